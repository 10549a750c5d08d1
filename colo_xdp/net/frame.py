# SPDX-License-Identifier: GPL-2.0-or-later
"""A captured frame, as the engine takes and releases it, and what proves a difference."""

from __future__ import annotations

from dataclasses import dataclass

from ..abi import Gso


@dataclass(slots=True)
class Frame:
    """One frame as the data path handed it over."""

    frame: bytes  # Ethernet, guest VLAN tag in place
    ts_ns: int  # CLOCK_MONOTONIC of the capture
    gso_size: int = 0
    partial: bool = False  # TCP's or UDP's checksum is CHECKSUM_PARTIAL (pseudo header only)
    sent: bool = False  # left at once (shadow, mirror-only): only compared, never released again
    punt_seq: int = 0  # by the fast path, as in Event
    parts: tuple[Frame, ...] = ()  # `frame` was put together from these, which leave instead
    gso_type: int = 0  # struct virtio_net_hdr's, if it is known

    @property
    def datagram_size(self) -> int:
        """Payload of each of the datagrams that a UDP frame stands for, in bytes; 0: it is one,
        also if that is to be fragmented (UFO)."""
        return 0 if self.gso_type == Gso.UDP else self.gso_size


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where and how the guests differ. pvm[i] and svm[i] are of the same place in the stream
    (datagram: body); both are equal before `at`."""

    offset: int = 0  # of the first differing byte in the stream (modulo 2**32) or body
    at: int = 0  # its index in `pvm` and `svm`
    pvm: bytes = b""
    svm: bytes = b""
    pvm_frame: Frame | None = None
    svm_frame: bytes = b""


NO_EVIDENCE = Evidence()
