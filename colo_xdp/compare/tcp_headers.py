# SPDX-License-Identifier: GPL-2.0-or-later
"""State that a connection's SYNs negotiate and that its other segments depend on.

That is ECN's counter, and signatures, whose segments cannot be changed. The other header fields
(net/tcp_headers.py) are not compared, and leave as the PVM set them. compare/tcp.py uses this
module.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..net.packet import CWR, ECE, URG, Packet, tcp_options
from ..net.seqnum import MASK
from ..net.tcp_headers import counts_in_ace, is_atomic, is_signed, reserved, urgent_position
from .causes import Cause
from .flow import CONTEXT

#: How long a signed frame, which cannot be split, waits for the rest after part of it is verified.
#: An SVM that does not wait for acks has sent the rest by then, or has retransmitted what it has
#: (RFC 6298 section 2.4).
SIGNED_PART_NS = 200_000_000


class Marks:
    """Header state of one incarnation of a connection."""

    __slots__ = ("ace", "deaf", "signed", "unfit")

    def __init__(self) -> None:
        #: AE, CWR and ECE are AccECN's counter; None: requested, the answer is not known
        self.ace: bool | None = False
        self.signed = False  # segments are signed: they leave unchanged or not at all
        self.deaf = False  # the SVM's numbers differ, so it rejects what the client signs
        # not for the fast path, which puts headers of other segments on the payload
        self.unfit = False

    def begin(self, syn: Packet, svm_syn: Packet | None) -> None:
        """Start a new incarnation. `svm_syn`: the SVM's SYN; None if a checkpoint contains ours."""
        self.ace = counts_in_ace(syn)
        self.signed = is_signed(syn)
        self.deaf = self.signed and svm_syn is not None and svm_syn.seq != syn.seq
        self.unfit = self.signed or self.ace is True or not is_atomic(syn)


@dataclass(frozen=True, slots=True)
class SynDifference:
    """Difference between two SYNs.

    `at`: a sequence number of the PVM; None: outside the payload.
    """

    cause: Cause
    at: int | None
    svm: bytes


def syns_differ(p: Packet, svm_syn: Packet) -> SynDifference | None:
    """Compare what the guests' SYNs negotiate with the client; None if they agree."""
    # RFC 3168 section 6.1.1, RFC 9768 section 3.1: ECN is negotiated in the SYNs' flags.
    other = (svm_syn.flags ^ p.flags) & (ECE | CWR | URG) or reserved(svm_syn) != reserved(p)
    if p.flags & URG and urgent_position(p) - p.seq != urgent_position(svm_syn) - svm_syn.seq:
        other = True
    if other or tcp_options(p).negotiated() != tcp_options(svm_syn).negotiated():
        svm = svm_syn.frame[svm_syn.l4 + 12 : svm_syn.off][:CONTEXT]
        return SynDifference(Cause.SYN_OPTIONS_DIFFER, None, svm)
    mine, theirs = p.frame[p.off : p.end], svm_syn.frame[svm_syn.off : svm_syn.end]
    if mine == theirs:
        return None
    n = min(len(mine), len(theirs))  # TCP Fast Open
    i = next((i for i in range(n) if mine[i] != theirs[i]), n)
    return SynDifference(Cause.PAYLOAD_DIFFERS, (p.seq + i) & MASK, theirs[i : i + CONTEXT])
