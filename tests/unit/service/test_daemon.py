# SPDX-License-Identifier: GPL-2.0-or-later
"""The process around a controller: it stays when the roles change."""

from __future__ import annotations

import asyncio
import fcntl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp import user_command
from colo_xdp.abi import Mode
from colo_xdp.config.file import Config, load
from colo_xdp.datapath import loader
from colo_xdp.datapath.attach import Taken
from colo_xdp.datapath.prepare import DataPathError
from colo_xdp.service import daemon
from colo_xdp.service.mark_file import MarkFile
from colo_xdp.tools import preflight
from colo_xdp.tools.preflight import AlreadyRuns, Refusal
from tests.unit.controller.fakes import primary

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"


@pytest.mark.parametrize("last", [0, 1])
def test_a_change_of_roles_makes_a_new_controller(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: int
) -> None:
    """What the one has left is closed before the next one looks at it."""
    story: list[str] = []
    ends = [daemon.ROLE_CHANGED, daemon.ROLE_CHANGED, last]
    marks: set[MarkFile] = set()

    class FakeDataPath:
        def __init__(self, config: Any) -> None:
            story.append("load")

        def close(self) -> None:
            story.append("close")

    async def serve(config: Any, datapath: Any, history: Any, mark: MarkFile) -> int:
        story.append("serve")
        marks.add(mark)
        return ends.pop(0)

    monkeypatch.setattr(daemon.HostDataPath, "load", FakeDataPath)
    monkeypatch.setattr(daemon, "_serve", serve)
    assert daemon._run(here(tmp_path)) == last
    assert story == ["load", "serve", "close"] * 3
    assert len(marks) == 1, "two threads could write the file in the wrong order"


def here(tmp_path: Path) -> Config:
    config = load(EXAMPLES / "primary.toml")
    d = replace(
        config.datapath,
        run_dir=str(tmp_path),
        bpffs=str(tmp_path / "bpf"),
        state_dir=str(tmp_path / "state"),
    )
    return replace(config, datapath=d)


@pytest.mark.parametrize(
    "why", [Refusal("a certificate"), Taken("a filter"), DataPathError("in a bridge")]
)
@pytest.mark.parametrize("pinned", [False, True])
def test_a_data_path_that_is_pinned_is_never_given_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, why: Exception, pinned: bool
) -> None:
    """A guest depends on it: nobody may be awake to start the unit again."""

    @contextmanager
    def claim(config: Config) -> Iterator[None]:
        raise why
        yield

    config = here(tmp_path)
    if pinned:
        pins = Path(loader.pin_dir(config.datapath.bpffs, config.pair, config.role))
        pins.mkdir(parents=True)
        (pins / "config").touch()
    monkeypatch.setattr(daemon, "claim", claim)
    monkeypatch.setattr(daemon, "setup_logging", lambda: None)
    assert daemon.run(config) == (daemon.FAILED if pinned else daemon.REFUSED)


@pytest.mark.parametrize("service", [False, True])
def test_a_predecessor_that_is_not_gone_yet_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, service: bool
) -> None:
    @contextmanager
    def claim(config: Config) -> Iterator[None]:
        raise AlreadyRuns("locked")
        yield

    monkeypatch.setattr(daemon, "claim", claim)
    monkeypatch.setattr(daemon, "setup_logging", lambda: None)
    monkeypatch.setattr(user_command, "is_service", lambda: service)
    assert daemon.run(here(tmp_path)) == (daemon.FAILED if service else daemon.REFUSED)


def test_who_asks_whether_a_controller_runs_is_none(tmp_path: Path) -> None:
    """Another pair's controller, `doctor` and `cleanup` hold the lock for a moment to find out."""
    path = tmp_path / "lock"
    with path.open("a+") as mine, path.open() as theirs:
        fcntl.flock(theirs, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, fcntl.flock, (theirs, fcntl.LOCK_UN))
        timer.start()
        preflight._flock(mine.fileno(), str(path), here(tmp_path))
        timer.join()


def test_a_controller_begins_with_its_hosts_mark_and_is_told_of_trouble(tmp_path: Path) -> None:
    """The trouble comes from the thread that writes."""
    c = here(tmp_path)
    mark = MarkFile(c)
    told: list[dict[str, Any]] = []
    ctl, _, _ = primary(Mode.BYPASS)
    ctl.story.keep = told.append

    async def body() -> None:
        await daemon._use_mark(ctl, mark)
        ctl.view.went_standalone()
        end = time.monotonic() + 5
        while not mark.path.exists():
            assert time.monotonic() < end
            await asyncio.sleep(0.002)
        assert not told
        mark.path.parent.rename(tmp_path / "elsewhere")
        mark.path.parent.write_text("no directory")
        ctl.view.checkpointed()
        ctl.view.went_standalone()
        while not told:
            assert time.monotonic() < end
            await asyncio.sleep(0.002)
        assert told[0]["kind"] == "mark" and str(mark.path) in told[0]["why"]

    asyncio.run(body())
    mark.close()
