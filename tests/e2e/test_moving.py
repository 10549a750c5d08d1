# SPDX-License-Identifier: GPL-2.0-or-later
"""A running service moves over from QEMU's own proxy and back, as docs/operator/moving.md says."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from colo_xdp.datapath import attach, loader
from colo_xdp.datapath.manifest import manifest_path
from colo_xdp.lab.client import EchoStream
from colo_xdp.lab.net import in_ns, stop_process, wait_for
from colo_xdp.lab.pair import PAIR, Lab
from colo_xdp.tools import cleanup
from tests.bench.arms import Events, QemuLab, prove
from tests.e2e.conftest import BUILD, fixed_wait

#: the primary's objects, in the order in which they are removed
OBJECTS = ("comp0", "iothread1", "m0", "redire0", "redire1")
#: s; the page has what was seen, and a busy machine takes longer
SILENCE_S = 20.0


class MovingLab(QemuLab):
    """A pair that begins with QEMU's proxy."""

    late = True


@pytest.fixture
def lab() -> Iterator[MovingLab]:
    made = MovingLab(BUILD, tag="cxe2e", overrides=fixed_wait({}))
    try:
        made.up()
        made.net.join(made.net.primary)
        yield made
    finally:
        made.down()


def proven(lab: MovingLab) -> None:
    """QEMU's proxy is in the path: what differs costs a checkpoint."""
    events = Events(lab.vm["primary"].qmp_oob)
    try:
        prove(lab, events)
    finally:
        events.close()


def longest(s: EchoStream, since: float) -> float:
    """Return the longest silence of a connection, s."""
    at = [since, *(t for t in s.stats.answered_at if t > since)]
    return max(b - a for a, b in zip(at, at[1:], strict=False))


def answers(made: list[EchoStream], since: float) -> None:
    for s in made:
        wait_for(
            "echoes",
            lambda s=s: s.stats.dead or s.stats.answered_after(since) > 30,  # type: ignore[misc]
            20,
        )
        assert (s.stats.dead, s.stats.wrong) == ("", 0)


def step(made: list[EchoStream], what: str, began: float) -> float:
    """The connections live on. Print, for the page, their longest silence; return the time."""
    answers(made, time.time())
    silence = max(longest(s, began) for s in made)
    print(f"{what}: {time.time() - began:.1f} s, longest silence {silence:.2f} s")
    assert silence < SILENCE_S, what
    return time.time()


def end_qemus_colo(lab: MovingLab) -> None:
    lab.vm["secondary"].stop()
    p = lab.vm["primary"]
    for name in OBJECTS:
        p.ask("object-del", id=name)
    p.ask("x-colo-lost-heartbeat")
    wait_for("a guest that runs alone", lambda: p.ask("query-status")["running"], 20)


def start_ours(lab: MovingLab) -> None:
    Lab.start_vm(lab, "secondary")
    lab.start_controller("secondary")
    wait_for("the secondary's controller", lambda: lab.status("secondary").get("state"), 60)
    lab.start_controller("primary")
    for role in ("primary", "secondary"):
        lab.wait_state(role, "protected", 90)


def end_ours(lab: MovingLab) -> None:
    lab.vm["secondary"].stop()
    lab.wait_state("primary", "solo", 30)
    for role in ("secondary", "primary"):
        stop_process(lab.controllers.pop(role))
    # `colo-xdp cleanup` on both hosts. Here they are two namespaces with one run_dir and the same
    # numbers of devices, so it would take the primary's tap for the secondary's.
    run_dir = str(lab.work)

    def clean_secondary() -> None:
        attach.detach_all(manifest_path(run_dir, PAIR, "secondary"))
        loader.remove_pins(loader.pin_dir("/sys/fs/bpf", PAIR, "secondary"))

    in_ns(lab.net.secondary, clean_secondary)
    in_ns(lab.net.primary, lambda: cleanup.cleanup(PAIR, "/sys/fs/bpf", run_dir))


def start_qemus_colo(lab: MovingLab) -> None:
    secondary = lab.start_vm("secondary")
    wait_for("the secondary's QEMU", secondary.lab_qmp.exists, 20)
    lab.vm["primary"].ask("object-add", **{"qom-type": "iothread", "id": "iothread1"})
    lab.protect()


@pytest.mark.timeout(600)
def test_a_running_service_moves_over_and_back(lab: MovingLab) -> None:
    lab.protect()
    proven(lab)
    made = [EchoStream(lab.net.client), EchoStream(lab.net.client, v6=True)]
    answers(made, time.time())

    began = time.time()
    end_qemus_colo(lab)
    began = step(made, "QEMU's COLO ends", began)
    start_ours(lab)
    began = step(made, "the controllers protect", began)
    before = lab.checkpoints()
    assert lab.client.uptime_page() == (True, "")
    assert lab.checkpoints() > before

    began = time.time()
    end_ours(lab)
    began = step(made, "the controllers are gone", began)
    start_qemus_colo(lab)
    proven(lab)
    step(made, "QEMU's COLO protects", began)
    for s in made:
        assert s.stop().dead == ""
