# SPDX-License-Identifier: GPL-2.0-or-later
"""Load scenarios: what each guest sends, and what must leave. Pure data; also for `replay
--corpus`.

A step is `WHO frame -> what happens`. WHO is P or S (a frame of the PVM, of the SVM), C or G (for
the rewriter: from the client, from the SVM), or one of the words `wait MS` and `checkpoint`. What
happens is a list of frames that leave, by number ("P2"), and of causes of checkpoints. A part of a
frame is "P2[0:50]"; "P2'" has another window. For the rewriter it is what changed: "seq+5",
"ack-5", "tsval+5", "tsecr-5", or the reason why nothing did.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from . import craft

FILES = ("compare", "rewrite")


@dataclass(frozen=True, slots=True)
class ScenarioStep:
    """One step and its expected result."""

    who: str  # P, S, C, G, wait, checkpoint
    text: str  # the frame, or the number of ms
    then: str

    def frames(self) -> Iterator[bytes]:
        """Yield one frame, or `repeat` frames, each with the next bytes of the stream."""
        s = craft.spec(self.text)
        if self.who == "S" and s["kind"] in ("tcp", "udp", "icmp") and "frag" not in s:
            s.setdefault("id", 2)  # two guests do not use the same IP identifications
        if self.who == "C":
            s.setdefault("sport", 40000)
            s.setdefault("dport", 80)
            s.setdefault("src", "10.0.0.2")
            s.setdefault("dst", "10.0.0.1")
        for _ in range(s.pop("repeat", 1)):
            yield craft.build(s)
            if "at" in s:
                n = len(s["body"])
                s["at"] += n
                s["body"] = craft.STREAM[s["at"] : s["at"] + n]


@dataclass(frozen=True, slots=True)
class Scenario:
    """A named sequence of steps."""

    name: str
    about: str  # the case, and the rule that decides it
    steps: tuple[ScenarioStep, ...]
    why: str  # why this result is right where QEMU's differs
    compare_timeout: int  # ms
    max_queue_size: int

    @property
    def rewrites(self) -> bool:
        """Whether the scenario is for the rewriter rather than the engine."""
        return self.steps[0].who in ("C", "G")


def _step(text: str, where: str) -> ScenarioStep:
    left, _, then = text.partition("->")
    who, _, rest = left.strip().partition(" ")
    if who not in ("P", "S", "C", "G", "wait", "checkpoint"):
        raise craft.SpecError(f"{where}: {text!r}: unknown sender {who!r}")
    step = ScenarioStep(who, rest.strip(), " ".join(then.split()))
    if len(who) == 1:
        try:
            list(step.frames())
        except ValueError as e:
            raise craft.SpecError(f"{where}: {text!r}: {e}") from e
    return step


def parse(text: str, file: str = "corpus") -> list[Scenario]:
    """Parse the scenarios of a file. Raises craft.SpecError (a ValueError) that names the step."""
    out: list[Scenario] = []
    for raw in tomllib.loads(text)["scenario"]:
        entry: dict[str, Any] = dict(raw)
        name = entry.pop("name")
        steps = tuple(_step(t, f"{file}: {name}") for t in entry.pop("steps"))
        out.append(
            Scenario(
                name, entry.pop("about"), steps, entry.pop("why", ""),
                entry.pop("compare_timeout", 1000), entry.pop("max_queue_size", 1024),
            )
        )  # fmt: skip
        if entry:
            raise craft.SpecError(f"{file}: {name}: {', '.join(entry)} is unknown")
    return out


def load() -> list[Scenario]:
    """Load all scenarios."""
    here = files(__package__)
    return [s for f in FILES for s in parse((here / f"{f}.toml").read_text(), f)]
