# SPDX-License-Identifier: GPL-2.0-or-later
"""The status document as text for people, as `colo-xdp status` prints it. Pure.

It is made of the document's JSON, since the command line gets no more than that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def text(s: Mapping[str, Any], now: float) -> str:
    """Return a few lines about one host of a pair, at the unix time `now`."""
    q, p, ck, held = s["qemu"], s["peer"], s["checkpoints"], s["held"]
    pa, age = s["patience"], now - s["since"]

    def no(x: dict[str, Any]) -> str:
        return "" if x["connected"] else "NOT "

    def ms(v: float | None) -> str:
        return "never" if v is None else f"{v:.0f} ms ago"

    may = s["active"]
    right = {"held": "the lease is held", "promised": "the other host stays silent"}
    why = right.get(may["lease"], "no lease") if may["lease"] else ""
    left = f", {may['remaining_s']:.1f} s left" if may["remaining_s"] else ""
    causes = ", ".join(f"{k} {v}" for k, v in ck["by_cause"].items() if v) or "none"
    lines = [
        f"{s['pair']} {s['role']}: {s['state']} for {age:.0f} s (epoch {s['epoch']}, {s['mode']})",
        f"  why          {s['reason']}",
        f"  guest        {'transmits' if may['transmitting'] else 'is silent'}"
        + (f" ({why}{left})" if why else ""),
        f"  QEMU         {no(q)}connected {q['version']} {q['accel']}".rstrip(),
        f"  peer         {no(p)}connected {p['state']}".rstrip(),
        *(
            f"  heartbeats   {w['name']}: received {ms(w['silent_ms'])}, round trip "
            f"{w['rtt_us'] / 1000:.1f} ms, acknowledged {ms(w['echo_age_ms'])}"
            + (f" ({w['trouble']})" if w["trouble"] else "")
            for w in s["heartbeat_links"]
        ),
        *(
            f"  NIC {n['name']:<8} {n['tap']}{' in ' + n['bridge'] if n['bridge'] else ''}, "
            f"{n['mac'] or 'address not known yet'}, peer link {n['peer_link']}: {n['flows']} "
            f"connections, {n['held']} packets held"
            + (f" ({n['trouble']})" if n["trouble"] else "")
            for n in s["nics"]
            if len(s["nics"]) > 1
        ),
        f"  hook         {s['hook']}, events by {s['events']} buffer, {s['ring']['lost']} lost",
        f"  held         {held['packets']} of {held['limit']} packets, {held['bytes']} bytes",
        *(
            [
                f"  patience     {pa['ms']:.0f} ms ({pa['source']}); the SVM lags by "
                f"{pa['lag_ms']:.0f} ms, a checkpoint takes {pa['checkpoint_ms']:.0f} ms, "
                f"{pa['needless']} were needless"
            ]
            * bool(pa["source"])
        ),
        f"  checkpoints  {ck['total']} ({causes}), {ck['failed']} failed"
        + (f", {ck['delayed']} delayed by {ck['delay_s']:.1f} s in all" * bool(ck["delayed"])),
    ]
    if ck["last"]:
        last = ck["last"]
        lines.append(
            f"  last         {last['cause']}: {last['detail']}; pause {last['pause_ms']:.1f} ms, "
            f"{last['total_ms']:.1f} ms in all"
        )
    return "\n".join(lines)
