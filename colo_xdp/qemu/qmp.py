# SPDX-License-Identifier: GPL-2.0-or-later
"""Drive one QEMU over QMP: the only module that imports qemu.qmp.

COLO needs no filter object and no patch: it takes capabilities, `migrate`, and setting
`x-checkpoint-delay` once more to request a checkpoint (while in COLO state its setter raises the
checkpoint event at once: migration/colo.c). STOP and RESUME mark a checkpoint; packets are sorted
by the timestamps of these events, not by the time at which they are read. qemu/supervisor.py and
the controller use the Qmp object; qemu/survey.py asks for the doctor.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError
from qemu.qmp.events import EventListener
from qemu.qmp.protocol import Runstate
from qemu.qmp.qmp_client import ExecuteError

from ..validate import printable
from .events import QmpEvent, read
from .hardware import Hardware, parse_qtree, tap_queues
from .migration import MULTIFD_SINCE, MigrationOptions, creds_refusal, is_deferred
from .nic import Card, Multiqueue, NicError, at_tap, multiqueue, parse

log = logging.getLogger("colo_xdp.qemu.qmp")

#: x-checkpoint-delay, ms: an hour, so that checkpoints happen on request only
IDLE_DELAY_MS = 3_600_000
DEFAULTS = MigrationOptions()

#: properties of virtio-net devices: offloads that a guest may leave to the host and that not every
#: network path carries (bpf/lib/gso.h)
HOST_OFFLOADS = ("host_tunnel", "host_tunnel_csum", "host_ufo", "host_uso")
GUEST_ANNOUNCE = "guest_announce"


class QmpError(RuntimeError):
    """A QMP command failed, timed out or could not be sent; the text names command and QEMU."""

    def __init__(self, text: str) -> None:
        # What a QEMU says that the guest has taken over ends up in logs and on terminals.
        super().__init__(printable(text))


class QmpTimeout(QmpError):
    """No answer within the deadline: QEMU's main loop may hang."""


class QmpRefused(QmpError):
    """The answer is an error: of QEMU, or of what stands between it and this controller."""


@dataclass(frozen=True, slots=True)
class QemuInfo:
    """What a QEMU reports about itself."""

    version: tuple[int, int, int]
    kvm: bool
    status: str
    machine: str = ""  # machine type, such as pc-i440fx-7.2-machine
    offers: frozenset[str] = frozenset()  # those of HOST_OFFLOADS that a network card offers
    queues: Mapping[str, Multiqueue] = field(default_factory=dict)  # of a card, by its tap
    trouble: str = ""  # why it cannot migrate as the configuration wants; for the doctor


def realtime_offset_ns() -> int:
    """Return CLOCK_REALTIME - CLOCK_MONOTONIC now, ns: the tightest of five readings."""
    best, width = 0, 1 << 62
    for _ in range(5):
        a = time.monotonic_ns()
        r = time.time_ns()
        b = time.monotonic_ns()
        if b - a < width:
            best, width = r - (a + b) // 2, b - a
    return best


def refusal(info: QemuInfo) -> str | None:
    """Return why this QEMU cannot do COLO, or None."""
    major, minor, micro = info.version
    if (major, minor) == (10, 0) and micro < 13:
        return (
            f"QEMU {major}.{minor}.{micro} cannot enter COLO (it ends in `completed`): "
            "use 7.2, 10.0.13 or newer"
        )
    if major < 7:
        return f"QEMU {major}.{minor}.{micro} is older than the oldest tested version (7.2)"
    if major < 11 and info.machine.startswith("pc-q35"):
        return (
            f"machine {info.machine.removesuffix('-machine')}: before QEMU 11 (this is "
            f"{major}.{minor}.{micro}) the secondary's QEMU aborts at its first checkpoint with "
            "q35: use machine `pc`, or QEMU 11"
        )
    return None


class Qmp:
    """A connection to one QEMU. Every command has a deadline."""

    def __init__(
        self,
        path: str,
        name: str,
        timeout: float,
        on_event: Callable[[QmpEvent], None],
        on_close: Callable[[str], None],
    ) -> None:
        self.path, self.name, self.timeout = path, name, timeout
        self._on_event, self._on_close = on_event, on_close
        self._client: QMPClient | None = None
        self._watch: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None  # the end of the connection
        self._queues: Hardware = {}  # as cards() has seen them

    @property
    def connected(self) -> bool:
        return self._client is not None and self._client.runstate is Runstate.RUNNING

    async def connect(self) -> QemuInfo:
        """Connect and query version, accelerator and run state.

        Raises QmpError, and is not connected, when nobody answers at the path within the deadline,
        or with an error.
        """
        await self.open()
        try:
            return await self.info()
        except QmpError:
            await self.close()  # the next attempt opens another connection
            raise

    async def open(self) -> None:
        """Connect.

        Raises QmpError when nobody answers at the path within the deadline.
        """
        client = QMPClient(self.name)
        client.logger.setLevel(logging.CRITICAL)  # the library logs what we report ourselves
        listener = EventListener(event_filter=self._dispatch)
        client.register_listener(listener)
        try:
            async with asyncio.timeout(self.timeout):
                await client.connect(self.path)
        except (OSError, QMPError, TimeoutError) as e:
            raise QmpError(
                f"{self.name}: no QMP at {self.path}: {str(e) or type(e).__name__}"
            ) from e
        self._client, self._ending = client, None
        self._watch = asyncio.create_task(self._watch_close(client))

    def _dispatch(self, msg: Any) -> bool:
        """Handle an event, in wire order and before any later reply; nothing stays queued."""
        event = read(msg, realtime_offset_ns(), time.monotonic_ns())
        if event is None:
            log.warning("%s: an event without a name: %.200s", self.name, msg)
        else:
            self._on_event(event)
        return False

    async def _watch_close(self, client: QMPClient) -> None:
        while client.runstate is Runstate.RUNNING:
            await client.runstate_changed()
        reason = "closed"
        try:
            await self._disconnect(client)
        except (EOFError, OSError, QMPError) as e:
            reason = str(e) or type(e).__name__
        if self._client is client:
            self._client = None
            self._on_close(f"{self.name}: QMP connection lost ({reason})")

    async def _disconnect(self, client: QMPClient) -> None:
        """Disconnect once, for all who want that: two calls at a time break the library's state.

        A QEMU that dies while close() is called would make the controller fail.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(client.disconnect())
        await asyncio.shield(self._ending)

    async def execute(
        self,
        command: str,
        args: dict[str, Any] | None = None,
        timeout: float | None = None,
        *,
        oob: bool = False,
    ) -> Any:
        """Execute one command; `oob`: out of band, past a hanging main loop (qmp-spec, 2.3.1).

        Raises QmpError on an error from QEMU, at the deadline, or when not connected.
        """
        client = self._client
        if client is None:
            raise QmpError(f"{self.name}: {command}: not connected")
        try:
            # Not wait_for(): Python 3.11's version loses a cancellation that coincides with the
            # result.
            async with asyncio.timeout(timeout or self.timeout):
                return await client.execute(command, args, oob=oob)
        except ExecuteError as e:
            raise QmpRefused(f"{self.name}: {command}: {e.error_class}: {e}") from e
        except TimeoutError as e:
            raise QmpTimeout(f"{self.name}: {command}: no answer in time") from e
        except (OSError, QMPError, EOFError) as e:
            raise QmpError(f"{self.name}: {command}: {str(e) or type(e).__name__}") from e

    async def info(self) -> QemuInfo:
        """Query version, accelerator, run state and machine type. Raises QmpError."""
        v = (await self.execute("query-version"))["qemu"]
        kvm = (await self.execute("query-kvm"))["enabled"]
        status = (await self.execute("query-status"))["status"]
        machine = await self.execute("qom-get", {"path": "/machine", "property": "type"})
        return QemuInfo((v["major"], v["minor"], v["micro"]), kvm, status, str(machine))

    async def offers(self) -> frozenset[str]:
        """Return those of HOST_OFFLOADS that the guest's virtio-net devices offer. Raises
        QmpError."""
        return frozenset(name for _, name in await self._switched_on(HOST_OFFLOADS))

    async def announcing(self) -> frozenset[str]:
        """Return the virtio-net devices that have the guest announce itself. Raises QmpError."""
        return frozenset(card for card, _ in await self._switched_on((GUEST_ANNOUNCE,)))

    async def _switched_on(self, names: Iterable[str]) -> set[tuple[str, str]]:
        """Return (device, property) of those properties of virtio-net devices that are on."""
        found = set()
        for place in ("/machine/peripheral", "/machine/peripheral-anon"):
            for child in await self.execute("qom-list", {"path": place}):
                if not child["type"].startswith("child<virtio-net"):
                    continue
                path = f"{place}/{child['name']}"
                known = {p["name"] for p in await self.execute("qom-list", {"path": path})}
                for name in known.intersection(names):
                    if await self.execute("qom-get", {"path": path, "property": name}):
                        found.add((str(child["name"]), name))
        return found

    async def hardware(self) -> Hardware:
        """Return what the guest sees of its machine (qemu/hardware.py). Raises QmpError."""
        info = await self.info()
        cpus = await self.execute("query-cpus-fast")
        memory = await self.execute("query-memory-size-summary")
        model = await self.execute("qom-get", {"path": cpus[0]["qom-path"], "property": "type"})
        tree = await self.execute("human-monitor-command", {"command-line": "info qtree"})
        return {
            "QEMU": ".".join(map(str, info.version[:2])),
            "machine": info.machine.removesuffix("-machine"),
            "CPU model": str(model),
            "vCPUs": str(len(cpus)),
            "memory": f"{memory['base-memory'] >> 20} MiB",
            **parse_qtree(str(tree)),
            **self._queues,
        }

    async def queues(self, tap: str) -> Multiqueue | None:
        """Return the queues of the card at this tap; None if it cannot be determined.

        Raises QmpError.
        """
        cards = await self.cards()
        tree = await self.execute("human-monitor-command", {"command-line": "info qtree"})
        vcpus = len(await self.execute("query-cpus-fast"))
        try:
            return multiqueue(at_tap(cards, tap), parse_qtree(str(tree)), vcpus)
        except NicError:
            return None

    async def status(self, timeout: float | None = None) -> str:
        """Return the run state (`running`, `colo`, `inmigrate`, ...). Raises QmpError."""
        answer = await self.execute("query-status", timeout=timeout)
        if not isinstance(answer, dict) or not isinstance(answer.get("status"), str):
            raise QmpRefused(f"{self.name}: query-status: no run state in {answer!r:.100}")
        return str(answer["status"])

    async def migration_status(self, timeout: float | None = None) -> str:
        """Return the state of the migration (`colo` while in COLO); empty when there was none."""
        return str((await self.execute("query-migrate", timeout=timeout)).get("status", ""))

    async def cards(self) -> list[Card]:
        """Return the guest's network cards. Raises QmpError."""
        text = await self.execute("human-monitor-command", {"command-line": "info network"})
        cards = parse(str(text))
        for card in cards:
            self._queues.update(tap_queues(card.mac, card.queues))
        return cards

    async def enters_colo(self) -> bool:
        """Return whether a migration of this QEMU would enter COLO. Raises QmpError."""
        known = await self.execute("query-migrate-capabilities")
        return any(c.get("capability") == "x-colo" and c["state"] is True for c in known)

    async def guest_macs(self, tap: str) -> list[str]:
        """Return the MAC addresses of the guest's card at this tap.

        The first is the main one; the others are those that the guest's driver requested in
        addition. Raises QmpError, or NicError when the card cannot be determined.
        """
        card = at_tap(await self.cards(), tap)
        try:  # includes addresses that the guest set itself
            seen = (await self.execute("query-rx-filter", {"name": card.name}))[0]
            return [str(seen["main-mac"]), *map(str, seen["unicast-table"])]
        except (QmpError, LookupError):  # this model has no such filter
            return [card.mac]

    async def migration_trouble(self, options: MigrationOptions, *, primary: bool) -> str:
        """Return why this QEMU cannot migrate with these options, or an empty string.

        Without options nothing is asked. Raises QmpError.
        """
        name = options.tls_creds
        if name:
            # QEMU takes any id, and fails only when the migration begins.
            listed = await self.execute("qom-list", {"path": "/objects"})
            types = {str(x["name"]): str(x["type"]) for x in listed}
            endpoint = ""
            if name in types:
                where = {"path": f"/objects/{name}", "property": "endpoint"}
                endpoint = str(await self.execute("qom-get", where))
            why = creds_refusal(options, types, endpoint, sends=primary)
            if why:
                return why
        if not options.multifd:
            return ""
        version = (await self.info()).version
        if version < MULTIFD_SINCE:
            return f"[migration] multifd needs QEMU 11, this is {'.'.join(map(str, version))}"
        if primary:
            return ""
        have = await self.execute("query-migrate-capabilities")
        if any(c["capability"] == "multifd" and c["state"] is True for c in have):
            return ""
        if not is_deferred(await self.execute("query-migrate")):
            return (
                "[migration] multifd: this QEMU waits already, and takes no further channels: "
                "start it with `-incoming defer`"
            )
        if not options.listen:
            return (
                "[migration] multifd: this QEMU has to be told where to wait: set [qemu] "
                "migrate_uri on the secondary (reverse_uri on the primary) as on the other host"
            )
        return ""

    async def prepare(self, *, primary: bool, migration: MigrationOptions = DEFAULTS) -> None:
        """Set the capabilities and parameters that COLO needs, on either side. Raises QmpError.

        Capabilities that another tool left on are turned off: with return-path before QEMU 11, or
        with pause-before-switchover, the PVM would stay stopped, and others would make the entry
        fail.
        """
        wanted = {"x-colo", "events"}
        have = await self.execute("query-migrate-capabilities")
        known = {str(c["capability"]): c["state"] is True for c in have}
        if "x-colo" not in known:
            raise QmpError(f"{self.name}: this QEMU is built without COLO (no capability x-colo)")
        info = await self.info()
        if info.version >= (11, 0, 0):
            wanted.add("return-path")  # QEMU 11 refuses x-colo without it
        deferred = False
        if migration.multifd and not await self.migration_trouble(migration, primary=primary):
            wanted.add("multifd")
            deferred = not primary and is_deferred(await self.execute("query-migrate"))
        change = {c: False for c, on in known.items() if on and c not in wanted}
        if change:
            log.warning(
                "%s: turned off capabilities that another tool left on: %s",
                self.name,
                ", ".join(change),
            )
        change |= dict.fromkeys(sorted(wanted), True)
        await self.execute(
            "migrate-set-capabilities",
            {"capabilities": [{"capability": c, "state": on} for c, on in change.items()]},
        )
        parameters = migration.parameters(sends=primary)
        if primary:
            await self.execute(
                "migrate-set-parameters", {"x-checkpoint-delay": IDLE_DELAY_MS, **parameters}
            )
            if not info.kvm and info.version < (11, 0, 0):
                # Under TCG, QEMU before 11 misses writes to pages whose dirty logging starts while
                # translated code runs, so the guest must be stopped for the first copy.
                await self.execute("stop")
        else:
            # Announcements belong to the controller: a RARP sent too early would make the switch
            # learn the address at the wrong port.
            await self.execute("migrate-set-parameters", {"announce-rounds": 0, **parameters})
        if deferred:
            await self.execute("migrate-incoming", {"uri": migration.listen})

    async def migrate(self, uri: str) -> None:
        """Start the initial synchronisation; the RESUME event completes it. Raises QmpError."""
        await self.execute("migrate", {"uri": uri})

    async def trigger_checkpoint(self) -> None:
        """Request a checkpoint from the PVM's QEMU now. Raises QmpError."""
        await self.execute("migrate-set-parameters", {"x-checkpoint-delay": IDLE_DELAY_MS})

    async def lost_heartbeat(self, timeout: float | None = None) -> None:
        """Tell QEMU that its COLO peer is gone, so that it continues alone. Raises QmpError."""
        await self.execute("x-colo-lost-heartbeat", timeout=timeout)

    async def yank(self, timeout: float | None = None) -> None:
        """Cut QEMU's migration channel out of band: a main loop that waits for it continues.

        A secondary that loads a checkpoint holds QEMU's big lock while it reads from the channel
        (colo_incoming_process_checkpoint() in migration/colo.c), so a primary that hangs there also
        blocks the secondary's QMP. Raises QmpError.
        """
        await self.execute("yank", {"instances": [{"type": "migration"}]}, timeout, oob=True)

    async def quit(self) -> None:
        """End QEMU, whose guest is worthless. Raises QmpError."""
        await self.execute("quit")

    async def close(self) -> None:
        """Disconnect without calling on_close."""
        client, self._client = self._client, None
        if client is not None:
            try:
                await asyncio.wait_for(self._disconnect(client), 2)
            except (EOFError, OSError, QMPError, TimeoutError) as e:
                log.debug("%s: disconnect: %s", self.name, e)
        if self._watch is not None:
            self._watch.cancel()
