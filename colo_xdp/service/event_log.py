# SPDX-License-Identifier: GPL-2.0-or-later
"""The file in which a pair's events survive restarts, reboots and changes of role.

One JSON object per line, in PAIR.ROLE.events.jsonl (the role of the configuration file) of
`datapath.state_dir`, or of `run_dir` if that directory cannot be used. At MAX_BYTES the file
becomes FILE.1, which replaces the one before. A thread writes, so that a disk that hangs keeps
nobody waiting; what a full queue, a full disk or a read-only one costs is events: they are counted
(`event_log.lost` of the status), and the first is logged.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..config.file import Config

log = logging.getLogger("colo_xdp")

MAX_BYTES = 1 << 20
MAX_QUEUED = 256
MAX_LINE = 4096  # a longer event loses the end of its reason
BURST, PER_S = 100, 1.0  # events at once, and lasting: a state that flaps must not fill the file
CLOSE_S = 1.0
ROTATIONS = 3  # in a row, while a reader begins


def paths(config: Config) -> list[Path]:
    """Return where this host's events may be, the best place first."""
    name = f"{config.pair}.{config.role}.events.jsonl"
    return [Path(config.datapath.state_dir) / name, Path(config.datapath.run_dir) / name]


def place(config: Config) -> Path:
    """Return the first of paths() whose directory can be written, and make that directory."""
    for path in paths(config):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError:
            continue
        if os.access(path.parent, os.W_OK):
            return path
    return paths(config)[-1]


class EventLog:
    """Writes events from any thread; add() never blocks and never raises."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_BYTES, burst: int = BURST) -> None:
        self.path, self._max = path, max_bytes
        self.written = self.lost = 0
        self.trouble = ""  # why the last event could not be written
        self._logged = False
        self._burst = self._tokens = float(burst)
        self._refilled = time.monotonic()
        self._queue: queue.Queue[dict[str, Any] | None] = queue.Queue(MAX_QUEUED)
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        self._thread.start()

    def add(self, event: dict[str, Any]) -> None:
        """Have an event written, with the time of now."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._refilled) * PER_S)
        self._refilled = now
        if self._tokens < 1:
            self._lose("more events than are kept")
            return
        self._tokens -= 1
        try:
            self._queue.put_nowait({"t": round(time.time(), 3), **event})
        except queue.Full:
            self._lose("the disk does not keep up")

    def close(self) -> None:
        """Write what is queued, for CLOSE_S at most."""
        try:
            self._queue.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(CLOSE_S)

    def _lose(self, why: str) -> None:
        self.lost += 1
        self.trouble = why
        if not self._logged:
            self._logged = True
            log.warning("%s: events are lost (counted in the status): %s", self.path, why)

    def _run(self) -> None:
        while (event := self._queue.get()) is not None:
            try:
                self._write(_line(event))
            except OSError as e:
                self._lose(e.strerror or str(e))
            else:
                self.written += 1
                self.trouble = ""

    def _write(self, line: bytes) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o640)
        try:
            size = os.fstat(fd).st_size
            if size and size + len(line) > self._max:
                os.replace(self.path, old(self.path))
                os.close(fd)
                fd, size = os.open(self.path, flags, 0o640), 0
            if not size:
                os.fchmod(fd, 0o640)  # whatever the unit's UMask=: its group may read events
            if size and os.pread(fd, 1, size - 1) != b"\n":
                line = b"\n" + line  # the writer died, or the disk was full, within a line
            done = os.write(fd, line)
            if done < len(line):
                raise OSError(0, "no space left for a whole line")
        finally:
            os.close(fd)


def _line(event: dict[str, Any]) -> bytes:
    line = json.dumps(event, separators=(",", ":")).encode()
    if len(line) >= MAX_LINE:
        line = json.dumps(event | {"why": str(event.get("why", ""))[:500]}).encode()
    return line + b"\n"


def old(path: Path) -> Path:
    """Return the file that the last rotation has left."""
    return path.with_name(path.name + ".1")


def parse(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the events of whole lines; a damaged line is left out."""
    for line in data.split(b"\n"):
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict) and type(event.get("t")) in (int, float):
            yield event


class Reader:
    """Reads a log while it is being written; poll() returns what has come since the last call."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = -1  # inode
        self._at = 0

    def poll(self) -> list[dict[str, Any]]:
        """Return the new events, oldest first. Raises OSError if the file cannot be read."""
        events: list[dict[str, Any]] = []
        if self._file < 0:
            for _ in range(ROTATIONS):
                before = _inode(old(self._path))
                events = self._rest(old(self._path), skip=0) + self._new()
                if _inode(old(self._path)) == before:  # else the file moved between the two
                    break
                self._file = -1
            return sorted(events, key=_time)
        moved = _inode(self._path) not in (self._file, -1)
        if moved and _inode(old(self._path)) == self._file:
            events += self._rest(old(self._path), skip=self._at)
        return sorted([*events, *self._new()], key=_time)

    def _new(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as f:
                inode = os.fstat(f.fileno()).st_ino
                if inode != self._file:
                    self._file, self._at = inode, 0
                f.seek(self._at)
                data = f.read(4 * MAX_BYTES)
        except FileNotFoundError:
            return []
        whole = data.rfind(b"\n") + 1
        self._at += whole
        return list(parse(data[:whole]))

    @staticmethod
    def _rest(path: Path, skip: int) -> list[dict[str, Any]]:
        try:
            with path.open("rb") as f:
                f.seek(skip)
                return list(parse(f.read(4 * MAX_BYTES)))
        except FileNotFoundError:
            return []


def _time(event: dict[str, Any]) -> float:
    return float(event["t"])


def _inode(path: Path) -> int:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return -1


def follow(
    readers: list[Reader], every_s: float, sleep: Callable[[float], None] = time.sleep
) -> Iterator[dict[str, Any]]:
    """Yield the events of all logs, and then, for ever, what comes."""
    while True:
        yield from sorted((e for r in readers for e in r.poll()), key=_time)
        sleep(every_s)
