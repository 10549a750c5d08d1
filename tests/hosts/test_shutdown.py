# SPDX-License-Identifier: GPL-2.0-or-later
"""Shut hosts down in order: the other one serves the clients before anything here is stopped.

Nobody is fenced, and a client's connection hardly notices. Each test continues with what the
previous one has left, a protected pair; so the guest runs in each of the units in which it can.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import pytest

from colo_xdp.lab.client import EchoStream, LineStream
from colo_xdp.lab.net import wait_for

from .host import CLIENT, Host
from .pair import CONTROLLER, Pair

pytestmark = pytest.mark.usefixtures("pair")

HANDOVER = "colo-xdp-handover@web1.service"
QEMU = "qemu-system-x86_64.*-qmp"
#: A switchover costs clients some 0.1 s, or a retransmission; a fence comes after 2 s at the
#: earliest, and then TCP's retransmissions have backed off.
GAP_S = 2.0


@dataclass(frozen=True)
class Clients:
    """A connection whose answers are timed, and one on which the guest counts."""

    echo: EchoStream
    lines: LineStream

    def answered(self, more: int) -> None:
        """Wait for so many further answers, and lines, from now on."""
        seen, counted = len(self.echo.stats.answered_at), self.lines.lines
        wait_for("answers", lambda: len(self.echo.stats.answered_at) > seen + more, 30)
        wait_for("lines", lambda: self.lines.lines > counted, 30)

    def gap_s(self, since: float) -> float:
        """Return the longest time between two answers."""
        return max(b - a for a, b in pairwise(t for t in self.echo.stats.answered_at if t > since))


@pytest.fixture
def clients(pair: Pair) -> Iterator[Clients]:
    """Provide a protected pair with two connections, which live on with every byte right."""
    pair.wait_protected()
    pair.forget_fences()
    c = Clients(EchoStream(CLIENT), LineStream(CLIENT))
    try:
        c.answered(20)
        yield c
    finally:
        st = c.echo.stop()
        c.lines.stop()
    assert not st.dead and not st.wrong, (st.dead, st.wrong)
    assert not c.lines.dead and not c.lines.wrong, (c.lines.dead, c.lines.odd)


def journal(h: Host, unit: str, since: str) -> str:
    return h.run("journalctl", "--quiet", "--no-pager", f"--unit={unit}", since)


def shut_down(p: Pair, h: Host, how: str, clients: Clients, state: str, unit: str) -> str:
    """Shut a host down whose QEMU is in that unit; the other's guest is then in that state.

    Returns the journal of the other one's controller since.
    """
    other = p.b if h is p.a else p.a
    (qemu,) = h.pids(QEMU)
    assert h.unit_of(qemu).startswith(unit)
    said = h.run("colo-xdp", "doctor", "--json", "/etc/colo-xdp/web1.toml", check=False)
    found = [c for c in json.loads(said)["checks"] if c["key"] == "unit"]
    assert found and all(c["level"] == "ok" for c in found), found
    began = time.time()
    h.shut_down(how)
    s = p.wait(other, f"a guest that is {state}", lambda s: s["state"] == state, 5)
    assert "host shuts down" in s["reason"], "it knows why"
    clients.answered(50)
    gap = clients.gap_s(began - 1)
    print(f"host{h.name}: {how}: the longest gap between two answers: {gap * 1e3:.0f} ms")
    assert gap < GAP_S and not p.fences
    return journal(other, CONTROLLER, f"--since=@{int(began)}")


def back(p: Pair, h: Host, clients: Clients) -> None:
    """Switch it on; nobody does anything else."""
    h.boot()
    h.booted()
    p.wait_protected()
    clients.answered(20)
    assert not p.fences
    said = journal(h, HANDOVER, "--boot=-1")
    assert "stopped: " in said and "host shuts down" in said, said


def test_a_unit_that_is_stopped_is_no_host_that_shuts_down(pair: Pair, clients: Clients) -> None:
    for h in pair.hosts:
        assert h.show(HANDOVER, "ActiveState") == {"ActiveState": "active"}
        before = pair.status(h)
        h.run("systemctl", "restart", HANDOVER)
        assert "does not shut down: nothing is handed over" in h.journal(HANDOVER)
        now = pair.status(h)
        assert [now[k] for k in ("role", "state")] == [before[k] for k in ("role", "state")]
    h = pair.a
    h.run("systemctl", "stop", CONTROLLER)
    assert h.pids(QEMU), "it is the user's, and goes on"
    h.run("systemctl", "start", CONTROLLER)
    pair.wait_protected()
    assert pair.status(pair.a)["role"] == "primary" and not pair.fences


def test_the_primarys_host_is_switched_off(pair: Pair, clients: Clients) -> None:
    said = shut_down(pair, pair.a, "poweroff", clients, "promoted", "vm@web1")
    assert "stops on purpose" in said, "its controller says goodbye after that"
    back(pair, pair.a, clients)
    assert pair.status(pair.a)["role"] == "secondary" and pair.status(pair.b)["role"] == "primary"


def test_the_standbys_host_is_switched_off(pair: Pair, clients: Clients) -> None:
    """Its QEMU is in a unit that the controller had systemd make."""
    shut_down(pair, pair.a, "poweroff", clients, "solo", "colo-xdp-web1-incoming-")
    back(pair, pair.a, clients)
    assert pair.status(pair.a)["role"] == "secondary" and pair.status(pair.b)["role"] == "primary"


def test_the_survivors_host_reboots(pair: Pair, clients: Clients) -> None:
    shut_down(pair, pair.b, "reboot", clients, "promoted", "vm-incoming@web1")
    back(pair, pair.b, clients)
    assert pair.status(pair.a)["role"] == "primary" and pair.status(pair.b)["role"] == "secondary"


def test_a_guest_is_moved_that_a_command_has_left_running(pair: Pair, clients: Clients) -> None:
    """That unit is in no target, and still systemd ends it after the handover."""
    shut_down(pair, pair.a, "reboot", clients, "promoted", "colo-xdp-web1-incoming-")
    back(pair, pair.a, clients)
    assert pair.status(pair.b)["role"] == "primary"


def test_so_does_rescue_mode(pair: Pair, clients: Clients) -> None:
    """systemd ends the services and not the kernel: the next controller finds what is pinned."""
    b, began = pair.b, time.time()
    b.run("systemctl", "--no-block", "rescue")
    s = pair.wait(pair.a, "a guest that is promoted", lambda s: s["state"] == "promoted", 30)
    assert "host shuts down" in s["reason"]
    clients.answered(50)
    assert clients.gap_s(began - 1) < GAP_S
    wait_for("rescue mode", lambda: not pair.status(b), 60)
    b.run("systemctl", "--no-block", "default")
    pair.wait_protected()
    assert pair.status(pair.a)["role"] == "primary" and not pair.fences
