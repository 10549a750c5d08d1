# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's command line and the two units that run it: as the guest, and waiting for it. Pure.

Both units run one script, and the second adds -incoming. Each pair has units of its own, as
instances without a template: another pair, or a package with a template, does not touch them.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import PurePosixPath

from .answers import Answers
from .config_text import directory, incoming_unit, migration_uri, monitors

UNITS = "/etc/systemd/system"
RUN = "/run/colo-vm"


#: of root, without a user of its own: images of others, locked memory, a tap, ports, -runas
CAPABILITIES = (
    "CAP_DAC_OVERRIDE CAP_IPC_LOCK CAP_NET_ADMIN CAP_NET_BIND_SERVICE CAP_SETGID CAP_SETUID "
    "CAP_SYS_NICE"
)
#: deploy/examples/vm@.service has the same
SANDBOX = """\
NoNewPrivileges=yes
ProtectSystem=full
ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native
# Not set: ProtectHome, PrivateTmp (images and sockets may be anywhere), PrivateDevices and
# ProtectClock (KVM, vhost, disks that are devices), MemoryDenyWriteExecute (TCG), SystemCallFilter
# (QEMU has one of its own: -sandbox on)."""


def unit(pair: str) -> str:
    return f"colo-qemu@{pair}.service"


def _escape(value: str) -> str:
    """Write a value of an option of QEMU: a comma would end it."""
    return value.replace(",", ",,")


def _monitors(a: Answers) -> list[str]:
    if a.guest is not None and a.guest.command and len(a.guest.qmp) >= 2:
        return []
    out = []
    for path in monitors(a):
        out += ["-qmp", f"unix:{_escape(path)},server=on,wait=off"]
    return out


def _cards(a: Answers, role: str) -> list[str]:
    out = []
    for i, nic in enumerate(a.nics):
        tap = f"tap,id=n{i},ifname={nic.tap.of(role)},script=no,downscript=no,vnet_hdr=on"
        card = f"virtio-net-pci,netdev=n{i},mac={nic.mac},guest_announce=off"
        if nic.queues > 1:
            tap += f",queues={nic.queues}"
            card += f",mq=on,vectors={2 * nic.queues + 2}"
        out += ["-netdev", tap, "-device", card]
    return out


def _disks(a: Answers, role: str) -> list[str]:
    out = []
    for disk in a.disks:
        file = _escape(disk.file.of(role))
        out += [
            "-drive", f"if=none,id={disk.name},file={file},format={disk.format}",
            "-device", f"virtio-blk-pci,drive={disk.name}",
        ]  # fmt: skip
    return out


def command(a: Answers, role: str) -> list[str]:
    """Return the command line of the guest on the host with that role, without -incoming."""
    if a.guest is not None and a.guest.command:
        return [*a.guest.command, *_monitors(a), *a.qemu_args]
    return [
        a.qemu, "-name", a.pair, "-machine", f"{a.machine},accel={a.accel}", "-cpu", a.cpu,
        "-m", str(a.memory), "-smp", str(a.cpus),
        "-nodefaults", "-no-user-config", "-display", "none",
        *_monitors(a), *_cards(a, role), *_disks(a, role), *a.qemu_args,
    ]  # fmt: skip


def script(a: Answers, role: str) -> str:
    """Return the script that becomes QEMU."""
    lines: list[list[str]] = []
    for word in command(a, role):
        if not lines or word.startswith("-"):
            lines.append([])
        lines[-1].append(word)
    text = " \\\n\t".join(shlex.join(words) for words in lines)
    about = [
        "#!/bin/sh",
        f"# The guest of the pair {a.pair}. The other host has the same, but for names of its own;",
        f"# {unit(a.pair)} and {incoming_unit(a.pair)} run it, the latter with -incoming.",
    ]
    return "\n".join(about) + f'\nexec {text} \\\n\t"$@"\n'


def _directories(paths: Iterable[str]) -> list[str]:
    """Return the parents of sockets, without those that the unit's RuntimeDirectory makes."""
    found = {str(PurePosixPath(p).parent) for p in paths}
    return sorted(d for d in found if not d.startswith(f"{RUN}/") and d not in ("/run", "/tmp"))


def _quote(path: str) -> str:
    """Write a word of ExecStart=, where % and $ have a meaning."""
    text = path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{text}"'


def _unit(a: Answers, role: str, *, incoming: bool) -> str:
    controller, other = f"colo-xdp@{a.pair}.service", incoming_unit(a.pair)
    about, argument = "", ""
    if incoming:
        other, about = unit(a.pair), ", waiting for the other host's"
        argument = f" -incoming {migration_uri(a, role)}"
    lines = [
        f"# Made by `colo-xdp init` for the pair {a.pair} on its {role} host.",
        "[Unit]",
        f"Description=QEMU guest {a.pair}{about}",
        "# The controller starts first, so that an outdated guest cannot transmit beside the other",
        "# host's. QEMU does not end with it.",
        f"Wants={controller}",
        f"After={controller} systemd-networkd.service" + (f" {other}" if incoming else ""),
        f"Conflicts={other}",
        "",
        "[Service]",
        *(f"ExecStartPre=+/usr/bin/install -d -m 0700 {_quote(d)}"
          for d in _directories(monitors(a))),
        f"ExecStart={directory(a.pair)}/qemu{argument}",
        *([f"User={a.qemu_user}"] if a.qemu_user else []),
        *(["SupplementaryGroups=kvm"] if a.qemu_user and a.accel == "kvm" else []),
        f"RuntimeDirectory=colo-vm/{a.pair}",
        "RuntimeDirectoryMode=0700",
        "# The other unit of the pair has it, too.",
        "RuntimeDirectoryPreserve=yes",
        "LimitMEMLOCK=infinity",
        "# SIGTERM ends QEMU at once, so shut the guest down from inside first.",
        "TimeoutStopSec=10s",
        "# What a guest finds that breaks out of QEMU.",
        "CapabilityBoundingSet=" + ("" if a.qemu_user else CAPABILITIES),
        SANDBOX,
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def files(a: Answers, role: str) -> list[tuple[str, str, int]]:
    """Return (path, text, mode) of each file."""
    return [
        (f"{directory(a.pair)}/qemu", script(a, role), 0o755),
        (f"{UNITS}/{unit(a.pair)}", _unit(a, role, incoming=False), 0o644),
        (f"{UNITS}/{incoming_unit(a.pair)}", _unit(a, role, incoming=True), 0o644),
    ]
