# SPDX-License-Identifier: GPL-2.0-or-later
"""Stand in for the ways between two controllers: the control channel and heartbeat datagrams."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colo_xdp.failover.facts import Ending
from colo_xdp.peer import messages
from colo_xdp.peer.heartbeat_datagram import Flag, Heartbeat, HeartbeatSession, session_key

from .process import OfProcess

if TYPE_CHECKING:
    from .host import Side


class SimPeer(OfProcess):
    """Stand in for colo_xdp.peer.channel.Peer: an ordered channel that can be cut silently."""

    def __init__(
        self,
        side: Side,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        self._side, self._process = side, side.process
        self.connected = self.started = False
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self.last_seen_ns = self.rtt_ns = self.refused = 0
        side.boots += 1
        self.boot, self.peer_boot = f"{side.name}{side.boots}", ""
        self.heartbeat_key, self.ending = b"", Ending.UNKNOWN
        self._last = 0.0
        self._waiting: list[tuple[SimPeer, bytes]] = []  # sent, and not received for a cut
        self._partner: SimPeer | None = None
        side.peer = self

    async def start(self) -> None:
        self.started = True
        self._side.world.spawn(self._dial())

    async def _dial(self) -> None:
        world = self._side.world
        while not self.dead:
            other = self._side.other.peer
            free = other is not None and other.started and not other.dead and not other.connected
            if not self.connected and free and not (world.channel_cut or world.mute):
                assert other is not None
                self._partner, other._partner = other, self
                world.sessions += 1
                key = session_key("sim", f"{world.sessions:064x}", "00" * 32)
                for end, far in ((self, other), (other, self)):
                    end.connected, end.last_seen_ns = True, world.ns()
                    end.peer_boot, end.heartbeat_key = far.boot, key
                    end.ending = Ending.UNKNOWN
                for end in (self, other):
                    end._on_up()
            await asyncio.sleep(world.rnd.uniform(0.05, 0.1))

    def send(self, kind: str, **fields: Any) -> bool:
        line = messages.encode(kind, **fields)
        partner, world = self._partner, self._side.world
        if self.dead or not self.connected or partner is None:
            return False
        at = max(self._last, world.ms_exact() + world.rnd.uniform(0.05, 2))
        self._last = at + 0.001
        world.later(at - world.ms_exact(), lambda: self._arrive(partner, line))
        return True

    def _arrive(self, partner: SimPeer, line: bytes) -> None:
        world = self._side.world
        if partner.dead or not partner.connected or partner._partner is not self:
            return
        if self._waiting or self._is_cut():  # TCP sends it again, in its order
            self._waiting.append((partner, line))
            if len(self._waiting) == 1:
                world.later(5, self._again)
            return
        self._deliver(partner, line)

    def _is_cut(self) -> bool:
        return self._side.world.channel_cut or self._side.name in self._side.world.mute

    def _again(self) -> None:
        if self._is_cut():
            self._side.world.later(5, self._again)
            return
        waiting, self._waiting = self._waiting, []
        for partner, line in waiting:
            if not partner.dead and partner.connected and partner._partner is self:
                self._deliver(partner, line)

    def _deliver(self, partner: SimPeer, line: bytes) -> None:
        world = self._side.world
        partner.last_seen_ns = world.ns()
        msg = messages.decode(line)
        if msg["type"] != "heartbeat":
            world.note("%s gets %s", partner._side.name, msg)
        partner._on_message(msg)

    def drop(self, why: str) -> None:
        """Close a connection as the real channel does by itself."""
        self.cut(why)

    def cut(self, why: str) -> None:
        """Drop the connection; both ends notice unless they are dead."""
        partner, self._partner = self._partner, None
        ends = [self] if partner is None else [self, partner]
        if partner is not None:
            partner._partner = None
        for end in ends:
            was, end.connected = end.connected, False
            if was and not end.dead:
                end._on_down(why)

    def discount(self, ns: int) -> None:
        raise AssertionError("nobody stands still in virtual time")

    def silent_ms(self) -> float:
        if not self.last_seen_ns:
            return float("inf")
        return (self._side.world.ns() - self.last_seen_ns) / 1e6

    async def close(self) -> None:
        self.connected = False


class SimHeartbeatLinks(OfProcess):
    """Stand in for HeartbeatLinks with one link, the peer link.

    It carries the product's own heartbeat datagrams, which may be lost, late and reordered. Its
    random numbers are separate, so that a scene is the same without it.
    """

    def __init__(self, side: Side, pair: str, on_heartbeat: Callable[[Heartbeat], None]) -> None:
        self._side, self._process, self._on_heartbeat = side, side.process, on_heartbeat
        names = ["peer link"] if side.world.scene.datagrams else []
        self.core = HeartbeatSession(pair, "primary" if side.primary else "secondary", names)
        self._watched, self._inbox = True, list[tuple[int, bytes]]()
        side.heartbeat_links = self

    def start(self) -> None:
        pass

    def watch(self, on: bool) -> None:
        self._watched = on
        if on:
            self.read()

    def read(self) -> None:
        inbox, self._inbox = self._inbox, []
        for i, data in inbox:
            lay_ns = 0 if self._watched else 100_000_000
            word = self.core.receive(i, data, self._side.world.ns(), lay_ns)
            if word is not None:
                self._on_heartbeat(word)

    def send(self, flags: Flag, lag_ms: int, epoch: int) -> None:
        world, rnd = self._side.world, self._side.world.rnd_datagrams
        self.core.round()
        self.read()
        for i in range(len(self.core.links)):
            data = self.core.make(i, world.ns(), flags, lag_ms, epoch)
            if data and not self.dead and rnd.random() >= world.scene.link_loss:
                for _ in range(2 if rnd.random() < 0.02 else 1):
                    late = rnd.choice((2, 2, 2, 2, 80)) * rnd.random()
                    world.later(0.02 + late, lambda i=i, data=data: self._arrive(i, data))  # type: ignore[misc]

    def _arrive(self, i: int, data: bytes) -> None:
        world, other = self._side.world, self._side.other
        if (
            world.link_cut
            or other.name in world.deaf
            or other.heartbeat_links is None
            or other.heartbeat_links.dead
        ):
            return
        there = other.heartbeat_links
        there._inbox.append((i, data))
        if there._watched:
            there.read()

    def close(self) -> None:
        pass
