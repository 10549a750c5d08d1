# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands for one host: run the controller, check what it needs, compile, clean up."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from . import target
from .app import FAILED, OK, USAGE, app, fail, print_json
from .target import BPFFS, CONFIG_DIR, RUN_DIR, STATE_DIR, ConfigArg, RunDir, load_config


@app.command()
def run(config: ConfigArg) -> None:
    """Run the controller of one pair on this host until SIGTERM.

    The data path stays in place when the controller ends; the next controller adopts it.
    """
    c = load_config(config)
    from ..service.daemon import run as daemon

    raise typer.Exit(daemon(c))


@app.command()
def doctor(
    config: ConfigArg,
    peer: Annotated[
        bool, typer.Option("--peer", help="Ask the other host, too, and compare the two.")
    ] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Do what is safe, print it before, and look again."),
    ] = False,
    before_start: Annotated[
        bool, typer.Option("--before-start", help="QEMU is not to run yet: only warn of that.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this host for everything that would keep a pair from working, with remedies.

    Beside a running controller that one is asked for what it occupies. `--peer` needs a running
    controller on both hosts. `--fix` brings devices up, puts the tap of a guest that transmits into
    its bridge, gives the route of the migration quickack, makes the run_dir and hides a key from
    others; what the guest's frames pass is left alone while a controller runs. Exit code 1 if
    something fails, on either host; warnings count as done.
    """
    from ..service.doctor import run as examine

    def say(text: str) -> None:
        if not as_json:
            typer.echo(text)

    def tell(text: str) -> None:
        typer.echo(text, err=as_json)

    failed, doc = examine(config, say=say, tell=tell, peer=peer, fix=fix, before_start=before_start)
    if as_json:
        print_json(doc)
    raise typer.Exit(FAILED if failed else OK)


@app.command(name="compile")
def compile_(
    configs: Annotated[
        list[Path] | None,
        typer.Argument(help=f"TOML files of pairs; default: all in {CONFIG_DIR}."),
    ] = None,
) -> None:
    """Compile the programs of pairs for every role, so that no controller has to wait for them.

    A controller compiles what is missing itself. After an upgrade of colo-xdp, of the kernel or of
    bcc, this takes the seconds that the compiler needs out of the restart. It fails if a restarted
    controller would have to compile all the same, or could not take over what is pinned.
    """
    from ..tools.compile import Uncompiled, compile_for

    paths = configs or sorted(Path(target.CONFIG_DIR).glob("*.toml"))
    if not paths:
        raise fail(f"no TOML file in {target.CONFIG_DIR}: name one", USAGE)
    for path in paths:
        config = load_config(path)
        try:
            for line in compile_for(config):
                typer.echo(line)
        except Uncompiled as e:
            raise fail(f"{path}: {e}") from e


@app.command()
def cleanup(
    config: Annotated[Path | None, typer.Argument(help="TOML file of the pair.")] = None,
    pair: Annotated[str | None, typer.Option(help="Name of the pair, if there is no file.")] = None,
    bpffs: Annotated[str, typer.Option(help="BPF file system with the pins.")] = BPFFS,
    force: Annotated[
        bool, typer.Option(help="You guarantee that no guest can transmit that must not.")
    ] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Remove the programs, pins and sockets of a pair from this host, and nothing else.

    Afterwards frames flow as if colo-xdp had never been installed, so use it when the pair is no
    longer needed. Refused while the programs keep a guest silent whose QEMU is alive.

    The mark of a guest that ran standalone here is kept: the next start must know of it.
    """
    from ..service.mark_file import paths
    from ..tools.cleanup import GuestWouldTransmit, StillRunning
    from ..tools.cleanup import cleanup as clean

    state_dir = STATE_DIR
    if config is not None:
        c = load_config(config)
        pair, bpffs, run_dir = c.pair, c.datapath.bpffs, c.datapath.run_dir
        state_dir = c.datapath.state_dir
    if pair is None:
        raise fail("name the pair: a config file, or --pair", USAGE)
    try:
        gone = clean(pair, bpffs, run_dir, force=force)
    except GuestWouldTransmit as e:
        raise fail(f"{e}; use `--force` if it may transmit") from e
    except StillRunning as e:
        raise fail(str(e)) from e
    for line in gone:
        typer.echo(f"removed {line}")
    if not gone:
        typer.echo("nothing to remove")
    for path in paths(state_dir, pair).values():
        if os.path.exists(path):  # False where that directory cannot be read
            typer.echo(f"kept {path}: a guest ran standalone here, so its disks may be the newest")
