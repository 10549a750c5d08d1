# SPDX-License-Identifier: GPL-2.0-or-later
"""What is shipped beside the code says what the code does."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest

from colo_xdp.config import DOCS, load
from colo_xdp.corpus import load as load_corpus

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


def test_unit_file() -> None:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy/systemd/colo-xdp@.service")
    s = unit["Service"]
    assert s["Type"] == "notify" and "colo-xdp run /etc/colo-xdp/%i.toml" in s["ExecStart"]
    assert s["RuntimeDirectory"] == "colo-xdp" and s["RuntimeDirectoryPreserve"] == "yes"
    for cap in ("CAP_BPF", "CAP_NET_ADMIN", "CAP_PERFMON"):
        assert cap in s["CapabilityBoundingSet"]


def test_dashboard_is_json_with_panels() -> None:
    d = json.loads((ROOT / "deploy/grafana/colo-xdp.json").read_text())
    assert len(d["panels"]) >= 8
    assert len({p["id"] for p in d["panels"]}) == len(d["panels"])


def test_readme_has_every_key_of_the_config() -> None:
    text = (ROOT / "README.md").read_text()
    for key, meaning in DOCS.items():
        assert f"| `{key}` | {meaning.replace('|', '&#124;')} |" in text, key


def test_every_rule_of_the_table_has_its_tests() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
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


def test_readme_has_every_command() -> None:
    from colo_xdp.cli import app

    text = (ROOT / "README.md").read_text()
    for command in app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        if name != "version":
            assert f"`colo-xdp {name}" in text, name
