# SPDX-License-Identifier: GPL-2.0-or-later
"""Builds frames that the PVM could have sent: parts of one, a smaller window, a window update.

Parts are needed for liveness. A PVM may put 64 KiB into one frame, while the SVM may send no more
than its congestion window (or Nagle) allows before it sees an ack. The client acks only what it
gets. If the frame left only as a whole, both guests would wait.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

from .frame import Frame
from .packet import ACK, CWR, ECE, FIN, PSH, Packet, parse
from .seqnum import MASK
from .tcp_headers import ip_id, is_atomic, reserved

#: Reserves so many IP IDs in a row that the PVM has not used near this packet's; returns the first.
SpareIds = Callable[[Packet, int], int]


def _sum(data: bytes) -> int:
    """Return the RFC 1071 sum of 16-bit words, folded, not inverted."""
    if len(data) % 2:
        data += b"\0"
    n = int.from_bytes(data, "big")
    return (n - 1) % 0xFFFF + 1 if n else 0


def _put_id(head: bytearray, l3: int, ident: int) -> None:
    """Set an IPv4 header's ID and recompute its checksum (also for another length)."""
    struct.pack_into("!H", head, l3 + 4, ident & 0xFFFF)
    head[l3 + 10 : l3 + 12] = b"\0\0"
    ihl = (head[l3] & 15) * 4
    struct.pack_into("!H", head, l3 + 10, 0xFFFF & ~_sum(bytes(head[l3 : l3 + ihl])))


def _part(rec: Frame, p: Packet, start: int, stop: int, flags: int, ident: int) -> Frame:
    """Build a frame with bytes start..stop of the payload under the frame's header. ident:

    IPv4's ID.
    """
    head = bytearray(rec.frame[: p.off])
    body = rec.frame[p.off + start : p.off + stop]
    l3, l4 = p.l3, p.l4
    if head[l3] >> 4 == 4:
        struct.pack_into("!H", head, l3 + 2, len(head) - l3 + len(body))
        _put_id(head, l3, ident)
        addresses = bytes(head[l3 + 12 : l3 + 20])
    else:
        struct.pack_into("!H", head, l3 + 4, len(head) - l3 - 40 + len(body))
        addresses = bytes(head[l3 + 8 : l3 + 40])
    struct.pack_into("!I", head, l4 + 4, (p.seq + start) & MASK)
    head[l4 + 13] = flags
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
    """Build a frame from headers (untagged Ethernet up to TCP's options) and payload.

    Sets the lengths, the IPv4 checksum, and TCP's checksum as CHECKSUM_PARTIAL requires it (the
    pseudo header's sum).
    """
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


def with_window(rec: Frame, p: Packet, value: int, spare: SpareIds) -> Frame:
    """Return the frame with another window field; the checksum follows RFC 1624, equation 3."""
    frame = bytearray(rec.frame)
    at = p.l4 + 14
    struct.pack_into("!H", frame, at, value)
    if not rec.partial:  # a partial one covers the pseudo header only
        (old,) = struct.unpack_from("!H", rec.frame, p.l4 + 16)
        total = (0xFFFF & ~old) + (0xFFFF & ~p.window) + value
        total = (total & 0xFFFF) + (total >> 16)
        total = (total & 0xFFFF) + (total >> 16)
        struct.pack_into("!H", frame, p.l4 + 16, 0xFFFF & ~total)
    if rec.parts and not is_atomic(p):  # fragments share one ID, its segments need one each
        _put_id(frame, p.l3, spare(p, _segments(p.end - p.off, rec.gso_size)))
    return replace(rec, frame=bytes(frame), parts=())


def bare_ack(
    rec: Frame, p: Packet, seq: int, value: int, spare: SpareIds, ace: bool | None
) -> Frame:
    """Return a frame without payload that repeats this one's ack and options with another window.

    Its congestion signals are repeated too: ECE stays set until CWR answers it (RFC 3168 section
    6.1.3), and AccECN's counter is in each segment. CWR alone refers to data. A bare ACK is not
    ECN-capable (RFC 3168 section 6.1.4).
    """
    head = bytearray(rec.frame[: p.off])
    if head[p.l3] >> 4 == 4:
        head[p.l3 + 1] &= 0xFC
    else:
        head[p.l3 + 1] &= 0xCF
    head[p.l4 + 14 : p.l4 + 16] = struct.pack("!H", value)
    head[p.l4 + 18 : p.l4 + 20] = b"\0\0"
    counts = ace or reserved(p) & 1  # AE is set for nothing else
    flags = ACK | p.flags & (ECE | CWR if counts else ECE)
    ident = 0 if p.frame[p.l3] >> 4 == 6 else ip_id(p) if is_atomic(p) else spare(p, 1)
    bare = replace(rec, frame=bytes(head), gso_size=0, partial=False, parts=())
    return _part(bare, replace(p, seq=seq), 0, 0, flags, ident)


def _segments(size: int, gso_size: int) -> int:
    """Return the number of packets on the wire for `size` bytes of payload."""
    return -(-size // gso_size) if gso_size else 1


def _ids(rec: Frame, p: Packet, n: int, spare: SpareIds) -> tuple[int, int]:
    """Return the first IPv4 ID of each of the two parts.

    A device numbers the segments of a GSO frame consecutively, so the PVM has left as many IDs free
    as there are segments.
    """
    if p.frame[p.l3] >> 4 == 6:
        return 0, 0
    total, size = p.end - p.off, rec.gso_size
    all_of_it, before, behind = (_segments(x, size) for x in (total, n, total - n))
    ident = ip_id(p)
    if rec.parts and not is_atomic(p):
        ident = spare(p, all_of_it)
    if before + behind <= all_of_it or is_atomic(p):
        return ident, ident + all_of_it - behind
    return spare(p, before), ident + all_of_it - behind


def split(
    rec: Frame, p: Packet, n: int, spare: SpareIds, ace: bool | None = False
) -> tuple[tuple[Frame, Packet], tuple[Frame, Packet]]:
    """Return the first n bytes of payload as one frame, and the rest as another.

    PSH and FIN stay with the second. CWR does not, as it refers to the first byte sent after a
    reduction (RFC 3168 section 6.1.2), unless it is a digit of AccECN's counter (`ace`; None: not
    known), which each segment carries. Raises ValueError unless 0 < n < length of the payload.
    """
    total = p.end - p.off
    if not 0 < n < total:
        raise ValueError(f"cannot cut {total} bytes at {n}")
    counts = ace or reserved(p) & 1  # AE is set for nothing else
    one, two = _ids(rec, p, n, spare)
    a = _part(rec, p, 0, n, p.flags & ~(FIN | PSH) & 0xFF, one)
    b = _part(rec, p, n, total, p.flags if counts else p.flags & ~CWR & 0xFF, two)
    return (a, parse(a.frame)), (b, parse(b.frame))
