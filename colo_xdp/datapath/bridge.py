# SPDX-License-Identifier: GPL-2.0-or-later
"""The bridge of the tap: its ports, its addresses, and whether frames may be sent past it."""

from __future__ import annotations

import contextlib
import errno
from pathlib import Path
from typing import Any

from ..net.bridge import PORT_STATES
from .devices import NoSuchDevice, link_info
from .manifest import Manifest
from .netlink import NetlinkError, nftables, rtnetlink

#: states (PORT_STATES) in which a port with a carrier forwards nothing
PORT_WAITS = ("listening", "learning", "blocking")
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


def set_master(name: str, bridge: str | None) -> None:
    """Put a device into a bridge, or remove it (None)."""
    index = link_info(name).index
    master = link_info(bridge).index if bridge else 0
    with rtnetlink() as ipr:
        ipr.link("set", index=index, master=master)


def take_out_ports(manifest_path: Path) -> list[str]:
    """Remove taps from the bridges into which a controller has put them; return one line each."""
    gone = []
    for tap, bridge in Manifest(manifest_path).data["ports"]:
        with contextlib.suppress(NoSuchDevice):
            if link_info(tap).master == link_info(bridge).index:
                set_master(tap, None)
                gone.append(f"{tap} from {bridge}")
    return gone


def port_state(name: str) -> str:
    """Return the state of a bridge port (PORT_STATES); "" if the device is not one.

    Raises NoSuchDevice.
    """
    index = link_info(name).index
    with rtnetlink() as ipr:
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
    with rtnetlink() as ipr:
        info = ipr.link("get", index=index)[0].get_attr("IFLA_LINKINFO")
    data = info.get_attr("IFLA_INFO_DATA") if info else None
    if data is None or not hasattr(data, "get_attr"):
        return 0, 0.0
    stp, delay = data.get_attr("IFLA_BR_STP_STATE"), data.get_attr("IFLA_BR_FORWARD_DELAY")
    return stp or 0, (delay or 0) / 100  # USER_HZ


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
    with rtnetlink() as ipr:
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
        with nftables() as nft:
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
    with rtnetlink() as ipr:
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
