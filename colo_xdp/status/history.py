# SPDX-License-Identifier: GPL-2.0-or-later
"""The last hours of one controller in numbers: what the status page plots. Pure.

A row is made of two readings of the status document (status/document.py), or of the part of it that
status/sampler.py reads. Rows are kept as JSON text: the thread that answers HTTP only joins them,
since encoding thousands of numbers at once would keep the interpreter from the frames that wait.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from ..engine.waits import WAIT_BUCKETS
from .document import OFFLOAD_WAIT_BUCKETS

EVERY_S = 10.0
HOURS = 6
#: rows that are kept
SIZE = int(HOURS * 3600 / EVERY_S)

#: the values of a row: name, meaning
COLUMNS: dict[str, str] = {
    "at": "Unix time, in seconds",
    "state": "state of the pair as this host sees it",
    "transmitting": "this host's guest reaches the network",
    "frames_per_s": "frames of this host's guest that passed its tap, per second",
    "fast_share": "share of the PVM's frames that the fast path handled, 0 to 1; null: no frame",
    "held": "frames that waited at that moment",
    "wait_p50_ms": "median of the waiting times in the interval (upper bound of its bucket), both "
    "paths, in ms; null: nothing has waited",
    "wait_p99_ms": "the same, 99th percentile",
    "checkpoints": "checkpoints completed in the interval, by cause; `loaded`: by the secondary",
    "checkpoint_ms": "what a checkpoint takes (smoothed), in ms",
    "lag_ms": "lag with which the SVM has answered lately, in ms",
    "silent_ms": "time since the peer's last message, in ms; null: there was none",
    "flows": "tracked connections",
}

_PASSES = ("pass", "offload_")
_BOUNDS = (*WAIT_BUCKETS, WAIT_BUCKETS[-1]), (*OFFLOAD_WAIT_BUCKETS, OFFLOAD_WAIT_BUCKETS[-1])

Document = Mapping[str, Any]


def _packets(row: Document, prefixes: tuple[str, ...]) -> int:
    return sum(v[0] for reason, v in row.items() if reason.startswith(prefixes))


def _frames(s: Document) -> int:
    """Frames of this host's guest that left its tap, since the counters began."""
    programs = s["programs"]
    if s["role"] == "primary":
        released: int = s["engine"].get("released", 0)
        return released + _packets(programs.get("pvm_out", {}), _PASSES)
    # With XDP, each frame passes both programs.
    return max(_packets(programs.get(p, {}), _PASSES) for p in ("svm_out", "svm_out_xdp"))


def _more(now: Iterable[int], before: Iterable[int]) -> list[int]:
    return [max(0, a - b) for a, b in zip(now, before, strict=True)]


def quantile(buckets: Iterable[tuple[float, int]], q: float) -> float | None:
    """Return the upper bound of the bucket that has the quantile; None if all are empty."""
    filled = sorted((bound, n) for bound, n in buckets if n)
    left = q * sum(n for _, n in filled)
    for bound, n in filled:
        left -= n
        if left <= 0:
            return bound
    return filled[-1][0] if filled else None


def _waits(s: Document, before: Document) -> list[tuple[float, int]]:
    out: list[tuple[float, int]] = []
    for bounds, key, part in zip(_BOUNDS, ("wait", "offload"), ("buckets", "waits"), strict=True):
        out += zip(bounds, _more(s[key][part], before[key][part]), strict=True)
    return out


def _checkpoints(s: Document, before: Document) -> dict[str, int]:
    now, then = s["checkpoints"], before["checkpoints"]
    new = {k: n - then["by_cause"].get(k, 0) for k, n in now["by_cause"].items()}
    out = {k: n for k, n in new.items() if n > 0}
    others = now["total"] - then["total"] - sum(out.values())
    return out | ({"loaded": others} if others > 0 else {})


def _rounded(v: float | None) -> float | None:
    """With as many digits as a plot shows."""
    return None if v is None else float(f"{v:.4g}")


def sample(s: Document, before: Document | None, at: float, seconds: float) -> dict[str, Any]:
    """Return a row: the document `s`, and what has changed since `before`, `seconds` ago.

    What needs a difference is null without one: at the first row, and when the role has changed.
    """
    row: dict[str, Any] = dict.fromkeys(COLUMNS)
    row |= {
        "at": round(at, 1),
        "state": s["state"],
        "transmitting": s["active"]["transmitting"],
        "held": s["held"]["packets"],
        "checkpoints": {},
        "checkpoint_ms": _rounded(s["patience"]["checkpoint_ms"]),
        "lag_ms": _rounded(s["patience"]["lag_ms"]),
        "silent_ms": _rounded(s["peer"]["silent_ms"]),
        "flows": s["flows"]["tracked"],
    }
    if before is None or before["role"] != s["role"] or seconds <= 0:
        return row
    row["frames_per_s"] = _rounded(max(0, _frames(s) - _frames(before)) / seconds)
    out, was = (d["programs"].get("pvm_out", {}) for d in (s, before))
    fast = _packets(out, ("offload_",)) - _packets(was, ("offload_",))
    punted = _packets(out, ("punt",)) - _packets(was, ("punt",))
    if fast + punted > 0:
        row["fast_share"] = _rounded(fast / (fast + punted))
    waits = _waits(s, before)
    for q in (50, 99):
        wait = quantile(waits, q / 100)
        row[f"wait_p{q}_ms"] = None if wait is None else _rounded(wait * 1000)
    row["checkpoints"] = _checkpoints(s, before)
    return row


class History:
    """The last rows, numbered from 1."""

    def __init__(self, began: float, size: int = SIZE) -> None:
        """`began`: Unix time; a reader sees by it that the numbers have begun again."""
        self._head = json.dumps(
            {"began": began, "every_s": EVERY_S, "hours": HOURS, "columns": list(COLUMNS)}
        )
        self._rows: deque[tuple[int, str]] = deque(maxlen=size)
        self._last = 0
        self._before: Document | None = None
        self._taken_s = float("-inf")

    def due(self, now_s: float) -> bool:
        """Return whether it is time for the next row (monotonic, s).

        Half a second early is in time: whoever asks each second is not to take every 11th.
        """
        return now_s - self._taken_s >= EVERY_S - 0.5

    def add(self, s: Document, at: float, now_s: float) -> None:
        """Append the row of a document that was read at `at` (Unix time) and `now_s`."""
        row = sample(s, self._before, at, now_s - self._taken_s)
        self._before, self._taken_s = s, now_s
        self._last += 1
        text = json.dumps([row[k] for k in COLUMNS], separators=(",", ":"))
        self._rows.append((self._last, text))

    def skip(self, now_s: float) -> None:
        """Note that there is no row for this time."""
        self._before, self._taken_s = None, now_s

    def to_json(self, after: int = 0) -> str:
        """Return the rows behind number `after` as JSON; any thread may ask."""
        rows = tuple(self._rows)  # in one piece
        last = rows[-1][0] if rows else 0
        shown = ",\n".join(text for n, text in rows if n > after)
        return f'{self._head[:-1]}, "last": {last}, "rows": [\n{shown}]}}\n'
