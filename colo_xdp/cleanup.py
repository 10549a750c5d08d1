# SPDX-License-Identifier: GPL-2.0-or-later
"""Takes everything of a pair off this host, and nothing else."""

from __future__ import annotations

import socket
from pathlib import Path

from . import attach, loader
from .datapath import manifest_path
from .preflight import is_running


class StillRunning(RuntimeError):
    """A controller of the pair answers on its control socket."""


def _served(sock: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(1)
        try:
            s.connect(str(sock))
        except OSError:
            return False
        return True


def cleanup(pair: str, bpffs: str, run_dir: str) -> list[str]:
    """Detach programs, remove pins and the control socket; one line for each thing removed.

    Idempotent. Raises StillRunning while a controller of the pair runs.
    """
    gone: list[str] = []
    for role in ("primary", "secondary"):
        if is_running(run_dir, bpffs, pair, role) or _served(Path(run_dir) / f"{pair}.{role}.sock"):
            raise StillRunning(f"the {role}'s controller of {pair} still runs: stop it first")
    for role in ("primary", "secondary"):
        gone += attach.detach_all(manifest_path(run_dir, pair, role))
        gone += loader.remove_pins(loader.pin_dir(bpffs, pair, role))
        sock = Path(run_dir) / f"{pair}.{role}.sock"
        if sock.is_socket():
            sock.unlink()
            gone.append(str(sock))
    base = Path(bpffs) / "colo-xdp"
    if base.is_dir() and not any(base.iterdir()):
        base.rmdir()
    return gone
