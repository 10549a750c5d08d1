# SPDX-License-Identifier: GPL-2.0-or-later
"""One row about each flow of an engine, for `colo-xdp flows`. Pure. Reading reclaims nothing.

Times are ns (CLOCK_MONOTONIC).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..compare.bypass import MonitoredFlow
from ..compare.compared import ComparedFlow
from ..compare.flow import Comparer
from ..compare.tcp import TcpFlow
from ..net.flow_key import (
    FlowKey,
    datagram_name,
    describe_datagram,
    describe_tcp,
    tcp_port,
)
from ..net.seqnum import MASK
from ..offload.kernel_format import KernelView, is_stream, known
from ..offload.offloaded import OffloadedFlow

SORTS = ("bytes", "wait", "idle")
PATHS = ("kernel", "controller", "watched", "uncompared")


@dataclass(frozen=True, slots=True)
class Filters:
    """Which flows are wanted; empty or 0: any."""

    proto: str = ""
    port: int = 0
    peer: str = ""


def _peer(text: str) -> str:
    """Return the other end's address in a flow's text."""
    end = text.partition(" > ")[2].split(" ")[0]
    if end.startswith("["):
        return end[1:].partition("]")[0]
    return end.rpartition(":")[0] if end.count(":") == 1 else end


def row(
    flow: Comparer,
    stream: bool,
    now_ns: int,
    filters: Filters,
    peek: Callable[[FlowKey], KernelView | None] | None,
) -> dict[str, Any] | None:
    """Return what is known of one flow; None: it is not wanted. `stream`: it is TCP."""
    key = flow.key
    proto, port = ("tcp", tcp_port(key)) if stream else datagram_name(key)
    if filters.proto not in ("", proto) or filters.port not in (0, port):
        return None
    text = describe_tcp(key) if stream else describe_datagram(key)
    if filters.peer and filters.peer != _peer(text):
        return None
    inner = _inner(flow)
    held = inner.held if inner is not None and not isinstance(flow, OffloadedFlow) else ()
    since, last, sent = (inner.head_ns() if held and inner is not None else 0), flow.last, None
    if inner is not None:
        sent = inner.codec.bytes_sent(inner)
    path = "controller" if inner is not None else "uncompared"
    if isinstance(flow, MonitoredFlow):
        path, since = "watched", 0
    elif isinstance(flow, OffloadedFlow):
        path = "kernel"
        view = peek(key) if peek is not None and known(key) else None
        sent = None if not is_stream(key) else sent
        if view is not None:
            since, last = view.since_ns, max(last, view.seen_ns)
            if isinstance(inner, TcpFlow):
                sent = (view.released - inner.sent.origin) & MASK
    return {
        "flow": text,
        "proto": proto,
        "port": port,
        "rule": flow.verdict.rule,
        "path": path,
        "direction": flow.direction,
        "bytes": sent,
        "held": 0 if path == "watched" else sum(1 for _ in held),
        "wait_ms": max(0, now_ns - since) / 1e6 if since else 0.0,
        "idle_ms": max(0, now_ns - last) / 1e6 if last else 0.0,
    }


def _inner(flow: Comparer) -> ComparedFlow | None:
    if isinstance(flow, OffloadedFlow):
        return flow.flow
    if isinstance(flow, MonitoredFlow):
        return flow.inner
    return flow if isinstance(flow, ComparedFlow) else None


def order(sort: str) -> Callable[[dict[str, Any]], float]:
    """Return the key by which the first row is the most interesting one."""
    name = {"bytes": "bytes", "wait": "wait_ms", "idle": "idle_ms"}[sort]

    def key(r: dict[str, Any]) -> float:
        value = r[name]
        return 1.0 if value is None else -value

    return key
