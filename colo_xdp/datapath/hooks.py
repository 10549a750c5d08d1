# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks that the data path is still in place: devices, and our programs on their hooks.

Devices come and go while a controller lives. A tap or the peer link is deleted and created again,
or moved to another namespace and back; its clsact is removed; another tool's filter is put before
ours. What was lost is restored, first the programs that keep the guest's frames from leaving. The
device's new ifindex is given to the programs only when they are all in place. What cannot be
restored is reported as a sentence. DataPath.look() runs this; controller/device_watch.py acts on
the result.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..abi import Cfg
from ..failover.states import Role, sends_nothing
from . import attach, devices, netlink
from .fingerprint import Fingerprint
from .loader import Program
from .prepare import make_peer_link

if TYPE_CHECKING:
    from .datapath import DataPath

log = logging.getLogger("colo_xdp.datapath.hooks")

TAG_BYTES = 4  # what a frame carries in addition on the peer link
#: without one of these the guest's frames leave unchecked
GATES = frozenset(("pvm_out", "promoted_out", "svm_out"))
_FAILURES = (devices.DeviceError, devices.NoSuchDevice, netlink.NetlinkError, OSError)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a program has to be attached."""

    dev: str
    direction: str
    prog: Program
    prio: int = attach.PRIO


@dataclass(slots=True)
class Look:
    """Result of one check."""

    trouble: list[str] = field(default_factory=list)  # what is missing, one sentence each
    restored: list[str] = field(default_factory=list)  # what was missing and has been restored
    #: The guest's frames may have left unseen since the previous check (`unseen`), or still may
    #: (`exposed`).
    unseen: bool = False
    exposed: bool = False
    #: frames between the guests, or from clients to them, may have been missed
    missed: bool = False
    cut: bool = False  # nothing arrives over the peer link now, or over one of several
    cut_nics: set[int] = field(default_factory=set)  # the NICs whose it is, if there are several


class Hooks:
    """Checks and restores the hooks of one data path."""

    def __init__(self, dp: DataPath) -> None:
        self._dp = dp
        self._blind = False
        self._fingerprint = Fingerprint()
        #: what the last look depended on, if all was well
        self._whole: tuple[object, ...] | None = None

    def look(self) -> Look:
        """Restore what can be restored; never raises.

        Where nothing has changed since all was well, nothing more is looked at.
        """
        found = Look()
        now = self._inputs()
        if now is not None and now == self._whole:
            return found
        self._whole = None
        try:
            self._look(found)
            self._blind = False
            self._whole = now if found == Look() and now == self._inputs() else None
        except _FAILURES as e:
            if not self._blind:
                log.error("the hooks cannot be looked at: %s", e)
            self._blind = True
            found.trouble.append(f"the hooks cannot be looked at: {e}")
        return found

    def _inputs(self) -> tuple[object, ...] | None:
        """Return everything that a look depends on; None: it is not known."""
        dp, net = self._dp, self._dp.net
        names = [net.tap, net.peer_link, *(i.name for i in dp.injectors.values())]
        names += [net.uplink] if net.uplink not in ("auto", "bridge") else []
        try:
            kernel = self._fingerprint.take(names)
        except OSError:
            return None
        slots = (Cfg.TAP, Cfg.PEER, Cfg.UPLINK, Cfg.MODE, Cfg.UNDECIDED, Cfg.PROMOTED_EPOCH)
        return (kernel, dp.stepped_out, dp.guest is not None, *(dp.slot(x) for x in slots))

    def close(self) -> None:
        """Release what a look needs."""
        self._fingerprint.close()

    def _look(self, found: Look) -> None:
        dp, net = self._dp, self._dp.net
        wanted = [net.tap, net.peer_link, *(i.name for i in dp.injectors.values())]
        seen = attach.look(wanted)
        if seen[net.peer_link] is None and net.vxlan_remote:
            make_peer_link(net, dp.manifest)
            found.restored.append(f"device {net.peer_link}")
            seen |= attach.look((net.peer_link,))
        for role, i in dp.injectors.items():
            if seen[i.name] is None:
                i.reopen(devices.make_tap(i.name))
                found.restored.append(f"device {i.name} ({role})")
                seen |= attach.look((i.name,))
        bad = self._devices(seen, found)
        for place in dp.places():
            there = seen[place.dev]
            if there is not None and place.dev not in bad:
                self._place(place, there, found)
        tap, peer = seen[net.tap], seen[net.peer_link]
        if peer is not None and not peer.info.promiscuous:
            devices.take_all_frames(net.peer_link, dp.manifest)
            found.missed = True
            found.restored.append(f"promiscuous mode of {net.peer_link}")
        if tap is not None and net.tap not in bad:
            self._xdp(tap, found)
            self._bridge(tap, found)
        # The programs are in place now, so frames sent to a device meet them.
        self._index(Cfg.TAP, tap if net.tap not in bad else None)
        if self._index(Cfg.PEER, peer) and tap is not None and peer is not None:
            need = tap.info.mtu + TAG_BYTES
            if peer.info.mtu < need:
                log.warning("%s came with mtu %d, %d is needed", net.peer_link, peer.info.mtu, need)
        self._uplink()

    def _devices(self, seen: dict[str, attach.Seen | None], found: Look) -> set[str]:
        """Check the devices themselves; return the names of those that must not get programs."""
        dp, net, bad = self._dp, self._dp.net, set()
        tap, peer = seen[net.tap], seen[net.peer_link]
        dp.tap_up = tap is not None and tap.info.up
        if tap is None:
            found.trouble.append(
                f"[network] tap: network device {net.tap} does not exist, the guest is cut off"
            )
        elif tap.info.kind != "tun":
            bad.add(net.tap)
            found.trouble.append(f"[network] tap: {net.tap} is not a tap device any more")
        elif dp.hook == "xdp" and tap.info.vnet_hdr:
            # XDP would corrupt checksums, and the loaded programs translate only there.
            found.trouble.append(
                f"[network] tap: {net.tap} has vnet_hdr now, which it had not at the start: "
                "restart the controller"
            )
        elif not tap.info.up:
            found.trouble.append(f"[network] tap: {net.tap} is down, the guest is cut off")
        if peer is None:
            found.trouble.append(
                f"[network] peer_link: network device {net.peer_link} does not exist, nothing of "
                "one guest reaches the other"
            )
        elif not peer.info.up or not peer.info.carrier:
            what = "has no carrier" if peer.info.up else "is down"
            found.trouble.append(
                f"[network] peer_link: {net.peer_link} {what}, nothing of one guest reaches the "
                "other"
            )
        found.cut = peer is None or not peer.info.up or not peer.info.carrier
        return bad

    def _place(self, place: Place, seen: attach.Seen, found: Look) -> None:
        dp = self._dp
        pair, name = dp.config.pair, place.prog.name
        own, gate = attach.label(pair, name), name in GATES
        first = attach.comes_first(place.dev, seen, place.direction)
        if first:
            found.trouble.append(f"{first}: it may let frames pass that nobody compares")
            found.exposed |= gate
        there = any(
            f.name == own and f.prio == place.prio and f.prog_id in (0, place.prog.id)
            for f in seen.filters[place.direction]
        )
        if there:
            return
        found.unseen |= gate
        found.missed = True
        manifest = None if place.dev in (i.name for i in dp.injectors.values()) else dp.manifest
        try:
            attach.attach_tc(place.dev, place.direction, place.prog, pair, manifest, place.prio)
        except _FAILURES as e:
            found.exposed |= gate
            if not first:
                found.trouble.append(str(e))
            return
        found.restored.append(f"{name} on {place.dev}")

    def _xdp(self, tap: attach.Seen, found: Look) -> None:
        dp, dev, there = self._dp, self._dp.net.tap, tap.info.xdp_prog_id
        wanted = dp.hook == "xdp" and not dp.stepped_out and not tap.info.vnet_hdr
        if not wanted:
            if there and not attach.is_ours(there, dp.objects.pin_dir):
                found.exposed = True
                found.trouble.append(
                    f"{dev}: an XDP program of somebody else sees the guest's frames first: "
                    "take it off"
                )
            return
        prog = dp.objects.programs["svm_out_xdp"]
        if there == prog.id:
            return
        found.missed = True
        try:
            attach.attach_xdp(dev, prog, dp.manifest, pins=dp.objects.pin_dir)
        except _FAILURES as e:
            found.trouble.append(str(e))
            return
        found.restored.append(f"{prog.name} on {dev}")

    def _bridge(self, tap: attach.Seen, found: Look) -> None:
        """Put the tap of an active guest into the bridge, also if the tap is a new one."""
        dp, net = self._dp, self._dp.net
        transmits = not (sends_nothing(Role(dp.role), dp.mode) or dp.undecided)
        if net.bridge and transmits and not tap.info.master:
            try:
                dp.open_network()
            except _FAILURES as e:
                found.trouble.append(f"[network] bridge: {e}, the guest is cut off")
                return
            found.restored.append(f"{net.tap} in {net.bridge}")

    def _index(self, slot: Cfg, seen: attach.Seen | None) -> bool:
        """Give the programs an ifindex; return whether it has changed.

        0 means nowhere: frames for the device are dropped and counted.
        """
        index = seen.info.index if seen is not None else 0
        if self._dp.slot(slot) == index:
            return False
        self._dp.set_slot(slot, index)
        return True

    def _uplink(self) -> None:
        """Update [network] uplink if it is a device: nothing is sent to one that is gone."""
        dp, name = self._dp, self._dp.net.uplink
        if name in ("auto", "bridge"):
            return
        seen = attach.look((name,))[name]
        if seen is None and dp.slot(Cfg.UPLINK):
            log.warning("[network] uplink: %s is gone, frames leave by way of the bridge", name)
        self._index(Cfg.UPLINK, seen)
