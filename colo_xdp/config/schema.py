# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of the configuration file: each declared once, with its default, its check and its help.

Here are the tables that say how the controller works, and the file as a whole (Config). The devices
of the host are in config/network.py, what concerns QEMU in config/qemu.py. config/file.py reads a
file into these and writes it; tests/docs/generate.py makes docs/reference/config.md of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .. import validate
from ..compare.limits import Limits
from ..compare.patience import Patience
from ..compare.policy import Policy, Rule
from ..peer.messages import MIN_VERSION, VERSION
from .network import Network
from .qemu import Disk, Migration, Nbd, Qemu

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """[peer]: the control channel. Times in ms."""

    local: str = validate.key(
        validate.address,
        "address of this controller; the secondary listens on it",
    )
    remote: str = validate.key(
        validate.address,
        "address of the other controller: the primary connects to it, and the secondary "
        "accepts connections from its IP address only",
    )
    cert: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "certificate of this host (PEM); needs key, and either ca or peer_cert",
        default="",
    )
    key: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "private key of cert (PEM)",
        default="",
    )
    ca: str = validate.key(
        validate.or_empty(validate.path, "peer_cert is used"),
        "certificate authority (PEM) whose certificates are accepted if they carry the right "
        "identity",
        default="",
    )
    identity: str = validate.key(
        validate.or_empty(validate.identity, "colo-xdp://PAIR/ROLE, as `colo-xdp pki` writes it"),
        "with ca: the name that the peer's certificate must carry, as a URI, DNS name or CN",
        default="",
    )
    peer_cert: str = validate.key(
        validate.or_empty(validate.path, "ca is used"),
        "certificate of the other host (PEM), which is then the only one accepted",
        default="",
    )
    min_version: int = validate.key(
        validate.integer(MIN_VERSION, VERSION, "versions"),
        "oldest protocol version that is accepted from the peer",
        default=MIN_VERSION,
    )
    insecure: bool = validate.key(
        validate.boolean,
        "allow a control channel without TLS between two hosts (laboratory only)",
        default=False,
    )
    heartbeat_interval: int = validate.key(
        validate.integer(10, 60_000, "ms"),
        "time between two heartbeats",
        default=100,
        unit="ms",
    )
    link_heartbeats: bool = validate.key(
        validate.boolean,
        "whether heartbeats are also sent over network.peer_link, in Ethernet frames of their "
        "own (EtherType 0x88B5)",
        default=True,
    )
    heartbeat_links: tuple[str, ...] = validate.key(
        validate.heartbeat_links,
        'further links for heartbeats (UDP), each as "local:port->remote:port"; the other '
        "host lists the same links with the ends exchanged",
        default=(),
    )
    dead_after: int = validate.key(
        validate.integer(100, _DAY_MS, "ms"),
        "silence on all heartbeat links after which a peer that gives no other sign of death "
        "is fenced; the secondary waits twice as long",
        default=5000,
        unit="ms",
    )
    heartbeat_timeout: int = validate.key(
        validate.integer(30, 600_000, "ms"),
        "silence after which the peer is suspected; at least three times heartbeat_interval",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """[compare]: the engine. Times in ms."""

    compare_timeout: int = validate.key(
        validate.integer(1, 600_000, "ms"),
        "the longest time that a frame waits for its counterpart before a checkpoint is requested",
        default=3000,
        unit="ms",
    )
    wait: str = validate.key(
        validate.choice("adaptive", "fixed"),
        'how long a frame waits; "adaptive": as long as the measured lag of the secondary guest '
        'and the cost of a checkpoint suggest, between min_wait and compare_timeout; "fixed": '
        "always compare_timeout",
        default="adaptive",
    )
    min_wait: int = validate.key(
        validate.integer(1, 600_000, "ms"),
        'the shortest time that a frame waits with wait = "adaptive"',
        default=50,
        unit="ms",
    )
    expired_scan_cycle: int = validate.key(
        validate.integer(1, 600_000, "ms"),
        "interval between two scans for idle flows",
        default=1000,
        unit="ms",
    )
    max_queue_size: int = validate.key(
        validate.integer(1, 1 << 20, "packets"),
        "number of held frames, per guest, at which a checkpoint is requested",
        default=1024,
        unit="packets",
    )
    max_stream_bytes: int = validate.key(
        validate.integer(65536, 1 << 30, "bytes"),
        "how far the secondary guest may be ahead in one connection before a checkpoint is "
        "requested",
        default=4 << 20,
        unit="bytes",
    )
    max_flows: int = validate.key(
        validate.integer(16, 1 << 24, "flows"),
        "number of connections that the engine keeps",
        default=100_000,
        unit="flows",
    )
    max_held_bytes: int = validate.key(
        validate.integer(1 << 20, 1 << 34, "bytes"),
        "number of bytes in held frames at which a checkpoint is requested",
        default=64 << 20,
        unit="bytes",
    )
    arp: str = validate.key(
        validate.choice("pass", "compare"),
        "ARP: released at once, or compared",
        default="pass",
    )
    ndp: str = validate.key(
        validate.choice("pass", "compare"),
        "IPv6 neighbor discovery, MLD and IGMP: released at once, or compared",
        default="pass",
    )
    other: str = validate.key(
        validate.choice("pass", "compare"),
        "other protocols: released at once, or compared",
        default="compare",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKeys:
    """[checkpoint]. Times in ms."""

    deadline: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "time after which an incomplete checkpoint counts as failed",
        default=10_000,
        unit="ms",
    )
    periodic: int = validate.key(
        validate.integer(0, _DAY_MS, "ms"),
        "longest time between two checkpoints; 0: none is made just because of time",
        default=0,
        unit="ms",
    )
    share: int = validate.key(
        validate.integer(1, 100, "per cent"),
        "upper limit of the share of time that checkpoints take, over any longer period; "
        "requests beyond it are delayed, by compare_timeout at most",
        default=25,
        unit="per cent",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverKeys:
    """[failover]. Times in ms."""

    automatic: bool = validate.key(
        validate.boolean,
        'fail over without an operator; requires arbiter "fence" or "lease"',
        default=False,
    )
    arbiter: str = validate.key(
        validate.choice("fence", "lease", "manual"),
        'what guarantees that only one guest transmits; "fence": the fence command; "lease": '
        'a lease in etcd; "manual": an operator',
        default="fence",
    )
    fence: tuple[str, ...] = validate.key(
        validate.argv,
        "command (argv, no shell) that makes sure that the peer is silent; exit status 0 "
        "means that it certainly is",
        default=(),
    )
    fence_timeout: int = validate.key(
        validate.integer(1, 3_600_000, "ms"),
        "time after which a running fence command counts as failed",
        default=30_000,
        unit="ms",
    )
    etcd: tuple[str, ...] = validate.key(
        validate.urls,
        "endpoints of the etcd cluster that holds the lease",
        default=(),
    )
    etcd_ca: str = validate.key(
        validate.or_empty(validate.path, "the system's authorities"),
        "certificate authority of the etcd endpoints (PEM)",
        default="",
    )
    etcd_cert: str = validate.key(
        validate.or_empty(validate.path, "none"),
        "client certificate that is shown to etcd (PEM)",
        default="",
    )
    etcd_key: str = validate.key(
        validate.or_empty(validate.path, "none"),
        "private key of etcd_cert (PEM)",
        default="",
    )
    lease_ttl: int = validate.key(
        validate.integer(2000, 600_000, "ms"),
        "how long a lease is valid without renewal; the other host waits as long before it "
        "can acquire it; whole seconds",
        default=5000,
        unit="ms",
    )
    lease_margin: int = validate.key(
        validate.integer(100, 300_000, "ms"),
        "how long before the lease expires its holder stops transmitting; at most half of "
        "lease_ttl",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPathKeys:
    """[datapath]: programs and maps. Times in ms."""

    events: str = validate.key(
        validate.choice("auto", "ring", "perf"),
        "how frames reach the controller: BPF ring buffer or perf buffers",
        default="auto",
    )
    ring_pages: int = validate.key(
        validate.power_of_two(16, 262_144, "pages"),
        "size of the ring buffer",
        default=8192,
        unit="pages",
    )
    flow_table: int = validate.key(
        validate.integer(16, 1 << 22, "entries"),
        "number of connections that the secondary's rewriter tracks, and as many handshakes "
        "in addition",
        default=65_536,
        unit="entries",
    )
    fast_path: str = validate.key(
        validate.choice("on", "off"),
        "whether established TCP connections and UDP flows are compared in the kernel (needs "
        "Linux 5.12)",
        default="on",
    )
    fast_path_memory: int = validate.key(
        validate.integer(1, 1 << 16, "MiB"),
        "memory for the buffers of the fast path, taken at the start: 512 KiB for each connection "
        "in which one guest is ahead, as long as it is ahead",
        default=256,
        unit="MiB",
    )
    fast_path_flows: int = validate.key(
        validate.integer(16, 1 << 24, "entries"),
        "number of connections that the fast path knows; each takes 350 bytes once it is used",
        default=1_000_000,
        unit="entries",
    )
    on_controller_loss: str = validate.key(
        validate.choice("hold", "release"),
        'what the programs do with the guest\'s output while no controller runs; "hold": '
        'drop it, like loss on the wire; "release": let it pass uncompared',
        default="hold",
    )
    controller_loss: int = validate.key(
        validate.integer(50, 3_600_000, "ms"),
        "silence of the controller after which the programs treat it as lost",
        default=1000,
        unit="ms",
    )
    bpffs: str = validate.key(
        validate.directory,
        "BPF file system in which programs and maps are pinned",
        default="/sys/fs/bpf",
    )
    run_dir: str = validate.key(
        validate.directory,
        "directory of the control socket and of the record of what is attached",
        default="/run/colo-xdp",
    )
    state_dir: str = validate.key(
        validate.directory,
        "directory of the events (`colo-xdp events`), which survive a reboot there (where it "
        "cannot be written they are in run_dir), and of the mark of a guest that ran standalone",
        default="/var/lib/colo-xdp/events",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: the Prometheus endpoint."""

    listen: str = validate.key(
        validate.or_empty(validate.address, "off"),
        'address of the metrics endpoint; "": no endpoint',
        default="127.0.0.1:9847",
    )
    cert: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "certificate of the endpoint (PEM); needs key and client_ca, and makes the endpoint HTTPS",
        default="",
    )
    key: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "private key of cert (PEM)",
        default="",
    )
    client_ca: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "certificate authority (PEM) of the clients that may read the metrics",
        default="",
    )
    allow_remote: bool = validate.key(
        validate.boolean,
        "allow a non-loopback address without TLS: anyone who reaches it can read the metrics",
        default=False,
    )


PAIR_NAME = validate.pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -")


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of one file. Times in ms; what was not written has its default."""

    pair: str = validate.key(
        PAIR_NAME,
        "name of the pair, the same on both hosts",
    )
    role: Literal["primary", "secondary"] = validate.key(
        validate.choice("primary", "secondary"),
        "which guest this host runs",
    )
    network: Network
    qemu: Qemu
    peer: Peer
    compare: Compare = field(default_factory=Compare)
    checkpoint: CheckpointKeys = field(default_factory=CheckpointKeys)
    failover: FailoverKeys = field(default_factory=FailoverKeys)
    datapath: DataPathKeys = field(default_factory=DataPathKeys)
    metrics: Metrics = field(default_factory=Metrics)
    nbd: Nbd = field(default_factory=Nbd)
    migration: Migration = field(default_factory=Migration)
    rules: tuple[Rule, ...] = ()
    disks: tuple[Disk, ...] = ()
    further: tuple[Network, ...] = ()  # NICs of the guest besides `network`
    path: str | None = None  # where it was read from

    def differences(self, other: Config) -> list[str]:
        """The keys that differ, but for the policy, which can change while running."""
        mine, theirs = flat(self), flat(other)
        free = {"compare.arp", "compare.ndp", "compare.other"}
        found = [k for k in mine if mine[k] != theirs[k] and k not in free]
        found += ["network"] * (self.further != other.further)
        return found + ["disk"] * (self.disks != other.disks)

    @property
    def networks(self) -> tuple[Network, ...]:
        """The devices of each NIC of the guest, in the order of the file."""
        return (self.network, *self.further)

    @property
    def external_disks(self) -> tuple[str, ...]:
        """Names of the disks that something outside of colo_xdp keeps equal."""
        return tuple(d.name for d in self.disks if d.external)

    @property
    def replicated_disks(self) -> tuple[Disk, ...]:
        """The disks that the controllers keep equal."""
        return tuple(d for d in self.disks if not d.external)

    def migration_options(self, role: str) -> dict[str, Any]:
        """How this host's QEMU migrates while its guest has that role: the fields of
        qemu.migration.MigrationOptions."""
        m = self.migration
        return {
            "max_bandwidth": m.max_bandwidth << 20,
            "multifd": m.multifd,
            "tls_creds": m.tls_creds if role == "primary" else m.tls_creds_incoming,
            "tls_hostname": m.tls_hostname,
            # where a QEMU of this host waits, if it is told so
            "listen": self.qemu.reverse_uri if self.role == "primary" else self.qemu.migrate_uri,
        }

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

    def patience(self) -> Patience:
        """What the engines of a new pair share."""
        c = self.compare
        adaptive = c.wait == "adaptive"
        return Patience(c.compare_timeout * 1_000_000, c.min_wait * 1_000_000, adaptive=adaptive)

    def policy(self, nic: str = "") -> Policy:
        """What is compared at a NIC: the file's rules, then the defaults of [compare].

        An empty name means the first NIC.
        """
        c, name = self.compare, nic or self.network.name
        rules = tuple(r for r in self.rules if r.nic in ("", name))
        return Policy(rules, arp=c.arp, ndp=c.ndp, other=c.other)

    def policy_of_all(self) -> Policy:
        """All rules in their order, for reports."""
        c = self.compare
        return Policy(self.rules, arp=c.arp, ndp=c.ndp, other=c.other)


SECTIONS: dict[str, type[Any]] = {
    "network": Network,
    "qemu": Qemu,
    "peer": Peer,
    "compare": Compare,
    "checkpoint": CheckpointKeys,
    "failover": FailoverKeys,
    "datapath": DataPathKeys,
    "metrics": Metrics,
    "nbd": Nbd,
    "migration": Migration,
}


def flat(config: Config) -> dict[str, Any]:
    """All keys as `section.key`."""
    out = {k: getattr(config, k) for k in validate.keys(Config)}
    for name, cls in SECTIONS.items():
        out |= {f"{name}.{k}": getattr(getattr(config, name), k) for k in validate.keys(cls)}
    return out
