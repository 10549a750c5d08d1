# SPDX-License-Identifier: GPL-2.0-or-later
"""Read QEMU's answers about disks: those that nobody keeps equal, and how a mirror goes. Pure.

Both guests run and both write. A checkpoint copies memory but not disks: an image that both open is
destroyed, and of two images each holds only what its own guest wrote. Neither QEMU nor the guest's
file system notices. qemu/replication.py keeps disks equal; a writable one that it does not know
keeps a guest from being protected. The controller calls refusal(), the doctor uncovered() and
missing().
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

PREFIX = "colo-"  # of the names of all block nodes, jobs and exports that the controllers make
MAX_STEM = 18  # a node name has at most 31 characters (block_int-common.h of QEMU)


class DiskError(RuntimeError):
    """A disk cannot be replicated; the text names it and says why."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Names of what the controllers make for one disk in a QEMU."""

    stem: str

    @staticmethod
    def of(disk: str) -> Nodes:
        """Return those of the disk of this name.

        They depend on the name alone: a controller that is new, or whose file has another order of
        disks, has to find them again.
        """
        if re.fullmatch(rf"[A-Za-z0-9._-]{{1,{MAX_STEM}}}", disk):
            return Nodes(PREFIX + disk)
        plain = re.sub(r"[^A-Za-z0-9]", "", disk)[: MAX_STEM - 9]
        return Nodes(f"{PREFIX}{plain}-{hashlib.sha256(disk.encode()).hexdigest()[:8]}")

    @property
    def replication(self) -> str:
        return self.stem

    @property
    def active(self) -> str:
        return f"{self.stem}-active"

    @property
    def hidden(self) -> str:
        return f"{self.stem}-hidden"

    @property
    def target(self) -> str:
        return f"{self.stem}-target"

    @property
    def job(self) -> str:
        return f"{self.stem}-mirror"


@dataclass(frozen=True, slots=True)
class Mirror:
    """A mirror job as `query-block-jobs` shows it. Bytes."""

    job: str
    done: int
    total: int
    ready: bool
    trouble: str  # why it is not what it should be

    @staticmethod
    def read(job: Mapping[str, Any]) -> Mirror:
        """Read one entry (BlockJobInfo of qapi/block-core.json).

        `actively-synced` (QEMU 8.2) tells whether each write is on the target before the guest
        learns of its end. Before that version a mirror with copy-mode=write-blocking is so from the
        moment at which it is ready until its first error, which ends it.
        """
        trouble = ""
        if job.get("error"):
            trouble = str(job["error"])
        elif job.get("io-status") not in (None, "ok"):
            trouble = f"io-status {job['io-status']}"
        elif job.get("paused") is True:
            trouble = "it is paused"
        ready = job.get("ready") is True and job.get("actively-synced") is not False
        return Mirror(
            str(job.get("device", "")), int(job.get("offset", 0)), int(job.get("len", 0)),
            ready, trouble,
        )  # fmt: skip


class Waits:
    """Since when each mirror has had requests on their way without an answer to any.

    A mirror counts the bytes of a write when it begins (`len`) and when it has ended (`offset`,
    do_sync_target_write() in QEMU's block/mirror.c), so what lies between is on its way.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, float]] = {}  # bytes done by then, time of that look

    def saw(self, mirrors: Iterable[Mirror], now: float) -> None:
        """Take all mirrors as they were at `now` (monotonic, s)."""
        known, self._since = self._since, {}
        for m in mirrors:
            if m.done >= m.total:
                continue
            done, since = known.get(m.job, (-1, now))
            self._since[m.job] = (m.done, since if done == m.done else now)

    def forget(self) -> None:
        """The mirrors are others from now on."""
        self._since.clear()

    def longest(self, now: float) -> tuple[str, float]:
        """Return the job that has waited the longest, and for how long, s; "" and 0: none does."""
        if not self._since:
            return "", 0.0
        job = min(self._since, key=lambda j: self._since[j][1])
        return job, now - self._since[job][1]


def find(blocks: Any, name: str) -> Mapping[str, Any] | None:
    """Return the entry of `query-block` of a disk.

    Once the controllers have put their nodes under the device, its node has another name.
    """
    wanted = {name, Nodes.of(name).replication}
    for entry in blocks if isinstance(blocks, list) else []:
        if entry.get("inserted") and wanted.intersection(_names(entry)):
            found: Mapping[str, Any] = entry
            return found
    return None


def _names(entry: Mapping[str, Any]) -> list[str]:
    """Return the names by which an operator may call a disk.

    They are the drive's id, its node name, and its device in QEMU's tree.
    """
    inserted = entry.get("inserted") or {}
    names = [entry.get("device"), inserted.get("node-name"), entry.get("qdev")]
    qdev = str(entry.get("qdev") or "")
    for part in qdev.removesuffix("/virtio-backend").split("/")[-1:]:
        names.append(part)
    return [str(n) for n in names if n]


def _firmware(entry: Mapping[str, Any]) -> bool:
    """Return whether this is parallel flash.

    Flash lives in the guest's memory and is copied with it; QEMU writes all of it to the file after
    each load (pflash_post_load() in hw/block/pflash_cfi01.c).
    """
    last = str(entry.get("qdev") or "").rsplit("/", 1)[-1]
    return str(entry.get("device") or "").startswith("pflash") or last.startswith("system.flash")


def uncovered(blocks: Any, covered: Iterable[str]) -> list[str]:
    """Return one sentence per writable disk of `query-block` that is not one of `covered`.

    The input is the answer of qapi/block-core.json. Missing media, read-only media and the
    firmware's flash do not matter.
    """
    known, out = _with_nodes(covered), []
    for entry in blocks if isinstance(blocks, list) else []:
        inserted = entry.get("inserted")
        if not inserted or inserted.get("ro") is True or _firmware(entry):
            continue
        names = _names(entry)
        if known.isdisjoint(names):
            name = names[0] if names else "without a name"
            where = f" (node {inserted['node-name']})" if inserted.get("node-name") else ""
            out.append(f"disk {name}{where}, file {inserted.get('file', '?')}, is writable")
    return out


def _with_nodes(names: Iterable[str]) -> set[str]:
    return {n for name in names for n in (name, Nodes.of(name).replication)}


def missing(blocks: Any, names: Iterable[str]) -> list[str]:
    """Return those of these names that are no disk of this QEMU."""
    have = {n for entry in blocks if isinstance(blocks, list) for n in _names(entry)}
    return [n for n in names if have.isdisjoint((n, Nodes.of(n).replication))]


def refusal(blocks: Any, covered: Iterable[str]) -> str:
    """Return why this guest must not be protected, or an empty string.

    `covered`: the names of the disks in the configuration.
    """
    found = uncovered(blocks, covered)
    if not found:
        return ""
    return (
        f"{'; '.join(found)}: both guests would write, and a failover would lose or destroy what "
        "is on it. Declare it with a [[disk]], or take it off (docs/operator/disks.md)"
    )
