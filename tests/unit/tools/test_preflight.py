# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what a controller that begins takes for another one's."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.config.file import Config, load
from colo_xdp.tools import preflight

EXAMPLES = Path(__file__).parents[3] / "deploy" / "examples"


def config(tmp_path: Path) -> Config:
    found = load(EXAMPLES / "primary.toml")
    return replace(found, datapath=replace(found.datapath, run_dir=str(tmp_path)))


@contextmanager
def locked(tmp_path: Path, **said: Any) -> Iterator[Path]:
    """Hold another controller's lock; the file says what its holder, or a former one, wrote."""
    path = tmp_path / "other.primary.lock"
    net = config(tmp_path).networks[0]
    known = {
        "pair": "other", "role": "primary", "pid": os.getpid(), "ports": [],
        "netns": os.stat("/proc/self/ns/net").st_ino, "devices": {net.tap: "tap"},
        "pidns": os.stat("/proc/self/ns/pid").st_ino,
    }  # fmt: skip
    path.write_text(json.dumps(known | said))
    with ExitStack() as held:
        f = held.enter_context(path.open("a+"))
        fcntl.flock(f, fcntl.LOCK_EX)
        yield path


def dead() -> int:
    """Return the number of a process that has ended."""
    p = subprocess.Popen([sys.executable, "-c", ""])
    p.wait()
    return p.pid


def test_a_device_serves_one_pair(tmp_path: Path) -> None:
    with locked(tmp_path):
        found = preflight.conflicts(config(tmp_path), runs=True)
    assert (
        len(found) == 1
        and f"pair other, whose controller runs here (process {os.getpid()})" in (found[0])
    )


@pytest.mark.parametrize(
    "said", [{"netns": 1}, {"pid": 0}], ids=["another namespace", "a former holder"]
)
def test_what_is_no_conflict(tmp_path: Path, said: dict[str, Any]) -> None:
    """A lock is taken before its holder has written: until then a former one's text is in it.

    The number of that one's network namespace may be another's by now: this host's.
    """
    said = {"pid": dead()} if "pid" in said else said
    with locked(tmp_path, **said):
        assert preflight.conflicts(config(tmp_path), runs=True) == []


@pytest.mark.parametrize(
    "said", [{"pidns": 1}, {"pidns": None}, {"pid": "?"}, {"pid": -1}, {"pid": 1 << 70}], ids=str
)
def test_a_process_of_which_nothing_is_known_counts(tmp_path: Path, said: dict[str, Any]) -> None:
    with locked(tmp_path, **{"pid": dead(), **said}):
        assert len(preflight.conflicts(config(tmp_path), runs=True)) == 1


def test_of_two_that_begin_at_once_one_sees_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a controller uses is written before it looks at what others use."""
    mine = config(tmp_path)
    mine = replace(mine, datapath=replace(mine.datapath, bpffs=str(tmp_path)))
    monkeypatch.setattr(preflight.loader, "make_pins", lambda *args: str(tmp_path))
    seen: list[dict[str, Any]] = []

    def conflicts(found: Config) -> list[str]:
        path = preflight.lock_path(str(tmp_path), found.pair, found.role)
        seen.append(json.loads(path.read_text()))
        return ["enough"]

    monkeypatch.setattr(preflight, "conflicts", conflicts)
    with pytest.raises(preflight.Refusal, match="enough"), preflight.claim(mine):
        pass
    assert seen[0]["pid"] == os.getpid() and mine.networks[0].tap in seen[0]["devices"]
