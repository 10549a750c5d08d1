# SPDX-License-Identifier: GPL-2.0-or-later
"""What the guest does, as figures of its status documents: throughput, waits, agreement. Pure.

A figure since the controller's start needs one document, a rate two of the same controller.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..engine.counters import UNCOMPARED
from ..engine.waits import WAIT_BUCKETS
from ..failover.states import Role
from .document import OFFLOAD_WAIT_BUCKETS

Document = Mapping[str, Any]
#: reasons under which the kernel itself lets a frame of the PVM leave, by program
_BY_KERNEL = (
    ("pvm_out", "offload_passed"), ("pvm_out", "offload_acked"),
    ("svm_arrival", "offload_released"), ("svm_arrival", "offload_rebuilt"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Rate:
    """Frames and bits in a second."""

    frames: float
    bits: float


@dataclass(frozen=True, slots=True)
class Work:
    """The figures. A share is from 0 to 1; None: there is nothing to tell."""

    sent: Rate | None  # by the guest to the network
    received: Rate | None
    wait_p50_s: float | None
    wait_p99_s: float | None
    agreed: float | None  # frames that left because both guests sent the same
    by_kernel: float | None  # of the frames that left


def work(s: Document, before: Document | None = None, since: Document | None = None) -> Work:
    """Return the rates since `before`, and the other figures since `since`.

    Both are earlier documents; one of another controller does not count. Without `since` it is the
    time since the controller's start.
    """
    before, old = same_controller(s, before), same_controller(s, since)
    sent = received = None
    if before is not None:
        seconds = s["uptime_s"] - before["uptime_s"]
        sent = _rate(_sent(s), _sent(before), seconds)
        received = _rate(_received(s), _received(before), seconds)
    if s["role"] != Role.PRIMARY:
        return Work(sent, received, None, None, None, None)
    slow = _less(s["wait"]["buckets"], old["wait"]["buckets"] if old else None)
    fast = _less(s["offload"]["waits"], old["offload"]["waits"] if old else None)
    histograms = [(WAIT_BUCKETS, slow), (OFFLOAD_WAIT_BUCKETS, fast)]
    kernel, engine, uncompared = _released(s)
    if old is not None:
        k, e, u = _released(old)
        kernel, engine, uncompared = kernel - k, engine - e, uncompared - u
    left = kernel + engine
    return Work(
        sent,
        received,
        quantile(histograms, 0.5),
        quantile(histograms, 0.99),
        max(0.0, (left - uncompared) / left) if left > 0 else None,
        kernel / left if left > 0 else None,
    )


def same_controller(s: Document, other: Document | None) -> Document | None:
    """Return the other document if it is an earlier one of the same controller."""
    earlier = other is not None and other["role"] == s["role"]
    return other if earlier and other is not None and other["uptime_s"] < s["uptime_s"] else None


def quantile(
    histograms: Sequence[tuple[Sequence[float], Sequence[int]]], share: float
) -> float | None:
    """Return the value below which that share of several histograms lies; None: they are empty.

    Within a bucket the values count as spread evenly; above the last bound they count as the bound.
    """
    total = sum(sum(counts) for _, counts in histograms)
    if total <= 0:
        return None
    want, low, below = share * total, 0.0, 0.0
    for bound in sorted({b for bounds, _ in histograms for b in bounds}):
        upto = sum(_below(bounds, counts, bound) for bounds, counts in histograms)
        if upto >= want:
            return low + (bound - low) * ((want - below) / (upto - below) if upto > below else 1.0)
        low, below = bound, upto
    return low


def _below(bounds: Sequence[float], counts: Sequence[int], x: float) -> float:
    n, low = 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if bound <= x:
            n += count
        else:
            return n + count * max(0.0, x - low) / (bound - low)
        low = bound
    return n


def _less(now: Sequence[int], before: Sequence[int] | None) -> list[int]:
    return [max(0, a - b) for a, b in zip(now, before or [0] * len(now), strict=True)]


def _rate(now: tuple[int, int], before: tuple[int, int], seconds: float) -> Rate:
    frames, size = (max(0, a - b) / seconds for a, b in zip(now, before, strict=True))
    return Rate(frames, 8 * size)


def _sum(s: Document, *wanted: tuple[str, str]) -> tuple[int, int]:
    """Add up [packets, bytes] of programs and reasons; a reason that ends with `*` is a prefix."""
    packets = size = 0
    for program, reason in wanted:
        for name, (n, b) in s["programs"].get(program, {}).items():
            if name == reason or (reason[-1] == "*" and name.startswith(reason[:-1])):
                packets, size = packets + n, size + b
    return packets, size


def _sent(s: Document) -> tuple[int, int]:
    if s["role"] == Role.PRIMARY:
        return _sum(s, ("pvm_out", "pass*"), *_BY_KERNEL)
    return _sum(s, ("svm_out", "pass*"))


def _received(s: Document) -> tuple[int, int]:
    if s["role"] == Role.PRIMARY:
        return _sum(s, ("pvm_in", "pass*"))
    return _sum(s, ("svm_net", "pass*"))


def _released(s: Document) -> tuple[int, int, int]:
    """Return frames that left by the kernel, by the engine, and of these for another reason than
    that both guests sent the same."""
    e = s["engine"]
    return _sum(s, *_BY_KERNEL)[0], e["released"], sum(e[name] for name in UNCOMPARED)
