# SPDX-License-Identifier: GPL-2.0-or-later
"""Ensure that only one guest of a pair runs standalone ([failover] arbiter).

The decision (failover/decision.py) reads an ArbiterView and does not know any arbiter by name. To
add an arbiter, write a class here, list it in ARBITERS, and add its name to the choices of the key
in config/schema.py. Which keys it needs or excludes is checked in config/file.py, what can be tried
beforehand in tools/doctor.py. The controller creates the configured arbiter, runs it as a task and
reports peer and decision events to it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .. import user_command
from .decision import Action
from .facts import ArbiterView
from .lease import Leadership, Store, StoreError

if TYPE_CHECKING:
    from ..config.file import Config

log = logging.getLogger("colo_xdp")


class ArbiterError(RuntimeError):
    """The arbiter cannot be consulted now; the text gives the reason."""


@dataclass(frozen=True, slots=True)
class Host:
    """What an arbiter needs from the host that it works for."""

    config: Config
    boot: str  # identifies this process to the peer
    transmitting: bool  # the guest was already on the network when this process started
    adopted: bool  # a former process's data path is still there, and with it what it has decided
    allow: Callable[[int], None]  # give the programs the permission's end, CLOCK_BOOTTIME in ns
    changed: Callable[[], None]  # call when view() has changed


class Arbiter(Protocol):
    """Interface of an arbiter: events go in through the methods, the result is read from view()."""

    #: no guest is on the network without the arbiter's grant, and the eBPF programs enforce that
    needs_grant: bool = False

    def view(self) -> ArbiterView:
        """Return the arbiter's current view of the pair."""
        ...

    def follow(self, action: Action, *, wants: bool) -> None:
        """Take note of the decision; `wants`: this host's guest is to be on the network."""

    async def fence(self) -> bool:
        """Make sure that the other host is silent; return whether that is certain now."""
        return False

    async def check(self) -> None:
        """Check that the arbiter could let this host's guest transmit. Raises ArbiterError."""

    def paired(self) -> None:
        """Note that neither guest of the pair has state that the other one lacks."""

    def new_guest(self) -> None:
        """Discard what was read about the last pair: it does not apply to the new guest."""

    def promise(self) -> bool:
        """Return whether the heartbeat being sent promises silence. This host's guest is silent."""
        return False

    def promised(self, sent_boot_ns: int) -> None:
        """Note that the peer promised silence in reply to what was sent at `sent_boot_ns`.

        Time: CLOCK_BOOTTIME of this host, ns.
        """

    def peer_shut(self, boot: str) -> None:
        """Note that the peer's process with this boot id has shut its data path."""

    def peer_open(self) -> None:
        """Note that the peer, shut until now, may transmit again later."""

    @property
    def right(self) -> str:
        """What entitles the guest to transmit (status/document.py, `permission.lease`)."""
        return ""

    @property
    def remaining_s(self) -> float | None:
        """How long the guest may transmit with no further renewal, s; None: no limit."""
        return None

    @property
    def trouble(self) -> str:
        """What keeps the arbiter from working; empty if nothing does."""
        return ""

    async def run(self) -> None:
        """Run until cancelled."""

    async def close(self) -> None:
        """Release all resources; the arbiter is not used afterwards."""


class ManualArbiter(Arbiter):
    """Leave the decision to the operator."""

    def __init__(self, host: Host) -> None:
        pass

    def view(self) -> ArbiterView:
        return ArbiterView()


class FenceArbiter(Arbiter):
    """Run a command that powers the other host off or isolates it."""

    def __init__(self, host: Host) -> None:
        self._pair, self._options = host.config.pair, host.config.failover

    def view(self) -> ArbiterView:
        return ArbiterView(fences=bool(self._options.fence))

    async def fence(self) -> bool:
        """Run the fence command; only exit status 0 within the deadline is success."""
        f = self._options
        try:
            proc = await asyncio.create_subprocess_exec(
                *user_command.fence(self._pair, f.fence, f.fence_timeout),
                env=user_command.environment(),
            )
        except OSError as e:
            log.error("fence %s: %s", f.fence[0], e)
            return False
        try:
            async with asyncio.timeout(f.fence_timeout / 1000):
                status = await proc.wait()
        except TimeoutError:
            proc.kill()
            await proc.wait()
            log.error("fence: the command did not finish within %d ms", f.fence_timeout)
            return False
        log.info("fence: exit status %d", status)
        return status == 0


class LeaseArbiter(Arbiter):
    """Use a lease in a store that both hosts reach (failover/lease.py)."""

    needs_grant = True

    def __init__(self, leadership: Leadership) -> None:
        self.leadership = leadership

    @classmethod
    def of(cls, host: Host) -> LeaseArbiter:
        """Create the arbiter from a host's configuration."""
        f = host.config.failover
        return cls(
            Leadership(
                make_store(host.config),
                node=host.config.role,
                address=host.config.peer.local,
                boot=host.boot,
                ttl_ms=f.lease_ttl,
                margin_ms=f.lease_margin,
                transmitting=host.transmitting,
                knows=host.adopted,
                allow=host.allow,
                changed=host.changed,
            )
        )

    def view(self) -> ArbiterView:
        s = self.leadership
        return ArbiterView(
            name="lease",
            needs_grant=True,
            granted=s.held,
            may_transmit=s.may_transmit,
            peer_standalone=s.peer_standalone,
            recorded=s.recorded,
            requested=s.committed,
        )

    def follow(self, action: Action, *, wants: bool) -> None:
        s = self.leadership
        s.watch = action is not Action.NONE
        s.want = wants
        if action is Action.ACQUIRE and s.held:
            s.ran_standalone()

    async def check(self) -> None:
        """Check that the store answers: with no lease available both guests would be silent.

        Raises ArbiterError.
        """
        try:
            await self.leadership.look()
        except StoreError as e:
            raise ArbiterError(str(e)) from e

    def paired(self) -> None:
        self.leadership.paired()

    def new_guest(self) -> None:
        self.leadership.forget()

    def promise(self) -> bool:
        return self.leadership.promise()

    def promised(self, sent_boot_ns: int) -> None:
        self.leadership.promised(sent_boot_ns)

    def peer_shut(self, boot: str) -> None:
        self.leadership.freed(boot)

    def peer_open(self) -> None:
        self.leadership.new_guest()

    @property
    def right(self) -> str:
        s = self.leadership
        return "held" if s.held else "promised" if s.may_transmit else "none"

    @property
    def remaining_s(self) -> float | None:
        return self.leadership.remaining_s

    @property
    def trouble(self) -> str:
        return self.leadership.trouble

    async def run(self) -> None:
        await self.leadership.run()

    async def close(self) -> None:
        await self.leadership.close()


def make_store(config: Config) -> Store:
    """Create the lease's store; its library is imported only when it is used."""
    from .etcd import Etcd, EtcdStore

    f = config.failover
    etcd = Etcd(f.etcd, f.etcd_ca, f.etcd_cert, f.etcd_key)
    return EtcdStore(etcd, config.pair, f.lease_ttl / 10_000)


@dataclass(frozen=True, slots=True)
class ArbiterKind:
    """An arbiter that can be configured."""

    make: Callable[[Host], Arbiter]
    needs_grant: bool = False  # as in the class; the programs are loaded accordingly


#: arbiters by the value of [failover] arbiter
ARBITERS = {
    "fence": ArbiterKind(FenceArbiter),
    "lease": ArbiterKind(LeaseArbiter.of, needs_grant=LeaseArbiter.needs_grant),
    "manual": ArbiterKind(ManualArbiter),
}
