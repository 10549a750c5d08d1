# SPDX-License-Identifier: GPL-2.0-or-later
"""Test what clients pay on bad days: a lossy link, clients that provoke, a slow channel."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.datapath import attach, compiler
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import in_ns, sh, wait_for
from colo_xdp.lab.pair import PAIR, Lab
from colo_xdp.service.control_socket import ControlError

from .conftest import LabMaker

_DROP = """
#include <uapi/linux/bpf.h>
#include <uapi/linux/pkt_cls.h>
int lose(struct __sk_buff *skb)
{
    return bpf_get_prandom_u32() % 100 < PERCENT ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}
"""
#: s; a client's own retransmissions (0.2, 0.4, 0.8 ...) and compare_timeout come to less
BOUND_S = 8.0
#: of the time for checkpoints, in per cent: so small that this laboratory's clients exceed it
SHARE = 1


@contextmanager
def losing(lab: Lab, percent: int) -> Iterator[None]:
    """Have the peer link lose frames at random, in both directions."""
    bpf = compiler.compile_text(_DROP.replace("PERCENT", str(percent)))
    program: Any = SimpleNamespace(fd=bpf.load_func(b"lose", 3).fd, name="lose")
    for role in ("primary", "secondary"):
        in_ns(lab.ns(role), lambda: attach.attach_tc("peer0", "egress", program, PAIR, None))
    try:
        yield
    finally:
        for role in ("primary", "secondary"):
            sh("tc", "-n", lab.ns(role), "filter", "del", "dev", "peer0", "egress")


def longest_gap(times: list[float]) -> float:
    return max(b - a for a, b in pairwise(times))


@pytest.mark.parametrize("percent", [1, 10])
def test_a_peer_link_that_loses_frames(make_lab: LabMaker, percent: int) -> None:
    lab = make_lab(overrides={"compare": {"wait": "adaptive"}})
    lab.protect()
    stream = EchoStream(lab.net.client)
    wait_for("answers", lambda: len(stream.stats.answered_at) > 20, 30)
    with losing(lab, percent):
        for _ in range(15):
            for name in ("index.html", "f100k"):
                f = lab.client.http(name, timeout=BOUND_S)
                assert f.ok and f.body == content(name), (name, f.error, lab.status("primary"))
                assert f.seconds < BOUND_S
        by_cause = lab.status("primary")["checkpoints"]["by_cause"]
    assert percent == 1 or by_cause["frame_lost"], "a hole in a stream is not waited for"
    lab.wait_state("primary", "protected", 30)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)
    assert longest_gap(stats.answered_at) < BOUND_S


def test_clients_that_provoke_a_difference_with_each_request(make_lab: LabMaker) -> None:
    """Checkpoints take their share of the time, and others are served."""
    lab = make_lab(overrides={"compare": {"wait": "adaptive"}, "checkpoint": {"share": SHARE}})
    lab.protect()
    stream = EchoStream(lab.net.client)
    wait_for("answers", lambda: len(stream.stats.answered_at) > 20, 30)
    before, enough = lab.status("primary")["checkpoints"], threading.Event()
    said: list[str] = []

    def provoke() -> None:
        while not enough.is_set():
            good, why = lab.client.uptime_page()
            if not good:
                said.append(why)

    threads = [threading.Thread(target=provoke) for _ in range(4)]
    for t in threads:
        t.start()

    def after() -> dict[str, Any]:
        return dict(lab.status("primary")["checkpoints"])

    try:  # a slow guest needs longer to use up what several in a row may take
        wait_for("a delayed one", lambda: after()["delay_s"] > before["delay_s"], 60, poll=0.5)
    finally:
        enough.set()
        for t in threads:
            t.join()
    assert not said, said[:3]
    assert after()["total"] >= before["total"] + 4 and after()["delayed"] > before["delayed"]
    lab.wait_state("primary", "protected", 20)
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)
    assert longest_gap(stats.answered_at) < BOUND_S


def test_a_checkpoint_that_takes_longer_than_its_deadline(make_lab: LabMaker) -> None:
    """The guest has written more than the channel carries: it goes on alone, and says so."""
    deadline_s = 3.0

    def ask() -> None:
        with suppress(ControlError):  # it reports that this one failed
            lab.ask("primary", "checkpoint")

    lab = make_lab(tcp=True, overrides={"checkpoint": {"deadline": int(deadline_s * 1000)}})
    lab.protect()
    stream = EchoStream(lab.net.client)
    wait_for("answers", lambda: len(stream.stats.answered_at) > 20, 30)
    slow = ("root", "tbf", "rate", "20mbit", "burst", "64k", "latency", "200ms")
    sh("tc", "-n", lab.net.primary, "qdisc", "replace", "dev", "peer0", *slow)
    lab.client.run("dd if=/dev/urandom of=/tmp/dirty bs=1M count=24")
    asked = threading.Thread(target=ask)
    asked.start()
    s = lab.wait_state("primary", "solo", 60)
    asked.join(BOUND_S)
    assert "deadline" in s["reason"], s["reason"]
    sh("tc", "-n", lab.net.primary, "qdisc", "del", "dev", "peer0", "root")
    mark = time.time()
    wait_for("answers of a guest that is alone", lambda: stream.stats.answered_after(mark) > 20, 20)
    size, wrong = lab.client.download("f1m")
    assert size > 0 and wrong == 0
    stats = stream.stop()
    assert (stats.dead, stats.wrong) == ("", 0)
    assert longest_gap(stats.answered_at) < deadline_s + BOUND_S
