# SPDX-License-Identifier: GPL-2.0-or-later
"""Encode and judge heartbeat datagrams, which are sent besides the control channel. Pure.

One small datagram is sent over each heartbeat link. It proves that the peer's controller lives when
the control channel is silent, and carries the fields of a heartbeat that matter then.
peer/heartbeat_links.py owns the sockets that send and receive them.

    bytes
    0   4   magic and version, "CXB" 1
    4   8   pair: the first bytes of SHA-256 of its name
    12  4   key: the first bytes of SHA-256 of the session key
    16  1   side: 0 the host configured as primary, 1 the other
    17  1   flags (Flag)
    18  2   lag: ms that the sender's loop stalled since its last datagram; 65535: or more
    20  8   counter: of this key and side, over all links
    28  8   t: the sender's CLOCK_BOOTTIME, ns
    36  8   echo: the last t that the sender received on this link, 0: none
    44  4   held: us between receiving that and sending this
    48  8   epoch
    56  32  HMAC-SHA256 of everything before it

All fields are in network byte order.

*Key.* Both hellos on the control channel carry a nonce (peer/messages.py), and the key is derived
from both. It is therefore as secret as the channel (TLS), new for each connection, and needs no
configuration. If a new connection is cut again at once, one side may know its key and the other may
not. Until a datagram under the new key arrives, a side therefore sends under the new and the former
key in turns, and accepts both. It drops the former key when the first datagram under the new one
arrives, or when the peer's process is another one.

*Replay.* A counter is accepted once, on whatever link; a counter more than WINDOW behind the newest
is refused. Datagrams that somebody held back and delivers later remain. The flags therefore count
only with a recent echo (Heartbeat.after), which shows that the peer sent the datagram after it had
received what this side sent at that time, and only if the datagram is newer, by Heartbeat.t, than
everything else received from the peer, heartbeats on the control channel included. That the peer
lives needs no such proof: this knowledge can only make decisions more careful.
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
DRIFT_NS = 1_000_000  # between two datagrams: far more than that of clocks
NONCE = 32  # bytes
MAC = 32
_HEAD = struct.Struct("!4s8s4sBBHQQQIQ")
SIZE = _HEAD.size + MAC
SIDES = {"primary": 0, "secondary": 1}
#: reasons for refusing a datagram
REFUSALS = ("stranger", "other_pair", "other_key", "forged", "own", "replayed")


class Flag(IntFlag):
    """Flags of a heartbeat datagram.

    SHUT, STANDALONE and SHADOW mean the same as in a heartbeat (peer/messages.py).
    """

    VM = 1  # the sender's QEMU lives
    SHUT = 2  # its data path drops everything, and opens only for a new guest
    STANDALONE = 4  # its guest ran standalone
    ASK = 8  # from the primary: demote your guest, as the message `demote`
    SHADOW = 16
    SVM = 32  # it runs the SVM
    HANGS = 64  # its QEMU is alive but answers nothing
    PROMISE = 128  # its guest is silent and stays so for lease_ttl (failover/lease.py)


def session_key(pair: str, primary: str, secondary: str) -> bytes:
    """Derive the key of one connection from the nonces (hexadecimal) of both hosts' hellos.

    The key is empty if a nonce is missing or malformed, as with an older release.
    """
    try:
        nonces = [bytes.fromhex(n) for n in (primary, secondary)]
    except ValueError:
        return b""
    if any(len(n) != NONCE for n in nonces):
        return b""
    return hmac.digest(b"".join(nonces), b"colo_xdp heartbeat 1 " + pair.encode(), "sha256")


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Content of one datagram. Times are in ns; `after` is on this host's clock."""

    flags: Flag
    lag_ms: int
    epoch: int
    t: int  # when it was sent, on the sender's clock
    after: int  # it was sent after the peer received what this side sent at this time; 0: unknown


@dataclass(slots=True)
class _Session:
    key: bytes
    id: bytes
    sent: int = 0
    heard: bool = False
    newest: int = 0
    seen: int = 0  # bit i: counter newest - i was accepted

    def fresh(self, counter: int) -> bool:
        """Return whether this counter is new, and mark it as used."""
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
    """What is known about one link. Times: CLOCK_BOOTTIME, ns; 0: never."""

    name: str
    #: signed with each datagram, so that links of two NICs which are crossed do not look whole
    label: bytes = b""
    sent: int = 0
    received: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    heard_ns: int = 0  # when the last datagram was accepted
    peer_t: int = 0  # its t
    echo_ns: int = 0  # send time of our newest datagram that the peer received on this link
    rtt_ns: int = 0
    #: the least that this side's clock was ahead of `t` when a datagram was read: that of one which
    #: was read as it came. It may grow with each datagram, as the clocks drift apart
    lead_ns: int | None = None

    def arrived(self, t: int, now_ns: int, lay_ns: int) -> int:
        """Return when a datagram came that is read now; at most `lay_ns` before.

        A host that stood still must not take what it reads late for the peer's silence.
        """
        lead = now_ns - t
        self.lead_ns = lead if self.lead_ns is None else min(lead, self.lead_ns + DRIFT_NS)
        return now_ns - min(lead - self.lead_ns, lay_ns)


class HeartbeatSession:
    """Create datagrams for one side and judge those that arrive."""

    def __init__(
        self, pair: str, side: str, links: Sequence[str], labels: Sequence[str] = ()
    ) -> None:
        """Set up these links. `labels`: for each, what both ends must agree on."""
        self._pair = hashlib.sha256(pair.encode()).digest()[:8]
        self._side = SIDES[side]
        texts = [*labels, *[""] * (len(links) - len(labels))]
        self.links = [HeartbeatLink(n, text.encode()) for n, text in zip(links, texts, strict=True)]
        self._now: _Session | None = None
        self._former: _Session | None = None
        self._turn = False

    def rekey(self, key: bytes, *, same_peer: bool) -> None:
        """Start a new connection; an empty `key`: its peer knows no heartbeat datagrams."""
        former = self._now if same_peer else None
        if former is not None and not former.heard and self._former is not None:
            former = self._former  # no datagram arrived under it: the peer may not know it
        self._former = former
        self._now = _Session(key, hashlib.sha256(key).digest()[:4]) if key else None
        if not same_peer:
            for p in self.links:  # its clock may be that of another boot
                p.peer_t = p.echo_ns = 0
                p.lead_ns = None

    def round(self) -> None:
        """Prepare for one round of datagrams, one for each link."""
        self._turn = not self._turn

    def make(self, link: int, now_ns: int, flags: Flag, lag_ms: int, epoch: int) -> bytes:
        """Return the next datagram for a link; empty while there is no key."""
        s = self._now
        if self._former is not None and (s is None or (not s.heard and self._turn)):
            s = self._former
        if s is None:
            return b""
        p = self.links[link]
        s.sent += 1
        held = min(max(0, now_ns - p.heard_ns) // 1000, 0xFFFFFFFF) if p.peer_t else 0
        head = _HEAD.pack(
            MAGIC, self._pair, s.id, self._side, flags, min(lag_ms, 0xFFFF), s.sent, now_ns,
            p.peer_t, held, epoch,
        )  # fmt: skip
        p.sent += 1
        return head + hmac.digest(s.key, head + p.label, "sha256")

    def receive(self, link: int, data: bytes, now_ns: int, lay_ns: int = 0) -> Heartbeat | None:
        """Check a received datagram; return its content, or None after counting the refusal.

        `lay_ns`: how long it may have lain unread, at most.
        """
        p = self.links[link]
        heartbeat = self._judge(p, data, now_ns, lay_ns)
        if isinstance(heartbeat, str):
            p.refused[heartbeat] += 1
            return None
        p.received += 1
        return heartbeat

    def _judge(self, p: HeartbeatLink, data: bytes, now_ns: int, lay_ns: int) -> Heartbeat | str:
        if len(data) != SIZE or data[:4] != MAGIC:
            return "stranger"
        head = data[: _HEAD.size]
        (_, pair, key, side, flags, lag, counter, t, echo, held, epoch) = _HEAD.unpack(head)
        if pair != self._pair:
            return "other_pair"  # two pairs may share a link
        s = next((s for s in (self._now, self._former) if s is not None and s.id == key), None)
        if s is None:
            return "other_key"
        if not hmac.compare_digest(
            hmac.digest(s.key, head + p.label, "sha256"), data[_HEAD.size :]
        ):
            return "forged"
        if side == self._side:
            return "own"
        if not s.fresh(counter):
            return "replayed"
        s.heard = True
        if s is self._now:
            self._former = None
        at_ns = now_ns
        if t > p.peer_t:
            at_ns = p.arrived(t, now_ns, lay_ns)
            p.heard_ns, p.peer_t = at_ns, t
        if echo > now_ns:
            echo = 0  # from another boot
        if echo > p.echo_ns:
            p.echo_ns = echo
            p.rtt_ns = max(0, at_ns - echo - held * 1000)
        return Heartbeat(Flag(flags), lag, epoch, t, echo)

    def discount(self, ns: int) -> None:
        """Do not count the last `ns` as the peer's silence: this side was not receiving."""
        for p in self.links:
            p.heard_ns += ns if p.heard_ns else 0

    def silent_ms(self, link: int, now_ns: int) -> float:
        """Return the time since the last datagram on a link, ms; infinite if there was none."""
        at = self.links[link].heard_ns
        return (now_ns - at) / 1e6 if at else float("inf")

    def echo_age_ms(self, link: int, now_ns: int) -> float:
        """Return the age of our newest datagram that the peer received, ms; infinite if none."""
        at = self.links[link].echo_ns
        return (now_ns - at) / 1e6 if at else float("inf")
