# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that exists already, as far as a pair needs to know it. Pure.

setup/qemu_arguments.py and setup/libvirt_domain.py fill it in; setup/reader.py takes from it what
nobody has to be asked then. `left` says what could not be carried over, a sentence each.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestNic:
    """A network card; tap "": none that has a name of its own; bridge "": not known."""

    mac: str = ""
    tap: str = ""
    bridge: str = ""
    queues: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class GuestDisk:
    """A writable disk, by QEMU's name for it."""

    name: str
    file: str
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """What is known of the guest.

    `command`: the whole command line that makes the same hardware again, without what init adds;
    empty: the other fields make one. `qmp`: monitor sockets that the running QEMU has.
    """

    origin: str
    nics: tuple[GuestNic, ...] = ()
    disks: tuple[GuestDisk, ...] = ()
    memory: int = 0
    cpus: int = 1
    machine: str = ""
    cpu: str = ""
    qmp: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
