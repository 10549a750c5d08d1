# SPDX-License-Identifier: GPL-2.0-or-later
"""Shows two byte strings one above the other, the first difference marked, for `explain`."""

from __future__ import annotations

ROW = 16


def _row(data: bytes, start: int) -> tuple[str, str]:
    part = data[start : start + ROW]
    text = "".join(chr(b) if 32 <= b < 127 else "." for b in part)
    return " ".join(f"{b:02x}" for b in part).ljust(3 * ROW - 1), text


def compare(pvm: bytes, svm: bytes, at: int, offset: int) -> list[str]:
    """Return the lines of the dump.

    Both strings begin at the same position. at: index of the first difference; offset: its position
    in the stream or datagram.
    """
    lines: list[str] = []
    for start in range(0, max(len(pvm), len(svm), 1), ROW):
        place = offset - at + start
        a, ta = _row(pvm, start)
        b, tb = _row(svm, start)
        same = pvm[start : start + ROW] == svm[start : start + ROW]
        lines.append(f"{place:>10}  {'both' if same else 'PVM '}  {a}  {ta}")
        if same:
            continue
        lines.append(f"{'':>10}  SVM   {b}  {tb}")
        if start <= at < start + ROW:
            lines.append(f"{'':>10}        {'   ' * (at - start)}^^")
    return lines
