# SPDX-License-Identifier: GPL-2.0-or-later
"""What `join` has put in place on a host, so that `leave` removes that and nothing else. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from .config_text import directory
from .files import File, HostFiles

_SHARED = ("/etc/systemd/network", "/etc/systemd/system", "/etc/colo-xdp")


class RecordError(ValueError):
    """This is no record of `join`."""


@dataclass(frozen=True, slots=True)
class Record:
    """`files`: path to SHA-256. `devices`: what systemd-networkd made and does not remove."""

    files: dict[str, str]
    devices: tuple[str, ...]
    directories: tuple[str, ...]

    def text(self) -> str:
        return (
            json.dumps(
                {
                    "files": self.files,
                    "devices": list(self.devices),
                    "directories": list(self.directories),
                },
                indent=2,
                sort_keys=True,
            )
            + "\n"
        )


def path(pair: str) -> str:
    """Return where a pair's record is."""
    return f"{directory(pair)}/joined.json"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


def of(h: HostFiles, files: Iterable[File], before: Record | None) -> Record:
    """Return the record of a join: `files` are in place then, and what `before` has besides."""
    files = list(files)
    sums = {f.path: digest(f.text.encode()) for f in files}
    devices = [f.device for f in files if f.path.endswith(".netdev")]
    parents = [p for f in files if (p := _parent(f.path)) not in _SHARED]
    directories = [*parents, *h.directories]
    if before is not None:
        sums = {**before.files, **sums}
        devices += before.devices
        directories += before.directories
    return Record(sums, tuple(sorted(set(devices))), tuple(sorted(set(directories))))


def parse(text: str) -> Record:
    """Read a record. Raises RecordError."""
    try:
        said = json.loads(text)
        found = Record(dict(said["files"]), tuple(said["devices"]), tuple(said["directories"]))
    except (ValueError, KeyError, TypeError) as e:
        raise RecordError(f"it is damaged: {e!r}") from e
    names = [*found.files, *found.files.values(), *found.devices, *found.directories]
    if not all(isinstance(x, str) for x in names):
        raise RecordError("it is damaged: a name in it is no string")
    return found
