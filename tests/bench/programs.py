# SPDX-License-Identifier: GPL-2.0-or-later
"""Measure ns per frame of every program on every path, with the empty program as zero.

There are three ways, because none of them reaches all paths:

- BPF_PROG_TEST_RUN, repeated: the kernel's mean over 20,000 runs of one frame. Only where a run
  leaves frame and maps as it found them.
- BPF_PROG_TEST_RUN, single: each run has a fresh frame, and the kernel reports the duration of that
  run alone; the median of 300. Caches and branch predictors have seen a system call in between, as
  they have between two frames of a real guest. For programs that push or pop a tag. The zero of
  this way is the empty program run singly.
- On devices: the kernel adds up the time that a program runs (BPF_ENABLE_STATS) while batches of
  frames are written, chosen such that all of a batch take the same path; the counters prove it.
  Each batch meets new connections. For the fast path, where every frame changes what the next one
  meets; for the event ring; for frames larger than a page; for tags that only a device puts into
  the metadata. The zero is the empty program on the same device.

All figures are medians of 5 or more such measurements, minus the zero.
"""

from __future__ import annotations

import statistics
import struct
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode
from colo_xdp.conntrack.tcp_state import transition_table
from colo_xdp.datapath import attach, compiler, loader, syscall
from colo_xdp.datapath.source import Options
from colo_xdp.net.flow_key import FlowKey
from colo_xdp.net.packet import parse
from colo_xdp.offload.kernel_format import OffloadRequest, OffloadResult, conn_key
from tests.bpf.craft import (
    ACK,
    CLIENT4,
    CLIENT6,
    GUEST4,
    GUEST6,
    SYN,
    ip,
    sack,
    tcp_segment,
    timestamps,
)
from tests.netns.conftest import inside, sh
from tests.netns.frames import tcp, udp

from . import held
from .report import Part, Spread
from .stats import fdinfo, ran, run_stats

EMPTY = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
int empty(struct __sk_buff *skb) { return TC_ACT_OK; }
int empty_shot(struct __sk_buff *skb) { return TC_ACT_SHOT; }
int empty_xdp(struct xdp_md *xdp) { return XDP_PASS; }
/* The way of svm_out and svm_in without looking at the frame. */
int relay_out(struct __sk_buff *skb)
{
    if (bpf_skb_vlan_push(skb, bpf_htons(0x88A8), 2 << 13 | 1))
        return TC_ACT_SHOT;
    return bpf_redirect(PEER, 0);
}
int relay_in(struct __sk_buff *skb)
{
    if (bpf_skb_vlan_pop(skb))
        return TC_ACT_SHOT;
    skb->mark = 0xC0105EED;
    return bpf_redirect(PEER, 0);
}
"""


@contextmanager
def empties(peer: int = 1) -> Iterator[dict[str, SimpleNamespace]]:
    """Return the programs of EMPTY, by name."""
    bpf = compiler.compile_text(EMPTY.replace("PEER", str(peer)))
    out = {}
    for name in ("empty", "empty_shot", "empty_xdp", "relay_out", "relay_in"):
        f = bpf.load_func(name.encode(), 6 if name == "empty_xdp" else 3)
        out[name] = SimpleNamespace(fd=f.fd, name=name, bpf=bpf)
    try:
        yield out
    finally:
        bpf.cleanup()


def repeated(fd: int, data: bytes, mark: int = 0, runs: int = 5) -> list[float]:
    """Return ns of one run, the mean of 20,000 on the same frame."""
    ctx = struct.pack("=III", 0, 0, mark) if mark else b""
    return [
        float(syscall.test_run(fd, data, ctx=ctx, repeat=20_000, data_out=0).ns)
        for _ in range(runs)
    ]


def single(
    fd: int, data: bytes, mark: int = 0, runs: int = 5, verdict: int | None = None
) -> list[float]:
    """Return ns of one run on a fresh frame, the median of 300."""
    ctx = struct.pack("=III", 0, 0, mark) if mark else b""
    out = []
    for _ in range(runs):
        ns = []
        for _ in range(300):
            r = syscall.test_run(fd, data, ctx=ctx, data_out=0)
            if verdict is not None and r.retval != verdict:
                raise RuntimeError(f"verdict {r.retval} where {verdict} was expected")
            ns.append(r.ns)
        out.append(float(statistics.median(ns)))
    return out


@contextmanager
def bpffs() -> Iterator[str]:
    """Provide a BPF file system of our own."""
    with tempfile.TemporaryDirectory(prefix="colo-bench-bpf.") as path:
        syscall.mount_bpffs(path)
        try:
            yield path
        finally:
            sh("umount", path)


class Loaded:
    """One role's programs, not attached; everything goes to the loopback device."""

    def __init__(self, role: str, name: str, where: str, **options: Any) -> None:
        o = Options(flow_table=1024, ring_pages=64, **options)
        self.objects = loader.load(role, name, where, o)
        self._config = self.objects.map("config")
        for slot, value in ((Cfg.TAP, 1), (Cfg.PEER, 1), (Cfg.EPOCH, 7), (Cfg.MODE, Mode.RUN)):
            self.set(slot, value)
        if role == "secondary":
            table = self.objects.map("transitions")
            for i, word in enumerate(transition_table()):
                table.set(struct.pack("=I", i), struct.pack("=I", word))

    def set(self, slot: Cfg, value: int) -> None:
        self._config.set(struct.pack("=I", slot), struct.pack("=Q", value))

    def fd(self, name: str) -> int:
        return self.objects.programs[name].fd

    def close(self) -> None:
        self.objects.close()
        loader.remove_pins(self.objects.pin_dir)


def tagged(data: bytes, kind: int, epoch: int = 7) -> bytes:
    """Return a frame of the peer link."""
    return data[:12] + struct.pack("!HH", abi.TPID, kind << abi.KIND_SHIFT | epoch) + data[12:]


def untagged(data: bytes) -> bytes:
    """Return the frame that a guest or client sent."""
    return data[:12] + data[16:]


ISN_P, ISN_S, ISN_C = 5000, 900_000, 100
STAMPS = timestamps(1000, 2000)


@dataclass(frozen=True)
class Ends:
    """A connection of the SVM, whose offset the secondary has learned."""

    v6: bool

    def _ends(self, of_guest: bool) -> tuple[str, str, int, int]:
        g, c = (GUEST6, CLIENT6) if self.v6 else (GUEST4, CLIENT4)
        return (g, c, 80, 40000) if of_guest else (c, g, 40000, 80)

    def _frame(self, of_guest: bool, *args: Any) -> bytes:
        src, dst, sport, dport = self._ends(of_guest)
        return ip(src, dst, 6, tcp_segment(src, dst, sport, dport, *args))

    def handshake(self) -> Iterator[tuple[bool, bytes]]:
        """Yield the handshake between the SVM and its client; True: the guest's frame."""
        for of_guest, args in (
            (False, (ISN_C, 0, SYN, b"", timestamps(2000, 0))),
            (True, (ISN_S, ISN_C + 1, SYN | ACK, b"", timestamps(1000, 2000))),
            (False, (ISN_C + 1, ISN_P + 1, ACK, b"", timestamps(2001, 990))),
        ):
            yield of_guest, self._frame(of_guest, *args)

    def learn(self, k: Loaded) -> None:
        """Let the secondary's programs see the handshake."""
        for of_guest, data in self.handshake():
            if of_guest:
                syscall.test_run(k.fd("svm_out"), data)
            else:
                syscall.test_run(k.fd("svm_in"), tagged(data, abi.KIND_MIRROR))

    def guests(self, payload: int, options: bytes = STAMPS) -> bytes:
        """A segment of the SVM."""
        return self._frame(True, ISN_S + 1, ISN_C + 1, ACK, bytes(payload), options)

    def clients(self, payload: int, options: bytes = STAMPS) -> bytes:
        """Return a segment of the client, with an ack that must be translated."""
        return self._frame(False, ISN_C + 1, ISN_P + 1, ACK, bytes(payload), options)


@dataclass(frozen=True)
class Path_:
    """One path through one program."""

    prog: str
    name: str
    data: bytes
    how: Callable[..., list[float]]
    mark: int = 0
    mode: Mode = Mode.RUN
    verdict: int | None = None


OK, SHOT, REDIRECT, UNSPEC = 0, 2, 7, 0xFFFFFFFF


def _secondary_paths(v4: Ends, v6: Ends) -> list[Path_]:
    p: list[Path_] = []
    mtu = 1448
    sack1 = STAMPS + sack(ISN_P + 1000, ISN_P + 2000)
    sack3 = STAMPS + sack(*(ISN_P + 1000 * i for i in range(1, 7)))
    other = udp(bytes(mtu))
    for ends, v in ((v4, "IPv4"), (v6, "IPv6")):
        p += [
            Path_("svm_out", f"{v}, timestamps", ends.guests(mtu), single, verdict=REDIRECT),
            Path_("svm_out", f"{v}, no options", ends.guests(mtu, b""), single, verdict=REDIRECT),
        ]
        p += [
            Path_("svm_in", f"{v}, {what}", tagged(ends.clients(n, o), abi.KIND_MIRROR), single,
                  verdict=REDIRECT)
            for what, n, o in (
                ("timestamps", mtu, STAMPS), ("no options", mtu, b""), ("bare ack", 0, STAMPS),
                ("bare ack, 1 SACK block", 0, sack1), ("bare ack, 3 SACK blocks", 0, sack3),
            )
        ]  # fmt: skip
    p += [
        Path_("svm_out", "not TCP", other, single, verdict=REDIRECT),
        Path_("svm_out", "taken over", v4.guests(mtu), single, mode=Mode.TAKEOVER, verdict=OK),
        Path_("svm_out", "drop_mode", v4.guests(mtu), repeated, mode=Mode.DROP, verdict=SHOT),
        Path_("svm_in", "not TCP", tagged(other, abi.KIND_MIRROR), single, verdict=REDIRECT),
        Path_("svm_in", "not ours", v4.clients(mtu), repeated, verdict=OK),
        Path_("svm_deliver", "IPv4, timestamps", v4.clients(mtu), single, verdict=REDIRECT),
        Path_("svm_forward", "IPv4, timestamps", v4.guests(mtu), single, verdict=REDIRECT),
        Path_("svm_net", "drop_isolated", v4.clients(mtu), repeated, verdict=SHOT),
        Path_("svm_net", "from the mirror", v4.clients(mtu), repeated, abi.MARK, verdict=OK),
        Path_("svm_net", "taken over", v4.clients(mtu), single, mode=Mode.TAKEOVER, verdict=OK),
    ]
    return p


def _measure(
    k: Loaded, paths: list[Path_], zero: dict[Callable[..., list[float]], float], part: Part
) -> None:
    for path in paths:
        k.set(Cfg.MODE, path.mode)
        try:
            ns = path.how(k.fd(path.prog), path.data, path.mark)
            once = syscall.test_run(
                k.fd(path.prog), path.data, data_out=4096,
                ctx=struct.pack("=III", 0, 0, path.mark) if path.mark else b"",
            )  # fmt: skip
            if path.verdict is not None and once.retval != path.verdict:
                raise RuntimeError(f"verdict {once.retval} where {path.verdict} was expected")
            if path.name.startswith("IPv") and once.data in (path.data, untagged(path.data)):
                raise RuntimeError("nothing was translated")
        except (OSError, RuntimeError) as e:
            part.error(f"{path.prog}: {path.name}", str(e))
            continue
        part.add(f"{path.prog}: {path.name}", "ns", {path.how.__name__: _off(ns, zero[path.how])})


def _off(ns: list[float], zero: float) -> Spread:
    return Spread.of(x - zero for x in ns)


def test_runs(part: Part) -> None:
    """Measure everything that BPF_PROG_TEST_RUN reaches."""
    with bpffs() as where, empties() as e:
        data = tcp(bytes(1448))
        zero: dict[Callable[..., list[float]], float] = {}
        for how in (repeated, single):
            ns = how(e["empty"].fd, data)
            zero[how] = statistics.median(ns)
            part.add("empty program, tc (taken off below)", "ns", {how.__name__: Spread.of(ns)})
        xdp_zero = repeated(e["empty_xdp"].fd, data)
        part.add("empty program, XDP (taken off below)", "ns", {"repeated": Spread.of(xdp_zero)})
        for name in ("relay_out", "relay_in"):
            frame = tagged(data, abi.KIND_MIRROR) if name == "relay_in" else data
            ns = single(e[name].fd, frame, verdict=REDIRECT)
            what = "tag and redirect" if name == "relay_out" else "untag and redirect"
            part.add(f"{what}, nothing else", "ns", {"single": _off(ns, zero[single])})
        v4, v6 = Ends(False), Ends(True)
        k = Loaded("secondary", "programs", where)
        try:
            for ends in (v4, v6):
                ends.learn(k)
            _measure(k, _secondary_paths(v4, v6), zero, part)
        finally:
            k.close()
        k = Loaded("secondary", "programs-xdp", where, rewrite_at_xdp=True)
        try:
            for ends in (v4, v6):
                ends.learn(k)
            _measure(
                k, [Path_("svm_out", "already translated at XDP", v4.guests(1448), single,
                          verdict=REDIRECT)], zero, part,
            )  # fmt: skip
            for ends, v in ((v4, "IPv4"), (v6, "IPv6")):
                ns = repeated(k.fd("svm_out_xdp"), ends.guests(1448))
                part.add(
                    f"svm_out_xdp: {v}, timestamps", "ns",
                    {"repeated": _off(ns, statistics.median(xdp_zero))},
                )  # fmt: skip
        finally:
            k.close()
        k = Loaded("primary", "programs", where)
        try:
            client = tcp(bytes(1448), reverse=True)
            _measure(k, [
                Path_("pvm_in", "bypass", client, repeated, mode=Mode.BYPASS, verdict=UNSPEC),
                Path_("pvm_out", "bypass", data, repeated, mode=Mode.BYPASS, verdict=OK),
                Path_("pvm_out", "drop_mode", data, repeated, mode=Mode.DROP, verdict=SHOT),
                Path_("pvm_release", "", data, repeated, verdict=REDIRECT),
                Path_("svm_arrival", "not ours", data, repeated, verdict=OK),
            ], zero, part)  # fmt: skip
            k.set(Cfg.MODE, Mode.BYPASS)
        finally:
            k.close()


Frames = list[held.Write]


def _stream(side: int, size: int, upto: int, v6: bool = False, start: int = 0) -> Frames:
    """Return one guest's segments of `size` bytes, `upto` bytes in all, on the first connection."""
    if not v6:
        return [
            (side, held.frame(held.PORT, at, min(size, upto - at), bool(side)))
            for at in range(start, upto, size)
        ]
    out = []
    for at in range(start, upto, size):
        data = tcp(
            bytes(min(size, upto - at)), seq=1000 + at, dport=held.PORT, partial=True, v6=True
        )
        shift = 4 if side else 0
        if side:
            data = tagged(data, abi.KIND_SVM, 1)
        out.append((side, struct.pack("<BBHHHH", 1, 0, 0, 0, 54 + shift, 16) + data))
    return out


def _datagrams(side: int, size: int, count: int = 300) -> Frames:
    """Return one guest's datagrams, all of the same flow."""
    return [(side, held.frame(held.PORT, 0, size, bool(side), True))] * count


def _acks(side: int, count: int) -> Frames:
    """Return bare acks, each of 1000 bytes more."""
    out = []
    for i in range(1, count + 1):
        data = tcp(b"", ack=5000 + 1000 * i, dport=held.PORT, flags=ACK)
        out.append((side, bytes(10) + (tagged(data, abi.KIND_SVM, 1) if side else data)))
    return out


@dataclass(frozen=True)
class Scene:
    """Batches of frames; the last one is measured, and has `reason` for most of its frames."""

    prog: str
    name: str
    reason: str
    batches: tuple[Frames, ...]
    arm: str = "fast path"  # of held.ARMS
    v6: bool = False
    udp: bool = False


def scenes() -> list[Scene]:
    """Return every path of the fast path, and the slow path's counterparts."""
    out = []
    few = 300 * 1448
    for name, size, upto, v6 in (
        ("1448 bytes", 1448, few, False), ("1448 bytes, IPv6", 1448, few, True),
        ("64,000 bytes", 64_000, 512_000, False),
    ):  # fmt: skip
        p, s = (_stream(i, size, upto, v6) for i in (0, 1))
        out += [
            Scene("pvm_out", f"held, {name}", "offload_held", (p,), v6=v6),
            Scene("svm_arrival", f"becomes the PVM's, {name}", "offload_released", (p, s), v6=v6),
            Scene("svm_arrival", f"held, {name}", "offload_held", (s,), v6=v6),
            Scene("pvm_out", f"passes, {name}", "offload_passed", (s, p), v6=v6),
            Scene("pvm_out", f"captured, {name}", "punt", (p,), "slow path", v6),
            Scene("svm_arrival", f"captured, {name}", "punt", (s,), "slow path", v6),
        ]
    for size in (1400, 200):
        p, s = (_datagrams(i, size) for i in (0, 1))
        name = f"UDP, {size:,} bytes"
        out += [
            Scene("pvm_out", f"held, {name}", "offload_held", (p,), udp=True),
            Scene(
                "svm_arrival", f"becomes the PVM's, {name}", "offload_released", (p, s), udp=True
            ),
            Scene("pvm_out", f"passes, {name}", "offload_passed", (s, p), udp=True),
        ]
    # The SVM's frames end in the middle of the PVM's: each frame goes beyond what the other has.
    half, later = _stream(0, 724, 724), _stream(0, 1448, few, start=724)
    turns = [w for pair in zip(_stream(1, 1448, few), later, strict=False) for w in pair]
    apart = (half, turns)
    p, s, short = (_stream(*a) for a in ((0, 1448, few), (1, 1448, few), (1, 1000, few)))
    out += [
        Scene("pvm_out", "sent again, passes, 1448 bytes", "offload_passed", (p, s, p)),
        Scene("svm_arrival", "sent again, dropped, 1448 bytes", "offload_duplicate", (p, s, s)),
        Scene("svm_arrival", "rebuilt, half a frame apart", "offload_rebuilt", apart),
        Scene("pvm_out", "rebuilt, half a frame apart", "offload_rebuilt", apart),
        Scene(
            "svm_arrival", "becomes the PVM's, 1000 against 1448", "offload_released", (p, short)
        ),
        Scene("pvm_out", "ack passes", "offload_passed", (_acks(1, 200), _acks(0, 200))),
        Scene("pvm_out", "ack waits", "offload_held", (_acks(0, 200),)),
        Scene(
            "svm_arrival", "ack lets the PVM's go", "offload_acked", (_acks(0, 200), _acks(1, 200))
        ),
    ]
    return out


def _key(sc: Scene) -> FlowKey:
    return parse((udp if sc.udp else tcp)(b"", dport=held.PORT, v6=sc.v6)).key


def _new_connection(dp: Any, sc: Scene) -> None:
    """As held.offload_all(), for either family."""
    key = _key(sc)
    request = OffloadRequest(held.words(sc.udp), b"")
    dp.objects.map("conns").delete(conn_key(key))
    if not (dp.fast.offer(key) and dp.fast.offload(key, request, 0) is OffloadResult.ACCEPTED):
        raise RuntimeError("the connection was not taken")


def _scene(a: held.Arm, sc: Scene, runs: int) -> list[float]:
    """Return ns of the program per frame of the last batch."""
    dp = a.dp
    assert dp is not None
    out: list[float] = []
    for _ in range(runs):
        dp.drain(lambda e: None)
        dp.beat()
        if dp.fast is not None:
            dp.fast.reclaim(_key(sc))  # returns its buffer
            _new_connection(dp, sc)
        for batch in sc.batches[:-1]:
            held.write_all(batch, a.fds)
        before = dp.counters()[sc.prog]
        ns, n = ran(dp.objects.programs[sc.prog].fd)
        held.write_all(sc.batches[-1], a.fds)
        ns1, n1 = ran(dp.objects.programs[sc.prog].fd)
        after = dp.counters()[sc.prog]
        took = {r: c - before[r][0] for r, (c, _) in after.items() if c != before[r][0]}
        if took.get(sc.reason, 0) < 0.9 * (n1 - n):
            raise RuntimeError(f"the frames went another way: {took}")
        out.append((ns1 - ns) / (n1 - n))
    return out


def on_devices(part: Part, runs: int) -> None:
    """Measure everything that needs a device, or changes with each frame."""
    with ExitStack() as stack:
        stack.enter_context(run_stats())
        arms = {n: stack.enter_context(held.arm(n)) for n in ("fast path", "slow path")}
        net, guest, peer = stack.enter_context(held.bench_net("cxbz"))
        with empties() as e, inside(net.host):
            attach.attach_tc("tap0", "ingress", e["empty_shot"], held.PAIR, None)  # type: ignore[arg-type]
            zeros = []
            for _ in range(runs):
                ns, n = ran(e["empty_shot"].fd)
                held.write_all(_stream(0, 1448, 300 * 1448), (guest.fd, peer.fd))
                ns1, n1 = ran(e["empty_shot"].fd)
                zeros.append((ns1 - ns) / (n1 - n))
        part.add("empty program, tc (taken off below)", "ns", {"on devices": Spread.of(zeros)})
        zero = statistics.median(zeros)
        for sc in scenes():
            try:
                ns = _scene(arms[sc.arm], sc, runs)
            except (RuntimeError, OSError) as err:
                part.error(f"{sc.prog}: {sc.name}", str(err))
                continue
            part.add(f"{sc.prog}: {sc.name}", "ns", {"on devices": _off(ns, zero)})


def mirror(part: Part, runs: int) -> None:
    """Measure pvm_in, with the clone's path to the peer link, by frames that a client sends."""
    with run_stats(), held.arm("fast path") as k:
        assert k.dp is not None
        fd = k.dp.objects.programs["pvm_in"].fd
        dp = k.dp
        import socket

        with inside(k.net.client):
            s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
            s.bind(("c0", 0))
        client = tcp(bytes(1448), reverse=True)
        try:
            for name, mode in (("mirrors", Mode.RUN), ("bypass, on the device", Mode.BYPASS)):
                dp.mode = mode
                out = []
                for _ in range(runs):
                    ns, n = ran(fd)
                    for _ in range(300):
                        s.send(client)
                    ns1, n1 = ran(fd)
                    if n1 > n:
                        out.append((ns1 - ns) / (n1 - n))
                if out:
                    part.add(f"pvm_in: {name}", "ns", {"on devices": Spread.of(out)})
                else:
                    part.error(f"pvm_in: {name}", "no frame came to the tap")
        finally:
            dp.mode = Mode.RUN
            s.close()


def run(part: Part, quick: bool, _build: Path) -> None:
    """Run everything."""
    test_runs(part)
    on_devices(part, 5)
    mirror(part, 5)


__all__ = ["Loaded", "empties", "fdinfo", "run"]
