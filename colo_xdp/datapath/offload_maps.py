# SPDX-License-Identifier: GPL-2.0-or-later
"""The fast path's maps, and the program that offloads connections and reclaims them.

The program is run with BPF_PROG_TEST_RUN, so that user space takes the same lock by the same
compare and swap as the programs on the devices do (bpf/offload/offload.h).
"""

from __future__ import annotations

import errno
import logging
import mmap
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

from .. import abi
from ..abi import CtlOp, CtlResult
from ..net.flow_key import FlowKey
from ..offload.kernel_format import (
    ConnState,
    KernelView,
    OffloadRequest,
    OffloadResult,
    Overdue,
    conn_key,
    conn_state,
    flow_key,
    known,
)
from . import syscall
from .loader import Objects

log = logging.getLogger("colo_xdp.datapath.offload_maps")

RECLAIM_S = 1.0  # a connection that stays locked for longer is given up
#: Pause between two walks: one through a table of a million buckets takes 3 ms, however few are
#: used.
REST_NS = 10_000_000_000
_DONE = CtlResult.DONE
_ANSWERS = {_DONE: OffloadResult.ACCEPTED, CtlResult.REFUSED: OffloadResult.IN_FLIGHT}
#: indexes into abi.CONN
_SINCE, _SEEN, _CLIENT_ACK, _RELEASED, _NEXT, _LEADER, _PENDING, _FIN_KNOWN, _FIN = (
    1, 2, 3, 6, 7, 18, 19, 23, 25,
)  # fmt: skip
_U32 = struct.Struct("=I")
_EMPTY = bytes(abi.CONN.size)
_NO_STATE = bytes(abi.OFFLOAD.size)
_BUFFER_SIZE = abi.BUFFER_BEFORE + abi.BUFFER + abi.BUFFER_SLACK


class Buffer:
    """One element of the map `buffers` (struct colo_buffer), of which parts are read and written.

    Only the pages of a part are mapped, and only for that moment. All buffers would be 256 MiB of a
    controller's memory that it hardly ever touches. Mapping costs as much as copying: 0.3 us a
    page.
    """

    def __init__(self, fd: int, index: int) -> None:
        """Use the descriptor of the map."""
        self._fd, self._begin = fd, index * _BUFFER_SIZE  # BPF_F_MMAPABLE: they are contiguous

    def __len__(self) -> int:
        return _BUFFER_SIZE

    def _mapped(self, first: int, size: int) -> tuple[mmap.mmap, int]:
        at = self._begin + first
        page = at // mmap.PAGESIZE * mmap.PAGESIZE
        return mmap.mmap(self._fd, _pages(at + size - page), offset=page), at - page

    def __getitem__(self, part: slice) -> bytes:
        first, last, _ = part.indices(_BUFFER_SIZE)
        if last <= first:
            return b""
        pages, at = self._mapped(first, last - first)
        with pages:
            return pages[at : at + last - first]

    def write(self, first: int, data: bytes) -> None:
        """Store bytes from a place on."""
        if data:
            pages, at = self._mapped(first, len(data))
            with pages:
                pages[at : at + len(data)] = data


class BpfKernelPath:
    """kernel_format.KernelPath on the kernel's maps."""

    def __init__(
        self,
        objects: Objects,
        idle_ns: int,
        since: int,
        switch: Callable[[bool], None],
        keep_since: Callable[[int], None],
    ) -> None:
        self._moved = objects.map("offload_moved")
        self._conns, self._waits = objects.map("conns"), objects.map("offload_waits")
        buffers, owners = objects.map("buffers"), objects.map("owners")
        self.buffers = owners.info.max_entries
        self._rings = buffers.fd
        table = memoryview(mmap.mmap(owners.fd, _pages(self.buffers * abi.OWNER.size)))
        self._table = table[: self.buffers * abi.OWNER.size]
        #: since_ns of each: reading only these takes a tenth of the time
        self._since_ns = self._table.cast("Q")[1 :: abi.OWNER.size // 8]
        self._ctl = objects.programs["offload_ctl"].fd
        self._idle_ns, self._since = idle_ns, since
        self._switch, self._keep_since = switch, keep_since
        self._on = False
        self._full = 0
        self.forgotten = 0
        self._sweep: Iterator[bytes] | None = None
        self._rest_until = 0
        self._reclaimed: list[bytes] = []
        #: whether sweep() has met no connection, since it began anew and up to its end
        self._met_none = False
        self.unused = False  # a former controller may have left connections

    @property
    def enabled(self) -> bool:
        """Return whether the kernel decides."""
        return self._on

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._on = on
        self._switch(on)

    def _control(
        self,
        op: CtlOp,
        raw_key: bytes,
        punt_seq: int = 0,
        state: bytes = _NO_STATE,
        since_ns: int = 0,
    ) -> CtlResult:
        message = abi.CTL.pack(op, punt_seq, raw_key, state, since_ns)
        end = time.monotonic() + RECLAIM_S
        while True:
            r = CtlResult(syscall.test_run(self._ctl, message, data_out=0).retval)
            if r is not CtlResult.BUSY or time.monotonic() > end:
                return r

    def offer(self, key: FlowKey) -> bool:
        """Make the connection known; return False if there are too many."""
        self.unused = self._met_none = False
        try:
            seen = struct.pack("=16xQ", time.monotonic_ns())
            self._conns.set(conn_key(key), seen + _EMPTY[len(seen) :], new=True)
        except OSError as e:
            if e.errno == errno.EEXIST:
                return True
            self._full += 1
            return False
        return True

    def offload(self, key: FlowKey, request: OffloadRequest, punt_seq: int) -> OffloadResult:
        """Hand a flow to the fast path, if `punt_seq` is the last frame that was captured."""
        raw_key = conn_key(key)
        if request.buffer or request.pending:
            slot = self._slot(raw_key) if self._control(CtlOp.CLAIM, raw_key) is _DONE else 0
            if not slot:
                return OffloadResult.UNAVAILABLE
            Buffer(self._rings, slot - 1).write(abi.BUFFER_BEFORE, request.buffer)
        r = self._control(CtlOp.OFFLOAD, raw_key, punt_seq, request.state, request.since_ns)
        if r is CtlResult.UNKNOWN:
            self.offer(key)  # sweep() has deleted it meanwhile
        elif r is not _DONE and (request.buffer or request.pending):
            self._control(CtlOp.FREE, raw_key)  # the buffer that was claimed
        return _ANSWERS.get(r, OffloadResult.UNAVAILABLE)

    def _slot(self, raw_key: bytes) -> int:
        raw = self._conns.get(raw_key)
        return int(abi.CONN.unpack(raw)[9]) if raw else 0

    def reclaim(self, key: FlowKey) -> ConnState | None:
        """Reclaim the flow from the kernel. None: unknown, or its state was read before."""
        if not known(key):
            return None
        raw_key = conn_key(key)
        # Most flows that are looked up are new. Only user space makes entries, so the answer stays
        # true.
        if self._conns.get(raw_key) is None:
            return None
        r = self._control(CtlOp.RECLAIM, raw_key)
        if r is not _DONE:
            if r is CtlResult.BUSY:
                log.error("a connection stays locked in the kernel: it is met as a new one")
            return None
        raw = self._conns.get(raw_key)
        if raw is None:
            return None
        state = conn_state(raw, b"")
        slot = abi.CONN.unpack(raw)[9]
        if slot and state.epoch:
            state = conn_state(raw, Buffer(self._rings, slot - 1))
            if not state.buffer and self._slot(raw_key) != slot:
                state = conn_state(raw, b"")  # taken meanwhile, since it held history only
        if slot or state.epoch:
            self._control(CtlOp.FREE, raw_key)
        return state if state.epoch and state.epoch >= self._since else None

    def _waiting(self) -> Iterator[tuple[int, bytes]]:
        """Yield (since_ns, key) of the buffers in which anything waits."""
        for taken, since, key in abi.OWNER.iter_unpack(self._table):
            if taken and since:
                yield since, key

    def outstanding(self) -> list[FlowKey]:
        """Return the connections that have anything in a buffer which has not left."""
        return [flow_key(k) for _, k in self._waiting()]

    def overdue(self, before_ns: int) -> list[Overdue]:
        """Return those of them that have waited since before_ns or longer, and who waits."""
        found = []
        for since, key in self._waiting():
            if since <= before_ns:
                state = abi.CONN.unpack(self._conns.get(key) or _EMPTY)
                pvm, payload = state[_LEADER] == abi.SIDE_PVM, state[_RELEASED] != state[_NEXT]
                held = (pvm and payload) or bool(state[_PENDING])
                found.append(Overdue(since, flow_key(key), held, payload))
        return found

    def peek(self, key: FlowKey) -> KernelView | None:
        """Return what a report shows of a connection, without taking it; None: not known."""
        raw = self._conns.get(conn_key(key))
        if raw is None:
            return None
        state = abi.CONN.unpack(raw)
        pvm = state[_LEADER] == abi.SIDE_PVM and state[_RELEASED] != state[_NEXT]
        since = state[_SINCE] if pvm or state[_PENDING] else 0
        return KernelView(state[_RELEASED], since, state[_SEEN])

    def oldest_ns(self) -> int:
        """Return since when (ns) the first of them has waited; 0: there is none."""
        if not any(self._since_ns):
            return 0
        return min((since for since, _ in self._waiting()), default=0)

    def moved_ns(self) -> int:
        """Return when a guest last sent something new here, more than an ack; 0: never."""
        raw = self._moved.get(_U32.pack(0)) or b""
        return max(struct.unpack(f"={len(raw) // 8}Q", raw), default=0)  # of each CPU

    def void(self, epoch: int) -> None:
        """Invalidate everything that was learnt before `epoch`."""
        self._since = epoch
        self._keep_since(epoch)

    def state(self) -> dict[str, Any]:
        """Return the fast path's part of the status document."""
        return {
            "waits": self.waits(),
            "buffers": self.buffers,
            "waiting": sum(1 for _ in self._waiting()),
            "forgotten": self.forgotten,
        }

    def waits(self) -> list[int]:
        """Return how often released bytes had waited less than 1, 2, 4, ... us (not cumulative)."""
        out = []
        for i in range(self._waits.info.max_entries):
            raw = self._waits.get(_U32.pack(i)) or b""
            out.append(sum(struct.unpack(f"={len(raw) // 8}Q", raw)))
        return out

    def sweep(self, now_ns: int, most: int) -> None:
        """Examine the next `most` connections; forget those long unused.

        They are reclaimed in one call and deleted in the next, when no program uses one any more.
        """
        reclaimed, self._reclaimed = self._reclaimed, []
        for key in reclaimed:
            raw = self._conns.get(key)
            if raw is not None and self._unused(key, raw, now_ns):
                self.forgotten += self._conns.delete(key)
        if self._sweep is None:
            if now_ns < self._rest_until:
                return
            self._sweep, self._met_none = self._conns.keys(), True
        for _ in range(most):
            key_ = next(self._sweep, None)
            if key_ is None:
                self._sweep, self._rest_until = None, now_ns + min(REST_NS, self._idle_ns // 4)
                self.unused = self._met_none
                break
            self._met_none = False
            raw = self._conns.get(key_)
            if raw is not None and self._unused(key_, raw, now_ns):
                self.reclaim(flow_key(key_))  # from now on in the slow path, with its buffer free
                self._reclaimed.append(key_)

    def _unused(self, raw_key: bytes, raw: bytes, now_ns: int) -> bool:
        """Return whether a connection has been unused for long enough.

        The time is shorter if it has ended, or if its client was not seen after the handshake.
        """
        state = abi.CONN.unpack(raw)
        over = state[_FIN_KNOWN] and state[_FIN] == state[_RELEASED]
        udp = abi.FLOW_KEY.unpack(raw_key)[4] & abi.KEY_UDP
        short = over or not (state[_CLIENT_ACK] or udp)
        return now_ns - int(state[_SEEN]) >= (self._idle_ns // 5 if short else self._idle_ns)


def _pages(size: int) -> int:
    return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
