# SPDX-License-Identifier: GPL-2.0-or-later
"""Read what ab, redis-benchmark and pgbench print. Pure.

All become an Outcome, which is what a client of any kind has seen.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import dataclass


class OutputError(ValueError):
    """A client has printed something else than expected; the text has the end of it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What clients saw of one workload: operations per s, latencies of single ones in ms."""

    rate: float
    p50: float
    p99: float
    errors: int = 0
    hung: bool = False  # it had not ended at its deadline

    @staticmethod
    def at_deadline(seconds: float, done: int = 0) -> Outcome:
        """Return what a workload counts as that does not end.

        `done`: its operations, as far as that is known. The one that hangs counts as done at the
        deadline, so that this is the best that can be said of it.
        """
        return Outcome((done + 1) / seconds, seconds * 1e3, seconds * 1e3, 1, hung=True)


def quantile(values: Iterable[float], q: float) -> float:
    """Return the value below which a share of the values lies."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def of_times(times: list[float], wrong: int = 0) -> Outcome:
    """Return the outcome of operations one after the other, from what each took (s)."""
    if not times:
        raise OutputError("no operation has ended")
    return at_once(times, sum(times), wrong)


def at_once(times: list[float], spent: float, wrong: int = 0) -> Outcome:
    """Return the outcome of operations of several clients, which took `spent` s together."""
    p50, p99 = (quantile(times, q) * 1e3 for q in (0.5, 0.99))
    return Outcome(len(times) / spent, p50, p99, wrong)


def _number(pattern: str, text: str) -> float:
    m = re.search(pattern, text, re.M)
    if m is None:
        raise OutputError(f"no {pattern!r} in {text[-300:]!r}")
    return float(m[1])


def read_ab(text: str, percentiles: str) -> Outcome:
    """Read ab: what it prints, and what it writes with -e (percentiles in ms)."""
    rows = list(csv.reader(percentiles.splitlines()))[1:]
    at = {int(row[0]): float(row[1]) for row in rows if len(row) == 2}
    if not {50, 99} <= set(at):
        raise OutputError(f"ab: no percentiles in {percentiles[-300:]!r}")
    failed = _number(r"^Failed requests: +(\d+)", text)
    other = re.search(r"^Non-2xx responses: +(\d+)", text, re.M)
    rate = _number(r"^Requests per second: +([\d.]+)", text)
    # ab writes nonsense for 99 if there are few requests (0.257 ms below a median of 400).
    p99 = max(ms for percent, ms in at.items() if percent <= 99)
    return Outcome(rate, at[50], p99, int(failed) + (int(other[1]) if other else 0))


def read_redis(text: str) -> Outcome:
    """Read redis-benchmark --csv with one test."""
    lines = [x for x in text.splitlines() if x.startswith('"')]
    rows = list(csv.DictReader(lines))
    if len(rows) != 1:
        raise OutputError(f"redis-benchmark: {len(rows)} results in {text[-300:]!r}")
    (row,) = rows
    try:
        return Outcome(
            float(row["rps"]), float(row["p50_latency_ms"]), float(row["p99_latency_ms"])
        )
    except (KeyError, TypeError, ValueError) as e:
        raise OutputError(f"redis-benchmark: {e} in {text[-300:]!r}") from e


@dataclass(frozen=True, slots=True)
class Transaction:
    """One transaction of pgbench: its end (unix time, s) and what it took (s)."""

    ended: float
    took: float


def read_log(text: str) -> list[Transaction]:
    """Read pgbench's log (--log): one line per transaction; those that failed do not count."""
    out = []
    for line in text.splitlines():
        words = line.split()
        # client, number, us, script, end: s, us; the last line may be cut
        if len(words) < 6 or not words[2].isdigit() or not words[5].isdigit():
            continue
        out.append(Transaction(int(words[4]) + int(words[5]) / 1e6, int(words[2]) / 1e6))
    return sorted(out, key=lambda t: t.ended)


def read_pgbench(text: str, log: str) -> Outcome:
    """Read pgbench: what it prints, and its log. A run without a transaction counts as a hang."""
    if re.search(r"^number of transactions actually processed: 0$", text, re.M):
        return Outcome.at_deadline(_number(r"^duration: (\d+) s", text))
    times = [t.took for t in read_log(log)]
    rate = _number(r"^tps = ([\d.]+)", text)
    failed = re.search(r"^number of failed transactions: (\d+)", text, re.M)
    errors = (int(failed[1]) if failed else 0) + aborted(text)
    if not times:
        raise OutputError(f"pgbench: no transaction in its log; {text[-300:]!r}")
    return Outcome(rate, quantile(times, 0.5) * 1e3, quantile(times, 0.99) * 1e3, errors)


def aborted(text: str) -> int:
    """Return how many clients of pgbench have given up."""
    return len(re.findall(r"client \d+ (?:script \d+ )?aborted", text))
