# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp doctor` beside running controllers: it asks them, and each asks the other host's."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

from colo_xdp.lab.pair import Lab


def doctor(lab: Lab, role: str, *options: str) -> subprocess.CompletedProcess[str]:
    cmd = ["nsenter", f"--net=/run/netns/{lab.ns(role)}", sys.executable, "-m", "colo_xdp.cli"]
    return subprocess.run(
        [*cmd, "doctor", str(lab.config_path(role)), *options],
        capture_output=True, text=True, check=False, timeout=90,
    )  # fmt: skip


def found(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {c["key"]: c for c in report["checks"]}


def test_beside_a_running_pair_nothing_fails(pair: Lab) -> None:
    """Both hosts' answers in one call; what the controllers occupy is asked of them."""
    before = {role: pair.status(role) for role in ("primary", "secondary")}
    began = time.monotonic()
    r = doctor(pair, "primary", "--peer", "--json")
    took = time.monotonic() - began
    doc = json.loads(r.stdout)
    failing = [
        (report["role"], c["key"], c["text"])
        for report in (doc, doc["peer"])
        for c in report["checks"]
        if c["level"] == "fail"
    ]
    assert not failing and r.returncode == 0, (failing, r.stderr)
    assert took < 30
    for report, role in ((doc, "primary"), (doc["peer"], "secondary")):
        assert report["role"] == role and report["controller"] is True
        checks = found(report)
        for key in ("QEMU", "other host", "data path", "heartbeats"):
            assert checks[key]["level"] == "ok", checks[key]
            assert checks[key]["text"].endswith("(by the running controller)"), checks[key]
        for key in ("controller", "NICs", "disks", "guest_announce", "addresses", "isolation"):
            assert checks[key]["level"] == "ok", checks[key]
        assert "in use" not in checks and "both ways" in checks["heartbeats"]["text"]
    both = {c["key"]: c for c in doc["both"]}
    assert both["clocks"]["level"] == both["releases"]["level"] == "ok", both
    for role, s in before.items():
        now = pair.status(role)
        assert now["state"] == s["state"] == "protected" and now["failures"] == s["failures"] == []


def test_what_is_of_a_running_pair_is_left_alone(pair: Lab) -> None:
    """`--fix` names the remedy and does not touch the data path of a pair that runs."""
    at = ("ip", "-n", pair.ns("primary"), "link", "set", "br0")
    subprocess.run([*at, "down"], check=True)
    try:
        r = doctor(pair, "primary", "--fix")
        assert r.returncode == 1, r.stdout
        assert "left  ip link set br0 up: a controller of this pair runs" in r.stdout
        assert "FAIL  bridge: br0 is down" in r.stdout
    finally:
        subprocess.run([*at, "up"], check=True)
    assert pair.status("primary")["state"] == "protected"


def test_the_columns_of_both_hosts(pair: Lab) -> None:
    r = doctor(pair, "secondary", "--peer")
    assert r.returncode == 0, r.stdout + r.stderr
    lines = r.stdout.splitlines()
    assert len(lines[0].split()) == 2, "the names of the hosts"
    (line,) = (x for x in lines if x.endswith("  data path"))
    assert line.split()[:2] == ["ok", "ok"]
    assert any(x.startswith("ok    clocks: ") for x in lines)
