# SPDX-License-Identifier: GPL-2.0-or-later
"""The pairs of this host: those with a configuration file, and those with a control socket."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..config.file import Config, ConfigError, load
from ..controller.command import Command
from .control_socket import ControlError, NotRunning, request

ANSWER_S = 3.0
AT_ONCE = 8

Row = dict[str, Any]
Ask = Callable[[str], dict[str, Any]]


def _status(path: str) -> dict[str, Any]:
    return request(path, Command.STATUS, timeout=ANSWER_S)


def socket_of(config: Config) -> str:
    """Return the path of the control socket of this host's controller."""
    return f"{config.datapath.run_dir}/{config.pair}.{config.role}.sock"


def pairs(config_dir: Path, run_dir: Path, ask: Ask = _status) -> list[Row]:
    """Return one row for each pair: its name, its role, and its status or why there is none."""
    found: dict[str, tuple[str, str, str]] = {}  # socket -> pair, role, trouble of the file
    wrong: list[Row] = []
    for path in sorted(config_dir.glob("*.toml")):
        try:
            c = load(path)
        except (ConfigError, OSError) as e:
            first = (str(e).splitlines() or [type(e).__name__])[0]
            wrong.append(_row(path.stem, "-", None, f"{path} is not valid: {first}"))
        else:
            found[socket_of(c)] = (c.pair, c.role, f"no controller runs; configured in {path}")
    for path in sorted(run_dir.glob("*.sock")):
        pair, _, role = path.stem.rpartition(".")
        found.setdefault(str(path), (pair, role, "no controller answers; it left its socket"))
    with ThreadPoolExecutor(AT_ONCE) as pool:
        rows = list(pool.map(lambda item: _one(item[0], item[1], ask), found.items()))
    running = {r["pair"] for r in rows if r["status"]}
    return sorted(
        [*rows, *(r for r in wrong if r["pair"] not in running)],
        key=lambda r: (r["pair"], r["role"]),
    )


def _one(path: str, known: tuple[str, str, str], ask: Ask) -> Row:
    pair, role, trouble = known
    try:
        return _row(pair, role, ask(path), "")
    except NotRunning:
        return _row(pair, role, None, trouble)
    except ControlError as e:
        return _row(pair, role, None, f"the controller does not answer: {e}")


def _row(pair: str, role: str, status: dict[str, Any] | None, trouble: str) -> Row:
    return {"pair": pair, "role": role, "status": status, "trouble": trouble}


def only(rows: Iterable[Row]) -> list[Row]:
    """Return the rows without the documents, for `list --json`."""
    keys = ("state", "reason", "since", "active", "if_peer_died")
    out = []
    for r in rows:
        s = r["status"]
        out.append(r | {"status": None if s is None else {k: s[k] for k in keys}})
    return out
