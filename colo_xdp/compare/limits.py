# SPDX-License-Identifier: GPL-2.0-or-later
"""Bounds of the compare engine (I10). Times in ns."""

from __future__ import annotations

from dataclasses import dataclass

CHECKPOINT_QUEUE = 16  # times the limits below may wait for a checkpoint
NEVER = 1 << 63  # ns, of any clock


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one engine (I10)."""

    compare_timeout_ns: int = 3_000_000_000
    expired_scan_cycle_ns: int = 1_000_000_000  # period of the ageing of flows
    max_queue_size: int = 1024  # packets held, per side
    max_held_bytes: int = 64 << 20  # of the PVM; CHECKPOINT_QUEUE times that in a checkpoint
    max_stream_bytes: int = 4 << 20  # the SVM's bytes ahead, per connection
    max_flows: int = 100_000
    # released bytes kept per connection, plus a quarter of slack: what may be in flight to a client
    # (Linux: net.ipv4.tcp_rmem, 6 MiB)
    history_bytes: int = 8 << 20
    history_total: int = 64 << 20
    flow_idle_ns: int = 300_000_000_000  # a fifth of it for datagrams and closed connections
    datagram_grace_ns: int = 10_000_000
