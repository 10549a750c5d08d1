# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP connection states as data: one table for the kernel and for the model.

States are those of RFC 9293 section 3.3.2 as the *guest* sees them. An event is a segment of one
side, named by what it means to the connection (`EV_CLIENT_FIN_ACK`: the client's FIN, which also
acks the guest's). `TABLE[s]` lists only the events that leave state `s`; any other event leaves it
as it is.

The table decides how long a connection is remembered (`conntrack/timeouts.py`) and nothing else:
which segments teach an offset is in `conntrack/rewriter.py`. It is therefore lenient. A segment
that was seen is no proof that the guest accepted it, so where the two could differ, the table
follows what the guest sends next: after an RST that the guest ignored, its next segment makes the
connection established again.

The kernel walks the same table: the controller writes `transition_table()` into the map
`transitions`, at index `state * len(Event) + event`.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from types import MappingProxyType


class TcpState(IntEnum):
    """enum colo_tcp_state."""

    CLOSED = 0
    LISTEN = 1
    SYN_SENT = 2
    SYN_RECEIVED = 3
    ESTABLISHED = 4
    FIN_WAIT_1 = 5
    FIN_WAIT_2 = 6
    CLOSE_WAIT = 7
    CLOSING = 8
    LAST_ACK = 9
    TIME_WAIT = 10


class Event(IntEnum):
    """enum colo_tcp_event."""

    CLIENT_SYN = 0
    CLIENT_SYNACK = 1
    CLIENT_ACK = 2
    CLIENT_FIN = 3
    CLIENT_FIN_ACK = 4
    CLIENT_ACK_FIN = 5
    CLIENT_RST = 6
    GUEST_SYN = 7
    GUEST_SYNACK = 8
    GUEST_DATA = 9
    GUEST_FIN = 10
    GUEST_RST = 11


_S, _E = TcpState, Event

#: An entry begins in CLOSED with a SYN or SYN-ACK. A client's SYN alone shows nothing about the
#: guest: any host may send it, to any port, so the guest is at most in LISTEN until it answers.
_FROM_CLOSED = {
    _E.CLIENT_SYN: _S.LISTEN,
    _E.GUEST_SYN: _S.SYN_SENT,
    _E.GUEST_SYNACK: _S.SYN_RECEIVED,  # its SYN was seen before the checkpoint
    _E.GUEST_DATA: _S.ESTABLISHED,  # the guest did not accept the RST
    _E.GUEST_FIN: _S.FIN_WAIT_1,
}

_RESET = {_E.CLIENT_RST: _S.CLOSED, _E.GUEST_RST: _S.CLOSED}

TABLE: Mapping[TcpState, Mapping[Event, TcpState]] = MappingProxyType(
    {
        _S.CLOSED: _FROM_CLOSED,
        _S.LISTEN: {
            **_RESET,
            _E.GUEST_SYN: _S.SYN_RECEIVED,  # simultaneous open
            _E.GUEST_SYNACK: _S.SYN_RECEIVED,
            _E.GUEST_DATA: _S.ESTABLISHED,
            _E.GUEST_FIN: _S.FIN_WAIT_1,
        },
        _S.SYN_SENT: {
            **_RESET,
            _E.CLIENT_SYN: _S.SYN_RECEIVED,  # simultaneous open
            _E.CLIENT_SYNACK: _S.ESTABLISHED,
            _E.GUEST_SYNACK: _S.SYN_RECEIVED,
            _E.GUEST_DATA: _S.ESTABLISHED,
            _E.GUEST_FIN: _S.FIN_WAIT_1,
        },
        _S.SYN_RECEIVED: {
            **_RESET,
            _E.CLIENT_SYNACK: _S.ESTABLISHED,  # simultaneous open
            _E.CLIENT_ACK: _S.ESTABLISHED,
            _E.CLIENT_FIN: _S.CLOSE_WAIT,
            _E.GUEST_FIN: _S.FIN_WAIT_1,
        },
        _S.ESTABLISHED: {
            **_RESET,
            _E.CLIENT_FIN: _S.CLOSE_WAIT,
            _E.GUEST_FIN: _S.FIN_WAIT_1,
        },
        _S.FIN_WAIT_1: {
            **_RESET,
            _E.CLIENT_ACK_FIN: _S.FIN_WAIT_2,
            _E.CLIENT_FIN: _S.CLOSING,
            _E.CLIENT_FIN_ACK: _S.TIME_WAIT,
        },
        _S.FIN_WAIT_2: {
            **_RESET,
            _E.CLIENT_FIN: _S.TIME_WAIT,
            _E.CLIENT_FIN_ACK: _S.TIME_WAIT,
        },
        _S.CLOSE_WAIT: {
            **_RESET,
            _E.GUEST_FIN: _S.LAST_ACK,
            # The FINs crossed on two CPUs and one update was lost (bpf/lib/conntrack.h, Races).
            _E.CLIENT_ACK_FIN: _S.CLOSED,
            _E.CLIENT_FIN_ACK: _S.CLOSED,
        },
        _S.CLOSING: {
            **_RESET,
            _E.CLIENT_ACK_FIN: _S.TIME_WAIT,
            _E.CLIENT_FIN_ACK: _S.TIME_WAIT,
        },
        _S.LAST_ACK: {
            **_RESET,
            _E.CLIENT_ACK_FIN: _S.CLOSED,
            _E.CLIENT_FIN_ACK: _S.CLOSED,
        },
        # RFC 1337: a client's RST does not shorten the wait.
        _S.TIME_WAIT: {_E.GUEST_RST: _S.CLOSED},
    }
)


def next_state(state: int, event: int) -> int:
    """Return the state after `event`."""
    return TABLE[TcpState(state)].get(Event(event), TcpState(state))


def transition_table() -> list[int]:
    """Return the table as the map `transitions` holds it."""
    return [int(next_state(s, e)) for s in TcpState for e in Event]
