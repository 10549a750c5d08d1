# SPDX-License-Identifier: GPL-2.0-or-later
"""Decides when a flow goes to the fast path; tcp.py and udp.py decide what it takes along. Sans-IO.

A flow that has been settled for some batches is offered, and offloaded when no frame of it is on
its way here. A busy flow always has some on their way. Its own frames, compared and ready, are then
kept back for a moment (backpressure): no acks come for them, both guests' windows fill, and the
last frame arrives.

Datagrams have no windows. Applications that send many over a network depend on acks of their own
(QUIC, RTP with feedback), so backpressure works for them too. Others are offloaded when they pause.

All times are CLOCK_MONOTONIC ns. The engine calls this module with each frame and batch; see
docs/design/offload.md.
"""

from __future__ import annotations

from collections.abc import Callable

from ..compare.compared import ComparedFlow
from ..compare.flow import Comparer, Outbox
from ..compare.offload_port import Backpressure
from ..compare.patience import Patience
from ..compare.timers import Clock
from ..net.frame import Frame
from .kernel_format import ConnState, KernelPath, OffloadResult
from .offloaded import OffloadedFlow

#: settled batches before a connection is offered to the kernel; at most, between two stays there
OFFER_AFTER, MAX_BACKOFF = 12, 256
#: fewer if only the handshake has happened, or if so many bytes were sent that more will follow
OFFER_SOON, OFFER_BYTES = 1, 8192
#: a shorter stay in the kernel doubles the number of batches before the next
SHORT_STAY_NS = 50_000_000
#: batches between two attempts to offload a stream that always has frames on their way
RETRY = 4
#: attempts that fail for this reason before backpressure is applied
BACKPRESSURE_AFTER = 3
#: Bounds of backpressure per stream: time, and what a guest sends without an ack, in frames and
#: bytes. A window of small frames takes the slow path longer, so after each attempt that ended too
#: early the next one has twice the time.
BACKPRESSURE_NS, BACKPRESSURE_MOST_NS = 20_000_000, 80_000_000
BACKPRESSURE_FRAMES, BACKPRESSURE_BYTES = 8192, 8 << 20
#: settled batches after backpressure that was in vain; twice as many each time, up to MAX_BACKOFF
AGAIN = 16
#: streams under backpressure at a time: 128 MiB at most
BACKPRESSURE_STREAMS = 16


def _wait(st: ComparedFlow) -> int:
    """Return the settled batches needed before a flow that the kernel does not know is offered."""
    soon = st.codec.young(st) or st.codec.bytes_sent(st) >= OFFER_BYTES
    return OFFER_SOON if soon else OFFER_AFTER


def _full(pressure: Backpressure) -> bool:
    """Return whether the guest keeps sending without an ack."""
    return len(pressure.frames) > BACKPRESSURE_FRAMES or pressure.size > BACKPRESSURE_BYTES


class OffloadScheduler:
    """Moves the flows of one engine to the fast path and back.

    put(flow) puts a flow into the engine's tables, in place of its current entry.
    """

    def __init__(
        self,
        clock: Clock,
        fast: KernelPath,
        outbox: Outbox,
        patience: Patience,
        put: Callable[[Comparer], None],
    ) -> None:
        self._clock, self._kernel, self._outbox = clock, fast, outbox
        self._patience, self._put = patience, put
        self._settled: dict[ComparedFlow, None] = {}  # anything arrived in this batch
        self._backpressured: list[ComparedFlow] = []
        self._back: ComparedFlow | None = None  # the last one that came back

    def note(self, st: Comparer, rec: Frame) -> None:
        """Note that a frame has been processed: its stream may be settled at the end of the batch.

        A frame that the fast path could not count, because the connection was locked, made user
        space reclaim the connection. Other such frames may be on their way, and no number would
        show it.
        """
        st = st.reclaim()  # already reclaimed, by the frame
        if not isinstance(st, ComparedFlow):
            return
        if rec.punt_seq:
            st.offload.punt_seq = rec.punt_seq
        elif st is self._back:
            self._back = None
            return
        self._settled[st] = None

    def end_batch(self, may_offload: bool) -> None:
        """Offload what is settled. All frames that came together have been noted."""
        if self._settled:
            settled, self._settled = self._settled, {}
            if may_offload:
                self._offload(settled)
        if self._backpressured:
            self.look()

    def _offload(self, settled: dict[ComparedFlow, None]) -> None:
        now, count = self._clock.now, self._outbox.count
        for st in settled:
            state = st.offload
            if state.backpressure is not None:
                continue  # look() handles it
            state.settled_batches += 1
            if state.settled_batches < (state.backoff if state.offered else _wait(st)):
                continue
            st.release_part(now, False)
            if not self._ready(st):
                continue
            if not state.offered:
                state.offered, state.settled_batches = self._kernel.offer(st.key), 0
                count("offload_offered", state.offered)
                if not (state.offered and st.codec.young(st)):
                    continue
            answer = self._gave(st)
            if answer is OffloadResult.ACCEPTED:
                continue
            state.settled_batches -= RETRY
            if answer is OffloadResult.IN_FLIGHT:
                state.refused += 1
                if (
                    state.refused >= BACKPRESSURE_AFTER
                    and len(self._backpressured) < BACKPRESSURE_STREAMS
                ):
                    time_ns = min(BACKPRESSURE_NS << state.in_vain, BACKPRESSURE_MOST_NS)
                    st.outbox = state.backpressure = Backpressure(st.outbox, now + time_ns)
                    self._backpressured.append(st)
                    count("offload_backpressured")

    def _ready(self, st: ComparedFlow) -> bool:
        return st.epoch == self._clock.epoch and st.codec.ready(st)

    def _gave(self, st: ComparedFlow) -> OffloadResult:
        """Offload a ready flow; return the fast path's answer."""
        now, state = self._clock.now, st.offload
        since = st.codec.waits_since(st)
        limit = self._patience.ns if st.held else self._patience.ceiling_ns
        if since and now - since > limit // 2:
            return OffloadResult.UNAVAILABLE  # the engine would reclaim it at once
        request = st.codec.pack(st, self._clock.epoch)
        if request is None:
            return OffloadResult.UNAVAILABLE
        answer = self._kernel.offload(st.key, request, state.punt_seq)
        if answer is OffloadResult.ACCEPTED:
            st.codec.on_offloaded(st)
            self._settled.pop(st, None)
            self._put(OffloadedFlow(st, self.reclaim))
            state.offloaded_ns, state.settled_batches, state.refused = now, 0, 0
            state.in_vain = 0
            self._outbox.count("offload_accepted")
        return answer

    def reclaim(self, st: ComparedFlow, conn: ConnState | None = None) -> None:
        """Reclaim a flow that the fast path has handed over, or has to.

        conn: the kernel's state, if it is already known.
        """
        self._put(st)
        conn = self._kernel.reclaim(st.key) if conn is None else conn
        if conn is None:  # the kernel has forgotten it: treat it as new
            st.reset(self._clock.epoch)
            return
        state, now = st.offload, self._clock.now
        short = now - state.offloaded_ns < SHORT_STAY_NS
        state.backoff = min(2 * state.backoff, MAX_BACKOFF) if short else 1
        state.offered, state.settled_batches, state.punt_seq = True, 0, conn.punt_seq
        self._back = st
        st.codec.restore(st, conn, now)
        self._outbox.count("offload_reclaimed")

    # -- backpressure

    @property
    def under_backpressure(self) -> bool:
        """Return whether frames of any flow are kept back."""
        return bool(self._backpressured)

    def look(self) -> None:
        """Offload the flows under backpressure that are ready; end it for those that took too long.

        Called with each batch and each tick.
        """
        now = self._clock.now
        for st in self._backpressured[:]:
            pressure = st.offload.backpressure
            assert pressure is not None
            st.release_part(now, False)
            if self._ready(st) and self._gave(st) is OffloadResult.ACCEPTED:
                self._end_backpressure(st)
            elif now >= pressure.until_ns or _full(pressure):
                pause = min(AGAIN << st.offload.in_vain, MAX_BACKOFF)
                st.offload.refused, st.offload.settled_batches = 0, -pause
                st.offload.in_vain = min(st.offload.in_vain + 1, 8)
                self._end_backpressure(st)

    def _end_backpressure(self, st: ComparedFlow) -> None:
        pressure, st.offload.backpressure = st.offload.backpressure, None
        assert pressure is not None
        st.outbox = st.host.outbox
        self._backpressured.remove(st)
        for rec in pressure.frames:
            st.outbox.release(rec)

    def end_all_backpressure(self) -> None:
        """Release everything that is kept back. It may leave, and something else happens now."""
        for st in self._backpressured[:]:
            self._end_backpressure(st)

    def clear(self) -> None:
        """Forget all streams. None is under backpressure."""
        self._settled.clear()
        self._back = None

    def kept(self) -> tuple[int, int]:
        """Return the number of frames that are kept back, and their bytes."""
        pressures = [
            st.offload.backpressure
            for st in self._backpressured
            if st.offload.backpressure is not None
        ]
        return sum(len(b.frames) for b in pressures), sum(b.size for b in pressures)
