# SPDX-License-Identifier: GPL-2.0-or-later
"""Answers, bundles and hosts' roots for the tests of colo_xdp.setup."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from colo_xdp.setup import bundle, init
from colo_xdp.setup.answers import Answers
from colo_xdp.setup.flags import Flags
from colo_xdp.setup.reader import answers

FLAGS = Flags(
    pair="web1", hosts="hosta/hostb", addresses="192.0.2.1/192.0.2.2", peer_link="eth1",
    bridge="br0", memory="4G", disk=("file=/var/lib/vm/web1.qcow2",),
    fence_primary="/sbin/off a", fence_secondary="/sbin/off b",
)  # fmt: skip


def flags(**changes: Any) -> Flags:
    return replace(FLAGS, **changes)


def made(**changes: Any) -> Answers:
    return answers(flags(**changes))


def bundles(where: Path, **changes: Any) -> dict[str, Path]:
    """Make the bundles of a pair; return them by role."""
    a = made(**changes)
    where.mkdir(exist_ok=True)
    list(init.write(a, where, replace_old=True))
    return {role: where / bundle.name(a.pair, role) for role in ("primary", "secondary")}


def root(where: Path, hostname: str = "hosta") -> Path:
    """Make the root directory of a host."""
    (where / "etc").mkdir(parents=True)
    (where / "etc/hostname").write_text(f"{hostname}\n")
    return where


def tree(where: Path) -> dict[str, tuple[int, bytes]]:
    """Return the mode and the bytes of every file, and of directories b"/"."""
    return {
        str(p.relative_to(where)): (
            p.lstat().st_mode, p.read_bytes() if p.is_file() else b"/"
        )
        for p in sorted(where.rglob("*"))
    }  # fmt: skip
