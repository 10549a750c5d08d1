# SPDX-License-Identifier: GPL-2.0-or-later
"""Deliberate faults, by name: each must be noticed by the simulator, or it proves nothing.

Each is a function that breaks the product in one place, with what pytest's monkeypatch gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from colo_xdp import controller, failover, fragments, rewrite, secondary, stream
from colo_xdp.abi import Mode
from colo_xdp.compare import Engine
from colo_xdp.datagram import DatagramFlow
from colo_xdp.failover import Action
from colo_xdp.fragments import Fragments
from colo_xdp.primary import Primary
from colo_xdp.rewrite import Rewriter
from colo_xdp.secondary import Secondary
from colo_xdp.stream import Stream
from colo_xdp.twin import Twin
from colo_xdp.window import WindowGate

MUTANTS: dict[str, Callable[[Any], None]] = {}


def _mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    MUTANTS[f.__name__] = f
    return f


# -- the engine


@_mutant
def no_ack_gate(mp: Any) -> None:
    mp.setattr(Stream, "_acked", lambda self, p: True)


@_mutant
def release_before_compare(mp: Any) -> None:
    mp.setattr(Stream, "_verified", lambda self, p: True)


@_mutant
def rst_uncompared(mp: Any) -> None:
    mp.setattr(Stream, "_ready_rst", lambda self, p: True)


@_mutant
def fin_uncompared(mp: Any) -> None:
    mp.setattr(Stream, "_ready_fin", lambda self, p: p.off == p.end or self._verified(p))


@_mutant
def syn_uncompared(mp: Any) -> None:
    mp.setattr(Stream, "_ready_syn", lambda self, p: True)


@_mutant
def epoch_ignored(mp: Any) -> None:
    real = Engine.from_svm

    def from_svm(self: Engine, rec: Any, epoch12: int, now_ns: int) -> None:
        real(self, rec, self.epoch & 0xFFF, now_ns)

    mp.setattr(Engine, "from_svm", from_svm)


@_mutant
def old_svm_kept_over_a_checkpoint(mp: Any) -> None:
    mp.setattr(Twin, "forget_svm", lambda self: None)


@_mutant
def retransmissions_uncompared(mp: Any) -> None:
    real = Stream._verified

    def verified(self: Stream, p: Any) -> bool:
        if self.ver is not None and (self.ver - p.seq - (p.end - p.off)) & 0xFFFFFFFF < 1 << 31:
            return True
        return real(self, p)

    mp.setattr(Stream, "_verified", verified)


@_mutant
def stop_time_ignored(mp: Any) -> None:
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        real(self, now_ns, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


@_mutant
def verified_kept_over_a_checkpoint(mp: Any) -> None:
    real = Twin.new_epoch

    def new_epoch(self: Twin, epoch: int) -> None:
        ver, hist = self.ver, self.hist[:]
        real(self, epoch)
        if self.base is not None and ver is not None:
            self.ver = self.send = ver
            self.hist[:] = hist

    mp.setattr(Twin, "new_epoch", new_epoch)


@_mutant
def never_times_out(mp: Any) -> None:
    mp.setattr(Stream, "expire", lambda self, now: 0)


@_mutant
def parts_never_leave(mp: Any) -> None:
    mp.setattr(Stream, "release_part", lambda self, now, whole: False)


@_mutant
def parts_leave_unverified(mp: Any) -> None:
    real = Stream.release_part

    def release_part(self: Stream, now: int, whole: bool) -> bool:
        if self.held and self.head_ok is not None:
            p = self.held[0][1]
            self.head_ok = (p.seq + max(1, p.end - p.off - 1)) & 0xFFFFFFFF
        return real(self, now, whole)

    mp.setattr(Stream, "release_part", release_part)


@_mutant
def split_without_a_new_checksum(mp: Any) -> None:
    real = stream.split

    def split(rec: Any, p: Any, n: int) -> Any:
        (a, pa), (b, pb) = real(rec, p, n)
        raw = bytearray(a.frame)
        raw[pa.l4 + 16 : pa.l4 + 18] = rec.frame[p.l4 + 16 : p.l4 + 18]
        a.frame = bytes(raw)
        return (a, pa), (b, pb)

    mp.setattr(stream, "split", split)


@_mutant
def no_window_gate(mp: Any) -> None:
    mp.setattr(WindowGate, "limit", lambda self, rec, p: (rec, False))


@_mutant
def no_window_updates(mp: Any) -> None:
    mp.setattr(WindowGate, "update", lambda self, base: None)


@_mutant
def stale_incarnations_count(mp: Any) -> None:
    real = Twin.svm

    def svm(self: Twin, p: Any, now: int) -> None:
        limit, self.host.max_stream = self.host.max_stream, 1 << 31
        try:
            real(self, p, now)
        finally:
            self.host.max_stream = limit

    mp.setattr(Twin, "svm", svm)


@_mutant
def datagrams_uncompared(mp: Any) -> None:
    mp.setattr(DatagramFlow, "_use", lambda self, wanted: True)


@_mutant
def fragments_leave_one_by_one(mp: Any) -> None:
    def pvm(self: Fragments, rec: Any, p: Any, now: int) -> None:
        self.host.emit(rec, now)

    mp.setattr(fragments.Fragments, "pvm", pvm)


# -- the controllers


@_mutant
def commit_without_the_secondary(mp: Any) -> None:
    real = Primary.on_qmp

    def on_qmp(self: Primary, event: Any) -> None:
        real(self, event)
        if event.name == "RESUME" and self._ck is not None:
            self._ck.done = True

    mp.setattr(Primary, "on_qmp", on_qmp)
    mp.setattr(Secondary, "_begin_hold", lambda self, n: None)


@_mutant
def secondary_forwards_what_the_old_guest_said(mp: Any) -> None:
    def forward(self: Secondary, e: Any) -> None:
        self.dp.injectors["forward"].send(e.frame, e.gso_size, e.partial)

    mp.setattr(Secondary, "_forward", forward)


@_mutant
def offset_kept_over_a_checkpoint(mp: Any) -> None:
    real = Rewriter._find

    def find(self: Rewriter, p: Any, *, to_svm: bool) -> Any:
        for flow in self.flows.values():
            flow.epoch = self.epoch
        return real(self, p, to_svm=to_svm)

    mp.setattr(Rewriter, "_find", find)


@_mutant
def timestamps_untranslated(mp: Any) -> None:
    real = rewrite.Rewriter._moves

    def moves(p: Any, o: Any, off: int, tsoff: int, *, to_svm: bool) -> Any:
        return real(p, o, off, 0 if not to_svm else tsoff, to_svm=to_svm)

    mp.setattr(Rewriter, "_moves", staticmethod(moves))


@_mutant
def acks_untranslated(mp: Any) -> None:
    real = rewrite.Rewriter._moves

    def moves(p: Any, o: Any, off: int, tsoff: int, *, to_svm: bool) -> Any:
        return {} if to_svm else real(p, o, off, tsoff, to_svm=to_svm)

    mp.setattr(Rewriter, "_moves", staticmethod(moves))


@_mutant
def takeover_forgets_the_offsets(mp: Any) -> None:
    real = Secondary.become

    def become(self: Secondary, state: Any, why: str) -> None:
        if state is failover.State.TAKEN_OVER:
            self.dp.epoch += 1
        real(self, state, why)

    mp.setattr(Secondary, "become", become)


@_mutant
def takeover_never_asks_which_guest_runs(mp: Any) -> None:
    mp.setattr(Secondary, "_loaded", lambda self: False)


@_mutant
def network_opens_before_the_primary_is_silent(mp: Any) -> None:
    real = secondary.Secondary.on_tick

    def on_tick(self: Secondary, now_ns: int) -> None:
        real(self, now_ns)
        if self.colo_exit and self.dp.mode is Mode.RUN:
            self.dp.mode = Mode.TAKEOVER

    mp.setattr(Secondary, "on_tick", on_tick)


@_mutant
def solo_with_no_word_of_the_secondary(mp: Any) -> None:
    real = controller.decide

    def decide(f: Any) -> Any:
        d = real(f)
        fences = (Action.FENCE, Action.DEGRADE)
        if d.action in fences and f.peer_silent_ms > f.heartbeat_timeout_ms:
            return failover.Decision(failover._OVER[f.role], "a timer")
        return d

    mp.setattr(controller, "decide", decide)


@_mutant
def a_restarted_primary_goes_on_comparing(mp: Any) -> None:
    real = Primary.__init__

    def init(self: Primary, config: Any, datapath: Any) -> None:
        adopted, datapath.adopted = datapath.adopted, False
        real(self, config, datapath)
        datapath.adopted = adopted
        if adopted and datapath.mode is Mode.RUN:
            self.state = failover.State.PROTECTED

    mp.setattr(Primary, "__init__", init)


@_mutant
def the_queue_of_a_checkpoint_is_lost(mp: Any) -> None:
    real = Engine._release_queued

    def release_queued(self: Engine, ts_ns: int, counter: str) -> int:
        self._queue.clear()
        return real(self, ts_ns, counter)

    mp.setattr(Engine, "_release_queued", release_queued)


@_mutant
def an_open_connection_counts_as_a_living_peer(mp: Any) -> None:
    real = failover._suspect
    mp.setattr(failover, "_suspect", lambda f: not f.peer_connected and real(f))
    mp.setattr(failover, "_unreachable", lambda f: not f.peer_connected and f.peer_silent_ms > 9e9)


@_mutant
def a_dead_host_is_taken_for_a_cut_link(mp: Any) -> None:
    mp.setattr(failover, "_unreachable", lambda f: False)


@_mutant
def a_failed_fence_is_never_tried_again(mp: Any) -> None:
    forever = property(lambda self: 1 << 62, lambda self, value: None)
    mp.setattr(controller.Controller, "_fence_failed_ns", forever, raising=False)


@_mutant
def syn_windows_ungated(mp: Any) -> None:
    real = WindowGate.open

    def open_(self: WindowGate, syn: Any, twin: Any) -> None:
        real(self, syn, None)
        self._edge = None

    mp.setattr(WindowGate, "open", open_)


@_mutant
def windows_ungated_with_no_scale(mp: Any) -> None:
    mp.setattr(WindowGate, "_limit_unscaled", lambda self, rec, p: (rec, False))


@_mutant
def frames_after_stop_leave_with_the_checkpoint(mp: Any) -> None:
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        real(self, stop_ts_ns + 5_000_000, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


@_mutant
def the_oldest_svm_bytes_win(mp: Any) -> None:
    """Bytes of the SVM's next epoch, kept while the checkpoint ran, are dropped."""
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        self._next.clear()
        real(self, stop_ts_ns, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)
