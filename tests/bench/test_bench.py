# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the harness: every figure is one, and failures and missed goals are seen.

Speed is never asserted here.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.bench import held, programs, published, queues, report
from tests.bench.__main__ import PARTS, leftovers, measure
from tests.bench.report import Part, Spread

rooted = pytest.mark.skipif(
    bool(os.geteuid()) and not os.environ.get("CI"), reason="needs root for network namespaces"
)


@pytest.fixture(scope="module")
def parts() -> Iterator[list[Part]]:
    """Return the parts that need no QEMU, with few frames."""
    leftovers()
    try:
        few = [
            held.Case("MTU", 1448, frames=300),
            held.Case("64 KB", 64_000, frames=30),
            held.Case("other boundaries", 1448, 1000, 8, frames=320),
            held.Case("P late", 1448, conns=8, frames=320, svm_first=True),
        ]
        with pytest.MonkeyPatch.context() as m:
            m.setattr(held, "quick_cases", lambda: few)
            yield measure(["programs", "held"], True, Path("/nonexistent"))
    finally:
        leftovers()


def _numbers(x: Any) -> Iterator[float]:
    if isinstance(x, dict):
        for v in x.values():
            yield from _numbers(v)
    elif isinstance(x, list):
        for v in x:
            yield from _numbers(v)
    elif isinstance(x, int | float) and not isinstance(x, bool):
        yield float(x)


@rooted
def test_nothing_is_missing(parts: list[Part]) -> None:
    assert [(p.key, e) for p in parts for e in p.errors] == []
    rows = {p.key: {r.name: r for r in p.rows} for p in parts}
    for scene in programs.scenes():
        assert f"{scene.prog}: {scene.name}" in rows["programs"]
    for prog in ("pvm_in", "svm_in", "svm_out", "svm_out_xdp", "svm_net", "pvm_release"):
        assert any(name.startswith(prog) for name in rows["programs"]), prog
    assert len(rows["held"]) == 4
    for row in rows["held"].values():
        assert set(row.arms) == set(row.wall) == set(held.ARMS)
        assert all(s.runs >= 3 and s.low <= s.median <= s.high for s in row.arms.values())
        assert row.arms["floor"].median > 0
    assert {g.goal for p in parts for g in p.goals} == set(held.GOALS.values())


@rooted
def test_the_report_has_its_shape(parts: list[Part], tmp_path: Path) -> None:
    report.write(parts, report.machine(quick=True), tmp_path)
    text = (tmp_path / "bench-report.json").read_text()
    got = json.loads(text)
    assert set(got) == {"machine", "results", "goals"}
    assert all(math.isfinite(x) for x in _numbers(got))
    for r in got["results"]:
        assert "error" in r or r["arms"], r
    for g in got["goals"]:
        assert set(g) == {"name", "value", "goal", "met"}
    table = (tmp_path / "bench-report.md").read_text()
    assert "nan" not in table and all(f"## {p.title}" in table for p in parts)


@rooted
def test_nothing_is_left_behind(parts: list[Part]) -> None:
    left = {p.name for p in Path("/run/netns").glob("cxb*")}
    assert left == set()
    assert not list(Path("/sys/fs/bpf/colo-xdp").glob("bench*"))


def test_a_part_that_fails_is_an_error_and_the_rest_goes_on(monkeypatch: Any) -> None:
    def fails(part: Part, quick: bool, build: Path) -> None:
        part.add("before", "ns", {"a": Spread.of([1.0])})
        raise ValueError("broken")

    monkeypatch.setitem(PARTS, "held", ("title", fails))
    monkeypatch.setitem(PARTS, "scale", ("title", lambda p, q, b: p.goal("g", None, 1.0)))
    a, b = measure(["held", "scale"], True, Path())
    assert a.errors == [("held", "ValueError: broken")] and len(a.rows) == 1
    got = report.as_json([a, b], {})
    assert got["results"][1] == {"part": "held", "name": "held", "error": "ValueError: broken"}
    assert got["goals"] == [{"name": "g (at least)", "value": None, "goal": 1.0, "met": False}]


def test_goals_and_ratios() -> None:
    part = Part("x", "x")
    ns = part.add(
        "ns", "ns", {"floor": Spread.of([2.0]), "fast path": Spread.of([4.0])}, base="floor"
    )
    assert ns.ratio("fast path") == 0.5 and ns.ratio("slow path") is None
    speed = part.add(
        "s", "Gbit/s", {"floor": Spread.of([2.0]), "fast path": Spread.of([4.0])}, base="floor",
        higher_is_better=True,
    )  # fmt: skip
    assert speed.ratio("fast path") == 2.0
    for value, least, met in ((0.9, True, True), (0.8, True, False), (0.8, False, True)):
        part.goal("g", value, 0.85, at_least=least)
        assert part.goals[-1].met is met
    part.goal("g", float("nan"), 0.85)
    assert not part.goals[-1].met
    assert Spread.of([3, 1, 2]) == Spread(2, 1, 3, 3)


ABOUT = {"cpu": "c", "cpus": 2, "kernel": "k", "qemu": "q", "commit": "x", "date": "d"}


def held_part(value: float) -> Part:
    part = Part("held", "title")
    arms = {"floor": Spread.of([2.0]), "fast path": Spread.of([4.0])}
    part.add("S behind by 1", "ns", arms, base="floor", wall={"floor": Spread.of([1.0, 3.0])})
    part.error("another row", "it was not there")
    part.goal("reach", value, 0.85)
    return part


def test_published_parts_replace_what_was_there(tmp_path: Path, monkeypatch: Any) -> None:
    page, folder = tmp_path / "benchmarks.md", tmp_path / "report"
    page.write_text(f"before\n{published.BEGIN}\nold\n{published.END}\nafter\n")
    monkeypatch.setattr(published, "PAGE", page)
    monkeypatch.setattr(published, "FOLDER", folder)

    def publish(part: Part, commit: str) -> tuple[str, str]:
        about = ABOUT | {"commit": commit}
        published.publish([part], about, ["scale", "held"], lambda parts, where: [])
        text = page.read_text()
        assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
        return text, (folder / "bench-report.md").read_text()

    for text in publish(held_part(0.5), "one"):
        assert "| reach | ≥ 0.85 | 0.5 | **missed** |" in text and "**0.50**" in text
        assert text.count("commit one") == 1
    scale = Part("scale", "another title")
    scale.goal("far", 1.0, 1.0)
    text, full = publish(scale, "two")
    assert text.index("| far |") < text.index("| reach |"), "in the order of the parts"
    assert "commit one" in text and "commit one" in full and "commit two" in full
    assert "another row: not measured" in full and "wall 2.00" in full
    text, _ = publish(held_part(0.9), "two")
    assert "| reach | ≥ 0.85 | 0.9 | met |" in text and text.count("| reach |") == 1
    assert text.count("commit two") == 1


def test_a_published_part_that_is_no_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "held.json").write_text('{"about": {}, "part": {"rows": [{}]}}')
    with pytest.raises(ValueError, match=r"held\.json"):
        published.kept(tmp_path / "held.json")


def test_plans_give_both_guests_the_same_bytes() -> None:
    for case in [*held.quick_cases(), held.Case("x", 1448, 1000, 3, 2, 30)]:
        sent = [0, 0]
        for side, data in held.plan(case):
            head = 10 + 66 + (4 if side else 0)
            sent[side] += len(data) - head
            ahead = sent[case.svm_first] >= sent[not case.svm_first]
            assert ahead or case.svm_payload, case
        assert sent[0] == sent[1] > 0


def test_each_frame_has_one_writer() -> None:
    """Whether each queue has its connections, or each connection all queues."""
    case = held.Case("x", 1448, conns=8, frames=64)
    writes = held.plan(case)

    def plans(count: int, moving: bool = False) -> list[list[tuple[int, bytes]]]:
        taps: Any = [SimpleNamespace(fd=i) for i in range(count)]
        peer: Any = SimpleNamespace(fd=10)
        client: Any = SimpleNamespace(fileno=lambda: 11)
        return queues.Arm("", None, taps, peer, client, None, moving).plans(case, writes)  # type: ignore[arg-type]

    everything = sorted(data for _, data in writes)
    for found in (plans(1), plans(4), plans(4, moving=True)):
        assert sorted(d for p in found for fd, d in p if fd != 11) == everything
    split = plans(4)
    assert [{fd for fd, _ in p} - {10, 11} for p in split] == [{0}, {1}, {2}, {3}]
    (one,) = plans(4, moving=True)
    assert {fd for fd, _ in one} - {10, 11} == {0, 1, 2, 3}
