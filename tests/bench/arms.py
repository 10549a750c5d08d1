# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare three proxies around the same real guests: none, QEMU's, ours (fast path on and off).

The demo's laboratory builds each arm from scratch: the same images, the same taps with vnet_hdr,
the same client. Without a proxy only one guest works, with a proxy two do, on the same CPUs. QEMU's
own proxy is set up as its docs/COLO-FT.txt describes, with vnet_hdr_support on every object and
Unix sockets instead of TCP ones. Both kinds of proxy may request checkpoints at any time; periodic
ones are deferred by an hour in all arms, so that only needed ones are counted. What a proxy loses
is counted from outside: UDP echoes that are never answered, and segments that the guest's TCP had
to retransmit.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.maps import Map
from colo_xdp.lab import vm as vms
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import PEER_P, PEER_S, LabError, in_ns, wait_for
from colo_xdp.lab.pair import NBD_PORT, PAIR, Lab
from colo_xdp.qemu.block_layer import ReplicationOptions
from colo_xdp.qemu.overlays import ReplicatedDisk
from colo_xdp.qemu.qmp import QemuInfo, Qmp
from colo_xdp.qemu.replication import DiskReplication
from colo_xdp.status.document import WAIT_BUCKETS

from .report import Part, Spread, cpu_seconds

TAG = "cxbn"  # of the laboratory's namespaces
ARMS = ("none", "QEMU", "ours", "ours, slow path")
COPY_S = 120.0  # of all disks to the secondary
BULK, SMALL, PAGE = "big", "index.html", "f100k"


class Events:
    """Count STOP events of a QEMU on the QMP socket that the controller would use."""

    def __init__(self, path: Path) -> None:
        self.stops = 0
        self._s = socket.socket(socket.AF_UNIX)
        self._s.connect(str(path))
        self._f = self._s.makefile("rwb")
        self._f.readline()
        self._f.write(b'{"execute":"qmp_capabilities"}\n')
        self._f.flush()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        try:
            for line in self._f:
                self.stops += json.loads(line).get("event") == "STOP"
        except (OSError, ValueError):
            return

    def close(self) -> None:
        self._s.shutdown(socket.SHUT_RDWR)  # the reader still has it open
        self._s.close()


@dataclass
class _Qemu:
    """A QEMU whose disks are replicated (qemu/replication.py)."""

    qmp: Qmp
    info: QemuInfo | None = None

    @property
    def way_past(self) -> Qmp:
        return self.qmp


#: the primary's objects, each with vnet_hdr_support, in their order
PRIMARY = (
    "filter-mirror,id=m0,netdev=n0,queue=tx,outdev=mirror0",
    "filter-redirector,id=redire0,netdev=n0,queue=rx,indev=compare_out",
    "filter-redirector,id=redire1,netdev=n0,queue=rx,outdev=compare0",
    "colo-compare,id=comp0,primary_in=compare0-0,secondary_in=compare1,outdev=compare_out0,"
    "iothread=iothread1",
)


def qom(option: str) -> dict[str, str | bool]:
    """Return what object-add takes for an -object."""
    kind, *properties = option.split(",")
    pairs = dict(p.split("=", 1) for p in properties)
    return {"qom-type": kind, "vnet_hdr_support": True, **pairs}


class QemuLab(Lab):
    """The pair with QEMU's filter objects in place of our controllers.

    Disks are replicated by QEMU's block layer, set up by the same code as for our controllers.
    """

    #: The primary's objects are added by protect() (COLO-FT.txt has that, for a primary that goes
    #: on after a failover): colo-compare holds what the guest sends before there is an SVM, too.
    late = False

    def start_vm(self, role: str) -> vms.Vm:
        sock = {n: f"path={self.work}/q-{n}.sock" for n in ("mirror", "sec", "cmp", "out")}
        on = "vnet_hdr_support=on"
        if role == "primary":
            extra = [
                "-chardev", f"socket,id=mirror0,{sock['mirror']},server=on,wait=off",
                "-chardev", f"socket,id=compare1,{sock['sec']},server=on,wait=off",
                "-chardev", f"socket,id=compare0,{sock['cmp']},server=on,wait=off",
                "-chardev", f"socket,id=compare0-0,{sock['cmp']}",
                "-chardev", f"socket,id=compare_out,{sock['out']},server=on,wait=off",
                "-chardev", f"socket,id=compare_out0,{sock['out']}",
                "-object", "iothread,id=iothread1",
            ]  # fmt: skip
            if not self.late:
                extra += [x for name in PRIMARY for x in ("-object", f"{name},{on}")]
        else:
            extra = [
                "-chardev", f"socket,id=red0,{sock['mirror']},reconnect=1",
                "-chardev", f"socket,id=red1,{sock['sec']},reconnect=1",
                "-object", f"filter-redirector,id=f1,netdev=n0,queue=tx,indev=red0,{on}",
                "-object", f"filter-redirector,id=f2,netdev=n0,queue=rx,outdev=red1,{on}",
                "-object", f"filter-rewriter,id=rew0,netdev=n0,queue=all,{on}",
            ]  # fmt: skip
        v = vms.Vm(
            self.procs, role, self.work, self.guest, self.accel, qemu=self.qemu,
            ns=self.ns(role), shim=self._shim,
            incoming=self._migrate_uri(role) if role == "secondary" else "",
            extra=[*extra, *(x for name in self.disks for x in self._drive(role, name))],
        )  # fmt: skip
        self.vm[role] = v
        return v

    def protect(self) -> float:
        """Enter COLO as the documentation describes, by QMP alone."""
        t = time.monotonic()
        p, s = self.vm["primary"], self.vm["secondary"]
        if self.disks:
            in_ns(self.net.primary, lambda: asyncio.run(self._replicate()))
        for option in PRIMARY if self.late else ():
            p.ask("object-add", **qom(option))
        caps = [{"capability": c, "state": True} for c in ("x-colo", "events")]
        for v in (s, p):
            v.ask("migrate-set-capabilities", capabilities=caps)
        p.ask("migrate-set-parameters", **{"x-checkpoint-delay": 3600000, "max-bandwidth": 8 << 30})
        if self._shim:
            p.ask("stop")
        p.ask("migrate", uri=self._migrate_uri("secondary"))
        for v in (p, s):
            wait_for(
                f"COLO of the {v.name}",
                lambda v=v: v.ask("query-migrate").get("status") == "colo",  # type: ignore[misc]
                60,
            )
        wait_for("a running PVM", lambda: p.ask("query-status")["running"], 20)
        return time.monotonic() - t

    async def _replicate(self) -> None:
        """Have QEMU keep the disks equal. Raises DiskError, or QmpError."""
        ends = {}
        for role, local, remote in (
            ("primary", PEER_P, PEER_S),
            ("secondary", PEER_S, PEER_P),
        ):
            overlays = self.work / f"{role}.overlays"
            overlays.mkdir(exist_ok=True)
            disks = tuple(
                ReplicatedDisk(name, str(overlays), self.overlay_limit << 20) for name in self.disks
            )
            addresses = (f"{local}:{NBD_PORT}", f"{remote}:{NBD_PORT}")
            options = ReplicationOptions(PAIR, disks, *addresses)
            qmp = Qmp(str(self.vm[role].qmp), role, 10.0, lambda event: None, lambda why: None)
            qemu = _Qemu(qmp)
            qemu.info = await qmp.connect()
            ends[role] = (qmp, DiskReplication(options, qemu))
        try:
            (_, mine), (_, theirs) = ends["primary"], ends["secondary"]
            await mine.mirrors.start(await theirs.replica.serve())
            end = time.monotonic() + COPY_S
            while not await mine.mirrors.copied():
                if time.monotonic() > end:
                    raise LabError(f"disks not copied within {COPY_S:g} s")
                await asyncio.sleep(0.1)
        finally:
            for qmp, _ in ends.values():
                await qmp.close()


@dataclass
class Seen:
    """What the client saw of one arm; times in s, one entry per request."""

    bulk: list[float] = field(default_factory=list)
    bulk_cpu: list[float] = field(default_factory=list)
    page: list[float] = field(default_factory=list)
    small: list[float] = field(default_factory=list)
    wrong: int = 0
    failed: int = 0
    checkpoints: int = 0
    udp_sent: int = 0
    udp_lost: int = 0
    resent: int = 0
    proxy_lost: int = 0  # as the proxy itself reports
    by_k: int = 0  # frames that the fast path released
    waited: list[int] = field(default_factory=list)  # frames of the slow path by SLOW_BUCKETS
    waited_fast: list[int] = field(default_factory=list)  # frames of the fast path by FAST_BUCKETS


@contextmanager
def _lab(arm: str, directory: Path) -> Iterator[Lab]:
    kind: Callable[..., Lab] = QemuLab if arm == "QEMU" else Lab
    fast = {"datapath": {"fast_path": "off"}} if arm == "ours, slow path" else None
    lab = kind(directory, tag=TAG, overrides=fast)
    try:
        lab.up()
        if arm in ("none", "QEMU"):  # no controller of ours adds the tap there
            lab.net.join(lab.net.primary)
        yield lab
    finally:
        lab.down()


def _fetch(lab: Lab, name: str, seen: Seen) -> tuple[float, float]:
    cpu = cpu_seconds()
    f = lab.client.http(name)
    if not f.ok:
        seen.failed += 1
    elif f.body != content(name):
        seen.wrong += 1
    return f.seconds, cpu_seconds() - cpu


def _sum(a: list[int], b: list[int]) -> list[int]:
    return [x + y for x, y in zip(a or [0] * len(b), b, strict=True)]


def _resent(lab: Lab) -> int:
    """Return RetransSegs of the guest that answers."""
    text = lab.client.run("cat /proc/net/snmp")
    rows = [line.split() for line in text.splitlines() if line.startswith("Tcp:")]
    return int(dict(zip(*rows, strict=True))["RetransSegs"]) if len(rows) == 2 else 0


def prove(lab: Lab, events: Events | None) -> None:
    """Prove that the proxy was in the path: a page that differs must cost a checkpoint."""

    def count() -> int:
        return events.stops if events else lab.checkpoints()

    before = count()
    lab.client.uptime_page()
    wait_for("checkpoint for a page that differs", lambda: count() > before, 10)


def once(arm: str, directory: Path, bulk: int, small: int, seen: Seen) -> None:
    """Run one life of one arm."""
    with _lab(arm, directory) as lab:
        events: Events | None = None
        if arm != "none":
            lab.protect()
        if arm == "QEMU":
            events = Events(lab.vm["primary"].qmp)
        try:
            before = events.stops if events else lab.checkpoints() if arm != "none" else 0
            resent = _resent(lab) if arm == "none" else None
            for _ in range(bulk):
                seconds, cpu = _fetch(lab, BULK, seen)
                seen.bulk.append(seconds)
                seen.bulk_cpu.append(cpu)
            seen.page += [_fetch(lab, PAGE, seen)[0] for _ in range(small // 4)]
            seen.small += [_fetch(lab, SMALL, seen)[0] for _ in range(small)]
            answered, wrong = lab.client.udp_echo(small)
            seen.udp_sent += small
            seen.udp_lost += small - answered
            seen.wrong += wrong
            after = events.stops if events else lab.checkpoints() if arm != "none" else 0
            seen.checkpoints += after - before
            if arm != "none":
                prove(lab, events)
            # Not before: the question itself is a page that two guests answer differently.
            seen.resent += _resent(lab) - (resent or 0)
            if arm == "QEMU":
                log = lab.vm["primary"].log.read_text(errors="replace")
                seen.proxy_lost += len(re.findall(r"send .*packet failed", log))
            elif arm != "none":
                status = lab.status("primary")
                seen.proxy_lost += int(status["ring"]["lost"])
                seen.waited = _sum(seen.waited, status["wait"]["buckets"])
                seen.by_k += sum(
                    status["programs"][prog][reason][0]
                    for prog in ("pvm_out", "svm_arrival")
                    for reason in ("offload_passed", "offload_released", "offload_rebuilt")
                )
                seen.waited_fast = _sum(seen.waited_fast, _fast_path_waits())
        finally:
            if events:
                events.close()


def run(part: Part, quick: bool, build: Path) -> None:
    """Run all arms in turns."""
    # The speed of a guest differs more between its lives than the proxies do: many short ones.
    rounds, bulk, small = (1, 5, 20) if quick else (8, 4, 60)
    seen: dict[str, Seen] = {a: Seen() for a in ARMS}
    errors: dict[str, str] = {}
    for turn in range(rounds):
        for arm in ARMS if turn % 2 == 0 else ARMS[::-1]:
            if arm in errors:
                continue
            try:
                once(arm, build, bulk, small, seen[arm])
            except (LabError, OSError, RuntimeError, ValueError) as e:
                errors[arm] = f"{type(e).__name__}: {e}"
    for arm, why in errors.items():
        part.error(f"real guests, {arm}", why)
    good = {a: s for a, s in seen.items() if a not in errors and s.small}
    size = len(content(BULK)) / 2**20
    rows: tuple[tuple[str, str, Callable[[Seen], list[float]]], ...] = (
        ("HTTP, 8 MiB", "MiB/s", lambda s: [size / x for x in s.bulk]),
        ("HTTP, 100 KiB", "ms", lambda s: [1e3 * x for x in s.page]),
        ("HTTP, small", "ms", lambda s: [1e3 * x for x in s.small]),
        ("HTTP, 8 MiB: CPU of the machine", "s", lambda s: s.bulk_cpu),
    )
    for name, unit, of in rows:
        part.add(
            name, unit, {a: Spread.of(of(s)) for a, s in good.items()}, base="none",
            higher_is_better=unit == "MiB/s",
        )  # fmt: skip
    p99 = {a: _p99(s.small) * 1e3 for a, s in good.items()}
    part.add("HTTP, small: p99", "ms", {a: Spread.of([v]) for a, v in p99.items()}, base="none")
    counts: tuple[tuple[str, Callable[[Seen], int]], ...] = (
        ("checkpoints needed", lambda s: s.checkpoints),
        ("UDP echoes not answered", lambda s: s.udp_lost),
        ("TCP segments sent again by the guest", lambda s: s.resent),
        ("frames lost, as the proxy says", lambda s: s.proxy_lost),
        ("frames that the fast path let go", lambda s: s.by_k),
        ("answers failed or wrong", lambda s: s.failed + s.wrong),
    )
    for name, count in counts:
        part.add(name, "count", {a: Spread.of([float(count(s))]) for a, s in good.items()})
    for p in (50, 99, 99.9):
        waited = {
            f"{a}: {path}": Spread.of([_bound(bounds, h, p) * 1e3])
            for a, s in good.items()
            for path, bounds, h in (
                ("the fast path", FAST_BUCKETS, s.waited_fast),
                ("the slow path", SLOW_BUCKETS, s.waited),
            )
            if sum(h)
        }
        part.add(f"what released frames had waited for the SVM: p{p:g}", "ms at most", waited)
    _goals(part, good, size, p99)


#: upper bounds of the histograms' buckets, s
SLOW_BUCKETS = (*WAIT_BUCKETS, 60.0)
FAST_BUCKETS = tuple(1e-6 * 2**i for i in range(24))


def _bound(bounds: tuple[float, ...], histogram: list[int], p: float) -> float:
    """Return the upper bound of the bucket with the percentile, s."""
    need, total = sum(histogram) * p / 100, 0
    for bound, n in zip(bounds, histogram, strict=True):
        total += n
        if total >= need:
            return bound
    return bounds[-1]


def _fast_path_waits() -> list[int]:
    """Read the pinned map offload_waits (bpf/offload/offload.h) of the laboratory's pair.

    All values are zero without the fast path.
    """
    path = f"{loader.pin_dir('/sys/fs/bpf', PAIR, 'primary')}/offload_waits"
    if not Path(path).exists():
        return [0] * len(FAST_BUCKETS)
    out = []
    fd = syscall.obj_get(path)
    try:
        table = Map(fd)
        for i in range(len(FAST_BUCKETS)):
            raw = table.get(struct.pack("=I", i)) or b""
            out.append(sum(struct.unpack(f"={len(raw) // 8}Q", raw)))
    finally:
        os.close(fd)
    return out


def _p99(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _goals(part: Part, good: dict[str, Seen], size: float, p99: dict[str, float]) -> None:
    if not {"QEMU", "ours"} <= set(good):
        for what in ("bulk throughput", "p50 of small requests", "p99 of small requests"):
            part.goal(f"real guests, ours to QEMU's proxy: {what}", None, 1.0, at_least=False)
        return
    ours, qemu = good["ours"], good["QEMU"]
    bulk = Spread.of(qemu.bulk).median / Spread.of(ours.bulk).median
    small = Spread.of(ours.small).median / Spread.of(qemu.small).median
    name = "real guests, ours to QEMU's proxy: "
    part.goal(name + "bulk throughput", bulk, 1.0)
    part.goal(name + "p50 of small requests", small, 1.0, at_least=False)
    part.goal(name + "p99 of small requests", p99["ours"] / p99["QEMU"], 1.0, at_least=False)
    part.goal(
        name + "checkpoints more", float(ours.checkpoints - qemu.checkpoints), 0.0, at_least=False
    )
    lost = [s.udp_lost + s.failed + s.wrong + s.proxy_lost for s in (ours, qemu)]
    part.goal(name + "packets lost more", float(lost[0] - lost[1]), 0.0, at_least=False)
