# SPDX-License-Identifier: GPL-2.0-or-later
"""Heartbeats beside the control channel: one small datagram, sent over each further path. Pure.

A beacon proves that the peer's controller lives when the control channel is silent, and carries
the few words of a heartbeat that matter then. peer/heartbeat_links.py sends and receives them.

    bytes
    0   4   magic and version, "CXB" 1
    4   8   pair: the first bytes of SHA-256 of its name
    12  4   key: the first bytes of SHA-256 of the session key
    16  1   side: 0 the host whose file says primary, 1 the other
    17  1   flags (Flag)
    18  2   lag: ms that the sender's loop stood still since its last beacon, 65535: or more
    20  8   counter: of this key and side, over all paths
    28  8   t: the sender's CLOCK_BOOTTIME, ns
    36  8   echo: the last t that the sender has heard on this path, 0: none
    44  4   held: us between hearing it and sending this
    48  8   epoch
    56  32  HMAC-SHA256 of all that is before it

All in network byte order.

*Key.* Both hellos on the control channel carry a nonce (peer/messages.py); the key is made of both,
so it is secret if the channel is (TLS), new for each connection, and nothing has to be configured.
When a connection is new one side may know its key and the other not, if the channel was cut again
at once: until a beacon under the new key is heard, a side sends under the new one and the former
one in turns, and takes both. The former one goes with the first beacon under the new one, and when
the peer's process is another.

*Replay.* A counter is taken once, whatever the path; what lies more than WINDOW behind the newest
is refused. That leaves beacons that somebody has kept from arriving and brings later. So what the
flags say counts only with an echo that is recent (Word.after): the peer has sent it after it had
heard what this side sent at that time; and only if it is newer, by Word.t, than all that was heard
of the peer, heartbeats on the control channel included. That the peer lives counts without: it can
only make decisions more careful.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntFlag

MAGIC = b"CXB\x01"
WINDOW = 64
NONCE = 32  # bytes
MAC = 32
_HEAD = struct.Struct("!4s8s4sBBHQQQIQ")
SIZE = _HEAD.size + MAC
SIDES = {"primary": 0, "secondary": 1}
#: why a datagram was not taken
REFUSALS = ("stranger", "other_pair", "other_key", "forged", "own", "replayed")


class Flag(IntFlag):
    """What a beacon says; SHUT, ALONE and SHADOW mean what they do in a heartbeat
    (peer/messages.py)."""

    VM = 1  # the sender's QEMU lives
    SHUT = 2  # its data path drops everything, and opens only for a new guest
    STANDALONE = 4  # its guest has run standalone
    ASK = 8  # P: shut your guest in, as `solo`
    SHADOW = 16
    SVM = 32  # it runs the SVM
    HANGS = 64  # its QEMU is alive and answers nothing
    PROMISE = 128  # its guest is silent, and stays so for lease_ttl (failover/lease.py)


def session_key(pair: str, primary: str, secondary: str) -> bytes:
    """The key of one connection, from the nonces (hexadecimal) of both hosts' hellos.

    Empty when one of them sent none, or what is none: an older release.
    """
    try:
        nonces = [bytes.fromhex(n) for n in (primary, secondary)]
    except ValueError:
        return b""
    if any(len(n) != NONCE for n in nonces):
        return b""
    return hmac.digest(b"".join(nonces), b"colo_xdp beacon 1 " + pair.encode(), "sha256")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """What one beacon says. Times: ns, `after` on this host's clock."""

    flags: Flag
    lag_ms: int
    epoch: int
    t: int  # when it was sent, on the sender's clock
    after: int  # sent after the peer had heard what this side sent then; 0: unknown


@dataclass(slots=True)
class _Session:
    key: bytes
    id: bytes
    sent: int = 0
    heard: bool = False
    newest: int = 0
    seen: int = 0  # bit i: counter newest - i has been taken

    def fresh(self, counter: int) -> bool:
        """Whether this counter is new; then it is taken."""
        if counter > self.newest:
            self.seen = (self.seen << min(counter - self.newest, WINDOW) | 1) & ((1 << WINDOW) - 1)
            self.newest = counter
            return True
        behind = self.newest - counter
        if behind >= WINDOW or self.seen >> behind & 1:
            return False
        self.seen |= 1 << behind
        return True


@dataclass(slots=True)
class HeartbeatLink:
    """What is known of one path. Times: CLOCK_BOOTTIME, ns; 0: never."""

    name: str
    sent: int = 0
    received: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    heard_ns: int = 0  # the last beacon that was taken
    peer_t: int = 0  # its t
    echo_ns: int = 0  # the newest of our own beacons that the peer has heard here was sent then
    rtt_ns: int = 0


class HeartbeatSession:
    """One side: makes beacons and judges what arrives."""

    def __init__(self, pair: str, side: str, paths: Sequence[str]) -> None:
        self._pair = hashlib.sha256(pair.encode()).digest()[:8]
        self._side = SIDES[side]
        self.paths = [HeartbeatLink(name) for name in paths]
        self._now: _Session | None = None
        self._former: _Session | None = None
        self._turn = False

    def rekey(self, key: bytes, *, same_peer: bool) -> None:
        """A new connection. `key` may be empty: its peer knows no beacons."""
        former = self._now if same_peer else None
        if former is not None and not former.heard and self._former is not None:
            former = self._former  # never heard under: the peer may not know it
        self._former = former
        self._now = _Session(key, hashlib.sha256(key).digest()[:4]) if key else None
        if not same_peer:
            for p in self.paths:  # its clock may be that of another boot
                p.peer_t = p.echo_ns = 0

    def round(self) -> None:
        """Before the beacons of one moment are made, one for each path."""
        self._turn = not self._turn

    def make(self, path: int, now_ns: int, flags: Flag, lag_ms: int, epoch: int) -> bytes:
        """The next beacon for a path; empty while there is no key."""
        s = self._now
        if self._former is not None and (s is None or (not s.heard and self._turn)):
            s = self._former
        if s is None:
            return b""
        p = self.paths[path]
        s.sent += 1
        held = min(max(0, now_ns - p.heard_ns) // 1000, 0xFFFFFFFF) if p.peer_t else 0
        head = _HEAD.pack(
            MAGIC, self._pair, s.id, self._side, flags, min(lag_ms, 0xFFFF), s.sent, now_ns,
            p.peer_t, held, epoch,
        )  # fmt: skip
        p.sent += 1
        return head + hmac.digest(s.key, head, "sha256")

    def receive(self, path: int, data: bytes, now_ns: int) -> Heartbeat | None:
        """What has arrived on a path: its word, or None, and then counted."""
        p = self.paths[path]
        heartbeat = self._judge(p, data, now_ns)
        if isinstance(heartbeat, str):
            p.refused[heartbeat] += 1
            return None
        p.received += 1
        return heartbeat

    def _judge(self, p: HeartbeatLink, data: bytes, now_ns: int) -> Heartbeat | str:
        if len(data) != SIZE or data[:4] != MAGIC:
            return "stranger"
        head = data[: _HEAD.size]
        (_, pair, key, side, flags, lag, counter, t, echo, held, epoch) = _HEAD.unpack(head)
        if pair != self._pair:
            return "other_pair"  # they may share a link
        s = next((s for s in (self._now, self._former) if s is not None and s.id == key), None)
        if s is None:
            return "other_key"
        if not hmac.compare_digest(hmac.digest(s.key, head, "sha256"), data[_HEAD.size :]):
            return "forged"
        if side == self._side:
            return "own"
        if not s.fresh(counter):
            return "replayed"
        s.heard = True
        if s is self._now:
            self._former = None
        if t > p.peer_t:
            p.heard_ns, p.peer_t = now_ns, t
        if echo > now_ns:
            echo = 0  # not of this boot
        if echo > p.echo_ns:
            p.echo_ns = echo
            p.rtt_ns = max(0, now_ns - echo - held * 1000)
        return Heartbeat(Flag(flags), lag, epoch, t, echo)

    def excuse(self, ns: int) -> None:
        """This side was not listening for so long."""
        for p in self.paths:
            p.heard_ns += ns if p.heard_ns else 0

    def silent_ms(self, path: int, now_ns: int) -> float:
        """Since the last beacon on a path; infinite when there was none."""
        at = self.paths[path].heard_ns
        return (now_ns - at) / 1e6 if at else float("inf")

    def echo_age_ms(self, path: int, now_ns: int) -> float:
        """Age of the newest of our own beacons that the peer has heard; infinite: none."""
        at = self.paths[path].echo_ns
        return (now_ns - at) / 1e6 if at else float("inf")
