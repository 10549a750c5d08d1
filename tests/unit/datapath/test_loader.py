# SPDX-License-Identifier: GPL-2.0-or-later
"""What becomes of pinned sets of programs when another one is loaded: by their names alone."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.datapath import loader, source
from colo_xdp.datapath.source import Options

SECONDARY = loader.Plan(source.Source("secondary", "text", (), (), (), "ring"), Options())
TAG = f"secondary_{SECONDARY.tag}_"


@pytest.mark.parametrize("whole", [False, True])
def test_what_a_dead_controller_has_half_pinned_is_in_nobodys_way(
    tmp_path: Path, whole: bool
) -> None:
    other = {"config", "flows", "idle_promoted_1_", "whole_primary_2_", "prog_primary_2_x"}
    mine = {f"prog_{TAG}svm_in", f"map_{TAG}config"} | ({f"whole_{TAG}"} if whole else set())
    older = {"idle_secondary_0_", "prog_secondary_0_svm_in", "map_secondary_0_config"}
    for name in other | mine | older:
        (tmp_path / name).touch()
    loader._set_aside(str(tmp_path), SECONDARY, (), whole=whole)
    left = {p.name for p in tmp_path.iterdir()}
    kept = mine if whole else set()
    assert left == (other - {"whole_primary_2_"}) | {"idle_primary_2_"} | kept


def test_marks_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("idle_secondary_0_", "prog_secondary_0_a", "map_secondary_0_b"):
        (tmp_path / name).touch()
    gone: list[str] = []
    monkeypatch.setattr(loader.os, "unlink", lambda path: gone.append(Path(path).name))
    loader._set_aside(str(tmp_path), SECONDARY, (), whole=False)
    assert gone[0] == "idle_secondary_0_" and len(gone) == 3


@pytest.mark.parametrize("role", ["primary", "secondary", "promoted"])
def test_every_option_reaches_the_programs(role: str) -> None:
    """A macro that no source mentions would leave its default in force without a word."""
    options = Options(fast=True, lease=True, rewrite_at_xdp=True)
    sources = "".join(p.read_text() for p in source.source_dir().rglob("*.[ch]"))
    for events in ("ring", "perf"):
        for o in (options, replace(options, rewrite_at_xdp=False)):
            flags = source.source(role, o, events).flags
            macros = [m[1] for f in flags if (m := re.match(r"-D(\w+)", f))]
            assert ("COLO_BUFFERS" in macros) is (role == "primary") and "COLO_LEASE" in macros
            unused = [m for m in macros if not re.search(rf"\b{m}\b", sources)]
            assert not unused


def maps_of_the_sources() -> dict[str, str]:
    """Return the size of each map, as the sources have it."""
    sources = "".join(p.read_text() for p in source.source_dir().rglob("*.[ch]"))
    table = r'BPF_(?:F_)?TABLE\("\w+",\s*[^,]+,\s*[^,]+,\s*(\w+),\s*([^,)]+)'
    ring = r"BPF_RINGBUF_OUTPUT\((\w+),\s*([^,)]+)"
    return dict(re.findall(table, sources) + re.findall(ring, sources))


def test_every_size_that_is_configured_is_of_a_map() -> None:
    """A map whose size the sources leave open would have one entry without a word."""
    names = {name for name, size in maps_of_the_sources().items() if size == "COLO_AS_CONFIGURED"}
    assert names == set(Options().entries("ring"))


def test_the_lasting_maps_are_those_of_the_sources() -> None:
    of_one_controller = {"scratch", "works", "events"}
    assert set(maps_of_the_sources()) - set(source.LASTING) == of_one_controller
    assert set(source.LASTING) <= set(maps_of_the_sources())


def test_the_programs_are_the_same_for_every_size_but_the_pins_are_not() -> None:
    options = Options(fast=True)
    one = loader.Plan(source.source("primary", options, "ring"), options)
    tags = {one.tag}
    for more in (
        replace(options, flow_table=1), replace(options, ring_pages=1), replace(options, conns=1)
    ):  # fmt: skip
        other = loader.Plan(source.source("primary", more, "ring"), more)
        assert other.source.tag == one.source.tag
        tags.add(other.tag)
    assert len(tags) == 4
    # the fast path spreads connections over its buffers by a division
    buffers = replace(options, buffers=7)
    assert source.source("primary", buffers, "ring").tag != one.source.tag


@pytest.fixture
def bpffs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(loader.syscall, "is_bpffs", lambda path: True)
    return tmp_path


def test_pins_are_nobody_elses(bpffs: Path) -> None:
    pins = Path(loader.make_pins(str(bpffs), "web1", "primary", 1))
    assert pins == bpffs / "colo-xdp/web1-primary/nic1"
    for path in (pins, pins.parent, pins.parent.parent):
        assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("where", ["colo-xdp", "colo-xdp/web1-primary"])
@pytest.mark.parametrize("harm", ["mode", "owner"])
def test_pins_in_a_directory_of_others_are_refused(bpffs: Path, where: str, harm: str) -> None:
    """Whoever made it before the controller could give it maps that they go on writing to."""
    (bpffs / where).mkdir(parents=True)
    if harm == "mode":
        (bpffs / where).chmod(0o777)
    elif os.geteuid():
        pytest.skip("gives a directory away")
    else:
        os.chown(bpffs / where, 12345, 12345)
    with pytest.raises(source.LoadError, match="others may have pinned something there"):
        loader.make_pins(str(bpffs), "web1", "primary")
