# SPDX-License-Identifier: GPL-2.0-or-later
"""One controller process: wiring, signals, systemd, control socket, metrics.

Stopping it leaves the data path as it is, pinned: the guests go on, and the
next controller takes over. `colo-xdp cleanup` is what removes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import outside
from .attach import AttachError, NoSuchDevice
from .config import Config
from .control import ControlError, ControlServer
from .controller import Controller
from .datapath import DataPath, DataPathError
from .loader import LoadError
from .metrics import start as start_metrics
from .notify import Notifier
from .peer import PeerError
from .primary import Primary
from .secondary import Secondary
from .starts import Starts

log = logging.getLogger("colo_xdp")

ROLE_CHANGED = -1
LOAD_S = 60  # to compile and load the programs of the other role
#: a controller that hangs is ended after this share of dead_after: its successor needs the rest
HUNG_SHARE = 0.6
STATUS_S = 1.0
SCRAPE_S = 2.0
#: a frame may wait for a thread that works on other things (netlink, a scrape) no longer than this
SWITCH_S = 0.0005


def setup_logging() -> None:
    """Lines for people; priorities for the journal when it reads us."""
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
    logging.basicConfig(level=os.environ.get("COLO_XDP_LOG", "INFO").upper(), handlers=[handler])
    logging.getLogger("asyncio").setLevel(logging.WARNING)


def _reload(ctl: Controller) -> None:
    """SIGHUP has nobody to answer: a file that is wrong is logged, and the old rules stay."""
    try:
        ctl.reload()
    except ValueError as e:
        log.error("not reloaded: %s", e)


async def _serve(config: Config, datapath: DataPath) -> int:
    ctl: Controller = (Primary if datapath.role == "primary" else Secondary)(config, datapath)
    notifier = Notifier(HUNG_SHARE * config.peer.dead_after / 1000)
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    loop.add_signal_handler(signal.SIGHUP, _reload, ctl)
    run_dir = Path(config.datapath.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    control = ControlServer(str(run_dir / f"{config.pair}.{config.role}.sock"), ctl.command)
    await control.start()
    metrics: Any = None
    try:

        def fresh_status() -> dict[str, Any]:
            """For the HTTP thread: the loop's thread builds it."""
            future = asyncio.run_coroutine_threadsafe(ctl.command("status", {}), loop)
            try:
                return future.result(timeout=SCRAPE_S)
            except TimeoutError:
                future.cancel()
                raise

        if config.metrics.listen:
            m = config.metrics
            tls = (m.cert, m.key, m.client_ca) if m.cert else None
            metrics = start_metrics(m.listen, fresh_status, tls)
        await ctl.start()
        # Long-lived objects are not looked at again: no pause while packets wait.
        gc.freeze()
        notifier.patience(None)
        notifier.send(READY="1", STATUS=ctl.reason)
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
                notifier.send(WATCHDOG="1", STATUS=f"{ctl.state.value}: {ctl.reason}")
        changed = ctl.role_changed and not stopping.done()
        failed = watcher.done() and not changed
        for t in (watcher, stopping):
            t.cancel()
        if changed:  # the next role's programs may take a while to compile
            notifier.patience(LOAD_S)
        else:
            notifier.send(STOPPING="1")
        why = "the roles change" if changed else "stopped by a signal"
        await ctl.stop("internal error" if failed else why)
        return ROLE_CHANGED if changed else int(failed)
    finally:
        if metrics is not None:
            metrics.close()
        with contextlib.suppress(OSError):
            await control.close()


class AlreadyRuns(RuntimeError):
    """Another controller of this pair and role holds the lock."""


@contextlib.contextmanager
def _only_one(config: Config) -> Iterator[None]:
    """Before anything is touched: a second controller would take the first one's events away."""
    path = Path(config.datapath.run_dir) / f"{config.pair}.{config.role}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise AlreadyRuns(
                f"another controller of {config.pair} ({config.role}) runs here: {path} is locked"
            ) from e
        yield


def run(config: Config) -> int:
    """Run until SIGTERM or SIGINT. Exit status: 0 stopped, 1 failed."""
    setup_logging()
    sys.setswitchinterval(SWITCH_S)
    try:
        with _only_one(config):
            starts = Starts(Path(config.datapath.run_dir) / f"{config.pair}.starts")
            if outside.is_service():
                starts.wait(Notifier())
            status = _run(config)
            if status == 0:
                starts.forget()
            return status
    except (
        AlreadyRuns,
        LoadError,
        DataPathError,
        AttachError,
        NoSuchDevice,
        PeerError,
        ControlError,
        OSError,
    ) as e:
        log.error("%s", e)
        return 1


def _run(config: Config) -> int:
    while True:
        # Before the loop: pyroute2 runs one of its own and cannot work inside of ours.
        datapath = DataPath(config)
        try:
            status = asyncio.run(_serve(config, datapath))
        finally:
            datapath.close()
        if status != ROLE_CHANGED:
            return status
        # The next controller finds what this one has left as it would after a crash.
