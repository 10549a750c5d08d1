# SPDX-License-Identifier: GPL-2.0-or-later
"""What libvirt's description of a domain says of its guest. Pure.

libvirt starts and ends a QEMU by itself and holds its monitor, which a pair needs. So the guest
leaves libvirt: its cards, disks and memory become a command line of init's own, and everything else
is named.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from xml.etree import ElementTree

from .guest import Guest, GuestDisk, GuestNic

_UNITS = {
    "b": 1, "bytes": 1, "kb": 10**3, "k": 1 << 10, "kib": 1 << 10, "mb": 10**6, "m": 1 << 20,
    "mib": 1 << 20, "gb": 10**9, "g": 1 << 30, "gib": 1 << 30, "tb": 10**12, "t": 1 << 40,
    "tib": 1 << 40,
}  # fmt: skip
#: elements of <devices> that say nothing of the guest, or come with any QEMU
_NOTHING = frozenset(("emulator", "controller", "input", "memballoon", "audio", "rng", "console"))
#: names that libvirt gives a tap anew at each start
_TEMPORARY = re.compile(r"(vnet|macvtap|macvlan)\d+")


class DomainError(ValueError):
    """This is no domain that a pair can be made of; the text says why."""


def _mebibytes(element: ElementTree.Element | None) -> int:
    if element is None or not (element.text or "").strip().isdigit():
        return 0
    unit = _UNITS.get(element.get("unit", "KiB").lower(), 0)
    return int(str(element.text)) * unit >> 20


def _text(root: ElementTree.Element, path: str, attribute: str) -> str:
    found = root.find(path)
    return found.get(attribute, "") if found is not None else ""


def _nic(e: ElementTree.Element) -> GuestNic:
    tap = _text(e, "target", "dev")
    queues = _text(e, "driver", "queues")
    return GuestNic(
        mac=_text(e, "mac", "address").lower(),
        tap="" if _TEMPORARY.fullmatch(tap) else tap,
        bridge=_text(e, "source", "bridge"),
        queues=int(queues) if queues.isdigit() and int(queues) else 1,
    )


def _disk(e: ElementTree.Element) -> GuestDisk:
    source = e.find("source")
    file = ""
    if source is not None:
        file = source.get("file") or source.get("dev") or ""
    return GuestDisk(
        name=_text(e, "target", "dev"), file=file, format=_text(e, "driver", "type") or "raw"
    )


def _is_read_only(e: ElementTree.Element) -> bool:
    return e.get("device", "disk") in ("cdrom", "floppy") or e.find("readonly") is not None


def _left(root: ElementTree.Element) -> Iterator[str]:
    if root.find("os/loader") is not None or root.get("firmware"):
        yield "<loader>: its firmware is not taken over: add it with --qemu-arg"
    if root.find("cpu") is not None:
        yield "<cpu>: only its mode or model is taken over"
    if root.find("features") is not None:
        names = ", ".join(e.tag for e in root.findall("features/*"))
        yield f"<features>: QEMU's own are used in their place ({names})"
    for e in root.findall("devices/*"):
        if e.tag == "interface":
            kind, model = e.get("type", ""), _text(e, "model", "type")
            if kind not in ("bridge", "network", "ethernet"):
                yield f"<interface type='{kind}'>: it becomes a tap of its own"
            if model not in ("virtio", ""):
                yield f"<interface> model {model}: it becomes virtio"
        elif e.tag == "disk":
            if _is_read_only(e):
                yield f"<disk> {_text(e, 'target', 'dev')}: read-only, and left out"
            elif _text(e, "target", "bus") not in ("virtio", ""):
                yield f"<disk> {_text(e, 'target', 'dev')}: its bus becomes virtio"
        elif e.tag not in _NOTHING:
            yield f"<{e.tag}> is left out"
    if any(e.tag.endswith("}commandline") for e in root):
        yield "<qemu:commandline> is left out: add what the guest needs with --qemu-arg"


def guest(name: str, text: str) -> Guest:
    """Return the guest that `virsh dumpxml` describes.

    Raises DomainError.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DomainError(
            f"domain {name}: its description declares entities, which libvirt's never"
        )
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError as e:
        raise DomainError(f"domain {name}: its description is no XML: {e}") from e
    if root.tag != "domain":
        raise DomainError(f"domain {name}: its description is a <{root.tag}>")
    if root.get("type") not in ("kvm", "qemu"):
        raise DomainError(f"domain {name} is of type {root.get('type')}, and not QEMU's")
    memory = _mebibytes(root.find("memory"))
    if not memory:
        raise DomainError(f"domain {name}: its <memory> is not readable")
    cpus = (root.findtext("vcpu") or "1").strip()
    machine = _text(root, "os/type", "machine") or "pc"
    cpu = root.find("cpu")
    model = "" if cpu is None else (cpu.findtext("model") or "").strip()
    if cpu is not None and cpu.get("mode") in ("host-passthrough", "host-model", "maximum"):
        model = "max" if cpu.get("mode") == "maximum" else "host"
    disks = [_disk(e) for e in root.findall("devices/disk") if not _is_read_only(e)]
    for disk in disks:
        if not disk.file:
            raise DomainError(f"domain {name}: disk {disk.name} is in no file or block device")
    left = [f"domain {name}: {said}" for said in _left(root)]
    left.append(
        f"domain {name} leaves libvirt, which would hold its monitor: shut it down and "
        f"`virsh autostart --disable {name}` before its unit starts"
    )
    if "q35" in machine:
        left.append(f"domain {name}: machine {machine}: before QEMU 11 it has to be pc")
    return Guest(
        origin=f"domain {name}", memory=memory, cpus=int(cpus) if cpus.isdigit() else 1,
        machine=machine, cpu=model, disks=tuple(disks), left=tuple(left),
        nics=tuple(_nic(e) for e in root.findall("devices/interface")),
    )  # fmt: skip
