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
from heapq import heappop, heappush
from itertools import count

from .comparer import Flow
from .counters import COUNTERS
from .flow import FlowKey, datagram_name, tcp_port
from .flows import GIVEN, Flows, RuleCount
from .fragments import Fragments
from .giving import FastFlow, Giving
from .held_queue import Held, HeldQueue
from .journal import Divergence
from .ledger import Ledger
from .limits import CHECKPOINT_QUEUE, NEVER, Limits
from .packet import Kind, Packet, parse
from .policy import Policy, Verdict
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence, Record
from .stream import PART_NS, Stream
from .tier_k import Fast, NoFast, Words, is_stream
from .uncompared import Budget, Passed, Watched, Watching, catch_up

__all__ = ["COUNTERS", "Divergence", "Engine", "Limits", "Policy", "Record"]

_TCP, _FRAGMENT = Kind.TCP, Kind.FRAGMENT
_TAG = 0xFFF
#: epochs ahead of ours that may be the next one (a checkpoint that failed takes a number)
_NEXT_EPOCHS = 16
_LONG_AGO = -1
#: a timer shorter than this goes off when it should, a longer one up to a tenth of it late
SOON_NS = 500_000_000


class Engine:
    """Holds the primary guest's frames until the rules let them go.

    release(record) sends a frame. request_checkpoint(divergence) is called once per
    epoch. on_wait(ns) gets the time from capture to release of each frame; in shadow
    mode the time that it would have waited. on_divergence gets every difference, also
    those that ask for nothing (one is asked for already, the flow is only watched).
    unmirror(key) gets the flows (struct colo_unmirrored_key) whose clients' frames the SVM
    is not to have, None when there is none any more. fast: tier K, which gets settled streams.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        release: Callable[[Record], None],
        *,
        request_checkpoint: Callable[[Divergence], None],
        on_wait: Callable[[int], None],
        on_divergence: Callable[[Divergence], None] = lambda d: None,
        unmirror: Callable[[bytes | None], None] = lambda key: None,
        fast: Fast | None = None,
    ) -> None:
        self.limits = limits
        self._release, self._request, self._on_wait = release, request_checkpoint, on_wait
        self._on_divergence, self.unmirror = on_divergence, unmirror
        self._next_policy: Policy | None = None  # in force from the next epoch on
        self.shadow = False  # hold nothing: every frame leaves at once and is compared behind
        self.epoch = 0
        # read by the comparers (stream.Host)
        self.timeout_ns = limits.compare_timeout_ns
        self.grace_ns = limits.datagram_grace_ns
        self.max_stream = limits.max_stream_bytes
        self.max_history = limits.history_bytes
        self.ledger = Ledger(limits.max_queue_size, limits.max_held_bytes)
        self.watched = Budget(Ledger(limits.max_queue_size, limits.max_held_bytes))
        # hot counters are plain attributes
        self._n_pvm = self._n_svm = self._n_released = 0
        self._counters: Counter[str] = Counter({name: 0 for name, _ in COUNTERS})
        self._flows = Flows(self, limits, policy)
        self._tcp = self._flows.tcp
        self._fragments = Fragments(self, self.policy.verdicts[-1])
        self.now = 0
        self._asked = False
        self._checkpointing = False
        self._solo = False
        self._void_ns = 0
        self._stop_ts = _LONG_AGO
        self._queue = HeldQueue(self.ledger)  # of the PVM, undecided, while checkpointing
        self._next: deque[tuple[Record, int]] = deque()  # of the SVM of the next epoch
        self._next_behind: deque[tuple[Record, int]] = deque()  # of flows that hold nothing
        self._next_lost = 0
        # A heap with one live entry per flow, lazy: an entry is a lower bound, the flow itself
        # knows better. So a timeout costs nothing per frame and no scan.
        self._serial = count()
        self._timers: list[tuple[int, int, Flow]] = []  # every flow where anything waits
        self._soon_ns = NEVER  # the first of them that was armed to go off within SOON_NS
        self._next_scan = self._next_look = 0
        self._parts: dict[Stream, None] = {}  # a verified part of their head may leave
        self.fast: Fast = NoFast() if fast is None else fast
        self._fast_wanted = self.fast.enabled
        self._giving = Giving(self, self.fast)
        self._note = self._giving.note
        self._history: OrderedDict[Stream, None] = OrderedDict()
        self._history_sum = 0

    # -- frames

    def from_pvm(self, rec: Record, now_ns: int) -> None:
        """A frame of the primary guest, in the order of capture."""
        self.now = now_ns
        self._n_pvm += 1
        if self.shadow and not self._solo:
            self._send_ahead(rec)
        p = parse(rec.frame)
        if p.kind is _TCP and not self._checkpointing and rec.ts_ns > self._stop_ts:
            st = self._tcp.get(p.key)
            if st is None:
                if self._solo or (st := self._flows.new(self._tcp, p)) is None:
                    self._homeless(rec)
                    return
            elif st.epoch != self.epoch:
                st = self._flows.renew(self._tcp, st, p)
            st.last = now_ns
            st.pvm(rec, p, now_ns)
            if self.fast.enabled:
                self._note(st, rec)
            return
        self._count_opaque(p)
        if self._solo:
            self._homeless(rec)
        elif rec.ts_ns <= self._stop_ts:
            self._counters["released_late"] += 1
            self._committed(rec, p)
        elif self._checkpointing:
            flow = None if p.kind is _FRAGMENT else self._flows.of(p, must=False)
            if isinstance(flow, Watched):
                flow.pvm_in_checkpoint(rec, p, now_ns)
            elif isinstance(flow, Passed):
                flow.pvm(rec, p, now_ns)
            else:
                self._enqueue(rec, p)
        else:
            self._feed(rec, p)

    def set_shadow(self, on: bool, now_ns: int) -> None:
        """In shadow every frame leaves at once and is compared behind; what is held leaves now."""
        self.now, self.shadow = now_ns, on
        self.fast.enabled = not on and self._fast_wanted
        if on:
            self._giving.unbrake_all()
            self._recall_all(self.fast.outstanding())
            held = [h for flow in self._waiting() for h in flow.held]
            for rec, _, _ in sorted([*held, *self._queue], key=lambda h: h[2]):
                self._send_ahead(rec)

    def _send_ahead(self, rec: Record) -> None:
        if rec.sent:
            return
        for part in rec.parts or (rec,):
            if not part.sent:
                self._counters["released_in_shadow"] += 1
                self._n_released += 1
                self._release(part)
                part.sent = True
        rec.sent = True

    def _feed(self, rec: Record, p: Packet) -> None:
        if p.kind is _FRAGMENT:
            whole = self._fragments.pvm(rec, p, self.now)
            if whole is None:
                return
            rec, p = whole, parse(whole.frame)
        flow = self._flows.of(p)
        if flow is None:
            self._homeless(rec)
        else:
            flow.pvm(rec, p, self.now)
            if self.fast.enabled:
                self._note(flow, rec)

    def _homeless(self, rec: Record) -> None:
        """A frame with no flow: the pair is lost, or the table is full."""
        if self._solo:
            self._counters["released_solo"] += 1
            self.emit(rec, self.now)
        # else dropped and counted by _room(): like loss on the network

    def _enqueue(self, rec: Record, p: Packet) -> None:
        if not self.ledger.room(CHECKPOINT_QUEUE):
            self._counters["queue_full_dropped"] += 1
            self.ask(Cause.QUEUE_FULL, "checkpoint")
            return
        self._queue.push(rec, p, self.now)

    def from_svm(self, rec: Record, epoch12: int, now_ns: int) -> None:
        """A frame of the secondary guest, TCP numbers translated; epoch12 is its epoch
        modulo 4096. Never released."""
        self.now = now_ns
        self._n_svm += 1
        ahead = (epoch12 - self.epoch) & _TAG
        if ahead == 0 and not self._checkpointing and not self._solo:
            p = parse(rec.frame)
            if p.kind is _TCP:
                st = self._tcp.get(p.key)
                if st is None:
                    st = self._flows.new(self._tcp, p)
                    if st is None:
                        return
                elif st.epoch != self.epoch:
                    st = self._flows.renew(self._tcp, st, p)
                st.last = now_ns
                st.svm(p, now_ns)
                if self.fast.enabled:
                    self._note(st, rec)
                return
            p.datagram_size = rec.datagram_size
            self._svm_datagram(rec, p)
        elif ahead == 0:
            self._counters["svm_superseded"] += 1
        elif ahead <= _NEXT_EPOCHS and not self._solo:
            self._buffer(rec, epoch12 & _TAG)
        else:
            self._counters["svm_stale"] += 1

    def _buffer(self, rec: Record, tag: int) -> None:
        """A frame of the SVM that is of an epoch to come."""
        p = parse(rec.frame)
        flow = (self._tcp if p.kind is _TCP else self._flows.datagram).get(p.key)
        kept = self._next_behind if isinstance(flow, Passed) else self._next
        if len(kept) < self.limits.max_queue_size:
            self._counters["svm_buffered"] += 1
            kept.append((rec, tag))
            return
        self._counters["svm_buffer_overflow"] += 1
        if isinstance(flow, Watched):
            flow.miss()
        elif not isinstance(flow, Passed):
            self._next_lost += 1

    def _svm_datagram(self, rec: Record, p: Packet) -> None:
        self._count_opaque(p)
        if p.kind is _FRAGMENT:
            whole = self._fragments.svm(p, self.now)
            if whole is None:
                return
            p = whole
        flow = self._flows.of(p)
        if flow is not None:
            flow.svm(p, self.now)
            if self.fast.enabled:
                self._note(flow, rec)

    def _count_opaque(self, p: Packet) -> None:
        if p.defect:
            self._counters["opaque"] += 1
            self._counters[f"defect_{p.defect}"] += 1

    # -- checkpoints

    def begin_checkpoint(self) -> None:
        """From now on the PVM's frames are queued undecided, the SVM's of this epoch dropped
        and of the next one kept. Also ends a solo phase (re-protection)."""
        self._giving.unbrake_all()
        self._checkpointing = True
        self._solo = False
        self._collect()

    def _collect(self) -> None:
        """Move what the flows hold to the queue, oldest first, each flow in its order."""
        held: list[Held] = []
        for flow in self._waiting():
            watched = isinstance(flow, FastFlow) and isinstance(flow.host, Watching)
            (self.watched.frames if watched else held).extend(flow.unhold())
        if held:
            held.extend(self._queue.drain())
            held.sort(key=lambda h: h[2])
            self._queue.extend(held)

    def _waiting(self) -> Iterator[Flow]:
        # whoever holds or stashes anything has a timer
        return iter({id(flow): flow for _, _, flow in self._timers}.values())

    def set_policy(self, policy: Policy) -> None:
        """New rules. They take force with the next checkpoint, which this asks for."""
        self._next_policy = policy
        self._flows.announce(policy)
        self.ask(Cause.POLICY, "policy")

    def release_until(self, ts_ns: int) -> int:
        """While checkpointing: release the queued frames captured at ts_ns or before, which
        are proven to precede STOP. Returns how many."""
        return self._release_queued(ts_ns, "released_by_checkpoint")

    def _release_queued(self, ts_ns: int, counter: str) -> int:
        queue = self._queue.drain()
        self._queue.extend(h for h in queue if h[0].ts_ns > ts_ns)
        n = 0
        for rec, p, _ in queue:
            if rec.ts_ns <= ts_ns:
                n += 1
                self._counters[counter] += 1
                self._committed(rec, p)
        return n

    def _committed(self, rec: Record, p: Packet) -> None:
        # with a full table it leaves untracked: the next frame is as of an unknown connection
        if p.kind is _TCP and (st := self._flows.of(p, must=False)) is not None:
            st.commit(p)
            self.emit(rec, self.now)
            if st.held:  # it may have been what the next one waited for
                st.pump(self.now)
            return
        if p.kind is _FRAGMENT:
            self._fragments.commit(p, self.now)
        self.emit(rec, self.now)

    def commit_checkpoint(self, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        """The checkpoint is complete on the SVM, which runs on under `epoch`.

        The PVM's frames captured at stop_ts_ns or before are in it and leave; newer ones
        are compared under the new epoch, with the SVM's frames kept for it. Everything
        that the SVM said before is forgotten (I7).
        """
        self.now = now_ns
        self._counters["checkpoints"] += 1
        self._recall_all(self.fast.outstanding())
        self._collect()
        self.epoch, self._stop_ts = epoch, stop_ts_ns
        for flow in self._waiting():
            if flow.epoch != GIVEN:
                flow.new_epoch(epoch)
        self._fragments.new_epoch(epoch)
        self._flows.openings.clear()
        self._checkpointing = self._asked = self._solo = False
        self._release_queued(stop_ts_ns, "released_by_checkpoint")
        behind = self.watched.commit(self._flows.of, stop_ts_ns)
        if self._void_ns:
            self._void_ns = self._void_ns if stop_ts_ns <= self._void_ns else 0
            self._forget(epoch)
            self._fragments.new_epoch(epoch)
        self._fragments.begin()
        if self._next_policy is not None:
            self._flows.enforce(self._next_policy, epoch)
            self._timers.clear()
            self._soon_ns = NEVER
            self._next_policy = None
        rest = self._queue.drain()
        # they were accepted before, so no limit may drop them now
        self.ledger.raise_limits(len(rest))
        self._flows.limit = self.limits.max_flows + len(rest)
        for rec, p, _ in rest:
            self._feed(rec, p)
        for rec, p, _ in behind:
            catch_up(self._flows.of(p, must=False), rec, p, now_ns)
        self.ledger.restore_limits()
        self._flows.limit = self.limits.max_flows
        kept = [*self._next, *self._next_behind]
        self._next.clear()
        self._next_behind.clear()
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

    def void_flows(self, now_ns: int) -> None:
        """Until now frames of the PVM may have left, or of the SVM gone by, unseen: with the next
        commit, after which both guests are equal, every flow is met anew, until one whose STOP
        came later."""
        self._void_ns = now_ns

    def gather(self, now_ns: int) -> int:
        """No twin is to be expected: what waits in tier K comes here. How many frames wait."""
        self.now = now_ns
        self._recall_all(self.fast.outstanding())
        return self.held_packets

    def abort_checkpoint(self, now_ns: int) -> None:
        """The checkpoint failed: everything stays held until a commit or release_all."""
        self.now = now_ns
        self._counters["checkpoints_aborted"] += 1
        self._counters["svm_stale"] += len(self._next) + len(self._next_behind)
        self._next.clear()
        self._next_behind.clear()
        self._next_lost = 0

    def release_all(self) -> int:
        """The pair is lost and the PVM goes solo: release everything held, in order, and from
        now on at once. The flows are forgotten. Returns how many were held."""
        self._giving.unbrake_all()
        self._recall_all(self.fast.outstanding())
        self._collect()
        for flow in (*self._waiting(), self._fragments):
            flow.forget_svm()
        queue = self._queue.drain()
        self._checkpointing, self._solo = False, True
        self._counters["released_solo"] += len(queue)
        self._forget(self.epoch + 1)
        self._next.clear()
        self._next_behind.clear()
        self._next_lost = 0
        for rec, _, _ in queue:
            self.emit(rec, self.now)
        return len(queue)

    def _forget(self, epoch: int) -> None:
        """All flows, and what tier K has learnt before this epoch."""
        self.fast.void(epoch)
        self._flows.clear()
        self._fragments = Fragments(self, self.policy.verdicts[-1])
        self._timers.clear()
        self._soon_ns = NEVER
        self._history.clear()
        self._parts.clear()
        self._giving.clear()
        self._history_sum = 0
        self.watched.frames.drain()

    # -- time

    def flush(self, now_ns: int) -> None:
        """Release verified parts of frames that wait for their rest, in whole segments.

        To be called when a batch of frames has been fed: most rests are in the same batch.
        """
        self.now = now_ns
        self._giving.end_batch(self.fast.enabled and not self._checkpointing and not self._solo)
        if not self._parts:
            return
        parts, self._parts = self._parts, {}
        for st in parts:
            if st.epoch == self.epoch and st.release_part(now_ns, True):
                self.arm(st, now_ns + PART_NS)

    def tick(self, now_ns: int) -> None:
        """Timeouts and ageing; cheap when nothing is due. To be called at tick_ns(), and without
        that every 50 ms or so."""
        self.now = now_ns
        self._giving.look()
        timers = self._timers
        if not self._checkpointing:
            while timers and timers[0][0] <= now_ns:
                when, _, flow = heappop(timers)
                if when != flow.when:
                    continue  # an earlier one was set
                flow.when = 0
                if flow.epoch == GIVEN:
                    continue
                if flow.epoch != self.epoch:
                    flow.new_epoch(self.epoch)
                due = flow.expire(now_ns)
                if due:
                    self.arm(flow, due)
            for apart in self._flows.openings.apart(now_ns, self.timeout_ns):
                if not apart.asked:
                    apart.asked = True
                    evidence = Evidence(pvm_frame=apart.held[0][0])
                    self.ask(Cause.OPENED_APART, apart, evidence)
            if self._soon_ns <= now_ns:
                near = timers and timers[0][0] - now_ns < SOON_NS
                self._soon_ns = timers[0][0] if near else NEVER
            if self.fast.enabled and now_ns >= self._next_look:
                self._next_look = now_ns + self.timeout_ns // 8
                self._recall_all(self.fast.overdue(now_ns - self.timeout_ns // 2))
        if now_ns >= self._next_scan:
            self._next_scan = now_ns + self.limits.expired_scan_cycle_ns
            self._flows.age(now_ns)

    def tick_ns(self) -> int:
        """When tick() has something to do that cannot be late (NEVER: nothing): a timer of some
        ms, a frame that is kept back. One of seconds may be late by 50 ms, and mostly its flow is
        gone by then: it wakes nobody."""
        return self.now if self._giving.braking else self._soon_ns

    def unbrake(self, now_ns: int) -> None:
        """In place of tick(), where no time runs out: what is kept back for tier K leaves."""
        self.now = now_ns
        self._giving.unbrake_all()

    # -- tier K

    def lookup(self, key: FlowKey) -> Words | None:
        """What tier K knows of a connection that is not in the tables."""
        if not self.fast.enabled or self._solo:
            return None
        return self.fast.seize(key)

    def recall(self, st: FastFlow, words: Words | None = None) -> None:
        """Tier K has handed the flow over, or has to."""
        words = self.fast.seize(st.key) if words is None else words
        if words is None:  # it has forgotten it: as one that is met for the first time
            st.unknown(self.epoch)
            return
        self._giving.recalled(st, words)
        self._counters["fast_recalled"] += 1

    def _recall_all(self, keys: list[FlowKey]) -> None:
        for key in keys:
            st = (self._tcp if is_stream(key) else self._flows.datagram).get(key)
            if st is None:
                words = self.fast.seize(key)
                if words is not None:
                    self._flows.revive(key, words)
            elif st.epoch == GIVEN:
                assert isinstance(st, FastFlow)
                self.recall(st)

    # -- for the comparers (stream.Host)

    def emit(self, rec: Record, now_ns: int) -> None:
        """Release a frame, unless it has left already."""
        self._on_wait(now_ns - rec.ts_ns)
        if rec.sent:
            return
        if not rec.parts:
            self._n_released += 1
            self._release(rec)
            return
        for part in rec.parts:
            if not part.sent:
                self._n_released += 1
                self._release(part)

    def uncompared(self, verdict: Verdict) -> None:
        """A frame is about to leave that the policy does not hold."""
        self._counters["uncompared"] += 1
        self._flows.rules[verdict.rule].uncompared += 1

    def ask(self, cause: Cause, flow: Flow | str, evidence: Evidence = NO_EVIDENCE) -> None:
        """Count a divergence; the first one of an epoch asks for a checkpoint."""
        self._counters[f"cause_{cause}"] += 1
        d = self._divergence(cause, flow, evidence, True)
        if not self._asked and not self._checkpointing and not self._solo:
            self._asked = True
            self._counters["checkpoint_requests"] += 1
            self._request(d)

    def noticed(self, cause: Cause, flow: Flow, evidence: Evidence) -> None:
        """A difference in a flow that is only watched."""
        self._counters["differences_watched"] += 1
        self._divergence(cause, flow, evidence, False)

    def _divergence(
        self, cause: Cause, flow: Flow | str, evidence: Evidence, asked: bool
    ) -> Divergence:
        text, proto, port, rule = str(flow), "", 0, ""
        if not isinstance(flow, str):
            text, rule = flow.text(), flow.verdict.rule
            proto, port = (
                ("tcp", tcp_port(flow.key))
                if isinstance(flow, Stream)
                else (datagram_name(flow.key) if flow.key else ("fragment", 0))
            )
            self._flows.rules[rule].differences += 1
        d = Divergence(self.now, cause, text, proto, port, rule, evidence, asked)
        self._on_divergence(d)
        return d

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        self._counters[name] += n

    def arm(self, flow: Flow, when_ns: int) -> None:
        """Look at the flow at when_ns or before."""
        if not flow.when or when_ns < flow.when:
            flow.when = when_ns
            heappush(self._timers, (when_ns, next(self._serial), flow))
            if when_ns < self._soon_ns and when_ns - self.now < SOON_NS:
                self._soon_ns = when_ns

    def part_verified(self, stream: Stream) -> None:
        """The stream's head is verified in part: flush() looks at it."""
        self._parts[stream] = None

    def charge_history(self, stream: Stream) -> None:
        """The stream's history has outgrown what it is accounted with: account, or trim."""
        full = self.max_history + self.max_history // 4
        n = len(stream.hist)
        if n > full:
            stream.hist.trim(self.max_history)
            n = stream.hist.size
        cap = max(n, min(max(2 * stream.hist_cap, 4096), full))
        self._history_sum += cap - stream.hist_cap
        stream.hist_cap = cap
        self._history[stream] = None
        self._history.move_to_end(stream)
        while self._history_sum > self.limits.history_total and len(self._history) > 1:
            self._counters["history_evicted"] += 1
            self.drop_history(next(iter(self._history)))

    def drop_history(self, stream: Stream) -> None:
        """Give up what was kept of its past."""
        if stream.hist_cap:
            self._history_sum -= stream.hist_cap
            stream.hist_cap = 0
            stream.hist.clear()
            del self._history[stream]

    # -- to be looked at

    @property
    def policy(self) -> Policy:
        """The rules in force."""
        return self._flows.policy

    @property
    def rules(self) -> dict[str, RuleCount]:
        """What each rule has done."""
        return self._flows.rules

    @property
    def counters(self) -> Counter[str]:
        """All counters of COUNTERS; do not change it."""
        c = self._counters
        c["pvm_frames"], c["svm_frames"] = self._n_pvm, self._n_svm
        c["released"] = self._n_released
        return c

    @property
    def pvm_packets(self) -> int:
        """Frames of the PVM that wait to be compared, or for a checkpoint."""
        return self.ledger.pvm_packets

    @property
    def svm_packets(self) -> int:
        """Frames of the SVM that are stashed to be compared."""
        return self.ledger.svm_packets

    @property
    def held_packets(self) -> int:
        """Frames of the PVM that wait, also those that are kept back for tier K."""
        return self.ledger.pvm_packets + self._giving.kept()[0]

    @property
    def held_bytes(self) -> int:
        """Their bytes, Ethernet headers included."""
        return self.ledger.pvm_bytes + self._giving.kept()[1]

    @property
    def flows(self) -> int:
        """Flows known, TCP and others."""
        return len(self._flows)
