# SPDX-License-Identifier: GPL-2.0-or-later
"""The scenario corpus: what we do, and what the installed QEMU does with the same frames."""

from __future__ import annotations

import os
import shutil

import pytest

from colo_xdp.tools import corpus
from colo_xdp.tools.corpus import Scenario, craft
from colo_xdp.tools.corpus.play import play

from . import qemu, table

SCENARIOS = corpus.load()


@pytest.mark.parametrize("s", SCENARIOS, ids=lambda s: s.name)
def test_ours(s: Scenario) -> None:
    assert play(s) == [step.then for step in s.steps], s.about


def test_the_corpus_is_large_and_each_scenario_has_a_name_of_its_own() -> None:
    names = [s.name for s in SCENARIOS]
    assert len(names) == len(set(names)) >= 60


def test_every_difference_from_qemu_has_a_reason() -> None:
    found = table.recorded()
    assert set(found) == {s.name for s in SCENARIOS}, "run python -m tests.oracle.qemu"
    for s in SCENARIOS:
        assert table.same(s, found[s.name]) or s.why, f"{s.name}: QEMU: {found[s.name]}"


def test_the_table_is_up_to_date() -> None:
    assert table.TABLE.read_text() == table.text(), "run python -m tests.oracle.table"


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("", "does not begin with one"),
        ("tpc 0:1", "does not begin with one"),
        ("tcp 0:1 sqe=1", "'sqe=1' is unknown"),
        ("tcp 0:1 seq=one", "not a number"),
        ("udp hello", "is unknown"),
    ],
)
def test_a_line_that_means_no_frame_is_refused(line: str, what: str) -> None:
    with pytest.raises(craft.SpecError, match=what):
        craft.spec(line)


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_the_installed_qemu_still_decides_so() -> None:
    """QEMU still does what is recorded; otherwise the table is wrong.

    Its timers are real, so whatever differs is tried once more, alone.
    """
    if shutil.which(qemu.QEMU) is None:
        assert not os.environ.get("CI"), "no QEMU here"
        pytest.skip(f"{qemu.QEMU} is not installed")
    before = table.RECORDED.read_text().splitlines()[0]
    release = ".".join(qemu.version().split()[3].split(".")[:2])
    if f"version {release}." not in before:
        pytest.skip(f"recorded with another release: {before}, here {release}")
    found, was = qemu.decide_all(SCENARIOS), table.recorded()
    moved = [s for s in SCENARIOS if found[s.name] != was[s.name]]
    assert len(moved) < 10, [s.name for s in moved]
    assert {s.name: qemu.decide(s) for s in moved} == {s.name: was[s.name] for s in moved}
