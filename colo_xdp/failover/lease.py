# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the two hosts may speak, with a lease as the arbiter ([failover] arbiter = "lease").

One key per pair in a store that both hosts reach (etcd; failover/etcd.py), bound to a lease of
`ttl`. A host's guest may speak until the later of two times, and the kernel itself enforces it: the
programs drop what comes after CFG_LEASE_EXPIRY_NS, so a controller that hangs or dies falls silent
with its guest.

- *The key*: asked for at t, held, so nobody else gets it before t + ttl.
- *A promise*: the other host's heartbeat says "my guest is silent, and stays so for `ttl`
  from now"; it answers a heartbeat of ours that was sent at t, so until t + ttl. An unreachable
  store alone stops nobody.

Both less `margin`. A host that has promised silence waits until its last promise is over, and gets
the key, before its guest speaks. It counts a promise 1 % longer than it said.

Times are durations on CLOCK_BOOTTIME of one host each: it goes on while a host is suspended, and
nobody sets it. The hosts need not agree on the time; what is assumed is that the rates of
the clocks of both hosts and of the store differ by less than 1 %, that none of them stands still (a
hypervisor that pauses a host and its clock breaks this), and that the way from the program's
check to the wire takes less than `margin` less 1 % of `ttl`. etcd's side: the leader counts a lease
from the moment it handled the renewal, later than t, and a new leader counts it anew
(lessor.Promote() in etcd's server/lease).

*A key that is gone* proves nothing: a lease can end before its time (somebody revokes it, or
etcd's leader hung and goes on), and its holder relies on it for up to `ttl`. So a third key,
without lease, names whoever got the first one last; giving it up is written there. Who finds the
key gone and the other host as its last holder waits for `ttl` from then, unless that one says
that its path is shut. To be in time a host looks as soon as it suspects the other one.

The second key, without lease, says whose guest has spoken alone. It is written while the key is
held, before the guest speaks alone; the other host's guest, whose state is old from then on, never
speaks after that, however long the survivor is dead. A new pair clears it.

Late requests: one that is given up may be carried out by the store afterwards.
A late acquisition only keeps the other side waiting; the holder is `node boot`, so it is never
taken for somebody else's. A late release names a lease that is never used again. A key that is
held is taken over only from the process that said itself that its path is shut, by its boot id. A
late record binds: who has asked for it goes through with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

log = logging.getLogger("colo_xdp.failover.lease")

MS = 1_000_000
RATE = 100  # clocks differ by less than one part in so many
STEPS = 5  # renewals in one ttl
T = TypeVar("T")


class StoreError(RuntimeError):
    """The store did not answer, or not in time; says which."""


#: in place of the last holder: the key was given up, and nobody relies on it
GIVEN_UP = "-"


@dataclass(frozen=True, slots=True)
class StoreView:
    """What the store says: "node boot" of the key's holder, node that spoke alone; "": nobody.

    `last`: whoever got it last, or GIVEN_UP; "": nothing is known. `since` is another one each
    time that somebody gets it.
    """

    holder: str
    alone: str
    last: str = ""
    since: int = 0


def host_of(holder: str) -> str:
    """Of "node@address boot" what names the host."""
    return holder.split(" ")[0]


def ours_to_take(seen: StoreView, holder: str, steal: str, claim: bool) -> bool:
    """Whether `holder` may get the key, or renew it: what each store has to ask first.

    `steal`: the process of the other host whose path is shut; `claim`: the time of a key that has
    vanished is over.
    """
    who = seen.holder or seen.last
    if host_of(who) == host_of(holder) or (steal and who.endswith(f" {steal}")):
        return True
    return not seen.holder and (seen.last == GIVEN_UP or claim)


class Store(Protocol):
    """The key in the store. All of it may raise StoreError, and may be carried out late."""

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        """Renew the key, or get it, if ours_to_take() says so."""

    async def record(self, holder: str, alone: str) -> bool:
        """Write who has spoken alone, if `holder` holds the key; whether it did."""

    async def look(self) -> StoreView:
        """What it says, without asking for anything."""

    async def release(self) -> None:
        """Give the key up, if it is held, and say so."""

    async def close(self) -> None:
        """No more."""


def boot_ns() -> int:
    """CLOCK_BOOTTIME."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Leadership:
    """One host's side. `allow` gives a new end of the permission, in ns, to the programs."""

    def __init__(
        self,
        store: Store,
        *,
        node: str,
        address: str,
        boot: str,
        ttl_ms: int,
        margin_ms: int,
        transmitting: bool,
        allow: Callable[[int], None],
        changed: Callable[[], None],
    ) -> None:
        self._store, self.node, self.holder = store, node, f"{node}@{address} {boot}"
        self._ttl_ms, self._ttl = ttl_ms, ttl_ms * MS
        self._usable = self._ttl - margin_ms * MS
        self._allow, self._changed = allow, changed
        self._key_until = self._promise_until = 0
        # A former process of this host may have promised something just before it died, unless its
        # guest was `speaking`.
        self._silent_until = 0 if transmitting else boot_ns() + self._ttl + self._ttl // RATE
        self._want = self._asked = self._watch = False
        self._gone_ns = 0  # since when the key is known to have vanished (boot_ns)
        self._record: str | None = None
        self.steal = ""  # boot id of a holder that is certain to be silent
        self.seen = StoreView("", "")
        self.trouble = ""
        self._wake = asyncio.Event()

    # ---- what is known

    @property
    def held(self) -> bool:
        """The key is ours, and so is the network, whatever the other side does."""
        return boot_ns() < self._key_until

    @property
    def may_transmit(self) -> bool:
        return boot_ns() < max(self._key_until, self._promise_until)

    @property
    def remaining_s(self) -> float:
        """How long the guest may speak from now on, s, if nothing more is heard."""
        return max(0, max(self._key_until, self._promise_until) - boot_ns()) / 1e9

    @property
    def peer_standalone(self) -> bool:
        """The other guest has spoken alone: ours must not."""
        return self.seen.alone not in ("", self.node)

    @property
    def recorded(self) -> bool:
        """The store knows that this host's guest speaks alone."""
        return self.seen.alone == self.node

    @property
    def committed(self) -> bool:
        """The store has been asked to know it, and may do so late."""
        return self._record == self.node

    # ---- what is wanted

    @property
    def want(self) -> bool:
        """Whether this host's guest speaks or wants to."""
        return self._want

    @want.setter
    def want(self, want: bool) -> None:
        if want is self._want:
            return
        self._want = want
        if not want:
            self._key_until, self._record = 0, None
            self._publish()
        self._wake.set()

    @property
    def watch(self) -> bool:
        """The other host is suspected: look, so that a key which vanishes is missed in time."""
        return self._watch

    @watch.setter
    def watch(self, watch: bool) -> None:
        if watch and not self._watch:
            self._wake.set()
        self._watch = watch

    def alone(self) -> None:
        """Have it recorded that this host's guest speaks alone."""
        if not self.committed:
            self._record = self.node
            self._wake.set()

    def paired(self) -> None:
        """No guest of the pair has anything that the other one lacks: clear our own record."""
        if self.recorded or self.committed:
            self._record = ""
            self._wake.set()

    # ---- promises

    def promise(self) -> bool:
        """Whether the heartbeat that is sent now promises silence; the caller's guest is silent."""
        if self._want:
            return False
        self._silent_until = max(self._silent_until, boot_ns() + self._ttl + self._ttl // RATE)
        return True

    def promised(self, sent_ns: int) -> None:
        """The other side promises, in answer to what we sent at `sent_ns` (boot_ns)."""
        if sent_ns <= boot_ns():
            self._promise_until = max(self._promise_until, sent_ns + self._usable)
            self._publish()

    async def look(self) -> None:
        """Ask what the store says, and for nothing. Raises StoreError, within its deadline."""
        self._saw(await self._bounded(self._store.look()))

    def forget(self) -> None:
        """This host's guest is a new one: what was read of the last pair says nothing of it. The
        store is asked again before anybody speaks."""
        self.seen = replace(self.seen, alone="")

    def freed(self, boot: str) -> None:
        """That process of the other host has shut its data path: nobody relies on our promises,
        and its key may be taken, until it says that it waits for a new guest (revived())."""
        self._silent_until, self.steal = 0, boot
        self._wake.set()

    def revived(self) -> None:
        """The process that was silent may speak again one day: its key is its own."""
        self.steal = ""

    def _publish(self) -> None:
        self._allow(max(self._key_until, self._promise_until))

    # ---- the loop

    async def run(self) -> None:
        """Until cancelled; gives nothing up then: a controller may stop while its guest goes on."""
        every = self._ttl / 1e9 / STEPS
        while True:
            self._wake.clear()
            before = (self.held, self.seen)
            ok = True
            try:
                await self._step()
                self._say("")
            except StoreError as e:
                ok = False
                self._say(str(e))
            if (self.held, self.seen) != before:
                self._changed()
            pause = every if ok else every / 4
            now = boot_ns()
            for at in (self._silent_until, self._gone_ns and self._claim_ns):
                if self._want and at > now:
                    pause = min(pause, (at - now) / 1e9)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(pause, 0.001)):
                    await self._wake.wait()

    def _say(self, trouble: str) -> None:
        if trouble != self.trouble:
            self.trouble = trouble
            log.warning("lease: %s", trouble or "the store answers again")

    async def _bounded(self, request: Awaitable[T]) -> T:
        try:
            async with asyncio.timeout(2 * self._ttl / 1e9 / STEPS):
                return await request
        except TimeoutError as e:
            raise StoreError("the store does not answer in time") from e

    async def _step(self) -> None:
        if not self._want:
            if self._asked:
                await self._bounded(self._store.release())
                self._asked = self._want
            if self.peer_standalone or self._watch:  # until it no longer is: a new pair clears it
                await self.look()
            return
        if boot_ns() < self._silent_until:
            await self.look()
            return
        began, self._asked = boot_ns(), True
        claim = self._may_claim()
        seen = await self._bounded(self._store.hold(self.holder, self._ttl_ms, self.steal, claim))
        if not self._want:  # changed its mind meanwhile
            return
        self._saw(seen)
        if seen.holder != self.holder or self.peer_standalone:
            self._key_until = 0
            self._publish()
            if not self.recorded:
                self._record = None  # who holds it now has not let us
            return
        self.steal = ""
        self._key_until = max(self._key_until, began + self._usable)
        self._publish()
        await self._write_record()

    @property
    def _claim_ns(self) -> int:
        """When a key that has vanished may be taken: its holder's last renewal is older."""
        return self._gone_ns + self._ttl + self._ttl // RATE

    def _may_claim(self) -> bool:
        # While ours holds, whoever finds it gone waits longer than it does.
        return self.held or (self._gone_ns > 0 and boot_ns() >= self._claim_ns)

    def _saw(self, seen: StoreView) -> None:
        """Counted from the answer: it may have been asked long before."""
        if (seen.holder, seen.alone) != (self.seen.holder, self.seen.alone):
            log.info("lease: held by %s, alone: %s", seen.holder or "nobody", seen.alone or "none")
        if seen.holder or seen.last == GIVEN_UP:
            self._gone_ns = 0
        elif not self._gone_ns or seen.since != self.seen.since:
            self._gone_ns = boot_ns()
            if seen.last and host_of(seen.last) != host_of(self.holder):
                log.warning("lease: the key of %s has vanished: waiting for its end", seen.last)
        self.seen = seen

    async def _write_record(self) -> None:
        """Bring the store's record to what is wanted; another node's is never touched."""
        want = self._record
        if want is None or want == self.seen.alone or self.peer_standalone:
            return
        if await self._bounded(self._store.record(self.holder, want)):
            self.seen = replace(self.seen, holder=self.holder, alone=want)
            if want == "" and self._record == "":
                self._record = None

    async def close(self) -> None:
        """Stop using the store; what is held ends by itself."""
        await self._store.close()
