# SPDX-License-Identifier: GPL-2.0-or-later
"""Put several files in place, all or none.

A journal says what is about to happen. Everything is written under other names first, so that a
full or a read-only disk is met before anything has changed. Then the files are renamed, and the
journal goes. Whoever finds a journal undoes what it says: its process has died in between. Names
that begin with a point are read neither by systemd nor by systemd-networkd.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class InstallError(RuntimeError):
    """Nothing was changed; the text says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """A file as it should be."""

    path: Path
    data: bytes
    mode: int


@dataclass(frozen=True, slots=True)
class Directory:
    """A directory that is made if it is not there; `owner`: user and group."""

    path: Path
    mode: int
    owner: tuple[int, int] | None = None


@dataclass(slots=True)
class _Journal:
    """What happens: for each file its new text, and what is kept of the old one ("": none)."""

    path: Path
    files: list[dict[str, str]] = field(default_factory=list)
    directories: list[str] = field(default_factory=list)  # that are made, parents first
    renaming: bool = False  # before that, every file is as it was

    def save(self) -> None:
        text = json.dumps(
            {"files": self.files, "directories": self.directories, "renaming": self.renaming}
        )
        new = self.path.with_name(self.path.name + ".new")
        _remove(new)
        _write(new, text.encode(), 0o600)
        os.rename(new, self.path)
        _sync(self.path.parent)


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write a file that is not there yet; readable by its owner only until it is complete."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as f:
        f.write(data)
        f.flush()
        os.fchmod(f.fileno(), mode)
        os.fsync(f.fileno())


def is_there(target: Target) -> bool:
    """Return whether a file is as it should be: its text, and nobody reads it who should not."""
    try:
        stat = os.lstat(target.path)
        if not os.path.isfile(target.path) or os.path.islink(target.path):
            return False
        return not stat.st_mode & 0o777 & ~target.mode and target.path.read_bytes() == target.data
    except FileNotFoundError:
        return False


def _why(e: OSError) -> str:
    return f"{e.filename or 'file'}: {e.strerror or e}"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Hold off every other installation that has to do with this directory.

    It is made if it is not there. Raises InstallError.
    """
    made, held, fd = not directory.exists(), False, -1
    try:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Who held it before may have removed the directory.
            held = directory.is_dir() and os.path.samestat(os.fstat(fd), directory.stat())
        except BlockingIOError:
            pass
        except OSError as e:
            raise InstallError(_why(e)) from e
        if not held:
            others = "another `colo-xdp init`, `join` or `leave`"
            raise InstallError(f"{directory}: {others} is at work here")
        yield
    finally:
        if made and (held or fd < 0):
            with contextlib.suppress(OSError):  # unless something is in it now
                directory.rmdir()
        if fd >= 0:
            os.close(fd)


def undo_interrupted(journal: Path) -> list[str]:
    """Undo what a process began that has died; return the files concerned.

    Raises InstallError if that is not possible; the next one tries again.
    """
    try:
        text = journal.read_text()
    except FileNotFoundError:
        return []
    except OSError as e:
        raise InstallError(_why(e)) from e
    try:
        said: dict[str, Any] = json.loads(text)
        j = _Journal(journal, said["files"], said["directories"], said["renaming"])
        _undo(j)
        return [str(f["path"]) for f in j.files]
    except (ValueError, KeyError, TypeError) as e:
        raise InstallError(f"{journal}: damaged ({e}); look at it, and remove it") from e
    except OSError as e:
        raise InstallError(f"{_why(e)}, while undoing what {journal} says") from e


def _remove(path: Path | str) -> None:
    """Remove a file if it is there: on a read-only disk, unlink(2) fails even if it is not."""
    if os.path.lexists(path):
        os.unlink(path)


def _undo(j: _Journal) -> None:
    """Make it as it was; may be repeated."""
    for f in reversed(j.files):
        path, new, kept = f["path"], f["new"], f["kept"]
        if not j.renaming:
            pass
        elif kept and os.path.lexists(kept):
            # As the old file was linked and not moved, both names may be the same file; rename(2)
            # does nothing then.
            os.rename(kept, path)
            _remove(kept)
        elif not kept and not os.path.lexists(new):
            _remove(path)  # it was made by the rename
        _remove(new)
    for d in reversed(j.directories):
        with contextlib.suppress(OSError):
            os.rmdir(d)
    _remove(j.path)
    _remove(j.path.with_name(j.path.name + ".new"))


def _kept_name(path: Path) -> Path:
    """Return a free name for the old file, as `cp --backup=numbered` does it."""
    for n in range(1, 10_000):
        kept = path.with_name(f"{path.name}.~{n}~")
        if not os.path.lexists(kept):
            return kept
    raise InstallError(f"{path}: 9999 old ones are there already")


def _missing(path: Path) -> list[Path]:
    """Return the directories that have to be made for this one to be there, parents first."""
    out: list[Path] = []
    while not path.is_dir():
        out.insert(0, path)
        path = path.parent
    return out


def install(
    journal: Path,
    targets: Iterable[Target],
    directories: Iterable[Directory] = (),
) -> list[tuple[Path, Path | None]]:
    """Put the files in place; return each with the name of what was there before.

    Raises InstallError; everything is as it was then. Call it with the lock held.
    """
    targets, directories = list(targets), list(directories)
    j, tag = _Journal(journal), secrets.token_hex(4)
    done: list[tuple[Path, Path | None]] = []
    try:
        wanted = [*(d.path for d in directories), *(t.path.parent for t in targets)]
        j.directories = list(dict.fromkeys(str(m) for d in wanted for m in _missing(d)))
        for t in targets:
            if t.path.is_dir() and not t.path.is_symlink():
                raise InstallError(f"{t.path} is a directory; nothing was changed")
            kept = _kept_name(t.path) if os.path.lexists(t.path) else None
            new = t.path.with_name(f".{t.path.name}.{tag}")
            j.files.append({"path": str(t.path), "new": str(new), "kept": str(kept or "")})
            done.append((t.path, kept))
        j.save()
        _prepare(j, targets, directories)
        j.renaming = True
        j.save()
        for f in j.files:
            if f["kept"]:
                os.link(f["path"], f["kept"], follow_symlinks=False)
            os.rename(f["new"], f["path"])
        for where in {t.path.parent for t in targets}:
            _sync(where)
        journal.unlink()
    except BaseException as e:
        try:
            _undo(j)
        except OSError as again:
            raise InstallError(
                f"{_why(again)}, while undoing; the next `colo-xdp join` undoes the rest"
            ) from e
        if isinstance(e, OSError):
            raise InstallError(f"{_why(e)}; nothing was changed") from e
        raise
    with contextlib.suppress(OSError):  # it is done, whether or not this reaches the disk
        _sync(journal.parent)
    return done


def _make(name: str, mode: int, owner: tuple[int, int] | None) -> None:
    """Make a directory, whatever the umask is, and give it away.

    Its parent may belong to that user already, who could put a link to something else in its
    place: what is given away is what was made here.
    """
    os.mkdir(name, 0o700)
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_uid != os.geteuid():
            raise InstallError(f"{name}: somebody else has just made it; nothing was changed")
        os.fchmod(fd, mode)
        if owner:
            os.fchown(fd, *owner)
    finally:
        os.close(fd)


def remove(paths: Iterable[Path], last: Path, directories: Iterable[Path]) -> None:
    """Remove files, then `last`, which lists them; and the directories in which nothing is left.

    May be repeated after a failure: `last` goes when the others are gone from the disk. Raises
    InstallError.
    """
    try:
        parents = set()
        for path in paths:
            _remove(path)
            parents.add(path.parent)
        for parent in parents:
            _sync(parent)
        _remove(last)
    except OSError as e:
        raise InstallError(f"{_why(e)}; the rest is still there, so repeat it") from e
    for d in sorted(directories, reverse=True):  # children first
        with contextlib.suppress(OSError):  # something else is in it
            d.rmdir()


def _prepare(j: _Journal, targets: Iterable[Target], directories: Iterable[Directory]) -> None:
    """Make the directories, and write every file under its other name."""
    modes = {str(d.path): d for d in directories}
    for name in j.directories:
        special = modes.get(name)
        _make(name, special.mode if special else 0o755, special.owner if special else None)
    for t, f in zip(targets, j.files, strict=True):
        _write(Path(f["new"]), t.data, t.mode)
