# SPDX-License-Identifier: GPL-2.0-or-later
"""Find disks that keep a guest from being protected: writable ones that nobody keeps equal. Pure.

Both guests run and both write. A checkpoint copies memory but not disks: an image that both open is
destroyed, and of two images each holds only what its own guest wrote. Neither QEMU nor the guest's
file system notices. The controller calls refusal(), the doctor uncovered() and missing().
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


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


def uncovered(blocks: Any, external: Iterable[str]) -> list[str]:
    """Return one sentence per writable disk of `query-block` that is not one of `external`.

    The input is the answer of qapi/block-core.json. Missing media, read-only media and the
    firmware's flash do not matter.
    """
    known, out = set(external), []
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


def missing(blocks: Any, external: Iterable[str]) -> list[str]:
    """Return the names in `external` that are no disk of this QEMU."""
    have = {n for entry in blocks if isinstance(blocks, list) for n in _names(entry)}
    return [name for name in external if name not in have]


def refusal(blocks: Any, external: Iterable[str]) -> str:
    """Return why this guest must not be protected, or an empty string."""
    found = uncovered(blocks, external)
    if not found:
        return ""
    return (
        f"{'; '.join(found)}: both guests would write, and a failover would lose or destroy what "
        "is on it. Take it off, or declare it with [[disk]] external = true "
        "(docs/operator/guests.md)"
    )
