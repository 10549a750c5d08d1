# SPDX-License-Identifier: GPL-2.0-or-later
"""Cutting a frame: the two parts say what the whole said, with right headers and checksums."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import FIN, Packet, parse
from colo_xdp.net.segment import bare_ack, split, with_window
from colo_xdp.net.tcp_headers import ip_id
from tests.netns.frames import csum, tcp


def checksum_right(rec: Frame) -> bool:
    p = parse(rec.frame)
    l3, segment = p.l3, rec.frame[p.l4 : p.end]
    v6 = rec.frame[l3] >> 4 == 6
    addresses = rec.frame[l3 + 8 : l3 + 40] if v6 else rec.frame[l3 + 12 : l3 + 20]
    pseudo = csum(addresses + struct.pack("!HH", 6, len(segment)))
    if not v6 and csum(rec.frame[l3 : l3 + 20]) != 0xFFFF:
        return False
    if rec.partial:
        return struct.unpack_from("!H", segment, 16)[0] == pseudo
    return csum(segment, pseudo) == 0xFFFF


def spare(p: Packet, n: int) -> int:
    return 0xF000


def wire_ids(rec: Frame) -> list[int]:
    """IPv4 ids of the packets that a device makes of a frame: counted on from its own."""
    p = parse(rec.frame)
    n = -(-(p.end - p.off) // rec.gso_size) if rec.gso_size else 1
    return [(ip_id(p) + i) & 0xFFFF for i in range(n)]


@given(
    st.binary(min_size=2, max_size=4000),
    st.data(),
    st.booleans(),
    st.booleans(),
    st.sampled_from((0, 7)),
    st.sampled_from((5, 0xFFFFFF00)),
    st.sampled_from((0x18, 0x11, 0x98)),
)
def test_parts_make_the_whole(
    body: bytes, data: st.DataObject, partial: bool, v6: bool, vlan: int, seq: int, flags: int
) -> None:
    n = data.draw(st.integers(1, len(body) - 1))
    frame = tcp(body, seq=seq, flags=flags, partial=partial, v6=v6, vlan=vlan)
    rec = Frame(frame, 42, 1448 if partial and len(body) > 1448 else 0, partial)
    whole = parse(frame)
    (a, pa), (b, pb) = split(rec, whole, n, spare)
    assert (pa.defect, pb.defect) == ("", "")
    assert pa.key == pb.key == whole.key
    assert pa.seq == whole.seq and pb.seq == (whole.seq + n) % 2**32
    assert a.frame[pa.off : pa.end] + b.frame[pb.off : pb.end] == body
    assert (pa.ack, pb.ack) == (whole.ack, whole.ack)
    assert not pa.flags & (FIN | 0x08) and pb.flags & (FIN | 0x08) == whole.flags & (FIN | 0x08)
    assert pa.flags & 0x80 == whole.flags & 0x80 and not pb.flags & 0x80
    for rec2, p in ((a, pa), (b, pb)):
        assert checksum_right(rec2)
        assert rec2.gso_size == (rec.gso_size if p.end - p.off > rec.gso_size else 0)
        assert (rec2.ts_ns, rec2.partial) == (42, partial)


@pytest.mark.parametrize("n", [0, 3, -1, 4])
def test_no_empty_part(n: int) -> None:
    frame = tcp(b"abc")
    with pytest.raises(ValueError, match="cannot cut"):
        split(Frame(frame, 1), parse(frame), n, spare)


@given(st.integers(2, 9000), st.data(), st.booleans(), st.sampled_from((0, 536, 1448)))
def test_ids_of_packets_that_may_be_cut_are_their_own(
    size: int, data: st.DataObject, df: bool, gso: int
) -> None:
    """RFC 6864 4.2. What the PVM has left free for a frame's segments is used, and nothing of what
    it will give out next."""
    n = data.draw(st.integers(1, size - 1))
    rec = Frame(tcp(bytes(size), ident=100, df=df), 1, gso if gso < size else 0)
    whole = parse(rec.frame)
    (a, _), (b, _) = split(rec, whole, n, spare)
    own, ids = wire_ids(rec), wire_ids(a) + wire_ids(b)
    if not df:
        assert len(set(ids)) == len(ids)
        assert all(i in own or i >= 0xF000 for i in ids)
    if rec.gso_size and n % rec.gso_size == 0:
        assert ids == own  # as the device would have numbered them
    assert checksum_right(a) and checksum_right(b)


def test_ids_of_what_was_fragments() -> None:
    """One id for all fragments: the segments that they become need one each."""
    parts = (Frame(b"", 1), Frame(b"", 1))
    rec = Frame(tcp(bytes(3000), df=False), 1, 1000, parts=parts)
    assert wire_ids(with_window(rec, parse(rec.frame), 7, spare)) == [0xF000, 0xF001, 0xF002]
    (a, _), (b, _) = split(rec, parse(rec.frame), 1000, spare)
    assert wire_ids(a) + wire_ids(b) == [0xF000, 0xF001, 0xF002]


@pytest.mark.parametrize("v6", [False, True])
@pytest.mark.parametrize("df", [False, True])
def test_a_bare_ack_is_one_that_the_pvm_could_have_sent(v6: bool, df: bool) -> None:
    """Its own id, congestion signals that still hold, no ECN-capable transport, nothing urgent."""
    flags = 0x10 | 0x20 | 0x40 | 0x80 | 0x08
    frame = tcp(b"abc", flags=flags, urgent=3, tos=0xBA, ident=77, df=df, v6=v6, reserved=0)
    bare = bare_ack(Frame(frame, 1, partial=False), parse(frame), 5, 600, spare, False)
    p = parse(bare.frame)
    assert (p.seq, p.window, p.off, p.flags) == (5, 600, p.end, 0x10 | 0x40)
    assert checksum_right(bare)
    assert p.frame[p.l4 + 18 : p.l4 + 20] == b"\0\0"
    tos = int.from_bytes(p.frame[14:16], "big") >> 4 & 0xFF if v6 else p.frame[15]
    assert tos == 0xB8
    if not v6:
        assert ip_id(p) == (77 if df else 0xF000)


def test_accecn_counts_in_each_segment() -> None:
    """RFC 9768 3.2.2: AE, CWR and ECE are a number, which a cut must not change."""
    frame = tcp(b"ab" * 1448, flags=0x98, reserved=1)
    (a, pa), (b, pb) = split(Frame(frame, 1, 1448), parse(frame), 1448, spare)
    for rec, p in ((a, pa), (b, pb)):
        assert (rec.frame[p.l4 + 12] & 0x0F, p.flags & 0xC0) == (1, 0x80)
    frame = tcp(b"ab" * 1448, flags=0x98)  # the number 2 on such a connection; or ECN's CWR
    (_, pa), (_, pb) = split(Frame(frame, 1, 1448), parse(frame), 1448, spare, True)
    assert (pa.flags & 0xC0, pb.flags & 0xC0) == (0x80, 0x80)
    (_, pa), (_, pb) = split(Frame(frame, 1, 1448), parse(frame), 1448, spare, False)
    assert (pa.flags & 0xC0, pb.flags & 0xC0) == (0x80, 0)
    bare = bare_ack(Frame(frame, 1), parse(frame), 5, 600, spare, True)
    assert parse(bare.frame).flags == 0x90
