# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices that the guests wait for each other's clients: nothing that waits will ever be matched.

Two threads of a guest want one lock (a row of a database). The PVM grants it to the first client's
and the SVM to the second client's. The PVM has answered the first client, the SVM the second, and
both wait for their client, who has got no answer. So output of the PVM waits in one connection,
output of the SVM in another, and neither guest sends anything any more. A slow guest looks the same
for a moment, so the silence must be longer than the lag with which the SVM usually answers. What a
guest repeats does not break it, nor does an ack. Other clients may still be served, for as long as
they want nothing of what is locked: there need not be a silence if both have waited for SERVED
times as long.

Only TCP counts, and only what is more than an ack: datagrams of the SVM that the PVM never sends
are usual, and acks are sent late on purpose. The SVM's kernel must have acked what the PVM's has:
otherwise it does not run, or has not got what the client sent.

While disagreement lasts (Patience.lasting) the SVM has only just got its state: it is the slower
one, and hardly ever ahead unless it decided otherwise. So its output needs to have waited for no
longer than a silence there, and that is looked for more often.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..compare.flow import Flow
from ..compare.limits import NEVER
from ..compare.patience import Patience
from ..compare.tcp import TcpFlow
from ..compare.tcp_wait import in_vain

#: where other clients are served, the waits are so many times as long as a silence
SERVED = 2
#: looks in the time of a silence while disagreement lasts; each goes through what waits
LOOKS = 3


class Silence:
    """Says when no frame of either guest has come for long enough, once each time."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._fast_ns = 0  # as of the last look: when a guest has sent something in the fast path
        self._served_ns = 0  # when to look again although the guests are not silent
        self._looked_ns = -1  # the silence (by its beginning) that due() has reported

    @property
    def _since_ns(self) -> int:
        return max(self._patience.moved_ns, self._fast_ns)

    def note(self, moved_ns: int) -> None:
        """Note when a guest last sent something new that user space does not see."""
        self._fast_ns = moved_ns

    def look_ns(self) -> int:
        """Return when due() will say so if no frame comes meanwhile; NEVER: it has."""
        since = self._since_ns
        return NEVER if since == self._looked_ns else since + self._patience.quiet_ns

    def due(self, now_ns: int) -> bool:
        """Return whether the guests are silent and that has not been reported yet."""
        due = self.look_ns() <= now_ns
        if due:
            self._looked_ns = self._since_ns
        return due

    @property
    def step_ns(self) -> int:
        """Return how long after a look the next one is due, though nothing has changed."""
        patience = self._patience
        return patience.quiet_ns // (LOOKS if patience.lasting else 1)

    def crossed_before(self, now_ns: int) -> tuple[int, int]:
        """Return since when output of the PVM, and of the SVM, must have waited to be lost.

        (0, 0): look later.
        """
        quiet = now_ns - self._patience.quiet_ns
        if self.due(now_ns):
            return quiet, quiet
        if now_ns < self._served_ns:
            return 0, 0
        self._served_ns = now_ns + self.step_ns
        served = now_ns - SERVED * self._patience.quiet_ns
        return served, quiet if self._patience.lasting else served

    @staticmethod
    def waiting(
        flows: Sequence[Flow], epoch: int, pvm_ns: int, svm_ns: int
    ) -> tuple[TcpFlow | None, bool]:
        """Return a flow in which the PVM waits, and whether the SVM is ahead in another one.

        Each since the time given for it, or longer.
        """
        pvm: TcpFlow | None = None
        svm = False
        for flow in flows:
            if not isinstance(flow, TcpFlow) or flow.epoch != epoch:
                continue
            if flow.held.frames:
                if in_vain(flow, pvm_ns):
                    pvm = flow
            elif 0 < flow.svm_since() <= svm_ns:
                svm = True
        return pvm, svm
