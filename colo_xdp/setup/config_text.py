# SPDX-License-Identifier: GPL-2.0-or-later
"""The TOML file of one host, with the schema's own words as comments. Pure.

Only what has no default, or another value than it, is written.
"""

from __future__ import annotations

import textwrap
from dataclasses import MISSING
from typing import Any

from .. import validate
from ..config.file import toml_value
from ..config.network import DEFAULT_NIC, Network
from ..config.qemu import Disk
from ..config.schema import SECTIONS, Config
from .answers import Answers, NicAnswers

WIDTH = 96
Values = dict[str, Any]
#: also written if the value is the default: a reader looks for it
ALWAYS = ("arbiter", "listen")


def endpoint(ip: str, port: int) -> str:
    """Return "ip:port", or "[ipv6]:port"."""
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def directory(pair: str) -> str:
    """Return where the pair's certificates and its QEMU's command line are."""
    return f"/etc/colo-xdp/{pair}"


def incoming_unit(pair: str) -> str:
    return f"colo-qemu-incoming@{pair}.service"


def monitors(a: Answers) -> tuple[str, str]:
    """Return the QMP sockets: that of the controller, and the one that frees a QEMU that hangs."""
    if a.guest is not None and len(a.guest.qmp) >= 2:
        return a.guest.qmp[0], a.guest.qmp[1]
    return f"/run/colo-vm/{a.pair}/qmp", f"/run/colo-vm/{a.pair}/qmp-oob"


def migration_uri(a: Answers, role: str) -> str:
    """Return where the QEMU of the host with that role waits."""
    return "tcp:" + endpoint(a.migration.of(role), a.ports.migration)


def _network(a: Answers, i: int, nic: NicAnswers, role: str) -> Values:
    out: Values = {
        "name": nic.name, "tap": nic.tap.of(role), "peer_link": nic.peer_link.of(role),
        "bridge": nic.bridge.of(role), "guest_mac": nic.mac,
    }  # fmt: skip
    if nic.vxlan:
        out["vxlan_local"], out["vxlan_remote"] = nic.vxlan.of(role), nic.vxlan.other(role)
        out["vxlan_vni"] = a.ports.vni(i)
    return out


def _qemu(a: Answers, role: str) -> Values:
    qmp, oob = monitors(a)
    out: Values = {
        "qmp": qmp, "qmp_oob": oob, "migrate_uri": migration_uri(a, "secondary"),
        "incoming": ("systemctl", "restart", incoming_unit(a.pair)),
    }  # fmt: skip
    if role == "secondary":
        out["reverse_uri"] = migration_uri(a, "primary")
    return out


def _peer(a: Answers, role: str) -> Values:
    where = directory(a.pair)
    return {
        "local": endpoint(a.addresses.of(role), a.ports.control),
        "remote": endpoint(a.addresses.other(role), a.ports.control),
        "cert": f"{where}/{role}.crt", "key": f"{where}/{role}.key", "ca": f"{where}/ca.crt",
        "heartbeat_links": tuple(
            endpoint(link.of(role), port) + "->" + endpoint(link.other(role), port)
            for i, link in enumerate(a.heartbeats)
            for port in (a.ports.heartbeat(i),)
        ),
    }  # fmt: skip


def _failover(a: Answers, role: str) -> Values:
    ca, cert, key = a.etcd_files
    return {
        "arbiter": a.arbiter, "automatic": a.arbiter != "manual", "fence": a.fence.of(role),
        "etcd": a.etcd, "etcd_ca": ca, "etcd_cert": cert, "etcd_key": key,
    }  # fmt: skip


def sections(a: Answers, role: str) -> dict[str, list[Values]]:
    """Return the tables of the file in their order; several of one name are [[tables]]."""
    out = {
        "network": [_network(a, i, nic, role) for i, nic in enumerate(a.nics)],
        "qemu": [_qemu(a, role)],
        "peer": [_peer(a, role)],
        "failover": [_failover(a, role)],
        "metrics": [{"listen": endpoint("127.0.0.1", a.ports.metrics)}],
    }
    if a.replicated:
        ends = (endpoint(ip, a.ports.nbd) for ip in (a.migration.of(role), a.migration.other(role)))
        out["nbd"] = [dict(zip(("local", "remote"), ends, strict=True))]
    out["disk"] = [
        {"name": d.name, "external": True} if d.external
        else {"name": d.name, "overlays": a.overlays}
        for d in a.disks
    ]  # fmt: skip
    return out


def _comment(text: str) -> list[str]:
    text = text[0].upper() + text[1:] + "."
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ",
                         break_long_words=False, break_on_hyphens=False)  # fmt: skip


def _lines(cls: type[Any], values: Values) -> list[str]:
    out = []
    for key, field in validate.keys(cls).items():
        if key not in values:
            continue
        value = values[key]
        is_default = field.default is not MISSING and value == field.default
        if is_default and key not in ALWAYS:
            continue
        out += [*_comment(field.metadata["help"]), f"{key} = {toml_value(value)}"]
    return out


def config_text(a: Answers, role: str) -> str:
    """Return the text of /etc/colo-xdp/PAIR.toml on the host with that role."""
    lines = [
        f"# The pair {a.pair} on {a.hosts.of(role)}, its {role} host. Made by `colo-xdp init`.",
        "# `colo-xdp config show` prints all keys with their defaults.",
        "",
        *_lines(Config, {"pair": a.pair, "role": role}),
    ]  # fmt: skip
    classes = {**SECTIONS, "disk": Disk}
    for name, tables in sections(a, role).items():
        several = name == "disk" or len(tables) > 1
        for values in tables:
            lines += ["", f"[[{name}]]" if several else f"[{name}]"]
            if classes[name] is Network and several and values["name"] == DEFAULT_NIC:
                lines.append(f"name = {toml_value(DEFAULT_NIC)}")
            lines += _lines(classes[name], values)
    return "\n".join(lines) + "\n"
