# SPDX-License-Identifier: GPL-2.0-or-later
"""What makes sure that only one guest of a pair speaks alone: [failover] arbiter.

The decision (failover/decision.py) sees an ArbiterView of it and knows no arbiter by name. A
further one is a class here with its name in ARBITERS, and that name among the choices of the key in
config/schema.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .. import user_command
from .decision import Action, ArbiterView
from .lease import Leadership, Store, StoreError

if TYPE_CHECKING:
    from ..config.file import Config

log = logging.getLogger("colo_xdp")


class ArbiterError(RuntimeError):
    """The arbiter cannot be asked now; says why."""


@dataclass(frozen=True, slots=True)
class Host:
    """What an arbiter has of the host that it works for."""

    config: Config
    boot: str  # which process this is, as the peer is told
    transmitting: bool  # its guest was on the network when this process began
    allow: Callable[[int], None]  # tell the programs how long the guest may speak (boot_ns)
    changed: Callable[[], None]  # view() says something new


class Arbiter(Protocol):
    """What happens is told to it; what it makes of that is in view()."""

    #: no guest is on the network without its grant, and the programs see to that
    needs_grant: bool = False

    def view(self) -> ArbiterView:
        """What it says now."""
        ...

    def follow(self, action: Action, *, wants: bool) -> None:
        """What was decided; `wants`: this host's guest is to be on the network."""

    async def fence(self) -> bool:
        """Make sure that the other host is silent. Whether that is certain now."""
        return False

    async def check(self) -> None:
        """Whether it could let this host's guest speak. Raises ArbiterError."""

    def paired(self) -> None:
        """No guest of the pair has anything that the other one lacks."""

    def new_guest(self) -> None:
        """What it has read of the last pair says nothing of the guest that is here now."""

    def promise(self) -> bool:
        """Whether the heartbeat that is sent now promises silence; this host's guest is silent."""
        return False

    def promised(self, sent_boot_ns: int) -> None:
        """The peer promises silence, in answer to what was sent at that time."""

    def peer_shut(self, boot: str) -> None:
        """That process of the peer has shut its data path."""

    def peer_open(self) -> None:
        """It may speak again one day."""

    @property
    def right(self) -> str:
        """By which right the guest speaks (status/document.py, `permission.lease`)."""
        return ""

    @property
    def remaining_s(self) -> float | None:
        """How long it may, if nothing more is heard; None: without end."""
        return None

    @property
    def trouble(self) -> str:
        """What keeps the arbiter from its work."""
        return ""

    async def run(self) -> None:
        """Until cancelled."""

    async def close(self) -> None:
        """No more."""


class ManualArbiter(Arbiter):
    """A person decides."""

    def __init__(self, host: Host) -> None:
        pass

    def view(self) -> ArbiterView:
        return ArbiterView()


class FenceArbiter(Arbiter):
    """A command that switches the other host off, or cuts it off."""

    def __init__(self, host: Host) -> None:
        self._pair, self._options = host.config.pair, host.config.failover

    def view(self) -> ArbiterView:
        return ArbiterView(fences=bool(self._options.fence))

    async def fence(self) -> bool:
        """Run the command; only exit status 0 within its deadline is success."""
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
            log.error("fence: no end after %d ms", f.fence_timeout)
            return False
        log.info("fence: exit status %d", status)
        return status == 0


class LeaseArbiter(Arbiter):
    """A lease in a store that both hosts reach (failover/lease.py)."""

    needs_grant = True

    def __init__(self, leadership: Leadership) -> None:
        self.leadership = leadership

    @classmethod
    def of(cls, host: Host) -> LeaseArbiter:
        """For a host, as its configuration says."""
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
            s.alone()

    async def check(self) -> None:
        """With no lease to be had the guest would be silent on both hosts."""
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
        self.leadership.revived()

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
    """The lease's store. Its library is imported only where it is used."""
    from .etcd import Etcd, EtcdStore

    f = config.failover
    etcd = Etcd(f.etcd, f.etcd_ca, f.etcd_cert, f.etcd_key)
    return EtcdStore(etcd, config.pair, f.lease_ttl / 10_000)


@dataclass(frozen=True, slots=True)
class Kind:
    """An arbiter that can be configured."""

    make: Callable[[Host], Arbiter]
    needs_grant: bool = False  # as the class says; the programs are loaded for it


#: by the value of [failover] arbiter
ARBITERS = {
    "fence": Kind(FenceArbiter),
    "lease": Kind(LeaseArbiter.of, needs_grant=LeaseArbiter.needs_grant),
    "manual": Kind(ManualArbiter),
}
