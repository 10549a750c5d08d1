# SPDX-License-Identifier: GPL-2.0-or-later
"""Run `colo-xdp doctor`: examine, mend what is safe, and put the other host beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.file import Config, ConfigError, load
from ..tools import mend
from ..tools.doctor import Beside, examine, report
from ..tools.findings import FAIL, WARN, Check, Fix, Report, columns, worst
from . import ask
from .control_socket import ControlError

Say = Callable[[str], None]


def run(
    path: Path, *, say: Say, tell: Say, peer: bool, fix: bool, before_start: bool
) -> tuple[bool, dict[str, Any]]:
    """Examine this host; return whether something fails, and everything as JSON.

    `say` prints the findings, `tell` what is about to be done.
    """
    config = _config(path)
    beside = ask.beside(config) if config else None
    printed = say if not (peer or fix) else _nothing
    checks = _examine(path, beside, printed, before_start=before_start)
    fixed: list[dict[str, Any]] = []
    if fix:
        fixed = mended(checks, tell, runs=_runs(config, beside))
        if any(f["done"] for f in fixed):
            beside = ask.beside(config) if config else None
            checks = _examine(path, beside, _nothing, before_start=before_start)
        if not peer:
            _print(checks, say)
    ours = report(path, checks, controller=beside is not None)
    doc: dict[str, Any] = ours.to_json() | {"fixed": fixed}
    failed = worst(checks) == FAIL
    if peer and config:
        theirs, both = _other(config, ours, say)
        doc |= {"peer": theirs.to_json() if theirs else None, "both": [c.to_json() for c in both]}
        failed |= worst([*both, *(theirs.checks if theirs else ())]) == FAIL
    return failed, doc


def _nothing(text: str) -> None:
    pass


def _config(path: Path) -> Config | None:
    try:
        return load(path)
    except (ConfigError, OSError):
        return None  # the first check says so


def _runs(config: Config | None, beside: Beside | None) -> bool:
    from ..tools import preflight

    return beside is not None or (config is not None and preflight.running(config) != 0)


def _print(checks: list[Check], say: Say) -> None:
    for check in checks:
        for line in check.lines():
            say(line)


def _examine(path: Path, beside: Beside | None, say: Say, *, before_start: bool) -> list[Check]:
    checks = []
    for check in examine(path, beside, before_start=before_start):
        checks.append(check)
        _print([check], say)
    return checks


def mended(checks: list[Check], say: Say, *, runs: bool) -> list[dict[str, Any]]:
    """Carry out each fix once. `runs`: a controller does, whose data path is left alone."""
    out = []
    wanted: dict[str, Fix] = {c.fix.command: c.fix for c in checks if c.fix}
    for command, fix in wanted.items():
        why = ""
        if fix.in_path and runs:
            why = "a controller of this pair runs, whose data path that is: do it yourself"
            say(f"left  {command}: {why}")
        else:
            say(f"fix   {command}   (undo: {fix.undo})")
            try:
                mend.mend(fix)
            except mend.NotMended as e:
                why = str(e)
                say(f"      failed: {why}")
        out.append({"command": command, "undo": fix.undo, "done": not why, "why": why})
    return out


def _other(config: Config, ours: Report, say: Say) -> tuple[Report | None, list[Check]]:
    """Ask the other host, and print both reports side by side; else ours, and why there is none."""
    theirs: Report | None = None
    try:
        theirs, both = ask.other_host(config, ours)
    except ControlError as e:
        both = [Check("other host's doctor", WARN, str(e), f"colo-xdp doctor {config.path}, there")]
        _print(list(ours.checks), say)
    else:
        for line in columns(ours, theirs):
            say(line)
    _print(both, say)
    return theirs, both
