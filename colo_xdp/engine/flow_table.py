# SPDX-License-Identifier: GPL-2.0-or-later
"""The engine's flows: created as the policy demands, aged, and evicted when there are too many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from heapq import heappop, heappush
from itertools import count

from ..compare.bypass import BypassedFlow, MonitorBudget, MonitoredFlow
from ..compare.causes import Cause
from ..compare.compared import ComparedFlow
from ..compare.datagram import DatagramFlow
from ..compare.flow import LONG_AGO, Comparer, FlowContext
from ..compare.limits import Limits
from ..compare.policy import Policy, RuleAction, Verdict, subject
from ..compare.tcp import TcpFlow
from ..compare.timers import Clock
from ..net.flow_key import FlowKey, unmirrored_key
from ..net.packet import Kind, Packet
from ..offload import tcp as offload_tcp
from ..offload import udp as offload_udp
from ..offload.kernel_format import ConnState, direction, is_stream, known
from .guest_opened import GuestOpened
from .outbox import EngineOutbox, RuleCount

__all__ = ["FlowTable", "RuleCount"]

_TCP = Kind.TCP
_TCP_CODEC, _UDP_CODEC = offload_tcp.TcpCodec(), offload_udp.UdpCodec()


class FlowTable:
    """All flows of one engine, TCP and others. `limit` bounds their number.

    lookup(key): returns the fast path's state of a flow that is not in the tables. restore(flow,
    state): continues a new flow from it. unmirror: see Engine. watched: the budget of monitored
    flows.
    """

    def __init__(
        self,
        clock: Clock,
        host: FlowContext,
        outbox: EngineOutbox,
        watched: MonitorBudget,
        limits: Limits,
        policy: Policy,
        *,
        lookup: Callable[[FlowKey], ConnState | None],
        restore: Callable[[ComparedFlow, ConnState], None],
        unmirror: Callable[[bytes | None], None],
    ) -> None:
        self._clock, self._host, self._outbox = clock, host, outbox
        self._watched, self._watched_host = watched, watched.host(host)
        self._lookup, self._restore, self._set_unmirrored = lookup, restore, unmirror
        self._limits, self.limit = limits, limits.max_flows
        self.tcp: dict[FlowKey, Comparer] = {}
        self.datagram: dict[FlowKey, Comparer] = {}
        self.policy, self._policy_epoch = policy, LONG_AGO
        self.announce(policy)
        # A lazy heap with one entry per flow: an entry is a lower bound, and the flow itself knows
        # the exact time.
        self._ages: list[tuple[int, int, Comparer]] = []
        self._serial = count()
        self.openings = GuestOpened()

    def __len__(self) -> int:
        return len(self.tcp) + len(self.datagram)

    def clear(self) -> None:
        """Forget all flows."""
        self.openings.clear()
        self.tcp.clear()
        self.datagram.clear()
        self._ages.clear()

    def announce(self, policy: Policy) -> None:
        """Count rules that will be in force soon from now on."""
        for v in policy.verdicts:
            self._outbox.rules.setdefault(v.rule, RuleCount())

    def enforce(self, policy: Policy, epoch: int) -> None:
        """Enforce new rules from the start of an epoch, when nothing waits.

        Each flow is judged when it is next seen.
        """
        self.policy, self._policy_epoch = policy, epoch
        self._set_unmirrored(None)
        for table in (self.tcp, self.datagram):
            for flow in table.values():
                flow.outdate(epoch)

    def table(self, key: FlowKey) -> dict[FlowKey, Comparer]:
        """Return the table for a key that the fast path knows."""
        return self.tcp if is_stream(key) else self.datagram

    def put(self, flow: Comparer) -> None:
        """Put a flow into the place of its current entry, when it is offloaded or reclaimed."""
        table = self.table(flow.key)
        found = table.get(flow.key)
        if found is not None and (found.stands_for(flow) or flow.stands_for(found)):
            table[flow.key] = flow  # otherwise it has been evicted

    def of(self, p: Packet, must: bool = True) -> Comparer | None:
        """Return the frame's flow; None when the table is full."""
        table = self.tcp if p.kind is _TCP else self.datagram
        flow = table.get(p.key)
        if flow is None:
            return self.new(table, p, must)
        if flow.epoch != self._clock.epoch:
            flow = self.renew(table, flow, p)
        flow.last = self._clock.now
        return flow

    def new(self, table: dict[FlowKey, Comparer], p: Packet, must: bool = True) -> Comparer | None:
        if not self._room(must):
            return None
        state = self._lookup(p.key) if known(p.key) else None
        if state is not None:
            return self.restore_evicted(p.key, state)
        flow = table[p.key] = self._make(p)
        self._outbox.rules[flow.verdict.rule].flows += 1
        self._born(flow)
        if isinstance(flow, ComparedFlow):
            self.openings.note(flow, self._clock.now)
        return flow

    def restore_evicted(self, key: FlowKey, state: ConnState) -> Comparer:
        """Recreate a flow that the fast path knows and the table does not."""
        p = (_TCP_CODEC if is_stream(key) else _UDP_CODEC).probe(key, state)
        table = self.table(key)
        flow = table[key] = self._make(p, direction(state))
        self._born(flow)
        if not isinstance(flow, ComparedFlow):
            return flow
        self._restore(flow, state)
        return flow if flow.epoch == self._clock.epoch else self.renew(table, flow, p)

    def _make(self, p: Packet, direction: str = "") -> Comparer:
        """Create the kind of flow that the policy demands for this frame."""
        what = subject(p, direction)
        verdict = self.policy.judge(what)
        if verdict.action is RuleAction.COMPARE:
            return self._compared(self._host, p, verdict, what.direction)
        if verdict.action is RuleAction.DROP_SECONDARY:
            self._unmirror(p)
        args = self._outbox, p.key, self._clock.epoch, verdict, what.direction
        if verdict.action is not RuleAction.MIRROR_ONLY:
            return BypassedFlow(*args)
        watched = MonitoredFlow(*args, self._watched, self._host.timers)
        host = replace(self._watched_host, outbox=watched.monitor())
        watched.inner = self._compared(host, p, verdict, what.direction)
        return watched

    def _compared(
        self, host: FlowContext, p: Packet, verdict: Verdict, direction: str
    ) -> ComparedFlow:
        if p.kind is _TCP:
            return TcpFlow(host, p.key, self._clock.epoch, verdict, direction, _TCP_CODEC)
        return DatagramFlow(host, p.key, self._clock.epoch, verdict, direction, _UDP_CODEC)

    def _unmirror(self, p: Packet) -> None:
        key = unmirrored_key(p.key, p.kind is _TCP)
        if key is not None:
            self._set_unmirrored(key)

    def renew(self, table: dict[FlowKey, Comparer], flow: Comparer, p: Packet) -> Comparer:
        """Update a flow at its first frame in this epoch, or since it was offloaded.

        New rules may have come into force, so the flow that is returned may be a new one.
        """
        flow = flow.reclaim()
        if flow.epoch == self._clock.epoch:
            return flow
        if flow.epoch < self._policy_epoch:
            verdict = self.policy.judge(subject(p, flow.direction))
            if verdict.action is not flow.verdict.action:
                self._remove(flow)
                fresh = table[p.key] = self._make(p, flow.direction)
                self._outbox.rules[fresh.verdict.rule].flows += 1
                self._born(fresh)
                return fresh
            if verdict.rule != flow.verdict.rule:
                self._outbox.rules[verdict.rule].flows += 1
            flow.judged(verdict)
            if verdict.action is RuleAction.DROP_SECONDARY:
                self._unmirror(p)
        flow.new_epoch(self._clock.epoch)
        return flow

    def _born(self, flow: Comparer) -> None:
        flow.last = self._clock.now
        when = self._clock.now + self._limits.flow_idle_ns // 5
        heappush(self._ages, (when, next(self._serial), flow))

    def _room(self, must: bool = True) -> bool:
        """Make room for one flow by evicting roughly the longest idle one where nothing waits.

        If that fails and the flow `must` be known, its frame will be dropped: request a checkpoint.
        """
        while len(self.tcp) + len(self.datagram) >= self.limit:
            if not self._evict():
                if must:
                    self._outbox.count("flow_table_full_dropped")
                    self._outbox.request(Cause.QUEUE_FULL, "flow table")
                return False
        return True

    def _evict(self) -> bool:
        ages, tries, found = self._ages, 64, False
        busy: list[tuple[int, int, Comparer]] = []
        while ages and not found:
            entry = heappop(ages)[2]
            flow = self._current(entry)
            if flow is None:
                continue
            due = self._old_at(flow)
            if not flow.quiet():
                busy.append((due, next(self._serial), entry))
            elif tries and ages and due > ages[0][0]:
                tries -= 1  # its entry was out of date: another one has been idle for longer
                heappush(ages, (due, next(self._serial), entry))
            else:
                self._remove(flow)
                self._outbox.count("flows_evicted")
                found = True
        for each in busy:
            heappush(ages, each)
        return found

    def _current(self, flow: Comparer) -> Comparer | None:
        """Return the entry in the tables for a flow; None: it is not in them any more."""
        for table in (self.tcp, self.datagram):
            found = table.get(flow.key)
            if found is not None and found.stands_for(flow):
                return found
        return None

    def _remove(self, flow: Comparer) -> None:
        table = self.tcp if self.tcp.get(flow.key) is flow else self.datagram
        del table[flow.key]
        flow.removed()

    def age(self, now_ns: int) -> None:
        ages = self._ages
        while ages and ages[0][0] <= now_ns:
            entry = heappop(ages)[2]
            flow = self._current(entry)
            if flow is None:
                continue
            due = self._old_at(flow)
            if due <= now_ns and flow.quiet():
                self._remove(flow)
                self._outbox.count("flows_aged")
            else:
                soon = now_ns + self._limits.expired_scan_cycle_ns
                heappush(ages, (max(due, soon), next(self._serial), entry))

    def _old_at(self, flow: Comparer) -> int:
        idle = self._limits.flow_idle_ns
        return flow.last + (idle // 5 if flow.closed() else idle)
