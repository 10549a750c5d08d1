# SPDX-License-Identifier: GPL-2.0-or-later
"""What a running QEMU's command line says of its guest. Pure.

The command line is kept as a whole and in its order, which decides where the guest's devices are.
Only what has to do with this one start of it goes, and what cannot work in a pair; both are named.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .guest import Guest, GuestDisk, GuestNic

Option = tuple[str, str | None]

#: options of QEMU that have no argument
_ALONE = frozenset((
    "S", "daemonize", "nodefaults", "nographic", "no-user-config", "enable-kvm", "no-reboot",
    "no-shutdown", "snapshot", "usb", "no-acpi", "no-hpet", "only-migratable", "no-fd-bootchk",
    "mem-prealloc", "full-screen", "preconfig", "singlestep", "win2k-hack", "help", "version",
    "h", "no-quit", "alt-grab", "ctrl-grab", "portrait",
))  # fmt: skip
#: those of one start: no pair needs them again
_ONCE = {
    "S": "the guest starts at once", "daemonize": "the unit's QEMU stays in the foreground",
    "pidfile": "systemd knows the process", "incoming": "the unit adds its own",
    "loadvm": "the guest boots", "preconfig": "the guest starts at once",
}  # fmt: skip
_FILTERS = re.compile(r"(filter-[a-z]+|colo-compare)")
_DRIVE_SHORT = {"hda": 0, "hdb": 1, "hdc": 2, "hdd": 3}


class ArgumentsError(ValueError):
    """This is no command line that a pair can be made of; the text says why."""


def options(argv: Sequence[str]) -> Iterator[Option]:
    """Return the options in their order; the name "" is that of an image without an option."""
    words = iter(argv)
    for word in words:
        if not word.startswith("-") or word == "-":
            yield "", word
            continue
        name = word.lstrip("-")
        yield name, None if name in _ALONE else next(words, None)


def keys(text: str, first: str = "") -> dict[str, str]:
    """Read "a=b,c=d"; a comma within a value is doubled. `first`: the key of a bare first word."""
    if text.startswith("{"):
        try:
            said = json.loads(text)
        except ValueError:
            return {}
        return {k: v if isinstance(v, str) else json.dumps(v) for k, v in said.items()}
    out: dict[str, str] = {}
    for i, part in enumerate(text.replace(",,", "\0").split(",")):
        key, equals, value = part.partition("=")
        if not equals:
            key, value = (first, part) if i == 0 and first else (part, "on")
        if key:
            out[key] = value.replace("\0", ",")
    return out


def mebibytes(text: str) -> int:
    """Return the size of "-m": MiB, or with a suffix."""
    m = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([bkmgtBKMGT]?)", text)
    if not m:
        return 0
    return int(float(m[1]) * {"b": 2**-20, "k": 2**-10, "m": 1, "": 1, "g": 2**10, "t": 2**20}[
        m[2].lower()])  # fmt: skip


@dataclass(slots=True)
class _Found:
    """What one pass over the options has found."""

    nics: list[GuestNic]
    disks: list[GuestDisk]
    qmp: list[str]
    command: list[str]
    left: list[str]
    chardevs: dict[str, str]  # id -> path of a unix socket that QEMU serves
    taps: dict[str, tuple[str, int]]  # id of a -netdev -> tap, queues
    nodes: dict[str, dict[str, str]]  # -blockdev by node-name
    gone: set[str]  # ids of -chardev that cannot be made again
    memory: int = 128
    cpus: int = 1
    machine: str = "pc"
    cpu: str = ""


def guest(origin: str, argv: Sequence[str], pair: str) -> Guest:
    """Return the guest that this command line makes.

    `pair`: gives a name to a tap that has none, as its descriptor was passed. Raises
    ArgumentsError.
    """
    if not argv:
        raise ArgumentsError(f"{origin}: there is no command line")
    f = _Found([], [], [], [argv[0]], [], {}, {}, {}, set())
    for option in options(argv[1:]):
        _take(f, option, pair)
    return Guest(
        origin=origin, nics=tuple(f.nics), disks=tuple(f.disks), memory=f.memory, cpus=f.cpus,
        machine=f.machine, cpu=f.cpu, qmp=tuple(f.qmp), command=tuple(f.command),
        left=tuple(f"{origin}: {text}" for text in [*f.left, *_missing(f)]),
    )  # fmt: skip


def _missing(f: _Found) -> Iterator[str]:
    if len(f.qmp) < 2:
        yield (
            f"it has {len(f.qmp)} QMP socket{'s' if len(f.qmp) != 1 else ''} of its own, and a "
            "pair needs two: shut the guest down and start it by its unit"
        )
    if not f.machine.startswith(("pc", "none")) or f.machine == "pc-q35":
        yield f"-machine {f.machine}: before QEMU 11 it has to be pc"


def _take(f: _Found, option: Option, pair: str) -> None:
    name, value = option
    value_text = value or ""
    words = [f"-{name}", *([value] if value is not None else [])] if name else [value_text]
    if name in _ONCE:
        f.left.append(f"{' '.join(words)} is left out: {_ONCE[name]}")
        return
    if name == "snapshot":
        f.left.append("-snapshot is left out: what the guest writes would be lost")
        return
    if why := _of_this_process(f, name, value_text):
        f.left.append(why)
        return
    if name == "monitor" and value_text == "stdio":
        f.left.append("-monitor stdio is left out: a unit has no terminal")
        return
    if name == "netdev":
        words[1] = _netdev(f, value_text, pair)
    _read(f, name, value_text)
    f.command += words


def _of_this_process(f: _Found, name: str, value: str) -> str:
    """Return why an option cannot be used again, or an empty string."""
    if name == "object":
        said = keys(value, "qom-type")
        kind = said.get("qom-type", "")
        if _FILTERS.fullmatch(kind):
            return f"-object {kind} is left out: colo_xdp takes its place"
        if kind == "secret" and "/libvirt/qemu/domain-" in said.get("file", ""):
            return "libvirt runs it: the guest has to leave libvirt (--from-libvirt says more)"
    elif name == "chardev":
        said = keys(value, "backend")
        if said.get("fd"):
            f.gone.add(said.get("id", ""))
            return f"-chardev {said.get('id', '')} is left out: it is a descriptor of this process"
    elif name == "mon":
        said = keys(value, "chardev")
        if said.get("chardev") in f.gone:
            return f"-mon {said['chardev']} is left out with it"
    elif name == "add-fd":
        return f"-add-fd {value} is left out: it is a descriptor of this process"
    return ""


def _read(f: _Found, name: str, value: str) -> None:
    """Note what an option says of the guest."""
    if name == "m":
        f.memory = mebibytes(keys(value, "size").get("size", "")) or f.memory
    elif name == "smp":
        said = keys(value, "cpus").get("cpus", "")
        f.cpus = int(said) if said.isdigit() else f.cpus
    elif name in ("machine", "M"):
        f.machine = keys(value, "type").get("type", f.machine)
    elif name == "cpu":
        f.cpu = value.partition(",")[0]
    elif name in ("drive", "blockdev", "hda", "hdb", "hdc", "hdd", ""):
        _disk(f, name, value)
    elif name == "device":
        _device(f, value)
    elif name in ("nic", "net"):
        f.left.append(f"-{name} {value}: write it as -netdev and -device, a pair needs a tap")
    else:
        _monitor(f, name, value)


def _netdev(f: _Found, value: str, pair: str) -> str:
    """Note a backend; return it as it can be made again."""
    said = keys(value, "type")
    if said.get("type") != "tap":
        f.left.append(f"-netdev {value}: a pair needs a tap, so its card cannot be compared")
        return value
    tap = said.get("ifname", "")
    if not tap:
        tap = f"tap{len(f.taps) + 1 if f.taps else ''}-{pair}"
        kept = {k: v for k, v in said.items() if k in ("id", "queues", "vhost", "vnet_hdr")}
        fds = said.get("fds", "")
        if fds:
            kept["queues"] = str(len(fds.split(":")))
        f.left.append(f"-netdev {said.get('id', '')}: its tap has no name; it becomes {tap}")
        value = ",".join(["tap", *(f"{k}={v}" for k, v in kept.items())])
        value += f",ifname={tap},script=no,downscript=no"
        said = keys(value, "type")
    elif "script" not in said:
        f.left.append(f"-netdev {said.get('id', '')}: script=no,downscript=no is added, since a "
                      "script would put the tap into a bridge")  # fmt: skip
        value += ",script=no,downscript=no"
    if said.get("vhost") in ("on", "true"):
        f.left.append(f"-netdev {said.get('id', '')}: vhost=on has not been tried")
    queues = said.get("queues", "1")
    f.taps[said.get("id", "")] = (tap, int(queues) if queues.isdigit() else 1)
    return value


def _device(f: _Found, value: str) -> None:
    said = keys(value, "driver")
    driver = said.get("driver", "")
    if driver.startswith(("vfio-", "ivshmem", "usb-host", "vhost-user")):
        f.left.append(f"-device {driver}: it cannot be copied to another host; take it out")
    if said.get("drive") in f.nodes:
        _node(f, said["drive"])
    if said.get("netdev") not in f.taps:
        return
    tap, queues = f.taps[said["netdev"]]
    mac = said.get("mac", "").lower() or f"52:54:00:12:34:{0x56 + len(f.nics):02x}"
    f.nics.append(GuestNic(mac=mac, tap=tap, queues=queues))
    if not said.get("mac"):
        f.left.append(f"-device {driver} at {tap} has no mac=: taken for QEMU's own {mac}")
    if said.get("guest_announce") not in ("off", "false"):
        f.left.append(f"-device {driver} at {tap}: add guest_announce=off when it is started anew")


def _monitor(f: _Found, name: str, value: str) -> None:
    """Note sockets at which QEMU listens for QMP."""
    if name == "chardev":
        said = keys(value, "backend")
        if said.get("backend") == "socket" and said.get("path"):
            f.chardevs[said.get("id", "")] = said["path"]
    elif name == "qmp":
        m = re.match(r"unix:([^,]+)", value)
        if m and "server" in value:
            f.qmp.append(m[1])
    elif name == "mon":
        said = keys(value, "chardev")
        if said.get("mode") == "control" and said.get("chardev") in f.chardevs:
            f.qmp.append(f.chardevs[said["chardev"]])


def _flash(said: dict[str, str]) -> bool:
    return said.get("if") == "pflash" or said.get("read-only", said.get("readonly")) in (
        "on", "true",
    )  # fmt: skip


def _disk(f: _Found, name: str, value: str) -> None:
    """Note a writable disk under the name that QEMU gives it."""
    if name in (*_DRIVE_SHORT, ""):
        i = _DRIVE_SHORT.get(name, 0)
        f.disks.append(GuestDisk(name=f"ide{i // 2}-hd{i % 2}", file=value, format="raw"))
        return
    said = keys(value)
    if _flash(said) or said.get("media") == "cdrom":
        return
    if name == "drive":
        if said.get("file"):
            f.disks.append(GuestDisk(
                name=said.get("id") or said.get("node-name") or _drive_name(f, said),
                file=said["file"], format=said.get("format", "raw"),
            ))  # fmt: skip
        return
    if said.get("node-name"):
        f.nodes[said["node-name"]] = said


def _node(f: _Found, name: str) -> None:
    """Note the disk of a -blockdev that a device uses; its file is that of a node below it."""
    said = f.nodes[name]
    below, file = said, ""
    for _ in range(8):
        file = below.get("file.filename") or below.get("filename") or below.get("file", "")
        if file.startswith("{"):
            file = keys(file).get("filename", "")
        if file not in f.nodes:
            break
        below = f.nodes[file]
    f.disks.append(GuestDisk(name=name, file=file, format=said.get("driver", "raw")))


def _drive_name(f: _Found, said: dict[str, str]) -> str:
    """Return QEMU's name for a -drive without an id (drive_new() in its blockdev.c)."""
    kind = said.get("if", "ide")
    index = said.get("index", "")
    n = int(index) if index.isdigit() else sum(d.name.startswith(kind) for d in f.disks)
    return f"{kind}{n // 2}-hd{n % 2}" if kind in ("ide", "scsi") else f"{kind}{n}"


def with_disks(g: Guest, blocks: Any) -> Guest:
    """Add what QEMU's `query-block` knows better: disks that were plugged in since its start."""
    known = {d.name for d in g.disks}
    found, left = list(g.disks), list(g.left)
    for entry in blocks if isinstance(blocks, list) else []:
        inserted = entry.get("inserted") or {}
        qdev = str(entry.get("qdev") or "")
        names = [entry.get("device"), inserted.get("node-name"), entry.get("qdev")]
        if not inserted or inserted.get("ro") or "flash" in f"{entry.get('device')} {qdev}":
            continue
        if known.isdisjoint(n for n in names if n):
            name = next((str(n) for n in names if n), "")
            found.append(GuestDisk(name=name, file=str(inserted.get("file", "")),
                                   format=str(inserted.get("drv", "raw"))))  # fmt: skip
            left.append(
                f"{g.origin}: disk {name} ({inserted.get('file', '?')}) is not in its command "
                "line: add it to the script"
            )
    return replace(g, disks=tuple(found), left=tuple(left))
