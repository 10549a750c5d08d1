# SPDX-License-Identifier: GPL-2.0-or-later
"""When a flow goes to the fast path: sans-IO. What it takes along is offload/tcp.py's, or
offload/udp.py's.

A flow that has been settled for some batches is offered, and given when no frame of it is on its
way here. Of a busy one some always are: then its own frames, compared and ready, are kept back for
a moment (the brake). No acks come for them, both guests' windows fill, the last frame arrives.

Datagrams have no windows; those who send many over a network listen to acks of their own (QUIC,
RTP with feedback), and for them the brake does the same. Others are given when they pause.

All times are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from collections.abc import Callable

from ..compare.compared import ComparedFlow
from ..compare.flow import Comparer, Outbox
from ..compare.offload_port import Backpressure
from ..compare.timers import Clock
from ..net.frame import Frame
from .kernel_format import ConnState, KernelPath, OffloadResult
from .offloaded import OffloadedFlow

#: settled batches before a connection is offered to the kernel, and at most between two stays there
OFFER_AFTER, MAX_BACKOFF = 12, 256
#: but so many if only its handshake has been, or if it has said so much that there is more to come
OFFER_SOON, OFFER_BYTES = 1, 8192
#: a stay in the kernel that was shorter than this doubles the patience
SHORT_STAY_NS = 50_000_000
#: batches between two tries to give a stream of which frames are always on their way
RETRY = 4
#: so many tries that failed for this reason, and the brake is put on
BACKPRESSURE_AFTER = 3
#: but for no longer than this, and for no more of its frames: what a guest sends without an ack
BACKPRESSURE_NS, BACKPRESSURE_FRAMES, BACKPRESSURE_BYTES = 20_000_000, 512, 8 << 20
#: and for so many streams at a time: 128 MiB at most
BACKPRESSURE_STREAMS = 16


def _wait(st: ComparedFlow) -> int:
    """Settled batches before a flow that the kernel does not know is offered to it."""
    soon = st.codec.young(st) or st.codec.bytes_sent(st) >= OFFER_BYTES
    return OFFER_SOON if soon else OFFER_AFTER


def _full(pressure: Backpressure) -> bool:
    """Whether the guest sends on and on without an ack."""
    return len(pressure.frames) > BACKPRESSURE_FRAMES or pressure.size > BACKPRESSURE_BYTES


class OffloadScheduler:
    """The flows of one engine on their way to the fast path, and back.

    put(flow) puts a flow into the engine's tables, in place of what stands there for it.
    """

    def __init__(
        self, clock: Clock, fast: KernelPath, outbox: Outbox, timeout_ns: int,
        put: Callable[[Comparer], None],
    ) -> None:  # fmt: skip
        self._clock, self._kernel, self._outbox = clock, fast, outbox
        self._timeout_ns, self._put = timeout_ns, put
        self._settled: dict[ComparedFlow, None] = {}  # anything came in this batch
        self._backpressured: list[ComparedFlow] = []
        self._back: ComparedFlow | None = None  # the last that has come back

    def note(self, st: Comparer, rec: Frame) -> None:
        """A frame has been taken in; its stream may be settled at the end of the batch.

        A frame that the fast path has not counted, as the connection was locked, has made user
        space take it back: others may be on their way as it was, and no number would tell.
        """
        st = st.reclaim()  # it has been, by the frame
        if not isinstance(st, ComparedFlow):
            return
        if rec.punt_seq:
            st.offload.punt_seq = rec.punt_seq
        elif st is self._back:
            self._back = None
            return
        self._settled[st] = None

    def end_batch(self, may_offload: bool) -> None:
        """All frames that came together have been noted."""
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
                continue  # look() has it
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
                    st.outbox = state.backpressure = Backpressure(st.outbox, now + BACKPRESSURE_NS)
                    self._backpressured.append(st)
                    count("offload_backpressured")

    def _ready(self, st: ComparedFlow) -> bool:
        return st.epoch == self._clock.epoch and st.codec.ready(st)

    def _gave(self, st: ComparedFlow) -> OffloadResult:
        """The fast path's answer to a ready flow."""
        now, state = self._clock.now, st.offload
        since = st.codec.waits_since(st)
        if since and now - since > self._timeout_ns // 2:
            return OffloadResult.UNAVAILABLE  # the engine would take it back at once
        request = st.codec.pack(st, self._clock.epoch)
        if request is None:
            return OffloadResult.UNAVAILABLE
        answer = self._kernel.offload(st.key, request, state.punt_seq)
        if answer is OffloadResult.ACCEPTED:
            st.codec.on_offloaded(st)
            self._settled.pop(st, None)
            self._put(OffloadedFlow(st, self.reclaim))
            state.offloaded_ns, state.settled_batches, state.refused = now, 0, 0
            self._outbox.count("offload_accepted")
        return answer

    def reclaim(self, st: ComparedFlow, conn: ConnState | None = None) -> None:
        """The fast path has handed the flow over, or has to. `conn`: what it had, if
        that is known."""
        self._put(st)
        conn = self._kernel.reclaim(st.key) if conn is None else conn
        if conn is None:  # it has forgotten it: as one that is met for the first time
            st.unknown(self._clock.epoch)
            return
        state, now = st.offload, self._clock.now
        short = now - state.offloaded_ns < SHORT_STAY_NS
        state.backoff = min(2 * state.backoff, MAX_BACKOFF) if short else 1
        state.offered, state.settled_batches, state.punt_seq = True, 0, conn.punt_seq
        self._back = st
        st.codec.recall(st, conn, now)
        self._outbox.count("offload_reclaimed")

    # -- the brake

    @property
    def braking(self) -> bool:
        """Whether frames of any flow are kept back."""
        return bool(self._backpressured)

    def look(self) -> None:
        """Give what is braked and can be given now; let go what has been braked for long enough.
        To be called with each batch and with each tick."""
        now = self._clock.now
        for st in self._backpressured[:]:
            pressure = st.offload.backpressure
            assert pressure is not None
            st.release_part(now, False)
            if self._ready(st) and self._gave(st) is OffloadResult.ACCEPTED:
                self._end_backpressure(st)
            elif now >= pressure.until_ns or _full(pressure):
                st.offload.refused, st.offload.settled_batches = 0, -MAX_BACKOFF
                self._end_backpressure(st)

    def _end_backpressure(self, st: ComparedFlow) -> None:
        pressure, st.offload.backpressure = st.offload.backpressure, None
        assert pressure is not None
        st.outbox = st.host.outbox
        self._backpressured.remove(st)
        for rec in pressure.frames:
            st.outbox.release(rec)

    def end_all_backpressure(self) -> None:
        """What is kept back leaves: it may, and something else happens now."""
        for st in self._backpressured[:]:
            self._end_backpressure(st)

    def clear(self) -> None:
        """Forget all streams, of which none is braked."""
        self._settled.clear()
        self._back = None

    def kept(self) -> tuple[int, int]:
        """Frames that are kept back, and their bytes."""
        pressures = [
            st.offload.backpressure
            for st in self._backpressured
            if st.offload.backpressure is not None
        ]
        return sum(len(b.frames) for b in pressures), sum(b.size for b in pressures)
