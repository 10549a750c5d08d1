# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: one TOML file per host and pair. Pure, nothing is looked up.

Each key is declared once, with its default, its check and its help; the
reader, `as_toml` and DOCS are made from that. All mistakes of a file are
reported together.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

_Check = Callable[[Any], str | None]
_DAY_MS = 86_400_000
_IFNAMSIZ = 16
_SUN_PATH = 108


class ConfigError(ValueError):
    """The file cannot be used; `errors` has one sentence per mistake."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


def _key(check: _Check, text: str, *, default: Any = MISSING, unit: str = "") -> Any:
    """A key. `check` gives what is expected when a value is not that, else None."""
    meta = {"check": check, "help": text, "unit": unit}
    return field(default=default, metadata=meta)


# ---- checks: None, or what is expected


def _integer(low: int, high: int, unit: str) -> _Check:
    want = f"expected a whole number of {unit} from {low} to {high}"

    def check(v: Any) -> str | None:
        return None if type(v) is int and low <= v <= high else want

    return check


def _power_of_two(low: int, high: int, unit: str) -> _Check:
    want = f"expected a power of two from {low} to {high} ({unit})"

    def check(v: Any) -> str | None:
        return None if type(v) is int and low <= v <= high and not v & (v - 1) else want

    return check


def _boolean(v: Any) -> str | None:
    return None if isinstance(v, bool) else "expected true or false"


def _choice(*names: str) -> _Check:
    want = "expected " + " or ".join(json.dumps(n) for n in names)

    def check(v: Any) -> str | None:
        return None if isinstance(v, str) and v in names else want

    return check


def _pattern(pattern: str, want: str) -> _Check:
    exact = re.compile(pattern)

    def check(v: Any) -> str | None:
        return None if isinstance(v, str) and exact.fullmatch(v) else f"expected {want}"

    return check


def _or_empty(inner: _Check, meaning: str) -> _Check:
    def check(v: Any) -> str | None:
        if v == "" and isinstance(v, str):
            return None
        want = inner(v)
        return None if want is None else f'{want}, or "" ({meaning})'

    return check


def _device(v: Any) -> str | None:
    ok = isinstance(v, str) and re.fullmatch(r"[^\s/:\0]+", v) and v not in (".", "..")
    if ok and len(v.encode()) < _IFNAMSIZ:
        return None
    return "expected the name of a network device (1 to 15 bytes)"


def _path(v: Any) -> str | None:
    return None if isinstance(v, str) and v and "\0" not in v else "expected a path"


def _directory(v: Any) -> str | None:
    ok = isinstance(v, str) and v.startswith("/") and "\0" not in v
    return None if ok else "expected an absolute path of a directory"


def _socket_path(v: Any) -> str | None:
    ok = _path(v) is None and len(v.encode()) < _SUN_PATH
    return None if ok else "expected the path of a unix socket (1 to 107 bytes)"


def _mac(v: Any) -> str | None:
    ok = isinstance(v, str) and re.fullmatch(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", v)
    if ok and not int(v[:2], 16) & 1 and v != "00:00:00:00:00:00":
        return None
    return "expected a unicast MAC address such as 52:54:00:12:34:56"


def _split(v: Any) -> tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int] | None:
    """The parts of "ip:port" or "[v6]:port"; None when it is neither."""
    m = (
        re.fullmatch(r"(?:\[([^\[\]]+)\]|([^:\[\]]+)):([0-9]{1,5})", v)
        if isinstance(v, str)
        else None
    )
    if m is None:
        return None
    try:
        ip = ipaddress.IPv6Address(m[1]) if m[1] else ipaddress.IPv4Address(m[2])
    except ValueError:
        return None
    port = int(m[3])
    return (ip, port) if 1 <= port <= 65535 else None


def _loopback(*where: tuple[ipaddress.IPv4Address | ipaddress.IPv6Address, int] | None) -> bool:
    """Whether all are loopback; what could not be read counts as such: it has its own error."""
    return all(w is None or w[0].is_loopback for w in where)


def _address(v: Any) -> str | None:
    return None if _split(v) else 'expected "ip:port" or "[ipv6]:port", port from 1 to 65535'


def _argv(v: Any) -> str | None:
    ok = isinstance(v, list | tuple) and all(isinstance(s, str) and "\0" not in s for s in v)
    if ok and (not v or v[0]):
        return None
    return "expected a list of strings: a program and its arguments"


# ---- keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """[network]: devices of this host."""

    tap: str = _key(_device, "tap device of this host's guest")
    peer_link: str = _key(_device, "device that leads to the other host, for guest frames only")
    bridge: str = _key(
        _or_empty(_device, "none"),
        'bridge that the tap joins at a takeover; "": the host routes',
        default="",
    )
    hook: str = _key(
        _choice("auto", "xdp", "tc"),
        "where the secondary guest's output is met; auto: xdp if the tap has no vnet_hdr, else tc",
        default="auto",
    )
    guest_mac: str = _key(
        _or_empty(_mac, "QEMU is asked"),
        'the guest\'s MAC address, announced at a takeover; "": QEMU is asked',
        default="",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """[qemu]: QMP and migration. Times in ms."""

    qmp: str = _key(_socket_path, "unix socket of this host's QEMU (QMP)")
    migrate_uri: str = _key(
        _or_empty(
            _pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.2:4444"
            ),
            "secondary",
        ),
        "where the secondary's QEMU waits (-incoming); required on the primary",
        default="",
    )
    qmp_timeout: int = _key(
        _integer(1, _DAY_MS, "ms"), "deadline of one QMP command", default=5000, unit="ms"
    )
    enter_timeout: int = _key(
        _integer(1, _DAY_MS, "ms"),
        "deadline of the first synchronisation (all of the guest's memory is copied)",
        default=120_000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """[peer]: the control channel. Times in ms."""

    local: str = _key(_address, "this controller's address; the secondary listens on it")
    remote: str = _key(_address, "the other controller's address; the primary connects to it")
    cert: str = _key(
        _or_empty(_path, "no TLS"),
        "this host's certificate (PEM), with key and peer_cert",
        default="",
    )
    key: str = _key(_or_empty(_path, "no TLS"), "private key of cert (PEM)", default="")
    peer_cert: str = _key(
        _or_empty(_path, "no TLS"),
        "the other host's certificate, the only one accepted",
        default="",
    )
    insecure: bool = _key(
        _boolean, "allow a channel without TLS between two hosts (laboratory only)", default=False
    )
    heartbeat_interval: int = _key(
        _integer(10, 60_000, "ms"), "time between two heartbeats", default=100, unit="ms"
    )
    heartbeat_timeout: int = _key(
        _integer(30, 600_000, "ms"),
        "silence after which the peer is suspected; at least 3 heartbeat_interval",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """[compare]: the engine. Times in ms."""

    compare_timeout: int = _key(
        _integer(1, 600_000, "ms"),
        "how long a frame may wait for its twin before a checkpoint is asked for",
        default=3000,
        unit="ms",
    )
    expired_scan_cycle: int = _key(
        _integer(1, 600_000, "ms"), "period of the ageing of flows", default=1000, unit="ms"
    )
    max_queue_size: int = _key(
        _integer(1, 1 << 20, "packets"),
        "frames held before a checkpoint is asked for, per guest",
        default=1024,
        unit="packets",
    )
    max_stream_bytes: int = _key(
        _integer(65536, 1 << 30, "bytes"),
        "how far the secondary guest may be ahead in one connection",
        default=4 << 20,
        unit="bytes",
    )
    max_flows: int = _key(
        _integer(16, 1 << 24, "flows"),
        "connections the engine keeps",
        default=100_000,
        unit="flows",
    )
    arp: str = _key(
        _choice("pass", "compare"), "ARP: released at once, or compared", default="pass"
    )
    ndp: str = _key(
        _choice("pass", "compare"),
        "IPv6 neighbour discovery: released, or compared",
        default="pass",
    )
    other: str = _key(
        _choice("pass", "compare"), "other protocols: released, or compared", default="compare"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKeys:
    """[checkpoint]. Times in ms."""

    deadline: int = _key(
        _integer(1, _DAY_MS, "ms"),
        "a checkpoint that takes longer has failed",
        default=10_000,
        unit="ms",
    )
    periodic: int = _key(
        _integer(0, _DAY_MS, "ms"),
        "a checkpoint at least this often; 0: never",
        default=0,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverKeys:
    """[failover]. Times in ms."""

    automatic: bool = _key(_boolean, "fail over without a person; requires fence", default=False)
    fence: tuple[str, ...] = _key(
        _argv,
        "command (argv, no shell) that makes the peer silent for certain; exit status 0 is success",
        default=(),
    )
    fence_timeout: int = _key(
        _integer(1, 3_600_000, "ms"),
        "a fence command that takes longer has failed",
        default=30_000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPathKeys:
    """[datapath]: programs and maps. Times in ms."""

    events: str = _key(
        _choice("auto", "ring", "perf"),
        "how frames reach the controller: BPF ring buffer or perf buffers",
        default="auto",
    )
    ring_pages: int = _key(
        _power_of_two(16, 262_144, "pages"), "size of the ring buffer", default=8192, unit="pages"
    )
    flow_table: int = _key(
        _integer(16, 1 << 22, "entries"),
        "connections the secondary's rewriter tracks",
        default=65_536,
        unit="entries",
    )
    on_controller_loss: str = _key(
        _choice("hold", "release"),
        "what the programs do with output while no controller lives",
        default="hold",
    )
    controller_loss: int = _key(
        _integer(50, 3_600_000, "ms"),
        "silence of the controller after which the programs count it as lost",
        default=1000,
        unit="ms",
    )
    bpffs: str = _key(
        _directory, "bpf file system where programs and maps are pinned", default="/sys/fs/bpf"
    )
    run_dir: str = _key(
        _directory, "directory of the control socket and the list of what is attached",
        default="/run/colo-xdp",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: the Prometheus endpoint."""

    listen: str = _key(
        _or_empty(_address, "off"), 'address of the endpoint; "": off', default="127.0.0.1:9847"
    )
    allow_remote: bool = _key(_boolean, "allow an address that is not loopback", default=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of one file. Times in ms; what was not written has its default."""

    pair: str = _key(
        _pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -"),
        "name of the pair, the same on both hosts",
    )
    role: Literal["primary", "secondary"] = _key(
        _choice("primary", "secondary"), "which guest this host runs"
    )
    network: Network
    qemu: Qemu
    peer: Peer
    compare: Compare = field(default_factory=Compare)
    checkpoint: CheckpointKeys = field(default_factory=CheckpointKeys)
    failover: FailoverKeys = field(default_factory=FailoverKeys)
    datapath: DataPathKeys = field(default_factory=DataPathKeys)
    metrics: Metrics = field(default_factory=Metrics)


_SECTIONS: dict[str, type[Any]] = {
    "network": Network,
    "qemu": Qemu,
    "peer": Peer,
    "compare": Compare,
    "checkpoint": CheckpointKeys,
    "failover": FailoverKeys,
    "datapath": DataPathKeys,
    "metrics": Metrics,
}


def _keys(cls: type[Any]) -> dict[str, Field[Any]]:
    return {f.name: f for f in fields(cls) if "check" in f.metadata}


# ---- reading


def _show(value: Any) -> str:
    """A value as TOML writes it, cut to a line's length."""
    if isinstance(value, bool | int | float | str | list | tuple):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _near(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Reader:
    """One pass over a parsed file: values that are right, sentences about those that are not."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.errors: list[str] = []

    def error(self, section: str, key: str, value: Any, want: str) -> None:
        where = f"[{section}] {key}" if section else key
        self.errors.append(f"{self.path}: {where} = {_show(value)}: {want}")

    def table(self, section: str, cls: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
        """The right values of one table; missing keys get their default."""
        known = _keys(cls)
        out: dict[str, Any] = {}
        top = list(_SECTIONS) if cls is Config else []
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
    """A hint for a key that stands under the wrong heading."""
    homes = [s for s, cls in _SECTIONS.items() if key in _keys(cls)]
    if key in _keys(Config):
        return "; it belongs to the top of the file"
    return f"; it belongs to [{homes[0]}]" if homes else ""


def parse(text: str, path: str = "<config>") -> Config:
    """A configuration from TOML text; `path` is only for the messages.

    Raises ConfigError with every mistake of the text.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise ConfigError([f"{path}: not TOML: {e}"]) from e
    r = _Reader(path)
    top = r.table("", Config, data)
    sections: dict[str, dict[str, Any]] = {}
    for name, cls in _SECTIONS.items():
        body = data.get(name, {})
        if not isinstance(body, dict):
            r.errors.append(f"{path}: {name} = {_show(body)}: expected a section [{name}]")
            continue
        sections[name] = r.table(name, cls, body)
    _cross_checks(r, top, sections)
    if r.errors:
        raise ConfigError(r.errors)
    return Config(**top, **{name: cls(**sections[name]) for name, cls in _SECTIONS.items()})


def load(path: str | Path) -> Config:
    """The configuration of a file.

    Raises ConfigError: the file cannot be read, or with every mistake in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ConfigError([f"{path}: cannot be read: {why}"]) from e
    return parse(text, str(path))


def _cross_checks(r: _Reader, top: dict[str, Any], s: dict[str, dict[str, Any]]) -> None:
    """Rules over more than one key; skipped where one of them is wrong by itself."""
    net, qemu, peer = s.get("network", {}), s.get("qemu", {}), s.get("peer", {})
    for key in ("peer_link", "bridge"):
        if net.get(key) and net[key] == net.get("tap"):
            r.error("network", key, net[key], "expected another device than tap")
    if net.get("bridge") and net["bridge"] == net.get("peer_link"):
        r.error("network", "bridge", net["bridge"], "expected another device than peer_link")
    if top.get("role") == "primary" and qemu.get("migrate_uri") == "":
        r.error("qemu", "migrate_uri", "", "required on the primary, such as tcp:10.0.0.2:4444")
    _peer_checks(r, peer)
    failover = s.get("failover", {})
    if failover.get("automatic") and failover.get("fence") == ():
        r.error("failover", "automatic", True, "requires a fence command ([failover] fence)")
    metrics = s.get("metrics", {})
    where = _split(metrics.get("listen", ""))
    if where and not where[0].is_loopback and metrics.get("allow_remote") is False:
        r.error(
            "metrics", "listen", metrics["listen"],
            "expected a loopback address, or [metrics] allow_remote = true",
        )  # fmt: skip


def _peer_checks(r: _Reader, peer: dict[str, Any]) -> None:
    local, remote = _split(peer.get("local", "")), _split(peer.get("remote", ""))
    if local and remote:
        if local == remote:
            r.error("peer", "remote", peer["remote"], "expected another address than local")
        if local[0].version != remote[0].version:
            r.error(
                "peer", "remote", peer["remote"],
                f"expected an IPv{local[0].version} address as local is",
            )  # fmt: skip
    tls = {k: peer.get(k) for k in ("cert", "key", "peer_cert")}
    if None not in tls.values():
        missing = [k for k, v in tls.items() if not v]
        if missing and len(missing) < len(tls):
            for k in missing:
                r.error("peer", k, "", "expected all three of cert, key and peer_cert, or none")
        elif missing and peer.get("insecure") is False and not _loopback(local, remote):
            r.error(
                "peer", "cert", "",
                "cert, key and peer_cert are required between hosts (or insecure = true)",
            )  # fmt: skip
    interval, timeout = peer.get("heartbeat_interval"), peer.get("heartbeat_timeout")
    if interval is not None and timeout is not None and timeout < 3 * interval:
        r.error(
            "peer", "heartbeat_timeout", timeout,
            f"expected at least three times heartbeat_interval, {3 * interval} ms",
        )  # fmt: skip


# ---- writing


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str):
        # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return "[" + ", ".join(_toml(v) for v in value) + "]"


def as_toml(config: Config) -> str:
    """The configuration as a file, every key written; `parse` gives the same Config back."""
    lines = [f"{k} = {_toml(getattr(config, k))}" for k in _keys(Config)]
    for name, cls in _SECTIONS.items():
        section = getattr(config, name)
        lines += ["", f"[{name}]"]
        lines += [f"{k} = {_toml(getattr(section, k))}" for k in _keys(cls)]
    return "\n".join(lines) + "\n"


def _doc(f: Field[Any]) -> str:
    if f.default is MISSING:
        return f"{f.metadata['help']} (required)"
    unit = f" {f.metadata['unit']}" if f.metadata["unit"] else ""
    return f"{f.metadata['help']} (default {_toml(f.default)}{unit})"


#: "section.key" (top level: "key") -> one line of help with unit and default
DOCS: dict[str, str] = {k: _doc(f) for k, f in _keys(Config).items()} | {
    f"{name}.{k}": _doc(f) for name, cls in _SECTIONS.items() for k, f in _keys(cls).items()
}
