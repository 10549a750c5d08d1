# SPDX-License-Identifier: GPL-2.0-or-later
"""The history of a real controller: what it has, and what it costs at rest."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from colo_xdp.controller.primary import Primary
from colo_xdp.datapath.host import HostDataPath
from colo_xdp.status import builder, sampler
from colo_xdp.status.history import History
from colo_xdp.tools import cleanup
from tests.netns import test_two_pairs as two_pairs
from tests.netns.conftest import Net, inside
from tests.netns.test_primary_path import PAIR, config
from tests.unit.status.serving import get


def cpu_ms(f: Callable[[], object]) -> float:
    """Median of this thread's CPU time."""
    spent = []
    for _ in range(100):
        began = time.thread_time()
        f()
        spent.append((time.thread_time() - began) * 1000)
    return statistics.median(spent)


def test_a_row_takes_less_than_a_millisecond(net: Net, tmp_path: Path) -> None:
    cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)
    c = config(tmp_path)
    dp = HostDataPath.load(c)
    try:
        controller, history = Primary(c, dp), History(0.0)
        row = cpu_ms(lambda: history.add(sampler.reading(controller), 0.0, 0.0))
        whole = cpu_ms(lambda: builder.status(controller))
        print(f"a row takes {row:.2f} ms, the document {whole:.2f} ms")
        assert row < 1
        got, said = sampler.reading(controller), builder.status(controller)
        counted = said["programs"]["pvm_out"]
        assert {k: list(v) for k, v in got["programs"]["pvm_out"].items()} == counted
        assert got["offload"]["waits"] == said["offload"]["waits"]
    finally:
        dp.close()
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(tmp_path), force=True)


def test_a_controller_serves_its_page_and_takes_rows(net: Net, tmp_path: Path) -> None:
    two_pairs.sh("ip", "-n", net.host, "link", "set", "lo", "up")
    run = two_pairs.Run(net, two_pairs.write(tmp_path, two_pairs.A, 0))
    try:
        run.until_on("tap0", "pvm_out")
        url, rows = "http://127.0.0.1:19850", []
        end = time.monotonic() + 60
        while not rows and time.monotonic() < end:
            time.sleep(0.5)
            with inside(net.host):
                history = json.loads(get(url + "/history.json")[1])
            rows = history["rows"]
        (first, *_) = (dict(zip(history["columns"], r, strict=True)) for r in rows)
        with inside(net.host):
            said = json.loads(get(url + "/status.json")[1])
            assert get(url + "/")[1].startswith("<!DOCTYPE html>")
            assert get(url + "/status.json", Host="evil.example")[0] == 421
        assert first["state"] == said["state"] and abs(first["at"] - time.time()) < 60
    finally:
        run.stop()
        cleanup.cleanup(two_pairs.A, "/sys/fs/bpf", str(tmp_path), force=True)
