# SPDX-License-Identifier: GPL-2.0-or-later
"""Judges, after each checkpoint, whether the SVM is still worth being called a copy. Pure.

A checkpoint makes the SVM equal to the PVM, whatever had become of it: one that has panicked runs
again. So a single difference says nothing. An SVM is no copy if it goes wrong again after each of
several checkpoints in a row: it panics or is reset, it sends nothing though clients' frames reach
it, or nothing of what it sends agrees with the PVM. Each such checkpoint has cost clients a wait,
and a takeover would give them a guest that answers nothing.

What does not count: guests that disagree (random output, a lock granted in another order), and
output that only one of them has (a guest's own queries). There the SVM's kernel acks all the same
what clients send: it is not silent, and where nothing agrees, only output that acks what the SVM
has not acked counts against it. Nor does a peer link count that brings nothing of a guest which
does transmit on its host: each checkpoint makes that one a copy (device_watch.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ..compare.causes import MISSED, NEUTRAL

#: checkpoints in a row after each of which the SVM sent nothing, or was reset or had panicked
SILENT, RESETS = 3, 3
#: the same for an SVM whose frames arrive and never match
DISAGREES = 8


class Traffic(NamedTuple):
    """Frames at the SVM's taps since the data path began, as the secondary reports them."""

    delivered: int  # clients' frames that came for it
    sent: int  # frames of its own


NO_TRAFFIC = Traffic(0, 0)


class CopyHealth:
    """Follows one copy, from its first checkpoint on.

    on_agreed() is called once for each copy, when output of the two has matched.
    """

    def __init__(self, on_agreed: Callable[[], None] = lambda: None) -> None:
        self._on_agreed = on_agreed
        self.new_copy(0)

    def new_copy(self, agreed: int) -> None:
        """Begin with another SVM. `agreed`: as for checkpointed()."""
        self._agreed, self._proven = agreed, False
        self._missed = self._silent = self._resets = 0
        self._reset = False  # since the last checkpoint
        self._base = NO_TRAFFIC  # when the SVM was last known to have sent something
        self._arrived = 0

    def svm_changed(self) -> None:
        """Note that the SVM was reset or has panicked; a checkpoint follows."""
        self._reset = True

    def checkpointed(
        self, cause: str, *, deaf: bool, agreed: int, arrived: int, traffic: Traffic
    ) -> str:
        """Judge after a checkpoint; return why the SVM is no copy, or an empty string.

        deaf: what waited acks what the SVM has not acked. agreed: frames released by comparison so
        far. arrived: frames of the SVM that came over the peer link so far. traffic: what the
        secondary reported last.
        """
        matched, self._agreed = agreed > self._agreed, agreed
        if matched and not self._proven:
            self._proven = True
            self._on_agreed()
        if self._reset:
            self._reset = False
            self._resets += 1
        elif cause not in NEUTRAL:
            self._resets = 0
        if self._resets >= RESETS:
            return (
                f"the SVM was reset, has panicked or was stopped before each of the last "
                f"{self._resets} checkpoints: it is no copy"
            )
        if matched or (cause not in MISSED and cause not in NEUTRAL):
            self._missed = self._silent = 0
            return ""
        if cause not in MISSED:
            return ""
        return self._silence(traffic) or (self._disagreement(arrived) if deaf else "")

    def _silence(self, traffic: Traffic) -> str:
        """Count a checkpoint for missed output if the SVM has sent nothing since the last one."""
        base = self._base
        if not self._silent or traffic.sent != base.sent or traffic.delivered < base.delivered:
            # A report may be older than the silence; and the counters begin anew with its host.
            self._base, self._silent = traffic, 0
        self._silent += 1
        delivered = traffic.delivered - self._base.delivered
        if self._silent < SILENT or not delivered:
            return ""
        return (
            f"the SVM has sent nothing over {self._silent} checkpoints, though {delivered} "
            "frames were delivered to it: it is no copy"
        )

    def _disagreement(self, arrived: int) -> str:
        """Count a checkpoint for output that acks what the SVM has not acked."""
        self._missed += 1
        if self._missed == 1:
            self._arrived = arrived
        if self._missed < DISAGREES or arrived == self._arrived:
            return ""
        return (
            f"nothing that the SVM has sent over {self._missed} checkpoints agrees with the "
            "PVM: it is no copy"
        )
