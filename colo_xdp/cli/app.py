# SPDX-License-Identifier: GPL-2.0-or-later
"""The application that the commands register with, its options and its exit codes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .. import __version__

OK, FAILED, USAGE, NOT_RUNNING, DEGRADED, DIFFER = 0, 1, 2, 3, 4, 5
EXIT_CODES: dict[int, str] = {
    OK: "done",
    FAILED: "failed",
    USAGE: "wrong usage or configuration, or refused (`run`: starting again would not help)",
    NOT_RUNNING: "no controller is running",
    DEGRADED: "running, but not protected (`status`)",
    DIFFER: "checkpoints would have been needed (`replay`)",
}
app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="COLO proxy in eBPF: two virtual machines in lock step, one of which may die.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()) + ".",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit(OK)


@app.callback()
def _options(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    pass


def fail(text: str, code: int = FAILED) -> typer.Exit:
    """Print what went wrong, and return what the caller is to raise."""
    typer.echo(text, err=True)
    return typer.Exit(code)


def print_json(document: Any) -> None:
    """Print a document for programs."""
    import json

    typer.echo(json.dumps(document, indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)
