# SPDX-License-Identifier: GPL-2.0-or-later
"""What waits is counted in one place (I10)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from colo_xdp.compare.held_queue import Held, HeldQueue
from colo_xdp.compare.ledger import Ledger
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse
from tests.unit import frames as f

PACKAGE = Path(__file__).parents[3] / "colo_xdp"
COUNTS = {"pvm_packets", "pvm_bytes", "svm_packets"}
KEEPERS = {"compare/ledger.py", "compare/held_queue.py"}


def held(size: int, since: int = 0) -> Held:
    rec = Frame(f.tcp(1, 1, bytes(size)), since)
    return rec, parse(rec.frame), since


@pytest.fixture
def ledger() -> Ledger:
    return Ledger(3, 1000)


def charged(ledger: Ledger) -> tuple[int, int, int]:
    return ledger.pvm_packets, ledger.pvm_bytes, ledger.svm_packets


def test_two_queues_share_a_ledger(ledger: Ledger) -> None:
    a, b = HeldQueue(ledger), HeldQueue(ledger)
    one, two, three = held(10, 1), held(20, 2), held(30, 3)
    assert a.offer(*one) and b.offer(*two) and a.offer(*three)
    assert not b.offer(*held(1)), "three wait"
    size = sum(len(h[0].frame) for h in (one, two, three))
    assert charged(ledger) == (3, size, 0)
    assert list(a) == list(a.frames) == [one, three] and len(a) == 2 and a[1] == three
    assert a.pop() == one
    assert charged(ledger) == (2, size - len(one[0].frame), 0)
    assert b.offer(*one)
    assert a.drain() == [three] and b.drain() == [two, one]
    assert charged(ledger) == (0, 0, 0) and not a and not a.frames


def test_bytes_are_a_limit_too(ledger: Ledger) -> None:
    q = HeldQueue(ledger)
    assert q.offer(*held(1200)), "there was room when it came"
    assert not ledger.room() and ledger.room(2) and not q.offer(*held(1))
    q.push(*held(1))
    assert len(q) == 2, "whatever the limit"


def test_the_rest_of_a_frame_goes_on_waiting(ledger: Ledger) -> None:
    q = HeldQueue(ledger)
    q.extend([held(100, 5), held(7, 6)])
    rest = held(40)
    q.replace_head(*rest[:2])
    assert q[0] == (rest[0], rest[1], 5)
    assert charged(ledger) == (2, sum(len(rec.frame) for rec, _, _ in q), 0)


def test_raised_limits(ledger: Ledger) -> None:
    q = HeldQueue(ledger)
    ledger.raise_limits(2)
    assert [q.offer(*held(900)) for _ in range(6)] == [True] * 5 + [False]
    assert [ledger.admit_svm() for _ in range(6)] == [True] * 5 + [False]
    ledger.restore_limits()
    q.drain()
    ledger.discharge_svm(2)
    assert not ledger.admit_svm() and ledger.room()
    ledger.charge_svm(2)
    assert charged(ledger) == (0, 0, 5)


def test_nobody_else_changes_the_counts() -> None:
    writers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
                if node.attr in COUNTS:
                    writers.add(str(path.relative_to(PACKAGE)))
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = {a.value for a in node.args if isinstance(a, ast.Constant)}
                assert node.func.id != "setattr" or not names & COUNTS, path
    assert writers == KEEPERS
