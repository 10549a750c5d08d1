# SPDX-License-Identifier: GPL-2.0-or-later
"""A read of an NBD export: against qemu-nbd, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from colo_xdp.qemu import nbd

QEMU_NBD = shutil.which("qemu-nbd")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.skipif(QEMU_NBD is None and not os.environ.get("CI"), reason="no qemu-nbd")
def test_a_real_server(tmp_path: Path) -> None:
    image, port = tmp_path / "a.raw", free_port()
    image.write_bytes(bytes((1 << 20) + 512))
    p = subprocess.Popen(
        [QEMU_NBD or "", "-f", "raw", "-t", "-e", "8", "-x", "web1.d0", "-b", "127.0.0.1", "-p",
         str(port), str(image)],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        end = time.monotonic() + 20
        while True:
            try:
                asyncio.run(nbd.read("127.0.0.1", port, "web1.d0", 0.5, 5))
                break
            except OSError:
                assert time.monotonic() < end
                time.sleep(0.05)
        for place in (0.0, 0.3, 0.999):
            asyncio.run(nbd.read("127.0.0.1", port, "web1.d0", place, 5))
        with pytest.raises(nbd.NbdError, match=r"web2\.d0"):
            asyncio.run(nbd.read("127.0.0.1", port, "web2.d0", 0.5, 5))
    finally:
        p.terminate()
        said = p.communicate(timeout=10)[1]
    assert "negotiation failed" not in said, "a probe is no error in the server's log"


GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\0\1"
ACK = nbd.REPLY.to_bytes(8, "big") + bytes([0, 0, 0, 7, 0, 0, 0, 1, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n",
        b"NBDMAGIC" + bytes(10),
        GREETING + b"x" * 40,
        GREETING + ACK[:-4] + b"\xff\xff\xff\xff",
        GREETING + ACK + b"y" * 16,
        GREETING + ACK + nbd.SIMPLE_REPLY.to_bytes(4, "big") + b"\0\0\0\5" + bytes(8),
        b"NBDM",
        b"",
    ],
)
def test_a_server_that_is_none_or_fails(answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        writer.write_eof()
        await reader.read()
        writer.close()

    async def body(serve: Callable[..., object]) -> None:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)  # type: ignore[arg-type]
        port = server.sockets[0].getsockname()[1]
        try:
            with pytest.raises((nbd.NbdError, EOFError, OSError)):
                await asyncio.wait_for(nbd.read("127.0.0.1", port, "web1.d0", 0.5, 5), 5)
        finally:
            server.close()

    asyncio.run(body(serve))
