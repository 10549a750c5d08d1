# SPDX-License-Identifier: GPL-2.0-or-later
"""A captured frame, as the engine receives and releases it, and evidence of a difference."""

from __future__ import annotations

from dataclasses import dataclass

from ..abi import Gso


@dataclass(slots=True)
class Frame:
    """One frame as the data path captured it."""

    frame: bytes  # Ethernet, guest VLAN tag in place
    ts_ns: int  # CLOCK_MONOTONIC of the capture
    gso_size: int = 0
    partial: bool = False  # TCP's or UDP's checksum is CHECKSUM_PARTIAL (pseudo header only)
    sent: bool = False  # left at once (shadow, mirror-only): only compared, never released again
    punt_seq: int = 0  # number given by the fast path, as in CapturedFrame
    # fragments from which `frame` was assembled; they leave instead of it
    parts: tuple[Frame, ...] = ()
    gso_type: int = 0  # as in struct virtio_net_hdr, if known

    @property
    def datagram_size(self) -> int:
        """Return the payload size, in bytes, of each datagram that a UDP frame stands for.

        0: the frame is one datagram, possibly to be fragmented (UFO).
        """
        return 0 if self.gso_type == Gso.UDP else self.gso_size


@dataclass(frozen=True, slots=True)
class Evidence:
    """Where and how the guests differ.

    pvm[i] and svm[i] are at the same position of the stream (for a datagram: of the body). Both are
    equal before `at`.
    """

    offset: int = 0  # of the first differing byte in the stream (modulo 2**32) or body
    at: int = 0  # index of that byte in `pvm` and `svm`
    pvm: bytes = b""
    svm: bytes = b""
    pvm_frame: Frame | None = None
    svm_frame: bytes = b""


NO_EVIDENCE = Evidence()
