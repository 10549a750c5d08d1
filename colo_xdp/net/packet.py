# SPDX-License-Identifier: GPL-2.0-or-later
"""Parses an Ethernet frame into a Packet, once; everything after works on the Packet.

Never raises: a frame that cannot be parsed becomes OPAQUE with a named defect. The parser stops
where bpf/lib/parsing.h does (tests/bpf/test_parsers.py): a connection that the kernel does not
translate cannot be compared as TCP. Lengths come from the IP header, so Ethernet padding is not
payload (QEMU's net/colo-compare.c uses the frame's size). Checksums are not checked: with offloads
they are not complete yet. Sources: RFC 791, 8200, 9293, 7323, 2018, 6946, IEEE 802.1Q.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from . import flow_key

MAX_TAGS = 2  # as many as struct colo_flow_key holds
MAX_EXTENSIONS = 4  # COLO_IP6_EXT_DEPTH

FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = 1, 2, 4, 8, 16, 32, 64, 128

#: possible defects of a frame: Packet.defect, meaning
DEFECTS = {
    "runt": "shorter than an Ethernet header",
    "truncated_tag": "ends within an 802.1Q tag",
    "too_many_tags": f"more than {MAX_TAGS} 802.1Q tags",
    "truncated_ip": "ends within the IP header",
    "bad_ip_version": "IP version and ethertype disagree",
    "bad_ihl": "IPv4 header length below 20",
    "bad_ip_length": "IP length below its header's or beyond the frame, or a jumbogram",
    "truncated_extension": "ends within an IPv6 extension header",
    "too_many_extensions": f"more than {MAX_EXTENSIONS} IPv6 extension headers",
    "truncated_tcp": "ends within the TCP header",
    "bad_data_offset": "TCP header length below 20 or beyond the packet",
    "truncated_udp": "ends within the UDP header",
    "truncated_icmp": "ends within the ICMP header",
}


class Kind(IntEnum):
    """How a frame is compared."""

    TCP = 1
    UDP = 2
    ICMP = 3  # ICMP and ICMPv6 except neighbour discovery
    FRAGMENT = 4  # any IP fragment
    IP = 5  # another protocol over IP
    ETHER = 6  # another ethertype
    ARP = 7  # ARP and RARP
    NDP = 8  # ICMPv6 neighbour, router and multicast listener discovery, IGMP
    OPAQUE = 9  # malformed, see `defect`


@dataclass(slots=True)
class Packet:
    """One parsed frame.

    Offsets are in bytes from the frame's start. `off` and `end` enclose the payload: for TCP and
    UDP what follows their header, for other kinds over IP what follows the IP header, otherwise
    what follows the ethertype. `seq` and `ack` are host integers. `frame` is the caller's bytes,
    not a copy.
    """

    kind: Kind
    frame: bytes
    key: flow_key.FlowKey
    off: int
    end: int
    seq: int = 0
    ack: int = 0
    flags: int = 0
    window: int = 0  # the field, unscaled
    l3: int = 14
    l4: int = 34
    proto: int = 6  # IP protocol; 0 if not IP
    defect: str = ""
    datagram_size: int = 0  # as Frame.datagram_size; set for UDP of the SVM only


@dataclass(frozen=True, slots=True)
class TcpOptions:
    """Options of one TCP header; None or False if absent.

    RFC 9293 section 3.2, RFC 7323, RFC 2018.
    """

    mss: int | None = None
    wscale: int | None = None
    sack_ok: bool = False
    ts: tuple[int, int] | None = None  # TSval, TSecr
    signed: bool = False  # TCP-MD5 or TCP-AO (RFC 2385, RFC 5925)

    def negotiated(self) -> tuple[int | None, int | None, bool, bool, bool]:
        """Return what the connection depends on.

        That is MSS, window scale, SACK, and whether there are timestamps and a signature.
        """
        return (self.mss, self.wscale, self.sack_ok, self.ts is not None, self.signed)


# Ethertype, version/IHL, total length, fragment word, protocol, addresses and ports (the flow key),
# seq, ack, data offset, flags.
_V4_TCP = struct.Struct("!12xHBxHxxHxBxx12sIIBBH")
_V4 = struct.Struct("!BxHxxHxBxx8s")
_V6 = struct.Struct("!IHBx32s")
_TCP = struct.Struct("!4sIIBBH")
_OPT_TS = struct.Struct("!II")
_TPIDS = frozenset((0x8100, 0x88A8, 0x9100))
_HOP, _ROUTING, _FRAG, _DEST = 0, 43, 44, 60  # not AH: what it signs cannot be translated
_ERRORS4 = frozenset((3, 4, 5, 11, 12))
_QUERIES4 = frozenset((0, 8, 13, 14, 15, 16, 17, 18))
#: With multicast listener discovery (RFC 3810): the reports' delays are random.
_NDP = frozenset((*range(130, 138), 143))
_K_TCP = Kind.TCP


def parse(frame: bytes) -> Packet:
    """Parse a frame that a guest sent. Never raises."""
    size = len(frame)
    if size >= 54:
        et, vihl, total, frag, proto, key, seq, ack, doff, flags, win = _V4_TCP.unpack_from(frame)
        if vihl == 0x45 and proto == 6 and et == 0x0800 and not frag & 0x3FFF:
            off = 34 + (doff >> 2 & 0x3C)
            end = 14 + total
            if 54 <= off <= end <= size:
                return Packet(_K_TCP, frame, key, off, end, seq, ack, flags, win)
    return _parse_any(frame)


def _opaque(frame: bytes, defect: str) -> Packet:
    key = flow_key.datagram_key(flow_key.OPAQUE, 0, frame[12:14] + frame[:12], b"")
    return Packet(Kind.OPAQUE, frame, key, 0, len(frame), l3=0, l4=0, proto=0, defect=defect)


def _parse_any(frame: bytes) -> Packet:
    if len(frame) < 14:
        return _opaque(frame, "runt")
    l3 = 14
    et = int.from_bytes(frame[12:14], "big")
    while et in _TPIDS:
        if l3 >= 14 + 4 * MAX_TAGS:
            return _opaque(frame, "too_many_tags")
        if len(frame) < l3 + 4:
            return _opaque(frame, "truncated_tag")
        l3 += 4
        et = int.from_bytes(frame[l3 - 2 : l3], "big")
    tags = _vlans(frame[12 : l3 - 2]) if l3 > 14 else b""
    if et == 0x0800:
        return _parse_v4(frame, l3, tags)
    if et == 0x86DD:
        return _parse_v6(frame, l3, tags)
    ident = et.to_bytes(2, "big") + frame[:12]
    kind, cls = (Kind.ARP, flow_key.ARP) if et in (0x0806, 0x8035) else (Kind.ETHER, flow_key.ETHER)
    key = flow_key.datagram_key(cls, 0, ident, tags)
    return Packet(kind, frame, key, l3, len(frame), l3=l3, l4=l3, proto=0)


def _vlans(tags: bytes) -> bytes:
    """Return the part of the tags that belongs to the flow: TPID and VID, without priority tags.

    The priority is each frame's own, and VID 0 names no VLAN (IEEE 802.1Q sections 6.9.3, 9.6). A
    guest may send both within one connection: segments with a priority tagged, those without
    untagged.
    """
    out = b""
    for at in range(0, len(tags), 4):
        vid = int.from_bytes(tags[at + 2 : at + 4], "big") & 0xFFF
        if vid:
            out += tags[at : at + 2] + vid.to_bytes(2, "big")
    return out


def _parse_v4(frame: bytes, l3: int, tags: bytes) -> Packet:
    if len(frame) < l3 + 20:
        return _opaque(frame, "truncated_ip")
    vihl, total, frag, proto, addrs = _V4.unpack_from(frame, l3)
    if vihl >> 4 != 4:
        return _opaque(frame, "bad_ip_version")
    l4, end = l3 + (vihl & 15) * 4, l3 + total
    if l4 < l3 + 20:
        return _opaque(frame, "bad_ihl")
    if end < l4 or end > len(frame):
        return _opaque(frame, "bad_ip_length")
    if frag & 0x3FFF:
        return _fragment(frame, l3, l4, end, 4, addrs, proto, frag & 0x3FFF, tags)
    return _parse_l4(frame, l3, l4, end, 4, addrs, proto, tags)


def _parse_v6(frame: bytes, l3: int, tags: bytes) -> Packet:
    if len(frame) < l3 + 40:
        return _opaque(frame, "truncated_ip")
    word, length, nxt, addrs = _V6.unpack_from(frame, l3)
    if word >> 28 != 6:
        return _opaque(frame, "bad_ip_version")
    l4 = l3 + 40
    end = l4 + length
    if end > len(frame) or (not length and nxt == _HOP):  # the second case: an RFC 2675 jumbogram
        return _opaque(frame, "bad_ip_length")
    for _ in range(MAX_EXTENSIONS + 1):
        if nxt not in (_HOP, _ROUTING, _DEST):
            break
        if end < l4 + 8:
            return _opaque(frame, "truncated_extension")
        nxt, l4 = frame[l4], l4 + (frame[l4 + 1] + 1) * 8
        if l4 > end:
            return _opaque(frame, "truncated_extension")
    else:
        return _opaque(frame, "too_many_extensions")
    if nxt == _FRAG:
        if end < l4 + 8:
            return _opaque(frame, "truncated_extension")
        nxt, word = frame[l4], int.from_bytes(frame[l4 + 2 : l4 + 4], "big") & 0xFFF9
        l4 += 8
        if word:  # otherwise an atomic fragment, a whole packet (RFC 6946)
            return _fragment(frame, l3, l4, end, 6, addrs, nxt, word, tags)
    return _parse_l4(frame, l3, l4, end, 6, addrs, nxt, tags)


def _fragment(
    frame: bytes,
    l3: int,
    l4: int,
    end: int,
    version: int,
    addrs: bytes,
    proto: int,
    word: int,
    tags: bytes,
) -> Packet:
    # the IP ID is each guest's own; `seq` carries offset and more-fragments bit to the body
    key = flow_key.datagram_key(flow_key.FRAGMENT, version, addrs + bytes((proto,)), tags)
    return Packet(Kind.FRAGMENT, frame, key, l4, end, word, l3=l3, l4=l4, proto=proto)


def _parse_l4(
    frame: bytes, l3: int, l4: int, end: int, version: int, addrs: bytes, proto: int, tags: bytes
) -> Packet:
    if proto == 6:
        if end < l4 + 20:
            return _opaque(frame, "truncated_tcp")
        ports, seq, ack, doff, flags, win = _TCP.unpack_from(frame, l4)
        off = l4 + (doff >> 2 & 0x3C)
        if not l4 + 20 <= off <= end:
            return _opaque(frame, "bad_data_offset")
        key = addrs + ports + tags
        return Packet(Kind.TCP, frame, key, off, end, seq, ack, flags, win, l3, l4)
    if proto == 17:
        if end < l4 + 8:
            return _opaque(frame, "truncated_udp")
        # with UDP GSO, UDP's length differs from the IP length, which is the one to use
        key = flow_key.datagram_key(flow_key.UDP, version, addrs + frame[l4 : l4 + 4], tags)
        return Packet(Kind.UDP, frame, key, l4 + 8, end, l3=l3, l4=l4, proto=17)
    if proto == (1 if version == 4 else 58):
        if end < l4 + 8:
            return _opaque(frame, "truncated_icmp")
        typ = frame[l4]
        if version == 6 and typ in _NDP:
            key = flow_key.datagram_key(flow_key.NDP, version, addrs + frame[l4 : l4 + 1], tags)
            return Packet(Kind.NDP, frame, key, l4, end, l3=l3, l4=l4, proto=proto)
        ident = addrs + frame[l4 : l4 + 1]
        if typ in (128, 129) if version == 6 else typ in _QUERIES4:
            ident += frame[l4 + 4 : l4 + 6]
        key = flow_key.datagram_key(flow_key.ICMP, version, ident, tags)
        return Packet(Kind.ICMP, frame, key, l4, end, l3=l3, l4=l4, proto=proto)
    if proto == 2 and version == 4 and end >= l4 + 8:  # IGMP: IPv4's multicast listener discovery
        key = flow_key.datagram_key(flow_key.NDP, version, addrs + frame[l4 : l4 + 1], tags)
        return Packet(Kind.NDP, frame, key, l4, end, l3=l3, l4=l4, proto=proto)
    key = flow_key.datagram_key(flow_key.IP, version, addrs + bytes((proto,)), tags)
    return Packet(Kind.IP, frame, key, l4, end, l3=l3, l4=l4, proto=proto)


def tcp_options(p: Packet) -> TcpOptions:
    """Parse the options of a TCP packet; stops without error at the first malformed one."""
    f, i, end = p.frame, p.l4 + 20, p.off
    mss: int | None = None
    wscale: int | None = None
    sack_ok, ts, signed = False, None, False
    while i < end:
        kind = f[i]
        if kind == 0:
            break
        if kind == 1:
            i += 1
            continue
        length = f[i + 1] if i + 1 < end else 0
        if length < 2 or i + length > end:
            break
        if kind == 2 and length == 4:
            mss = int.from_bytes(f[i + 2 : i + 4], "big")
        elif kind == 3 and length == 3:
            wscale = f[i + 2]
        elif kind == 4 and length == 2:
            sack_ok = True
        elif kind == 8 and length == 10:
            ts = _OPT_TS.unpack_from(f, i + 2)
        elif kind in (19, 29):
            signed = True
        i += length
    return TcpOptions(mss, wscale, sack_ok, ts, signed)


def datagram_body(p: Packet) -> bytes:
    """Return what two equal datagrams of one flow (same key) have in common.

    - UDP: the payload.
    - ICMP queries: code, sequence and data, but of a timestamp reply (RFC 792) not the times at
      which a guest received and answered it. Clocks are not state, just as TCP's timestamps are
      not, and any host could provoke a difference with each packet.
    - ICMP errors: type, code, the word after the checksum, and of the quoted packet addresses,
      protocol and 8 bytes. The rest, like TTL and checksum, depends on the network.
    - Fragments: offset, the more-fragments bit and payload.
    - Others: everything that follows the header in the key.
    """
    f, off, end = p.frame, p.off, p.end
    kind = p.kind
    if kind is Kind.FRAGMENT:
        return p.seq.to_bytes(2, "big") + f[off:end]
    if p.proto != 2 and (kind is Kind.ICMP or kind is Kind.NDP):
        typ = f[off]
        head = f[off : off + 2] + f[off + 4 : off + 8]  # without the checksum
        if p.proto == 1 and typ == 14 and end == off + 20:
            return head + f[off + 8 : off + 12]
        q = off + 8
        if p.proto == 1 and typ in _ERRORS4 and end >= q + 20:
            l4 = q + (f[q] & 15) * 4
            return head + f[q + 9 : q + 10] + f[q + 12 : q + 20] + f[l4 : min(l4 + 8, end)]
        if p.proto == 58 and 1 <= typ <= 4 and end >= q + 40:
            return head + f[q + 6 : q + 7] + f[q + 8 : q + 40] + f[q + 40 : min(q + 48, end)]
        return head + f[q:end]
    return f[off:end]
