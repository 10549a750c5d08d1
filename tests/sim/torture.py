# SPDX-License-Identifier: GPL-2.0-or-later
"""Run many random schedules; minimize a failing one and print it so that it can be run again.

python -m tests.sim.torture --runs 100000 --seed 0
python -m tests.sim.torture --scene '{"seed":7,...}'     one run, with its trace
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from .world import Scene, World, adaptive, disk_scene, roles_scene, scene

BLOCK = 100
ROLES = 8  # one schedule in this many creates pairs again and changes the roles
DATAGRAMS = 5  # and with many of them
DISKS = 7  # and with a disk


class _Trace(logging.Handler):
    """Add what the controllers log to the trace."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        self._world.note("%s", record.getMessage())


def failure(s: Scene, kind: type[World] = World) -> str:
    """Return what is wrong with a run; empty if nothing is."""
    try:
        kind(s).run()
    except Exception as e:
        return f"{type(e).__name__}: {e}"
    return ""


def _simpler(s: Scene) -> Iterator[Scene]:
    for i in range(len(s.faults)):
        yield replace(s, faults=s.faults[:i] + s.faults[i + 1 :])
    for n in (1, s.conns // 2, s.conns - 1):
        if 0 < n < s.conns:
            yield replace(s, conns=n)
    plain = Scene(s.seed)
    quiet = {"loss": 0, "dup": 0, "jitter": 0.0, "link_loss": 0, "link_jitter": 0.0, "odd": 0,
             "odd_udp": False, "ring": plain.ring, "queue": plain.queue, "fast": False,
             "buffers": plain.buffers, "eager": False}  # fmt: skip
    for name, value in quiet.items():
        if getattr(s, name) != value:
            yield replace(s, **{name: value})


def shrink(s: Scene, seconds: float = 60, kind: type[World] = World) -> Scene:
    """Return a simpler scene that fails too (in whatever way)."""
    end = time.monotonic() + seconds
    found = True
    while found and time.monotonic() < end:
        found = False
        for t in _simpler(s):
            if failure(t, kind):
                s, found = t, True
                break
    return s


def trace(s: Scene, lines: int, kind: type[World] = World) -> str:
    """Return the last lines of a run's story."""
    world = kind(s, trace=True)
    root = logging.getLogger()
    handler, level, disabled = _Trace(world), root.level, logging.root.manager.disable
    logging.disable(logging.NOTSET)
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        world.run()
        end = "nothing wrong"
    except Exception as e:
        end = f"{type(e).__name__}: {e}"
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        logging.disable(disabled)
    return "\n".join([*list(world.trace)[-lines:], end])


def report(s: Scene, what: str, lines: int = 60) -> str:
    """Format a failing scene."""
    small = shrink(s)
    return (
        f"seed {s.seed}: {what}\n"
        f"shrunk, to be run again with: python -m tests.sim.torture --scene "
        f"'{small.to_json()}'\n{trace(small, lines)}"
    )


def _scene(seed: int, path: str) -> Scene:
    s = (roles_scene if seed % ROLES == 0 else scene)(seed)
    if seed % DISKS == 3:
        s = disk_scene(seed)
    if seed % DATAGRAMS == 1:
        s = replace(s, udp=100)
    s = adaptive(s)
    return s if path == "both" else replace(s, fast=path == "fast")


def _block(first: int, path: str = "both") -> tuple[int, list[tuple[int, str]], Counter[str]]:
    logging.disable(logging.CRITICAL)
    bad: list[tuple[int, str]] = []
    seen: Counter[str] = Counter()
    for seed in range(first, first + BLOCK):
        world = World(_scene(seed, path))
        try:
            world.run()
        except Exception as e:
            bad.append((seed, f"{type(e).__name__}: {e}"))
        seen["frames released"] += world.frames
        seen["frames decided by the fast path"] += world.fast
        seen["of them datagrams"] += world.fast_udp
        seen["of them with no controller"] += world.fast_alone
        seen["checkpoints"] += world.clones
        seen["controllers stopped on purpose"] += world.stops
        seen["runs with a takeover"] += "S" in world.transmitted
        seen["runs that went solo"] += world.was_solo
        seen["runs with a connection older than two takeovers"] += world.oldest() > 2
        seen["pairs made anew"] += world.pairs
        seen["confirmed writes"] += len(world.client.confirmed()) if world.scene.disk else 0
        seen["runs that an operator decides, for the disks"] += world.unproven
        seen["virtual seconds"] += world.ms() // 1000
    return first, bad, seen


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="the first one")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--path", choices=("both", "slow", "fast"), default="both",
        help="slow: without the fast path; fast: always with it; both: with it in three of four",
    )  # fmt: skip
    parser.add_argument("--scene", help="one scene, as printed; shows its trace")
    parser.add_argument("--lines", type=int, default=2000, help="of the trace")
    args = parser.parse_args()
    if args.scene:
        text = trace(Scene.from_json(args.scene), args.lines)
        print(text)
        return 0 if text.endswith("nothing wrong") else 1
    began, total, bad = time.monotonic(), Counter[str](), []
    starts = range(args.seed, args.seed + args.runs, BLOCK)
    block = partial(_block, path=args.path)
    with multiprocessing.Pool(args.jobs) as pool:
        for done, (_, found, seen) in enumerate(pool.imap_unordered(block, starts), 1):
            total += seen
            bad += found
            for seed, what in found:
                print(f"seed {seed}: {what}", flush=True)
            if done % 50 == 0:
                rate = done * BLOCK / (time.monotonic() - began)
                print(f"{done * BLOCK} schedules, {len(bad)} failed, {rate:.0f}/s", flush=True)
            if len(bad) >= 5:
                break
    shown = ", ".join(f"{v} {k}" for k, v in sorted(total.items()))
    print(f"{len(starts) * BLOCK} schedules from seed {args.seed}: {len(bad)} failed; {shown}")
    logging.disable(logging.CRITICAL)
    for seed, what in bad[:1]:
        print(report(_scene(seed, args.path), what))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
