# SPDX-License-Identifier: GPL-2.0-or-later
"""What the other host's death would lead to now: the answer is the decision's own."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import inf

import pytest

from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.facts import ArbiterView, Ending, Facts, LinkView, OtherGuest
from colo_xdp.failover.prospect import Need, Outcome, prospect
from colo_xdp.failover.states import Role, State

FENCE = ArbiterView(fences=True)
LEASE = ArbiterView(name="lease", needs_grant=True, granted=True, recorded=False)
P, S = Role.PRIMARY, Role.SECONDARY


def facts(role: Role, state: State = State.PROTECTED, **more: object) -> Facts:
    f = Facts(
        role=role,
        state=state,
        own_vm_alive=True,
        own_qmp=True,
        peer_connected=True,
        peer_silent_ms=20,
        heartbeat_timeout_ms=1000,
        dead_after_ms=10_000 if role is S else 5000,
        peer_vm_gone=False,
        colo_exit=False,
        automatic=True,
        operator=False,
        arbiter=FENCE,
        other_guest=OtherGuest.TRANSMITTING if role is S else OtherGuest.COPY,
    )
    return replace(f, **more)  # type: ignore[arg-type]


ROWS: tuple[tuple[Facts, bool, Outcome, tuple[Need, ...], str], ...] = (
    (facts(S), False, Outcome.TAKES_OVER, (Need.FENCE,),
     "the guest here would take over within 10 s, once the fence command has succeeded"),
    (facts(P), True, Outcome.GOES_SOLO, (Need.FENCE,),
     "the guest here would go on alone within 5 s, once the fence command has succeeded"),
    (facts(S, State.CHECKPOINTING), False, Outcome.TAKES_OVER, (Need.FENCE,), "would take over"),
    (facts(S, State.DEGRADED), False, Outcome.TAKES_OVER, (Need.FENCE,), "would take over"),
    (facts(S, arbiter=LEASE), False, Outcome.TAKES_OVER, (Need.LEASE,),
     "within 10 s, once this host has the lease"),
    (facts(P, arbiter=LEASE), True, Outcome.GOES_SOLO, (Need.LEASE,),
     "once this host has the lease"),
    (facts(S, peer_vm_gone=True), False, Outcome.TAKES_OVER, (), "the guest here would take over"),
    # an operator
    (facts(S, automatic=False), False, Outcome.OPERATOR, (),
     'no answer until an operator decides; the status would say "the peer looks dead; automatic'),
    (facts(P, automatic=False), True, Outcome.OPERATOR, (),
     "what needs the other guest would wait until an operator decides"),
    (facts(S, arbiter=ArbiterView()), False, Outcome.OPERATOR, (), "until an operator decides"),
    (facts(S, State.PAUSED, automatic=False), False, Outcome.OPERATOR, (), "the pair is paused"),
    (facts(S, State.SHADOW, shadow=True), False, Outcome.OPERATOR, (), "shadow mode"),
    (facts(S, disk_unproven=True), False, Outcome.OPERATOR, (), "disks here have all"),
    (facts(S, arbiter=replace(LEASE, peer_standalone=True)), False, Outcome.OPERATOR, (),
     "records that its guest ran standalone"),
    (facts(P, State.STARTING, undecided=True), False, Outcome.OPERATOR, (),
     "does not know what happened before"),
    # nothing changes, or nobody is left
    (facts(P, State.SOLO), True, Outcome.UNCHANGED, (), "nothing: the guest here serves"),
    (facts(S, State.PROMOTED), True, Outcome.UNCHANGED, (), "nothing: the guest here serves"),
    (facts(P, State.STARTING), True, Outcome.UNCHANGED, (), "nothing: the guest here serves"),
    (facts(S, State.STARTING), False, Outcome.LOST, (), "is not a copy yet"),
    (facts(P, State.STOPPED), False, Outcome.LOST, (), "the one here does not transmit"),
    (facts(S, State.STOPPED), False, Outcome.LOST, (), "the one here does not transmit"),
    (facts(P, State.SOLO), False, Outcome.LOST, (), "the one here does not transmit"),
    (facts(S, own_vm_alive=False), False, Outcome.LOST, (), "the QEMU of this host is gone"),
    (facts(P, arbiter=replace(LEASE, peer_standalone=True)), True, Outcome.LOST, (), "outdated"),
)  # fmt: skip


@pytest.mark.parametrize(("f", "transmits", "outcome", "needs", "says"), ROWS)
def test_the_prospect(
    f: Facts, transmits: bool, outcome: Outcome, needs: tuple[Need, ...], says: str
) -> None:
    p = prospect(f, transmits=transmits)
    assert (p.outcome, p.needs) == (outcome, needs), p.sentence
    assert says in p.sentence
    assert (p.within_s is not None) == (outcome in (Outcome.TAKES_OVER, Outcome.GOES_SOLO))


def test_an_arbiter_that_does_not_answer_now_is_waited_for() -> None:
    p = prospect(facts(S, arbiter=LEASE), transmits=False, trouble="etcd: no route to host")
    assert p.outcome is Outcome.WAITS and "etcd: no route to host" in p.sentence
    sure = prospect(facts(S, peer_vm_gone=True), transmits=False, trouble="etcd")
    assert sure.outcome is Outcome.TAKES_OVER, "what needs no arbiter does not ask it"


STATES = [(r, s) for r in Role for s in State]
KINDS = (FENCE, LEASE, ArbiterView(), replace(LEASE, peer_standalone=True))


@pytest.mark.parametrize(("role", "state"), STATES)
def test_it_is_what_the_decision_does_when_the_host_has_died(role: Role, state: State) -> None:
    """Played through as the controllers do it: silence first, then the arbiter's answer."""
    for arbiter, automatic, shadow, unproven, colo_exit in product(
        KINDS, (True, False), (True, False), (True, False), (True, False)
    ):
        live = facts(
            role,
            state,
            arbiter=arbiter,
            automatic=automatic,
            shadow=shadow,
            disk_unproven=unproven,
            links=(LinkView("peer link", 20, 20),),
        )
        dead = replace(
            live,
            peer_connected=False,
            peer_silent_ms=60_000,
            links=(LinkView("peer link", 60_000, 60_000),),
            ending=Ending.LOST,
            other_guest=OtherGuest.UNKNOWN,
            colo_exit=colo_exit,  # QEMU may notice it, or not
        )
        action = decide(dead).action
        while action in (Action.FENCE, Action.ACQUIRE):
            done = {"fenced": True} if action is Action.FENCE else {"recorded": True}
            dead = replace(dead, arbiter=replace(dead.arbiter, granted=True, **done))
            action = decide(dead).action
        p = prospect(live, transmits=True)
        got = {
            Action.TAKE_OVER: Outcome.TAKES_OVER,
            Action.GO_SOLO: Outcome.GOES_SOLO,
            Action.DEGRADE: Outcome.OPERATOR,
            Action.STOP: Outcome.LOST,
            Action.NONE: Outcome.UNCHANGED,
        }[action]
        assert p.outcome is got, (live, p)


def test_what_happens_to_be_known_of_the_live_peer_does_not_count() -> None:
    """An operator's order, or a former fence, is not about this death."""
    f = facts(S, operator=True, arbiter=replace(FENCE, fenced=False), peer_slow=True)
    assert prospect(f, transmits=False) == prospect(facts(S), transmits=False)
    assert prospect(facts(S, dead_after_ms=inf), transmits=False).within_s is None
