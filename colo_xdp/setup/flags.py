# SPDX-License-Identifier: GPL-2.0-or-later
"""The flags of `colo-xdp init` as they were given, and what has to be asked for. Pure.

setup/reader.py makes answers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .guest import Guest


class AnswersError(ValueError):
    """The answers cannot be used; `errors` has one sentence per mistake."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def _asked(question: str) -> str:
    """Declare a flag that has to be given."""
    value: str = field(default="", metadata={"question": question})
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Flags:
    """The flags of `colo-xdp init`, as they were given; "" and (): not given."""

    pair: str = _asked("name of the pair, 1 to 10 of a-z, 0-9 and -")
    hosts: str = _asked("names of the hosts (`hostname`), the primary's/the secondary's")
    addresses: str = _asked("addresses of the hosts, such as 192.0.2.1/192.0.2.2")
    peer_link: str = _asked("device that leads to the other host, such as eth1")
    bridge: str = ""
    tap: str = ""
    mac: str = ""
    queues: str = ""
    vxlan: str = ""
    nic: tuple[str, ...] = ()
    migration: str = ""
    migration_network: str = ""
    heartbeat: tuple[str, ...] = ()
    memory: str = _asked("memory of the guest, in MiB or such as 4G")
    cpus: str = ""
    machine: str = ""
    cpu: str = ""
    accel: str = ""
    qemu: str = ""
    qemu_user: str = ""
    qemu_arg: tuple[str, ...] = ()
    disk: tuple[str, ...] = ()
    overlays: str = ""
    arbiter: str = ""
    fence_primary: str = ""
    fence_secondary: str = ""
    etcd: tuple[str, ...] = ()
    etcd_ca: str = ""
    etcd_cert: str = ""
    etcd_key: str = ""
    base_port: str = ""


def flag_name(name: str) -> str:
    """Return a field of Flags as it is written on the command line."""
    return "--" + name.replace("_", "-")


def missing(flags: Flags, guest: Guest | None = None) -> list[tuple[str, str]]:
    """Return the flags that have to be given and are not, with the question for each."""
    out = []
    for f in fields(Flags):
        question = f.metadata.get("question", "")
        if not question or getattr(flags, f.name):
            continue
        if f.name == "memory" and guest is not None:
            continue
        if f.name == "peer_link" and (flags.vxlan or flags.nic):
            continue
        out.append((f.name, question))
    return out


def ask(flags: Flags, question: Callable[[str, str], str], guest: Guest | None = None) -> Flags:
    """Complete the flags by asking; `question` gets a text and what an empty answer means.

    Besides what has to be known, it asks for what most pairs have.
    """
    wanted = [(name, text, "") for name, text in missing(flags, guest)]
    if not flags.nic and not flags.bridge and not (guest and any(n.bridge for n in guest.nics)):
        wanted.append(("bridge", "bridge of the clients' network", "br0"))
    if guest is None and not flags.disk:
        wanted.append(("disk", "image of the guest's disk, such as /var/lib/vm/web1.qcow2", ""))
    given: dict[str, Any] = {}
    for name, text, default in wanted:
        given[name] = question(f"{flag_name(name)}: {text}", default).strip()
    if "disk" in given:
        image = given["disk"]
        given["disk"] = (image if "=" in image else f"file={image}",) if image else ()
    return replace(flags, **given)
