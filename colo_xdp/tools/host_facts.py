# SPDX-License-Identifier: GPL-2.0-or-later
"""Gather what `doctor` judges of this host: devices, bridges, addresses, clock, packet filter.

Nothing is changed, and nothing is judged: tools/host_checks.py does that.
"""

from __future__ import annotations

import ctypes
import os
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..abi import Cfg, Mode
from ..config.file import Config
from ..failover.states import Role, sends_nothing

if TYPE_CHECKING:
    from ..datapath.devices import LinkInfo

STA_UNSYNC = 0x40
_TIMEX_BYTES, _TIMEX_STATUS = 256, 40  # struct timex (linux/timex.h) has 208 bytes


@dataclass(frozen=True, slots=True)
class Bridge:
    """The configured bridge. `stp`: 0 none, 1 the kernel's, 2 a daemon's; `delay` in s."""

    name: str
    up: bool
    stp: int = 0
    delay: float = 0.0
    is_bridge: bool = True


@dataclass(frozen=True, slots=True)
class NicFacts:
    """The devices of one NIC of the guest; None: there is no such device."""

    tap: LinkInfo | None
    peer: LinkInfo | None
    bridge: Bridge | None = None
    master: str = ""  # name of the bridge that the tap is in
    port: str = ""  # its state there
    waits: bool = False  # a state in which nothing is forwarded
    foreign_xdp: str = ""
    hook: str = ""
    hook_trouble: str = ""
    tag_bytes: int = 4  # what a frame grows by on the peer link


@dataclass(frozen=True, slots=True)
class Standing:
    """What this host's guest is now.

    `pid`: of the controller of this pair that runs here; 0: none does, -1: unknown. `allowed`: a
    controller has decided that the guest may transmit, and that is in force.
    """

    role: str
    pid: int = 0
    allowed: bool = False


def standing(config: Config, pid: int, role: str = "", mode: str = "") -> Standing:
    """Return what the guest is: by a running controller's status, else by what is pinned here."""
    from ..datapath import loader

    if role:
        return Standing(role, pid, not sends_nothing(Role(role), Mode[mode.upper()]))
    allowed = False
    for r in Role:
        pins = loader.pin_dir(config.datapath.bpffs, config.pair, r.value)
        mode_now = Mode(loader.pinned_slot(pins, Cfg.MODE) or 0)
        allowed |= not sends_nothing(r, mode_now)
    return Standing(config.role, pid, allowed)


def _link(name: str) -> LinkInfo | None:
    from ..datapath import devices

    try:
        return devices.link_info(name)
    except devices.NoSuchDevice:
        return None


def bridge_facts(name: str) -> Bridge | None:
    """Return what is known of the configured bridge; None: there is no such device."""
    from ..datapath.bridge import spanning_tree

    link = _link(name)
    if link is None:
        return None
    stp, delay = spanning_tree(name)
    return Bridge(name, link.up, stp, delay, link.kind in ("bridge", "openvswitch"))


def _master(index: int) -> str:
    try:
        return socket.if_indextoname(index) if index else ""
    except OSError:
        return f"device {index}"


def gather(config: Config) -> list[NicFacts]:
    """Return what is known of the devices of each NIC."""
    from ..datapath import attach, syscall
    from ..datapath.bridge import PORT_WAITS, port_state
    from ..datapath.hooks import TAG_BYTES
    from ..datapath.prepare import DataPathError, choose_hook

    out = []
    for net in config.networks:
        tap, peer = _link(net.tap), _link(net.peer_link)
        foreign = hook = trouble = port = ""
        if tap is not None and tap.xdp_prog_id and not attach.is_ours(tap.xdp_prog_id):
            foreign = syscall.prog_info_by_id(tap.xdp_prog_id).name
        if tap is not None and tap.kind == "tun":
            port = port_state(net.tap)
            try:
                hook = choose_hook(net.hook, tap)
            except DataPathError as e:
                trouble = str(e)
        out.append(NicFacts(
            tap, peer, bridge_facts(net.bridge) if net.bridge else None,
            _master(tap.master) if tap else "", port, port in PORT_WAITS, foreign, hook, trouble,
            TAG_BYTES,
        ))  # fmt: skip
    return out


def clock_is_set() -> bool | None:
    """Return whether something keeps this host's clock right; None: the kernel does not say."""
    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)  # modes 0: only read
    if libc.adjtimex(buffer) < 0:
        return None
    status = int.from_bytes(buffer.raw[_TIMEX_STATUS : _TIMEX_STATUS + 4], "little")
    return not status & STA_UNSYNC


def hostname() -> str:
    """Return this host's name."""
    return os.uname().nodename
