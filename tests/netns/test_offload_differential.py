# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare the kernel's fast path with tests/sim/offload_model.py, frame by frame.

Compared are reasons, frames, connection state and buffers.
"""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.abi import OWNER_KERNEL, SIDE_PVM, SIDE_SVM, Cfg, CtlOp, CtlResult, Mode, Prog, Reason
from colo_xdp.conntrack.headers import parse
from colo_xdp.datapath import syscall
from colo_xdp.datapath.ring import CapturedFrame, summed
from tests.netns.conftest import Net, inside, own, sh
from tests.netns.frames import tcp, udp
from tests.netns.kernel_lab import (
    ACK,
    BUFFERS,
    CWR,
    ECE,
    FIN,
    M32,
    PSH,
    RST,
    SIZES,
    SYN,
    TS,
    URG,
    Datagrams,
    Lab,
    Talk,
    packet,
)
from tests.sim.mutants import KERNEL_MUTANTS
from tests.sim.offload_model import BUFFER, Conn, KernelModel

SEEDS, STEPS = 10, 2500
PRIORITY = 0x6000  # a tag without a VLAN: such a frame's connection has none


class Run:
    """Random frames through both."""

    def __init__(self, lab: Lab, seed: int) -> None:
        self.lab, self.rnd, self.model = lab, random.Random(seed), KernelModel(BUFFERS)
        lab.reset()
        m = self.model
        m.mode, m.epoch, m.on = Mode.RUN, 5, True
        self.uplink = 0
        kinds = (Talk, Talk, Datagrams)
        self.talks = [
            (Datagrams if i == 1 else self.rnd.choice(kinds))(self.rnd, 40000 + i)
            for i in range(self.rnd.choice((3, 9)))
        ]
        for t in self.talks:
            lab.conns.set(t.key, bytes(abi.CONN.size))
            m.conns[t.key] = Conn()
        self.now, self.said = 0, Counter[Reason]()
        self.since = {t.key: (0, 0) for t in self.talks}
        self.seen: Counter[str] = Counter()

    # -- what is done

    def step(self) -> None:
        rnd = self.rnd
        self.now += 1
        t = rnd.choice(self.talks)
        c = self.model.conns[t.key]
        x = rnd.random()
        if x < 0.004:
            self.uplink = 0 if self.uplink else self.lab.index["up0"]
            self.lab.set(Cfg.UPLINK, self.uplink)
        elif x < 0.007:
            self.new_epoch()
        elif x < 0.02:
            op = rnd.choice((CtlOp.RECLAIM, CtlOp.RECLAIM, CtlOp.FREE, CtlOp.CLAIM))
            self.control(op, t)
        elif (c.owner != OWNER_KERNEL or t.over) and rnd.random() < 0.5:
            if rnd.random() < 0.8:
                self.control(CtlOp.RECLAIM, t)
                self.control(CtlOp.FREE, t)
            self.offload_datagrams(t) if isinstance(t, Datagrams) else self.offload(t)
        elif isinstance(t, Datagrams):
            self.datagram(t)
        elif rnd.random() < 0.2:
            self.client_says(t)
        else:
            self.frame(t)
        self.compare(t)

    def client_says(self, t: Talk) -> None:
        """Send a client's frame: mostly an ack of all that has left; or a forged or reordered
        one, and odd flags."""
        rnd, rel = self.rnd, self.model.conns[t.key].released
        ack = rel + rnd.choice((0, 0, 0, 0, 0, -1, -700, -5000, 1, 5000, 1 << 31))
        flags = rnd.choice((ACK, ACK, ACK, ACK | PSH, ACK | FIN, ACK | RST, ACK | SYN, RST, 0))
        frame = tcp(
            rnd.choice((b"", b"GET /")), seq=t.client0, ack=ack & M32, flags=flags, dport=t.port,
            v6=t.v6, reverse=True,
        )  # fmt: skip
        self.model.note_ack(frame)
        self.lab.client(frame)

    def new_epoch(self) -> None:
        self.model.epoch += 1
        self.lab.set(Cfg.EPOCH, self.model.epoch)

    def control(
        self, op: CtlOp, t: Talk | Datagrams, punt_seq: int = 0, words: bytes = b""
    ) -> CtlResult:
        since = self.rnd.choice((0, 1000 * self.now))
        message = abi.CTL.pack(op, punt_seq, t.key, words or bytes(abi.OFFLOAD.size), since)
        ours, theirs = self.model.control(message, self.now), self.lab.control(message)
        assert ours == theirs, f"{op!r}: the model says {ours!r}, the kernel {theirs!r}"
        self.seen[f"{op.name} {ours.name}"] += 1
        return ours

    def offload(self, t: Talk) -> None:
        """Offload a connection with any state that makes sense, and any history."""
        rnd, c = self.rnd, self.model.conns[t.key]
        rel = min(t.pos)
        out = rnd.choice((0, 0, 0, 0, 1, 100, 2000, 30_000, 200_000, BUFFER - 2000))
        past = rnd.choice(
            (0, 0, 1, 500, 65536, BUFFER - 2000, BUFFER, BUFFER + 5000, 2 * BUFFER - 1)
        )
        past = max(0, min(past, 2 * BUFFER - 1 - out, rel - 1000))
        ahead = rnd.choice((SIDE_PVM, SIDE_SVM)) if out else SIDE_PVM
        t.pos, t.end = [rel, rel], None
        t.pos[ahead] += out
        told = min(t.ack)
        t.ack = [told + rnd.choice((0, 0, 100)), told + rnd.choice((0, 0, 100))]
        t.win = [rnd.choice((0, 10, 500, 65535)) for _ in range(2)]
        pending = t.ack[0] > told
        header = b""
        if pending or (out and ahead == SIDE_PVM) or rnd.random() < 0.5:
            header = self.segment(t, SIDE_PVM, rel, b"", partial=rnd.random() < 0.5)
        doff = 20 + len(self.full(t.options))
        l4 = (54 if t.v6 else 34) if header else 0
        if past or out or (pending and rnd.random() < 0.9):
            full = self.control(CtlOp.CLAIM, t) is CtlResult.FULL
            if full and rnd.random() < 0.8:
                return
            kept = min(past + out, BUFFER)
            first = rel + out - kept
            data, at = t.body(first, kept), (first - (rel - past)) % BUFFER
            for side in () if full else (self.model, self.lab):
                ring = side.ring(c.buffer)
                n = min(kept, BUFFER - at)
                ring[at : at + n], ring[: kept - n] = data[:n], data[n:]
        words = abi.OFFLOAD.pack(
            self.model.epoch - (rnd.random() < 0.02), *(self.at(t, rel),),
            *((t.client0 + a) & M32 for a in (*t.ack, told)),
            *t.win, rnd.choice((min(t.win), t.win[0] // 3)), rnd.choice((536, 1448, 100, 8948, 0)),
            self.at(t, rel + out), self.at(t, rel - past), ahead, pending, l4,
            doff if header else 0, rnd.random() < 0.5, header[: l4 + doff], rnd.randbytes(64),
        )  # fmt: skip
        punt_seq = c.punt_seq + (rnd.random() < 0.1)
        self.control(CtlOp.OFFLOAD, t, punt_seq, words)

    def at(self, t: Talk, pos: int) -> int:
        return (t.seq0 + pos) & M32

    @staticmethod
    def full(options: bytes) -> bytes:
        return options + bytes(8) if options == TS else options

    def segment(self, t: Talk, side: int, pos: int, data: bytes, **k: Any) -> bytes:
        ack, win = (t.client0 + t.ack[side]) & M32, t.win[side]
        options = TS + self.rnd.randbytes(8) if t.options == TS else t.options
        k = {
            "options": options, "flags": ACK | PSH * self.rnd.randrange(2), "window": win,
            "tos": self.rnd.choice((0, 2, 0xB9)), "ident": self.rnd.getrandbits(16),
        } | k  # fmt: skip
        return tcp(data, seq=self.at(t, pos), ack=ack, dport=t.port, v6=t.v6, **k)

    def frame(self, t: Talk) -> None:
        rnd = self.rnd
        side = rnd.choice((SIDE_PVM, SIDE_SVM))
        lead = t.pos[side] - t.pos[1 - side]
        if lead > rnd.choice((1000, 20_000, 20_000, 20_000, 300_000, 700_000)):
            side, lead = 1 - side, -lead
        pos, n = t.pos[side], 0
        k: dict[str, Any] = {}
        if t.end is None and rnd.random() < 0.05:
            t.end = max(t.pos) + rnd.choice((0, 0, 0, 500, 3000))
        if rnd.random() < 0.3:
            t.ack[side] += rnd.choice((1, 100, 3000))
        if rnd.random() < 0.1:
            t.win[side] = rnd.choice((0, 1, 100, 200, 500, 501, 65535))
        x = rnd.random()
        if x < 0.6:
            n = min(rnd.choice(SIZES), -lead) if lead < 0 and x < 0.3 else rnd.choice(SIZES)
            if t.end is not None:  # seldom a byte too much, or a FIN too early
                n = max(0, min(n, t.end + (rnd.random() < 0.02) - pos))
                if (
                    pos <= t.end
                    and (pos + n == t.end or rnd.random() < 0.02)
                    and rnd.random() < 0.8
                ):
                    k["flags"] = ACK | FIN | PSH * rnd.randrange(2)
            t.pos[side] = pos + n + ("flags" in k)
        elif x < 0.72:  # again; rarely from before the history, or across its edge
            n = rnd.choice(SIZES)
            if rnd.random() < 0.05:
                k["flags"] = ACK | FIN
            back = rnd.choice(
                (n, n, n + 10, n // 2, 5000, 70_000, BUFFER - 10, BUFFER, BUFFER + 2000)
            )
            pos -= back
        elif x < 0.73:
            pos, n = pos + rnd.choice((1, 5000)), rnd.choice((0, 500))
        elif x < 0.74:
            t.ack[side] -= 50
        data = bytearray(t.body(pos, n))
        x = rnd.random()
        if x < 0.01 and n:
            data[rnd.choice((0, n - 1, rnd.randrange(n)))] ^= 1 << rnd.randrange(8)
        elif x < 0.02:
            k["flags"] = rnd.choice(
                (ACK | FIN, SYN, RST, ACK | RST, 0, ACK | URG, ACK | ECE, ACK | CWR)
            )
        elif x < 0.023:
            k["reserved"] = rnd.choice((1, 1, 8))  # AE, and bits without a name
        elif x < 0.026:
            k["df"] = False
        elif x < 0.031:
            k["options"] = rnd.choice((b"", TS + bytes(8), b"\1" * 4, b"\1" * 12))
        elif x < 0.034 and n < 3900:
            k["vlan"] = rnd.choice((7, PRIORITY))
        partial, gso = rnd.random() < 0.5 and "vlan" not in k, 0
        if n > 3900 or (n > 600 and "vlan" not in k and rnd.random() < 0.3):
            gso = rnd.choice([g for g in (536, 1448, 1448, 2047, 2048, 3800) if g < n])
            partial = True
        frame = self.segment(t, side, pos, bytes(data), partial=partial, **k)
        if not gso and rnd.random() < 0.05:
            frame += bytes(rnd.choice((1, 6)))
        self.through(t, side, frame, gso, partial)

    # -- datagrams

    def offload_datagrams(self, t: Datagrams) -> None:
        """Offload a flow of which some datagrams of one side wait, or none."""
        rnd, m, lab = self.rnd, self.model, self.lab
        first, ahead = min(t.said), rnd.choice((SIDE_PVM, SIDE_SVM))
        number = rnd.choice((0, 0, 1, 5, 100, 4000))
        data = b""
        for i in range(first, first + number):
            body = t.body(i)
            frame = udp(body, dport=t.port, v6=t.v6, partial=rnd.random() < 0.5)
            head = abi.DGRAM.pack(
                1000 * self.now + i, len(body), rnd.randrange(2), frame[: -len(body) or None]
            )
            more = head + body
            if len(data) + len(more) > BUFFER - 1000:
                number = i - first
                break
            data += more + bytes(-len(more) % abi.DGRAM_ALIGN)
        t.said = [first, first]
        t.said[ahead] += number
        start = rnd.choice((0, M32 - 127, rnd.getrandbits(25) * 128))
        # As if the ring had been in use: what waits may continue at its beginning.
        past = rnd.choice((0, 0, BUFFER - 128, BUFFER - 256, BUFFER - 4096)) if data else 0
        if data:
            if self.control(CtlOp.CLAIM, t) is CtlResult.FULL:
                return
            for side in (m, lab):
                ring = side.ring(m.conns[t.key].buffer)
                n = min(len(data), BUFFER - past)
                ring[past : past + n], ring[: len(data) - n] = data[:n], data[n:]
        words = abi.OFFLOAD.pack(
            m.epoch - (rnd.random() < 0.02), start, *[0] * 7, (start + len(data)) & M32,
            (start - past) & M32, ahead, 0, 0, 0, 0, b"", rnd.randbytes(64),
        )  # fmt: skip
        self.control(CtlOp.OFFLOAD, t, m.conns[t.key].punt_seq + (rnd.random() < 0.1), words)

    def datagram(self, t: Datagrams) -> None:
        """Send a datagram, mostly the next one of either guest."""
        rnd = self.rnd
        side = rnd.choice((SIDE_PVM, SIDE_SVM))
        if t.said[side] - t.said[1 - side] > rnd.choice((0, 3, 40, 400, 10_000)):
            side = 1 - side
        number, x = t.said[side], rnd.random()
        t.said[side] += 1
        if x < 0.01:
            number += 1  # reordered
        elif x < 0.015:
            t.said[side] += 1  # lost
        body = bytearray(t.body(number))
        x = rnd.random()
        if x < 0.01 and body:
            body[rnd.choice((0, len(body) - 1, rnd.randrange(len(body))))] ^= 1 << rnd.randrange(8)
        elif x < 0.015:
            body += b"x"
        vlan = rnd.choice((7, PRIORITY)) * (rnd.random() < 0.005 and len(body) < 3900)
        partial, gso = not vlan and rnd.random() < 0.5, 0
        if len(body) > 3900 or (len(body) > 700 and not vlan and rnd.random() < 0.01):
            partial, gso = True, 700
        frame = udp(bytes(body), dport=t.port, v6=t.v6, partial=partial, vlan=vlan)
        l4 = 54 if t.v6 else 34
        if not vlan and not partial and not t.v6 and rnd.random() < 0.2:
            frame = frame[:40] + bytes(2) + frame[42:]  # RFC 768: no checksum
        x = rnd.random()
        if x < 0.01 and not gso and not vlan:
            frame += b"\0"
        elif x < 0.015 and not vlan:
            frame = frame[: l4 + 4] + struct.pack("!H", 8 + len(body) // 2) + frame[l4 + 6 :]
        elsewhere = not (gso or vlan or partial) and len(body) >= 8 and rnd.random() < 0.02
        self.through(t, side, frame, gso, partial, elsewhere)

    def through(
        self, t: Talk | Datagrams, side: int, frame: bytes, gso: int, partial: bool,
        elsewhere: bool = False,
    ) -> None:  # fmt: skip
        """Put one frame through both, under any circumstances."""
        rnd, lab, m = self.rnd, self.lab, self.model
        x = rnd.random()
        epoch, busy = m.epoch, False
        if x < 0.004:
            lab.set(Cfg.MODE, Mode.CHECKPOINT)
            m.mode = Mode.CHECKPOINT
        elif x < 0.007:
            lab.set(Cfg.OFFLOAD, 0)
            m.on = False
        elif x < 0.01 and side == SIDE_SVM:
            epoch += rnd.choice((-1, 1))
        elif x < 0.012:
            busy, m.conns[t.key].lock = True, 1
            lab.conns.set(t.key, struct.pack("=Q", 1) + (lab.conns.get(t.key) or b"")[8:])
        rel = m.conns[t.key].released
        kernel_moved, model_moved = lab.maps.moved_ns(), m.moved_ns
        fate = m.fast(
            side, frame, self.now, gso_size=gso, partial=partial,
            epoch=epoch if epoch == m.epoch else -1, elsewhere=elsewhere,
        )  # fmt: skip
        said, self.said = m.counts - self.said, m.counts.copy()
        lab.send(side, frame, gso, partial, epoch, elsewhere=elsewhere)
        if elsewhere:
            self.seen["sums elsewhere"] += 1
            frame = summed(frame, (54 if t.v6 else 34) + 8, 6)
        what = f"step {self.now}, {'PS'[side]}, {len(frame)} bytes, port {t.port}"
        out = [(packet(o.frame), o.gso_size, o.partial) for o in fate.out]
        left = lab.leaving(len(out)) + lab.leaving(1, 0.0)
        expected = Counter({Reason(fate.reason).name if fate.reason else "PUNT": 1})
        self.seen.update(expected)
        if isinstance(t, Datagrams):
            self.seen.update(f"udp {name}" for name in (*expected, *(r.name for r in said)))
        elif frame[(54 if t.v6 else 34) + 13] & (FIN | SYN | RST) == FIN:
            self.seen.update(f"fin {name}" for name in expected)
        if side == SIDE_SVM and fate.reason == Reason.OFFLOAD_REBUILT:
            whole = (m.conns[t.key].released - rel) & M32 == parse(frame).payload_len
            self.seen["cut to the PVM's size"] += whole
        if side == SIDE_PVM and fate.reason == Reason.OFFLOAD_ACKED:
            self.seen["asked the client"] += 1
        if side == SIDE_PVM and not self.uplink and fate.reason in (
            Reason.OFFLOAD_REBUILT, Reason.OFFLOAD_ACKED,
        ):  # fmt: skip
            expected["PASS_RELEASED"] = len(out)
        got = lab.counted(Prog.SVM_ARRIVAL if side == SIDE_SVM else Prog.PVM_OUT)
        if side == SIDE_SVM:
            marked = lab.counted(Prog.PVM_OUT)
            assert marked["PASS_RELEASED"] == (0 if self.uplink else len(out)), what
        assert got == expected, what
        assert (lab.maps.moved_ns() != kernel_moved) == (m.moved_ns != model_moved), what
        why = Counter({r.name: k for r, k in said.items() if r >= Reason.PUNT_MODE})
        assert lab.counted(Prog.OFFLOAD) == why, what
        self.seen.update(why)
        assert len(left) == len(out), f"{what}: {expected}"
        for mine, theirs in zip(out, left, strict=True):
            assert theirs == mine, f"{what}: {expected}\nkernel {theirs}\nmodel  {mine}"
        events: list[CapturedFrame] = []
        lab.reader.drain(events.append)
        if fate.reason:
            assert not events, what
        else:
            (e,) = events
            assert (e.punt_seq, e.frame, e.gso_size, e.partial) == (
                fate.punt_seq, frame, gso, partial,
            ), what  # fmt: skip
            assert e.source == (abi.Source.SVM if side == SIDE_SVM else abi.Source.PVM)
            assert (e.epoch - epoch) & 0xFFF == 0
        if busy:
            m.conns[t.key].lock = 0
            lab.conns.set(t.key, bytes(8) + (lab.conns.get(t.key) or b"")[8:])
        if m.mode is not Mode.RUN or not m.on:
            lab.set(Cfg.MODE, Mode.RUN)
            lab.set(Cfg.OFFLOAD, 1)
            m.mode, m.on = Mode.RUN, True

    # -- what must be equal

    def conn(self, t: Talk | Datagrams) -> Conn:
        return Conn.unpack(self.lab.conns.get(t.key) or b"")

    def compare(self, last: Talk | Datagrams) -> None:
        for t in self.talks:
            mine, theirs = self.model.conns[t.key], self.conn(t)
            for name in Conn.__slots__:
                if name in ("since_ns", "seen_ns"):
                    continue
                a, b = getattr(mine, name), getattr(theirs, name)
                assert a == b, f"step {self.now} port {t.port}: {name}: model {a}, kernel {b}"
            old = self.since[t.key]
            new = self.since[t.key] = (mine.since_ns, theirs.since_ns)
            assert bool(new[0]) == bool(new[1]), f"step {self.now} port {t.port}: {new}"
            assert (new[0] != old[0]) == (new[1] != old[1]), f"step {self.now}: since {old} {new}"
        for i, (taken, since, key) in enumerate(abi.OWNER.iter_unpack(self.lab.maps._table)):
            ours = self.model.owner(i)
            assert (taken, bool(since), key) == (ours[0], bool(ours[1]), ours[2]), f"owner {i}"
        self.compare_buffer(last, outstanding=True)

    def compare_buffer(self, t: Talk | Datagrams, *, outstanding: bool) -> None:
        c = self.model.conns[t.key]
        if not c.buffer or not c.epoch or (c.owner != OWNER_KERNEL and isinstance(t, Datagrams)):
            return
        whole = outstanding or isinstance(t, Datagrams)  # none of it is history
        first = c.released if whole else self.model.oldest(c)
        n, at = (c.next - first) & M32, (first - c.base_seq) % BUFFER
        one, two = self.model.ring(c.buffer), self.lab.ring(c.buffer)
        if isinstance(t, Datagrams):
            return self.compare_records(c, n, at, one, two)
        n -= bool(c.fin_known and n and c.fin == c.next)  # nothing is stored in its place
        k = min(n, BUFFER - at)
        assert one[at : at + k] == two[at : at + k], f"buffer of port {t.port}"
        assert one[: n - k] == two[: n - k], f"buffer of port {t.port}"

    def compare_records(
        self, c: Conn, n: int, at: int, one: memoryview, two: memoryview
    ) -> None:  # fmt: skip
        assert (at | n) % abi.DGRAM_ALIGN == 0
        while n:
            (_, *mine), (ts, *theirs) = (abi.DGRAM.unpack_from(r, at) for r in (one, two))
            size = 62 if mine[2][12:14] == b"\x86\xdd" else 42
            assert mine[:2] == theirs[:2] and mine[2][:size] == theirs[2][:size] and ts
            at = (at + abi.DGRAM.size) % BUFFER
            k = min(mine[0], BUFFER - at)
            assert one[at : at + k] == two[at : at + k]
            assert one[: mine[0] - k] == two[: mine[0] - k]
            whole = -(-mine[0] // abi.DGRAM_ALIGN) * abi.DGRAM_ALIGN
            at, n = (at + whole) % BUFFER, n - abi.DGRAM.size - whole

    def go(self, steps: int) -> Counter[str]:
        try:
            for _ in range(steps):
                self.step()
            for t in self.talks:
                self.compare_buffer(t, outstanding=False)
        finally:
            self.model.close()
        return self.seen


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    bpffs = tmp_path_factory.mktemp("fastdiff")
    syscall.mount_bpffs(str(bpffs))
    net = Net(own("cxdf"))
    try:
        with inside(net.host):
            lab = Lab(str(bpffs), net)
            try:
                yield lab
            finally:
                lab.close()
    finally:
        net.close()
        sh("umount", str(bpffs))


def test_kernel_and_model_decide_alike(lab: Lab) -> None:
    seen: Counter[str] = Counter()
    for seed in range(SEEDS):
        seen += Run(lab, seed).go(STEPS)
    everything = {r.name for r in Reason if r.name.startswith(("OFFLOAD_", "PUNT_"))}
    missed = everything - {Reason.PUNT_HELPER_FAILED.name} - set(seen)
    assert seen["asked the client"] > 20 and seen["cut to the PVM's size"] > 100, seen
    assert seen["sums elsewhere"] > 20, seen
    for name in ("HELD", "PASSED", "RELEASED"):
        assert seen[f"udp OFFLOAD_{name}"] > 300, seen
        assert seen[f"fin OFFLOAD_{name}"] > 4, seen
    for name in ("MODE", "EXCEPTION", "DIFFERS", "NO_BUFFER", "BUFFER_FULL"):
        assert seen[f"udp PUNT_{name}"] > 3, seen
    assert not missed and min(seen[f"OFFLOAD {r}"] for r in ("DONE", "REFUSED", "FULL")), seen


@pytest.mark.parametrize("name", KERNEL_MUTANTS)
def test_mutants_of_the_model_are_noticed(lab: Lab, name: str) -> None:
    with pytest.MonkeyPatch.context() as mp, pytest.raises(AssertionError):
        KERNEL_MUTANTS[name](mp)
        for seed in range(SEEDS):
            Run(lab, seed).go(STEPS)
