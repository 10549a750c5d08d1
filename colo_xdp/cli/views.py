# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands that show what the pairs of this host do: status, list, events, flows."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import deque
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import target
from .app import DEGRADED, USAGE, app, fail, print_json
from .target import RUN_DIR, RunDir, Where, ask, config_of, control_socket, load_config

BETWEEN_S = 0.5  # between the two looks of `status`
FOLLOW_S = 0.5  # between two looks at the events
WINDOW = 10  # seconds of which `status --watch` tells
ANSWER_S = 5.0  # for one view of `status --watch`


class SortName(StrEnum):
    """What `flows` shows first."""

    bytes = "bytes"
    wait = "wait"
    idle = "idle"


@app.command()
def status(
    where: Where = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the status document as JSON.")
    ] = False,
    watch: Annotated[
        bool, typer.Option(help="Show it again every second: on a terminal as a live view.")
    ] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Show at a glance what the pair is doing, and why. Exit code 4 if it is not protected.

    The text is of two looks half a second apart, for the throughput; `--json` is of one.
    """
    from ..status.text import text

    s = ask(where, run_dir, "status")
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(where, run_dir, s, as_json=as_json)
        return
    if as_json:
        print_json(s)
    else:
        time.sleep(BETWEEN_S)
        before, s = s, ask(where, run_dir, "status")
        typer.echo(text(s, time.time(), before))
    if s["state"] not in ("protected", "checkpointing", "paused", "shadow"):
        raise typer.Exit(DEGRADED)


def _watch(where: str | None, run_dir: str, s: dict[str, Any], *, as_json: bool) -> None:
    """Show the status every second until Ctrl-C. A controller that is away is waited for."""
    from ..service.control_socket import ControlError, request
    from ..status.glance import glance
    from ..status.live import view
    from ..status.text import plain

    path, note = control_socket(where, run_dir), ""
    past = deque([s], WINDOW)  # what is seen, for the figures of the last seconds
    live = sys.stdout.isatty() and not as_json
    with view() if live else contextlib.nullcontext(None) as show:
        while True:
            if show is not None:
                show(glance(s, time.time(), past[-1], past[0]), note)
            elif note:
                typer.echo(note, err=True)
            elif as_json:
                print_json(s)
            else:
                typer.echo(plain(glance(s, time.time(), past[-1], past[0])) + "\n")
            time.sleep(1)
            try:
                now = request(path, "status", timeout=ANSWER_S)
            except ControlError as e:
                note = str(e)
                with contextlib.suppress(typer.Exit):  # the roles may have changed
                    path = control_socket(where, run_dir)
            else:
                past.append(s)
                s, note = now, ""


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """List all pairs of this host, with state and health, whether or not a controller runs."""
    from ..service.pairs import only, pairs
    from ..status.text import pairs as table

    rows = pairs(Path(target.CONFIG_DIR), Path(run_dir))
    if as_json:
        print_json(only(rows))
    else:
        none = f"no pair: no file in {target.CONFIG_DIR}, none in {run_dir}"
        typer.echo(table(rows) if rows else none)


@app.command()
def events(
    where: Where = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Print what comes, until Ctrl-C.")
    ] = False,
    since: Annotated[str, typer.Option(help="Only the last 90s, 15m, 2h, 1d ...")] = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print each event as a line of JSON.")
    ] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Tell what happened on this host, in sentences: states, failover steps, starts, commands.

    The events are kept across restarts and changes of role. No controller needs to run.
    """
    import json

    from ..service.event_log import Reader
    from ..service.event_log import follow as following
    from ..status.events import line
    from ..tools.explain import duration

    try:
        oldest = time.time() - duration(since) if since else 0.0
    except ValueError as e:
        raise fail(f"--since {since}: a time such as 90s, 15m, 2h or 1d", USAGE) from e

    def show(found: Iterable[dict[str, Any]]) -> None:
        for e in found:
            if e["t"] >= oldest:
                typer.echo(json.dumps(e) if as_json else line(e))

    readers = [Reader(path) for path in _event_files(where, run_dir)]
    try:
        if follow:
            with contextlib.suppress(KeyboardInterrupt):
                show(following(readers, FOLLOW_S))
        else:
            show(sorted((e for r in readers for e in r.poll()), key=lambda e: e["t"]))
    except OSError as e:
        raise fail(f"{e.filename}: {e.strerror}") from e


def _event_files(where: str | None, run_dir: str) -> list[Path]:
    """The files with the events of the pair that is meant."""
    from ..service.event_log import paths

    if where is None:
        configs = sorted(Path(target.CONFIG_DIR).glob("*.toml"))
        if len(configs) == 1:
            where = str(configs[0])
    elif "/" not in where and config_of(where).exists():
        where = str(config_of(where))
    if where is not None and where.endswith(".toml"):
        return list(dict.fromkeys(paths(load_config(Path(where)))))
    return [Path(ask(where, run_dir, "status")["event_log"]["path"])]


@app.command()
def flows(
    where: Where = None,
    sort: Annotated[
        SortName, typer.Option(help="Show first what has sent most, waits or is idle longest.")
    ] = SortName.bytes,
    proto: Annotated[str, typer.Option(help="Only tcp, udp, icmp ...")] = "",
    port: Annotated[int, typer.Option(min=0, help="Only of this service.")] = 0,
    peer: Annotated[str, typer.Option(help="Only with this address at the other end.")] = "",
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Number of flows to show.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """List the guest's connections: bytes sent (modulo 4 GiB), waits, and who decides about them.

    On the primary host. `kernel`: the fast path; `controller`: the slow path; `watched` and
    `uncompared`: by a rule.
    """
    from ..status.text import flows as table

    doc = ask(
        where, run_dir, "flows", sort=sort.value, proto=proto, port=port, peer=peer, limit=limit
    )
    if as_json:
        print_json(doc)
    else:
        typer.echo(table(doc))
