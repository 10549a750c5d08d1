# SPDX-License-Identifier: GPL-2.0-or-later
"""The mark's file: durable, in whatever state its disk is, and never in anybody's way."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.config.file import Config, load
from colo_xdp.failover.mark import Mark, Standing, decode
from colo_xdp.service import mark_file
from colo_xdp.service.mark_file import MarkFile, paths, read, remove, write

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"
MARK = Mark("web1", Standing.STANDALONE, "b1", 7.0)


def config(state: Path, role: str = "secondary") -> Config:
    c = load(EXAMPLES / f"{role}.toml")
    return replace(c, datapath=replace(c.datapath, state_dir=str(state)))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., MarkFile]]:
    made: list[MarkFile] = []

    def new(state: Path = tmp_path / "state", role: str = "secondary") -> MarkFile:
        made.append(MarkFile(config(state, role)))
        return made[-1]

    yield new
    for f in made:
        f.close()


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_mark_outlives_its_controller(make: Callable[..., MarkFile], tmp_path: Path) -> None:
    first = make()
    assert first.found() is None
    first.want(Standing.STANDALONE)
    first.close()
    name = "web1.secondary.standalone.json"
    assert [p.name for p in (tmp_path / "state").iterdir()] == [name]
    second = make()
    found = second.found()
    assert found is not None and found.standing is Standing.STANDALONE and not found.trouble
    assert found.boot == mark_file.boot_id() != ""
    assert abs(found.at - time.time()) < 60
    second.want(Standing.SUPERSEDED)
    assert second.found().standing is Standing.SUPERSEDED, "for a controller of another role"  # type: ignore[union-attr]
    second.want(Standing.NONE)
    second.close()
    assert list((tmp_path / "state").iterdir()) == [] and make().found() is None


def test_the_last_wish_counts(make: Callable[..., MarkFile]) -> None:
    f = make()
    for standing in (*[Standing.STANDALONE, Standing.NONE] * 50, Standing.SUPERSEDED):
        f.want(standing)
    f.close()
    assert decode(f.path.read_bytes(), "web1").standing is Standing.SUPERSEDED


def test_a_file_is_replaced_as_a_whole_and_made_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fsync of the file, rename, fsync of the directory, in this order."""
    said: list[str] = []
    fsync, rename = os.fsync, os.replace

    def syncing(fd: int) -> None:
        said.append("sync " + Path(os.readlink(f"/proc/self/fd/{fd}")).name)
        fsync(fd)

    def replacing(a: Path, b: Path) -> None:
        said.append(f"rename {Path(a).name}")
        rename(a, b)

    monkeypatch.setattr(mark_file.os, "fsync", syncing)
    monkeypatch.setattr(mark_file.os, "replace", replacing)
    path = tmp_path / "state" / "x.json"
    write(path, MARK)
    assert said == ["sync x.json.new", "rename x.json.new", "sync state"]
    assert read(path, "web1") == MARK
    said.clear()
    remove([path, tmp_path / "state/other"])
    assert said == ["sync state"] and not path.exists()
    remove([path])
    assert said == ["sync state"], "nothing was there"


def test_both_roles_files_are_removed(make: Callable[..., MarkFile], tmp_path: Path) -> None:
    """The operator may have changed the role in the file meanwhile."""
    state = tmp_path / "state"
    for path in paths(str(state), "web1").values():
        write(path, MARK)
    other = state / "web2.primary.standalone.json"
    write(other, MARK)
    f = make()
    f.want(Standing.NONE)
    f.close()
    assert list(state.iterdir()) == [other]


@pytest.mark.parametrize("kind", ["directory", "garbage", "empty", "large", "loop"])
def test_a_file_that_cannot_be_used_is_a_mark(
    make: Callable[..., MarkFile], tmp_path: Path, kind: str
) -> None:
    path = paths(str(tmp_path / "state"), "web1")["secondary"]
    path.parent.mkdir()
    if kind == "directory":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes({"garbage": b"\xff", "empty": b"", "large": b" " * (1 << 20)}[kind])
    found = make().found()
    assert found is not None and found.standing is Standing.STANDALONE and found.trouble


def test_a_state_directory_that_is_none_has_no_mark(
    make: Callable[..., MarkFile], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    assert make(tmp_path / "file").found() is None


def test_what_cannot_be_written_is_said_once_and_tried_again(
    make: Callable[..., MarkFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mark_file, "RETRY_S", 0.01)
    state, said = tmp_path / "file", list[str]()
    state.write_text("")
    f = make(state)
    f.tell = said.append
    f.want(Standing.STANDALONE)
    until(lambda: said)
    time.sleep(0.05)
    assert len(said) == 1 and str(f.path) in said[0] and "cannot be written" in said[0]
    state.unlink()
    until(lambda: len(said) == 2)
    assert "up to date again" in said[1] and f.path.exists()


def test_what_cannot_be_removed_is_said(
    make: Callable[..., MarkFile], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = list[str]()
    path = paths(str(tmp_path), "web1")["secondary"]
    path.mkdir()
    f = make(tmp_path)
    f.tell = said.append
    f.want(Standing.NONE)
    until(lambda: said)
    assert "cannot be removed" in said[0] and str(path) in said[0]


def test_nobody_to_tell_is_no_failure(make: Callable[..., MarkFile], tmp_path: Path) -> None:
    def closed(why: str) -> None:
        raise RuntimeError("Event loop is closed")

    (tmp_path / "file").write_text("")
    f = make(tmp_path / "file")
    f.tell = closed
    f.want(Standing.STANDALONE)
    until(lambda: f._failing)
    assert f._thread.is_alive()


def test_a_disk_that_hangs_keeps_nobody_waiting(
    make: Callable[..., MarkFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs, real = threading.Event(), mark_file.write

    def write_late(path: Path, mark: Mark) -> None:
        hangs.wait(10)
        real(path, mark)

    monkeypatch.setattr(mark_file, "write", write_late)
    monkeypatch.setattr(mark_file, "CLOSE_S", 0.05)
    f = make()
    assert f.found() is None
    began = time.monotonic()
    f.want(Standing.STANDALONE)
    f.want(Standing.SUPERSEDED)
    f.close()
    assert time.monotonic() - began < 1 and not f.path.exists()
    hangs.set()
    f._thread.join(5)
    assert decode(f.path.read_bytes(), "web1").standing is Standing.SUPERSEDED


def test_a_disk_that_does_not_answer_at_the_start_counts_as_a_mark(
    make: Callable[..., MarkFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = threading.Event()
    monkeypatch.setattr(mark_file, "read", lambda path, pair: hangs.wait(10) and None)
    monkeypatch.setattr(mark_file, "BOOT_READ_S", 0.5)
    monkeypatch.setattr(mark_file, "READ_S", 0.02)
    f, began = make(), time.monotonic()
    for hurry, least in ((True, 0.02), (False, 0.5)):
        found = f.found(hurry=hurry)
        assert found is not None and "does not answer" in found.trouble
        assert time.monotonic() - began >= least
        assert not hurry or time.monotonic() - began < 0.4, "a pair waits"
    hangs.set()
