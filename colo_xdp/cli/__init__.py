# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: the only package that imports typer.

Each module has the commands of one purpose. Heavy modules are imported by the command that needs
them, so that `status` and `--help` answer at once and without bcc.

EXIT_CODES lists the exit codes. The help texts are the source of docs/reference/cli.md, which
tests/docs/generate.py writes.
"""

from __future__ import annotations

from . import differences, host, laboratory, operations, setup, views
from .app import DEGRADED, DIFFER, EXIT_CODES, FAILED, NOT_RUNNING, OK, USAGE, app
from .target import BPFFS, CONFIG_DIR, RUN_DIR

__all__ = [
    "BPFFS", "CONFIG_DIR", "DEGRADED", "DIFFER", "EXIT_CODES", "FAILED", "NOT_RUNNING", "OK",
    "RUN_DIR", "USAGE", "app", "differences", "host", "laboratory", "main", "operations", "setup",
    "views",
]  # fmt: skip
#: the commands as `--help` and docs/reference/cli.md list them
ORDER = (
    "run", "status", "list", "events", "flows",
    "checkpoint", "switchover", "handover", "failover", "demote", "reprotect", "drill",
    "mode", "reload",
    "policy", "explain", "capture", "filter-capture", "suggest", "replay",
    "doctor", "compile", "demo", "vhost-drill", "cleanup",
    "init", "join", "leave", "version",
)  # fmt: skip
app.registered_commands.sort(
    key=lambda c: ORDER.index(c.name or getattr(c.callback, "__name__", ""))
)


def main() -> None:
    """Entry point."""
    app()
