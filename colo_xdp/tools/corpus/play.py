# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a scenario through the engine or the rewriter model, step by step. Pure, in virtual time."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...compare.limits import Limits
from ...compare.policy import Policy
from ...conntrack import headers, rewriter
from ...engine.engine import Engine
from ...engine.journal import Divergence
from ...net.frame import Frame
from ...net.packet import parse
from . import Scenario, ScenarioStep
from .craft import checksum

MS = 1_000_000
STEP_MS = 60  # time that passes after each frame


def play(s: Scenario) -> list[str]:
    """Return what happened at each step, in the notation of the step's `then`."""
    return list(_rewrite(s) if s.rewrites else _compare(s))


class Labels:
    """Name the frames that come out after the PVM's frame that they are, or are a part of."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []
        self._left: set[int] = set()

    def name(self, frame: bytes) -> str:
        """Return a name: P2; P2[0:50] for bytes 0 to 50 of its payload; P2' with another window."""
        same = [i for i, f in enumerate(self.sent, 1) if f == frame]
        for i in same:
            if i not in self._left:
                self._left.add(i)
                return f"P{i}"
        if same:
            return f"P{same[0]}"
        p = parse(frame)
        for i, f in reversed(list(enumerate(self.sent, 1))):
            q = parse(f)
            if p.proto != 6 or q.proto != 6 or p.key != q.key:
                continue
            start = (p.seq - q.seq) & 0xFFFFFFFF
            body, part = f[q.off : q.end], frame[p.off : p.end]
            if not start and body == part:
                return f"P{i}'"
            if part and start < len(body) and body[start : start + len(part)] == part:
                return f"P{i}[{start}:{start + len(part)}]"
        return f"? {frame.hex()}"


def _compare(s: Scenario) -> Iterator[str]:
    now = 1_000 * MS
    happened: list[str] = []
    labels = Labels()

    def asked(d: Divergence) -> None:
        happened.append(d.cause.value)

    engine = Engine(
        Limits(compare_timeout_ns=s.compare_timeout * MS, max_queue_size=s.max_queue_size),
        Policy(),
        lambda rec: happened.append(labels.name(rec.frame)),
        request_checkpoint=asked,
        on_wait=lambda ns: None,
    )
    for step in s.steps:
        _do(engine, step, labels, now)
        engine.flush(now)
        for _ in range((int(step.text) if step.who == "wait" else STEP_MS) // 10):
            now += 10 * MS
            engine.tick(now)
        yield " ".join(happened)
        happened.clear()


def _do(engine: Engine, step: ScenarioStep, labels: Labels, now: int) -> None:
    if step.who == "checkpoint":
        engine.begin_checkpoint()
        engine.commit_checkpoint(now, engine.epoch + 1, now)
    elif step.who != "wait":
        for frame in step.frames():
            if step.who == "P":
                labels.sent.append(frame)
                engine.from_pvm(Frame(frame, now), now)
            else:
                engine.from_svm(Frame(frame, now), engine.epoch & 0xFFF, now)


def _rewrite(s: Scenario) -> Iterator[str]:
    model = rewriter.Rewriter()
    for step in s.steps:
        if step.who == "checkpoint":
            model.epoch += 1
            yield ""
            continue
        changes: list[str] = []
        for frame in step.frames():
            to_svm = step.who == "C"
            out, _ = model.to_svm(frame) if to_svm else model.from_svm(frame)
            changes.append(changed(frame, out))
        yield " ".join(changes)


def changed(before: bytes, after: bytes) -> str:
    """Describe what a rewriter changed: "seq+76000 ack-5", "same", "badsum" for a bad checksum."""
    if before == after:
        return "same"
    a, b = _numbers(before), _numbers(after)
    if not a or not b or len(before) != len(after):
        return "changed"
    words = [
        f"{n}{(b[n] - a[n] + (1 << 31)) % (1 << 32) - (1 << 31):+d}"
        for n in a
        if n in b and a[n] != b[n]
    ]
    if _valid(before) and not _valid(after):
        words.append("badsum")
    if not _valid(before) and _valid(after):
        words.append("goodsum")
    return " ".join(words) or "changed"


def _numbers(frame: bytes) -> dict[str, int]:
    try:
        p = headers.parse(frame)
    except headers.BadFrame:
        return {}
    if not p.is_tcp and not p.frag:
        return {}
    seq, ack = struct.unpack_from("!II", frame, p.l4_off + 4)
    found = {"seq": seq, "ack": ack}
    o = headers.parse_options(frame[p.l4_off : p.l4_off + p.doff]) if p.is_tcp else None
    if o and o.ts:
        found["tsval"], found["tsecr"] = struct.unpack_from("!II", frame, p.l4_off + o.ts + 2)
    if o and o.sack:
        (found["sack"],) = struct.unpack_from("!I", frame, p.l4_off + o.sack + 2)
    return found


def _valid(frame: bytes) -> bool:
    try:
        p = headers.parse(frame)
    except headers.BadFrame:
        return False
    if not p.is_tcp:
        return True
    end = p.l4_off + p.doff + p.payload_len
    v4 = p.src[:12] == bytes(10) + b"\xff\xff"
    ends = (p.src[12:] + p.dst[12:]) if v4 else p.src + p.dst
    n = end - p.l4_off
    pseudo = struct.pack("!BBH", 0, 6, n) if v4 else struct.pack("!IHBB", n, 0, 0, 6)
    return checksum(ends + pseudo + frame[p.l4_off : end]) == 0
