# SPDX-License-Identifier: GPL-2.0-or-later
"""Explain to an operator why checkpoints were taken. Pure.

The input is the document that the controller returns for the command `explain`.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any

from ..compare.causes import DESCRIPTIONS, Cause
from ..net import hexdump
from . import price

#: what an operator can do about each cause
ADVICE = {
    Cause.PAYLOAD_DIFFERS: "look at the differing bytes: a clock or a random id? Make the guests "
    "agree, or let the port pass with a [[rule]] (its connections are then not protected)",
    Cause.FIN_DIFFERS: "timeouts inside the guest close connections at different moments",
    Cause.RST_ONE_SIDED: "look for timeouts or firewalls inside the guest; often this follows "
    "another difference",
    Cause.SYN_OPTIONS_DIFFER: "sysctls of the two guests differ, or ECN or SYN cookies are random",
    Cause.URGENT_DIFFERS: "an application sends out-of-band data at times of its own",
    Cause.DATAGRAM_DIFFERS: "see payload_differs; for DNS and NTP a [[rule]] is usual",
    Cause.OPENED_APART: "each guest draws its ports at random: let the flows that the guest opens "
    '(DNS, updates) pass with a [[rule]] with direction = "out", or use a resolver outside of it',
    Cause.COMPARE_TIMEOUT: "the SVM does not answer at all, or is much slower than it was: compare "
    "with the needless checkpoints of the status; [compare] min_wait sets the least patience",
    Cause.CROSSED: "threads or locks inside the guests were granted in another order (a database, "
    "several vCPUs): each costs about one checkpoint, and no setting avoids it",
    Cause.REPEATED: "the peer link loses frames, or the SVM does not answer what the PVM answers",
    Cause.FRAME_LOST: "the peer link, or the SVM's tap, loses frames: see the devices' counters on "
    "both hosts",
    Cause.SVM_AHEAD: "the PVM is slower than compare_timeout, or the SVM sends more",
    Cause.RETRANSMIT_UNVERIFIABLE: "a client that is far behind causes very late retransmissions",
    Cause.SIGNED_CONNECTION: "expect one per connection of BGP, LDP or MSDP with a password",
    Cause.QUEUE_FULL: "raise max_queue_size or max_held_bytes, or find out what is slow",
    Cause.STREAM_FULL: "raise max_stream_bytes, or find out why the PVM is behind",
    Cause.EVENT_LOST: "raise ring_pages, or give the controller a CPU of its own",
    Cause.PEER_GAP: "the peer link loses frames, or was down",
    Cause.CONTROLLER_RESTART: "expect one per restart of a controller",
    Cause.POLICY: "expect one per reload of the rules",
    Cause.PEER_LINK: "check the peer link and the secondary guest: see the status on both hosts",
    Cause.HOOKS_LOST: "another tool recreates the device or removes filters: see the log",
    Cause.OPERATOR: "nothing to do",
    Cause.PERIODIC: "see [checkpoint] periodic",
    Cause.SWITCHOVER: "nothing to do",
    Cause.INITIAL: "expect one per pair",
    Cause.GUEST_EVENT: "someone used `stop`, system_reset or system_powerdown, or the guest "
    "rebooted",
    Cause.OVERLAY_FULL: "the guest writes much between two checkpoints: a larger [[disk]] "
    "overlay_limit, or [checkpoint] periodic",
}


def duration(text: str) -> float:
    """Return the seconds in "90s", "15m", "2h", "1d" or a number. Raises ValueError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400}
    n, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "s")
    seconds = float(n) * units[unit]
    if not 0 < seconds < 1e9:
        raise ValueError(text)
    return seconds


def _cell(e: dict[str, Any]) -> tuple[str, str, str, str]:
    port = str(e["port"]) if e["port"] else "-"
    return e["cause"], e["proto"] or "-", port, e["rule"] or "-"


def _groups(entries: list[dict[str, Any]]) -> list[str]:
    done = [e for e in entries if not e["failed"]]
    by: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for e in done:
        by.setdefault(_cell(e), []).append(e)
    lines = [
        f"{'count':>6} {'share':>6}  {'pause ms':>14} {'held ms':>8} {'held':>16}  cause"
        f"{'':16} proto     port  rule",
        f"{'':>6} {'':>6}  {'mean / max':>14} {'mean':>8} {'frames, bytes':>16}",
    ]
    for (cause, proto, port, rule), some in sorted(by.items(), key=lambda x: -len(x[1])):
        n = len(some)
        pauses = [e["pause_ms"] for e in some]
        lines.append(
            f"{n:>6} {n / len(done):>6.0%}  {sum(pauses) / n:>6.1f} /{max(pauses):>6.1f} "
            f"{sum(e['total_ms'] for e in some) / n:>8.1f} "
            f"{sum(e['held_packets'] for e in some) // n:>6}, "
            f"{sum(e['held_bytes'] for e in some) // n:>8}  "
            f"{cause:<21} {proto:<8} {port:>5}  {rule}"
        )
    return lines


def _over_time(entries: list[dict[str, Any]]) -> list[str]:
    span = entries[-1]["at"] - entries[0]["at"]
    step, form = (60, "%H:%M") if span < 3600 else (3600, "%d %b %H:00")
    per = Counter(int(e["at"] // step) for e in entries)
    first, last = min(per), max(per)
    shown = range(max(first, last - 23), last + 1)
    top = max(per.values())
    return [
        f"  {datetime.fromtimestamp(t * step):{form}}  {per[t]:>5}  {'#' * (40 * per[t] // top)}"
        for t in shown
    ]


def difference(d: dict[str, Any], title: str) -> list[str]:
    """Format one difference, with the bytes of both guests."""
    head = f"{title} {d['cause']}{'' if d['asked'] else ' (observed only)'}: {d['flow']}"
    head += f", byte {d['offset']}" + (f", rule {d['rule']}" if d["rule"] else "")
    pvm, svm = bytes.fromhex(d["pvm"]), bytes.fromhex(d["svm"])
    if not pvm and not svm:
        return [head]
    return [head, *hexdump.compare(pvm, svm, d["at_index"], d["offset"])]


def text(doc: dict[str, Any], *, last: int = 3, since: float = 0.0) -> str:
    """Format the answer to "why was a checkpoint taken?".

    `since`: unix time of the oldest checkpoint that counts, s.
    """
    entries = [e for e in doc["entries"] if e["at"] >= since]
    if not entries:
        return "no checkpoint in this time"
    lines = _groups(entries)
    lines += price.lines(entries, doc["now"])
    failed = [e for e in entries if e["failed"]]
    if failed:
        lines += ["", f"{len(failed)} failed:"]
        lines += [f"  {e['cause']}: {e['failed']}" for e in failed[-5:]]
    lines += ["", "over time:", *_over_time(entries)]
    causes = Counter(e["cause"] for e in entries)
    lines += ["", "what the causes mean:"]
    for cause, _ in causes.most_common():
        lines += [f"  {cause}: {DESCRIPTIONS[Cause(cause)]}", f"    -> {ADVICE[Cause(cause)]}"]
    found = [d for d in doc["divergences"] if d["at"] >= since][-last:] if last else []
    if found:
        lines += ["", f"the last {len(found)} differences:"]
        for d in found:
            when = f"{datetime.fromtimestamp(d['at']):%H:%M:%S}"
            lines += [*difference(d, f"#{d['serial']} {when}"), ""]
    return "\n".join(lines).rstrip()


def rules_text(rules: list[dict[str, Any]]) -> str:
    """Format the policy as a table."""
    lines = [f"{'rule':<32} {'action':<15} {'flows':>8} {'uncompared':>11} {'differences':>11}"]
    for r in rules:
        lines.append(
            f"{r['name']:<32} {r['action'] or '(former)':<15} {r['flows']:>8} "
            f"{r['uncompared']:>11} {r['differences']:>11}"
        )
    return "\n".join(lines)


def comment(d: dict[str, Any]) -> str:
    """Return the comment that Wireshark shows for a captured frame."""
    pvm, svm, at = bytes.fromhex(d["pvm"]), bytes.fromhex(d["svm"]), d["at_index"]
    both = f"{_byte(pvm, at)} of the PVM, {_byte(svm, at)} of the SVM"
    return (
        f"#{d['serial']} {d['cause']}: {d['flow']}, byte {d['offset']}: {both}"
        f"{', rule ' + d['rule'] if d['rule'] else ''}"
    )


def _byte(data: bytes, at: int) -> str:
    return f"0x{data[at]:02x}" if at < len(data) else "nothing"
