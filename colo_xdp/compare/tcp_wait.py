# SPDX-License-Identifier: GPL-2.0-or-later
"""How long the output of a TCP connection may wait, and which checkpoint is requested after that.

The head of the held frames waits for the SVM's counterpart, and output of the SVM waits for the
PVM's. Both may just be late, so time decides: patience (compare/patience.py), which is long where
waiting may help. What waits is never released because of time.

compare/tcp.py asks when a timer has run out, and for frames that are held. Times are
CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from typing import Protocol

from ..net.packet import FIN, RST, SYN, Packet
from ..net.seqnum import MASK
from .causes import Cause
from .flow import FlowContext
from .held_queue import HeldQueue
from .limits import NEVER
from .tcp_headers import SIGNED_PART_NS, Marks

FLAGS = FIN | SYN | RST


class Waiting(Protocol):
    """A connection, as far as its waiting is concerned."""

    host: FlowContext
    held: HeldQueue
    marks: Marks
    head_ok: int | None
    unverifiable: bool
    asked: bool

    def svm_since(self) -> int:
        """Return the arrival (ns) of the SVM's oldest unmatched output; 0 if none."""
        ...

    def svm_hole(self) -> int:
        """Return the arrival (ns) of the SVM's output beyond a hole that the head waits for; 0: no
        such hole."""
        ...

    def acked(self, p: Packet) -> bool:
        """Return whether the SVM, or a released frame, has acked as much."""
        ...

    def reset_ns(self, p: Packet) -> int:
        """Return when the SVM has reset the connection where `p` is the PVM's FIN; 0: not so."""
        ...

    def ask(self, cause: Cause, p: Packet | None = None) -> None:
        """Request a checkpoint, once per epoch."""


def due_ns(flow: Waiting, p: Packet, at_ns: int) -> int:
    """Return until when a head may wait that has waited since at_ns.

    A RST needs no longer than the SVM usually takes if the SVM has output that the PVM, which has
    reset, will never produce; nor does a FIN where the SVM has reset, until the PVM does, too.
    """
    patience = flow.host.patience
    reset = flow.reset_ns(p)
    if reset:
        return min(at_ns + patience.ns, max(at_ns, reset) + patience.quiet_ns)
    if not patience.adaptive:
        return at_ns + patience.ns
    if p.flags & RST:
        return patience.due_ns(at_ns, patience.quiet_ns if flow.svm_since() else 0)
    due = patience.due_ns(at_ns)
    return due if flow.acked(p) else max(due, at_ns + patience.stalled_ns)


def overdue(flow: Waiting, now_ns: int) -> int:
    """Request a checkpoint if the head or the SVM's surplus is overdue.

    Returns the next deadline, 0 for none.
    """
    t = flow.host.timeout_ns
    frames = flow.held.frames
    ahead = flow.svm_since()
    if not frames and not ahead:
        return 0
    head_due = due_ns(flow, frames[0][1], frames[0][2]) if frames else NEVER
    ahead_due = ahead + t if ahead else NEVER
    hole_due = _hole_due(flow)
    due = min(head_due, ahead_due, hole_due)
    if flow.marks.signed and frames and not flow.asked:
        due = min(due, _signed_due(flow, now_ns))
    if due > now_ns:
        return flow.host.patience.look_ns(due, now_ns)
    if not flow.asked:
        if hole_due == due:
            flow.ask(Cause.FRAME_LOST, frames[0][1])
        elif head_due <= ahead_due:
            p = frames[0][1]
            cause = Cause.COMPARE_TIMEOUT
            if flow.unverifiable:
                cause = Cause.RETRANSMIT_UNVERIFIABLE
            elif p.flags & RST or flow.reset_ns(p):
                cause = Cause.RST_ONE_SIDED
            flow.ask(cause, p)
        else:
            flow.ask(Cause.SVM_AHEAD)
    return now_ns + t  # keep the timer


def _hole_due(flow: Waiting) -> int:
    """Return when a hole in the SVM's stream counts as a frame that was lost between the hosts.

    The peer link keeps the order of a connection, so what is missing behind it does not come any
    more, until the SVM repeats it. It has no acks for it, so that takes an RTO or more.
    """
    patience, since = flow.host.patience, flow.svm_hole()
    return since + patience.quiet_ns if since and patience.adaptive else NEVER


def _signed_due(flow: Waiting, now_ns: int) -> int:
    """Return when a partly verified head that cannot be split has waited long enough."""
    v, (_, p, at) = flow.head_ok, flow.held[0]
    if v is None or not 0 < (v - p.seq) & MASK < p.end - p.off:
        return NEVER
    if at + SIGNED_PART_NS <= now_ns:
        flow.ask(Cause.SIGNED_CONNECTION, p)
    return at + SIGNED_PART_NS


def in_vain(flow: Waiting, before_ns: int) -> bool:
    """Return whether the head has waited in vain since before_ns, for more than an ack.

    The SVM runs, and has got what the PVM has got.
    """
    if not flow.held.frames:
        return False
    _, p, since = flow.held.frames[0]
    payload = p.off != p.end or p.flags & FLAGS
    return bool(payload) and since <= before_ns and flow.acked(p)


def repeats(flow: Waiting, p: Packet, now_ns: int) -> bool:
    """Return whether the PVM misses an answer, as `p` repeats what the head carries.

    A guest may do that within milliseconds (RFC 8985). So it counts only if the head has waited for
    twice as long as the SVM usually takes.
    """
    patience, (_, first, since) = flow.host.patience, flow.held[0]
    return (
        patience.adaptive
        and bool(p.off != p.end or p.flags & FLAGS)
        and not (p.flags ^ first.flags) & FLAGS
        and now_ns >= patience.due_ns(since, patience.repeat_ns)
        and flow.acked(first)
    )
