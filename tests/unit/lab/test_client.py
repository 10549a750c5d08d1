# SPDX-License-Identifier: GPL-2.0-or-later
"""The lab's judge: what a download that breaks off has received is compared as what it is."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from colo_xdp.lab import client


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (b"HTTP/1.0 200 OK\r\nContent-Le", b""),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\n", b""),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nab", b"ab"),
    ],
)
def test_the_header_of_a_download_that_stalls_is_no_wrong_byte(
    sent: bytes, body: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    over = threading.Event()

    def serve() -> None:
        s, _ = listener.accept()
        s.sendall(sent)
        over.wait(10)
        s.close()

    thread = threading.Thread(target=serve)
    thread.start()

    def connect(port: int, v6: bool, timeout: float, nic: int) -> socket.socket:
        return socket.create_connection(listener.getsockname(), 0.3)

    def here(ns: str, run: Callable[[], Any]) -> Any:
        return run()

    monkeypatch.setattr(client, "_connect", connect)
    monkeypatch.setattr(client, "in_ns", here)
    f = client.Client("x").http("f1m")
    over.set()
    thread.join(10)
    listener.close()
    assert not f.ok and f.body == body and "timed out" in f.error
