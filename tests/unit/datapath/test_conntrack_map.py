# SPDX-License-Identifier: GPL-2.0-or-later
"""The connection table: what is handed to the host of a guest's copy, and ageing."""

from __future__ import annotations

import time
from dataclasses import astuple
from types import SimpleNamespace

import pytest

from colo_xdp import abi
from colo_xdp.conntrack import rewriter
from colo_xdp.conntrack.tcp_state import TcpState
from colo_xdp.datapath.conntrack_map import ConntrackMap, decode
from tests.netns.frames import tcp

EST = int(TcpState.ESTABLISHED)


class FakeMap(dict[bytes, bytes]):
    info = SimpleNamespace(max_entries=8)

    def set(self, key: bytes, value: bytes) -> None:
        if len(self) >= self.info.max_entries and key not in self:
            raise OSError(7, "map update: Argument list too long")
        self[key] = value

    def items(self) -> list[tuple[bytes, bytes]]:  # type: ignore[override]
        return list(super().items())

    def delete(self, key: bytes) -> bool:
        return self.pop(key, None) is not None


def key(n: int, vlan: int = 0) -> bytes:
    ip = bytes(10) + b"\xff\xff\x0a\x09\x00"
    return abi.FLOW_KEY.pack(ip + b"\2", ip + b"\1", b"\0P", n.to_bytes(2, "big"), vlan)


def value(epoch: int, off: int, have: int = 2, have_client: int = 1, seen: int = 0) -> bytes:
    return abi.FLOW.pack(
        seen or time.monotonic_ns(), epoch, off, 0, 10, 10 + off, 0, 0, 0, 0, EST, have,
        have_client, 0, 5, 0, 0, 0,
    )  # fmt: skip


def table() -> tuple[ConntrackMap, FakeMap]:
    m = FakeMap()
    return ConntrackMap(m, FakeMap()), m  # type: ignore[arg-type]


def test_what_is_handed_over() -> None:
    t, m = table()
    m[key(1)] = value(7, 100)
    m[key(2)] = value(abi.EPOCH_BASE, 200)
    m[key(3)] = value(6, 300)  # a checkpoint has ended it
    m[key(4)] = value(7, 0)  # known to be none
    m[key(5)] = value(7, 0, have_client=64)  # half open: not known yet
    m[key(6)] = value(7, 0, 0, 0)  # forgotten
    m[key(7)] = value(7, 0, rewriter.FIN_GUEST, rewriter.FIN_CLIENT)  # and closed after that
    parts = t.export(7)
    assert {p[: len(key(1))] for p in parts} == {key(1), key(2), key(5)}
    t.sweep(7)
    assert (t.translated, t.wanted) == (2, 3)
    other, n = table()
    n[key(9)] = value(3, 1)
    other.adopt(b"".join(parts[:2]), first=True)
    other.adopt(parts[2], first=False)
    assert set(n) == {key(1), key(2), key(5)}
    for k, raw in n.items():
        f, was = decode(raw), decode(m[k])
        assert f.epoch == abi.EPOCH_BASE
        assert (f.off, f.isn_p, f.isn_s, f.state, f.have) == (
            was.off, was.isn_p, was.isn_s, was.state, was.have)  # fmt: skip
    assert {p[: len(key(1))] for p in other.export(0)} == set(n), "and on to the next one"


def test_what_may_or_may_not_have_an_offset_is_given_up() -> None:
    t, m = table()
    m[key(1)] = value(7, 100)
    m[key(2)] = value(abi.EPOCH_BASE, 200)  # of both states
    m[key(3)] = value(6, 300)
    m[key(4)] = value(7, 0)
    m[key(5)] = value(7, 0, have_client=64)  # the client was perhaps told another ISN
    m[key(6)] = value(7, 0, 0, 64)  # the guest has said nothing yet
    before = dict(m)
    assert t.give_up(7) == 2
    assert {k for k in m if m[k] != before[k]} == {key(1), key(5)}
    for k in (key(1), key(5)):
        f = decode(m[k])
        assert f.off == (f.isn_s - f.isn_p) & 0xFFFFFFFF == 1 << 31
        assert f.have_client & rewriter.HAVE_ISN_P, "and is not learnt from what is yet to come"


def test_nothing_half_and_nothing_beyond_the_limit() -> None:
    t, m = table()
    with pytest.raises(ValueError, match="not connections"):
        t.adopt(b"x" * 50, first=True)
    with pytest.raises(OSError, match="map update"):
        t.adopt(b"".join(key(i) + value(1, 1) for i in range(9)), first=True)
    assert len(m) == 8


def test_an_offset_for_good_is_not_swept_with_its_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    t, m = table()
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**15)
    old = time.monotonic_ns() - 5_000_000_000
    m[key(1)] = value(abi.EPOCH_BASE, 100, seen=old)
    m[key(2)] = value(6, 100, seen=old)
    t.sweep(9)
    assert set(m) == {key(1)} and (t.tracked, t.translated) == (1, 1)
    monkeypatch.setattr("time.monotonic_ns", lambda: 2 * 10**15)
    t.sweep(9)
    assert not m and t.translated == 0


def test_handshakes_are_in_a_table_of_their_own() -> None:
    m, opening = FakeMap(), FakeMap()
    t = ConntrackMap(m, opening)  # type: ignore[arg-type]
    m[key(1)] = value(7, 100)
    opening[key(2)] = value(7, 0, have_client=64)  # the guest has answered
    opening[key(3)] = value(7 ^ rewriter.VOID, 300)  # moved on
    opening[key(4)] = value(7, 0, 0, 64)  # anybody's SYN
    t.sweep(7)
    assert (t.tracked, t.opening, t.translated, t.wanted) == (1, 2, 1, 3)
    parts = t.export(7)
    assert [p[: len(key(1))] for p in parts] == [key(2), key(4), key(1)]
    assert t.give_up(7) == 2
    f = decode(opening[key(2)])
    assert f.certain and f.off == 1 << 31 and not f.have_pvm
    t.adopt(parts[0], first=True)
    assert set(m) == {key(2)} and not opening


def test_what_the_guest_has_not_answered_is_soon_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    m, opening = FakeMap(), FakeMap()
    t = ConntrackMap(m, opening)  # type: ignore[arg-type]
    model = rewriter.Rewriter(epoch=7)
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**15)
    for port in range(100):
        model.to_svm(tcp(flags=2, seq=1, ack=0, reverse=True, dport=port))
        model.to_svm(tcp(flags=16, seq=2, ack=77, reverse=True, dport=port))
    for k, f in model.opening.items():
        opening[k] = abi.FLOW.pack(10**15, *astuple(f))
    assert len(opening) == 100 and not model.flows
    monkeypatch.setattr("time.monotonic_ns", lambda: 10**15 + 11 * 10**9)
    t.sweep(7)
    assert not opening and t.aged == 100
