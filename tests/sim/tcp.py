# SPDX-License-Identifier: GPL-2.0-or-later
"""Implement a small TCP endpoint on plain data, which can be copied as a checkpoint copies a guest.

Positions count bytes of the stream from 0; wire numbers are computed at the edge. It shares no code
with the product: it is the outside.
"""

from __future__ import annotations

import copy
import random
import struct
from dataclasses import dataclass

M32 = 0xFFFFFFFF
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
SHIFT = 3  # window scale of every endpoint
GUEST4, CLIENT4 = bytes((10, 9, 0, 2)), bytes((10, 9, 0, 1))
GUEST6, CLIENT6 = bytes(15) + b"\2", bytes(15) + b"\1"
GUEST_MAC, CLIENT_MAC = b"\x52\x54\0\0\0\2", b"\x52\x54\0\0\0\1"


def fold(data: bytes) -> int:
    if len(data) & 1:
        data += b"\0"
    n = int.from_bytes(data, "big")
    return (n - 1) % 0xFFFF + 1 if n else 0


def diff(a: int, b: int) -> int:
    d = (a - b) & M32
    return d - (1 << 32) if d & 0x80000000 else d


@dataclass(slots=True)
class Seg:
    """A TCP segment as on the wire; the window is already scaled, except in a SYN."""

    v6: bool
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int
    window: int
    data: bytes
    tsval: int
    tsecr: int


def ip(v6: bool, to_guest: bool, proto: int, body: bytes, ident: int = 0, frag: int = 0) -> bytes:
    macs = GUEST_MAC + CLIENT_MAC if to_guest else CLIENT_MAC + GUEST_MAC
    if v6:
        pair = CLIENT6 + GUEST6 if to_guest else GUEST6 + CLIENT6
        if frag:
            body = struct.pack("!BBHI", proto, 0, frag, ident) + body
            proto = 44
        return (
            macs + b"\x86\xdd" + struct.pack("!IHBB", 6 << 28, len(body), proto, 64) + pair + body
        )
    pair = CLIENT4 + GUEST4 if to_guest else GUEST4 + CLIENT4
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), ident, frag, 64, proto, 0) + pair
    head = head[:10] + struct.pack("!H", 0xFFFF & ~fold(head)) + head[12:]
    return macs + b"\x08\x00" + head + body


def pseudo(v6: bool, proto: int, length: int) -> int:
    pair = CLIENT6 + GUEST6 if v6 else CLIENT4 + GUEST4
    return fold(pair + struct.pack("!II", length, proto))


def build(s: Seg, to_guest: bool, ident: int) -> bytes:
    """Build the frame of a segment, with a correct checksum."""
    if s.flags & SYN:
        options = b"\2\4\5\xb4\4\2\x08\x0a" + struct.pack("!II", s.tsval, s.tsecr)
        options += bytes((1, 3, 3, SHIFT))
        window = min(s.window, 65535)
    else:
        options = b"\1\1\x08\x0a" + struct.pack("!II", s.tsval, s.tsecr)
        window = min(s.window >> SHIFT, 65535)
    doff = 20 + len(options)
    head = struct.pack(
        "!HHIIBBHHH", s.sport, s.dport, s.seq & M32, s.ack & M32, doff << 2, s.flags, window, 0, 0
    )
    raw = head + options + s.data
    total = fold(raw) + pseudo(s.v6, 6, len(raw))
    check = 0xFFFF & ~((total - 1) % 0xFFFF + 1)
    # One connection in eight allows fragmentation of its packets, so each of them needs an id.
    df = 0 if s.v6 or (s.sport ^ s.dport) % 8 == 0 else 0x4000
    return ip(s.v6, to_guest, 6, raw[:16] + struct.pack("!H", check) + raw[18:], ident, df)


class BadChecksum(AssertionError):
    """A frame was damaged on its way."""


def read(frame: bytes) -> Seg | None:
    """Parse a frame; return its segment, or None if it is not TCP. Raises BadChecksum."""
    v6 = frame[12:14] == b"\x86\xdd"
    l4 = 54 if v6 else 34
    if not v6 and frame[12:14] != b"\x08\x00":
        return None
    proto = frame[20] if v6 else frame[23]
    if proto != 6:
        return None
    end = (
        54 + int.from_bytes(frame[18:20], "big") if v6 else 14 + int.from_bytes(frame[16:18], "big")
    )
    total = fold(frame[l4:end]) + pseudo(v6, 6, end - l4)
    if total % 0xFFFF:
        raise BadChecksum(frame.hex())
    if not v6 and fold(frame[14:34]) % 0xFFFF:
        raise BadChecksum(f"IP header: {frame.hex()}")
    sport, dport, seq, ack, doff, flags, window = struct.unpack_from("!HHIIBBH", frame, l4)
    at = l4 + (24 if flags & SYN else 22) + (4 if flags & SYN else 2)
    tsval, tsecr = struct.unpack_from("!II", frame, at) if doff >> 2 > 20 else (0, 0)
    data = frame[l4 + (doff >> 2) : end]
    scaled = window if flags & SYN else window << SHIFT
    return Seg(v6, sport, dport, seq, ack, flags, scaled, data, tsval, tsecr)


class Tcp:
    """One end of one connection. `port` is the client's; `server` tells which end sends."""

    __slots__ = (
        "abort_at",
        "aborted",
        "ack_due",
        "acked",
        "adv",
        "app",
        "close_asked",
        "cwnd",
        "edge",
        "fin_at",
        "fin_ok",
        "fin_sent",
        "heard",
        "inn",
        "irs",
        "iss",
        "killed",
        "mss",
        "nxt",
        "opened",
        "out",
        "out_of_order",
        "peer_fin",
        "port",
        "quiet_until",
        "read",
        "recent",
        "room",
        "rto",
        "rto_at",
        "sent_max",
        "server",
        "slow",
        "state",
        "tries",
        "ts_off",
        "una",
        "v6",
    )

    def __init__(self, port: int, v6: bool, server: bool, iss: int, rnd: random.Random) -> None:
        self.port, self.v6, self.server, self.iss = port, v6, server, iss
        self.irs = 0
        self.state = "syn"  # syn, open, closed, reset
        self.out, self.inn = bytearray(), bytearray()
        self.out_of_order: dict[int, bytes] = {}
        self.una = self.nxt = self.sent_max = self.read = 0
        self.acked = False  # our SYN
        self.close_asked = self.fin_sent = self.fin_ok = self.aborted = self.killed = False
        self.peer_fin: int | None = None
        self.fin_at: int | None = None
        self.abort_at: int | None = None  # where our stream has ended by a reset
        self.edge = 0  # of the peer's window, in our stream
        self.room = rnd.choice((600, 2000, 8000))
        self.adv = 0  # right edge we have offered, in the peer's stream
        self.rto, self.rto_at, self.tries = 200, 0, 0
        self.recent = self.quiet_until = 0
        self.mss = rnd.choice((60, 100, 160))
        self.cwnd = rnd.choice((2, 4, 10)) * 100
        self.slow = rnd.random() < 0.15  # reads only at ticks
        self.ack_due = False
        self.app: dict[str, int] = {"pos": 0}
        self.opened = self.heard = 0  # ms: of the client's application
        self.ts_off = rnd.randrange(1 << 32)  # each host draws its own

    def clone(self) -> Tcp:
        """Return what a checkpoint copies."""
        c = copy.copy(self)
        c.out, c.inn, c.out_of_order, c.app = (
            self.out[:],
            self.inn[:],
            dict(self.out_of_order),
            dict(self.app),
        )
        return c

    # -- sending

    def _window(self) -> int:
        """Return the window to advertise; its right edge never moves back."""
        free = max(0, self.room - (len(self.inn) - self.read))
        edge = max(self.adv, len(self.inn) + (free >> SHIFT << SHIFT))
        self.adv = edge
        return edge - len(self.inn)

    def seg(self, flags: int, pos: int, data: bytes = b"", tsval: int = 0) -> Seg:
        sport, dport = (80, self.port) if self.server else (self.port, 80)
        ack = self.irs + 1 + len(self.inn) + (self.peer_fin == len(self.inn))
        window = self._window() if self.irs or self.server or self.acked else 5000
        if flags & SYN:
            window = self._window()
        self.ack_due = False
        return Seg(
            self.v6, sport, dport, self.iss if flags & SYN else self.iss + 1 + pos,
            ack if flags & ACK else 0, flags, window, data,
            (tsval + self.ts_off) & M32, self.recent,
        )  # fmt: skip

    def output(self, now_ms: int, ts: int, rnd: random.Random, gso: bool) -> list[Seg]:
        """Return what may be sent now."""
        made: list[Seg] = []
        if self.state in ("closed", "reset"):
            return made
        if self.state == "syn" or (self.server and not self.acked):
            if now_ms >= self.rto_at:
                made.append(self.seg(SYN | ACK if self.server else SYN, 0, tsval=ts))
                self._arm(now_ms)
            return made
        while self.nxt < len(self.out):
            room = min(self.edge, self.una + self.cwnd) - self.nxt
            if room <= 0:
                break
            most = self.mss * (rnd.choice((1, 2, 4)) if gso else 1)
            data = bytes(self.out[self.nxt : self.nxt + min(most, room)])
            made.append(self.seg(ACK | (PSH if rnd.random() < 0.5 else 0), self.nxt, data, ts))
            self.nxt += len(data)
        if self.close_asked and self.nxt == len(self.out) and not self.fin_sent:
            self.fin_at = len(self.out)
            self.fin_sent = True
            self.nxt = self.fin_at + 1
            made.append(self.seg(FIN | ACK, self.fin_at, tsval=ts))
        self.sent_max = max(self.sent_max, min(self.nxt, len(self.out)))
        if made and not self.rto_at:
            self._arm(now_ms)
        elif not self.rto_at and len(self.out) > self.nxt:
            self._arm(now_ms)  # zero window: probe
        return made

    def _arm(self, now_ms: int) -> None:
        self.rto_at = now_ms + self.rto
        self.rto = min(2 * self.rto, 800)
        self.tries += 1

    def tick(self, now_ms: int, ts: int, rnd: random.Random, gso: bool) -> list[Seg]:
        """Timers."""
        made: list[Seg] = []
        if self.slow and self.read < len(self.inn):
            self.read = min(len(self.inn), self.read + 700)
            if self.state == "open" and self.room - (len(self.inn) - self.read) > self.adv - len(
                self.inn
            ):
                self.ack_due = True
        if self.rto_at and now_ms >= self.rto_at and self.state == "open" and self.acked:
            if self.una < self.nxt or (self.fin_sent and not self.fin_ok):
                self.nxt = self.una  # go back
                self.fin_sent = False
                if min(self.edge, self.una + self.cwnd) <= self.nxt < len(self.out):
                    made.append(
                        self.seg(ACK, self.nxt, bytes(self.out[self.nxt : self.nxt + 1]), ts)
                    )
                    self.nxt += 1
                    self.sent_max = max(self.sent_max, self.nxt)
                self._arm(now_ms)
            elif self.nxt < len(self.out):  # a probe into a closed window
                made.append(self.seg(ACK, self.nxt, bytes(self.out[self.nxt : self.nxt + 1]), ts))
                self.nxt += 1
                self.sent_max = max(self.sent_max, self.nxt)
                self._arm(now_ms)
            else:
                self.rto_at = 0
        made += self.output(now_ms, ts, rnd, gso)
        if self.ack_due and self.state == "open":
            made.append(self.seg(ACK, self.nxt, tsval=ts))
        return made

    def abort(self, ts: int) -> list[Seg]:
        """RST."""
        if self.state in ("closed", "reset"):
            return []
        s = self.seg(RST | ACK, self.nxt, tsval=ts)
        self.state, self.aborted, self.abort_at = "reset", True, self.nxt
        return [s]

    def is_new(self, s: Seg) -> bool:
        """Return whether a segment brings data that has not come before."""
        return bool(s.data) and diff(s.seq + len(s.data), self.irs + 1 + len(self.inn)) > 0

    # -- receiving

    def _challenge(self, s: Seg, now_ms: int, ts: int) -> list[Seg]:
        """Answer a segment that cannot be right: with an ACK.

        Segments without data are answered only now and then (Linux: tcp_invalid_ratelimit), or two
        ends that disagree would do nothing else.
        """
        if not s.data:
            if now_ms < self.quiet_until:
                return []
            self.quiet_until = now_ms + 500
        return [self.seg(ACK, self.nxt, tsval=ts)]

    def receive(self, s: Seg, now_ms: int, ts: int, rnd: random.Random) -> list[Seg]:
        """Handle a segment of the other end, which knows this connection."""
        if self.state in ("closed", "reset"):
            return []
        if s.flags & SYN:
            if self.server or self.state == "open":
                if not self.server and s.flags & ACK and diff(s.seq, self.irs) == 0:
                    return [self.seg(ACK, self.nxt, tsval=ts)]
                if self.server and not self.acked and s.seq == self.irs:
                    return [self.seg(SYN | ACK, 0, tsval=ts)]
                # In SYN-RECEIVED too: Linux acknowledges a SYN with another number
                # (tcp_check_req()), and a client that has started over answers with the RST that
                # ends the old connection.
                return [self.seg(ACK, self.nxt, tsval=ts)]  # challenge
            if not s.flags & ACK:
                return []
            if diff(s.ack, self.iss) != 1:
                return [Seg(self.v6, self.port, 80, s.ack, 0, RST, 0, b"", ts, s.tsval)]
            self.irs, self.acked, self.state = s.seq, True, "open"
            self.recent = s.tsval
            self.edge = s.window
            self.rto, self.rto_at = 200, 0
            return [self.seg(ACK, 0, tsval=ts)]
        if self.state == "syn" and not self.server:
            if s.flags & RST and s.flags & ACK and diff(s.ack, self.iss) == 1:
                self.state = "reset"
            elif s.flags & (RST | ACK) == ACK and diff(s.ack, self.iss) != 1:
                # of an older connection on this port (RFC 9293 3.10.7.3)
                return [Seg(self.v6, self.port, 80, s.ack, 0, RST, 0, b"", ts, s.tsval)]
            return []
        place = diff(s.seq, (self.irs + 1) & M32)
        want = len(self.inn) + (self.peer_fin == len(self.inn))
        at = place - ((place - want + (1 << 31)) // (1 << 32) << 32)
        if s.flags & RST:
            if at == want:
                self.state = "reset"
                return []
            return [self.seg(ACK, self.nxt, tsval=ts)] if want < at < self.adv else []
        if s.tsval and self.recent and diff(s.tsval, self.recent) < 0:
            return self._challenge(s, now_ms, ts)  # PAWS, RFC 7323 5.2
        if not s.flags & ACK:
            return []
        if at > self.adv or at + len(s.data) < want - 100_000:
            return self._challenge(s, now_ms, ts)
        top = self.sent_max + (self.fin_at is not None)
        got = diff(s.ack, (self.iss + 1 + self.una) & M32) + self.una
        if got > top:
            return self._challenge(s, now_ms, ts)  # acks what was never sent
        if s.tsval and at <= want <= at + len(s.data):  # RFC 7323 4.3, and Linux's tcp_sequence()
            self.recent = s.tsval
        if not self.acked:
            if got < 0:
                return []
            self.acked, self.state = True, "open"
            self.rto, self.rto_at = 200, 0
        if got >= self.una:
            if got > self.una:
                self.rto, self.tries = 200, 0
                self.rto_at = 0
            self.una = min(got, len(self.out))
            if self.fin_at is not None and got == self.fin_at + 1:
                self.fin_ok = True
                self.una = self.fin_at
            self.nxt = max(self.nxt, self.una)
            flying = self.una < self.nxt or (self.fin_sent and not self.fin_ok)
            if flying and not self.rto_at:
                self._arm(now_ms)
            self.edge = max(self.edge, got + s.window)
        fresh = False
        if s.data:
            data, pos = s.data[: max(0, self.adv - at)], at
            if pos < len(self.inn):
                data, pos = data[len(self.inn) - pos :], len(self.inn)
            if data:
                self.out_of_order.setdefault(pos, data)
                if len(self.out_of_order[pos]) < len(data):
                    self.out_of_order[pos] = data
            while True:
                p = next((p for p in self.out_of_order if p <= len(self.inn)), None)
                if p is None:
                    break
                piece = self.out_of_order.pop(p)[len(self.inn) - p :]
                if piece:
                    self.inn += piece
                    fresh = True
            if not self.slow:
                self.read = len(self.inn)
            self.ack_due = True
        if s.flags & FIN and at + len(s.data) >= len(self.inn):  # not an old incarnation's
            self.ack_due = True
            self.peer_fin = at + len(s.data)
        elif s.flags & FIN:
            self.ack_due = True
        if self.fin_ok and self.peer_fin == len(self.inn):
            made = [self.seg(ACK, self.nxt, tsval=ts)] if self.ack_due else []
            self.state = "closed"
            return made
        if self.ack_due and (not fresh or rnd.random() < 0.5):
            return [self.seg(ACK, self.nxt, tsval=ts)]
        return []
