# SPDX-License-Identifier: GPL-2.0-or-later
"""What `doctor` wants to know of a QEMU: asked over QMP, and as JSON.

A QMP socket serves one client. Beside a running controller `doctor` therefore gets the survey from
the controller, over the control socket (controller/checkup.py); else probe() asks QEMU itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from .migration import MigrationOptions
from .nic import Card, Multiqueue
from .qmp import QemuInfo, Qmp


@dataclass(frozen=True, slots=True)
class Survey:
    """One QEMU as it is now.

    `blocks`: the answer to `query-block`; as JSON, what qemu/disks.py reads of it. `announcing`:
    the network cards that offer the guest VIRTIO_NET_F_GUEST_ANNOUNCE.
    """

    info: QemuInfo
    blocks: list[dict[str, Any]]
    cards: list[Card]
    announcing: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the survey for the control socket."""
        info = self.info
        return {
            "version": list(info.version),
            "kvm": info.kvm,
            "status": info.status,
            "machine": info.machine,
            "offers": sorted(info.offers),
            "queues": {tap: asdict(q) for tap, q in info.queues.items()},
            "trouble": info.trouble,
            "blocks": [_disk(entry) for entry in self.blocks],
            "cards": [asdict(c) for c in self.cards],
            "announcing": list(self.announcing),
        }

    @classmethod
    def from_json(cls, doc: Mapping[str, Any]) -> Survey:
        """Read what to_json() has made. Raises ValueError."""
        try:
            major, minor, micro = map(int, doc["version"])
            info = QemuInfo(
                (major, minor, micro),
                bool(doc["kvm"]),
                str(doc["status"]),
                str(doc["machine"]),
                frozenset(map(str, doc["offers"])),
                {str(tap): Multiqueue(**q) for tap, q in doc["queues"].items()},
                str(doc["trouble"]),
            )
            cards = [Card(**c) for c in doc["cards"]]
            return cls(info, list(doc["blocks"]), cards, tuple(map(str, doc["announcing"])))
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"not a survey of a QEMU: {e!r}") from e


def _disk(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return what qemu/disks.py reads of an entry of `query-block`."""
    inserted = entry.get("inserted")
    kept = {k: inserted.get(k) for k in ("ro", "node-name", "file")} if inserted else None
    return {"device": entry.get("device"), "qdev": entry.get("qdev"), "inserted": kept}


async def take(
    q: Qmp, taps: Iterable[str], migration: MigrationOptions | None = None, *, primary: bool = True
) -> Survey:
    """Ask a connected QEMU; nothing is changed. `taps`: the guest's, to ask for their queues.

    `migration`: None if a controller has prepared this QEMU already. Raises QmpError.
    """
    info = replace(
        await q.info(),
        offers=await q.offers(),
        queues={tap: found for tap in taps if (found := await q.queues(tap))},
        trouble=await q.migration_trouble(migration, primary=primary) if migration else "",
    )
    blocks = await q.execute("query-block")
    return Survey(info, blocks, await q.cards(), tuple(sorted(await q.announcing())))


def probe(
    path: str,
    timeout: float,
    taps: Iterable[str] = (),
    migration: MigrationOptions | None = None,
    *,
    primary: bool = True,
) -> Survey:
    """Connect, take a survey and disconnect. Raises QmpError."""

    async def ask() -> Survey:
        q = Qmp(path, "qemu", timeout, lambda e: None, lambda why: None)
        try:
            await q.connect()
            return await take(q, taps, migration, primary=primary)
        finally:
            await q.close()

    return asyncio.run(ask())
