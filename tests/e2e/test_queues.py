# SPDX-License-Identifier: GPL-2.0-or-later
"""Test a pair whose guests have four queues and vCPUs each, up to the primary's death."""

from __future__ import annotations

import re
from collections.abc import Callable

from colo_xdp.datapath import devices
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import in_ns, wait_for
from colo_xdp.lab.pair import Lab

QUEUES = 4


def used(lab: Lab) -> int:
    """Return how many of the PVM's queues have transmitted, as its interrupts tell."""
    text = lab.client.run("cat /proc/interrupts")
    rows = re.findall(r"^ *\d+:((?: +\d+)+) .*virtio0-output\.\d+$", text, re.M)
    return sum(sum(map(int, row.split())) > 0 for row in rows)


def test_four_queues(make_lab: Callable[..., Lab]) -> None:
    lab = make_lab(queues=QUEUES)
    lab.protect()
    tap = in_ns(lab.net.primary, lambda: devices.link_info("tap0"))
    assert tap.multi_queue and tap.queues == QUEUES
    for i, name in enumerate(["index.html"] * 20 + ["f100k"] * 10 + ["f1m"] * 4 + ["big"]):
        size, wrong = lab.client.download(name, v6=bool(i % 2))
        assert size > 0 and wrong == 0, name
    for i in range(3):
        assert lab.client.upload(1 << 20, seed=i) == ""
        good, why = lab.client.uptime_page()
        assert good, why
    assert used(lab) > 1, "the guest has spread its connections"
    assert lab.status("primary")["ring"]["lost"] == 0
    stream = EchoStream(lab.net.client)
    wait_for("answers", lambda: len(stream.stats.answered_at) > 20, 30)
    at = lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 30)
    wait_for("echoes after it", lambda: stream.stats.answered_after(at + 1) > 20, 20)
    stats = stream.stop()
    assert not stats.dead and not stats.wrong
    assert lab.client.download("big") == (8 << 20, 0)
    assert lab.client.upload(4 << 20) == ""
