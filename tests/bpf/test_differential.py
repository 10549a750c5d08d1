# SPDX-License-Identifier: GPL-2.0-or-later
"""Send random traffic through kernel and model: bytes, reasons and entries must be equal."""

from __future__ import annotations

import errno
import random
import struct
from collections import Counter
from dataclasses import astuple

import pytest

from colo_xdp import abi
from colo_xdp.abi import Mode, Reason
from colo_xdp.conntrack import headers, rewriter

from . import craft
from .conftest import TC_OK, TC_REDIRECT, TC_SHOT, TC_UNSPEC, XDP_PASS, Kernel
from .craft import ACK, FIN, PSH, RST, SYN

M = 0xFFFFFFFF


class Conn:
    """A connection whose two guests chose different numbers, with faults."""

    def __init__(self, rng: random.Random, port: int) -> None:
        self.rng = rng
        self.v6 = rng.random() < 0.4
        self.guest, self.client = (
            (craft.GUEST6, craft.CLIENT6) if self.v6 else (craft.GUEST4, craft.CLIENT4)
        )
        vid = rng.randrange(1, 4095)
        self.vlans: list[tuple[int, int]] = rng.choice(
            [[], [], [(0x8100, vid)], [(0x8100, 0x6000 | vid)], [(0x88A8, vid), (0x8100, 9)]]
        )
        self.port = port
        self.marks = random.Random(port)
        self.begin()

    def begin(self) -> None:
        r = self.rng
        edge = [0, 1, M, M - 1, M - 1000, 1 << 31]
        pick = lambda: r.choice(edge) if r.random() < 0.2 else r.getrandbits(32)  # noqa: E731
        self.c, self.p, self.s = pick(), pick(), pick()
        self.ts_c, self.ts_p, self.ts_s = pick(), pick(), pick()
        self.with_ts = r.random() < 0.7
        self.sent_c = self.sent_s = 0
        self.active = r.random() < 0.3
        self.script = list(self._script())

    def _script(self) -> list[tuple[str, int]]:
        r = self.rng
        if self.active:
            open_ = [("G", SYN), ("C", SYN | ACK), ("G", ACK)]
            if r.random() < 0.2:
                open_ = [("G", SYN), ("C", SYN), ("G", SYN | ACK), ("C", SYN | ACK)]
        else:
            open_ = [("C", SYN), ("G", SYN | ACK), ("C", ACK)]
            if r.random() < 0.3:
                open_ = [("C", SYN), ("C", ACK), ("G", SYN | ACK), ("C", ACK)]
            if r.random() < 0.2:  # RFC 7413: the guest answers before it has an ack
                open_[2:2] = [("G", ACK)] * r.randrange(1, 3)
        for _ in range(r.choice((0, 1, 1, 2))):  # of the PVM, when it is sent and as it leaves
            open_.insert(r.randrange(1, 4), ("P", SYN if self.active else SYN | ACK))
        data = [(r.choice("CG"), r.choice((ACK, ACK | PSH))) for _ in range(r.randrange(8))]
        close = r.choice(
            [
                [],
                [("C", FIN | ACK), ("G", FIN | ACK), ("C", ACK)],
                [("G", FIN | ACK), ("C", ACK), ("C", FIN | ACK), ("G", ACK)],
                [("G", FIN | ACK), ("C", FIN | ACK), ("G", ACK), ("C", ACK)],
                [("C", RST)],
                [("C", RST | ACK)],
                [("G", RST)],
                [("G", RST | ACK)],
                [("G", FIN)],
            ]
        )
        return open_ + data + close

    def options(self, side: str, flags: int) -> bytes:
        r = self.rng
        out = b""
        if flags & SYN and r.random() < 0.5:
            out += b"\x02\x04\x05\xb4"
        parts = []
        if self.with_ts:
            lead = bytes([1]) * r.choice((2, 2, 2, 0, 1, 3))
            val, ecr = (self.ts_s, self.ts_c) if side == "G" else (self.ts_c, self.ts_p)
            parts.append(craft.timestamps(val + r.randrange(3) & M, ecr, lead=lead))
        if side == "P":
            parts = [craft.timestamps(self.ts_p, self.ts_c)] if self.with_ts else []
        if side == "C" and r.random() < 0.3:
            base = self.p + self.sent_s
            edges = [base + r.randrange(1 << 16) & M for _ in range(2 * r.randrange(1, 4))]
            parts.append(craft.sack(*edges, lead=bytes([1]) * r.randrange(4)))
        r.shuffle(parts)
        for part in parts:
            if len(out) + len(part) <= 40:
                out += part
        if r.random() < 0.05:
            junk = r.randbytes(r.randrange(1, 12))
            at = r.randrange(len(out) + 1)
            out = (out[:at] + junk + out[at:])[:40]
        return out

    def quoting(self) -> bytes:
        """Build an ICMP error about a segment of the guest, as the network has seen it."""
        r = self.rng
        seq = self.p + 1 + r.randrange(-2, 3000)
        flags = r.choice((ACK, ACK, SYN | ACK, RST | ACK, FIN | ACK))
        options = craft.timestamps(self.ts_p, self.ts_c, lead=bytes(r.choice((1, 0)) for _ in "12"))
        if r.random() < 0.3:
            options = self.options("P", flags) + craft.sack(1, 2)
        body = craft.tcp_segment(
            self.guest, self.client, self.port, 40000, 0 if r.random() < 0.05 else seq, self.c + 1,
            flags, r.randbytes(r.choice((0, 1, 700))), options[:40], partial=r.random() < 0.1,
        )  # fmt: skip
        kw: dict[str, object] = {}
        if r.random() < 0.2 and self.v6:
            kw["extensions"] = [
                (r.choice((0, 43, 60)), bytes(6 + 8 * r.randrange(2)))
                for _ in range(r.randrange(7))
            ]
        elif r.random() < 0.2:
            kw["ip_options"] = bytes([1] * 4 * r.randrange(1, 11))
        if r.random() < 0.1:
            kw["fragment"] = (r.choice((0, 8)), r.random() < 0.5)
        quote = craft.ip(self.guest, self.client, 6, body, **kw)[14:]  # type: ignore[arg-type]
        if r.random() < 0.5:
            quote = quote[: r.choice((28, 48, 60, 68, 576, r.randrange(20, 100)))]
        if r.random() < 0.1:
            quote = quote[:20] + r.randbytes(4) + quote[24:]
        typ = r.choice((1, 2, 2, 3, 4, 128) if self.v6 else (3, 3, 4, 11, 12, 8))
        router = "fd09::9" if self.v6 else "10.9.0.9"
        spoil = r.choice((0, 0, 0, 1))
        return craft.icmp_error(router, self.guest, typ, quote, vlans=self.vlans, spoil=spoil)

    def next(self) -> tuple[str, bytes]:
        r = self.rng
        if r.random() < 0.1:
            return "C", self.quoting()
        if not self.script:
            self.begin()
        side, flags = self.script[0]
        if r.random() < 0.85:
            self.script.pop(0)
        if r.random() < 0.04:  # something out of order
            side, flags = r.choice("CG"), r.choice((SYN, SYN | ACK, ACK, RST, FIN | ACK, 0, 0x3F))
        if r.random() < 0.03:  # a guest that chooses its numbers again
            self.s = r.getrandbits(32)
        if r.random() < 0.03:
            self.c = r.getrandbits(32)
        payload = b"" if flags & (SYN | RST) else r.randbytes(r.choice((0, 0, 1, 5, 100, 1447)))
        if flags & SYN and r.random() < 0.1:
            payload = r.randbytes(5)
        ack_on = bool(flags & ACK)
        begun = 0 if flags & SYN else 1
        if side == "P":
            seq, ack = self.p, (self.c + 1 + self.sent_c * (r.random() < 0.5)) * ack_on
        elif side == "C":
            seq, ack = self.c + begun + self.sent_c, (self.p + 1 + self.sent_s) * ack_on
            self.sent_c += len(payload)
        else:
            seq, ack = self.s + begun + self.sent_s, (self.c + 1 + self.sent_c) * ack_on
            if flags & RST and r.random() < 0.3:
                seq = 0
            self.sent_s += len(payload)
        ends = (self.client, self.guest) if side == "C" else (self.guest, self.client)
        ports = (40000, self.port) if side == "C" else (self.port, 40000)
        body = craft.tcp_segment(
            *ends, *ports, seq, ack, flags, payload, self.options(side, flags),
            spoil=r.choice((0,) * 20 + (1, 0xFFFF, r.getrandbits(16))),
        )  # fmt: skip
        vlans, marks = self.vlans, self.marks
        if marks.random() < 0.2:  # this one has a priority, or another
            vlans = [(tpid, tci & 0xFFF | marks.getrandbits(4) << 12) for tpid, tci in vlans]
            if len(vlans) < 2:
                at = marks.randrange(len(vlans) + 1)
                vlans.insert(at, (0x8100, marks.getrandbits(4) << 12))
        kw: dict[str, object] = {"vlans": vlans}
        if r.random() < 0.1:
            if self.v6:
                kw["extensions"] = [
                    (r.choice((0, 43, 60)), bytes(6 + 8 * r.randrange(3)))
                    for _ in range(r.randrange(1, 6))
                ]
            else:
                kw["ip_options"] = bytes([1] * 4 * r.randrange(1, 11))
        if r.random() < 0.03:
            kw["fragment"] = (r.choice((0, 8, 512)), r.random() < 0.5)
        if r.random() < 0.2:
            kw["trailer"] = r.randbytes(r.randrange(1, 30))
        frame = craft.ip(*ends, 6, body, **kw)  # type: ignore[arg-type]
        return side, frame


def spoil(rng: random.Random, frame: bytes) -> bytes:
    """Return a malformed variant of the frame."""
    out = bytearray(frame)
    kind = rng.randrange(4)
    if kind == 0:
        return bytes(out[: rng.randrange(14, len(out))])
    if kind == 1:
        for _ in range(rng.randrange(1, 4)):
            out[rng.randrange(12, min(len(out), 90))] = rng.getrandbits(8)
    elif kind == 2:  # lengths and types
        off, _ = craft.l4_at(frame) if rng.random() < 0.5 else (34, 0)
        at = rng.choice((12, 13, 14, 16, 17, 18, 19, 20, off + 12, off + 20, off + 21))
        if at < len(out):
            out[at] = rng.choice((0, 1, 0xFF, 0x40, 0x45, 0x4F, 0xF0, rng.getrandbits(8)))
    else:
        return bytes(out[:14]) + rng.randbytes(rng.randrange(0, 120))
    return bytes(out)


def compare(kernel: Kernel, out_prog: str, seed: int, frames: int) -> Counter[str]:
    """Feed both; the programs' counters are compared at the end."""
    rng = random.Random(seed)
    model = rewriter.Rewriter(epoch=7)
    conns = [Conn(rng, 1000 + i) for i in range(12)]
    seen: Counter[str] = Counter()
    progs = {p: kernel.counts(abi.Prog[p.upper()]) for p in ("svm_in", "svm_deliver", out_prog)}
    reasons: dict[str, Counter[str]] = {p: Counter() for p in progs}
    for i in range(frames):
        if rng.random() < 0.002:
            model.epoch = (model.epoch + 1) & 0xFFF
            kernel.set(abi.Cfg.EPOCH, model.epoch)
        if rng.random() < (0.02 if model.mode == Mode.TAKEOVER else 0.004):
            model.mode = Mode.RUN if model.mode == Mode.TAKEOVER else Mode.TAKEOVER
            kernel.set(abi.Cfg.MODE, model.mode)
        if model.flows and rng.random() < 0.004:
            key = rng.choice(list(model.flows))
            if kernel.flow(key) is not None:
                model.flows[key].epoch = abi.EPOCH_BASE
                kernel.keep_for_good(key)
                seen["for good"] += 1
        conn = rng.choice(conns)
        side, frame = conn.next()
        if frame[12:14] in (b"\x08\x00", b"\x86\xdd") and rng.random() < 0.02:
            frame += bytes(rng.randrange(20))  # padding
        if rng.random() < 0.1 and side != "P":  # a tag alone cannot be removed
            frame = spoil(rng, frame)
        prog = {"C": "svm_deliver", "P": "svm_in"}.get(side, out_prog)
        if side == "P":
            told = frame[:12] + struct.pack("!HH", abi.TPID, abi.KIND_SYN << 13) + frame[12:]
            try:
                verdict, _ = kernel.bare(prog, told)
            except OSError as e:
                assert e.errno == errno.EINVAL
                continue
            reason = model.note_pvm_header(frame)
            reasons[prog][reason.name] += 1
            seen[reason.name] += 1
            assert verdict == TC_SHOT
            assert kernel.tables() == (model.flows, model.opening), f"{reason}: {frame.hex()}"
            continue
        try:
            verdict, got = kernel.bare(prog, frame)
        except OSError as e:
            assert e.errno == errno.EINVAL  # the kernel refuses such a short frame in a test run
            seen["refused"] += 1
            continue
        want, reason = model.to_svm(frame) if side == "C" else model.from_svm(frame)
        where = f"seed {seed} frame {i} {prog} {model.mode.name} {reason.name}\n{frame.hex()}"
        assert got.hex() == want.hex(), where
        takeover = model.mode == Mode.TAKEOVER
        if prog == "svm_deliver":
            assert verdict == TC_REDIRECT, where
        elif prog == "svm_out_xdp":
            assert verdict == XDP_PASS, where
        else:
            assert verdict == (TC_OK if takeover else TC_REDIRECT), where
        if reason is Reason.PASS_REDIRECTED and (
            prog == "svm_out_xdp" or (takeover and prog == "svm_out")
        ):
            reason = Reason.PASS
        reasons[prog][reason.name] += 1
        seen[reason.name] += 1
        seen["quote moved"] += reason is Reason.PASS_REWRITTEN and not headers.parse(frame).is_tcp
        p = None
        try:
            p = headers.parse(frame)
        except headers.BadFrame:
            continue
        if p.is_tcp:
            ends = (p.dst, p.src, p.dport, p.sport) if side == "C" else (
                p.src, p.dst, p.sport, p.dport)  # fmt: skip
            key = abi.FLOW_KEY.pack(*ends, p.vlan)
            entry = kernel.flow(key)
            assert entry == model.flows.get(key), where
            entry = kernel.flow(key, opening=True)
            assert entry == model.opening.get(key), where
            if entry:
                seen[f"state {entry.state}"] += 1
    for name, before in progs.items():
        now = kernel.counts(abi.Prog[name.upper()])
        assert {k: v - before[k] for k, v in now.items() if v != before[k]} == reasons[name]
    assert kernel.tables() == (model.flows, model.opening)
    print(seen)
    return seen


@pytest.mark.parametrize("seed", range(6))
def test_tc(tc: Kernel, seed: int) -> None:
    seen = compare(tc, "svm_out", seed, 4000)
    assert seen["PASS_REWRITTEN"] > 800
    assert seen["NOTE_UNPARSED"] > 50
    assert seen["quote moved"] > 100


@pytest.mark.parametrize("seed", range(6))
def test_xdp(xdp: Kernel, seed: int) -> None:
    seen = compare(xdp, "svm_out_xdp", 100 + seed, 4000)
    assert seen["PASS_REWRITTEN"] > 800
    assert seen["NOTE_UNPARSED"] > 50
    assert seen["quote moved"] > 100


@pytest.mark.parametrize("check", [0, 1, 0x8000, 0xFFFE, 0xFFFF])
@pytest.mark.parametrize(
    ("isn_p", "isn_s"), [(0, 0), (0, 1), (1, 0), (0, M), (M, 0), (1000, 1000 + 0x10000), (5, 77000)]
)
def test_checksum_corners(tc: Kernel, xdp: Kernel, check: int, isn_p: int, isn_s: int) -> None:
    """0x0000 and 0xFFFF, and changes that add nothing to the sum."""
    for kernel, prog in ((tc, "svm_out"), (xdp, "svm_out_xdp")):
        kernel.reset()
        model = rewriter.Rewriter(epoch=7)
        ends = (craft.CLIENT4, craft.GUEST4, 40000, 80)
        back = (craft.GUEST4, craft.CLIENT4, 80, 40000)
        for seq in (isn_s, isn_s - 1, isn_s + 1, 0xFFFFFFFF, 0):
            for where, args in (
                ("C", (*ends, 5000, 0, SYN)),
                ("G", (*back, isn_s, 5001, SYN | ACK)),
                ("C", (*ends, 5001, isn_p + 1, ACK)),
                ("G", (*back, seq, 5001, ACK)),
                ("C", (*ends, 5001, seq, ACK)),
            ):
                body = craft.tcp_segment(*args)
                body = body[:16] + check.to_bytes(2, "big") + body[18:]
                frame = craft.ip(*args[:2], 6, body)
                to_svm = where == "C"
                want, _ = model.to_svm(frame) if to_svm else model.from_svm(frame)
                _, got = kernel.bare("svm_deliver" if to_svm else prog, frame)
                assert got.hex() == want.hex()


def encode_flow(f: rewriter.TrackedConnection) -> bytes:
    return abi.FLOW.pack(0, *astuple(f))


@pytest.mark.parametrize("seed", range(4))
def test_a_guest_with_numbers_of_its_own(guest: Kernel, seed: int) -> None:
    """As the PVM it is translated by what it took over with, and no new entry is created."""
    rng = random.Random(900 + seed)
    model = rewriter.Rewriter(epoch=7)
    conns = [Conn(rng, 1000 + i) for i in range(40)]
    for _ in range(200):
        side, frame = rng.choice(conns).next()
        {"C": model.to_svm, "P": model.note_pvm_header}.get(side, model.from_svm)(frame)
    for key, f in model.flows.items():
        if rng.random() < 0.3:
            f.epoch = rng.choice((abi.EPOCH_BASE, abi.EPOCH_BASE, 6))
        guest.flow_map.set(key, encode_flow(f))
    for key, f in model.opening.items():
        guest.opening_map.set(key, encode_flow(f))
    model.mode = Mode.TAKEOVER
    seen: Counter[str] = Counter()
    progs = {p: guest.counts(abi.Prog[p.upper()]) for p in ("promoted_in", "promoted_out")}
    reasons: dict[str, Counter[str]] = {p: Counter() for p in progs}
    for i in range(2500):
        if i % 500 == 250:
            mode = rng.choice(list(Mode))  # the mode makes no difference here
            guest.set(abi.Cfg.MODE, mode)
        side, frame = rng.choice(conns).next()
        if side == "P":
            continue
        if rng.random() < 0.05:
            frame = spoil(rng, frame)
        prog = "promoted_in" if side == "C" else "promoted_out"
        try:
            verdict, got = guest.bare(prog, frame)
        except OSError as e:
            assert e.errno == errno.EINVAL
            continue
        want, reason = model.to_svm(frame) if side == "C" else model.from_svm(frame)
        assert got.hex() == want.hex(), f"seed {seed} frame {i} {prog} {reason.name}"
        assert verdict == TC_UNSPEC
        reason = Reason.PASS if reason is Reason.PASS_REDIRECTED else reason
        reasons[prog][reason.name] += 1
        seen[reason.name] += 1
    for name, before in progs.items():
        now = guest.counts(abi.Prog[name.upper()])
        assert {k: v - before[k] for k, v in now.items() if v != before[k]} == reasons[name]
    assert guest.tables() == (model.flows, model.opening)
    assert seen["PASS_REWRITTEN"] > 50, seen


def test_a_released_frame_is_not_translated_again(guest: Kernel) -> None:
    ends = (craft.GUEST4, craft.CLIENT4)
    frame = craft.ip(*ends, 6, craft.tcp_segment(*ends, 80, 40000, 1, 1, ACK))
    for prog in ("promoted_in", "promoted_out"):
        ran = guest.run(prog, frame, abi.MARK)
        assert (ran.verdict, ran.frame, ran.reasons) == (TC_UNSPEC, frame, {"PASS_RELEASED": 1})
