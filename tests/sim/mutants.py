# SPDX-License-Identifier: GPL-2.0-or-later
"""Break the product deliberately, by name: the simulator must notice each mutant, or it proves
nothing.

Each mutant is a function that breaks the product in one place, with pytest's monkeypatch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from colo_xdp import abi
from colo_xdp.abi import SIDE_PVM, Mode, Reason
from colo_xdp.compare import fragments, tcp
from colo_xdp.compare.datagram import DatagramFlow
from colo_xdp.compare.fragments import Fragments
from colo_xdp.compare.patience import Patience
from colo_xdp.compare.tcp import TcpFlow
from colo_xdp.compare.tcp_secondary import SvmStream
from colo_xdp.compare.timers import Timers
from colo_xdp.compare.window import WindowGate
from colo_xdp.conntrack import rewriter
from colo_xdp.conntrack.rewriter import Rewriter
from colo_xdp.controller import controller, pair_view, secondary
from colo_xdp.controller.checkpoint_coordinator import CheckpointCoordinator
from colo_xdp.controller.commands import OperatorCommands
from colo_xdp.controller.disk_proof import DiskProof
from colo_xdp.controller.heartbeats import Heartbeats
from colo_xdp.controller.mirror_watch import MirrorWatch
from colo_xdp.controller.permanent_offsets import PermanentOffsets
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.controller.takeover import Takeover
from colo_xdp.datapath import offload_maps
from colo_xdp.datapath.conntrack_map import ConntrackEntry, ConntrackMap
from colo_xdp.engine.engine import Engine
from colo_xdp.failover import decision
from colo_xdp.failover.arbiter import LeaseArbiter
from colo_xdp.failover.decision import Action
from colo_xdp.failover.facts import OtherGuest
from colo_xdp.failover.lease import Leadership
from colo_xdp.failover.states import State
from colo_xdp.offload import udp as offload_udp
from colo_xdp.offload.udp import UdpCodec
from colo_xdp.peer.heartbeat_datagram import Flag
from colo_xdp.qemu.mirrors import Mirrors
from colo_xdp.qemu.replica import Replica

from .datapath import SimDataPath
from .host import Side
from .offload_model import Conn, KernelModel, Out, Work
from .world import Fault, Scene, disk_scene, lease_scene, roles_scene, scene

MUTANTS: dict[str, Callable[[Any], None]] = {}
#: mutants of the fast path's model which only cost time, or which cannot be seen from outside: the
#: differential test against the kernel has to notice them
#: (tests/netns/test_offload_differential.py)
KERNEL_MUTANTS: dict[str, Callable[[Any], None]] = {}
#: mutants between fast and slow path that heal by retransmission:
#: tests/property/test_offload_equivalence.py notices them
OFFLOAD_MUTANTS: dict[str, Callable[[Any], None]] = {}
#: what a mutant's scenes must contain where random ones seldom do
_ALONE_THEN_DEAD: dict[str, Any] = {
    "conns": 4, "loss": 0.0, "dup": 0.0, "jitter": 0.0, "link_loss": 0.0, "link_jitter": 0.0,
    "odd": 0.0, "datagrams": True, "manual": False,
    "faults": (Fault(1800, "cut_ps", 4000), Fault(4200, "power_p", 0)),
}  # fmt: skip
#: a mirror is lost within a checkpoint, and then the primary, too
_DISKS: dict[str, Any] = {
    "loss": 0.0, "dup": 0.0, "odd": 0.0, "link_loss": 0.0, "compare_timeout": 400, "roles": True,
    "lease": False, "manual": False,
}  # fmt: skip
_DIES_WITHIN = (Fault(20, "checkpoint"), Fault(600, "kill_pvm_in_checkpoint", 50, 1))
_LOST_WITHIN = tuple(Fault(600 + at, "lose_disk", 0, 1) for at in (2, 3, 4, 5, 6))
#: mutants of the rewriter's model that need more connections on one entry than schedules create:
#: tests/unit/conntrack/test_rewriter.py notices them
REWRITER_MUTANTS: dict[str, Callable[[Any], None]] = {}
#: seeds that have shown them, tried first: a search from 0 on takes up to minutes
FIRST = {
    "a_dead_host_is_taken_for_a_cut_link": 8,
    "a_fin_leaves_where_the_svm_has_reset": 13,
    "a_takeover_needs_no_whole_disks": 194,
    "a_handed_over_guest_transmits_on": 4,
    "a_restarted_primary_goes_on_comparing": 62,
    "both_hosts_stay_primaries": 3,
    "disks_are_vouched_for_unseen": 1105,
    "epoch_ignored": 77,
    "frames_after_stop_leave_with_the_checkpoint": 21,
    "network_opens_before_the_primary_is_silent": 69,
    "never_times_out": 57,
    "offset_kept_over_a_checkpoint": 11,
    "offsets_of_a_former_pair_are_not_exported": 26,
    "old_svm_kept_over_a_checkpoint": 14,
    "parts_never_leave": 143,
    "rst_uncompared": 73,
    "syn_uncompared": 3,
    "takeover_forgets_the_offsets": 40,
    "the_oldest_svm_bytes_win": 77,
    "the_queue_of_a_checkpoint_is_lost": 148,
    "windows_ungated_with_no_scale": 218,
    "timestamps_untranslated": 40,
    "fast_path_compares_no_datagrams": 7,
    "fast_path_compares_nothing": 7,
    "fast_path_decides_in_a_checkpoint": 168,
    "fast_path_forgets_the_checksum": 3,
    "fast_path_lets_a_fin_go_alone": 6,
    "fast_path_lets_early_acks_pass": 79,
    "fast_path_limits_no_window": 3,
    "fast_path_sends_pieces_with_a_wrong_number": 1,
    "who_asks_by_datagram_takes_it_for_granted": 2,
}
#: what the violation must be about, where those scenes violate something else without the mutant:
#: the only guest that may transmit has died
ABOUT = {
    "nobody_records_who_runs_standalone": "two guests transmit",
    "the_lease_is_not_waited_for": "two guests transmit",
}
SCENES: dict[str, dict[str, Any]] = {
    "a_fin_leaves_where_the_svm_has_reset": {"rude": True},
    "patience_has_no_end": {"wait": 20},
    "timers_of_what_waits_are_cancelled": {"wait": 20, "odd": 0.4},
    "nobody_records_who_runs_standalone": _ALONE_THEN_DEAD,
    "the_lease_is_not_waited_for": _ALONE_THEN_DEAD,
    "a_takeover_needs_no_whole_disks": _DISKS | {"faults": (*_DIES_WITHIN, *_LOST_WITHIN)},
    "disks_are_vouched_for_unseen": _DISKS | {"faults": (*_DIES_WITHIN, _LOST_WITHIN[2])},
    "a_lost_mirror_is_not_noticed": _DISKS | {
        "faults": (
            Fault(20, "checkpoint"), Fault(400, "lose_disk", 0, 1), Fault(600, "checkpoint", 0, 1),
            Fault(800, "power_pvm", 50, 1),
        ),
    },
    "a_silent_disk_is_waited_for": _DISKS | {
        "conns": 4, "compare_timeout": 3000, "faults": (Fault(300, "cut_disk", 20000),),
    },
    "fast_path_compares_no_datagrams": {"udp": 100, "odd_udp": True},
    "fast_path_releases_datagrams_that_wait": {"udp": 100},
    "a_shadow_begins_before_the_secondary_knows": {
        "conns": 4, "loss": 0.0, "lease": False, "manual": False, "datagrams": False, "faults": (
            Fault(95, "cut_channel", 3000), Fault(100, "shadow", 2000),
        ),
    },
    "a_shadow_ends_with_a_message": {
        "conns": 4, "loss": 0.0, "link_jitter": 3.0, "faults": (
            Fault(67, "shadow", 60), Fault(115, "kill_p_qemu", 0),
            Fault(635, "kill_p_controller", 60),
        ),
    },
    "only_a_first_checkpoint_hands_offsets_over": {
        "odd": 0, "odd_udp": False, "link_loss": 0, "compare_timeout": 400, "faults": (
            Fault(500, "kill_pvm_qemu", 50), Fault(510, "trap", 60),
            Fault(600, "kill_pvm_qemu", 50, 1),
        ),
    },
    "a_primary_that_was_alone_goes_on_comparing_nothing": {
        "faults": (Fault(400, "kill_svm_qemu", 50), Fault(400, "kill_pvm_qemu", 50, 1)),
    },
    "a_datagram_says_shut_before_it_is": {
        "conns": 6, "datagrams": True, "faults": (Fault(150, "cut_channel", 6000),),
    },
    "who_asks_by_datagram_takes_it_for_granted": {
        "conns": 6, "odd": 0.4, "datagrams": True, "lease": False, "faults": (
            Fault(150, "cut_channel", 6000), Fault(150, "deafen_s", 6000), Fault(200, "cut_colo"),
        ),
    },
    "a_solo_primary_does_not_tell": {  # the store loses its answers, the peer its word
        "conns": 4, "odd": 0, "compare_timeout": 400, "datagrams": False, "faults": (
            Fault(108, "cut_pe_out", 40), Fault(248, "cut_pe_out", 3000),
            Fault(764, "cut_channel", 3000), Fault(3848, "cut_pe_out", 300),
            Fault(3864, "cut_channel", 3000), Fault(4248, "cut_pe_out", 3000),
        ),
    },
    "takeover_never_asks_which_guest_runs": {
        "conns": 5, "faults": (Fault(400, "kill_p_qemu_in_checkpoint"),),
    },
}  # fmt: skip


#: mutants of the arbitration by a lease
LEASE: set[str] = set()


#: mutants of creating a pair again
ROLES: set[str] = set()


#: mutants of replicated disks
DISKS: set[str] = set()


def _disk_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    DISKS.add(f.__name__)
    return _mutant(f)


def _rewriter_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    REWRITER_MUTANTS[f.__name__] = f
    return f


def _roles_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    ROLES.add(f.__name__)
    return _mutant(f)


def _lease_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    LEASE.add(f.__name__)
    return _mutant(f)


def _mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    MUTANTS[f.__name__] = f
    return f


def _kernel_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    KERNEL_MUTANTS[f.__name__] = f
    return f


def _offload_mutant(f: Callable[[Any], None]) -> Callable[[Any], None]:
    OFFLOAD_MUTANTS[f.__name__] = f
    return f


def scenes(name: str, runs: int) -> Iterator[Scene]:
    """Return scenes in which the mutant has a chance to do harm."""
    random_one = lease_scene if name in LEASE else roles_scene if name in ROLES else scene
    random_one = disk_scene if name in DISKS else random_one
    for seed in (*((FIRST[name],) if name in FIRST else ()), *range(runs)):
        yield replace(random_one(seed), fast=name.startswith("fast_path"), **SCENES.get(name, {}))


# -- the engine


@_mutant
def patience_has_no_end(mp: Any) -> None:
    """Let frames wait for longer than compare_timeout where the SVM is slow."""
    real = Patience.__init__

    def init(self: Patience, ceiling_ns: int, floor_ns: int = 0, *, adaptive: bool = False) -> None:
        real(self, 100 * ceiling_ns, floor_ns, adaptive=adaptive)

    mp.setattr(Patience, "__init__", init)


@_mutant
def timers_of_what_waits_are_cancelled(mp: Any) -> None:
    real = Timers.next_waiting_ns
    mp.setattr(Timers, "next_waiting_ns", lambda self, waits: real(self, lambda flow: False))


@_mutant
def no_ack_gate(mp: Any) -> None:
    mp.setattr(TcpFlow, "acked", lambda self, p: True)


@_mutant
def release_before_compare(mp: Any) -> None:
    mp.setattr(TcpFlow, "_verified", lambda self, p: True)


@_mutant
def rst_uncompared(mp: Any) -> None:
    mp.setattr(TcpFlow, "_ready_rst", lambda self, p: True)


@_mutant
def a_fin_leaves_where_the_svm_has_reset(mp: Any) -> None:
    """Let it leave although the PVM does not reset: it may have read what the SVM has not."""
    mp.setattr(TcpFlow, "_resets_next", lambda self: True)


@_mutant
def fin_uncompared(mp: Any) -> None:
    mp.setattr(TcpFlow, "_ready_fin", lambda self, p: p.off == p.end or self._verified(p))


@_mutant
def syn_uncompared(mp: Any) -> None:
    mp.setattr(TcpFlow, "_ready_syn", lambda self, p: True)


@_mutant
def epoch_ignored(mp: Any) -> None:
    real = Engine.from_svm

    def from_svm(self: Engine, rec: Any, epoch12: int, now_ns: int) -> None:
        real(self, rec, self.epoch & 0xFFF, now_ns)

    mp.setattr(Engine, "from_svm", from_svm)


@_mutant
def old_svm_kept_over_a_checkpoint(mp: Any) -> None:
    mp.setattr(SvmStream, "forget", lambda self: None)


@_mutant
def stop_time_ignored(mp: Any) -> None:
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        real(self, now_ns, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


@_mutant
def never_times_out(mp: Any) -> None:
    mp.setattr(TcpFlow, "expire", lambda self, now: 0)


@_mutant
def parts_never_leave(mp: Any) -> None:
    mp.setattr(TcpFlow, "release_part", lambda self, now, whole: False)


@_mutant
def parts_leave_unverified(mp: Any) -> None:
    real = TcpFlow.release_part

    def release_part(self: TcpFlow, now: int, whole: bool) -> bool:
        if self.held and self.head_ok is not None:
            p = self.held[0][1]
            self.head_ok = (p.seq + max(1, p.end - p.off - 1)) & 0xFFFFFFFF
        return real(self, now, whole)

    mp.setattr(TcpFlow, "release_part", release_part)


@_mutant
def split_without_a_new_checksum(mp: Any) -> None:
    real = tcp.split

    def split(rec: Any, p: Any, n: int, *how: Any) -> Any:
        (a, pa), (b, pb) = real(rec, p, n, *how)
        raw = bytearray(a.frame)
        raw[pa.l4 + 16 : pa.l4 + 18] = rec.frame[p.l4 + 16 : p.l4 + 18]
        a.frame = bytes(raw)
        return (a, pa), (b, pb)

    mp.setattr(tcp, "split", split)


@_mutant
def no_window_gate(mp: Any) -> None:
    mp.setattr(WindowGate, "limit", lambda self, rec, p, spare: (rec, False))


@_mutant
def datagrams_uncompared(mp: Any) -> None:
    mp.setattr(DatagramFlow, "_use", lambda self, wanted: True)


@_mutant
def fragments_leave_one_by_one(mp: Any) -> None:
    def pvm(self: Fragments, rec: Any, p: Any, now: int) -> None:
        self.outbox.release(rec)

    mp.setattr(fragments.Fragments, "pvm", pvm)


# -- the controllers


@_mutant
def offset_kept_over_a_checkpoint(mp: Any) -> None:
    real = Rewriter._find

    def find(self: Rewriter, key: bytes, p: Any, *, to_svm: bool) -> Any:
        for flow in (*self.flows.values(), *self.opening.values()):
            if not flow.epoch & rewriter.VOID:
                flow.epoch = self.epoch
        return real(self, key, p, to_svm=to_svm)

    mp.setattr(Rewriter, "_find", find)


@_mutant
def timestamps_untranslated(mp: Any) -> None:
    real = rewriter.Rewriter._moves

    def moves(p: Any, o: Any, off: int, tsoff: int, *, to_svm: bool) -> Any:
        return real(p, o, off, 0 if not to_svm else tsoff, to_svm=to_svm)

    mp.setattr(Rewriter, "_moves", staticmethod(moves))


@_mutant
def acks_untranslated(mp: Any) -> None:
    real = rewriter.Rewriter._moves

    def moves(p: Any, o: Any, off: int, tsoff: int, *, to_svm: bool) -> Any:
        return {} if to_svm else real(p, o, off, tsoff, to_svm=to_svm)

    mp.setattr(Rewriter, "_moves", staticmethod(moves))


@_mutant
def takeover_forgets_the_offsets(mp: Any) -> None:
    real = Secondary.become

    def become(self: Secondary, state: Any, why: str) -> None:
        if state is State.PROMOTED:
            self.dp.epoch += 1
        real(self, state, why)

    mp.setattr(Secondary, "become", become)


@_mutant
def takeover_never_asks_which_guest_runs(mp: Any) -> None:
    mp.setattr(Takeover, "loaded", lambda self: False)


@_mutant
def network_opens_before_the_primary_is_silent(mp: Any) -> None:
    real = secondary.Secondary.on_tick

    def on_tick(self: Secondary, now_ns: int) -> None:
        real(self, now_ns)
        if self.view.guest.colo_exit and self.dp.mode is Mode.RUN:
            self.dp.mode = Mode.TAKEOVER

    mp.setattr(Secondary, "on_tick", on_tick)


@_mutant
def solo_without_a_report_of_the_secondary(mp: Any) -> None:
    real = controller.decide

    def decide(f: Any) -> Any:
        d = real(f)
        fences = (Action.FENCE, Action.DEGRADE)
        if d.action in fences and f.peer_silent_ms > f.heartbeat_timeout_ms:
            return decision.Decision(decision._OVER[f.role], "a timer")
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
            self.state = State.PROTECTED

    mp.setattr(Primary, "__init__", init)


@_mutant
def the_queue_of_a_checkpoint_is_lost(mp: Any) -> None:
    real = Engine._release_queued

    def release_queued(self: Engine, ts_ns: int, counter: str) -> int:
        self._queue.held.drain()
        return real(self, ts_ns, counter)

    mp.setattr(Engine, "_release_queued", release_queued)


@_mutant
def an_open_connection_counts_as_a_living_peer(mp: Any) -> None:
    real = decision._suspect
    mp.setattr(decision, "_suspect", lambda f: not f.peer_connected and real(f))
    mp.setattr(decision, "_unreachable", lambda f: not f.peer_connected and f.peer_silent_ms > 9e9)


@_mutant
def a_dead_host_is_taken_for_a_cut_link(mp: Any) -> None:
    mp.setattr(decision, "_unreachable", lambda f: False)


@_mutant
def a_failed_fence_is_never_tried_again(mp: Any) -> None:
    forever = property(lambda self: 1 << 62, lambda self, value: None)
    mp.setattr(pair_view.Fence, "failed_ns", forever)


@_mutant
def syn_windows_ungated(mp: Any) -> None:
    real = WindowGate.open

    def open_(self: WindowGate, syn: Any, counterpart: Any) -> None:
        real(self, syn, None)
        self._edge = None

    mp.setattr(WindowGate, "open", open_)


@_mutant
def windows_ungated_with_no_scale(mp: Any) -> None:
    mp.setattr(WindowGate, "_limit_unscaled", lambda self, rec, p, spare: (rec, False))


@_mutant
def frames_after_stop_leave_with_the_checkpoint(mp: Any) -> None:
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        real(self, stop_ts_ns + 5_000_000, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


@_mutant
def the_oldest_svm_bytes_win(mp: Any) -> None:
    """Drop bytes of the SVM's next epoch that were kept during the checkpoint."""
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        self._queue._next.clear()
        real(self, stop_ts_ns, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


@_mutant
def a_secondary_needs_no_confirmation(mp: Any) -> None:
    """Consider the secondary protected as soon as its own QEMU has loaded the first checkpoint."""
    always = property(lambda self: True, lambda self, value: None)
    mp.setattr(pair_view.PairLife, "confirmed", always)


@_mutant
def a_shadow_ends_with_a_message(mp: Any) -> None:
    """End shadow mode without a checkpoint, when a primary controller restarts."""

    def word(self: Secondary, on: bool, epoch: int) -> None:
        self.view.shadow = on

    mp.setattr(Secondary, "_on_peer_shadow", word)


@_mutant
def a_shadow_begins_before_the_secondary_knows(mp: Any) -> None:
    real = Primary.set_shadow

    def set_shadow(self: Primary, on: bool) -> None:
        real(self, on)
        self.output.nics[0].engine.set_shadow(on, self.output.nics[0].engine.now)

    mp.setattr(Primary, "set_shadow", set_shadow)


# -- the fast path


@_mutant
def fast_path_releases_uncompared_bytes(mp: Any) -> None:
    real = KernelModel.decide

    def decide(self: KernelModel, c: Conn, w: Work) -> int:
        r = real(self, c, w)
        if r == Reason.OFFLOAD_HELD and w.side == SIDE_PVM and w.p.payload_len:
            self.limit_pvm(c, w)
        return r

    mp.setattr(KernelModel, "decide", decide)


@_mutant
def fast_path_compares_nothing(mp: Any) -> None:
    real = KernelModel.compare_payload

    def compare_payload(self: KernelModel, c: Conn, w: Work) -> int:
        at, seq, left = w.at, w.seq, w.left
        if real(self, c, w):
            w.at, w.seq, w.left = at + left, (seq + left) & 0xFFFFFFFF, 0
        return 0

    mp.setattr(KernelModel, "compare_payload", compare_payload)


@_kernel_mutant
def the_epoch_is_ignored(mp: Any) -> None:
    def in_force(self: KernelModel, c: Conn, mode: Mode, epoch: int) -> bool:
        return mode is self.mode is Mode.RUN and self.on

    mp.setattr(KernelModel, "in_force", in_force)


@_mutant
def fast_path_decides_in_a_checkpoint(mp: Any) -> None:
    def in_force(self: KernelModel, c: Conn, mode: Mode, epoch: int) -> bool:
        return mode in (Mode.RUN, Mode.CHECKPOINT) and c.epoch == epoch == self.epoch and self.on

    mp.setattr(KernelModel, "in_force", in_force)


@_mutant
def fast_path_has_no_ack_gate(mp: Any) -> None:
    mp.setattr(KernelModel, "allowed_ack", staticmethod(lambda c: c.p_ack))


@_mutant
def fast_path_lets_early_acks_pass(mp: Any) -> None:
    real = KernelModel.limit_pvm

    def limit_pvm(self: KernelModel, c: Conn, w: Work) -> None:
        s_ack, c.s_ack = c.s_ack, w.p.ack
        real(self, c, w)
        c.s_ack = s_ack

    mp.setattr(KernelModel, "limit_pvm", limit_pvm)


@_mutant
def fast_path_limits_no_window(mp: Any) -> None:
    real = KernelModel.limit_pvm

    def limit_pvm(self: KernelModel, c: Conn, w: Work) -> None:
        s_win, c.s_win = c.s_win, 0xFFFF
        real(self, c, w)
        c.s_win = s_win

    mp.setattr(KernelModel, "limit_pvm", limit_pvm)
    mp.setattr(KernelModel, "allowed_win", staticmethod(lambda c: c.p_win))


@_mutant
def fast_path_sends_pieces_with_a_wrong_number(mp: Any) -> None:
    real = KernelModel.send_piece

    def send_piece(self: KernelModel, c: Conn, w: Work, new: bytearray, n: int, pos: int) -> None:
        c.released = (c.released + (n > 1)) & 0xFFFFFFFF
        real(self, c, w, new, n, pos)
        c.released = (c.released - (n > 1)) & 0xFFFFFFFF

    mp.setattr(KernelModel, "send_piece", send_piece)


@_mutant
def fast_path_forgets_the_checksum(mp: Any) -> None:
    real = KernelModel.rewrite_as_pvm

    def rewrite_as_pvm(self: KernelModel, c: Conn, w: Work) -> None:
        real(self, c, w)
        out, at = w.out.pop(), c.l4 + 16
        frame = out.frame[:at] + w.frame[at : at + 2] + out.frame[at + 2 :]
        w.out.append(Out(frame, out.gso_size, out.partial))

    mp.setattr(KernelModel, "rewrite_as_pvm", rewrite_as_pvm)


def _reclaimed(mp: Any, **changes: Callable[[Any], Any]) -> None:
    real = offload_maps.BpfKernelPath.reclaim

    def reclaim(self: Any, key: bytes) -> Any:
        words = real(self, key)
        if words is None:
            return None
        return replace(words, **{name: new(words) for name, new in changes.items()})

    mp.setattr(offload_maps.BpfKernelPath, "reclaim", reclaim)


@_mutant
def fast_path_loses_what_is_outstanding_when_it_hands_over(mp: Any) -> None:
    _reclaimed(mp, buffer=lambda w: b"")


@_mutant
def fast_path_says_that_all_acks_have_left(mp: Any) -> None:
    _reclaimed(mp, adv_ack=lambda w: w.p_ack)


@_mutant
def fast_path_says_that_the_svm_has_acked_as_much(mp: Any) -> None:
    _reclaimed(mp, s_ack=lambda w: w.p_ack)


@_offload_mutant
def fast_path_is_never_looked_at(mp: Any) -> None:
    """Request nothing for output that waits there too long."""
    mp.setattr(offload_maps.BpfKernelPath, "overdue", lambda self, before_ns: [])


@_kernel_mutant
def offload_ignores_punt_seq(mp: Any) -> None:
    mp.setattr(KernelModel, "frames_on_their_way", staticmethod(lambda c, punt_seq: False))


@_kernel_mutant
def history_compared_at_the_wrong_place(mp: Any) -> None:
    real = KernelModel.compare_payload

    def compare_payload(self: KernelModel, c: Conn, w: Work) -> int:
        org = c.base_seq
        if w.left and not w.moves:
            c.base_seq = (org - 1) & 0xFFFFFFFF
        r = real(self, c, w)
        c.base_seq = org
        return r

    mp.setattr(KernelModel, "compare_payload", compare_payload)


@_kernel_mutant
def early_acks_never_leave(mp: Any) -> None:
    mp.setattr(KernelModel, "ack_due", lambda self, c: False)


@_kernel_mutant
def the_ring_is_thought_to_be_endless(mp: Any) -> None:
    """Count overwritten bytes as history."""
    mp.setattr(KernelModel, "oldest", staticmethod(lambda c: c.base_seq))


@_kernel_mutant
def a_buffer_begins_anew_whatever_the_client_has(mp: Any) -> None:
    mp.setattr(KernelModel, "all_acked", staticmethod(lambda c: True))


@_kernel_mutant
def a_buffer_never_begins_anew(mp: Any) -> None:
    mp.setattr(KernelModel, "all_acked", staticmethod(lambda c: False))


@_kernel_mutant
def what_was_forgotten_counts_as_acked(mp: Any) -> None:
    mp.setattr(KernelModel, "believed", staticmethod(lambda c, end: True))


@_kernel_mutant
def a_loss_is_doubted_each_time(mp: Any) -> None:
    real = KernelModel.believed

    def believed(c: Conn, end: int) -> bool:
        c.doubted = 0
        return real(c, end)

    mp.setattr(KernelModel, "believed", staticmethod(believed))


@_kernel_mutant
def a_loss_is_never_doubted(mp: Any) -> None:
    real = KernelModel.believed

    def believed(c: Conn, end: int) -> bool:
        c.doubted = 1
        return real(c, end)

    mp.setattr(KernelModel, "believed", staticmethod(believed))


@_kernel_mutant
def only_a_higher_ack_of_the_client_counts(mp: Any) -> None:
    real = KernelModel.note_ack

    def note_ack(self: KernelModel, frame: bytes) -> None:
        before = {k: c.client_ack for k, c in self.conns.items()}
        real(self, frame)
        for k, c in self.conns.items():
            c.client_ack = max(c.client_ack, before[k])

    mp.setattr(KernelModel, "note_ack", note_ack)


@_kernel_mutant
def buffers_are_never_taken_from_others(mp: Any) -> None:
    real = KernelModel.owner

    def owner(self: KernelModel, slot: int) -> tuple[int, int, bytes]:
        taken, since, key = real(self, slot)
        return taken, since or 1, key

    mp.setattr(KernelModel, "owner", owner)


@_kernel_mutant
def segments_of_the_svm_leave_whatever_their_size(mp: Any) -> None:
    mp.setattr(KernelModel, "larger", staticmethod(lambda c, w: False))


@_kernel_mutant
def the_size_of_segments_only_grows(mp: Any) -> None:
    real = KernelModel.note_size
    mp.setattr(KernelModel, "note_size", staticmethod(lambda c, n, surely: real(c, n, False)))


@_kernel_mutant
def any_ip_packet_may_lend_its_id(mp: Any) -> None:
    def is_plain(w: Work) -> bool:
        frame = bytearray(w.frame)
        if frame[12:14] == b"\x08\x00":
            frame[20] |= 0x40
        return real(replace(w, frame=bytes(frame)))

    real = KernelModel.is_plain
    mp.setattr(KernelModel, "is_plain", staticmethod(is_plain))


@_kernel_mutant
def an_ae_bit_is_nothing_odd(mp: Any) -> None:
    def is_plain(w: Work) -> bool:
        frame, at = bytearray(w.frame), w.p.l4_off + 12
        frame[at] &= 0xF0
        return real(replace(w, frame=bytes(frame)))

    real = KernelModel.is_plain
    mp.setattr(KernelModel, "is_plain", staticmethod(is_plain))


@_kernel_mutant
def partial_checksums_are_completed(mp: Any) -> None:
    real = KernelModel.send_piece

    def send_piece(self: KernelModel, c: Conn, w: Work, new: bytearray, n: int, pos: int) -> None:
        w.partial = False
        real(self, c, w, new, n, pos)

    mp.setattr(KernelModel, "send_piece", send_piece)


@_mutant
def fast_path_lets_a_fin_go_alone(mp: Any) -> None:
    real = KernelModel.finish_segment

    def finish_segment(self: KernelModel, c: Conn, w: Work) -> int:
        if w.fin and w.side == SIDE_PVM and not w.act:
            self.limit_pvm(c, w)
        return real(self, c, w)

    mp.setattr(KernelModel, "finish_segment", finish_segment)


@_offload_mutant
def the_kernels_fin_is_forgotten(mp: Any) -> None:
    _reclaimed(mp, fin=lambda w: None)


@_kernel_mutant
def a_fin_takes_no_place(mp: Any) -> None:
    real = KernelModel.finish_segment

    def finish_segment(self: KernelModel, c: Conn, w: Work) -> int:
        w.seq -= w.fin
        return real(self, c, w)

    mp.setattr(KernelModel, "finish_segment", finish_segment)


@_mutant
def fast_path_compares_no_datagrams(mp: Any) -> None:
    real = KernelModel.compare_payload

    def compare_payload(self: KernelModel, c: Conn, w: Work) -> int:
        if w.p.is_udp and w.equal:
            return 0
        return real(self, c, w)

    mp.setattr(KernelModel, "compare_payload", compare_payload)


@_mutant
def fast_path_releases_datagrams_that_wait(mp: Any) -> None:
    real = KernelModel.finish_datagram

    def finish_datagram(self: KernelModel, c: Conn, w: Work) -> int:
        if w.side == SIDE_PVM and not w.act:
            w.out.append(Out(w.frame))
        return real(self, c, w)

    mp.setattr(KernelModel, "finish_datagram", finish_datagram)


@_offload_mutant
def datagrams_that_wait_are_lost_on_their_way_back(mp: Any) -> None:
    mp.setattr(offload_udp, "records", lambda queue: iter(()))


@_offload_mutant
def datagrams_of_the_svm_come_back_as_the_pvms(mp: Any) -> None:
    real = UdpCodec.restore

    def restore(self: UdpCodec, flow: DatagramFlow, words: Any, now_ns: int) -> None:
        real(self, flow, replace(words, pvm_ahead=True), now_ns)

    mp.setattr(UdpCodec, "restore", restore)


@_kernel_mutant
def any_datagram_is_plain(mp: Any) -> None:
    mp.setattr(KernelModel, "is_plain_datagram", staticmethod(lambda w: True))


@_kernel_mutant
def inner_checksums_are_nobodys(mp: Any) -> None:
    real = KernelModel.is_plain_datagram

    def is_plain_datagram(w: Work) -> bool:
        w.elsewhere = False
        return real(w)

    mp.setattr(KernelModel, "is_plain_datagram", staticmethod(is_plain_datagram))


@_kernel_mutant
def datagrams_of_the_svm_leave_under_its_own_headers(mp: Any) -> None:
    real = KernelModel.head_at

    def head_at(self: KernelModel, c: Conn, place: int) -> tuple[int, int, int, bytes]:
        ts, size, partial, header = real(self, c, place)
        return ts, size, partial, header[:18] + b"\x12\x34" + header[20:]

    mp.setattr(KernelModel, "head_at", head_at)


@_kernel_mutant
def the_oldest_datagram_gives_the_time(mp: Any) -> None:
    """Let what waits be as old as what has left."""
    real = KernelModel.settle

    def settle(self: KernelModel, c: Conn, now: int, moved: bool) -> None:
        real(self, c, c.since_ns if moved and c.released != c.next else now, moved)

    mp.setattr(KernelModel, "settle", settle)


# -- heartbeat datagrams


@_mutant
def a_datagram_says_shut_before_it_is(mp: Any) -> None:
    real = Heartbeats.flags

    def flags(self: Any) -> Flag:
        early = self._c.state is State.DEGRADED
        return real(self) | (Flag.SHUT if early else Flag(0))

    mp.setattr(Heartbeats, "flags", flags)


@_mutant
def who_asks_by_datagram_takes_it_for_granted(mp: Any) -> None:
    real = Primary.perform

    async def perform(self: Primary, action: Action, why: str) -> None:
        await real(self, action, why)
        self.view.peer.shut |= self.asks

    mp.setattr(Primary, "perform", perform)


# -- the lease; its timing is tested in test_leadership.py, where no decision hides it


def _taken_for_recorded(mp: Any) -> None:
    """Have decisions take the record for written. What is read from the store stays true."""
    real = LeaseArbiter.view
    mp.setattr(LeaseArbiter, "view", lambda self: replace(real(self), recorded=True))


@_lease_mutant
def nobody_records_who_runs_standalone(mp: Any) -> None:
    _taken_for_recorded(mp)


@_lease_mutant
def the_lease_is_not_waited_for(mp: Any) -> None:
    mp.setattr(Leadership, "held", property(lambda self: True))
    _taken_for_recorded(mp)


@_lease_mutant
def a_solo_primary_does_not_tell(mp: Any) -> None:
    """Let the returning secondary consider itself a standby."""
    original = Secondary.on_message

    def on_message(self: Secondary, msg: dict[str, Any]) -> None:
        if msg["type"] == "heartbeat":
            msg = msg | {"standalone": False}
        original(self, msg)

    mp.setattr(Secondary, "on_message", on_message)
    mp.setattr(Leadership, "peer_standalone", property(lambda self: False))


# -- pairs created again


@_roles_mutant
def no_offset_is_handed_over(mp: Any) -> None:
    mp.setattr(ConntrackMap, "export", lambda self, epoch: [])


@_roles_mutant
def handed_offsets_end_with_the_next_checkpoint(mp: Any) -> None:
    real = ConntrackMap.adopt

    def adopt(self: ConntrackMap, data: bytes, *, first: bool) -> None:
        real(self, data, first=first)
        for key, raw in self._map.items():
            words = abi.FLOW.unpack(raw)
            self._map.set(key, abi.FLOW.pack(words[0], 0, *words[2:]))

    mp.setattr(ConntrackMap, "adopt", adopt)


@_roles_mutant
def offsets_of_a_former_pair_are_not_exported(mp: Any) -> None:
    """Export only the offsets of the last takeover, not those handed over before."""
    real = ConntrackMap.export

    def export(self: ConntrackMap, epoch: int) -> list[bytes]:
        size = abi.FLOW_KEY.size
        return [x for x in real(self, epoch) if abi.FLOW.unpack(x[size:])[1] != abi.EPOCH_BASE]

    mp.setattr(ConntrackMap, "export", export)


@_roles_mutant
def the_clients_numbers_reach_the_guest(mp: Any) -> None:
    real = Side._own
    mp.setattr(Side, "_own", lambda self, f, to_guest: f if to_guest else real(self, f, to_guest))


@_roles_mutant
def the_guests_numbers_are_compared(mp: Any) -> None:
    real = Side._own
    mp.setattr(Side, "_own", lambda self, f, to_guest: real(self, f, to_guest) if to_guest else f)


@_roles_mutant
def released_frames_are_translated_again(mp: Any) -> None:
    real = Side.inject

    def inject(self: Side, name: str, frame: bytes, gso: int) -> None:
        real(self, name, self._own(frame, False) if name == "release" else frame, gso)

    mp.setattr(Side, "inject", inject)


@_roles_mutant
def the_epoch_of_the_takeover_is_forgotten(mp: Any) -> None:
    """Ignore what was learned in that epoch after the change of roles."""
    real = SimDataPath.change_role

    def change_role(self: SimDataPath) -> None:
        real(self)
        self._side.promoted_epoch += bool(self._side.promoted_epoch)

    mp.setattr(SimDataPath, "change_role", change_role)


@_roles_mutant
def a_primary_that_was_alone_goes_on_comparing_nothing(mp: Any) -> None:
    real = CheckpointCoordinator.make

    async def checkpoint(self: CheckpointCoordinator, want: Any) -> None:
        await real(self, want)
        c: Any = self._c
        c.output.uncompared = any(h["state"] == "solo" for h in c.history)

    mp.setattr(CheckpointCoordinator, "make", checkpoint)


@_roles_mutant
def only_a_first_checkpoint_hands_offsets_over(mp: Any) -> None:
    """Skip the checkpoint that completes an entry into COLO which another controller began."""
    mp.setattr(
        PermanentOffsets, "sent", property(lambda self: True, lambda self, on: None), raising=False
    )


@_roles_mutant
def both_hosts_stay_primaries(mp: Any) -> None:
    """Let neither what the other host reports about its guest nor its epoch keep a host silent."""
    real = pair_view.other_guest

    def silent(*args: Any, **kwargs: Any) -> Any:
        known = real(*args, **kwargs)
        return OtherGuest.IDLE if known is OtherGuest.TRANSMITTING else known

    mp.setattr(pair_view, "other_guest", silent)
    mp.setattr(Primary, "_older_than", lambda self, msg: False)


@_roles_mutant
def the_first_checkpoint_of_a_pair_needs_no_state(mp: Any) -> None:
    """Consider the new secondary in COLO as soon as it is asked."""
    real = Secondary._on_begin

    def begin(
        self: Secondary, n: int, initial: bool, planned: bool, *, asked: bool = False
    ) -> None:
        real(self, n, initial, planned, asked=asked)
        if initial and self.held.hold is not None:
            self.view.pair.in_colo = self.view.pair.confirmed = True
            self.state = State.PROTECTED

    mp.setattr(Secondary, "_on_begin", begin)


@_roles_mutant
def a_handed_over_guest_transmits_on(mp: Any) -> None:
    """The PVM of a switchover is not shut in."""
    real = CheckpointCoordinator.make

    async def checkpoint(self: CheckpointCoordinator, want: Any) -> None:
        await real(self, want)
        if want.cause == "switchover":
            self._c.dp.mode = Mode.BYPASS

    mp.setattr(CheckpointCoordinator, "make", checkpoint)


@_roles_mutant
def a_demotion_is_only_said(mp: Any) -> None:
    async def command(self: Any, args: Any) -> dict[str, Any]:
        return {"state": "stopped", "reason": "", "peer": ""}

    mp.setattr(OperatorCommands, "demote", command)


@_rewriter_mutant
def an_entry_for_good_learns_whatever_comes(mp: Any) -> None:
    """Hand over leftovers of a closed connection, and learn the next one into the same entry."""
    real = Rewriter._learn_guest

    def learn(self: Rewriter, n: Any, p: Any, ts: Any) -> None:
        was = n.epoch
        if was == abi.EPOCH_BASE:
            n.epoch = -1
        real(self, n, p, ts)
        if n.epoch == -1:
            n.epoch = was

    def wanted(self: ConntrackEntry) -> bool:
        known = self.have & rewriter.HAVE_ISN_S and self.have_client & rewriter.HAVE_ISN_P
        return bool(self.off or self.tsoff or ((self.have or self.have_client) and not known))

    mp.setattr(Rewriter, "_learn_guest", learn)
    mp.setattr(ConntrackEntry, "wanted", property(wanted))


# -- disks


async def _nothing(self: Any, *args: Any) -> None: ...


async def _all_is_well(self: Any) -> str:
    return ""


@_disk_mutant
def images_stay_open_at_a_takeover(mp: Any) -> None:
    mp.setattr(Replica, "stop_serving", _nothing)


@_disk_mutant
def a_lost_mirror_is_not_noticed(mp: Any) -> None:
    mp.setattr(Mirrors, "whole", _all_is_well)
    mp.setattr(Mirrors, "on_event", lambda self, event: "")


@_disk_mutant
def a_silent_disk_is_waited_for(mp: Any) -> None:
    mp.setattr(MirrorWatch, "run", _nothing)


@_disk_mutant
def disks_are_vouched_for_unseen(mp: Any) -> None:
    """The primary asks about its mirrors before a checkpoint, and no more after the STOP."""

    async def prove(self: CheckpointCoordinator, ck: Any) -> None:
        if self._c.qemu.disks.any and ck.stop_ns and not ck.disks_whole:
            ck.disks_whole = True
            self._c.peer.send("disks_whole", n=ck.n)

    mp.setattr(CheckpointCoordinator, "_prove_disks", prove)
    real = Primary.copy_lost

    def late(self: Primary, why: str) -> None:
        if self.checkpoints.running is None:
            real(self, why)

    mp.setattr(Primary, "copy_lost", late)
    mp.setattr(MirrorWatch, "run", _nothing)  # its timers shift the few schedules that show this


@_disk_mutant
def a_takeover_needs_no_whole_disks(mp: Any) -> None:
    mp.setattr(DiskProof, "missing", property(lambda self: False))
    mp.setattr(CheckpointCoordinator, "_prove_disks", _nothing)
    mp.setattr(DiskProof, "said", lambda self, n: True)
    mp.setattr(MirrorWatch, "run", _nothing)  # its timers shift the few schedules that show this


@_disk_mutant
def colo_is_entered_before_the_disks_are_copied(mp: Any) -> None:
    async def copied(self: Mirrors) -> bool:
        self.copying = None
        return True

    mp.setattr(Mirrors, "copied", copied)
    mp.setattr(Mirrors, "whole", _all_is_well)


@_disk_mutant
def mirrors_are_left_to_a_dead_host(mp: Any) -> None:
    mp.setattr(Mirrors, "cut", _nothing)
