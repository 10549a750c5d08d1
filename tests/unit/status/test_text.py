# SPDX-License-Identifier: GPL-2.0-or-later
"""What `colo-xdp status`, `flows` and `list` print, and that each view shows everything."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from colo_xdp.status.document import empty
from colo_xdp.status.glance import delay, glance, share, size, span
from colo_xdp.status.live import view
from colo_xdp.status.text import flows, pairs, plain, text


def full() -> dict[str, Any]:
    """A primary of which everything can be told."""
    s = empty("web1", "primary").to_json()
    s.update(
        state="paused", reason="both guests are equal as of epoch 7", since=1000.0, epoch=7,
        mode="run", hook="tc", events="ring", uptime_s=200.0, paused=True,
    )  # fmt: skip
    s["active"].update(transmitting=True, lease="held", remaining_s=3.25)
    s["failover"] = {"arbiter": "lease", "automatic": True, "fence": False, "trouble": "slow"}
    s["if_peer_died"] = {
        "outcome": "goes_solo", "needs": ["lease"], "within_s": 5.0, "sentence": "would go on",
    }  # fmt: skip
    s["qemu"].update(connected=True, version="7.2.22", accel="kvm")
    s["peer"].update(connected=True, silent_ms=20.0, state="protected", rtt_us=700.0)
    s["heartbeat_links"] = [
        {"name": "mgmt", "silent_ms": 80.0, "echo_age_ms": 91.0, "rtt_us": 500.0, "sent": 9,
         "received": 8, "refused": {}, "trouble": "half open"},
    ]  # fmt: skip
    s["nics"] = [
        {"name": n, "tap": f"tap-{n}", "peer_link": "eth1", "bridge": "br0", "mac": "52:54:00:1",
         "flows": 11, "held": 13, "trouble": "down"} for n in ("lan", "san")
    ]  # fmt: skip
    s["held"] = {"packets": 17, "bytes": 4096, "limit": 1024}
    s["flows"].update(tracked=19, limit=100_000)
    s["wait"]["buckets"][6] = 10
    s["engine"]["released"] = 23
    s["patience"].update(ms=51.0, source="lag", lag_ms=29.0, checkpoint_ms=31.0, needless=37)
    s["checkpoints"].update(
        total=41, failed=2, delayed=3, delay_s=4.5,
        price={"payload_differs": {"pause_ms": 150.0, "total_ms": 600.0}},
        last={"cause": "operator", "detail": "asked", "pause_ms": 5.1, "total_ms": 6.2,
              "at": 900.0},
    )  # fmt: skip
    s["checkpoints"]["by_cause"].update(payload_differs=30, operator=6, periodic=5)
    s["disks"].update(names=["root"], mirrored=True, overlays={"root": 2048}, room_trouble="little")
    s["ring"]["lost"] = 43
    s["data_path"]["trouble"] = "tap-san is down"
    s["event_log"].update(lost=47, trouble="No space left on device")
    return s


def later(s: dict[str, Any]) -> dict[str, Any]:
    return s | {"uptime_s": s["uptime_s"] + 1}


def test_status_text_tells_why() -> None:
    doc = empty("web1", "secondary").to_json()
    doc["reason"] = "waiting for the primary"
    shown = text(doc, doc["since"] + 7)
    assert "web1 secondary: starting for 7 s" in shown and "waiting for the primary" in shown
    assert "NOT connected" in shown


def test_everything_is_told() -> None:
    s = full()
    shown = text(later(s), 1061.0, s)
    for want in (
        "web1 primary: paused for 1 m 1 s (epoch 7, run)",
        "WARNING: protected but paused: no failover takes place without an operator; tap-san",
        "if the other host died now would go on",
        "lease in etcd, automatic failover; slow",
        "transmits (the lease is held, 3.2 s left)",
        "connected 7.2.22 kvm",
        "sends 0.0 bit/s (0 frames/s), receives 0.0 bit/s (0 frames/s)",
        "17 of 1024 packets, 4.0 KiB",
        "51 ms (lag); the SVM lags by 29 ms, a checkpoint takes 31 ms, 37 were needless",
        "41 in 3 m 21 s, 0.3 % of the time, 2 failed, 3 delayed by 4.5 s in all",
        "30, on average 20 ms with a pause of 5 ms",
        "2 m 41 s ago, operator: asked; pause 5.1 ms, 6.2 ms in all",
        "root: each write goes to both hosts; overlay of root: 2.0 KiB; little",
        "connected protected, round trip 0.7 ms",
        "received 80 ms ago, round trip 0.5 ms, acknowledged 91 ms ago (half open)",
        "tap-lan in br0, 52:54:00:1, peer link eth1: 11 connections, 13 packets held (down)",
        "19 of 100000",
        "tc, events by ring buffer, 43 lost",
        "47 lost: No space left on device",
    ):
        assert want in re.sub(r" +", " ", shown), want
    now = text(s, 1061.0)
    assert "p50 " in now and "p99 " in now and "100 % of the frames left" in now
    assert "both guests sent the same in the last 3 m 20 s" in now
    since = s | {"uptime_s": 190.0}
    assert "no frame waited in the last 10 s" in plain(glance(s, 1061.0, since, since))
    other = since | {"role": "secondary"}
    assert "in the last 3 m 20 s" in plain(glance(s, 1061.0, other, other))
    idle = text(empty("web1", "primary").to_json(), 1.0)
    assert "no frame waited in the last 1 s" in idle and "no frame left compared" in idle
    assert "throughput" not in now, "which needs two looks"
    assert max(map(len, shown.splitlines())) < 200


def test_a_copys_output_is_not_shown_as_what_clients_get() -> None:
    s = full() | {"role": "secondary"}
    s["active"] = s["active"] | {"transmitting": False}
    assert "0.0 bit/s (0 frames/s) go to the primary host only" in text(later(s), 1061.0, s)


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_the_view_without_colour_shows_everything(role: str) -> None:
    """On a terminal without colours, and with NO_COLOR: each line of the text, and no escape."""
    s = full() | {"role": role}
    g = glance(later(s), 1061.0, s)
    console = Console(file=io.StringIO(), width=400, height=200, no_color=True, color_system=None)
    with view(console) as show:
        show(g, "the controller is away")
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"[ │]+", " ", console.file.getvalue())
    assert "\x1b" not in shown
    for line in [g.title, g.health.level, g.health.sentence, "the controller is away"]:
        assert line in shown, line
    for line in g.lines():
        assert f"{line.name} {line.text}" in shown, line
    marked = [line for line in g.lines() if line.level != "OK"]
    assert len(marked) > 4
    for line in marked:
        assert f"! {line.name}" in shown, "a mark, where there is no colour"
        assert re.search(rf"^!.? *{re.escape(line.name)}", plain(g), re.M), line


def test_a_narrow_terminal_folds_and_loses_nothing() -> None:
    g = glance(full(), 1061.0)
    console = Console(file=io.StringIO(), width=60, height=300, color_system=None)
    with view(console) as show:
        show(g, "")
    assert isinstance(console.file, io.StringIO)
    words = re.sub(r"[ │\n]+", "", console.file.getvalue())
    for line in g.lines():
        assert re.sub(r" +", "", line.text) in words, line


def test_a_document_of_any_state_can_be_shown() -> None:
    for role in ("primary", "secondary"):
        s = empty("web1", role).to_json()
        s["disks"].update(names=["root"], copying={"done": 1, "total": 4, "rate": 1.5e6,
                                                   "left_s": None})  # fmt: skip
        s["peer"].update(gone=True)
        shown = text(s, 5.0)
        assert "first copy: 25.0 % of 4 bytes at 1.4 MiB/s" in shown
        assert "NOT connected, heard never; its guest is certainly silent" in shown
        for change, says in (
            ({"copying": None, "lost": "an I/O error"}, "an I/O error"),
            ({"lost": "", "committing": True}, "QEMU merges the overlays"),
            ({"committing": False}, "not mirrored" if role == "primary" else "not exported"),
        ):
            s["disks"].update(change)
            assert says in text(s, 5.0)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (span(0.4), "0 s"), (span(59), "59 s"), (span(61), "1 m 1 s"), (span(7265), "2 h 1 m"),
        (span(180_000), "2 d 2 h"),
        (size(0), "0 bytes"), (size(1023), "1023 bytes"), (size(1536), "1.5 KiB"),
        (size(5 << 40), "5.0 TiB"),
        (delay(2e-5), "20 us"), (delay(1.25e-3), "1.2 ms"), (delay(0.25), "250 ms"),
        (share(1), "100 %"), (share(0.99999), "99.9 %"), (share(0), "0.0 %"),
    ],
)  # fmt: skip
def test_figures(got: str, want: str) -> None:
    assert got == want


def test_flows_as_a_table() -> None:
    r = {"flow": "tcp 10.9.0.2:80 > 10.9.0.1:4000", "proto": "tcp", "port": 80, "rule": "default",
         "path": "kernel", "direction": "in", "bytes": 2048, "held": 1, "wait_ms": 3.25,
         "idle_ms": 1500.0, "nic": ""}  # fmt: skip
    rows = [r, r | {"bytes": None, "nic": "san"}]
    shown = flows({"flows": rows, "matched": 5, "seen": 9, "whole": False})
    assert "2.0 KiB     1       3.2      1.5  kernel" in shown and "4000 at san" in shown
    assert "and 3 more of 9" in shown and "too many connections" in shown
    assert len(flows({"flows": [], "matched": 0, "seen": 0, "whole": True}).splitlines()) == 1


def test_pairs_as_a_table() -> None:
    shown = pairs([
        {"pair": "db", "role": "-", "status": None, "trouble": "no controller runs"},
        {"pair": "web1", "role": "primary", "status": full(), "trouble": ""},
    ])  # fmt: skip
    assert re.search(r"^db +- +- +- +no controller runs$", shown, re.M)
    assert re.search(r"^web1 +primary +paused +protected +WARNING: protected but", shown, re.M)
