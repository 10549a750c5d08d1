# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the operator's commands that show why a real pair took checkpoints, and how to save them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from colo_xdp.lab.vm import MACS
from colo_xdp.tools.pcap import read
from colo_xdp.tools.suggest import MIN_SEEN


def cli(*args: object) -> tuple[int, str]:
    r = subprocess.run(
        [sys.executable, "-m", "colo_xdp.cli", *map(str, args)],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return r.returncode, r.stdout + r.stderr


def pages(lab: Lab, n: int) -> None:
    for _ in range(n):
        good, why = lab.client.uptime_page()
        assert good, why


def differing(lab: Lab) -> int:
    return int(lab.status("primary")["checkpoints"]["by_cause"].get("payload_differs", 0))


def test_explain_capture_suggest_and_a_rule(pair: Lab, tmp_path: Path) -> None:
    config = pair.config_path("primary")
    pages(pair, MIN_SEEN)
    code, out = cli("explain", config)
    assert code == 0 and "payload_differs       tcp       8080  default" in out, out
    assert "^^" in out and "PVM" in out
    code, out = cli("capture", config, "-w", tmp_path / "d.pcapng")
    assert code == 0, out
    frames = [f.data for f in read(tmp_path / "d.pcapng")]
    assert len(frames) >= 2 * MIN_SEEN and frames[0] != frames[1]
    code, out = cli("suggest", config)
    assert code == 0 and '+port = "8080"' in out, out

    before = config.read_text()
    rule = '[[rule]]\nname = "clock"\naction = "drop-secondary"\nprotocol = "tcp"\nport = "8080"\n'
    try:
        config.write_text(before + rule)
        code, out = cli("reload", config)
        assert code == 0 and "1 rules" in out, out
        wait_for(
            "the checkpoint of the new rules",
            lambda: pair.status("primary")["checkpoints"]["by_cause"].get("policy"), 20,
        )  # fmt: skip
        pair.wait_state("primary", "protected", 20)
        n = differing(pair)
        pages(pair, 4)
        assert differing(pair) == n
        row = next(r for r in pair.status("primary")["rules"] if r["name"] == "clock")
        assert row["flows"] >= 4 and row["uncompared"] >= 8
        assert pair.status("primary")["programs"]["pvm_in"]["pass_unmirrored"][0] > 0
        code, out = cli("policy", config)
        assert code == 0 and "clock" in out and "drop-secondary" in out
        config.write_text(before + rule.replace("8080", "many"))
        code, out = cli("reload", config)
        assert (code == 1 and "many" in out) or "rule" in out, out
    finally:
        config.write_text(before)
    assert cli("reload", config)[0] == 0
    wait_for(
        "the second policy checkpoint",
        lambda: pair.status("primary")["checkpoints"]["by_cause"].get("policy") == 2, 20,
    )  # fmt: skip
    size, wrong = pair.client.download("f1m")
    assert size > 0 and wrong == 0


def test_captures_of_both_taps_replayed_need_no_checkpoint(pair: Lab) -> None:
    pair.wait_state("primary", "protected", 20)
    taps = [
        pair.capture(pair.ns(role), "tap0", f"replay-{role}", whole=True)
        for role in ("primary", "secondary")
    ]
    for name in ("index.html", "f100k", "f1m", "f100k"):
        size, wrong = pair.client.download(name)
        assert size > 0 and wrong == 0
    wait_for("an idle pair", lambda: not pair.status("primary")["held"]["packets"], 20)
    for c in taps:
        pair.stop_capture(c)
    args = [str(c.path) for c in taps]
    code, out = cli("replay", *args)
    if "--guest-mac" in out:  # one client: either could be the guest
        code, out = cli("replay", *args, "--guest-mac", MACS[0])

    assert code == 0 and "checkpoints  0" in out, out
