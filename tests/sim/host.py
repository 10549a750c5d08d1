# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate one host: its kernel's programs, and the life of what runs on it.

The controllers are the product's own. Simulated is what they talk to: the verdicts of bpf/*.bpf.c
(numbers are translated by the product's model of the rewriter, the fast path is offload_model.py;
tests/bpf holds both equal to the programs), maps and devices (datapath.py), QEMU's COLO (qemu.py),
the channel to the other host (channel.py) and the store of a lease (store.py).
"""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING, Any

from colo_xdp import abi
from colo_xdp.abi import SIDE_PVM, SIDE_SVM, Mode, Reason, Source, SyncState
from colo_xdp.conntrack.rewriter import Rewriter, TrackedConnection
from colo_xdp.datapath.ring import CapturedFrame

from .channel import SimHeartbeatLinks, SimPeer
from .datapath import SimDataPath
from .guest import Guest, Out
from .offload_model import OFFLOAD_NO, KernelModel, completed
from .process import Process
from .qemu import Qemu
from .tcp import RST, SYN, read

if TYPE_CHECKING:
    from .world import World


MIRROR, SVM, PVM_SYN = 0, 1, 2
LOSS_NS = 1_000_000_000
BUSY = 0.003  # another CPU has the connection of a frame


def mirror_fate(mode: Mode, now_ns: int, mirrored_until: int) -> Reason:
    """Return what svm_in does with a client's frame; PASS: it goes to the guest, translated.

    tests/bpf holds this equal to the program.
    """
    if mode is Mode.CHECKPOINT:
        return Reason.PUNT
    if mode is Mode.TAKEOVER and now_ns >= mirrored_until:
        return Reason.DROP_PROMOTED
    return Reason.PASS if mode in (Mode.RUN, Mode.TAKEOVER) else Reason.DROP_MODE


class Tracker(Rewriter):
    """The rewriter's model, which also records when each connection was last seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}
        self.now_ns = 0

    def _find(self, key: bytes, p: Any, *, to_svm: bool) -> Any:
        n, reason = super()._find(key, p, to_svm=to_svm)
        if n is not None:
            self.seen[id(n)] = self.now_ns
        return n, reason

    def _promote(self, key: bytes, n: TrackedConnection) -> bool:
        room = super()._promote(key, n)
        if room:
            self.seen[id(self.flows[key])] = self.now_ns
        return room


class Side:
    """One host, named `P` or `S` by the role in its file; `primary` is what it currently runs."""

    def __init__(self, world: World, primary: bool, guest: Guest | None) -> None:
        self.world, self.guest = world, guest
        self.name, self._file_primary = "P" if primary else "S", primary
        self.fast: KernelModel | None = None
        # frames that a stopped guest has not received yet
        self.tap: deque[bytes] = deque(maxlen=500)
        self.off = False  # powered off
        self.failed_start = False  # of its QEMU, the last time
        self.arrived = 0  # frames over the peer link
        self.svm_frames = 0  # frames of a secondary's guest
        # the other guest has sent something to the network that this one does not know
        self.stale = False
        #: the numbers on this host's image; what the secondary's has at first is anything
        self.image: set[int] = set() if primary else {-1}
        self._forget()
        self.qemu = Qemu(self, incoming=not primary)
        self._attach()
        # of the controller that runs now
        self.controller: Any = None
        self.process = Process()
        self.dp = SimDataPath(self)
        self.loaded = False  # no controller has loaded anything yet
        self.peer: SimPeer | None = None
        self.heartbeat_links: SimHeartbeatLinks | None = None
        self._drain_set = False
        self.boots = 0
        self.powered = 0  # how often it has booted
        self.mark: bytes | None = None  # the file that outlives a loss of power (mark.py)

    def _forget(self) -> None:
        """Reset the kernel's state, which outlives controllers, to that after a boot."""
        world, primary = self.world, self._file_primary
        self.primary, self.role_word, self.promoted_epoch = primary, "", 0
        self.mode, self.epoch, self.beat_ns = Mode.DROP, 0, 0
        self.loaded = self.protected = False
        self.shadowed = self.disks_whole = self.mirrored_until = 0
        self.sync_state = SyncState.NONE
        self.undecided, self.peer_stopped = False, 0
        self.order = ""
        self.ring: deque[CapturedFrame] = deque()
        self.lost = 0
        self.rewriter = Tracker()
        if self.fast is not None:
            self.fast.close()
            self.fast = None
        if (primary or world.scene.roles) and world.scene.fast:
            self.fast = KernelModel(world.scene.buffers, lambda: world.rnd.random() < BUSY)
        self.in_bridge = False
        self.stepped_out = False
        self.lease_expiry = 0

    @property
    def other(self) -> Side:
        return self.world.s if self is self.world.p else self.world.p

    def power_on(self) -> None:
        """Boot the host: nothing is pinned, and no QEMU runs."""
        self._forget()
        self.off = False
        self.powered += 1

    # -- the guest

    def _attach(self) -> None:
        """Give the guest its disk."""
        if self.guest is not None:
            self.guest.write = self.qemu.block.write if self.world.scene.disk else None

    def new_guest(self) -> None:
        """Start QEMU without -incoming: a guest that boots and knows of no pair."""
        self.qemu.die()
        self.tap.clear()
        self.qemu = Qemu(self, incoming=False)
        self.booted()

    def booted(self) -> None:
        """Let the guest boot anew, from its disk: it knows of nothing that was before."""
        self.guest = Guest(random.Random(self.world.entropy_s.random()), self.world.ms())
        self.stale = False
        self.guest.written = set(self.image)
        self._attach()

    def new_qemu(self) -> None:
        """Start QEMU with -incoming, in place of the one that is gone."""
        self.qemu.die()
        self.tap.clear()
        self.guest, self.stale = None, False
        self.qemu = Qemu(self, incoming=True)

    def deliver(self, frame: bytes) -> None:
        """Deliver a frame to the guest over its tap."""
        if not self.qemu.alive or self.guest is None:
            return
        if not self.qemu.running:
            self.tap.append(frame)
            return
        self.sent(self.guest.receive(frame, self.world.ms()))

    def resume(self) -> None:
        """Let the guest run (again)."""
        self.qemu.running, self.qemu.still = True, ""
        waiting = list(self.tap)
        self.tap.clear()
        for frame in waiting:
            self.deliver(frame)

    def tick(self) -> None:
        if self.qemu.alive and self.qemu.running and self.guest is not None:
            self.sent(self.guest.tick(self.world.ms()))

    def sent(self, frames: list[Out]) -> None:
        for frame, gso in frames:
            self.world.note("%s guest sends %s", self.name, frame)
            (self.pvm_out if self.primary else self.svm_out)(frame, gso)

    # -- programs

    def capture(
        self, source: Source, epoch: int, frame: bytes, gso: int, punt_seq: int = 0
    ) -> None:
        if len(self.ring) >= self.world.scene.ring or self.world.ring_broken:
            self.lost += 1
            return
        now = self.world.ns()
        self.ring.append(CapturedFrame(source, now, epoch & 0xFFF, frame, gso, False, punt_seq))
        if not self._drain_set and self.controller is not None:
            self._drain_set = True
            self.world.later(self.world.rnd.uniform(0.01, 1.0), self._drain)

    def _drain(self) -> None:
        self._drain_set = False
        if self.controller is not None:
            self.controller.drain()

    def _lost_controller(self) -> bool:
        return self.world.ns() - self.beat_ns > LOSS_NS

    def silenced(self) -> bool:
        """Return whether the lease has expired (COLO_LEASE in the programs)."""
        return self.world.scene.lease and self.world.ns() >= self.lease_expiry

    def pvm_in(self, frame: bytes) -> None:
        if self.mode in (Mode.RUN, Mode.CHECKPOINT) and self.fast is not None:
            self.fast.note_ack(frame)
        if self.mode in (Mode.RUN, Mode.CHECKPOINT, Mode.DROP):
            self.world.link(self, MIRROR, self.epoch, frame, 0)
        self.deliver(self._own(frame, True))

    def _own(self, frame: bytes, to_guest: bool) -> bytes:
        """Translate as promoted_in and promoted_out do: by the numbers kept since the takeover."""
        if not self.promoted_epoch:
            return frame
        r = self.rewriter
        r.mode, r.epoch, r.now_ns = Mode.TAKEOVER, self.promoted_epoch, self.world.ns()
        return (r.to_svm if to_guest else r.from_svm)(frame)[0]

    def pvm_out(self, frame: bytes, gso: int) -> None:
        frame = self._own(frame, False)
        if self.mode is Mode.DROP or self.silenced():
            return
        if self.mode is Mode.BYPASS:
            self.world.to_network(self, frame)
            return
        self._tell_syn(frame)
        punt_seq = self._fast(SIDE_PVM, self.epoch, frame, gso)
        if punt_seq is not None and not self._lost_controller():
            self.capture(Source.PVM, self.epoch, frame, gso, punt_seq)

    def _tell_syn(self, frame: bytes) -> None:
        s = read(frame)
        if s is not None and s.flags & (SYN | RST) == SYN and self.mode is not Mode.BYPASS:
            self.world.link(self, PVM_SYN, self.epoch, frame, 0)

    def _fast(self, side: int, epoch: int, frame: bytes, gso: int) -> int | None:
        """Run the fast path: None if it has decided, else the number of the frame's event."""
        k = self.fast
        if k is None:
            return 0
        k.mode, k.epoch = self.mode, self.epoch
        fate = k.fast(side, frame, self.world.ns(), gso_size=gso, epoch=epoch)
        if fate.reason == OFFLOAD_NO:
            return fate.punt_seq
        self.world.note("the fast path, %s: %s", "PS"[side], abi.Reason(fate.reason).name)
        self.world.fast += 1
        self.world.fast_alone += self.controller is None
        self.world.fast_udp += (frame[20] if frame[14] >> 4 == 6 else frame[23]) == 17
        for out in fate.out:
            self.world.to_network(self, completed(out))
        return None

    def link_in(self, kind: int, epoch: int, frame: bytes, gso: int) -> None:
        """Handle a frame from the peer link: svm_arrival or svm_in."""
        if self.off:
            return
        self.arrived += 1
        if self.primary:
            if kind == SVM and self.mode in (Mode.RUN, Mode.CHECKPOINT) and not self.silenced():
                ours = (epoch ^ self.epoch) & abi.EPOCH_MASK == 0
                punt_seq = self._fast(SIDE_SVM, self.epoch if ours else -1, frame, gso)
                if punt_seq is not None:
                    self.capture(Source.SVM, epoch, frame, gso, punt_seq)
        elif kind == MIRROR:
            fate = mirror_fate(self.mode, self.world.ns(), self.mirrored_until)
            if fate is Reason.PUNT:
                self.capture(Source.CLIENT, self.epoch, frame, gso)
            elif fate is Reason.PASS:
                self.deliver(self._translate(frame, True))
        elif kind == PVM_SYN and self.mode is Mode.RUN:
            r = self.rewriter
            r.mode, r.epoch, r.now_ns = self.mode, self.epoch, self.world.ns()
            r.note_pvm_header(frame)

    def _translate(self, frame: bytes, to_svm: bool) -> bytes:
        r = self.rewriter
        r.mode, r.epoch, r.now_ns = self.mode, self.epoch, self.world.ns()
        return (r.to_svm if to_svm else r.from_svm)(frame)[0]

    def svm_out(self, frame: bytes, gso: int) -> None:
        self.svm_frames += 1
        if self.stepped_out:
            self.world.to_network(self, frame)  # no program is attached that would check the mode
        elif self.mode is Mode.CHECKPOINT:
            self.capture(Source.SVM, self.epoch, frame, gso)
        elif self.mode is Mode.RUN:
            self.world.link(self, SVM, self.epoch, self._translate(frame, False), gso)
        elif self.mode is Mode.TAKEOVER and not self.silenced():
            self.world.to_network(self, self._translate(frame, False))

    def network_in(self, frame: bytes) -> None:
        """Handle a client's frame that the bridge forwards to this host's tap."""
        if self.off or not self.in_bridge:
            return
        if self.primary:
            self.pvm_in(frame)
        elif self.mode is Mode.TAKEOVER:
            self.deliver(frame if self.stepped_out else self._translate(frame, True))

    def inject(self, name: str, frame: bytes, gso: int) -> None:
        """pvm_release, svm_deliver, svm_forward."""
        if name == "release":
            if self.mode is not Mode.DROP and not self.silenced():
                self._tell_syn(frame)
                self.world.to_network(self, frame)
        elif self.mode in (Mode.RUN, Mode.CHECKPOINT, Mode.TAKEOVER):
            out = self._translate(frame, name == "deliver")
            if name == "deliver":
                self.deliver(out)
            elif self.mode is Mode.TAKEOVER:
                if not self.silenced():
                    self.world.to_network(self, out)
            else:
                self.world.link(self, SVM, self.epoch, out, gso)

    # -- the controller's life

    def kill_controller(self, *, silently: bool = False) -> None:
        """Kill -9: what it holds is gone, what is pinned stays. A power cut is silent."""
        c, self.controller = self.controller, None
        if c is None:
            return
        if not self.primary and self.mode is Mode.CHECKPOINT:
            self.world.epoch_uncertain = True
        self.process.kill()
        if self.peer is not None and not silently:
            self.peer.cut("reset by peer")
        self.qemu.client = None

    def kill_qemu(self) -> None:
        self.qemu.die()
