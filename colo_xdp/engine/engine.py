# SPDX-License-Identifier: GPL-2.0-or-later
"""The compare engine: decides which of the PVM's frames may leave, and when.

Sans-IO: the caller supplies frames and the time, and the engine calls back. The primary controller
runs it for everything that the kernel does not decide itself (docs/design/compare-rules.md,
docs/design/checkpoints.md). It runs in one thread; callbacks must not call into the engine.

All times are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from functools import partial
from itertools import islice

from ..compare.bypass import MonitorBudget
from ..compare.causes import Cause
from ..compare.compared import ComparedFlow
from ..compare.flow import Comparer, Flow, FlowContext
from ..compare.fragments import Fragments
from ..compare.history import HistoryBudget
from ..compare.ledger import Ledger
from ..compare.limits import Limits
from ..compare.patience import QUIET_NS, Patience
from ..compare.policy import Policy
from ..compare.tcp import PART_NS
from ..compare.tcp_wait import FLAGS
from ..compare.timers import SOON_NS, Clock, Timers
from ..net.flow_key import FlowKey
from ..net.frame import Evidence, Frame
from ..net.packet import Kind, Packet, parse
from ..offload.kernel_format import ConnState, KernelPath, NoKernelPath
from ..offload.scheduler import OffloadScheduler
from .checkpoint_queue import CheckpointQueue
from .counters import COUNTERS
from .fast_path_watch import FastPathWatch
from .flow_table import FlowTable, RuleCount
from .journal import Divergence
from .outbox import EngineOutbox
from .silence import SERVED
from .suspect import Suspect

__all__ = ["COUNTERS", "SOON_NS", "Divergence", "Engine", "Frame", "Limits", "Policy"]

_TCP, _FRAGMENT = Kind.TCP, Kind.FRAGMENT
_TAG = 0xFFF
#: how many epochs ahead the next one may be (a failed checkpoint uses up a number)
_NEXT_EPOCHS = 16
#: frames of which shadow mode knows when the SVM had sent them; 64 bytes each
MAX_MATCHES = 4096


class Engine:
    """Holds the PVM's frames until the rules let them leave.

    release(record) sends a frame. request_checkpoint(divergence) is called once per epoch.
    on_wait(ns) gets the time from capture to release of each frame; in shadow mode, the time that
    it would have waited. on_divergence gets every difference, also those that request nothing (a
    checkpoint has already been requested, or the flow is only monitored). unmirror(key) gets the
    flows (struct colo_unmirrored_key) whose clients' frames must not reach the SVM, and None when
    there are none any more. fast: the fast path, which gets settled streams. patience: how long
    frames wait, shared by the engines of a pair; None: compare_timeout.
    """

    def __init__(
        self,
        limits: Limits,
        policy: Policy,
        release: Callable[[Frame], None],
        *,
        request_checkpoint: Callable[[Divergence], None],
        on_wait: Callable[[int], None],
        on_divergence: Callable[[Divergence], None] = lambda d: None,
        unmirror: Callable[[bytes | None], None] = lambda key: None,
        fast: KernelPath | None = None,
        patience: Patience | None = None,
    ) -> None:
        self.limits = limits
        self.patience = patience or Patience(limits.compare_timeout_ns)
        self._clock = Clock()
        self._outbox = EngineOutbox(
            self._clock, release, request_checkpoint, on_wait, on_divergence, self.patience
        )
        self._counters = self._outbox.counters
        self._n_pvm = self._n_svm = 0  # hot counters
        self.ledger = Ledger(limits.max_queue_size, limits.max_held_bytes)
        self._timers: Timers[Flow] = Timers(self._clock)
        self._histories = HistoryBudget(
            limits.history_bytes,
            limits.history_total,
            partial(self._outbox.count, "history_evicted"),
        )
        self._host = FlowContext(
            self._outbox,
            self.ledger,
            self._timers,
            self._histories,
            limits.compare_timeout_ns,
            limits.datagram_grace_ns,
            limits.max_stream_bytes,
            self.patience,
        )
        self._watched = MonitorBudget(Ledger(limits.max_queue_size, limits.max_held_bytes))
        self.fast: KernelPath = NoKernelPath() if fast is None else fast
        self._offload_wanted = self.fast.enabled
        self._flows = FlowTable(
            self._clock,
            self._host,
            self._outbox,
            self._watched,
            limits,
            policy,
            lookup=self._lookup,
            restore=self._restore,
            unmirror=unmirror,
        )
        self._tcp = self._flows.tcp
        self._scheduler = OffloadScheduler(
            self._clock, self.fast, self._outbox, self.patience, self._flows.put
        )
        self._note = self._scheduler.note
        self._fragments = self._no_fragments()
        self._queue = CheckpointQueue(self.ledger, limits.max_queue_size)
        self._next_policy: Policy | None = None  # in force from the next epoch on
        self.shadow = False  # hold nothing: every frame leaves at once and is compared afterwards
        self.crossed_ns = self._next_crossing = 0  # in shadow mode: see _note_crossing()
        self._checkpointing = False
        self._solo = False
        self._void_ns = 0
        self._next_scan = 0
        self._watch = FastPathWatch(
            self._clock, self.fast, self._flows, self._timers, self.patience, self._host.timeout_ns
        )
        self._suspect = Suspect()

    # -- frames

    def from_pvm(self, rec: Frame, now_ns: int) -> None:
        """Process a frame of the PVM, in the order of capture."""
        clock = self._clock
        patience = self.patience
        clock.now = now_ns
        self._n_pvm += 1
        if self.shadow and not self._solo:
            self._outbox.release_ahead(rec)
        p = parse(rec.frame)
        if p.off != p.end or p.flags & FLAGS:  # Patience.moved(), without the call
            patience.before_ns, patience.moved_ns = patience.moved_ns, now_ns
        if p.kind is _TCP and not self._checkpointing and rec.ts_ns > self._queue.stop_ns:
            # Deliberately duplicates _feed() and FlowTable.of(): nearly all frames are TCP segments
            # of known flows, and each saved call counts (tests/bench/slow_path.py).
            st = self._tcp.get(p.key)
            if st is None:
                if self._solo or (st := self._flows.new(self._tcp, p)) is None:
                    self._no_flow(rec)
                    return
            elif st.epoch != clock.epoch:
                st = self._flows.renew(self._tcp, st, p)
            st.last = now_ns
            st.pvm(rec, p, now_ns)
            if self.fast.enabled:
                self._note(st, rec)
            return
        self._count_opaque(p)
        if self._solo:
            self._no_flow(rec)
        elif rec.ts_ns <= self._queue.stop_ns:
            self._counters["released_late"] += 1
            self._committed(rec, p)
        elif self._checkpointing:
            flow = None if p.kind is _FRAGMENT else self._flows.of(p, must=False)
            if flow is None or not flow.pvm_in_checkpoint(rec, p, now_ns):
                self._enqueue(rec, p)
        else:
            self._feed(rec, p)

    def set_shadow(self, on: bool, now_ns: int) -> None:
        """Enter or leave shadow mode, in which frames leave at once and are compared later.

        Held frames leave now.
        """
        self._clock.now, self.shadow = now_ns, on
        self.fast.enabled = not on and self._offload_wanted
        self._outbox.matches = deque(maxlen=MAX_MATCHES) if on else None
        if on:
            self._scheduler.end_all_backpressure()
            self._watch.reclaim_all()
            held = [h for flow in self._timers.flows() for h in flow.held]
            for rec, _, _ in sorted([*held, *self._queue.held], key=lambda h: h[2]):
                self._outbox.release_ahead(rec)

    def followed_ns(self, after_ns: int, until_ns: int) -> int:
        """Return when the SVM had sent what both have sent of the PVM's output of that time.

        0: nothing, or it is not known (only shadow mode keeps it, of the latest frames).
        """
        matches = self._outbox.matches
        if not matches or (len(matches) == MAX_MATCHES and matches[0][0] > after_ns):
            return 0
        return max((came for sent, came in matches if after_ns < sent <= until_ns), default=0)

    def waiting_ns(self) -> int:
        """Return since when the oldest frame that flows hold has waited; 0: they hold none."""
        flows = self._timers.flows()
        return min((since for flow in flows for _, _, since in islice(flow.held, 1)), default=0)

    def _feed(self, rec: Frame, p: Packet) -> None:
        if p.kind is _FRAGMENT:
            whole = self._fragments.pvm(rec, p, self._clock.now)
            if whole is None:
                return
            rec, p = whole, parse(whole.frame)
        flow = self._flows.of(p)
        if flow is None:
            self._no_flow(rec)
        else:
            flow.pvm(rec, p, self._clock.now)
            if self.fast.enabled:
                self._note(flow, rec)

    def _no_flow(self, rec: Frame) -> None:
        """Handle a frame without a flow: the pair is lost, or the table is full."""
        if self._solo:
            self._counters["released_solo"] += 1
            self._outbox.release(rec, False)
        # otherwise dropped and counted by _room(): like loss on the network

    def _enqueue(self, rec: Frame, p: Packet) -> None:
        if not self._queue.offer(rec, p, self._clock.now):
            self._counters["queue_full_dropped"] += 1
            self._outbox.request(Cause.QUEUE_FULL, "checkpoint")

    def from_svm(self, rec: Frame, epoch12: int, now_ns: int) -> None:
        """Process a frame of the SVM, whose TCP numbers are translated. It is never released.

        epoch12: its epoch modulo 4096.
        """
        clock = self._clock
        patience = self.patience
        clock.now = now_ns
        patience.heard_ns = rec.ts_ns
        self._n_svm += 1
        ahead = (epoch12 - clock.epoch) & _TAG
        if ahead == 0 and not self._checkpointing and not self._solo:
            if not patience.awake_ns:
                patience.awake_ns = rec.ts_ns
            p = parse(rec.frame)
            if p.off != p.end or p.flags & FLAGS:
                patience.before_ns, patience.moved_ns = patience.moved_ns, now_ns
            if p.kind is _TCP:
                # duplicates _svm_datagram() and FlowTable.of(), as in from_pvm()
                st = self._tcp.get(p.key)
                if st is None:
                    st = self._flows.new(self._tcp, p)
                    if st is None:
                        return
                elif st.epoch != clock.epoch:
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
            if self._suspect:
                self._acquit(rec)
        elif ahead <= _NEXT_EPOCHS and not self._solo:
            self._buffer(rec, epoch12 & _TAG)
        else:
            self._counters["svm_stale"] += 1

    def _buffer(self, rec: Frame, tag: int) -> None:
        """Keep a frame of the SVM that belongs to an epoch to come."""
        p = parse(rec.frame)
        flow = (self._tcp if p.kind is _TCP else self._flows.datagram).get(p.key)
        bypassed = flow is not None and flow.bypassed
        if self._queue.buffer(rec, tag, bypassed):
            self._counters["svm_buffered"] += 1
            return
        self._counters["svm_buffer_overflow"] += 1
        if flow is not None and bypassed:
            flow.miss()
        else:
            self._queue.lost += 1

    def _svm_datagram(self, rec: Frame, p: Packet) -> None:
        self._count_opaque(p)
        if p.kind is _FRAGMENT:
            whole = self._fragments.svm(p, self._clock.now)
            if whole is None:
                return
            p = whole
        flow = self._flows.of(p)
        if flow is not None:
            flow.svm(p, self._clock.now)
            if self.fast.enabled:
                self._note(flow, rec)

    def _count_opaque(self, p: Packet) -> None:
        if p.defect:
            self._counters["opaque"] += 1
            self._counters[f"defect_{p.defect}"] += 1

    # -- checkpoints

    def begin_checkpoint(self) -> None:
        """Begin a checkpoint; also ends a solo phase (re-protection).

        From now on the PVM's frames are queued undecided. The SVM's are dropped if they are of this
        epoch, and kept if they are of the next.
        """
        self._scheduler.end_all_backpressure()
        if self._outbox.asked_for is not None and not self._suspect.begin(self._outbox.asked_for):
            self._needless()
        self._set_phase(checkpointing=True)
        self._collect()

    def _acquit(self, rec: Frame) -> None:
        """Look whether the SVM's frame is what a checkpoint was requested for in vain."""
        waited = self._suspect.answered(parse(rec.frame), rec.ts_ns)
        if waited:
            self._needless()
            self.patience.waited(waited)

    def _needless(self) -> None:
        self._counters["checkpoints_needless"] += 1
        self.patience.needless()

    def _set_phase(self, *, checkpointing: bool = False, solo: bool = False) -> None:
        self._checkpointing, self._solo = checkpointing, solo
        self._outbox.may_ask = not checkpointing and not solo

    def _collect(self) -> None:
        """Move what the flows hold to the queue, oldest first, each flow in its order."""
        # every flow that holds anything has a timer
        self._queue.collect([held for flow in self._timers.flows() for held in flow.defer()])

    def set_policy(self, policy: Policy) -> None:
        """Set new rules. They take effect with the next checkpoint, which this requests."""
        self._next_policy = policy
        self._flows.announce(policy)
        self._outbox.request(Cause.POLICY, "policy")

    def release_until(self, ts_ns: int) -> int:
        """Release queued frames captured at ts_ns or before; return how many.

        Called during a checkpoint, for frames that are known to precede STOP.
        """
        return self._release_queued(ts_ns, "released_by_checkpoint")

    def _release_queued(self, ts_ns: int, counter: str) -> int:
        queued = self._queue.take_until(ts_ns)
        for rec, p, _ in queued:
            self._counters[counter] += 1
            self._committed(rec, p)
        return len(queued)

    def _committed(self, rec: Frame, p: Packet) -> None:
        # with a full table it leaves untracked: the next frame looks like one of an unknown
        # connection
        if p.kind is _TCP and (st := self._flows.of(p, must=False)) is not None:
            st.commit(p)
            self._outbox.release(rec, False)
            st.release_ready(self._clock.now)  # it may have been what the next one waited for
            return
        if p.kind is _FRAGMENT:
            self._fragments.commit(p, self._clock.now)
        self._outbox.release(rec, False)

    def commit_checkpoint(self, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        """Commit a checkpoint that is complete on the SVM, which continues under `epoch`.

        The PVM's frames captured at stop_ts_ns or before are contained in it and leave. Newer ones
        are compared under the new epoch, with the SVM's frames kept for it. All earlier output of
        the SVM is forgotten.
        """
        self._clock.now = now_ns
        self._counters["checkpoints"] += 1
        self.patience.begin_epoch(now_ns)
        self._watch.reclaim_all()
        self._collect()
        self._clock.epoch, self._queue.stop_ns = epoch, stop_ts_ns
        for flow in self._timers.flows():
            flow.new_epoch(epoch)
        self._fragments.new_epoch(epoch)
        self._flows.openings.clear()
        self._set_phase()
        self._outbox.asked = False
        self._outbox.asked_for = None
        if self._suspect:
            self.patience.needed(now_ns)
        self._suspect.clear()
        self._release_queued(stop_ts_ns, "released_by_checkpoint")
        behind = self._watched.commit(self._flows.of, stop_ts_ns)
        if self._void_ns:
            self._void_ns = self._void_ns if stop_ts_ns <= self._void_ns else 0
            self._forget(epoch)
            self._fragments.new_epoch(epoch)
        self._fragments.begin()
        if self._next_policy is not None:
            self._flows.enforce(self._next_policy, epoch)
            self._timers.clear()
            self._next_policy = None
        rest = self._queue.held.drain()
        # they were accepted before, so no limit may drop them now
        self.ledger.raise_limits(len(rest))
        self._flows.limit = self.limits.max_flows + len(rest)
        for rec, p, _ in rest:
            self._feed(rec, p)
        for rec, p, _ in behind:
            if (behind_flow := self._flows.of(p, must=False)) is not None:
                behind_flow.catch_up(rec, p, now_ns)
        self.ledger.restore_limits()
        self._flows.limit = self.limits.max_flows
        for rec, tag in self._queue.take_svm():
            self._n_svm -= 1
            if (tag - epoch) & _TAG:
                self._n_svm += 1
                self._counters["svm_stale"] += 1
            else:
                self.from_svm(rec, tag, now_ns)
        self.patience.since_ns = now_ns
        lost, self._queue.lost = self._queue.lost, 0
        if lost:
            self._outbox.request(Cause.PEER_GAP, f"{lost} frames of the new epoch")

    def void_flows(self, now_ns: int) -> None:
        """Have every flow treated as new from the next commit on, when both guests are equal.

        Frames of the PVM may have left until now, or frames of the SVM gone by, unseen. This stays
        in force until a commit whose STOP came later.
        """
        self._void_ns = now_ns

    def gather(self, now_ns: int) -> int:
        """Reclaim what waits in the fast path, as no counterparts can be expected.

        Returns how many frames wait.
        """
        self._clock.now = now_ns
        self._watch.reclaim_all()
        return self.held_packets

    def abort_checkpoint(self, now_ns: int) -> None:
        """Note a failed checkpoint: everything stays held until a commit or release_all()."""
        self._clock.now = now_ns
        self._counters["checkpoints_aborted"] += 1
        self._counters["svm_stale"] += self._queue.forget_svm()

    def release_all(self) -> int:
        """Release all held frames in order, and later ones at once; return how many were held.

        The pair is lost and the PVM goes solo. The flows are forgotten.
        """
        self._scheduler.end_all_backpressure()
        self._watch.reclaim_all()
        self._collect()
        for flow in (*self._timers.flows(), self._fragments):
            flow.forget_svm()
        queue = self._queue.held.drain()
        self._set_phase(solo=True)
        self._suspect.clear()
        self._counters["released_solo"] += len(queue)
        self._forget(self.epoch + 1)
        self._queue.forget_svm()
        for rec, _, _ in queue:
            self._outbox.release(rec, False)
        return len(queue)

    def _forget(self, epoch: int) -> None:
        """Forget all flows, and what the fast path learnt before this epoch."""
        self.fast.void(epoch)
        self._flows.clear()
        self._fragments = self._no_fragments()
        self._timers.clear()
        self._histories.clear()
        self._outbox.take_parts()
        self._scheduler.clear()
        self._watched.frames.drain()

    def _no_fragments(self) -> Fragments:
        return Fragments(self._host, self._clock.epoch, self.policy.verdicts[-1])

    # -- time

    def flush(self, now_ns: int) -> None:
        """Release verified parts of frames that wait for their rest, in whole segments.

        Called at the end of a batch of frames: most rests are in the same batch.
        """
        self._clock.now = now_ns
        self._scheduler.end_batch(self.fast.enabled and not self._checkpointing and not self._solo)
        for flow in self._outbox.take_parts():
            if flow.epoch == self._clock.epoch and flow.release_part(now_ns, True):
                self._timers.arm(flow, now_ns + PART_NS)

    def tick(self, now_ns: int) -> None:
        """Handle timeouts and ageing; cheap when nothing is due.

        Called at tick_ns(), and otherwise every 50 ms or so; every 100 ms while `at_rest`.
        """
        self._clock.now = now_ns
        self._scheduler.look()
        if not self._checkpointing:
            for flow in self._timers.due(now_ns):
                if flow.epoch != self._clock.epoch:
                    flow.new_epoch(self._clock.epoch)
                due = flow.expire(now_ns)
                if due:
                    self._timers.arm(flow, due)
            for apart in self._flows.openings.apart(now_ns, self._host.timeout_ns):
                if not apart.asked:
                    apart.asked = True
                    evidence = Evidence(pvm_frame=apart.held[0][0])
                    self._outbox.request(Cause.OPENED_APART, apart, evidence)
            self._watch.look(now_ns)
            if self.shadow and self.ledger.pvm_packets:
                self._note_crossing(now_ns)
            if self.patience.adaptive and self._outbox.may_ask and not self._outbox.asked:
                self._ask_if_crossed(now_ns)
        if now_ns >= self._next_scan:
            self._next_scan = now_ns + self.limits.expired_scan_cycle_ns
            self._flows.age(now_ns)

    def tick_ns(self) -> int:
        """Return when tick() has something to do that cannot be late; NEVER: nothing.

        That is a timer of some ms, or a frame that is kept back. A timer of seconds may be late by
        50 ms, and mostly its flow has finished by then, so it causes no wake-up.
        """
        if self._scheduler.under_backpressure:
            return self._clock.now
        if not self.patience.adaptive:
            return self._timers.next_ns
        due = self._timers.next_waiting_ns(lambda flow: not flow.quiet())
        if self._outbox.may_ask and not self._outbox.asked:
            if self.ledger.pvm_packets or self._watch.waits:
                due = min(due, self._watch.silent_ns())
            if self.patience.lasting:
                due = min(due, self._clock.now + self._watch.step_ns)
        return min(due, self._watch.due_ns)

    @property
    def at_rest(self) -> bool:
        """Whether neither guest's output waits, here or in the fast path, so that no time runs."""
        return not (
            self.ledger.pvm_packets
            or self._timers.armed
            or self._scheduler.under_backpressure
            or self._flows.openings.any
            or (self.fast.enabled and self.fast.oldest_ns())
        )

    @property
    def asleep(self) -> bool:
        """Whether it is at rest until a frame comes here: no connection is in the fast path."""
        return (not self.fast.enabled or self.fast.unused) and self.at_rest

    def _ask_if_crossed(self, now_ns: int) -> None:
        """Request a checkpoint if the guests wait for each other's clients (engine/silence.py)."""
        if self.ledger.pvm_packets or self._watch.waits:
            pvm = self._watch.crossed(now_ns)
            if pvm is not None:
                pvm.ask(Cause.CROSSED, pvm.held[0][1])

    def _note_crossing(self, now_ns: int) -> None:
        """Note the first time since a checkpoint at which protected guests would have crossed.

        Without protection a client has its answer and goes on, so mostly the guests agree again by
        themselves. The clients of output that is held would wait for good.
        """
        if self.crossed_ns > self.patience.since_ns or now_ns < self._next_crossing:
            return
        self._next_crossing = now_ns + QUIET_NS  # it looks at every flow that waits
        before = now_ns - SERVED * QUIET_NS
        pvm, svm = self._watch.waiting(before, before)
        if pvm is not None and svm:
            self.crossed_ns = before

    def end_backpressure(self, now_ns: int) -> None:
        """Release what is kept back for the fast path.

        Called in place of tick() where no time runs out.
        """
        self._clock.now = now_ns
        self._scheduler.end_all_backpressure()

    # -- the fast path

    def _lookup(self, key: FlowKey) -> ConnState | None:
        """Return the fast path's state of a connection that is not in the tables."""
        if not self.fast.enabled or self._solo:
            return None
        return self.fast.reclaim(key)

    def _restore(self, flow: ComparedFlow, state: ConnState) -> None:
        self._scheduler.reclaim(flow, state)

    # -- properties

    @property
    def now(self) -> int:
        """Return the time of the last call."""
        return self._clock.now

    @property
    def epoch(self) -> int:
        """Return the epoch of the frames that are compared."""
        return self._clock.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._clock.epoch = epoch

    @property
    def policy(self) -> Policy:
        """Return the rules in force."""
        return self._flows.policy

    @property
    def rules(self) -> dict[str, RuleCount]:
        """Return the counts of each rule."""
        return self._outbox.rules

    @property
    def counters(self) -> Counter[str]:
        """Return all counters of COUNTERS; read only."""
        c = self._counters
        c["pvm_frames"], c["svm_frames"] = self._n_pvm, self._n_svm
        c["released"] = self._outbox.released
        return c

    @property
    def pvm_packets(self) -> int:
        """Return how many frames of the PVM wait to be compared or for a checkpoint."""
        return self.ledger.pvm_packets

    @property
    def svm_packets(self) -> int:
        """Return how many frames of the SVM are buffered to be compared."""
        return self.ledger.svm_packets

    @property
    def held_packets(self) -> int:
        """Return how many frames of the PVM wait, including those kept back for the fast path."""
        return self.ledger.pvm_packets + self._scheduler.kept()[0]

    @property
    def held_bytes(self) -> int:
        """Return the bytes of those frames, including Ethernet headers."""
        return self.ledger.pvm_bytes + self._scheduler.kept()[1]

    def tables(self) -> tuple[tuple[bool, list[Comparer]], ...]:
        """Return all flows of this moment, for reports: (whether they are TCP, the flows)."""
        return (True, list(self._tcp.values())), (False, list(self._flows.datagram.values()))

    @property
    def flows(self) -> int:
        """Return how many flows are known, TCP and others."""
        return len(self._flows)
