# SPDX-License-Identifier: GPL-2.0-or-later
"""Cutting a frame: the two parts say what the whole said, with right headers and checksums."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.packet import FIN, parse
from colo_xdp.record import Record
from colo_xdp.segment import split
from tests.netns.frames import csum, tcp


def checksum_right(rec: Record) -> bool:
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
    rec = Record(frame, 42, 1448 if partial and len(body) > 1448 else 0, partial)
    whole = parse(frame)
    (a, pa), (b, pb) = split(rec, whole, n)
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
        split(Record(frame, 1), parse(frame), n)
