# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate a guest: a server over TCP and UDP whose state can be copied, and the client that uses
it.

A request is a kind, a size and a number. Everything random in a guest (initial sequence numbers,
answers of kind N, moods) comes from its host, as the time and the entropy of a real guest do, and
is not copied by a checkpoint.
"""

from __future__ import annotations

import random
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from .tcp import ACK, RST, SYN, BadChecksum, Seg, Tcp, build, diff, ip, read

REQUEST = struct.Struct("!cHI")
TABLE = random.Random(7).randbytes(1 << 16)

Out = tuple[bytes, int]  # frame, gso_size


def answer(number: int, size: int) -> bytes:
    """Return what any honest guest answers to a request of kind G."""
    at = number * 2654435761 % (len(TABLE) - 4096)
    return TABLE[at : at + size]


Key = tuple[bool, int]


@dataclass
class Guest:
    """The server. `rnd` is the host's."""

    rnd: random.Random
    ts_base: int
    conns: dict[Key, Tcp] = field(default_factory=dict)
    archive: dict[tuple[bool, int, int], Tcp] = field(default_factory=dict)
    udp: Counter[bytes] = field(default_factory=Counter)
    ident: int = 0
    written: set[int] = field(default_factory=set)  # what it takes for being on its disk
    #: writes a number to its disk; whether that has ended
    write: Callable[[int], bool] | None = None

    def clone(self, rnd: random.Random) -> Guest:
        """Return the copy that runs on the other host from now on."""
        return Guest(
            rnd,
            self.ts_base,
            {k: c.clone() for k, c in self.conns.items()},
            {k: c.clone() if c.state not in ("closed", "reset") else c
             for k, c in self.archive.items()},
            Counter(self.udp),
            self.ident,
            set(self.written),
        )  # fmt: skip

    def find(self, v6: bool, port: int, irs: int) -> Tcp | None:
        """Return the connection that a client opened with this sequence number.

        If two match, it is the older one: what arrived during a checkpoint is delivered again after
        it, and a SYN whose connection is over opens a second one, which its client resets (RFC 9293
        3.5).
        """
        old = self.archive.get((v6, port, irs))
        if old is not None:
            return old
        c = self.conns.get((v6, port))
        return c if c is not None and c.irs == irs else None

    def _ts(self, now_ms: int) -> int:
        return (self.ts_base + now_ms) & 0xFFFFFFFF

    def _frames(self, segs: list[Seg]) -> list[Out]:
        out = []
        for s in segs:
            self.ident = (self.ident + 1) & 0xFFFF
            out.append((build(s, False, self.ident), 100 if len(s.data) > 160 else 0))
        return out

    def receive(self, frame: bytes, now_ms: int) -> list[Out]:
        """Handle a frame from the network."""
        s = read(frame)
        if s is None:
            return self._datagram(frame)
        key, ts = (s.v6, s.sport), self._ts(now_ms)
        c = self.conns.get(key)
        if s.flags & (SYN | ACK | RST) == SYN:
            # A half-open connection stays, whatever SYN arrives: see Tcp.receive().
            fresh = c is None or c.state in ("closed", "reset")
            if fresh and not (c is not None and c.irs == s.seq and c.state != "reset"):
                near = s.seq * 2_654_435_761  # clones have one secret and nearly one clock
                iss = self.rnd.choice((self.rnd.randrange(1 << 32), -1, near, near))
                iss = (iss - self.rnd.randrange(3000)) & 0xFFFFFFFF
                if c is not None:  # above the old one's numbers (RFC 6528)
                    iss = (c.iss + len(c.out) + 2 + self.rnd.randrange(100_000)) & 0xFFFFFFFF
                    self.archive.setdefault((*key, c.irs), c)
                c = self.conns[key] = Tcp(s.sport, s.v6, True, iss, self.rnd)
                c.irs, c.recent, c.edge = s.seq, s.tsval, s.window
                return self._frames(c.output(now_ms, ts, self.rnd, False))
        if c is None or c.state in ("closed", "reset"):
            if s.flags & RST:
                return []
            if c is not None and c.state == "closed":  # TIME-WAIT: ack what comes again
                return self._frames([c.seg(ACK, c.nxt, tsval=ts)]) if s.data or s.flags & 1 else []
            if s.flags & ACK:
                rst = Seg(s.v6, 80, s.sport, s.ack, 0, RST, 0, b"", ts, s.tsval)
            else:
                ack = s.seq + len(s.data) + 1
                rst = Seg(s.v6, 80, s.sport, 0, ack, RST | ACK, 0, b"", ts, s.tsval)
            return self._frames([rst])
        if c.app.get("shut") and c.is_new(s) and not s.flags & (SYN | RST):
            c.state = "reset"  # nobody will read it (RFC 2525 2.17)
            return self._frames([Seg(s.v6, 80, s.sport, s.ack, 0, RST, 0, b"", ts, s.tsval)])
        segs = c.receive(s, now_ms, ts, self.rnd)
        if self.rnd.random() < 0.8:
            segs += self._serve(c, now_ms)
        return self._frames(segs)

    def tick(self, now_ms: int) -> list[Out]:
        """Run timers, and what the application had deferred."""
        segs: list[Seg] = []
        for c in self.conns.values():
            if c.state in ("closed", "reset"):
                continue
            segs += c.tick(now_ms, self._ts(now_ms), self.rnd, True)
            segs += self._serve(c, now_ms)
        return self._frames(segs)

    def _serve(self, c: Tcp, now_ms: int) -> list[Seg]:
        """Read requests and answer them."""
        ts = self._ts(now_ms)
        while c.state == "open" and not c.close_asked and c.app["pos"] + 7 <= c.read:
            pos = c.app["pos"]
            kind, size, number = REQUEST.unpack_from(c.inn, pos)
            end = pos + 7 + (size if kind == b"U" else 0)
            if end > c.read:
                break
            if kind == b"W" and self.write is not None:
                if not self.write(number):
                    break  # its process waits for the disk
                self.written.add(number)
            if kind == b"C" and self.rnd.random() < 0.7:
                break  # its process does not run yet
            c.app["pos"] = end
            if kind in (b"G", b"W"):
                c.out += answer(number, size)
            elif kind == b"N":
                c.out += self.rnd.randbytes(2) + answer(number, size)
            elif kind == b"U":
                c.out += struct.pack("!II", zlib.crc32(bytes(c.inn[pos:end])), number)
            elif kind == b"Q":
                c.close_asked = True
            elif (
                kind == b"C"
            ):  # as Linux closes a socket: at once, and with a RST if data is unread
                c.out += answer(number, size)
                c.app["shut"] = 1
                if len(c.inn) > end and self.rnd.random() < 0.7:  # otherwise it reads that first
                    return c.output(now_ms, ts, self.rnd, True) + c.abort(ts)
                c.close_asked = True
            elif kind == b"A" or (kind == b"a" and self.rnd.random() < 0.5):
                return c.abort(ts)
            elif kind == b"a":
                c.out += answer(number, size)
        if c.peer_fin == len(c.inn) and c.app["pos"] >= len(c.inn) - 6:
            c.close_asked = True
        return c.output(now_ms, ts, self.rnd, True)

    def _datagram(self, frame: bytes) -> list[Out]:
        v6 = frame[12:14] == b"\x86\xdd"
        l4 = 54 if v6 else 34
        if frame[20 if v6 else 23] != 17:
            return []
        (sport,) = struct.unpack_from("!H", frame, l4)
        kind, size, number = REQUEST.unpack_from(frame, l4 + 8)
        body = struct.pack("!I", number) + answer(number, size)
        if kind == b"N":
            body += self.rnd.randbytes(1)
        self.udp[body] += 1
        self.ident = (self.ident + 1) & 0xFFFF
        packet = struct.pack("!HHHH", 53, sport, 8 + len(body), 0) + body
        if len(packet) <= 300:
            return [(ip(v6, False, 17, packet, self.ident), 0)]
        step = self.rnd.choice((104, 200, 296))
        made: list[Out] = []
        for at in range(0, len(packet), step):
            more = at + step < len(packet)
            word = (at | more) if v6 else at // 8 | (0x2000 if more else 0)
            # zero is "not fragmented" to ip(): the last piece of an IPv4 datagram is never at 0
            made.append((ip(v6, False, 17, packet[at : at + step], self.ident, word), 0))
        return made


@dataclass(eq=False)
class Plan:
    """What a client's connection does: (kind, size) one after another."""

    steps: list[tuple[bytes, int]]
    pause_ms: int
    half_close: bool
    until_told: bool = False  # it repeats until the client's `told` is set
    not_before: int = 0  # ms


class Client:
    """Open connections, send requests, check what must hold for any answer."""

    def __init__(self, rnd: random.Random, plans: list[Plan], ports: int) -> None:
        self.rnd, self.plans, self.ports = rnd, plans, ports
        self.conns: dict[Key, Tcp] = {}
        self.scripts: dict[Key, tuple[Plan, int, int]] = {}  # plan, next step, not before ms
        self.done: list[Tcp] = []
        self.numbers = 0
        self.last: dict[Key, Tcp] = {}  # on each port
        self.opened: dict[tuple[bool, int, int], Tcp] = {}  # by the client's own ISN
        self.told = False
        self.expect: dict[int, list[tuple[bytes, int, int]]] = {}  # id(conn) -> kind, size, number
        self.got_udp: list[bytes] = []
        self.udp_left = rnd.choice((0, 6, 12))
        self.udp_nondeterministic = False
        self.gap_ms = 0
        self.last_ms = 0

    def tick(self, now_ms: int) -> list[bytes]:
        """Open connections, send requests, retransmit."""
        segs: list[Seg] = []
        ts = now_ms & 0xFFFFFFFF
        free = [
            (v6, 4000 + i)
            for i in range(self.ports)
            for v6 in (False, True)
            if (v6, 4000 + i) not in self.conns
        ]
        due = next((p for p in reversed(self.plans) if p.not_before <= now_ms or self.told), None)
        if due is not None and free and self.rnd.random() < 0.4:
            key = self.rnd.choice(free)
            iss = self.rnd.choice((self.rnd.randrange(1 << 32), -1 - self.rnd.randrange(2000)))
            if key in self.last:  # above the old one's numbers (RFC 6528)
                iss = self.last[key].iss + len(self.last[key].out) + 2 + self.rnd.randrange(100_000)
            iss &= 0xFFFFFFFF
            c = self.conns[key] = Tcp(key[1], key[0], False, iss, self.rnd)
            c.opened = now_ms
            self.last[key] = c
            self.opened[(*key, iss)] = c
            self.plans.remove(due)
            self.scripts[key] = (due, 0, 0)
            self.expect[id(c)] = []
        for key, c in list(self.conns.items()):
            if c.state in ("closed", "reset") or (c.aborted and now_ms > c.rto_at + 300):
                self.done.append(self.conns.pop(key))
                del self.scripts[key]
                continue
            self._script(key, c, now_ms)
            segs += c.tick(now_ms, ts, self.rnd, False)
        frames = [build(s, True, self.rnd.randrange(1 << 16)) for s in segs]
        if self.udp_left and self.rnd.random() < (0.5 if self.udp_left > 12 else 0.1):
            self.udp_left -= 1
            self.numbers += 1
            odd = self.udp_nondeterministic and self.rnd.random() < 0.3
            body = REQUEST.pack(b"N" if odd else b"G", self.rnd.choice((5, 30, 500)), self.numbers)
            packet = struct.pack("!HHHH", 9000, 53, 8 + len(body), 0) + body
            frames.append(ip(self.rnd.random() < 0.5, True, 17, packet))
        return frames

    def _script(self, key: Key, c: Tcp, now_ms: int) -> None:
        plan, i, at = self.scripts[key]
        if c.state != "open" or now_ms < at or self._waits(c):
            return
        if i == len(plan.steps) or (plan.until_told and self.told):
            c.close_asked = True
            return
        kind, size = plan.steps[i]
        self.numbers += 1
        c.out += REQUEST.pack(kind, size, self.numbers)
        if kind == b"U":
            c.out += answer(self.numbers + 1, size)
        self.expect[id(c)].append((kind, size, self.numbers))
        if plan.half_close and i == len(plan.steps) - 1:
            c.close_asked = True
        self.scripts[key] = (plan, i + 1, now_ms + plan.pause_ms)

    def _waits(self, c: Tcp) -> bool:
        """Return whether answers are outstanding (requests are sometimes sent ahead of them)."""
        if self.expect[id(c)] and self.expect[id(c)][-1][0] == b"C":
            return False  # it does not know yet that the server will close
        return len(c.inn) < self.wanted(c) and self.rnd.random() < 0.8

    def wanted(self, c: Tcp) -> int:
        """Return the number of answer bytes expected for the requests so far."""
        n = 0
        for kind, size, _ in self.expect[id(c)]:
            n += {b"G": size, b"W": size, b"N": size + 2, b"U": 8, b"a": size, b"C": size}.get(
                kind, 0
            )
        return n

    def receive(self, frame: bytes, now_ms: int) -> list[bytes]:
        """Handle a frame from the network."""
        s = read(frame)
        if s is None:
            return []
        key = (s.v6, s.dport)
        c = self.conns.get(key)
        ts = now_ms & 0xFFFFFFFF
        if c is None or c.state in ("closed", "reset"):
            if c is None:
                c = next((d for d in reversed(self.done) if (d.v6, d.port) == key), None)
            if c is not None and c.state == "closed" and not s.flags & RST:
                if s.flags & SYN and s.ack != (c.iss + 1) & 0xFFFFFFFF:
                    return []
                return [build(c.seg(ACK, c.nxt, tsval=ts), True, 0)] if s.flags & 1 else []
            return []
        before = len(c.inn)
        segs = c.receive(s, now_ms, ts, self.rnd)
        if len(c.inn) > before:
            self.gap_ms = max(self.gap_ms, now_ms - self.last_ms) if self.last_ms else 0
            self.last_ms = c.heard = now_ms
        if c.state == "open":
            segs += c.output(now_ms, ts, self.rnd, False)
        return [build(x, True, 0) for x in segs]

    def confirmed(self) -> set[int]:
        """Return the numbers of all writes that the guest has confirmed."""
        out = set()
        for c in [*self.done, *self.conns.values()]:
            at = 0
            for kind, size, number in self.expect[id(c)]:
                at += {b"G": size, b"W": size, b"N": size + 2, b"U": 8, b"a": size, b"C": size}.get(
                    kind, 0
                )
                if at > len(c.inn):
                    break
                if kind == b"W":
                    out.add(number)
        return out

    def check_answers(self, c: Tcp, fail: type[AssertionError]) -> None:
        """Check that honest guests can have sent these answers, in order, as far as received."""
        want = bytearray()
        for kind, size, number in self.expect[id(c)]:
            if kind in (b"G", b"W", b"C"):
                want += answer(number, size)
            elif kind == b"N":
                want += bytes(c.inn[len(want) : len(want) + 2]) + answer(number, size)
            elif kind == b"U":
                body = REQUEST.pack(kind, size, number) + answer(number + 1, size)
                want += struct.pack("!II", zlib.crc32(body), number)
            elif kind == b"a":
                want += answer(number, size)
        n = min(len(want), len(c.inn))
        if bytes(c.inn[:n]) != bytes(want[:n]) or len(c.inn) > len(want):
            raise fail(f"the client of port {c.port} got bytes that nobody may answer")


__all__ = ["REQUEST", "BadChecksum", "Client", "Guest", "Out", "Plan", "answer", "diff"]
