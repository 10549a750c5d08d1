# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the OCF agent on a real pair, its actions in the order in which a cluster requests them."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from colo_xdp.lab.net import stop_process, wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker
from tests.e2e.test_reprotect import Work, protected

AGENT = Path(__file__).parents[2] / "deploy/ocf/colo-xdp"
NOT_RUNNING, PROMOTED = 7, 8


class Node:
    """One host of a cluster: `systemctl` starts and stops the lab's controller, once."""

    def __init__(self, lab: Lab, role: str) -> None:
        self.lab, self.role = lab, role
        self.dir = lab.work / f"node-{role}"
        (self.dir / "bin").mkdir(parents=True, exist_ok=True)
        for old in self.dir.glob("*.*"):
            old.unlink()
        self._script("colo-xdp", f'exec {sys.executable} -m colo_xdp.cli "$@"')
        asked = shlex.quote(str(self.dir / "asked"))
        self._script("systemctl", f'echo "$1" >{asked}; while [ -e {asked} ]; do sleep 0.05; done')
        self.score_file = self.dir / "score"
        self._script("crm_attribute", f'for x; do :; done; echo "$x" >{self.score_file}')
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._systemd, daemon=True)
        self._thread.start()

    def _script(self, name: str, text: str) -> None:
        path = self.dir / "bin" / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def _systemd(self) -> None:
        asked = self.dir / "asked"
        while not self._over.wait(0.02):
            with contextlib.suppress(FileNotFoundError):
                what = asked.read_text().strip()
                p = self.lab.controllers.get(self.role)
                if what == "start" and (p is None or p.poll() is not None):
                    self.lab.start_controller(self.role)
                elif what == "stop" and p is not None:
                    stop_process(p)
                if what:
                    asked.unlink()

    def __call__(self, action: str, *, timeout: int = 60, interval: int = 10) -> int:
        env = {
            **os.environ,
            "PATH": f"{self.dir}/bin:{os.environ['PATH']}",
            "OCF_RESKEY_config": str(self.lab.config_path(self.role)),
            "OCF_RESKEY_binary": str(self.dir / "bin/colo-xdp"),
            "OCF_RESKEY_CRM_meta_timeout": str(timeout * 1000),
            "OCF_RESKEY_CRM_meta_interval": str(interval * 1000),
            "OCF_RESOURCE_INSTANCE": f"web1:{self.role}",
            "HA_RSCTMP": str(self.dir),
        }
        r = subprocess.run(
            [str(AGENT), action], env=env, capture_output=True, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip
        print(f"{self.role} {action}: {r.returncode} {r.stderr.strip()}")
        return r.returncode

    def score(self) -> str:
        return self.score_file.read_text().strip()

    def end(self) -> None:
        self._over.set()
        self._thread.join(5)


def test_a_cluster_moves_the_guest_twice(make_lab: LabMaker) -> None:
    lab = make_lab()
    p, s = Node(lab, "primary"), Node(lab, "secondary")
    try:
        story(lab, p, s)
    finally:
        p.end()
        s.end()


def story(lab: Lab, p: Node, s: Node) -> None:
    assert (p("monitor", interval=0), s("monitor", interval=0)) == (NOT_RUNNING, NOT_RUNNING)
    assert (s("start"), p("start")) == (0, 0)
    wait_for(
        "its guest's first word", lambda: p("monitor") == 0 and p.score() == "--update=1000", 20
    )
    assert p("promote") == 0
    protected(lab)
    assert (p("monitor"), s("monitor")) == (PROMOTED, 0)
    assert s.score() == "--update=100"
    work = Work(lab)

    # The first host is put on standby.
    assert p("stop") == 0
    assert p("monitor", interval=0) == NOT_RUNNING
    assert s("promote") == 0 and s("monitor") == PROMOTED
    work.moves(time.time())
    work.open()

    # It comes back: its guest is over, a new QEMU waits there, the roles have changed.
    assert p("start") == 0 and p.score() == "--delete"
    wait_for("the end of the old PVM", lambda: not lab.vm["primary"].alive, 20)
    lab.start_vm("primary", incoming=True)
    protected(lab)
    assert (lab.status("primary")["role"], lab.status("secondary")["role"]) == (
        "secondary", "primary",
    )  # fmt: skip
    wait_for("its score", lambda: p("monitor") == 0 and p.score() == "--update=100", 20)
    work.open()

    # The active guest's controller dies for good: the cluster moves the guest back.
    lab.controllers["secondary"].send_signal(signal.SIGKILL)
    lab.controllers["secondary"].wait()
    assert s("monitor", timeout=5) == 1
    assert s("demote") == 0
    assert s("stop") == 0
    assert p("promote") == 0 and p("monitor") == PROMOTED
    work.moves(time.time())
    work.end()
