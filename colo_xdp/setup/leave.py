# SPDX-License-Identifier: GPL-2.0-or-later
"""Remove what `join` has put in place on this host, unless it was changed (`colo-xdp leave`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from . import host, record
from .transaction import InstallError, lock, remove, undo_interrupted


def read(root: Path, pair: str) -> record.Record | None:
    """Return what `join` has noted of a pair; None if it has noted nothing.

    Raises InstallError.
    """
    there = host.below(root, record.path(pair))
    try:
        return record.parse(there.read_text())
    except FileNotFoundError:
        return None
    except OSError as e:
        raise InstallError(f"{there}: {e.strerror}") from e
    except (record.RecordError, UnicodeDecodeError) as e:
        raise InstallError(f"{there}: {e}; `join --replace` writes it anew") from e


def _state(path: Path, digest: str) -> str:
    """Return whether a file is "gone", "changed", or as it was written ("")."""
    if not path.exists() and not path.is_symlink():
        return "gone"
    if path.is_symlink() or not path.is_file():
        return "changed"
    return "" if record.digest(path.read_bytes()) == digest else "changed"


def leave(pair: str, *, root: Path = Path("/"), dry_run: bool = False) -> Iterator[str]:
    """Remove the files of a pair; yield what was done, and what is left to do.

    One that dies in between is repeated: the record goes last. Raises InstallError.
    """
    etc = host.below(root, host.CONFIGS)
    if not etc.is_dir():
        raise InstallError(f"{etc} is not there: no pair was set up here")
    with lock(etc):
        if not dry_run:
            undo_interrupted(etc / f".{pair}.join")
        found = read(root, pair)
        if found is None:
            raise InstallError(
                f"`colo-xdp join` has set up no pair {pair} here; what was made by hand is removed "
                "by hand"
            )
        states = {p: _state(host.below(root, p), d) for p, d in found.files.items()}
        for path, state in states.items():
            if state == "changed":
                yield f"kept {host.below(root, path)}: it is not as `join` has written it"
        ours = [host.below(root, p) for p, state in states.items() if not state]
        if not dry_run:
            directories = [host.below(root, d) for d in found.directories]
            remove(ours, host.below(root, record.path(pair)), directories)
            for d in directories:
                if d.is_dir():
                    yield f"kept {d}: something is in it"
        yield from (f"{'would remove' if dry_run else 'removed'} {p}" for p in ours)
    yield "now run:"
    yield "    systemctl daemon-reload && networkctl reload"
    yield from (f"    ip link delete {device}" for device in found.devices)
