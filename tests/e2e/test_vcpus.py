# SPDX-License-Identifier: GPL-2.0-or-later
"""Test pairs whose guests have several vCPUs, with locks that are granted in another order."""

from __future__ import annotations

import re

import pytest

from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import in_ns, wait_for
from tests.bench import waits

from .conftest import LabMaker

#: pairs of clients that want the lock
PAIRS = 12
BROKEN = re.compile(r"BUG:|Oops:|Kernel panic -|corruption|soft lockup - |general protection fault")


@pytest.mark.parametrize("vcpus, thread", [(2, "multi"), (4, "single")])
def test_several_vcpus(make_lab: LabMaker, vcpus: int, thread: str) -> None:
    lab = make_lab(vcpus=vcpus, thread=thread, overrides={"compare": {"wait": "adaptive"}})
    lab.protect()
    assert lab.client.run("grep -c ^processor /proc/cpuinfo").strip() == str(vcpus)
    waits.install(lab, "lock", waits.LOCK, waits.LOCK_PORT)
    seen = waits.Seen()
    for n in range(PAIRS):
        in_ns(lab.net.client, lambda n=n: waits.pair_of_clients(n, seen))  # type: ignore[misc]
    assert len(seen.times) == 2 * PAIRS and not seen.wrong
    for i, name in enumerate(["index.html"] * 10 + ["f100k"] * 4 + ["f1m"] * 2):
        size, wrong = lab.client.download(name, v6=bool(i % 2))
        assert size > 0 and wrong == 0, name
    lab.wait_state("primary", "protected", 20)
    stream = EchoStream(lab.net.client)
    wait_for("answers", lambda: len(stream.stats.answered_at) > 20, 30)
    at = lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 30)
    wait_for("echoes after it", lambda: stream.stats.answered_after(at + 1) > 20, 20)
    stats = stream.stop()
    assert not stats.dead and not stats.wrong
    assert lab.client.run("grep -c ^processor /proc/cpuinfo").strip() == str(vcpus)
    for n in range(PAIRS, PAIRS + 2):
        in_ns(lab.net.client, lambda n=n: waits.pair_of_clients(n, seen))  # type: ignore[misc]
    assert not seen.wrong
    assert lab.client.download("big") == (8 << 20, 0)
    assert lab.client.upload(1 << 20) == ""
    assert not BROKEN.findall(lab.client.run("dmesg")), "of a copy that lacks what was written"
