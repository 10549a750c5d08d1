# SPDX-License-Identifier: GPL-2.0-or-later
"""Judge what a QEMU says of itself and of its guest: version, cards, disks, offloads, queues."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ..config.file import Config
from ..qemu import disks, nic
from ..qemu.overlays import ReplicatedDisk, directory_trouble, overlay_paths, rooms
from . import sockets
from .findings import FAIL, OK, WARN, Check

if TYPE_CHECKING:
    from ..qemu.nic import Multiqueue
    from ..qemu.survey import Survey


def judge(config: Config, s: Survey, said_by: str) -> Iterator[Check]:
    """Judge a survey; `said_by` ends the sentence about QEMU: who has asked it."""
    from ..qemu.qmp import refusal

    info = s.info
    version = ".".join(map(str, info.version))
    if why := refusal(info):
        yield Check("QEMU", FAIL, why, "install another QEMU, on both hosts")
        return
    yield Check("QEMU", OK, f"{version}, {'KVM' if info.kvm else 'TCG'}, {info.status}{said_by}")
    if info.trouble:
        yield Check("migration", FAIL, info.trouble, "docs/operator/configuration.md")
    yield from offloads(info.offers)
    if not info.kvm and info.version < (8, 0, 0) and not said_by:
        yield Check("QEMU", WARN, "COLO under TCG hangs with this version at the first checkpoint",
                    "use KVM, or for a test the shim in colo_xdp/lab/bqlshim.c")  # fmt: skip
    taps = {net.tap: net.guest_mac for net in config.networks}
    if why := nic.refusal(s.cards, taps):
        yield Check("NICs", FAIL, why, "docs/operator/networks.md, Several NICs")
    else:
        yield Check("NICs", OK, "each network card of the guest has a [network]")
    yield announce(s.announcing)
    for tap, queue in info.queues.items():
        yield from queues(queue, tap)
    yield from vhost(config, asked=bool(said_by))
    yield from replicated(config, s.blocks)


def announce(cards: tuple[str, ...]) -> Check:
    """Judge whether the guest would announce itself after a checkpoint, beside the controller."""
    if cards:
        return Check(
            "guest_announce", WARN, f"on for {', '.join(cards)}: after each checkpoint the guest "
            "may announce its addresses itself, which costs another checkpoint",
            "-device virtio-net-pci,...,guest_announce=off, on both hosts: the controller "
            "announces the guest",
        )  # fmt: skip
    return Check("guest_announce", OK, "off: the controller announces the guest")


def offloads(offers: frozenset[str]) -> Iterator[Check]:
    """Check what becomes of offloads that the guest may use (`offers`, of qmp.HOST_OFFLOADS)."""
    from ..datapath import btf

    why = btf.why_not()
    if not why:
        try:
            btf.kernel_flags()
        except (btf.BtfError, OSError) as e:
            why = str(e)
    # A tunnel's inner segment size is carried nowhere; UDP's is, where BTF is available.
    lost = sorted(n for n in offers if n.startswith("host_tunnel") or why)
    if lost:
        yield Check("offloads", WARN, f"{', '.join(lost)}: frames that use it are dropped"
                    + (f" ({why})" if why else ""),
                    f"-device virtio-net-pci,...,{','.join(f'{n}=off' for n in lost)}")  # fmt: skip
    elif why:
        yield Check("offloads", WARN, f"{why}: UDP with a gso_size is dropped, and so are partial "
                    "checksums that are not TCP's or UDP's", "a kernel with BTF")  # fmt: skip
    else:
        yield Check("offloads", OK, "read from the kernel (BTF)")


def queues(card: Multiqueue, tap: str) -> Iterator[Check]:
    """Check the queues between the guest and its tap."""
    from ..datapath import devices

    try:
        opened = devices.link_info(tap).queues
    except devices.NoSuchDevice:
        opened = 0
    found = card.obstacles()
    if opened > card.queues:
        yield Check(
            "queues", FAIL, f"{tap} has {opened} open, and QEMU {card.queues} of them: what the "
            "network sends to the guest may end up in another process",
            "end the other process that has opened the tap",
        )  # fmt: skip
    for text, remedy in found:
        yield Check("queues", WARN, text, remedy)
    if not found and opened <= card.queues:
        yield Check("queues", OK, f"{card.queues} between QEMU and {tap}")


def vhost(config: Config, *, asked: bool = False) -> Iterator[Check]:
    """Check whether the kernel (vhost-net) moves the guest's frames in QEMU's place.

    `asked`: a controller has the monitor, so nobody else may connect to it.
    """
    from . import vhost as vhost_net

    path = config.qemu.qmp
    try:
        pid = sockets.listener(path)
        if not pid and not asked:
            pid = vhost_net.listener(path)
        opened = vhost_net.opened(pid) if pid else -1
    except OSError as e:
        yield Check("vhost", WARN, f"not known: {e.strerror}", "as root, on QEMU's host")
        return
    if opened < 0:
        yield Check("vhost", WARN, f"not known: no process listens at {path} here",
                    "run doctor where QEMU runs")  # fmt: skip
        return
    if not opened:
        yield Check("vhost", OK, "off: QEMU itself moves the guest's frames")
        return
    if vhost_net.zero_copy():
        yield Check(
            "vhost", FAIL, "vhost_net sends from the guest's own memory: the guest can change a "
            "frame after it has been compared", "experimental_zcopytx=0 for the module vhost_net",
        )  # fmt: skip
    yield Check("vhost", WARN, f"on ({opened} queues): no release has been tried with it",
                "`colo-xdp vhost-drill` on this kind of host, or vhost=off")  # fmt: skip


def replicated(config: Config, blocks: Any) -> Iterator[Check]:
    names = [d.name for d in config.disks]
    found = disks.uncovered(blocks, names)
    for text in found:
        yield Check(
            "disk", FAIL, f"{text}, and nobody keeps its two copies equal",
            "remove it, or declare it with a [[disk]] (docs/operator/disks.md)",
        )  # fmt: skip
    for name in disks.missing(blocks, names):
        yield Check("disk", WARN, f"[[disk]] {name}: QEMU has no disk of that name",
                    "its drive id, node name or device id")  # fmt: skip
    if not found:
        yield Check("disks", OK, "every writable disk has a [[disk]]")
    yield from _overlays(config)


def _overlays(config: Config) -> Iterator[Check]:
    """Check what replicated disks need on this host."""
    if config.replicated_disks and not shutil.which("qemu-img"):
        yield Check("disks", FAIL, "qemu-img is missing", "apt install qemu-utils")
    for d in config.replicated_disks:
        if why := directory_trouble(d.name, d.overlays):
            yield Check("disk", FAIL, why, "docs/operator/disks.md")
            return
    found = [
        ReplicatedDisk(d.name, d.overlays, d.overlay_limit << 20) for d in config.replicated_disks
    ]
    for room in rooms(found, lambda d: overlay_paths(config.pair, d)):
        names = ", ".join(room.disks)
        level = FAIL if room.trouble else OK
        remedy = "more room there, or another directory (overlays)" if room.trouble else ""
        text = room.trouble or f"{names}: room for overlays in {room.where}"
        yield Check("disk", level, text, remedy)
