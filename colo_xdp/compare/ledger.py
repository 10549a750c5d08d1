# SPDX-License-Identifier: GPL-2.0-or-later
"""Counts of the frames that wait, over all flows that share a limit."""

from __future__ import annotations

_NO_LIMIT = 1 << 62


class Ledger:
    """Counts frames held of the PVM and buffered frames of the SVM.

    Only this class changes the numbers, and compare/held_queue.py those of the PVM. `max_packets`
    applies to each guest, `max_bytes` to the PVM, including Ethernet headers.
    """

    __slots__ = ("_limits", "max_bytes", "max_packets", "pvm_bytes", "pvm_packets", "svm_packets")

    def __init__(self, max_packets: int, max_bytes: int) -> None:
        self._limits = max_packets, max_bytes
        self.max_packets, self.max_bytes = max_packets, max_bytes
        self.pvm_packets = self.pvm_bytes = self.svm_packets = 0

    def room(self, times: int = 1) -> bool:
        """Return whether one more frame of the PVM fits into `times` the limits."""
        return (
            self.pvm_packets < times * self.max_packets and self.pvm_bytes < times * self.max_bytes
        )

    def admit_svm(self) -> bool:
        """Charge one frame of the SVM if there is room; return whether there was."""
        if self.svm_packets >= self.max_packets:
            return False
        self.svm_packets += 1
        return True

    def charge_svm(self, n: int = 1) -> None:
        """Charge `n` frames of the SVM regardless of the limit."""
        self.svm_packets += n

    def discharge_svm(self, n: int = 1) -> None:
        """Release the charge for `n` frames of the SVM."""
        self.svm_packets -= n

    def raise_limits(self, packets: int) -> None:
        """Admit `packets` more packets of any size, which were admitted once before."""
        self.max_packets, self.max_bytes = self._limits[0] + packets, _NO_LIMIT

    def restore_limits(self) -> None:
        """Undo raise_limits()."""
        self.max_packets, self.max_bytes = self._limits
