# SPDX-License-Identifier: GPL-2.0-or-later
"""Read the kernel's own clock on BPF programs, and run processes that end with this one."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from colo_xdp.datapath import syscall

_ENABLE_STATS = 32
_libc = ctypes.CDLL(None, use_errno=True)
PR_SET_PDEATHSIG = 1


class _StatsAttr(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint32)]


@contextmanager
def run_stats() -> Iterator[None]:
    """Let the kernel count run_time_ns and run_cnt; ends with this process at the latest."""
    fd = syscall._bpf(_ENABLE_STATS, _StatsAttr(0), "enable stats")
    try:
        yield
    finally:
        os.close(fd)


def fdinfo(fd: int) -> dict[str, int]:
    """Return numbers from /proc/self/fdinfo: a program's run_time_ns, run_cnt; a map's memlock."""
    out = {}
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.strip().isdigit():
            out[name] = int(value)
    return out


def ran(fd: int) -> tuple[int, int]:
    """Return (ns, runs) of a program so far."""
    info = fdinfo(fd)
    return info["run_time_ns"], info["run_cnt"]


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def child(cmd: list[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """Run a process that is killed at the end of the block, or of this process."""
    p = subprocess.Popen(cmd, preexec_fn=_die_with_parent, **options)
    try:
        yield p
    finally:
        p.kill()
        p.wait()


def process_ns(pid: int) -> int:
    """Return CPU ns of all threads of a process, to the nanosecond."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0])
    return total
