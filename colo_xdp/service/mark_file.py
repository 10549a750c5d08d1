# SPDX-License-Identifier: GPL-2.0-or-later
"""The file of the mark (failover/mark.py): read at the start, written and removed durably.

It is PAIR.ROLE.standalone.json (the role of the configuration file) in `datapath.state_dir`. A
thread does all of it, the reading too, so that a disk that hangs delays no takeover, and a start by
READ_S at most (by BOOT_READ_S where nothing was pinned, so that the mark matters). What cannot be
written is told once and tried again every RETRY_S.

There is no other place for it: `run_dir` does not outlive the boot after which the mark is needed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ..config.file import Config
from ..failover.mark import MAX_BYTES, Mark, Standing, decode, unusable

log = logging.getLogger("colo_xdp")

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
READ_S = 1.0
BOOT_READ_S = 10.0
RETRY_S = 10.0
CLOSE_S = 1.0
ROLES = ("primary", "secondary")

Tell = Callable[[str], None]


def paths(state_dir: str, pair: str) -> dict[str, Path]:
    """Return where the mark is, for each role that the host's file may have."""
    return {role: Path(state_dir) / f"{pair}.{role}.standalone.json" for role in ROLES}


def boot_id() -> str:
    """Return the kernel's id of this boot; "" where there is none."""
    try:
        return BOOT_ID.read_text().strip()
    except OSError:
        return ""


def read(path: Path, pair: str) -> Mark | None:
    """Return the mark in a file; None: there is no file. Whatever cannot be read is a mark."""
    try:
        with path.open("rb") as f:
            return decode(f.read(MAX_BYTES + 1), pair)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as e:
        return unusable(pair, e.strerror or str(e))


def write(path: Path, mark: Mark) -> None:
    """Write it so that a loss of power leaves the old file or the new one. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o640)
    try:
        data = mark.encode()
        if os.write(fd, data) < len(data):
            raise OSError(0, "no space left for the whole file")
        os.fsync(fd)
    finally:
        os.close(fd)
    os.replace(new, path)
    _sync_directory(path.parent)


def remove(files: list[Path]) -> None:
    """Remove what is there of these files of one directory, durably. Raises OSError."""
    there = [p for p in files if p.exists()]
    for p in there:
        p.unlink(missing_ok=True)
    if there:
        _sync_directory(there[0].parent)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class MarkFile:
    """Keeps the mark of one host; want() never blocks and never raises, in any thread."""

    def __init__(self, config: Config) -> None:
        self._pair, files = config.pair, paths(config.datapath.state_dir, config.pair)
        self.path = files[config.role]
        #: the other one is left by a host whose file had the other role
        self._removed = [p for f in files.values() for p in (f, f.with_name(f.name + ".new"))]
        self.boot = boot_id()
        self.tell: Tell | None = None  # what a person has to know of the file
        self._wanted: Mark | None = None
        self._news = self._over = self._failing = False
        self._found: Mark | None = None
        self._is_read = threading.Event()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="mark", daemon=True)
        self._thread.start()

    def found(self, *, hurry: bool = False) -> Mark | None:
        """Return what the file says, or will say when what is wanted has been written.

        `hurry`: a pair waits for this controller, which has the pins to go by.
        """
        if not self._is_read.wait(READ_S if hurry else BOOT_READ_S):
            return unusable(self._pair, "the disk does not answer")
        with self._changed:
            return self._found

    def want(self, standing: Standing) -> None:
        """Have the file say this, with the time of now; NONE: have it removed."""
        mark = None
        if standing is not Standing.NONE:
            mark = Mark(self._pair, standing, self.boot, time.time())
        with self._changed:
            self._wanted = self._found = mark
            self._news = True
            self._changed.notify()

    def close(self) -> None:
        """Do what is wanted yet, for CLOSE_S at most."""
        with self._changed:
            self._over = True
            self._changed.notify()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        mark = read(self.path, self._pair)
        with self._changed:
            if not self._news:
                self._found = mark
        self._is_read.set()
        while self._next():
            with self._changed:
                mark, self._news = self._wanted, False
            try:
                if mark is None:
                    remove(self._removed)
                else:
                    write(self.path, mark)
            except OSError as e:
                with self._changed:
                    self._news = True  # unless something else is wanted by then
                self._failed(mark, e.strerror or str(e))
            else:
                self._done()

    def _next(self) -> bool:
        """Wait until there is something to do, and after a failure for RETRY_S; False: the end."""
        with self._changed:
            if self._failing:
                self._changed.wait_for(lambda: self._over, RETRY_S)
                return not self._over
            self._changed.wait_for(lambda: self._news or self._over)
            return self._news

    def _failed(self, mark: Mark | None, why: str) -> None:
        if self._failing:
            return
        self._failing = True
        if mark is None:
            self._say(
                f"{self.path} cannot be removed ({why}), though the guests are equal: after a boot "
                "of this host it may have an operator asked who need not be. Remove it"
            )
        else:
            self._say(
                f"{self.path} cannot be written ({why}): if both hosts lose power now, nothing "
                "tells that the guest of this host ran standalone"
            )

    def _done(self) -> None:
        if self._failing:
            self._failing = False
            self._say(f"{self.path} is up to date again")

    def _say(self, text: str) -> None:
        log.warning("%s", text)
        if self.tell is not None:
            with contextlib.suppress(RuntimeError):  # that controller's loop is closed
                self.tell(text)
