# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that make a pair of their own on this machine: demo, vhost-drill."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import app


@app.command()
def demo(
    report: Annotated[str, typer.Option(help="File for the JSON report.")] = (
        "build/demo-report.json"
    ),
    keep: Annotated[bool, typer.Option(help="Leave everything running afterwards.")] = False,
) -> None:
    """Protect a Debian guest on this machine, kill its QEMUs in turn, and show what lives."""
    from ..lab.demo import main as demo_main

    raise typer.Exit(demo_main(report, keep))


@app.command("vhost-drill")
def vhost_drill(
    queues: Annotated[int, typer.Option(min=1, max=64, help="Queues of each guest's card.")] = 1,
    directory: Annotated[
        Path, typer.Option("--dir", help="Directory of the guest's image and of the logs.")
    ] = Path("build"),
    control: Annotated[
        bool, typer.Option("--control", help="The same without vhost: what must pass anywhere.")
    ] = False,
) -> None:
    """Try a pair with vhost=on on this machine, and print PASS or FAIL for each expectation.

    Nobody has tried this yet: it needs /dev/vhost-net, and exits with 2 where there is none. It
    builds its own pair in network namespaces, like `demo`, and touches nothing else.
    """
    from ..lab.vhost_drill import main as drill_main

    raise typer.Exit(drill_main(directory, queues, control=control))
