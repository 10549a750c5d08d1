# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes frames that the PVM could have sent: parts of one, a smaller window, a window update.

Parts are needed for liveness: a PVM may put 64 KiB into one frame while the SVM may send no
more than its congestion window (or Nagle) allows before it sees an ack. The client
acks only what it gets. If the frame left only as a whole, both would wait.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from ._seq import MASK
from .packet import ACK, FIN, Packet, parse
from .record import Record

_PSH, _CWR = 0x08, 0x80


def _sum(data: bytes) -> int:
    """RFC 1071 sum of 16-bit words, folded, not inverted."""
    if len(data) % 2:
        data += b"\0"
    n = int.from_bytes(data, "big")
    return (n - 1) % 0xFFFF + 1 if n else 0


def _part(rec: Record, p: Packet, start: int, stop: int, *, first: bool) -> Record:
    head = bytearray(rec.frame[: p.off])
    body = rec.frame[p.off + start : p.off + stop]
    l3, l4 = p.l3, p.l4
    if head[l3] >> 4 == 4:
        struct.pack_into("!H", head, l3 + 2, len(head) - l3 + len(body))
        head[l3 + 10 : l3 + 12] = b"\0\0"
        ihl = (head[l3] & 15) * 4
        struct.pack_into("!H", head, l3 + 10, 0xFFFF & ~_sum(bytes(head[l3 : l3 + ihl])))
        addresses = bytes(head[l3 + 12 : l3 + 20])
    else:
        struct.pack_into("!H", head, l3 + 4, len(head) - l3 - 40 + len(body))
        addresses = bytes(head[l3 + 8 : l3 + 40])
    struct.pack_into("!I", head, l4 + 4, (p.seq + start) & MASK)
    head[l4 + 13] &= ~(FIN | _PSH) & 0xFF if first else ~_CWR & 0xFF
    length = len(head) - l4 + len(body)
    pseudo = addresses + struct.pack("!II", length, 6)
    if rec.partial:  # the device adds the rest (linux/virtio_net.h, NEEDS_CSUM)
        struct.pack_into("!H", head, l4 + 16, _sum(pseudo))
    else:
        head[l4 + 16 : l4 + 18] = b"\0\0"
        struct.pack_into("!H", head, l4 + 16, 0xFFFF & ~_sum(pseudo + head[l4:] + body))
    gso = rec.gso_size if rec.gso_size and len(body) > rec.gso_size else 0
    return replace(rec, frame=bytes(head) + body, gso_size=gso, parts=())


def finish(head: bytearray, l4: int, payload: bytes) -> bytes:
    """A frame of these headers (Ethernet without tags, to TCP's options) and payload: lengths, the
    IPv4 checksum, and TCP's as CHECKSUM_PARTIAL wants it (the pseudo header's sum)."""
    length = len(head) - l4 + len(payload)
    if head[14] >> 4 == 4:
        struct.pack_into("!H", head, 16, l4 - 14 + length)
        head[24:26] = b"\0\0"
        struct.pack_into("!H", head, 24, 0xFFFF & ~_sum(bytes(head[14:l4])))
        addresses = bytes(head[26:34])
    else:
        struct.pack_into("!H", head, 18, l4 - 54 + length)
        addresses = bytes(head[22:54])
    struct.pack_into("!H", head, l4 + 16, _sum(addresses + struct.pack("!II", length, 6)))
    return bytes(head) + payload


def with_window(rec: Record, p: Packet, value: int) -> Record:
    """The frame with another window field; the checksum follows by RFC 1624, eqn. 3."""
    frame = bytearray(rec.frame)
    at = p.l4 + 14
    struct.pack_into("!H", frame, at, value)
    if not rec.partial:  # a partial one covers the pseudo header only
        (old,) = struct.unpack_from("!H", rec.frame, p.l4 + 16)
        total = (0xFFFF & ~old) + (0xFFFF & ~p.window) + value
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", frame, p.l4 + 16, 0xFFFF & ~total)
    return replace(rec, frame=bytes(frame), parts=())


def bare_ack(rec: Record, p: Packet, seq: int, value: int) -> Record:
    """A frame without payload that repeats this one's ack and options with another window."""
    bare = _part(rec, p, 0, 0, first=True)
    frame = bytearray(bare.frame)
    struct.pack_into("!I", frame, p.l4 + 4, seq)
    frame[p.l4 + 13] = ACK
    struct.pack_into("!H", frame, p.l4 + 14, value)
    whole = replace(bare, frame=bytes(frame), gso_size=0, partial=False)
    return _part(whole, replace(p, seq=seq), 0, 0, first=True)


def split(rec: Record, p: Packet, n: int) -> tuple[tuple[Record, Packet], tuple[Record, Packet]]:
    """The first n bytes of payload as one frame, what follows as another.

    PSH and FIN stay with the second, CWR with the first. 0 < n < length of the payload.
    """
    total = p.end - p.off
    if not 0 < n < total:
        raise ValueError(f"cannot cut {total} bytes at {n}")
    a = _part(rec, p, 0, n, first=True)
    b = _part(rec, p, n, total, first=False)
    return (a, parse(a.frame)), (b, parse(b.frame))
