# SPDX-License-Identifier: GPL-2.0-or-later
"""What the fast path and the slow path exchange about a flow, whatever its kind: sans-IO.

compare/offload_port.py is what a flow keeps for it. offload/tcp.py knows how a TCP stream goes to
the kernel and comes back, offload/udp.py a flow of UDP datagrams; offload/scheduler.py knows when;
datapath/offload_maps.py is the kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from .. import abi
from ..net.flow_key import UDP, FlowKey, unmirrored_key
from ..net.seqnum import MASK

_DIRECTIONS = ("", "in", "out")
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 2.5.5.2


@dataclass(frozen=True, slots=True)
class ConnState:
    """struct colo_conn, and the bytes outstanding. Windows are fields, not scaled."""

    owner: int
    epoch: int
    released: int
    punt_seq: int
    p_ack: int
    s_ack: int
    adv_ack: int
    p_win: int
    s_win: int
    adv_win: int
    mss: int
    pvm_ahead: bool
    pending: bool
    header: bytes  # of the PVM, Ethernet to TCP options; empty: none was needed
    l4: int
    since_ns: int
    seen_ns: int
    cookie: bytes  # user space's: byte 1 is the direction
    buffer: bytes  # from released on, of whoever is leader: bytes, or records of datagrams
    history: bytes  # up to released
    fin: int | None = (
        None  # place of the FIN that was sent: released - 1, or the last one outstanding
    )


class OffloadResult(Enum):
    """Of the fast path to a flow that it is given."""

    ACCEPTED = "accepted"
    IN_FLIGHT = "frames are on their way here"
    UNAVAILABLE = "not now"  # no buffer is free, it is locked, it is not known any more


class KernelPath(Protocol):
    """The fast path as the engine sees it. Keys are of known() flows, but for reclaim()."""

    enabled: bool

    def offer(self, key: FlowKey) -> bool:
        """Make the connection known to the kernel; False: the table is full."""
        ...

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        """To the fast path, the last frame of it that was seen here being `captured`."""
        ...

    def reclaim(self, key: FlowKey) -> ConnState | None:
        """To the slow path, with what is outstanding; None if the kernel does not know it."""
        ...

    def outstanding(self) -> list[FlowKey]:
        """Connections of which anything is outstanding."""
        ...

    def overdue(self, before_ns: int) -> list[FlowKey]:
        """Those of them that have waited since before_ns or longer."""
        ...

    def void(self, epoch: int) -> None:
        """What it knew in earlier epochs than this is of no more use."""
        ...


class NoKernelPath:
    """There is no the fast path."""

    enabled = False

    def offer(self, key: FlowKey) -> bool:
        return False

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        return OffloadResult.UNAVAILABLE

    def reclaim(self, key: FlowKey) -> ConnState | None:
        return None

    def outstanding(self) -> list[FlowKey]:
        return []

    def overdue(self, before_ns: int) -> list[FlowKey]:
        return []

    def void(self, epoch: int) -> None:
        pass


def known(key: FlowKey) -> bool:
    """Whether the fast path takes flows of this kind: TCP and UDP, without VLAN tags."""
    return is_stream(key) or (len(key) in (15, 39) and key[0] == UDP)


def is_stream(key: FlowKey) -> bool:
    """Whether a key that the fast path knows is TCP's (see net/flow_key.py)."""
    return len(key) in (12, 36)


def conn_key(key: FlowKey) -> bytes:
    """struct colo_flow_key, as in `conns`, of a known() flow."""
    raw = unmirrored_key(key, is_stream(key))
    assert raw is not None
    *ends, vlan = abi.FLOW_KEY.unpack_from(raw)
    return abi.FLOW_KEY.pack(*ends, vlan if is_stream(key) else vlan | abi.KEY_UDP)


def flow_key(raw: bytes) -> FlowKey:
    """The flow of a struct colo_flow_key of `conns`."""
    guest, client, sport, dport, vlan = abi.FLOW_KEY.unpack(raw)
    version = 6
    if guest.startswith(_MAPPED) and client.startswith(_MAPPED):
        guest, client, version = guest[12:], client[12:], 4
    head = bytes((UDP, version, 0)) if vlan & abi.KEY_UDP else b""
    return bytes(head + guest + client + sport + dport)


def direction(state: ConnState) -> str:
    """Who opened the flow, as the policy knows it."""
    return _DIRECTIONS[state.cookie[1]]


def direction_number(text: str) -> int:
    """For the second byte of a cookie."""
    return _DIRECTIONS.index(text)


@dataclass(frozen=True, slots=True)
class OffloadRequest:
    """A flow for the fast path: abi.OFFLOAD packed; the latest history, and what is outstanding;
    whether an ack waits, which needs a buffer too: by its owner user space finds what waits; and
    since when (0: nothing does)."""

    state: bytes
    buffer: bytes
    pending: bool = False
    since_ns: int = 0


def conn_state(raw: bytes, ring: bytes | memoryview) -> ConnState:
    """Decodes struct colo_conn; `ring`: struct colo_buffer, empty if there is none."""
    (
        _, since, seen, _, owner, epoch, released, next_, base_seq, buffer, punt_seq, p_ack, s_ack,
        adv_ack, p_win, s_win, adv_win, mss, leader, pending, l4, doff, _, fin_known, fin,
        hdr, cookie,
    ) = abi.CONN.unpack(raw)  # fmt: skip
    out, kept = (next_ - released) & MASK, (next_ - base_seq) & MASK
    data = past = b""
    if buffer and ring and out <= abi.BUFFER:
        kept = min(kept, abi.BUFFER)
        at = (next_ - kept - base_seq) % abi.BUFFER
        first, last = abi.BUFFER_BEFORE + at, abi.BUFFER_BEFORE + abi.BUFFER
        both = bytes(ring[first : min(last, first + kept)])
        both += bytes(ring[abi.BUFFER_BEFORE : abi.BUFFER_BEFORE + kept - len(both)])
        past, data = both[: kept - out], both[kept - out :]
    if fin_known:  # nothing is stored in its place: see _settle_fin() in compare/tcp.py
        past, data = (past, data[:-1]) if data else (past[:-1] + b"\0"[: len(past)], data)
    return ConnState(
        owner, epoch, released, punt_seq, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss,
        leader == abi.SIDE_PVM, bool(pending), hdr[: l4 + doff] if l4 else b"", l4, since, seen,
        cookie, data, past, (fin - 1) & MASK if fin_known else None,
    )  # fmt: skip
