# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that change a running pair: checkpoint, switchover, handover, failover, demote,
reprotect, drill, mode, reload."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import StrEnum
from typing import Annotated, Any

import typer

from .app import FAILED, NOT_RUNNING, app, fail
from .target import RUN_DIR, ProgressOpt, RunDir, Where, ask, control_socket, shows

DRILL_S = 180.0


class ModeName(StrEnum):
    """What `mode` can be set to."""

    protected = "protected"
    paused = "paused"
    shadow = "shadow"


@app.command()
def checkpoint(
    where: Where = None, progress: ProgressOpt = None, run_dir: RunDir = RUN_DIR
) -> None:
    """Make a checkpoint now, so that both guests are equal (on the primary host)."""
    r = ask(where, run_dir, "checkpoint", shows(progress))
    typer.echo(f"epoch {r['epoch']}: pause {r['pause_ms']:.1f} ms, {r['total_ms']:.1f} ms in all")


@app.command()
def switchover(
    where: Where = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps and do nothing.")
    ] = False,
    progress: ProgressOpt = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Change the guest that clients hear while both live, without losing anything; on either host.

    A checkpoint, after which the PVM is silent and the SVM takes over.
    """
    _change(where, run_dir, "switchover", dry_run=dry_run, progress=shows(progress))


@app.command()
def handover(
    where: Where = None,
    at_shutdown: Annotated[
        bool,
        typer.Option("--at-shutdown", help="Only if systemd is about to end all services here."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps and do nothing.")
    ] = False,
    progress: ProgressOpt = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Free this host of the pair: the other one serves the clients, and no new copy comes here.

    On the primary host a switchover; on the secondary host the copy is given up, and the guest goes
    on alone. `colo-xdp-handover@PAIR.service` does this when the host shuts down. `reprotect`, or a
    restart of this host's controller, allows a new copy again.
    """
    if at_shutdown:
        from ..service.shutdown import host_ends

        if not host_ends():
            typer.echo("this host does not shut down: nothing is handed over")
            return
    _change(
        where, run_dir, "handover", dry_run=dry_run, progress=shows(progress), shutdown=at_shutdown
    )


@app.command()
def failover(
    where: Where = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="You guarantee that the other guest is silent."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps and do nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    progress: ProgressOpt = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Let this host's guest go on alone: the SVM takes over, or the PVM goes solo.

    The other guest must certainly be silent: the configured fence command runs first. Without
    one, you are the fence. While both guests live, use `switchover`.
    """

    def confirm() -> None:
        if not yes and sys.stdin.isatty():
            typer.confirm("Is the other host's guest certain to be silent?", abort=True)

    _change(
        where,
        run_dir,
        "failover",
        dry_run=dry_run,
        progress=shows(progress),
        confirm=confirm,
        force=force,
    )


def _change(
    where: str | None,
    run_dir: str,
    command: str,
    *,
    dry_run: bool,
    progress: bool,
    confirm: Callable[[], None] = lambda: None,
    **args: Any,
) -> None:
    """Print the steps; carry them out unless it is a dry run."""
    plan = ask(where, run_dir, command, dry_run=True, **args)
    for i, step in enumerate(plan["steps"], 1):
        typer.echo(f"{i}. {step}")
    if dry_run:
        return
    confirm()
    r = ask(where, run_dir, command, progress, **args)
    typer.echo(f"{r['state']}: {r.get('reason', '')}")
    if not r["done"]:
        raise typer.Exit(FAILED)


@app.command("demote")
def demote(
    where: Where = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    why: Annotated[str, typer.Option(help="Reason, for the log.")] = "asked by the operator",
    progress: ProgressOpt = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Silence this host's guest now, for certain. The other guest goes on alone if it can.

    `switchover` is the gentle way. Only a new copy of the other guest is heard here again.
    """
    s = ask(where, run_dir, "status")
    if s["state"] not in ("protected", "checkpointing"):
        typer.echo(
            f"this pair is {s['state']} ({s['reason']}): there may be no guest left to go on"
        )
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Silence the guest of {s['pair']} on this host?", abort=True)
    r = ask(where, run_dir, "demote", shows(progress), why=why)
    typer.echo(f"{r['state']}: {r['reason']}")


@app.command()
def reprotect(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Give a guest that is alone a new secondary (on either host).

    On the host that lost its guest, `[qemu] incoming` starts a QEMU; without that command you
    start one with -incoming. Everything else happens by itself.
    """
    r = ask(where, run_dir, "reprotect")
    if r["here"] and not r["command"]:
        typer.echo("start this host's QEMU now, with -incoming: see `qemu.incoming` for a command")
    else:
        typer.echo("requested: see `colo-xdp status --watch`")


@app.command()
def drill(
    where: Where = None,
    run_dir: RunDir = RUN_DIR,
    wait: Annotated[float, typer.Option(help="Seconds to wait for the new secondary.")] = DRILL_S,
) -> None:
    """Exchange the roles of the hosts, protect again, and report the cost (on the primary host).

    A switchover and a re-protection. This host's QEMU has to be started anew in between:
    by `[qemu] incoming`, or by you.
    """
    from ..service.control_socket import ControlError, NotRunning
    from ..service.drill import DrillError
    from ..service.drill import drill as steps

    try:
        for line in steps(control_socket(where, run_dir), wait):
            typer.echo(line)
    except NotRunning as e:
        raise fail(str(e), NOT_RUNNING) from e
    except (ControlError, DrillError) as e:
        raise fail(str(e)) from e


@app.command()
def mode(
    name: Annotated[
        ModeName | None, typer.Argument(help="Mode to set; default: print the current one.")
    ] = None,
    where: Annotated[str | None, typer.Option("--config", help="The pair, as for status.")] = None,
    progress: ProgressOpt = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Print or set the mode of the pair.

    `protected`: normal operation. `paused`: no failover without an operator. `shadow`: compare
    the guests but hold nothing, so nothing is protected.
    """
    args = {"mode": name.value} if name else {}
    typer.echo(ask(where, run_dir, "mode", shows(progress), **args)["mode"])


@app.command()
def reload(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Read the rules of the configuration file again, as SIGHUP does, and report the result."""
    n = ask(where, run_dir, "reload")["rules"]
    typer.echo(f"{n} rules; changes take effect with the next checkpoint")
