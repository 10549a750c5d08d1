# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows that the guests open themselves, each from a port that its own kernel chooses (RFC 6056).

If the ports differ, the primary's frame has no counterpart in its flow, and the secondary's is in
another flow to the same service. Each of them alone could just be late, until compare_timeout. Both
together mean that the guests have diverged; an SVM that is merely slow would have sent nothing.
FlowTable notes the flows, the engine's tick checks them.
"""

from __future__ import annotations

from ..compare.compared import ComparedFlow
from ..offload.kernel_format import is_stream, known

#: How long (ns) both must be alone: frames of one guest are rarely so late and out of order.
ALONE_NS = 50_000_000
#: flows that are examined; further ones wait for compare_timeout
MAX_OPENINGS = 256


def _service(flow: ComparedFlow) -> bytes | None:
    """Return the flow's key without the guest's port; None: it has no port, or has tags."""
    key = flow.key
    if not known(key):
        return None
    at = 3 if not is_stream(key) else 0
    at += 8 if len(key) - at == 12 else 32
    return key[:at] + key[at + 2 :]


class GuestOpened:
    """Young flows by the service that they go to."""

    def __init__(self) -> None:
        self._by: dict[bytes, dict[ComparedFlow, int]] = {}
        self._count = 0

    def note(self, flow: ComparedFlow, now_ns: int) -> None:
        """Note a flow that one of the guests has just opened."""
        if flow.direction != "out" or self._count >= MAX_OPENINGS:
            return
        service = _service(flow)
        if service is not None:
            self._by.setdefault(service, {})[flow] = now_ns
            self._count += 1

    @property
    def any(self) -> bool:
        """Whether there are young flows to examine."""
        return bool(self._by)

    def clear(self) -> None:
        """Forget all flows: a checkpoint has made the guests equal."""
        self._by.clear()
        self._count = 0

    def apart(self, now_ns: int, timeout_ns: int) -> list[ComparedFlow]:
        """Return flows of the PVM that the SVM has opened from another port."""
        found = []
        for service, flows in list(self._by.items()):
            mine: list[ComparedFlow] = []
            theirs = 0
            for flow, since in list(flows.items()):
                pvm, svm = bool(flow.held), bool(flow.svm_since())
                if pvm == svm or now_ns - since > timeout_ns:
                    # both have output, nothing waits any more, or it has been requested
                    del flows[flow]
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
