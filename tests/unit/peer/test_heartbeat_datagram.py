# SPDX-License-Identifier: GPL-2.0-or-later
"""Heartbeat datagrams: what is taken, what is refused, and what a side knows of the way back."""

from __future__ import annotations

import hmac
import random

import pytest

from colo_xdp.peer.heartbeat_datagram import (
    MAC,
    NONCE,
    REFUSALS,
    SIZE,
    WINDOW,
    Flag,
    HeartbeatSession,
    session_key,
)

MS = 1_000_000
KEY = session_key("web1", "11" * NONCE, "22" * NONCE)
T0 = 10**12


def two(links: int = 2) -> tuple[HeartbeatSession, HeartbeatSession]:
    names = [f"link {i}" for i in range(links)]
    p, s = HeartbeatSession("web1", "primary", names), HeartbeatSession("web1", "secondary", names)
    for x in (p, s):
        x.rekey(KEY, same_peer=False)
    return p, s


def sent(b: HeartbeatSession, path: int = 0, at: int = T0, flags: Flag = Flag.VM) -> bytes:
    b.round()
    return b.make(path, at, flags, 7, 3)


def refusals(b: HeartbeatSession) -> dict[str, int]:
    return {r: n for p in b.links for r, n in p.refused.items() if n}


def test_a_datagram_and_its_echo() -> None:
    p, s = two()
    data = sent(p, at=T0, flags=Flag.VM | Flag.STANDALONE)
    assert len(data) == SIZE
    word = s.receive(0, data, T0 + 5 * MS)
    assert word is not None and word.flags == Flag.VM | Flag.STANDALONE
    assert (word.lag_ms, word.epoch, word.after) == (7, 3, 0)
    assert s.silent_ms(0, T0 + 8 * MS) == 3 and s.silent_ms(1, T0) == float("inf")
    # 2 ms later it answers; the clocks of both hosts have nothing in common
    back = p.receive(0, sent(s, at=T0 + 7 * MS), T0 + 9 * MS)
    assert back is not None and back.after == T0
    assert p.links[0].rtt_ns == 7 * MS and p.echo_age_ms(0, T0 + 9 * MS) == 9
    assert p.echo_age_ms(1, T0) == float("inf")


def test_what_has_lain_unread_counts_from_when_it_came() -> None:
    p, s = two(1)
    ahead, way = 12345 * MS, MS  # the clocks of both hosts have nothing in common

    def read(at: int, lay: int, most: int) -> float:
        now = at + ahead + way + lay
        assert s.receive(0, sent(p, at=at), now, most) is not None
        return s.silent_ms(0, now)

    assert read(T0, 0, 100 * MS) == 0, "nothing to compare it with"
    assert read(T0 + 100 * MS, 60 * MS, 100 * MS) == pytest.approx(60, abs=2)
    assert read(T0 + 200 * MS, 0, 100 * MS) == 0
    assert read(T0 + 300 * MS, 900 * MS, 100 * MS) == 100, "this host stood still: no silence"
    assert read(T0 + 400 * MS, 60 * MS, 0) == 0, "it was read as it came"
    for i in range(200):  # a longer way is no wait for ever
        late = read(T0 + (500 + 100 * i) * MS, 60 * MS, 100 * MS)
    assert late == 0
    s.rekey(KEY, same_peer=False)
    ahead = -5 * MS
    assert read(T0, 50 * MS, 100 * MS) == 0, "its clock may be that of another boot"


def test_a_cut_in_one_direction_is_seen_by_both() -> None:
    p, s = two(1)
    for i in range(5):  # S hears P, P hears S
        at = T0 + i * 100 * MS
        s.receive(0, sent(p, at=at), at + MS)
        p.receive(0, sent(s, at=at + 2 * MS), at + 3 * MS)
    for i in range(5, 30):  # from here on nothing of P arrives
        at = T0 + i * 100 * MS
        sent(p, at=at)
        assert p.receive(0, sent(s, at=at + 2 * MS), at + 3 * MS) is not None
    now = T0 + 3000 * MS
    assert s.silent_ms(0, now) > 2000, "S hears nothing"
    assert p.silent_ms(0, now) < 200 and p.echo_age_ms(0, now) > 2000, "P is not heard, and knows"


def test_each_counter_is_taken_once_on_any_path() -> None:
    p, s = two()
    data = [sent(p, i % 2, T0 + i) for i in range(2 * WINDOW)]
    random.Random(1).shuffle(data)
    got = 0
    for d in data:
        got += s.receive(0, d, T0 + 10**6) is not None
        assert s.receive(1, d, T0 + 10**6) is None
    assert 0 < got <= 2 * WINDOW and refusals(s)["replayed"] >= 2 * WINDOW
    assert s.receive(0, data[-1], T0 + 10**6) is None
    last = sent(p, 0, T0 + 10**6)
    assert s.receive(0, last, T0 + 10**6) is not None


def test_reordering_within_the_window_is_no_harm() -> None:
    p, s = two()
    data = [sent(p, 0, T0 + i) for i in range(WINDOW)]
    assert all(s.receive(0, d, T0 + MS) is not None for d in reversed(data))
    for _ in range(WINDOW - 1):
        late = sent(p, 0, T0)
    s2 = two()[1]
    assert s2.receive(0, late, T0) is not None
    assert s2.receive(0, data[0], T0) is None and s2.receive(0, data[-1], T0) is not None


@pytest.mark.parametrize("at", range(SIZE))
def test_no_byte_can_be_changed(at: int) -> None:
    p, s = two()
    data = bytearray(sent(p))
    data[at] ^= 1
    assert s.receive(0, bytes(data), T0) is None
    assert sum(refusals(s).values()) == 1 and s.links[0].received == 0
    assert s.silent_ms(0, T0) == float("inf")


def test_strangers_are_counted_by_kind() -> None:
    p, s = two(1)
    other = HeartbeatSession("web2", "primary", ["link 0"])
    other.rekey(KEY, same_peer=False)
    stale = HeartbeatSession("web1", "primary", ["link 0"])
    stale.rekey(session_key("web1", "33" * NONCE, "22" * NONCE), same_peer=False)
    own = sent(s)
    good = sent(p)
    forged = good[:-MAC] + hmac.digest(b"guess", good[:-MAC], "sha256")
    for data in (b"", b"x" * SIZE, good + b"x", sent(other), sent(stale), own, forged):
        assert s.receive(0, data, T0) is None
    assert refusals(s) == {
        "stranger": 3, "other_pair": 1, "other_key": 1, "own": 1, "forged": 1,
    }  # fmt: skip
    assert set(refusals(s)) <= set(REFUSALS)
    assert s.receive(0, good, T0) is not None, "a forgery does not use its counter up"


def test_no_key_no_datagrams() -> None:
    b = HeartbeatSession("web1", "primary", ["link 0"])
    assert sent(b) == b""
    for mine, theirs in (("11" * NONCE, ""), ("", ""), ("11" * NONCE, "zz"), ("11", "11" * NONCE)):
        assert session_key("web1", mine, theirs) == b""
    b.rekey(b"", same_peer=False)
    assert sent(b) == b""
    assert session_key("web2", "11" * NONCE, "22" * NONCE) != KEY
    assert session_key("web1", "22" * NONCE, "11" * NONCE) != KEY


def hears(a: HeartbeatSession, b: HeartbeatSession, at: int) -> bool:
    """Whether one of two datagrams in a row is taken."""
    return any([b.receive(0, sent(a, at=at + i), at + i) is not None for i in range(2)])


@pytest.mark.parametrize("knows", ["primary", "secondary", "both"])
def test_a_connection_that_was_cut_as_it_began(knows: str) -> None:
    """One side knows the new key, the other the former one only: both go on hearing each other."""
    p, s = two(1)
    assert hears(p, s, T0) and hears(s, p, T0)
    new = session_key("web1", "44" * NONCE, "55" * NONCE)
    for side, b in (("primary", p), ("secondary", s)):
        if knows in (side, "both"):
            b.rekey(new, same_peer=True)
    for i in range(1, 5):
        assert hears(p, s, T0 + i * MS) and hears(s, p, T0 + i * MS)
    late = sent(p, at=T0 + 9 * MS)
    newest = session_key("web1", "66" * NONCE, "77" * NONCE)
    for b in (p, s):
        b.rekey(newest, same_peer=True)
    for i in range(10, 14):
        assert hears(p, s, T0 + i * MS) and hears(s, p, T0 + i * MS)
    assert s.receive(0, late, T0 + 20 * MS) is None, "what was kept of a former connection is void"


def test_another_process_of_the_peer_ends_the_former_key() -> None:
    p, s = two(1)
    assert hears(p, s, T0) and hears(s, p, T0)
    kept = sent(p, at=T0 + MS)
    new = session_key("web1", "44" * NONCE, "55" * NONCE)
    p = HeartbeatSession("web1", "primary", ["link 0"])
    for b in (p, s):
        b.rekey(new, same_peer=False)
    assert s.receive(0, kept, T0 + 2 * MS) is None
    # its host was booted anew: its clock began anew too
    assert s.receive(0, sent(p, at=5), T0 + 3 * MS) is not None
    assert s.silent_ms(0, T0 + 4 * MS) == 1


def test_time_without_listening_is_no_silence() -> None:
    p, s = two(1)
    s.receive(0, sent(p), T0)
    s.discount(1000 * MS)
    assert s.silent_ms(0, T0 + 1100 * MS) == 100


def test_lag_is_bounded() -> None:
    p, s = two(1)
    word = s.receive(0, p.make(0, T0, Flag.VM, 10**9, 0), T0)
    assert word is not None and word.lag_ms == 0xFFFF
