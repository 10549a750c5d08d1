# SPDX-License-Identifier: GPL-2.0-or-later
"""The OCF agent: exit codes and order of what it does, against commands that remember.

With a real pair: tests/e2e/test_ocf.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
AGENT = ROOT / "deploy/ocf/colo-xdp"
FENCE = ROOT / "deploy/ocf/colo-xdp-fence"

#: what stands for colo-xdp, systemctl and crm_attribute: changes and notes what is in the directory
STUB = """#!{python} -SE
import json, sys, pathlib
d = pathlib.Path({directory!r})
name, args = pathlib.Path(sys.argv[0]).name, sys.argv[1:]
w = json.loads((d / "world").read_text())
(d / "calls").open("a").write(" ".join([name, *args]) + "\\n")
code, s = 0, w["status"]
key = f"{{name}} {{args[0]}}"
if key in w["fail"]:
    print(f"{{key}} cannot be done", file=sys.stderr)
    sys.exit(w["fail"][key])
if key == "systemctl start":
    w["status"] = w["started"]
    (d / "bpf/colo-xdp/web1-primary").mkdir(parents=True, exist_ok=True)
    (d / "bpf/colo-xdp/web1-primary/config").touch()
elif key == "systemctl stop":
    w["status"] = None
elif key == "colo-xdp status":
    print(json.dumps(s))
    code = 3 if s is None else 0 if s["state"] == "protected" else 4
elif key == "colo-xdp failover":
    s["active"]["transmitting"], s["state"] = True, "promoted"
elif key == "colo-xdp switchover":
    s["active"]["transmitting"], s["state"] = False, "stopped"
elif key == "colo-xdp demote":
    s["active"]["transmitting"], s["state"] = False, "stopped"
(d / "world").write_text(json.dumps(w))
sys.exit(code)
"""


def status(role: str, state: str, *, transmitting: bool, sync: str = "in_sync") -> dict[str, Any]:
    return {"role": role, "state": state, "reason": "because",
            "active": {"transmitting": transmitting, "sync": sync}}  # fmt: skip


PVM = status("primary", "protected", transmitting=True)
SVM = status("secondary", "protected", transmitting=False)
NEW_SVM = status("secondary", "starting", transmitting=False, sync="none")


class Host:
    """One host of a cluster."""

    def __init__(self, directory: Path) -> None:
        self.dir = directory
        self.config = directory / "web1.toml"
        self.config.write_text(
            f'pair = "web1"\nrole = "primary"\n[datapath]\nbpffs = "{directory}/bpf"\n'
        )
        self.pin = directory / "bpf/colo-xdp/web1-primary/config"
        for name in ("colo-xdp", "systemctl", "crm_attribute"):
            stub = directory / name
            stub.write_text(STUB.format(python=sys.executable, directory=str(directory)))
            stub.chmod(0o755)
        self.world(None)

    def world(
        self, now: dict[str, Any] | None, *, started: dict[str, Any] | None = None, **fail: int
    ) -> None:
        """What is there; a key of `fail` has _ for each space or -."""
        names = {"start": "systemctl start", "stop": "systemctl stop",
                 "failover": "colo-xdp failover",
                 "switchover": "colo-xdp switchover", "demote": "colo-xdp demote",
                 "config": "colo-xdp config", "status": "colo-xdp status"}  # fmt: skip
        doc = {"status": now, "started": started, "fail": {names[k]: v for k, v in fail.items()}}
        (self.dir / "world").write_text(json.dumps(doc))
        (self.dir / "calls").write_text("")
        if now or started:
            self.pin.parent.mkdir(parents=True, exist_ok=True)
            self.pin.touch()

    def __call__(self, action: str, *, interval: int = 10, timeout: int = 8, **more: str) -> int:
        env = {
            "PATH": f"{self.dir}:{os.environ['PATH']}",
            "OCF_RESKEY_config": str(self.config),
            "OCF_RESKEY_binary": str(self.dir / "colo-xdp"),
            "OCF_RESKEY_CRM_meta_interval": str(interval * 1000),
            "OCF_RESKEY_CRM_meta_timeout": str(timeout * 1000),
            "OCF_RESOURCE_INSTANCE": "web1:0",
            "HA_RSCTMP": str(self.dir / "run"),
            **more,
        }
        r = subprocess.run(
            [sys.executable, "-SE", str(AGENT), action], env=env, capture_output=True, text=True,
            check=False, timeout=60,
        )  # fmt: skip
        self.said = r.stderr
        return r.returncode

    def calls(self) -> list[str]:
        """Without questions: what was done."""
        lines = (self.dir / "calls").read_text().splitlines()
        asked = ("colo-xdp status", "colo-xdp config", "crm_attribute")
        done = [line for line in lines if not line.startswith(asked)]
        return [line.replace(f" {self.config}", "") for line in done]

    def score(self) -> str:
        lines = (self.dir / "calls").read_text().splitlines()
        scores = [line for line in lines if line.startswith("crm_attribute")]
        assert all("--promotion=web1:0 --lifetime=reboot" in line for line in scores)
        return scores[-1].split()[-1] if scores else ""


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_meta_data_names_what_the_agent_takes(host: Host) -> None:
    text = subprocess.run([str(AGENT), "meta-data"], capture_output=True, text=True, check=True)
    root = ET.fromstring(text.stdout)
    source = AGENT.read_text()
    names = {p.attrib["name"] for p in root.iter("parameter")}
    assert names == {"config", "unit", "binary"}
    assert all(f'"OCF_RESKEY_{n}"' in source for n in names)
    assert root.findtext("version") == "1.1"
    actions = {a.attrib["name"] for a in root.iter("action")}
    for action in actions - {"meta-data"}:
        assert host(action) != 3, f"{action} is not implemented"
    assert {a.attrib["role"] for a in root.iter("action") if "role" in a.attrib} == {
        "Promoted", "Unpromoted",
    }  # fmt: skip
    assert host("migrate_to") == 3


def test_the_example_for_the_cluster_fits_the_agent() -> None:
    clone = ET.parse(ROOT / "deploy/examples/pacemaker.xml").getroot()
    (primitive,) = clone.findall("primitive")
    assert (primitive.get("provider"), primitive.get("type")) == ("colo-xdp", "colo-xdp")
    assert [n.get("name") for n in primitive.iter("nvpair")] == ["config"]
    text = subprocess.run([str(AGENT), "meta-data"], capture_output=True, text=True, check=True)
    known = {
        (a.get("name"), a.get("role"), a.get("timeout"))
        for a in ET.fromstring(text.stdout).iter("action")
    }
    asked = [(o.get("name"), o.get("role"), o.get("timeout")) for o in primitive.iter("op")]
    assert len(asked) == 6 and set(asked) <= known
    ids = [e.get("id") for e in clone.iter()]
    assert len(set(ids)) == len(ids)


def test_validation(host: Host) -> None:
    assert host("validate-all") == 0
    host.world(None, config=2)
    assert host("validate-all") == 6 and "cannot be done" in host.said
    assert host("start") == 6 and not host.calls()
    assert host("monitor", OCF_RESKEY_config="") == 6
    assert host("start", OCF_RESKEY_binary="/nowhere/colo-xdp") == 5


def test_a_life_of_the_first_primary(host: Host) -> None:
    host.world(None, started=PVM)
    host.pin.unlink()  # a host that has just booted
    assert host("monitor", interval=0) == 7
    assert host("start") == 0 and host.calls() == ["systemctl start colo-xdp@web1.service"]
    assert host.score() == "--update=1000"
    assert host("monitor") == 0, "it transmits, but the cluster has not promoted it"
    assert host("promote") == 0 and len(host.calls()) == 1, "there was nothing to do"
    assert host("monitor") == 8
    assert host("start") == 0 and host("monitor") == 8, "again: nothing changes"
    assert host("demote") == 0
    assert host.calls()[1:] == [
        "colo-xdp switchover", "colo-xdp demote --yes --why requested by the cluster",
    ]  # fmt: skip
    assert host.score() == "--delete"
    assert host("monitor") == 0
    assert host("stop") == 0 and host.calls()[-1] == "systemctl stop colo-xdp@web1.service"
    assert host.pin.exists(), "what is pinned keeps the guest silent"
    assert host("monitor") == 7
    assert host("stop") == 0 and host("demote") == 7
    assert host("start") == 0 and host("monitor") == 0


def test_only_an_equal_standby_is_promoted(host: Host) -> None:
    host.world(SVM)
    assert host("monitor") == 0 and host.score() == "--update=100"
    host.world({**SVM, "state": "degraded"})
    assert host("monitor") == 0 and host.score() == "--update=100"
    host.world(NEW_SVM)
    assert host("monitor") == 0 and host.score() == "--delete"
    host.world(NEW_SVM, failover=1)
    assert host("promote") == 1 and "failover cannot be done" in host.said
    assert host("monitor") == 0, "a failed promotion is none"
    host.world(SVM)
    assert host("promote") == 0 and host.calls() == ["colo-xdp failover --yes"]
    assert host("monitor") == 8 and host.score() == "--update=1000"


def test_a_promoted_guest_that_is_silent_has_failed(host: Host) -> None:
    host.world(PVM)
    assert host("promote") == 0
    host.world(status("primary", "stopped", transmitting=False, sync="none"))
    assert host("monitor") == 9 and "promoted, but silent: stopped: because" in host.said
    assert host("demote") == 0 and host("monitor") == 0


def test_a_guest_of_which_nothing_is_known_may_be_promoted_where_there_is_no_other(
    host: Host,
) -> None:
    waits = status("primary", "starting", transmitting=False, sync="none")
    waits["active"]["undecided"] = True
    host.world(waits)
    assert host("monitor") == 0 and host.score() == "--update=10"
    assert host("promote") == 0
    assert "colo-xdp failover" in host.calls()[-1]


def test_a_probe_finds_who_transmits(host: Host) -> None:
    host.world(PVM)
    assert host("monitor", interval=0) == 8 and host("monitor") == 8
    host.world(SVM)
    (host.dir / "run/colo-xdp-web1:0.promoted").unlink()
    assert host("monitor", interval=0) == 0


def test_a_dead_controller_is_an_error_while_its_guest_lives(host: Host) -> None:
    host.world(None, started=PVM)
    assert host("monitor", timeout=5) == 1 and "the controller died" in host.said
    # To stop it, the controller must be started once more, to report that the guest is silent.
    assert host("stop", timeout=5) == 0
    assert [c.split()[1] for c in host.calls()] == ["start", "switchover", "demote", "stop"]


@pytest.mark.parametrize("what", ["start", "demote", "stop"])
def test_no_stop_without_certain_silence(host: Host, what: str) -> None:
    """The cluster fences a host whose stop has failed."""
    fail = {what: 1}
    host.world(None if what == "start" else PVM, started=PVM, **fail)
    assert host("stop", timeout=5) == 1
    assert "cannot be done" in host.said
    if what != "stop":
        assert "systemctl stop colo-xdp@web1.service" not in host.calls()


def test_a_plan_that_fails_still_ends_in_silence(host: Host) -> None:
    host.world(PVM, switchover=1)
    assert host("demote") == 0 and "no switchover" in host.said
    assert host.calls()[-1].startswith("colo-xdp demote")


@pytest.mark.parametrize(("quorum", "fenced", "code"), [("1", 0, 0), ("1", 1, 1), ("0", 0, 1)])
def test_the_cluster_fences_only_with_quorum(
    tmp_path: Path, quorum: str, fenced: int, code: int
) -> None:
    for name, text in (
        ("crm_node", f"echo {quorum}"),
        ("stonith_admin", f'echo "$@" > {tmp_path}/asked; exit {fenced}'),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    r = subprocess.run([str(FENCE), "host-b"], env=env, capture_output=True, check=False)
    assert r.returncode == code
    asked = tmp_path / "asked"
    assert asked.exists() is (quorum == "1")
    if asked.exists():
        assert asked.read_text().startswith("--fence host-b ")
    assert subprocess.run([str(FENCE)], env=env, capture_output=True, check=False).returncode != 0
    shutil.rmtree(tmp_path)
