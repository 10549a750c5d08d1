# SPDX-License-Identifier: GPL-2.0-or-later
"""Test that a survivor gets a new secondary repeatedly, with clients' connections open."""

from __future__ import annotations

import time

import pytest

from colo_xdp.lab.client import EchoStream, LineStream
from colo_xdp.lab.net import wait_for
from colo_xdp.lab.pair import Lab
from tests.e2e.conftest import LabMaker


def other(role: str) -> str:
    return "secondary" if role == "primary" else "primary"


class Work:
    """Connections from every age of the pair, each checked to its end."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.lines = LineStream(lab.net.client)
        self.echoes: list[EchoStream] = []
        self.open()

    def open(self) -> None:
        self.echoes += [EchoStream(self.lab.net.client, v6=v6) for v6 in (False, True)]
        self.moves(time.time())

    def moves(self, since: float) -> None:
        for i, s in enumerate(self.echoes):
            wait_for(
                f"echoes of connection {i}",
                lambda s=s: s.stats.dead or s.stats.answered_after(since) > 10,  # type: ignore[misc]
                30,
            )
            assert (s.stats.dead, s.stats.wrong) == ("", 0), f"connection {i}"
        n = self.lines.lines
        wait_for("lines", lambda: self.lines.dead or self.lines.lines > n + 5, 30)
        assert (self.lines.dead, self.lines.wrong) == ("", 0)
        size, wrong = self.lab.client.download("f1m")
        assert size > 0 and wrong == 0

    def end(self) -> None:
        for s in self.echoes:
            stats = s.stop()
            assert (stats.dead, stats.wrong) == ("", 0)
        self.lines.stop()
        assert (self.lines.dead, self.lines.wrong) == ("", 0)


def protected(lab: Lab) -> None:
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 60)


def test_a_primary_that_is_alone_gets_a_new_secondary(make_lab: LabMaker) -> None:
    lab = make_lab()
    lab.protect()
    work = Work(lab)
    for _ in range(2):
        lab.vm["secondary"].kill9()
        lab.wait_state("primary", "solo", 15)
        work.open()
        lab.start_vm("secondary")
        protected(lab)
        work.open()
        lab.ask("primary", "checkpoint")
        work.moves(time.time())
    lab.vm["primary"].kill9()
    lab.wait_state("secondary", "promoted", 15)
    work.moves(time.time())
    work.end()


@pytest.mark.parametrize("vnet_hdr", [True, False], ids=["tc-offloads", "xdp-plain"])
def test_a_connection_lives_through_three_takeovers(make_lab: LabMaker, vnet_hdr: bool) -> None:
    lab = make_lab(vnet_hdr=vnet_hdr)
    lab.protect()
    work = Work(lab)
    pvm = "primary"
    for turn in range(3):
        svm = other(pvm)
        lab.vm[pvm].kill9()
        lab.wait_state(svm, "promoted", 15)
        work.moves(time.time())
        lab.start_vm(pvm, incoming=True)
        protected(lab)
        assert lab.status(svm)["role"] == "primary" and lab.status(pvm)["role"] == "secondary"
        work.moves(time.time())
        before = lab.status(svm)["checkpoints"]["total"]
        work.moves(time.time())
        assert lab.status(svm)["checkpoints"]["total"] == before, "compared, and equal"
        for _ in range(2):
            lab.ask(svm, "checkpoint")
            work.moves(time.time())
        work.open()  # its offset is of this epoch
        said = lab.controller_log(svm).read_text()
        assert "handing the offsets of" in said, "they did have other numbers"
        print(f"turn {turn}: {len(work.echoes)} connections")
        pvm = svm
    work.end()
