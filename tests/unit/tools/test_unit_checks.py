# SPDX-License-Identifier: GPL-2.0-or-later
"""What doctor says of units: the one that we ship is right, and each change to it is told."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.tools import unit_facts
from colo_xdp.tools.findings import FAIL, OK, WARN, Check
from colo_xdp.tools.unit_checks import families, judge, start_of_guest
from colo_xdp.tools.unit_facts import GuestUnit, ShutdownFacts, UnitFacts, parse, program_of

UNIT = (Path(__file__).parents[3] / "deploy/systemd/colo-xdp@.service").read_text()
PATH = "/etc/colo-xdp/web1.toml"
EXEC = (
    "{ path=/usr/bin/colo-xdp ; argv[]=/usr/bin/colo-xdp run /etc/colo-xdp/web1.toml ; "
    "ignore_errors=no ; start_time=[n/a] ; stop_time=[n/a] ; pid=0 ; code=(null) ; status=0/0 }"
)


def shipped(key: str) -> str:
    (line,) = (x for x in UNIT.splitlines() if x.startswith(f"{key}="))
    return line.partition("=")[2]


VALUES = {
    "LoadState": "loaded", "ActiveState": "active", "UnitFileState": "enabled",
    "FragmentPath": "/lib/systemd/system/colo-xdp@.service", "DropInPaths": "",
    "NeedDaemonReload": "no", "ExecStart": EXEC,
    "CapabilityBoundingSet": shipped("CapabilityBoundingSet").lower(),
    **{
        k: shipped(k) for k in ("ProtectHome", "RestrictAddressFamilies", "KillMode", "Restart",
                                "NoExecPaths", "ExecPaths")
    },
}  # fmt: skip
U = UnitFacts(
    True, "colo-xdp@web1.service", VALUES, "/usr/bin/colo-xdp", program_of(EXEC)[1],
    "/usr/lib/colo-xdp/bin/colo-xdp", "0.1.0",
    (GuestUnit("colo-qemu@web1", True, False), GuestUnit("colo-qemu-incoming@web1", False, True)),
    ShutdownFacts("colo-xdp-handover@web1.service", True, "colo-qemu@web1.service"),
)  # fmt: skip


def said(u: UnitFacts, path: str = PATH) -> list[Check]:
    found = list(judge(u, path, "0.1.0", families(link_heartbeats=True)))
    for c in found:
        assert c.level == OK or c.remedy, f"{c.text}: no remedy"
    return found


def test_the_unit_that_we_ship_is_right() -> None:
    (c,) = said(U)
    assert c.level == OK and c.text == "/lib/systemd/system/colo-xdp@.service"
    (c,) = said(replace(U, values=VALUES | {"DropInPaths": "/etc/systemd/system/a.conf"}))
    assert c.level == OK and c.text.endswith(", with /etc/systemd/system/a.conf")


@pytest.mark.parametrize(
    ("change", "level", "text", "remedy"),
    [
        ({"LoadState": "not-found"}, WARN, "colo-xdp@web1.service is not-found", "make install"),
        ({"LoadState": "masked"}, FAIL, "is masked", "systemctl cat"),
        ({"ActiveState": "failed"}, FAIL, "has failed", "journalctl -u colo-xdp@web1.service"),
        ({"NeedDaemonReload": "yes"}, WARN, "have changed", "systemctl daemon-reload"),
        ({"UnitFileState": "disabled"}, WARN, "does not start at boot", "systemctl enable"),
        ({"RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"}, FAIL,
         "lacks AF_PACKET: no heartbeats over the peer link", "drop-in"),
        ({"RestrictAddressFamilies": "~AF_PACKET AF_NETLINK"}, FAIL,
         "forbids AF_NETLINK AF_PACKET", "drop-in"),
        ({"CapabilityBoundingSet": "cap_bpf cap_perfmon cap_net_raw"}, FAIL, "lacks CAP_NET_ADMIN",
         "drop-in"),
        ({"KillMode": "control-group"}, WARN, "KillMode=control-group", "drop-in"),
        ({"Restart": "no"}, WARN, "stays away", "drop-in"),
    ],
)  # fmt: skip
def test_each_change_to_the_unit(
    change: dict[str, str], level: int, text: str, remedy: str
) -> None:
    (c,) = said(replace(U, values=VALUES | change))
    assert (c.key, c.level) == ("unit", level)
    assert text in c.text and remedy in c.remedy
    if "LoadState" not in change:
        also = said(replace(U, values=VALUES | change | {"DropInPaths": "/etc/x.conf"}))
        assert "drop-ins in force: /etc/x.conf" in [c.text for c in also]


@pytest.mark.parametrize(
    ("u", "level", "text", "remedy"),
    [
        (replace(U, target=""), FAIL, "/usr/bin/colo-xdp, which is not there", "make install"),
        (replace(U, target="/root/colo/.venv/bin/colo-xdp"), FAIL, "cannot see (ProtectHome)",
         "make install"),
        (replace(U, target="/srv/colo/bin/colo-xdp"), FAIL, "executes nothing there", "drop-in"),
        (replace(U, target="/opt/colo/bin/colo-xdp", values=VALUES | {"ExecPaths": "/usr"}), FAIL,
         "executes nothing there", "drop-in"),
        (replace(U, release="0.0.9"), WARN, "starts release 0.0.9, this is 0.1.0", "make install"),
        (replace(U, values=None), WARN, "does not answer", "systemctl status"),
        (UnitFacts(False), OK, "no systemd here", ""),
    ],
)  # fmt: skip
def test_its_program(u: UnitFacts, level: int, text: str, remedy: str) -> None:
    (c,) = said(u)
    assert c.level == level and text in c.text and remedy in c.remedy


def test_another_file_than_the_unit_reads() -> None:
    (c,) = said(U, "/root/web1.toml")
    assert c.level == WARN and f"reads {PATH}, this is /root/web1.toml" in c.text


def test_without_heartbeats_over_the_link_no_packet_socket_is_needed() -> None:
    u = replace(
        U, values=VALUES | {"RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK"}
    )
    (c,) = judge(u, PATH, "0.1.0", families(link_heartbeats=False))
    assert c.level == OK


@pytest.mark.parametrize(
    ("s", "text", "remedy"),
    [
        (ShutdownFacts("h@web1.service", False), "h@web1.service is not active",
         "systemctl start h@web1.service"),
        (ShutdownFacts("h@web1.service", True, "session-3.scope", False),
         "QEMU runs in session-3.scope", "Before=h@web1.service"),
    ],
)  # fmt: skip
def test_a_guest_that_would_be_killed_with_its_host(
    s: ShutdownFacts, text: str, remedy: str
) -> None:
    (c,) = said(replace(U, shutdown=s))
    assert c.level == WARN and text in c.text and remedy in c.remedy
    (c,) = said(replace(U, shutdown=s, values=VALUES | {"ActiveState": "inactive"}))
    assert c.level == OK, "nothing runs that could be handed over"


@pytest.mark.parametrize(
    ("qemu", "before", "in_order"),
    [
        ("colo-qemu@web1.service", "shutdown.target colo-xdp-handover@web1.service", True),
        ("mine.service", "multi-user.target shutdown.target", True),
        ("session-3.scope", "shutdown.target", False),
        ("", "", True),
    ],
)  # fmt: skip
def test_the_order_of_the_end_is_read(
    qemu: str, before: str, in_order: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "colo-xdp-handover@web1.service"
    shown = f"Id={name}\nActiveState=active\nBefore=shutdown.target\n"
    shown += "After=colo-xdp@web1.service multi-user.target\n"
    shown += f"\nId={qemu}\nBefore={before}\nAfter=x.target\n" if qemu else ""
    monkeypatch.setattr(unit_facts, "_run", lambda argv: shown)
    monkeypatch.setattr(unit_facts.sockets, "listener", lambda path: 7 if qemu else 0)
    monkeypatch.setattr(unit_facts, "_unit_of", lambda pid: qemu)
    s = unit_facts._shutdown("web1", "/run/colo-vm/web1.qmp")
    assert s == ShutdownFacts(name, True, qemu, in_order)
    monkeypatch.setattr(unit_facts, "_run", lambda argv: "")
    assert unit_facts._shutdown("web1", "") is None


def test_before_the_start_it_need_not_be_enabled() -> None:
    u = replace(U, values=VALUES | {"UnitFileState": "disabled"})
    (c,) = judge(u, PATH, "0.1.0", families(link_heartbeats=True), before_start=True)
    assert c.level == OK


def test_what_starts_the_guest() -> None:
    assert start_of_guest(U, "primary") == "systemctl enable --now colo-qemu@web1"
    assert start_of_guest(U, "secondary") == "systemctl enable --now colo-qemu-incoming@web1"
    assert "with -incoming: docs" in start_of_guest(UnitFacts(True), "secondary")


SHOWN = """\
Id=colo-qemu@web1.service
LoadState=loaded
ActiveState=active

Id=colo-qemu-incoming@web1.service
LoadState=loaded
ActiveState=inactive

Id=vm@web1.service
LoadState=not-found
ActiveState=inactive
"""


def test_what_systemctl_prints_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert program_of(EXEC) == ("/usr/bin/colo-xdp", f"/usr/bin/colo-xdp run {PATH}")
    assert program_of("") == ("", "")
    assert [x["LoadState"] for x in parse(SHOWN)] == ["loaded", "loaded", "not-found"]
    program = tmp_path / "venv/bin/colo-xdp"
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 0.0.9\n")
    program.chmod(0o755)
    values = VALUES | {"ExecStart": EXEC.replace("/usr/bin/colo-xdp", str(program))}
    (tmp_path / "unit").write_text("\n".join(f"{k}={v}" for k, v in values.items()))
    (tmp_path / "guests").write_text(SHOWN)
    systemctl = tmp_path / "systemctl"
    systemctl.write_text(
        f'#!/bin/sh\ncase "$*" in *colo-qemu@*) cat {tmp_path}/guests;; '
        f"*) cat {tmp_path}/unit;; esac\n"
    )
    systemctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(unit_facts, "BOOTED", tmp_path)
    u = unit_facts.gather("web1")
    assert u.target == str(program) and u.release == "0.0.9"
    assert u.guests == U.guests
    systemctl.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(unit_facts, "ANSWER_S", 0.2)
    assert unit_facts.gather("web1") == UnitFacts(True, "colo-xdp@web1.service"), "it hangs"
    systemctl.unlink()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert unit_facts.gather("web1").values is None
    monkeypatch.setattr(unit_facts, "BOOTED", tmp_path / "none")
    assert not unit_facts.gather("web1").booted
