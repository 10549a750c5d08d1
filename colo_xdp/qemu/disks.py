# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks keep a guest from being protected: writable ones that nobody keeps equal. Pure.

Both guests run and both write. Memory is copied with each checkpoint, what is on a disk is not: one
image that both open is destroyed, and of two images each has only what its own guest wrote. Neither
QEMU nor the guest's file system notices.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def _names(entry: Mapping[str, Any]) -> list[str]:
    """By which a person may call it: the drive's id, its node, its device in QEMU's tree."""
    inserted = entry.get("inserted") or {}
    names = [entry.get("device"), inserted.get("node-name"), entry.get("qdev")]
    qdev = str(entry.get("qdev") or "")
    for part in qdev.removesuffix("/virtio-backend").split("/")[-1:]:
        names.append(part)
    return [str(n) for n in names if n]


def _firmware(entry: Mapping[str, Any]) -> bool:
    """Parallel flash: it lives in the guest's memory, is copied with it, and QEMU writes all of it
    to the file after each load (pflash_post_load() in hw/block/pflash_cfi01.c)."""
    last = str(entry.get("qdev") or "").rsplit("/", 1)[-1]
    return str(entry.get("device") or "").startswith("pflash") or last.startswith("system.flash")


def uncovered(blocks: Any, external: Iterable[str]) -> list[str]:
    """One sentence per writable disk of `query-block` (qapi/block-core.json) that is not one of
    `external`. Media that are not there, read-only ones and the firmware's flash are no matter."""
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
    """Names of `external` that QEMU knows no disk by."""
    have = {n for entry in blocks if isinstance(blocks, list) for n in _names(entry)}
    return [name for name in external if name not in have]


def refusal(blocks: Any, external: Iterable[str]) -> str:
    """Why this guest is not to be protected, or an empty string."""
    found = uncovered(blocks, external)
    if not found:
        return ""
    return (
        f"{'; '.join(found)}: both guests would write, and a failover would lose or destroy what "
        "is on it. Take it off, or declare it with [[disk]] external = true "
        "(docs/operator/guests.md)"
    )
