# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate what a controller sees of its host's kernel: the stand-ins for programs and maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from types import SimpleNamespace
from typing import TYPE_CHECKING

from colo_xdp import abi
from colo_xdp.abi import Mode, SyncState
from colo_xdp.conntrack.rewriter import TrackedConnection
from colo_xdp.datapath.addresses import AddressTable
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame

from .offload_model import Out as Leaving
from .offload_model import completed, user_space
from .process import OfProcess

if TYPE_CHECKING:
    from .host import Side


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
    def mirrored_until(self) -> int:
        return self._side.mirrored_until

    @mirrored_until.setter
    def mirrored_until(self, ns: int) -> None:
        if not self.dead:
            self._side.mirrored_until = ns

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
