# SPDX-License-Identifier: GPL-2.0-or-later
"""Check what would keep a pair from working on this host, before anything depends on it.

`colo-xdp doctor` prints the findings; nothing is changed.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import validate
from ..config.file import Config, ConfigError, load
from ..config.network import Network
from ..qemu import disks, nic
from ..qemu.migration import MigrationOptions
from ..qemu.overlays import ReplicatedDisk, directory_trouble, overlay_paths, rooms

if TYPE_CHECKING:
    from ..datapath.devices import LinkInfo
    from ..qemu.nic import Multiqueue

OK, WARN, FAIL = 0, 1, 2
CERT_DAYS = 30
MIN_KERNEL = (5, 4)


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` says what to do about it."""

    name: str
    level: int
    text: str
    remedy: str = ""


def examine(path: Path) -> Iterator[Check]:
    """Run all checks for one config file, in the order in which they matter."""
    try:
        config = load(path)
    except (ConfigError, OSError) as e:
        yield Check("config", FAIL, str(e), "see `colo-xdp config check`")
        return
    yield Check("config", OK, f"pair {config.pair}, {config.role}")
    for check in CHECKS:
        yield from check(config)


def _machine(config: Config) -> Iterator[Check]:
    if os.geteuid():
        yield Check("root", FAIL, "not root", "run as root, or with the unit's capabilities")
    else:
        yield Check("root", OK, "yes")
    release = platform.release()
    version = tuple(int(x) for x in release.split("-")[0].split(".")[:2])
    if version < MIN_KERNEL:
        yield Check("kernel", FAIL, release, "5.4 at least; 5.8 for ring buffers")
    else:
        yield Check("kernel", OK, release)


def _compiler(config: Config) -> Iterator[Check]:
    from ..datapath import compiler, kernel_headers, loader, source

    try:
        bcc = compiler.import_bcc()
    except source.LoadError as e:
        yield Check("bcc", FAIL, str(e), "apt-get install python3-bpfcc")
        return
    yield Check("bcc", OK, f"{getattr(bcc, '__version__', '?')} ({bcc.__file__})")
    try:
        yield Check("kernel headers", OK, kernel_headers.find().origin)
    except kernel_headers.NoHeaders as e:
        yield Check("kernel headers", FAIL, str(e), "apt-get install linux-headers-$(uname -r)")
        return
    try:
        source.source_dir()
    except source.LoadError as e:
        yield Check("BPF sources", FAIL, str(e))
    if os.geteuid() == 0:
        if not loader.ring_supported():
            yield Check("ring buffer", WARN, "not on this kernel: perf buffers will be used")
        yield _compiled(config)


def _compiled(config: Config) -> Check:
    """Check whether a start or a change of roles would have to wait for the compiler."""
    from ..datapath import programs
    from ..datapath.cache import Cache

    cache = Cache()
    missing = sorted({s.role for s in programs.wanted(config) if cache.find(s) is None})
    if missing:
        return Check("programs", WARN, f"not compiled yet for: {', '.join(missing)}",
                     "colo-xdp compile (else the controller does it when it starts)")  # fmt: skip
    return Check("programs", OK, f"compiled for every role ({cache.where})")


def _offloads(offers: frozenset[str]) -> Iterator[Check]:
    """Check what becomes of offloads that the guest may use (`offers`, of qmp.HOST_OFFLOADS)."""
    from ..datapath import btf

    why = btf.why_not()
    if not why:
        try:
            btf.kernel_flags()
        except (btf.BtfError, OSError) as e:
            why = str(e)
    # A tunnel's inner segment size is carried nowhere; UDP's is, where BTF is available.
    lost = sorted(n for n in offers if n.startswith("host_tunnel") or why)
    if lost:
        yield Check("offloads", WARN, f"{', '.join(lost)}: frames that use it are dropped"
                    + (f" ({why})" if why else ""),
                    f"-device virtio-net-pci,...,{','.join(f'{n}=off' for n in lost)}")  # fmt: skip
    elif why:
        yield Check("offloads", WARN, f"{why}: UDP with a gso_size is dropped, and so are partial "
                    "checksums that are not TCP's or UDP's", "a kernel with BTF")  # fmt: skip
    else:
        yield Check("offloads", OK, "read from the kernel (BTF)")


def _bpffs(config: Config) -> Iterator[Check]:
    from ..datapath import syscall

    where = config.datapath.bpffs
    if syscall.is_bpffs(where):
        yield Check("bpffs", OK, where)
    else:
        yield Check("bpffs", WARN, f"{where} is not mounted", "`run` mounts it, or add it to fstab")


def _devices(config: Config) -> Iterator[Check]:
    for net in config.networks:
        for check in _nic(config, net):
            yield check if not config.further else replace(check, name=f"{check.name} ({net.name})")


def _nic(config: Config, net: Network) -> Iterator[Check]:
    """Check the devices of one NIC of the guest."""
    from ..datapath import attach, devices, syscall
    from ..datapath.hooks import TAG_BYTES
    from ..datapath.prepare import DataPathError, choose_hook

    try:
        tap = devices.link_info(net.tap)
    except devices.NoSuchDevice as e:
        yield Check("tap", FAIL, str(e), f"ip tuntap add dev {net.tap} mode tap vnet_hdr")
        return
    if tap.kind != "tun":
        yield Check("tap", FAIL, f"{net.tap} is a {tap.kind or 'physical device'}, not a tap")
        return
    yield Check("tap", OK, f"{net.tap}, vnet_hdr {'on' if tap.vnet_hdr else 'off'}, mtu {tap.mtu}")
    if config.role == "secondary":
        if tap.master:
            yield Check("isolation", FAIL, f"{net.tap} is in a bridge",
                        f"ip link set {net.tap} nomaster; it joins at failover")  # fmt: skip
        try:
            yield Check("hook", OK, choose_hook(net.hook, tap))
        except DataPathError as e:
            yield Check("hook", FAIL, str(e))
        if not net.bridge:
            yield Check("bridge", WARN, "none: after a failover the host must route for the guest")
    elif tap.master and not _decided(config):
        yield Check(
            "isolation", WARN, f"{net.tap} is in a bridge, but no controller has allowed its guest "
            "to transmit: after a boot it transmits even if the other guest does",
            f"ip link set {net.tap} nomaster, and set [network] bridge: the controller adds it",
        )  # fmt: skip
    elif not tap.master and not net.bridge:
        yield Check("bridge", WARN, f"{net.tap} is in no bridge, and none is configured",
                    "[network] bridge")  # fmt: skip
    yield from _spanning_tree(net.bridge, tap)
    if tap.xdp_prog_id and not attach.is_ours(tap.xdp_prog_id):
        name = syscall.prog_info_by_id(tap.xdp_prog_id).name
        yield Check("XDP", FAIL, f"{net.tap} has a program of another tool ({name})", "remove it")
    try:
        peer = devices.link_info(net.peer_link)
    except devices.NoSuchDevice as e:
        if net.vxlan_remote:
            yield Check("peer link", OK, f"{net.peer_link}: a VXLAN that `run` creates")
        else:
            yield Check("peer link", FAIL, str(e))
        return
    if net.vxlan_remote and peer.kind != "vxlan":
        yield Check("peer link", FAIL, f"{net.peer_link} exists and is not a VXLAN ({peer.kind})",
                    "another name for [network] peer_link, or no vxlan_remote")  # fmt: skip
    if not peer.up:
        yield Check(
            "peer link", FAIL, f"{net.peer_link} is down", f"ip link set {net.peer_link} up"
        )
    elif peer.mtu < tap.mtu + TAG_BYTES:
        yield Check("peer link", WARN, f"mtu {peer.mtu}, the tap's is {tap.mtu}",
                    f"at least {tap.mtu + TAG_BYTES}: frames carry a tag there")  # fmt: skip
    else:
        yield Check("peer link", OK, f"{net.peer_link}, mtu {peer.mtu}")


def _spanning_tree(bridge: str, tap: LinkInfo) -> Iterator[Check]:
    """Check STP: a port that has just joined a bridge listens and learns before it forwards."""
    from ..datapath.bridge import PORT_WAITS, port_state, spanning_tree
    from ..datapath.devices import NoSuchDevice

    if bridge:
        try:
            stp, delay = spanning_tree(bridge)
        except NoSuchDevice as e:
            yield Check("bridge", FAIL, str(e), f"ip link add {bridge} type bridge")
            return
        if stp == 1 and delay:
            yield Check(
                "bridge", FAIL,
                f"{bridge} has STP on: after a takeover the guest is cut off for {2 * delay:g} s",
                f"ip link set {bridge} type bridge stp_state 0",
            )  # fmt: skip
        elif stp and delay:
            yield Check(
                "bridge", WARN, f"a daemon runs STP on {bridge}: the tap must forward at once",
                f"mstpctl setportadminedge {bridge} {tap.name} yes, whenever the tap joins",
            )  # fmt: skip
        else:
            yield Check("bridge", OK, f"{bridge}, a port forwards as soon as it joins")
    state = port_state(tap.name)
    if state in PORT_WAITS:
        yield Check("bridge", FAIL, f"{tap.name} is {state} in its bridge: the guest is cut off",
                    "let STP forward on this port, or turn STP off")  # fmt: skip


def _decided(config: Config) -> bool:
    """Return whether a controller has pinned here that the primary's guest may transmit."""
    from ..abi import Cfg, Mode
    from ..datapath import loader

    pins = loader.pin_dir(config.datapath.bpffs, config.pair, config.role)
    return loader.pinned_slot(pins, Cfg.MODE) != Mode.DROP


def _neighbours(config: Config) -> Iterator[Check]:
    """Check for other pairs and other tools that use what this pair needs."""
    from ..datapath import attach
    from . import preflight

    clean = True
    devices = [dev for net in config.networks for dev in (net.tap, net.peer_link)]
    for dev, seen in attach.look(devices).items():
        if seen is None:
            continue
        why = attach.other_pair(dev, seen, config.pair)
        if why:
            clean = False
            yield Check("other pairs", FAIL, why)
            continue
        for first in filter(None, (attach.comes_first(dev, seen, d) for d in seen.filters)):
            clean = False
            yield Check("filters", FAIL, first)
    pid = preflight.running(config)
    found = preflight.conflicts(config)
    if pid:  # its own controller uses these ports
        own = [a for _, a, _ in preflight.ports(config)]
        found = [x for x in found if not any(f"{a}: in use by another socket" in x for a in own)]
    for text in found:
        yield Check("in use", FAIL, text)
    if clean and not found:
        who = f"; a controller of this pair runs (process {pid})" if pid else ""
        yield Check("other pairs", OK, f"none on {' and '.join(devices)}, ports free{who}")


def _qemu(config: Config) -> Iterator[Check]:
    from ..qemu.qmp import QmpError, probe, refusal

    try:
        info, blocks, cards = probe(
            config.qemu.qmp,
            config.qemu.qmp_timeout / 1000,
            [net.tap for net in config.networks],
            MigrationOptions(**config.migration_options(config.role)),
            primary=config.role == "primary",
        )
    except QmpError as e:
        yield Check("QEMU", FAIL, str(e),
                    f"-qmp unix:{config.qemu.qmp},server=on,wait=off (one client at a time: "
                    "a running controller occupies it)")  # fmt: skip
        return
    version = ".".join(map(str, info.version))
    why = refusal(info)
    if why:
        yield Check("QEMU", FAIL, why)
        return
    yield Check("QEMU", OK, f"{version}, {'KVM' if info.kvm else 'TCG'}, {info.status}")
    if info.trouble:
        yield Check("migration", FAIL, info.trouble)
    yield from _offloads(info.offers)
    if not info.kvm and info.version < (8, 0, 0):
        yield Check("QEMU", WARN, "COLO under TCG hangs with this version at the first checkpoint",
                    "use KVM, or for a test the shim in colo_xdp/lab/bqlshim.c")  # fmt: skip
    taps = {net.tap: net.guest_mac for net in config.networks}
    if why := nic.refusal(cards, taps):
        yield Check("NICs", FAIL, why)
    else:
        yield Check("NICs", OK, "each network card of the guest has a [network]")
    for tap, queues in info.queues.items():
        yield from _queues(queues, tap)
    yield from _vhost(config)
    yield from _disks(config, blocks)


def _queues(card: Multiqueue, tap: str) -> Iterator[Check]:
    """Check the queues between the guest and its tap."""
    from ..datapath import devices

    try:
        opened = devices.link_info(tap).queues
    except devices.NoSuchDevice:
        opened = 0
    found = card.obstacles()
    if opened > card.queues:
        yield Check(
            "queues", FAIL, f"{tap} has {opened} open, and QEMU {card.queues} of them: what the "
            "network sends to the guest may end up in another process",
            "end the other process that has opened the tap",
        )  # fmt: skip
    for text, remedy in found:
        yield Check("queues", WARN, text, remedy)
    if not found and opened <= card.queues:
        yield Check("queues", OK, f"{card.queues} between QEMU and {tap}")


def _vhost(config: Config) -> Iterator[Check]:
    """Check whether the kernel (vhost-net) moves the guest's frames in QEMU's place."""
    from . import vhost

    try:
        opened = vhost.opened(vhost.listener(config.qemu.qmp))
    except OSError as e:
        yield Check("vhost", WARN, f"not known: {e.strerror}")
        return
    if not opened:
        yield Check("vhost", OK, "off: QEMU itself moves the guest's frames")
        return
    if vhost.zero_copy():
        yield Check(
            "vhost", FAIL, "vhost_net sends from the guest's own memory: the guest can change a "
            "frame after it has been compared", "experimental_zcopytx=0 for the module vhost_net",
        )  # fmt: skip
    yield Check("vhost", WARN, f"on ({opened} queues): no release has been tried with it",
                "`colo-xdp vhost-drill` on this kind of host, or vhost=off")  # fmt: skip


def _migration_route(config: Config) -> Iterator[Check]:
    """Check what a checkpoint waits for on the migration channel."""
    from ..datapath.route import route_to

    address = migration_peer(config)
    route = route_to(address) if address else None
    if route is None:
        return
    if route.quickack:
        yield Check("migration", OK, f"the route to {address} has quickack")
    else:
        yield Check(
            "migration", WARN, f"the route to {address} ({route.dev}) has no quickack: each "
            "checkpoint over TCP takes some 40 ms longer (Nagle, delayed acknowledgements)",
            f"{route.with_quickack(address)}, on both hosts and at each boot "
            "(docs/operator/install.md)",
        )  # fmt: skip


def migration_peer(config: Config) -> str:
    """Return the IP address of the other host's QEMU, or "" if it is not reached by TCP."""
    q = config.qemu
    uri = q.migrate_uri if config.role == "primary" else q.reverse_uri
    if not uri and (not q.migrate_uri or q.migrate_uri.startswith("tcp:")):
        uri = f"tcp:{config.peer.remote}"
    end = validate.split(uri.removeprefix("tcp:")) if uri.startswith("tcp:") else None
    return "" if end is None or end[0].is_loopback else str(end[0])


def _disks(config: Config, blocks: Any) -> Iterator[Check]:
    names = [d.name for d in config.disks]
    found = disks.uncovered(blocks, names)
    for text in found:
        yield Check(
            "disk", FAIL, f"{text}, and nobody keeps its two copies equal",
            "remove it, or declare it with a [[disk]] (docs/operator/disks.md)",
        )  # fmt: skip
    for name in disks.missing(blocks, names):
        yield Check("disk", WARN, f"[[disk]] {name}: QEMU has no disk of that name")
    if not found:
        yield Check("disks", OK, "every writable disk has a [[disk]]")
    yield from _replication(config)


def _replication(config: Config) -> Iterator[Check]:
    """Check what replicated disks need on this host."""
    if config.replicated_disks and not shutil.which("qemu-img"):
        yield Check("disks", FAIL, "qemu-img is missing", "apt install qemu-utils")
    for d in config.replicated_disks:
        if why := directory_trouble(d.name, d.overlays):
            yield Check("disk", FAIL, why)
            return
    found = [
        ReplicatedDisk(d.name, d.overlays, d.overlay_limit << 20) for d in config.replicated_disks
    ]
    for room in rooms(found, lambda d: overlay_paths(config.pair, d)):
        names = ", ".join(room.disks)
        level = FAIL if room.trouble else OK
        yield Check("disk", level, room.trouble or f"{names}: room for overlays in {room.where}")


def _failover(config: Config) -> Iterator[Check]:
    f = config.failover
    if f.arbiter == "lease":
        from ..failover.etcd import Etcd, probe

        for url in f.etcd:
            why = probe(Etcd((url,), f.etcd_ca, f.etcd_cert, f.etcd_key), f.lease_ttl / 10_000)
            yield Check("etcd", WARN if why else OK, why or url,
                        "[failover] etcd: each endpoint should answer" if why else "")  # fmt: skip
    if f.automatic and f.arbiter == "fence":
        exe = f.fence[0]
        found = os.access(exe, os.X_OK) if "/" in exe else _which(exe)
        level = OK if found else FAIL
        yield Check("fence", level, f"{' '.join(f.fence)}{'' if found else ' is not executable'}")
    elif not f.automatic:
        yield Check("failover", WARN, "not automatic when the peer's host dies as a whole",
                    "[failover] automatic = true with an arbiter")  # fmt: skip


def _certificates(config: Config) -> Iterator[Check]:
    from ..peer.tls import Tls, TlsError, identity
    from . import pki

    p = config.peer
    if not p.cert:
        yield Check("peer channel", WARN, "not encrypted, not authenticated",
                    "`colo-xdp pki init` and `issue`, then [peer] cert, key and ca")  # fmt: skip
        return
    try:
        Tls(p.cert, p.key, p.ca, p.peer_cert, p.identity).context(server=True)
        mode = os.stat(p.key).st_mode & 0o077
        if mode:
            yield Check("certificate", WARN, f"{p.key} can be read by others", f"chmod 600 {p.key}")
        for path in filter(None, (p.cert, p.ca, p.peer_cert)):
            seen = pki.look(Path(path))
            days = (seen.ends.timestamp() - time.time()) / 86400
            text = f"{path} {'expires in' if days >= 0 else 'expired for'} {abs(days):.0f} days"
            level = FAIL if days < 0 else WARN if days < CERT_DAYS else OK
            yield Check("certificate", level, text, "" if days >= CERT_DAYS else "renew it")
        mine, want = pki.ours(pki.look(Path(p.cert))), identity(config.pair, config.role)
        if mine and mine != want:
            yield Check("certificate", FAIL, f"{p.cert} identifies {mine}, this host is {want}",
                        f"colo-xdp pki issue --role {config.role}")  # fmt: skip
    except (TlsError, pki.PkiError, OSError) as e:
        yield Check("certificate", FAIL, str(e), "[peer] cert, key, ca")


def _paths(config: Config) -> Iterator[Check]:
    from ..peer.heartbeat_links import links_of

    found = links_of(config)
    if not found:
        yield Check("heartbeats", WARN, "over the control channel only: if it is cut, a live peer "
                    "looks dead", "[peer] link_heartbeats or heartbeat_links")  # fmt: skip
    for link in found:
        try:
            link.open().close()
        except OSError as e:
            made = any(n.vxlan_remote and n.link_name == link.name for n in config.networks)
            if made and e.errno == errno.ENODEV:
                continue  # `run` creates it
            if e.errno != errno.EADDRINUSE:  # in use by a running controller
                yield Check(
                    "heartbeats", FAIL, f"{link.name}: {e.strerror}", "[peer] heartbeat_links"
                )
                continue
        yield Check("heartbeats", OK, f"also over {link.name}")


def _which(name: str) -> bool:
    return any(os.access(f"{d}/{name}", os.X_OK) for d in os.environ.get("PATH", "").split(":"))


CHECKS: tuple[Callable[[Config], Iterator[Check]], ...] = (
    _machine,
    _compiler,
    _bpffs,
    _devices,
    _neighbours,
    _qemu,
    _migration_route,
    _failover,
    _certificates,
    _paths,
)
