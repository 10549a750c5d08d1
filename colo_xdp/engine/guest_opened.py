# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the guests open themselves, each from a port that its own kernel draws (RFC 6056).

The primary's frame has then no twin in a flow of its own, and the secondary's in another one to
the same service. Each alone could still be late, until compare_timeout; both of them say that the
guests have gone apart. A SVM that is slow has said nothing instead.
"""

from __future__ import annotations

from ..compare.compared import ComparedFlow
from ..offload.kernel_format import is_stream, known

#: how long both have to be alone: so late, and in another order, frames of one guest seldom are
ALONE_NS = 50_000_000
#: flows that are looked at; more wait for compare_timeout
MAX_OPENINGS = 256


def _service(flow: ComparedFlow) -> bytes | None:
    """The flow's key without the guest's port; None: it has none, or tags."""
    key = flow.key
    if not known(key):
        return None
    at = 3 if not is_stream(key) else 0
    at += 8 if len(key) - at == 12 else 32
    return key[:at] + key[at + 2 :]


class GuestOpened:
    """Young flows by the service that they are to."""

    def __init__(self) -> None:
        self._by: dict[bytes, dict[ComparedFlow, int]] = {}
        self._count = 0

    def note(self, flow: ComparedFlow, now_ns: int) -> None:
        """A flow that one of the guests has just opened."""
        if flow.direction != "out" or self._count >= MAX_OPENINGS:
            return
        service = _service(flow)
        if service is not None:
            self._by.setdefault(service, {})[flow] = now_ns
            self._count += 1

    def clear(self) -> None:
        """A checkpoint has made the guests equal."""
        self._by.clear()
        self._count = 0

    def apart(self, now_ns: int, timeout_ns: int) -> list[ComparedFlow]:
        """The PVM's flows that the SVM has opened from another port."""
        found = []
        for service, flows in list(self._by.items()):
            mine: list[ComparedFlow] = []
            theirs = 0
            for flow, since in list(flows.items()):
                pvm, svm = bool(flow.held), bool(flow.svm_since())
                if pvm == svm or now_ns - since > timeout_ns:
                    del flows[flow]  # both have, nothing waits any more, or it is asked for
                    self._count -= 1
                elif now_ns - since >= ALONE_NS:
                    theirs += svm
                    mine += [flow] * pvm
            if mine and theirs:
                found.append(mine[0])
                self._count -= len(flows)
                flows.clear()
            if not flows:
                del self._by[service]
        return found
