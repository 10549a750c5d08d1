# SPDX-License-Identifier: GPL-2.0-or-later
"""Build documents about a live controller: its status (status/document.py), and what differed.

service/daemon.py registers them as commands of the control socket.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ..compare.causes import Cause
from ..compare.patience import QUIET_NS
from ..controller.command import Command
from ..controller.controller import Controller
from ..controller.primary import Primary
from ..controller.secondary import Secondary
from ..engine.journal import divergence_json
from ..failover.prospect import prospect
from . import flows
from .document import empty


class EventFile(Protocol):
    """Where events are kept (service/event_log.py)."""

    path: Path
    lost: int
    trouble: str


@dataclass(frozen=True, slots=True)
class Process:
    """What the process around a controller adds to its status."""

    began_s: float  # monotonic
    events: EventFile

    def to_json(self) -> dict[str, Any]:
        """Return this part of the status document."""
        e = self.events
        return {
            "uptime_s": time.monotonic() - self.began_s,
            "event_log": {"path": str(e.path), "lost": e.lost, "trouble": e.trouble},
        }


def register(c: Controller, process: Process) -> None:
    """Let the control socket answer with documents about this controller."""
    for command, document in answers(c, process).items():
        c.commands.answer(command, document)
    c.commands.serve(Command.FLOWS, partial(flows.answer, c))


def answers(
    c: Controller, process: Process
) -> dict[Command, Callable[[dict[str, Any]], dict[str, Any]]]:
    """Return the control socket commands that only return a document."""
    return {
        Command.STATUS: lambda args: status(c) | process.to_json(),
        Command.EXPLAIN: lambda args: explain(c),
        Command.CAPTURE: lambda args: capture(c, args),
    }


def status(c: Controller) -> dict[str, Any]:
    """Return the status document (status/document.py)."""
    if isinstance(c, Primary):
        return primary_status(c)
    assert isinstance(c, Secondary)
    return secondary_status(c)


def _who_compares(c: Controller, command: str) -> Primary:
    if not isinstance(c, Primary):
        raise ValueError(f"{command}: ask the primary host, which does the comparing")
    return c


def _agreed_ms(p: Primary, since_ns: int) -> float:
    """Return for how long the guests have agreed since a checkpoint, as far as is known."""
    differ = (p.output.crossed_ns(since_ns), p.output.waiting_ns())
    until = min((at for at in differ if at), default=time.monotonic_ns())
    return max(0, until - since_ns) / 1e6


def explain(c: Controller) -> dict[str, Any]:
    """Return what differed, and what the policy's rules have done. Raises ValueError."""
    p = _who_compares(c, "explain")
    patience, cks = p.output.patience, p.checkpoints
    now = {
        "shadow": p.view.shadow,
        "patience_ms": patience.ns / 1e6,
        "quiet_ms": QUIET_NS / 1e6,
        "share": p.config.checkpoint.share,
        # since the last checkpoint, until something waits
        "agreed_ms": _agreed_ms(p, cks.ended_ns) if cks.ended_ns else 0.0,
    }
    return p.journal.to_json() | {"rules": rules_json(p), "now": now}


def capture(c: Controller, args: dict[str, Any]) -> dict[str, Any]:
    """Return one page of frames that differed. Raises ValueError."""
    p = _who_compares(c, "capture")
    after, limit = args.get("after", 0), args.get("limit", 8)
    if type(after) is not int or type(limit) is not int or not 1 <= limit <= 64:
        raise ValueError("capture: `after` is a number, `limit` one from 1 to 64")
    return p.journal.frames_json(after, limit)


def active_json(c: Controller) -> dict[str, Any]:
    """Return whether this host's guest reaches the network, and what entitles it to."""
    return {
        "transmitting": c.transmits,
        "undecided": c.undecided,
        "disks_unproven": c.disk_unproven,
        "lease": c.arbiter.right,
        "remaining_s": c.arbiter.remaining_s,
        "sync": c.dp.sync_state.name.lower(),
    }


def failover_json(c: Controller) -> dict[str, Any]:
    """Return what decides when the other host is lost."""
    f = c.config.failover
    return {
        "arbiter": f.arbiter,
        "automatic": f.automatic,
        "fence": bool(f.fence),
        "trouble": c.arbiter.trouble,
    }


def if_peer_died_json(c: Controller) -> dict[str, Any]:
    """Return what would happen now if the other host died."""
    p = prospect(
        c.facts(), transmits=c.transmits, trouble=c.arbiter.trouble, qemu_trouble=c.qemu.trouble
    )
    return {
        "outcome": p.outcome.value,
        "needs": [n.value for n in p.needs],
        "within_s": p.within_s,
        "sentence": p.sentence,
    }


def _common(c: Controller) -> dict[str, Any]:
    doc = empty(c.config.pair, c.role.value).to_json()
    info = c.qemu.info
    silent = c.peer.silent_ms()
    state, reason = c.announced_state()
    injectors = [i for nic in c.dp.nics for i in nic.injectors.values()]
    lead = c.dp.nics[0]
    doc.update(
        state=state.value,
        reason=reason,
        since=c.since,
        epoch=c.dp.epoch,
        mode=c.dp.mode.name.lower(),
        hook=lead.hook,
        events=lead.objects.events,
        paused=c.view.paused,
        active=active_json(c),
        failover=failover_json(c),
        if_peer_died=if_peer_died_json(c),
        port=lead.port_state,
        qemu={
            "connected": c.qemu.qmp.connected,
            "version": ".".join(map(str, info.version)) if info else "",
            "accel": ("kvm" if info.kvm else "tcg") if info else "",
            "gone": c.view.guest.gone,
        },
        peer={
            "connected": c.peer.connected,
            "silent_ms": None if silent == float("inf") else silent,
            "state": c.view.peer.state,
            "rtt_us": c.peer.rtt_ns / 1000,
            "gone": c.view.peer.shut,
            "ending": c.peer.ending.value,
        },
        heartbeat_links=c.heartbeat_links.status(),
        data_path={
            "trouble": c.devices.trouble,
            "restored": c.devices.restored,
            "silent_checkpoints": c.devices.silent_checkpoints,
        },
        programs={
            prog: {reason: list(v) for reason, v in row.items()}
            for prog, row in c.dp.counters().items()
        },
        ring={
            "lost": c.dp.lost_events(),
            "capacity_bytes": sum(nic.reader.capacity for nic in c.dp.nics),
        },
        inject={
            "sent": sum(i.sent for i in injectors),
            "failed": sum(sum(i.failed.values()) for i in injectors),
        },
        history=list(c.history),
        disks=disks_json(c),
        nics=nics_json(c),
        failures=c.failures[-16:],
        last_failover=c.last_failover,
    )
    return doc


def primary_status(c: Primary) -> dict[str, Any]:
    """Return the primary controller's document."""
    doc = _common(c)
    nics, cks = c.output.nics, c.checkpoints
    engines = [nic.engine for nic in nics]
    for e in engines:
        for name, value in e.counters.items():
            doc["engine"][name] += value
    packets, size = c.output.held
    doc["held"] = {
        "packets": packets,
        "bytes": size,
        "limit": sum(e.limits.max_queue_size for e in engines),
    }
    doc["wait"] = {"buckets": list(c.output.waits), "sum": c.output.wait_sum}
    patience = c.output.patience
    doc["patience"] = {
        "ms": patience.ns / 1e6,
        "source": patience.source,
        "lag_ms": patience.lag_ns / 1e6,
        "checkpoint_ms": patience.cost_ns / 1e6,
        "needless": doc["engine"]["checkpoints_needless"],
    }
    doc["flows"] |= {
        "tracked": sum(e.flows for e in engines),
        "limit": sum(e.limits.max_flows for e in engines),
    }
    for nic, row in zip(nics, doc["nics"], strict=True):
        row["held"] = nic.engine.held_packets
        row["flows"] = nic.engine.flows
        if nic.fast is not None:
            _add(doc["offload"], nic.fast.state())
    doc["checkpoints"] = {
        "total": sum(cks.by_cause.values()),
        "failed": cks.failures,
        "delayed": cks.delayed,
        "delay_s": cks.delay_s,
        "folded": cks.folded,
        "by_cause": {cause.value: cks.by_cause[cause.value] for cause in Cause},
        "price": price_json(c),
        "last": cks.last or None,
    }
    doc["divergences"] = [divergence_json(d) for _, _, d in c.journal.pairs]
    doc["rules"] = rules_json(c)
    return doc


def price_json(c: Primary) -> dict[str, dict[str, float]]:
    """Return the sums of what checkpoints have taken, by cause."""
    out: dict[str, dict[str, float]] = {}
    for (cause, *_), g in c.journal.groups.items():
        row = out.setdefault(cause, {"pause_ms": 0.0, "total_ms": 0.0})
        row["pause_ms"] += g.pause_ms
        row["total_ms"] += g.total_ms
    return out


def disks_json(c: Controller) -> dict[str, Any]:
    """Return the state of the replicated disks."""
    disks = c.qemu.disks
    copying, connected = disks.mirrors.copying, c.qemu.qmp.connected
    doc = {
        "names": list(disks.block.nodes),
        "mirrored": disks.mirrors.mirroring
        and copying is None
        and not disks.mirrors.lost
        and connected,
        "lost": disks.mirrors.lost,
        "copying": None
        if copying is None
        else {
            "done": copying.done,
            "total": copying.total,
            "rate": copying.rate,
            "left_s": copying.left_s,
        },
        "exported": disks.replica.serving and connected,
        "committing": False,
        "overlays": {},
        "room_trouble": "",
        "proof_ms": 0.0,
    }
    if isinstance(c, Secondary):
        doc |= {
            "committing": c.takeover.committing,
            "overlays": c.disks.overlays,
            "room_trouble": c.disks.room_trouble,
            "proof_ms": c.disks.proof_ms,
        }
    return doc


def rules_json(c: Primary) -> list[dict[str, Any]]:
    """Return the policy's rules in order with what each has done; former rules last."""
    engines = [nic.engine for nic in c.output.nics]
    now = {r.name: r.action for r in c.config.policy_of_all().order}
    done = [(name, rule) for e in engines for name, rule in e.rules.items()]
    gone = {name: "" for name, _ in done if name not in now}
    return [
        {
            "name": name,
            "action": action,
            "flows": sum(r.flows for n, r in done if n == name),
            "uncompared": sum(r.uncompared for n, r in done if n == name),
            "differences": sum(r.differences for n, r in done if n == name),
        }
        for name, action in (now | gone).items()
    ]


def nics_json(c: Controller) -> list[dict[str, Any]]:
    """Return what is of each NIC."""
    return [
        {
            "name": net.name,
            "tap": net.tap,
            "peer_link": net.peer_link,
            "bridge": net.bridge,
            "mac": mac,
            "hook": nic.hook,
            "port": nic.port_state,
            "arrived": nic.arrived(),
            "lost": nic.lost_events(),
            "sent": sum(i.sent for i in nic.injectors.values()),
            "held": 0,
            "flows": 0,
            "trouble": c.devices.trouble_of(i),
        }
        for i, (nic, net, mac) in enumerate(
            zip(c.dp.nics, c.config.networks, c.qemu.first_macs, strict=True)
        )
    ]


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    """Add up what two fast paths report."""
    for key, value in more.items():
        if isinstance(value, list):
            total[key] = [a + b for a, b in zip(total[key], value, strict=True)]
        else:
            total[key] += value


def secondary_status(c: Secondary) -> dict[str, Any]:
    """Return the secondary controller's document."""
    doc = _common(c)
    doc["engine"] |= {"svm_stale": c.held.stale, "hold_overflow": c.held.overflow}
    doc["held"]["packets"] = c.held.count
    doc["held"]["limit"] = c.held.limit
    doc["flows"] = {
        key: sum(getattr(one, key) for one in c.flows)
        for key in ("tracked", "opening", "limit", "translated", "aged")
    }
    for one, row in zip(c.flows, doc["nics"], strict=True):
        row["flows"] = one.tracked
    doc["checkpoints"]["total"] = c.checkpoints_loaded
    return doc
