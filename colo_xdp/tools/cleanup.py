# SPDX-License-Identifier: GPL-2.0-or-later
"""Remove everything of a pair from this host, and nothing else (`colo-xdp cleanup`).

The pinned data path may be all that keeps a guest silent. It is therefore removed only under a
guest that is entitled to transmit, standalone: otherwise two guests could transmit, or one that
lacks what the other one has sent.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path

from ..abi import Cfg, HostRole, Mode
from ..datapath import attach, bridge, devices, loader
from ..datapath.manifest import manifest_path
from ..failover.lease import boot_ns
from .preflight import is_running

ROLES = ("primary", "secondary")


class StillRunning(RuntimeError):
    """A controller of the pair answers on its control socket."""


class GuestWouldTransmit(RuntimeError):
    """A guest that is not entitled to run standalone would transmit without the pins."""


@dataclass(frozen=True, slots=True)
class Pinned:
    """State that the last controller left behind, and whether a QEMU is running."""

    role: str  # of the guest that this host currently runs
    mode: Mode
    lease_expiry: int  # CLOCK_BOOTTIME, ns; 0: the arbiter is not a lease
    in_use: bool  # a QEMU holds a tap


def refusal(p: Pinned, now_ns: int) -> str:
    """Return why the guest must not be released, as a sentence; "" if it may.

    `now_ns`: CLOCK_BOOTTIME.
    """
    if not p.in_use:
        return ""
    if p.mode is Mode.DROP:
        return (
            "the guest here is kept off the network and its QEMU lives: the other host's guest may "
            "be transmitting"
        )
    if p.mode in (Mode.RUN, Mode.CHECKPOINT):
        if p.role == "primary":
            return (
                "the guest here is compared with a copy on the other host, which could take over "
                "later without what this guest sends standalone: run `colo-xdp failover` first, "
                "with the controller running"
            )
        return (
            "the guest here is a copy that is kept off the network, and its QEMU lives: end it "
            "first"
        )
    if p.lease_expiry and now_ns >= p.lease_expiry:
        return (
            "the guest here has no lease and its QEMU lives: the other host's guest may be "
            "transmitting"
        )
    return ""


def _pinned(pins: str, role: str) -> Pinned | None:
    if loader.pinned_slot(pins, Cfg.ABI) == 0:
        return None

    def slot(which: Cfg) -> int:
        return loader.pinned_slot(pins, which)

    now = HostRole(slot(Cfg.ROLE))
    return Pinned(
        role if now is HostRole.CONFIGURED else now.name.lower(),
        Mode(slot(Cfg.MODE)),
        slot(Cfg.LEASE_EXPIRY_NS),
        any(devices.tap_in_use(loader.pinned_slot(nic, Cfg.TAP)) for nic in loader.nic_pins(pins)),
    )


def _served(sock: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(1)
        try:
            s.connect(str(sock))
        except OSError:
            return False
        return True


def _runs(pair: str, bpffs: str, run_dir: str, role: str) -> bool:
    return is_running(run_dir, bpffs, pair, role) or _served(Path(run_dir) / f"{pair}.{role}.sock")


def in_use(pair: str, bpffs: str, run_dir: str) -> str:
    """Return why a pair's files are still needed, as a sentence; "" if they are not."""
    for role in ROLES:
        if _runs(pair, bpffs, run_dir, role):
            return f"the {role}'s controller of {pair} still runs: stop those of both hosts first"
    for role in ROLES:
        if Path(loader.pin_dir(bpffs, pair, role)).exists():
            return f"the data path of {pair} is still in place: run `colo-xdp cleanup` first"
    return ""


def cleanup(pair: str, bpffs: str, run_dir: str, *, force: bool = False) -> list[str]:
    """Detach programs, remove pins and the control socket; return a line per removed item.

    A tap that a controller added to a bridge is taken out, unless its guest is entitled to
    transmit. Idempotent. Raises StillRunning while a controller of the pair runs,
    GuestWouldTransmit unless `force`.
    """
    gone: list[str] = []
    for role in ROLES:
        if _runs(pair, bpffs, run_dir, role):
            raise StillRunning(f"the {role}'s controller of {pair} is still running: stop it first")
    found = {role: _pinned(loader.pin_dir(bpffs, pair, role), role) for role in ROLES}
    why = {role: refusal(p, boot_ns()) for role, p in found.items() if p is not None}
    for text in why.values():
        if text and not force:
            raise GuestWouldTransmit(f"{pair}: {text}")
    for role in ROLES:
        p = found[role]
        if p is not None and (why[role] or not p.in_use):
            gone += bridge.take_out_ports(manifest_path(run_dir, pair, role))
        gone += attach.detach_all(manifest_path(run_dir, pair, role))
        gone += loader.remove_pins(loader.pin_dir(bpffs, pair, role))
        sock = Path(run_dir) / f"{pair}.{role}.sock"
        if sock.is_socket():
            sock.unlink()
            gone.append(str(sock))
    base = Path(bpffs) / "colo-xdp"
    if base.is_dir() and not any(base.iterdir()):
        base.rmdir()
    return gone
