# SPDX-License-Identifier: GPL-2.0-or-later
"""How many frames wait, of all flows that share the room for them, and how many may (I10)."""

from __future__ import annotations

_NO_LIMIT = 1 << 62


class Ledger:
    """Counts what is held of the PVM and stashed of the SVM.

    Nobody else changes these numbers, and of the PVM's only compare/held_queue.py does.
    `max_packets` is of either side, `max_bytes` of the PVM, with Ethernet headers.
    """

    __slots__ = ("_limits", "max_bytes", "max_packets", "pvm_bytes", "pvm_packets", "svm_packets")

    def __init__(self, max_packets: int, max_bytes: int) -> None:
        self._limits = max_packets, max_bytes
        self.max_packets, self.max_bytes = max_packets, max_bytes
        self.pvm_packets = self.pvm_bytes = self.svm_packets = 0

    def room(self, times: int = 1) -> bool:
        """Whether one frame more of the PVM may wait, if so many times the limits may."""
        return (
            self.pvm_packets < times * self.max_packets and self.pvm_bytes < times * self.max_bytes
        )

    def admit_svm(self) -> bool:
        """Charge one more of the SVM, if there is room for it."""
        if self.svm_packets >= self.max_packets:
            return False
        self.svm_packets += 1
        return True

    def charge_svm(self, n: int = 1) -> None:
        """Charge `n` more of the SVM, whatever the limit."""
        self.svm_packets += n

    def discharge_svm(self, n: int = 1) -> None:
        """So many of the SVM are stashed no more."""
        self.svm_packets -= n

    def raise_limits(self, packets: int) -> None:
        """Admit so many packets more, of any size: they were admitted before."""
        self.max_packets, self.max_bytes = self._limits[0] + packets, _NO_LIMIT

    def restore_limits(self) -> None:
        """End what raise_limits() has begun."""
        self.max_packets, self.max_bytes = self._limits
