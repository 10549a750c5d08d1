# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's flows: made as the policy wants them, aged, and evicted when there are too many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count
from typing import Protocol

from . import fastgram, fastpath
from .comparer import Comparer, Flow, Host
from .datagram import DatagramFlow
from .flow import FlowKey, describe_datagram, describe_tcp, unmirrored_key
from .limits import Limits
from .openings import Openings
from .packet import Kind, Packet
from .policy import Action, Policy, subject
from .reasons import Cause
from .record import NO_EVIDENCE, Evidence
from .stream import Stream
from .tier_k import Words, direction, is_stream, known
from .uncompared import Budget, Passed, Watched

_TCP = Kind.TCP
_LONG_AGO = -1
#: epoch of a flow that tier K has
GIVEN = -2


class Engine(Host, Protocol):
    """What the table needs of the engine."""

    now: int
    watched: Budget
    unmirror: Callable[[bytes | None], None]

    def ask(self, cause: Cause, flow: Flow | str, evidence: Evidence = NO_EVIDENCE) -> None: ...
    def drop_history(self, stream: Stream) -> None: ...
    def recall(self, st: Stream | DatagramFlow, words: Words | None = None) -> None: ...
    def lookup(self, key: FlowKey) -> Words | None: ...


@dataclass(slots=True)
class RuleCount:
    """What one rule of the policy has done."""

    flows: int = 0
    uncompared: int = 0  # frames of the PVM
    differences: int = 0


class Flows:
    """All flows of one engine, TCP and others. `limit` bounds their number."""

    def __init__(self, host: Engine, limits: Limits, policy: Policy) -> None:
        self._host, self._limits, self.limit = host, limits, limits.max_flows
        self.tcp: dict[FlowKey, Comparer] = {}
        self.datagram: dict[FlowKey, Comparer] = {}
        self.policy, self._policy_epoch = policy, _LONG_AGO
        self.rules: dict[str, RuleCount] = {v.rule: RuleCount() for v in policy.verdicts}
        # A heap with one entry per flow, lazy: an entry is a lower bound, the flow itself knows
        # better.
        self._ages: list[tuple[int, int, Flow]] = []
        self._serial = count()
        self.openings = Openings()

    def __len__(self) -> int:
        return len(self.tcp) + len(self.datagram)

    def clear(self) -> None:
        """Forget all of them."""
        self.openings.clear()
        self.tcp.clear()
        self.datagram.clear()
        self._ages.clear()

    def announce(self, policy: Policy) -> None:
        """Rules that will be in force soon are counted from now on."""
        for v in policy.verdicts:
            self.rules.setdefault(v.rule, RuleCount())

    def enforce(self, policy: Policy, epoch: int) -> None:
        """New rules begin with an epoch, when nothing waits. Each flow is judged when next seen."""
        self.policy, self._policy_epoch = policy, epoch
        self._host.unmirror(None)
        for table in (self.tcp, self.datagram):
            for flow in table.values():
                flow.when = 0  # the engine forgets its timers
                if flow.epoch == GIVEN:
                    continue
                flow.new_epoch(epoch)
                flow.epoch = _LONG_AGO
                if isinstance(flow, Watched):
                    flow.inner.when = 0

    def of(self, p: Packet, must: bool = True) -> Comparer | None:
        """The frame's flow; None when the table is full."""
        table = self.tcp if p.kind is _TCP else self.datagram
        flow = table.get(p.key)
        if flow is None:
            return self.new(table, p, must)
        if flow.epoch != self._host.epoch:
            flow = self.renew(table, flow, p)
        flow.last = self._host.now
        return flow

    def new(self, table: dict[FlowKey, Comparer], p: Packet, must: bool = True) -> Comparer | None:
        if not self._room(must):
            return None
        words = self._host.lookup(p.key) if known(p.key) else None
        if words is not None:
            return self.revive(p.key, words)
        flow = table[p.key] = self._make(p)
        self.rules[flow.verdict.rule].flows += 1
        self._born(flow)
        if isinstance(flow, Stream | DatagramFlow):
            self.openings.note(flow, self._host.now)
        return flow

    def revive(self, key: FlowKey, words: Words) -> Comparer:
        """A flow that tier K knows, and the table no more."""
        p = (fastpath if is_stream(key) else fastgram).probe(key, words)
        table = self.tcp if is_stream(key) else self.datagram
        flow = table[key] = self._make(p, direction(words))
        self._born(flow)
        if not isinstance(flow, Stream | DatagramFlow):
            return flow
        self._host.recall(flow, words)
        return flow if flow.epoch == self._host.epoch else self.renew(table, flow, p)

    def _make(self, p: Packet, direction: str = "") -> Comparer:
        """What the policy wants for the flow of this frame."""
        what = subject(p, direction)
        verdict = self.policy.judge(what)
        kind: type[Stream] | type[DatagramFlow] = Stream if p.kind is _TCP else DatagramFlow
        if verdict.action is Action.COMPARE:
            return kind(self._host, p.key, self._host.epoch, verdict, what.direction)
        if verdict.action is Action.DROP_SECONDARY:
            self._unmirror(p)
        text = (describe_tcp if p.kind is _TCP else describe_datagram)(p.key)
        if verdict.action is Action.MIRROR_ONLY:
            watched = Watched(
                self._host, p.key, self._host.epoch, verdict, what.direction, text,
                self._host.watched,
            )  # fmt: skip
            host = watched.watcher()
            watched.inner = kind(host, p.key, self._host.epoch, verdict, what.direction)
            return watched
        return Passed(self._host, p.key, self._host.epoch, verdict, what.direction, text)

    def _unmirror(self, p: Packet) -> None:
        key = unmirrored_key(p.key, p.kind is _TCP)
        if key is not None:
            self._host.unmirror(key)

    def renew(self, table: dict[FlowKey, Comparer], flow: Comparer, p: Packet) -> Comparer:
        """The flow's first frame in this epoch, or since tier K had it: new rules may have come."""
        if flow.epoch == GIVEN:
            assert isinstance(flow, Stream | DatagramFlow)
            self._host.recall(flow)
            if flow.epoch == self._host.epoch:
                return flow
        if flow.epoch < self._policy_epoch:
            verdict = self.policy.judge(subject(p, flow.direction))
            if verdict.action is not flow.verdict.action:
                self._remove(flow)
                fresh = table[p.key] = self._make(p, flow.direction)
                self.rules[fresh.verdict.rule].flows += 1
                self._born(fresh)
                return fresh
            if verdict.rule != flow.verdict.rule:
                self.rules[verdict.rule].flows += 1
            flow.verdict = verdict
            if verdict.action is Action.DROP_SECONDARY:
                self._unmirror(p)
        flow.new_epoch(self._host.epoch)
        return flow

    def _born(self, flow: Flow) -> None:
        flow.last = self._host.now
        when = self._host.now + self._limits.flow_idle_ns // 5
        heappush(self._ages, (when, next(self._serial), flow))

    def _room(self, must: bool = True) -> bool:
        """Make room for one flow: evict about the longest idle ones where nothing waits.
        If that fails and the flow `must` be known, its frame will be dropped: ask."""
        while len(self.tcp) + len(self.datagram) >= self.limit:
            if not self._evict():
                if must:
                    self._host.count("flow_table_full_dropped")
                    self._host.ask(Cause.QUEUE_FULL, "flow table")
                return False
        return True

    def _evict(self) -> bool:
        ages, tries, found = self._ages, 64, False
        busy: list[tuple[int, int, Flow]] = []
        while ages and not found:
            _, _, flow = heappop(ages)
            if not self._known(flow):
                continue
            due = self._old_at(flow)
            if not flow.quiet():
                busy.append((due, next(self._serial), flow))
            elif tries and ages and due > ages[0][0]:
                tries -= 1  # its entry was out of date: another one is idle for longer
                heappush(ages, (due, next(self._serial), flow))
            else:
                self._remove(flow)
                self._host.count("flows_evicted")
                found = True
        for entry in busy:
            heappush(ages, entry)
        return found

    def _known(self, flow: Flow) -> bool:
        return self.tcp.get(flow.key) is flow or self.datagram.get(flow.key) is flow

    def _remove(self, flow: Flow) -> None:
        table = self.tcp if self.tcp.get(flow.key) is flow else self.datagram
        del table[flow.key]
        inner = flow.inner if isinstance(flow, Watched) else flow
        if isinstance(inner, Stream):
            self._host.drop_history(inner)

    def age(self, now_ns: int) -> None:
        ages = self._ages
        while ages and ages[0][0] <= now_ns:
            _, _, flow = heappop(ages)
            if not self._known(flow):
                continue
            due = self._old_at(flow)
            if due <= now_ns and flow.quiet():
                self._remove(flow)
                self._host.count("flows_aged")
            else:
                soon = now_ns + self._limits.expired_scan_cycle_ns
                heappush(ages, (max(due, soon), next(self._serial), flow))

    def _old_at(self, flow: Flow) -> int:
        idle = self._limits.flow_idle_ns
        # what tier K has it can tell of itself
        return flow.last + (idle // 5 if flow.closed() or flow.epoch == GIVEN else idle)
