# SPDX-License-Identifier: GPL-2.0-or-later
"""Check that what a controller needs is free on this host: its name, its devices, its ports.

It runs before the controller touches anything. Each controller holds a lock (flock, so that it ends
with its process) on a file that lists what it uses, and one on the directory of its pins, which two
run_dirs may share. A conflict raises a Refusal: a person must resolve it, and restarting does not
help. service/daemon.py calls claim(); the doctor and cleanup use the queries.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import validate
from ..config.file import Config
from ..datapath import loader
from ..peer.channel import split_address
from ..peer.tls import Tls, TlsError
from . import sockets

# how long somebody else may hold the lock, s, before the holder counts as a controller
LOCK_S = 1.0


class Refusal(RuntimeError):
    """This controller cannot run here as configured; the text names the conflict."""


class AlreadyRuns(Refusal):
    """Another controller of this pair and role is running."""


def lock_path(run_dir: str, pair: str, role: str) -> Path:
    """Return the file that a controller locks, and that lists what it uses."""
    return Path(run_dir) / f"{pair}.{role}.lock"


def _namespace(kind: str) -> int:
    return os.stat(f"/proc/thread-self/ns/{kind}").st_ino


def _is_stale(said: dict[str, Any]) -> bool:
    """Return whether a former holder of the lock wrote this, and is gone.

    Its namespaces' numbers may belong to others by now.
    """
    pid = said.get("pid")
    if said.get("pidns") != _namespace("pid") or not isinstance(pid, int) or pid <= 0:
        return False  # nothing is known of that process
    try:  # not /proc, which may hide it
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


def _locked(path: Path) -> bool:
    """Return whether a living process holds a lock on a file or directory."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def ports(config: Config) -> list[tuple[str, str, int]]:
    """Return (key, "address:port", kind of socket) for everything this controller listens on."""
    out: list[tuple[str, str, int]] = []
    if config.metrics.listen:
        out.append(("[metrics] listen", config.metrics.listen, socket.SOCK_STREAM))
    if config.role == "secondary":
        out.append(("[peer] local", config.peer.local, socket.SOCK_STREAM))
    for text in config.peer.heartbeat_links:
        ends = validate.path_ends(text)
        if ends is not None:
            host, port = ends[0]
            shown = f"[{host}]:{port}" if host.version == 6 else f"{host}:{port}"
            out.append(("[peer] heartbeat_links", shown, socket.SOCK_DGRAM))
    return out


def is_taken(address: str, kind: int) -> bool:
    """Return whether another socket of this host uses the address."""
    host, port = split_address(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, kind) as s:
        if kind == socket.SOCK_STREAM:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            return e.errno == errno.EADDRINUSE
    return False


def others(config: Config) -> list[dict[str, Any]]:
    """Return what the other controllers running in this network namespace use."""
    own = lock_path(config.datapath.run_dir, config.pair, config.role)
    here, out = _namespace("net"), []
    for path in sorted(own.parent.glob("*.lock")):
        if path == own or not _locked(path):
            continue
        with contextlib.suppress(OSError, ValueError):
            said = json.loads(path.read_text())
            if isinstance(said, dict) and said.get("netns") == here and not _is_stale(said):
                out.append(said)
    return out


def _devices(config: Config) -> dict[str, str]:
    """Return the devices that serve this pair alone, with the key of [network] that names each."""
    return {getattr(net, key): key for net in config.networks for key in ("tap", "peer_link")}


def conflicts(config: Config, *, runs: bool = False) -> list[str]:
    """Return a sentence for each thing in this configuration that somebody else uses.

    `runs`: a controller of this pair does, so that the ports are its own.
    """
    running, found = others(config), []
    for name, key in _devices(config).items():
        for o in running:
            if theirs := o.get("devices", {}).get(name):
                found.append(
                    f"[network] {key}: {name} is the {theirs} of pair {o['pair']}, whose "
                    f"controller runs here (process {o['pid']}): a device serves only one pair"
                )
    for key, address, kind in () if runs else ports(config):
        if is_taken(address, kind):
            by = [o for o in running if address in o.get("ports", [])]
            unknown = sockets.user_of(*split_address(address), kind) or "another socket"
            who = f"by pair {by[0]['pair']} (process {by[0]['pid']})" if by else f"by {unknown}"
            found.append(f"{key} {address}: in use {who}; each pair needs an address of its own")
    return found


def running(config: Config) -> int:
    """Return the process id of the controller of this pair and role; 0: none, -1: unknown."""
    path = lock_path(config.datapath.run_dir, config.pair, config.role)
    if not _locked(path):
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(path.read_text())["pid"])
    return -1


def is_running(run_dir: str, bpffs: str, pair: str, role: str) -> bool:
    """Return whether a controller holds one of its locks, even if it does not answer."""
    pins = Path(loader.pin_dir(bpffs, pair, role))
    return _locked(lock_path(run_dir, pair, role)) or _locked(pins)


def _flock(fd: int, path: str, config: Config, pid: str = "") -> None:
    """Take the lock, waiting LOCK_S: a process that only checks (_locked()) holds it briefly, too.

    Raises AlreadyRuns.
    """
    end = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError as e:
            if time.monotonic() > end:
                raise AlreadyRuns(
                    f"another controller of {config.pair} ({config.role}) runs here{pid}: {path} "
                    "is locked"
                ) from e
        time.sleep(0.01)


@contextlib.contextmanager
def claim(config: Config) -> Iterator[None]:
    """Hold what this controller needs; called before anything is loaded, attached or replaced.

    Raises Refusal, OSError when the directories cannot be created, LoadError without a bpffs.
    """
    path = lock_path(config.datapath.run_dir, config.pair, config.role)
    path.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        # Who may read it may lock it, and keep the next controller from starting.
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        f = held.enter_context(os.fdopen(fd, "a+"))
        os.fchmod(fd, 0o640)
        pid = running(config)
        _flock(f.fileno(), str(path), config, f" (process {pid})" if pid > 0 else "")
        # Before a look at what the others have: of two that begin at once one or both are refused.
        f.truncate(0)
        f.write(
            json.dumps(
                {
                    "pair": config.pair, "role": config.role, "pid": os.getpid(),
                    "netns": _namespace("net"), "pidns": _namespace("pid"),
                    "devices": _devices(config),
                    "ports": [address for _, address, _ in ports(config)],
                }
            )
        )  # fmt: skip
        f.flush()
        pins = loader.make_pins(config.datapath.bpffs, config.pair, config.role)
        fd = os.open(pins, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        held.callback(os.close, fd)
        _flock(fd, pins, config)
        found = conflicts(config)
        if found:
            raise Refusal("\n  ".join(found))
        p = config.peer
        try:
            if p.cert:
                tls = Tls(p.cert, p.key, p.ca, p.peer_cert, p.identity)
                tls.context(server=config.role == "secondary")
        except TlsError as e:
            raise Refusal(f"[peer] cert, key, ca: {e}") from e
        yield
