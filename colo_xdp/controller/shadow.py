# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadow mode on the primary: nothing is held, so clients may know more than the SVM does.

The same holds, unasked, while the PVM's frames may pass uncompared because a program is missing
(`exposed`). Either ends with a checkpoint whose STOP comes after the cause has ended: only then
does the SVM contain everything that clients know.
"""

from __future__ import annotations

import time

from .pair_view import PairView
from .pvm_output import PvmOutput


class ShadowMode:
    """Whether, and until when, clients may know what the SVM does not."""

    def __init__(self, view: PairView, output: PvmOutput) -> None:
        self._view, self._output = view, output
        self.leaving = False  # over with the next checkpoint that stops later than `_since_ns`
        self.exposed = False
        self._since_ns = 0

    def begin(self) -> None:
        """Begin by order. The engine follows once the secondary has confirmed it (confirmed()):
        it would otherwise take over from what clients know more than it does."""
        self.leaving = False
        self._view.set_shadow(True)

    def confirmed(self) -> None:
        """Hold nothing from now on: the secondary knows."""
        waits = self._view.shadow and not self.leaving and not self._output.shadow
        if waits and not self.exposed:
            self._output.set_shadow(True, time.monotonic_ns())

    def leave(self) -> None:
        """End by order: hold everything, and wait for the checkpoint that ends it."""
        self.leaving = True
        self._since_ns = time.monotonic_ns()
        self._output.set_shadow(False, time.monotonic_ns())

    def expose(self, *, still: bool) -> bool:
        """Note that frames of the PVM may have left uncompared; `still`: they still may.

        Returns whether that is news.
        """
        if self._view.shadow and not self.leaving and not self.exposed:
            return False  # shadow mode as ordered says the same
        self._view.set_shadow(True)
        self.exposed, self.leaving = still, not still
        self._since_ns = time.monotonic_ns()
        return True

    def committed(self, stop_ns: int) -> bool:
        """Account for a checkpoint that stopped the PVM then (monotonic, ns).

        Returns whether another one is needed to end the shadow.
        """
        if not self.leaving:
            return False
        if self._since_ns > stop_ns:
            return True
        self.leaving = self.exposed = False
        self._view.set_shadow(False)
        return False
