# SPDX-License-Identifier: GPL-2.0-or-later
"""Receives the decisions of the flows: releases frames and requests checkpoints."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from ..compare.causes import WAITS, Cause
from ..compare.flow import Partial, Requester
from ..compare.patience import Patience
from ..compare.policy import Verdict
from ..compare.timers import Clock
from ..net.frame import NO_EVIDENCE, Evidence, Frame
from .counters import COUNTERS
from .journal import Divergence


@dataclass(slots=True)
class RuleCount:
    """Counts of one rule of the policy."""

    flows: int = 0
    uncompared: int = 0  # frames of the PVM
    differences: int = 0


class EngineOutbox:
    """Outbox (flow.Reporter) of all flows that are not monitored. For the callables see Engine."""

    def __init__(
        self,
        clock: Clock,
        send: Callable[[Frame], None],
        request_checkpoint: Callable[[Divergence], None],
        on_wait: Callable[[int], None],
        on_divergence: Callable[[Divergence], None],
        patience: Patience,
    ) -> None:
        self._patience = patience
        self._clock, self._send, self._on_wait = clock, send, on_wait
        self._request_checkpoint, self._on_divergence = request_checkpoint, on_divergence
        self.counters: Counter[str] = Counter({name: 0 for name, _ in COUNTERS})
        self.released = 0  # hot counter
        self.rules: dict[str, RuleCount] = {}
        self.asked = False  # for a checkpoint, in this epoch
        #: the flow that did, if it was because something had waited
        self.asked_for: Requester | str | None = None
        self.may_ask = True  # no checkpoint is under way, and there are two guests
        #: in shadow mode, the latest frames that both guests have sent: when the PVM's was
        #: captured, and when the SVM's had come
        self.matches: deque[tuple[int, int]] | None = None
        self._parts: dict[Partial, None] = {}  # a verified part of their head may leave

    # -- for the flows

    def release(self, rec: Frame, agreed: bool = True) -> None:
        """Release a frame, unless it has left already.

        agreed: the SVM has sent the same, which says something about its lag.
        """
        self._on_wait(self._clock.now - rec.ts_ns)
        if agreed and self.matches is not None:
            self.matches.append((rec.ts_ns, self._clock.now))
        if agreed and not self._patience.longest_ns:
            self._patience.longest_ns = 1  # a counterpart that did not wait
        if rec.sent:
            return
        if not rec.parts:
            self.released += 1
            self._send(rec)
            return
        for part in rec.parts:
            if not part.sent:
                self.released += 1
                self._send(part)

    def request(
        self, cause: Cause, flow: Requester | str, evidence: Evidence = NO_EVIDENCE
    ) -> None:
        """Count a divergence; the first one of an epoch requests a checkpoint."""
        self.counters[f"cause_{cause}"] += 1
        d = self._divergence(cause, flow, evidence, True)
        if not self.asked and self.may_ask:
            self.asked = True
            self.asked_for = flow if cause in WAITS else None
            self.counters["checkpoint_requests"] += 1
            self._request_checkpoint(d)

    def count(self, name: str, n: int = 1) -> None:
        """Add to a counter of COUNTERS."""
        self.counters[name] += n

    def part_verified(self, flow: Partial) -> None:
        """Note that the flow's head is partly verified; take_parts() returns the flow."""
        self._parts[flow] = None

    def uncompared(self, verdict: Verdict) -> None:
        """Count a frame that is about to leave and that the policy does not hold."""
        self.counters["uncompared"] += 1
        self.rules[verdict.rule].uncompared += 1

    def noticed(self, cause: Cause, flow: Requester, evidence: Evidence) -> None:
        """Report a difference in a monitored flow."""
        self.counters["differences_monitored"] += 1
        self._divergence(cause, flow, evidence, False)

    def _divergence(
        self, cause: Cause, flow: Requester | str, evidence: Evidence, asked: bool
    ) -> Divergence:
        text, proto, port, rule, deaf = str(flow), "", 0, "", False
        since = self._clock.now
        if not isinstance(flow, str):
            text, rule, deaf = flow.text(), flow.verdict.rule, flow.svm_deaf()
            proto, port = flow.service()
            since = flow.head_ns() or since
            self.rules[rule].differences += 1
        d = Divergence(
            self._clock.now,
            cause,
            text,
            proto,
            port,
            rule,
            evidence,
            asked,
            svm_deaf=deaf,
            since_ns=since,
        )
        self._on_divergence(d)
        return d

    # -- for the engine

    def release_ahead(self, rec: Frame) -> None:
        """Release a frame at once, to be compared afterwards (shadow mode)."""
        if rec.sent:
            return
        for part in rec.parts or (rec,):
            if not part.sent:
                self.counters["released_in_shadow"] += 1
                self.released += 1
                self._send(part)
                part.sent = True
        rec.sent = True

    def take_parts(self) -> dict[Partial, None]:
        """Return the flows with a verified part, and forget them."""
        parts, self._parts = self._parts, {}
        return parts
