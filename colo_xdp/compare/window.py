# SPDX-License-Identifier: GPL-2.0-or-later
"""Limits the advertised window to what both guests offer.

Bytes that a client sends beyond the SVM's window are dropped by the SVM, while the PVM takes and
acks them; then nobody sends them again. So a frame of the PVM leaves with the smaller of the two
windows, and when the SVM's grows the client is informed by a bare ACK (RFC 9293 section 3.8.6: a
right edge never moves back). Edges are sequence numbers of the client's stream.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..net.frame import Frame
from ..net.packet import ACK, RST, SYN, Packet, tcp_options
from ..net.segment import SpareIds, bare_ack, with_window
from ..net.seqnum import HALF, MASK, diff, later

#: growth of the window, in bytes since the last frame to the client, that is worth an ACK
_UPDATE = 4 * 1448


@dataclass(frozen=True, slots=True)
class WindowState:
    """Windows as the fast path knows them: unscaled fields at the newest ack of each guest."""

    scale: int | None
    syn: int  # limit of the window field in this incarnation's SYN
    pvm: int
    svm: int
    advertised: int


class WindowGate:
    """Windows of one connection.

    If the scale is unknown (no SYN was seen, because the connection is older than the pair or than
    this controller), window fields are compared as they are. Both guests have the same scale, and a
    frame leaves only when the SVM has acked as much. So a field that is not above the SVM's
    promises no more than the SVM does; it may promise less than it could.
    """

    __slots__ = (
        "_advertised",
        "_advertised_win",
        "_edge",
        "_offer",
        "_offered",
        "_seen",
        "_shift",
        "_syn",
        "shrunk",
    )

    def __init__(self) -> None:
        self._shift: int | None = None
        self._syn = 0xFFFF  # largest window field for the SYN of this incarnation
        self._offered: int | None = None  # right edge offered by the PVM
        self._edge: int | None = None  # right edge that the SVM honours
        self._advertised: int | None = None  # right edge advertised to the client
        self.shrunk: tuple[Frame, Packet] | None = None  # the last frame, if its window was reduced
        # Without a scale: (ack, window field) that the PVM offered last and that the SVM honours;
        # and the field that was advertised.
        self._offer: tuple[int, int] | None = None
        self._seen: tuple[int, int] | None = None
        self._advertised_win = 0

    def open(self, syn: Packet, svm_syn: Packet | None) -> None:
        """Start a new incarnation of the connection.

        svm_syn: the SVM's SYN; None if a checkpoint contains ours. Windows of SYNs are not scaled
        (RFC 7323 section 2.2).
        """
        self._shift = tcp_options(syn).wscale or 0
        self._offered = self._edge = self._advertised = self.shrunk = None
        self._syn = syn.window if svm_syn is None else min(syn.window, svm_syn.window)
        if syn.flags & ACK:
            self._offered = (syn.ack + syn.window) & MASK
            self._edge = (syn.ack + self._syn) & MASK

    def new_epoch(self) -> None:
        """Begin an epoch: the SVM is a copy of a PVM that had offered this much."""
        self._edge, self._seen = self._offered, self._offer

    def commit(self, p: Packet) -> None:
        """Note the window of a frame that leaves with a checkpoint; the SVM will honour it."""
        if self._shift is None:
            self._offer = self._seen = (p.ack, p.window)
            self.shrunk = None
        elif p.flags & (ACK | SYN) == ACK:
            edge = (p.ack + (p.window << self._shift)) & MASK
            self._offered = later(self._offered, edge)
            self._edge = later(self._edge, edge)
            self._advertised = later(self._advertised, edge)
            self.shrunk = None

    def svm(self, p: Packet) -> None:
        """Note the window in a frame of the SVM that carries an ACK."""
        shift, edge = self._shift, self._edge
        if shift is not None:
            new = (p.ack + (p.window << shift)) & MASK
            if edge is None or 0 < (new - edge) & MASK < HALF:
                self._edge = new
        elif self._seen is None or diff(p.ack, self._seen[0]) >= 0:
            self._seen = (p.ack, p.window)

    def state(self, p_ack: int, s_ack: int) -> WindowState | None:
        """Return the windows for the fast path, while no frame is reduced.

        None: the PVM has not sent any window yet.
        """
        shift = self._shift
        if shift is None:
            if self._offer is None:
                return None
            svm = self._seen[1] if self._seen is not None else 0xFFFF
            return WindowState(None, self._syn, self._offer[1], svm, self._offer[1])
        if self._offered is None:
            return None

        def field(edge: int | None, ack: int) -> int:
            if edge is None:
                return 0xFFFF
            return min(0xFFFF, max(0, diff(edge, ack)) >> shift)

        pvm = field(self._offered, p_ack)
        return WindowState(shift, self._syn, pvm, field(self._edge, s_ack), pvm)

    def resume(
        self, w: WindowState, acks: tuple[int, int, int], cut: tuple[Frame, Packet] | None
    ) -> None:
        """Continue from the fast path's state.

        acks: the PVM's, the SVM's, the advertised one. cut: a bare ACK of the PVM that has not left
        with its full window.
        """
        p_ack, s_ack, adv_ack = acks
        self._shift, self._syn, self.shrunk = w.scale, w.syn, cut
        if w.scale is None:
            self._offer, self._seen, self._advertised_win = (
                (p_ack, w.pvm),
                (s_ack, w.svm),
                w.advertised,
            )
            return
        self._offered = (p_ack + (w.pvm << w.scale)) & MASK
        self._edge = (s_ack + (w.svm << w.scale)) & MASK
        self._advertised = (adv_ack + (w.advertised << w.scale)) & MASK

    def limit(self, rec: Frame, p: Packet, spare: SpareIds) -> tuple[Frame, bool]:
        """Return the frame, which is about to leave, and whether its window had to be reduced."""
        shift = self._shift
        if shift is None or p.flags & (ACK | SYN | RST) != ACK:
            if p.flags & SYN and p.window > self._syn:
                return with_window(rec, p, self._syn, spare), True
            if shift is None and p.flags & (ACK | SYN | RST) == ACK:
                return self._limit_unscaled(rec, p, spare)
            return rec, False
        offered = (p.ack + (p.window << shift)) & MASK
        last = self._offered
        if last is None or 0 < (offered - last) & MASK < HALF:
            self._offered = offered
        self.shrunk = None
        edge, cut = self._edge, False
        if edge is not None and (over := diff(offered, edge)) > 0:
            allowed = max(0, diff(edge, p.ack)) >> shift
            if allowed < p.window:
                self.shrunk = (rec, p)
                rec, cut = with_window(rec, p, allowed, spare), True
                offered = (offered - over) & MASK
        last = self._advertised
        if last is None or 0 < (offered - last) & MASK < HALF:
            self._advertised = offered
        return rec, cut

    def _limit_unscaled(self, rec: Frame, p: Packet, spare: SpareIds) -> tuple[Frame, bool]:
        self.shrunk = None
        self._offer, self._advertised_win = (p.ack, p.window), p.window
        seen = self._seen
        if seen is None or diff(seen[0], p.ack) < 0 or p.window <= seen[1]:
            return rec, False
        self.shrunk, self._advertised_win = (rec, p), seen[1]
        return with_window(rec, p, seen[1], spare), True

    def _update_unscaled(self, base: int | None, spare: SpareIds, ace: bool | None) -> Frame | None:
        if self.shrunk is None or self._seen is None:
            return None
        rec, p = self.shrunk
        value = min(p.window, self._seen[1])
        if value < 2 * self._advertised_win + 1 and (
            value < p.window or value == self._advertised_win
        ):
            return None
        self._advertised_win = value
        if value == p.window:
            self.shrunk = None
        return bare_ack(rec, p, p.seq if base is None else base, value, spare, ace)

    def update(self, base: int | None, spare: SpareIds, ace: bool | None) -> Frame | None:
        """Return a bare ACK at sequence number `base` if the client should learn of more room.

        spare, ace: see net/segment.py.
        """
        if self._shift is None:
            return self._update_unscaled(base, spare, ace)
        if self.shrunk is None or self._edge is None or self._advertised is None:
            return None
        rec, p = self.shrunk
        assert self._shift is not None
        advertised = diff(self._advertised, p.ack)
        if diff(self._edge, self._advertised) < (_UPDATE if advertised > _UPDATE else 1448):
            return None
        value = min(p.window, diff(self._edge, p.ack) >> self._shift)
        self._advertised = (p.ack + (value << self._shift)) & MASK
        if value == p.window:
            self.shrunk = None
        return bare_ack(rec, p, p.seq if base is None else base, value, spare, ace)
