# SPDX-License-Identifier: GPL-2.0-or-later
"""Which pair a command means, and what its controller answers.

The arguments that most commands have in common are here, too.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import NOT_RUNNING, USAGE, fail

RUN_DIR = "/run/colo-xdp"
STATE_DIR = "/var/lib/colo-xdp/events"
BPFFS = "/sys/fs/bpf"
CONFIG_DIR = "/etc/colo-xdp"
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
ProgressOpt = Annotated[
    bool | None,
    typer.Option(
        "--progress/--no-progress",
        help="Say on stderr what it waits for, after a second; default: if that is a terminal.",
        show_default=False,
    ),
]


def load_config(path: Path) -> Any:
    """Read a configuration file; its mistakes end the command."""
    from ..config.file import ConfigError, load

    try:
        return load(path)
    except ConfigError as e:
        raise fail(str(e), USAGE) from e
    except OSError as e:
        raise fail(f"{path}: {e.strerror}", USAGE) from e


def control_socket(where: str | None, run_dir: str) -> str:
    """The control socket meant: named, of a config, or the only one there is."""
    from ..service.control_socket import NotRunning, SeveralRun, find

    if where is not None:
        path = Path(where)
        if path.suffix == ".sock" or path.is_socket():
            return where
        if "/" in where or path.suffix == ".toml" or path.exists():
            return _socket_of(path)
    try:
        return find(run_dir, where or "")
    except NotRunning as e:
        if where is not None and (path := config_of(where)).exists():
            return _socket_of(path)  # it may have another run_dir
        raise fail(str(e), NOT_RUNNING) from e
    except SeveralRun as e:
        raise fail(str(e), USAGE) from e


def config_of(name: str) -> Path:
    """Return where the configuration of a pair is by default."""
    return Path(CONFIG_DIR) / f"{name}.toml"


def _socket_of(path: Path) -> str:
    from ..service.pairs import socket_of

    return socket_of(load_config(path))


def ask(
    where: str | None, run_dir: str, command: str, progress: bool = False, **args: Any
) -> dict[str, Any]:
    """Return the answer of the pair's controller to a command; a refusal ends ours."""
    from ..controller.command import Command
    from ..service.control_socket import ControlError, NotRunning, request
    from ..service.progress import watched

    path = control_socket(where, run_dir)
    try:
        if progress:
            return watched(path, Command(command), args, lambda text: typer.echo(text, err=True))
        return request(path, Command(command), args)
    except NotRunning as e:
        raise fail(str(e), NOT_RUNNING) from e
    except ControlError as e:
        raise fail(str(e)) from e


def shows(progress: bool | None) -> bool:
    """Return whether stderr is told what a command waits for."""
    return sys.stderr.isatty() if progress is None else progress
