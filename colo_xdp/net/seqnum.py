# SPDX-License-Identifier: GPL-2.0-or-later
"""Serial arithmetic on 32-bit TCP sequence numbers (RFC 1982, RFC 9293 section 3.4).

Numbers are ints in 0 .. 2**32-1. Two numbers exactly 2**31 apart have no order
(RFC 1982 section 3.2); here the difference is then -2**31, so both count as "less".
"""

from __future__ import annotations

MASK = 0xFFFFFFFF
HALF = 0x80000000


def add(a: int, n: int) -> int:
    """Return the number n bytes after a; n may be negative."""
    return (a + n) & MASK


def diff(a: int, b: int) -> int:
    """Return the signed distance a - b in bytes, -2**31 .. 2**31-1."""
    return ((a - b + HALF) & MASK) - HALF


def lt(a: int, b: int) -> bool:
    """Return whether a comes before b."""
    return diff(a, b) < 0


def leq(a: int, b: int) -> bool:
    """Return whether a is b or comes before it."""
    return diff(a, b) <= 0


def gt(a: int, b: int) -> bool:
    """Return whether a comes after b."""
    return diff(a, b) > 0


def geq(a: int, b: int) -> bool:
    """Return whether a is b or comes after it."""
    return diff(a, b) >= 0


def later(a: int | None, b: int) -> int:
    """Return the later of both; None is before everything."""
    return b if a is None or diff(b, a) > 0 else a
