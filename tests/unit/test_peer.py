# SPDX-License-Identifier: GPL-2.0-or-later
"""The control channel over real sockets: who gets in, what is heard, what is lost."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colo_xdp import abi, wire
from colo_xdp.peer import Peer, PeerError, split_address


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class End:
    """One end that notes what it is told."""

    def __init__(self, role: str, port: int, pair: str = "p", tls: Any = None) -> None:
        self.up = 0
        self.down: list[str] = []
        self.got: list[dict[str, Any]] = []
        self.peer = Peer(
            pair=pair,
            role=role,
            local=f"127.0.0.1:{port if role == 'secondary' else 1}",
            remote=f"127.0.0.1:{port}",
            tls=tls,
            on_up=self._up,
            on_down=self.down.append,
            on_message=self.got.append,
        )

    def _up(self) -> None:
        self.up += 1


async def until(cond: Callable[[], object], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not cond():
            await asyncio.sleep(0.01)


async def both(port: int, **kw: Any) -> tuple[End, End]:
    s, p = End("secondary", port, **kw), End("primary", port, **kw)
    await s.peer.start()
    await p.peer.start()
    await until(lambda: s.peer.connected and p.peer.connected)
    return p, s


def test_messages_and_loss() -> None:
    async def go() -> None:
        p, s = await both(free_port())
        assert p.peer.send("begin", n=1, cause="operator", initial=False)
        await until(lambda: s.got)
        assert s.got == [{"type": "begin", "n": 1, "cause": "operator", "initial": False}]
        assert s.peer.silent_ms() < 5000
        await p.peer.close()
        await until(lambda: s.down)
        assert not s.peer.connected and not s.peer.send("begun", n=1)
        await s.peer.close()

    asyncio.run(go())


def test_primary_comes_back_by_itself() -> None:
    async def go() -> None:
        port = free_port()
        p, s = await both(port)
        await s.peer.close()
        await until(lambda: p.down)
        s2 = End("secondary", port)
        await s2.peer.start()
        await until(lambda: s2.peer.connected and p.up == 2)
        await p.peer.close()
        await s2.peer.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        wire.encode("begun", n=1),
        wire.encode("hello", v=wire.VERSION, pair="other", role="primary", boot="", abi=abi.ABI),
        wire.encode("hello", v=9, pair="p", role="primary", boot="", abi=abi.ABI),
        wire.encode("hello", v=wire.VERSION, pair="p", role="secondary", boot="", abi=abi.ABI),
        b"\xff" * 70000 + b"\n",
    ],
    ids=["http", "no-hello", "other-pair", "other-version", "same-role", "flood"],
)
def test_strangers_are_refused_and_do_not_disturb(first: bytes) -> None:
    async def go() -> None:
        port = free_port()
        p, s = await both(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        async with asyncio.timeout(5):
            while await reader.read(4096):  # our hello, then the end
                pass
        writer.close()
        assert s.peer.refused >= 1
        assert s.peer.connected and p.peer.connected and not s.down
        p.peer.send("begun", n=3)
        await until(lambda: s.got)
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


def test_garbage_in_the_middle_cuts_the_connection() -> None:
    async def go() -> None:
        port = free_port()
        s = End("secondary", port)
        await s.peer.start()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        hello = dict(v=wire.VERSION, pair="p", role="primary", boot="", abi=abi.ABI)
        writer.write(wire.encode("hello", **hello))
        await until(lambda: s.peer.connected)
        writer.write(b'{"type": "done"}\n')
        await until(lambda: s.down)
        assert "fields" in s.down[0]
        writer.close()
        await s.peer.close()

    asyncio.run(go())


def certificate(directory: Path, name: str) -> tuple[str, str]:
    crt, key = directory / f"{name}.crt", directory / f"{name}.key"
    cmd = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    cmd += ["-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(key), "-out", str(crt)]
    subprocess.run(cmd, check=True, capture_output=True)
    return str(crt), str(key)


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl is not installed")
def test_only_the_pinned_certificate_gets_in(tmp_path: Path) -> None:
    a, b, c = (certificate(tmp_path, n) for n in ("a", "b", "c"))

    async def go() -> None:
        port = free_port()
        s = End("secondary", port, tls=(*a, b[0]))
        await s.peer.start()
        stranger = End("primary", port, tls=(*c, a[0]))
        await stranger.peer.start()
        plain = End("primary", port)
        await plain.peer.start()
        right = End("primary", port, tls=(*b, a[0]))
        await right.peer.start()
        await until(lambda: right.peer.connected and s.peer.connected)
        right.peer.send("begun", n=1)
        await until(lambda: s.got)
        assert s.up == 1 and not stranger.peer.connected and not plain.peer.connected
        for e in (stranger, plain, right, s):
            await e.peer.close()

    asyncio.run(go())


def test_a_missing_certificate_is_named() -> None:
    async def go() -> None:
        e = End("secondary", free_port(), tls=("/nonexistent.crt", "/x", "/y"))
        with pytest.raises(PeerError, match="cert"):
            await e.peer.start()

    asyncio.run(go())


def test_addresses() -> None:
    assert split_address("192.0.2.1:98") == ("192.0.2.1", 98)
    assert split_address("[fd00::1]:98") == ("fd00::1", 98)
