# SPDX-License-Identifier: GPL-2.0-or-later
"""The configuration file: one TOML file per host and pair. Pure, nothing is looked up.

Each key is declared once, with its default, its check and its help; the
reader, `as_toml` and DOCS are made from that. All mistakes of a file are
reported together.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from . import checks
from .limits import Limits
from .policy import MAX_RULES, Policy, Rule
from .wire import MIN_VERSION, VERSION

_DAY_MS = 86_400_000


class ConfigError(ValueError):
    """The file cannot be used; `errors` has one sentence per mistake."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = list(errors)


# ---- keys


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """[network]: devices of this host."""

    tap: str = checks.key(checks.device, "tap device of this host's guest")
    peer_link: str = checks.key(
        checks.device, "device that leads to the other host, for guest frames only"
    )
    vxlan_remote: str = checks.key(
        checks.or_empty(checks.ip, "peer_link exists"),
        "peer_link is a VXLAN to this address, made by the controller; encrypt what is below it",
        default="",
    )
    vxlan_local: str = checks.key(
        checks.or_empty(checks.ip, "the kernel chooses"),
        "this host's address of that VXLAN",
        default="",
    )
    vxlan_vni: int = checks.key(
        checks.integer(1, (1 << 24) - 1, "(a VNI)"),
        "its number, the same on both hosts, another one for each pair",
        default=9846,
    )
    vxlan_port: int = checks.key(checks.integer(1, 65535, "(a port)"), "its UDP port", default=4789)
    bridge: str = checks.key(
        checks.or_empty(checks.device, "none"),
        'bridge that the tap joins at a takeover; "": the host routes',
        default="",
    )
    uplink: str = checks.key(
        checks.device,
        "how the fast path's frames leave; auto: by the bridge's port where the client was last "
        "heard, if the bridge does not filter; bridge: through it; a device: there, always",
        default="auto",
    )
    hook: str = checks.key(
        checks.choice("auto", "xdp", "tc"),
        "where the secondary guest's output is met; auto: xdp if the tap has no vnet_hdr, else tc",
        default="auto",
    )
    guest_mac: str = checks.key(
        checks.or_empty(checks.mac, "QEMU is asked"),
        'the guest\'s MAC address, announced at a takeover; "": QEMU is asked',
        default="",
    )
    guest_addresses: tuple[str, ...] = checks.key(
        checks.ip_addresses,
        "addresses of the guest that are announced at a takeover, besides those that connections "
        "were seen to",
        default=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """[qemu]: QMP and migration. Times in ms."""

    qmp: str = checks.key(checks.socket_path, "unix socket of this host's QEMU (QMP)")
    qmp_oob: str = checks.key(
        checks.or_empty(checks.socket_path, "the first one's"),
        "second QMP socket, for the way past a hung main loop (yank)",
        default="",
    )
    migrate_uri: str = checks.key(
        checks.or_empty(
            checks.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.2:4444"
            ),
            "secondary",
        ),
        "where the secondary's QEMU waits (-incoming); required on the primary",
        default="",
    )
    reverse_uri: str = checks.key(
        checks.or_empty(
            checks.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.1:4444"
            ),
            "the survivor of the primary stays alone",
        ),
        "where the primary host's QEMU waits (-incoming) after a takeover, to become the new "
        "secondary; needed on the secondary",
        default="",
    )
    incoming: tuple[str, ...] = checks.key(
        checks.argv,
        "command (argv, no shell) that starts this host's QEMU anew with -incoming, and ends what "
        "is left of the old one; run when its guest is worthless and the other one speaks",
        default=(),
    )
    qmp_timeout: int = checks.key(
        checks.integer(1, _DAY_MS, "ms"), "deadline of one QMP command", default=5000, unit="ms"
    )
    enter_timeout: int = checks.key(
        checks.integer(1, _DAY_MS, "ms"),
        "deadline of the first synchronisation (all of the guest's memory is copied)",
        default=120_000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """[peer]: the control channel. Times in ms."""

    local: str = checks.key(
        checks.address, "this controller's address; the secondary listens on it"
    )
    remote: str = checks.key(
        checks.address,
        "the other controller's address: the primary connects to it, the secondary accepts it only",
    )
    cert: str = checks.key(
        checks.or_empty(checks.path, "no TLS"),
        "this host's certificate (PEM), with key and one of ca, peer_cert",
        default="",
    )
    key: str = checks.key(
        checks.or_empty(checks.path, "no TLS"), "private key of cert (PEM)", default=""
    )
    ca: str = checks.key(
        checks.or_empty(checks.path, "peer_cert decides"),
        "the authority (PEM) whose certificates are accepted, if they carry the right identity",
        default="",
    )
    identity: str = checks.key(
        checks.or_empty(checks.identity, "colo-xdp://PAIR/ROLE, as `colo-xdp pki` writes it"),
        "with ca: who the peer's certificate has to name, as URI, DNS name or CN",
        default="",
    )
    peer_cert: str = checks.key(
        checks.or_empty(checks.path, "ca decides"),
        "the other host's certificate, then the only one accepted",
        default="",
    )
    min_version: int = checks.key(
        checks.integer(MIN_VERSION, VERSION, "versions"),
        "oldest version of the protocol that is spoken with the peer",
        default=MIN_VERSION,
    )
    insecure: bool = checks.key(
        checks.boolean,
        "allow a channel without TLS between two hosts (laboratory only)",
        default=False,
    )
    heartbeat_interval: int = checks.key(
        checks.integer(10, 60_000, "ms"), "time between two heartbeats", default=100, unit="ms"
    )
    link_heartbeats: bool = checks.key(
        checks.boolean,
        "heartbeats also go over network.peer_link, in frames of their own (ethertype 0x88B5)",
        default=True,
    )
    heartbeat_paths: tuple[str, ...] = checks.key(
        checks.heartbeat_paths,
        'and over these (UDP): "local:port->remote:port", on the other host the other way round',
        default=(),
    )
    dead_after: int = checks.key(
        checks.integer(100, _DAY_MS, "ms"),
        "silence on all paths after which a peer that gives no other sign is fenced; the secondary "
        "waits twice",
        default=5000,
        unit="ms",
    )
    heartbeat_timeout: int = checks.key(
        checks.integer(30, 600_000, "ms"),
        "silence after which the peer is suspected; at least 3 heartbeat_interval",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """[compare]: the engine. Times in ms."""

    compare_timeout: int = checks.key(
        checks.integer(1, 600_000, "ms"),
        "how long a frame may wait for its twin before a checkpoint is asked for",
        default=3000,
        unit="ms",
    )
    expired_scan_cycle: int = checks.key(
        checks.integer(1, 600_000, "ms"), "period of the ageing of flows", default=1000, unit="ms"
    )
    max_queue_size: int = checks.key(
        checks.integer(1, 1 << 20, "packets"),
        "frames held before a checkpoint is asked for, per guest",
        default=1024,
        unit="packets",
    )
    max_stream_bytes: int = checks.key(
        checks.integer(65536, 1 << 30, "bytes"),
        "how far the secondary guest may be ahead in one connection",
        default=4 << 20,
        unit="bytes",
    )
    max_flows: int = checks.key(
        checks.integer(16, 1 << 24, "flows"),
        "connections the engine keeps",
        default=100_000,
        unit="flows",
    )
    max_held_bytes: int = checks.key(
        checks.integer(1 << 20, 1 << 34, "bytes"),
        "bytes of frames held before a checkpoint is asked for",
        default=64 << 20,
        unit="bytes",
    )
    arp: str = checks.key(
        checks.choice("pass", "compare"), "ARP: released at once, or compared", default="pass"
    )
    ndp: str = checks.key(
        checks.choice("pass", "compare"),
        "IPv6 neighbour discovery, MLD, IGMP: released, or compared",
        default="pass",
    )
    other: str = checks.key(
        checks.choice("pass", "compare"),
        "other protocols: released, or compared",
        default="compare",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKeys:
    """[checkpoint]. Times in ms."""

    deadline: int = checks.key(
        checks.integer(1, _DAY_MS, "ms"),
        "a checkpoint that takes longer has failed",
        default=10_000,
        unit="ms",
    )
    periodic: int = checks.key(
        checks.integer(0, _DAY_MS, "ms"),
        "a checkpoint at least this often; 0: never",
        default=0,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverKeys:
    """[failover]. Times in ms."""

    automatic: bool = checks.key(
        checks.boolean, "fail over without a person; requires an arbiter but manual", default=False
    )
    arbiter: str = checks.key(
        checks.choice("fence", "lease", "manual"),
        "what makes sure that only one guest speaks: the fence command, a lease in etcd, a person",
        default="fence",
    )
    fence: tuple[str, ...] = checks.key(
        checks.argv,
        "command (argv, no shell) that makes the peer silent for certain; exit status 0 is success",
        default=(),
    )
    fence_timeout: int = checks.key(
        checks.integer(1, 3_600_000, "ms"),
        "a fence command that takes longer has failed",
        default=30_000,
        unit="ms",
    )
    etcd: tuple[str, ...] = checks.key(
        checks.urls, "endpoints of the etcd cluster that holds the lease", default=()
    )
    etcd_ca: str = checks.key(
        checks.or_empty(checks.path, "the system's"), "its authority (PEM)", default=""
    )
    etcd_cert: str = checks.key(
        checks.or_empty(checks.path, "none"), "certificate (PEM) to show it", default=""
    )
    etcd_key: str = checks.key(
        checks.or_empty(checks.path, "none"), "private key of etcd_cert (PEM)", default=""
    )
    lease_ttl: int = checks.key(
        checks.integer(2000, 600_000, "ms"),
        "how long a lease holds without renewal; the other host waits as long; whole seconds",
        default=5000,
        unit="ms",
    )
    lease_margin: int = checks.key(
        checks.integer(100, 300_000, "ms"),
        "how much earlier the holder falls silent; at most half of lease_ttl",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPathKeys:
    """[datapath]: programs and maps. Times in ms."""

    events: str = checks.key(
        checks.choice("auto", "ring", "perf"),
        "how frames reach the controller: BPF ring buffer or perf buffers",
        default="auto",
    )
    ring_pages: int = checks.key(
        checks.power_of_two(16, 262_144, "pages"),
        "size of the ring buffer",
        default=8192,
        unit="pages",
    )
    flow_table: int = checks.key(
        checks.integer(16, 1 << 22, "entries"),
        "connections the secondary's rewriter tracks",
        default=65_536,
        unit="entries",
    )
    fast_path: str = checks.key(
        checks.choice("on", "off"),
        "established TCP is compared in the kernel (needs Linux 5.12)",
        default="on",
    )
    fast_path_memory: int = checks.key(
        checks.integer(1, 1 << 16, "MiB"),
        "memory for what one guest is ahead in it, 512 KiB per connection while it is",
        default=256,
        unit="MiB",
    )
    fast_path_flows: int = checks.key(
        checks.integer(16, 1 << 24, "entries"),
        "connections it knows; 350 bytes each when used",
        default=1_000_000,
        unit="entries",
    )
    on_controller_loss: str = checks.key(
        checks.choice("hold", "release"),
        "what the programs do with output while no controller lives",
        default="hold",
    )
    controller_loss: int = checks.key(
        checks.integer(50, 3_600_000, "ms"),
        "silence of the controller after which the programs count it as lost",
        default=1000,
        unit="ms",
    )
    bpffs: str = checks.key(
        checks.directory,
        "bpf file system where programs and maps are pinned",
        default="/sys/fs/bpf",
    )
    run_dir: str = checks.key(
        checks.directory, "directory of the control socket and the list of what is attached",
        default="/run/colo-xdp",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: the Prometheus endpoint."""

    listen: str = checks.key(
        checks.or_empty(checks.address, "off"),
        'address of the endpoint; "": off',
        default="127.0.0.1:9847",
    )
    cert: str = checks.key(
        checks.or_empty(checks.path, "no TLS"),
        "certificate (PEM) of the endpoint, with key and client_ca: HTTPS",
        default="",
    )
    key: str = checks.key(
        checks.or_empty(checks.path, "no TLS"), "private key of cert (PEM)", default=""
    )
    client_ca: str = checks.key(
        checks.or_empty(checks.path, "no TLS"),
        "the authority (PEM) of those who may read",
        default="",
    )
    allow_remote: bool = checks.key(
        checks.boolean,
        "allow an address that is not loopback without TLS: everybody there can read",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of one file. Times in ms; what was not written has its default."""

    pair: str = checks.key(
        checks.pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -"),
        "name of the pair, the same on both hosts",
    )
    role: Literal["primary", "secondary"] = checks.key(
        checks.choice("primary", "secondary"), "which guest this host runs"
    )
    network: Network
    qemu: Qemu
    peer: Peer
    compare: Compare = field(default_factory=Compare)
    checkpoint: CheckpointKeys = field(default_factory=CheckpointKeys)
    failover: FailoverKeys = field(default_factory=FailoverKeys)
    datapath: DataPathKeys = field(default_factory=DataPathKeys)
    metrics: Metrics = field(default_factory=Metrics)
    rules: tuple[Rule, ...] = ()
    path: str | None = None  # where it was read from

    def differences(self, other: Config) -> list[str]:
        """The keys that differ, but for the policy, which can change while running."""
        mine, theirs = _flat(self), _flat(other)
        free = {"compare.arp", "compare.ndp", "compare.other"}
        return [k for k in mine if mine[k] != theirs[k] and k not in free]

    def limits(self) -> Limits:
        """Of the engine."""
        c = self.compare
        return Limits(
            compare_timeout_ns=c.compare_timeout * 1_000_000,
            expired_scan_cycle_ns=c.expired_scan_cycle * 1_000_000,
            max_queue_size=c.max_queue_size,
            max_held_bytes=c.max_held_bytes,
            max_stream_bytes=c.max_stream_bytes,
            max_flows=c.max_flows,
        )

    def policy(self) -> Policy:
        """What is compared: the file's rules, then the defaults of [compare]."""
        c = self.compare
        return Policy(self.rules, arp=c.arp, ndp=c.ndp, other=c.other)


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


def _flat(config: Config) -> dict[str, Any]:
    out = {k: getattr(config, k) for k in checks.keys(Config)}
    for name, cls in _SECTIONS.items():
        out |= {f"{name}.{k}": getattr(getattr(config, name), k) for k in checks.keys(cls)}
    return out


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
        known = checks.keys(cls)
        out: dict[str, Any] = {}
        top = [*_SECTIONS, "rule"] if cls is Config else []
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
    homes = [s for s, cls in _SECTIONS.items() if key in checks.keys(cls)]
    if not homes and key in checks.keys(Rule):
        return "; it belongs to a rule, under [[rule]]"
    if key in checks.keys(Config):
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
    rules = _rules(r, data.get("rule", []))
    _cross_checks(r, top, sections)
    if r.errors:
        raise ConfigError(r.errors)
    made = {name: cls(**sections[name]) for name, cls in _SECTIONS.items()}
    return Config(**top, **made, rules=rules)


def _rules(r: _Reader, data: Any) -> tuple[Rule, ...]:
    """The [[rule]] tables, in order; the first one that fits a flow decides."""
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


def load(path: str | Path) -> Config:
    """The configuration of a file.

    Raises ConfigError: the file cannot be read, or with every mistake in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise ConfigError([f"{path}: cannot be read: {why}"]) from e
    return replace(parse(text, str(path)), path=str(path))


def _cross_checks(r: _Reader, top: dict[str, Any], s: dict[str, dict[str, Any]]) -> None:
    """Rules over more than one key; skipped where one of them is wrong by itself."""
    net, qemu, peer = s.get("network", {}), s.get("qemu", {}), s.get("peer", {})
    for key in ("peer_link", "bridge", "uplink"):
        if net.get(key) and net[key] == net.get("tap"):
            r.error("network", key, net[key], "expected another device than tap")
    if net.get("vxlan_local") and not net.get("vxlan_remote"):
        r.error("network", "vxlan_local", net["vxlan_local"], "expected only with vxlan_remote")
    if net.get("bridge") and net["bridge"] == net.get("peer_link"):
        r.error("network", "bridge", net["bridge"], "expected another device than peer_link")
    if top.get("role") == "primary" and qemu.get("migrate_uri") == "":
        r.error("qemu", "migrate_uri", "", "required on the primary, such as tcp:10.0.0.2:4444")
    failover = s.get("failover", {})
    _peer_checks(r, peer, lease=failover.get("arbiter") == "lease")
    _failover_checks(r, failover)
    metrics = s.get("metrics", {})
    where = checks.split(metrics.get("listen", ""))
    tls = [k for k in ("cert", "key", "client_ca") if metrics.get(k)]
    if 0 < len(tls) < 3:
        r.error("metrics", tls[0], metrics[tls[0]], "expected all of cert, key and client_ca")
    elif where and not where[0].is_loopback and not tls and metrics.get("allow_remote") is False:
        r.error(
            "metrics", "listen", metrics["listen"],
            "expected a loopback address, or cert, key and client_ca, or allow_remote = true",
        )  # fmt: skip


def _failover_checks(r: _Reader, f: dict[str, Any]) -> None:
    arbiter = f.get("arbiter")
    if f.get("automatic") and arbiter == "fence" and f.get("fence") == ():
        r.error("failover", "automatic", True, "requires a fence command ([failover] fence)")
    if f.get("automatic") and arbiter == "manual":
        r.error("failover", "automatic", True, 'requires arbiter "fence" or "lease"')
    if f.get("fence") and arbiter in ("lease", "manual"):
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
    """Further paths for heartbeats: each a way of its own."""
    paths = peer.get("heartbeat_paths") or ()
    locals_: set[Any] = set()
    for text in paths:
        ends = checks.path_ends(text)
        if ends is None:
            continue
        if ends[0] == ends[1]:
            r.error("peer", "heartbeat_paths", text, "expected two different ends")
        if ends[0] in locals_:
            r.error("peer", "heartbeat_paths", text, "expected another local end for each path")
        locals_.add(ends[0])
        same = None not in control and (ends[0][0], ends[1][0]) == (control[0][0], control[1][0])
        if same and not ends[0][0].is_loopback:
            r.error(
                "peer", "heartbeat_paths", text,
                "expected other addresses than local and remote: that way is the control channel's",
            )  # fmt: skip


def _peer_checks(r: _Reader, peer: dict[str, Any], *, lease: bool) -> None:
    local, remote = checks.split(peer.get("local", "")), checks.split(peer.get("remote", ""))
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
        elif missing and peer.get("insecure") is False and not checks.loopback(local, remote):
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
    lines = [f"{k} = {_toml(getattr(config, k))}" for k in checks.keys(Config)]
    for name, cls in _SECTIONS.items():
        section = getattr(config, name)
        lines += ["", f"[{name}]"]
        lines += [f"{k} = {_toml(getattr(section, k))}" for k in checks.keys(cls)]
    for rule in config.rules:
        lines += ["", "[[rule]]"]
        lines += [f"{k} = {_toml(getattr(rule, k))}" for k in checks.keys(Rule)]
    return "\n".join(lines) + "\n"


def _doc(f: Field[Any]) -> str:
    if f.default is MISSING:
        return f"{f.metadata['help']} (required)"
    unit = f" {f.metadata['unit']}" if f.metadata["unit"] else ""
    return f"{f.metadata['help']} (default {_toml(f.default)}{unit})"


_TABLES: list[tuple[str, type[Any]]] = [*_SECTIONS.items(), ("rule", Rule)]
#: "section.key" (top level: "key") -> one line of help with unit and default
DOCS: dict[str, str] = {k: _doc(f) for k, f in checks.keys(Config).items()} | {
    f"{name}.{k}": _doc(f) for name, cls in _TABLES for k, f in checks.keys(cls).items()
}
