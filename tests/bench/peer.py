# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare CPU per frame with the installed QEMU's colo-compare and filter-rewriter, on equal
frames.

colo-compare runs in a QEMU without a machine; feed.c passes it both guests' frames through Unix
sockets and takes what it releases. Counted is the CPU time of all of QEMU's threads, per released
frame, with vnet_hdr_support on. It is compared with the fast path's own share: the CPU time of the
same frames on real devices minus the lower bound (held.py), that is, minus the cost of forwarding
the PVM's frames and dropping the SVM's without us. QEMU's figure includes reading and writing its
sockets, which is how frames reach it; it does not include the two filters that feed these sockets.

The rewriter is measured in a chain of redirectors, without a guest, with it and without it: the
difference is its own share. Ours is svm_out and svm_in by single test runs, minus the empty
program; our own share is what they cost over a program that only tags (untags) and redirects. The
whole chain is compared with our cost on devices from the guest's tap to the peer link.
"""

from __future__ import annotations

import os
import socket
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace

from colo_xdp import abi
from colo_xdp.abi import Cfg
from colo_xdp.colo_proxy.packet_stream import PacketDecoder, StreamPacket, encode
from colo_xdp.datapath import attach, devices, loader
from tests.netns.conftest import inside

from . import held, programs
from .report import Part, Spread
from .stats import child, process_ns

QEMU = "qemu-system-x86_64"
SOURCE = Path(__file__).with_name("feed.c")
VNET = 10  # bytes of virtio_net_hdr


def feeder(build: Path) -> Path:
    """Compile feed.c."""
    out = build / "feed"
    if not out.exists() or out.stat().st_mtime < SOURCE.stat().st_mtime:
        subprocess.run(["gcc", "-O2", "-Wall", "-pthread", "-o", str(out), str(SOURCE)], check=True)
    return out


def _record(side: int, data: bytes) -> bytes:
    return bytes([side]) + struct.pack("!I", len(data)) + data


def schedule(writes: list[held.Write]) -> bytes:
    """Return held.plan()'s frames as colo-compare wants them: no tag, lengths in front."""
    out = []
    for side, data in writes:
        head, frame = data[:VNET], data[VNET:]
        if side:
            frame = programs.untagged(frame)
            flags, kind, size, gso, start, at = struct.unpack("<BBHHHH", head)
            head = struct.pack("<BBHHHH", flags, kind, size - 4 if kind else 0, gso, start - 4, at)
        out.append(_record(side, encode(StreamPacket(head + frame, VNET), vnet_hdr=True)))
    return b"".join(out)


def _feed(build: Path, file: Path, fds: tuple[int, int, int], vnet: int) -> tuple[int, int, float]:
    """Return (frames out, frames in, seconds)."""
    r = subprocess.run(
        [str(feeder(build)), str(file), *map(str, fds), "256", str(vnet)],
        capture_output=True, text=True, timeout=120, check=False, pass_fds=set(fds),
    )  # fmt: skip
    if r.returncode:
        raise RuntimeError(f"feed: {r.stderr}")
    came, sent, seconds = r.stdout.split()
    if int(came) < 0.9 * int(sent):
        raise RuntimeError(f"{came} frames of {sent} came out of QEMU")
    return int(came), int(sent), float(seconds)


class Wire:
    """A chardev of QEMU, connected once: its filters do not accept a second connection."""

    def __init__(self, path: Path) -> None:
        self.s = socket.socket(socket.AF_UNIX)
        self.s.settimeout(5)
        self.s.connect(str(path))
        self._packets = PacketDecoder(vnet_hdr=False)

    @property
    def pending(self) -> int:
        """Bytes that were read and not yet taken."""
        return self._packets.pending

    def send(self, frame: bytes) -> None:
        self.s.sendall(encode(StreamPacket(frame), vnet_hdr=False))

    def take(self) -> bytes:
        while (packet := self._packets.next_packet()) is None:
            part = self.s.recv(1 << 16)
            if not part:
                raise RuntimeError("QEMU has closed the channel")
            self._packets.receive(part)
        return packet.data


def _for_feed(*wires: Wire) -> tuple[int, int, int]:
    """Return their descriptors, blocking."""
    for w in wires:
        assert not w.pending, "feed.c would begin within a packet"
        w.s.settimeout(None)
    a, b, c = (w.s.fileno() for w in wires)
    return a, b, c


@contextmanager
def _qemu(where: Path, arguments: list[str], sockets: str) -> Iterator[tuple[int, dict[str, Wire]]]:
    """Start QEMU with these socket chardevs; return its pid and the connections, once it idles."""
    chardevs = [
        x for n in sockets
        for x in ("-chardev", f"socket,id={n},path={where}/{n},server=on,wait=off")
    ]  # fmt: skip
    with (
        open(where / "log", "wb") as log,
        child(
            [QEMU, "-nodefaults", "-display", "none", *chardevs, *arguments],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
        ) as p,
    ):  # fmt: skip
        end = time.monotonic() + 15
        while not all((where / n).exists() for n in sockets):
            if p.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"QEMU: {(where / 'log').read_text()[-1000:]}")
            _nap(p)
        wires = {n: Wire(where / n) for n in sockets}
        idle = process_ns(p.pid)
        while time.monotonic() < end:  # until its start is over
            _nap(p, 0.2)
            was, idle = idle, process_ns(p.pid)
            if idle - was < 2_000_000:
                break
        try:
            yield p.pid, wires
        finally:
            for w in wires.values():
                w.s.close()


def _nap(p: subprocess.Popen[bytes], seconds: float = 0.05) -> None:
    try:
        p.wait(seconds)
    except subprocess.TimeoutExpired:
        return


GOAL = "CPU per released packet, the fast path's share to colo-compare: "
COMPARE = [
    "-machine", "none", "-S", "-object", "iothread,id=io", "-object",
    "colo-compare,id=c,primary_in=p,secondary_in=s,outdev=o,iothread=io,vnet_hdr_support=on",
]  # fmt: skip


def _compare_once(build: Path, where: Path, file: Path) -> tuple[float, float, float]:
    """Return (CPU ns, wall ns) per frame that colo-compare released, and how many it lost."""
    for n in "pso":
        (where / n).unlink(missing_ok=True)
    with _qemu(where, COMPARE, "pso") as (pid, wires):
        before = process_ns(pid)
        came, sent, seconds = _feed(build, file, _for_feed(*(wires[n] for n in "pso")), 1)
        return (process_ns(pid) - before) / came, seconds * 1e9 / came, float(sent - came)


def compare(part: Part, quick: bool, build: Path) -> None:
    """Compare the fast path's own share with all of colo-compare's."""
    mtu, large = (3_000, 600) if quick else (30_000, 3_000)
    cases = (
        (held.Case("MTU, 1 connection", 1448, frames=mtu, lag=8), 1 / 8),
        (held.Case("MTU, 64 connections", 1448, frames=mtu, conns=64, lag=40), 1 / 8),
        (held.Case("64 KB, 1 connection", 64_000, frames=large, lag=4), 1 / 20),
        (held.Case("64 KB, 64 connections", 64_000, frames=large, conns=64, lag=8), 1 / 20),
    )
    with ExitStack() as stack:
        where = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="colo-bench.")))
        arms = [
            stack.enter_context(held.arm(n)) for n in ("floor", "fast path", "fast path, bridge")
        ]
        for case, wanted in cases:
            writes = held.plan(case)
            file = where / "schedule"
            file.write_bytes(schedule(writes))
            frames = sum(1 for side, _ in writes if side == 0)
            expected = sum(len(d) - VNET for side, d in writes if side == 0)
            runs: list[dict[str, tuple[float, float]]] = []
            lost: list[float] = []
            try:
                held.once(arms[0], case, writes, expected)  # warms up
                cpu0, wall0 = held.calls(writes)
                for turn in range(3 if quick else 5):
                    got: dict[str, tuple[float, float]] = {}
                    for a in held.rotated(arms, turn):
                        c, w = held.once(a, case, writes, expected)
                        got[a.name] = ((c - cpu0) / frames, (w - wall0) / frames)
                    c, w = got["floor"]
                    for n in ("fast path", "fast path, bridge"):
                        got[f"{n}, own share"] = (got[n][0] - c, got[n][1] - w)
                    qemu = _compare_once(build, where, file)
                    runs.append({"colo-compare": qemu[:2], **got})
                    lost.append(qemu[2])
            except (RuntimeError, OSError, subprocess.SubprocessError) as e:
                part.error(f"colo-compare, {case.name}", str(e))
                part.goal(GOAL + case.name, None, wanted, at_least=False)
                continue
            cpu, wall = ({a: Spread.of(r[a][i] for r in runs) for a in runs[0]} for i in (0, 1))
            part.add(
                f"compare: {case.name}",
                "ns per released frame",
                cpu,
                base="colo-compare",
                wall=wall,
            )
            part.add(f"lost: {case.name}", f"of {frames} frames", {"colo-compare": Spread.of(lost)})
            ratio = cpu["fast path, own share"].median / cpu["colo-compare"].median
            part.goal(GOAL + case.name, ratio, wanted, at_least=False)


def _chain(rewriter: bool) -> list[str]:
    """Set up the secondary's filters as documented, on a netdev without a guest.

    `a` to `b` is the client's path to the guest, `c` to `d` the guest's output path.
    """
    out = [
        "-M", "pc", "-accel", "tcg", "-m", "16", "-device", "rtl8139,netdev=n,romfile=",
        "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=net",
        "-object", "filter-redirector,id=fa,netdev=n,queue=tx,indev=a",
        "-object", "filter-redirector,id=fd,netdev=n,queue=rx,outdev=d",
    ]  # fmt: skip
    if rewriter:
        out += ["-object", "filter-rewriter,id=rew,netdev=n,queue=all"]
    return [
        *out,
        "-object", "filter-redirector,id=fb,netdev=n,queue=tx,outdev=b",
        "-object", "filter-redirector,id=fc,netdev=n,queue=rx,indev=c",
    ]  # fmt: skip


def _rewriter_once(
    build: Path, where: Path, files: dict[str, Path], rewriter: bool
) -> dict[str, float]:
    """Return CPU ns per frame and direction; the connection is learned first."""
    for n in ("a", "b", "c", "d", "net"):
        (where / n).unlink(missing_ok=True)
    arguments = [x.replace("addr.path=net", f"addr.path={where}/net") for x in _chain(rewriter)]
    out = {}
    with _qemu(where, arguments, "abcd") as (pid, wires):
        ends = programs.Ends(False)
        for of_guest, frame in ends.handshake():
            wires["c" if of_guest else "a"].send(frame)
            wires["d" if of_guest else "b"].take()
        probe = ends.guests(1448)
        wires["c"].send(probe)
        if rewriter and wires["d"].take() == probe:
            raise RuntimeError("filter-rewriter translates nothing")
        if not rewriter:
            wires["d"].take()
        for name, (into, outof) in {"svm_in": ("a", "b"), "svm_out": ("c", "d")}.items():
            before = process_ns(pid)
            fds = _for_feed(wires[into], wires[into], wires[outof])
            frames, _, _ = _feed(build, files[name], fds, 0)
            out[name] = (process_ns(pid) - before) / frames
    return out


@contextmanager
def _out_path(tag: str, ours: bool) -> Iterator[tuple[int, int]]:
    """Set up the path from the guest's tap to the peer link, by svm_out or only by tag and
    redirect.

    Return (descriptor of the SVM's tap, descriptor whose writes cost the same with nothing behind).
    """
    from tests.netns.conftest import Net, Tap

    net = Net(tag)
    try:
        with ExitStack() as stack, inside(net.host):
            tap = Tap("tap0")
            peer = devices.link_info("peer0").index
            if ours:
                where = stack.enter_context(programs.bpffs())
                k = programs.Loaded("secondary", "out", where)
                stack.callback(k.close)
                k.set(Cfg.PEER, peer)
                programs.Ends(False).learn(k)
                prog: SimpleNamespace | loader.Program = k.objects.programs["svm_out"]
            else:
                prog = stack.enter_context(programs.empties(peer))["relay_out"]
            attach.attach_tc("tap0", "ingress", prog, held.PAIR, None)  # type: ignore[arg-type]
            null = os.open("/dev/null", os.O_WRONLY)
            stack.callback(os.close, null)
            yield tap.fd, null
            tap.close()
    finally:
        net.close()


def _way_out(runs: int) -> dict[str, list[tuple[float, float]]]:
    """Return CPU and wall ns per frame from the SVM's tap to the peer link."""
    writes = [(0, bytes(10) + programs.Ends(False).guests(1448))] * 20_000
    out: dict[str, list[tuple[float, float]]] = {"svm_out": [], "relay": []}
    with _out_path("cxb7", True) as ours, _out_path("cxb8", False) as plain:
        for _ in range(runs):
            for name, (fd, null) in (("svm_out", ours), ("relay", plain)):
                cpu, wall = min(held.write_all(writes, (null, null)) for _ in range(3))
                c, w = held.write_all(writes, (fd, fd))
                out[name].append(((c - cpu) / len(writes), (w - wall) / len(writes)))
    return out


def _own(runs: int) -> dict[str, dict[str, list[float]]]:
    """Return ns of our programs: whole, and over a program that only tags and redirects."""
    ends = programs.Ends(False)
    frames = {
        "svm_out": ends.guests(1448),
        "svm_in": programs.tagged(ends.clients(1448), abi.KIND_MIRROR),
    }
    out: dict[str, dict[str, list[float]]] = {"svm_in": {}, "svm_out": {}}
    with programs.bpffs() as where, programs.empties() as e:
        k = programs.Loaded("secondary", "own", where)
        try:
            ends.learn(k)
            zero = statistics.median(programs.single(e["empty"].fd, frames["svm_out"], runs=runs))
            for name, relay in (("svm_in", "relay_in"), ("svm_out", "relay_out")):
                mine = programs.single(
                    k.fd(name), frames[name], runs=runs, verdict=programs.REDIRECT
                )
                theirs = programs.single(e[relay].fd, frames[name], runs=runs)
                out[name]["whole"] = [x - zero for x in mine]
                out[name]["own"] = [x - y for x, y in zip(mine, theirs, strict=True)]
        finally:
            k.close()
    return out


def rewriter(part: Part, quick: bool, build: Path) -> None:
    """Compare filter-rewriter's share and chain with svm_in and svm_out."""
    runs, count = (3, 5_000) if quick else (9, 80_000)
    ends = programs.Ends(False)
    mine = _own(runs)
    with tempfile.TemporaryDirectory(prefix="colo-bench.") as d:
        where = Path(d)
        files = {}
        for name, frame in (("svm_in", ends.clients(1448)), ("svm_out", ends.guests(1448))):
            files[name] = where / f"{name}.schedule"
            one = _record(0, struct.pack("!I", len(frame)) + frame)
            files[name].write_bytes(one * count)
        pairs = []
        for _ in range(runs):
            pairs.append([_rewriter_once(build, where, files, on) for on in (True, False)])
    own, whole = [], []
    for name in ("svm_in", "svm_out"):
        chain = Spread.of(a[name] for a, _ in pairs)
        share = Spread.of(a[name] - b[name] for a, b in pairs)
        ours, ours_own = Spread.of(mine[name]["whole"]), Spread.of(mine[name]["own"])
        way = "client to guest" if name == "svm_in" else "guest to client"
        part.add(
            f"rewrite, {way}: own share", "ns per frame",
            {"filter-rewriter": share, name: ours_own}, base="filter-rewriter",
        )  # fmt: skip
        part.add(
            f"rewrite, {way}: whole", "ns per frame", {"filter-rewriter": chain, name: ours},
            base="filter-rewriter",
        )  # fmt: skip
        own.append(ours_own.median / share.median if share.median > 0 else float("nan"))
        whole.append(ours.median / chain.median)
    devices = _way_out(runs)
    cpu, wall = ({n: Spread.of(x[i] for x in v) for n, v in devices.items()} for i in (0, 1))
    chain = Spread.of(a["svm_out"] for a, _ in pairs)
    part.add(
        "rewrite, guest to client: from tap to peer link, devices included", "ns per frame",
        {"filter-rewriter": chain, "svm_out": cpu["svm_out"], "no rewriting": cpu["relay"]},
        base="filter-rewriter", wall=wall,
    )  # fmt: skip
    bad = any(x != x for x in own)
    part.goal("CPU per rewritten packet to filter-rewriter's own share, the worse direction",
              None if bad else max(own), 1 / 4, at_least=False)  # fmt: skip
    part.goal("CPU per rewritten packet to the documented chain's, the worse direction",
              max(whole), 1 / 15, at_least=False)  # fmt: skip


def run(part: Part, quick: bool, build: Path) -> None:
    """Run both; if one fails, the other still runs."""
    for name, what in (("colo-compare", compare), ("filter-rewriter", rewriter)):
        try:
            what(part, quick, build)
        except (RuntimeError, OSError, subprocess.SubprocessError) as e:
            part.error(name, f"{type(e).__name__}: {e}")
