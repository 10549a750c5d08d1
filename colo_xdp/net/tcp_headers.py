# SPDX-License-Identifier: GPL-2.0-or-later
"""Fields of TCP and IP headers other than bytes, acks and windows, and what depends on them.

Urgent data (RFC 9293 section 3.8.5), ECN's counter (RFC 9768, RFC 3168), signatures (RFC 2385, RFC
5925), and whether an IP ID must be unique to a packet (RFC 6864).
"""

from __future__ import annotations

from .packet import ACK, SYN, Packet, tcp_options
from .seqnum import MASK

#: Sizes of nearly every TCP header: without options, and with timestamps. Neither has a signature.
USUAL_HEADERS = (20, 32)
#: Distance from the PVM's own IP IDs to the spare ones, and how many of those there are.
FAR, SPARE = 0x8000, 0x4000
#: AE, CWR and ECE of a SYN-ACK that agrees to AccECN (RFC 9768, table 2)
_AGREED = frozenset((0b010, 0b011, 0b100, 0b110))


def is_signed(p: Packet) -> bool:
    """Return whether the segment carries TCP-MD5 (option 19) or TCP-AO (29).

    A signature covers at least sequence numbers, window, length and payload: if they are changed,
    the segment is dropped.
    """
    return tcp_options(p).signed


def urgent_position(p: Packet) -> int:
    """Return where urgent data ends according to a segment with URG, as a sequence number."""
    return (p.seq + int.from_bytes(p.frame[p.l4 + 18 : p.l4 + 20], "big")) & MASK


def reserved(p: Packet) -> int:
    """Return the four bits after the header's length: 1 is AE (RFC 9768; NS in RFC 3540)."""
    return p.frame[p.l4 + 12] & 0x0F


def ace(p: Packet) -> int:
    """Return AE, CWR and ECE as one number, AccECN's counter (RFC 9768 section 3.1.1)."""
    return (p.frame[p.l4 + 12] & 1) << 2 | p.flags >> 6 & 3


def counts_in_ace(syn: Packet) -> bool | None:
    """Return whether a guest's SYN or SYN-ACK makes the connection use AccECN; None: requested."""
    if syn.flags & (SYN | ACK) == SYN:
        return None if ace(syn) == 0b111 else False
    return ace(syn) in _AGREED


def is_atomic(p: Packet) -> bool:
    """Return whether the packet cannot be fragmented, so that its IP ID means nothing.

    That is IPv6 without a fragment header, and IPv4 with DF (RFC 6864 section 4).
    """
    return p.frame[p.l3] >> 4 == 6 or bool(p.frame[p.l3 + 6] & 0x40)


def ip_id(p: Packet) -> int:
    """Return the identification field of an IPv4 packet."""
    return int.from_bytes(p.frame[p.l3 + 4 : p.l3 + 6], "big")
