# SPDX-License-Identifier: GPL-2.0-or-later
"""The compare engine: which of the primary guest's frames may leave, and when.

Sans-IO: the caller brings frames and the time, the engine calls back. It holds the
design's invariants I1 to I4, I7 and I10 for everything that the kernel does not decide
itself. It runs in one thread; callbacks must not call into the engine.

All times are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from .datagram import DatagramFlow
from .flow import FlowKey
from .packet import DEFECTS, Kind, Packet, parse
from .reasons import DESCRIPTIONS, Cause
from .record import Record
from .stream import PART_NS, Flow, Held, Stream

__all__ = ["COUNTERS", "Divergence", "Engine", "Limits", "Policy", "Record"]

#: every counter of Engine.counters: name, meaning
COUNTERS: tuple[tuple[str, str], ...] = (
    ("pvm_frames", "frames of the primary guest seen"),
    ("svm_frames", "frames of the secondary guest seen"),
    ("released", "frames of the primary guest released, for whatever reason"),
    ("released_by_checkpoint", "released because a complete checkpoint contains them"),
    ("released_late", "as above, but read after the checkpoint's commit"),
    ("released_solo", "released because the pair was lost"),
    ("released_in_parts", "parts of a frame released before its rest was verified"),
    ("window_shrunk", "released with a smaller window: the secondary offered less"),
    ("window_updates", "bare ACKs made to tell a client of the secondary's grown window"),
    ("uncompared", "released uncompared by policy"),
    ("svm_uncompared_dropped", "of the secondary, not compared by policy"),
    ("svm_stale", "of the secondary, from another epoch"),
    ("svm_superseded", "of the secondary, dropped as a checkpoint was under way"),
    ("svm_buffered", "of the secondary, kept for the epoch that a checkpoint begins"),
    ("svm_buffer_overflow", "as above, dropped as there were too many"),
    ("svm_retransmit", "of the secondary, sent again and not needed"),
    ("svm_out_of_order", "of the secondary, stashed until a hole is filled"),
    ("svm_out_of_window", "of the secondary, dropped as far from the stream's place"),
    ("svm_datagram_expired", "of the secondary, a datagram that the primary never sent"),
    ("svm_queue_full_dropped", "of the secondary, dropped as max_queue_size were waiting"),
    ("stream_full_dropped", "of the secondary, dropped as max_stream_bytes ahead"),
    ("queue_full_dropped", "of the primary, dropped as max_queue_size were held"),
    ("flow_table_full_dropped", "of either guest, dropped as no flow could be evicted"),
    ("flows_evicted", "idle flows forgotten to make room"),
    ("flows_aged", "idle flows forgotten by age"),
    ("history_evicted", "connections whose history was given up for history_total"),
    ("checkpoints", "checkpoints committed"),
    ("checkpoints_aborted", "checkpoints aborted"),
    ("checkpoint_requests", "checkpoints the engine asked for"),
    ("opaque", "malformed frames of either guest, see the defects"),
    *((f"defect_{d}", f"malformed: {text}") for d, text in DEFECTS.items()),
    *((f"cause_{c}", text) for c, text in DESCRIPTIONS.items()),
)

_TCP = Kind.TCP
_TAG = 0xFFF
#: epochs ahead of ours that may be the next one (a checkpoint that failed takes a number)
_NEXT_EPOCHS = 16
_CHECKPOINT_QUEUE = 16  # times max_queue_size
_LONG_AGO = -1


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine (I10)."""

    compare_timeout_ns: int = 3_000_000_000
    expired_scan_cycle_ns: int = 1_000_000_000  # period of the ageing of flows
    max_queue_size: int = 1024  # packets held, per side
    max_stream_bytes: int = 4 << 20  # the SVM's bytes ahead, per connection
    max_flows: int = 100_000
    history_bytes: int = 65536  # released bytes kept per connection, plus a quarter of slack
    history_total: int = 64 << 20
    flow_idle_ns: int = 300_000_000_000  # a fifth of it for datagrams and closed connections
    datagram_grace_ns: int = 10_000_000


@dataclass(frozen=True, slots=True)
class Policy:
    """What is compared: 'compare', or 'pass' to release uncompared and count."""

    arp: str = "pass"
    ndp: str = "pass"
    other: str = "compare"  # other protocols and ethertypes, malformed frames


@dataclass(frozen=True, slots=True)
class Divergence:
    """One difference that was found. For a flow that is not TCP, and for causes that have no
    place in a stream, `offset` counts from the datagram's body or is 0."""

    ts_ns: int
    cause: Cause
    flow: str
    offset: int  # of the first differing byte in the stream, modulo 2**32
    pvm: bytes  # at most 32 bytes from there on
    svm: bytes


class Engine:
    """Holds the primary guest's frames until the rules let them go.

    release(record) sends a frame. request_checkpoint(cause, text) is called once per
    epoch. on_wait(ns) gets the time from capture to release of each frame.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        release: Callable[[Record], None],
        *,
        request_checkpoint: Callable[[Cause, str], None],
        on_wait: Callable[[int], None],
    ) -> None:
        self.limits = limits
        self._release, self._request, self._on_wait = release, request_checkpoint, on_wait
        passed = {Kind.ARP: policy.arp, Kind.NDP: policy.ndp}
        passed |= dict.fromkeys((Kind.IP, Kind.ETHER, Kind.OPAQUE), policy.other)
        self._pass = frozenset(k for k, v in passed.items() if v == "pass")
        self.epoch = 0
        self.last_divergences: deque[Divergence] = deque(maxlen=64)
        # read by the comparers (stream.Host)
        self.timeout_ns = limits.compare_timeout_ns
        self.grace_ns = limits.datagram_grace_ns
        self.max_packets = limits.max_queue_size
        self._max_flows = limits.max_flows
        self.max_stream = limits.max_stream_bytes
        self.max_history = limits.history_bytes
        self.pvm_packets = self.pvm_bytes = self.svm_packets = 0
        # hot counters are plain attributes
        self._n_pvm = self._n_svm = self._n_released = 0
        self._counters: Counter[str] = Counter({name: 0 for name, _ in COUNTERS})
        self._tcp: dict[FlowKey, Stream] = {}
        self._datagram: dict[FlowKey, DatagramFlow] = {}
        self._now = 0
        self._asked = False
        self._checkpointing = False
        self._solo = False
        self._stop_ts = _LONG_AGO
        self._queue: deque[Held] = deque()  # of the PVM, undecided, while checkpointing
        self._next: deque[tuple[Record, int]] = deque()  # of the SVM of the next epoch
        self._next_lost = 0
        # Two heaps with one live entry per flow, both lazy: an entry is a lower bound, the
        # flow itself knows better. So a timeout costs nothing per frame and no scan.
        self._serial = count()
        self._timers: list[tuple[int, int, Flow]] = []  # every flow where anything waits
        self._ages: list[tuple[int, int, Flow]] = []  # every flow
        self._next_scan = 0
        self._parts: dict[Stream, None] = {}  # a verified part of their head may leave
        self._history: OrderedDict[Stream, None] = OrderedDict()
        self._history_sum = 0

    # -- frames

    def from_pvm(self, rec: Record, now_ns: int) -> None:
        """A frame of the primary guest, in the order of capture."""
        self._now = now_ns
        self._n_pvm += 1
        p = parse(rec.frame)
        if p.kind is _TCP and not self._checkpointing and rec.ts_ns > self._stop_ts:
            st = self._tcp.get(p.key)
            if st is None:
                if self._solo or (st := self._new_stream(p.key)) is None:
                    self._homeless(rec)
                    return
            elif st.epoch != self.epoch:
                st.new_epoch(self.epoch)
            st.last = now_ns
            st.pvm(rec, p, now_ns)
            return
        self._count_opaque(p)
        if self._solo:
            self._homeless(rec)
        elif rec.ts_ns <= self._stop_ts:
            self._counters["released_late"] += 1
            self._committed(rec, p)
        elif p.kind in self._pass:
            self._counters["uncompared"] += 1
            self.emit(rec, now_ns)
        elif self._checkpointing:
            self._enqueue(rec, p)
        else:
            self._feed(rec, p)

    def _feed(self, rec: Record, p: Packet) -> None:
        if p.kind is _TCP:
            st = self._stream(p.key)
            if st is None:
                self._homeless(rec)
            else:
                st.pvm(rec, p, self._now)
            return
        flow = self._datagram_flow(p.key)
        if flow is None:
            self._homeless(rec)
        else:
            flow.pvm(rec, p, self._now)

    def _homeless(self, rec: Record) -> None:
        """A frame with no flow: the pair is lost, or the table is full."""
        if self._solo:
            self._counters["released_solo"] += 1
            self.emit(rec, self._now)
        # else dropped and counted by _room(): like loss on the network

    def _enqueue(self, rec: Record, p: Packet) -> None:
        if self.pvm_packets >= _CHECKPOINT_QUEUE * self.limits.max_queue_size:
            self._counters["queue_full_dropped"] += 1
            self.ask(Cause.QUEUE_FULL, "checkpoint")
            return
        self.pvm_packets += 1
        self.pvm_bytes += len(rec.frame)
        self._queue.append((rec, p, self._now))

    def from_svm(self, rec: Record, epoch12: int, now_ns: int) -> None:
        """A frame of the secondary guest, TCP numbers translated; epoch12 is its epoch
        modulo 4096. Never released."""
        self._now = now_ns
        self._n_svm += 1
        ahead = (epoch12 - self.epoch) & _TAG
        if ahead == 0 and not self._checkpointing and not self._solo:
            p = parse(rec.frame)
            if p.kind is _TCP:
                st = self._tcp.get(p.key)
                if st is None:
                    st = self._new_stream(p.key)
                    if st is None:
                        return
                elif st.epoch != self.epoch:
                    st.new_epoch(self.epoch)
                st.last = now_ns
                st.svm(p, now_ns)
                return
            self._svm_datagram(p)
        elif ahead == 0:
            self._counters["svm_superseded"] += 1
        elif ahead <= _NEXT_EPOCHS and not self._solo:
            if len(self._next) >= self.limits.max_queue_size:
                self._counters["svm_buffer_overflow"] += 1
                self._next_lost += 1
            else:
                self._counters["svm_buffered"] += 1
                self._next.append((rec, epoch12 & _TAG))
        else:
            self._counters["svm_stale"] += 1

    def _svm_datagram(self, p: Packet) -> None:
        self._count_opaque(p)
        if p.kind in self._pass:
            self._counters["svm_uncompared_dropped"] += 1
            return
        flow = self._datagram_flow(p.key)
        if flow is not None:
            flow.svm_frame(p, self._now)

    def _count_opaque(self, p: Packet) -> None:
        if p.defect:
            self._counters["opaque"] += 1
            self._counters[f"defect_{p.defect}"] += 1

    # -- checkpoints

    def begin_checkpoint(self) -> None:
        """From now on the PVM's frames are queued undecided, the SVM's of this epoch dropped
        and of the next one kept. Also ends a solo phase (re-protection)."""
        self._checkpointing = True
        self._solo = False
        self._collect()

    def _collect(self) -> None:
        """Move what the flows hold to the queue, oldest first, each flow in its order."""
        held = [h for flow in self._waiting() for h in flow.unhold()]
        if held:
            held.extend(self._queue)
            held.sort(key=lambda h: h[2])
            self._queue = deque(held)

    def _waiting(self) -> Iterator[Flow]:
        # whoever holds or stashes anything has a timer
        return iter({id(flow): flow for _, _, flow in self._timers}.values())

    def release_until(self, ts_ns: int) -> int:
        """While checkpointing: release the queued frames captured at ts_ns or before, which
        are proven to precede STOP. Returns how many."""
        return self._release_queued(ts_ns, "released_by_checkpoint")

    def _release_queued(self, ts_ns: int, counter: str) -> int:
        queue, self._queue = self._queue, deque()
        n = 0
        for held in queue:
            rec, p, _ = held
            if rec.ts_ns <= ts_ns:
                n += 1
                self.pvm_packets -= 1
                self.pvm_bytes -= len(rec.frame)
                self._counters[counter] += 1
                self._committed(rec, p)
            else:
                self._queue.append(held)
        return n

    def _committed(self, rec: Record, p: Packet) -> None:
        # with a full table it leaves untracked: the next frame is as of an unknown connection
        if p.kind is _TCP and (st := self._stream(p.key, must=False)) is not None:
            st.commit(p)
            self.emit(rec, self._now)
            if st.held:  # it may have been what the next one waited for
                st.pump(self._now)
            return
        self.emit(rec, self._now)

    def commit_checkpoint(self, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        """The checkpoint is complete on the SVM, which runs on under `epoch`.

        The PVM's frames captured at stop_ts_ns or before are in it and leave; newer ones
        are compared under the new epoch, with the SVM's frames kept for it. Everything
        that the SVM said before is forgotten (I7).
        """
        self._now = now_ns
        self._counters["checkpoints"] += 1
        self._collect()
        self.epoch, self._stop_ts = epoch, stop_ts_ns
        for flow in self._waiting():
            flow.new_epoch(epoch)
        self.svm_packets = 0
        self._checkpointing = self._asked = self._solo = False
        self._release_queued(stop_ts_ns, "released_by_checkpoint")
        rest, self._queue = self._queue, deque()
        self.pvm_packets = self.pvm_bytes = 0
        # they were accepted before, so no limit may drop them now
        self.max_packets = self.limits.max_queue_size + len(rest)
        self._max_flows = self.limits.max_flows + len(rest)
        for rec, p, _ in rest:
            self._feed(rec, p)
        self.max_packets, self._max_flows = self.limits.max_queue_size, self.limits.max_flows
        kept, self._next = self._next, deque()
        for rec, tag in kept:
            self._n_svm -= 1
            if (tag - epoch) & _TAG:
                self._n_svm += 1
                self._counters["svm_stale"] += 1
            else:
                self.from_svm(rec, tag, now_ns)
        lost, self._next_lost = self._next_lost, 0
        if lost:
            self.ask(Cause.PEER_GAP, f"{lost} frames of the new epoch")

    def abort_checkpoint(self, now_ns: int) -> None:
        """The checkpoint failed: everything stays held until a commit or release_all."""
        self._now = now_ns
        self._counters["checkpoints_aborted"] += 1
        self._counters["svm_stale"] += len(self._next)
        self._next.clear()
        self._next_lost = 0

    def release_all(self) -> int:
        """The pair is lost and the PVM goes solo: release everything held, in order, and from
        now on at once. The flows are forgotten. Returns how many were held."""
        self._collect()
        queue, self._queue = self._queue, deque()
        self._checkpointing, self._solo = False, True
        self.pvm_packets = self.pvm_bytes = self.svm_packets = 0
        self._counters["released_solo"] += len(queue)
        self._tcp.clear()
        self._datagram.clear()
        self._timers.clear()
        self._ages.clear()
        self._history.clear()
        self._parts.clear()
        self._history_sum = 0
        self._next.clear()
        self._next_lost = 0
        for rec, _, _ in queue:
            self.emit(rec, self._now)
        return len(queue)

    # -- time

    def flush(self, now_ns: int) -> None:
        """Release verified parts of frames that wait for their rest, in whole segments.

        To be called when a batch of frames has been fed: most rests are in the same batch.
        """
        if not self._parts:
            return
        self._now = now_ns
        parts, self._parts = self._parts, {}
        for st in parts:
            if st.epoch == self.epoch and st.release_part(now_ns, True):
                self.arm(st, now_ns + PART_NS)

    def tick(self, now_ns: int) -> None:
        """Timeouts and ageing; cheap when nothing is due. To be called every 10 ms or so."""
        self._now = now_ns
        timers = self._timers
        if not self._checkpointing:
            while timers and timers[0][0] <= now_ns:
                when, _, flow = heappop(timers)
                if when != flow.when:
                    continue  # an earlier one was set
                flow.when = 0
                if flow.epoch != self.epoch:
                    flow.new_epoch(self.epoch)
                due = flow.expire(now_ns)
                if due:
                    self.arm(flow, due)
        if now_ns >= self._next_scan:
            self._next_scan = now_ns + self.limits.expired_scan_cycle_ns
            self._age(now_ns)

    def _age(self, now_ns: int) -> None:
        ages = self._ages
        while ages and ages[0][0] <= now_ns:
            _, _, flow = heappop(ages)
            due = self._old_at(flow)
            if due <= now_ns and flow.quiet():
                self._remove(flow)
                self._counters["flows_aged"] += 1
            else:
                soon = now_ns + self.limits.expired_scan_cycle_ns
                heappush(ages, (max(due, soon), next(self._serial), flow))

    def _old_at(self, flow: Flow) -> int:
        idle = self.limits.flow_idle_ns
        return flow.last + (idle // 5 if flow.closed() else idle)

    # -- flows

    def _stream(self, key: FlowKey, must: bool = True) -> Stream | None:
        st = self._tcp.get(key)
        if st is None:
            return self._new_stream(key, must)
        if st.epoch != self.epoch:
            st.new_epoch(self.epoch)
        st.last = self._now
        return st

    def _new_stream(self, key: FlowKey, must: bool = True) -> Stream | None:
        if not self._room(must):
            return None
        st = self._tcp[key] = Stream(self, key, self.epoch)
        self._born(st)
        return st

    def _datagram_flow(self, key: FlowKey) -> DatagramFlow | None:
        flow = self._datagram.get(key)
        if flow is None:
            if not self._room():
                return None
            flow = self._datagram[key] = DatagramFlow(self, key, self.epoch)
            self._born(flow)
        elif flow.epoch != self.epoch:
            flow.new_epoch(self.epoch)
        flow.last = self._now
        return flow

    def _born(self, flow: Flow) -> None:
        flow.last = self._now
        when = self._now + self.limits.flow_idle_ns // 5
        heappush(self._ages, (when, next(self._serial), flow))

    def _room(self, must: bool = True) -> bool:
        """Make room for one flow: evict about the longest idle ones where nothing waits.
        If that fails and the flow `must` be known, its frame will be dropped: ask."""
        while self.flows >= self._max_flows:
            if not self._evict():
                if must:
                    self._counters["flow_table_full_dropped"] += 1
                    self.ask(Cause.QUEUE_FULL, "flow table")
                return False
        return True

    def _evict(self) -> bool:
        ages, tries, found = self._ages, 64, False
        busy: list[tuple[int, int, Flow]] = []
        while ages and not found:
            _, _, flow = heappop(ages)
            due = self._old_at(flow)
            if not flow.quiet():
                busy.append((due, next(self._serial), flow))
            elif tries and ages and due > ages[0][0]:
                tries -= 1  # its entry was out of date: another one is idle for longer
                heappush(ages, (due, next(self._serial), flow))
            else:
                self._remove(flow)
                self._counters["flows_evicted"] += 1
                found = True
        for entry in busy:
            heappush(ages, entry)
        return found

    def _remove(self, flow: Flow) -> None:
        if isinstance(flow, Stream):
            del self._tcp[flow.key]
            self._drop_history(flow)
        else:
            del self._datagram[flow.key]

    # -- for the comparers (stream.Host)

    def emit(self, rec: Record, now_ns: int) -> None:
        """Release a frame."""
        self._n_released += 1
        self._release(rec)
        self._on_wait(now_ns - rec.ts_ns)

    def ask(
        self, cause: Cause, flow: str, offset: int = 0, pvm: bytes = b"", svm: bytes = b""
    ) -> None:
        """Count a divergence; the first one of an epoch asks for a checkpoint."""
        self._counters[f"cause_{cause}"] += 1
        self.last_divergences.append(Divergence(self._now, cause, flow, offset, pvm, svm))
        if not self._asked and not self._checkpointing and not self._solo:
            self._asked = True
            self._counters["checkpoint_requests"] += 1
            self._request(cause, f"{flow} at {offset}")

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        self._counters[name] += n

    def arm(self, flow: Flow, when_ns: int) -> None:
        """Look at the flow at when_ns or before."""
        if not flow.when or when_ns < flow.when:
            flow.when = when_ns
            heappush(self._timers, (when_ns, next(self._serial), flow))

    def part_verified(self, stream: Stream) -> None:
        """The stream's head is verified in part: flush() looks at it."""
        self._parts[stream] = None

    def charge_history(self, stream: Stream) -> None:
        """The stream's history has outgrown what it is accounted with: account, or trim."""
        full = self.max_history + self.max_history // 4
        n = len(stream.hist)
        if n > full:
            del stream.hist[: n - self.max_history]
            n = self.max_history
        cap = min(max(2 * stream.hist_cap, n, 4096), full)
        self._history_sum += cap - stream.hist_cap
        stream.hist_cap = cap
        self._history[stream] = None
        self._history.move_to_end(stream)
        while self._history_sum > self.limits.history_total and len(self._history) > 1:
            self._counters["history_evicted"] += 1
            self._drop_history(next(iter(self._history)))

    def _drop_history(self, stream: Stream) -> None:
        if stream.hist_cap:
            self._history_sum -= stream.hist_cap
            stream.hist_cap = 0
            stream.hist.clear()
            del self._history[stream]

    # -- to be looked at

    @property
    def counters(self) -> Counter[str]:
        """All counters of COUNTERS; do not change it."""
        c = self._counters
        c["pvm_frames"], c["svm_frames"] = self._n_pvm, self._n_svm
        c["released"] = self._n_released
        return c

    @property
    def held_packets(self) -> int:
        """Frames of the PVM that wait."""
        return self.pvm_packets

    @property
    def held_bytes(self) -> int:
        """Their bytes, Ethernet headers included."""
        return self.pvm_bytes

    @property
    def flows(self) -> int:
        """Flows known, TCP and others."""
        return len(self._tcp) + len(self._datagram)
