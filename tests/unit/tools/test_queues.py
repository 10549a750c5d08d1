# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of queues and vhost, of a real QEMU where there is one to ask."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.datapath import devices
from colo_xdp.qemu.hardware import parse_qtree
from colo_xdp.qemu.nic import Card, Multiqueue, multiqueue
from colo_xdp.tools import findings, guest_checks, vhost
from tests.unit.qemu.test_hardware import TREE

CARD = Card("virtio-net-pci.0", "52:54:00:12:34:56", tap="tap0", queues=4)


def test_what_is_known_of_a_card() -> None:
    assert multiqueue(CARD, parse_qtree(TREE), 4) == Multiqueue(4, False, 0, 4)
    tree = TREE.replace("mq = false", "mq = true").replace(
        "        addr = 02.0\n", "        addr = 02.0\n        vectors = 10 (0xa)\n"
    )
    assert multiqueue(CARD, parse_qtree(tree), 4) == Multiqueue(4, True, 10, 4)
    assert multiqueue(CARD, {}, 1) == Multiqueue(4, False, 0, 1), "a card of another kind"


@pytest.mark.parametrize(
    ("card", "said"),
    [
        (Multiqueue(1, False, 3, 1), []),
        (Multiqueue(1, True, 3, 1), []),
        (Multiqueue(4, True, 10, 4), []),
        (Multiqueue(4, True, 10, 8), []),
        (Multiqueue(4, True, 0, 4), []),
        (Multiqueue(4, False, 3, 4), ["mq=off"]),
        (Multiqueue(4, True, 9, 4), ["9 interrupts for 4"]),
        (Multiqueue(4, True, 10, 2), ["4 for a guest with 2 vCPUs"]),
        (Multiqueue(4, False, 3, 1), ["mq=off", "with 1 vCPUs"]),
    ],
)
def test_what_keeps_a_guest_from_its_queues(card: Multiqueue, said: list[str]) -> None:
    found = card.obstacles()
    assert len(found) == len(said)
    for (text, remedy), want in zip(found, said, strict=True):
        assert want in text and remedy


def queues(card: Multiqueue, opened: int, monkeypatch: pytest.MonkeyPatch) -> list[findings.Check]:
    monkeypatch.setattr(devices, "link_info", lambda name: SimpleNamespace(queues=opened))
    return list(guest_checks.queues(card, "tap0"))


def test_doctor_counts_queues_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    four = Multiqueue(4, True, 10, 4)
    (good,) = queues(four, 4, monkeypatch)
    assert good.level == findings.OK and good.text.startswith("4 ")
    (foreign,) = queues(four, 5, monkeypatch)
    assert foreign.level == findings.FAIL and "another process" in foreign.text
    (plain,) = queues(Multiqueue(1, False, 3, 1), 0, monkeypatch)
    assert plain.level == findings.OK
    (unused,) = queues(Multiqueue(2, False, 3, 2), 2, monkeypatch)
    assert unused.level == findings.WARN and "vectors=6" in unused.remedy


def config(path: str) -> Any:
    return SimpleNamespace(qemu=SimpleNamespace(qmp=path))


def test_doctor_sees_vhost_by_what_qemu_has_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unknown,) = guest_checks.vhost(config(str(tmp_path / "none")))
    assert unknown.level == findings.WARN and "not known" in unknown.text
    path = str(tmp_path / "qmp")
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        s.listen()
        assert vhost.listener(path) == os.getpid()
        (off,) = guest_checks.vhost(config(path))
        assert off.level == findings.OK and off.text.startswith("off")
        device = str(tmp_path / "vhost-net")
        monkeypatch.setattr(vhost.opened, "__defaults__", (device,))
        fds = [os.open(device, os.O_CREAT | os.O_RDWR) for _ in range(2)]
        try:
            (on,) = guest_checks.vhost(config(path))
            assert on.level == findings.WARN and "(2 queues)" in on.text
            assert "vhost-drill" in on.remedy
            monkeypatch.setattr(vhost, "zero_copy", lambda: True)
            first, _ = guest_checks.vhost(config(path))
            assert first.level == findings.FAIL and "zcopytx" in first.remedy
        finally:
            for fd in fds:
                os.close(fd)


@pytest.mark.parametrize(("text", "on"), [("0\n", False), ("1\n", True), ("3\n", True)])
def test_zero_copy_is_a_mask_of_queues(tmp_path: Path, text: str, on: bool) -> None:
    path = tmp_path / "experimental_zcopytx"
    path.write_text(text)
    assert vhost.zero_copy(path) is on
    assert not vhost.zero_copy(tmp_path / "none"), "the module is not loaded"
