# SPDX-License-Identifier: GPL-2.0-or-later
"""Read and write the configuration file: one TOML file per host and pair. Pure, no look-ups.

The reader and `as_toml` follow the declarations in config/schema.py. All mistakes of a file are
reported together. The command line loads the file once at the start.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, replace
from pathlib import Path
from typing import Any

from .. import validate
from ..compare.policy import MAX_RULES, Rule
from .network import Network
from .qemu import Disk
from .schema import SECTIONS, Config

MAX_DISKS = 64
MAX_NICS = 8

__all__ = ["Config", "ConfigError", "as_toml", "load", "parse", "toml_value"]


class ConfigError(ValueError):
    """The file cannot be used; `errors` has one sentence per mistake."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


# ---- reading


def _show(value: Any) -> str:
    """Format a value as TOML writes it, cut to 80 characters."""
    if isinstance(value, bool | int | float | str | list | tuple):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Reader:
    """One pass over a parsed file; collects valid values, and a sentence for each invalid one."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors: list[str] = []

    def error(self, section: str, key: str, value: Any, want: str) -> None:
        where = f"[{section}] {key}" if section else key
        self.errors.append(f"{self.path}: {where} = {_show(value)}: {want}")

    def table(self, section: str, cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """Return the valid values of one table; missing keys get their default."""
        known = validate.keys(cls)
        out: dict[str, Any] = {}
        top = [*SECTIONS, "rule", "disk"] if cls is Config else []
        for key, value in data.items():
            if key in top:
                continue
            if key not in known:
                where = f"[{section}] " if section else ""
                hint = _near(key, [*known, *top])
                if isinstance(value, dict) and not section:
                    self.errors.append(f"{self.path}: unknown section [{key}]{hint}")
                else:
                    self.errors.append(
                        f"{self.path}: {where}unknown key {key!r}{hint or _elsewhere(key)}"
                    )
                continue
            want = known[key].metadata["check"](value)
            if want is None:
                out[key] = tuple(value) if isinstance(value, list) else value
            else:
                self.error(section, key, value, want)
        for key, f in known.items():
            if key in data:
                continue
            if f.default is MISSING:
                where = f"[{section}] {key}" if section else key
                self.errors.append(f"{self.path}: {where} is missing: {f.metadata['help']}")
            else:
                out[key] = f.default
        return out


def _elsewhere(key: str) -> str:
    """Return a hint for a key that is in the wrong section."""
    homes = [s for s, cls in SECTIONS.items() if key in validate.keys(cls)]
    if not homes and key in validate.keys(Rule):
        return "; it belongs to a rule, under [[rule]]"
    if key in validate.keys(Config):
        return "; it belongs to the top of the file"
    return f"; it belongs to [{homes[0]}]" if homes else ""


def parse(text: str, path: str = "<config>") -> Config:
    """Parse a configuration from TOML text; `path` is used only in messages.

    Raises ConfigError with every mistake in the text.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError([f"{path}: not TOML: {e}"]) from e
    r = _Reader(path)
    top = r.table("", Config, data)
    sections: dict[str, dict[str, Any]] = {}
    for name, cls in SECTIONS.items():
        body = data.get(name, {})
        if name == "network" and isinstance(body, list) and body:
            body = body[0]  # the others: _nics()
        if not isinstance(body, dict):
            r.errors.append(f"{path}: {name} = {_show(body)}: expected a section [{name}]")
            continue
        sections[name] = r.table(name, cls, body)
    rules = _rules(r, data.get("rule", []))
    disks = _disks(r, data.get("disk", []))
    nics = _nics(r, sections.get("network", {}), data.get("network"))
    _cross_checks(r, top, sections)
    _nic_checks(r, nics, rules)
    _replication_checks(r, sections, disks)
    if r.errors:
        raise ConfigError(r.errors)
    made = {name: cls(**sections[name]) for name, cls in SECTIONS.items()}
    further = tuple(Network(**values) for values in nics[1:])
    return Config(**top, **made, rules=rules, disks=disks, further=further)


def _nics(r: _Reader, first: dict[str, Any], data: Any) -> list[dict[str, Any]]:
    """Return the valid values of each [[network]] table; of the first one they are read already."""
    found = [first]
    if not isinstance(data, list):
        return found
    if len(data) > MAX_NICS:
        r.errors.append(f"{r.path}: {len(data)} NICs: expected at most {MAX_NICS}")
    for i, body in enumerate(data[1:], 2):
        if isinstance(body, dict):
            found.append(r.table(f"network {i}", Network, body))
        else:
            r.errors.append(f"{r.path}: network = {_show(data)}: expected tables [[network]]")
    return found


def _nic_checks(r: _Reader, nics: list[dict[str, Any]], rules: tuple[Rule, ...]) -> None:
    """Check that each NIC has a name and devices of its own."""
    seen: dict[str, str] = {}
    taps = {net.get("tap"): i for i, net in enumerate(nics, 1)}
    for i, net in enumerate(nics, 1):
        section = "network" if len(nics) == 1 else f"network {i}"
        own = {key: net.get(key) for key in ("tap", "peer_link")}
        for key, value in own.items():
            if value and seen.setdefault(f"device {value}", section) != section:
                r.error(section, key, value, "expected a device of its own for each NIC")
        name = net.get("name")
        if name and seen.setdefault(f"name {name}", section) != section:
            r.error(section, "name", name, "expected a name of its own for each NIC")
        for key in ("bridge", "uplink"):
            if net.get(key) and taps.get(net[key], i) != i:
                r.error(section, key, net[key], "expected no tap of the guest")
        mac = net.get("guest_mac")
        if mac and seen.setdefault(f"MAC {mac.lower()}", section) != section:
            r.error(section, "guest_mac", mac, "expected an address of its own for each NIC")
        tunnel = tuple(net.get(k) for k in ("vxlan_port", "vxlan_vni"))
        if net.get("vxlan_remote") and seen.setdefault(f"vxlan {tunnel}", section) != section:
            r.error(section, "vxlan_vni", tunnel[1], "expected a VNI of its own for each NIC")
        _device_checks(r, section, net)
    names = [net.get("name") for net in nics]
    for i, rule in enumerate(rules, 1):
        if rule.nic and rule.nic not in names:
            r.error(f"rule {i}", "nic", rule.nic, "expected the name of a NIC: a [[network]]")


def _device_checks(r: _Reader, section: str, net: dict[str, Any]) -> None:
    for key in ("peer_link", "bridge", "uplink"):
        if net.get(key) and net[key] == net.get("tap"):
            r.error(section, key, net[key], "expected another device than tap")
    if net.get("vxlan_local") and not net.get("vxlan_remote"):
        r.error(section, "vxlan_local", net["vxlan_local"], "expected only with vxlan_remote")
    if net.get("bridge") and net["bridge"] == net.get("peer_link"):
        r.error(section, "bridge", net["bridge"], "expected another device than peer_link")


def _rules(r: _Reader, data: Any) -> tuple[Rule, ...]:
    """Read the [[rule]] tables in order; the first rule that matches a flow decides."""
    if not isinstance(data, list) or not all(isinstance(d, dict) for d in data):
        r.errors.append(f"{r.path}: rule = {_show(data)}: expected tables [[rule]]")
        return ()
    if len(data) > MAX_RULES:
        r.errors.append(f"{r.path}: {len(data)} rules: expected at most {MAX_RULES}")
    out: list[Rule] = []
    for i, body in enumerate(data, 1):
        before = len(r.errors)
        values = r.table(f"rule {i}", Rule, body)
        if len(r.errors) > before:
            continue
        if any(rule.name == values["name"] for rule in out):
            r.error(f"rule {i}", "name", values["name"], "expected a name of its own")
            continue
        rule = Rule(**values)
        why = rule.contradiction()
        if why:
            r.errors.append(f"{r.path}: [rule {i}] {rule.name}: {why}")
        out.append(rule)
    return tuple(out)


def _disks(r: _Reader, data: Any) -> tuple[Disk, ...]:
    """Read the [[disk]] tables."""
    if not isinstance(data, list) or not all(isinstance(d, dict) for d in data):
        r.errors.append(f"{r.path}: disk = {_show(data)}: expected tables [[disk]]")
        return ()
    if len(data) > MAX_DISKS:
        r.errors.append(f"{r.path}: {len(data)} disks: expected at most {MAX_DISKS}")
    out: list[Disk] = []
    for i, body in enumerate(data, 1):
        before = len(r.errors)
        values = r.table(f"disk {i}", Disk, body)
        if len(r.errors) > before:
            continue
        if any(d.name == values["name"] for d in out):
            r.error(f"disk {i}", "name", values["name"], "expected a name of its own")
            continue
        disk = Disk(**values)
        if disk.external and disk.overlays:
            r.error(f"disk {i}", "overlays", disk.overlays, "expected only without external = true")
        elif not disk.external and not disk.overlays:
            r.error(f"disk {i}", "overlays", "", "required, such as /var/lib/colo-xdp/overlays")
        out.append(disk)
    return tuple(out)


def _replication_checks(r: _Reader, s: dict[str, dict[str, Any]], disks: tuple[Disk, ...]) -> None:
    """Check what replicated disks need besides their own tables."""
    nbd = s.get("nbd", {})
    if all(d.external for d in disks):
        return
    for key in ("local", "remote"):
        if nbd.get(key) == "":
            r.error("nbd", key, "", "required with a [[disk]], such as 10.0.0.1:10809")
    if nbd.get("local") and nbd.get("local") == nbd.get("remote"):
        r.error("nbd", "remote", nbd["remote"], "expected another address than local")
    if s.get("qemu", {}).get("qmp_oob") == "":
        r.error(
            "qemu", "qmp_oob", "",
            "required with a [[disk]]: a write that waits for a dead host makes QEMU hang, and "
            "only this socket ends that",
        )  # fmt: skip


def load(path: str | Path) -> Config:
    """Load the configuration from a file.

    Raises ConfigError if the file cannot be read, or with every mistake in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ConfigError([f"{path}: cannot be read: {why}"]) from e
    return replace(parse(text, str(path)), path=str(path))


def _cross_checks(r: _Reader, top: dict[str, Any], s: dict[str, dict[str, Any]]) -> None:
    """Check rules over more than one key; a rule is skipped if one of its keys is invalid."""
    qemu, peer = s.get("qemu", {}), s.get("peer", {})
    if top.get("role") == "primary" and qemu.get("migrate_uri") == "":
        r.error("qemu", "migrate_uri", "", "required on the primary, such as tcp:10.0.0.2:4444")
    _migration_checks(r, top, qemu, s.get("migration", {}))
    failover = s.get("failover", {})
    _peer_checks(r, peer, lease=failover.get("arbiter") == "lease")
    _failover_checks(r, failover)
    metrics = s.get("metrics", {})
    where = validate.split(metrics.get("listen", ""))
    tls = [k for k in ("cert", "key", "client_ca") if metrics.get(k)]
    if 0 < len(tls) < 3:
        r.error("metrics", tls[0], metrics[tls[0]], "expected all of cert, key and client_ca")
    elif where and not where[0].is_loopback and not tls and metrics.get("allow_remote") is False:
        r.error(
            "metrics", "listen", metrics["listen"],
            "expected a loopback address, or cert, key and client_ca, or allow_remote = true",
        )  # fmt: skip


def _migration_checks(
    r: _Reader, top: dict[str, Any], qemu: dict[str, Any], m: dict[str, Any]
) -> None:
    """Check what further channels and TLS need besides their own keys."""
    if m.get("multifd"):
        for key in ("migrate_uri", "reverse_uri"):
            if qemu.get(key) and not qemu[key].startswith(("tcp:", "unix:", "vsock:")):
                r.error("qemu", key, qemu[key], "expected tcp:, unix: or vsock: with multifd")
        if top.get("role") == "secondary" and qemu.get("migrate_uri") == "":
            r.error(
                "qemu", "migrate_uri", "",
                "required with multifd: this host's QEMU is told where to wait",
            )  # fmt: skip
    creds, incoming = m.get("tls_creds"), m.get("tls_creds_incoming")
    if creds and incoming == "":
        r.error(
            "migration", "tls_creds_incoming", "",
            "required with tls_creds: after a takeover the guests have changed places, and QEMU's "
            "credentials are for one direction",
        )  # fmt: skip
    elif creds and creds == incoming:
        r.error(
            "migration", "tls_creds_incoming", incoming, "expected another object than tls_creds"
        )
    elif incoming and creds == "":
        r.error("migration", "tls_creds_incoming", incoming, "expected only with tls_creds")
    if m.get("tls_hostname") and creds == "":
        r.error("migration", "tls_hostname", m["tls_hostname"], "expected only with tls_creds")


def _failover_checks(r: _Reader, f: dict[str, Any]) -> None:
    arbiter = f.get("arbiter")
    if f.get("automatic") and arbiter == "fence" and f.get("fence") == ():
        r.error("failover", "automatic", True, "requires a fence command ([failover] fence)")
    if f.get("automatic") and arbiter == "manual":
        r.error("failover", "automatic", True, 'requires arbiter "fence" or "lease"')
    if f.get("fence") and arbiter not in (None, "fence"):
        r.error("failover", "fence", list(f["fence"]), 'expected only with arbiter = "fence"')
    if arbiter == "lease" and f.get("etcd") == ():
        r.error("failover", "etcd", [], 'required with arbiter = "lease"')
    if bool(f.get("etcd_cert")) != bool(f.get("etcd_key")):
        r.error("failover", "etcd_cert", f.get("etcd_cert"), "expected both etcd_cert and etcd_key")
    ttl, margin = f.get("lease_ttl"), f.get("lease_margin")
    if ttl is not None and ttl % 1000:
        r.error("failover", "lease_ttl", ttl, "expected whole seconds, such as 5000")
    if ttl is not None and margin is not None and not ttl // 50 <= margin <= ttl // 2:
        r.error(
            "failover", "lease_margin", margin,
            f"expected from a fiftieth to a half of lease_ttl, {ttl // 50} to {ttl // 2} ms",
        )  # fmt: skip


def _path_checks(r: _Reader, peer: dict[str, Any], control: tuple[Any, Any]) -> None:
    """Check that each heartbeat link is a path of its own."""
    paths = peer.get("heartbeat_links") or ()
    locals_: set[Any] = set()
    for text in paths:
        ends = validate.path_ends(text)
        if ends is None:
            continue
        if ends[0] == ends[1]:
            r.error("peer", "heartbeat_links", text, "expected two different ends")
        if ends[0] in locals_:
            r.error("peer", "heartbeat_links", text, "expected another local end for each link")
        locals_.add(ends[0])
        same = None not in control and (ends[0][0], ends[1][0]) == (control[0][0], control[1][0])
        if same and not ends[0][0].is_loopback:
            r.error(
                "peer", "heartbeat_links", text,
                "expected other addresses than local and remote, which the control channel uses",
            )  # fmt: skip


def _peer_checks(r: _Reader, peer: dict[str, Any], *, lease: bool) -> None:
    local, remote = validate.split(peer.get("local", "")), validate.split(peer.get("remote", ""))
    if local and remote:
        if local == remote:
            r.error("peer", "remote", peer["remote"], "expected another address than local")
        if local[0].version != remote[0].version:
            r.error(
                "peer", "remote", peer["remote"],
                f"expected an IPv{local[0].version} address as local is",
            )  # fmt: skip
        if lease and local[0].is_unspecified:
            r.error(
                "peer", "local", peer["local"],
                "expected this host's own address with arbiter = \"lease\", whose holder it names",
            )  # fmt: skip
    _path_checks(r, peer, (local, remote))
    tls = {k: peer.get(k) for k in ("cert", "key", "ca", "peer_cert")}
    if None not in tls.values():
        trust = "ca" if tls["ca"] else "peer_cert"
        missing = [k for k in ("cert", "key", trust) if not tls[k]]
        if missing and len(missing) < 3:
            for k in missing:
                want = "expected all of cert, key and one of ca, peer_cert, or none of them"
                r.error("peer", k, "", want)
        elif missing and peer.get("insecure") is False and not validate.loopback(local, remote):
            r.error(
                "peer", "cert", "",
                "cert, key and ca (or peer_cert) are required between hosts (or insecure = true); "
                "`colo-xdp pki` makes them",
            )  # fmt: skip
        elif tls["ca"] and tls["peer_cert"]:
            r.error("peer", "peer_cert", tls["peer_cert"], "expected either ca or peer_cert")
        elif peer.get("identity") and not tls["ca"]:
            r.error("peer", "identity", peer["identity"], "expected only with ca")
    interval, timeout = peer.get("heartbeat_interval"), peer.get("heartbeat_timeout")
    if interval is not None and timeout is not None and timeout < 3 * interval:
        r.error(
            "peer", "heartbeat_timeout", timeout,
            f"expected at least three times heartbeat_interval, {3 * interval} ms",
        )  # fmt: skip
    dead = peer.get("dead_after")
    if timeout is not None and dead is not None and dead < 2 * timeout:
        r.error(
            "peer", "dead_after", dead,
            f"expected at least twice heartbeat_timeout, {2 * timeout} ms",
        )  # fmt: skip


# ---- writing


def toml_value(value: Any) -> str:
    """Format a value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, except that TOML requires DEL to be escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(toml_value(v) for v in value) + "]"


def as_toml(config: Config) -> str:
    """Format the configuration as a file with every key; `parse` returns the same Config."""
    lines = [f"{k} = {toml_value(getattr(config, k))}" for k in validate.keys(Config)]
    for name, cls in SECTIONS.items():
        several = name == "network" and bool(config.further)
        for section in config.networks if several else (getattr(config, name),):
            lines += ["", f"[[{name}]]" if several else f"[{name}]"]
            lines += [f"{k} = {toml_value(getattr(section, k))}" for k in validate.keys(cls)]
    for rule in config.rules:
        lines += ["", "[[rule]]"]
        lines += [f"{k} = {toml_value(getattr(rule, k))}" for k in validate.keys(Rule)]
    for disk in config.disks:
        lines += ["", "[[disk]]"]
        lines += [f"{k} = {toml_value(getattr(disk, k))}" for k in validate.keys(Disk)]
    return "\n".join(lines) + "\n"
