# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that the three parsers see the same in a frame.

They are bpf/lib/parsing.h, colo_xdp/net/packet.py and colo_xdp/conntrack/headers.py. The first
decides which connections are translated and where a checksum is, the second what is compared as
what. The frames are random, of every kind that any of them parses: whole, truncated and damaged.
"""

from __future__ import annotations

import errno
import random
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from colo_xdp import abi
from colo_xdp.conntrack import headers
from colo_xdp.datapath import compiler, source, syscall
from colo_xdp.datapath.maps import Map
from colo_xdp.net.flow_key import unmirrored_key
from colo_xdp.net.packet import DEFECTS, Kind, Packet, parse

from . import craft
from .test_differential import spoil

#: struct pkt, and what parse_skb() returned
PKT = struct.Struct("=16s16sIIIIIII2s2s2sBBBBBBB3xi")
HEAD = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/pkt_cls.h>
"""
TAIL = """
struct seen {
	struct pkt p;
	int err;
};
BPF_ARRAY(seen, struct seen, 1);

int look(struct __sk_buff *skb)
{
	struct seen *s;
	struct pkt p = {};
	u32 zero = 0;
	int err = parse_skb(skb, &p);

	s = seen.lookup(&zero);
	if (s) {
		s->p = p;
		s->err = err;
	}
	return 0;
}
"""
Look = Callable[[bytes], tuple[Any, ...] | None]


@pytest.fixture(scope="module")
def look() -> Iterator[Look]:
    bpf_dir, seen = source.source_dir(), set[str]()
    parts = [source.flatten(bpf_dir / n, seen) for n in ("lib/abi.h", "lib/limits.h")]
    text = HEAD + "\n".join([*parts, source.flatten(bpf_dir / "lib/parsing.h", seen)]) + TAIL
    module = compiler.compile_text(text)
    fd = module.load_func(b"look", compiler.import_bcc().BPF.SCHED_CLS).fd
    table = Map(module[b"seen"].map_fd)
    assert table.info.value_size == PKT.size

    def run(frame: bytes) -> tuple[Any, ...] | None:
        try:
            syscall.test_run(fd, frame, data_out=0)
        except OSError as e:
            assert e.errno == errno.EINVAL  # such a short frame is refused in a test run
            return None
        return PKT.unpack(table.get(bytes(4)) or b"")

    yield run
    module.cleanup()


def upper(rng: random.Random, proto: int, ends: tuple[str, str]) -> bytes:
    """Return what follows the IP header."""
    if rng.random() < 0.06:
        return rng.randbytes(rng.randrange(20))  # too short for some
    data = rng.randbytes(rng.choice((0, 0, 1, 7, 8, 20, 100)))
    if proto == 6:
        options = rng.choice((b"", craft.timestamps(1, 2), rng.randbytes(rng.randrange(41))))
        segment = craft.tcp_segment(
            *ends, rng.getrandbits(16), rng.getrandbits(16), rng.getrandbits(32),
            rng.getrandbits(32), rng.getrandbits(8), data, options[:40],
        )  # fmt: skip
        if rng.random() < 0.1:
            return segment[:12] + bytes([rng.getrandbits(8)]) + segment[13:]
        return segment
    if proto == 17:
        return struct.pack("!HHHH", 1, rng.getrandbits(16), 8 + len(data), 9) + data
    return rng.randbytes(rng.choice((0, 4, 8, 8, 30))) + data


def frame_of(rng: random.Random) -> bytes:
    """Return a frame that contradicts itself nowhere, or rarely."""
    tpids = (0x8100, 0x8100, 0x88A8, 0x9100)
    depth = rng.choice((0, 0, 0, 0, 1, 1, 1, 2, 2, 3))
    vids = (0, 0, 5, 0xFFF, rng.getrandbits(12))
    vlans = [(rng.choice(tpids), rng.getrandbits(4) << 12 | rng.choice(vids)) for _ in range(depth)]
    if rng.random() < 0.1:
        ethertype = rng.choice(
            (0x0806, 0x8035, 0x88CC, 0x8864, 0x8847, 0x0028, rng.getrandbits(16))
        )
        return craft.MACS + craft.tags(vlans, ethertype) + rng.randbytes(rng.randrange(60))
    kw: dict[str, Any] = {"vlans": vlans}
    proto = rng.choice((6, 6, 6, 17, 17, 1, 58, 2, 47, 50, 51, 132, 59, 0, 43, 44, 60, 135, 4, 41))
    if rng.random() < 0.5:
        ends = (craft.GUEST6, craft.CLIENT6)
        if rng.random() < 0.6:
            chain = []
            for _ in range(rng.choice((0, 1, 1, 2, 3, 4, 5, 6))):
                kind = rng.choice((0, 43, 60, 0, 43, 60, 44, 51, 135))
                words = rng.choice((0, 0, 1, 2))
                content = struct.pack("!HI", rng.choice((0, 1, 8, 7, 9)), 5)
                chain.append((kind, content if kind == 44 else bytes(6 + 8 * words)))
            kw["extensions"] = chain
    else:
        ends = (craft.GUEST4, craft.CLIENT4)
        if rng.random() < 0.3:
            kw["ip_options"] = bytes([1] * 4 * rng.randrange(1, 11))
    if rng.random() < 0.1:
        kw["fragment"] = (rng.choice((0, 8, 512)), rng.random() < 0.5)
    if rng.random() < 0.2:
        kw["trailer"] = rng.randbytes(rng.randrange(1, 30))
    return craft.ip(*ends, proto, upper(rng, proto, ends), **kw)


def mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


def vids(frame: bytes, l3: int) -> int:
    """Return colo_flow_key.vlan: outer << 16 | inner, without priority tags, which name none."""
    tags = range(14, l3, 4)
    found = [v for at in tags if (v := int.from_bytes(frame[at : at + 2], "big") & 0xFFF)]
    return sum(vid << 16 * i for i, vid in enumerate(reversed(found)))


def as_packet(p: Packet) -> tuple[Any, ...]:
    """Return what net/packet.py has found, in the terms of `as_kernel`."""
    if p.defect and p.defect != "truncated_icmp":
        return ("bad",)
    f = p.frame
    if p.defect:  # the kernel does not look into ICMP
        return ("ip",)
    where = (vids(f, p.l3), p.l3)
    if p.kind in (Kind.ETHER, Kind.ARP):
        return ("ether", *where)
    six = f[p.l3] >> 4 == 6
    ends = f[p.l3 + 8 : p.l3 + 40] if six else f[p.l3 + 12 : p.l3 + 20]
    both = (mapped(ends[: len(ends) // 2]), mapped(ends[len(ends) // 2 :]))
    head = (*where, *both, six, p.l4, p.proto)
    if p.kind is Kind.FRAGMENT:
        return ("fragment", *head)
    ports = f[p.l4 : p.l4 + 2], f[p.l4 + 2 : p.l4 + 4]
    if p.kind is Kind.TCP:
        return ("tcp", *head, *ports, p.seq, p.ack, p.flags, p.off - p.l4, p.end - p.off, p.l4 + 16)
    if p.kind is Kind.UDP:
        return ("udp", *head, *ports, p.end - p.off, p.l4 + 6)
    return ("other", *head)


def as_kernel(words: tuple[Any, ...]) -> tuple[Any, ...]:
    (
        src, dst, vlan, l3, l4, csum_at, size, seq, ack, sport, dport, _ethertype,
        proto, six, frag, tcp, udp, flags, doff, err,
    ) = words  # fmt: skip
    if err:
        assert not csum_at and not tcp and not udp
        return ("bad",)
    if not l4:
        return ("ether", vlan, l3)
    head = (vlan, l3, src, dst, bool(six), l4, proto)
    if frag:
        assert not csum_at
        return ("fragment", *head)
    if tcp:
        return ("tcp", *head, sport, dport, seq, ack, flags, doff, size, csum_at)
    if udp:
        return ("udp", *head, sport, dport, size, csum_at)
    assert not csum_at
    return ("other", *head)


def as_model(frame: bytes) -> tuple[Any, ...]:
    try:
        s = headers.parse(frame)
    except headers.BadFrame:
        return ("bad",)
    if not s.l4_off:
        return ("ether", s.vlan)
    head = (s.vlan, s.src, s.dst, s.l4_off, s.l4_proto)
    if s.frag:
        return ("fragment", *head)
    if s.is_tcp:
        return (
            "tcp", *head, s.sport, s.dport, s.seq, s.ack, s.flags, s.doff, s.payload_len, s.csum_at
        )  # fmt: skip
    if s.is_udp:
        return ("udp", *head, s.sport, s.dport, s.payload_len, s.csum_at)
    return ("other", *head)


def without(found: tuple[Any, ...], *places: int) -> tuple[Any, ...]:
    return tuple(x for i, x in enumerate(found) if i not in places)


@pytest.mark.parametrize("seed", range(4))
def test_all_three_see_the_same(look: Look, seed: int) -> None:
    rng = random.Random(seed)
    kinds: Counter[str] = Counter()
    defects: Counter[str] = Counter()
    priority = 0
    for i in range(8000):
        frame = frame_of(rng)
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            short = len(frame) < 60 or rng.random() < 0.2
            frame = frame[: rng.randrange(14, 60)] if short else spoil(rng, frame)
        words = look(frame)
        if words is None:
            kinds["refused"] += 1
            continue
        kernel, p = as_kernel(words), parse(frame)
        ours = as_packet(p)
        where = f"seed {seed} frame {i} {p.defect}\n{frame.hex()}"
        kinds[kernel[0]] += 1
        defects[p.defect] += 1
        if ours == ("ip",):
            assert kernel[0] == "other" and kernel[-1] in (1, 58), where
        else:
            assert kernel == ours, where
        if p.kind in (Kind.TCP, Kind.UDP):
            key = unmirrored_key(p.key, p.kind is Kind.TCP)
            assert key is not None, where
            *ends, vlan = abi.FLOW_KEY.unpack_from(key)
            assert (*ends, vlan) == (words[0], words[1], words[9], words[10], words[2]), where
            priority += sum(x > 0 for x in (vlan >> 16, vlan & 0xFFFF)) < (p.l3 - 14) // 4
        # the model keeps neither the network header's place nor the version
        drop = (2, 5) if kernel[0] not in ("bad", "ether") else (2,)
        assert without(kernel, *drop) == as_model(frame), where
    print(kinds, defects)
    assert min(kinds[k] for k in ("bad", "ether", "fragment", "tcp", "udp", "other")) > 100
    assert priority > 100
    missing = set(DEFECTS) - set(defects) - {"runt"}  # which is refused in a test run
    assert not missing, "each defect has been met"
