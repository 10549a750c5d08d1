# SPDX-License-Identifier: GPL-2.0-or-later
"""Run two simulated guests, a bad link, checkpoints at any time; check the invariants from outside.

`Oracle` knows what each guest sent and when a checkpoint was complete, and judges each released
frame byte by byte with dicts; it shares no code with the engine. The second half breaks the engine
deliberately and requires the oracle to notice.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colo_xdp.compare.causes import Cause
from colo_xdp.compare.tcp import TcpFlow
from colo_xdp.compare.tcp_secondary import SvmStream
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.engine.journal import Divergence
from colo_xdp.net.packet import parse

from ..unit import frames as f

MS = 1_000_000
TIMEOUT = 300 * MS
MASK = 0xFFFFFFFF


TIGHT = Limits(compare_timeout_ns=TIMEOUT, max_queue_size=4, history_bytes=4096)


class Violation(AssertionError):
    """An invariant was broken."""


@dataclass
class Meta:
    """What the guest meant by a frame."""

    conn: int
    inc: int  # incarnation
    kind: str  # syn, data, fin, rst, udp
    pos: int = 0
    data: bytes = b""
    ack: int = 0
    ts: int = 0
    epoch: int = 0


@dataclass
class View:
    """One connection's incarnation as the oracle sees it."""

    seen: dict[int, set[int]] = field(default_factory=dict)  # position -> bytes the client received
    said: dict[int, int] = field(default_factory=dict)  # by the SVM in this epoch
    end: int = 0
    ack: int = -1
    sack: int = -1
    done: set[tuple[str, int]] = field(default_factory=set)  # flags the client has
    flags: set[tuple[str, int]] = field(default_factory=set)  # by the SVM in this epoch
    ended: int = -1  # where the SVM has reset it in this epoch
    reset: bool = False  # by the PVM, as far as the engine knows


class Oracle:
    """Judge releases (I1, I2, I3, I7) and their order."""

    def __init__(self) -> None:
        self.views: dict[tuple[int, int], View] = {}
        self.bodies: dict[int, list[bytes]] = {}
        self.stop = -1
        self.order: dict[int, int] = {}

    def view(self, m: Meta) -> View:
        return self.views.setdefault((m.conn, m.inc), View())

    def svm(self, m: Meta) -> None:
        """Note that a frame of the current epoch's SVM reached the engine."""
        if m.kind == "udp":
            self.bodies.setdefault(m.conn, []).append(m.data)
            return
        v = self.view(m)
        for i, b in enumerate(m.data):
            v.said.setdefault(m.pos + i, b)
        v.sack = max(v.sack, m.ack)
        if m.kind != "data":
            v.flags.add((m.kind, 0 if m.kind in ("rst", "syn") else m.pos))
        if m.kind == "rst":
            v.ended = m.pos

    def pvm(self, m: Meta) -> None:
        """Note that a frame of the PVM is about to reach the engine."""
        self.view(m).reset |= m.kind == "rst"

    def commit(self, stop: int) -> None:
        self.stop = stop
        self.bodies.clear()
        for v in self.views.values():
            # holes below what the client has: the PVM sent them before it stopped
            for pos, b in v.said.items():
                if pos < v.end:
                    v.seen.setdefault(pos, {b})
            v.said.clear()
            v.flags.clear()
            v.sack = v.ended = -1

    def released(self, m: Meta, number: int) -> None:
        if self.order.get(m.conn, -1) >= number:
            raise Violation(f"{m} left out of order")
        self.order[m.conn] = number
        covered = m.ts <= self.stop
        if m.kind == "udp":
            if not covered:
                if m.data not in self.bodies.get(m.conn, []):
                    raise Violation(f"I1: {m}")
                self.bodies[m.conn].remove(m.data)
            return
        v = self.view(m)
        if not covered:
            for i, b in enumerate(m.data):
                pos = m.pos + i
                if v.said.get(pos) != b and b not in v.seen.get(pos, ()):
                    raise Violation(f"I1: byte {pos} of {m}")
            if m.kind != "rst" and m.ack > max(v.ack, v.sack):
                raise Violation(f"I2: {m}, acked {v.ack} {v.sack}")
            if m.kind != "data":
                flag = (m.kind, 0 if m.kind in ("rst", "syn") else m.pos)
                # a FIN with a reset behind it, and a reset in its place
                alike = m.kind == "fin" and v.reset and v.ended == m.pos
                if flag not in v.flags and flag not in v.done and not alike:
                    raise Violation(f"I3: {m}")
        for i, b in enumerate(m.data):
            v.seen.setdefault(m.pos + i, set()).add(b)
        v.end = max(v.end, m.pos + len(m.data))
        if m.kind != "rst":
            v.ack = max(v.ack, m.ack)
        if m.kind != "data":
            v.done.add((m.kind, 0 if m.kind in ("rst", "syn") else m.pos))


@dataclass
class Guest:
    """One guest's end of one connection."""

    pos: int = 0  # next byte to send
    rcv: int = 0  # received from the client
    syn: bool = False
    fin: bool = False
    rst: bool = False
    isn: int = 0
    flips: dict[int, int] = field(default_factory=dict)
    length: int = 0

    def data(self, text: bytes, a: int, b: int) -> bytes:
        raw = bytearray(text[a:b])
        for pos, x in self.flips.items():
            if a <= pos < b:
                raw[pos - a] ^= x
        return bytes(raw)


class Conn:
    """A connection of the simulated server, over all its incarnations."""

    def __init__(self, rnd: random.Random, number: int) -> None:
        self.rnd, self.number, self.inc = rnd, number, -1
        self.reopen(mid=rnd.random() < 0.2)

    def reopen(self, mid: bool = False) -> None:
        rnd = self.rnd
        self.inc += 1
        self.mid = mid  # known only from the middle on
        self.text = rnd.randbytes(rnd.choice((0, 300, 3000)))
        self.isn = rnd.choice((rnd.randrange(1 << 32), (1 << 32) - rnd.randrange(1500)))
        self.cisn = rnd.choice((rnd.randrange(1 << 32), (1 << 32) - rnd.randrange(1500)))
        n = len(self.text)
        self.p = Guest(isn=self.isn, syn=mid, length=n)
        self.s = Guest(isn=rnd.randrange(1 << 32), syn=mid, length=n)


class World:
    """Schedule everything from one seed."""

    def __init__(
        self, seed: int, *, faults: bool = True, limits: Limits | None = None, steps: int = 350
    ) -> None:
        self.rnd = random.Random(seed)
        self.faults, self.steps = faults, steps
        self.now = 1_000 * MS
        self.oracle = Oracle()
        self.meta: dict[int, tuple[Meta, Frame, int]] = {}
        self.asked: Cause | None = None
        self.asks = 0
        self.epoch = self.rnd.choice((0, 4090))
        self.engine = Engine(
            limits or Limits(compare_timeout_ns=TIMEOUT, history_bytes=512),
            Policy(),
            self.on_release,
            request_checkpoint=self.on_request,
            on_wait=lambda ns: None,
        )
        self.engine.epoch = self.epoch
        self.conns = [Conn(self.rnd, i) for i in range(self.rnd.choice((1, 3)))]
        self.ring: list[tuple[Frame, Meta]] = []  # captured, not yet read
        self.link: list[tuple[Frame, Meta]] = []  # on the peer link
        self.waiting: dict[int, int] = {}  # delivered, not released: id -> since
        self.udp_p: list[bytes] = []
        self.udp_s: list[bytes] = []
        self.early: list[Meta] = []  # of the next epoch, read before the commit
        self.phase = "run"
        self.stop = -1
        self.numbers = self.superseded = 0
        self.lossy = True

    # -- callbacks

    def on_release(self, rec: Frame) -> None:
        entry = self.meta.get(id(rec))
        if entry is not None and entry[1] is rec:
            del self.meta[id(rec)]
            self.waiting.pop(id(rec), None)
            self.oracle.released(entry[0], entry[2])
            return
        # A part of a frame is judged as what it carries, at its position in the whole.
        part = parse(rec.frame)
        for key, (m, whole, number) in self.meta.items():
            w = parse(whole.frame)
            at = (part.seq - w.seq) & MASK
            size = part.end - part.off
            if w.key == part.key and whole.ts_ns == rec.ts_ns and at + size <= w.end - w.off:
                if rec.frame[part.off : part.end] != m.data[at : at + size]:
                    raise Violation(f"a part of {m} carries other bytes")
                last = at + size == w.end - w.off
                kind = m.kind if part.flags & f.FIN else "data"
                if last != bool(part.flags & f.FIN) and m.kind == "fin":
                    raise Violation(f"the FIN of {m} is in the wrong part")
                data = m.data[at : at + size]
                self.oracle.released(replace(m, kind=kind, pos=m.pos + at, data=data), number)
                if last:
                    del self.meta[key]
                    self.waiting.pop(key, None)
                else:
                    self.oracle.order[m.conn] = number - 1  # its rest follows under the same number
                return
        if part.off == part.end and part.flags == f.ACK:  # a window update made by the engine
            number = int.from_bytes(rec.frame[36:38], "big") - 4000
            c = self.conns[number]
            v = self.oracle.view(Meta(number, c.inc, "data"))
            if (part.ack - c.cisn - 1) & MASK <= max(v.ack, v.sack):
                return
        raise Violation("released what was never captured")

    def on_request(self, d: Divergence) -> None:
        if self.asked is not None:
            raise Violation("asked twice in one epoch")
        self.asked = d.cause
        self.asks += 1

    # -- frames

    def frame(self, c: Conn, g: Guest, m: Meta) -> bytes:
        if m.kind == "udp":
            return f.udp(m.data, dport=9)
        dport = 4000 + c.number
        first = c.isn + 1  # the secondary host has translated it
        ack = c.cisn + 1 + m.ack
        tos = self.rnd.randrange(1 << 16)  # IP id: each guest's own
        if m.kind == "syn":
            return f.tcp(g.isn, c.cisn + 1, b"", f.SYN | f.ACK, dport=dport, opts=f.SYN_OPTS)
        flags = f.ACK | {"data": 0, "fin": f.FIN, "rst": f.RST}[m.kind]
        if m.data and self.rnd.random() < 0.5:
            flags |= f.PSH
        return f.tcp(first + m.pos, ack, m.data, flags, dport=dport, ident=tos, pad=not m.data)

    def send(self, c: Conn, who: str, kind: str, pos: int = 0, data: bytes = b"") -> None:
        g = c.p if who == "p" else c.s
        self.now += self.rnd.randrange(1, 200_000)
        number = -1 if kind == "udp" else c.number
        inc = 0 if kind == "udp" else c.inc
        m = Meta(number, inc, kind, pos, data, 0 if kind == "syn" else g.rcv, self.now)
        rec = Frame(self.frame(c, g, m), self.now)
        if who == "p":
            self.ring.append((rec, m))
            return
        m.epoch = self.epoch + (self.phase == "resumed")
        for _ in range(2 if self.lossy and self.rnd.random() < 0.05 else 1):
            if not (self.lossy and self.rnd.random() < 0.04):
                self.link.append((rec, m))

    def emit(self, c: Conn, who: str) -> None:
        """Let one guest do what comes next, or repeat something."""
        g, rnd = (c.p if who == "p" else c.s), self.rnd
        if who == "s" and self.phase == "stopped":
            return
        if g.rst:
            if rnd.random() < 0.5:
                self.send(c, who, "rst", g.pos)
            return
        answered = c.mid or ("syn", 0) in self.oracle.views.get((c.number, c.inc), View()).done
        if not g.syn or (not answered and rnd.random() < 0.3):
            g.syn = True
            self.send(c, who, "syn")
        if not answered:
            return  # the client has not answered, so there is no connection yet
        kind = rnd.random()
        if kind < 0.15:
            self.send(c, who, "data", g.pos + g.fin)
        elif kind < 0.30 and g.pos:
            a = max(0, rnd.randrange(g.pos) if rnd.random() < 0.3 else g.pos - 200)
            b = min(g.pos, a + rnd.randrange(1, 400))
            data = g.data(c.text, a, b)
            if who == "p" and self.faults and rnd.random() < 0.1:
                data = bytes([data[0] ^ 1]) + data[1:]  # it retransmits something different
            self.send(c, who, "data", a, data)
        elif g.pos < g.length:
            n = min(rnd.choice((1, 7, 100, 536, 2000)), g.length - g.pos)
            self.send(c, who, "data", g.pos, g.data(c.text, g.pos, g.pos + n))
            g.pos += n
        elif rnd.random() < 0.3:
            g.fin = True
            self.send(c, who, "fin", g.pos)

    # -- the world's events

    def deliver_pvm(self) -> None:
        if not self.ring:
            return
        rec, m = self.ring.pop(0)
        self.numbers += 1
        self.meta[id(rec)] = (m, rec, self.numbers)
        self.waiting[id(rec)] = self.now
        before = self.dropped()
        self.oracle.pvm(m)
        self.engine.from_pvm(rec, self.now)
        if self.dropped() > before:
            del self.meta[id(rec)], self.waiting[id(rec)]

    def dropped(self) -> int:
        c = self.engine.counters
        return c["queue_full_dropped"] + c["flow_table_full_dropped"]

    def deliver_svm(self) -> None:
        if not self.link:
            return
        i = self.rnd.randrange(min(4, len(self.link))) if self.lossy else 0
        rec, m = self.link.pop(i)
        if m.epoch == self.epoch and self.phase == "run":
            self.oracle.svm(m)
        elif m.epoch == self.epoch + 1:
            self.early.append(m)
        self.engine.from_svm(rec, m.epoch & 0xFFF, self.now)

    def begin(self) -> None:
        self.phase = "begun"
        self.early = []
        self.engine.begin_checkpoint()

    def resume(self) -> None:
        """STOP and RESUME of both: the SVM becomes a copy of the PVM."""
        self.now += 1
        self.stop = self.now
        self.now += 1
        for c in self.conns:
            p = c.p
            c.s = Guest(p.pos, p.rcv, p.syn, p.fin, p.rst, p.isn, {}, p.length)
        self.udp_s = list(self.udp_p)
        self.phase = "resumed"

    def commit(self) -> None:
        self.oracle.commit(self.stop)
        self.epoch += 1
        self.asked = None
        self.phase = "run"
        for m in self.early:
            self.oracle.svm(m)
        for key in self.waiting:
            self.waiting[key] = self.now
        self.engine.commit_checkpoint(self.stop, self.epoch, self.now)

    def checkpoint_step(self) -> None:
        {"run": self.begin, "begun": self.resume, "resumed": self.commit}[self.phase]()

    def disturb(self) -> None:
        c, rnd = self.rnd.choice(self.conns), self.rnd
        what = rnd.random()
        if what < 0.5 and c.s.pos < c.s.length:
            c.s.flips[rnd.randrange(c.s.pos, c.s.length)] = rnd.randrange(1, 256)
        elif what < 0.6:
            c.s.length = max(c.s.pos, rnd.randrange(len(c.text) + 1))
        elif what < 0.7:
            c.p.length = max(c.p.pos, rnd.randrange(len(c.text) + 1))
        elif what < 0.8:
            c.s.rst = True
        elif what < 0.9:
            c.p.rst = True
        else:
            c.p.rst = c.s.rst = True

    def client(self, c: Conn) -> None:
        if self.rnd.random() < 0.5:
            c.p.rcv += self.rnd.randrange(1, 1000)
        elif self.phase != "stopped":
            c.s.rcv = max(c.s.rcv, min(c.p.rcv, c.s.rcv + self.rnd.randrange(1, 1000)))
        both_over = (c.p.fin and c.s.fin) or (c.p.rst and c.s.rst)
        quiet = not any(m.conn == c.number for _, m in self.ring + self.link)
        waits = any(m.conn == c.number for m, _, _ in self.meta.values())
        if both_over and quiet and not waits and self.rnd.random() < 0.3:
            c.reopen()

    def datagram(self, who: str) -> None:
        mine, other = (self.udp_p, self.udp_s) if who == "p" else (self.udp_s, self.udp_p)
        if who == "s" and self.phase == "stopped":
            return
        n = len(mine)
        body = other[n] if n < len(other) else self.rnd.randbytes(3)
        if self.faults and self.rnd.random() < 0.02:
            body = b"differs"
        mine.append(body)
        self.send(self.conns[0], who, "udp", n, body)

    def step(self) -> None:
        rnd = self.rnd
        c = rnd.choice(self.conns)
        x = rnd.random()
        if x < 0.20:
            self.emit(c, "p")
        elif x < 0.40:
            self.emit(c, "s")
        elif x < 0.62:
            self.deliver_pvm()
        elif x < 0.84:
            self.deliver_svm()
        elif x < 0.90:
            self.client(c)
        elif x < 0.93:
            self.datagram(rnd.choice("ps"))
        elif x < 0.98:
            self.now += rnd.randrange(1, 20) * MS
            self.tick()
        elif x < 0.985 and self.faults:
            self.disturb()
        if self.phase != "run":
            if rnd.random() < 0.15:
                self.checkpoint_step()
        elif rnd.random() < (0.2 if self.asked else 0.004):
            self.checkpoint_step()

    def forget_superseded(self) -> None:
        """Forget bare ACKs that were given up before the RST of both guests."""
        n = self.engine.counters["acks_superseded"] - self.superseded
        if not n:
            return
        self.superseded += n
        flows = list(self.engine._tcp.values())
        held = {id(rec) for flow in flows for rec, _, _ in flow.held}
        held |= {id(rec) for rec, _, _ in self.engine._queue.held}
        gone = [i for i in self.waiting if i not in held and self.meta[i][0].kind == "data"]
        gone = [i for i in gone if not self.meta[i][0].data]
        if len(gone) != n:
            raise Violation(f"{n} frames given up, {len(gone)} missing")
        for i in gone:
            if not self.conns[self.meta[i][0].conn].p.rst:
                raise Violation(f"{self.meta[i][0]} was given up without a RST behind it")
            del self.waiting[i], self.meta[i]

    def tick(self) -> None:
        self.engine.tick(self.now)
        self.forget_superseded()
        if self.phase == "run" and self.asked is None:
            late = [i for i, since in self.waiting.items() if since + TIMEOUT <= self.now]
            if late:
                raise Violation(f"I4: {self.meta[late[0]][0]} held with nobody asked")
        if self.engine.held_packets > len(self.waiting):
            raise Violation("counts more held than delivered")

    def run(self) -> World:
        for _ in range(self.steps):
            self.step()
            if self.rnd.random() < 0.5:  # the end of a batch
                self.engine.flush(self.now)
        # whatever remains must leave within the timeout and one checkpoint
        while self.ring or self.link:
            self.deliver_pvm()
            self.deliver_svm()
        for _ in range(3):
            if self.phase == "run" and self.asked is None:
                self.now += TIMEOUT + 1
                self.tick()
            if self.asked or self.phase != "run":
                self.checkpoint_step()
                while self.phase != "run":
                    self.checkpoint_step()
        self.forget_superseded()
        if self.waiting or self.engine.held_packets or self.engine.held_bytes:
            raise Violation(f"I4: {len(self.waiting)} frames never left")
        unknown = set(self.engine.counters) - set(NAMES)
        if unknown:
            raise Violation(f"counters without a description: {unknown}")
        return self


def _names() -> list[str]:
    from colo_xdp.engine.engine import COUNTERS

    return [name for name, _ in COUNTERS]


NAMES = _names()


@pytest.mark.parametrize("block", range(8))
def test_random_schedules(block: int) -> None:
    causes: set[str] = set()
    for seed in range(block * 60, block * 60 + 60):
        world = World(seed).run()
        causes |= {n for n, v in world.engine.counters.items() if v and n.startswith("cause_")}
    assert "cause_payload_differs" in causes  # the disturbances were found


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1000, 1 << 40), st.booleans(), st.sampled_from([4, 32, 1024]))
def test_any_seed(seed: int, faults: bool, queue: int) -> None:
    limits = Limits(
        compare_timeout_ns=TIMEOUT,
        max_queue_size=queue,
        history_bytes=queue * 16,
        history_total=3000,
        max_stream_bytes=2000,
    )
    World(seed, faults=faults, limits=limits).run()


def test_healthy_pair_needs_no_checkpoint_for_differences() -> None:
    for seed in range(100):
        world = World(seed, faults=False).run()
        for cause in ("payload_differs", "fin_differs", "rst_one_sided", "syn_options_differ"):
            assert not world.engine.counters[f"cause_{cause}"], (seed, cause)


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=120))
def test_parse_never_raises(raw: bytes) -> None:
    parse(raw)


@settings(max_examples=600, deadline=None)
@given(
    st.sampled_from(
        [
            f.tcp(1, 2, b"abc"),
            f.tcp(1, 2, b"abc", v6=True, tags=b"\x81\0\0\5"),
            f.udp(b"abc"),
            f.echo_reply(b"abc"),
            f.ip6(0, b"\x2c\0\0\0\0\0\0\0" + b"\6\0\0\1\0\0\0\0" + bytes(20)),
        ]
    ),
    st.lists(st.tuples(st.integers(0, 90), st.integers(0, 255)), max_size=4),
    st.integers(0, 100),
)
def test_mutated_frames_never_raise(frame: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    raw = bytearray(frame)
    for at, value in changes:
        if at < len(raw):
            raw[at] = value
    data = bytes(raw[: len(raw) - cut] if cut < len(raw) else raw)
    p = parse(data)
    assert 0 <= p.off <= p.end <= len(data)
    out: list[Frame] = []
    engine = Engine(
        Limits(),
        Policy(),
        out.append,
        request_checkpoint=lambda d: None,
        on_wait=lambda ns: None,
    )
    engine.from_svm(Frame(data, 1), 0, 1)
    engine.from_pvm(Frame(data, 1), 2)
    engine.tick(10**12)
    engine.release_all()
    assert len(out) == 1


# -- does the oracle notice? break the engine in one place at a time


def _no_ack_gate(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "acked", lambda self, p: True)


def _rst_uncompared(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "_ready_rst", lambda self, p: True)


def _fin_uncompared(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "_ready_fin", lambda self, p: p.off == p.end or self._verified(p))


def _syn_uncompared(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "_ready_syn", lambda self, p: True)


def _epoch_ignored(mp: pytest.MonkeyPatch) -> None:
    real = Engine.from_svm

    def from_svm(self: Engine, rec: Frame, epoch12: int, now_ns: int) -> None:
        real(self, rec, self.epoch & 0xFFF, now_ns)

    mp.setattr(Engine, "from_svm", from_svm)


def _old_svm_kept(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(SvmStream, "forget", lambda self: None)


def _release_before_compare(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "_verified", lambda self, p: True)


def _history_ignored(mp: pytest.MonkeyPatch) -> None:
    real = TcpFlow._verified

    def verified(self: TcpFlow, p: Any) -> bool:
        verified = self.sent.verified
        if verified is not None and (verified - p.seq - (p.end - p.off)) & MASK < 1 << 31:
            return True
        return real(self, p)

    mp.setattr(TcpFlow, "_verified", verified)


def _stop_ts_ignored(mp: pytest.MonkeyPatch) -> None:
    real = Engine.commit_checkpoint

    def commit(self: Engine, stop_ts_ns: int, epoch: int, now_ns: int) -> None:
        real(self, now_ns, epoch, now_ns)

    mp.setattr(Engine, "commit_checkpoint", commit)


def _no_rollback(mp: pytest.MonkeyPatch) -> None:
    real = TcpFlow.new_epoch

    def new_epoch(self: TcpFlow, epoch: int) -> None:
        sent = self.sent
        verified, history = sent.verified, sent.history.back(sent.history.size, sent.history.size)
        real(self, epoch)
        if sent.released_nxt is not None and verified is not None:
            sent.verified = self.theirs.svm_nxt = verified
            sent.history.clear()
            sent.history.add(history)

    mp.setattr(TcpFlow, "new_epoch", new_epoch)


def _never_times_out(mp: pytest.MonkeyPatch) -> None:
    mp.setattr(TcpFlow, "expire", lambda self, now: 0)


def _newest_first(mp: pytest.MonkeyPatch) -> None:
    real = Engine._release_queued

    def release_queued(self: Engine, ts_ns: int, counter: str) -> int:
        self._queue.held.extend(reversed(self._queue.held.drain()))
        return real(self, ts_ns, counter)

    mp.setattr(Engine, "_release_queued", release_queued)


@pytest.mark.parametrize(
    "fault",
    [
        _no_ack_gate,
        _rst_uncompared,
        _fin_uncompared,
        _syn_uncompared,
        _epoch_ignored,
        _old_svm_kept,
        _release_before_compare,
        _history_ignored,
        _stop_ts_ignored,
        _no_rollback,
        _never_times_out,
        _newest_first,
    ],
)
def test_oracle_notices(fault: Callable[[pytest.MonkeyPatch], None]) -> None:
    with pytest.MonkeyPatch.context() as mp:
        fault(mp)
        with pytest.raises(Violation):
            for seed in range(300):
                World(seed, limits=TIGHT if seed % 2 else None).run()
