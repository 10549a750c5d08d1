# SPDX-License-Identifier: GPL-2.0-or-later
"""Suggest configuration changes that would have saved checkpoints. Pure; nothing is applied.

The suggestions are cautious on purpose: a cause counts from MIN_SEEN checkpoints on, and a change
that lowers the protection says so. `colo-xdp suggest` prints them.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from ..compare.causes import Cause
from ..config.file import ConfigError, parse
from ..engine.waits import WAIT_BUCKETS

MIN_SEEN = 5
_DIFFERS = (Cause.PAYLOAD_DIFFERS, Cause.DATAGRAM_DIFFERS, Cause.FIN_DIFFERS)


@dataclass(frozen=True, slots=True)
class Change:
    """One change: the reason, and either a key of a section or lines to append."""

    why: str
    section: str = ""
    key: str = ""
    value: str = ""
    rule: tuple[str, ...] = ()


def _quantile(buckets: list[int], q: float) -> float | None:
    """Return the upper bound (s) of the bucket with the quantile; None: above all, or empty."""
    left: float = q * sum(buckets)
    for n, bound in zip(buckets, WAIT_BUCKETS, strict=False):
        left -= n
        if left <= 0 and any(buckets):
            return bound
    return None


def changes(
    explain: dict[str, Any], status: dict[str, Any], config: dict[str, int]
) -> list[Change]:
    """Return the suggested changes.

    `config` has compare_timeout, max_queue_size and ring_pages.
    """
    out: list[Change] = []
    done = [e for e in explain["entries"] if not e["failed"]]
    causes = Counter(e["cause"] for e in done)
    places = Counter((e["proto"], e["port"]) for e in done if e["cause"] in _DIFFERS and e["port"])
    taken = {r["name"] for r in explain["rules"]}
    for (proto, port), n in places.most_common(4):
        name = f"suggested-{proto}-{port}"
        if n < MIN_SEEN or name in taken or n < 0.1 * len(done):
            continue
        pause = sum(e["pause_ms"] for e in done if (e["proto"], e["port"]) == (proto, port))
        out.append(
            Change(
                f"{n} of {len(done)} checkpoints came from differences on {proto} port {port} "
                f"({pause:.0f} ms of pause). With this rule its bytes leave uncompared: after a "
                "failover a client of this port may find its connection broken",
                rule=(
                    "[[rule]]", f'name = "{name}"', 'action = "mirror-only"',
                    f'protocol = "{proto}"', f'port = "{port}"',
                ),
            )
        )  # fmt: skip
    out += _limits(causes, status, config)
    return out


def _limits(causes: Counter[str], status: dict[str, Any], config: dict[str, int]) -> list[Change]:
    out: list[Change] = []
    late = causes[Cause.COMPARE_TIMEOUT] + causes[Cause.SVM_AHEAD]
    slow = _quantile(status["wait"]["buckets"], 0.999)
    timeout = config["compare_timeout"]
    if late >= MIN_SEEN and slow is not None and slow * 1000 > timeout / 4:
        out.append(
            Change(
                f"{late} checkpoints came from compare_timeout, and one frame in a thousand waits "
                f"about {slow * 1000:.0f} ms: the SVM is slow, not different",
                "compare", "compare_timeout", str(min(2 * timeout, 60_000)),
            )
        )  # fmt: skip
    elif late >= MIN_SEEN and slow is not None and slow * 1000 * 20 < timeout:
        out.append(
            Change(
                f"{late} checkpoints waited the whole compare_timeout, while all but one frame in "
                f"a thousand leave within {slow * 1000:.1f} ms: request the checkpoint sooner",
                "compare", "compare_timeout", str(max(100, int(slow * 1000 * 20))),
            )
        )  # fmt: skip
    full = causes[Cause.QUEUE_FULL]
    if full >= MIN_SEEN:
        out.append(
            Change(
                f"{full} checkpoints came from a full queue",
                "compare", "max_queue_size", str(min(4 * config["max_queue_size"], 1 << 20)),
            )
        )  # fmt: skip
    lost = causes[Cause.EVENT_LOST]
    if lost >= MIN_SEEN:
        out.append(
            Change(
                f"{lost} checkpoints came from events that did not fit into the ring",
                "datapath", "ring_pages", str(min(2 * config["ring_pages"], 262_144)),
            )
        )  # fmt: skip
    return out


def _set(lines: list[str], c: Change) -> list[str]:
    """Set one key of one section: where it already is, or at the start of the section."""
    head = re.compile(rf"^\s*\[{c.section}\]\s*(#.*)?$")
    new = f"{c.key} = {c.value}"
    why = f"# {c.why}"
    inside, at = False, None
    for i, line in enumerate(lines):
        if head.match(line):
            inside, at = True, i
        elif line.lstrip().startswith("["):
            inside = False
        elif inside and re.match(rf"^\s*{c.key}\s*=", line):
            return [*lines[:i], why, new, *lines[i + 1 :]]
    if at is not None:
        return [*lines[: at + 1], why, new, *lines[at + 1 :]]
    first = next((i for i, x in enumerate(lines) if x.lstrip().startswith("[[rule")), len(lines))
    return [*lines[:first], f"[{c.section}]", why, new, "", *lines[first:]]


def apply(text: str, wanted: list[Change]) -> str:
    """Return the configuration with the changes applied.

    Raises ConfigError when the result could not be loaded.
    """
    lines = text.splitlines()
    for c in wanted:
        if c.rule:
            lines += ["", f"# {c.why}", *c.rule]
        else:
            lines = _set(lines, c)
    result = "\n".join(lines) + "\n"
    parse(result)
    return result


def diff(text: str, path: str, wanted: list[Change]) -> str:
    """Return the changes as a unified diff of the file; empty if there is nothing to suggest."""
    if not wanted:
        return ""
    new = apply(text, wanted)
    return "".join(
        difflib.unified_diff(
            text.splitlines(keepends=True),
            new.splitlines(keepends=True),
            path,
            f"{path} (suggested)",
        )
    )


__all__ = ["Change", "ConfigError", "apply", "changes", "diff"]
