# SPDX-License-Identifier: GPL-2.0-or-later
"""Replay two captures through the engine, in their own time, to see what would have happened. Pure.

A capture cannot answer for a guest whose state a checkpoint has replaced. A TCP connection that has
differed is therefore not judged any further; everything else continues as if both guests had
agreed. `colo-xdp replay` reads the files (tools/pcap.py) and prints the report.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..compare.causes import FINAL
from ..compare.limits import Limits
from ..compare.policy import Policy
from ..engine.engine import Engine
from ..engine.journal import Divergence, divergence_json
from ..net.flow_key import FlowKey, describe_tcp
from ..net.frame import Frame
from ..net.packet import RST, SYN, Kind, Packet, parse
from ..net.seqnum import MASK, diff

Capture = Sequence[tuple[int, bytes]]  # unix time in ns, frame

MS = 1_000_000
TICK_NS = 10 * MS
MAX_LISTED = 1000
# bytes; one connection in two captures that start further apart than this is renumbered
_SAME_NUMBERS = 1 << 20


class ReplayError(ValueError):
    """The captures cannot be replayed; the text says which one and why."""


@dataclass(frozen=True, slots=True)
class ReplayOptions:
    """Options of a replay."""

    limits: Limits = field(default_factory=Limits)
    policy: Policy = field(default_factory=Policy)
    checkpoint_ns: int = 20 * MS  # duration of a checkpoint
    offset_ns: int = 0  # added to the SVM's times


def guest_mac(pvm: Capture, svm: Capture) -> bytes:
    """Find the source address in both captures that every unicast frame is from or to.

    That is the guest's own interface. Raises ReplayError if it is not unique: with a single client
    it may be either address.
    """
    both = {f[6:12] for _, f in pvm} & {f[6:12] for _, f in svm}
    if len(both) > 1:
        for _, f in (*pvm, *svm):
            if not f[0] & 1:
                both &= {f[:6], f[6:12]}
    if len(both) == 1:
        return both.pop()
    if not both:
        raise ReplayError("no source address is in both captures: are they of one pair?")
    names = ", ".join(sorted(mac.hex(":") for mac in both))
    raise ReplayError(f"which of these is the guest's address (--guest-mac)? {names}")


def output_of(mac: bytes, capture: Capture) -> list[tuple[int, bytes]]:
    """Return what the guest sent."""
    return [(ts, f) for ts, f in capture if f[6:12] == mac]


class _Numbers:
    """Translate the SVM's sequence numbers: each guest has chosen its own initial ones."""

    def __init__(self, pvm: Capture, svm: Capture) -> None:
        ours, theirs = self._first(pvm), self._first(svm)
        self.aligned: list[str] = []
        self._isns = {k: isns for k, (isns, _) in theirs.items()}
        self._at: dict[FlowKey, int] = {}
        self._moves: dict[FlowKey, list[int]] = {}
        for key, (isns, first) in theirs.items():
            known, ours_first = ours.get(key, ([], first))
            moves = [(a - b) & MASK for a, b in zip(known, isns, strict=False)]
            if not known and not isns and abs(diff(ours_first, first)) > _SAME_NUMBERS:
                moves = [(ours_first - first) & MASK]
                self.aligned.append(describe_tcp(key))
            self._moves[key] = moves or [0]

    @staticmethod
    def _first(capture: Capture) -> dict[FlowKey, tuple[list[int], int]]:
        found: dict[FlowKey, tuple[list[int], int]] = {}
        for _, frame in capture:
            p = parse(frame)
            if p.kind is not Kind.TCP or p.flags & RST:
                continue
            isns, _ = found.setdefault(p.key, ([], p.seq))
            if p.flags & SYN and isns[-1:] != [p.seq]:
                isns.append(p.seq)
        return found

    def move(self, frame: bytes, p: Packet) -> bytes:
        """Return the frame with the PVM's sequence number; its checksum is not read and stays."""
        isns, moves = self._isns.get(p.key, []), self._moves.get(p.key, [0])
        at = self._at.get(p.key, 0)
        if p.flags & SYN and at + 1 < len(isns) and isns[at + 1] == p.seq:
            at = self._at[p.key] = at + 1
        by = moves[min(at, len(moves) - 1)]
        if not by:
            return frame
        where = p.l4 + 4
        return frame[:where] + ((p.seq + by) & MASK).to_bytes(4, "big") + frame[where + 4 :]


class Replay:
    """One run. `report` returns the result, `pairs` has the differences with their frames."""

    def __init__(self, pvm: Capture, svm: Capture, options: ReplayOptions) -> None:
        if not pvm or not svm:
            raise ReplayError(f"the guest sent nothing in the {'PVM' if not pvm else 'SVM'}'s file")
        self.o = options
        self.pairs: list[tuple[int, Divergence]] = []
        self._pvm = [(ts, 0, f) for ts, f in pvm]
        self._svm = [(ts + options.offset_ns, 1, f) for ts, f in svm]
        self._numbers = _Numbers(pvm, svm)
        self._waits: list[int] = []
        self._engine = Engine(
            options.limits, options.policy, lambda rec: None,
            request_checkpoint=self._asked, on_wait=self._waits.append,
            on_divergence=self._differs,
        )  # fmt: skip
        self._want = False
        self._commit_at: int | None = None
        self._stop = 0
        self._causes: Counter[str] = Counter()
        self._listed: list[dict[str, Any]] = []
        self._lost: set[FlowKey] = set()
        self._lost_names: list[str] = []
        self._flows: set[FlowKey] = set()
        self._skipped = [0, 0]
        self._said: deque[tuple[int, FlowKey, Frame]] = deque(maxlen=1000)  # the SVM's TCP frames
        self._now = 0

    # -- the engine's side

    def _asked(self, d: Divergence) -> None:
        self._want = True
        self._causes[d.cause.value] += 1
        if len(self._listed) < MAX_LISTED:
            self._listed.append(
                {"at_s": round((d.ts_ns - self._began) / 1e9, 6), **divergence_json(d)}
            )

    def _differs(self, d: Divergence) -> None:
        if len(self.pairs) < MAX_LISTED:
            self.pairs.append((d.ts_ns, d))
        if d.proto == "tcp" and d.cause in FINAL and d.flow not in self._lost_names:
            self._lost_names.append(d.flow)
            self._lost |= {k for k in self._flows if describe_tcp(k) == d.flow}

    # -- time

    def run(self) -> Replay:
        """Play everything."""
        timeline = sorted([*self._pvm, *self._svm], key=lambda x: x[:2])
        self._began = self._now = timeline[0][0]
        for ts, who, frame in timeline:
            self._pass_until(ts)
            self._feed(who, ts, frame)
        end = self._now + self.o.limits.compare_timeout_ns + self.o.checkpoint_ns + 2 * TICK_NS
        self._pass_until(end)
        self._ended = timeline[-1][0]
        return self

    def _pass_until(self, ts: int) -> None:
        while True:
            self._engine.flush(self._now)
            if self._want and self._commit_at is None:
                self._engine.begin_checkpoint()
                self._stop, self._commit_at = self._now, self._now + self.o.checkpoint_ns
            step = ts - self._now
            if step <= 0:
                return
            if self._commit_at is not None and self._commit_at <= ts:
                self._now = max(self._now, self._commit_at)
                self._commit()
                continue
            if self._engine.held_packets or self._engine.svm_packets:
                self._now += min(step, TICK_NS)
            else:
                self._now = ts  # nothing waits, so no deadline can pass
            self._engine.tick(self._now)

    def _commit(self) -> None:
        self._commit_at, self._want = None, False
        epoch = self._engine.epoch + 1
        # A real SVM would continue from the PVM's state. The captured one sent these frames
        # already.
        since = self._now - self.o.limits.compare_timeout_ns
        for ts, key, rec in self._said:
            if since < ts <= self._stop and key not in self._lost:
                self._engine.from_svm(rec, epoch & 0xFFF, self._now)
        self._engine.commit_checkpoint(self._stop, epoch, self._now)

    def _feed(self, who: int, ts: int, frame: bytes) -> None:
        p = parse(frame)
        tcp = p.kind is Kind.TCP
        if tcp:
            self._flows.add(p.key)
            if p.key in self._lost:
                self._skipped[who] += 1
                return
        if who == 0:
            self._engine.from_pvm(Frame(frame, ts), ts)
            return
        rec = Frame(self._numbers.move(frame, p) if tcp else frame, ts)
        if tcp:
            self._said.append((ts, p.key, rec))
        epoch = self._engine.epoch + (self._commit_at is not None)
        self._engine.from_svm(rec, epoch & 0xFFF, ts)

    # -- the result

    def report(self) -> dict[str, Any]:
        """Return the result, for `--json`."""
        c, waits = self._engine.counters, sorted(self._waits)

        def wait(q: float) -> float:
            return round(waits[min(len(waits) - 1, int(q * len(waits)))] / MS, 3) if waits else 0.0

        return {
            "seconds": round((self._ended - self._began) / 1e9, 3),
            "pvm_frames": len(self._pvm),
            "svm_frames": len(self._svm),
            "connections": len(self._flows),
            "released": c["released"],
            "released_by_checkpoint": c["released_by_checkpoint"],
            "uncompared": c["uncompared"],
            "not_judged": sum(self._skipped),
            "held_at_the_end": self._engine.held_packets,
            "wait_ms": {"p50": wait(0.5), "p99": wait(0.99), "max": wait(1.0)},
            "checkpoints": sum(self._causes.values()),
            "by_cause": dict(self._causes.most_common()),
            "differences": self._listed,
            "connections_that_differed": self._lost_names,
            "aligned_by_first_frame": self._numbers.aligned,
        }


def replay(
    pvm: Iterable[tuple[int, bytes]],
    svm: Iterable[tuple[int, bytes]],
    options: ReplayOptions | None = None,
    mac: bytes = b"",
) -> Replay:
    """Replay what the guest with this address sent (detected if empty). Raises ReplayError."""
    p, s = list(pvm), list(svm)
    mac = mac or guest_mac(p, s)
    return Replay(output_of(mac, p), output_of(mac, s), options or ReplayOptions()).run()


def text(r: dict[str, Any]) -> str:
    """Format the report for an operator, without the differences."""
    w = r["wait_ms"]
    lines = [
        f"{r['seconds']} s, {r['connections']} TCP connections; "
        f"{r['pvm_frames']} frames of the PVM, {r['svm_frames']} of the SVM",
        f"released     {r['released']}, of these {r['uncompared']} uncompared by policy, "
        f"{r['released_by_checkpoint']} by a checkpoint",
        f"held for     p50 {w['p50']} ms, p99 {w['p99']} ms, longest {w['max']} ms",
        f"checkpoints  {r['checkpoints']}"
        + "".join(f", {n} {cause}" for cause, n in r["by_cause"].items()),
    ]
    if r["not_judged"]:
        lines.append(
            f"not judged   {r['not_judged']} frames of {len(r['connections_that_differed'])} "
            "connections after their first difference: a checkpoint would have made the guests "
            "equal"
        )
    if r["aligned_by_first_frame"]:
        lines.append(
            f"assumed      {len(r['aligned_by_first_frame'])} connections have no start in the "
            "captures and differ in their numbers: matched by the first frame of each"
        )
    if r["held_at_the_end"]:
        lines.append(f"still held   {r['held_at_the_end']} frames at the end of the captures")
    return "\n".join(lines)
