# SPDX-License-Identifier: GPL-2.0-or-later
"""Notices that the guests wait for each other's clients: nothing that waits will ever be matched.

Two threads of a guest want one lock (a row of a database). The PVM grants it to the first client's
and the SVM to the second client's. The PVM has answered the first client, the SVM the second, and
both wait for their client, who has got no answer. So output of the PVM waits in one connection,
output of the SVM in another, and neither guest sends anything any more. A slow guest looks the same
for a moment, so the silence must be longer than the lag with which the SVM usually answers.

Only TCP counts, and only what is more than an ack: datagrams of the SVM that the PVM never sends
are usual, and acks are sent late on purpose. The SVM's kernel must have acked what the PVM's has:
otherwise it does not run, or has not got what the client sent.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..compare.flow import Flow
from ..compare.patience import Patience
from ..compare.tcp import TcpFlow


class Silence:
    """Says when no frame of either guest has come for long enough, once each time."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self._looked_ns = -1  # the silence (by its beginning) that has been looked at
        self._decided = -1  # frames of the fast path, when it was last asked
        self._again_ns = 0  # it had decided some since: the silence began later

    def look_ns(self) -> int:
        """Return when due() will say so if no frame comes meanwhile."""
        moved = self._patience.moved_ns
        since = max(moved, self._again_ns) if moved == self._looked_ns else moved
        return since + self._patience.quiet_ns

    def due(self, now_ns: int) -> bool:
        """Return whether the guests are silent and that has not been looked at yet."""
        moved = self._patience.moved_ns
        if now_ns - moved < self._patience.quiet_ns:
            return False
        if moved == self._looked_ns and now_ns < self._again_ns + self._patience.quiet_ns:
            return False
        self._looked_ns, self._again_ns = moved, now_ns
        return True

    def undisturbed(self, decided: int, now_ns: int) -> bool:
        """Return whether the fast path, too, has decided nothing since the last look.

        The first look only takes the count.
        """
        same, self._decided, self._again_ns = decided == self._decided, decided, now_ns
        return same

    @staticmethod
    def waiting(flows: Sequence[Flow], epoch: int, before_ns: int) -> tuple[TcpFlow | None, bool]:
        """Return a flow in which the PVM waits, and whether the SVM is ahead in another one."""
        pvm: TcpFlow | None = None
        svm = False
        for flow in flows:
            if not isinstance(flow, TcpFlow) or flow.epoch != epoch:
                continue
            if flow.held.frames:
                if flow.waits_in_vain(before_ns):
                    pvm = flow
            elif 0 < flow.svm_since() <= before_ns:
                svm = True
        return pvm, svm
