# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs, kept in files: what was compiled once on this host is not compiled again.

One directory for all pairs of a host ($COLO_XDP_CACHE, by default /var/cache/colo-xdp), one file
for each image (datapath/image.py). A file is written beside its name and renamed, so that a reader
sees all of it or nothing. Who may write here may run programs in the kernel: a directory or file
that anybody but root (or this process's user) can change is not used. Nothing of this ever stops a
controller: without the cache it compiles.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import compiler
from .cache_dir import cache_dir
from .image import Image, ImageError, decode
from .source import Source, Unfinished

log = logging.getLogger("colo_xdp.datapath.cache")

#: Images that are kept, the latest used. Each has 30 to 100 KiB.
KEPT = 64
#: Longest wait, s, for another process that compiles. Then two compile, which costs memory only.
WAIT_S = 45.0
_LOOK_S = 0.05
#: The same where nobody waits for the image. Then none compiles: there may be twenty of them.
IDLE_WAIT_S = 1800.0
_IDLE_LOOK_S = 1.0
_SUFFIX = ".image"
_MOST_BYTES = 16 << 20
_LEFT_S = 3600  # a file that is still being written has not been for longer


class Distrusted(OSError):
    """Others may have written what is found; the text names it."""


def _trusted(path: Path, st: os.stat_result) -> None:
    if st.st_uid not in (0, os.geteuid()):
        raise Distrusted(f"{path} belongs to user {st.st_uid}")
    if st.st_mode & 0o022:
        raise Distrusted(f"{path} is writable for others ({stat.S_IMODE(st.st_mode):o})")


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class Cache:
    """The images of one directory."""

    def __init__(self, where: Path | None = None) -> None:
        """Use that directory, or the usual one. It is created when something is stored."""
        self.where = where or cache_dir()

    def path(self, source: Source) -> Path:
        """Return the file of a source's image."""
        return self.where / f"{source.role}-{source.tag}{_SUFFIX}"

    def find(self, source: Source, level: int = logging.WARNING) -> Image | None:
        """Return the image of a source; None if there is none that can be used.

        level: of the log line that says why not.
        """
        path = self.path(source)
        try:
            image = decode(self._read(path))
            if (image.role, image.tag) != (source.role, source.tag):
                raise ImageError(f"of {image.role} {image.tag}")
            if {p.name for p in image.programs} != {*source.tc, *source.xdp}:
                raise ImageError("other programs than this role has")
            return image
        except FileNotFoundError:
            return None
        except (OSError, ImageError) as e:
            log.log(level, "compiled programs are not used, %s: %s", path, e)
            return None

    def _read(self, path: Path) -> bytes:
        _trusted(self.where, os.stat(self.where))
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as f:
            st = os.fstat(fd)
            _trusted(path, st)
            if not stat.S_ISREG(st.st_mode) or st.st_size > _MOST_BYTES:
                raise Distrusted(f"{path} is no file of ours")
            with contextlib.suppress(OSError):  # a read-only directory serves as well
                os.utime(fd)
            return f.read()

    def store(self, source: Source, image: Image) -> None:
        """Keep an image; log why it cannot be."""
        try:
            self._make()
            with tempfile.NamedTemporaryFile(dir=self.where, prefix=".", delete=False) as f:
                try:
                    f.write(image.encode())
                    f.flush()
                    os.fsync(f.fileno())
                    os.rename(f.name, self.path(source))
                except BaseException:
                    os.unlink(f.name)
                    raise
            self._prune()
        except OSError as e:
            log.warning("the next start compiles again, nothing can be kept in %s: %s",
                        self.where, e)  # fmt: skip

    def _make(self) -> None:
        self.where.mkdir(mode=0o755, parents=True, exist_ok=True)
        _trusted(self.where, os.stat(self.where))

    def _prune(self) -> None:
        """Remove what was used longest ago, and what a writer that was killed has left."""
        files = []
        now = time.time()
        for entry in os.scandir(self.where):
            with contextlib.suppress(FileNotFoundError):  # by another process
                at = entry.stat(follow_symlinks=False).st_mtime
                if entry.name.endswith(_SUFFIX):
                    files.append((at, entry.path))
                elif entry.name.startswith(".") and entry.is_file() and now - at > _LEFT_S:
                    os.unlink(entry.path)
        for _, path in sorted(files)[:-KEPT]:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)

    @contextlib.contextmanager
    def _alone(self, idle: bool) -> Iterator[None]:
        """Let one process of this host compile at a time, for a bounded time.

        Twenty pairs that start at once need one image, not twenty compilers. Those for whose image
        nobody waits (`idle`) have a lock of their own: their compilers may take long. Raises
        Unfinished if it is not their turn for too long.
        """
        fd = -1
        try:
            self._make()
            name = "lock-idle" if idle else "lock"
            fd = os.open(self.where / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as e:
            log.debug("no lock in %s: %s", self.where, e)
        try:
            end = time.monotonic() + (IDLE_WAIT_S if idle else WAIT_S)
            while fd >= 0 and not _locked(fd):
                if time.monotonic() >= end:
                    if idle:
                        raise Unfinished("other pairs' compilers have not come to an end")
                    break
                time.sleep(_IDLE_LOOK_S if idle else _LOOK_S)
            yield
        finally:
            if fd >= 0:
                os.close(fd)

    def obtain(self, source: Source, *, nice: int = 0) -> Image:
        """Return the image of a source, compiled if necessary, which blocks for seconds.

        nice: of the compiler; above 0 if nobody waits for it. Raises what compiler.run() does.
        """
        image = self.find(source)
        if image is not None:
            return image
        with self._alone(idle=nice > 0):
            image = self.find(source, logging.DEBUG)  # made while this process waited
            if image is not None:
                return image
            began = time.monotonic()
            image = compiler.run(source, nice=nice)
            took = time.monotonic() - began
            log.info("compiled %s in %.1f s (%s)", source.name, took, image.origin)
            self.store(source, image)
        return image
