# SPDX-License-Identifier: GPL-2.0-or-later
"""The secondary's takeover: QEMU leaves COLO, the data path opens, the guest is announced.

A takeover also settles the checkpoint in progress: which offsets count depends on whether the SVM
runs the state of that checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from ..abi import Mode, SyncState
from ..clock import TICK_S
from ..config.file import Config
from ..datapath.conntrack_map import ConntrackMap
from ..datapath.host import HostDataPath
from ..datapath.inject import Injector
from ..failover.states import State
from ..net.announce import ANNOUNCE_TIMES, announcements
from ..peer.channel import Peer
from ..qemu.events import QmpEvent
from ..qemu.qmp import QmpError, QmpTimeout
from ..qemu.supervisor import HUNG_S, IN_COLO, QemuSupervisor
from .disk_proof import DiskProof
from .held_frames import HeldFrames, Hold
from .pair_view import PairView
from .story import Kind, Story

log = logging.getLogger("colo_xdp.controller.secondary")

TAKEOVER_S = 10.0
GAP_S = 5.0
MAX_ANNOUNCED = 256  # IP addresses of the guest, and as many MAC addresses
FORWARDING_S = 90.0  # a port listens, then learns, for forward_delay each: at most 30 s
COMMIT_LATE_S = 120.0
COMMIT_LATE = (
    "QEMU does not finish merging the overlays into the guest's images, as without room there: the "
    "guest's disks depend on the overlays, and no new secondary can be made"
)
COMMIT_S = 0.2  # between two looks at overlays that QEMU merges into the image
#: How long a guest that a live primary has handed over to still takes what is mirrored there:
#: switches have learnt where it is with the last of ANNOUNCE_TIMES, if not with the first.
MIRRORED_S = 1.5
PORT_S = 0.1  # between two looks at a port that does not forward yet


class Vouched(Protocol):
    """Disks of which somebody may have said that they are whole."""

    proof: DiskProof


class Standby(Protocol):
    """The controller whose guest is to run standalone."""

    config: Config
    dp: HostDataPath
    view: PairView
    peer: Peer
    qemu: QemuSupervisor
    held: HeldFrames
    flows: tuple[ConntrackMap, ...]
    failures: list[str]
    state: State
    reason: str
    last_failover: dict[str, float] | None
    story: Story

    @property
    def disks(self) -> Vouched:
        """What is known of the disks here."""
        ...

    def become(self, state: State, why: str) -> None:
        """Change the state."""

    def spawn(self, coro: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a background task whose failure ends the controller."""
        ...

    def drain(self) -> None:
        """Read what is in the event ring."""

    async def open_network(self) -> None:
        """Put the tap into the bridge."""


class Takeover:
    """Turns the copy into the guest that serves the clients."""

    def __init__(self, standby: Standby) -> None:
        self._c = standby
        self.under_way = False
        #: the last controller died in a checkpoint of this epoch, or -1. QMP does not repeat its
        #: events, so the SVM may run either state until the next checkpoint is complete
        self.epoch_uncertain = -1
        self.committing = False  # QEMU still merges the overlays into the guest's images
        self._silent_ns = 0  # since when the PVM has been silent in a switchover; 0: in none
        self._events: list[QmpEvent] = []  # that QEMU sent during the takeover

    def saw(self, event: QmpEvent) -> None:
        """Keep an event that QEMU sends during the takeover."""
        self._events.append(event)

    def primary_silent(self, since_ns: int) -> None:
        """Note since when the PVM has been silent in a switchover (CLOCK_MONOTONIC)."""
        self._silent_ns = since_ns

    async def run(self, why: str) -> None:
        """Take over. The peer is certain to be silent; each step may have been done before."""
        c, began = self._c, time.monotonic()
        if not self.under_way:
            self._events.clear()
        self.under_way = True
        status = await self._leave_colo()
        if c.state is State.STOPPED:
            # The guest was shut in meanwhile. The primary got a message about it, and may run
            # standalone because of that.
            self.under_way = False
            log.warning("no takeover: %s", c.reason)
            return
        if status != "running":
            c.failures.append(f"takeover: the SVM is `{status}`")
            c.become(State.DEGRADED, f"takeover: the SVM does not run (`{status}`); trying again")
            return
        c.drain()
        if self._unproven():
            log.error("no takeover: the disks here may lack what was written before the checkpoint")
            return  # the decision says what is to be done (failover/decision.py)
        hold = c.held.take()
        c.view.went_standalone()
        c.dp.sync_state = SyncState.STANDALONE
        self._settle_epoch(hold)
        if hold is not None and hold.resume is not None:
            c.held.resume_ns = hold.resume.ts_ns
        for nic in c.dp.nics:  # claims that the primary sent for a checkpoint to come
            nic.addresses.undo(c.dp.epoch)
        said = self._frames_out()
        # Before the mode: see still_mirrored() in bpf/secondary.bpf.c. Only a primary that has said
        # that it is shut is known to live, and to mirror.
        lives = c.view.peer.shut
        c.dp.mirrored_until = time.monotonic_ns() + int(MIRRORED_S * 1e9) if lives else 0
        c.dp.mode = Mode.TAKEOVER
        c.become(State.PROMOTED, why)
        c.peer.send("promoted", why=why)
        await c.open_network()
        c.spawn(self.announce())
        c.spawn(self.settle_disks())
        if hold is not None:  # the primary died, or fell silent, during a checkpoint
            c.held.let_go_standalone(hold)
        c.drain()
        log.info("takeover took %.1f ms", (time.monotonic() - began) * 1000)
        if self._silent_ns:
            c.spawn(self._measure_gap(said, began))

    async def _leave_colo(self) -> str:
        """Wait until QEMU has left COLO and its guest runs. Returns its run state."""
        qemu = self._c.qemu
        try:
            await self._close_images()
        except QmpError as e:
            log.error("%s: a primary that still lives could write to the disks here", e)
            return "its disks are open to the primary"
        try:
            if await self._in_colo():
                await qemu.leave_colo()
        except QmpError as e:
            log.warning("%s", e)
        end = time.monotonic() + TAKEOVER_S
        status = ""
        while time.monotonic() < end:
            try:
                # Ask in this order: QEMU may still finish a checkpoint, and run, before it leaves.
                left = await qemu.qmp.migration_status() not in IN_COLO
                status = await qemu.qmp.status() if left else "leaving COLO"
            except QmpError as e:
                status = str(e)
            if status == "running":
                break
            await asyncio.sleep(TICK_S / 5)
        return status

    async def _close_images(self) -> None:
        """Close the disks to the primary; a QEMU that waits for it is freed first. Raises
        QmpError."""
        qemu = self._c.qemu
        try:
            await qemu.disks.replica.stop_serving(HUNG_S)
        except QmpTimeout as e:
            log.warning("%s: cutting its migration channel (yank)", e)
            await qemu.yank()
            await qemu.disks.replica.stop_serving()

    def _unproven(self) -> bool:
        """Return whether the SVM runs a checkpoint whose disks may not be whole here.

        An operator may accept that.
        """
        c = self._c
        h = c.held.hold
        if h is not None and (h.resume is not None or self.loaded()):
            c.disks.proof.loaded(h.n)
        return c.qemu.disks.any and c.disks.proof.missing and not c.view.forced

    async def settle_disks(self) -> None:
        """Wait until QEMU has merged the overlays, on which the guest's disks depend until then."""
        disks = self._c.qemu.disks
        if not disks.any:
            return
        self.committing, said = True, False
        began = time.monotonic()
        while self._c.state is State.PROMOTED:
            with contextlib.suppress(QmpError):
                await disks.replica.stop_serving()  # also for a controller that died before
                if not await disks.block.committing():
                    await disks.replica.files.remove_all()
                    self.committing = False
                    log.info("the overlays are committed, %.1f s", time.monotonic() - began)
                    return
            if not said and time.monotonic() - began > COMMIT_LATE_S:
                said = True
                log.error(COMMIT_LATE)
                self._c.failures.append(COMMIT_LATE)
            await asyncio.sleep(COMMIT_S)

    async def _in_colo(self) -> bool:
        """Return whether QEMU has to be made to leave COLO.

        That includes a QEMU that hangs: leave_colo() has a way past its main loop.
        """
        try:
            return await self._c.qemu.qmp.migration_status(HUNG_S) in IN_COLO
        except QmpTimeout:
            return True

    def _settle_epoch(self, hold: Hold | None) -> None:
        """Set the epoch of the state that the SVM runs, which voids the offsets of earlier ones.

        A state that was loaded is a copy of the PVM and has its sequence numbers. The epoch that
        the primary reported counts too, since it reports `n` only after this side has sent
        `resumed` for `n`.
        """
        c = self._c
        loaded = hold is not None and (hold.resume is not None or self.loaded())
        was = c.dp.epoch
        c.dp.epoch = max(was, c.view.peer.epoch, hold.n if hold is not None and loaded else 0)
        if c.dp.epoch == was == self.epoch_uncertain:
            lost = sum(flows.give_up(was) for flows in c.flows)
            log.error(
                "the last controller here died in a checkpoint, the primary before the next one: it"
                " is not known which state runs. %d connections opened since the checkpoint before"
                " are given up",
                lost,
            )

    def _frames_out(self) -> int:
        """Return how many frames of the guest have left to the network."""
        row = self._c.dp.counters()["svm_out"]
        return sum(row[r][0] for r in ("pass", "pass_rewritten", "pass_released"))

    async def _measure_gap(self, said: int, began: float) -> None:
        """Measure the gap that clients see: from the PVM's last frame to the SVM's first one."""
        since, self._silent_ns = self._silent_ns, 0
        took = int((time.monotonic() - began) * 1e6)
        end = time.monotonic() + GAP_S
        while self._frames_out() == said:
            if time.monotonic() > end:
                log.info("the guest sent nothing for %g s: no gap was measured", GAP_S)
                return
            await asyncio.sleep(0.001)
        gap = max(0, time.monotonic_ns() - since)
        self._c.last_failover = {"gap_ms": gap / 1e6, "took_ms": took / 1e3}
        self._c.story.tell(Kind.SWITCHED, "", gap_ms=gap / 1e6)
        log.info("no frame of the guest reached the network for %.1f ms", gap / 1e6)
        self._c.peer.send("downtime", gap_us=gap // 1000, took_us=took)

    def loaded(self) -> bool:
        """Return whether the SVM has loaded the checkpoint during which the primary died.

        x-colo-lost-heartbeat ends with a RESUME; QEMU sends a STOP before it if the guest was
        running (vm_prepare_start() in QEMU's system/cpus.c). If the guest had loaded the
        checkpoint, another RESUME came before. QMP keeps the order, so both events had been read
        when the state `running` was read.
        """
        return sum(e.name == "RESUME" for e in self._events) > 1

    async def announce(self) -> None:
        """Announce the guest's new place to switches and neighbours, as its QEMU would.

        RARP is for the switches; gratuitous ARP and unsolicited neighbour advertisements are for
        the addresses. If the bridge does not let frames through yet (STP), the announcement is
        repeated when it does.
        """
        macs = await self._c.qemu.learn_macs()
        for net, mac in zip(self._c.config.networks, macs, strict=True):
            if not mac:
                log.warning(
                    "no guest_mac is configured for %s and QEMU reports none: no announcement",
                    net.tap,
                )
        if not any(macs):
            return
        await self._announce_now(macs)
        end = time.monotonic() + FORWARDING_S
        waited = self._c.reason
        while not self._forwarding() and self._c.state is State.PROMOTED:
            if time.monotonic() > end:
                log.error("%s; the guest is not announced again", self._deaf())
                self._c.failures.append(self._deaf())
                return
            self._c.become(State.PROMOTED, self._deaf())
            await asyncio.sleep(PORT_S)
            await asyncio.to_thread(self._c.dp.look_at_port)
            if self._forwarding() and self._c.state is State.PROMOTED:
                self._c.become(State.PROMOTED, waited)
                await self._announce_now(macs)

    def _forwarding(self) -> bool:
        return all(nic.port_forwarding for nic in self._c.dp.nics)

    def _deaf(self) -> str:
        waiting = [
            f"{net.tap} is {nic.port_state} in {net.bridge}"
            for nic, net in zip(self._c.dp.nics, self._c.config.networks, strict=True)
            if not nic.port_forwarding
        ]
        return (
            f"{' and '.join(waiting)}: nothing of the guest leaves before the bridge's STP lets it"
        )

    async def _announce_now(self, macs: Sequence[str]) -> None:
        """Announce each NIC on its own network; `macs`: the first address of each, "": unknown."""
        epoch = self._c.dp.epoch
        out: list[tuple[Injector, list[bytes]]] = []
        for nic, net, mac in zip(self._c.dp.nics, self._c.config.networks, macs, strict=True):
            if not mac:
                continue
            first, table = bytes.fromhex(mac.replace(":", "")), nic.addresses
            own = (await asyncio.to_thread(table.own, first, epoch))[:MAX_ANNOUNCED]
            more = table.macs(epoch)[:MAX_ANNOUNCED]
            frames = announcements(mac, own, more, net.guest_addresses)
            out.append((nic.injectors["forward"], frames))
        count = sum(len(frames) for _, frames in out)
        log.info("announcing the guest: %d frames, %d times", count, len(ANNOUNCE_TIMES))
        start = time.monotonic()
        for at in ANNOUNCE_TIMES:
            await asyncio.sleep(max(0.0, start + at - time.monotonic()))
            for injector, frames in out:
                for frame in frames:
                    injector.send(frame)
