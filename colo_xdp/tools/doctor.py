# SPDX-License-Identifier: GPL-2.0-or-later
"""Check what would keep a pair from working on this host, before anything depends on it.

`colo-xdp doctor` prints the findings; nothing is changed. Beside a running controller its status is
asked in place of what it occupies: QEMU's monitor, its ports, its programs.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__, validate
from ..config.file import Config, ConfigError, load
from ..qemu.migration import MigrationOptions
from . import guest_checks, host_checks, host_facts, sockets, unit_checks, unit_facts
from .findings import FAIL, OK, WARN, Check, Report, key_mode, quickack, run_dir

if TYPE_CHECKING:
    from ..qemu.survey import Survey

CERT_DAYS = 30
MIN_KERNEL = (5, 4)
GOOD = ("protected", "checkpointing", "paused", "shadow")
ALONE = ("starting", "solo", "promoted")


@dataclass(frozen=True, slots=True)
class Beside:
    """What the running controller of this pair has said.

    `survey`: of its QEMU; None: it could not ask, and `why` says why.
    """

    pid: int
    status: Mapping[str, Any]
    survey: Survey | None = None
    why: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """One host, and what is known of it before the first check.

    `pid`: of the controller of this pair that runs here; 0: none, -1: unknown. `before_start`: QEMU
    and the controller are not to run yet.
    """

    config: Config
    beside: Beside | None = None
    pid: int = 0
    before_start: bool = False
    units: unit_facts.UnitFacts = field(default_factory=lambda: unit_facts.UnitFacts(False))


def examine(
    path: Path, beside: Beside | None = None, *, before_start: bool = False
) -> Iterator[Check]:
    """Run all checks for one config file, in the order in which they matter."""
    from . import preflight

    try:
        config = load(path)
    except (ConfigError, OSError) as e:
        yield Check("config", FAIL, str(e), "see `colo-xdp config check`")
        return
    yield Check("config", OK, f"pair {config.pair}, {config.role}")
    pid = beside.pid if beside else preflight.running(config)
    units = unit_facts.gather(config.pair, config.qemu.qmp)
    patient = Patient(config, beside, pid, before_start, units)
    for check in CHECKS:
        yield from check(patient)


def report(path: Path, checks: list[Check], *, controller: bool) -> Report:
    """Put the findings about one file together."""
    try:
        config = load(path)
        who: tuple[str, str] = (config.pair, config.role)
    except (ConfigError, OSError):
        who = path.stem, "?"
    return Report(*who, host_facts.hostname(), __version__, controller, tuple(checks))


def _machine(p: Patient) -> Iterator[Check]:
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
    yield host_checks.clock(host_facts.clock_is_set())


def _compiler(p: Patient) -> Iterator[Check]:
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
        yield Check("BPF sources", FAIL, str(e), "make install")
    if os.geteuid() == 0:
        if not loader.ring_supported():
            yield Check("ring buffer", WARN, "not on this kernel: perf buffers will be used",
                        "Linux 5.8 or newer")  # fmt: skip
        yield _compiled(p.config)


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


def _directories(p: Patient) -> Iterator[Check]:
    from ..datapath import syscall

    d = p.config.datapath
    if syscall.is_bpffs(d.bpffs):
        yield Check("bpffs", OK, d.bpffs)
    else:
        yield Check(
            "bpffs", WARN, f"{d.bpffs} is not mounted", "`run` mounts it, or add it to fstab"
        )
    if os.path.isdir(d.run_dir):
        yield Check("run_dir", OK, d.run_dir)
    elif p.units.booted and d.run_dir == "/run/colo-xdp":
        yield Check("run_dir", OK, f"{d.run_dir}: the unit creates it")
    else:
        fix = run_dir(d.run_dir)
        remedy = f"{fix.command} (`run` does it)"
        yield Check("run_dir", WARN, f"{d.run_dir} does not exist", remedy, fix)


def _unit(p: Patient) -> Iterator[Check]:
    needed = unit_checks.families(link_heartbeats=p.config.peer.link_heartbeats)
    path = str(Path(p.config.path).absolute()) if p.config.path else ""
    yield from unit_checks.judge(p.units, path, __version__, needed, before_start=p.before_start)


def _controller(p: Patient) -> Iterator[Check]:
    """Check what the running controller says of itself."""
    if p.beside is None:
        if p.pid:
            yield Check(
                "controller", FAIL, f"{_process(p.pid)} runs for this pair and does not answer at "
                f"{control_socket(p.config)}", f"systemctl restart colo-xdp@{p.config.pair}",
            )  # fmt: skip
        else:
            yield Check("controller", OK, "none runs here: what only it can tell was not asked")
        return
    s = p.beside.status
    state, who = s["state"], _process(p.beside.pid)
    level = OK if state in GOOD else WARN if state in ALONE else FAIL
    yield Check("controller", level, f"{who}: {state}: {s['reason']}",
                "" if level == OK else "docs/operator/troubleshooting.md")  # fmt: skip
    if trouble := s["data_path"]["trouble"]:
        yield Check("data path", FAIL, f"{trouble}{host_checks.BY}",
                    "docs/operator/troubleshooting.md, Devices and other tools")  # fmt: skip
    else:
        yield Check("data path", OK, f"programs and devices are there{host_checks.BY}")
    for failure in s["failures"][-3:]:
        yield Check("controller", WARN, f"internal error: {failure[:300]}",
                    f"journalctl -u colo-xdp@{p.config.pair}; please report it")  # fmt: skip


def _process(pid: int) -> str:
    return f"process {pid}" if pid > 0 else "a controller"


def control_socket(config: Config) -> str:
    """Return the path at which the controller of this file serves."""
    return f"{config.datapath.run_dir}/{config.pair}.{config.role}.sock"


def standing(p: Patient) -> host_facts.Standing:
    """Return what this host's guest is now."""
    if p.beside:
        s = p.beside.status
        return host_facts.standing(p.config, p.pid, s["role"], s["mode"])
    return host_facts.standing(p.config, p.pid)


def _devices(p: Patient) -> Iterator[Check]:
    yield from host_checks.nics(p.config, host_facts.gather(p.config), standing(p))


def _addresses(p: Patient) -> Iterator[Check]:
    from ..datapath import route

    yield from host_checks.addresses(p.config, route.own_addresses())


def _neighbours(p: Patient) -> Iterator[Check]:
    """Check for other pairs and other tools that use what this pair needs."""
    from ..datapath import attach
    from . import preflight

    clean, config = True, p.config
    devices = [dev for net in config.networks for dev in (net.tap, net.peer_link)]
    for dev, seen in attach.look(devices).items():
        if seen is None:
            continue
        why = attach.other_pair(dev, seen, config.pair)
        if why:
            clean = False
            yield Check(
                "other pairs", FAIL, why, "docs/operator/networks.md, Two pairs on one host"
            )
            continue
        for first in filter(None, (attach.comes_first(dev, seen, d) for d in seen.filters)):
            clean = False
            yield Check("filters", FAIL, first, f"tc filter show dev {dev} ingress (egress)")
    found = preflight.conflicts(config, runs=bool(p.pid))
    for text in found:
        yield Check("in use", FAIL, text, "another value for the key, here or in the other file")
    if clean and not found:
        who = f"; a controller of this pair runs ({_process(p.pid)})" if p.pid else ""
        yield Check("other pairs", OK, f"none on {' and '.join(devices)}, ports free{who}")


def _qemu(p: Patient) -> Iterator[Check]:
    from ..qemu.qmp import QmpError
    from ..qemu.survey import probe

    config = p.config
    start = unit_checks.start_of_guest(
        p.units, p.beside.status["role"] if p.beside else config.role
    )
    if p.beside:
        if p.beside.survey:
            yield from guest_checks.judge(config, p.beside.survey, host_checks.BY)
        elif p.beside.status["qemu"]["connected"]:
            yield Check(
                "QEMU", WARN, f"{p.beside.why}{host_checks.BY}", "try again; QEMU may be busy"
            )
        else:
            yield Check("QEMU", FAIL, f"it does not run, or its monitor {config.qemu.qmp} is busy"
                        f"{host_checks.BY}", start)  # fmt: skip
        return
    if p.pid:
        yield Check("QEMU", WARN, "not asked: the controller has its monitor, and does not answer")
        return
    try:
        survey = probe(
            config.qemu.qmp,
            config.qemu.qmp_timeout / 1000,
            [net.tap for net in config.networks],
            MigrationOptions(**config.migration_options(config.role)),
            primary=config.role == "primary",
        )
    except QmpError as e:
        yield no_qemu(config.qemu.qmp, str(e), sockets.listener(config.qemu.qmp), start,
                      before_start=p.before_start)  # fmt: skip
        if not sockets.listener(config.qemu.qmp):
            yield from _waiting_ports(config)
        return
    yield from guest_checks.judge(config, survey, "")


def no_qemu(path: str, why: str, pid: int, start: str, *, before_start: bool) -> Check:
    """Judge that QEMU has not answered. `pid`: of the process that listens there; 0: none."""
    if pid:
        return Check(
            "QEMU", FAIL, f"{sockets.named(pid)} does not answer at {path}: {why}",
            "a monitor serves one client: end the other one (a tool, a libvirt), or give it a -qmp "
            "of its own",
        )  # fmt: skip
    level = WARN if before_start else FAIL
    return Check("QEMU", level, f"it does not run yet: nobody listens at {path}", start)


def _waiting_ports(config: Config) -> Iterator[Check]:
    """Check the ports on which this host's QEMU will wait for the other one."""
    import socket

    from . import preflight

    q = config.qemu
    uri = q.migrate_uri if config.role == "secondary" else q.reverse_uri
    ends = [("the migration", uri.removeprefix("tcp:"))] if uri.startswith("tcp:") else []
    ends += [("[nbd] local", config.nbd.local)] if config.nbd.local else []
    for what, text in ends:
        end = validate.split(text)
        if end and preflight.is_taken(text, socket.SOCK_STREAM):
            who = sockets.user_of(str(end[0]), end[1], socket.SOCK_STREAM) or "another socket"
            yield Check("in use", FAIL, f"{what} {text}: in use by {who}, and QEMU needs it",
                        "end that process, or use another port in both files")  # fmt: skip


def _other_host(p: Patient) -> Iterator[Check]:
    """Check whether the hosts reach each other, in both directions if controllers run."""
    from ..datapath import firewall
    from . import reach

    proven = False
    if p.beside:
        proven = bool(p.beside.status["peer"]["connected"])
        yield from host_checks.by_controller(p.config, p.beside.status)
    else:
        yield host_checks.reached(p.config, reach.control_channel(p.config))
    yield from host_checks.firewall(p.config, firewall.dropping(), proven=proven)


def _migration_route(p: Patient) -> Iterator[Check]:
    """Check what a checkpoint waits for on the migration channel."""
    from ..datapath.route import has_own_route, route_to

    address = migration_peer(p.config)
    route = route_to(address) if address else None
    if route is None:
        return
    if route.quickack:
        yield Check("migration", OK, f"the route to {address} has quickack")
    else:
        command = route.with_quickack(address)
        yield Check(
            "migration", WARN, f"the route to {address} ({route.dev}) has no quickack: each "
            "checkpoint over TCP takes some 40 ms longer (Nagle, delayed acknowledgements)",
            f"{command}, on both hosts and at each boot (docs/operator/install.md)",
            # One that is there would be replaced, and --fix could not give it back.
            None if has_own_route(address) else quickack(address, command),
        )  # fmt: skip


def migration_peer(config: Config) -> str:
    """Return the IP address of the other host's QEMU, or "" if it is not reached by TCP."""
    q = config.qemu
    uri = q.migrate_uri if config.role == "primary" else q.reverse_uri
    if not uri and (not q.migrate_uri or q.migrate_uri.startswith("tcp:")):
        uri = f"tcp:{config.peer.remote}"
    end = validate.split(uri.removeprefix("tcp:")) if uri.startswith("tcp:") else None
    return "" if end is None or end[0].is_loopback else str(end[0])


def _failover(p: Patient) -> Iterator[Check]:
    f = p.config.failover
    if f.arbiter == "lease":
        from ..failover.etcd import Etcd, probe

        for url in f.etcd:
            why = probe(Etcd((url,), f.etcd_ca, f.etcd_cert, f.etcd_key), f.lease_ttl / 10_000)
            yield Check("etcd", WARN if why else OK, why or url,
                        "[failover] etcd: each endpoint should answer" if why else "")  # fmt: skip
    if f.automatic and f.arbiter == "fence":
        exe = f.fence[0]
        found = shutil.which(exe) is not None
        level = OK if found else FAIL
        yield Check("fence", level, f"{' '.join(f.fence)}{'' if found else ' is not executable'}",
                    "" if found else "[failover] fence: a program of this host")  # fmt: skip
    elif not f.automatic:
        yield Check("failover", WARN, "not automatic when the peer's host dies as a whole",
                    "[failover] automatic = true with an arbiter")  # fmt: skip


def _certificates(p: Patient) -> Iterator[Check]:
    from ..peer.tls import Tls, TlsError, identity
    from . import pki

    config, peer = p.config, p.config.peer
    if not peer.cert:
        yield Check("peer channel", WARN, "not encrypted, not authenticated",
                    "`colo-xdp pki init` and `issue`, then [peer] cert, key and ca")  # fmt: skip
        return
    try:
        Tls(peer.cert, peer.key, peer.ca, peer.peer_cert, peer.identity).context(server=True)
        mode = os.stat(peer.key).st_mode & 0o7777
        if mode & 0o077:
            fix = key_mode(peer.key, mode)
            text = f"{peer.key} can be read by others"
            yield Check("certificate", WARN, text, fix.command, fix)
        for path in filter(None, (peer.cert, peer.ca, peer.peer_cert)):
            seen = pki.look(Path(path))
            days = (seen.ends.timestamp() - time.time()) / 86400
            text = f"{path} {'expires in' if days >= 0 else 'expired for'} {abs(days):.0f} days"
            level = FAIL if days < 0 else WARN if days < CERT_DAYS else OK
            yield Check("certificate", level, text, "" if days >= CERT_DAYS else "renew it")
        mine, want = pki.ours(pki.look(Path(peer.cert))), identity(config.pair, config.role)
        if mine and mine != want:
            yield Check("certificate", FAIL, f"{peer.cert} identifies {mine}, this host is {want}",
                        f"colo-xdp pki issue --role {config.role}")  # fmt: skip
    except (TlsError, pki.PkiError, OSError) as e:
        yield Check("certificate", FAIL, str(e), "[peer] cert, key, ca")


def _paths(p: Patient) -> Iterator[Check]:
    from ..peer.heartbeat_links import links_of

    config = p.config
    found = links_of(config)
    if not found:
        yield Check("heartbeats", WARN, "over the control channel only: if it is cut, a live peer "
                    "looks dead", "[peer] link_heartbeats or heartbeat_links")  # fmt: skip
    for link in () if p.beside else found:  # else the controller has told
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


CHECKS: tuple[Callable[[Patient], Iterator[Check]], ...] = (
    _machine,
    _compiler,
    _directories,
    _unit,
    _controller,
    _devices,
    _addresses,
    _neighbours,
    _qemu,
    _migration_route,
    _other_host,
    _paths,
    _failover,
    _certificates,
)
