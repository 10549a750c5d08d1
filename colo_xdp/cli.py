# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: the only module that imports typer.

Heavy modules are imported by the command that needs them, so that `status` and
`--help` answer at once and without bcc.

Exit codes: 0 done, 1 failed, 2 wrong usage or config, or refused (`run`: starting again cures
nothing), 3 no controller running, 4 running but not protected (`status`), 5 checkpoints would be
needed (`replay`).
"""

from __future__ import annotations

import glob
import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__

OK, FAILED, USAGE, NOT_RUNNING, DEGRADED, DIFFER = 0, 1, 2, 3, 4, 5
RUN_DIR = "/run/colo-xdp"
BPFFS = "/sys/fs/bpf"

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    help="COLO proxy in eBPF: two lock-stepped virtual machines, one of which may die.",
    epilog="Exit codes: 0 done, 1 failed, 2 usage or config, 3 not running, 4 not protected, "
    "5 checkpoints would be needed (replay).",
)
config_app = typer.Typer(no_args_is_help=True, help="Look at a configuration file.")
app.add_typer(config_app, name="config")
pki_app = typer.Typer(no_args_is_help=True, help="Certificates for a pair's control channel.")
app.add_typer(pki_app, name="pki")

ConfigArg = Annotated[Path, typer.Argument(help="The pair's TOML file on this host.")]
Where = Annotated[
    str | None,
    typer.Argument(help="The pair, its TOML file or control socket; default: the one that runs."),
]
RunDir = Annotated[str, typer.Option(help="Where control sockets are.", envvar="COLO_XDP_RUN_DIR")]


class RoleName(StrEnum):
    """Whose certificate."""

    primary = "primary"
    secondary = "secondary"


class ModeName(StrEnum):
    """What `mode` can be set to."""

    protected = "protected"
    paused = "paused"
    shadow = "shadow"


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
    if where is None:
        found = sorted(Path(run_dir).glob("*.sock")) if Path(run_dir).is_dir() else []
        if not found:
            raise _fail(f"no controller runs here (no control socket in {run_dir})", NOT_RUNNING)
        if len(found) > 1:
            names = "\n  ".join(f"{p.stem.rpartition('.')[0]}  ({p})" for p in found)
            raise _fail(f"several controllers run here; name a pair:\n  {names}", USAGE)
        return str(found[0])
    path = Path(where)
    if path.suffix == ".sock" or path.is_socket():
        return where
    if "/" not in where and path.suffix != ".toml" and not path.exists():  # a pair's name
        found = sorted(Path(run_dir).glob(f"{glob.escape(where)}.*.sock"))
        if not found:
            raise _fail(f"no controller of pair {where} runs here (none in {run_dir})", NOT_RUNNING)
        if len(found) > 1:
            names = "\n  ".join(map(str, found))
            raise _fail(f"both roles of {where} run here; name one:\n  {names}", USAGE)
        return str(found[0])
    config = _load(path)
    return f"{config.datapath.run_dir}/{config.pair}.{config.role}.sock"


def _ask(where: str | None, run_dir: str, command: str, **args: Any) -> dict[str, Any]:
    from .controller.command import Command
    from .service.control_socket import ControlError, NotRunning, request

    path = _socket(where, run_dir)
    try:
        return request(path, Command(command), args)
    except NotRunning as e:
        raise _fail(str(e), NOT_RUNNING) from e
    except ControlError as e:
        raise _fail(str(e)) from e


@app.command()
def run(config: ConfigArg) -> None:
    """Run the controller of one pair on this host, until SIGTERM.

    Stopping it leaves the data path in place; the next one takes over.
    """
    c = _load(config)
    from .service.daemon import run as daemon

    raise typer.Exit(daemon(c))


def _text(s: dict[str, Any]) -> str:
    q, p, ck, held = s["qemu"], s["peer"], s["checkpoints"], s["held"]
    age = time.time() - s["since"]

    def no(x: dict[str, Any]) -> str:
        return "" if x["connected"] else "NOT "

    def ms(v: float | None) -> str:
        return "never" if v is None else f"{v:.0f} ms ago"

    may = s["active"]
    right = {"held": "the lease is held", "promised": "the other host keeps silent"}
    why = right.get(may["lease"], "no lease") if may["lease"] else ""
    left = f", {may['remaining_s']:.1f} s left" if may["remaining_s"] else ""
    causes = ", ".join(f"{k} {v}" for k, v in ck["by_cause"].items() if v) or "none"
    lines = [
        f"{s['pair']} {s['role']}: {s['state']} for {age:.0f} s (epoch {s['epoch']}, {s['mode']})",
        f"  why          {s['reason']}",
        f"  guest        {'speaks' if may['transmitting'] else 'is silent'}"
        + (f" ({why}{left})" if why else ""),
        f"  QEMU         {no(q)}connected {q['version']} {q['accel']}".rstrip(),
        f"  peer         {no(p)}connected {p['state']}".rstrip(),
        *(
            f"  beacons      {w['name']}: heard {ms(w['silent_ms'])}, round trip "
            f"{w['rtt_us'] / 1000:.1f} ms, the peer hears what was sent {ms(w['unheard_ms'])}"
            + (f" ({w['trouble']})" if w["trouble"] else "")
            for w in s["heartbeat_links"]
        ),
        f"  hook         {s['hook']}, events by {s['events']} buffer, {s['ring']['lost']} lost",
        f"  held         {held['packets']} of {held['limit']} packets, {held['bytes']} bytes",
        f"  checkpoints  {ck['total']} ({causes}), {ck['failed']} failed"
        + (f", {ck['delayed']} waited {ck['delay_s']:.1f} s for their share" * bool(ck["delayed"])),
    ]
    if ck["last"]:
        last = ck["last"]
        lines.append(
            f"  last         {last['cause']}: {last['detail']}; pause {last['pause_ms']:.1f} ms, "
            f"{last['total_ms']:.1f} ms in all"
        )
    return "\n".join(lines)


@app.command()
def status(
    where: Where = None,
    as_json: Annotated[bool, typer.Option("--json", help="The documented JSON.")] = False,
    watch: Annotated[bool, typer.Option(help="Show it again every second.")] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """What the pair is doing, and why. Exit code 4 when it is not protected."""
    while True:
        s = _ask(where, run_dir, "status")
        typer.echo(json.dumps(s, indent=2) if as_json else _text(s))
        if not watch:
            break
        time.sleep(1)
    if s["state"] not in ("protected", "checkpointing", "paused", "shadow"):
        raise typer.Exit(DEGRADED)


@app.command()
def checkpoint(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Make both guests equal now (on the primary host)."""
    r = _ask(where, run_dir, "checkpoint")
    typer.echo(f"epoch {r['epoch']}: pause {r['pause_ms']:.1f} ms, {r['total_ms']:.1f} ms in all")


@app.command()
def switchover(
    where: Where = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the steps and do nothing.")
    ] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Change the guest that clients hear while both live, without losing anything; on either host.

    A checkpoint, after which the PVM is silent and the SVM takes over.
    """
    _change(where, run_dir, "switchover", dry_run=dry_run)


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
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Let this host's guest go on alone: the SVM takes over, or the PVM goes solo.

    The other guest must certainly be silent: the configured fence command runs first. Without
    one, you are the fence. While both guests live, use `switchover`.
    """

    def confirm() -> None:
        if not yes and sys.stdin.isatty():
            typer.confirm("Is the other host's guest certain to be silent?", abort=True)

    _change(where, run_dir, "failover", dry_run=dry_run, confirm=confirm, force=force)


def _change(
    where: str | None,
    run_dir: str,
    command: str,
    *,
    dry_run: bool,
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
    r = _ask(where, run_dir, command, **args)
    typer.echo(f"{r['state']}: {r.get('reason', '')}")
    if not r["done"]:
        raise typer.Exit(FAILED)


@app.command("demote")
def demote(
    where: Where = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    why: Annotated[str, typer.Option(help="For the log.")] = "asked by the operator",
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Silence this host's guest now, for certain. The other one goes on alone, if it can.

    `switchover` is the gentle way. Only a new copy of the other guest is heard here again.
    """
    s = _ask(where, run_dir, "status")
    if s["state"] not in ("protected", "checkpointing"):
        typer.echo(f"this pair is {s['state']} ({s['reason']}): nobody may be left to go on")
    if not yes and sys.stdin.isatty():
        typer.confirm(f"Silence the guest of {s['pair']} on this host?", abort=True)
    r = _ask(where, run_dir, "demote", why=why)
    typer.echo(f"{r['state']}: {r['reason']}")


@app.command()
def reprotect(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Give a guest that is alone a new secondary: on either host.

    Where the other guest was, `[qemu] incoming` starts a QEMU; without it you do, with -incoming.
    The rest needs nobody.
    """
    r = _ask(where, run_dir, "reprotect")
    if r["here"] and not r["command"]:
        typer.echo("start this host's QEMU now, with -incoming: see `qemu.incoming` for a command")
    else:
        typer.echo("asked for: see `colo-xdp status --watch`")


DRILL_S = 180.0


@app.command()
def drill(
    where: Where = None,
    run_dir: RunDir = RUN_DIR,
    wait: Annotated[float, typer.Option(help="Seconds for the new secondary.")] = DRILL_S,
) -> None:
    """Change the hosts' roles on purpose, protect again, and say what it cost (primary host).

    A switchover and a re-protection. This host's QEMU has to be started anew in between:
    by `[qemu] incoming`, or by you.
    """
    from .service.control_socket import ControlError, request

    path = _socket(where, run_dir)
    s = _ask(path, run_dir, "status")
    if (s["role"], s["state"]) != ("primary", "protected"):
        raise _fail(f"a drill begins on the primary of a protected pair; this is {s['role']}, "
                    f"{s['state']}: {s['reason']}")  # fmt: skip
    began = time.monotonic()
    r = _ask(path, run_dir, "switchover")
    if not r["done"]:
        raise _fail(f"no switchover: {r['state']}: {r['reason']}")
    typer.echo(
        f"the guest speaks on the other host after {(time.monotonic() - began) * 1e3:.0f} ms"
    )
    gap, last, end = None, "", began + wait
    _ask(path, run_dir, "reprotect")
    while time.monotonic() < end:
        try:
            s = request(path, "status", {}, timeout=5)
        except ControlError:
            time.sleep(0.2)  # the controller of the other role is being made
            continue
        if gap is None and s["last_failover"]:
            gap = s["last_failover"]["gap_ms"]
            typer.echo(f"the network heard nothing of the guest for {gap:.0f} ms")
        if s["reason"] != last:
            last = s["reason"]
            typer.echo(f"  {s['role']}, {s['state']}: {last}")
        if (s["role"], s["state"]) == ("secondary", "protected"):
            typer.echo(f"protected again after {time.monotonic() - began:.1f} s, roles changed")
            return
        time.sleep(0.02)
    raise _fail(f"not protected again within {wait:g} s: {last}")


@app.command()
def mode(
    name: Annotated[ModeName | None, typer.Argument(help="Print it, or set it.")] = None,
    where: Annotated[str | None, typer.Option("--config", help="As for status.")] = None,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """`paused` decides no failover by itself; `shadow` compares but holds nothing."""
    args = {"mode": name.value} if name else {}
    typer.echo(_ask(where, run_dir, "mode", **args)["mode"])


@app.command()
def reload(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """Read the config file again: its rules. As SIGHUP does, but it says what came of it."""
    n = _ask(where, run_dir, "reload")["rules"]
    typer.echo(f"{n} rules; what they change takes force with the next checkpoint")


@app.command()
def policy(where: Where = None, run_dir: RunDir = RUN_DIR) -> None:
    """The rules in force, and what each has counted (on the primary host)."""
    from .tools.explain import rules_text

    typer.echo(rules_text(_ask(where, run_dir, "explain")["rules"]))


@app.command()
def explain(
    where: Where = None,
    as_json: Annotated[bool, typer.Option("--json", help="All that is known.")] = False,
    last: Annotated[int, typer.Option(min=0, help="How many differences to show.")] = 3,
    since: Annotated[str, typer.Option(help="Only this long back: 90s, 15m, 2h, 1d.")] = "",
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Why checkpoints were made: causes, services, rules, and the bytes that differed."""
    from .tools.explain import duration, text

    try:
        oldest = time.time() - duration(since) if since else 0.0
    except ValueError as e:
        raise _fail(f"--since {since}: a time such as 90s, 15m, 2h or 1d", USAGE) from e
    doc = _ask(where, run_dir, "explain")
    typer.echo(json.dumps(doc, indent=2) if as_json else text(doc, last=last, since=oldest))


@app.command()
def capture(
    out: Annotated[Path, typer.Option("-w", "--write", help="The pcapng file.")],
    where: Where = None,
    seconds: Annotated[float, typer.Option(min=0, help="Wait so long for more.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Stop after so many.")] = 1000,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Write the frames that differed, both guests', for Wireshark: a comment says where."""
    from .tools.explain import comment
    from .tools.pcap import PcapError, Writer

    end, after, n = time.monotonic() + seconds, 0, 0
    try:
        with Writer(out) as w:
            while n < count:
                page = _ask(where, run_dir, "capture", after=after, limit=8)["pairs"]
                for d in page[: count - n]:
                    after, n = d["serial"], n + 1
                    at = int(d["at"] * 1e9)
                    for guest in ("pvm", "svm"):
                        if d[f"{guest}_frame"]:
                            w.put(guest, at, bytes.fromhex(d[f"{guest}_frame"]), comment(d))
                if not page:
                    if time.monotonic() >= end:
                        break
                    time.sleep(0.2)
    except PcapError as e:
        raise _fail(str(e)) from e
    typer.echo(f"{out}: {n} differences, {w.frames} frames")


@app.command()
def suggest(config: ConfigArg, run_dir: RunDir = RUN_DIR) -> None:
    """Changes to the config that would have saved checkpoints, as a diff. Applies nothing."""
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
    pvm: Annotated[Path | None, typer.Argument(help="Capture of the PVM's tap.")] = None,
    svm: Annotated[Path | None, typer.Argument(help="Capture of the SVM's tap.")] = None,
    config: Annotated[Path | None, typer.Option(help="Limits and rules of this file.")] = None,
    guest_mac: Annotated[str, typer.Option(help="The guest's address, if not plain.")] = "",
    offset_ms: Annotated[float, typer.Option(help="Added to the SVM's times.")] = 0.0,
    compare_timeout: Annotated[
        int | None, typer.Option(min=1, help="ms; instead of the config's.")
    ] = None,
    checkpoint_ms: Annotated[float, typer.Option(min=0, help="What a checkpoint takes.")] = 20.0,
    write: Annotated[
        Path | None, typer.Option("-w", "--write", help="The differing frames, as capture does.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The whole report.")] = False,
    corpus: Annotated[bool, typer.Option(help="Play the built-in scenarios instead.")] = False,
) -> None:
    """Run two captures through the engine, offline: what would have left, what differed.

    Exit code 5 when checkpoints would have been needed.
    """
    if corpus:
        raise typer.Exit(_corpus())
    if pvm is None or svm is None:
        raise _fail("two captures are needed: of the PVM's tap and of the SVM's", USAGE)
    from dataclasses import replace

    from .tools.pcap import PcapError, read
    from .tools.replay import MS, Options, ReplayError, text
    from .tools.replay import replay as play

    try:
        mac = bytes.fromhex(guest_mac.replace(":", ""))
    except ValueError:
        mac = b"?"
    if len(mac) not in (0, 6):
        raise _fail(f"--guest-mac {guest_mac}: an address such as 52:54:00:00:00:01", USAGE)
    o = Options(checkpoint_ns=int(checkpoint_ms * MS), offset_ns=int(offset_ms * MS))
    if config is not None:
        c = _load(config)
        o = replace(o, limits=c.limits(), policy=c.policy())
    if compare_timeout is not None:
        o = replace(o, limits=replace(o.limits, compare_timeout_ns=compare_timeout * MS))
    try:
        frames = [[(f.ts_ns, f.data) for f in read(path)] for path in (pvm, svm)]
        r = play(frames[0], frames[1], o, mac)
        if write is not None:
            _write_pairs(write, r)
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


def _write_pairs(out: Path, r: Any) -> None:
    from .engine.journal import divergence_json
    from .tools.explain import comment
    from .tools.pcap import Writer

    with Writer(out) as w:
        for n, (ts, d) in enumerate(r.pairs, 1):
            note = comment({"serial": n, **divergence_json(d)})
            e = d.evidence
            for guest, frame in (("pvm", e.pvm_frame and e.pvm_frame.frame), ("svm", e.svm_frame)):
                if frame:
                    w.put(guest, ts, frame, note)


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
def doctor(config: ConfigArg) -> None:
    """Check this host before anything depends on it."""
    from .tools.doctor import examine

    worst = 0
    for check in examine(config):
        mark = {0: "ok  ", 1: "warn", 2: "FAIL"}[check.level]
        typer.echo(f"{mark}  {check.name}: {check.text}")
        if check.remedy:
            typer.echo(f"      -> {check.remedy}")
        worst = max(worst, check.level)
    raise typer.Exit(FAILED if worst == 2 else OK)


@app.command()
def demo(
    report: Annotated[str, typer.Option(help="Where the JSON report goes.")] = (
        "build/demo-report.json"
    ),
    keep: Annotated[bool, typer.Option(help="Leave everything running.")] = False,
) -> None:
    """Build a pair on this machine, kill its primary, and show a connection that lives."""
    from .lab.demo import main as demo_main

    raise typer.Exit(demo_main(report, keep))


@app.command()
def cleanup(
    config: Annotated[Path | None, typer.Argument(help="The pair's TOML file.")] = None,
    pair: Annotated[str | None, typer.Option(help="The pair's name, without a file.")] = None,
    bpffs: Annotated[str, typer.Option(help="Where the pins are.")] = BPFFS,
    force: Annotated[
        bool, typer.Option(help="Your word that no guest speaks which must not.")
    ] = False,
    run_dir: RunDir = RUN_DIR,
) -> None:
    """Take a pair's programs, pins and sockets off this host, and nothing else.

    Frames then flow as if we had never been here, so do it when the pair is not needed. Refused
    while they keep a guest silent whose QEMU lives.
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
        raise _fail(f"{e}; `--force`: your word that it may be let go") from e
    except StillRunning as e:
        raise _fail(str(e)) from e
    for line in gone:
        typer.echo(f"removed {line}")
    if not gone:
        typer.echo("nothing to remove")


@config_app.command("check")
def config_check(config: ConfigArg) -> None:
    """Say what is wrong with a file, all at once."""
    c = _load(config)
    typer.echo(f"{config}: pair {c.pair}, {c.role}: ok")


@config_app.command("show")
def config_show(config: ConfigArg) -> None:
    """The configuration with all defaults."""
    from .config.file import as_toml

    typer.echo(as_toml(_load(config)))


Directory = Annotated[Path, typer.Argument(help="Where the files are, readable by you only.")]
Days = Annotated[int, typer.Option(min=1, max=36500, help="How long it is valid.")]


@pki_app.command("init")
def pki_init(
    directory: Directory,
    pair: Annotated[str, typer.Option(help="Name of the pair, as in its configuration.")],
    days: Days = 3650,
) -> None:
    """Make an authority of the pair's own: DIR/ca.crt and DIR/ca.key.

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
    role: Annotated[list[RoleName] | None, typer.Option(help="Default: both.")] = None,
    days: Days = 3650,
    renew: Annotated[bool, typer.Option(help="Replace what is there.")] = False,
) -> None:
    """Make a host's key and certificate, with the pair's name and the role in it.

    Copy ca.crt and the role's .crt and .key to that host. Running controllers take renewed
    files with their next connection.
    """
    from .tools import pki

    try:
        for one in role or list(RoleName):
            for path in pki.issue(directory, one.value, days, renew=renew):
                typer.echo(f"wrote {path}")
    except pki.PkiError as e:
        raise _fail(str(e)) from e


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point."""
    app()


if __name__ == "__main__":
    main()
