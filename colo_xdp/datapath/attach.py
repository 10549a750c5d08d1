# SPDX-License-Identifier: GPL-2.0-or-later
"""Devices and hooks, over netlink; the only module that imports pyroute2.

Everything that is put on a device carries our name, is replaced atomically by the next controller,
and is recorded in a manifest. So `detach` removes exactly what was attached, and nothing that
belongs to other tools.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2.netlink.exceptions import NetlinkError as NetlinkError
from pyroute2.nftables.main import NFTables

from ..net.bridge import PORT_STATES
from . import syscall
from .loader import Program

ETH_P_ALL = 0x0003
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT | TC_H_MIN_INGRESS/EGRESS
#: Before any other filter: one that passes a frame before ours would be a leak. Ours come in the
#: order promoted_out, one of the role's programs, promoted_in.
FIRST, PRIO, LAST = 1, 2, 3
LABEL = "colo-xdp"
XDP_NAME = "svm_out_xdp"

XDP_IF_NOEXIST, XDP_SKB, XDP_DRV, XDP_REPLACE = 1, 2, 4, 16
XDP_MODES = {0: "none", 1: "drv", 2: "skb", 3: "hw", 4: "multi"}

TUNSETIFF = 0x400454CA
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
RTN_UNICAST = 1
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_PROMISC = 0x0100


class NoSuchDevice(RuntimeError):
    """A network device named in the configuration does not exist in this namespace."""


class AttachError(RuntimeError):
    """A program cannot be attached to a device; the text names the obstacle."""


class Taken(AttachError):
    """The device belongs to another pair, or another tool's program comes first.

    The operator has to decide.
    """


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """The kernel's information about a device.

    `queues`: of a tap with multi_queue, how many descriptors are open, used by the guest or not.
    """

    name: str
    index: int
    kind: str
    up: bool
    carrier: bool
    mtu: int
    mac: str
    master: int
    vnet_hdr: bool
    multi_queue: bool
    xdp_prog_id: int
    xdp_mode: str
    queues: int = 0
    promiscuous: bool = False  # as somebody has set it (`ip link`), not for a bridge or a capture


@contextlib.contextmanager
def _netlink() -> Iterator[Any]:
    with IPRoute() as ipr:
        yield ipr


def _info(msg: Any) -> LinkInfo:
    linkinfo = msg.get_attr("IFLA_LINKINFO")
    kind = (linkinfo.get_attr("IFLA_INFO_KIND") if linkinfo else None) or ""
    data = linkinfo.get_attr("IFLA_INFO_DATA") if linkinfo else None
    vnet = mq = False
    queues = 0
    if kind == "tun" and data is not None:
        vnet = bool(data.get_attr("IFTUN_VNET_HDR") or data.get_attr("IFLA_TUN_VNET_HDR"))
        mq = bool(data.get_attr("IFTUN_MULTI_QUEUE") or data.get_attr("IFLA_TUN_MULTI_QUEUE"))
        for name in ("NUM_QUEUES", "NUM_DISABLED_QUEUES"):
            queues += data.get_attr(f"IFLA_TUN_{name}") or 0
    xdp = msg.get_attr("IFLA_XDP")
    mode = (xdp.get_attr("IFLA_XDP_ATTACHED") if xdp else 0) or 0
    mode = int(mode) if not isinstance(mode, str) else 1
    prog = (xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else 0) or 0
    return LinkInfo(
        name=msg.get_attr("IFLA_IFNAME"),
        index=msg["index"],
        kind=kind,
        up=bool(msg["flags"] & 1),
        carrier=bool(msg.get_attr("IFLA_CARRIER")),
        mtu=msg.get_attr("IFLA_MTU") or 0,
        mac=msg.get_attr("IFLA_ADDRESS") or "",
        master=msg.get_attr("IFLA_MASTER") or 0,
        vnet_hdr=vnet,
        multi_queue=mq,
        xdp_prog_id=int(prog),
        xdp_mode=XDP_MODES.get(mode, str(mode)),
        queues=queues,
        promiscuous=bool(msg["flags"] & IFF_PROMISC),
    )


def link_info(name: str) -> LinkInfo:
    """Return the state of a device.

    Raises NoSuchDevice when it does not exist in this network namespace.
    """
    with _netlink() as ipr:
        try:
            return _info(ipr.link("get", ifname=name)[0])
        except NetlinkError as e:
            if e.code in (errno.ENODEV, errno.ENOENT):
                raise NoSuchDevice(f"network device {name} does not exist") from e
            raise


@dataclass(frozen=True, slots=True)
class Route:
    """How the kernel reaches another host."""

    dev: str
    gateway: str  # empty: it is on the same network
    source: str  # empty: any
    quickack: bool

    def with_quickack(self, address: str) -> str:
        """Return the command that makes this a route of its own, with quickack, to one host."""
        via = f" via {self.gateway}" if self.gateway else ""
        src = f" src {self.source}" if self.source else ""
        return f"ip route replace {address}{via} dev {self.dev}{src} quickack 1"


def route_to(address: str) -> Route | None:
    """Return the route to an IP address; None if there is none, or if it is this host's own."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with _netlink() as ipr:
        try:
            found = next(iter(ipr.route("get", dst=address, family=family)))
        except NetlinkError as e:
            if e.code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return None
            raise
        if found["type"] != RTN_UNICAST:
            return None
        dev = ipr.link("get", index=found.get_attr("RTA_OIF"))[0].get_attr("IFLA_IFNAME")
    metrics = found.get_attr("RTA_METRICS")
    return Route(
        dev,
        found.get_attr("RTA_GATEWAY") or "",
        found.get_attr("RTA_PREFSRC") or "",
        bool(metrics and metrics.get_attr("RTAX_QUICKACK")),
    )


def set_up(name: str, up: bool = True) -> None:
    """Bring a device up or down."""
    index = link_info(name).index
    with _netlink() as ipr:
        ipr.link("set", index=index, state="up" if up else "down")


def take_all_frames(name: str, manifest: Manifest) -> None:
    """Make a device promiscuous, if it is not.

    Frames on the peer link are for the guest or its clients. A NIC drops those that are neither for
    its own address nor for a group, before any program sees them.
    """
    info = link_info(name)
    if not info.promiscuous:
        manifest.add("promiscuous", name)
        with _netlink() as ipr:
            ipr.link("set", index=info.index, flags=IFF_PROMISC, mask=IFF_PROMISC)


def set_master(name: str, bridge: str | None) -> None:
    """Put a device into a bridge, or remove it (None)."""
    index = link_info(name).index
    master = link_info(bridge).index if bridge else 0
    with _netlink() as ipr:
        ipr.link("set", index=index, master=master)


#: states (PORT_STATES) in which a port with a carrier forwards nothing
PORT_WAITS = ("listening", "learning", "blocking")


def port_state(name: str) -> str:
    """Return the state of a bridge port (PORT_STATES); "" if the device is not one.

    Raises NoSuchDevice.
    """
    index = link_info(name).index
    with _netlink() as ipr:
        info = ipr.link("get", index=index)[0].get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_SLAVE_DATA") if info else None
    if data is None or not hasattr(data, "get_attr"):
        return ""
    state = data.get_attr("IFLA_BRPORT_STATE")
    return "" if state is None else PORT_STATES[state]


def spanning_tree(bridge: str) -> tuple[int, float]:
    """Return a kernel bridge's spanning tree mode and its forward delay in seconds.

    The mode is 0: no STP, 1: the kernel's, 2: a daemon's. Returns (0, 0.0) if the device is not a
    bridge. Raises NoSuchDevice.
    """
    index = link_info(bridge).index
    with _netlink() as ipr:
        info = ipr.link("get", index=index)[0].get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    if data is None or not hasattr(data, "get_attr"):
        return 0, 0.0
    stp, delay = data.get_attr("IFLA_BR_STP_STATE"), data.get_attr("IFLA_BR_FORWARD_DELAY")
    return stp or 0, (delay or 0) / 100  # USER_HZ


_BRIDGE_CALLS = ("NF_CALL_IPTABLES", "NF_CALL_IP6TABLES", "NF_CALL_ARPTABLES")
_NFPROTO_BRIDGE = 7
_NUD_REACHABLE, _NUD_NOARP, _NUD_PERMANENT = 0x02, 0x40, 0x80
_NTF_USE, _NTF_MASTER, _NTF_EXT_LEARNED, _NTF_STICKY = 0x01, 0x04, 0x10, 0x40
#: Port attributes (IFLA_BRPORT_*) that frames would bypass if they were sent past the bridge.
_PORT_RULES = (
    "LOCKED",
    "ISOLATED",
    "NEIGH_SUPPRESS",
    "NEIGH_VLAN_SUPPRESS",
    "PROXYARP",
    "PROXYARP_WIFI",
)
#: With a shorter ageing time the bridge forgets a client before pvm_in does (CLIENT_FRESH_NS); in
#: 1/100 s.
_MIN_AGEING = 100
#: Legacy ebtables: once a table's module is loaded, only its own ioctl shows whether it has rules.
EBTABLES = tuple(Path(f"/sys/module/ebtable_{x}") for x in ("filter", "nat", "broute"))
_CALL_FILES = tuple(f"/proc/sys/net/bridge/bridge-nf-call-{x}tables" for x in ("ip", "ip6", "arp"))
_NAME_FILES = tuple(f"/proc/thread-self/net/{x}_tables_names" for x in ("ip", "ip6", "arp"))
#: what _is_filtered() reads and no netlink message reports, besides EBTABLES
RULE_FILES = (*_CALL_FILES, *_NAME_FILES)
#: Answers of a kernel without nf_tables, to the socket or to the request (nfnetlink_rcv_msg()
#: answers EINVAL for a subsystem that it does not have).
_NO_NFTABLES = frozenset(
    (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EOPNOTSUPP, errno.ENOENT, errno.EINVAL)
)


def plain_ports(tap: str) -> frozenset[int]:
    """Return the ifindexes of bridge ports whose clients can be answered past the tap's bridge.

    Empty if the tap is in no bridge, or in one that filters (VLANs, netfilter) or keeps no
    addresses, or if the tap's own port has rules. Otherwise, the ports that learn and have no
    rules. Entries made by hand are reported by refresh_fdb().
    """
    none: frozenset[int] = frozenset()
    try:
        own = link_info(tap)
    except NoSuchDevice:
        return none
    if not own.master:
        return none
    with _netlink() as ipr:
        data = ipr.link("get", index=own.master)[0].get_attr("IFLA_LINKINFO")
        data = data.get_attr("IFLA_INFO_DATA") if data else None
        ports = frozenset(m["index"] for m in ipr.get_links(master=own.master) if _is_plain(m))
    if data is None or data.get_attr("IFLA_BR_VLAN_FILTERING") or own.index not in ports:
        return none
    if (data.get_attr("IFLA_BR_AGEING_TIME") or 0) < _MIN_AGEING:
        return none
    calls = any(data.get_attr(f"IFLA_BR_{x}") for x in _BRIDGE_CALLS)
    return none if _is_filtered(calls) else ports


def _is_plain(port: Any) -> bool:
    """Return whether a bridge port learns addresses and has no rules of its own."""
    info = port.get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_SLAVE_DATA") if info else None
    if data is None or not hasattr(data, "get_attr"):
        return False
    return bool(data.get_attr("IFLA_BRPORT_LEARNING")) and not any(
        data.get_attr(f"IFLA_BRPORT_{x}") for x in _PORT_RULES
    )


def _is_filtered(calls: bool) -> bool:
    """Return whether there may be rules for bridged frames.

    That is legacy ebtables, nftables' family `bridge`, or any rules at all if the bridge calls the
    other families (`calls`, or the sysctl). What cannot be determined counts as a rule.
    """
    if any(path.exists() for path in EBTABLES):
        return True
    try:
        for name in _CALL_FILES:
            with contextlib.suppress(FileNotFoundError):
                calls |= Path(name).read_text() != "0\n"
        for name in _NAME_FILES:
            with contextlib.suppress(FileNotFoundError):
                if calls and Path(name).read_text():
                    return True
        with NFTables(nfgen_family=0) as nft:
            return any(calls or m["nfgen_family"] == _NFPROTO_BRIDGE for m in nft.get_tables())
    except (NetlinkError, OSError) as e:
        return (e.code if isinstance(e, NetlinkError) else e.errno) not in _NO_NFTABLES


def refresh_fdb(port: str) -> tuple[frozenset[int], float]:
    """Refresh each address that the bridge has learnt at this port, as a frame from it would.

    Returns where the bridge has addresses that it has not learnt (static, sticky, local but no
    device's own, or set by another program): ifindexes of ports, or of the bridge. Such an address
    must be reached there, wherever it was seen. The second value is the time (s) after which the
    bridge forgets an address that is not refreshed; 0: it is not known.
    """
    own = link_info(port)
    fixed: set[int] = set()
    if not own.master:
        return frozenset(), 0.0
    with _netlink() as ipr:
        local = {m.get_attr("IFLA_ADDRESS") for m in ipr.get_links(master=own.master)}
        bridge = ipr.link("get", index=own.master)[0]
        local.add(bridge.get_attr("IFLA_ADDRESS"))
        data = bridge.get_attr("IFLA_LINKINFO")
        data = data.get_attr("IFLA_INFO_DATA") if data else None
        ageing = (data.get_attr("IFLA_BR_AGEING_TIME") if data else None) or 0
        for m in ipr.fdb("dump"):
            state, flags, mac = m["state"], m["flags"], m.get_attr("NDA_LLADDR")
            if m.get_attr("NDA_MASTER") != own.master:
                continue
            if flags & (_NTF_EXT_LEARNED | _NTF_STICKY) or state & _NUD_NOARP:
                fixed.add(m["ifindex"])
            elif state & _NUD_PERMANENT:
                if mac not in local:
                    fixed.add(m["ifindex"])
            elif m["ifindex"] == own.index and state & _NUD_REACHABLE and flags == 0:
                ipr.fdb(
                    "add",
                    ifindex=own.index,
                    lladdr=mac,
                    state=_NUD_REACHABLE,
                    flags=_NTF_USE | _NTF_MASTER,
                )
    return frozenset(fixed), ageing / 100  # USER_HZ


def make_vxlan(name: str, vni: int, local: str, remote: str, port: int, manifest: Manifest) -> bool:
    """Create the peer link as a unicast VXLAN, up and without addresses; False if it exists.

    No learning: everything goes to `remote`. MTU: what the path to `remote` leaves. Raises
    AttachError if another device has that name.
    """
    suffix = "6" if ":" in remote else ""
    want = {"IFLA_VXLAN_ID": vni, f"IFLA_VXLAN_GROUP{suffix}": remote, "IFLA_VXLAN_PORT": port}
    if local:
        want[f"IFLA_VXLAN_LOCAL{suffix}"] = local
    with _netlink() as ipr:
        try:
            there = ipr.link("get", ifname=name)[0]
        except NetlinkError as e:
            if e.code not in (errno.ENODEV, errno.ENOENT):
                raise
        else:
            info = there.get_attr("IFLA_LINKINFO")
            kind = (info.get_attr("IFLA_INFO_KIND") if info else None) or "a device of hardware"
            data = info.get_attr("IFLA_INFO_DATA") if kind == "vxlan" else None
            found = {k: data.get_attr(k) for k in want} if data is not None else kind
            if found != want:
                raise AttachError(f"{name} exists and is not the VXLAN that is wanted: {found}")
            set_up(name)
            return False
        addresses = {f"vxlan_group{suffix}": remote}
        if local:
            addresses[f"vxlan_local{suffix}"] = local
        try:
            ipr.link(
                "add",
                ifname=name,
                kind="vxlan",
                vxlan_id=vni,
                vxlan_port=port,
                vxlan_learning=0,
                **addresses,
            )
        except NetlinkError as e:
            raise AttachError(f"{name}: VXLAN {vni} to {remote}: {e}") from e
    manifest.add("links", name)
    with contextlib.suppress(FileNotFoundError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    set_up(name)
    return True


def make_tap(name: str) -> int:
    """Create a tap with vnet_hdr that lives as long as its descriptor; return the descriptor.

    Frames written to it carry a 10-byte struct virtio_net_hdr (little-endian).
    """
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", 10))
        # The device is only written to. Without addresses the host sends nothing to it.
        with contextlib.suppress(FileNotFoundError):
            Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
        set_up(name)
    except BaseException:
        os.close(fd)
        raise
    return fd


class Manifest:
    """Record of what one controller has attached to devices, kept on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.RLock()  # devices are looked at in threads
        self.data: dict[str, list[Any]] = {
            "clsact": [],
            "filters": [],
            "xdp": [],
            "links": [],
            "promiscuous": [],
            "ports": [],
            "nics": [],  # their names
        }
        if path.exists():
            with contextlib.suppress(ValueError):
                old = json.loads(path.read_text())
                for k, v in self.data.items():
                    v.extend(old.get(k, []))

    def add(self, kind: str, item: Any) -> None:
        """Record one more item."""
        with self._lock:
            if item not in self.data[kind]:
                self.replace(kind, [*self.data[kind], item])

    def replace(self, kind: str, items: list[Any]) -> None:
        """Record these items in place of the former ones."""
        with self._lock:
            if items != self.data[kind]:
                self.data[kind] = items
                self.path.parent.mkdir(parents=True, exist_ok=True)
                tmp = self.path.with_suffix(".tmp")
                tmp.write_text(json.dumps(self.data))
                tmp.replace(self.path)


@dataclass(frozen=True, slots=True)
class Filter:
    """A tc filter at a hook; `name` and `prog_id` only for kind "bpf"."""

    prio: int
    handle: int
    kind: str
    name: str
    prog_id: int

    @property
    def pair(self) -> str:
        """Return the pair that it belongs to, if a controller attached it; otherwise ""."""
        parts = self.name.split(":")
        return parts[1] if len(parts) == 3 and parts[0] == LABEL else ""


def _filters(ipr: Any, index: int, parent: int) -> list[Filter]:
    """Return the filters at a hook."""
    out = []
    for m in ipr.get_filters(index=index, parent=parent):
        if not m["handle"]:
            continue  # the head of a priority chain, not a filter
        name, prog = "", 0
        opts = m.get_attr("TCA_OPTIONS")
        if opts is not None and hasattr(opts, "get_attr"):
            name, prog = opts.get_attr("TCA_BPF_NAME") or "", opts.get_attr("TCA_BPF_ID") or 0
        kind = m.get_attr("TCA_KIND") or ""
        out.append(Filter(m["info"] >> 16, m["handle"], kind, name, int(prog)))
    return out


@dataclass(frozen=True, slots=True)
class Seen:
    """A device and what is on its hooks.

    filters: by direction ("ingress", "egress"). tcx: the number of tcx programs (Linux 6.6), which
    run before any filter.
    """

    info: LinkInfo
    filters: dict[str, list[Filter]] = field(default_factory=dict)
    tcx: dict[str, int] = field(default_factory=dict)


_PARENTS = {"ingress": INGRESS, "egress": EGRESS}


def look(names: Iterable[str]) -> dict[str, Seen | None]:
    """Return what is on these devices now; None: there is no such device."""
    out: dict[str, Seen | None] = {}
    with _netlink() as ipr:
        for name in names:
            try:
                info = _info(ipr.link("get", ifname=name)[0])
                filters = {d: _filters(ipr, info.index, parent) for d, parent in _PARENTS.items()}
            except NetlinkError as e:
                if e.code not in (errno.ENODEV, errno.ENOENT):
                    raise
                out[name] = None
                continue
            out[name] = Seen(
                info, filters, {d: syscall.tcx_programs(info.index, d) for d in filters}
            )
    return out


def other_pair(dev: str, seen: Seen, pair: str) -> str:
    """Return a sentence that names the other pair which has this device; "": none."""
    for direction, filters in seen.filters.items():
        for f in filters:
            if f.pair not in ("", pair):
                return (
                    f"{dev} {direction}: pair {f.pair} has its program {f.name.split(':')[2]} "
                    "here, and a device serves one pair: give this one another device (a VLAN or "
                    f"VXLAN of its own), or `colo-xdp cleanup --pair {f.pair}` if that pair is gone"
                )
    return ""


def comes_first(dev: str, seen: Seen, direction: str) -> str:
    """Return a sentence about a program that sees frames before ours; "": none."""
    for f in seen.filters[direction]:
        if f.prio <= LAST and not f.name.startswith(LABEL + ":"):
            return (
                f"{dev} {direction}: a filter of somebody else ({f.kind} {f.name!r}, priority "
                f"{f.prio}) comes first; give it a priority above {LAST} or remove it"
            )
    n = seen.tcx[direction]
    if n and seen.info.kind == "tun":  # on the peer link nothing passes to the clients' network
        return f"{dev} {direction}: {n} tcx programs of somebody else run before ours: remove them"
    return ""


def changes() -> socket.socket:
    """Return a socket that is readable when devices, qdiscs or filters here have changed.

    Its messages are of no use, since it may overflow: call look().
    """
    s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    s.bind((0, 1 | 8))  # RTMGRP_LINK, RTMGRP_TC
    return s


def drain(sock: socket.socket) -> None:
    """Read everything from a socket of changes(). The messages only mean that something changed."""
    with contextlib.suppress(OSError):  # nothing more to read, or it has overflowed
        while sock.recv(65536):
            pass


def label(pair: str, prog: str) -> str:
    """Return the name of our filter, made of pair and program."""
    return f"{LABEL}:{pair}:{prog}"


def attach_tc(
    dev: str,
    direction: str,
    prog: Program,
    pair: str,
    manifest: Manifest | None,
    prio: int = PRIO,
) -> None:
    """Attach a program to a device's clsact hook, atomically replacing ours at this place.

    manifest: None for devices that vanish with their descriptor. Raises NoSuchDevice; Taken if
    another pair is there or another tool's filter comes first; AttachError.
    """
    parent = _PARENTS[direction]
    name_of = label(pair, prog.name)
    seen = look((dev,))[dev]
    if seen is None:
        raise NoSuchDevice(f"network device {dev} does not exist")
    why = other_pair(dev, seen, pair) or comes_first(dev, seen, direction)
    if why:
        raise Taken(why)
    index = seen.info.index
    # Replace only what is ours: if another pair has come meanwhile, `add` fails.
    mine = any(f.prio == prio and f.pair == pair for f in seen.filters[direction])
    with _netlink() as ipr:
        try:
            ipr.tc("add", "clsact", index)
            if manifest:
                manifest.add("clsact", dev)
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise AttachError(f"{dev}: clsact: {e}") from e
        if manifest:
            manifest.add("filters", [dev, direction, name_of])
        try:
            ipr.tc(
                "replace-filter" if mine else "add-filter",
                "bpf",
                index,
                handle=1,
                prio=prio,
                protocol=ETH_P_ALL,
                fd=prog.fd,
                name=name_of,
                parent=parent,
                classid=1,
                direct_action=True,
            )
        except NetlinkError as e:
            if e.code == errno.EEXIST:
                raise Taken(f"{dev} {direction}: another pair has just taken this device") from e
            raise AttachError(f"{dev} {direction}: {e}") from e


def attach_xdp(dev: str, prog: Program, manifest: Manifest, *, generic: bool = False) -> None:
    """Attach an XDP program to a device, in native mode unless `generic` is set.

    Raises Taken if a foreign program is there, AttachError if the mode is refused.
    """
    info = link_info(dev)
    attrs: list[tuple[str, int]] = [("IFLA_XDP_FD", prog.fd)]
    flags = XDP_SKB if generic else XDP_DRV
    old = -1
    if info.xdp_prog_id:
        there = syscall.prog_info_by_id(info.xdp_prog_id)
        if there.name != prog.name[:15]:
            raise Taken(
                f"{dev}: XDP program {there.name!r} (id {there.id}, {info.xdp_mode}) is not ours: "
                "take it off first, it is not replaced"
            )
        old = syscall.prog_fd_by_id(info.xdp_prog_id)
        attrs.append(("IFLA_XDP_EXPECTED_FD", old))
        flags |= XDP_REPLACE
    else:
        flags |= XDP_IF_NOEXIST
    attrs.append(("IFLA_XDP_FLAGS", flags))
    try:
        with _netlink() as ipr:
            manifest.add("xdp", [dev, prog.name])
            ipr.link("set", index=info.index, xdp={"attrs": attrs})
    except NetlinkError as e:
        mode = "generic" if generic else "native"
        raise AttachError(f"{dev}: XDP in {mode} mode refused: {e}") from e
    finally:
        if old >= 0:
            os.close(old)


def is_ours(prog_id: int) -> bool:
    """Return whether an XDP program was attached by attach_xdp()."""
    try:
        return syscall.prog_info_by_id(prog_id).name == XDP_NAME[:15]
    except OSError:
        return False


def detach_tc(dev: str, direction: str, name_of: str) -> bool:
    """Detach one of our filters; False if it (or the device) is not there any more."""
    try:
        index = link_info(dev).index
    except NoSuchDevice:
        return False
    parent = INGRESS if direction == "ingress" else EGRESS
    with _netlink() as ipr:
        for f in _filters(ipr, index, parent):
            if f.name == name_of:
                ipr.tc(
                    "del-filter",
                    "bpf",
                    index,
                    handle=f.handle,
                    prio=f.prio,
                    protocol=ETH_P_ALL,
                    parent=parent,
                )
                return True
    return False


def detach_xdp(dev: str, name: str) -> bool:
    """Detach our XDP program; one of another name stays. Returns whether it was there."""
    try:
        info = link_info(dev)
    except NoSuchDevice:
        return False
    if not info.xdp_prog_id or syscall.prog_info_by_id(info.xdp_prog_id).name != name[:15]:
        return False
    fd = syscall.prog_fd_by_id(info.xdp_prog_id)
    flags = (XDP_SKB if info.xdp_mode == "skb" else XDP_DRV) | XDP_REPLACE
    try:
        with _netlink() as ipr:
            ipr.link(
                "set",
                index=info.index,
                xdp={
                    "attrs": [
                        ("IFLA_XDP_FD", -1),
                        ("IFLA_XDP_EXPECTED_FD", fd),
                        ("IFLA_XDP_FLAGS", flags),
                    ]
                },
            )
    finally:
        os.close(fd)
    return True


def take_out_ports(manifest_path: Path) -> list[str]:
    """Remove taps from the bridges into which a controller has put them; return one line each."""
    gone = []
    for tap, bridge in Manifest(manifest_path).data["ports"]:
        with contextlib.suppress(NoSuchDevice):
            if link_info(tap).master == link_info(bridge).index:
                set_master(tap, None)
                gone.append(f"{tap} from {bridge}")
    return gone


def tap_in_use(index: int) -> bool:
    """Return whether a tap with this index exists and is held open (by QEMU)."""
    with _netlink() as ipr:
        try:
            info = _info(ipr.link("get", index=index)[0])
        except NetlinkError:
            return False
    return info.kind == "tun" and info.carrier


def detach_all(manifest_path: Path) -> list[str]:
    """Remove everything that the manifest lists; return what was removed, one line each.

    A clsact qdisc is removed only if we made it and nothing is left on it.
    """
    if not manifest_path.exists():
        return []
    manifest = Manifest(manifest_path)
    gone = []
    for dev, direction, name_of in manifest.data["filters"]:
        if detach_tc(dev, direction, name_of):
            gone.append(f"tc {direction} {dev} {name_of}")
    for dev, name in manifest.data["xdp"]:
        if detach_xdp(dev, name):
            gone.append(f"xdp {dev} {name}")
    for dev in manifest.data["clsact"]:
        try:
            index = link_info(dev).index
        except NoSuchDevice:
            continue
        with _netlink() as ipr:
            if not _filters(ipr, index, INGRESS) and not _filters(ipr, index, EGRESS):
                with contextlib.suppress(NetlinkError):
                    ipr.tc("del", "clsact", index)
                    gone.append(f"clsact {dev}")
    for dev in manifest.data["promiscuous"]:
        with contextlib.suppress(NoSuchDevice, NetlinkError):
            info = link_info(dev)
            if info.promiscuous:
                with _netlink() as ipr:
                    ipr.link("set", index=info.index, flags=0, mask=IFF_PROMISC)
                gone.append(f"promiscuous mode of {dev}")
    for dev in manifest.data["links"]:
        with _netlink() as ipr, contextlib.suppress(NoSuchDevice, NetlinkError):
            ipr.link("del", index=link_info(dev).index)
            gone.append(f"device {dev}")
    manifest_path.unlink()
    return gone
