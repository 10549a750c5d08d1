# SPDX-License-Identifier: GPL-2.0-or-later
"""What would happen now if the other host died: the decision itself, asked beforehand. Pure.

prospect() replaces what this host would then know of its peer, lets decide()
(failover/decision.py) answer, and assumes that the fence command succeeds and that a lease is
granted. So the answer changes with the decision's table and cannot contradict it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import inf, isfinite

from .decision import Action, decide
from .facts import Ending, Facts, OtherGuest
from .states import Role, State


class Outcome(StrEnum):
    """What the clients would get."""

    UNCHANGED = "unchanged"  # this host's guest serves without the other one already
    TAKES_OVER = "takes_over"  # the SVM here takes over
    GOES_SOLO = "goes_solo"  # the PVM here goes on alone
    OPERATOR = "operator"  # nothing happens until an operator decides
    WAITS = "waits"  # nothing happens until the arbiter, or the QEMU here, can be asked
    LOST = "lost"  # no guest would serve


class Need(StrEnum):
    """What has to succeed first."""

    FENCE = "fence"
    LEASE = "lease"


@dataclass(frozen=True, slots=True)
class Prospect:
    """The outcome, what it needs, its longest delay (s; None: unknown), and one sentence."""

    outcome: Outcome
    needs: tuple[Need, ...]
    within_s: float | None
    sentence: str


_OVER = {
    Action.TAKE_OVER: Outcome.TAKES_OVER,
    Action.GO_SOLO: Outcome.GOES_SOLO,
    Action.OPEN: Outcome.GOES_SOLO,
}
_DOES = {
    Outcome.TAKES_OVER: "the guest here would take over",
    Outcome.GOES_SOLO: "the guest here would go on alone",
}
_NEEDS = {
    Need.FENCE: "once the fence command has succeeded",
    Need.LEASE: "once this host has the lease",
}


def _bereaved(f: Facts) -> Facts:
    """Return what this host would know after a long silence of a dead peer."""
    primary = f.role is Role.PRIMARY
    return replace(
        f,
        peer_connected=False,
        peer_silent_ms=inf,
        links=(),  # as silent as the control channel: nothing for the sentence to name
        ending=Ending.UNKNOWN,
        other_guest=OtherGuest.UNKNOWN,
        peer_slow=False,
        operator=False,
        colo_exit=True,
        checkpoint_overdue=f.checkpoint_overdue or primary,
        waiting=f.waiting or primary,
        arbiter=replace(f.arbiter, fenced=None, granted=False, recorded=False),
    )


def prospect(f: Facts, *, transmits: bool, trouble: str = "", qemu_trouble: str = "") -> Prospect:
    """Return what the other host's death would lead to now.

    transmits: whether the network receives this host's guest; trouble: why the arbiter cannot be
    asked now; qemu_trouble: why the QEMU here cannot.
    """
    facts, needs = _bereaved(f), list[Need]()
    d = decide(facts)
    if d.action is Action.FENCE:
        needs.append(Need.FENCE)
        facts = replace(facts, arbiter=replace(facts.arbiter, fenced=True))
        d = decide(facts)
    if d.action is Action.ACQUIRE:
        needs.append(Need.LEASE)
        has = replace(facts.arbiter, granted=True, recorded=True, may_transmit=True)
        d = decide(replace(facts, arbiter=has))
    within = f.dead_after_ms / 1000 if isfinite(f.dead_after_ms) else None
    if d.action in _OVER:
        outcome = _OVER[d.action]
        if needs and trouble:
            text = f"{_DOES[outcome]}, but the arbiter does not answer now ({trouble})"
            return Prospect(Outcome.WAITS, tuple(needs), None, text)
        if qemu_trouble and outcome is Outcome.TAKES_OVER:  # a PVM runs on without a command
            text = f"{_DOES[outcome]} once its QEMU carries out commands again ({qemu_trouble})"
            return Prospect(Outcome.WAITS, tuple(needs), None, text)
        late = "" if within is None or f.peer_vm_gone else f" within {within:g} s"
        steps = "".join(f", {_NEEDS[n]}" for n in needs)
        return Prospect(outcome, tuple(needs), within, f"{_DOES[outcome]}{late}{steps}")
    if d.action in (Action.DEGRADE, Action.WAIT):
        wait = (
            "what needs the other guest would wait"
            if f.role is Role.PRIMARY and transmits
            else "clients would get no answer"
        )
        text = f'{wait} until an operator decides; the status would say "{d.why}"'
        return Prospect(Outcome.OPERATOR, tuple(needs), None, text)
    if d.action is Action.STOP or not transmits:
        return Prospect(Outcome.LOST, (), None, _lost(f, d.why if d.action is Action.STOP else ""))
    return Prospect(Outcome.UNCHANGED, (), None, "nothing: the guest here serves without it")


def _lost(f: Facts, why: str) -> str:
    if why:
        return f"no guest would serve: {why}"
    if f.state is State.STARTING:
        return "no guest would serve: the one here is not a copy yet"
    return "no guest would serve: the one here does not transmit"
