# SPDX-License-Identifier: GPL-2.0-or-later
"""Let a controller wait for a device that does not exist yet.

After a boot the tap may be created after the controller starts, by whatever starts the guest. The
controller reports that it waits and loads and attaches nothing meanwhile. service/daemon.py calls
wait_for().
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from pathlib import Path
from typing import Any

from ..config.file import Config
from ..controller.command import Command
from ..datapath import devices, netlink
from ..status.document import empty
from ..status.server import start as start_metrics
from .control_socket import ControlServer
from .start_limit import LOAD_S
from .systemd import Notifier

log = logging.getLogger("colo_xdp")

LOOK_S = 1.0


def _there(name: str) -> bool:
    try:
        devices.link_info(name)
    except (devices.NoSuchDevice, netlink.NetlinkError, OSError):
        return False
    return True


async def _wait(config: Config, device: str, why: str) -> bool:
    reason = f"waiting for a device: {why}"
    log.warning("%s", reason)
    doc = empty(config.pair, config.role).to_json() | {"reason": reason}
    doc["data_path"] = doc["data_path"] | {"trouble": why}

    async def command(name: str, args: dict[str, Any]) -> dict[str, Any]:
        if name != Command.STATUS:
            raise ValueError(reason)
        return doc

    notifier, loop, stop = Notifier(), asyncio.get_running_loop(), asyncio.Event()
    for sig in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(sig, stop.set)
    changed = asyncio.Event()

    def news(sock: socket.socket) -> None:
        netlink.drain(sock)
        changed.set()

    control = ControlServer(
        str(Path(config.datapath.run_dir) / f"{config.pair}.{config.role}.sock"), command
    )
    m = config.metrics
    async with contextlib.AsyncExitStack() as held:
        await control.start()
        held.push_async_callback(control.close)
        if m.listen:
            tls = (m.cert, m.key, m.client_ca) if m.cert else None
            held.callback(start_metrics(m.listen, lambda: doc, tls).close)
        sock = held.enter_context(netlink.changes())
        loop.add_reader(sock.fileno(), news, sock)
        held.callback(loop.remove_reader, sock.fileno())
        notifier.send(READY="1", STATUS=f"starting: {reason}")
        stopping = asyncio.ensure_future(stop.wait())
        held.callback(stopping.cancel)
        while not stop.is_set():
            changed.clear()
            if await asyncio.to_thread(_there, device):
                log.info("%s exists now", device)
                notifier.patience(LOAD_S)  # systemd considers it ready, so the watchdog is active
                return True
            notifier.send(WATCHDOG="1")
            heard = asyncio.ensure_future(changed.wait())
            every = min(LOOK_S, notifier.watchdog_s or LOOK_S)
            await asyncio.wait(
                (stopping, heard), timeout=every, return_when=asyncio.FIRST_COMPLETED
            )
            heard.cancel()
    notifier.send(STOPPING="1")
    return False


def wait_for(config: Config, device: str, why: str) -> bool:
    """Wait until a device of this name exists; return False if a signal asked to stop."""
    return asyncio.run(_wait(config, device, why))
