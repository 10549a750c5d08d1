# SPDX-License-Identifier: GPL-2.0-or-later
"""Recorded metrics of both hosts of a pair, as the series that `promtool test rules` reads. Pure.

A recording has one sample a second. A file of tests/deploy/incidents is a valid excerpt of a
promtool test (`interval`, `input_series`); its comments say what was recorded and when, and
`marks` gives the seconds at which something was done.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

#: a sample; None: the series was not there
Values = list[float | None]
NAN_TEXT, STALE = "_", "stale"
_SERIES = re.compile(r"^  - series: '(.*)'$")
_VALUES = re.compile(r"^    values: '(.*)'$")


@dataclass(frozen=True, slots=True)
class Recording:
    """The series of one incident, all of one length."""

    title: str
    origin: str  # when, where and from what it was recorded
    marks: Mapping[str, int]
    series: Mapping[str, Values] = field(repr=False)

    @property
    def seconds(self) -> int:
        return max(map(len, self.series.values()))

    def stretched(self, start: str, end: str, seconds: int) -> Recording:
        """Return the recording with what lies between two marks repeated, for this long in all.

        Gauges repeat. Counters go on from repetition to repetition by what they counted in one.
        """
        a, b = self.marks[start], self.marks[end]
        times = -(-seconds // (b - a))
        more = (times - 1) * (b - a)
        return Recording(
            self.title,
            self.origin,
            {m: at + more * (at >= b) for m, at in self.marks.items()},
            {s: _repeat(v, a, b, times, is_counter(s)) for s, v in self.series.items()},
        )

    def repeated(self, times: int) -> Recording:
        """Return the whole recording this many times in sequence."""
        n = self.seconds
        return Recording(
            self.title,
            self.origin,
            {m: at + (times - 1) * n for m, at in self.marks.items()},
            {s: _repeat(v, 0, n, times, is_counter(s)) for s, v in self.series.items()},
        )

    def scraped(self, every: int, phase: Mapping[str, int]) -> Recording:
        """Return what scrapes see that come so often, of each `instance` from a second on.

        The marks stay in seconds.
        """
        series = {s: v[phase[instance(s)] :: every] for s, v in self.series.items()}
        return Recording(self.title, self.origin, self.marks, series)

    def input_series(self, unmarked: str = "") -> str:
        """Return the block of a promtool test.

        `unmarked`: an instance whose series end without a mark, as where an agent on the host sends
        them that dies with it.
        """
        lines = ["input_series:"]
        for name, values in self.series.items():
            text = notation(values, marks=instance(name) != unmarked)
            lines += [f"  - series: '{name}'", f"    values: '{text}'"]
        return "\n".join(lines) + "\n"


def is_counter(series: str) -> bool:
    """Return whether a series counts, by its name."""
    return metric(series).endswith("_total")


def metric(series: str) -> str:
    return series.partition("{")[0]


def instance(series: str) -> str:
    return series.partition('instance="')[2].partition('"')[0]


def _repeat(values: Values, a: int, b: int, times: int, counter: bool) -> Values:
    window = values[a:b]
    known = [v for v in values[a : b + 1] if v is not None]
    # a counter that began anew in the window has counted nothing that could go on
    step = max(0.0, known[-1] - known[0]) if counter and len(known) > 1 else 0.0
    out = values[:a]
    for n in range(times):
        out += [None if v is None else v + n * step for v in window]
    more = (times - 1) * step
    return out + [None if v is None else v + more for v in values[b:]]


# ---- promtool's notation


def notation(values: Sequence[float | None], *, marks: bool = True) -> str:
    """Return samples in promtool's notation: 1+0x9 is a 1 ten times, 1+2x3 is 1 3 5 7.

    Where a series ends between two scrapes, Prometheus marks it as stale, unless not `marks`.
    """
    words: list[str] = []
    i = 0
    while i < len(values):
        first, end = values[i], i + 1
        if first is None:
            while end < len(values) and values[end] is None:
                end += 1
            n = end - i
            if i and marks:
                words.append(STALE)
                n -= 1
            if n:
                words.append(f"{NAN_TEXT}x{n}")
        else:
            step = 0.0
            if end < len(values) and (second := values[end]) is not None:
                step = round(second - first, 6)
                while (
                    end < len(values)
                    and (v := values[end]) is not None
                    and abs(v - (first + step * (end - i))) < 1e-9
                ):
                    end += 1
            if end - i < 3 and step:
                end = i + 1
            n = end - i
            words.append(_number(first) if n == 1 else f"{_number(first)}{step:+g}x{n - 1}")
        i = end
    return " ".join(words)


def _number(v: float) -> str:
    return f"{v:.10g}"


def samples(text: str) -> Values:
    """Read promtool's notation, as far as notation() writes it."""
    out: Values = []
    for word in text.split():
        if word == STALE:
            out.append(None)
        elif m := re.fullmatch(r"_x(\d+)", word):
            out += [None] * int(m[1])
        elif m := re.fullmatch(r"(-?[\d.e]+?)([+-][\d.]+(?:e-?\d+)?)x(\d+)", word):
            out += [round(float(m[1]) + i * float(m[2]), 6) for i in range(int(m[3]) + 1)]
        else:
            out.append(float(word))
    return out


# ---- files


def dump(r: Recording) -> str:
    """Return the text of a file."""
    head = ["# SPDX-License-Identifier: GPL-2.0-or-later", f"# {r.title}"]
    head += [f"# {line}" for line in r.origin.splitlines()]
    return "\n".join(head) + f"\nmarks: {json.dumps(r.marks)}\ninterval: 1s\n" + r.input_series()


def load(text: str) -> Recording:
    """Read a file that dump() has written."""
    lines = text.splitlines()
    comments = [x[2:] for x in lines if x.startswith("# ")][1:]
    marks = next(json.loads(x[7:]) for x in lines if x.startswith("marks: "))
    names = [m[1] for x in lines if (m := _SERIES.match(x))]
    values = [samples(m[1]) for x in lines if (m := _VALUES.match(x))]
    return Recording(
        comments[0], "\n".join(comments[1:]), marks, dict(zip(names, values, strict=True))
    )


def trimmed(rows: Iterable[tuple[str, Values]], wanted: set[str]) -> Iterator[tuple[str, Values]]:
    """Leave out what no rule reads, and counters that never counted."""
    for name, values in rows:
        known = {v for v in values if v is not None}
        if metric(name) in wanted and not (is_counter(name) and known == {0.0}):
            yield name, values
