# SPDX-License-Identifier: GPL-2.0-or-later
"""Makes the evidence of a difference in a TCP stream, for operators (`colo-xdp explain`)."""

from __future__ import annotations

from ..net.frame import Evidence, Frame
from ..net.packet import Packet
from ..net.seqnum import MASK, diff
from .flow import BEFORE, CONTEXT


def of_segment(
    p: Packet, rec: Frame | None, origin: int, at: int | None, svm: bytes, svm_frame: bytes
) -> Evidence:
    """Return what differs in a segment of the PVM.

    origin: number of the stream's first byte; at: number of the first differing byte, None: none of
    the payload; svm: the SVM's bytes from there on; rec: the segment as it was captured, if it is
    known.
    """
    o = p.off + (0 if at is None else max(0, diff(at, p.seq)))
    before = p.frame[max(p.off, o - BEFORE) : o]
    return Evidence(
        ((p.seq if at is None else at) - origin) & MASK,
        len(before),
        p.frame[o - len(before) : min(o + CONTEXT, p.end)],
        before + svm,
        rec if rec is not None else Frame(p.frame, 0),
        svm_frame,
    )
