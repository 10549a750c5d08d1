# SPDX-License-Identifier: GPL-2.0-or-later
"""Serve the control socket: one JSON object per line, a request and its answer.

    {"command": "status", "args": {}}  ->  {"ok": true, "result": {...}}
                                           {"ok": false, "error": "..."}

The controller runs a ControlServer; the command line calls request().
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import json
import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

MAX_MESSAGE = 1 << 20
READ_TIMEOUT_S = 5.0


Handler = Callable[[str, dict[str, Any]], Awaitable[dict[str, Any]]]


class ControlError(RuntimeError):
    """A request was refused, or the socket cannot be served; the text is for the operator."""


class NotRunning(ControlError):
    """Nobody answers on the socket."""


class SeveralRun(ControlError):
    """Several controllers run here, and nobody said which one is meant."""


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(1)
        try:
            s.connect(path)
        except OSError:
            return False
        return True


class ControlServer:
    """Serve a handler on a Unix socket, mode 0660: root and the socket's group."""

    def __init__(self, path: str, handler: Handler) -> None:
        self.path, self._handler = path, handler
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Begin to serve.

        Raises ControlError when another controller answers there, OSError when the socket cannot be
        created.
        """
        if os.path.exists(self.path):
            if _answers(self.path):
                raise ControlError(f"{self.path} is already served: another controller runs")
            os.unlink(self.path)
        old = os.umask(0o117)
        try:
            self._server = await asyncio.start_unix_server(
                self._serve, self.path, limit=MAX_MESSAGE
            )
        finally:
            os.umask(old)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            answer = await self._answer(reader)
            writer.write(json.dumps(answer).encode() + b"\n")
            await asyncio.wait_for(writer.drain(), READ_TIMEOUT_S)
        except (OSError, TimeoutError):
            pass  # the client is gone; nothing was promised to it
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> dict[str, Any]:
        try:
            line = await asyncio.wait_for(reader.readline(), READ_TIMEOUT_S)
            request = json.loads(line)
        except TimeoutError:
            return {"ok": False, "error": "no request in time"}
        except (ValueError, RecursionError) as e:
            return {"ok": False, "error": f"not a request: {e}"}
        if not isinstance(request, dict):
            return {"ok": False, "error": "not a request: an object is needed"}
        command, args = request.get("command"), request.get("args", {})
        if not isinstance(command, str) or not isinstance(args, dict):
            return {"ok": False, "error": "a request has a command (text) and args (an object)"}
        try:
            return {"ok": True, "result": await self._handler(command, args)}
        except ValueError as e:
            return {"ok": False, "error": str(e)}

    async def close(self) -> None:
        """Stop serving and remove the socket."""
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path)


def find(run_dir: str, pair: str = "") -> str:
    """Return the control socket of the only controller here, or the only one of that pair.

    Raises NotRunning, or SeveralRun.
    """
    found = sorted(Path(run_dir).glob(f"{glob.escape(pair)}.*.sock" if pair else "*.sock"))
    if len(found) == 1:
        return str(found[0])
    if not found and pair:
        raise NotRunning(f"no controller of pair {pair} runs here (none in {run_dir})")
    if not found:
        raise NotRunning(f"no controller runs here (no control socket in {run_dir})")
    if pair:
        names = "\n  ".join(map(str, found))
        raise SeveralRun(f"both roles of {pair} run here; name one:\n  {names}")
    names = "\n  ".join(f"{p.stem.rpartition('.')[0]}  ({p})" for p in found)
    raise SeveralRun(f"several controllers run here; name a pair:\n  {names}")


def request(
    path: str, command: str, args: dict[str, Any] | None = None, timeout: float = 60.0
) -> dict[str, Any]:
    """Send one request and wait for the answer, `timeout` in s.

    Raises NotRunning when nobody answers, ControlError with the controller's text otherwise.
    """
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(timeout)
        try:
            s.connect(path)
        except OSError as e:
            raise NotRunning(f"no controller answers at {path}: {e.strerror or e}") from e
        try:
            s.sendall(json.dumps({"command": command, "args": args or {}}).encode() + b"\n")
            with s.makefile("rb") as f:
                line = f.readline(16 * MAX_MESSAGE)
        except TimeoutError as e:
            raise ControlError(f"{command}: no answer within {timeout:g} s") from e
        except OSError as e:
            raise NotRunning(f"{path}: {e}") from e
    try:
        answer = json.loads(line)
        if answer["ok"]:
            result: dict[str, Any] = answer["result"]
            return result
        error = str(answer["error"])
    except (ValueError, KeyError, TypeError) as e:
        raise NotRunning(f"{path}: the controller went away before it answered") from e
    raise ControlError(error)
