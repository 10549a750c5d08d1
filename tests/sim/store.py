# SPDX-License-Identifier: GPL-2.0-or-later
"""Simulate the store of a lease, and a controller's requests to it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from colo_xdp.failover.lease import GIVEN_UP, StoreError, StoreView, ours_to_take

from .process import OfProcess

if TYPE_CHECKING:
    from .host import Side
    from .world import World


class Witness:
    """What etcd stores for a pair. Its clock is slightly faster or slower than the hosts'."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.rate = world.rnd.uniform(0.992, 1.008)
        self.holder, self.alone, self.lease, self.revision = "", "", 0, 0
        self.last, self.since = "", 0
        self.leases: dict[int, tuple[int, int]] = {}  # end, ttl
        self._serial = 0

    def look(self) -> None:
        """Expire the leases that have ended by now."""
        now = self._world.ns()
        self.leases = {n: v for n, v in self.leases.items() if v[0] > now}
        if self.holder and self.lease not in self.leases:
            self._world.note("the lease of %s ends", self.holder)
            self.holder, self.lease = "", 0

    def grant(self, ttl_ms: int) -> int:
        self._serial += 1
        self.leases[self._serial] = (self._end(ttl_ms), ttl_ms)
        return self._serial

    def _end(self, ttl_ms: int) -> int:
        return self._world.ns() + int(ttl_ms * 1_000_000 / self.rate)

    def renew(self, lease: int) -> bool:
        self.look()
        if lease not in self.leases:
            return False
        ttl = self.leases[lease][1]
        self.leases[lease] = (self._end(ttl), ttl)
        return True

    def put(self, holder: str, lease: int) -> None:
        self.holder, self.lease, self.last = holder, lease, holder
        self.revision += 1
        self.since = self.revision

    def give_up(self, lease: int) -> None:
        """Record that the key was given up, if this lease still holds it."""
        if self.holder and self.lease == lease:
            self.revision += 1
            self.holder, self.last, self.since = "", GIVEN_UP, self.revision
        self.leases.pop(lease, None)

    def revoke(self) -> None:
        """End all leases early, as an administrator or a fault of the store does."""
        self._world.note("the store's leases are revoked")
        self.leases.clear()

    def seen(self) -> StoreView:
        return StoreView(self.holder, self.alone, self.last, self.since)


class SimStore(OfProcess):
    """Stand in for EtcdStore, request for request: each may be lost, late, or executed without
    an answer."""

    def __init__(self, side: Side) -> None:
        self._side, self._world, self._lease = side, side.world, 0
        self._process, self._closed = side.process, False

    async def _ask(self, what: Callable[[], Any]) -> Any:
        """Send one request and its answer over a network that is cut in one or both directions."""
        world, side = self._world, self._side
        if self.dead or self._closed:
            raise StoreError("closed")
        answer: asyncio.Future[Any] = world.loop.create_future()

        def arrive() -> None:
            if side.name in world.store_cut_out:
                return
            world.witness.look()
            try:
                result = what()
            except StoreError as e:
                result = e
            delay = world.rnd.uniform(0.05, 3 if world.rnd.random() < 0.9 else 350)
            world.later(delay, lambda: give(result))

        def give(result: Any) -> None:
            if side.name not in world.store_cut_in and not answer.done():
                answer.set_result(result)

        late = world.rnd.random() < 0.02
        world.later(world.rnd.uniform(300, 3000) if late else world.rnd.uniform(0.05, 3), arrive)
        done = False
        try:
            result = await answer
            if isinstance(result, StoreError):
                raise result
            done = True
            return result
        finally:
            if not done:
                self._lease = 0

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        w, last = self._world.witness, self._lease
        seen, revision = await self._ask(lambda: (w.seen(), w.revision))
        if not ours_to_take(seen, holder, steal, claim):
            return seen  # type: ignore[no-any-return]
        if last and await self._ask(lambda: w.renew(last)):
            lease = last
        else:
            lease = await self._ask(lambda: w.grant(ttl_ms))
        if lease == last:
            ok, now = await self._ask(lambda: (w.holder == holder and w.lease == lease, w.seen()))
            if ok:
                self._lease = lease
                return now  # type: ignore[no-any-return]

        def put() -> StoreView:
            if bool(w.holder) is not bool(seen.holder) or w.revision != revision:
                raise StoreError("changed")
            w.put(holder, lease)
            return w.seen()

        now = await self._ask(put)
        self._lease = lease
        return now  # type: ignore[no-any-return]

    async def look(self) -> StoreView:
        w = self._world.witness
        return await self._ask(w.seen)  # type: ignore[no-any-return]

    async def record(self, holder: str, alone: str) -> bool:
        w = self._world.witness

        def write() -> bool:
            if w.holder != holder:
                return False
            w.alone = alone
            return True

        return bool(await self._ask(write))

    async def release(self) -> None:
        lease, self._lease = self._lease, 0
        w = self._world.witness
        if lease:
            await self._ask(lambda: w.give_up(lease))

    async def close(self) -> None:
        self._closed = True
