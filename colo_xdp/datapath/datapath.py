# SPDX-License-Identifier: GPL-2.0-or-later
"""The data path of one NIC as an object: attached programs, mode, epoch, counters, taps.

The controllers own one for each NIC (datapath/host.py). On start-up it adopts what a former
controller left pinned, so that the guest's frames meet a program at every moment.
"""

from __future__ import annotations

import logging
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from .. import abi
from ..abi import Cfg, Mode, Prog, Reason
from ..config.file import Config
from ..net.address_claims import mac_key
from . import attach, bridge, devices, loader, netlink, programs
from .addresses import AddressTable
from .fingerprint import Fingerprint
from .hooks import Hooks, Look, Place
from .inject import Injector
from .maps import Map
from .offload_maps import BpfKernelPath
from .pair_slots import OF_THE_PAIR, PairSlots
from .prepare import DataPathError, Prepared, note_nics, prepare, record
from .ring import CapturedFrame, open_reader
from .rule_changes import RuleChanges
from .source import Options, Refused

log = logging.getLogger("colo_xdp.datapath.datapath")

_U32 = struct.Struct("=I")
#: not OFFLOAD_DUPLICATE: a guest that has nothing to say repeats what its client has not acked
_U64 = struct.Struct("=Q")
#: the programs that hand frames to the controller, of the secondary and of the primary
_CAPTURING = ((Prog.SVM_IN, Prog.SVM_OUT), (Prog.PVM_OUT, Prog.SVM_ARRIVAL))

#: Between two refreshes of the guest in its bridge while addresses change, and the longest time
#: while none does. Bridges forget after 300 s by default. A refresh costs 3 ms, and 35 us per
#: address.
FDB_EVERY_S, FDB_REST_S = 5.0, 30.0

PRIMARY_HOOKS = (("pvm_in", "tap", "egress"), ("svm_arrival", "peer", "ingress"))
SECONDARY_HOOKS = (("svm_net", "tap", "egress"), ("svm_in", "peer", "ingress"))
#: the programs of the taps to which only the controller writes
INJECTED = {"release": "pvm_release", "deliver": "svm_deliver", "forward": "svm_forward"}


class DataPath(PairSlots):
    """Programs and maps of one NIC, loaded, attached and pinned.

    `adopted`: a former controller's state continues.
    """

    def __init__(
        self,
        config: Config,
        nic: int = 0,
        ready: Prepared | None = None,
        lead: DataPath | None = None,
    ) -> None:
        """Set up the NIC of that number.

        `ready`: the result of prepare(), which is called if there is none; `lead`: the first NIC's
        data path, whose pair slots this one follows.
        """
        self.config, self.nic = config, nic
        ready = ready or prepare(config, nic, record(config))
        self.net, self.manifest, self.role, self.hook = (
            config.networks[nic], ready.manifest, ready.role, ready.hook,
        )  # fmt: skip
        net, dp, tap, primary = self.net, config.datapath, ready.tap, self.role == "primary"
        options = programs.options(config, self.role, self.hook)
        note_nics(config, self.manifest)
        self.objects, options = self._load(options)
        self._cfg = self.objects.map("config")
        self._counters = self.objects.map("counters")
        # No program writes to `config`, and one controller at a time does: what this process has
        # written is what is there. A slot is asked for some hundred times a second.
        self._slots_lock = threading.Lock()  # held while a slot is written
        self._slots = {slot: self._read_slot(slot) for slot in Cfg}
        found = self.slot(Cfg.ABI)
        if found not in (0, abi.ABI):
            raise DataPathError(
                f"the pinned data path has ABI {found}, this release {abi.ABI}: "
                "run `colo-xdp cleanup` once the guest may lose its connections"
            )
        self.adopted = found == abi.ABI
        if lead is not None:
            self._follow(lead)
        self.addresses = AddressTable(self.objects.map("addresses"), self.objects.map("macs"))
        #: CFG_GUEST_MAC without MAC_ALL
        self._guest_mac = self.slot(Cfg.GUEST_MAC) & ~abi.MAC_ALL
        self._macs_full = False
        self.tap_up = tap.up  # as of the last look at the devices (hooks.py)
        #: state of the tap's bridge port (PORT_STATES in net/bridge.py), if it is one
        self.port_state = ""
        self._port_print, self._port_seen = Fingerprint(), b""
        self.reader = open_reader(self.objects)
        self.injectors: dict[str, Injector] = {}
        if lead is None:
            if not self.adopted or (self.undecided and options.lease):
                self._begin(primary, options.lease)
            self._lease(options.lease)
        self.guest: loader.Objects | None = None
        if primary and self.slot(Cfg.PROMOTED_EPOCH):
            self.guest = loader.load("promoted", config.pair, dp.bpffs, options, config.role, nic)
        mode = (lead or self).mode
        if self.adopted and self.role == "secondary" and mode is Mode.DROP and tap.master:
            # it was there as a primary; open_network() puts it back
            bridge.set_master(net.tap, None)
        self.set_slot(Cfg.TAP, tap.index)
        self.set_slot(Cfg.PEER, ready.peer.index)
        uplinks = {"auto": abi.UPLINK_LEARNED, "bridge": abi.UPLINK_BRIDGE}
        uplink = uplinks.get(net.uplink)
        if uplink is None:
            seen = attach.look((net.uplink,))[net.uplink]
            # A guest that waits for this controller does not wait for a device that it can do
            # without (datapath/hooks.py).
            uplink = seen.info.index if seen is not None else abi.UPLINK_BRIDGE
        self.set_slot(Cfg.UPLINK, uplink)
        policy = abi.LossPolicy[dp.on_controller_loss.upper()]
        self.set_slot(Cfg.LOSS_POLICY, policy)
        self.set_slot(Cfg.LOSS_NS, dp.controller_loss * 1_000_000)
        self.beat()
        if not primary or self.guest:
            self._fill_transitions(self.guest or self.objects)
        self.set_slot(Cfg.ABI, abi.ABI)
        self.fast: BpfKernelPath | None = None
        if options.fast:
            self.fast = BpfKernelPath(
                self.objects,
                config.limits().flow_idle_ns,
                self.slot(Cfg.OFFLOAD_SINCE),
                lambda on: self.set_slot(Cfg.OFFLOAD, on),
                lambda epoch: self.set_slot(Cfg.OFFLOAD_SINCE, epoch),
            )
            self.fast.enabled = True
        self._ports: frozenset[int] | None = None
        self._plain: frozenset[int] = frozenset()  # as of the last look
        self._rule_changes = RuleChanges()
        self._fixed: frozenset[int] = frozenset()  # where the bridge has entries made by hand
        self._fdb_set, self._fdb_rest = 0.0, FDB_EVERY_S
        self._fdb_changed = True
        self._bridge_unknown = False
        self.stepped_out = False  # taken over, and no program is needed any more
        self._lock = threading.RLock()  # guards what is attached
        self.hooks = Hooks(self)
        if lead is not None:
            # Not sooner: in the mode of another role the programs that are attached drop all, and
            # what was loaded above may have taken seconds to compile.
            self.mode = lead.mode
        self._attach()
        #: by programs of the other role, which this host may have had
        self._lost_before = self._lost(_CAPTURING[self.role != "primary"])
        self.look_at_port()
        if self.guest:
            # A later epoch than any other host has seen: see Primary._older_than(). Set only when
            # the secondary's programs are detached, as they would take their offsets for void.
            self.epoch = max(self.epoch, self.promoted_epoch + 1)

    def _begin(self, primary: bool, lease: bool) -> None:
        """Set the initial state when nothing was pinned: no guest transmits before a decision."""
        transmits = primary and lease  # in the kernel not before the lease allows it
        self.undecided = primary and not lease
        # The guest is active while nothing is compared: a copy made before must not take over.
        self.set_slot(Cfg.SYNC_STATE, abi.SyncState.STANDALONE if transmits else abi.SyncState.NONE)
        self.set_slot(Cfg.MODE, Mode.BYPASS if transmits else Mode.DROP)

    def _lease(self, on: bool) -> None:
        """Set the lease slot, which also shows whether there is a lease: then it is never 0.

        tools/cleanup.py reads it.
        """
        if not on:
            self.lease_expiry(0)
        elif not self.slot(Cfg.LEASE_EXPIRY_NS):
            self.lease_expiry(1)

    def _load(self, options: Options) -> tuple[loader.Objects, Options]:
        """Load the role's programs, without the fast path if this kernel refuses it."""
        c = self.config

        def load(options: Options) -> loader.Objects:
            return loader.load(self.role, c.pair, c.datapath.bpffs, options, c.role, self.nic)

        if not options.fast:
            return load(options), options
        try:
            if loader.events(options) == "ring":
                return load(options), options
            why = "it needs a BPF ring buffer"
        except Refused as e:
            why = str(e).splitlines()[0]
        log.error("no fast path, every frame is compared in user space: %s", why)
        options = replace(options, fast=False)
        return load(options), options

    def _follow(self, lead: DataPath) -> None:
        """Take over what the first NIC's data path says of the pair.

        HostDataPath writes each slot to the first NIC first. Where a controller died between two
        NICs, this one is a step behind, as it would be if that controller had died a moment
        sooner. The epoch follows once every NIC has its programs: see HostDataPath.
        """
        for which in OF_THE_PAIR:
            if which is not Cfg.MODE:  # see __init__
                self.set_slot(which, lead.slot(which))

    def _attach(self) -> None:
        progs, pair, m = self.objects.programs, self.config.pair, self.manifest
        dev = {"tap": self.net.tap, "peer": self.net.peer_link}
        devices.take_all_frames(dev["peer"], m)

        def hook(name: str, where: str, direction: str) -> None:
            attach.attach_tc(dev.get(where, where), direction, progs[name], pair, m)

        if self.role == "primary":
            if self.mode is Mode.TAKEOVER:
                # Until now this was the SVM of a lost pair. A frame must be translated exactly
                # once. In MODE_BYPASS the programs that are attached drop it, and those that
                # replace them one by one let it pass.
                self.mode = Mode.BYPASS
            if self.guest:
                guest = self.guest.programs
                attach.attach_tc(
                    dev["tap"], "ingress", guest["promoted_out"], pair, m, attach.FIRST
                )
                attach.attach_tc(dev["tap"], "egress", guest["promoted_in"], pair, m, attach.LAST)
            self._tap("release", self._tap_name("r"))
            for h in PRIMARY_HOOKS:
                hook(*h)
            hook("pvm_out", "tap", "ingress")  # last: from here on output is under our control
            attach.detach_xdp(dev["tap"], self.objects.pin_dir)
        else:
            hook("svm_out", "tap", "ingress")  # first: the SVM is isolated before anything opens
            self._detach_guest()
            self._attach_xdp()
            self._tap("deliver", self._tap_name("d"))
            self._tap("forward", self._tap_name("f"))
            for h in SECONDARY_HOOKS:
                hook(*h)

    def places(self) -> list[Place]:
        """Return where this role's programs must be now, in the order of their restoration.

        Those that keep the guest's frames from leaving come first.
        """
        progs, net = self.objects.programs, self.net
        out: list[Place] = []
        dev = {"tap": net.tap, "peer": net.peer_link}
        primary = self.role == "primary"
        if primary and self.guest and self.promoted_epoch:
            guest = self.guest.programs
            out.append(Place(net.tap, "ingress", guest["promoted_out"], attach.FIRST))
            out.append(Place(net.tap, "egress", guest["promoted_in"], attach.LAST))
        if not self.stepped_out:
            out.append(Place(net.tap, "ingress", progs["pvm_out" if primary else "svm_out"]))
        for role, i in self.injectors.items():
            out.append(Place(i.name, "ingress", progs[INJECTED[role]]))
        for name, where, direction in PRIMARY_HOOKS if primary else SECONDARY_HOOKS:
            if where == "peer" or not self.stepped_out:
                out.append(Place(dev[where], direction, progs[name]))
        return out

    def look(self) -> Look:
        """Restore what was removed, and report what is missing.

        Blocks for some ms (netlink), so it must not run in the event loop.
        """
        with self._lock:
            return self.hooks.look()

    def changes(self) -> socket.socket | None:
        """Return a socket that is readable when it is time to look; None: there is none."""
        return netlink.changes()

    def arrived(self) -> int:
        """Return the number of tagged frames that have come over the peer link."""
        prog = Prog.SVM_ARRIVAL if self.role == "primary" else Prog.SVM_IN
        return sum(
            self._count(prog, r)[0] for r in Reason if r not in (Reason.PASS_FOREIGN, Reason.MAX)
        )

    def sent(self) -> int:
        """Return the number of frames of the secondary's guest that have come from its tap."""
        return sum(self._count(Prog.SVM_OUT, r)[0] for r in Reason if r is not Reason.MAX)

    def _attach_xdp(self) -> None:
        if self.hook == "xdp":
            prog = self.objects.programs["svm_out_xdp"]
            attach.attach_xdp(self.net.tap, prog, self.manifest, pins=self.objects.pin_dir)

    def _tap_name(self, kind: str) -> str:
        """Return the name of an injector's tap, such as cxr-web, or cxr1web for the second NIC."""
        return f"cx{kind}{self.nic or '-'}{self.config.pair}"

    def _tap(self, role: str, name: str) -> None:
        self.injectors[role] = Injector(devices.make_tap(name), name)
        prog = self.objects.programs[INJECTED[role]]
        attach.attach_tc(name, "ingress", prog, self.config.pair, None)

    def _detach_guest(self) -> None:
        tap, pair = self.net.tap, self.config.pair
        attach.detach_tc(tap, "ingress", attach.label(pair, "promoted_out"))
        attach.detach_tc(tap, "egress", attach.label(pair, "promoted_in"))

    @staticmethod
    def _fill_transitions(objects: loader.Objects) -> None:
        from ..conntrack.tcp_state import transition_table

        table = objects.map("transitions")
        for i, nxt in enumerate(transition_table()):
            table.set(_U32.pack(i), _U32.pack(nxt))

    def slot(self, slot: Cfg) -> int:
        return self._slots[slot]

    def _read_slot(self, slot: Cfg) -> int:
        raw = self._cfg.get(_U32.pack(slot))
        value: int = _U64.unpack(raw)[0] if raw else 0
        return value

    def set_slot(self, slot: Cfg, value: int) -> None:
        with self._slots_lock:
            self._cfg.set(_U32.pack(slot), _U64.pack(value))
            self._slots[slot] = value

    @property
    def in_bridge(self) -> bool:
        """Return whether the guest's tap is in a bridge."""
        return bool(devices.link_info(self.net.tap).master)

    def unmirror(self, key: bytes | None) -> None:
        """Stop mirroring a flow (struct colo_unmirrored_key) to the SVM; None: mirror all again."""
        table = self.objects.map("unmirrored")
        if key is None:
            self.set_slot(Cfg.UNMIRRORED, 0)
            for old in list(table.keys()):
                table.delete(old)
        else:
            table.set(key, _U64.pack(1))
            self.set_slot(Cfg.UNMIRRORED, 1)

    def is_at(self, first: bytes, *others: bytes) -> None:
        """Set the guest's MAC addresses: what is for other machines is not mirrored from now on.

        Raises OSError when there is no room for the others.
        """
        self._guest_mac = abi.MAC_KNOWN | mac_key(first)
        self._set_mac()
        now = self.epoch
        self.addresses.announced(now, b"", b"".join(others), running=now)

    def _set_mac(self) -> None:
        full = abi.MAC_ALL if self._macs_full else 0
        self.set_slot(Cfg.GUEST_MAC, self._guest_mac | full if self._guest_mac else 0)

    def watch_guest(self) -> None:
        """Forget old addresses of the guest, and check its bridge port.

        Blocks for some ms (netlink).
        """
        full = self.addresses.sweep(self.epoch if self.role == "secondary" else None)
        if full is not self._macs_full:
            level, what = (logging.ERROR, "everything is") if full else (logging.INFO, "not all is")
            log.log(level, "the guest's MAC addresses: %s mirrored to the other host", what)
        self._macs_full = full
        if not self._guest_mac and self.addresses.macs(None):
            # QEMU does not report it, but the guest has sent frames
            self._guest_mac = abi.MAC_KNOWN
        self._set_mac()
        self.look_at_port()

    def look_at_port(self) -> None:
        """Update port_state; blocks (netlink)."""
        try:
            with self._lock:
                now = self._port_print.take((self.net.tap,))
                if now == self._port_seen:
                    return
                self._port_seen = b""
                self.port_state = bridge.port_state(self.net.tap)
                self._port_seen = now
        except devices.NoSuchDevice:
            self.port_state = ""
        except (netlink.NetlinkError, OSError) as e:  # vanished between two requests, or no memory
            log.debug("the port of the guest's tap: %s", e)  # the next look will show

    @property
    def port_forwarding(self) -> bool:
        """Return whether the bridge forwards the guest's frames, as of the last look.

        A port without carrier is disabled: then there is no guest to wait for.
        """
        return self.port_state not in bridge.PORT_WAITS

    def watch_bridge(self) -> None:
        """Give the fast path the ports of the tap's bridge, and refresh the guest in that bridge.

        A bridge that cannot be examined has no such ports: frames go through it. Blocks for some ms
        (netlink), so it must not run in the event loop.
        """
        if self.fast is None or self.net.uplink != "auto":
            return
        tap, now = self.net.tap, time.monotonic()
        refresh = self._must_refresh(now)
        look = self._rule_changes.any()
        if not (look or refresh):
            return
        try:
            if look:
                self._plain = bridge.plain_ports(tap)
                refresh = self._must_refresh(now)
            if refresh:
                self._fdb_changed = False
                self._fixed, ageing_s = bridge.refresh_fdb(tap)
                self._fdb_set = now
                self._fdb_rest = max(FDB_EVERY_S, min(FDB_REST_S, ageing_s / 8))
            ports = self._plain
            for port in self._fixed:
                ports &= {port}
            self._set_ports(ports)
            self._bridge_unknown = False
        except (devices.NoSuchDevice, netlink.NetlinkError, OSError) as e:
            self._rule_changes.again()
            self._fdb_changed = True
            self._set_ports(frozenset())
            if not self._bridge_unknown:
                log.error("the bridge of %s is not known, nothing leaves past it: %s", tap, e)
            self._bridge_unknown = True

    def _must_refresh(self, now: float) -> bool:
        """Return whether it is time to refresh the guest in its bridge."""
        try:
            self._fdb_changed |= self._rule_changes.addresses()
        except OSError:  # no memory, no descriptors
            self._fdb_changed = True
        since = now - self._fdb_set
        due = since > (FDB_EVERY_S if self._fdb_changed else self._fdb_rest)
        return bool(self._plain) and due

    def _set_ports(self, ports: frozenset[int]) -> None:
        """Set the ports; forget where clients were seen if they have changed."""
        if ports == self._ports:
            return
        self._ports = None
        table, clients = self.objects.map("ports"), self.objects.map("clients")
        for key in list(table.keys()):
            table.delete(key)
        for key in list(clients.keys()):
            clients.delete(key)
        for index in ports:
            table.set(_U32.pack(index), _U64.pack(1))
        self._ports = ports

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 1 << 30) -> int:
        """Pass the waiting events to `sink`, in order; return how many."""
        if not self.nic:
            return self.reader.drain(sink, limit)

        def mark(event: CapturedFrame) -> None:
            event.nic = self.nic
            sink(event)

        return self.reader.drain(mark, limit)

    def counters(self, progs: Iterable[Prog] = Prog) -> dict[str, dict[str, tuple[int, int]]]:
        """Return {program: {reason: (packets, bytes)}}, summed over CPUs; zeros included."""
        return {
            prog.name.lower(): {
                reason.name.lower(): self._count(prog, reason)
                for reason in Reason
                if reason is not Reason.MAX
            }
            for prog in progs
            if prog is not Prog.MAX
        }

    def _count(self, prog: Prog, reason: Reason) -> tuple[int, int]:
        """Return packets and bytes of one counter."""
        raw = self._counters.get(_U32.pack(prog * Reason.MAX + reason)) or b""
        p = b = 0
        for x, y in abi.COUNT.iter_unpack(raw):  # of each CPU
            p, b = p + x, b + y
        return p, b

    def lost_events(self) -> int:
        """Return how many frames did not fit into the event ring, or could not be carried by it."""
        primary = self.role == "primary"
        return self.reader.lost + self._lost_before + self._lost(_CAPTURING[primary])

    def _lost(self, progs: tuple[Prog, ...]) -> int:
        reasons = (Reason.DROP_RING_FULL, Reason.DROP_TOO_LARGE)
        return sum(self._count(prog, reason)[0] for prog in progs for reason in reasons)

    def tap_alive(self) -> bool:
        """Return whether the tap is held open (by QEMU): its carrier."""
        try:
            return devices.link_info(self.net.tap).carrier
        except devices.NoSuchDevice:
            return False

    def open_network(self) -> None:
        """Put the guest's tap into the configured bridge, if any: the guest may transmit."""
        net = self.net
        if net.bridge and devices.link_info(net.tap).master != devices.link_info(net.bridge).index:
            bridge.set_master(net.tap, net.bridge)
            self.manifest.add("ports", [net.tap, net.bridge])

    def close_network(self) -> None:
        """Remove the tap from the configured bridge: the other host's guest is active."""
        net = self.net
        if net.bridge and devices.link_info(net.tap).master == devices.link_info(net.bridge).index:
            bridge.set_master(net.tap, None)

    def step_out(self) -> None:
        """Detach the programs on the guest's tap, which a takeover makes needless (secondary).

        No address that moves is noticed afterwards, so a later controller announces none.
        """
        tap, pair = self.net.tap, self.config.pair
        with self._lock:
            self.stepped_out = True
            attach.detach_tc(tap, "ingress", attach.label(pair, "svm_out"))
            attach.detach_tc(tap, "egress", attach.label(pair, "svm_net"))
            if self.hook == "xdp":
                attach.detach_xdp(tap, self.objects.pin_dir)
        self.addresses.forget_all()

    def step_in(self) -> None:
        """Attach the programs that step_out() has detached: the mode decides again what leaves."""
        progs, pair, tap = self.objects.programs, self.config.pair, self.net.tap
        with self._lock:
            self.stepped_out = False
            attach.attach_tc(tap, "ingress", progs["svm_out"], pair, self.manifest)
            self._attach_xdp()
            attach.attach_tc(tap, "egress", progs["svm_net"], pair, self.manifest)

    def drop_guest(self) -> None:
        """Stop translating: no connection in the guest's own numbers is left (primary)."""
        with self._lock:
            self._detach_guest()
            self.set_slot(Cfg.PROMOTED_EPOCH, 0)

    def flows(self) -> tuple[Map, Map] | None:
        """Return the maps of connections with offsets and of handshakes; None if there are none."""
        objects = self.guest if self.role == "primary" else self.objects
        return (objects.map("flows"), objects.map("opening")) if objects else None

    def close(self, *, detach: bool = False) -> None:
        """Release all resources. What is attached and pinned stays, unless `detach` is set."""
        for i in self.injectors.values():
            i.close()
        self.reader.close()
        self._rule_changes.close()
        self.hooks.close()
        self._port_print.close()
        if detach:
            attach.detach_all(self.manifest.path)
        self.objects.close()
        if self.guest:
            self.guest.close()
        if detach:
            loader.remove_pins(self.objects.pin_dir)
