# SPDX-License-Identifier: GPL-2.0-or-later
"""Run `make bench`: every part, a report, a table and plots in build/.

    python -m tests.bench [--quick] [--publish] [--out DIR] [PART...]

A part that fails is an entry with "error" in the report; the others still run, and the exit
status is 1. A missed goal is no failure. --publish puts what was measured into docs/benchmarks.md
and tests/bench/report; parts that were not measured stay there as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from colo_xdp.datapath import loader
from colo_xdp.lab.pair import Lab

from . import (
    arms,
    goodput,
    held,
    latency,
    peer,
    plots,
    programs,
    published,
    queues,
    report,
    rest,
    scale,
    slow_path,
    waits,
)  # fmt: skip
from .apps import part as apps
from .report import Part

Run = Callable[[Part, bool, Path], None]

#: key, title, measuring function
PARTS: dict[str, tuple[str, Run]] = {
    "programs": ("ns per frame of each program and path, the empty program as zero", programs.run),
    "held": (
        "Stand-in guests: holding, comparing and releasing against plain forwarding",
        held.run,
    ),
    "engine": (
        "The slow path: the engine by stage, against the least Python can do",
        slow_path.run,
    ),
    "goodput": ("TCP goodput of a copied sender (iperf3)", goodput.run),
    "steady": ("TCP goodput, the worst run to the median", goodput.run_steady),
    "queues": ("A tap with several queues against one", queues.run),
    "peer": ("CPU per frame against QEMU's colo-compare and filter-rewriter", peer.run),
    "guests": ("Real guests: no proxy, QEMU's own, ours", arms.run),
    "waits": ("Real guests that disagree by waiting: a fixed and an adaptive wait", waits.run),
    "rest": ("A protected pair at rest: CPU and memory of the controllers", rest.run),
    "apps": ("Real applications: no pair, shadow, QEMU's own proxy, ours", apps.run),
    "latency": ("Added latency of a released frame, one at a time", latency.run),
    "scale": ("Connections against time and memory", scale.run),
}
#: too long for --quick, unless they are named
LONG = ("apps",)
BUILD = Path(__file__).parents[2] / "build"


def leftovers() -> None:
    """Remove what a killed run may have left: processes, namespaces with their contents, pins.

    Ordinary children die with their parent (stats.child).
    """
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    mine = ("cxb", "cxg")
    for line in listed.splitlines():
        name = line.split()[0]
        if (name.startswith(mine) and len(name) in (4, 5)) or name == slow_path.NAMESPACE:
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run(["ip", "netns", "del", name], check=True)
    for tag in (arms.TAG, rest.TAG):
        if (BUILD / f"{tag}.pids.json").exists():
            Lab(BUILD, tag=tag).down()
    for pins in Path("/sys/fs/bpf/colo-xdp").glob(f"{held.PAIR}*"):
        loader.remove_pins(str(pins))
    mounts = Path("/proc/mounts").read_text().splitlines()
    for path in (line.split()[1] for line in mounts if "/colo-bench-bpf." in line):
        subprocess.run(["umount", path], check=False)
    for old in Path(tempfile.gettempdir()).glob("colo-bench*.*"):
        shutil.rmtree(old, ignore_errors=True)


def measure(names: list[str], quick: bool, build: Path) -> list[Part]:
    """Run the parts one after the other."""
    out = []
    for name in names:
        title, run = PARTS[name]
        part = Part(name, title)
        began = time.monotonic()
        print(f"{name}: {title}", flush=True)
        try:
            run(part, quick, build)
        except Exception as e:
            part.error(name, f"{type(e).__name__}: {e}")
        part.seconds = time.monotonic() - began
        print(
            f"{name}: {len(part.rows)} rows, {len(part.errors)} errors, {part.seconds:.0f} s",
            flush=True,
        )
        for what, why in part.errors:
            print(f"  {what}: {why.strip()[:300]}", flush=True)
        out.append(part)
    return out


def main() -> int:
    """See the module's docstring."""
    p = argparse.ArgumentParser(prog="python -m tests.bench")
    p.add_argument("parts", nargs="*", metavar="PART", help=f"default all: {' '.join(PARTS)}")
    p.add_argument(
        "--quick", action="store_true",
        help=f"few runs; under 3 minutes, without {', '.join(LONG)}",
    )  # fmt: skip
    p.add_argument(
        "--publish", action="store_true", help="into docs/benchmarks.md and tests/bench/report"
    )
    p.add_argument("--out", type=Path, default=BUILD)
    args = p.parse_args()
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        p.error(f"unknown part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if os.geteuid():
        print("the benchmark builds network namespaces and loads BPF programs: run it as root",
              file=sys.stderr)  # fmt: skip
        return 1
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that every `finally` runs
    args.out.mkdir(parents=True, exist_ok=True)
    leftovers()
    began = time.monotonic()
    try:
        usual = [x for x in PARTS if not (args.quick and x in LONG)]
        parts = measure(args.parts or usual, args.quick, args.out)
    finally:
        leftovers()
    about = report.machine(quick=args.quick, seconds=round(time.monotonic() - began))
    report.write(parts, about, args.out)
    pictures = plots.draw(parts, args.out)
    print("\n".join(report.goal_table(parts)))
    print(f"report: {args.out / 'bench-report.json'}, {args.out / 'bench-report.md'}, "
          + ", ".join(x.name for x in pictures))  # fmt: skip
    if args.publish:
        published.publish(parts, about, list(PARTS), plots.draw)
    return 1 if any(x.errors for x in parts) else 0


if __name__ == "__main__":
    sys.exit(main())
