# SPDX-License-Identifier: GPL-2.0-or-later
"""All files of one host of a pair, and what its operator does with them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..config.file import ConfigError, parse
from ..config.schema import Config
from . import networkd, qemu_unit
from .answers import ROLES, Answers
from .config_text import config_text, directory, incoming_unit
from .flags import AnswersError

#: instead of certificates in a dry run
PLACEHOLDER = "(made by `colo-xdp init`)\n"


@dataclass(frozen=True, slots=True)
class File:
    """One file. `device`: what it configures, if systemd-networkd reads it."""

    path: str
    text: str
    mode: int = 0o644
    device: str = ""

    @property
    def is_secret(self) -> bool:
        return not self.mode & 0o077


@dataclass(frozen=True, slots=True, kw_only=True)
class HostFiles:
    """What one host gets.

    `directories`: made if they are not there, for `owner`. `networks`: files of systemd-networkd
    that have to be there already. `programs`: the same, of whatever the configuration starts.
    """

    pair: str
    role: str
    host: str
    files: tuple[File, ...]
    directories: tuple[str, ...] = ()
    owner: str = ""
    networks: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def certificate_names(role: str) -> tuple[str, str, str]:
    return "ca.crt", f"{role}.crt", f"{role}.key"


def config_path(pair: str) -> str:
    return f"/etc/colo-xdp/{pair}.toml"


def config_of(h: HostFiles) -> Config:
    """Read the configuration among the files; bundle.unpack() has seen to it that it is valid."""
    path = config_path(h.pair)
    return parse(next(f.text for f in h.files if f.path == path), path)


def configs(a: Answers) -> dict[str, Config]:
    """Read the files of both hosts as their controllers will.

    Raises AnswersError with what the reader objects to.
    """
    out = {}
    for role in ROLES:
        try:
            out[role] = parse(config_text(a, role), f"{a.pair}.toml of the {role}")
        except ConfigError as e:
            raise AnswersError(e.errors) from e
    return out


def host_files(a: Answers, role: str, certificates: Mapping[str, str]) -> HostFiles:
    """Return everything of one host; `certificates` by their file's name.

    Raises AnswersError.
    """
    configs(a)
    where = directory(a.pair)
    out = [File(config_path(a.pair), config_text(a, role))]
    for name in certificate_names(role):
        mode = 0o600 if name.endswith(".key") else 0o644
        out.append(File(f"{where}/{name}", certificates.get(name, PLACEHOLDER), mode))
    out += [File(path, text, mode) for path, text, mode in qemu_unit.files(a, role)]
    out += [File(path, text, 0o644, dev) for path, text, dev in networkd.files(a, role)]
    fence = a.fence.of(role)
    network = a.migration_network.of(role)
    return HostFiles(
        pair=a.pair, role=role, host=a.hosts.of(role), files=tuple(out),
        directories=(a.overlays,) if a.replicated else (),
        owner=a.qemu_user, networks=(network,) if network else (),
        programs=fence[:1], notes=notes(a, role),
    )  # fmt: skip


def notes(a: Answers, role: str) -> tuple[str, ...]:
    """Return what is left to a person, a sentence each."""
    out = []
    if a.arbiter == "manual":
        out.append(
            "nobody fails over by itself: with a fence command or a lease the survivor goes on "
            "without you (--arbiter)"
        )
    if not a.migration_network.of(role):
        out.append(
            "the route of the migration channel is as it was: `colo-xdp doctor` tells whether "
            "it needs `quickack 1` (--migration-network)"
        )
    for nic in a.nics:
        if not nic.bridge.of(role):
            out.append(f"{nic.name} has no bridge: this host has to route the guest (--bridge)")
    for disk in a.replicated:
        if role == "secondary":
            out.append(
                f"disk {disk.name}: {disk.file.of(role)} has to exist here, with the same size as "
                "on the primary host; what is in it is overwritten"
            )
    out.append(
        f"let the other host reach {a.ports.control}/tcp, {a.ports.migration}/tcp"
        + (f", {a.ports.nbd}/tcp" if a.replicated else "")
        + "".join(f", {a.ports.heartbeat(i)}/udp" for i in range(len(a.heartbeats)))
        + "".join(", 4789/udp" for nic in a.nics[:1] if nic.vxlan)
        + " here, and nobody else"
    )
    return (*out, *(a.guest.left if a.guest else ()))


def commands(pair: str, role: str) -> tuple[str, ...]:
    """Return what to run after the files are in place, in this order."""
    guest = qemu_unit.unit(pair) if role == "primary" else incoming_unit(pair)
    return (
        "systemctl daemon-reload && systemctl enable --now systemd-networkd && networkctl reload",
        f"colo-xdp doctor --before-start {config_path(pair)}",
        f"systemctl enable --now colo-xdp@{pair} {guest.removesuffix('.service')}",
    )
