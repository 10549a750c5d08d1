# SPDX-License-Identifier: GPL-2.0-or-later
"""Heartbeats: what this host reports of itself, and what the peer's heartbeat datagrams report.

This host sends heartbeats on the control channel, and as datagrams over the heartbeat links. The
control channel costs most of it (JSON, TLS, a wake-up of the other host). While datagrams pass in
both directions it carries a heartbeat in every ROUND intervals only: one host begins a round, the
other answers at once, and then it is the other's turn to begin, so that each learns the round trip.
Whatever is new to the peer is sent with the next interval in any case.
"""

from __future__ import annotations

import logging
import time
from typing import Any, Protocol

from ..config.file import Config
from ..datapath.host import HostDataPath
from ..failover.arbiter import Arbiter
from ..failover.lease import boot_ns
from ..failover.states import Role, State
from ..peer.channel import Peer
from ..peer.heartbeat_datagram import Flag, Heartbeat
from ..peer.heartbeat_links import HeartbeatLinks
from .pair_view import PairView

log = logging.getLogger("colo_xdp")

#: heartbeat intervals between two rounds on the control channel, unless heartbeat_timeout is short
ROUND = 3


def round_length(interval: int, timeout: int) -> int:
    """Return the intervals between two rounds; 1: a heartbeat with each.

    A round that the peer fails to begin is begun here one interval later. The silence until then
    must stay below half of `timeout`, from where on somebody looks at it. Both in ms.
    """
    return max(1, min(ROUND, (timeout - 1) // (2 * interval) - 1))


class Beating(Protocol):
    """The part of a controller that heartbeats report or change."""

    config: Config
    role: Role
    dp: HostDataPath
    view: PairView
    peer: Peer
    heartbeat_links: HeartbeatLinks
    arbiter: Arbiter
    asks: bool

    @property
    def path_shut(self) -> bool:
        """Whether nothing leaves, or will without a new guest: what `shut` means."""
        ...

    @property
    def left_standalone(self) -> bool:
        """Whether to say that a guest ran standalone here before this host's boot, and is gone."""
        ...

    @property
    def uncompared(self) -> bool:
        """Whether clients may know what the SVM never sent: in shadow mode, or nobody knows."""
        ...

    def own_state(self) -> State:
        """Return the state as far as it depends on this host."""
        ...

    def silent(self) -> bool:
        """Return whether the data path keeps everything of this host's guest from the network."""
        ...

    def peer_shut(self, was_standalone: bool) -> None:
        """Note that the peer's data path drops everything."""

    def peer_lives(self, why: str) -> None:
        """Note that the peer lives, whatever the fence command has reported."""

    def on_heartbeat_flags(self, flags: Flag) -> None:
        """React to a heartbeat datagram that stands in for a heartbeat on the control channel."""

    def reconsider(self) -> None:
        """Decide anew, since something has changed."""


class Heartbeats:
    """Sends heartbeats, and handles the peer's heartbeat datagrams."""

    def __init__(self, controller: Beating) -> None:
        self._c = controller
        self._lag_ns = 0  # how long this loop stood still since the last heartbeat
        config = controller.config
        interval = config.peer.heartbeat_interval
        timeout = min(config.peer.heartbeat_timeout, config.nbd.write_timeout)  # mirror_watch.py
        self._interval_ns = interval * 1_000_000
        self._round = round_length(interval, timeout)
        self._left = 0  # intervals until the next one on the control channel
        self._said: dict[str, Any] = {}  # there, in the last one
        self._sent_ns = 0  # its `t`
        self._owes = False  # the peer has begun a round

    def beat(self, *, due: bool = False) -> None:
        """Send a heartbeat that reports the current state.

        `due`: the time for it has come, and nothing else; it may be one of datagrams alone.
        """
        c = self._c
        promise = c.silent() and c.arbiter.promise()
        left = c.left_standalone
        delivered, sent = c.dp.guest_traffic() if c.role is Role.SECONDARY else (0, 0)
        says = {
            "state": c.own_state().value,
            "epoch": c.dp.epoch,
            "vm": not c.view.guest.gone,
            "shut": c.path_shut or left,
            "over": bool(c.view.guest.over),
            "standalone": c.view.guest.standalone or left,
            "shadow": c.uncompared,  # the secondary repeats what the primary reported
            "promise": promise,
            "role": c.role.value,
            "delivered": delivered,
            "sent": sent,
        }
        # First the datagrams: the peer reads them when the heartbeat on the control channel comes.
        lag, self._lag_ns = self._lag_ns, 0
        flags = self.flags() | (Flag.PROMISE if promise else Flag(0))
        c.heartbeat_links.send(flags, lag // 1_000_000, c.dp.epoch)
        self._left -= 1
        if not (due and self._left > 0 and not self._owes and says == self._said and self._passes):
            # Who began this round leaves the next one to the peer.
            self._left = self._round if self._owes else self._round + 1
            self._owes, self._said, self._sent_ns = False, says, boot_ns()
            c.peer.send("heartbeat", t=self._sent_ns, echo=c.view.answered(), **says)

    @property
    def _passes(self) -> bool:
        """Whether datagrams have passed some link lately, in both directions."""
        core, now, limit = self._c.heartbeat_links.core, boot_ns(), 4 * self._interval_ns / 1e6
        return self._round > 1 and any(
            core.silent_ms(i, now) < limit and core.echo_age_ms(i, now) < limit
            for i in range(len(core.links))
        )

    def echoed(self, echo_ns: int) -> int | None:
        """Note the `echo` of a heartbeat on the control channel; return the round trip in ns.

        None: unknown, as the peer has not answered at once. An answer ends a round; anything else
        begins one.
        """
        self._owes = not echo_ns or echo_ns != self._sent_ns
        took = boot_ns() - echo_ns
        return took if echo_ns and 0 <= took < self._interval_ns // 2 else None

    def to_answer(self, pause: float) -> bool:
        """Return whether the peer has begun a round, the last one being over for so long (s).

        So a flood is not answered by a flood.
        """
        return self._owes and boot_ns() - self._sent_ns >= pause * 1e9

    def flags(self) -> Flag:
        """Return the flags of a heartbeat datagram, except for a promise."""
        c, guest = self._c, self._c.view.guest
        flags = Flag(0) if guest.gone else Flag.VM
        for flag, on in (
            (Flag.SHUT, c.path_shut and not guest.over),  # a pair that is over: no takeover
            (Flag.STANDALONE, guest.standalone), (Flag.ASK, c.asks),
            (Flag.SHADOW, c.role is Role.PRIMARY and c.uncompared),
            (Flag.SVM, c.role is Role.SECONDARY), (Flag.HANGS, guest.hung),
        ):  # fmt: skip
            if on:
                flags |= flag
        return flags

    def stood_still(self, late: float, interval: float) -> None:
        """Note that this loop is `late` (s): a peer does not count as silent while nobody read."""
        if late <= 0:
            return
        ns = int(late * 1e9)
        self._lag_ns = max(self._lag_ns, ns)
        if late > interval:
            self._c.peer.discount(ns)
            self._c.heartbeat_links.core.discount(ns)
        if late > self._c.config.peer.heartbeat_timeout / 2000:
            log.warning("this controller stood still for %.0f ms", ns / 1e6)

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Handle a heartbeat datagram.

        Its flags count only while the control channel is down, and only if the datagram is recent,
        newer than every heartbeat so far, and sent since the peer has its present guest. A promise
        always counts: it carries its own time.
        """
        c, view = self._c, self._c.view
        limit = c.config.peer.heartbeat_timeout
        if Flag.PROMISE in heartbeat.flags and heartbeat.after:
            c.arbiter.promised(heartbeat.after)
        if heartbeat.lag_ms > limit / 2:
            view.peer_slow(time.monotonic_ns())
        since = max(view.peer.guest_since_boot_ns, boot_ns() - limit * 1_000_000)
        if view.pair.fence.result and heartbeat.after > view.pair.fence.ended_boot_ns:
            c.peer_lives("it has received what was sent since")
        if c.peer.connected or heartbeat.after <= since or heartbeat.t <= view.peer.heard_boot_ns:
            return
        view.datagram(heartbeat.t, heartbeat.epoch)
        if Flag.SHUT in heartbeat.flags:
            if not view.peer.shut:
                view.peer_gave_reason("its QEMU hangs" if Flag.HANGS in heartbeat.flags else "")
                log.warning("the peer's heartbeat datagrams say that its data path is shut")
            c.peer_shut(Flag.STANDALONE in heartbeat.flags)
        c.on_heartbeat_flags(heartbeat.flags)
        c.reconsider()
