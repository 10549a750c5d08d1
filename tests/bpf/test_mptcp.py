# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare bpf/lib/mptcp.h with its rule in Python: options of a SYN, valid and invalid."""

from __future__ import annotations

import random
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode, Prog, Reason
from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.source import Options

from . import craft
from .conftest import TC_UNSPEC
from .craft import ACK, SYN

MPTCP, CAPABLE = 30, 0
NOP = b"\1"


def without(options: bytes) -> bytes:
    """Return the options with NOPs for each MP_CAPABLE that tcp_parse_options() would reach."""
    out, i = bytearray(options), 0
    while i < len(options) and options[i]:
        if options[i] == 1:
            i += 1
            continue
        size = options[i + 1] if i + 1 < len(options) else 0
        if size < 2 or i + size > len(options):
            break
        if options[i] == MPTCP and size > 2 and options[i + 2] >> 4 == CAPABLE:
            out[i : i + size] = NOP * size
        i += size
    return bytes(out)


def mptcp(rng: random.Random, subtype: int, size: int) -> bytes:
    return bytes((MPTCP, size, subtype << 4 | rng.getrandbits(4))) + rng.randbytes(size - 3)


def some_options(rng: random.Random) -> bytes:
    """Return up to 40 bytes, in whole words."""
    out = b""
    for _ in range(rng.randrange(1, 9)):
        out += rng.choice((
            NOP, NOP, NOP * 3, b"\2\4\5\xb4", b"\3\3\7", b"\4\2",
            craft.timestamps(1, 2, lead=b""),
            mptcp(rng, CAPABLE, rng.choice((3, 4, 4, 12, 12, 20))),
            mptcp(rng, CAPABLE, rng.choice((4, 4, 12))),
            mptcp(rng, rng.choice((1, 2, 15)), rng.choice((3, 12, 16))),
        ))  # fmt: skip
    if rng.random() < 0.1:  # what no kernel sends
        out += rng.choice((b"\0", b"\x1e", b"\x1e\0\0", b"\x1e\1\0", b"\x1e\2", b"\x1e\x28\0"))
    out = out[:40]
    return out + (NOP if rng.random() < 0.5 else b"\0") * (-len(out) % 4)


class Primary:
    def __init__(self, objects: loader.Objects) -> None:
        self.objects = objects
        for slot, value in ((Cfg.MODE, Mode.RUN), (Cfg.TAP, 1), (Cfg.PEER, 1)):
            objects.map("config").set(struct.pack("=I", slot), struct.pack("=Q", value))

    def count(self, reason: Reason) -> int:
        key = struct.pack("=I", Prog.PVM_IN * Reason.MAX + reason)
        raw = self.objects.map("counters").get(key) or b""
        return sum(int(n) for n, _ in abi.COUNT.iter_unpack(raw))

    def taken_out(self) -> int:
        return self.count(Reason.NOTE_MPTCP_REMOVED)

    def pvm_in(self, frame: bytes) -> bytes:
        ran = syscall.test_run(self.objects.programs["pvm_in"].fd, frame, data_out=4200)
        assert ran.retval == TC_UNSPEC
        return ran.data


@pytest.fixture(scope="module")
def primary(bpffs: Path) -> Iterator[Primary]:
    objects = loader.load("primary", "mptcp", str(bpffs), Options(ring_pages=64))
    try:
        yield Primary(objects)
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


def syn(options: bytes, v6: bool, flags: int = SYN, spoil: int = 0) -> bytes:
    ends = (craft.CLIENT6, craft.GUEST6) if v6 else (craft.CLIENT4, craft.GUEST4)
    segment = craft.tcp_segment(
        *ends, 40000, 80, 5, 6 * (flags != SYN), flags, b"", options, spoil=spoil
    )
    return craft.ip(*ends, 6, segment)


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_a_second_mp_capable_is_taken_out_too(primary: Primary, v6: bool) -> None:
    """Linux takes the last one that it meets: what remains of two is negotiated."""
    one, two = b"\x1e\x04\x01\x81", b"\x1e\x0c\x01\x81" + bytes(range(200, 208))
    before = primary.taken_out()
    for options in (
        one + one,
        one + two,
        two + b"\1" + one + b"\1\1\1",  # at an odd offset
        one + b"\2\4\5\xb4" + one + b"\3\3\7\4\2" + b"\1\1\1" + one,
        one * 10,
    ):
        assert primary.pvm_in(syn(options, v6)) == syn(without(options), v6)
    assert primary.taken_out() == before + 5, "one for each SYN"


@pytest.mark.parametrize("seed", range(2))
def test_any_options(primary: Primary, seed: int) -> None:
    rng = random.Random(seed)
    seen: Counter[str] = Counter()
    for i in range(4000):
        options = some_options(rng)
        v6, flags = rng.random() < 0.4, rng.choice((SYN, SYN | ACK))
        spoil = rng.getrandbits(16) if rng.random() < 0.1 else 0
        frame = syn(options, v6, flags, spoil)
        after = without(options)
        before = primary.taken_out()
        got = primary.pvm_in(frame)
        where = f"seed {seed} frame {i} {options.hex()}"
        l4, end = craft.l4_at(frame)
        assert got[l4 + 20 : end] == after, where
        field = slice(l4 + 16, l4 + 18)
        assert got[:l4] + got[l4:end][:16] == frame[:l4] + frame[l4:end][:16], where
        assert craft.l4_residue(got) == craft.l4_residue(frame), where
        assert len(got) == len(frame) and (after != options or got[field] == frame[field]), where
        assert primary.taken_out() == before + (after != options), where
        n = sum(a == MPTCP and b != MPTCP for a, b in zip(options, after, strict=True))
        seen["none" if after == options else "one" if n == 1 else "more"] += 1
    assert min(seen[k] for k in ("none", "one", "more")) > 300, seen
