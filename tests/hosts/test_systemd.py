# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the shipped unit and examples on two hosts that boot systemd, with a real pair of guests.

Each test continues with what the previous one has left, a protected pair. test_documents.py has
the package's upgrade.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from colo_xdp.lab.client import Client, EchoStream
from colo_xdp.lab.net import LabError, sh, wait_for

from .host import CLIENT, never, unplugged
from .pair import CONTROLLER, Pair

pytestmark = pytest.mark.usefixtures("pair")

DEAD_AFTER_S = 5.0  # the default, which the examples do not change
QEMU = "qemu-system-x86_64.*-qmp"


@pytest.fixture
def protected(pair: Pair) -> Pair:
    """Provide a pair for every test to start with; nobody is fenced yet."""
    pair.wait_protected()
    pair.forget_fences()
    return pair


@pytest.fixture
def echo() -> Iterator[EchoStream]:
    """Open a client's connection that lives through the test and never gets a wrong byte."""
    e = EchoStream(CLIENT)
    try:
        wait_for("an answer", lambda: e.stats.answered_at, 30)
        yield e
    finally:
        st = e.stop()
    assert not st.dead and not st.wrong, (st.dead, st.wrong)


def test_units_as_shipped_make_a_protected_pair(pair: Pair) -> None:
    """Only the boot happens: networkd creates the taps, the units start controllers and guests."""
    pair.wait_protected()
    for h in pair.hosts:
        s = h.show(CONTROLLER, "ActiveState", "NRestarts")
        assert s == {"ActiveState": "active", "NRestarts": "0"}
        wait_for("its state in the unit's", lambda h=h: h.show(CONTROLLER, "StatusText")[
            "StatusText"].startswith("protected"), 5)  # type: ignore[misc]  # fmt: skip
        assert h.run("systemctl", "is-system-running").strip() == "running"
        assert h.run("colo-xdp", "status").splitlines()[0].startswith("web1 ")
    got, wrong = Client(CLIENT).download("f100k")
    assert got == 100 << 10 and not wrong


def test_heartbeats_pass_the_peer_link(protected: Pair) -> None:
    """The unit's sandbox lets them open what they need (AF_PACKET)."""
    for h in protected.hosts:
        protected.wait(h, "heartbeats over the peer link", lambda s: any(
            p["name"] == "peer link" and (p["silent_ms"] or 1e9) < 1000
            for p in s["heartbeat_links"]
        ), 10)  # fmt: skip
        assert "Address family not supported" not in h.journal(CONTROLLER)


def test_only_the_management_network_is_cut(protected: Pair, echo: EchoStream) -> None:
    """The control channel uses it. The peer lives, as its peer link shows: nobody is fenced."""
    p = protected
    with unplugged(p.a, 2):
        for h in p.hosts:
            p.wait(h, "the loss of the channel", lambda s: s["state"] == "degraded", 30)
        never("fence of a host that lives", lambda: p.fences, 2 * DEAD_AFTER_S + 2)
        seen = len(echo.stats.answered_at)
        wait_for("answers meanwhile", lambda: len(echo.stats.answered_at) > seen + 20, 10)
    p.wait_protected()
    assert not p.fences


def test_a_wrong_file_ends_in_failed(protected: Pair) -> None:
    h = protected.b
    h.write("/etc/colo-xdp/wrong.toml", 'pair = "wrong"\nrole = "third"\n[peer]\nlocol = "x"\n')
    with pytest.raises(LabError):
        h.run("systemctl", "start", "colo-xdp@wrong")
    s = h.show("colo-xdp@wrong", "ActiveState", "NRestarts", "ExecMainStatus")
    assert s == {"ActiveState": "failed", "NRestarts": "0", "ExecMainStatus": "2"}
    said = h.journal("colo-xdp@wrong")
    for mistake in ('role = "third"', "unknown key 'locol'", "[network] tap is missing"):
        assert mistake in said
    h.run("systemctl", "reset-failed", "colo-xdp@wrong")


def test_stopping_the_standbys_controller_fences_nobody(protected: Pair, echo: EchoStream) -> None:
    p = protected
    p.b.run("systemctl", "stop", CONTROLLER)
    try:
        never("fence of a host that was stopped in order", lambda: p.fences, 2 * DEAD_AFTER_S + 2)
        assert p.b.pids(QEMU), "its guest is nobody's but the user's"
    finally:
        p.b.run("systemctl", "start", CONTROLLER)
    p.wait_protected()
    assert echo.stats.answered_at and not p.fences


def test_the_primarys_host_loses_power_and_comes_back(protected: Pair, echo: EchoStream) -> None:
    """The other one takes over; after the boot the tap exists and the pair is protected again."""
    p = protected
    before = len(echo.stats.answered_at)
    p.power_off(p.a)
    p.wait(p.b, "the takeover", lambda s: s["state"] == "promoted", 60)
    assert set(p.fences) == {"hostb"}
    wait_for("answers of the survivor", lambda: len(echo.stats.answered_at) > before + 50, 60)
    p.power_on(p.a)
    assert "tap-web1" in p.a.run("ip", "-brief", "link")
    p.wait_protected()
    assert p.status(p.a)["role"] == "secondary" and p.status(p.b)["role"] == "primary"
    assert p.a.show(CONTROLLER, "NRestarts") == {"NRestarts": "0"}


def test_a_restart_leaves_the_qemu_that_incoming_has_started(
    protected: Pair, echo: EchoStream
) -> None:
    """The controller has started it, with a command that simply leaves it running."""
    p = protected
    (qemu,) = p.a.pids(QEMU)
    assert p.a.unit_of(qemu).startswith("colo-xdp-web1-incoming-")
    environ = f"/proc/{p.a.pid1}/root/proc/{qemu}/environ"
    assert "NOTIFY_SOCKET=" not in sh("cat", environ)
    old = p.a.show(CONTROLLER, "MainPID")
    p.a.run("systemctl", "restart", CONTROLLER)
    assert p.a.show(CONTROLLER, "MainPID") != old
    assert p.a.pids(QEMU) == [qemu]
    p.wait_protected()
    assert p.a.pids(QEMU) == [qemu] and echo.stats.answered_at
