# SPDX-License-Identifier: GPL-2.0-or-later
"""What bcc makes of the programs where it cannot read /proc/kallsyms: containers, the sandbox."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from colo_xdp.datapath import btf

PROBE_READ, PROBE_READ_KERNEL = 4, 113  # BPF_FUNC_*
CHILD = """
import json
from colo_xdp.datapath import compiler, loader, source
image = compiler.run(loader.plan("secondary", source.Options()).source)
calls = set()
for p in image.programs:
    for i in range(0, len(p.code), 8):
        if p.code[i] == 0x85 and not p.code[i + 1] >> 4:
            calls.add(int.from_bytes(p.code[i + 4 : i + 8], "little"))
print(json.dumps(sorted(calls)))
"""


@pytest.mark.skipif(os.geteuid() != 0 or bool(btf.why_not()), reason="needs root, and BTF")
@pytest.mark.parametrize("hidden", [False, True])
def test_offloads_are_read_by_the_helper_that_programs_may_call(hidden: bool) -> None:
    hide = "mount --bind /dev/null /proc/kallsyms && " if hidden else ""
    r = subprocess.run(
        ["unshare", "--mount", "sh", "-ec", f'{hide}exec "$0" -c "$1"', sys.executable, CHILD],
        capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert r.returncode == 0, r.stderr
    calls = json.loads(r.stdout)
    assert PROBE_READ_KERNEL in calls and PROBE_READ not in calls
