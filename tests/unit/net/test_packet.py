# SPDX-License-Identifier: GPL-2.0-or-later
"""Frames to packets: every kind, every defect, keys and bodies."""

from __future__ import annotations

import struct

import pytest

from colo_xdp.net import packet
from colo_xdp.net.flow_key import describe_datagram, describe_tcp
from colo_xdp.net.packet import Kind, datagram_body, parse, tcp_options
from tests.unit import frames as f

TAG = b"\x81\0\0\x05"


def body(p: packet.Packet) -> bytes:
    return p.frame[p.off : p.end]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("tags", [b"", TAG, b"\x88\xa8\0\7" + TAG, b"\x91\0\0\7" + TAG])
@pytest.mark.parametrize("pad", [False, True])
def test_tcp(v6: bool, tags: bytes, pad: bool) -> None:
    p = parse(f.tcp(0xFFFFFFF0, 7, b"hi", f.ACK | f.PSH, v6=v6, tags=tags, pad=pad))
    assert (p.kind, p.seq, p.ack, p.flags) == (Kind.TCP, 0xFFFFFFF0, 7, f.ACK | f.PSH)
    assert body(p) == b"hi"  # never the padding
    text = describe_tcp(p.key)
    assert ("[::2]:80 > [::1]:4000" if v6 else "10.9.0.2:80 > 10.9.0.1:4000") in text
    assert text.count("vlan") == len(tags) // 4


PRIORITY = b"\x81\0\xa0\0"  # 5, DEI 0, and no VLAN


@pytest.mark.parametrize(
    ("tags", "same"),
    [
        ((b"", PRIORITY, b"\x81\0\0\0", b"\x88\xa8\x10\0", PRIORITY + PRIORITY), True),
        ((TAG, b"\x81\0\xf0\5", PRIORITY + TAG, TAG + PRIORITY), True),
        ((b"\x88\xa8\0\7" + TAG, b"\x88\xa8\xe0\7" + b"\x81\0\x20\5"), True),
        # 4095 is reserved (IEEE 802.1Q table 9-2), and yet not the network of an untagged frame
        ((b"", TAG, b"\x81\0\0\6", b"\x81\0\x0f\xff", b"\x88\xa8\0\7" + TAG), False),
    ],
    ids=["none", "one", "two", "others"],
)
def test_the_vid_belongs_to_the_flow_and_the_priority_does_not(
    tags: tuple[bytes, ...], same: bool
) -> None:
    for make in (
        lambda t: f.tcp(1, tags=t),
        lambda t: f.tcp(1, v6=True, tags=t),
        lambda t: f.ip4(17, b"\0\x35\x0f\xa0\0\x08\0\0", tags=t),
        lambda t: f.ip4(1, bytes(8), tags=t),
        lambda t: f.ip4(47, b"gre", tags=t),
        lambda t: f.ip4(17, b"piece", frag=0x2000, tags=t),
        lambda t: f.ether(0x0806, bytes(28), t),
        lambda t: f.ether(0x88CC, b"lldp", t),
    ):
        keys = [parse(make(t)).key for t in tags]
        assert len(set(keys)) == (1 if same else len(tags))


def test_fast_and_general_parser_agree() -> None:
    for data in (b"", b"x", bytes(1448)):
        raw = f.tcp(1, 2, data)
        assert parse(raw) == packet._parse_any(raw)


def test_padded_pure_ack_has_no_payload() -> None:
    assert body(parse(f.tcp(1, 2, opts=b"", pad=True))) == b""


def test_gso_frame_of_64k() -> None:
    p = parse(f.tcp(1, 2, bytes(65483)))
    assert p.end - p.off == 65483


def test_ip_options() -> None:
    p = parse(f.ip4(6, f.segment(9, 1, b"abc"), options=b"\1\1\1\0"))
    assert (p.kind, p.seq, body(p)) == (Kind.TCP, 9, b"abc")
    assert p.key == parse(f.tcp(9)).key


def test_tcp_options() -> None:
    o = tcp_options(parse(f.tcp(1, 2, flags=f.SYN, opts=f.SYN_OPTS)))
    assert o.negotiated() == (1460, 7, True, True, False)
    nothing = (None, None, False, False, False)
    assert tcp_options(parse(f.tcp(1, opts=b"\2\0\0\0"))).negotiated() == nothing
    md5, ao = b"\1\1\x13\x12" + bytes(16), b"\x1d\x10\1\1" + bytes(12)
    assert all(tcp_options(parse(f.tcp(1, opts=opts))).signed for opts in (md5, ao))
    assert tcp_options(parse(f.tcp(1, opts=b"\1\1\1\2"))).mss is None  # cut
    assert tcp_options(parse(f.tcp(1, opts=b"\0\3\3\7"))).wscale is None  # behind the end
    assert tcp_options(parse(f.tcp(1, v6=True, opts=b"\x08\x0a\0\0\0\1\0\0\0\2\1\1"))).ts == (1, 2)


def test_ipv6_extensions() -> None:
    seg = f.segment(3, 4, b"xyz")
    chain = b"\x2b\0" + bytes(6) + b"\x3c\0" + bytes(6) + b"\x2c\0" + bytes(6)
    atomic = b"\6\0\0\0" + bytes(4)
    p = parse(f.ip6(0, chain + atomic + seg))
    assert (p.kind, p.seq, body(p)) == (Kind.TCP, 3, b"xyz")
    ah = parse(f.ip6(51, b"\6\1" + bytes(10) + seg))  # signed: nothing within it can be changed
    assert (ah.kind, ah.proto) == (Kind.IP, 51)


def test_fragments() -> None:
    a = parse(f.ip4(17, b"0123", frag=0x2000, ident=5))
    b = parse(f.ip4(17, b"0123", frag=0x2000, ident=6))
    c = parse(f.ip4(17, b"0123", frag=0x0001))
    assert a.kind is c.kind is Kind.FRAGMENT
    assert a.key == b.key == c.key
    assert datagram_body(a) == datagram_body(b) != datagram_body(c)
    six = parse(f.ip6(44, b"\x11\0\0\1\0\0\0\0" + b"0123"))
    assert (six.kind, six.proto, datagram_body(six)[2:]) == (Kind.FRAGMENT, 17, b"0123")


@pytest.mark.parametrize(
    ("frame", "kind", "text"),
    [
        (f.udp(b"x"), Kind.UDP, "udp 10.9.0.2:53 > 10.9.0.1:4000"),
        (f.echo_reply(b"x"), Kind.ICMP, "icmp 10.9.0.2 > 10.9.0.1 type 0 id 7"),
        (f.ip4(47, b"gre"), Kind.IP, "ip 10.9.0.2 > 10.9.0.1 proto 47"),
        (f.ip6(58, b"\x80" + bytes(7)), Kind.ICMP, "icmp ::2 > ::1 type 128 id 0"),
        (f.ip6(58, b"\x88" + bytes(23)), Kind.NDP, "ndp ::2 > ::1 type 136"),
        (f.ether(0x0806, bytes(28)), Kind.ARP, "arp"),
        (f.ether(0x8035, bytes(28)), Kind.ARP, "arp"),
        (f.ether(0x88CC, b"lldp"), Kind.ETHER, "type 0x88cc"),
        (f.ether(0x0806, bytes(28), TAG), Kind.ARP, "vlan 5"),
    ],
)
def test_kinds(frame: bytes, kind: Kind, text: str) -> None:
    p = parse(frame)
    assert (p.kind, p.defect) == (kind, "")
    assert text in describe_datagram(p.key)


GOOD = f.tcp(1, 2, b"abc", opts=b"")
GOOD6 = f.tcp(1, 2, b"abc", v6=True)


def poke(raw: bytes, at: int, value: bytes) -> bytes:
    return raw[:at] + value + raw[at + len(value) :]


DEFECTS = [
    (b"", "runt"),
    (GOOD[:13], "runt"),
    (f.MACS + b"\x81\0\0", "truncated_tag"),
    (f.tcp(1, tags=TAG * 3), "too_many_tags"),
    (GOOD[:33], "truncated_ip"),
    (GOOD6[:50], "truncated_ip"),
    (poke(GOOD, 14, b"\x65"), "bad_ip_version"),
    (poke(GOOD6, 14, b"\x45"), "bad_ip_version"),
    (poke(GOOD, 14, b"\x43"), "bad_ihl"),
    (poke(GOOD, 16, b"\0\x13"), "bad_ip_length"),
    (poke(GOOD, 16, b"\xff\xff"), "bad_ip_length"),
    (poke(GOOD6, 18, b"\xff\xff"), "bad_ip_length"),
    (f.ip6(0, b""), "bad_ip_length"),
    (f.ip6(43, b"\6\0\0"), "truncated_extension"),
    (f.ip6(43, b"\6\x09" + bytes(6)), "truncated_extension"),
    (f.ip6(0, (b"\0\0" + bytes(6)) * 5), "too_many_extensions"),
    (f.ip4(6, bytes(19)), "truncated_tcp"),
    (poke(GOOD, 46, b"\x40"), "bad_data_offset"),
    (poke(GOOD, 46, b"\xf0"), "bad_data_offset"),
    (f.ip4(17, bytes(7)), "truncated_udp"),
    (f.ip4(1, bytes(7)), "truncated_icmp"),
]


@pytest.mark.parametrize(("frame", "defect"), DEFECTS)
def test_defects(frame: bytes, defect: str) -> None:
    p = parse(frame)
    assert (p.kind, p.defect, body(p)) == (Kind.OPAQUE, defect, frame)
    assert describe_datagram(p.key).startswith("opaque")


def test_each_defect_is_tested_and_described() -> None:
    assert {d for _, d in DEFECTS} == set(packet.DEFECTS)


def test_icmp_bodies() -> None:
    def error(ttl: int, ports: bytes = b"\0\1\0\2", rest: bytes = b"abcdEFGH") -> bytes:
        quoted = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 40, ttl, 0, ttl, 17, ttl, f.CLIENT, f.GUEST)
        return datagram_body(parse(f.ip4(1, b"\3\3\xbe\xef" + bytes(4) + quoted + ports + rest)))

    assert error(1) == error(2) != error(1, b"\0\1\0\3")
    assert error(1) == error(1, rest=b"abcdXXXX")  # 8 bytes of L4, no more
    a, b = (datagram_body(parse(f.echo_reply(b"ping", seq=n))) for n in (1, 2))
    assert a != b
    quoted6 = struct.pack("!IHBB16s16s", 6 << 28, 8, 17, 9, f.CLIENT6, f.GUEST6) + bytes(8)
    six = [b"\1\4\0" + x + bytes(4) + quoted6 for x in (b"\1", b"\2")]
    assert len({datagram_body(parse(f.ip6(58, x))) for x in six}) == 1  # checksum
    assert datagram_body(parse(f.ip4(1, b"\3\3\0\0" + bytes(8))))  # a quote too short


def test_keys_do_not_collide() -> None:
    some = [f.udp(b""), f.udp(b"", sport=54), f.echo_reply(b""), f.echo_reply(b"", ident=8)]
    some += [f.ip4(47, b""), f.ip4(1, bytes(8)), f.ether(0x88CC, b""), b""]
    some.append(f.ip4(47, b"", tags=TAG))
    assert len({parse(x).key for x in some}) == len(some)
