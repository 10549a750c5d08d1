# SPDX-License-Identifier: GPL-2.0-or-later
"""The keys of the configuration file: each declared once, with its default, its check and its help.

config/file.py reads a file into these, writes it, and makes the documentation of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .. import validate
from ..compare.limits import Limits
from ..compare.policy import Policy, Rule
from ..peer.messages import MIN_VERSION, VERSION

_DAY_MS = 86_400_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """[network]: devices of this host."""

    tap: str = validate.key(validate.device, "tap device of this host's guest")
    peer_link: str = validate.key(
        validate.device, "device that leads to the other host, for guest frames only"
    )
    vxlan_remote: str = validate.key(
        validate.or_empty(validate.ip, "peer_link exists"),
        "peer_link is a VXLAN to this address, made by the controller; encrypt what is below it",
        default="",
    )
    vxlan_local: str = validate.key(
        validate.or_empty(validate.ip, "the kernel chooses"),
        "this host's address of that VXLAN",
        default="",
    )
    vxlan_vni: int = validate.key(
        validate.integer(1, (1 << 24) - 1, "(a VNI)"),
        "its number, the same on both hosts, another one for each pair",
        default=9846,
    )
    vxlan_port: int = validate.key(
        validate.integer(1, 65535, "(a port)"), "its UDP port", default=4789
    )
    bridge: str = validate.key(
        validate.or_empty(validate.device, "none"),
        'bridge that the tap joins as soon as the guest may speak; "": the host routes, or the tap '
        "is in a bridge by hand (primary only)",
        default="",
    )
    uplink: str = validate.key(
        validate.device,
        "how the fast path's frames leave; auto: by the bridge's port where the client was last "
        "heard, if the bridge does not filter; bridge: through it; a device: there, always",
        default="auto",
    )
    hook: str = validate.key(
        validate.choice("auto", "xdp", "tc"),
        "where the secondary guest's output is met; auto: xdp if the tap has no vnet_hdr, else tc",
        default="auto",
    )
    guest_mac: str = validate.key(
        validate.or_empty(validate.mac, "QEMU is asked"),
        'the guest\'s MAC address, announced at a takeover; "": QEMU is asked',
        default="",
    )
    guest_addresses: tuple[str, ...] = validate.key(
        validate.ip_addresses,
        "addresses of the guest that are announced at a takeover, besides those that it has itself "
        "said to have (ARP, neighbour discovery)",
        default=(),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Qemu:
    """[qemu]: QMP and migration. Times in ms."""

    qmp: str = validate.key(validate.socket_path, "unix socket of this host's QEMU (QMP)")
    qmp_oob: str = validate.key(
        validate.or_empty(validate.socket_path, "the first one's"),
        "second QMP socket, for the way past a hung main loop (yank)",
        default="",
    )
    migrate_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.2:4444"
            ),
            "secondary",
        ),
        "where the secondary's QEMU waits (-incoming); required on the primary",
        default="",
    )
    reverse_uri: str = validate.key(
        validate.or_empty(
            validate.pattern(
                r"(tcp|unix|rdma|fd|exec|vsock):.+", "a migration URI such as tcp:10.0.0.1:4444"
            ),
            "the survivor of the primary stays alone",
        ),
        "where the primary host's QEMU waits (-incoming) after a takeover, to become the new "
        "secondary; needed on the secondary",
        default="",
    )
    incoming: tuple[str, ...] = validate.key(
        validate.argv,
        "command (argv, no shell) that starts this host's QEMU anew with -incoming, and ends what "
        "is left of the old one; run when its guest is worthless and the other one speaks",
        default=(),
    )
    qmp_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"), "deadline of one QMP command", default=5000, unit="ms"
    )
    enter_timeout: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "deadline of the first synchronisation (all of the guest's memory is copied)",
        default=120_000,
        unit="ms",
    )
    enter_stop: int = validate.key(
        validate.integer(100, 600_000, "ms"),
        "how long the guest may stand still for it; then it is given up, and the guest runs on",
        default=5000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """[[disk]]: a disk of the guest that both hosts may write to."""

    name: str = validate.key(
        validate.pattern(r"[!-~]{1,255}", "a name (1 to 255 printable characters)"),
        "QEMU's name of the disk: drive id, node name, or device id",
    )
    external: bool = validate.key(
        lambda v: None if v is True else "expected true: there is no other kind in this release",
        "true: its two copies are kept equal by somebody else, on your word",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """[peer]: the control channel. Times in ms."""

    local: str = validate.key(
        validate.address, "this controller's address; the secondary listens on it"
    )
    remote: str = validate.key(
        validate.address,
        "the other controller's address: the primary connects to it, the secondary accepts it only",
    )
    cert: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "this host's certificate (PEM), with key and one of ca, peer_cert",
        default="",
    )
    key: str = validate.key(
        validate.or_empty(validate.path, "no TLS"), "private key of cert (PEM)", default=""
    )
    ca: str = validate.key(
        validate.or_empty(validate.path, "peer_cert decides"),
        "the authority (PEM) whose certificates are accepted, if they carry the right identity",
        default="",
    )
    identity: str = validate.key(
        validate.or_empty(validate.identity, "colo-xdp://PAIR/ROLE, as `colo-xdp pki` writes it"),
        "with ca: who the peer's certificate has to name, as URI, DNS name or CN",
        default="",
    )
    peer_cert: str = validate.key(
        validate.or_empty(validate.path, "ca decides"),
        "the other host's certificate, then the only one accepted",
        default="",
    )
    min_version: int = validate.key(
        validate.integer(MIN_VERSION, VERSION, "versions"),
        "oldest version of the protocol that is spoken with the peer",
        default=MIN_VERSION,
    )
    insecure: bool = validate.key(
        validate.boolean,
        "allow a channel without TLS between two hosts (laboratory only)",
        default=False,
    )
    heartbeat_interval: int = validate.key(
        validate.integer(10, 60_000, "ms"), "time between two heartbeats", default=100, unit="ms"
    )
    link_heartbeats: bool = validate.key(
        validate.boolean,
        "heartbeats also go over network.peer_link, in frames of their own (ethertype 0x88B5)",
        default=True,
    )
    heartbeat_links: tuple[str, ...] = validate.key(
        validate.heartbeat_links,
        'and over these (UDP): "local:port->remote:port", on the other host the other way round',
        default=(),
    )
    dead_after: int = validate.key(
        validate.integer(100, _DAY_MS, "ms"),
        "silence on all paths after which a peer that gives no other sign is fenced; the secondary "
        "waits twice",
        default=5000,
        unit="ms",
    )
    heartbeat_timeout: int = validate.key(
        validate.integer(30, 600_000, "ms"),
        "silence after which the peer is suspected; at least 3 heartbeat_interval",
        default=1000,
        unit="ms",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """[compare]: the engine. Times in ms."""

    compare_timeout: int = validate.key(
        validate.integer(1, 600_000, "ms"),
        "how long a frame may wait for its twin before a checkpoint is asked for",
        default=3000,
        unit="ms",
    )
    expired_scan_cycle: int = validate.key(
        validate.integer(1, 600_000, "ms"), "period of the ageing of flows", default=1000, unit="ms"
    )
    max_queue_size: int = validate.key(
        validate.integer(1, 1 << 20, "packets"),
        "frames held before a checkpoint is asked for, per guest",
        default=1024,
        unit="packets",
    )
    max_stream_bytes: int = validate.key(
        validate.integer(65536, 1 << 30, "bytes"),
        "how far the secondary guest may be ahead in one connection",
        default=4 << 20,
        unit="bytes",
    )
    max_flows: int = validate.key(
        validate.integer(16, 1 << 24, "flows"),
        "connections the engine keeps",
        default=100_000,
        unit="flows",
    )
    max_held_bytes: int = validate.key(
        validate.integer(1 << 20, 1 << 34, "bytes"),
        "bytes of frames held before a checkpoint is asked for",
        default=64 << 20,
        unit="bytes",
    )
    arp: str = validate.key(
        validate.choice("pass", "compare"), "ARP: released at once, or compared", default="pass"
    )
    ndp: str = validate.key(
        validate.choice("pass", "compare"),
        "IPv6 neighbour discovery, MLD, IGMP: released, or compared",
        default="pass",
    )
    other: str = validate.key(
        validate.choice("pass", "compare"),
        "other protocols: released, or compared",
        default="compare",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointKeys:
    """[checkpoint]. Times in ms."""

    deadline: int = validate.key(
        validate.integer(1, _DAY_MS, "ms"),
        "a checkpoint that takes longer has failed",
        default=10_000,
        unit="ms",
    )
    periodic: int = validate.key(
        validate.integer(0, _DAY_MS, "ms"),
        "a checkpoint at least this often; 0: never",
        default=0,
        unit="ms",
    )
    share: int = validate.key(
        validate.integer(1, 100, "per cent"),
        "time that checkpoints may take at most, over any longer while; those that are asked for "
        "beyond wait, by compare_timeout at most",
        default=50,
        unit="per cent",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FailoverKeys:
    """[failover]. Times in ms."""

    automatic: bool = validate.key(
        validate.boolean,
        "fail over without a person; requires an arbiter but manual",
        default=False,
    )
    arbiter: str = validate.key(
        validate.choice("fence", "lease", "manual"),
        "what makes sure that only one guest speaks: the fence command, a lease in etcd, a person",
        default="fence",
    )
    fence: tuple[str, ...] = validate.key(
        validate.argv,
        "command (argv, no shell) that makes the peer silent for certain; exit status 0 is success",
        default=(),
    )
    fence_timeout: int = validate.key(
        validate.integer(1, 3_600_000, "ms"),
        "a fence command that takes longer has failed",
        default=30_000,
        unit="ms",
    )
    etcd: tuple[str, ...] = validate.key(
        validate.urls, "endpoints of the etcd cluster that holds the lease", default=()
    )
    etcd_ca: str = validate.key(
        validate.or_empty(validate.path, "the system's"), "its authority (PEM)", default=""
    )
    etcd_cert: str = validate.key(
        validate.or_empty(validate.path, "none"), "certificate (PEM) to show it", default=""
    )
    etcd_key: str = validate.key(
        validate.or_empty(validate.path, "none"), "private key of etcd_cert (PEM)", default=""
    )
    lease_ttl: int = validate.key(
        validate.integer(2000, 600_000, "ms"),
        "how long a lease holds without renewal; the other host waits as long; whole seconds",
        default=5000,
        unit="ms",
    )
    lease_margin: int = validate.key(
        validate.integer(100, 300_000, "ms"),
        "how much earlier the holder falls silent; at most half of lease_ttl",
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
        "connections the secondary's rewriter tracks, and as many handshakes",
        default=65_536,
        unit="entries",
    )
    fast_path: str = validate.key(
        validate.choice("on", "off"),
        "established TCP is compared in the kernel (needs Linux 5.12)",
        default="on",
    )
    fast_path_memory: int = validate.key(
        validate.integer(1, 1 << 16, "MiB"),
        "memory for what one guest is ahead in it, 512 KiB per connection while it is",
        default=256,
        unit="MiB",
    )
    fast_path_flows: int = validate.key(
        validate.integer(16, 1 << 24, "entries"),
        "connections it knows; 350 bytes each when used",
        default=1_000_000,
        unit="entries",
    )
    on_controller_loss: str = validate.key(
        validate.choice("hold", "release"),
        "what the programs do with output while no controller lives",
        default="hold",
    )
    controller_loss: int = validate.key(
        validate.integer(50, 3_600_000, "ms"),
        "silence of the controller after which the programs count it as lost",
        default=1000,
        unit="ms",
    )
    bpffs: str = validate.key(
        validate.directory,
        "bpf file system where programs and maps are pinned",
        default="/sys/fs/bpf",
    )
    run_dir: str = validate.key(
        validate.directory, "directory of the control socket and the list of what is attached",
        default="/run/colo-xdp",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Metrics:
    """[metrics]: the Prometheus endpoint."""

    listen: str = validate.key(
        validate.or_empty(validate.address, "off"),
        'address of the endpoint; "": off',
        default="127.0.0.1:9847",
    )
    cert: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "certificate (PEM) of the endpoint, with key and client_ca: HTTPS",
        default="",
    )
    key: str = validate.key(
        validate.or_empty(validate.path, "no TLS"), "private key of cert (PEM)", default=""
    )
    client_ca: str = validate.key(
        validate.or_empty(validate.path, "no TLS"),
        "the authority (PEM) of those who may read",
        default="",
    )
    allow_remote: bool = validate.key(
        validate.boolean,
        "allow an address that is not loopback without TLS: everybody there can read",
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
        validate.choice("primary", "secondary"), "which guest this host runs"
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
    disks: tuple[Disk, ...] = ()
    path: str | None = None  # where it was read from

    def differences(self, other: Config) -> list[str]:
        """The keys that differ, but for the policy, which can change while running."""
        mine, theirs = flat(self), flat(other)
        free = {"compare.arp", "compare.ndp", "compare.other"}
        found = [k for k in mine if mine[k] != theirs[k] and k not in free]
        return found + ["disk"] * (self.disks != other.disks)

    @property
    def external_disks(self) -> tuple[str, ...]:
        """Names of the disks that are somebody else's affair."""
        return tuple(d.name for d in self.disks)

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


SECTIONS: dict[str, type[Any]] = {
    "network": Network,
    "qemu": Qemu,
    "peer": Peer,
    "compare": Compare,
    "checkpoint": CheckpointKeys,
    "failover": FailoverKeys,
    "datapath": DataPathKeys,
    "metrics": Metrics,
}


def flat(config: Config) -> dict[str, Any]:
    """All keys as `section.key`."""
    out = {k: getattr(config, k) for k in validate.keys(Config)}
    for name, cls in SECTIONS.items():
        out |= {f"{name}.{k}": getattr(getattr(config, name), k) for k in validate.keys(cls)}
    return out
