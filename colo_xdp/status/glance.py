# SPDX-License-Identifier: GPL-2.0-or-later
"""The status of one host of a pair as sections of short lines, for every view. Pure.

status/text.py and status/live.py show the same lines, so neither has what the other lacks. It is
made of the document's JSON, since the command line gets no more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..failover.states import Role
from .health import LINK_SILENT_MS, Health, Level, health
from .work import Rate, Work, same_controller, work

Document = Mapping[str, Any]
CAUSES = 5  # shown, the most frequent ones first


@dataclass(frozen=True, slots=True)
class Line:
    """A name and what is said of it; `level`: whether it needs attention."""

    name: str
    text: str
    level: Level = Level.OK


@dataclass(frozen=True, slots=True)
class Glance:
    """Title, health, and the sections by name."""

    title: str
    health: Health
    sections: dict[str, list[Line]]

    def lines(self) -> list[Line]:
        """Return the lines of all sections."""
        return [line for lines in self.sections.values() for line in lines]


def glance(
    s: Document, now: float, before: Document | None = None, since: Document | None = None
) -> Glance:
    """Return the view at the unix time `now`.

    before: an earlier document, for the throughput; since: the one from which waits and agreement
    count, None: from the controller's start.
    """
    w = work(s, before, since)
    began = same_controller(s, since)
    ago = s["uptime_s"] - (began["uptime_s"] if began is not None else 0.0)
    sections = {
        "now": list(_now(s)),
        "guest": list(_guest(s, w, f"in the last {span(max(1.0, ago))}")),
        "checkpoints": list(_checkpoints(s, now)) if s["role"] == Role.PRIMARY else [],
        "other host": list(_other(s)),
        "data path": list(_data_path(s)),
    }
    title = (
        f"{s['pair']} {s['role']}: {s['state']} for {span(max(0.0, now - s['since']))} "
        f"(epoch {s['epoch']}, {s['mode']})"
    )
    return Glance(title, health(s), {k: v for k, v in sections.items() if v})


# ---- figures


def span(seconds: float) -> str:
    """Return a time in its two largest units."""
    total = int(seconds)
    for unit, name, small, less in (
        (86400, "d", 3600, "h"),
        (3600, "h", 60, "m"),
        (60, "m", 1, "s"),
    ):
        if total >= unit:
            return f"{total // unit} {name} {total % unit // small} {less}"
    return f"{total} s"


def size(n: float) -> str:
    """Return a number of bytes."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if n < 1024:
            break
        n, unit = n / 1024, "TiB"
    return f"{n:.0f} {unit}" if unit == "bytes" else f"{n:.1f} {unit}"


def delay(seconds: float) -> str:
    """Return a short time."""
    ms = seconds * 1000
    return f"{ms * 1000:.0f} us" if ms < 0.1 else f"{ms:.2g} ms" if ms < 10 else f"{ms:.0f} ms"


def share(part: float) -> str:
    """Return a share in per cent; only all of it is 100 %."""
    return "100 %" if part == 1 else f"{min(99.9, part * 100):.1f} %"


def _rate(r: Rate) -> str:
    bits, unit = r.bits, "bit/s"
    for bigger in ("kbit/s", "Mbit/s", "Gbit/s"):
        if bits < 1000:
            break
        bits, unit = bits / 1000, bigger
    return f"{bits:.1f} {unit} ({r.frames:.0f} frames/s)"


def _ago(ms: float | None) -> str:
    return "never" if ms is None else f"{ms:.0f} ms ago"


# ---- sections


def _now(s: Document) -> Iterator[Line]:
    yield Line("why", s["reason"])
    f, died = s["failover"], s["if_peer_died"]
    level = (
        Level.OK if died["outcome"] in ("takes_over", "goes_solo", "unchanged") else Level.WARNING
    )
    yield Line("if the other host died now", died["sentence"], level)
    if f["arbiter"]:
        kind = {
            "fence": "fence command" if f["fence"] else "fence, but no command is configured",
            "lease": "lease in etcd",
            "manual": "an operator",
        }[f["arbiter"]]
        how = "automatic failover" if f["automatic"] else "failover by an operator only"
        trouble = f"; {f['trouble']}" if f["trouble"] else ""
        yield Line("arbiter", f"{kind}, {how}{trouble}", Level.WARNING if trouble else Level.OK)
    if s["paused"]:
        yield Line("paused", "failover decisions are left to an operator", Level.WARNING)


def _guest(s: Document, w: Work, when: str) -> Iterator[Line]:
    may, q, held, pa = s["active"], s["qemu"], s["held"], s["patience"]
    right = {"held": "the lease is held", "promised": "the other host stays silent"}
    why = right.get(may["lease"], "no lease") if may["lease"] else ""
    left = f", {may['remaining_s']:.1f} s left" if may["remaining_s"] else ""
    yield Line(
        "guest",
        ("transmits" if may["transmitting"] else "is silent") + (f" ({why}{left})" if why else ""),
    )
    gone = "; the guest is lost" if q["gone"] else ""
    yield Line(
        "QEMU",
        f"{'' if q['connected'] else 'NOT '}connected {q['version']} {q['accel']}".rstrip() + gone,
        Level.OK if q["connected"] else Level.WARNING,
    )
    if w.sent is not None and w.received is not None:
        text = f"sends {_rate(w.sent)}, receives {_rate(w.received)}"
        if not may["transmitting"] and s["role"] == Role.SECONDARY:
            text = f"{_rate(w.sent)} go to the primary host only, {_rate(w.received)} come from it"
        yield Line("throughput", text)
    yield Line("held", f"{held['packets']} of {held['limit']} packets, {size(held['bytes'])}")
    if s["role"] == Role.PRIMARY:
        wait, agreed = f"no frame waited {when}", f"no frame left compared {when}"
        if w.wait_p50_s is not None and w.wait_p99_s is not None:
            wait = f"p50 {delay(w.wait_p50_s)}, p99 {delay(w.wait_p99_s)} {when}"
        if w.agreed is not None and w.by_kernel is not None:
            agreed = (
                f"{share(w.agreed)} of the frames left because both guests sent the same {when}; "
                f"the kernel decided {share(w.by_kernel)}"
            )
        yield Line("wait", wait)
        yield Line("agreement", agreed)
    if pa["source"]:
        yield Line(
            "patience",
            f"{pa['ms']:.0f} ms ({pa['source']}); the SVM lags by {pa['lag_ms']:.0f} ms, a "
            f"checkpoint takes {pa['checkpoint_ms']:.0f} ms, {pa['needless']} were needless",
        )
    yield from _disks(s)


def _disks(s: Document) -> Iterator[Line]:
    d = s["disks"]
    if not d["names"]:
        return
    names = ", ".join(d["names"])
    if d["copying"]:
        c = d["copying"]
        left = "" if c["left_s"] is None else f", {span(c['left_s'])} left"
        done = share(c["done"] / c["total"]) if c["total"] else "0 %"
        text = f"first copy: {done} of {size(c['total'])} at {size(c['rate'])}/s{left}"
    elif d["lost"]:
        text = d["lost"]
    elif d["committing"]:
        text = "QEMU merges the overlays after the takeover"
    elif s["role"] == Role.PRIMARY:
        text = "each write goes to both hosts" if d["mirrored"] else "not mirrored"
    else:
        text = "the other host writes to the images here" if d["exported"] else "not exported"
    over = "".join(f"; overlay of {k}: {size(v)}" for k, v in d["overlays"].items())
    trouble = f"; {d['room_trouble']}" if d["room_trouble"] else ""
    bad = d["lost"] or trouble or s["active"]["disks_unproven"]
    yield Line("disks", f"{names}: {text}{over}{trouble}", Level.WARNING if bad else Level.OK)


def _checkpoints(s: Document, now: float) -> Iterator[Line]:
    ck = s["checkpoints"]
    late = f", {ck['delayed']} delayed by {ck['delay_s']:.1f} s in all" if ck["delayed"] else ""
    up = s["uptime_s"]
    took = sum(p["total_ms"] for p in ck["price"].values())
    part = f", {share(took / up / 1000)} of the time" if up and took else ""
    yield Line("checkpoints", f"{ck['total']} in {span(up)}{part}, {ck['failed']} failed{late}")
    causes = sorted(((n, k) for k, n in ck["by_cause"].items() if n), reverse=True)
    for n, cause in causes[:CAUSES]:
        p = ck["price"].get(cause)
        price = (
            f", on average {p['total_ms'] / n:.0f} ms with a pause of {p['pause_ms'] / n:.0f} ms"
            if p
            else ""
        )
        yield Line(cause, f"{n}{price}")
    if len(causes) > CAUSES:
        yield Line("others", str(sum(n for n, _ in causes[CAUSES:])))
    if ck["last"]:
        last = ck["last"]
        yield Line(
            "last",
            f"{span(max(0.0, now - last['at']))} ago, {last['cause']}: {last['detail']}; pause "
            f"{last['pause_ms']:.1f} ms, {last['total_ms']:.1f} ms in all",
        )


def _other(s: Document) -> Iterator[Line]:
    p = s["peer"]
    gone = "; its guest is certainly silent" if p["gone"] else ""
    if p["connected"]:
        text = f"connected {p['state']}".rstrip()
        text += f", round trip {p['rtt_us'] / 1000:.1f} ms{gone}"
    else:
        text = f"NOT connected, heard {_ago(p['silent_ms'])}{gone}"
    yield Line("peer", text, Level.OK if p["connected"] else Level.WARNING)
    for w in s["heartbeat_links"]:
        silent = w["silent_ms"]
        bad = w["trouble"] or silent is None or silent > LINK_SILENT_MS
        yield Line(
            f"heartbeats {w['name']}",
            f"received {_ago(silent)}, round trip {w['rtt_us'] / 1000:.1f} ms, acknowledged "
            f"{_ago(w['echo_age_ms'])}" + (f" ({w['trouble']})" if w["trouble"] else ""),
            Level.WARNING if bad else Level.OK,
        )


def _data_path(s: Document) -> Iterator[Line]:
    if len(s["nics"]) > 1:
        for n in s["nics"]:
            yield Line(
                f"NIC {n['name']}",
                f"{n['tap']}{' in ' + n['bridge'] if n['bridge'] else ''}, "
                f"{n['mac'] or 'address not known yet'}, peer link {n['peer_link']}: {n['flows']} "
                f"connections, {n['held']} packets held"
                + (f" ({n['trouble']})" if n["trouble"] else ""),
                Level.WARNING if n["trouble"] else Level.OK,
            )
    yield Line("connections", f"{s['flows']['tracked']} of {s['flows']['limit']}")
    if s["hook"]:
        lost = s["ring"]["lost"]
        yield Line(
            "hook",
            f"{s['hook']}, events by {s['events']} buffer, {lost} lost",
            Level.WARNING if lost else Level.OK,
        )
    if s["data_path"]["trouble"]:
        yield Line("trouble", s["data_path"]["trouble"], Level.WARNING)
    log = s["event_log"]
    if log["lost"]:
        yield Line(
            "events", f"{log['lost']} lost: {log['trouble'] or 'written again'}", Level.WARNING
        )
