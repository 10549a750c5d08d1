# SPDX-License-Identifier: GPL-2.0-or-later
"""A captured frame, as the engine takes and releases it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Record:
    """One frame as the data path handed it over."""

    frame: bytes  # Ethernet, guest VLAN tag in place
    ts_ns: int  # CLOCK_MONOTONIC of the capture
    gso_size: int = 0
    partial: bool = False  # checksum is CHECKSUM_PARTIAL (pseudo header only)
