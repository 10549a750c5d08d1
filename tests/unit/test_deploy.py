# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shipped beside the code says what the code does."""

from __future__ import annotations

import ast
import configparser
import inspect
import json
import re
from pathlib import Path

import pytest

from colo_xdp.cli import USAGE
from colo_xdp.config.file import load
from colo_xdp.controller.handover import PROTECT_S
from colo_xdp.service.control_socket import request
from colo_xdp.service.daemon import HUNG_SHARE
from colo_xdp.setup import qemu_unit
from colo_xdp.setup.config_text import incoming_unit
from colo_xdp.tools.corpus import load as load_corpus
from colo_xdp.user_command import handover_unit

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("role", ["primary", "secondary"])
def test_example_configs_load(role: str) -> None:
    c = load(ROOT / f"deploy/examples/{role}.toml")
    assert c.role == role and c.failover.automatic and c.peer.cert


def test_the_two_examples_belong_together() -> None:
    p, s = (load(ROOT / f"deploy/examples/{r}.toml") for r in ("primary", "secondary"))
    assert (p.peer.local, p.peer.remote) == (s.peer.remote, s.peer.local)
    assert p.peer.ca == s.peer.ca and p.peer.cert != s.peer.cert
    assert p.pair == s.pair and p.qemu.migrate_uri == s.qemu.migrate_uri


def unit_file(path: str) -> configparser.ConfigParser:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / path)
    return unit


UNIT = "deploy/systemd/colo-xdp@.service"
HANDOVER = "deploy/systemd/colo-xdp-handover@.service"


def test_unit_file() -> None:
    unit = unit_file(UNIT)
    s = unit["Service"]
    assert s["Type"] == "notify" and "colo-xdp run /etc/colo-xdp/%i.toml" in s["ExecStart"]
    assert s["RuntimeDirectory"] == "colo-xdp" and s["RuntimeDirectoryPreserve"] == "yes"
    for cap in ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"):
        assert cap in s["CapabilityBoundingSet"]
    # a restart ends the controller alone, also where something has been left in its control group
    assert s["KillMode"] == "process"
    # a wrong file, or no program to start, is not cured by starting again
    assert s["Restart"] == "always" and s["RestartPreventExitStatus"].split() == ["2", "203"]
    assert USAGE == 2 and unit["Unit"]["StartLimitIntervalSec"] == "0"


def test_a_hung_controller_is_replaced_before_its_host_is_fenced() -> None:
    s = unit_file(UNIT)["Service"]
    dead_after = load(ROOT / "deploy/examples/primary.toml").peer.dead_after
    for key in ("WatchdogSec", "TimeoutStopSec"):
        assert float(s[key].removesuffix("s")) * 1000 < dead_after, key
    assert HUNG_SHARE < 1


def test_the_handover_ends_before_whatever_the_guest_needs() -> None:
    """systemd stops units in the reverse order of their start."""
    unit = configparser.RawConfigParser(strict=False)  # After= is there more than once
    lines = (ROOT / HANDOVER).read_text().splitlines()
    after = {x for line in lines if line.startswith("After=") for x in line[6:].split()}
    guests = {f"{qemu_unit.unit('%i')}", incoming_unit("%i")}
    guests |= {f.name.replace("@", "@%i") for f in (ROOT / "deploy/examples").glob("vm*.service")}
    assert len(guests) == 4 and guests <= after
    assert {"colo-xdp@%i.service", "multi-user.target"} <= after
    assert handover_unit("web1") == Path(HANDOVER).name.replace("@", "@web1")
    unit.read_string("\n".join(x for x in lines if not x.startswith(("After=", "Documentation="))))
    s = unit["Service"]
    assert s["ExecStop"] == "/usr/bin/colo-xdp handover --at-shutdown /etc/colo-xdp/%i.toml"
    assert "ExecStart" not in s and s["RemainAfterExit"] == "yes"
    # it is there wherever the controller is, and ends with nothing but the host
    assert unit_file(UNIT)["Unit"]["Wants"] == Path(HANDOVER).name.replace("@", "@%i")
    assert not {"requires", "bindsto", "partof", "wants"} & set(unit["Unit"])


def test_the_handover_has_the_time_that_it_may_take() -> None:
    seconds = float(unit_file(HANDOVER)["Service"]["TimeoutStopSec"].removesuffix("s"))
    waits = inspect.signature(request).parameters["timeout"].default
    c = load(ROOT / "deploy/examples/primary.toml")
    switchover_s = (c.checkpoint.deadline + 2 * c.qemu.qmp_timeout) / 1000
    assert PROTECT_S + switchover_s < waits < seconds


def socket_families(path: Path) -> set[str]:
    """The families that a module names (AF_*), and AF_NETLINK if it imports pyroute2."""
    tree = ast.parse(path.read_text())
    found = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    found |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    modules = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    modules |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    families = {f for f in found if re.fullmatch(r"AF_[A-Z0-9]+", f)}
    if any(m.split(".")[0] == "pyroute2" for m in modules):
        families.add("AF_NETLINK")
    if modules & {"asyncio", "http.server"} and {"open_connection", "start_server"} & found:
        families |= {"AF_INET", "AF_INET6"}
    return families


def test_the_unit_allows_the_socket_families_that_the_package_opens() -> None:
    needed: set[str] = set()
    for path in (ROOT / "colo_xdp").rglob("*.py"):
        if "lab" not in path.relative_to(ROOT / "colo_xdp").parts:
            needed |= socket_families(path)
    assert {"AF_PACKET", "AF_NETLINK", "AF_UNIX"} <= needed
    assert set(unit_file(UNIT)["Service"]["RestrictAddressFamilies"].split()) == needed


def test_a_new_family_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "m.py").write_text("import socket as s\nfrom pyroute2 import IPRoute\ns.AF_VSOCK\n")
    assert socket_families(tmp_path / "m.py") == {"AF_VSOCK", "AF_NETLINK"}


def test_the_guests_units_belong_to_the_examples() -> None:
    plain, waits = (unit_file(f"deploy/examples/{n}@.service") for n in ("vm", "vm-incoming"))
    for u in (plain, waits):
        assert "colo-xdp@%i.service" in u["Unit"]["Wants"]
        assert "colo-xdp@%i.service" in u["Unit"]["After"]
        # QEMU does not end with the controller
        assert not {"Requires", "BindsTo", "PartOf"} & set(u["Unit"])
    assert waits["Service"]["ExecStart"].startswith(plain["Service"]["ExecStart"] + " -incoming")
    port = waits["Service"]["ExecStart"].rsplit(":", 1)[1]
    for role in ("primary", "secondary"):
        text = (ROOT / f"deploy/examples/{role}.toml").read_text()
        assert load(ROOT / f"deploy/examples/{role}.toml").qemu.migrate_uri.endswith(f":{port}")
        assert '# incoming = ["systemctl", "restart", "vm-incoming@web1"]' in text
    qemu = (ROOT / "deploy/examples/qemu").read_text()
    c = load(ROOT / "deploy/examples/primary.toml")
    assert f"ifname={c.network.tap}," in qemu and f"unix:{c.qemu.qmp}," in qemu


def test_the_tap_that_networkd_makes_is_the_one_of_the_examples() -> None:
    tap = load(ROOT / "deploy/examples/primary.toml").network.tap
    dev = unit_file("deploy/networkd/30-tap-web1.netdev")
    net = unit_file("deploy/networkd/30-tap-web1.network")
    assert dev["NetDev"]["Name"] == net["Match"]["Name"] == tap
    assert dev["Tap"]["VNetHeader"] == "yes" and "Bridge" not in net["Network"]


def test_dashboard_is_json_with_panels() -> None:
    d = json.loads((ROOT / "deploy/grafana/colo-xdp.json").read_text())
    assert len(d["panels"]) >= 8
    assert len({p["id"] for p in d["panels"]}) == len(d["panels"])


def test_every_rule_of_the_table_has_its_tests() -> None:
    text = (ROOT / "docs/design/compare-rules.md").read_text()
    table = text.split("## The rules, case by case")[1].split("\n## ")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 30
    scenarios = {s.name for s in load_corpus()}
    code = "".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    for row in rows:
        names = re.findall(r"`([^`]+)`", row[4])
        assert names, row[1]
        for name in names:
            assert name in scenarios or f"def {name}(" in code, f"{row[1]}: {name}"
