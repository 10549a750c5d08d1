# SPDX-License-Identifier: GPL-2.0-or-later
"""The events' file: rotation, disks that are full or gone, torn lines, and who reads meanwhile."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.config.file import load
from colo_xdp.service import event_log
from colo_xdp.service.event_log import EventLog, Reader, follow, old, parse, paths, place

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"


def wrote(log: EventLog, *whys: str) -> None:
    for why in whys:
        log.add({"kind": "state", "role": "primary", "why": why})
    log.close()


def whys(events: list[dict[str, Any]]) -> list[str]:
    return [e["why"] for e in events]


def test_events_survive_the_process(tmp_path: Path) -> None:
    path = tmp_path / "e"
    before = time.time()
    wrote(EventLog(path), "one", "two")
    log = EventLog(path)
    wrote(log, "three")
    assert (log.written, log.lost, log.trouble) == (1, 0, "")
    events = Reader(path).poll()
    assert whys(events) == ["one", "two", "three"]
    assert all(before - 1 < e["t"] < time.time() + 1 for e in events)
    assert path.stat().st_mode & 0o777 == 0o640


def test_its_group_may_read_it_under_any_umask(tmp_path: Path) -> None:
    path, umask = tmp_path / "e", os.umask(0o077)
    try:
        log = EventLog(path, max_bytes=100)
        wrote(log, "one", "two, after which there is a second file", "three")
    finally:
        os.umask(umask)
    assert old(path).stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o640


def test_the_file_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "e"
    log = EventLog(path, max_bytes=1000, burst=1000)
    for i in range(200):
        log.add({"kind": "state", "role": "primary", "why": f"{i}"})
        if i % 50 == 0:
            time.sleep(0.02)  # a queue's length at a time
    log.close()
    assert path.stat().st_size <= 1000 and old(path).stat().st_size <= 1000
    assert {p.name for p in tmp_path.iterdir()} == {"e", "e.1"}
    got = whys(Reader(path).poll())
    assert got == [str(i) for i in range(200 - len(got), 200)] and len(got) > 15


def test_a_reason_without_an_end_is_cut(tmp_path: Path) -> None:
    path = tmp_path / "e"
    wrote(EventLog(path), "x" * 100_000)
    assert path.stat().st_size < 1000 and Reader(path).poll()[0]["why"] == "x" * 500


def test_a_state_that_flaps_does_not_fill_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = EventLog(tmp_path / "e", burst=10)
    wrote(log, *(str(i) for i in range(100)))
    assert log.written + log.lost == 100 and 10 <= log.written <= 12
    assert len([r for r in caplog.records if "events are lost" in r.message]) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_hurts_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def write(fd: int, data: bytes) -> int:
        raise OSError(code, os.strerror(code))

    log = EventLog(tmp_path / "e")
    with monkeypatch.context() as m:
        m.setattr(event_log.os, "write", write)
        for i in range(5):
            log.add({"kind": "state", "why": str(i)})
        wait_until(lambda: log.lost == 5)
    assert log.trouble == os.strerror(code)
    assert len(caplog.records) == 1, "logged once"
    wrote(log, "room again")
    assert (log.written, log.trouble) == (1, "") and whys(Reader(log.path).poll()) == ["room again"]


def wait_until(ready: Any) -> None:
    end = time.monotonic() + 5
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(where)]
    if os.geteuid() != 0 or subprocess.run(mount, check=False).returncode:
        pytest.skip("mounting needs root")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    path = small_disk / "e"
    (small_disk / "ballast").write_bytes(bytes(56 << 10))
    log = EventLog(path, burst=10_000)
    for i in range(200):
        log.add({"kind": "state", "role": "primary", "why": f"{i:0200d}"})
        wait_until(lambda i=i: log.written + log.lost > i)
    assert log.lost > 0 and "space" in log.trouble
    kept = len(Reader(path).poll())
    assert kept == log.written > 0
    (small_disk / "ballast").unlink()
    wrote(log, "after")
    events = Reader(path).poll()
    assert whys(events)[-1] == "after", "the torn line does not take the next one with it"
    assert len(events) == kept + 1


def test_a_disk_that_hangs_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    log = EventLog(tmp_path / "e", burst=100_000)
    monkeypatch.setattr(log, "_write", lambda line: go.wait(10))
    monkeypatch.setattr(event_log, "CLOSE_S", 0.05)
    began = time.monotonic()
    for i in range(1000):
        log.add({"kind": "state", "why": str(i)})
    log.close()
    assert time.monotonic() - began < 2
    assert log.lost >= 1000 - event_log.MAX_QUEUED - 1 and "keep up" in log.trouble
    go.set()


def test_a_torn_last_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "e"
    wrote(EventLog(path), "one")
    with path.open("ab") as f:
        f.write(b'{"t": 17, "kind": "sta')
    reader = Reader(path)
    assert whys(reader.poll()) == ["one"]
    wrote(EventLog(path), "two")
    assert whys(reader.poll()) == ["two"] and whys(Reader(path).poll()) == ["one", "two"]


def test_rubbish_is_left_out() -> None:
    data = b'[1]\n{"t": "x"}\n\xff\xfe\n\n{"no": "time"}\n{"t": true}\n{"t": 1}\n{"t": 2.5}\n'
    assert list(parse(data)) == [{"t": 1}, {"t": 2.5}]


def test_who_reads_meanwhile_misses_nothing(tmp_path: Path) -> None:
    """A writer that rotates, and readers that begin at any moment."""
    path, n = tmp_path / "e", 3000
    log = EventLog(path, max_bytes=20_000, burst=n)
    reader, got = Reader(path), list[str]()

    def write() -> None:
        for i in range(n):
            log.add({"kind": "state", "why": str(i)})
            # the reader is never behind by more than a file, of which there are two
            wait_until(lambda i=i: log.written + log.lost > i - 100 and len(got) > i - 250)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        got += whys(reader.poll())
        late = [int(w) for w in whys(Reader(path).poll())]
        assert late == list(range(late[0], late[0] + len(late))) if late else True
    log.close()
    got += whys(reader.poll())
    assert log.lost == 0 and got == [str(i) for i in range(n)]


def test_a_reader_waits_for_a_file(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "none")
    assert reader.poll() == []
    wrote(EventLog(tmp_path / "none"), "one")
    assert whys(reader.poll()) == ["one"] and reader.poll() == []


def test_follow_merges_logs(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text('{"t": 1}\n{"t": 3}\n')
    b.write_text('{"t": 2}\n')
    naps: list[float] = []

    def sleep(s: float) -> None:
        naps.append(s)
        a.open("a").write(f'{{"t": {9 + len(naps)}}}\n')

    events = follow([Reader(a), Reader(b)], 0.5, sleep)
    assert [next(events)["t"] for _ in range(5)] == [1, 2, 3, 10, 11] and naps == [0.5, 0.5]


def test_the_place_of_a_pair(tmp_path: Path) -> None:
    config = load(EXAMPLES / "primary.toml")
    assert config.datapath.state_dir == "/var/lib/colo-xdp/events"

    def at(state: Path) -> Path:
        d = replace(config.datapath, state_dir=str(state), run_dir=str(tmp_path / "run"))
        here = replace(config, datapath=d)
        assert place(here) in paths(here)
        return place(here).parent

    assert at(tmp_path / "new/state") == tmp_path / "new/state"
    (tmp_path / "file").write_text("")
    assert at(tmp_path / "file/state") == tmp_path / "run", "it cannot be made"
