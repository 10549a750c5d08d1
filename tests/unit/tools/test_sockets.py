# SPDX-License-Identifier: GPL-2.0-or-later
"""Who has a socket, as /proc shows it."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from colo_xdp.tools import sockets

ME = f"(process {os.getpid()})"


@pytest.mark.parametrize(
    ("host", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::1", "::1")]
)
def test_who_listens(host: str, asked: str) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as s:
        s.bind((host, 0))
        port = s.getsockname()[1]
        assert sockets.user_of(asked, port, socket.SOCK_STREAM) == "", "it does not listen yet"
        s.listen()
        assert sockets.user_of(asked, port, socket.SOCK_STREAM).endswith(ME)
        assert sockets.user_of(asked, port, socket.SOCK_DGRAM) == ""
    assert sockets.user_of(asked, port, socket.SOCK_STREAM) == ""


def test_who_has_a_datagram_socket() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1", 0))
        name = sockets.user_of("127.0.0.1", s.getsockname()[1], socket.SOCK_DGRAM)
    assert name.endswith(ME) and name.split()[0]


def test_who_listens_at_a_path_without_a_connection(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    assert sockets.listener(path) == 0
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        assert sockets.listener(path) == 0, "nobody listens"
        s.listen()
        assert sockets.listener(path) == os.getpid()
        s.settimeout(0)
        with pytest.raises(BlockingIOError):
            s.accept()
    assert sockets.listener(path) == 0 and Path(path).exists(), "it was left behind"


def test_names() -> None:
    assert sockets.named(0) == "" and sockets.named(1 << 30) == f"process {1 << 30}"
