# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare bpf/offload/ahead.h, which lowers clients' windows, with its rule in Python."""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import OWNER_KERNEL, OWNER_USER, Reason
from colo_xdp.datapath import loader
from colo_xdp.datapath.source import Options

from . import craft, test_mptcp
from .craft import ACK, FIN, PSH, RST, SYN
from .test_mptcp import some_options, without

M32 = 0xFFFFFFFF
AHEAD = abi.BUFFER - 65536
UNKNOWN, NONE = 254, 255
#: of colo_conn, in bytes
RELEASED, SHIFT = struct.calcsize("=QQQQII"), struct.calcsize("=QQQQIIIIIIIIIIHHHHBBBBBB")
CLIENT_ACK, OWNER = struct.calcsize("=QQQ"), struct.calcsize("=QQQQ")


def scale(options: bytes) -> int:
    """Return the shift count that tcp_parse_options() would take from a SYN."""
    found, i = 0, 0
    while i + 3 <= len(options) and options[i]:
        if options[i] == 1:
            i += 1
            continue
        size = options[i + 1]
        if size < 2 or i + size > len(options):
            break
        if options[i] == 3 and size == 3:
            found = min(14, options[i + 2])
        i += size
    return found


def lowered(window: int, ack: int, released: int, shift: int) -> int:
    """Return the window field that the guests may see."""
    room = ((released & -65536) + AHEAD - ack) & M32
    if (ack - released) & M32 and not (ack - released) & 1 << 31:
        room = AHEAD  # acks what has not left
    return min(window, room >> shift)


class Primary(test_mptcp.Primary):
    def __init__(self, objects: loader.Objects) -> None:
        super().__init__(objects)
        self.conns, self.scales = objects.map("conns"), objects.map("scales")

    def lowered(self) -> int:
        return self.count(Reason.NOTE_WINDOW_LIMITED)

    def owns(self, key: bytes, owner: int, released: int, shift: int) -> None:
        raw = bytearray(abi.CONN.size)
        struct.pack_into("=I", raw, OWNER, owner)
        struct.pack_into("=I", raw, RELEASED, released)
        raw[SHIFT] = shift
        self.conns.set(key, bytes(raw))

    def conn(self, key: bytes) -> bytes:
        raw = self.conns.get(key)
        assert raw is not None
        return raw


@pytest.fixture(scope="module")
def primary(bpffs: Path) -> Iterator[Primary]:
    objects = loader.load("primary", "ahead", str(bpffs), Options(ring_pages=64, fast=True))
    try:
        yield Primary(objects)
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


class Client:
    def __init__(self, v6: bool, port: int) -> None:
        self.ends = (craft.CLIENT6, craft.GUEST6) if v6 else (craft.CLIENT4, craft.GUEST4)
        self.port = port
        family = socket.AF_INET6 if v6 else socket.AF_INET
        client, guest = (
            (b"" if v6 else bytes(10) + b"\xff\xff") + socket.inet_pton(family, a)
            for a in self.ends
        )
        ports = struct.pack("!H", 80), struct.pack("!H", port)
        self.key = abi.FLOW_KEY.pack(guest, client, *ports, 0)

    def segment(
        self, ack: int, window: int, flags: int = ACK, data: bytes = b"", options: bytes = b"",
        spoil: int = 0,
    ) -> bytes:  # fmt: skip
        raw = craft.tcp_segment(
            *self.ends, self.port, 80, 5, ack, flags, data, options, spoil=spoil, window=window
        )
        return craft.ip(*self.ends, 6, raw)


@pytest.mark.parametrize("seed", range(2))
def test_any_segment(primary: Primary, seed: int) -> None:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for i in range(4000):
        c = Client(rng.random() < 0.4, rng.choice((40000, 40001, rng.randrange(1024, 65536))))
        where = f"seed {seed} segment {i} {c.key.hex()}"
        primary.scales.delete(c.key)
        shift, known = NONE, rng.random() < 0.8
        options = some_options(rng)
        if rng.random() < 0.7:  # two of them: the last one counts
            options = (bytes((3, 3, rng.randrange(17), 1)) + options)[:40]
        if known:
            syn = c.segment(1, 65535, rng.choice((SYN, SYN | ACK)), b"", options)
            got, (l4, end) = primary.pvm_in(syn), craft.l4_at(syn)
            assert got[l4 + 20 : end] == without(options), where
            shift = scale(options)
        owner = OWNER_KERNEL if rng.random() < 0.9 else OWNER_USER
        released = rng.choice((rng.getrandbits(32), rng.randrange(100), M32 - rng.randrange(100)))
        before = UNKNOWN if rng.random() < 0.8 else NONE
        primary.owns(c.key, owner, released, before)
        ack = (released - rng.choice((0, 1, 1448, 70_000, AHEAD, 5_000_000, -1, -70_000))) & M32
        window = rng.choice((0, 1, 20, 3000, 7000, 0x7FFF, 0xFFFF, rng.getrandbits(16)))
        flags = rng.choice((ACK, ACK, ACK | PSH, ACK | FIN, ACK | RST, 0))
        spoil = rng.getrandbits(16) if rng.random() < 0.1 else 0
        frame = c.segment(ack, window, flags, rng.choice((b"", b"x", b"question")), b"", spoil)
        count = primary.lowered()
        got, (l4, end) = primary.pvm_in(frame), craft.l4_at(frame)
        plain = flags & (ACK | RST) == ACK
        limits = plain and owner == OWNER_KERNEL and before == UNKNOWN and known
        expected = lowered(window, ack, released, shift) if limits else window
        assert struct.unpack_from("!H", got, l4 + 14)[0] == expected, where
        assert got[: l4 + 14] + got[l4 + 18 :] == frame[: l4 + 14] + frame[l4 + 18 :], where
        assert craft.l4_residue(got) == craft.l4_residue(frame), where
        assert expected != window or got == frame, where
        assert primary.lowered() == count + (expected != window), where
        raw = primary.conn(c.key)
        acked = struct.unpack_from("=Q", raw, CLIENT_ACK)[0]
        assert acked == (abi.CLIENT_ACK_KNOWN | ack if plain else 0), where
        looked = before == UNKNOWN and plain and owner == OWNER_KERNEL
        if (looked and not (ack - released) & M32) or raw[SHIFT] != before:
            assert looked and raw[SHIFT] == shift, where
        seen["lowered"] += expected != window
        seen["unchanged"] += limits and expected == window
        seen["unknown"] += looked and not known
        seen["spoilt"] += bool(spoil) and expected != window
        seen[f"by {shift}"] += expected != window
    assert min(seen[k] for k in ("lowered", "unchanged", "unknown", "spoilt")) > 10, seen
    assert seen["by 4"] and seen["by 7"] and seen["by 14"], seen
    assert seen["by 0"] == 0, "an unscaled window is less than the limit"


def test_syns_that_differ_limit_nothing(primary: Primary) -> None:
    """A forged SYN of a connection that lives must not make its windows tiny."""
    for port, shifts in enumerate(((7, 7), (7, 14), (7, 14, 14), (7, 0, 7)), 42000):
        c = Client(False, port)
        for shift in shifts:
            primary.pvm_in(c.segment(0, 65535, SYN, b"", bytes((3, 3, shift, 1))))
        primary.owns(c.key, OWNER_KERNEL, 1000, UNKNOWN)
        got = primary.pvm_in(c.segment(1000, 60_000))
        window = struct.unpack_from("!H", got, craft.l4_at(got)[0] + 14)[0]
        assert window == (AHEAD - 1000 >> 7 if port == 42000 else 60_000), shifts


def test_right_edges_only_move_forward(primary: Primary) -> None:
    """A guest that believed an edge may have sent up to it; rounding may take back one unit."""
    rng = random.Random(7)
    c = Client(False, 41000)
    primary.pvm_in(c.segment(0, 65535, SYN, b"", b"\3\3\7" + b"\1"))
    released = ack = 0xFFF00000
    edge = 0
    primary.owns(c.key, OWNER_KERNEL, released, UNKNOWN)
    for _ in range(2000):
        released += rng.choice((0, 1448, 14480, 65160))
        ack += rng.randrange(min(released - ack, 30_000) + 1)
        raw = bytearray(primary.conn(c.key))
        struct.pack_into("=I", raw, RELEASED, released & M32)
        primary.conns.set(c.key, bytes(raw))
        got = primary.pvm_in(c.segment(ack & M32, 40_000))
        window = struct.unpack_from("!H", got, craft.l4_at(got)[0] + 14)[0]
        assert window > 0 and ack + (window << 7) > edge - 128
        assert ack + (window << 7) <= released + AHEAD
        edge = max(edge, ack + (window << 7))
    assert released > 0x100000000, "it has wrapped around"
