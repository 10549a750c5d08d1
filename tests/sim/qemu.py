# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate one host: its kernel's programs, its QEMU, and stand-ins for QMP, peer channel and
fence.

The controllers are the product's own. Simulated is what they talk to: the verdicts of bpf/*.bpf.c
(numbers are translated by the product's model of the rewriter, the fast path is offload_model.py;
tests/bpf holds both equal to the programs), QEMU's COLO, and a channel.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable
from dataclasses import astuple
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from colo_xdp import abi
from colo_xdp.abi import SIDE_PVM, SIDE_SVM, Mode, Source, SyncState
from colo_xdp.conntrack.rewriter import Rewriter, TrackedConnection
from colo_xdp.datapath.addresses import AddressTable
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.facts import Ending
from colo_xdp.failover.lease import GIVEN_UP, StoreError, StoreView, ours_to_take
from colo_xdp.peer import messages
from colo_xdp.peer.heartbeat_datagram import Flag, Heartbeat, HeartbeatSession, session_key
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.migration import MigrationOptions
from colo_xdp.qemu.nic import Card
from colo_xdp.qemu.qmp import QemuInfo, QmpError

from .disk import SimBlock
from .guest import Guest, Out
from .offload_model import OFFLOAD_NO, KernelModel, completed, user_space
from .offload_model import Out as Leaving
from .process import Process
from .tcp import RST, SYN, read

if TYPE_CHECKING:
    from .world import World

MIRROR, SVM, PVM_SYN = 0, 1, 2
LOSS_NS = 1_000_000_000
BUSY = 0.003  # another CPU has the connection of a frame


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

    def _forget(self) -> None:
        """Reset the kernel's state, which outlives controllers, to that after a boot."""
        world, primary = self.world, self._file_primary
        self.primary, self.role_word, self.promoted_epoch = primary, "", 0
        self.mode, self.epoch, self.beat_ns = Mode.DROP, 0, 0
        self.loaded = self.protected = False
        self.shadowed = self.disks_whole = 0
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
            if self.mode is Mode.CHECKPOINT:
                self.capture(Source.CLIENT, self.epoch, frame, gso)
            elif self.mode in (Mode.RUN, Mode.TAKEOVER):
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


class OfProcess:
    """What a controller has opened: dead with its process."""

    _process: Process

    @property
    def dead(self) -> bool:
        return not self._process.alive


class SimDataPath(OfProcess):
    """The controller's view of its host's programs and maps."""

    hook = "tc"

    def __init__(self, side: Side) -> None:
        self._side, self._process = side, side.process
        self.adopted = side.loaded
        side.primary = self.wanted(side)
        if side.primary:
            side.stepped_out = False
            if side.promoted_epoch:
                side.epoch = max(side.epoch, side.promoted_epoch + 1)
        elif self.adopted and side.mode is Mode.DROP:
            side.in_bridge = False
        if not self.adopted:
            self.begin(side)
        self.fast = None
        if side.primary and side.fast is not None:
            self.fast = user_space(side.fast, lambda: not self.dead)
            self.fast.enabled = True
        side.loaded = True
        names = ("release",) if side.primary else ("deliver", "forward")
        self.injectors = {n: _Injector(self, n) for n in names}
        self.objects = SimpleNamespace(map=lambda name: _Flows(side, name), events="ring")
        self.reader = SimpleNamespace(fds=[], capacity=0)
        self.fds: list[int] = []
        self.addresses = AddressTable(MapDict(), MapDict())  # the simulated guests do without ARP
        self.port_state, self.port_forwarding = "", True

    @staticmethod
    def begin(side: Side) -> None:
        """Start with nothing pinned (DataPath._begin())."""
        transmits = side.primary and side.world.scene.lease
        side.undecided = side.primary and not transmits
        side.sync_state = SyncState.STANDALONE if transmits else SyncState.NONE
        side.mode = Mode.BYPASS if transmits else Mode.DROP

    @staticmethod
    def wanted(side: Side) -> bool:
        """Return whether the host is to run the PVM; the role's programs then replace the others.

        A frame must not be translated twice, so the old programs first stop passing anything.
        """
        primary = side.role_word == "primary" if side.role_word else side.name == "P"
        if primary and side.mode is Mode.TAKEOVER:
            side.mode, side.protected = Mode.BYPASS, False
        return primary

    @property
    def role(self) -> str:
        return "primary" if self._side.primary else "secondary"

    @property
    def promoted_epoch(self) -> int:
        return self._side.promoted_epoch

    @property
    def nics(self) -> tuple[SimDataPath]:
        return (self,)

    @property
    def in_bridge(self) -> list[str]:
        return []  # [network] bridge is set, else another controller could not take it out

    def change_role(self) -> None:
        side = self._side
        if self.dead:
            return
        to_primary = not side.primary
        side.promoted_epoch = max(1, side.epoch) if to_primary else 0
        if side.fast is not None:
            side.fast.since = side.epoch + 1
        side.shadowed, side.order = 0, ""
        if not to_primary:
            side.sync_state = SyncState.NONE
        side.role_word = "primary" if to_primary else "secondary"

    def drop_guest(self) -> None:
        if not self.dead:
            self._side.promoted_epoch = 0

    @property
    def mode(self) -> Mode:
        return self._side.mode

    @mode.setter
    def mode(self, mode: Mode) -> None:
        if not self.dead:
            if mode is not self._side.mode:
                self._side.world.note("%s data path: %s", self._side.name, mode.name)
            self._side.mode = mode
            if self._side.primary:
                if mode is Mode.RUN:
                    self._side.world.protected = self._side.protected = True
                elif mode is Mode.BYPASS:
                    self._side.protected = False
                    self._side.world.went_solo()
            self._side.world.gates_moved()

    @property
    def epoch(self) -> int:
        return self._side.epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if not self.dead:
            if not self._side.primary and epoch != self._side.epoch:
                self._side.world.epoch_uncertain = False
            self._side.epoch = epoch

    @property
    def shadowed(self) -> int:
        return self._side.shadowed

    @shadowed.setter
    def shadowed(self, value: int) -> None:
        if not self.dead:
            self._side.shadowed = value

    @property
    def sync_state(self) -> SyncState:
        return self._side.sync_state

    @sync_state.setter
    def sync_state(self, sync: SyncState) -> None:
        if not self.dead:
            self._side.sync_state = sync

    @property
    def undecided(self) -> bool:
        return self._side.undecided

    @undecided.setter
    def undecided(self, value: bool) -> None:
        if not self.dead:
            self._side.undecided = value

    @property
    def peer_stopped(self) -> int:
        return self._side.peer_stopped

    @peer_stopped.setter
    def peer_stopped(self, boot_ns: int) -> None:
        if not self.dead:
            self._side.peer_stopped = boot_ns

    @property
    def disks_whole(self) -> int:
        return self._side.disks_whole

    @disks_whole.setter
    def disks_whole(self, epoch: int) -> None:
        if not self.dead:
            self._side.disks_whole = epoch

    @property
    def order(self) -> str:
        return self._side.order

    @order.setter
    def order(self, what: str) -> None:
        if not self.dead:
            self._side.order = what

    def beat(self) -> None:
        if not self.dead:
            self._side.beat_ns = self._side.world.ns()

    def lease_expiry(self, boot_ns: int) -> None:
        if not self.dead:
            self._side.lease_expiry = boot_ns

    def unmirror(self, key: bytes | None) -> None:
        pass

    def watch_bridge(self) -> None:
        pass

    def look(self) -> Look:
        return Look()

    def changes(self) -> None:
        return None

    def arrived(self) -> int:
        return self._side.arrived

    def guest_traffic(self) -> tuple[int, int]:
        return self._side.arrived, self._side.svm_frames

    def watch_guest(self) -> None:
        pass

    def is_at(self, first: bytes, *others: bytes) -> None:
        pass

    def look_at_port(self) -> None:
        pass

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        n = 0
        while self._side.ring and n < limit and not self.dead:
            sink(self._side.ring.popleft())
            n += 1
        return n

    def lost_events(self) -> int:
        return self._side.lost

    def tap_alive(self) -> bool:
        return self._side.qemu.alive

    def flows(self) -> tuple[_Flows, _Flows] | None:
        side = self._side
        return (_Flows(side, "flows"), _Flows(side, "opening")) if side.promoted_epoch else None

    def counters(self, progs: object = None) -> dict[str, dict[str, tuple[int, int]]]:
        return {"svm_out": dict.fromkeys(("pass", "pass_rewritten", "pass_released"), (0, 0))}

    def open_network(self) -> None:
        if not self.dead:
            self._side.in_bridge = True
            self._side.world.gates_moved()

    def close_network(self) -> None:
        if not self.dead:
            self._side.in_bridge = False

    def step_out(self) -> None:
        if not self.dead:
            self._side.stepped_out = True

    def step_in(self) -> None:
        if not self.dead:
            self._side.stepped_out = False


class _Injector:
    def __init__(self, dp: SimDataPath, name: str) -> None:
        self._dp, self._name = dp, name
        self.sent, self.failed = 0, {}

    def send(
        self, frame: bytes, gso_size: int = 0, partial: bool = False, gso_type: int = 0
    ) -> bool:
        if not self._dp.dead:
            self._dp._side.inject(
                self._name, completed(Leaving(frame, gso_size, partial)), gso_size
            )
        return True


class MapDict(dict[bytes, bytes]):
    """A map without a kernel."""

    info = SimpleNamespace(max_entries=256)

    def set(self, key: bytes, value: bytes) -> None:
        if len(self) >= self.info.max_entries and key not in self:
            raise OSError(7, "map update: Argument list too long")
        self[key] = value

    def delete(self, key: bytes) -> bool:
        return self.pop(key, None) is not None


class _Flows:
    """The maps `flows` and `opening`."""

    def __init__(self, side: Side, name: str) -> None:
        self._side, self._name = side, name
        self.info = SimpleNamespace(max_entries=65536)

    @property
    def _table(self) -> dict[bytes, TrackedConnection]:
        r = self._side.rewriter
        return r.opening if self._name == "opening" else r.flows

    def items(self) -> list[tuple[bytes, bytes]]:
        seen = self._side.rewriter.seen
        return [(k, abi.FLOW.pack(seen.get(id(f), 0), *astuple(f))) for k, f in self._table.items()]

    def set(self, key: bytes, value: bytes) -> None:
        words = abi.FLOW.unpack(value)
        f = self._table[key] = TrackedConnection(*words[1:])
        self._side.rewriter.seen[id(f)] = words[0]

    def keys(self) -> list[bytes]:
        return list(self._table)

    def delete(self, key: bytes) -> None:
        self._table.pop(key, None)


class Qemu:
    """One QEMU: run state, COLO, and the events it sends."""

    def __init__(self, side: Side, *, incoming: bool) -> None:
        self.side, self.alive, self.running = side, True, not incoming
        self.incoming = incoming  # whether it runs the pair's SVM
        self.migration = ""
        self.hung = self.channel_lost = self.loading = self.leaving = False
        self.client: SimQmp | None = None
        self._busy = self.cancelled = False
        self.still = ""  # the run state of a stopped guest, if it is an unusual one
        self.block = SimBlock(side, lambda: self.alive)
        self.draining = False  # the main loop waits for the disks, and answers nothing

    def status(self) -> str:
        if self.running:
            colo = self.migration == "colo" and self.incoming
            return "colo" if colo or self.loading else "running"
        if self.still:
            return self.still
        return "inmigrate" if self.incoming and not self.migration else "paused"

    def event(self, name: str, **data: Any) -> None:
        """Send an event to whoever is connected: late, but in order."""
        if self.client is not None:
            self.client.event(name, self.side.world.ns(), data)

    def die(self, *, silently: bool = False) -> None:
        if not self.alive:
            return
        self.alive = self.running = False
        if silently:
            return
        self.side.world.note("%s QEMU dies", self.side.name)
        other = self.side.other.qemu
        if self.client is not None:
            self.client.closed()
        if self.incoming and self.migration == "colo":
            return  # a primary's QEMU notices only when it attempts a checkpoint
        if other.alive and other.migration == "colo":
            self.side.world.later(self.side.world.rnd.uniform(0.1, 3), other.lose_channel)

    # -- what a guest does, or a person at another QMP socket

    def guest_off(self) -> None:
        """Let the guest shut itself down, which ends QEMU."""
        if self.alive and self.running:
            self.running, self.still = False, "shutdown"
            self.event("SHUTDOWN", guest=True, reason="guest-shutdown")
            world, c = self.side.world, self.client
            read = max(0.0, c.last - world.ms_exact()) if c is not None else 0.0  # before EOF
            world.later(read + world.rnd.uniform(0.2, 5), self.die)

    def reset(self) -> None:
        """Execute system_reset, or let the guest reboot; the controllers see only the event."""
        if self.alive and self.running:
            self.event("RESET", guest=False, reason="host-qmp-system-reset")

    def stop(self) -> None:
        """Execute `stop`."""
        if self.alive and self.running and not self._busy and not self.side.other.qemu._busy:
            self.running, self.still = False, "paused"
            self.event("STOP")

    def cont(self) -> None:
        """Execute `cont`."""
        if self.still == "finish-migrate":
            raise QmpError("Migration is not finalized yet")
        if not self.running:
            self.event("RESUME")
            self.side.resume()

    def cancel(self) -> None:
        """Execute `migrate_cancel`."""
        if self.migration == "active":
            self.cancelled = True

    def lose_channel(self) -> None:
        if self.alive and self.migration == "colo" and not self.channel_lost:
            # and it stays in `colo` unchanged until lost-heartbeat arrives
            self.channel_lost = True
            self.event("COLO_EXIT")

    def checkpoint(self, *, first: bool) -> None:
        """Request a checkpoint; requests during one are folded into it."""
        if not self._busy and (first or (self.migration == "colo" and not self.channel_lost)):
            self._busy = True
            self.side.world.spawn(self._checkpoint(first))

    async def _wait(self, other: Qemu, low: float, high: float) -> bool:
        """Wait some ms; return False when either QEMU has died meanwhile."""
        world = self.side.world
        await asyncio.sleep(world.rnd.uniform(low, high) / 1000)
        while self.hung and self.alive:
            await asyncio.sleep(0.01)
        whole = not (world.colo_cut or other.channel_lost or self.cancelled)
        return self.alive and other.alive and whole

    async def _checkpoint(self, first: bool) -> None:
        p, s, world = self.side, self.side.other, self.side.world
        svm = s.qemu
        try:
            if first:
                if not svm.alive or svm.status() != "inmigrate":
                    return self._failed(svm, first)
                self.migration = svm.migration = "active"
                self.incoming = self.channel_lost = self.cancelled = False
                if not await self._wait(svm, 5, 40):
                    return self._failed(svm, first)
            if not await self._wait(svm, 0.1, 3):
                return self._failed(svm, first)
            if not first:
                svm.halt("colo")
                if not await self._wait(svm, 0.05, 1):
                    return self._failed(svm, first)
            await self._drain()
            if not first and svm.migration != "colo":  # the SVM has left meanwhile
                return self._failed(svm, first)
            self.halt("" if first else "colo")
            image = p.guest
            assert image is not None
            if first and world.entry_trap:
                return self._goes_wrong(image)
            svm.loading = True
            whole = await self._wait(svm, 0.5, world.rnd.choice((4, 4, 25, 300)))
            if not whole and not first and not self.alive and svm.alive:
                whole = world.rnd.random() < 0.5  # all of it may already have been on its way
            if not whole:
                return self._failed(svm, first)
            s.guest, s.stale = image.clone(world.entropy_s), p.stale
            svm.block.load(self.block)
            s._attach()
            world.cloned(s, first=first)
            svm.migration = self.migration = "colo"
            svm.event("RESUME")
            s.resume()
            svm.loading = False
            if not await self._wait(svm, 0.02, 1):
                return self._failed(svm, first)
            self.event("RESUME")
            p.resume()
        finally:
            self._busy = svm.loading = False

    async def _drain(self) -> None:
        """Wait for the end of all writes, as vm_stop() does; nothing else is done meanwhile."""
        self.draining = True
        try:
            while self.block.flying and self.alive:
                await asyncio.sleep(0.0005)
        finally:
            self.draining = False

    def halt(self, still: str) -> None:
        """Stop as vm_stop_force_state() does: a stopped guest is not stopped again, but its run
        state changes. For a checkpoint that is `colo` on both sides (migration/colo.c)."""
        if self.running:
            self.running = False
            self.event("STOP")
        self.still = still

    def _goes_wrong(self, image: Guest) -> None:
        """Let an entry fail without anybody reporting it.

        Causes: the capability return-path left on before QEMU 11, pause-before-switchover, or a
        secondary that cannot continue.
        """
        world, svm = self.side.world, self.side.other.qemu
        how, world.entry_trap = world.entry_trap, ""
        world.note("the entry ends as %s", how)
        if how == "completed":
            self.migration, self.still = "completed", "postmigrate"
            svm.side.guest, svm.side.stale = image.clone(world.entropy_s), self.side.stale
            svm.migration = "completed"
            svm.event("RESUME")
            svm.side.resume()
        else:
            self.migration, self.still = "colo", "finish-migrate"

    def _failed(self, svm: Qemu, first: bool) -> None:
        self.side.world.note("checkpoint fails in QEMU")
        if first and self.migration != "colo":
            self.migration = "cancelled" if self.cancelled else "failed"
            if self.side.world.scene.roles and svm.migration == "active":
                svm.die()  # QEMU exits when an incoming migration is cut off
            return
        for q in (self, svm):
            q.lose_channel()

    def lost_heartbeat(self) -> None:
        """Execute x-colo-lost-heartbeat."""
        if self.migration not in ("colo", "failed", "active"):
            raise QmpError("not in COLO")
        if self.leaving:  # failover_request_active() in QEMU's migration/colo-failover.c
            raise QmpError("COLO failover is already activated")
        self.leaving = True
        self.side.world.spawn(self._leave())

    async def _leave(self) -> None:
        while self.loading and self.alive:  # QEMU: FAILOVER_STATUS_RELAUNCH
            await asyncio.sleep(0.0002)
        await self._drain()
        self.block.leave()
        self.migration, self.leaving = "completed", False
        if self.still == "finish-migrate":
            self.still = "paused"
        elif self.running:
            self.event("STOP")
            self.event("RESUME")
        elif self.alive:
            self.event("RESUME")
            self.side.resume()
        other = self.side.other.qemu
        if other.alive:
            self.side.world.later(0.5, other.lose_channel)


class SimQmp(OfProcess):
    """Stand in for colo_xdp.qemu.qmp.Qmp."""

    def __init__(
        self,
        side: Side,
        name: str,
        on_event: Callable[[QmpEvent], None],
        on_close: Callable[[str], None],
        *,
        oob: bool = False,
    ) -> None:
        self._oob, self._process = oob, side.process
        self._side, self.name, self.connected = side, name, False
        self._on_event, self._on_close = on_event, on_close
        self._last = 0.0
        self._to = side.qemu

    def event(self, name: str, ts_ns: int, data: dict[str, Any]) -> None:
        world = self._side.world
        at = max(
            self._last, world.ms_exact() + world.rnd.choice((0.01, 1, 20)) * world.rnd.random()
        )
        self._last = at + 0.001
        world.later(at - world.ms_exact(), lambda: self._event(name, ts_ns, data))

    def _event(self, name: str, ts_ns: int, data: dict[str, Any]) -> None:
        if self.connected and not self.dead:
            self._side.world.note("%s QMP event %s", self._side.name, name)
            self._on_event(QmpEvent(name, data, ts_ns, self._side.world.ns()))

    def closed(self) -> None:
        if self.connected:
            self.connected = False
            self._side.world.later(0.1, lambda: None if self.dead else self._on_close("closed"))

    @property
    def last(self) -> float:
        """Return when the last event will have been read, ms."""
        return self._last

    async def _call(self, what: str) -> Qemu:
        if what == "connect":
            self._to = self._side.qemu
        world, q = self._side.world, self._to
        await asyncio.sleep(world.rnd.uniform(0.05, 1) / 1000)
        end = world.ns() + 1_000_000_000
        while (q.hung or self._waits_for_disks(q)) and q.alive and world.ns() < end:
            await asyncio.sleep(0.01 if q.hung else 0.001)
        while self._last > world.ms_exact():  # answers do not overtake events
            await asyncio.sleep((self._last - world.ms_exact()) / 1000)
        hung = q.hung or self._waits_for_disks(q)
        if self.dead or not q.alive or hung or (what != "connect" and not self.connected):
            raise QmpError(f"{self.name}: {what}: no answer")
        return q

    def _waits_for_disks(self, q: Qemu) -> bool:
        return q.draining and bool(q.block.flying) and not self._oob

    async def open(self) -> None:
        await self._call("connect")
        self.connected = True

    async def connect(self) -> QemuInfo:
        q = await self._call("connect")
        self.connected, q.client = True, self
        return QemuInfo((7, 2, 0), True, q.status())

    async def status(self, timeout: float | None = None) -> str:
        return (await self._call("status")).status()

    async def migration_status(self, timeout: float | None = None) -> str:
        return (await self._call("query-migrate")).migration

    async def prepare(self, *, primary: bool, migration: MigrationOptions) -> None:
        await self._call("prepare")

    async def enters_colo(self) -> bool:
        await self._call("query-migrate-capabilities")
        return True

    async def migrate(self, uri: str) -> None:
        (await self._call("migrate")).checkpoint(first=True)

    async def trigger_checkpoint(self) -> None:
        (await self._call("trigger")).checkpoint(first=False)

    async def yank(self, timeout: float | None = None) -> None:
        await self._call("yank")

    async def quit(self) -> None:
        (await self._call("quit")).die()

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        (await self._call("x-colo-lost-heartbeat")).lost_heartbeat()

    async def hardware(self) -> dict[str, str]:
        return {}  # both are alike

    async def cards(self) -> list[Card]:
        return []

    async def guest_macs(self, tap: str) -> list[str]:
        return ["52:54:00:00:00:02"]

    async def execute(
        self, command: str, args: Any = None, timeout: Any = None, *, oob: bool = False
    ) -> Any:
        q = await self._call(command)
        if self._side.world.scene.disk and hasattr(q.block, command.replace("-", "_")):
            return q.block.command(command, args or {})
        if command == "query-block":
            return []
        if command == "query-migrate":
            return {"status": q.migration} if q.migration else {}
        if command == "migrate_cancel":
            q.cancel()
        if command == "cont":
            q.cont()
        if command == "system_reset":
            q.reset()
            q.side.booted()
        return [{"main-mac": "52:54:00:00:00:02"}]

    async def close(self) -> None:
        self.connected = False


class SimPeer(OfProcess):
    """Stand in for colo_xdp.peer.channel.Peer: an ordered channel that can be cut silently."""

    def __init__(
        self,
        side: Side,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        self._side, self._process = side, side.process
        self.connected = self.started = False
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self.last_seen_ns = self.rtt_ns = self.refused = 0
        side.boots += 1
        self.boot, self.peer_boot = f"{side.name}{side.boots}", ""
        self.heartbeat_key, self.ending = b"", Ending.UNKNOWN
        self._last = 0.0
        self._waiting: list[tuple[SimPeer, bytes]] = []  # sent, and not received for a cut
        self._partner: SimPeer | None = None
        side.peer = self

    async def start(self) -> None:
        self.started = True
        self._side.world.spawn(self._dial())

    async def _dial(self) -> None:
        world = self._side.world
        while not self.dead:
            other = self._side.other.peer
            free = other is not None and other.started and not other.dead and not other.connected
            if not self.connected and free and not (world.channel_cut or world.mute):
                assert other is not None
                self._partner, other._partner = other, self
                world.sessions += 1
                key = session_key("sim", f"{world.sessions:064x}", "00" * 32)
                for end, far in ((self, other), (other, self)):
                    end.connected, end.last_seen_ns = True, world.ns()
                    end.peer_boot, end.heartbeat_key = far.boot, key
                    end.ending = Ending.UNKNOWN
                for end in (self, other):
                    end._on_up()
            await asyncio.sleep(world.rnd.uniform(0.05, 0.1))

    def send(self, kind: str, **fields: Any) -> bool:
        line = messages.encode(kind, **fields)
        partner, world = self._partner, self._side.world
        if self.dead or not self.connected or partner is None:
            return False
        at = max(self._last, world.ms_exact() + world.rnd.uniform(0.05, 2))
        self._last = at + 0.001
        world.later(at - world.ms_exact(), lambda: self._arrive(partner, line))
        return True

    def _arrive(self, partner: SimPeer, line: bytes) -> None:
        world = self._side.world
        if partner.dead or not partner.connected or partner._partner is not self:
            return
        if self._waiting or self._is_cut():  # TCP sends it again, in its order
            self._waiting.append((partner, line))
            if len(self._waiting) == 1:
                world.later(5, self._again)
            return
        self._deliver(partner, line)

    def _is_cut(self) -> bool:
        return self._side.world.channel_cut or self._side.name in self._side.world.mute

    def _again(self) -> None:
        if self._is_cut():
            self._side.world.later(5, self._again)
            return
        waiting, self._waiting = self._waiting, []
        for partner, line in waiting:
            if not partner.dead and partner.connected and partner._partner is self:
                self._deliver(partner, line)

    def _deliver(self, partner: SimPeer, line: bytes) -> None:
        world = self._side.world
        partner.last_seen_ns = world.ns()
        msg = messages.decode(line)
        if msg["type"] != "heartbeat":
            world.note("%s gets %s", partner._side.name, msg)
        partner._on_message(msg)

    def drop(self, why: str) -> None:
        """Close a connection as the real channel does by itself."""
        self.cut(why)

    def cut(self, why: str) -> None:
        """Drop the connection; both ends notice unless they are dead."""
        partner, self._partner = self._partner, None
        ends = [self] if partner is None else [self, partner]
        if partner is not None:
            partner._partner = None
        for end in ends:
            was, end.connected = end.connected, False
            if was and not end.dead:
                end._on_down(why)

    def discount(self, ns: int) -> None:
        raise AssertionError("nobody stands still in virtual time")

    def silent_ms(self) -> float:
        if not self.last_seen_ns:
            return float("inf")
        return (self._side.world.ns() - self.last_seen_ns) / 1e6

    async def close(self) -> None:
        self.connected = False


class SimHeartbeatLinks(OfProcess):
    """Stand in for HeartbeatLinks with one link, the peer link.

    It carries the product's own heartbeat datagrams, which may be lost, late and reordered. Its
    random numbers are separate, so that a scene is the same without it.
    """

    def __init__(self, side: Side, pair: str, on_heartbeat: Callable[[Heartbeat], None]) -> None:
        self._side, self._process, self._on_heartbeat = side, side.process, on_heartbeat
        names = ["peer link"] if side.world.scene.datagrams else []
        self.core = HeartbeatSession(pair, "primary" if side.primary else "secondary", names)
        side.heartbeat_links = self

    def start(self) -> None:
        pass

    def send(self, flags: Flag, lag_ms: int, epoch: int) -> None:
        world, rnd = self._side.world, self._side.world.rnd_datagrams
        self.core.round()
        for i in range(len(self.core.links)):
            data = self.core.make(i, world.ns(), flags, lag_ms, epoch)
            if data and not self.dead and rnd.random() >= world.scene.link_loss:
                for _ in range(2 if rnd.random() < 0.02 else 1):
                    late = rnd.choice((2, 2, 2, 2, 80)) * rnd.random()
                    world.later(0.02 + late, lambda i=i, data=data: self._arrive(i, data))  # type: ignore[misc]

    def _arrive(self, i: int, data: bytes) -> None:
        world, other = self._side.world, self._side.other
        if (
            world.link_cut
            or other.name in world.deaf
            or other.heartbeat_links is None
            or other.heartbeat_links.dead
        ):
            return
        word = other.heartbeat_links.core.receive(i, data, world.ns())
        if word is not None:
            other.heartbeat_links._on_heartbeat(word)

    def close(self) -> None:
        pass


class Witness:
    """What etcd stores for a pair. Its clock is slightly faster or slower than the hosts'."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rate = world.rnd.uniform(0.992, 1.008)
        self.holder, self.alone, self.lease, self.revision = "", "", 0, 0
        self.last, self.since = "", 0
        self.leases: dict[int, tuple[int, int]] = {}  # end, ttl
        self._serial = 0

    def look(self) -> None:
        """Expire the leases that have ended by now."""
        now = self._world.ns()
        self.leases = {n: v for n, v in self.leases.items() if v[0] > now}
        if self.holder and self.lease not in self.leases:
            self._world.note("the lease of %s ends", self.holder)
            self.holder, self.lease = "", 0

    def grant(self, ttl_ms: int) -> int:
        self._serial += 1
        self.leases[self._serial] = (self._end(ttl_ms), ttl_ms)
        return self._serial

    def _end(self, ttl_ms: int) -> int:
        return self._world.ns() + int(ttl_ms * 1_000_000 / self.rate)

    def renew(self, lease: int) -> bool:
        self.look()
        if lease not in self.leases:
            return False
        ttl = self.leases[lease][1]
        self.leases[lease] = (self._end(ttl), ttl)
        return True

    def put(self, holder: str, lease: int) -> None:
        self.holder, self.lease, self.last = holder, lease, holder
        self.revision += 1
        self.since = self.revision

    def give_up(self, lease: int) -> None:
        """Record that the key was given up, if this lease still holds it."""
        if self.holder and self.lease == lease:
            self.revision += 1
            self.holder, self.last, self.since = "", GIVEN_UP, self.revision
        self.leases.pop(lease, None)

    def revoke(self) -> None:
        """End all leases early, as an administrator or a fault of the store does."""
        self._world.note("the store's leases are revoked")
        self.leases.clear()

    def seen(self) -> StoreView:
        return StoreView(self.holder, self.alone, self.last, self.since)


class SimStore(OfProcess):
    """Stand in for EtcdStore, request for request: each may be lost, late, or executed without
    an answer."""

    def __init__(self, side: Side) -> None:
        self._side, self._world, self._lease = side, side.world, 0
        self._process, self._closed = side.process, False

    async def _ask(self, what: Callable[[], Any]) -> Any:
        """Send one request and its answer over a network that is cut in one or both directions."""
        world, side = self._world, self._side
        if self.dead or self._closed:
            raise StoreError("closed")
        answer: asyncio.Future[Any] = world.loop.create_future()

        def arrive() -> None:
            if side.name in world.store_cut_out:
                return
            world.witness.look()
            try:
                result = what()
            except StoreError as e:
                result = e
            delay = world.rnd.uniform(0.05, 3 if world.rnd.random() < 0.9 else 350)
            world.later(delay, lambda: give(result))

        def give(result: Any) -> None:
            if side.name not in world.store_cut_in and not answer.done():
                answer.set_result(result)

        late = world.rnd.random() < 0.02
        world.later(world.rnd.uniform(300, 3000) if late else world.rnd.uniform(0.05, 3), arrive)
        done = False
        try:
            result = await answer
            if isinstance(result, StoreError):
                raise result
            done = True
            return result
        finally:
            if not done:
                self._lease = 0

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        w, last = self._world.witness, self._lease
        seen, revision = await self._ask(lambda: (w.seen(), w.revision))
        if not ours_to_take(seen, holder, steal, claim):
            return seen  # type: ignore[no-any-return]
        if last and await self._ask(lambda: w.renew(last)):
            lease = last
        else:
            lease = await self._ask(lambda: w.grant(ttl_ms))
        if lease == last:
            ok, now = await self._ask(lambda: (w.holder == holder and w.lease == lease, w.seen()))
            if ok:
                self._lease = lease
                return now  # type: ignore[no-any-return]

        def put() -> StoreView:
            if bool(w.holder) is not bool(seen.holder) or w.revision != revision:
                raise StoreError("changed")
            w.put(holder, lease)
            return w.seen()

        now = await self._ask(put)
        self._lease = lease
        return now  # type: ignore[no-any-return]

    async def look(self) -> StoreView:
        w = self._world.witness
        return await self._ask(w.seen)  # type: ignore[no-any-return]

    async def record(self, holder: str, alone: str) -> bool:
        w = self._world.witness

        def write() -> bool:
            if w.holder != holder:
                return False
            w.alone = alone
            return True

        return bool(await self._ask(write))

    async def release(self) -> None:
        lease, self._lease = self._lease, 0
        w = self._world.witness
        if lease:
            await self._ask(lambda: w.give_up(lease))

    async def close(self) -> None:
        self._closed = True
