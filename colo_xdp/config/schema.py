# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of the configuration file: each declared once, with its default, its check and its help.

config/file.py reads a file into these and writes it; tests/docs/generate.py makes
docs/reference/config.md of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .. import validate
from ..compare.limits import Limits
from ..compare.patience import Patience
from ..compare.policy import Policy, Rule
from ..peer.messages import MIN_VERSION, VERSION

_DAY_MS = 86_400_000
DEFAULT_NIC = "net0"
_QOM_ID = validate.pattern(r"[A-Za-z][A-Za-z0-9._-]{0,254}", "the id of a QEMU object")


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """[network]: the devices of this host; a [[network]] for each NIC of a guest with several."""

    name: str = validate.key(
        validate.pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -"),
        "name of the NIC, the same on both hosts; required with several NICs",
        default=DEFAULT_NIC,
    )
    tap: str = validate.key(
        validate.device,
        "tap device of this host's guest",
    )
    peer_link: str = validate.key(
        validate.device,
        "device that leads to the other host; it carries the guests' frames",
    )
    vxlan_remote: str = validate.key(
        validate.or_empty(validate.ip, "peer_link exists already"),
        "remote address of a VXLAN that the controller creates and uses as peer_link; a VXLAN "
        "is not encrypted, so encrypt the network below it",
        default="",
    )
    vxlan_local: str = validate.key(
        validate.or_empty(validate.ip, "the kernel chooses it"),
        "this host's address of that VXLAN",
        default="",
    )
    vxlan_vni: int = validate.key(
        validate.integer(1, (1 << 24) - 1, "(a VNI)"),
        "VNI of that VXLAN: the same on both hosts, and a different one for each pair",
        default=9846,
    )
    vxlan_port: int = validate.key(
        validate.integer(1, 65535, "(a port)"),
        "UDP port of that VXLAN",
        default=4789,
    )
    bridge: str = validate.key(
        validate.or_empty(validate.device, "none"),
        'bridge that the tap joins as soon as the guest may transmit; "": the host routes the '
        "traffic, or the tap is added to a bridge by hand (primary host only)",
        default="",
    )
    uplink: str = validate.key(
        validate.device,
        'how frames released by the fast path leave; "auto": directly by the bridge port '
        'where the client was last seen, if the bridge filters nothing; "bridge": through the '
        "bridge; a device name: always by that device",
        default="auto",
    )
    hook: str = validate.key(
        validate.choice("auto", "xdp", "tc"),
        'where the secondary guest\'s output is intercepted; "auto": XDP if the tap has no '
        "vnet_hdr, else tc",
        default="auto",
    )
    guest_mac: str = validate.key(
        validate.or_empty(validate.mac, "the controller asks QEMU"),
        'MAC address of the guest, announced at a takeover; "": the controller asks QEMU',
        default="",
    )
    guest_addresses: tuple[str, ...] = validate.key(
        validate.ip_addresses,
        "IP addresses of the guest that are announced at a takeover, in addition to those "
        "that the guest has claimed itself by ARP or neighbor discovery",
        default=(),
    )

    @property
    def link_name(self) -> str:
        """The name of the peer link among the heartbeat links."""
        return "peer link" if self.name == DEFAULT_NIC else f"peer link {self.name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """[qemu]: QMP and migration. Times in ms."""

    qmp: str = validate.key(
        validate.socket_path,
        "unix socket of this host's QEMU (QMP)",
    )
    qmp_oob: str = validate.key(
        validate.or_empty(validate.socket_path, "the same socket as qmp"),
        "second QMP socket, for the out-of-band `yank` that frees a QEMU whose main loop hangs",
        default="",
    )
    migrate_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.2:4444"
            ),
            "on the secondary",
        ),
        "where the secondary's QEMU waits (its -incoming); required on the primary, and on the "
        "secondary with multifd",
        default="",
    )
    reverse_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.1:4444"
            ),
            "a survivor on this host stays alone",
        ),
        "where the primary host's QEMU waits (its -incoming) after a takeover, to become the "
        "new secondary; needed on the secondary",
        default="",
    )
    incoming: tuple[str, ...] = validate.key(
        validate.argv,
        "command (argv, no shell) that restarts this host's QEMU with -incoming and ends what "
        "is left of the old one; run when the other host's guest serves the clients and this host "
        "has no usable copy of it: its own guest is outdated, or the copy's QEMU has exited",
        default=(),
    )
    qmp_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "deadline of one QMP command",
        default=5000,
        unit="ms",
    )
    enter_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "deadline of the first synchronization, which copies all of the guest's memory",
        default=120_000,
        unit="ms",
    )
    enter_stop: int = validate.key(
        validate.integer(100, 600_000, "ms"),
        "how long the first synchronization may stop the guest; after that it is abandoned "
        "and the guest runs on",
        default=5000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Migration:
    """[migration]: parameters of QEMU's migration channel, which checkpoints use too."""

    max_bandwidth: int = validate.key(
        validate.integer(0, 1 << 20, "MiB/s"),
        "upper limit of the rate at which QEMU sends the guest's memory; 0: none",
        default=0,
        unit="MiB/s",
    )
    multifd: int = validate.key(
        validate.integer(0, 255, "channels"),
        "number of further connections that carry the guest's memory (QEMU's multifd), the same "
        "on both hosts; 0: off; needs QEMU 11, and `-incoming defer`",
        default=0,
        unit="channels",
    )
    tls_creds: str = validate.key(
        validate.or_empty(_QOM_ID, "those that QEMU has been given otherwise, if any"),
        "id of the TLS credentials (`-object tls-creds-...,endpoint=client`) with which this "
        "host's QEMU sends its guest's state",
        default="",
    )
    tls_creds_incoming: str = validate.key(
        validate.or_empty(_QOM_ID, "without tls_creds"),
        "id of those with which it receives the other guest's (endpoint=server); required with "
        "tls_creds, since the guests may change places",
        default="",
    )
    tls_hostname: str = validate.key(
        validate.or_empty(
            validate.pattern(r"[!-~]{1,255}", "a host name"), "the host in the migration URI"
        ),
        "name that the certificate of the other host's QEMU must carry",
        default="",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """[[disk]]: a writable disk of the guest."""

    name: str = validate.key(
        validate.pattern(r"[!-~]{1,255}", "a name (1 to 255 printable characters)"),
        "QEMU's name of the disk, the same on both hosts: drive id, node name or device id; also "
        "the name of its NBD export",
    )
    overlays: str = validate.key(
        validate.or_empty(validate.directory, "with external = true"),
        "directory of this host in which QEMU may make files, for the overlays (active and hidden "
        "disk) that the secondary guest needs; they grow by what is written between two "
        "checkpoints",
        default="",
    )
    overlay_limit: int = validate.key(
        validate.integer(1, 1 << 24, "MiB"),
        "size of an overlay at which a checkpoint is requested, which empties both overlays of "
        "the disk",
        default=256,
        unit="MiB",
    )
    external: bool = validate.key(
        validate.boolean,
        "you guarantee that something else keeps the two copies of the disk identical, and "
        "nothing is done for it",
        default=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Nbd:
    """[nbd]: how the primary's writes reach the secondary's disks; needed with a [[disk]]."""

    local: str = validate.key(
        validate.or_empty(validate.address, "no disk is replicated"),
        "address where this host's QEMU serves its images while its guest is the secondary",
        default="",
    )
    remote: str = validate.key(
        validate.or_empty(validate.address, "no disk is replicated"),
        "the same of the other host's QEMU",
        default="",
    )
    speed: int = validate.key(
        validate.integer(0, 1 << 20, "MiB/s"),
        "upper limit of the rate at which a disk is copied before the pair is protected; 0: none",
        default=0,
        unit="MiB/s",
    )
    write_timeout: int = validate.key(
        validate.integer(100, 600_000, "ms"),
        "how long writes of the guest may wait for the secondary's image, none of them ending, "
        "before the secondary is given up; 15 s at least while a disk is copied",
        default=2000,
        unit="ms",
    )


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
        "memory for the buffers of the fast path: 512 KiB for each connection in which one "
        "guest is ahead, as long as it is ahead",
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All of one file. Times in ms; what was not written has its default."""

    pair: str = validate.key(
        validate.pattern(r"[a-z0-9-]{1,10}", "1 to 10 of a-z, 0-9 and -"),
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
