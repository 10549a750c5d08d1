# SPDX-License-Identifier: GPL-2.0-or-later
"""Checks whether the data path is attached and delivers anything.

A controller asks three questions as long as it lives:

- Are the devices and our programs there (datapath/hooks.py)? It looks when netlink reports a
  change, and every LOOK_S.
- Does the peer link deliver anything? Heartbeat datagrams use it too. The link has failed when the
  control channel lives, but neither heartbeat datagrams nor frames of the data path arrive.
- Does the secondary's guest send anything? When several checkpoints in a row were made for output
  without a counterpart, and not one frame of that guest came in between, for compare_timeout at
  least (with a short patience such checkpoints follow each other quickly), its output does not
  arrive, whatever the devices look like. Unless its own host says that clients' frames reach that
  guest and that it sends none: then it is the guest (copy_health.py), and no link is to blame.

The answer is a sentence (`trouble`) that turns `protected` into `degraded` in every report. It is
no state of the decision: both guests live, both controllers report that, and neither guest may run
standalone because of it. Output that waits meanwhile leaves by checkpoints (`cut`), one right after
the other, instead of after compare_timeout each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..compare.causes import MISSED, Cause
from ..datapath import netlink
from ..datapath.hooks import Look
from ..failover.lease import boot_ns
from ..failover.states import Role
from .copy_health import Traffic
from .story import Kind

if TYPE_CHECKING:
    from .controller import Controller

log = logging.getLogger("colo_xdp")

LOOK_S = 5.0  # netlink reports changes; this is for those that it may have missed
REST_S = 0.05  # between two looks, since changes come in bursts
SILENT_CHECKPOINTS = 3
FRESH_NS = 1_000_000_000  # reports of the secondary's traffic are not as old as this
FRESH_BEATS = 4  # and not as many heartbeats
PACE_S = 0.02  # the least time between two checkpoints while nothing arrives


@dataclass(slots=True)
class PeerLink:
    """What is known of the peer link of one NIC."""

    nic: str  # name of the NIC
    device: str
    name: str  # as a heartbeat link
    silent_checkpoints: int = 0  # made in a row for output of the NIC that was missed
    silent_ns: int = 0  # when the first of them was complete (boot_ns)
    #: what the SVM's host had counted once nothing of the SVM had come for some time, and whether
    #: it has counted more of the SVM's since
    base: Traffic | None = None
    base_ns: int = 0
    sends: bool = False
    #: the SVM's output was missed in SILENT_CHECKPOINTS checkpoints in a row, and it is not the SVM
    #: that is silent
    undelivered: bool = False
    _long: bool = False  # they have counted for long enough
    trouble: str = ""  # why it delivers nothing; empty: it delivers
    first: int = -1  # frames of the data path that had come at the first look
    arrived: int = -1  # and at the last one
    arrived_ns: int = 0  # when one last came (boot_ns)

    def count(self, arrived: int, now: int) -> bool:
        """Return whether frames of the data path came since the last call."""
        if self.first < 0:
            self.first = self.arrived = arrived
            self.arrived_ns = now
        if arrived == self.arrived:
            return False
        self.arrived, self.arrived_ns = arrived, now
        self.heard()
        return True

    def heard(self) -> None:
        """End a silence."""
        self.silent_checkpoints, self.base = 0, None
        self.sends = self.undelivered = False

    def missed(self, now: int, least_ns: int) -> None:
        """Count a checkpoint for output that was missed; they count after `least_ns`."""
        self.silent_checkpoints += 1
        if self.silent_checkpoints == 1:
            self.silent_ns = now
        self._long = now - self.silent_ns >= least_ns

    def reported(self, now: int, traffic: Traffic, fresh_ns: int) -> None:
        """Take what the SVM's host says while nothing of the SVM comes, and judge.

        fresh_ns: a report is not as old as that.
        """
        if not self.silent_checkpoints or now - self.silent_ns < fresh_ns:
            return
        base = self.base
        if base is None or traffic.sent < base.sent or traffic.delivered < base.delivered:
            self.base, self.base_ns = traffic, now  # its counters begin anew with its data path
            base = traffic
        self.sends |= traffic.sent > base.sent
        if self.silent_checkpoints >= SILENT_CHECKPOINTS and self._long:
            unheard = traffic.delivered == base.delivered  # it has nothing to answer
            self.undelivered = self.sends or (unheard and now - self.base_ns >= fresh_ns)


class DeviceWatch:
    """Holds what one controller knows of its data path."""

    def __init__(self, controller: Controller) -> None:
        self._c = controller
        self.look = Look()
        self.restored = 0  # programs and devices put back
        networks = controller.config.networks
        self.links = [PeerLink(n.name, n.peer_link, n.link_name) for n in networks]
        self._trouble = ""
        self._up_ns = 0  # since when the control channel is up (boot_ns)
        self._changed = asyncio.Event()

    # ---- answers

    @property
    def link(self) -> str:
        """Why a peer link delivers nothing, or an empty string."""
        return "; ".join(link.trouble for link in self.links if link.trouble)

    @property
    def trouble(self) -> str:
        """Why the data path is not whole, or an empty string."""
        text = list(self.look.trouble)
        if not self.look.cut:
            text += [self.link] if self.link else []
            devices = " or ".join(link.device for link in self.links if link.undelivered)
            if not self.link and devices:
                text.append(
                    f"the secondary's output does not arrive over {devices}: {SILENT_CHECKPOINTS} "
                    "checkpoints in a row or more for output that waited, and not one frame of its "
                    "guest"
                )
        return "; ".join(text)

    def trouble_of(self, nic: int) -> str:
        """Return why nothing arrives over the peer link of one NIC, or an empty string."""
        link = self.links[nic]
        why = "nothing of the other guest arrives"
        return link.trouble or (f"{link.device}: {why}" if nic in self.cut_nics else "")

    @property
    def cut(self) -> bool:
        """Whether nothing of the other guest arrives, so that waiting for it is of no use."""
        return bool(self.cut_nics)

    @property
    def cut_nics(self) -> set[int]:
        """The numbers of the NICs of which that is so."""
        gone, every = self.look.cut_nics, self.look.cut and not self.look.cut_nics
        return {
            i
            for i, link in enumerate(self.links)
            if every or i in gone or link.trouble or link.undelivered
        }

    @property
    def silent_checkpoints(self) -> int:
        """Checkpoints in a row that were made for output of one NIC that was missed."""
        return max(link.silent_checkpoints for link in self.links)

    # ---- hooks

    async def run(self) -> None:
        """Look at the hooks, for ever."""
        loop = asyncio.get_running_loop()
        sock = self._c.dp.changes()
        if sock is not None:
            loop.add_reader(sock.fileno(), self._changes, sock)
        try:
            while True:
                self._changed.clear()
                began = time.monotonic()
                self._found(await asyncio.to_thread(self._c.dp.look))
                # A first change is looked at at once. The rest grows with the cost of a look, so
                # that a host whose devices change all the time costs little.
                await asyncio.sleep(max(REST_S, 10 * (time.monotonic() - began)))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LOOK_S):
                        await self._changed.wait()
        finally:
            if sock is not None:
                loop.remove_reader(sock.fileno())
                sock.close()

    def _changes(self, sock: socket.socket) -> None:
        netlink.drain(sock)
        self._changed.set()

    def _found(self, look: Look) -> None:
        was, self.look = self.look, look
        for what in look.restored:
            log.warning("put back: %s", what)
        self.restored += len(look.restored)
        if look.unseen or look.exposed or look.missed or was.exposed:
            what = ", ".join(look.restored) or "; ".join(look.trouble) or "; ".join(was.trouble)
            self._c.hooks_lost(
                what, unseen=look.unseen or look.exposed or was.exposed, still=look.exposed
            )
        self.report()

    # ---- the peer link

    def connected(self) -> None:
        """Note that the control channel is up: heartbeat datagrams have a key from now on."""
        self._up_ns = boot_ns()

    def listen(self) -> None:
        """Check whether the peer link is silent; called with each heartbeat."""
        for i, link in enumerate(self.links):
            link.trouble = self._link(i, link)
        if self.silent_checkpoints:
            now = boot_ns()
            self._count(now)
            for link in self.links:
                link.reported(now, self._c.view.peer.traffic, self._fresh_ns)
        self.report()

    def _link(self, nic: int, peer_link: PeerLink) -> str:
        c, core = self._c, self._c.heartbeat_links.core
        names = [p.name for p in core.links]
        if not c.peer.connected or not c.peer.heartbeat_key or peer_link.name not in names:
            return ""
        i, now, limit = names.index(peer_link.name), boot_ns(), c.config.peer.heartbeat_timeout
        silent, up_ms = core.silent_ms(i, now), (now - self._up_ns) / 1e6
        quiet = self._quiet_ms(nic, now) if silent > limit / 2 else 0.0
        if up_ms <= limit:
            return ""
        if silent == float("inf") and peer_link.arrived != peer_link.first:
            return ""  # frames get through, heartbeat datagrams do not: only one link less
        link = peer_link.device
        if silent > limit and quiet > limit / 2:
            return (
                f"nothing arrives over {link}: no heartbeat and no frame from the other host for "
                f"{limit} ms, while its controller answers"
            )
        echo_age = core.echo_age_ms(i, now)
        if silent <= limit < echo_age < float("inf"):
            return f"the other host receives nothing over {link}, while its controller answers"
        return ""

    def _quiet_ms(self, nic: int, now: int) -> float:
        """Return how long ago the last frame came, or the first look for one if none came (ms)."""
        self._count(now)
        return (now - self.links[nic].arrived_ns) / 1e6

    def _count(self, now: int) -> None:
        """Count frames of the data path; those that came since the last call end a silence."""
        for link, nic in zip(self.links, self._c.dp.nics, strict=True):
            link.count(nic.arrived(), now)

    # ---- the secondary's guest

    @property
    def _fresh_ns(self) -> int:
        return max(FRESH_NS, FRESH_BEATS * self._c.config.peer.heartbeat_interval * 1_000_000)

    def checkpointed(self, cause: str, nic: str = "") -> None:
        """Note a complete checkpoint: count it if output was missed and no frame came.

        `nic`: the name of the NIC whose output waited; "": not known.
        """
        cut, now, compare = self.cut_nics, boot_ns(), self._c.config.compare
        fixed = compare.wait == "fixed"  # each has waited for as long already
        least_ns = 0 if fixed else compare.compare_timeout * 1_000_000
        for i, (link, path) in enumerate(zip(self.links, self._c.dp.nics, strict=True)):
            came = link.count(path.arrived(), now)
            late = cause in MISSED and nic in ("", link.nic)
            if not came and (late or (cause == Cause.PEER_LINK and i in cut)):
                link.missed(now, least_ns)
                link.reported(now, self._c.view.peer.traffic, self._fresh_ns)
            elif cause == Cause.INITIAL:  # there is another guest now
                link.heard()
        self.report()

    # ---- the log and the history

    def report(self) -> None:
        """Write `trouble` to the log and to the history when it has changed."""
        trouble = self.trouble
        if trouble == self._trouble:
            return
        self._trouble = trouble
        c = self._c
        what = trouble or "the data path is whole again"
        (log.warning if trouble else log.info)("%s", what)
        c.history.append({"at": time.time(), "state": c.shown_state().value, "reason": what})
        c.story.tell(Kind.DATA_PATH, what)
        if c.role is Role.PRIMARY and not trouble:
            c.data_path_back()
