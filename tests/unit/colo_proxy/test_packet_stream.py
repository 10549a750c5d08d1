# SPDX-License-Identifier: GPL-2.0-or-later
"""The packet stream: what is written is read, in whatever pieces, and bad input has a name."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from colo_xdp.colo_proxy.packet_stream import (
    MAX_PACKET,
    EmptyPacketError,
    OversizedPacketError,
    PacketDecoder,
    PacketStreamError,
    StreamPacket,
    TruncatedPacketError,
    VnetHeaderError,
    encode,
)

SEEDS = range(40)


def pieces(rnd: random.Random, data: bytes) -> Iterator[bytes]:
    """Cut at random places, often within a field."""
    while data:
        n = rnd.choice((1, 2, 3, 5, 9, 100, 5000, 70_000))
        yield data[:n]
        data = data[n:]


def read(decoder: PacketDecoder, parts: Iterator[bytes]) -> tuple[list[StreamPacket], str]:
    """Return what came, and the name of the error that ended it."""
    out: list[StreamPacket] = []
    try:
        for part in parts:
            decoder.receive(part)
            while (packet := decoder.next_packet()) is not None:
                out.append(packet)
        decoder.end()
    except PacketStreamError as e:
        return out, type(e).__name__
    return out, ""


def some_packets(rnd: random.Random, vnet_hdr: bool) -> list[StreamPacket]:
    return [
        StreamPacket(
            rnd.randbytes(rnd.choice((60, 1514, 9014, MAX_PACKET))),
            rnd.choice((0, 10, 12, 20)) if vnet_hdr else 0,
        )
        for _ in range(rnd.randrange(1, 12))
    ]


def test_the_bytes_are_those_that_qemu_writes() -> None:
    assert encode(StreamPacket(b"abc"), vnet_hdr=False) == b"\0\0\0\3abc"
    with_header = StreamPacket(b"\0" * 10 + b"abc", 10)
    assert encode(with_header, vnet_hdr=True) == b"\0\0\0\x0d\0\0\0\x0a" + b"\0" * 10 + b"abc"
    assert with_header.frame == b"abc"


@pytest.mark.parametrize("vnet_hdr", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_written_is_read_in_any_pieces(seed: int, vnet_hdr: bool) -> None:
    rnd = random.Random(seed)
    packets = some_packets(rnd, vnet_hdr)
    data = b"".join(encode(p, vnet_hdr=vnet_hdr) for p in packets)
    assert read(PacketDecoder(vnet_hdr=vnet_hdr), pieces(rnd, data)) == (packets, "")


@pytest.mark.parametrize("seed", SEEDS)
def test_a_damaged_stream_ends_the_same_in_any_pieces(seed: int) -> None:
    rnd = random.Random(seed)
    vnet_hdr = rnd.random() < 0.5
    data = bytearray(b"".join(encode(p, vnet_hdr=vnet_hdr) for p in some_packets(rnd, vnet_hdr)))
    for _ in range(rnd.randrange(3)):
        data[rnd.randrange(len(data))] ^= 1 << rnd.randrange(8)
    whole = bytes(data[: rnd.randrange(len(data) + 1)])
    once = read(PacketDecoder(vnet_hdr=vnet_hdr), iter([whole]))
    assert read(PacketDecoder(vnet_hdr=vnet_hdr), pieces(rnd, whole)) == once


def test_it_keeps_less_than_one_packet() -> None:
    rnd = random.Random(0)
    data = b"".join(encode(StreamPacket(bytes(MAX_PACKET)), vnet_hdr=True) for _ in range(20))
    decoder = PacketDecoder(vnet_hdr=True)
    for part in pieces(rnd, data):
        decoder.receive(part)
        while decoder.next_packet() is not None:
            pass
        assert decoder.pending < MAX_PACKET + 8


@pytest.mark.parametrize(
    ("vnet_hdr", "data", "error"),
    [
        (False, b"\0\0\0\0", EmptyPacketError),
        (False, (MAX_PACKET + 1).to_bytes(4, "big"), OversizedPacketError),
        (False, b"\xff\xff\xff\xff", OversizedPacketError),
        (False, b"GET / HTTP/1.1\r\n", OversizedPacketError),
        (True, b"\0\0\0\x3c\0\0\0\x3d", VnetHeaderError),
        # without vnet_hdr_support: the frame's first bytes stand where the field would be
        (True, encode(StreamPacket(b"\x52\x54\0\x12" * 20), vnet_hdr=False), VnetHeaderError),
    ],
)
def test_a_wrong_field_is_an_error_at_once_and_for_good(
    vnet_hdr: bool, data: bytes, error: type[PacketStreamError]
) -> None:
    decoder = PacketDecoder(vnet_hdr=vnet_hdr)
    decoder.receive(encode(StreamPacket(b"before"), vnet_hdr=vnet_hdr) + data)
    assert decoder.next_packet() == StreamPacket(b"before")
    for _ in range(2):
        with pytest.raises(error):
            decoder.next_packet()
    decoder.receive(bytes(1000))
    assert decoder.pending == 0
    decoder.end()


@pytest.mark.parametrize("cut", [1, 3, 4, 5, 9])
def test_an_end_within_a_packet_has_a_name(cut: int) -> None:
    decoder = PacketDecoder(vnet_hdr=False)
    decoder.receive(encode(StreamPacket(b"abcdef"), vnet_hdr=False)[:cut])
    assert decoder.next_packet() is None
    with pytest.raises(TruncatedPacketError, match=f"ended {cut} bytes after"):
        decoder.end()


@pytest.mark.parametrize(
    ("packet", "vnet_hdr", "error"),
    [
        (StreamPacket(b""), False, EmptyPacketError),
        (StreamPacket(bytes(MAX_PACKET + 1)), False, OversizedPacketError),
        (StreamPacket(bytes(60), 10), False, VnetHeaderError),
        (StreamPacket(bytes(9), 10), True, VnetHeaderError),
        (StreamPacket(bytes(60), -1), True, VnetHeaderError),
    ],
)
def test_what_no_filter_could_read_is_not_written(
    packet: StreamPacket, vnet_hdr: bool, error: type[PacketStreamError]
) -> None:
    with pytest.raises(error):
        encode(packet, vnet_hdr=vnet_hdr)
