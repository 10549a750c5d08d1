# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare the engine alone with the engine behind the fast path: same traffic, same outcome.

Equal must be, for each flow: the bytes that leave and their positions, the flags, the highest ack,
and the right edge of the window; for all flows: the causes of checkpoints. The following may differ
and is not compared:
- where frames begin and end: the fast path rebuilds segments, the engine cuts its own;
- how often the same has left: the engine releases a retransmission that a frame of the fast path
  has made needless, and vice versa; bare acks with nothing new may be merged into one;
- UDP's checksum, if the guests' checksums differ: from the fast path it is always the late guest's;
- acks while bytes wait: the engine keeps the PVM's order, the fast path releases them;
- the time: the fast path releases verified data at once, the engine with a batch. So both are
  compared when all of that time has passed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from colo_xdp import abi
from colo_xdp.abi import SIDE_PVM, SIDE_SVM, CtlOp, CtlResult, Mode, Reason
from colo_xdp.datapath import offload_maps
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.net.packet import ACK, FIN, RST, SYN, Kind, parse
from colo_xdp.offload import kernel_format, scheduler
from colo_xdp.offload.tcp import TcpCodec
from colo_xdp.tools import corpus
from colo_xdp.tools.corpus import craft
from colo_xdp.tools.corpus.play import MS, STEP_MS
from tests.sim.mutants import OFFLOAD_MUTANTS
from tests.sim.offload_model import Bpf, Conn, KernelModel, completed, user_space

from ..unit import frames as f

M32 = 0xFFFFFFFF
#: bytes of each connection that precede a scenario, so that the fast path has it when it begins
BEFORE = 20


@dataclass
class Flow:
    """What a client has received of one flow."""

    bytes: dict[int, int] = field(default_factory=dict)  # position -> byte
    flags: set[tuple[int, int]] = field(default_factory=set)
    ack: int | None = None
    edge: int | None = None
    frames: list[bytes] = field(default_factory=list)  # if it is not TCP

    def tcp(self, p: Any) -> None:
        for i, b in enumerate(p.frame[p.off : p.end]):
            at = (p.seq + i) & M32
            assert self.bytes.setdefault(at, b) == b, f"other bytes at {at}"
        if p.flags & (FIN | SYN | RST):
            self.flags.add((p.flags & (FIN | SYN | RST), (p.seq + p.end - p.off) & M32))
        if p.flags & ACK:
            self.ack = _later(self.ack, p.ack)
            if not p.flags & RST:
                self.edge = _later(self.edge, (p.ack + p.window) & M32)


def _later(a: int | None, b: int) -> int:
    return b if a is None or 0 < (b - a) & M32 < 1 << 31 else a


class Host:
    """A primary host's data path: what waits in the event ring is read in batches."""

    def __init__(self, limits: Limits, *, fast: bool, buffers: int = 8) -> None:
        self.now = 1_000 * MS
        self.k: KernelModel | None = None
        self.flows: dict[bytes, Flow] = {}
        self.heads: set[tuple[bytes, bytes, int]] = set()  # of the PVM: Ethernet, TCP's length
        self.causes: list[str] = []
        self.ring: list[Callable[[], None]] = []
        user = None
        if fast:
            self.k = KernelModel(buffers)
            self.k.mode = Mode.RUN
            user = user_space(self.k)
            user.enabled = True
        self.engine = Engine(
            limits, Policy(), lambda rec: self.leaves(rec.frame), on_wait=lambda ns: None,
            request_checkpoint=lambda d: self.causes.append(d.cause.value), fast=user,
        )  # fmt: skip
        if self.k is not None:
            self.k.epoch = self.engine.epoch = 7
        self.engine.epoch = 7

    def leaves(self, frame: bytes) -> None:
        p = parse(frame)
        flow = self.flows.setdefault(p.key, Flow())
        if p.kind is Kind.TCP:
            flow.tcp(p)
            assert (p.key, frame[:14], p.off - p.l4) in self.heads, "a header of nobody's"
        else:
            if p.kind is Kind.UDP:
                frame = frame[: p.l4 + 6] + b"??" + frame[p.l4 + 8 :]
            flow.frames.append(frame)

    def frame(self, side: int, frame: bytes, gso_size: int = 0) -> None:
        """Let a guest's frame reach pvm_out or svm_arrival."""
        punt_seq, ts = 0, self.now
        p = parse(frame)
        if side == SIDE_PVM and p.kind is Kind.TCP:
            self.heads.add((p.key, frame[:14], p.off - p.l4))
        if self.k is not None:
            fate = self.k.fast(side, frame, self.now, gso_size=gso_size)
            for out in fate.out:
                self.leaves(completed(out))
            if fate.reason:
                return
            punt_seq = fate.punt_seq
        rec, epoch = Frame(frame, ts, gso_size, punt_seq=punt_seq), self.engine.epoch & 0xFFF
        if side == SIDE_PVM:
            self.ring.append(lambda: self.engine.from_pvm(rec, self.now))
        else:
            self.ring.append(lambda: self.engine.from_svm(rec, epoch, self.now))

    def read(self) -> None:
        """Let the controller read the ring."""
        ring, self.ring = self.ring, []
        for event in ring:
            event()
        self.engine.flush(self.now)

    def wait(self, ms: int) -> None:
        for _ in range(ms // 10):
            self.now += 10 * MS
            self.engine.tick(self.now)
            self.read()

    def checkpoint(self) -> None:
        self.engine.begin_checkpoint()
        epoch = self.engine.epoch + 1
        if self.k is not None:
            self.k.mode = Mode.CHECKPOINT
        self.read()
        self.engine.commit_checkpoint(self.now, epoch, self.now)
        if self.k is not None:
            self.k.epoch, self.k.mode = epoch, Mode.RUN


@contextmanager
def quick(hosts: list[Host]) -> Iterator[None]:
    """Offload connections as soon as allowed; user space runs in the hosts' time."""

    class Clock:
        monotonic = staticmethod(lambda: hosts[-1].now / 1e9)
        monotonic_ns = staticmethod(lambda: hosts[-1].now)

    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(offload_maps, "syscall", Bpf(Clock.monotonic_ns))
        mp.setattr(offload_maps, "time", Clock)
        mp.setattr(scheduler, "OFFER_AFTER", 1)
        mp.setattr(scheduler, "MAX_BACKOFF", 1)
        try:
            yield
        finally:
            for host in hosts:
                if host.k is not None:
                    host.k.close()


def both(limits: Limits, play: Callable[[Host], None]) -> tuple[Host, Host]:
    hosts: list[Host] = []
    with quick(hosts):
        for fast in (False, True):
            hosts.append(Host(limits, fast=fast))
            play(hosts[-1])
    return hosts[0], hosts[1]


def same(alone: Host, fast: Host) -> None:
    assert fast.causes == alone.causes
    for key in {*alone.flows, *fast.flows}:
        a, b = alone.flows.get(key, Flow()), fast.flows.get(key, Flow())
        assert sorted(b.bytes.items()) == sorted(a.bytes.items()), key
        assert (b.flags, b.ack, b.edge) == (a.flags, a.ack, a.edge), key
        assert b.frames == a.frames, key


# -- the scenarios

#: the fast path's limit is its buffer, not the number of frames
OTHER_LIMITS = tuple(f"overflow-of-{who}" for who in ("tcp-primary", "primary", "secondary"))
#: the fast path releases the bytes before a waiting FIN, the engine the frame as a whole
FIN_APART = ("fin-on-data-of-primary-only",)
OTHERWISE = OTHER_LIMITS + FIN_APART
SCENARIOS = {s.name: s for s in corpus.load() if not s.rewrites and s.name not in OTHERWISE}


def before(s: corpus.Scenario) -> list[bytes]:
    """Return a frame per TCP connection, right before its first byte, and per UDP flow."""
    found: dict[tuple[Any, ...], bytes] = {}
    for step in s.steps:
        if step.who not in ("P", "S"):
            continue
        said = craft.spec(step.text)
        if said["kind"] == "udp" and not {"vlan", "cut", "frag", "ext", "ipopt"} & set(said):
            plain = {n: said[n] for n in ("sport", "dport", "src", "dst", "v6") if n in said}
            frame = craft.build({"kind": "udp", "body": b"before"} | plain)
            found.setdefault(("udp", *plain.items()), frame)
            continue
        if said["kind"] != "tcp" or said.get("flags", 0) & 6 or "vlan" in said or "cut" in said:
            continue
        ends = ("sport", "dport", "src", "dst", "v6", "isn", "opt", "ack", "win")
        plain = {n: said[n] for n in ends if n in said}
        seq = plain.get("isn", craft.DEFAULTS["isn"]) + 1 - BEFORE
        key = tuple(plain.get(n) for n in ends[:5])
        frame = craft.build({"kind": "tcp", "seq": seq, "body": b"b" * BEFORE} | plain)
        found.setdefault(key, frame)
    return list(found.values())


def play(s: corpus.Scenario, host: Host, first: list[bytes]) -> None:
    for _ in range(2 if first else 0):  # registered, and offloaded
        for frame in first:
            for side in (SIDE_PVM, SIDE_SVM):
                host.frame(side, frame)
        host.wait(50)
    for step in s.steps:
        if step.who == "checkpoint":
            host.checkpoint()
        elif step.who != "wait":
            for frame in step.frames():
                host.frame(SIDE_PVM if step.who == "P" else SIDE_SVM, frame)
        host.read()
        host.wait(int(step.text) if step.who == "wait" else STEP_MS)


def outcome(name: str, *, known: bool) -> tuple[Host, Host]:
    s = SCENARIOS[name]
    first = before(s) if known else []
    limits = Limits(compare_timeout_ns=s.compare_timeout * MS, max_queue_size=s.max_queue_size)
    return both(limits, lambda host: play(s, host, first))


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("name", SCENARIOS)
def test_scenarios(name: str, known: bool) -> None:
    same(*outcome(name, known=known))


def test_the_fast_path_takes_part_in_them() -> None:
    decided: Counter[str] = Counter()
    for name in SCENARIOS:
        _, fast = outcome(name, known=True)
        assert fast.k is not None
        decided[name] = fast.k.decided()
    assert sum(n > 0 for n in decided.values()) > 40, decided


@pytest.mark.parametrize("name", OFFLOAD_MUTANTS)
def test_faults_between_the_paths_are_noticed(name: str) -> None:
    def differ() -> bool:
        for s in SCENARIOS:
            try:
                same(*outcome(s, known=True))
            except AssertionError:
                return True
        return False

    with pytest.MonkeyPatch.context() as mp:
        OFFLOAD_MUTANTS[name](mp)
        assert differ()


@pytest.mark.parametrize("side", [SIDE_PVM, SIDE_SVM])
def test_acks_that_go_on_hide_no_byte_that_waits(side: int) -> None:
    """One guest answers in the middle of an upload, the other does not."""

    def play(host: Host) -> None:
        guests = Guests(host, 1000, f.TS)
        for _ in range(3):
            for who in (SIDE_PVM, SIDE_SVM):
                guests.say(who, 10, True)
            host.wait(20)
        guests.say(side, 1)
        for _ in range(20):
            host.wait(50)
            for who in (SIDE_PVM, SIDE_SVM):
                guests.ack[who] += 100
                guests.send(who, guests.pos[who], 0)

    alone, fast = both(LIMITS, play)
    # the acks themselves: in the engine they wait behind the byte
    assert fast.causes == alone.causes == ["svm_ahead" if side == SIDE_SVM else "compare_timeout"]
    assert fast.k is not None and fast.k.decided() > 5


def test_jumbo_segments_of_a_frame_that_waits() -> None:
    """Pieces have at most 2047 bytes at any MTU (send_piece() in bpf/offload/offload.h)."""

    def play(host: Host) -> None:
        guests = Guests(host, 1000, f.TS)
        for side in (SIDE_PVM, SIDE_SVM):
            guests.say(side, 10, True)
        host.frame(SIDE_PVM, f.tcp(1011, 101, TEXT[10:20010], win=5000), 8948)
        host.read()
        host.frame(SIDE_SVM, f.tcp(1011, 101, TEXT[10:20510], win=5000))
        host.read()
        host.wait(1000)

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert fast.k is not None and fast.k.counts[Reason.OFFLOAD_REBUILT] == 1


def test_an_ack_that_rides_on_a_retransmission_of_the_svm() -> None:
    def play(host: Host) -> None:
        guests = Guests(host, 1000, f.TS)
        for _ in range(3):
            for side in (SIDE_PVM, SIDE_SVM):
                guests.say(side, 10, True)
            host.wait(20)
        for side in (SIDE_PVM, SIDE_SVM):
            guests.ack[side] += 50
        guests.send(SIDE_PVM, 30, 0)
        guests.send(SIDE_SVM, 20, 10)
        host.wait(1000)

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert fast.k is not None and fast.k.counts[Reason.OFFLOAD_ACKED] and not fast.causes


def test_a_claimed_buffer_is_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between CLAIM and OFFLOAD user space writes into it while another CPU may look for one."""
    found: list[int] = []

    def play(host: Host) -> None:
        if host.k is None:
            return
        k = host.k
        first, other = Guests(host, 1000, f.TS), parse(f.tcp(1, 1, b"x", dport=4001)).key
        real = Bpf.test_run

        def test_run(self: Bpf, fd: KernelModel, message: bytes, data_out: int = 0) -> Any:
            r = real(self, fd, message, data_out)
            (op, *_) = abi.CTL.unpack(message)
            if op == CtlOp.CLAIM and r.retval == CtlResult.DONE:
                c = k.conns.setdefault(kernel_format.conn_key(other), Conn())
                found.append(k.buffer_claim(c, kernel_format.conn_key(other)))
            return r

        monkeypatch.setattr(Bpf, "test_run", test_run)
        for side in (SIDE_PVM, SIDE_SVM):
            first.say(side, 10)
        host.read()
        assert k.owner(0)[2] == kernel_format.conn_key(parse(f.tcp(1, 1, b"x")).key)

    # offloaded when there is something to take along
    monkeypatch.setattr(TcpCodec, "young", lambda self, st: False)
    hosts: list[Host] = []
    with quick(hosts):
        hosts.append(Host(LIMITS, fast=True, buffers=1))
        play(hosts[0])
    assert found == [False]


def test_new_rules_while_the_fast_path_has_a_connection() -> None:
    """The engine then forgets its timers: what waits later must set one again."""

    def play(host: Host) -> None:
        guests = Guests(host, 1000, f.TS)
        guests.say(SIDE_PVM, 10)  # a timer is set
        host.read()
        guests.say(SIDE_SVM, 10)
        host.engine.set_policy(Policy())
        host.checkpoint()
        guests.say(SIDE_PVM, 10)
        guests.send(SIDE_PVM, 20, 0)
        guests.send(SIDE_PVM, 20, 0)
        host.wait(1000)
        guests.checkpoint()
        host.wait(20)
        assert host.engine.held_packets == host.engine.held_bytes == 0

    alone, fast = both(LIMITS, play)
    assert fast.engine.counters["offload_reclaimed"]
    assert fast.causes == alone.causes == ["policy", "compare_timeout"]
    same(alone, fast)


# -- any schedule

Op = tuple[Any, ...]
TEXT = random.Random(3).randbytes(1 << 17)
LIMITS = Limits(compare_timeout_ns=300 * MS)


@st.composite
def schedules(draw: Any) -> list[Op]:
    side = st.sampled_from((SIDE_PVM, SIDE_SVM))
    size = st.sampled_from((1, 5, 63, 64, 100, 600, 1448, 3000))
    op = st.one_of(
        st.tuples(st.just("say"), side, size, st.booleans()),
        st.tuples(st.just("say"), side, size, st.booleans()),
        st.tuples(st.just("catch up"), side, size),
        st.tuples(st.just("ack"), side, size),
        st.tuples(st.just("hear"), side, size),
        st.tuples(st.just("again"), side, size, size),
        # Not both: bytes of the SVM in the place of what the PVM has lost are history, and stay
        # what they are when a checkpoint replaces the SVM. Which bytes these are is a matter of
        # time.
        st.tuples(st.just(draw(st.sampled_from(("lose", "flip")))), side, size),
        st.tuples(st.just("window"), side, st.sampled_from((0, 10, 500, 5000))),
        st.tuples(st.just("read")),
        st.tuples(st.just("read")),
        st.tuples(st.just("wait"), st.sampled_from((10, 50, 400))),
        st.tuples(st.just("checkpoint")),
    )
    return list(draw(st.lists(op, max_size=40)))


class Guests:
    """Two guests with one connection; the same operations, whatever the host."""

    def __init__(self, host: Host, isn: int, opts: bytes) -> None:
        self.host, self.isn, self.opts = host, isn, opts
        self.text = [bytearray(TEXT), bytearray(TEXT)]
        self.pos, self.ack, self.win = [0, 0], [0, 0], [5000, 5000]
        for side in (SIDE_PVM, SIDE_SVM):
            syn = f.tcp(isn, 1, b"", f.SYN | f.ACK, opts=f.SYN_OPTS, win=5000)
            host.frame(side, syn)
        host.read()

    def send(self, side: int, at: int, n: int) -> None:
        """Send bytes at..at+n, or an ack."""
        frame = f.tcp(
            (self.isn + 1 + at) & M32, 1 + self.ack[side], bytes(self.text[side][at : at + n]),
            opts=self.opts, win=self.win[side],
        )  # fmt: skip
        self.host.now += MS // 10
        self.host.frame(side, frame)

    def say(self, side: int, n: int, ack: bool = False) -> None:
        self.ack[side] += 100 * ack
        self.send(side, self.pos[side], n)
        self.pos[side] += n

    def do(self, op: Op) -> None:
        what, *args = op
        side = args[0] if args else 0
        if what == "say":
            self.say(*args)
        elif what == "catch up":
            n = self.pos[1 - side] - self.pos[side]
            self.say(side, min(n, args[1])) if n > 0 else None
        elif what == "ack":
            self.ack[side] += args[1]
            self.send(side, self.pos[side], 0)
        elif what == "hear":  # the ack travels with what is sent next
            self.ack[side] += args[1]
        elif what == "again" and self.pos[side]:
            at = max(0, self.pos[side] - args[2])
            self.send(side, at, min(args[1], self.pos[side] - at))
        elif what == "lose":
            self.pos[side] += args[1]
        elif what == "window":
            self.win[side] = args[1]
        elif what == "flip":
            self.text[side][self.pos[side] + 3] ^= 1
        elif what == "read":
            self.host.read()
        elif what == "wait":
            self.host.read()
            self.host.wait(args[0])
        elif what == "checkpoint":
            self.checkpoint()

    def checkpoint(self) -> None:
        self.host.read()
        for each in (self.pos, self.ack, self.win):
            each[SIDE_SVM] = each[SIDE_PVM]
        self.text[SIDE_SVM][:] = self.text[SIDE_PVM]
        self.host.checkpoint()

    def finish(self) -> None:
        """Let both send and receive everything, as TCP would ensure."""
        for _ in range(2):
            self.host.read()
            self.host.wait(1000)
            self.checkpoint()
            end = max(self.pos)
            self.win, self.ack = [5000, 5000], [max(self.ack) + 10] * 2
            for side in (SIDE_PVM, SIDE_SVM):
                for at in range(0, end, 1448):
                    self.send(side, at, min(1448, end - at))
                    self.host.read()
                self.pos[side] = end
                self.say(side, 500)
                self.say(side, 10, True)
        self.host.read()
        self.host.wait(1000)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    schedules(), st.sampled_from((1000, M32 - 1000, 1 << 31)), st.sampled_from((b"", f.TS)),
)  # fmt: skip
def test_any_schedule(ops: list[Op], isn: int, opts: bytes) -> None:
    def play(host: Host) -> None:
        guests = Guests(host, isn, opts)
        for op in ops:
            guests.do(op)
        guests.finish()

    alone, fast = both(LIMITS, play)
    # Which cause is first is a matter of time: the fast path compares bytes behind an ack that
    # waits, and has one time for everything that waits. It may therefore find a difference before a
    # checkpoint heals it.
    assert fast.causes or not alone.causes
    assert alone.causes or not fast.causes or any(op[0] == "flip" for op in ops)
    fast.causes = alone.causes
    same(alone, fast)


# -- how a connection ends


@st.composite
def ends(draw: Any) -> list[Op]:
    side = st.sampled_from((SIDE_PVM, SIDE_SVM))
    op = st.one_of(
        st.tuples(st.just("say"), side, st.sampled_from((1, 100, 3000))),
        st.tuples(st.just("close"), side, st.sampled_from((0, 0, 10, 2000))),
        st.tuples(st.just("close"), side, st.sampled_from((0, 0, 10, 2000))),
        st.tuples(st.just("again"), side, st.sampled_from((0, 10))),
        st.tuples(st.just("ack"), side, st.just(100)),
        st.tuples(st.just("read")),
        st.tuples(st.just("wait"), st.sampled_from((10, 50, 400))),
        st.tuples(st.just("checkpoint")),
    )
    return list(draw(st.lists(op, max_size=20)))


class Closing(Guests):
    """Both guests send LAST bytes more and close; then they only acknowledge."""

    LAST = 6000

    def __init__(self, host: Host, isn: int, opts: bytes) -> None:
        super().__init__(host, isn, opts)
        for _ in range(3):
            for side in (SIDE_PVM, SIDE_SVM):
                self.say(side, 10, True)
            host.wait(20)
        self.end = self.pos[SIDE_PVM] + self.LAST
        self.closed = [False, False]

    def fin(self, side: int, n: int) -> None:
        """Send the last n bytes and the FIN."""
        self.host.now += MS // 10
        at = self.end - n
        body = bytes(self.text[side][at : self.end])
        number = (self.isn + 1 + at) & M32
        raw = f.tcp(number, 1 + self.ack[side], body, f.FIN | f.ACK, opts=self.opts, win=5000)
        self.host.frame(side, raw)

    def upto(self, side: int, at: int) -> None:
        while self.pos[side] < at:
            self.say(side, min(1448, at - self.pos[side]))

    def do(self, op: Op) -> None:
        what, *args = op
        side = args[0] if args and what != "wait" else 0
        if what == "say" and not self.closed[side]:
            self.say(side, min(args[1], self.end - self.pos[side]))
        elif what == "close" and not self.closed[side]:
            self.upto(side, self.end - args[1])
            self.fin(side, self.end - self.pos[side])
            self.pos[side], self.closed[side] = self.end, True
        elif what == "again" and self.closed[side]:
            self.fin(side, args[1])
        elif what == "ack":
            self.ack[side] += args[1]
            self.send(side, self.pos[side] + self.closed[side], 0)
        elif what in ("read", "wait", "checkpoint"):
            super().do(op)
            if what == "checkpoint":
                self.closed[SIDE_SVM] = self.closed[SIDE_PVM]

    def finish(self) -> None:
        for _ in range(2):
            for side in (SIDE_PVM, SIDE_SVM):
                self.do(("close", side, 0))
            self.host.read()
            self.host.wait(1000)
            self.checkpoint()
            self.closed[SIDE_SVM] = self.closed[SIDE_PVM]
            self.ack = [max(self.ack) + 10] * 2
            for side in (SIDE_PVM, SIDE_SVM):
                for at in range(self.end - self.LAST, self.end, 1448):
                    self.send(side, at, min(1448, self.end - at))
                self.fin(side, 10)
                self.send(side, self.end + 1, 0)
        self.host.read()
        self.host.wait(1000)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(ends(), st.sampled_from((1000, M32 - 3000, 1 << 31)), st.sampled_from((b"", f.TS)))
def test_any_end(ops: list[Op], isn: int, opts: bytes) -> None:
    def play(host: Host) -> None:
        guests = Closing(host, isn, opts)
        for op in ops:
            guests.do(op)
        guests.finish()

    alone, fast = both(LIMITS, play)
    assert bool(fast.causes) == bool(alone.causes)  # which one is a matter of time, see above
    fast.causes = alone.causes
    same(alone, fast)


def test_a_short_connection_is_the_kernels() -> None:
    """Everything but the SYN: it is not reclaimed for its end."""

    def play(host: Host) -> None:
        guests = Closing(host, 1000, f.TS)
        for side in (SIDE_PVM, SIDE_SVM):
            guests.do(("close", side, 10))
        guests.do(("ack", SIDE_SVM, 1))
        guests.do(("ack", SIDE_PVM, 1))
        host.read()
        host.wait(1000)

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert fast.k is not None and not fast.engine.counters["offload_reclaimed"]
    assert fast.engine.counters["pvm_frames"] == 1 and not fast.causes


# -- datagrams


@st.composite
def datagram_schedules(draw: Any) -> list[Op]:
    side = st.sampled_from((SIDE_PVM, SIDE_SVM))
    some = st.sampled_from((1, 1, 2, 5))
    op = st.one_of(
        st.tuples(st.just("both"), side),
        st.tuples(st.just("both"), side),
        st.tuples(st.just("say"), side, some),
        st.tuples(st.just("catch up"), side),
        st.tuples(st.just("swap"), side),
        st.tuples(st.just("twice"), side),
        st.tuples(st.just("big"), side),
        st.tuples(st.just("offloaded"), side),
        st.tuples(st.just(draw(st.sampled_from(("lose", "other", "longer")))), side),
        st.tuples(st.just("read")),
        st.tuples(st.just("wait"), st.sampled_from((5, 20, 200, 400))),
        st.tuples(st.just("checkpoint")),
    )
    return list(draw(st.lists(op, max_size=40)))


class Senders:
    """Two guests and one UDP flow; the same operations, whatever the host."""

    def __init__(self, host: Host, sizes: int) -> None:
        self.host, self.rnd_size = host, sizes
        self.said = [0, 0]
        self.skipped: list[set[int]] = [set(), set()]

    def begin(self) -> None:
        """Wait until the fast path may have the flow."""
        for _ in range(3):
            self.do(("both", SIDE_SVM))
            self.host.read()
            self.host.wait(20)

    def body(self, number: int) -> bytes:
        size = 1 + number * self.rnd_size % 1400
        return (number.to_bytes(4, "big") + TEXT)[:size]

    def frame(self, side: int, frame: bytes, gso: int = 0) -> None:
        self.host.now += MS // 10
        self.host.frame(side, frame, gso)

    def say(self, side: int, n: int = 1) -> None:
        for _ in range(n):
            self.frame(side, f.udp(self.body(self.said[side])))
            self.said[side] += 1

    def catch_up(self, side: int) -> None:
        while self.said[side] < self.said[1 - side]:
            self.say(side)

    def do(self, op: Op) -> None:
        what, *args = op
        side = args[0] if args else 0
        if what == "both":
            self.say(side)
            self.catch_up(1 - side)
        elif what == "say":
            self.say(*args)
        elif what == "catch up":
            self.catch_up(side)
        elif what == "swap":
            at = self.said[side]
            for number in (at + 1, at):
                self.frame(side, f.udp(self.body(number)))
            self.said[side] += 2
        elif what == "twice":
            self.frame(side, f.udp(self.body(self.said[side])))
            self.say(side)
        elif what == "big":
            self.frame(side, f.udp(self.body(self.said[side]) + TEXT[:40_000]))
            self.said[side] += 1
        elif what == "offloaded":
            self.frame(side, f.udp(TEXT[: 3 * 700]), 700)
        elif what == "lose":
            self.said[side] += 1
        elif what in ("other", "longer"):
            body = self.body(self.said[side])
            self.frame(side, f.udp(body + b"!" if what == "longer" else body[:-1] + b"\x01"))
            self.said[side] += 1
        elif what == "read":
            self.host.read()
        elif what == "wait":
            self.host.read()
            self.host.wait(args[0])
        elif what == "checkpoint":
            self.checkpoint()

    def checkpoint(self) -> None:
        self.host.read()
        self.said[SIDE_SVM] = self.said[SIDE_PVM]
        self.host.checkpoint()


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(datagram_schedules(), st.sampled_from((0, 1, 37, 701)))
def test_any_schedule_of_datagrams(ops: list[Op], sizes: int) -> None:
    def play(host: Host) -> None:
        senders = Senders(host, sizes)
        senders.begin()
        for op in ops:
            senders.do(op)
        host.read()
        host.wait(1000)
        senders.checkpoint()
        senders.begin()

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert fast.k is not None and fast.k.decided()
    for each in (alone, fast):
        assert not each.engine.held_packets and not each.engine.svm_packets


def test_datagrams_of_a_frame_that_the_svm_has_offloaded() -> None:
    """Each waits separately; the fast path could not have compared the frame that they came in."""

    def play(host: Host) -> None:
        senders = Senders(host, 0)
        senders.begin()
        senders.do(("offloaded", SIDE_SVM))
        for _ in range(3):
            senders.do(("both", SIDE_PVM))
            host.read()
            host.wait(20)
        senders.do(("offloaded", SIDE_PVM))
        host.read()
        host.wait(1000)

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert not fast.causes


def test_datagrams_that_wait_go_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the fast path and back, whichever guest is ahead; none is lost, none is reordered."""
    requests: list[int] = []
    real = offload_maps.BpfKernelPath.offload
    monkeypatch.setattr(
        offload_maps.BpfKernelPath, "offload",
        lambda self, key, request, n: (
            requests.append(len(request.buffer)) or real(self, key, request, n)
        ),
    )  # fmt: skip

    def play(host: Host) -> None:
        for side in (SIDE_PVM, SIDE_SVM):
            senders = Senders(host, 37)
            senders.begin()
            for other in (side, 1 - side):
                senders.say(side, 4)
                host.read()
                host.wait(20)
                senders.say(1 - side, 2)
                senders.do(("twice", other))  # an exception
                senders.catch_up(side)
                senders.catch_up(1 - side)
                host.read()
                host.wait(400)
                senders.checkpoint()

    alone, fast = both(LIMITS, play)
    same(alone, fast)
    assert max(requests) >= 4 * abi.DGRAM.size and fast.engine.counters["offload_reclaimed"]
