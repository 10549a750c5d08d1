# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: the only module that imports typer.

Heavy modules are imported by the command that needs them, so that `status` and
`--help` answer at once and without bcc.

EXIT_CODES lists the exit codes. The help texts are the source of docs/reference/cli.md, which
tests/docs/generate.py writes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__

OK, FAILED, USAGE, NOT_RUNNING, DEGRADED, DIFFER = 0, 1, 2, 3, 4, 5
EXIT_CODES: dict[int, str] = {
    OK: "done",
    FAILED: "failed",
    USAGE: "wrong usage or configuration, or refused (`run`: starting again would not help)",
    NOT_RUNNING: "no controller is running",
    DEGRADED: "running, but not protected (`status`)",
    DIFFER: "checkpoints would have been needed (`replay`)",
}
RUN_DIR = "/run/colo-xdp"
BPFFS = "/sys/fs/bpf"
CONFIG_DIR = "/etc/colo-xdp"
BETWEEN_S = 0.5  # between the two looks of `status`
FOLLOW_S = 0.5  # between two looks at the events
WINDOW = 10  # seconds of which `status --watch` tells
ANSWER_S = 5.0  # for one view of `status --watch`

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="COLO proxy in eBPF: two virtual machines in lock step, one of which may die.",
    epilog="Exit codes: " + "; ".join(f"{code} {text}" for code, text in EXIT_CODES.items()) + ".",
)
config_app = typer.Typer(no_args_is_help=True, help="Check or print a configuration file.")
app.add_typer(config_app, name="config")
pki_app = typer.Typer(
    no_args_is_help=True, help="Create certificates for the control channel of a pair."
)
app.add_typer(pki_app, name="pki")

ConfigArg = Annotated[Path, typer.Argument(help="TOML file of the pair on this host.")]
Where = Annotated[
    str | None,
    typer.Argument(
        help="Name, TOML file or control socket of the pair; default: the only one that runs here."
    ),
]
RunDir = Annotated[
    str, typer.Option(help="Directory of the control sockets.", envvar="COLO_XDP_RUN_DIR")
]


class RoleName(StrEnum):
    """Whose certificate."""

    primary = "primary"
    secondary = "secondary"


class GuestName(StrEnum):
    """Whose output."""

    pvm = "pvm"
    svm = "svm"


ProgressOpt = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Say on stderr what it waits for, after a second; default: if that is a terminal.",
        show_default=False,
    ),
]


class SortName(StrEnum):
    """What `flows` shows first."""

    bytes = "bytes"
    wait = "wait"
    idle = "idle"


class ModeName(StrEnum):
    """What `mode` can be set to."""

    protected = "protected"
    paused = "paused"
    shadow = "shadow"


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


def _fail(text: str, code: int = FAILED) -> typer.Exit:
    typer.echo(text, err=True)
    return typer.Exit(code)


def _load(path: Path) -> Any:
    from .config.file import ConfigError, load

    try:
        return load(path)
    except ConfigError as e:
        raise _fail(str(e), USAGE) from e
    except OSError as e:
        raise _fail(f"{path}: {e.strerror}", USAGE) from e


def _socket(where: str | None, run_dir: str) -> str:
    """The control socket meant: named, of a config, or the only one there is."""
    from .service.control_socket import NotRunning, SeveralRun, find

    if where is not None:
        path = Path(where)
        if path.suffix == ".sock" or path.is_socket():
            return where
        if "/" in where or path.suffix == ".toml" or path.exists():
            return _socket_of(path)
    try:
        return find(run_dir, where or "")
    except NotRunning as e:
        if where is not None and (path := _config_of(where)).exists():
            return _socket_of(path)  # it may have another run_dir
        raise _fail(str(e), NOT_RUNNING) from e
    except SeveralRun as e:
        raise _fail(str(e), USAGE) from e


def _config_of(name: str) -> Path:
    return Path(CONFIG_DIR) / f"{name}.toml"


def _socket_of(path: Path) -> str:
    from .service.pairs import socket_of

    return socket_of(_load(path))


def _ask(
    where: str | None, run_dir: str, command: str, progress: bool = False, **args: Any
) -> dict[str, Any]:
    from .controller.command import Command
    from .service.control_socket import ControlError, NotRunning, request
    from .service.progress import watched

    path = _socket(where, run_dir)
    try:
        if progress:
            return watched(path, Command(command), args, lambda text: typer.echo(text, err=True))
        return request(path, Command(command), args)
    except NotRunning as e:
        raise _fail(str(e), NOT_RUNNING) from e
    except ControlError as e:
        raise _fail(str(e)) from e


def _shows(progress: bool | None) -> bool:
    return sys.stderr.isatty() if progress is None else progress


@app.command()
def run(config: ConfigArg) -> None:
    """Run the controller of one pair on this host until SIGTERM.

    The data path stays in place when the controller ends; the next controller adopts it.
    """
    c = _load(config)
    from .service.daemon import run as daemon

    raise typer.Exit(daemon(c))


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
    from .status.text import text

    s = _ask(where, run_dir, "status")
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            _watch(where, run_dir, s, as_json=as_json)
        return
    if as_json:
        typer.echo(json.dumps(s, indent=2))
    else:
        time.sleep(BETWEEN_S)
        before, s = s, _ask(where, run_dir, "status")
        typer.echo(text(s, time.time(), before))
    if s["state"] not in ("protected", "checkpointing", "paused", "shadow"):
        raise typer.Exit(DEGRADED)


def _watch(where: str | None, run_dir: str, s: dict[str, Any], *, as_json: bool) -> None:
    """Show the status every second until Ctrl-C. A controller that is away is waited for."""
    from .service.control_socket import ControlError, request
    from .status.glance import glance
    from .status.live import view
    from .status.text import plain

    path, note = _socket(where, run_dir), ""
    past = deque([s], WINDOW)  # what is seen, for the figures of the last seconds
    live = sys.stdout.isatty() and not as_json
    with view() if live else contextlib.nullcontext(None) as show:
        while True:
            if show is not None:
                show(glance(s, time.time(), past[-1], past[0]), note)
            elif note:
                typer.echo(note, err=True)
            elif as_json:
                typer.echo(json.dumps(s, indent=2))
            else:
                typer.echo(plain(glance(s, time.time(), past[-1], past[0])) + "\n")
            time.sleep(1)
            try:
                now = request(path, "status", timeout=ANSWER_S)
            except ControlError as e:
                note = str(e)
                with contextlib.suppress(typer.Exit):  # the roles may have changed
                    path = _socket(where, run_dir)
            else:
                past.append(s)
                s, note = now, ""


@app.command("list")
def list_(
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """List all pairs of this host, with state and health, whether or not a controller runs."""
    from .service.pairs import only, pairs
    from .status.text import pairs as table

    rows = pairs(Path(CONFIG_DIR), Path(run_dir))
    if as_json:
        typer.echo(json.dumps(only(rows), indent=2))
    else:
        typer.echo(table(rows) if rows else f"no pair: no file in {CONFIG_DIR}, none in {run_dir}")


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
    from .service.event_log import Reader
    from .service.event_log import follow as following
    from .status.events import line
    from .tools.explain import duration

    try:
        oldest = time.time() - duration(since) if since else 0.0
    except ValueError as e:
        raise _fail(f"--since {since}: a time such as 90s, 15m, 2h or 1d", USAGE) from e

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
        raise _fail(f"{e.filename}: {e.strerror}") from e


def _event_files(where: str | None, run_dir: str) -> list[Path]:
    """The files with the events of the pair that is meant."""
    from .service.event_log import paths

    if where is None:
        configs = sorted(Path(CONFIG_DIR).glob("*.toml"))
        if len(configs) == 1:
            where = str(configs[0])
    elif "/" not in where and _config_of(where).exists():
        where = str(_config_of(where))
    if where is not None and where.endswith(".toml"):
        return list(dict.fromkeys(paths(_load(Path(where)))))
    return [Path(_ask(where, run_dir, "status")["event_log"]["path"])]


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
    from .status.text import flows as table

    doc = _ask(
        where, run_dir, "flows", sort=sort.value, proto=proto, port=port, peer=peer, limit=limit
    )
    typer.echo(json.dumps(doc, indent=2) if as_json else table(doc))


@app.command()
def checkpoint(
    where: Where = None, progress: ProgressOpt = None, run_dir: RunDir = RUN_DIR
) -> None:
    """Make a checkpoint now, so that both guests are equal (on the primary host)."""
    r = _ask(where, run_dir, "checkpoint", _shows(progress))
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
    _change(where, run_dir, "switchover", dry_run=dry_run, progress=_shows(progress))


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
        from .service.shutdown import host_ends

        if not host_ends():
            typer.echo("this host does not shut down: nothing is handed over")
            return
    _change(
        where, run_dir, "handover", dry_run=dry_run, progress=_shows(progress), shutdown=at_shutdown
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
        progress=_shows(progress),
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
    plan = _ask(where, run_dir, command, dry_run=True, **args)
    for i, step in enumerate(plan["steps"], 1):
        typer.echo(f"{i}. {step}")
    if dry_run:
        return
    confirm()
    r = _ask(where, run_dir, command, progress, **args)
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
    s = _ask(where, run_dir, "status")
    if s["state"] not in ("protected", "checkpointing"):
        typer.echo(
            f"this pair is {s['state']} ({s['reason']}): there may be no guest left to go on"
        )
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Silence the guest of {s['pair']} on this host?", abort=True)
    r = _ask(where, run_dir, "demote", _shows(progress), why=why)
    typer.echo(f"{r['state']}: {r['reason']}")


@app.command()
def reprotect(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Give a guest that is alone a new secondary (on either host).

    On the host that lost its guest, `[qemu] incoming` starts a QEMU; without that command you
    start one with -incoming. Everything else happens by itself.
    """
    r = _ask(where, run_dir, "reprotect")
    if r["here"] and not r["command"]:
        typer.echo("start this host's QEMU now, with -incoming: see `qemu.incoming` for a command")
    else:
        typer.echo("requested: see `colo-xdp status --watch`")


DRILL_S = 180.0


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
    from .service.control_socket import ControlError, NotRunning
    from .service.drill import DrillError
    from .service.drill import drill as steps

    try:
        for line in steps(_socket(where, run_dir), wait):
            typer.echo(line)
    except NotRunning as e:
        raise _fail(str(e), NOT_RUNNING) from e
    except (ControlError, DrillError) as e:
        raise _fail(str(e)) from e


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
    typer.echo(_ask(where, run_dir, "mode", _shows(progress), **args)["mode"])


@app.command()
def reload(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Read the rules of the configuration file again, as SIGHUP does, and report the result."""
    n = _ask(where, run_dir, "reload")["rules"]
    typer.echo(f"{n} rules; changes take effect with the next checkpoint")


@app.command()
def policy(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Show the rules in force and the counters of each (on the primary host)."""
    from .tools.explain import rules_text

    typer.echo(rules_text(_ask(where, run_dir, "explain")["rules"]))


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
    from .tools.explain import duration, text

    try:
        oldest = time.time() - duration(since) if since else 0.0
    except ValueError as e:
        raise _fail(f"--since {since}: a time such as 90s, 15m, 2h or 1d", USAGE) from e
    doc = _ask(where, run_dir, "explain")
    typer.echo(json.dumps(doc, indent=2) if as_json else text(doc, last=last, since=oldest))


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
    from .tools.differences import from_controller
    from .tools.pcap import PcapError

    def page(after: int, limit: int) -> list[dict[str, Any]]:
        pairs: list[dict[str, Any]] = _ask(where, run_dir, "capture", after=after, limit=limit)[
            "pairs"
        ]
        return pairs

    if seconds >= 1 and _shows(None):
        typer.echo(f"waiting {seconds:g} s for differences", err=True)
    try:
        n, frames = from_controller(out, page, seconds, count)
    except PcapError as e:
        raise _fail(str(e)) from e
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
    from .tools.filter_capture import FilterCaptureError
    from .tools.filter_capture import capture as read
    from .tools.pcap import PcapError

    try:
        done = read(
            socket, file, guest=guest.value, vnet_hdr=vnet_hdr, seconds=seconds,
            max_bytes=max_mib << 20,
        )  # fmt: skip
    except (FilterCaptureError, PcapError) as e:
        raise _fail(str(e)) from e
    typer.echo(f"{file}: {done.frames} frames, {done.octets} bytes; {done.ended}")


@app.command()
def suggest(config: ConfigArg, run_dir: RunDir = RUN_DIR) -> None:
    """Print changes to the configuration that would have saved checkpoints, as a diff.

    Nothing is applied.
    """
    from .tools.suggest import changes, diff

    c = _load(config)
    known = {
        "compare_timeout": c.compare.compare_timeout,
        "max_queue_size": c.compare.max_queue_size,
        "ring_pages": c.datapath.ring_pages,
    }
    doc, state = (_ask(str(config), run_dir, what) for what in ("explain", "status"))
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
        raise _fail("two captures are needed: of the PVM's tap and of the SVM's", USAGE)
    from dataclasses import replace

    from .tools.differences import from_replay
    from .tools.pcap import PcapError, read
    from .tools.replay import MS, ReplayError, ReplayOptions, text
    from .tools.replay import replay as play

    try:
        mac = bytes.fromhex(guest_mac.replace(":", ""))
    except ValueError:
        mac = b"?"
    if len(mac) not in (0, 6):
        raise _fail(f"--guest-mac {guest_mac}: an address such as 52:54:00:00:00:01", USAGE)
    o = ReplayOptions(checkpoint_ns=int(checkpoint_ms * MS), offset_ns=int(offset_ms * MS))
    if config is not None:
        c = _load(config)
        o = replace(o, limits=c.limits(), policy=c.policy())
    if compare_timeout is not None:
        o = replace(o, limits=replace(o.limits, compare_timeout_ns=compare_timeout * MS))
    try:
        if _shows(None):
            typer.echo(f"reading {pvm} and {svm}", err=True)
        frames = [[(f.ts_ns, f.data) for f in read(path)] for path in (pvm, svm)]
        if _shows(None):
            typer.echo(f"playing {sum(map(len, frames))} frames", err=True)
        r = play(frames[0], frames[1], o, mac)
        if write is not None:
            from_replay(write, r)
    except (PcapError, ReplayError) as e:
        raise _fail(str(e)) from e
    report = r.report()
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        from .tools.explain import difference

        typer.echo(text(report))
        for n, d in enumerate(report["differences"][:3], 1):
            typer.echo("\n" + "\n".join(difference(d, f"#{n} at {d['at_s']:.3f} s")))
    if report["checkpoints"]:
        raise typer.Exit(DIFFER)


def _corpus() -> int:
    from .tools.corpus import load
    from .tools.corpus.play import play

    wrong = 0
    for s in load():
        got = play(s)
        bad = [(step, out) for step, out in zip(s.steps, got, strict=True) if step.then != out]
        wrong += bool(bad)
        typer.echo(f"{'FAIL' if bad else 'ok  '}  {s.name}: {s.about}")
        for step, out in bad:
            typer.echo(f"      {step.who} {step.text}: {out or 'nothing'}, not {step.then}")
    return FAILED if wrong else OK


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
    from .service.doctor import run as examine

    def say(text: str) -> None:
        if not as_json:
            typer.echo(text)

    def tell(text: str) -> None:
        typer.echo(text, err=as_json)

    failed, doc = examine(config, say=say, tell=tell, peer=peer, fix=fix, before_start=before_start)
    if as_json:
        typer.echo(json.dumps(doc, indent=2))
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
    from .tools.compile import Uncompiled, compile_for

    paths = configs or sorted(Path(CONFIG_DIR).glob("*.toml"))
    if not paths:
        raise _fail(f"no TOML file in {CONFIG_DIR}: name one", USAGE)
    for path in paths:
        config = _load(path)
        try:
            for line in compile_for(config):
                typer.echo(line)
        except Uncompiled as e:
            raise _fail(f"{path}: {e}") from e


@app.command()
def demo(
    report: Annotated[str, typer.Option(help="File for the JSON report.")] = (
        "build/demo-report.json"
    ),
    keep: Annotated[bool, typer.Option(help="Leave everything running afterwards.")] = False,
) -> None:
    """Protect a Debian guest on this machine, kill its QEMUs in turn, and show what lives."""
    from .lab.demo import main as demo_main

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
    from .lab.vhost_drill import main as drill_main

    raise typer.Exit(drill_main(directory, queues, control=control))


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
    """
    from .tools.cleanup import GuestWouldTransmit, StillRunning
    from .tools.cleanup import cleanup as clean

    if config is not None:
        c = _load(config)
        pair, bpffs, run_dir = c.pair, c.datapath.bpffs, c.datapath.run_dir
    if pair is None:
        raise _fail("name the pair: a config file, or --pair", USAGE)
    try:
        gone = clean(pair, bpffs, run_dir, force=force)
    except GuestWouldTransmit as e:
        raise _fail(f"{e}; use `--force` if it may transmit") from e
    except StillRunning as e:
        raise _fail(str(e)) from e
    for line in gone:
        typer.echo(f"removed {line}")
    if not gone:
        typer.echo("nothing to remove")


@config_app.command("check")
def config_check(config: ConfigArg) -> None:
    """Report all mistakes of a file at once."""
    c = _load(config)
    typer.echo(f"{config}: pair {c.pair}, {c.role}: ok")


@config_app.command("show")
def config_show(config: ConfigArg) -> None:
    """Print the configuration with all defaults."""
    from .config.file import as_toml

    typer.echo(as_toml(_load(config)))


Directory = Annotated[Path, typer.Argument(help="Directory of the files, readable by you only.")]
Days = Annotated[int, typer.Option(min=1, max=36500, help="Validity in days.")]


@pki_app.command("init")
def pki_init(
    directory: Directory,
    pair: Annotated[str, typer.Option(help="Name of the pair, as in its configuration.")],
    days: Days = 3650,
) -> None:
    """Create a certificate authority for the pair: DIRECTORY/ca.crt and DIRECTORY/ca.key.

    Keep the key off the hosts.
    """
    from . import validate
    from .config import file as config
    from .tools import pki

    want = validate.keys(config.Config)["pair"].metadata["check"](pair)
    if want:
        raise _fail(f"--pair {pair}: {want}", USAGE)
    try:
        files = pki.init(directory, pair, days)
    except pki.PkiError as e:
        raise _fail(str(e)) from e
    for path in files:
        typer.echo(f"wrote {path}")


@pki_app.command("issue")
def pki_issue(
    directory: Directory,
    role: Annotated[
        list[RoleName] | None, typer.Option(help="Only for this role; default: both.")
    ] = None,
    days: Days = 3650,
    renew: Annotated[bool, typer.Option(help="Replace existing files.")] = False,
) -> None:
    """Create key and certificate for each host; they name the pair and the role.

    Copy ca.crt and the role's .crt and .key to that host. Running controllers use renewed files
    from their next connection on.
    """
    from .tools import pki

    try:
        for one in role or list(RoleName):
            for path in pki.issue(directory, one.value, days, renew=renew):
                typer.echo(f"wrote {path}")
    except pki.PkiError as e:
        raise _fail(str(e)) from e


Bundles = Annotated[
    Path, typer.Option("--bundle", help="Directory of the two bundles and of the certificates.")
]
Replace = Annotated[
    bool, typer.Option("--replace", help="Replace what is different, and keep it as FILE.~1~ ...")
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print what would be written, and write nothing.")
]


def _text(text: str) -> Any:
    return typer.Option(help=text, show_default=False)


@app.command("init")
def init(
    pair: Annotated[str, _text("Name of the pair.")] = "",
    hosts: Annotated[str, _text("Names of the hosts, such as hosta/hostb.")] = "",
    addresses: Annotated[str, _text("Their addresses for the control channel.")] = "",
    peer_link: Annotated[str, _text("Device that leads to the other host.")] = "",
    vxlan: Annotated[str, _text("Addresses of a VXLAN to make as the peer link.")] = "",
    bridge: Annotated[str, _text("Bridge of the clients' network.")] = "",
    tap: Annotated[str, _text("The guest's tap; default: tap-PAIR.")] = "",
    mac: Annotated[str, _text("The guest's MAC address; default: made of the pair's name.")] = "",
    queues: Annotated[str, _text("Queues of the guest's network card.")] = "",
    nic: Annotated[
        list[str] | None,
        _text("For several network cards, one each: name=,peer-link=,bridge=,tap=,mac= ..."),
    ] = None,
    migration: Annotated[str, _text("Addresses for migration; default: --addresses.")] = "",
    migration_network: Annotated[
        str, _text("File of systemd-networkd that configures their device: it gets quickack.")
    ] = "",
    heartbeat: Annotated[
        list[str] | None, _text("Addresses of a further link for heartbeats.")
    ] = None,
    memory: Annotated[str, _text("Memory of the guest, in MiB or such as 4G.")] = "",
    cpus: Annotated[str, _text("Virtual CPUs of the guest; default: 1.")] = "",
    machine: Annotated[str, _text("QEMU's -machine; default: pc.")] = "",
    cpu: Annotated[str, _text("QEMU's -cpu; default: host, with tcg max.")] = "",
    accel: Annotated[str, _text("kvm or tcg; default: kvm.")] = "",
    qemu: Annotated[str, _text("QEMU's program; default: qemu-system-x86_64.")] = "",
    qemu_user: Annotated[str, _text("User of QEMU on both hosts; default: root.")] = "",
    qemu_arg: Annotated[list[str] | None, _text("A further argument of QEMU.")] = None,
    disk: Annotated[
        list[str] | None,
        _text("A writable disk: file=PATH,format=,name=,secondary-file=,external"),
    ] = None,
    overlays: Annotated[str, _text("Directory of the disks' overlays, on both hosts.")] = "",
    arbiter: Annotated[str, _text("fence, lease or manual; default: by what is given.")] = "",
    fence_primary: Annotated[str, _text("Command that switches the primary's host off.")] = "",
    fence_secondary: Annotated[str, _text("Command that switches the secondary's host off.")] = "",
    etcd: Annotated[list[str] | None, _text("Endpoint of the etcd that has the lease.")] = None,
    etcd_ca: Annotated[str, _text("Authority of etcd's endpoints, on both hosts (PEM).")] = "",
    etcd_cert: Annotated[str, _text("Certificate for etcd, on both hosts (PEM).")] = "",
    etcd_key: Annotated[str, _text("Key of --etcd-cert (PEM).")] = "",
    base_port: Annotated[
        str, _text("First of ten ports in a row; default: the first that are free here.")
    ] = "",
    from_qemu: Annotated[
        int,
        typer.Option(help="Process id of a running QEMU whose guest it is.", show_default=False),
    ] = 0,
    from_libvirt: Annotated[str, _text("Domain of libvirt whose guest it is.")] = "",
    bundle: Bundles = Path(),
    replace: Replace = False,
    dry_run: DryRun = False,
) -> None:
    """Make everything that the two hosts of a pair need, as one bundle for each.

    Where the hosts differ, give the primary's value and the secondary's with / between. On a
    terminal it asks for what is missing. Nothing is installed: `join` does that, on each host.
    """
    given = {k: tuple(v or ()) if k in LISTS else v for k, v in locals().items()}
    from .setup import command

    ask = typer.prompt if sys.stdin.isatty() else None
    _print(lambda: command.init(given, ask))


LISTS = ("nic", "heartbeat", "qemu_arg", "disk", "etcd")


@app.command("join")
def join(
    bundle: Annotated[Path, typer.Argument(help="Bundle that `init` has made for this host.")],
    host: Annotated[str, _text("Name of this host, if it is not its hostname.")] = "",
    root: Annotated[Path, typer.Option(help="Root directory of the host.")] = Path("/"),
    replace: Replace = False,
    dry_run: DryRun = False,
) -> None:
    """Put the files of a bundle in place, all or none, and print what to run then."""
    from .setup import command

    _print(lambda: command.join(bundle, root, host, replace=replace, dry_run=dry_run))


@app.command("leave")
def leave(
    pair: Annotated[str, typer.Argument(help="Name of the pair.")],
    root: Annotated[Path, typer.Option(help="Root directory of the host.")] = Path("/"),
    dry_run: DryRun = False,
) -> None:
    """Remove what `join` has put in place, unless it was changed, and print what to run then.

    Refused while the pair's controller runs or its programs are attached: stop the controllers of
    both hosts first, and run `cleanup`.
    """
    from .setup import command

    _print(lambda: command.leave(pair, root, dry_run=dry_run))


def _print(lines: Callable[[], Iterable[str]]) -> None:
    from .setup.command import MISTAKES

    try:
        for line in lines():
            typer.echo(line)
    except MISTAKES as e:
        raise _fail(str(e), USAGE if isinstance(e, ValueError) else FAILED) from e


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
