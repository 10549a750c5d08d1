# SPDX-License-Identifier: GPL-2.0-or-later
"""Which state may follow which, as data. Pure.

become() (controller/host.py) looks each transition up. One that is not here is an internal error:
it is logged and counted among the `failures` of the status, and carried out all the same. The state
tells people and the decision what the data path already does: a controller that refused it, or
ended itself over it, would go on believing something that is not so, or leave a guest silent by
surprise. Tests and the simulator set STRICT, where it raises.

diagram() draws what the table says. `paused` and `shadow` are no states of a controller: they are
how `protected` is shown to people (Node.shown_state).
"""

from __future__ import annotations

from collections.abc import Mapping

from ..abi import Mode
from .decision import Role, State

STRICT = False  # raise IllegalTransition


class IllegalTransition(RuntimeError):
    """A state was to follow one that it cannot follow; says which."""


_S = State

TRANSITIONS: Mapping[Role, Mapping[State, frozenset[State]]] = {
    Role.PRIMARY: {
        # solo: undecided, and a person opens it; degraded: what was decided while the first
        # checkpoint ran is carried out when the entry has failed
        _S.STARTING: frozenset({_S.CHECKPOINTING, _S.DEGRADED, _S.SOLO, _S.STOPPED}),
        _S.PROTECTED: frozenset({_S.CHECKPOINTING, _S.DEGRADED, _S.SOLO, _S.STOPPED}),
        # starting: COLO was not entered
        _S.CHECKPOINTING: frozenset({_S.PROTECTED, _S.DEGRADED, _S.STARTING, _S.SOLO, _S.STOPPED}),
        # protected: suspicion does not end the checkpoint under way
        _S.DEGRADED: frozenset({_S.CHECKPOINTING, _S.PROTECTED, _S.STARTING, _S.SOLO, _S.STOPPED}),
        # starting: a new secondary waits
        _S.SOLO: frozenset({_S.STARTING, _S.STOPPED}),
        # the next guest of this host is a secondary, with a controller of its own
        _S.STOPPED: frozenset(),
    },
    Role.SECONDARY: {
        # degraded: a takeover that was decided upon before the QEMU was another one
        _S.STARTING: frozenset({_S.PROTECTED, _S.DEGRADED, _S.STOPPED}),
        # starting, from here and the next two: another QEMU waits, before the old one was missed
        _S.PROTECTED: frozenset(
            {_S.CHECKPOINTING, _S.DEGRADED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        _S.CHECKPOINTING: frozenset(
            {_S.PROTECTED, _S.DEGRADED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        _S.DEGRADED: frozenset(
            {_S.CHECKPOINTING, _S.PROTECTED, _S.STARTING, _S.PROMOTED, _S.STOPPED}
        ),
        # then the next controller of this host is a primary's
        _S.PROMOTED: frozenset({_S.STOPPED}),
        # degraded: whoever asked this guest to be silent is gone, and has never spoken alone
        _S.STOPPED: frozenset({_S.STARTING, _S.DEGRADED}),
    },
}


def legal(role: Role, old: State, new: State) -> bool:
    """Whether `new` may follow `old`; a state may always follow itself, for another reason."""
    return old is new or new in TRANSITIONS[role].get(old, frozenset())


def diagram(role: Role) -> str:
    """The transitions of one role as a Mermaid state diagram."""
    lines = ["stateDiagram-v2", f"    [*] --> {_name(State.STARTING)}"]
    for old, following in TRANSITIONS[role].items():
        lines += [f"    {_name(old)} --> {_name(new)}" for new in State if new in following]
    return "\n".join(lines) + "\n"


def _name(state: State) -> str:
    """Mermaid takes `-` for a part of an arrow."""
    return state.value.replace("-", "_")


def sends_nothing(role: Role, mode: Mode) -> bool:
    """Whether the data path keeps this host's guest from the network, whatever it says."""
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
