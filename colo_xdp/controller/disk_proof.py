# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the disks of the secondary's host are of the checkpoint that the SVM runs. Pure.

QEMU empties the SVM's overlays whenever it loads a checkpoint, whatever has become of the mirrors
of the PVM's disks. Only the primary knows that they were whole up to its STOP, and says so
(`disks_whole`). An SVM that has loaded a checkpoint without that message has new memory over disks
that may be old, and cannot go back: until the message comes it must not take over by itself.
"""

from __future__ import annotations


class DiskProof:
    """Which checkpoint the SVM runs, and for which its disks are vouched for."""

    def __init__(self, runs: int = 0, whole: int = 0) -> None:
        self._runs, self._whole = runs, whole

    def begin(self, n: int) -> None:
        """Note that a checkpoint to epoch n begins; what was said of an earlier try is void."""
        self._whole = min(self._whole, n - 1)

    def loaded(self, n: int) -> None:
        """Note that the SVM runs the state of checkpoint n."""
        self._runs = max(self._runs, n)

    def whole(self, n: int) -> None:
        """Note that the PVM's disks were whole on this host at its STOP for checkpoint n."""
        self._whole = max(self._whole, n)

    def said(self, n: int) -> bool:
        """Return whether that was said of checkpoint n."""
        return self._whole >= n

    @property
    def runs(self) -> int:
        """Return the last checkpoint that the SVM is known to run."""
        return self._runs

    @property
    def missing(self) -> bool:
        """Whether the disks may lack what was written before the state that the SVM runs."""
        return self._runs > self._whole
