# SPDX-License-Identifier: GPL-2.0-or-later
"""sd_notify over a real datagram socket, as systemd listens on one."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.config.file import load
from colo_xdp.service import waiting
from colo_xdp.service.systemd import Notifier

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"


@pytest.fixture(params=["path", "abstract"])
def systemd(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[socket.socket]:
    """The manager's end, named as it names itself: a path, or `@` for the abstract space."""
    name = str(tmp_path / "notify") if request.param == "path" else f"@colo-xdp-{tmp_path}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
        s.bind(name.replace("@", "\0", 1) if request.param == "abstract" else name)
        s.settimeout(2)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield s


def test_fields_arrive_in_one_datagram(systemd: socket.socket) -> None:
    Notifier().send(READY="1", STATUS="both guests run")
    assert systemd.recv(4096) == b"READY=1\nSTATUS=both guests run"


def test_patience_sets_and_restores_the_watchdog(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    n = Notifier()
    assert n.watchdog_s == 5  # twice within the time of the unit
    n.patience(60)
    assert systemd.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=60000000"
    n.patience(None)
    assert systemd.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=10000000"


def test_who_has_waited_for_a_device_gets_its_time_to_load(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It was ready while it waited: the watchdog would end it in the middle of compiling."""
    monkeypatch.setenv("WATCHDOG_USEC", "3000000")
    monkeypatch.setattr(waiting, "_there", lambda name: True)
    config = load(EXAMPLES / "primary.toml")
    here = replace(config.datapath, run_dir=str(tmp_path))
    metrics = replace(config.metrics, listen="")
    assert waiting.wait_for(replace(config, datapath=here, metrics=metrics), "tap0", "no tap0")
    assert systemd.recv(4096).startswith(b"READY=1")
    assert systemd.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=120000000"


def test_a_manager_that_is_gone_or_does_not_read_stops_nobody(systemd: socket.socket) -> None:
    n = Notifier()
    for _ in range(5000):  # more than a socket's queue takes
        n.send(WATCHDOG="1")
    systemd.close()
    n.send(STOPPING="1")


def test_silent_without_systemd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    monkeypatch.setenv("WATCHDOG_USEC", "junk")
    n = Notifier()
    assert n.watchdog_s == 0
    n.patience(1)
    n.send(READY="1")


def test_a_limit_of_our_own_is_below_the_units(
    systemd: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "10000000")
    n = Notifier(longest_s=3)
    assert n.watchdog_s == 1.5
    n.patience(None)
    assert systemd.recv(4096) == b"WATCHDOG=1\nWATCHDOG_USEC=3000000"
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert Notifier(longest_s=3).watchdog_s == 1
    monkeypatch.delenv("WATCHDOG_USEC")
    assert Notifier(longest_s=3).watchdog_s == 0
