# SPDX-License-Identifier: GPL-2.0-or-later
"""Compare bpf/lib/addresses.h with its model, frame by frame, and test what pvm_in mirrors."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.abi import Cfg, Mode, Prog
from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.source import Options
from colo_xdp.net.address_claims import MAPPED, Claims, mac_key

from .conftest import TC_UNSPEC, Kernel

GUEST, VRRP, BEHIND = (bytes.fromhex(x) for x in ("525400123456", "00005e000107", "020000000009"))
OTHER, ALL = bytes.fromhex("020000000077"), b"\xff" * 6
MACS = (GUEST, VRRP, BEHIND, OTHER)
IP4 = [bytes((10, 9, 0, n)) for n in range(1, 6)] + [bytes(4), b"\x7f\0\0\1", b"\xe0\0\0\x12"]
IP6 = [b"\xfd\x09" + bytes(13) + bytes([n]) for n in range(1, 6)] + [bytes(16), b"\xff\2" * 8]


def arp(rnd: random.Random) -> bytes:
    op, kind = rnd.choice((1, 1, 2, 2, 3)), rnd.choice((0x0800, 0x0800, 0x0800, 0x86DD))
    head = struct.pack("!HHBBH", 1, kind, 6, rnd.choice((4, 4, 4, 16)), op)
    return head + rnd.choice(MACS) + rnd.choice(IP4) + rnd.choice(MACS) + rnd.choice(IP4)


def nd(rnd: random.Random) -> bytes:
    kind = rnd.choice((128, 132, 133, 134, 135, 136, 136, 136, 137))
    body = struct.pack("!BBHI", kind, rnd.random() < 0.05, 0, rnd.getrandbits(3) << 29)
    if kind == 134:
        body += bytes(8)
    elif kind > 134:
        body += rnd.choice(IP6)
    if rnd.random() < 0.6:
        body += rnd.choice((b"\1\1", b"\2\1", b"\2\1", b"\2\2")) + rnd.choice(MACS)
    hops, nxt = rnd.choice((255, 255, 255, 254)), rnd.choice((58, 58, 58, 58, 0, 6))
    said = len(body) if rnd.random() < 0.9 else rnd.randrange(80)
    return struct.pack("!IHBB", 6 << 28, said, nxt, hops) + rnd.choice(IP6) + rnd.choice(IP6) + body


def frame(rnd: random.Random) -> bytes:
    tags = b"".join(
        struct.pack("!HH", rnd.choice((0x8100, 0x88A8)), rnd.choice((5, 7, 0x2007)))
        for _ in range(rnd.choice((0, 0, 0, 0, 1, 2, 3)))
    )
    kind, body = rnd.choice(((0x0806, arp(rnd)), (0x86DD, nd(rnd)), (0x0800, bytes(40))))
    dst = rnd.choice((GUEST, OTHER, ALL, b"\x33\x33\0\0\0\1"))
    out = dst + rnd.choice(MACS) + tags + struct.pack("!H", kind) + body
    if rnd.random() < 0.2:
        out = out[: rnd.randrange(54 if kind == 0x86DD else 34, len(out) + 1)]  # else EINVAL
    return out


def words(objects: loader.Objects) -> tuple[dict[bytes, tuple[int, int]], dict[int, int]]:
    """Return {address and vlan: (MAC, epoch, flags)} and {MAC: epoch}."""
    addresses, macs = {}, {}
    for key, raw in objects.map("addresses").items():
        _, mac, epoch, flags = abi.CLAIM.unpack(raw)
        addresses[key] = (mac, epoch, flags)
    for key, raw in objects.map("macs").items():
        macs[int.from_bytes(key, "little")] = abi.CLAIM.unpack(raw)[2]
    return addresses, macs  # type: ignore[return-value]


def expected(model: Claims) -> tuple[dict[bytes, tuple[int, int, int]], dict[int, int]]:
    return (
        {
            abi.ADDRESS.pack(*k): (mac_key(e.mac), e.epoch, e.flags)
            for k, e in model.addresses.items()
        },
        {mac_key(m): e.epoch for m, e in model.macs.items()},
    )


def clear(objects: loader.Objects) -> None:
    for name in ("addresses", "macs"):
        table = objects.map(name)
        for key in list(table.keys()):
            table.delete(key)


@pytest.mark.parametrize("seed", range(4))
def test_the_model_notes_and_forgets_the_same(tc: Kernel, seed: int) -> None:
    rnd = random.Random(seed)
    clear(tc.objects)
    tc.set(Cfg.MODE, Mode.TAKEOVER)
    model = Claims(main=GUEST if seed % 2 else bytes(6))
    tc.set(Cfg.GUEST_MAC, abi.MAC_KNOWN | mac_key(model.main or b""))
    epoch, seen = 7, 0
    for n in range(3000):
        if rnd.random() < 0.05:
            epoch = rnd.choice((6, 7, 8))
            tc.set(Cfg.EPOCH, epoch)
        f = frame(rnd)
        if rnd.random() < 0.75:
            tc.bare("svm_out", f)
            model.note(f, epoch)
        else:
            tc.bare("svm_net", f)
            model.hear(f)
        assert words(tc.objects) == expected(model), (n, f.hex())
        seen = max(seen, len(model.addresses))
    assert seen > 8, "something was noted"
    tc.set(Cfg.GUEST_MAC, 0)
    clear(tc.objects)


def test_what_the_guest_is_not_heard_to_say(tc: Kernel) -> None:
    """Frames of the controller's own are announcements, or were here before."""
    clear(tc.objects)
    tc.set(Cfg.MODE, Mode.TAKEOVER)
    said = ALL + GUEST + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST + IP4[1]
    said += bytes(6) + IP4[1]
    tc.bare("svm_out", said, abi.MARK)
    assert words(tc.objects) == ({}, {})
    tc.bare("svm_out", said)
    addresses, macs = words(tc.objects)
    assert set(addresses) == {abi.ADDRESS.pack(MAPPED + IP4[1], 0)} and set(macs) == {
        mac_key(GUEST)
    }
    clear(tc.objects)


@pytest.fixture(scope="module")
def primary(bpffs: Path) -> Iterator[loader.Objects]:
    objects = loader.load("primary", "addresses", str(bpffs), Options(ring_pages=64))
    try:
        set_slot(objects, Cfg.TAP, 1)
        set_slot(objects, Cfg.PEER, 1)
        yield objects
    finally:
        objects.close()
        loader.remove_pins(objects.pin_dir)


def set_slot(objects: loader.Objects, slot: Cfg, value: int) -> None:
    objects.map("config").set(struct.pack("=I", slot), struct.pack("=Q", value))


def counted(objects: loader.Objects, prog: Prog) -> dict[str, int]:
    table, out = objects.map("counters"), {}
    for reason in abi.Reason:
        if reason is not abi.Reason.MAX:
            key = struct.pack("=I", prog * abi.Reason.MAX + reason)
            raw = table.get(key) or b""
            if n := sum(p for p, _ in abi.COUNT.iter_unpack(raw)):
                out[reason.name] = n
    return out


def test_only_what_is_for_the_guest_is_mirrored(primary: loader.Objects) -> None:
    clear(primary)
    set_slot(primary, Cfg.MODE, Mode.RUN)
    model = Claims()

    def known(main: bytes | None, full: bool = False) -> None:
        model.main, model.full = main, full
        word = 0 if main is None else abi.MAC_KNOWN | mac_key(main) | (abi.MAC_ALL if full else 0)
        set_slot(primary, Cfg.GUEST_MAC, word)

    def mirrored(dst: bytes) -> bool:
        before = counted(primary, Prog.PVM_IN)
        f = dst + OTHER + b"\x08\x00" + bytes(46)
        r = syscall.test_run(primary.programs["pvm_in"].fd, f)
        assert r.retval == TC_UNSPEC, "the PVM gets it, as any port of the bridge"
        after = counted(primary, Prog.PVM_IN)
        (reason,) = {k for k, n in after.items() if n != before.get(k, 0)}
        assert reason in ("PASS_MIRRORED", "PASS_OTHER_MAC")
        assert model.is_for_guest(f) == (reason == "PASS_MIRRORED")
        return reason == "PASS_MIRRORED"

    groups = (ALL, b"\x33\x33\0\0\0\1", b"\1\0\x5e\0\0\x12")
    known(None)
    assert all(mirrored(m) for m in (*MACS, *groups)), "nobody has said who the guest is"
    known(GUEST)
    assert [mirrored(m) for m in MACS] == [True, False, False, False]
    assert all(mirrored(m) for m in groups)
    for m in (VRRP, BEHIND):
        f = ALL + m + b"\x08\x00" + bytes(46)
        syscall.test_run(primary.programs["pvm_out"].fd, f)
        model.note(f, 0)
    assert [mirrored(m) for m in MACS] == [True, True, True, False]
    known(bytes(6))  # QEMU does not report it, but the guest has transmitted
    assert [mirrored(m) for m in MACS] == [False, True, True, False]
    known(GUEST, full=True)
    assert all(mirrored(m) for m in MACS)
    known(None)


def test_nothing_is_noted_of_a_table_that_is_full(primary: loader.Objects) -> None:
    """Only the guest itself can fill it; that is counted, and nothing else happens."""
    clear(primary)
    set_slot(primary, Cfg.MODE, Mode.RUN)
    set_slot(primary, Cfg.GUEST_MAC, abi.MAC_KNOWN | mac_key(GUEST))
    size = primary.map("macs").info.max_entries
    before = counted(primary, Prog.ADDRESSES)
    for n in range(size + 9):
        mac = b"\2\0" + n.to_bytes(4, "big")
        syscall.test_run(primary.programs["pvm_out"].fd, ALL + mac + b"\x08\x00" + bytes(46))
    arps = primary.map("addresses").info.max_entries
    head = ALL + GUEST + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1) + GUEST
    for n in range(arps + 5):
        said = head + bytes((10, 8, n >> 8, n & 255)) + bytes(10)
        syscall.test_run(primary.programs["pvm_out"].fd, said)
    after = counted(primary, Prog.ADDRESSES)
    assert after["NOTE_MACS_FULL"] - before.get("NOTE_MACS_FULL", 0) == 9
    assert after["NOTE_ADDRESSES_FULL"] - before.get("NOTE_ADDRESSES_FULL", 0) == 5
    addresses, macs = words(primary)
    assert (len(addresses), len(macs)) == (arps, size)
    clear(primary)
    set_slot(primary, Cfg.GUEST_MAC, 0)
