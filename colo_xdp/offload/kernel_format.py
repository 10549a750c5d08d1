# SPDX-License-Identifier: GPL-2.0-or-later
"""State that the fast path and the slow path exchange about a flow of any kind: sans-IO.

compare/offload_port.py is what a flow stores for offloading. offload/tcp.py converts TCP streams to
the kernel's state and back, offload/udp.py flows of UDP datagrams. offload/scheduler.py decides
when. datapath/offload_maps.py is the kernel's side.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from .. import abi
from ..net.flow_key import UDP, FlowKey, unmirrored_key
from ..net.seqnum import MASK

_DIRECTIONS = ("", "in", "out")
_MAPPED = bytes(10) + b"\xff\xff"  # RFC 4291 section 2.5.5.2


@dataclass(frozen=True, slots=True)
class ConnState:
    """Contents of struct colo_conn, and the outstanding bytes. Windows are unscaled fields."""

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
    buffer: bytes  # from `released` on, of the leader: bytes, or records of datagrams
    history: bytes  # before `released`
    # position of the FIN that was sent: released - 1, or the last one outstanding
    fin: int | None = None


class OffloadResult(Enum):
    """Answer of the fast path to an offload."""

    ACCEPTED = "accepted"
    IN_FLIGHT = "frames are on their way here"
    UNAVAILABLE = "not now"  # no buffer is free, it is locked, or it is no longer known


class Overdue(NamedTuple):
    """A connection of which something has waited for long in the kernel.

    held: the PVM's output waits; otherwise only the SVM is ahead.
    """

    since_ns: int
    key: FlowKey
    held: bool
    payload: bool  # more than an ack waits


class KernelView(NamedTuple):
    """What the fast path knows of a connection; since_ns: output of the PVM waits; 0: none."""

    released: int
    since_ns: int
    seen_ns: int


class KernelPath(Protocol):
    """The fast path as the engine sees it. Keys are of known() flows, except for reclaim()."""

    enabled: bool

    @property
    def unused(self) -> bool:
        """Whether the kernel knows no connection, so that nothing can begin to wait there."""
        ...

    def offer(self, key: FlowKey) -> bool:
        """Make the connection known to the kernel; return False if the table is full."""
        ...

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        """Hand the flow to the fast path.

        `punt_seq`: number of the last frame of it that was seen here.
        """
        ...

    def reclaim(self, key: FlowKey) -> ConnState | None:
        """Reclaim the flow, with what is outstanding; None if the kernel does not know it."""
        ...

    def outstanding(self) -> list[FlowKey]:
        """Return the connections that have anything outstanding."""
        ...

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Return those of them that have waited since before_ns or longer."""
        ...

    def oldest_ns(self) -> int:
        """Return since when (ns) the first of them has waited; 0: there is none."""
        ...

    def moved_ns(self) -> int:
        """Return when a guest last sent something new here, more than an ack; 0: never."""
        ...

    def waits(self) -> list[int]:
        """Return how often released bytes had waited less than 1, 2, 4, ... us (not cumulative)."""
        ...

    def void(self, epoch: int) -> None:
        """Invalidate what the kernel learnt in epochs before this one."""
        ...


class NoKernelPath:
    """Stands in where there is no fast path."""

    enabled = False
    unused = True

    def offer(self, key: FlowKey) -> bool:
        return False

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        return OffloadResult.UNAVAILABLE

    def reclaim(self, key: FlowKey) -> ConnState | None:
        return None

    def outstanding(self) -> list[FlowKey]:
        return []

    def overdue(self, before_ns: int) -> list[Overdue]:
        return []

    def oldest_ns(self) -> int:
        return 0

    def moved_ns(self) -> int:
        return 0

    def waits(self) -> list[int]:
        return []

    def void(self, epoch: int) -> None:
        pass


def known(key: FlowKey) -> bool:
    """Return whether the fast path takes flows of this kind: TCP and UDP without VLAN tags."""
    return is_stream(key) or (len(key) in (15, 39) and key[0] == UDP)


def is_stream(key: FlowKey) -> bool:
    """Return whether a key that the fast path knows is of TCP (see net/flow_key.py)."""
    return len(key) in (12, 36)


def conn_key(key: FlowKey) -> bytes:
    """Pack the key of a known() flow as struct colo_flow_key, as in `conns`."""
    raw = unmirrored_key(key, is_stream(key))
    assert raw is not None
    *ends, vlan = abi.FLOW_KEY.unpack_from(raw)
    return abi.FLOW_KEY.pack(*ends, vlan if is_stream(key) else vlan | abi.KEY_UDP)


def flow_key(raw: bytes) -> FlowKey:
    """Return the flow key of a struct colo_flow_key of `conns`."""
    guest, client, sport, dport, vlan = abi.FLOW_KEY.unpack(raw)
    version = 6
    if guest.startswith(_MAPPED) and client.startswith(_MAPPED):
        guest, client, version = guest[12:], client[12:], 4
    head = bytes((UDP, version, 0)) if vlan & abi.KEY_UDP else b""
    return bytes(head + guest + client + sport + dport)


def direction(state: ConnState) -> str:
    """Return which end opened the flow, as the policy names it."""
    return _DIRECTIONS[state.cookie[1]]


def direction_number(text: str) -> int:
    """Return the value for the second byte of a cookie."""
    return _DIRECTIONS.index(text)


@dataclass(frozen=True, slots=True)
class OffloadRequest:
    """Flow for the fast path.

    state: abi.OFFLOAD, packed. buffer: the latest history, then what is outstanding. pending: an
    ack waits; this needs a buffer too, since user space finds what waits by the owners of buffers.
    since_ns: since when anything waits; 0: nothing does.
    """

    state: bytes
    buffer: bytes
    pending: bool = False
    since_ns: int = 0


class Ring(Protocol):
    """The bytes of struct colo_buffer."""

    def __len__(self) -> int: ...
    def __getitem__(self, part: slice, /) -> bytes | memoryview: ...


def conn_state(raw: bytes, ring: Ring) -> ConnState:
    """Decode struct colo_conn; `ring`: struct colo_buffer, empty if there is none."""
    (
        _,
        since,
        seen,
        _,
        owner,
        epoch,
        released,
        next_,
        base_seq,
        buffer,
        punt_seq,
        p_ack,
        s_ack,
        adv_ack,
        p_win,
        s_win,
        adv_win,
        mss,
        leader,
        pending,
        l4,
        doff,
        _,
        fin_known,
        _,
        fin,
        _,
        hdr,
        cookie,
    ) = abi.CONN.unpack(raw)
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
        owner,
        epoch,
        released,
        punt_seq,
        p_ack,
        s_ack,
        adv_ack,
        p_win,
        s_win,
        adv_win,
        mss,
        leader == abi.SIDE_PVM,
        bool(pending),
        hdr[: l4 + doff] if l4 else b"",
        l4,
        since,
        seen,
        cookie,
        data,
        past,
        (fin - 1) & MASK if fin_known else None,
    )
