# SPDX-License-Identifier: GPL-2.0-or-later
"""The data paths of all NICs of a host's guest.

Each NIC has programs, maps and a peer link of its own: a frame belongs to the NIC where it was
seen, and so does its flow. What is said of the pair is said to each of them, the first one first. A
controller that dies between two NICs leaves the later ones where they would be if it had died a
moment sooner, and the next controller makes them follow the first (DataPath).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterable, Sequence

from ..abi import Cfg, Prog
from ..config.file import Config
from . import devices, loader, netlink
from .datapath import DataPath
from .hooks import Look
from .pair_slots import PairSlots
from .prepare import prepare, record
from .ring import CapturedFrame

TRAFFIC_S = 0.5
Counters = dict[str, dict[str, tuple[int, int]]]


class HostDataPath(PairSlots):
    """What a controller owns: the pair's slots, and `nics` with all that is of one NIC."""

    def __init__(self, config: Config, nics: Sequence[DataPath]) -> None:
        """Take the data paths of the NICs, in the order of the configuration."""
        self.config, self.nics = config, tuple(nics)
        self.role, self.adopted = nics[0].role, nics[0].adopted
        # Every NIC has its role's programs now. The first one's epoch may be behind: see DataPath.
        self.epoch = max(nic.epoch for nic in nics)
        self._traffic, self._traffic_due = (0, 0), 0.0
        self.beat()  # the last NIC's programs may have taken seconds to compile

    @classmethod
    def load(cls, config: Config) -> HostDataPath:
        """Load and attach, once everything that every NIC needs is there.

        Raises what prepare() and DataPath() raise.
        """
        manifest, d = record(config), config.datapath
        ready = [prepare(config, i, manifest) for i in range(len(config.networks))]
        nics = [DataPath(config, 0, ready[0])]
        try:
            for i in range(1, len(ready)):
                if not nics[0].adopted:  # left by an interrupted cleanup: of no use
                    loader.remove_pins(loader.pin_dir(d.bpffs, config.pair, config.role, i))
                nics.append(DataPath(config, i, ready[i], nics[0]))
        except BaseException:
            for nic in nics:
                nic.close()
            raise
        return cls(config, nics)

    def slot(self, slot: Cfg) -> int:
        return self.nics[0].slot(slot)

    def set_slot(self, slot: Cfg, value: int) -> None:
        for nic in self.nics:
            nic.set_slot(slot, value)

    # ---- frames

    @property
    def fds(self) -> list[int]:
        """Descriptors that are readable when there are frames."""
        return [fd for nic in self.nics for fd in nic.reader.fds]

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        """Pass the waiting events of each NIC to `sink`; return how many.

        They are in order within a NIC. `limit`: the number of events taken of one NIC.
        """
        return sum(nic.drain(sink, limit) for nic in self.nics)

    def lost_events(self) -> int:
        """Return how many frames did not fit into an event ring, or could not be carried by it."""
        return sum(nic.lost_events() for nic in self.nics)

    def guest_traffic(self) -> tuple[int, int]:
        """Return how many frames have come for the SVM and from it, at most TRAFFIC_S ago.

        Counters are summed for it, which is too much for each heartbeat.
        """
        now = time.monotonic()
        if now >= self._traffic_due:
            self._traffic = (
                sum(nic.arrived() for nic in self.nics),
                sum(nic.sent() for nic in self.nics),
            )
            self._traffic_due = now + TRAFFIC_S
        return self._traffic

    def counters(self, progs: Iterable[Prog] = Prog) -> Counters:
        """Return {program: {reason: (packets, bytes)}}, summed over the NICs."""
        total, *others = (nic.counters(progs) for nic in self.nics)
        for one in others:
            for prog, row in one.items():
                for reason, (packets, size) in row.items():
                    p, b = total[prog][reason]
                    total[prog][reason] = p + packets, b + size
        return total

    # ---- devices

    def look(self) -> Look:
        """Restore what was removed, and report what is missing, for all NICs.

        Blocks for some ms (netlink), so it must not run in the event loop.
        """
        found = Look()
        for i, nic in enumerate(self.nics):
            one = nic.look()
            found.cut_nics |= {i} if one.cut else set()
            found.trouble += one.trouble
            found.restored += one.restored
            found.unseen |= one.unseen
            found.exposed |= one.exposed
            found.missed |= one.missed
            found.cut |= one.cut
        return found

    def changes(self) -> socket.socket | None:
        """Return a socket that is readable when it is time to look; None: there is none."""
        return netlink.changes()

    def tap_alive(self) -> bool:
        """Return whether a tap is held open (by QEMU)."""
        return any(nic.tap_alive() for nic in self.nics)

    def watch_guest(self) -> None:
        """Forget old addresses of the guest, and check its bridge ports; blocks (netlink)."""
        for nic in self.nics:
            nic.watch_guest()

    def watch_bridge(self) -> None:
        """Give the fast path the ports of the taps' bridges; blocks (netlink)."""
        for nic in self.nics:
            nic.watch_bridge()

    def look_at_port(self) -> None:
        """Update port_state of each NIC; blocks (netlink)."""
        for nic in self.nics:
            nic.look_at_port()

    @property
    def port_forwarding(self) -> bool:
        """Return whether frames of the guest get past a tap and its port, as of the last look."""
        return any(nic.tap_up and nic.port_forwarding for nic in self.nics)

    @property
    def in_bridge(self) -> list[str]:
        """Return the taps that are in a bridge though the configuration names none."""
        return [nic.net.tap for nic in self.nics if not nic.net.bridge and nic.in_bridge]

    def open_network(self) -> None:
        """Put the guest's taps into their bridges, if any: the guest may transmit."""
        self._each(DataPath.open_network)

    def close_network(self) -> None:
        """Remove the taps from their bridges: the other host's guest is active."""
        self._each(DataPath.close_network)

    def step_out(self) -> None:
        """Detach the programs on the guest's taps, which a takeover makes needless (secondary)."""
        self._each(DataPath.step_out)

    def step_in(self) -> None:
        """Attach the programs that step_out() has detached: the mode decides again what leaves."""
        self._each(DataPath.step_in)

    def _each(self, act: Callable[[DataPath], None]) -> None:
        """Do something for each NIC, also if it fails for another one; raise what came first."""
        failed: Exception | None = None
        for nic in self.nics:
            try:
                act(nic)
            except (devices.DeviceError, devices.NoSuchDevice, netlink.NetlinkError, OSError) as e:
                failed = failed or e
        if failed is not None:
            raise failed

    def close(self, *, detach: bool = False) -> None:
        """Release all resources. What is attached and pinned stays, unless `detach` is set."""
        for nic in reversed(self.nics):
            nic.close(detach=detach)
