# SPDX-License-Identifier: GPL-2.0-or-later
"""Doctor beside a running controller, before the first start, and what it mends."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import app
from colo_xdp.config.file import load
from colo_xdp.qemu import disks
from colo_xdp.qemu.nic import Card
from colo_xdp.qemu.qmp import QemuInfo
from colo_xdp.qemu.survey import Survey
from colo_xdp.service import ask
from colo_xdp.service import doctor as service
from colo_xdp.service.control_socket import ControlError
from colo_xdp.status.document import empty
from colo_xdp.tools import doctor, guest_checks, mend
from colo_xdp.tools.doctor import Beside, Patient
from colo_xdp.tools.findings import FAIL, OK, WARN, Check, Fix, FixKind, Report, key_mode, link_up
from colo_xdp.tools.unit_facts import GuestUnit, UnitFacts

EXAMPLE = Path(__file__).parents[3] / "deploy/examples/primary.toml"
CONFIG = load(EXAMPLE)
UNITS = UnitFacts(True, guests=(GuestUnit("colo-qemu@web1", False, False),))
DISK = {"device": "d0", "qdev": "/machine/peripheral/v0/virtio-backend",
        "inserted": {"ro": False, "node-name": "n0", "file": "/d.raw"}}  # fmt: skip
SURVEY = Survey(
    QemuInfo((7, 2, 22), True, "colo", "pc-i440fx-7.2-machine"), [],
    [Card("n0", "52:54:00:12:34:56", "tap", "tap-web1", 1)],
)  # fmt: skip


def status(**change: Any) -> dict[str, Any]:
    doc = empty("web1", "primary").to_json()
    doc |= {"state": "protected", "reason": "both guests are equal", "mode": "run"}
    doc["qemu"] |= {"connected": True}
    return doc | change


def patient(survey: Survey | None = SURVEY, why: str = "", **change: Any) -> Patient:
    return Patient(CONFIG, Beside(77, status(**change), survey, why), 77, units=UNITS)


def bad(checks: Iterator[Check]) -> list[Check]:
    found = [c for c in checks if c.level != OK]
    assert all(c.remedy for c in found), found
    return found


# ---- the controller


@pytest.mark.parametrize(
    ("change", "key", "level", "text"),
    [
        ({"state": "starting"}, "controller", WARN, "process 77: starting: both"),
        ({"state": "solo"}, "controller", WARN, "process 77: solo"),
        ({"state": "degraded"}, "controller", FAIL, "process 77: degraded"),
        ({"state": "stopped"}, "controller", FAIL, "process 77: stopped"),
        ({"data_path": {"trouble": "tap-web1 is gone"}}, "data path", FAIL, "tap-web1 is gone"),
        ({"failures": ["KeyError(1)"]}, "controller", WARN, "internal error: KeyError(1)"),
    ],
)
def test_what_a_running_controller_says(
    change: dict[str, Any], key: str, level: int, text: str
) -> None:
    (c,) = bad(doctor._controller(patient(**change)))
    assert (c.key, c.level) == (key, level) and text in c.text


def test_a_controller_that_is_well_silent_or_not_there() -> None:
    assert bad(doctor._controller(patient())) == []
    (none,) = doctor._controller(Patient(CONFIG))
    assert none.level == OK and "none runs here" in none.text
    (silent,) = bad(doctor._controller(Patient(CONFIG, pid=77)))
    assert (
        silent.level == FAIL and "process 77 runs for this pair and does not answer" in silent.text
    )


# ---- QEMU


def test_beside_a_controller_qemu_is_not_asked_twice() -> None:
    found = list(doctor._qemu(patient()))
    assert found[0].text == "7.2.22, KVM, colo (by the running controller)"
    assert not [c for c in found if c.level == FAIL]
    (c,) = bad(doctor._qemu(patient(None, "QEMU does not answer within 10 s")))
    assert (c.key, c.level) == ("QEMU", WARN) and "does not answer within" in c.text
    (c,) = bad(doctor._qemu(patient(None, qemu={"connected": False})))
    assert c.level == FAIL and c.remedy == "systemctl enable --now colo-qemu@web1"


def test_a_controller_that_does_not_answer_keeps_the_monitor() -> None:
    (c,) = doctor._qemu(Patient(CONFIG, pid=77))
    assert (c.key, c.level) == ("QEMU", WARN) and "not asked" in c.text


@pytest.mark.parametrize(("before_start", "level"), [(False, FAIL), (True, WARN)])
def test_qemu_does_not_run_yet(before_start: bool, level: int) -> None:
    (c,) = bad(doctor._qemu(Patient(CONFIG, before_start=before_start, units=UNITS)))
    assert (c.key, c.level) == ("QEMU", level) and "it does not run yet: nobody listens" in c.text
    assert c.remedy == "systemctl enable --now colo-qemu@web1"


def test_a_monitor_that_somebody_else_has(tmp_path: Path) -> None:
    path = str(tmp_path / "qmp")
    c = replace(CONFIG, qemu=replace(CONFIG.qemu, qmp=path, qmp_timeout=200))
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(path)
        s.listen()
        (found,) = bad(doctor._qemu(Patient(c, before_start=True)))
    assert found.level == FAIL and f"(process {os.getpid()}) does not answer" in found.text
    assert "a monitor serves one client" in found.remedy


def test_ports_that_qemu_will_need() -> None:
    with socket.create_server(("127.0.0.1", 0)) as s:
        taken = f"127.0.0.1:{s.getsockname()[1]}"
        c = replace(
            CONFIG, role="secondary", nbd=replace(CONFIG.nbd, local=taken),
            qemu=replace(CONFIG.qemu, migrate_uri=f"tcp:{taken}"),
        )  # fmt: skip
        found = bad(doctor._waiting_ports(c))
    assert [f.key for f in found] == ["in use", "in use"]
    assert (
        f"the migration {taken}: in use by " in found[0].text and f"{os.getpid()}" in found[0].text
    )
    assert found[1].text.startswith(f"[nbd] local {taken}")
    assert bad(doctor._waiting_ports(c)) == []


@pytest.mark.parametrize(
    ("survey", "key", "level", "text", "remedy"),
    [
        (replace(SURVEY, info=replace(SURVEY.info, version=(10, 0, 2))), "QEMU", FAIL,
         "cannot enter COLO", "another QEMU"),
        (replace(SURVEY, info=replace(SURVEY.info, trouble="no creds")), "migration", FAIL,
         "no creds", "configuration"),
        (replace(SURVEY, info=replace(SURVEY.info, kvm=False)), "QEMU", WARN, "TCG hangs", "KVM"),
        (replace(SURVEY, cards=[*SURVEY.cards, Card("n1", "52:54:00:00:00:09", "tap", "tap9", 1)]),
         "NICs", FAIL, "tap9", "networks.md"),
        (replace(SURVEY, announcing=("n0",)), "guest_announce", WARN, "on for n0",
         "guest_announce=off"),
        (replace(SURVEY, blocks=[DISK]), "disk", FAIL, "disk d0 (node n0), file /d.raw",
         "[[disk]]"),
    ],
)  # fmt: skip
def test_each_fault_of_a_guest(
    survey: Survey, key: str, level: int, text: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_checks, "offloads", lambda offers: iter(()))
    monkeypatch.setattr(guest_checks, "vhost", lambda config, asked: iter(()))
    (c,) = bad(guest_checks.judge(CONFIG, survey, ""))
    assert (c.key, c.level) == (key, level) and text in c.text and remedy in c.remedy


def test_a_survey_goes_through_the_control_socket() -> None:
    full = replace(SURVEY, blocks=[DISK], announcing=("n0",))
    again = Survey.from_json(json.loads(json.dumps(full.to_json())))
    assert again == full and disks.uncovered(again.blocks, []) == disks.uncovered([DISK], [])
    for wrong in ({}, {"version": [1]}, full.to_json() | {"cards": [{"x": 1}]}):
        with pytest.raises(ValueError):
            Survey.from_json(wrong)


# ---- directories and keys


def test_directories_that_run_needs(tmp_path: Path) -> None:
    there = replace(CONFIG, datapath=replace(CONFIG.datapath, run_dir=str(tmp_path / "r")))
    (c,) = [c for c in doctor._directories(Patient(there)) if c.key == "run_dir"]
    assert c.level == WARN and c.fix and c.fix.kind is FixKind.RUN_DIR
    mend.mend(c.fix)
    assert (tmp_path / "r").stat().st_mode & 0o777 == 0o750
    (c,) = [c for c in doctor._directories(Patient(there)) if c.key == "run_dir"]
    assert c.level == OK and not c.fix
    absent = replace(there, datapath=replace(there.datapath, bpffs=str(tmp_path)))
    (c,) = [c for c in doctor._directories(Patient(absent)) if c.key == "bpffs"]
    assert c.level == WARN and "is not mounted" in c.text and c.remedy


def test_a_key_is_hidden_from_others(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text("")
    key.chmod(0o644)
    fix = key_mode(str(key), 0o644)
    mend.mend(fix)
    assert key.stat().st_mode & 0o777 == 0o600 and fix.undo == f"chmod 644 {key}"
    with pytest.raises(mend.NotMended, match="No such file"):
        mend.mend(key_mode(str(tmp_path / "none"), 0o644))


# ---- --fix


def test_each_fix_is_told_before_it_is_done_and_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def done(fix: Fix) -> None:
        log.append(f"done {fix.command}")
        if fix.args[0] == "/k":
            raise mend.NotMended("read-only")

    monkeypatch.setattr(mend, "mend", done)
    tap, key = link_up("tap0"), key_mode("/k", 0o644)
    checks = [Check("tap", FAIL, "", "", tap), Check("a", OK, ""), Check("b", WARN, "", "", tap),
              Check("certificate", WARN, "", "", key)]  # fmt: skip
    out = service.mended(checks, log.append, runs=False)
    assert log == [
        "fix   ip link set tap0 up   (undo: ip link set tap0 down)", "done ip link set tap0 up",
        "fix   chmod 600 /k   (undo: chmod 644 /k)", "done chmod 600 /k",
        "      failed: read-only",
    ]  # fmt: skip
    assert [(f["done"], f["why"]) for f in out] == [(True, ""), (False, "read-only")]
    log.clear()
    out = service.mended(checks, log.append, runs=True)
    assert "done ip link set tap0 up" not in log and "done chmod 600 /k" in log
    assert log[0].startswith("left  ip link set tap0 up: a controller of this pair runs")
    assert not out[0]["done"] and "yourself" in out[0]["why"]


# ---- what is asked, and what comes of it


REPORT = Report("web1", "secondary", "hostb", "0.1.0", True, (Check("root", OK, "yes"),))


@contextmanager
def controller(run_dir: Path, answers: dict[str, Any]) -> Iterator[Path]:
    """Serve a control socket; an answer that is a string is an error."""
    path = run_dir / "web1.primary.sock"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
        s.listen()

        def serve() -> None:
            while True:
                try:
                    conn, _ = s.accept()
                except OSError:
                    return
                with conn, conn.makefile("rb") as f:
                    asked = json.loads(f.readline())
                    key = asked["command"] + ("_peer" if asked["args"].get("peer") else "")
                    found = answers.get(key, f"unknown command {key!r}")
                    ok = not isinstance(found, str)
                    answer = {"ok": ok, "result" if ok else "error": found}
                    conn.sendall(json.dumps(answer).encode() + b"\n")

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield path
        s.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """Provide a file whose run_dir is the test's."""
    path = tmp_path / "web1.toml"
    text = EXAMPLE.read_text() + f'\n[datapath]\nrun_dir = "{tmp_path}"\n'
    assert "[datapath]" not in EXAMPLE.read_text()
    path.write_text(text)
    return path


def test_what_the_controller_is_asked(here: Path, tmp_path: Path) -> None:
    c = load(here)
    assert ask.beside(c) is None
    answers: dict[str, Any] = {"status": status()}
    with controller(tmp_path, answers):
        old = ask.beside(c)
        assert old and old.survey is None and "unknown command 'doctor'" in old.why
        answers["doctor"] = {"pid": 77, "survey": None, "why": "QEMU does not answer"}
        found = ask.beside(c)
        assert found and (found.pid, found.survey, found.why) == (77, None, "QEMU does not answer")
        answers["doctor"] |= {"survey": SURVEY.to_json()}
        found = ask.beside(c)
        assert found and found.survey == SURVEY


def test_the_other_host(here: Path, tmp_path: Path) -> None:
    c, ours = load(here), replace(REPORT, role="primary", host="hosta")
    with pytest.raises(ControlError, match="no controller runs here"):
        ask.other_host(c, ours)
    answers: dict[str, Any] = {"doctor_peer": "the other host's controller is not connected"}
    with controller(tmp_path, answers):
        with pytest.raises(ControlError, match="is not connected"):
            ask.other_host(c, ours)
        good = {"report": REPORT.to_json(), "asked": 100.0, "answered": 103.0, "at": 103.0}
        answers["doctor_peer"] = good
        theirs, both = ask.other_host(c, ours)
        assert theirs == REPORT and [b.level for b in both] == [OK, OK]
        answers["doctor_peer"] = good | {"at": 163.0}
        assert ask.other_host(c, ours)[1][1].level == WARN, "a clock a minute ahead"
        for wrong in ({"report": {"trouble": "too slow"}}, {"report": 7}, {"at": None}):
            answers["doctor_peer"] = good | wrong
            with pytest.raises(ControlError, match="the other host"):
                ask.other_host(c, ours)


def cli(*args: str) -> Any:
    return CliRunner().invoke(app, ["doctor", *args])


def test_the_command_beside_a_controller(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor._controller, doctor._qemu))
    monkeypatch.setattr(guest_checks, "vhost", lambda config, asked: iter(()))
    answers: dict[str, Any] = {
        "status": status(), "doctor": {"pid": 77, "survey": SURVEY.to_json(), "why": ""},
        "doctor_peer": {"report": REPORT.to_json(), "asked": 1.0, "answered": 1.1, "at": 1.1},
    }  # fmt: skip
    with controller(tmp_path, answers):
        r = cli(str(here), "--json", "--peer")
        doc = json.loads(r.stdout)
        assert r.exit_code == 0 and doc["controller"] is True and doc["peer"]["host"] == "hostb"
        assert [c["key"] for c in doc["both"]] == ["releases", "clocks"] and doc["fixed"] == []
        r = cli(str(here), "--peer")
        assert "hostb" in r.stdout.splitlines()[0] and "ok    clocks: " in r.stdout
        answers["doctor_peer"]["report"]["checks"][0]["level"] = "fail"
        assert cli(str(here), "--peer").exit_code == 1, "the other host fails"
        answers["doctor_peer"] = "it is not connected"
        r = cli(str(here), "--peer")
        assert r.exit_code == 0 and "warn  other host's doctor: it is not connected" in r.stdout
    r = cli(str(here), "--peer")
    assert r.exit_code == 1 and "no controller runs here, and only controllers" in r.stdout
    r = cli(str(here), "--before-start")
    assert r.exit_code == 0 and "warn  QEMU: it does not run yet" in r.stdout


def test_a_wrong_file_is_a_finding(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("pair = 3")
    r = cli(str(tmp_path / "bad.toml"), "--json")
    doc = json.loads(r.stdout)
    assert r.exit_code == 1 and doc["pair"] == "bad" and doc["level"] == "fail"
    assert [c["key"] for c in doc["checks"]] == ["config"]


def test_vhost_of_a_qemu_that_is_occupied(tmp_path: Path) -> None:
    c: Any = SimpleNamespace(qemu=SimpleNamespace(qmp=str(tmp_path / "none")))
    (found,) = guest_checks.vhost(c, asked=True)
    assert found.level == WARN and found.remedy
