# SPDX-License-Identifier: GPL-2.0-or-later
"""Read from a live controller what a row of its history needs (status/history.py).

The whole document costs hundreds of reads of BPF maps. This is the part that is plotted, so a
controller at rest does not notice it.
"""

from __future__ import annotations

import logging
import time
from typing import Any

from ..abi import Prog
from ..controller.controller import Controller
from ..controller.primary import Primary
from ..controller.secondary import Secondary
from .document import empty
from .history import History

log = logging.getLogger("colo_xdp.status")

_COUNTED = {True: (Prog.PVM_OUT,), False: (Prog.SVM_OUT, Prog.SVM_OUT_XDP)}


def reading(c: Controller) -> dict[str, Any]:
    """Return a status document of which only the plotted part is filled."""
    doc = empty(c.config.pair, c.role.value).to_json()
    silent = c.peer.silent_ms()
    doc["state"] = c.announced_state()[0].value
    doc["active"]["transmitting"] = c.transmits
    doc["peer"]["silent_ms"] = None if silent == float("inf") else silent
    doc["programs"] = c.dp.counters(_COUNTED[isinstance(c, Primary)])
    if isinstance(c, Primary):
        patience, by_cause = c.output.patience, c.checkpoints.by_cause
        doc["engine"] = {"released": sum(n.engine.counters["released"] for n in c.output.nics)}
        doc["held"]["packets"] = c.output.held[0]
        doc["wait"]["buckets"] = list(c.output.waits)
        doc["patience"] |= {
            "checkpoint_ms": patience.cost_ns / 1e6,
            "lag_ms": patience.lag_ns / 1e6,
        }
        doc["flows"]["tracked"] = sum(n.engine.flows for n in c.output.nics)
        for nic in c.output.nics:
            if nic.fast is not None:
                total = doc["offload"]["waits"]
                doc["offload"]["waits"] = [
                    a + b for a, b in zip(total, nic.fast.waits(), strict=True)
                ]
        doc["checkpoints"] |= {"total": sum(by_cause.values()), "by_cause": dict(by_cause)}
    elif isinstance(c, Secondary):
        doc["held"]["packets"] = c.held.count
        doc["flows"]["tracked"] = sum(flows.tracked for flows in c.flows)
        doc["checkpoints"]["total"] = c.checkpoints_loaded
    return doc


def take(c: Controller, history: History) -> None:
    """Append a row if it is time for one. Never fails: a plot is worth no guest."""
    now_s = time.monotonic()
    if not history.due(now_s):
        return
    try:
        history.add(reading(c), time.time(), now_s)
    except Exception as e:
        history.skip(now_s)
        log.warning("no row in the history: %s: %s", type(e).__name__, e)
