# SPDX-License-Identifier: GPL-2.0-or-later
"""The decision table: every row, and over all facts the rule behind the rows."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace
from typing import Any

import pytest

from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.facts import (
    ArbiterView,
    Ending,
    Facts,
    LinkView,
    OtherGuest,
    OwnGuest,
    other_guest,
)
from colo_xdp.failover.states import Role, State

CALM = Facts(
    role=Role.SECONDARY,
    state=State.PROTECTED,
    own_vm_alive=True,
    own_qmp=True,
    peer_connected=True,
    peer_silent_ms=5,
    heartbeat_timeout_ms=1000,
    dead_after_ms=5000,
    peer_vm_gone=False,
    colo_exit=False,
    automatic=False,
    operator=False,
)
ARBITERS = {f.name for f in fields(ArbiterView)}


def facts(**change: Any) -> Facts:
    """CALM with a change; what is the arbiter's by the names of its own fields."""
    its = {k: change.pop(k) for k in ARBITERS & set(change)}
    return replace(CALM, arbiter=replace(CALM.arbiter, **its), **change)


SILENT = {"peer_connected": False, "peer_silent_ms": 5000}
LONG = {"peer_connected": False, "peer_silent_ms": 5001}
DEAD = {**SILENT, "colo_exit": True}
ARMED = {"automatic": True, "fences": True}
P = {"role": Role.PRIMARY}
LEASE = {"automatic": True, "needs_grant": True, "name": "lease"}
HELD = {**LEASE, "granted": True, "recorded": True}

LINK = LinkView("peer link", 5, 5)
CUT = {**SILENT, "links": (LINK,)}  # datagrams arrive
LONG_CUT = {**CUT, "peer_silent_ms": 5001}
STOPPED = {**LONG, "ending": Ending.STOPPED}  # its controller, on purpose
NEW = {**P, "state": State.STARTING, "undecided": True}  # nothing was pinned
QUIET = {"links": (replace(LINK, silent_ms=5001),)}

ROWS = [
    ({}, Action.NONE, "both guests run"),
    ({"own_vm_alive": False}, Action.STOP, "QEMU of this host is gone"),
    ({"state": State.STARTING, **DEAD}, Action.NONE, "not protected yet"),
    ({"peer_vm_gone": True}, Action.TAKE_OVER, "data path is shut"),
    ({"peer_vm_gone": True, **P}, Action.GO_SOLO, "data path is shut"),
    ({"peer_vm_gone": True, "state": State.CHECKPOINTING}, Action.TAKE_OVER, "shut"),
    (SILENT, Action.DEGRADE, "slow or cut link"),
    ({**SILENT, **ARMED}, Action.DEGRADE, "slow or cut link"),
    ({**SILENT, "peer_connected": True}, Action.DEGRADE, "slow or cut link"),  # no FIN ever came
    ({**LONG, **ARMED}, Action.FENCE, "a dead host or a cut link"),
    ({**LONG, **ARMED, "fenced": True}, Action.TAKE_OVER, "has succeeded"),
    ({**LONG, **ARMED, "fenced": True, **P}, Action.GO_SOLO, "has succeeded"),
    ({**LONG, **ARMED, "fenced": False}, Action.DEGRADE, "may be alive"),
    (LONG, Action.DEGRADE, "slow or cut link"),
    ({**LONG, "automatic": True}, Action.DEGRADE, "slow or cut link"),
    ({**LONG, **ARMED, "state": State.PAUSED}, Action.DEGRADE, "paused"),
    ({**LONG, **ARMED, "shadow": True}, Action.DEGRADE, "an operator decides"),
    ({"peer_vm_gone": True, "shadow": True}, Action.DEGRADE, "an operator decides"),
    ({"peer_vm_gone": True, "shadow": True, "operator": True}, Action.TAKE_OVER, "data path"),
    ({"peer_vm_gone": True, "shadow": True, **P}, Action.GO_SOLO, "data path"),
    (DEAD, Action.DEGRADE, "automatic failover is off"),
    ({**DEAD, "automatic": True}, Action.DEGRADE, "automatic failover is off"),
    ({**DEAD, **ARMED}, Action.FENCE, "fencing it"),
    ({**DEAD, **ARMED, "fenced": True}, Action.TAKE_OVER, "fence command has succeeded"),
    ({**DEAD, **ARMED, "fenced": False}, Action.DEGRADE, "may be alive"),
    ({**DEAD, **ARMED, "fenced": True, **P}, Action.GO_SOLO, "succeeded"),
    ({**SILENT, **ARMED, **P, "checkpoint_overdue": True}, Action.FENCE, "fencing"),
    ({**DEAD, **ARMED, "state": State.PAUSED}, Action.DEGRADE, "paused"),
    ({"operator": True}, Action.TAKE_OVER, "operator"),
    ({"operator": True, **P}, Action.GO_SOLO, "operator"),
    ({"operator": True, "fences": True}, Action.FENCE, "fencing"),
    ({"operator": True, "fences": True, "fenced": False}, Action.DEGRADE, "failed"),
    ({"operator": True, "fences": True, "fenced": True}, Action.TAKE_OVER, "oper"),
    ({"state": State.DEGRADED, **P}, Action.REARM, "re-arms"),
    ({"state": State.DEGRADED}, Action.NONE, ""),
    ({"checkpoint_overdue": True, **P}, Action.ASK_SHUT, "demote itself"),
    ({"colo_exit": True, **P}, Action.ASK_SHUT, "demote itself"),
    ({"checkpoint_overdue": True, "own_qmp": False, **P}, Action.DEGRADE, "still answers"),
    ({"colo_exit": True}, Action.DEGRADE, "still answers"),
    ({**DEAD, **LEASE}, Action.ACQUIRE, "waiting for the lease"),
    ({**LONG, **LEASE, **P}, Action.ACQUIRE, "waiting for the lease"),
    ({**LONG, **LEASE, "granted": True}, Action.ACQUIRE, "waiting"),  # not recorded yet
    ({**LONG, **HELD}, Action.TAKE_OVER, "the lease is held"),
    ({**LONG, **HELD, **P}, Action.GO_SOLO, "the lease is held"),
    ({**SILENT, **LEASE}, Action.DEGRADE, "slow or cut link"),
    ({**LONG, **HELD, "peer_standalone": True}, Action.DEGRADE, "ran standalone"),
    ({**LEASE, **P, "peer_standalone": True}, Action.STOP, "state is outdated"),
    ({**LEASE, "operator": True}, Action.ACQUIRE, "operator"),
    ({**LEASE, "peer_vm_gone": True}, Action.ACQUIRE, "data path is shut"),
    ({**LEASE, "peer_vm_gone": True, **P}, Action.GO_SOLO, "data path is shut"),
    ({**LEASE, "requested": True}, Action.ACQUIRE, "is completed"),
    ({**LEASE, "may_transmit": False, **P}, Action.DEGRADE, "could not be renewed"),
    (
        CUT,
        Action.DEGRADE,
        "control channel is cut, but the peer lives: its heartbeats arrive over peer",
    ),
    (
        {**CUT, "links": (replace(LINK, echo_age_ms=1e9),)},
        Action.DEGRADE,
        "does not receive this side",
    ),
    ({**CUT, "peer_slow": True}, Action.DEGRADE, "slow, not dead"),
    ({**CUT, "ending": Ending.CLOSED}, Action.DEGRADE, "not on the control channel"),
    ({**CUT, **ARMED, "colo_exit": True}, Action.DEGRADE, "the peer lives"),
    ({**LONG_CUT, **ARMED}, Action.DEGRADE, "the peer lives"),
    ({**LONG_CUT, **ARMED, **P}, Action.DEGRADE, "the peer lives"),  # the guests agree
    ({**LONG_CUT, **HELD}, Action.DEGRADE, "the peer lives"),
    ({**CUT, **ARMED, **P, "waiting": True}, Action.DEGRADE, "the peer lives"),  # not yet
    ({**LONG_CUT, **ARMED, **P, "waiting": True}, Action.ASK_SHUT, "asked to demote itself over"),
    ({**LONG_CUT, **P, "waiting": True}, Action.DEGRADE, "the peer lives"),  # or paused
    ({**CUT, **P, "colo_exit": True}, Action.ASK_SHUT, "asked to demote itself over"),
    ({**CUT, **P, "checkpoint_overdue": True}, Action.ASK_SHUT, "asked to demote itself over"),
    ({**CUT, **P, "checkpoint_overdue": True, "own_qmp": False}, Action.DEGRADE, "lives"),
    (
        {**CUT, **ARMED, **P, "colo_exit": True, "peer_silent_ms": 10_001},
        Action.FENCE,
        "does not demote itself when asked: it receives nothing",
    ),
    (
        {**CUT, **P, "colo_exit": True, "peer_silent_ms": 10_001},
        Action.ASK_SHUT,
        "asked to demote itself over",
    ),
    ({**CUT, "peer_vm_gone": True}, Action.TAKE_OVER, "data path is shut"),
    ({**LONG, **QUIET, **ARMED}, Action.FENCE, "silent on all links (control channel, peer link)"),
    ({**LONG, **QUIET, **ARMED}, Action.FENCE, "cannot be told apart"),
    ({**DEAD, **QUIET, **ARMED}, Action.FENCE, "cannot be told apart"),
    ({**SILENT, **QUIET}, Action.DEGRADE, "cannot be told apart"),
    ({**SILENT, **QUIET, "ending": Ending.HUNG}, Action.DEGRADE, "the controller there hangs"),
    ({**SILENT, "ending": Ending.CLOSED}, Action.DEGRADE, "the controller there has ended"),
    ({**LONG, **ARMED, "ending": Ending.LOST}, Action.FENCE, "dead, or cut off"),
    ({"own_vm_alive": False, "own_vm_hangs": True}, Action.STOP, "hangs"),
    ({"peer_vm_gone": True, "peer_why": "its QEMU hangs"}, Action.TAKE_OVER, "its QEMU hangs"),
    ({"state": State.DEGRADED, "peer_slow": True, **P}, Action.REARM, "was slow"),
    # A controller that was stopped on purpose is no dead one, whatever the arbiter.
    ({**STOPPED, **ARMED}, Action.DEGRADE, "stopped on purpose"),
    ({**STOPPED, **ARMED, **P}, Action.DEGRADE, "what needs a checkpoint waits"),
    ({**STOPPED, **ARMED, **P, "waiting": True, "peer_silent_ms": 1e6}, Action.DEGRADE, "start it"),
    (STOPPED, Action.DEGRADE, "stopped on purpose"),
    ({**STOPPED, **QUIET, **ARMED}, Action.DEGRADE, "stopped on purpose"),
    ({**STOPPED, "state": State.PAUSED}, Action.DEGRADE, "paused"),
    ({**STOPPED, "peer_connected": True, "peer_silent_ms": 5}, Action.NONE, "both guests run"),
    # Signs of death of what it has left behind count as ever.
    ({**STOPPED, **ARMED, "colo_exit": True}, Action.FENCE, "was stopped on purpose before"),
    ({**STOPPED, **ARMED, **P, "checkpoint_overdue": True}, Action.FENCE, "fencing"),
    ({**STOPPED, "colo_exit": True}, Action.DEGRADE, "automatic failover is off"),
    ({**STOPPED, **ARMED, "colo_exit": True, "fenced": True}, Action.TAKE_OVER, "succeeded"),
    ({**STOPPED, "peer_vm_gone": True}, Action.TAKE_OVER, "data path is shut"),
    ({**STOPPED, "operator": True}, Action.TAKE_OVER, "operator"),
    ({**STOPPED, "operator": True, "fences": True}, Action.FENCE, "operator"),
    # With a lease nobody is fenced, and a primary without a controller is silent in any case.
    ({**STOPPED, **LEASE}, Action.ACQUIRE, "waiting for the lease"),
    ({**STOPPED, **HELD}, Action.TAKE_OVER, "was stopped on purpose before"),
    ({**STOPPED, **LEASE, **P}, Action.DEGRADE, "stopped on purpose"),
    ({**STOPPED, **LEASE, **P, "waiting": True}, Action.ACQUIRE, "waiting for the lease"),
    # A primary of which nothing is known.
    (NEW, Action.WAIT, "silent until the other host's controller reports"),
    ({**NEW, **LONG, **ARMED}, Action.WAIT, "silent until"),  # just booted: fences nobody
    ({**NEW, "other_guest": OtherGuest.IDLE}, Action.OPEN, "does not transmit"),
    (
        {**NEW, "other_guest": OtherGuest.TRANSMITTING},
        Action.STOP,
        "guest transmits: this one must not",
    ),
    ({**NEW, "other_guest": OtherGuest.COPY}, Action.WAIT, "until an operator chooses one"),
    (
        {**NEW, "other_guest": OtherGuest.COPY, "own_guest": OwnGuest.NEW},
        Action.WAIT,
        "has a copy of the pair's guest",
    ),
    (
        {**NEW, "other_guest": OtherGuest.COPY, "own_guest": OwnGuest.PAIRED},
        Action.OPEN,
        "this is the PVM of the pair",
    ),
    ({**NEW, "other_guest": OtherGuest.ENDED}, Action.WAIT, "guest here is a new one"),
    (
        {**NEW, "other_guest": OtherGuest.IDLE, "own_guest": OwnGuest.OUTDATED},
        Action.WAIT,
        "the disks here lack",
    ),
    (
        {
            **NEW,
            "other_guest": OtherGuest.IDLE,
            "own_guest": OwnGuest.OUTDATED,
            "peer_vm_gone": True,
        },
        Action.WAIT,
        "the disks here lack",
    ),
    (
        {
            **NEW,
            "other_guest": OtherGuest.ENDED,
            "own_guest": OwnGuest.OUTDATED,
            "left_standalone": True,
        },
        Action.WAIT,
        "the guests of both hosts ran standalone",
    ),
    (
        {**NEW, "other_guest": OtherGuest.IDLE, "left_standalone": True},
        Action.OPEN,
        "does not transmit",
    ),
    (
        {**NEW, "other_guest": OtherGuest.ENDED, "own_guest": OwnGuest.OUTDATED},
        Action.WAIT,
        "the disks here lack what it has written",
    ),
    (
        {**NEW, "other_guest": OtherGuest.ENDED, "own_guest": OwnGuest.OLD},
        Action.WAIT,
        "ran standalone and is gone",
    ),
    (
        {**NEW, "other_guest": OtherGuest.ENDED, "own_guest": OwnGuest.NEW},
        Action.OPEN,
        "this one is new",
    ),
    ({**NEW, "peer_vm_gone": True, "own_guest": OwnGuest.NEW}, Action.OPEN, "data path is shut"),
    ({**NEW, "peer_vm_gone": True}, Action.WAIT, "silent until"),
    ({**NEW, "operator": True}, Action.GO_SOLO, "operator"),
    ({**NEW, "operator": True, "fences": True}, Action.FENCE, "fencing"),
    (
        {**NEW, "operator": True, "fences": True, "fenced": False},
        Action.DEGRADE,
        "failed",
    ),
    (
        {**NEW, "operator": True, "fences": True, "fenced": True},
        Action.GO_SOLO,
        "operator",
    ),
    (
        {**NEW, "operator": True, "fences": True, "other_guest": OtherGuest.COPY},
        Action.ASK_SHUT,
        "asked to demote itself first",
    ),
    ({**NEW, "own_vm_alive": False}, Action.STOP, "is gone"),
    # A guest that ran standalone and has lost its QEMU does not transmit any more.
    ({"state": State.SOLO, "own_vm_alive": False, **P}, Action.STOP, "no guest is active now"),
    ({"state": State.PROMOTED, "own_vm_alive": False}, Action.STOP, "no guest is active now"),
    ({"state": State.SOLO, **DEAD, **P}, Action.NONE, "already decided"),
    ({"state": State.PROMOTED, "operator": True}, Action.NONE, "already decided"),
    ({"state": State.STOPPED, "own_vm_alive": False}, Action.NONE, "already decided"),
]


@pytest.mark.parametrize(("change", "action", "words"), ROWS)
def test_rows(change: dict[str, Any], action: Action, words: str) -> None:
    d = decide(facts(**change))
    assert d.action is action
    assert words in d.why
    assert d.why


def test_nobody_runs_standalone_on_a_timer() -> None:
    """Over all facts: TAKE_OVER and GO_SOLO need an attestation, a fence or a person."""
    bools = (False, True)
    for (
        role,
        state,
        own,
        qmp,
        conn,
        silent,
        gone,
        colo,
        auto,
        fence,
        result,
        op,
        late,
    ) in itertools.product(
        Role,
        State,
        bools,
        bools,
        bools,
        (5.0, 5000.0),
        bools,
        bools,
        bools,
        bools,
        (None, False, True),
        bools,
        bools,
    ):
        f = Facts(
            role, state, own, qmp, conn, silent, 1000, gone, colo, auto, op, late,
            arbiter=ArbiterView(fences=fence, fenced=result),
        )  # fmt: skip
        a = decide(f).action
        if a in (Action.TAKE_OVER, Action.GO_SOLO):
            assert own
            assert gone or op or (fence and result is True), f
            assert not (op and fence and result is not True and not gone), f
            assert state not in (State.SOLO, State.PROMOTED, State.STOPPED, State.STARTING)
        if a is Action.FENCE:
            assert fence and result is None and (op or auto)
        if a in (Action.REARM, Action.ASK_SHUT):
            assert role is Role.PRIMARY and conn
        if a is Action.ASK_SHUT:
            assert qmp, "a host that does not know whether its guest lives asks nobody to be silent"


def test_a_guest_of_which_nothing_is_known_transmits_only_when_allowed() -> None:
    """Over all facts: the other host's, or a person's. No time, no sign of death and no fence."""
    bools = (False, True)
    for conn, silent, gone, colo, auto, fence, result, op in itertools.product(
        bools, (5.0, 1e9), bools, bools, bools, bools, (None, False, True), bools
    ):
        for other, own, late in itertools.product(OtherGuest, OwnGuest, bools):
            f = facts(
                role=Role.PRIMARY, state=State.STARTING, undecided=True, peer_connected=conn,
                peer_silent_ms=silent, peer_vm_gone=gone, colo_exit=colo, automatic=auto,
                fences=fence, fenced=result, operator=op, other_guest=other,
                own_guest=own, checkpoint_overdue=late,
            )  # fmt: skip
            a = decide(f).action
            if a is Action.OPEN:
                assert other is not OtherGuest.TRANSMITTING
                assert own is not OwnGuest.OUTDATED, "whatever the other host says"
                assert gone or other is not OtherGuest.UNKNOWN
                assert other is not OtherGuest.COPY or own is OwnGuest.PAIRED or gone
            if a is Action.GO_SOLO:
                assert op and (not fence or result is True)
            if a is Action.FENCE:
                assert op and fence
            assert a in (
                Action.OPEN, Action.WAIT, Action.STOP, Action.GO_SOLO, Action.FENCE,
                Action.DEGRADE, Action.ASK_SHUT,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("role", "state", "alone", "shut", "what"),
    [
        ("secondary", "starting", False, False, OtherGuest.IDLE),
        ("secondary", "stopped", False, True, OtherGuest.IDLE),  # stood down
        ("secondary", "protected", False, False, OtherGuest.COPY),
        ("secondary", "degraded", False, False, OtherGuest.COPY),
        ("secondary", "promoted", True, False, OtherGuest.TRANSMITTING),
        ("secondary", "stopped", True, True, OtherGuest.ENDED),
        ("primary", "solo", True, False, OtherGuest.TRANSMITTING),
        ("primary", "protected", False, False, OtherGuest.TRANSMITTING),
        ("primary", "starting", True, False, OtherGuest.TRANSMITTING),
        ("primary", "starting", False, False, OtherGuest.UNKNOWN),  # as undecided as this one
        ("primary", "stopped", True, True, OtherGuest.ENDED),
    ],
)
def test_what_a_heartbeat_says_of_the_other_guest(
    role: str, state: str, alone: bool, shut: bool, what: OtherGuest
) -> None:
    assert other_guest(role, state, standalone=alone, shut=shut) is what


def test_nobody_runs_standalone_without_the_lease() -> None:
    """Over all facts, a person's wish included; but for a primary whose peer has shut itself."""
    bools = (False, True)
    for role, state, conn, silent, gone, colo, op, late in itertools.product(
        Role, State, bools, (5.0, 20_000.0), bools, bools, bools, bools
    ):
        for held, may, other, recorded, committed in itertools.product(bools, repeat=5):
            f = facts(
                role=role, state=state, peer_connected=conn, peer_silent_ms=silent,
                peer_vm_gone=gone, colo_exit=colo, operator=op, checkpoint_overdue=late,
                automatic=True, needs_grant=True, granted=held, may_transmit=may,
                peer_standalone=other, recorded=recorded, requested=committed,
            )  # fmt: skip
            a = decide(f).action
            assert a is not Action.FENCE
            if a is Action.TAKE_OVER or (a is Action.GO_SOLO and not gone):
                assert held and recorded and not other, f
            if a is Action.REARM:
                assert may, f
