# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the rewriter remembers a connection that is silent, by its TCP state."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .tcp_state import TcpState

#: Seconds without a segment after which a connection is forgotten. Too early breaks it after a
#: failover, too late costs a slot: where the ends may rightly be silent, the numbers are large.
TIMEOUTS: Mapping[TcpState, int] = MappingProxyType(
    {
        TcpState.CLOSED: 10,  # segments still under way
        TcpState.LISTEN: 10,  # the guest has not answered: its SYN-ACK would begin the entry anew
        TcpState.SYN_SENT: 130,  # Linux: tcp_syn_retries 6, 127 s
        TcpState.SYN_RECEIVED: 70,  # Linux: tcp_synack_retries 5, 63 s
        TcpState.ESTABLISHED: 432_000,  # nf_conntrack's 5 days
        TcpState.FIN_WAIT_1: 1_000,  # Linux: tcp_retries2 15, 924 s
        TcpState.FIN_WAIT_2: 7_440,  # RFC 5382 REQ-5: the client's half may continue
        TcpState.CLOSE_WAIT: 432_000,  # the guest's half may continue
        TcpState.CLOSING: 1_000,
        TcpState.LAST_ACK: 1_000,
        TcpState.TIME_WAIT: 120,  # twice Linux's 60 s
    }
)


def timeout(state: int) -> int:
    """Return the seconds of silence after which a connection in `state` is forgotten."""
    try:
        return TIMEOUTS[TcpState(state)]
    except ValueError:  # a torn value, or one of another version: not worth keeping
        return TIMEOUTS[TcpState.CLOSED]
