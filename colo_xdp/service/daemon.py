# SPDX-License-Identifier: GPL-2.0-or-later
"""Run one controller process: wiring, signals, systemd, control socket, metrics.

Stopping it leaves the data path pinned as it is: the guests keep running, and the next controller
takes the data path over. `colo-xdp cleanup` removes it. The command line calls run().
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from .. import user_command
from ..config.file import Config
from ..controller.command import Command
from ..controller.controller import Controller
from ..controller.primary import Primary
from ..controller.secondary import Secondary
from ..controller.story import Kind
from ..datapath import loader
from ..datapath.attach import Taken
from ..datapath.devices import DeviceError, NoSuchDevice
from ..datapath.host import HostDataPath
from ..datapath.prepare import DataPathError, DeviceMissing
from ..datapath.programs import fill_quietly
from ..datapath.source import LoadError, Refused, Unfinished
from ..peer.channel import PeerError
from ..status import builder, sampler
from ..status.history import History
from ..status.server import start as start_metrics
from ..tools.preflight import AlreadyRuns, Refusal, claim
from .control_socket import ControlError, ControlServer
from .event_log import EventLog, place
from .examine import examine
from .mark_file import MarkFile
from .start_limit import Starts
from .systemd import Notifier
from .waiting import wait_for

log = logging.getLogger("colo_xdp")

FAILED, REFUSED = 1, 2
ROLE_CHANGED = -1
LOAD_S = 60  # time to compile and load a NIC's programs of the other role, s
#: a hanging controller is ended after this share of dead_after; its successor needs the rest
HUNG_SHARE = 0.6
STATUS_S = 1.0
SCRAPE_S = 2.0
#: longest time, s, that a frame may wait for a thread busy with something else (netlink, a scrape)
SWITCH_S = 0.0005


def setup_logging() -> None:
    """Log lines for people; with priorities if the journal reads them."""
    journal = bool(os.environ.get("JOURNAL_STREAM"))
    fmt = "%(message)s" if journal else "%(asctime)s %(levelname)s %(name)s: %(message)s"

    class Priority(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            text = super().format(record)
            if not journal:
                return text
            level = {10: 7, 20: 6, 30: 4, 40: 3, 50: 2}.get(record.levelno, 6)
            return f"<{level}>{text}"

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Priority(fmt))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    # Ours only: at DEBUG pyroute2 prints each netlink message, which takes time.
    logging.getLogger("colo_xdp").setLevel(os.environ.get("COLO_XDP_LOG", "INFO").upper())


def _reload(ctl: Controller) -> None:
    """Reload on SIGHUP. Nobody waits for an answer: errors are logged and the old rules stay."""
    try:
        ctl.commands.reload()
    except ValueError as e:
        log.error("not reloaded: %s", e)


async def _use_mark(ctl: Controller, mark: MarkFile) -> None:
    loop = asyncio.get_running_loop()

    def tell(why: str) -> None:
        loop.call_soon_threadsafe(ctl.mark_trouble, why)

    mark.tell = tell
    found = await asyncio.to_thread(mark.found, hurry=ctl.dp.adopted)
    ctl.use_mark(found, mark.want, str(mark.path), mark.boot)


async def _serve(config: Config, datapath: HostDataPath, history: History, mark: MarkFile) -> int:
    ctl: Controller = (Primary if datapath.role == "primary" else Secondary)(config, datapath)
    notifier = Notifier(HUNG_SHARE * config.peer.dead_after / 1000)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, ctl)
    run_dir = Path(config.datapath.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    events = EventLog(place(config))
    ctl.story.keep = events.add
    builder.register(ctl, builder.Process(time.monotonic(), events))
    ctl.checkup.examine = functools.partial(examine, config)
    sock = str(run_dir / f"{config.pair}.{config.role}.sock")
    control = ControlServer(sock, ctl.commands.run)
    await control.start()
    ctl.story.began(os.getpid(), ctl.state, ctl.reason)
    metrics: Any = None
    try:

        def fresh_status() -> dict[str, Any]:
            """Return the status for the HTTP thread; the event loop's thread builds it."""
            future = asyncio.run_coroutine_threadsafe(ctl.commands.run(Command.STATUS, {}), loop)
            try:
                return future.result(timeout=SCRAPE_S)
            except TimeoutError:
                future.cancel()
                raise

        if config.metrics.listen:
            m = config.metrics
            tls = (m.cert, m.key, m.client_ca) if m.cert else None
            try:
                metrics = start_metrics(m.listen, fresh_status, tls, history)
            except OSError as e:
                raise OSError(e.errno, f"[metrics] listen {m.listen}: {e.strerror or e}") from e
        await _use_mark(ctl, mark)
        await ctl.start()
        # Long-lived objects are not scanned again: no pause while packets wait.
        gc.freeze()
        notifier.patience(None)
        notifier.send(READY="1", STATUS=ctl.announced_state()[1])
        # A thread that no exit waits for: what it compiles is for another day.
        threading.Thread(target=fill_quietly, args=(config,), daemon=True).start()
        watcher = asyncio.create_task(ctl.finished())
        stopping = asyncio.create_task(stop.wait())
        beat = 0.0
        while not (stopping.done() or watcher.done()):
            every = min(STATUS_S, notifier.watchdog_s or STATUS_S)
            await asyncio.wait((stopping, watcher), timeout=every,
                               return_when=asyncio.FIRST_COMPLETED)  # fmt: skip
            now = time.monotonic()
            if now - beat >= every:
                beat = now
                state, reason = ctl.announced_state()
                notifier.send(WATCHDOG="1", STATUS=f"{state.value}: {reason}")
            if metrics is not None:
                sampler.take(ctl, history)
        changed = ctl.role_changed and not stopping.done()
        failed = watcher.done() and not changed
        for t in (watcher, stopping):
            t.cancel()
        if changed:  # the next role's programs may take a while to compile
            notifier.patience(LOAD_S * len(config.networks))
        else:
            notifier.send(STOPPING="1")
        why = "the roles change" if changed else "stopped by a signal"
        ctl.story.tell(Kind.STOP, "internal error" if failed else why)
        back_ms = LOAD_S * len(config.networks) * 1000 if changed else 0
        await ctl.stop("internal error" if failed else why, planned=not failed, back_ms=back_ms)
        return ROLE_CHANGED if changed else int(failed)
    finally:
        if metrics is not None:
            metrics.close()
        with contextlib.suppress(OSError):
            await control.close()
        await asyncio.to_thread(events.close)


def _is_needed(config: Config) -> bool:
    """Return whether a former controller's data path is pinned here.

    Its guest depends on a new controller, and what keeps that from starting may disappear before a
    person can act: a file that is being replaced, a port used by another connection, a temporary
    filter.
    """
    d = config.datapath
    return (Path(loader.pin_dir(d.bpffs, config.pair, config.role)) / "config").exists()


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT.

    Exit status: 0 stopped, 1 failed, 2 refused: a person must resolve the conflict, and restarting
    does not help. Where a former controller's data path is pinned nothing is given up, so a refusal
    is 1, too.
    """
    setup_logging()
    sys.setswitchinterval(SWITCH_S)
    service, needed = user_command.is_service(), _is_needed(config)
    run_dir = Path(config.datapath.run_dir)
    starts = Starts(run_dir / f"{config.pair}.starts")
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)  # as the unit makes it
        if service:
            starts.wait(Notifier())
        with claim(config):
            status = _run(config)
            if status == 0:
                starts.forget()
            return status
    except (Refused, Unfinished, NoSuchDevice, PeerError, OSError) as e:
        log.error("%s", e)
        return FAILED
    except AlreadyRuns as e:
        log.error("refused: %s", e)
        # The service's predecessor may be exiting, stuck in a call that does not return.
        return FAILED if service else REFUSED
    except (Refusal, Taken, LoadError, DataPathError, ControlError) as e:
        log.error("refused: %s", e)
        return FAILED if needed else REFUSED
    except DeviceError as e:
        log.error("%s", e)
        return FAILED


def _run(config: Config) -> int:
    # of the host: they outlive a change of roles
    history, mark = History(time.time()), MarkFile(config)
    try:
        return _run_roles(config, history, mark)
    finally:
        mark.close()


def _run_roles(config: Config, history: History, mark: MarkFile) -> int:
    while True:
        # Before the event loop: pyroute2 runs its own and cannot work inside ours.
        try:
            datapath = HostDataPath.load(config)
        except DeviceMissing as e:
            if not wait_for(config, e.device, str(e)):
                return 0
            continue
        try:
            status = asyncio.run(_serve(config, datapath, history, mark))
        finally:
            datapath.close()
        if status != ROLE_CHANGED:
            return status
        # The next controller adopts what this one has left, as it would after a crash.
