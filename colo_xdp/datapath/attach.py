# SPDX-License-Identifier: GPL-2.0-or-later
"""Programs on the hooks of devices: tc filters and XDP.

Everything that is put on a device carries our name, is replaced atomically by the next controller,
and is recorded in a manifest. So detach_all() removes exactly what was attached, and nothing that
belongs to other tools.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import syscall
from .devices import IFF_PROMISC, DeviceError, LinkInfo, NoSuchDevice, link_info
from .loader import Program
from .manifest import Manifest
from .netlink import NetlinkError, rtnetlink

ETH_P_ALL = 0x0003
INGRESS, EGRESS = 0xFFFFFFF2, 0xFFFFFFF3  # TC_H_CLSACT | TC_H_MIN_INGRESS/EGRESS
#: Before any other filter: one that passes a frame before ours would be a leak. Ours come in the
#: order promoted_out, one of the role's programs, promoted_in.
FIRST, PRIO, LAST = 1, 2, 3
LABEL = "colo-xdp"
XDP_NAME = "svm_out_xdp"
XDP_PIN = "prog_xdp"  # the one that is attached, among the pins of its NIC

XDP_IF_NOEXIST, XDP_SKB, XDP_DRV, XDP_REPLACE = 1, 2, 4, 16


class Taken(DeviceError):
    """The device belongs to another pair, or another tool's program comes first.

    The operator has to decide.
    """


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
    with rtnetlink() as ipr:
        for name in names:
            try:
                info = LinkInfo.of(ipr.link("get", ifname=name)[0])
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
    another pair is there or another tool's filter comes first; DeviceError.
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
    with rtnetlink() as ipr:
        try:
            ipr.tc("add", "clsact", index)
            if manifest:
                manifest.add("clsact", dev)
        except NetlinkError as e:
            if e.code != errno.EEXIST:
                raise DeviceError(f"{dev}: clsact: {e}") from e
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
            raise DeviceError(f"{dev} {direction}: {e}") from e


def _own_xdp(prog_id: int, pins: str) -> int:
    """Open an attached XDP program if it is ours; -1: it is not. The caller closes it.

    Each one that is attached is pinned meanwhile: to open it by its number needs CAP_SYS_ADMIN,
    which a controller has not. Without `pins` it is opened by its number.
    """
    for name in (XDP_PIN, f"{XDP_PIN}_new") if pins else ():
        with contextlib.suppress(FileNotFoundError):
            fd = syscall.obj_get(f"{pins}/{name}")
            if syscall.prog_info(fd).id == prog_id:
                return fd
            os.close(fd)
    try:
        fd = syscall.prog_fd_by_id(prog_id)
    except OSError:  # not allowed, or it is gone
        return -1
    if syscall.prog_info(fd).name == XDP_NAME[:15]:
        return fd
    os.close(fd)
    return -1


def attach_xdp(
    dev: str, prog: Program, manifest: Manifest, *, pins: str = "", generic: bool = False
) -> None:
    """Attach an XDP program to a device, in native mode unless `generic` is set.

    pins: the directory of the NIC's pins. Raises Taken if a foreign program is there, DeviceError
    if the mode is refused.
    """
    info = link_info(dev)
    attrs: list[tuple[str, int]] = [("IFLA_XDP_FD", prog.fd)]
    flags = XDP_SKB if generic else XDP_DRV
    old = -1
    if info.xdp_prog_id:
        old = _own_xdp(info.xdp_prog_id, pins)
        if old < 0:
            raise Taken(
                f"{dev}: the XDP program with id {info.xdp_prog_id} ({info.xdp_mode}) is not ours: "
                "take it off first, it is not replaced"
            )
        attrs.append(("IFLA_XDP_EXPECTED_FD", old))
        flags |= XDP_REPLACE
    else:
        flags |= XDP_IF_NOEXIST
    attrs.append(("IFLA_XDP_FLAGS", flags))
    try:
        manifest.add("xdp", [dev, prog.name])
        new = f"{pins}/{XDP_PIN}_new"
        if pins:  # at each moment, what is attached is pinned
            with contextlib.suppress(FileNotFoundError):
                os.unlink(new)
            syscall.obj_pin(prog.fd, new)
        with rtnetlink() as ipr:
            ipr.link("set", index=info.index, xdp={"attrs": attrs})
        if pins:
            os.rename(new, f"{pins}/{XDP_PIN}")
    except NetlinkError as e:
        mode = "generic" if generic else "native"
        raise DeviceError(f"{dev}: XDP in {mode} mode refused: {e}") from e
    finally:
        if old >= 0:
            os.close(old)


def is_ours(prog_id: int, pins: str = "") -> bool:
    """Return whether an XDP program was attached by attach_xdp()."""
    fd = _own_xdp(prog_id, pins)
    if fd >= 0:
        os.close(fd)
    return fd >= 0


def detach_tc(dev: str, direction: str, name_of: str) -> bool:
    """Detach one of our filters; False if it (or the device) is not there any more."""
    try:
        index = link_info(dev).index
    except NoSuchDevice:
        return False
    parent = INGRESS if direction == "ingress" else EGRESS
    with rtnetlink() as ipr:
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


def detach_xdp(dev: str, pins: str = "") -> bool:
    """Detach our XDP program; one of somebody else stays. Returns whether it was there."""
    try:
        info = link_info(dev)
    except NoSuchDevice:
        return False
    fd = _own_xdp(info.xdp_prog_id, pins) if info.xdp_prog_id else -1
    if fd < 0:
        return False
    flags = (XDP_SKB if info.xdp_mode == "skb" else XDP_DRV) | XDP_REPLACE
    try:
        with rtnetlink() as ipr:
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
    for pin in (XDP_PIN, f"{XDP_PIN}_new") if pins else ():
        with contextlib.suppress(FileNotFoundError):
            os.unlink(f"{pins}/{pin}")
    return True


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
        if detach_xdp(dev):
            gone.append(f"xdp {dev} {name}")
    for dev in manifest.data["clsact"]:
        try:
            index = link_info(dev).index
        except NoSuchDevice:
            continue
        with rtnetlink() as ipr:
            if not _filters(ipr, index, INGRESS) and not _filters(ipr, index, EGRESS):
                with contextlib.suppress(NetlinkError):
                    ipr.tc("del", "clsact", index)
                    gone.append(f"clsact {dev}")
    for dev in manifest.data["promiscuous"]:
        with contextlib.suppress(NoSuchDevice, NetlinkError):
            info = link_info(dev)
            if info.promiscuous:
                with rtnetlink() as ipr:
                    ipr.link("set", index=info.index, flags=0, mask=IFF_PROMISC)
                gone.append(f"promiscuous mode of {dev}")
    for dev in manifest.data["links"]:
        with rtnetlink() as ipr, contextlib.suppress(NoSuchDevice, NetlinkError):
            ipr.link("del", index=link_info(dev).index)
            gone.append(f"device {dev}")
    manifest_path.unlink()
    return gone
