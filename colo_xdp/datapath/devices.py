# SPDX-License-Identifier: GPL-2.0-or-later
"""Network devices: their state, and those that a controller makes: taps and the peer link's VXLAN.

Programs on devices are in attach.py, the bridge of the tap is in bridge.py.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .manifest import Manifest
from .netlink import NetlinkError, rtnetlink

XDP_MODES = {0: "none", 1: "drv", 2: "skb", 3: "hw", 4: "multi"}
TUNSETIFF = 0x400454CA
TUNSETVNETHDRSZ = 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
IFF_PROMISC = 0x0100


class NoSuchDevice(RuntimeError):
    """A network device named in the configuration does not exist in this namespace."""


class DeviceError(RuntimeError):
    """A device cannot be used as configured; the text names the obstacle."""


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
    persistent: bool = True  # a tap that outlives the process which has opened it
    promiscuous: bool = False  # as somebody has set it (`ip link`), not for a bridge or a capture

    @classmethod
    def of(cls, msg: Any) -> LinkInfo:
        """Read the kernel's message about a device."""
        linkinfo = msg.get_attr("IFLA_LINKINFO")
        kind = (linkinfo.get_attr("IFLA_INFO_KIND") if linkinfo else None) or ""
        data = linkinfo.get_attr("IFLA_INFO_DATA") if linkinfo else None
        vnet = mq = False
        queues, persistent = 0, True
        if kind == "tun" and data is not None:
            persistent = bool(data.get_attr("IFTUN_PERSIST") or data.get_attr("IFLA_TUN_PERSIST"))
            vnet = bool(data.get_attr("IFTUN_VNET_HDR") or data.get_attr("IFLA_TUN_VNET_HDR"))
            mq = bool(data.get_attr("IFTUN_MULTI_QUEUE") or data.get_attr("IFLA_TUN_MULTI_QUEUE"))
            for name in ("NUM_QUEUES", "NUM_DISABLED_QUEUES"):
                queues += data.get_attr(f"IFLA_TUN_{name}") or 0
        xdp = msg.get_attr("IFLA_XDP")
        mode = (xdp.get_attr("IFLA_XDP_ATTACHED") if xdp else 0) or 0
        mode = int(mode) if not isinstance(mode, str) else 1
        prog = (xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else 0) or 0
        return cls(
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
            persistent=persistent,
            promiscuous=bool(msg["flags"] & IFF_PROMISC),
        )


def link_info(name: str) -> LinkInfo:
    """Return the state of a device.

    Raises NoSuchDevice when it does not exist in this network namespace.
    """
    with rtnetlink() as ipr:
        try:
            return LinkInfo.of(ipr.link("get", ifname=name)[0])
        except NetlinkError as e:
            if e.code in (errno.ENODEV, errno.ENOENT):
                raise NoSuchDevice(f"network device {name} does not exist") from e
            raise


def set_up(name: str, up: bool = True) -> None:
    """Bring a device up or down."""
    index = link_info(name).index
    with rtnetlink() as ipr:
        ipr.link("set", index=index, state="up" if up else "down")


def take_all_frames(name: str, manifest: Manifest) -> None:
    """Make a device promiscuous, if it is not.

    Frames on the peer link are for the guest or its clients. A NIC drops those that are neither for
    its own address nor for a group, before any program sees them.
    """
    info = link_info(name)
    if not info.promiscuous:
        manifest.add("promiscuous", name)
        with rtnetlink() as ipr:
            ipr.link("set", index=info.index, flags=IFF_PROMISC, mask=IFF_PROMISC)


def make_vxlan(name: str, vni: int, local: str, remote: str, port: int, manifest: Manifest) -> bool:
    """Create the peer link as a unicast VXLAN, up and without addresses; False if it exists.

    No learning: everything goes to `remote`. MTU: 1500; what is longer outside than the path is
    sent in fragments. Raises DeviceError if another device has that name.
    """
    suffix = "6" if ":" in remote else ""
    want = {"IFLA_VXLAN_ID": vni, f"IFLA_VXLAN_GROUP{suffix}": remote, "IFLA_VXLAN_PORT": port}
    if local:
        want[f"IFLA_VXLAN_LOCAL{suffix}"] = local
    with rtnetlink() as ipr:
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
                raise DeviceError(f"{name} exists and is not the VXLAN that is wanted: {found}")
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
            raise DeviceError(f"{name}: VXLAN {vni} to {remote}: {e}") from e
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


def tap_in_use(index: int) -> bool:
    """Return whether a tap with this index exists and is held open (by QEMU)."""
    with rtnetlink() as ipr:
        try:
            info = LinkInfo.of(ipr.link("get", index=index)[0])
        except NetlinkError:
            return False
    return info.kind == "tun" and info.carrier
