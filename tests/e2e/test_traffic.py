# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a protected pair at work: what clients do, byte by byte, and why checkpoints happen."""

from __future__ import annotations

import hashlib
import http.server
import json
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from colo_xdp.compare.causes import WAITS
from colo_xdp.lab.capture import from_guest
from colo_xdp.lab.client import EchoStream, LineStream
from colo_xdp.lab.net import CLIENT_IP, in_ns, wait_for
from colo_xdp.lab.pair import PAIR, Lab


def settled(lab: Lab) -> dict[str, Any]:
    """Wait until the pair is protected and nothing is held."""
    wait_for(
        "an idle pair",
        lambda: (s := lab.status("primary"))["state"] == "protected" and not s["held"]["packets"],
        20,
    )
    return lab.status("primary")


def by_fast_path(lab: Lab) -> int:
    """Return the number of the PVM's frames that the fast path has released."""
    programs = lab.status("primary")["programs"]
    return sum(
        programs[p].get(r, [0])[0]
        for p in ("pvm_out", "svm_arrival")
        for r in ("offload_passed", "offload_released", "offload_rebuilt")
    )


def causes(lab: Lab) -> dict[str, int]:
    return {k: v for k, v in lab.status("primary")["checkpoints"]["by_cause"].items() if v}


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_downloads_need_no_checkpoint(pair: Lab, v6: bool) -> None:
    before = pair.checkpoints()
    for name in ["index.html"] * 10 + ["f100k"] * 5 + ["f1m"] * 2 + ["big"] * 2:
        size, wrong = pair.client.download(name, v6=v6)
        assert size > 0 and wrong == 0, name
    assert pair.checkpoints() == before
    assert settled(pair)["ring"]["lost"] == 0


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_uploads_arrive_whole(pair: Lab, v6: bool) -> None:
    before = pair.checkpoints()
    for i, size in enumerate((1, 5000, 200_000, 4 << 20)):
        assert pair.client.upload(size, v6=v6, seed=i) == ""
    assert pair.checkpoints() - before <= 2, causes(pair)


@pytest.mark.parametrize("v6", [False, True], ids=["ipv4", "ipv6"])
def test_udp_is_compared(pair: Lab, v6: bool) -> None:
    compared = pair.status("primary")["engine"]["released"]
    decided = by_fast_path(pair)
    answered, wrong = pair.client.udp_echo(100, v6=v6)
    assert answered >= 99 and wrong == 0
    big, wrong = pair.client.udp_echo(5, v6=v6, size=4000)  # fragments
    assert big >= 4 and wrong == 0
    assert by_fast_path(pair) >= decided + 50, "the kernel has decided none"
    all_of_them = pair.status("primary")["engine"]["released"] + by_fast_path(pair)
    assert all_of_them >= compared + decided + 104


def test_a_page_that_differs_costs_one_checkpoint_each(pair: Lab) -> None:
    def asked() -> int:
        # An SVM that a checkpoint has just made slow may be waited for in vain before it differs. A
        # guest that has been up for 9.99 s and one that has for 10.00 end the page elsewhere.
        return sum(causes(pair).get(c, 0) for c in ("payload_differs", "fin_differs", *WAITS))

    before = asked()
    for n in range(5):
        good, why = pair.client.uptime_page()
        assert good, why
        assert asked() > before + n
    divergences = pair.status("primary")["divergences"]
    found = [d for d in divergences if d["cause"] == "payload_differs"][-1]
    assert ":8080 >" in found["flow"]
    assert found["pvm"] != found["svm"]


@contextmanager
def client_server(ns: str) -> Iterator[int]:
    """Run an HTTP server on the client's side, for connections that the guest opens."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"answer to " + self.path.encode() + b"\n" + bytes(range(256)) * 100
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = in_ns(ns, lambda: http.server.ThreadingHTTPServer((CLIENT_IP, 8000), Handler))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def test_connections_that_the_guest_opens(pair: Lab) -> None:
    with client_server(pair.net.client) as port:
        for i in range(4):
            url = f"http://{CLIENT_IP}:{port}/{i}"
            text = pair.client.run(
                f"wget -O /tmp/x {url}; md5sum < /tmp/x | cut -c 1-32 | tail -n 1"
            )
            want = b"answer to /%d\n" % i + bytes(range(256)) * 100
            assert text.split()[-1] == hashlib.md5(want).hexdigest()
    settled(pair)


def test_checkpoints_on_request_do_not_disturb_streams(pair: Lab) -> None:
    echo, lines = EchoStream(pair.net.client), LineStream(pair.net.client)
    wait_for("lines", lambda: lines.lines > 10, 10)
    for _ in range(15):
        r = pair.ask("primary", "checkpoint")
        assert r["cause"] in ("operator", "payload_differs", "compare_timeout")
        assert r["pause_ms"] > 0
    wait_for("more lines", lambda: lines.lines > 40, 10)
    stats = echo.stop()
    lines.stop()
    assert (stats.dead, stats.wrong) == ("", 0) and stats.received > 0
    assert (lines.dead, lines.wrong) == ("", 0)


def test_nothing_of_the_svm_reaches_the_network(pair: Lab) -> None:
    uplink = pair.capture(pair.net.secondary, "uplink", "leak", "out")
    wire = pair.capture(pair.net.client, "to-s", "leak-wire", "in")
    client = pair.capture(pair.net.client, "to-p", "leak-c", "in")
    pair.client.download("f100k")
    pair.client.uptime_page()
    pair.ask("primary", "checkpoint")
    assert from_guest(pair.stop_capture(client)) > 10, "the capture works"
    assert from_guest(pair.stop_capture(uplink)) == 0
    assert from_guest(pair.stop_capture(wire)) == 0


def test_status_and_metrics_tell_the_same(pair: Lab) -> None:
    cmd = [sys.executable, "-m", "colo_xdp.cli", "status", str(pair.config_path("primary"))]
    r = subprocess.run(cmd, capture_output=True, text=True, check=False)
    assert r.returncode == 0 and "OK: protected: either host may fail" in r.stdout, r.stdout
    assert "if the other host died now" in r.stdout and "throughput" in r.stdout
    print(r.stdout)

    def scrape(path: str) -> str:
        url = f"http://127.0.0.1:9847{path}"
        return in_ns(
            pair.net.primary, lambda: urllib.request.urlopen(url, timeout=5).read()
        ).decode()

    text = scrape("/metrics")
    total = pair.checkpoints()
    assert f'colo_xdp_state{{pair="{PAIR}",role="primary",state="protected"}} 1.0' in text
    found = [x for x in text.splitlines() if x.startswith("colo_xdp_checkpoints_total")]
    assert sum(float(x.split()[-1]) for x in found) == total
    assert "protected" in scrape("/readyz")


def test_flows_and_events_tell_of_the_pair_for_status(pair: Lab) -> None:
    """The fast path's connections are shown with their bytes, and stay where they are."""
    assert pair.client.download("big")[1] == 0
    settled(pair)
    before = pair.status("primary")["engine"]["offload_reclaimed"]

    def cli(command: str, role: str, *args: str) -> str:
        cmd = [sys.executable, "-m", "colo_xdp.cli", command, str(pair.config_path(role)), *args]
        r = subprocess.run(cmd, capture_output=True, text=True, check=True)
        print(r.stdout)
        return r.stdout

    rows = json.loads(cli("flows", "primary", "--proto", "tcp", "--json"))["flows"]
    assert rows and rows[0]["bytes"] > 1_000_000, rows
    assert rows[0]["bytes"] == max(r["bytes"] for r in rows)
    assert pair.status("primary")["engine"]["offload_reclaimed"] == before
    assert "default" in cli("flows", "primary", "--sort", "idle", "--limit", "3")
    for role in ("primary", "secondary"):
        story = cli("events", role)
        assert "a controller has started: process " in story
        assert "the other host's controller: connected" in story
        assert "protected: " in story
        assert pair.status(role)["event_log"]["lost"] == 0
        assert pair.status(role)["if_peer_died"]["outcome"] == "operator"  # no arbiter here


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_a_second_controller_is_turned_away_and_harms_nothing(pair: Lab, role: str) -> None:
    cmd = ["nsenter", f"--net=/run/netns/{pair.ns(role)}", sys.executable, "-m", "colo_xdp.cli"]
    r = subprocess.run(
        [*cmd, "run", str(pair.config_path(role))], capture_output=True, text=True, timeout=30
    )
    assert r.returncode == 2 and "another controller" in r.stderr
    pair.ask("primary", "checkpoint")
    assert pair_is_sound(pair)


def stays_up(lab: Lab, role: str) -> None:
    """Kill -9 a controller while a stream runs; the next one takes over."""
    stream = EchoStream(lab.net.client, period=0.05)
    wait_for("echoes", lambda: len(stream.stats.answered_at) > 10, 10)
    lab.controllers[role].send_signal(signal.SIGKILL)
    lab.controllers[role].wait(5)
    lab.start_controller(role)
    lab.wait_state("primary", "protected", 30)
    lab.wait_state("secondary", "protected", 30)
    n = len(stream.stats.answered_at)
    wait_for("echoes afterwards", lambda: len(stream.stats.answered_at) > n + 20, 20)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)
    assert pair_is_sound(lab)


def pair_is_sound(lab: Lab) -> bool:
    size, wrong = lab.client.download("f1m")
    return size > 0 and wrong == 0


def test_primary_controller_dies_and_comes_back(pair: Lab) -> None:
    stays_up(pair, "primary")
    assert causes(pair).get("controller_restart") == 1


def test_secondary_controller_dies_and_comes_back(pair: Lab) -> None:
    stays_up(pair, "secondary")
