# SPDX-License-Identifier: GPL-2.0-or-later
"""Controllers without a kernel, a QEMU or a peer, and what the tests of this package share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from colo_xdp.abi import Mode, SyncState
from colo_xdp.config.file import load
from colo_xdp.controller.primary import Primary
from colo_xdp.controller.secondary import Secondary
from colo_xdp.datapath.addresses import AddressTable
from colo_xdp.datapath.hooks import Look
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.failover.lease import StoreError, StoreView
from colo_xdp.qemu.events import QmpEvent
from colo_xdp.qemu.migration import MigrationOptions
from colo_xdp.qemu.nic import Card
from colo_xdp.qemu.qmp import QmpTimeout
from tests.sim.datapath import MapDict

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"


class FakeInjector:
    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.sent, self.failed = 0, {}

    def send(
        self, frame: bytes, gso_size: int = 0, partial: bool = False, gso_type: int = 0
    ) -> bool:
        self.frames.append(frame)
        return True


class FakeDataPath:
    """Remembers what it is told."""

    def __init__(self, mode: Mode, *, adopted: bool = False) -> None:
        self.mode, self.adopted, self.epoch, self.shadowed = mode, adopted, 7, 0
        self.sync_state = (
            SyncState.IN_SYNC if mode in (Mode.RUN, Mode.CHECKPOINT) else SyncState.NONE
        )
        self.fast = None
        self.order = ""
        self.injectors = {n: FakeInjector() for n in ("release", "deliver", "forward")}
        self.objects = SimpleNamespace(
            map=lambda name: SimpleNamespace(info=SimpleNamespace(max_entries=8), items=lambda: [])
        )
        self.waiting: list[CapturedFrame] = []
        self.found, self.came, self.traffic = Look(), 0, (0, 0)
        self.opened = self.changed = self.stepped_in = 0
        self.in_bridge: list[str] = []
        self.nics, self.fds = (self,), list[int]()
        self.promoted_epoch = self.peer_stopped = self.closed = self.disks_whole = 0
        self.mirrored_until = 0
        self.undecided = False
        self.unmirrored: set[bytes] = set()
        self.addresses = AddressTable(MapDict(), MapDict())
        self.port_state, self.port_forwarding, self.hook = "", True, "tc"
        self.macs: list[bytes] = []

    def is_at(self, *macs: bytes) -> None:
        self.macs = list(macs)

    def watch_guest(self) -> None:
        pass

    def look_at_port(self) -> None:
        pass

    def lost_events(self) -> int:
        return 0

    def unmirror(self, key: bytes | None) -> None:
        self.unmirrored = set() if key is None else self.unmirrored | {key}

    def watch_bridge(self) -> None:
        pass

    def look(self) -> Look:
        return self.found

    def changes(self) -> None:
        return None

    def arrived(self) -> int:
        return self.came

    def guest_traffic(self) -> tuple[int, int]:
        return self.traffic

    def drain(self, sink: Callable[[CapturedFrame], None], limit: int = 0) -> int:
        events, self.waiting = self.waiting, []
        for e in events:
            sink(e)
        return len(events)

    def lease_expiry(self, boot_ns: int) -> None:
        self.until = boot_ns

    def flows(self) -> None:
        return None

    def counters(self, progs: object = None) -> dict[str, dict[str, tuple[int, int]]]:
        sent = len(self.injectors["forward"].frames)
        return {"svm_out": {"pass": (0, 0), "pass_rewritten": (0, 0), "pass_released": (sent, 0)}}

    def change_role(self) -> None:
        self.changed += 1

    def open_network(self) -> None:
        self.opened += 1

    def close_network(self) -> None:
        self.closed += 1

    def tap_alive(self) -> bool:
        return True

    def step_in(self) -> None:
        self.stepped_in += 1


class Sent(list[dict[str, Any]]):
    def __call__(self, kind: str, **fields: Any) -> bool:
        self.append({"type": kind, **fields})
        return True

    def kinds(self) -> list[str]:
        return [m["type"] for m in self]


def primary(mode: Mode = Mode.RUN, *, adopted: bool = False) -> tuple[Primary, FakeDataPath, Sent]:
    dp = FakeDataPath(mode, adopted=adopted)
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def secondary(
    mode: Mode = Mode.RUN, *, adopted: bool = True
) -> tuple[Secondary, FakeDataPath, Sent]:
    dp = FakeDataPath(mode, adopted=adopted)
    c = Secondary(load(EXAMPLES / "secondary.toml"), dp)  # type: ignore[arg-type]
    sent = Sent()
    c.peer.send = sent  # type: ignore[method-assign]
    return c, dp, sent


def in_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(body(), 10))


def event(name: str, ts: int, seen: int) -> QmpEvent:
    return QmpEvent(name, {}, ts, seen)


def undecided() -> tuple[Primary, FakeDataPath, Sent]:
    """A primary that found nothing pinned, connected to the other host's controller."""
    dp, sent = FakeDataPath(Mode.DROP), Sent()
    dp.undecided, dp.epoch = True, 0
    c = Primary(load(EXAMPLES / "primary.toml"), dp)  # type: ignore[arg-type]
    c.peer.send = sent  # type: ignore[method-assign]
    c._peer_up()
    c.peer.connected = True
    return c, dp, sent


def beat(state: str, **fields: Any) -> dict[str, Any]:
    return {
        "type": "heartbeat", "t": 1, "echo": 0, "state": state, "epoch": 5, "vm": True,
        "shut": False,
        "standalone": False, "shadow": False, "promise": False, "role": "secondary",
        "delivered": 0, "sent": 0, **fields,
    }  # fmt: skip


class FakeQmp:
    """Answers as a QEMU that has left COLO at once."""

    name = "fake"

    def __init__(self) -> None:
        self.connected, self.said = True, []  # type: tuple[bool, list[str]]
        self.colo = True

    async def migration_status(self, timeout: float | None = None) -> str:
        return "colo" if self.colo else "completed"

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        self.said.append("lost_heartbeat")
        self.colo = False

    async def status(self, timeout: float | None = None) -> str:
        return "running"

    async def hardware(self) -> dict[str, str]:
        return {"vCPUs": "1"}

    async def trigger_checkpoint(self) -> None:
        self.said.append("checkpoint")

    async def cards(self) -> list[Card]:
        return []

    async def guest_macs(self, tap: str) -> list[str]:
        return ["52:54:00:12:34:56", "52:54:00:12:34:57"]


BEAT = {
    "t": 1,
    "echo": 0,
    "vm": True,
    "standalone": False,
    "shadow": False,
    "delivered": 0,
    "sent": 0,
    "type": "heartbeat",
    "role": "primary",
}


class WaitingQmp(FakeQmp):
    """Runs, until it is ended; the next one waits for a migration."""

    async def status(self, timeout: float | None = None) -> str:
        return "inmigrate" if "quit" in self.said else "running"

    async def migration_status(self, timeout: float | None = None) -> str:
        return "" if "quit" in self.said else "completed"

    async def quit(self) -> None:
        self.said.append("quit")

    async def prepare(self, *, primary: bool, migration: MigrationOptions) -> None:
        self.said.append("prepare")

    async def execute(self, command: str, args: Any = None, timeout: Any = None) -> Any:
        assert command == "query-block"
        return []


class HungQmp(FakeQmp):
    """Its main loop answers again after a yank, or not; the way past it answers, or not."""

    def __init__(self, *, loop: bool, oob: bool, after: bool) -> None:
        super().__init__()
        self.loop, self.oob, self.after = loop, oob, after

    async def status(self, timeout: float | None = None) -> str:
        if not self.loop:
            raise QmpTimeout("query-status: no answer in time")
        return "running"

    async def yank(self, timeout: float | None = None) -> None:
        self.said.append("yank")
        if not self.oob:
            raise QmpTimeout("yank: no answer in time")
        self.loop = self.after


RAN_STANDALONE = {
    "type": "heartbeat", "t": 1, "echo": 0, "epoch": 7, "vm": True, "promise": False,
    "shadow": False,
    "role": "primary", "state": "solo", "shut": False, "standalone": True,
    "delivered": 0, "sent": 0,
}  # fmt: skip


class Leased:
    """Of Leadership what a switchover asks."""

    def __init__(self, held: bool, trouble: str, *, may: bool = True) -> None:
        self.held, self.trouble = held, trouble
        self.may_transmit, self.peer_standalone, self.recorded, self.committed = (
            may,
            False,
            False,
            False,
        )
        self.want, self.remaining_s = True, 1.5 * may

    async def look(self) -> None:
        await asyncio.sleep(0)
        if self.trouble:
            raise StoreError(self.trouble)


class ToldStore:
    """Store that says what it is told to."""

    def __init__(self, seen: StoreView) -> None:
        self.seen, self.asked = seen, 0

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        self.asked += 1
        return StoreView(holder, self.seen.standalone)

    async def look(self) -> StoreView:
        return self.seen

    async def record(self, holder: str, alone: str) -> bool:
        return True

    async def release(self) -> None: ...

    async def close(self) -> None: ...
