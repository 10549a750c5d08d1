# SPDX-License-Identifier: GPL-2.0-or-later
"""Whether the files of a pair are still needed."""

from __future__ import annotations

import fcntl
from pathlib import Path

from colo_xdp.datapath import loader
from colo_xdp.tools.cleanup import in_use
from colo_xdp.tools.preflight import lock_path


def test_files_are_needed_while_a_controller_runs_and_while_its_programs_are_attached(
    tmp_path: Path,
) -> None:
    run, pins = tmp_path / "run", tmp_path / "bpf"
    run.mkdir()
    where = ("web1", str(pins), str(run))
    assert in_use(*where) == ""
    Path(loader.pin_dir(str(pins), "web1", "secondary")).mkdir(parents=True)
    assert "run `colo-xdp cleanup` first" in in_use(*where)
    with lock_path(str(run), "web1", "secondary").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "the secondary's controller of web1 still runs: stop" in in_use(*where)
    assert in_use("web2", *where[1:]) == ""
