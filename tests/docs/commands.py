# SPDX-License-Identifier: GPL-2.0-or-later
"""What a document tells a person to do, in its order: commands, on which host, and what is seen.

A step is a heading of the third level, "### 3. Join (1 minute)", with the time that a person needs.
In a step

- a block "sh" has commands. A comment of its own, "# on hosta", says where: for what follows in the
  block. There is none without it;
- a block "text" behind it is what is seen then; "..." stands for anything in a line;
- a paragraph in bold is done by hand: "**Cut the power of hosta.**"

Pure. tests/hosts/test_documents.py does all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

CLONE = "in a clone"
#: what a comment in a block says, and where that is
PLACES = {
    "on hosta": ("hosta",),
    "on hostb": ("hostb",),
    "on both hosts": ("hosta", "hostb"),
    CLONE: (CLONE,),
}
#: what a person needs at least, in minutes, to paste a block on one host and look at it, and to do
#: something by hand
LEAST = 0.25


class PageError(ValueError):
    """The page does not say clearly what is to be done; the text has the line."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of code; `kind`: its language, or "indented"."""

    line: int
    kind: str
    lines: tuple[str, ...]


@dataclass(slots=True)
class Run:
    """Commands to be run on these hosts, one after the other, and what is seen then."""

    line: int
    where: tuple[str, ...]
    commands: list[str]
    seen: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class ByHand:
    """Something that no command does."""

    line: int
    what: str


@dataclass(slots=True)
class Step:
    """One step, in the part of the page with this heading."""

    line: int
    part: str
    title: str
    minutes: int
    doings: list[Run | ByHand] = field(default_factory=list)

    @property
    def least(self) -> float:
        """Return the minutes that it takes at least."""
        return sum(LEAST * len(d.where) if isinstance(d, Run) else LEAST for d in self.doings)


STEP = re.compile(r"### (\d+\. .*?)(?: \((\d+) minutes?\))?$")
BOLD = re.compile(r"\*\*([^*]+)\.\*\*$")


def blocks(text: str) -> Iterator[Block]:
    """Return the blocks of code of a page, fenced or indented."""
    lines = text.splitlines()
    i = 0
    while i < len(lines):
        if fence := re.match(r"```(\w*)$", lines[i]):
            end = next((j for j in range(i + 1, len(lines)) if lines[j] == "```"), None)
            if end is None:
                raise PageError(f"line {i + 1}: a block without an end")
            yield Block(i + 1, fence[1] or "plain", tuple(lines[i + 1 : end]))
            i = end + 1
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip()):
            end = next((j for j in range(i, len(lines)) if not lines[j].startswith("    ")
                        and lines[j].strip()), len(lines))  # fmt: skip
            kept = [x[4:] for x in lines[i:end]]
            yield Block(i + 1, "indented", tuple("\n".join(kept).rstrip().split("\n")))
            i = end
        else:
            i += 1


def joined(lines: Iterable[str]) -> Iterator[str]:
    """Return commands; one that goes on behind a backslash is one."""
    whole = ""
    for line in lines:
        whole += line
        if whole.endswith("\\"):
            whole += "\n"
            continue
        if whole.strip():
            yield whole
        whole = ""
    if whole.strip():
        yield whole


def _place(comment: str) -> tuple[str, ...]:
    """Return the hosts that a comment names; what is behind a comma is for people."""
    return PLACES.get(comment.removeprefix("# ").partition(",")[0], ())


def runs(block: Block) -> Iterator[Run]:
    """Return what a block "sh" has to be run, host by host."""
    now: Run | None = None
    for command in joined(block.lines):
        if command.startswith("#"):
            if not (where := _place(command)):
                raise PageError(f"line {block.line}: {command!r} names none of {list(PLACES)}")
            if now is not None:
                yield now
            now = Run(block.line, where, [])
        elif now is None:
            raise PageError(f"line {block.line}: no comment says on which host")
        else:
            now.commands.append(command)
    if now is None or not now.commands:
        raise PageError(f"line {block.line}: a block without a command")
    yield now


def steps(text: str) -> list[Step]:
    """Return the steps of a page. Raises PageError."""
    found: list[Step] = []
    part, at = "", {b.line: b for b in blocks(text) if b.kind != "indented"}
    inside = 0  # the last line of the block in which we are
    for n, line in enumerate(text.splitlines(), 1):
        if n <= inside:
            continue
        if block := at.get(n):
            inside = n + len(block.lines) + 1
            if not found or found[-1].part != part:
                raise PageError(f"line {n}: a block in no step")
            _add(found[-1], block)
        elif line.startswith("## "):
            part = line[3:]
        elif m := STEP.match(line):
            if m[2] is None:
                raise PageError(f"line {n}: a step without its minutes")
            found.append(Step(n, part, m[1], int(m[2])))
        elif line.startswith("### "):
            raise PageError(f"line {n}: a step without a number")
        elif (m := BOLD.match(line)) and found:
            found[-1].doings.append(ByHand(n, m[1]))
    return found


def _add(step: Step, block: Block) -> None:
    if block.kind == "sh":
        step.doings += runs(block)
    elif block.kind == "text":
        last = step.doings[-1] if step.doings else None
        if not isinstance(last, Run) or last.seen:
            raise PageError(f"line {block.line}: what is seen, and of which commands?")
        last.seen += [x for x in block.lines if x.strip()]
    else:
        raise PageError(f"line {block.line}: a block of the kind {block.kind!r}")


def unseen(wanted: Iterable[str], said: str) -> list[str]:
    """Return the lines of `wanted` that do not occur in `said` in this order."""
    lines = iter([" ".join(x.split()) for x in said.splitlines()])
    missing = []
    for want in wanted:
        words = " ".join(want.split())
        exact = re.compile(".*".join(re.escape(p) for p in words.split("...")))
        if not any(exact.fullmatch(line) for line in lines):
            missing.append(want)
            break
    return missing
