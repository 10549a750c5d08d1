# SPDX-License-Identifier: GPL-2.0-or-later
"""The answers that the files of a pair are made of: valid as a whole, with nothing left open. Pure.

setup/reader.py makes them of what an operator has given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

from .guest import Guest
from .ports import Ports

T = TypeVar("T")
ROLES = ("primary", "secondary")


@dataclass(frozen=True, slots=True)
class Both(Generic[T]):
    """A value of each host, by its role."""

    primary: T
    secondary: T

    def of(self, role: str) -> T:
        return self.primary if role == "primary" else self.secondary

    def other(self, role: str) -> T:
        return self.secondary if role == "primary" else self.primary


@dataclass(frozen=True, slots=True, kw_only=True)
class NicAnswers:
    """One network card. `vxlan`: addresses of a VXLAN that the controllers make as peer link."""

    name: str
    tap: Both[str]
    peer_link: Both[str]
    bridge: Both[str]
    mac: str
    queues: int = 1
    vxlan: Both[str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskAnswers:
    """One writable disk."""

    name: str
    file: Both[str]
    format: str
    external: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """Everything that the files of a pair are made of; valid as a whole."""

    pair: str
    hosts: Both[str]
    addresses: Both[str]
    migration: Both[str]
    migration_network: Both[str]
    heartbeats: tuple[Both[str], ...]
    nics: tuple[NicAnswers, ...]
    disks: tuple[DiskAnswers, ...]
    overlays: str
    ports: Ports
    memory: int
    cpus: int
    machine: str
    cpu: str
    accel: str
    qemu: str
    qemu_user: str
    qemu_args: tuple[str, ...]
    arbiter: str
    fence: Both[tuple[str, ...]]
    etcd: tuple[str, ...]
    etcd_files: tuple[str, str, str]  # ca, certificate, key
    guest: Guest | None = None

    @property
    def replicated(self) -> tuple[DiskAnswers, ...]:
        return tuple(d for d in self.disks if not d.external)
