# SPDX-License-Identifier: GPL-2.0-or-later
"""Answer `colo-xdp flows` on a live primary, without keeping the guests' packets waiting.

A table may have a hundred thousand flows. They are examined in short turns of the loop, for
DEADLINE_S at most, and only LIMIT of them are returned.
"""

from __future__ import annotations

import asyncio
import time
from heapq import nsmallest
from typing import Any

from ..controller.controller import Controller
from ..controller.primary import Primary
from ..engine.flow_report import SORTS, Filters, order, row

LIMIT = 1000
TURN = 64  # flows in a turn: about a millisecond with a look into the kernel for each
DEADLINE_S = 5.0


def _filters(args: dict[str, Any]) -> tuple[str, int, Filters]:
    sort, limit = args.get("sort", "bytes"), args.get("limit", 20)
    proto, port, peer = args.get("proto", ""), args.get("port", 0), args.get("peer", "")
    if sort not in SORTS:
        raise ValueError(f"flows: sort is one of {', '.join(SORTS)}")
    if type(limit) is not int or not 1 <= limit <= LIMIT:
        raise ValueError(f"flows: limit is a number from 1 to {LIMIT}")
    if not isinstance(proto, str) or type(port) is not int or not isinstance(peer, str):
        raise ValueError("flows: `proto` and `peer` are text, `port` is a number")
    return sort, limit, Filters(proto.lower(), port, peer.lower())


async def answer(c: Controller, args: dict[str, Any]) -> dict[str, Any]:
    """Return the flows that are wanted, sorted, and how many there are. Raises ValueError."""
    if not isinstance(c, Primary):
        raise ValueError("flows: ask the primary host, which does the comparing")
    sort, limit, filters = _filters(args)
    end, best, seen, matched = time.monotonic() + DEADLINE_S, list[dict[str, Any]](), 0, 0
    several, whole = len(c.output.nics) > 1, True
    for nic in c.output.nics:
        peek = None if nic.fast is None else nic.fast.peek
        for stream, flows in nic.engine.tables():
            for at in range(0, len(flows), TURN):
                now = time.monotonic_ns()
                found = (row(f, stream, now, filters, peek) for f in flows[at : at + TURN])
                rows = [r | {"nic": nic.name if several else ""} for r in found if r]
                seen, matched = seen + len(flows[at : at + TURN]), matched + len(rows)
                best = nsmallest(limit, [*best, *rows], key=order(sort))
                await asyncio.sleep(0)
                if time.monotonic() > end:
                    whole = False
                    break
    return {"flows": best, "matched": matched, "seen": seen, "whole": whole}
