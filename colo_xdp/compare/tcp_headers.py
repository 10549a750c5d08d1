# SPDX-License-Identifier: GPL-2.0-or-later
"""What a connection's SYNs have agreed upon that its other segments depend on: ECN's counter, and
signatures, whose segments cannot be changed. What else the headers have (net/tcp_headers.py) is not
compared, and kept as the PVM made it."""

from __future__ import annotations

from dataclasses import dataclass

from ..net.packet import CWR, ECE, URG, Packet, tcp_options
from ..net.seqnum import MASK
from ..net.tcp_headers import counts_in_ace, is_atomic, is_signed, reserved, urgent_position
from .causes import Cause
from .flow import CONTEXT

#: how long a signed frame of which a part is verified, and which cannot be cut, waits for the rest:
#: a SVM that does not wait for acks has sent it by then, or sent again what it has (RFC 6298 2.4)
SIGNED_PART_NS = 200_000_000


class Marks:
    """Of one incarnation of a connection."""

    __slots__ = ("ace", "deaf", "signed", "unfit")

    def __init__(self) -> None:
        #: AE, CWR and ECE are AccECN's counter; None: that was asked for, the answer is not known
        self.ace: bool | None = False
        self.signed = False  # its segments are: they leave as they are, or not at all
        self.deaf = False  # the SVM's numbers are others: it cannot take what the client signs
        self.unfit = False  # not for the fast path, whose headers are of other segments than theirs

    def begin(self, syn: Packet, svm_syn: Packet | None) -> None:
        """A new incarnation. `twin`: the SVM's SYN, None if a checkpoint contains ours."""
        self.ace = counts_in_ace(syn)
        self.signed = is_signed(syn)
        self.deaf = self.signed and svm_syn is not None and svm_syn.seq != syn.seq
        self.unfit = self.signed or self.ace is True or not is_atomic(syn)


@dataclass(frozen=True, slots=True)
class SynDifference:
    """How two SYNs differ; at: in the numbers of the PVM's, None: not in the payload."""

    cause: Cause
    at: int | None
    svm: bytes


def syns_differ(p: Packet, svm_syn: Packet) -> SynDifference | None:
    """Compare what the guests' SYNs agree upon with the client."""
    # RFC 3168 6.1.1, RFC 9768 3.1: ECN is negotiated in the SYNs' flags.
    other = (svm_syn.flags ^ p.flags) & (ECE | CWR | URG) or reserved(svm_syn) != reserved(p)
    if p.flags & URG and urgent_position(p) - p.seq != urgent_position(svm_syn) - svm_syn.seq:
        other = True
    if other or tcp_options(p).negotiated() != tcp_options(svm_syn).negotiated():
        svm = svm_syn.frame[svm_syn.l4 + 12 : svm_syn.off][:CONTEXT]
        return SynDifference(Cause.SYN_OPTIONS_DIFFER, None, svm)
    mine, theirs = p.frame[p.off : p.end], svm_syn.frame[svm_syn.off : svm_syn.end]
    if mine == theirs:
        return None
    n = min(len(mine), len(theirs))  # TCP fast open
    i = next((i for i in range(n) if mine[i] != theirs[i]), n)
    return SynDifference(Cause.PAYLOAD_DIFFERS, (p.seq + i) & MASK, theirs[i : i + CONTEXT])
