# SPDX-License-Identifier: GPL-2.0-or-later
"""The roles, the states of a pair, and which state may follow which, as data. Pure.

become() (controller/controller.py) looks each transition up. A transition that is not listed is an
internal error: it is logged, counted among the `failures` of the status, and carried out all the
same. The state informs people and the decision of what the data path already does; a controller
that refused the transition, or exited because of it, would hold a wrong belief or leave a guest
silent unexpectedly. Tests and the simulator set STRICT, which makes it raise.

diagram() draws the table. `paused` and `shadow` are not states of a controller: they are how
`protected` is displayed (Controller.shown_state).
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from ..abi import Mode

STRICT = False  # raise IllegalTransition instead of only logging


class IllegalTransition(RuntimeError):
    """A state was about to follow one that it cannot follow; the text names both."""


class Role(StrEnum):
    """The guest that this host runs."""

    PRIMARY = "primary"
    SECONDARY = "secondary"


class State(StrEnum):
    """State of the pair as this host sees it; TRANSITIONS has the legal ones."""

    STARTING = "starting"
    PROTECTED = "protected"
    CHECKPOINTING = "checkpointing"
    DEGRADED = "degraded"
    SOLO = "solo"
    PROMOTED = "promoted"
    PAUSED = "paused"
    SHADOW = "shadow"  # compared, but nothing is held
    STOPPED = "stopped"


_S = State

TRANSITIONS: Mapping[Role, Mapping[State, frozenset[State]]] = {
    Role.PRIMARY: {
        # solo: undecided, and an operator opens it; degraded: what was decided during the first
        # checkpoint is carried out after the entry into COLO has failed
        _S.STARTING: frozenset({_S.CHECKPOINTING, _S.DEGRADED, _S.SOLO, _S.STOPPED}),
        _S.PROTECTED: frozenset({_S.CHECKPOINTING, _S.DEGRADED, _S.SOLO, _S.STOPPED}),
        # starting: COLO was not entered
        _S.CHECKPOINTING: frozenset({_S.PROTECTED, _S.DEGRADED, _S.STARTING, _S.SOLO, _S.STOPPED}),
        # protected: suspicion does not end the checkpoint in progress
        _S.DEGRADED: frozenset({_S.CHECKPOINTING, _S.PROTECTED, _S.STARTING, _S.SOLO, _S.STOPPED}),
        # starting: a new secondary is waiting
        _S.SOLO: frozenset({_S.STARTING, _S.STOPPED}),
        # this host's next guest is a secondary, with a controller of its own
        _S.STOPPED: frozenset(),
    },
    Role.SECONDARY: {
        # degraded: a takeover was decided before QEMU was replaced
        _S.STARTING: frozenset({_S.PROTECTED, _S.DEGRADED, _S.STOPPED}),
        # starting, here and in the next two: a new QEMU is waiting, and the old one's end was not
        # noticed
        _S.PROTECTED: frozenset(
            {_S.CHECKPOINTING, _S.DEGRADED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        _S.CHECKPOINTING: frozenset(
            {_S.PROTECTED, _S.DEGRADED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        _S.DEGRADED: frozenset(
            {_S.CHECKPOINTING, _S.PROTECTED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        # after that, this host's next controller is a primary's
        _S.PROMOTED: frozenset({_S.STOPPED}),
        # degraded: the peer that demoted this guest is gone and never ran standalone
        _S.STOPPED: frozenset({_S.STARTING, _S.DEGRADED}),
    },
}


def legal(role: Role, old: State, new: State) -> bool:
    """Return whether `new` may follow `old`; a state may follow itself, for another reason."""
    return old is new or new in TRANSITIONS[role].get(old, frozenset())


def diagram(role: Role) -> str:
    """Return the transitions of one role as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {_name(State.STARTING)}"]
    for old, following in TRANSITIONS[role].items():
        lines += [f"    {_name(old)} --> {_name(new)}" for new in State if new in following]
    return "\n".join(lines) + "\n"


def _name(state: State) -> str:
    """Replace `-`, which Mermaid parses as part of an arrow."""
    return state.value.replace("-", "_")


def sends_nothing(role: Role, mode: Mode) -> bool:
    """Return whether the data path keeps all of this host's guest's output off the network."""
    return mode is Mode.DROP or (role is Role.SECONDARY and mode is not Mode.TAKEOVER)


#: state -> what it means to an operator
MEANINGS: Mapping[State, str] = {
    State.STARTING: "not protected yet: the controller waits for QEMU, for the other host, for the "
    "right to transmit, or for the first checkpoint",
    State.PROTECTED: "both guests run and are compared; either host may fail",
    State.CHECKPOINTING: "a checkpoint is in progress; the pair is protected",
    State.DEGRADED: "protection is impaired: the peer is suspected, a device or link is missing, "
    "or a checkpoint failed; output that needs the other guest waits, and the reason says what for",
    State.SOLO: "the PVM runs alone, because the secondary is lost or was demoted",
    State.PROMOTED: "the SVM has taken over and runs alone",
    State.PAUSED: "protected, but a failover needs an operator (`colo-xdp mode paused`)",
    State.SHADOW: "the guests are compared, but nothing is held and nothing is protected "
    "(`colo-xdp mode shadow`)",
    State.STOPPED: "this host's guest does not transmit any more: its QEMU is gone, or it was "
    "demoted because the other guest transmits",
}
