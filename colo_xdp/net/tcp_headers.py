# SPDX-License-Identifier: GPL-2.0-or-later
"""What TCP and IP headers say besides bytes, acks and windows, and what depends on it.

Urgent data (RFC 9293 3.8.5), ECN's counter (RFC 9768, RFC 3168), signatures (RFC 2385, RFC 5925),
and whether an IP id has to be a packet's own (RFC 6864).
"""

from __future__ import annotations

from .packet import ACK, SYN, Packet, tcp_options
from .seqnum import MASK

#: bytes of nearly every TCP header: without options, and with timestamps. None of them signs.
USUAL_HEADERS = (20, 32)
#: ids that the PVM has not given out begin so far from its own, and there are so many
FAR, SPARE = 0x8000, 0x4000
#: what a SYN-ACK has in AE, CWR and ECE if it agrees to AccECN (RFC 9768, table 2)
_AGREED = frozenset((0b010, 0b011, 0b100, 0b110))


def is_signed(p: Packet) -> bool:
    """Whether the segment carries TCP-MD5 (option 19) or TCP-AO (29). A signature covers at least
    sequence numbers, window, length and payload: changed, the segment is dropped."""
    return tcp_options(p).signed


def urgent_position(p: Packet) -> int:
    """Where a segment with URG says that urgent data ends, in the numbers of the stream."""
    return (p.seq + int.from_bytes(p.frame[p.l4 + 18 : p.l4 + 20], "big")) & MASK


def reserved(p: Packet) -> int:
    """The four bits behind the header's length: 1 is AE (RFC 9768; NS in RFC 3540)."""
    return p.frame[p.l4 + 12] & 0x0F


def ace(p: Packet) -> int:
    """AE, CWR and ECE as one number, which AccECN counts in (RFC 9768 3.1.1)."""
    return (p.frame[p.l4 + 12] & 1) << 2 | p.flags >> 6 & 3


def counts_in_ace(syn: Packet) -> bool | None:
    """Whether the connection of a guest's SYN or SYN-ACK uses AccECN. None: it is asked for."""
    if syn.flags & (SYN | ACK) == SYN:
        return None if ace(syn) == 0b111 else False
    return ace(syn) in _AGREED


def is_atomic(p: Packet) -> bool:
    """Whether the packet is never cut on its way, so that its IP id means nothing (RFC 6864 4):
    IPv6 without a fragment header, IPv4 with DF."""
    return p.frame[p.l3] >> 4 == 6 or bool(p.frame[p.l3 + 6] & 0x40)


def ip_id(p: Packet) -> int:
    """The identification field of an IPv4 packet."""
    return int.from_bytes(p.frame[p.l3 + 4 : p.l3 + 6], "big")
