# SPDX-License-Identifier: GPL-2.0-or-later
"""A captured frame, as the engine takes and releases it, and what proves a difference."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Record:
    """One frame as the data path handed it over."""

    frame: bytes  # Ethernet, guest VLAN tag in place
    ts_ns: int  # CLOCK_MONOTONIC of the capture
    gso_size: int = 0
    partial: bool = False  # checksum is CHECKSUM_PARTIAL (pseudo header only)
    sent: bool = False  # left at once (shadow, mirror-only): only compared, never released again
    captured: int = 0  # by tier K, as in Event
    parts: tuple[Record, ...] = ()  # `frame` was put together from these, which leave instead


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where and how the guests differ. pvm[i] and svm[i] are of the same place in the stream
    (datagram: body); both are equal before `at`."""

    offset: int = 0  # of the first differing byte in the stream (modulo 2**32) or body
    at: int = 0  # its index in `pvm` and `svm`
    pvm: bytes = b""
    svm: bytes = b""
    pvm_frame: Record | None = None
    svm_frame: bytes = b""


NO_EVIDENCE = Evidence()
