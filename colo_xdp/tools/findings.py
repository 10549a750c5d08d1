# SPDX-License-Identifier: GPL-2.0-or-later
"""The findings of `doctor`: what they are made of, as text and as JSON, of one host or both. Pure.

tools/doctor.py makes them, tools/mend.py carries out a Fix.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import zip_longest
from typing import Any

from ..validate import printable

SCHEMA = 1
CLOCKS_S = 2.0  # a difference between the hosts' clocks that a person will wonder about


class Level(IntEnum):
    """How bad a finding is."""

    OK = 0
    WARN = 1
    FAIL = 2

    @property
    def label(self) -> str:
        """Return its name in the JSON."""
        return self.name.lower()

    @property
    def mark(self) -> str:
        """Return the beginning of its line in the text."""
        return "FAIL" if self is Level.FAIL else f"{self.label:<4}"


OK, WARN, FAIL = Level


class FixKind(StrEnum):
    """What `--fix` can do."""

    LINK_UP = "link_up"
    JOIN_BRIDGE = "join_bridge"
    QUICKACK = "quickack"
    RUN_DIR = "run_dir"
    KEY_MODE = "key_mode"


@dataclass(frozen=True, slots=True)
class Fix:
    """A remedy that is safe: it loses nothing, and `undo` takes it back.

    `in_path`: the guest's frames may pass what it changes, so it is not for beside a controller.
    """

    kind: FixKind
    args: tuple[str, ...]
    command: str  # what a person would type
    undo: str
    in_path: bool = False


def link_up(device: str) -> Fix:
    command = f"ip link set {device} up"
    return Fix(FixKind.LINK_UP, (device,), command, f"ip link set {device} down", in_path=True)


def join_bridge(tap: str, bridge: str) -> Fix:
    command = f"ip link set {tap} master {bridge}"
    undo = f"ip link set {tap} nomaster"
    return Fix(FixKind.JOIN_BRIDGE, (tap, bridge), command, undo, in_path=True)


def quickack(address: str, command: str) -> Fix:
    return Fix(FixKind.QUICKACK, (address,), command, f"ip route del {address}")


def run_dir(path: str) -> Fix:
    return Fix(FixKind.RUN_DIR, (path,), f"install -d -m 0750 {path}", f"rmdir {path}")


def key_mode(path: str, now: int) -> Fix:
    return Fix(FixKind.KEY_MODE, (path,), f"chmod 600 {path}", f"chmod {now:o} {path}")


@dataclass(frozen=True, slots=True)
class Check:
    """One finding; `remedy` says what to do about it, `nic` which of several NICs it is about."""

    key: str
    level: Level
    text: str
    remedy: str = ""
    fix: Fix | None = None
    nic: str = ""

    @property
    def title(self) -> str:
        return f"{self.key} ({self.nic})" if self.nic else self.key

    def lines(self) -> list[str]:
        """Return the finding as text."""
        out = [f"{self.level.mark}  {self.title}: {self.text}"]
        return out + [f"      -> {self.remedy}"] * bool(self.remedy)

    def to_json(self) -> dict[str, Any]:
        return {
            "key": self.key,
            "nic": self.nic,
            "level": self.level.label,
            "text": self.text,
            "remedy": self.remedy,
            "fix": self.fix.command if self.fix else None,
        }

    @classmethod
    def from_json(cls, doc: Any) -> Check:
        """Read a finding, without its fix: that is for its own host. Raises ValueError."""
        try:
            key, nic, text, remedy = (
                printable(str(doc[k])[:4000]) for k in ("key", "nic", "text", "remedy")
            )
            return cls(key, Level[str(doc["level"]).upper()], text, remedy, nic=nic)
        except (KeyError, TypeError) as e:
            raise ValueError(f"not a finding: {e!r}") from e


def worst(checks: Iterable[Check]) -> Level:
    """Return the level of the worst finding."""
    return max((c.level for c in checks), default=OK)


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was found on one host. `controller`: whether one of this pair runs there."""

    pair: str
    role: str
    host: str
    release: str
    controller: bool
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "pair": self.pair,
            "role": self.role,
            "host": self.host,
            "release": self.release,
            "controller": self.controller,
            "level": worst(self.checks).label,
            "checks": [c.to_json() for c in self.checks],
        }

    @classmethod
    def from_json(cls, doc: Any) -> Report:
        """Read a report; keys that are not known are ignored. Raises ValueError."""
        try:
            pair, role, host, release = (
                printable(str(doc[k])[:200]) for k in ("pair", "role", "host", "release")
            )
            checks = tuple(map(Check.from_json, doc["checks"]))
            return cls(pair, role, host, release, doc["controller"] is True, checks)
        except (KeyError, TypeError) as e:
            raise ValueError(f"not a report of doctor: {e!r}") from e


def between(ours: Report, theirs: Report, ahead_s: float, blur_s: float) -> list[Check]:
    """Return the findings about the two hosts together.

    `ahead_s`: the other host's clock minus ours, known to within `blur_s`.
    """
    out = []
    if ours.release != theirs.release:
        out.append(Check(
            "releases", WARN, f"{ours.host} has {ours.release}, {theirs.host} {theirs.release}",
            "install the same on both hosts",
        ))  # fmt: skip
    else:
        out.append(Check("releases", OK, f"both hosts have {ours.release}"))
    if abs(ahead_s) > CLOCKS_S + blur_s:
        far = f"{abs(ahead_s):.0f} s {'ahead of' if ahead_s > 0 else 'behind'}"
        out.append(Check(
            "clocks", WARN, f"{theirs.host}'s clock is {far} that of {ours.host}: certificates "
            "begin and end at different times, and the logs do not match",
            "let both follow a time server (chrony, systemd-timesyncd)",
        ))  # fmt: skip
    else:
        out.append(Check("clocks", OK, f"they agree to within {max(CLOCKS_S, blur_s):g} s"))
    return out


def _lines(check: Check | None) -> list[str]:
    return [] if check is None else [check.text, *([f"-> {check.remedy}"] * bool(check.remedy))]


def columns(ours: Report, theirs: Report) -> list[str]:
    """Return both reports side by side: a line with both levels for each finding, then the texts.

    Findings with the same title belong together, in the order of their hosts.
    """

    def by_title(checks: Sequence[Check]) -> dict[str, list[Check]]:
        out: dict[str, list[Check]] = {}
        for c in checks:
            out.setdefault(c.title, []).append(c)
        return out

    here, there = by_title(ours.checks), by_title(theirs.checks)
    same = ours.host == theirs.host  # in a laboratory
    names = (ours.role, theirs.role) if same else (ours.host, theirs.host)
    width = max(4, *map(len, names))
    out = ["  ".join(f"{name:<{width}}" for name in names).rstrip()]
    for title in dict.fromkeys([*here, *there]):
        for a, b in zip_longest(here.get(title, []), there.get(title, [])):
            marks = (c.level.mark if c else "-" for c in (a, b))
            out.append("  ".join(f"{m:<{width}}" for m in marks) + f"  {title}")
            pad = " " * (2 * width + 4)
            if a and b and _lines(a) == _lines(b):
                out += [f"{pad}  {line}" for line in _lines(a)]
                continue
            for host, check in zip(names, (a, b), strict=True):
                lines = _lines(check)
                out += [f"{pad}  {host}: {line}" for line in lines[:1]]
                out += [f"{pad}    {line}" for line in lines[1:]]
    return out


def shortened(report: Mapping[str, Any], fits: Any) -> dict[str, Any]:
    """Return a report's JSON that `fits` accepts: texts are cut, then the last findings left out.

    A control channel's message has a largest size.
    """
    out = dict(report)
    checks = [
        {k: v[:500] if isinstance(v, str) else v for k, v in c.items()} for c in out["checks"]
    ]
    # The worst ones are kept.
    while checks and not fits(out | {"checks": checks}):
        levels = [Level[c["level"].upper()] for c in checks]
        least = min(levels)
        del checks[len(levels) - 1 - levels[::-1].index(least)]
    return out | {"checks": checks}
