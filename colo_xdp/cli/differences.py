# SPDX-License-Identifier: GPL-2.0-or-later
"""Commands about what the guests differ in, and what that costs: policy, explain, capture,
filter-capture, suggest, replay."""

from __future__ import annotations

import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import DIFFER, FAILED, OK, USAGE, app, fail, print_json
from .target import RUN_DIR, ConfigArg, RunDir, Where, ask, load_config, shows


class GuestName(StrEnum):
    """Whose output."""

    pvm = "pvm"
    svm = "svm"


@app.command()
def policy(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Show the rules in force and the counters of each (on the primary host)."""
    from ..tools.explain import rules_text

    typer.echo(rules_text(ask(where, run_dir, "explain")["rules"]))


@app.command()
def explain(
    where: Where = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that is known, as JSON.")
    ] = False,
    last: Annotated[int, typer.Option(min=0, help="Number of differences to show.")] = 3,
    since: Annotated[str, typer.Option(help="Only the last 90s, 15m, 2h, 1d ...")] = "",
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Explain why checkpoints were made: causes, services, rules, and the bytes that differed.

    On the primary host, which compares.
    """
    from ..tools.explain import duration, text

    try:
        oldest = time.time() - duration(since) if since else 0.0
    except ValueError as e:
        raise fail(f"--since {since}: a time such as 90s, 15m, 2h or 1d", USAGE) from e
    doc = ask(where, run_dir, "explain")
    if as_json:
        print_json(doc)
    else:
        typer.echo(text(doc, last=last, since=oldest))


@app.command()
def capture(
    out: Annotated[Path, typer.Option("-w", "--write", help="The pcapng file to write.")],
    where: Where = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Seconds to wait for more differences.")
    ] = 0,
    count: Annotated[int, typer.Option(min=1, help="Stop after this many differences.")] = 1000,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Write the differing frames of both guests to a file for Wireshark (on the primary host).

    A comment on each frame gives the position of the difference.
    """
    from ..tools.differences import from_controller
    from ..tools.pcap import PcapError

    def page(after: int, limit: int) -> list[dict[str, Any]]:
        pairs: list[dict[str, Any]] = ask(where, run_dir, "capture", after=after, limit=limit)[
            "pairs"
        ]
        return pairs

    if seconds >= 1 and shows(None):
        typer.echo(f"waiting {seconds:g} s for differences", err=True)
    try:
        n, frames = from_controller(out, page, seconds, count)
    except PcapError as e:
        raise fail(str(e)) from e
    typer.echo(f"{out}: {n} differences, {frames} frames")


@app.command("filter-capture")
def filter_capture(
    socket: Annotated[Path, typer.Argument(help="Unix socket of the filter's chardev.")],
    file: Annotated[Path, typer.Argument(help="The pcapng file to write.")],
    guest: Annotated[
        GuestName, typer.Option(help="Whose output it is: the interface's name in the file.")
    ] = GuestName.pvm,
    seconds: Annotated[float, typer.Option(min=0.1, help="Seconds after which to end.")] = 60,
    max_mib: Annotated[int, typer.Option(min=1, help="MiB of frames after which to end.")] = 1024,
    vnet_hdr: Annotated[
        bool, typer.Option(help="Whether the filter has vnet_hdr_support=on.")
    ] = True,
) -> None:
    """Write what a filter-mirror of a running QEMU sends to a file, for `replay`.

    For a pair that runs QEMU's own proxy; docs/operator/moving.md has the steps.
    """
    from ..tools.filter_capture import FilterCaptureError
    from ..tools.filter_capture import capture as read
    from ..tools.pcap import PcapError

    try:
        done = read(
            socket, file, guest=guest.value, vnet_hdr=vnet_hdr, seconds=seconds,
            max_bytes=max_mib << 20,
        )  # fmt: skip
    except (FilterCaptureError, PcapError) as e:
        raise fail(str(e)) from e
    typer.echo(f"{file}: {done.frames} frames, {done.octets} bytes; {done.ended}")


@app.command()
def suggest(config: ConfigArg, run_dir: RunDir = RUN_DIR) -> None:
    """Print changes to the configuration that would have saved checkpoints, as a diff.

    Nothing is applied.
    """
    from ..tools.suggest import changes, diff

    c = load_config(config)
    known = {
        "compare_timeout": c.compare.compare_timeout,
        "max_queue_size": c.compare.max_queue_size,
        "ring_pages": c.datapath.ring_pages,
    }
    doc, state = (ask(str(config), run_dir, what) for what in ("explain", "status"))
    wanted = changes(doc, state, known)
    if not wanted:
        typer.echo("nothing to suggest: see `colo-xdp explain`")
        return
    for change in wanted:
        typer.echo(f"# {change.why}")
    typer.echo(diff(config.read_text(), str(config), wanted), nl=False)


@app.command()
def replay(
    pvm: Annotated[Path | None, typer.Argument(help="Capture file of the PVM's tap.")] = None,
    svm: Annotated[Path | None, typer.Argument(help="Capture file of the SVM's tap.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="Use the limits and rules of this file.")
    ] = None,
    guest_mac: Annotated[
        str, typer.Option(help="MAC address of the guest, if it is not evident.")
    ] = "",
    offset_ms: Annotated[
        float, typer.Option(help="Milliseconds to add to the times of the SVM.")
    ] = 0.0,
    compare_timeout: Annotated[
        int | None, typer.Option(min=1, help="Milliseconds; overrides the configuration.")
    ] = None,
    checkpoint_ms: Annotated[
        float, typer.Option(min=0, help="Assumed duration of a checkpoint in milliseconds.")
    ] = 20.0,
    write: Annotated[
        Path | None,
        typer.Option("-w", "--write", help="Write the differing frames, as `capture` does."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the whole report as JSON.")
    ] = False,
    corpus: Annotated[bool, typer.Option(help="Play the built-in scenarios instead.")] = False,
) -> None:
    """Run two captures through the engine, offline, and report what would have left or differed.

    Exit code 5 if checkpoints would have been needed.
    """
    if corpus:
        raise typer.Exit(_corpus())
    if pvm is None or svm is None:
        raise fail("two captures are needed: of the PVM's tap and of the SVM's", USAGE)
    from dataclasses import replace

    from ..tools.differences import from_replay
    from ..tools.pcap import PcapError, read
    from ..tools.replay import MS, ReplayError, ReplayOptions, text
    from ..tools.replay import replay as play

    try:
        mac = bytes.fromhex(guest_mac.replace(":", ""))
    except ValueError:
        mac = b"?"
    if len(mac) not in (0, 6):
        raise fail(f"--guest-mac {guest_mac}: an address such as 52:54:00:00:00:01", USAGE)
    o = ReplayOptions(checkpoint_ns=int(checkpoint_ms * MS), offset_ns=int(offset_ms * MS))
    if config is not None:
        c = load_config(config)
        o = replace(o, limits=c.limits(), policy=c.policy())
    if compare_timeout is not None:
        o = replace(o, limits=replace(o.limits, compare_timeout_ns=compare_timeout * MS))
    try:
        if shows(None):
            typer.echo(f"reading {pvm} and {svm}", err=True)
        frames = [[(f.ts_ns, f.data) for f in read(path)] for path in (pvm, svm)]
        if shows(None):
            typer.echo(f"playing {sum(map(len, frames))} frames", err=True)
        r = play(frames[0], frames[1], o, mac)
        if write is not None:
            from_replay(write, r)
    except (PcapError, ReplayError) as e:
        raise fail(str(e)) from e
    report = r.report()
    if as_json:
        print_json(report)
    else:
        from ..tools.explain import difference

        typer.echo(text(report))
        for n, d in enumerate(report["differences"][:3], 1):
            typer.echo("\n" + "\n".join(difference(d, f"#{n} at {d['at_s']:.3f} s")))
    if report["checkpoints"]:
        raise typer.Exit(DIFFER)


def _corpus() -> int:
    from ..tools.corpus import load
    from ..tools.corpus.play import play

    wrong = 0
    for s in load():
        got = play(s)
        bad = [(step, out) for step, out in zip(s.steps, got, strict=True) if step.then != out]
        wrong += bool(bad)
        typer.echo(f"{'FAIL' if bad else 'ok  '}  {s.name}: {s.about}")
        for step, out in bad:
            typer.echo(f"      {step.who} {step.text}: {out or 'nothing'}, not {step.then}")
    return FAILED if wrong else OK
