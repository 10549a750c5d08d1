# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounds of the compare engine. Times are in ns.

Every queue and table of the engine is bounded by one of these; the configuration sets them.
"""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT_QUEUE = 16  # factor on the limits below while a checkpoint is under way
NEVER = 1 << 63  # ns, on any clock


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine."""

    compare_timeout_ns: int = 3_000_000_000
    expired_scan_cycle_ns: int = 1_000_000_000  # period of the scan for idle flows
    max_queue_size: int = 1024  # packets held, per guest
    max_held_bytes: int = 64 << 20  # bytes held of the PVM; times CHECKPOINT_QUEUE in a checkpoint
    max_stream_bytes: int = 4 << 20  # how far the SVM may be ahead, per connection
    max_flows: int = 100_000
    # Released bytes kept per connection, plus a quarter of slack: what may be in flight to a client
    # (Linux: net.ipv4.tcp_rmem, 6 MiB).
    history_bytes: int = 8 << 20
    history_total: int = 64 << 20
    flow_idle_ns: int = 300_000_000_000  # a fifth of it for datagrams and closed connections
    datagram_grace_ns: int = 10_000_000
