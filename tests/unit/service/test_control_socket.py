# SPDX-License-Identifier: GPL-2.0-or-later
"""The control socket: answers, refusals, strangers, leftovers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from colo_xdp.service.control_socket import (
    MAX_MESSAGE,
    ControlError,
    ControlServer,
    NotRunning,
    request,
)

T = TypeVar("T")


async def handler(command: str, args: dict[str, Any]) -> dict[str, Any]:
    if command == "echo":
        return args
    if command == "big":
        return {"x": "y" * (2 * MAX_MESSAGE)}
    raise ValueError(f"unknown command {command!r}")


def served(path: Path, client: Callable[[], T]) -> T:
    async def go() -> T:
        server = ControlServer(str(path), handler)
        await server.start()
        try:
            return await asyncio.to_thread(client)
        finally:
            await server.close()

    return asyncio.run(go())


def raw(path: Path, data: bytes, *, end: bool = True) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as s:
        s.settimeout(10)
        s.connect(str(path))
        with contextlib.suppress(BrokenPipeError):
            s.sendall(data)
            if end:
                s.shutdown(socket.SHUT_WR)
        with s.makefile("rb") as f:
            answer: dict[str, Any] = json.loads(f.readline())
            return answer


def test_answers_and_refusals(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    assert served(path, lambda: request(str(path), "echo", {"a": [1, "x"]})) == {"a": [1, "x"]}
    assert len(served(path, lambda: request(str(path), "big"))["x"]) == 2 * MAX_MESSAGE
    with pytest.raises(ControlError, match="unknown command 'no'"):
        served(path, lambda: request(str(path), "no"))


def test_only_the_owner_and_the_group_may_talk(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    mode = served(path, lambda: stat.S_IMODE(os.stat(path).st_mode))
    assert mode == 0o660
    assert not path.exists(), "removed at the end"


@pytest.mark.parametrize(
    "data",
    [b"\n", b"garbage\n", b"[]\n", b'{"command": 1}\n', b'{"command": "echo", "args": 3}\n',
     b"[" * 50000 + b"\n", b"x" * (MAX_MESSAGE + 10) + b"\n", b""],
    ids=["empty", "garbage", "list", "number", "args", "deep", "huge", "nothing"],
)  # fmt: skip
def test_bad_requests_get_an_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "s.sock"
    answer = served(path, lambda: raw(path, data))
    assert answer["ok"] is False and answer["error"]


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotRunning):
        request(str(tmp_path / "none.sock"), "echo")


def test_a_leftover_socket_is_replaced_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))  # bound and dead: nobody listens
    assert served(path, lambda: request(str(path), "echo")) == {}

    async def second() -> None:
        first = ControlServer(str(path), handler)
        await first.start()
        try:
            with pytest.raises(ControlError, match="already served"):
                await ControlServer(str(path), handler).start()
        finally:
            await first.close()

    asyncio.run(second())
