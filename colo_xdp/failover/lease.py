# SPDX-License-Identifier: GPL-2.0-or-later
"""Decide which host may transmit, with a lease as the arbiter ([failover] arbiter = "lease").

There is one key per pair in a store that both hosts reach (etcd; failover/etcd.py), bound to a
lease of `ttl`. A host's guest may transmit until the later of two times. The kernel enforces this:
the eBPF programs drop everything after CFG_LEASE_EXPIRY_NS, so if a controller hangs or dies, its
guest falls silent too. LeaseArbiter (failover/arbiter.py) owns the Leadership object of this
module.

- *The key*: requested at t and held, so nobody else gets it before t + ttl.
- *A promise*: the other host's heartbeat says "my guest is silent and stays silent for `ttl` from
  now". It answers a heartbeat that this host sent at t, so it is good until t + ttl. An unreachable
  store alone therefore stops nobody.

Both times are reduced by `margin`. A host that has promised silence waits until its last promise
has expired, and gets the key, before its guest transmits. It keeps a promise 1 % longer than
stated.

Times are durations on each host's own CLOCK_BOOTTIME, which keeps running during suspend and which
nobody sets. The hosts need not agree on the time. What is assumed is that the clock rates of both
hosts and of the store differ by less than 1 %, that none of these clocks stops (a hypervisor that
pauses a host together with its clock breaks this), and that a frame needs less than `margin` minus
1 % of `ttl` from the program's check to the wire. On etcd's side the leader counts a lease from the
moment it handled the renewal, which is later than t, and a new leader starts counting anew
(lessor.Promote() in etcd's server/lease).

*A host that has booted* promises nothing until it has read in the store that its guest did not run
standalone before: else the other one, outdated and cut off from the store, would transmit.

*A key that has vanished* proves nothing: a lease can end early (somebody revokes it, or etcd's
leader hung and resumes), while its holder relies on it for up to `ttl`. A third key, without a
lease, therefore names the last holder of the first one; giving the key up is recorded there. A host
that finds the key gone and the other host as its last holder waits for `ttl` from then on, unless
that host reports that its path is shut. To start this wait in time, a host looks at the key as soon
as it suspects the other one.

The second key, without a lease, records whose guest ran standalone. It is written while the first
key is held and before the guest runs standalone. From then on the other host's guest is outdated
and never transmits again, however long the survivor stays dead. A new pair clears the record.

Late requests: the store may carry out a request after this host has given up on it. A late
acquisition only makes the other side wait; the holder is `node boot`, so it is never mistaken for
another one. A late release names a lease that is never used again. A held key is taken over only
from the process, identified by its boot id, that reported its path shut. A late record is binding:
the host that requested it goes through with it.
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
RATE = 100  # clocks differ by less than one part in this many
STEPS = 5  # renewals per ttl
T = TypeVar("T")


class StoreError(RuntimeError):
    """The store did not answer, or not in time; the text says which."""


#: stored in place of the last holder: the key was given up, and nobody relies on it
GIVEN_UP = "-"


@dataclass(frozen=True, slots=True)
class StoreView:
    """Contents of the store: the key's holder ("node boot") and the node that ran standalone.

    "" means nobody. `last` is the most recent holder, or GIVEN_UP; "" means that nothing is known.
    `since` differs each time somebody acquires the key.
    """

    holder: str
    standalone: str
    last: str = ""
    since: int = 0


def host_of(holder: str) -> str:
    """Return the part of "node@address boot" that names the host."""
    return holder.split(" ")[0]


def ours_to_take(seen: StoreView, holder: str, steal: str, claim: bool) -> bool:
    """Return whether `holder` may acquire or renew the key. Every store must check this first.

    `steal`: the process of the other host whose path is shut. `claim`: the waiting time after the
    key vanished is over.
    """
    who = seen.holder or seen.last
    if host_of(who) == host_of(holder) or (steal and who.endswith(f" {steal}")):
        return True
    return not seen.holder and (seen.last == GIVEN_UP or claim)


class Store(Protocol):
    """The key in the store. Every request may raise StoreError, and may be carried out late."""

    async def hold(self, holder: str, ttl_ms: int, steal: str, claim: bool) -> StoreView:
        """Renew the key, or acquire it, if ours_to_take() allows."""

    async def record(self, holder: str, standalone: str) -> bool:
        """Record the node that runs standalone if `holder` holds the key; return whether it did."""

    async def look(self) -> StoreView:
        """Read the store without requesting anything."""

    async def release(self) -> None:
        """Give the key up if it is held, and record that."""

    async def close(self) -> None:
        """Close the connection; the store is not used afterwards."""


def boot_ns() -> int:
    """Return CLOCK_BOOTTIME in ns."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Leadership:
    """Maintain one host's permission to transmit.

    `allow` passes a new end of the permission (CLOCK_BOOTTIME, ns) to the eBPF programs; `changed`
    is called when `held` or `seen` has changed.
    """

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
        knows: bool = True,
    ) -> None:
        """`knows`: a former process has left behind what this host's guest did before."""
        self._store, self.node, self.holder = store, node, f"{node}@{address} {boot}"
        self._ttl_ms, self._ttl = ttl_ms, ttl_ms * MS
        self._usable = self._ttl - margin_ms * MS
        self._allow, self._changed = allow, changed
        self._key_until = self._promise_until = 0
        # A former process of this host may have promised silence just before it died, unless its
        # guest was `transmitting`.
        self._silent_until = 0 if transmitting else boot_ns() + self._ttl + self._ttl // RATE
        self._want = self._asked = self._watch = False
        #: it is certain that no guest of this host has run standalone since the pair was made
        self._knows = knows
        self._gone_ns = 0  # when the key was first seen to be gone (boot_ns); 0: it is not
        self._record: str | None = None
        self.steal = ""  # boot id of a holder that is certain to be silent
        self.seen = StoreView("", "")
        self.trouble = ""
        self._wake = asyncio.Event()

    # ---- what is known

    @property
    def held(self) -> bool:
        """Whether the key is held: this guest may then transmit whatever the other side does."""
        return boot_ns() < self._key_until

    @property
    def may_transmit(self) -> bool:
        return boot_ns() < max(self._key_until, self._promise_until)

    @property
    def remaining_s(self) -> float:
        """How long the guest may still transmit without further renewal, s."""
        return max(0, max(self._key_until, self._promise_until) - boot_ns()) / 1e9

    @property
    def peer_standalone(self) -> bool:
        """Whether the other guest ran standalone, so that this one must not transmit."""
        return self.seen.standalone not in ("", self.node)

    @property
    def recorded(self) -> bool:
        """Whether the store records that this host's guest runs standalone."""
        return self.seen.standalone == self.node

    @property
    def committed(self) -> bool:
        """Whether that record was requested; the store may still write it late."""
        return self._record == self.node

    # ---- what is wanted

    @property
    def want(self) -> bool:
        """Whether this host's guest transmits or wants to."""
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
        """Whether the other host is suspected.

        The store is then read regularly, so that a vanishing key is noticed in time.
        """
        return self._watch

    @watch.setter
    def watch(self, watch: bool) -> None:
        if watch and not self._watch:
            self._wake.set()
        self._watch = watch

    def ran_standalone(self) -> None:
        """Request the record that this host's guest runs standalone."""
        if not self.committed:
            self._record = self.node
            self._wake.set()

    def paired(self) -> None:
        """Clear this host's record: neither guest has state that the other one lacks."""
        self._knows = True
        if self.recorded or self.committed:
            self._record = ""
            self._wake.set()

    # ---- promises

    def promise(self) -> bool:
        """Return whether the heartbeat being sent promises silence.

        The caller's guest is silent at this time. A host that knows nothing of what it did before
        (a boot) promises nothing until the store has told: with the promise the other host's guest
        would transmit, which is outdated if this host's has run standalone.
        """
        if self._want or not self._knows:
            return False
        self._silent_until = max(self._silent_until, boot_ns() + self._ttl + self._ttl // RATE)
        return True

    def promised(self, sent_ns: int) -> None:
        """Note that the other side promised, in reply to what was sent at `sent_ns` (boot_ns)."""
        if sent_ns <= boot_ns():
            self._promise_until = max(self._promise_until, sent_ns + self._usable)
            self._publish()

    async def look(self) -> None:
        """Read the store without requesting anything. Raises StoreError within the deadline."""
        self._saw(await self._bounded(self._store.look()))

    def forget(self) -> None:
        """Discard the standalone record of the last pair, because this host's guest is a new one.

        The store is read again before any guest transmits.
        """
        self.seen = replace(self.seen, standalone="")

    def freed(self, boot: str) -> None:
        """Note that the other host's process with this boot id has shut its data path.

        Nobody relies on this host's promises then, and the key may be taken over from that process,
        until it reports that it waits for a new guest (new_guest()).
        """
        self._silent_until, self.steal = 0, boot
        self._wake.set()

    def new_guest(self) -> None:
        """Note that the silent process may transmit again later: its key is its own again."""
        self.steal = ""

    def _publish(self) -> None:
        self._allow(max(self._key_until, self._promise_until))

    # ---- the loop

    async def run(self) -> None:
        """Renew the lease until cancelled.

        Cancellation gives nothing up: a controller may stop while its guest keeps running.
        """
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
            # until the record is cleared by a new pair
            if self.peer_standalone or self._watch or not self._knows:
                await self.look()
            return
        if boot_ns() < self._silent_until:
            await self.look()
            return
        began, self._asked = boot_ns(), True
        claim = self._may_claim()
        seen = await self._bounded(self._store.hold(self.holder, self._ttl_ms, self.steal, claim))
        if not self._want:  # no longer wanted
            return
        self._saw(seen)
        if seen.holder != self.holder or self.peer_standalone:
            self._key_until = 0
            self._publish()
            if not self.recorded:
                self._record = None  # the current holder kept us from recording it
            return
        self.steal = ""
        self._key_until = max(self._key_until, began + self._usable)
        self._publish()
        await self._write_record()

    @property
    def _claim_ns(self) -> int:
        """When a vanished key may be taken (boot_ns).

        Its holder's last renewal has expired by then.
        """
        return self._gone_ns + self._ttl + self._ttl // RATE

    def _may_claim(self) -> bool:
        # While our own key is valid, a host that finds it gone waits longer than ours lasts.
        return self.held or (self._gone_ns > 0 and boot_ns() >= self._claim_ns)

    def _saw(self, seen: StoreView) -> None:
        """Take the store's answer; waiting times count from the answer.

        The request may have been sent long before.
        """
        if (seen.holder, seen.standalone) != (self.seen.holder, self.seen.standalone):
            log.info(
                "lease: held by %s, standalone: %s",
                seen.holder or "nobody",
                seen.standalone or "none",
            )
        if seen.holder or seen.last == GIVEN_UP:
            self._gone_ns = 0
        elif not self._gone_ns or seen.since != self.seen.since:
            self._gone_ns = boot_ns()
            if seen.last and host_of(seen.last) != host_of(self.holder):
                log.warning(
                    "lease: the key of %s has vanished: waiting until it expires", seen.last
                )
        self.seen = seen
        self._knows = self._knows or not self.recorded

    async def _write_record(self) -> None:
        """Bring the store's record to the wanted value; another node's record is never changed."""
        want = self._record
        if want is None or want == self.seen.standalone or self.peer_standalone:
            return
        if await self._bounded(self._store.record(self.holder, want)):
            self.seen = replace(self.seen, holder=self.holder, standalone=want)
            if want == "" and self._record == "":
                self._record = None

    async def close(self) -> None:
        """Stop using the store; a held key expires by itself."""
        await self._store.close()
