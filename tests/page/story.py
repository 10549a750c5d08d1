# SPDX-License-Identifier: GPL-2.0-or-later
"""A pair's status and its last six hours, as a controller would have written them."""

from __future__ import annotations

import copy
import math
import random
from typing import Any

from colo_xdp.peer.heartbeat_datagram import REFUSALS
from colo_xdp.status.document import Status, empty
from colo_xdp.status.history import EVERY_S, SIZE, History

#: hours ago -> state from then on
STATES = (
    (6, "protected"),
    (2.35, "degraded"),
    (2.33, "solo"),
    (2.05, "starting"),
    (2.0, "protected"),
)


def document(now: float) -> dict[str, Any]:
    """What the primary of a protected pair says of itself."""
    s = copy.deepcopy(empty("web1", "primary").to_json())
    change = [
        (2.35, "degraded", "the secondary has not answered for 3000 ms"),
        (2.33, "solo", "the secondary is fenced: this guest serves alone"),
        (2.05, "starting", "the first checkpoint to a new secondary"),
        (2.0, "protected", "both guests run in step"),
    ]
    s.update(
        state="protected", reason="both guests run in step", since=now - 7200, epoch=1291,
        mode="run", hook="tc", events="ring", port="forwarding",
        history=[{"at": now - h * 3600, "state": x, "reason": r} for h, x, r in change],
    )  # fmt: skip
    s["active"] |= {"transmitting": True, "lease": "held", "remaining_s": 4.2, "sync": "in_sync"}
    s["qemu"] |= {"connected": True, "version": "7.2.22", "accel": "kvm"}
    s["peer"] |= {"connected": True, "silent_ms": 41.0, "state": "protected", "rtt_us": 310.0}
    s["heartbeat_links"] = [
        {"name": name, "silent_ms": 60.0 + i, "echo_age_ms": 120.0, "rtt_us": 280.0 + i,
         "sent": 9, "received": 9, "refused": dict.fromkeys(REFUSALS, 0), "trouble": ""}
        for i, name in enumerate(("peer link", "management"))
    ]  # fmt: skip
    s["held"] = {"packets": 3, "bytes": 4344, "limit": 1024}
    s["flows"] |= {"tracked": 412, "limit": 65536}
    s["patience"] |= {
        "ms": 35.0, "source": "checkpoint", "lag_ms": 4.2, "checkpoint_ms": 41.0, "needless": 7,
    }  # fmt: skip
    s["checkpoints"] |= {"total": 1291, "failed": 1, "folded": 12}
    s["checkpoints"]["by_cause"] |= {
        "compare_timeout": 640,
        "payload_differs": 412,
        "periodic": 239,
    }
    s["checkpoints"]["last"] = {
        "cause": "compare_timeout", "detail": "10.0.0.5:443 to 10.0.0.90:51812: nothing for 35 ms",
        "pause_ms": 18.4, "total_ms": 44.1, "at": now - 8,
    }  # fmt: skip
    s["nics"] = [
        {"name": "eth0", "tap": "tap0", "peer_link": "peer0", "bridge": "br0",
         "mac": "52:54:00:12:34:56", "hook": "tc", "port": "forwarding", "arrived": 1, "lost": 0,
         "sent": 1, "held": 3, "flows": 412, "trouble": ""}
    ]  # fmt: skip
    s["disks"] |= {"names": ["vda"], "mirrored": True}
    s["rules"] = [
        {"name": "dns", "action": "pass", "flows": 31, "uncompared": 811, "differences": 0},
        {"name": "default", "action": "compare", "flows": 412, "uncompared": 0, "differences": 412},
    ]  # fmt: skip
    s["divergences"] = [
        {"cause": "payload_differs", "flow": "10.0.0.5:443 to 10.0.0.90:51812", "proto": "tcp",
         "port": 443, "rule": "default", "nic": "eth0", "asked": True, "offset": 8192,
         "at_index": 3, "pvm": "00", "svm": "01"}
    ]  # fmt: skip
    Status.from_json(s)
    return s


def hours(now: float) -> History:
    """The last six hours before `now`, made of documents with counters."""
    h, rnd = History(now - 6 * 3600), random.Random(1)
    s = copy.deepcopy(empty("web1", "primary").to_json())
    total: dict[str, float] = dict.fromkeys(("released", "fast", "punt"), 0)
    for i in range(SIZE):
        left = (SIZE - 1 - i) * EVERY_S / 3600  # hours
        s = copy.copy(s)
        s["state"] = [state for since, state in STATES if left <= since][-1]
        load = 3000 * (1.3 + math.sin(i / 300)) * rnd.uniform(0.85, 1.15)
        both = s["state"] == "protected"
        total["fast"] += load * 8 * both
        total["punt"] += load * 2 * both
        total["released"] += load * (2 if both else 10)
        s["engine"] = {"released": int(total["released"])}
        out = {"offload_passed": [int(total["fast"]), 0], "punt": [int(total["punt"]), 0]}
        s["programs"] = s["programs"] | {"pvm_out": out}
        s["held"] = {"packets": int(rnd.expovariate(0.3)) * both, "bytes": 0, "limit": 1024}
        buckets = list(s["wait"]["buckets"])
        for at, n in ((4, 900), (7, 80), (9 + int(rnd.random() * 3), 20)):
            buckets[at] += n * both
        s["wait"] = {"buckets": buckets, "sum": 0.0}
        s["patience"] = s["patience"] | {
            "checkpoint_ms": rnd.uniform(35, 50), "lag_ms": rnd.uniform(2, 9),
        }  # fmt: skip
        by_cause = dict(s["checkpoints"]["by_cause"])
        for cause, p in (("compare_timeout", 0.3), ("payload_differs", 0.2), ("periodic", 0.11)):
            by_cause[cause] += both * (rnd.random() < p)
        done = {"total": sum(by_cause.values()), "by_cause": by_cause}
        s["checkpoints"] = s["checkpoints"] | done
        silent = rnd.uniform(5, 100) if both else None
        s["peer"] = s["peer"] | {"silent_ms": silent}
        h.add(s, now - left * 3600, i * EVERY_S)
    return h
