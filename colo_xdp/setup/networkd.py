# SPDX-License-Identifier: GPL-2.0-or-later
"""systemd-networkd's files: taps, peer links, and the route of the migration channel. Pure.

The name of each file has the name of the pair, so that no two pairs share one. Points separate the
parts of a name, because neither pairs nor NICs have any in theirs.
"""

from __future__ import annotations

from collections.abc import Iterator

from .answers import Answers, NicAnswers

DIRECTORY = "/etc/systemd/network"
MTU = 1600  # the peer link's: a frame of 1500 bytes, its tags, and some room


def stem(pair: str, device: str) -> str:
    """Return the name of the files of a device, without their suffix."""
    return f"{DIRECTORY}/30-colo-xdp.{pair}.{device}"


def _tap(a: Answers, nic: NicAnswers, role: str) -> Iterator[tuple[str, str, str]]:
    tap = nic.tap.of(role)
    about = f"# The tap of the pair {a.pair}: persistent, so that it and its programs survive QEMU."
    lines = [about, "[NetDev]", f"Name={tap}", "Kind=tap", "", "[Tap]", "VNetHeader=yes"]
    if nic.queues > 1:
        lines.append("MultiQueue=yes")
    if a.qemu_user:
        lines.append(f"User={a.qemu_user}")
    yield f"{stem(a.pair, tap)}.netdev", "\n".join(lines) + "\n", tap
    lines = [
        f"# The tap of the pair {a.pair} is up and in no bridge: the controller puts it into one.",
        "[Match]", f"Name={tap}", "", "[Link]", "RequiredForOnline=no", "",
        "[Network]", "LinkLocalAddressing=no", "ConfigureWithoutCarrier=yes",
    ]  # fmt: skip
    yield f"{stem(a.pair, tap)}.network", "\n".join(lines) + "\n", tap


def _link(a: Answers, nic: NicAnswers, role: str) -> tuple[str, str, str]:
    device = nic.peer_link.of(role)
    lines = [
        f"# The peer link of the pair {a.pair}: the host sends nothing of its own on it.",
        "[Match]", f"Name={device}", "", "[Link]", "RequiredForOnline=no", f"MTUBytes={MTU}", "",
        "[Network]", "LinkLocalAddressing=no",
    ]  # fmt: skip
    return f"{stem(a.pair, device)}.network", "\n".join(lines) + "\n", device


def _route(a: Answers, role: str) -> tuple[str, str, str]:
    """Return the route to the other host's QEMU.

    It is a drop-in for the file that configures the device, so that this file stays as it is; and
    to that one address, so that it does not meet the route of the network.
    """
    local, remote = a.migration.of(role), a.migration.other(role)
    lines = [
        f"# Checkpoints of the pair {a.pair}: with delayed acknowledgements each costs 40 ms.",
        "[Route]", f"Destination={remote}/{128 if ':' in remote else 32}",
        f"PreferredSource={local}", *([] if ":" in remote else ["Scope=link"]), "QuickAck=yes",
    ]  # fmt: skip
    where = f"{DIRECTORY}/{a.migration_network.of(role)}.d/50-colo-xdp.{a.pair}.conf"
    return where, "\n".join(lines) + "\n", ""


def files(a: Answers, role: str) -> list[tuple[str, str, str]]:
    """Return (path, text, device that it configures) of each file."""
    out: list[tuple[str, str, str]] = []
    for nic in a.nics:
        out += _tap(a, nic, role)
        if not nic.vxlan:
            out.append(_link(a, nic, role))
    if a.migration_network.of(role):
        out.append(_route(a, role))
    return out
