# SPDX-License-Identifier: GPL-2.0-or-later
"""Test entries into COLO that fail, and what they cost the guest."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.lab import vm as vms
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker

#: a controller beside which another tool turns a capability on, just before `migrate`
MEDDLED = """
from colo_xdp import cli
from colo_xdp.qemu import qmp
prepare = qmp.Qmp.prepare
async def meddled(self, **options):
    await prepare(self, **options)
    caps = [{"capability": "CAPABILITY", "state": True}]
    await self.execute("migrate-set-capabilities", {"capabilities": caps})
qmp.Qmp.prepare = meddled
cli.main()
"""


def left_on(lab: Lab, role: str, *names: str) -> None:
    caps = [{"capability": n, "state": True} for n in names]
    lab.vm[role].ask("migrate-set-capabilities", capabilities=caps)


@pytest.mark.parametrize("capability", ["return-path", "pause-before-switchover"])
def test_an_entry_that_leads_nowhere_costs_the_guest_seconds(
    make_lab: LabMaker, capability: str
) -> None:
    """QEMU before 11: one ends in `completed`, the PVM in `postmigrate`; the other waits in
    `pre-switchover`.

    The guest keeps running, and an entry that fails twice is not retried for ever.
    """
    if vms.qemu_version(vms.chosen_qemu()) >= (11, 0, 0):
        pytest.skip("QEMU 11 enters COLO with both")
    lab = make_lab()
    script = lab.work / "meddled.py"
    script.write_text(MEDDLED.replace("CAPABILITY", capability))
    for role in ("secondary", "primary"):
        cmd = [sys.executable, str(script), "run", str(lab.config_path(role))]
        env = {"COLO_XDP_LOG": "INFO", "PYTHONUNBUFFERED": "1"}
        lab.controllers[role] = lab.procs.start(cmd, lab.controller_log(role), lab.ns(role), env)

    def failed() -> dict[str, Any] | None:
        s = lab.status("primary")
        return s if "COLO was not entered" in s.get("reason", "") else None

    s = wait_for("the failure", failed, 60)
    at = time.monotonic()
    wait_for(
        "the PVM to run", lambda: lab.vm["primary"].ask("query-status")["status"] == "running", 1.5
    )
    ran_s = time.monotonic() - at
    assert s["state"] == "starting" and s["mode"] == "bypass"
    assert lab.client.http("index.html", timeout=5).ok
    print(f"ran on {ran_s:.2f} s after: {s['reason']}")
    wait_for("the secondary's word", lambda: given_up(lab), 10)
    wait_for("the end of its QEMU", lambda: not lab.vm["secondary"].alive, 10)
    lab.start_vm("secondary")  # an operator starts another one
    wait_for("a second failure", lambda: "2 times" in lab.status("primary")["reason"], 60)
    assert lab.vm["primary"].ask("query-status")["status"] == "running"
    assert lab.client.http("index.html", timeout=5).ok


def given_up(lab: Lab) -> bool:
    """Return whether its QEMU is useless now: it has loaded the guest, or exited by itself."""
    s = lab.status("secondary")
    stopped = s["state"] == "stopped" and "has given up entering COLO" in s["reason"]
    return stopped or "waiting for another one" in s["reason"]


def test_a_secondary_whose_qemu_dies_on_the_way_says_so(make_lab: LabMaker) -> None:
    lab = make_lab()
    for role in ("secondary", "primary"):
        lab.start_controller(role)
    wait_for(
        "the entry",
        lambda: "checkpoint to epoch 1" in lab.status("secondary").get("reason", ""),
        60,
    )
    lab.vm["secondary"].kill9()
    wait_for("its word", lambda: "waiting for another one" in lab.status("secondary")["reason"], 5)
    s = lab.wait_state("primary", "starting", 10)
    assert s["active"]["transmitting"]
    wait_for(
        "the PVM to run", lambda: lab.vm["primary"].ask("query-status")["status"] == "running", 2
    )
    assert lab.client.http("index.html", timeout=5).ok
    lab.start_vm("secondary")
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected")


def test_a_disk_that_nobody_keeps_equal_is_refused_by_name(
    make_lab: LabMaker, tmp_path: Path
) -> None:
    lab = make_lab()
    image = tmp_path / "disk.raw"
    image.write_bytes(bytes(1 << 20))
    for role in ("primary",):
        lab.vm[role].ask(
            "blockdev-add",
            **{
                "driver": "raw",
                "node-name": "data",
                "file": {"driver": "file", "filename": str(image)},
            },
        )
        lab.vm[role].ask("device_add", driver="virtio-blk-pci", id="vd9", drive="data")
    for role in ("secondary", "primary"):
        lab.start_controller(role)
    wait_for("the refusal", lambda: "disk data" in lab.status("primary").get("reason", ""), 60)
    s = lab.status("primary")
    assert s["state"] == "starting" and str(image) in s["reason"] and s["active"]["transmitting"]
    assert lab.client.http("index.html", timeout=5).ok
    lab.vm["primary"].ask("device_del", id="vd9")  # the guest answers, and the pair is protected
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected")


def test_what_another_tool_has_left_on_is_turned_off(make_lab: LabMaker) -> None:
    names = ("return-path", "pause-before-switchover")
    lab = make_lab()
    for role in ("primary", "secondary"):
        left_on(lab, role, *names)
    lab.protect()
    assert lab.client.uptime_page()[0]
    for role in ("primary", "secondary"):
        caps = lab.vm[role].ask("query-migrate-capabilities")
        on = {c["capability"] for c in caps if c["state"]}
        needed = {"return-path"} if vms.qemu_version(lab.qemu) >= (11, 0, 0) else set()
        assert on & set(names) == needed, role
