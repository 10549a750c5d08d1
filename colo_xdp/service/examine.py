# SPDX-License-Identifier: GPL-2.0-or-later
"""Run this host's `colo-xdp doctor` for the other host, which has asked the controller for it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import Any

from .. import user_command
from ..config.file import Config
from ..controller.checkup import EXAMINE_S
from ..peer import messages
from ..tools.findings import shortened


def fits(report: dict[str, Any]) -> bool:
    """Return whether a report is small enough for a message of the control channel."""
    text = json.dumps(report, separators=(",", ":"))
    # The message has it as a string, in which quotation marks take two bytes.
    return len(text) <= messages.MAX_FLOWS_TEXT and len(json.dumps(text)) < messages.MAX_LINE - 1024


def compact(output: bytes) -> str:
    """Return a report of `doctor --json`, as it is sent. Raises ValueError."""
    try:
        report = json.loads(output)
        small = shortened({k: v for k, v in report.items() if k in REPORT}, fits)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"doctor has printed no report: {e!r}") from e
    return json.dumps(small, separators=(",", ":"))


#: where this package is: not where Python looks by itself if Debian's package has brought it, and
#: systemd-run passes no PYTHONPATH
PACKAGE = Path(__file__).resolve().parents[2]
_RUN = (
    "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); "
    "runpy.run_module('colo_xdp.cli', run_name='__main__', alter_sys=True)"
)
REPORT = ("schema", "pair", "role", "host", "release", "controller", "level", "checks")


async def examine(config: Config) -> str:
    """Run doctor and return its report. The caller has the deadline. Raises ValueError, OSError."""
    if config.path is None:
        raise ValueError("this configuration came from no file")
    argv = [sys.executable, "-P", "-c", _RUN, str(PACKAGE), "doctor", "--json", str(config.path)]
    child = await asyncio.create_subprocess_exec(
        *user_command.examine(config.pair, argv, round(EXAMINE_S * 1000)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=user_command.environment(),
    )
    try:
        output, _ = await child.communicate()
    finally:
        if child.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()
    return compact(output)
