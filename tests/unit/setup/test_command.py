# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp init` and `join` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import FAILED, USAGE, app

from .pairs import root, tree

run = CliRunner().invoke
INIT = [
    "init", "--pair", "web1", "--hosts", "hosta/hostb", "--addresses", "192.0.2.1/192.0.2.2",
    "--peer-link", "eth1", "--bridge", "br0", "--memory", "1G",
]  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has in its /etc is no pair of the tests'."""
    monkeypatch.setattr("colo_xdp.setup.host.CONFIGS", "/none")


def test_init_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r = run(app, [*INIT, "--bundle", str(tmp_path / "made"), "--disk", "file=/a.qcow2"])
    assert r.exit_code == 0, r.output
    assert "on hostb: colo-xdp join web1-secondary.bundle" in r.output
    monkeypatch.setattr("colo_xdp.setup.host.CONFIGS", "/etc/colo-xdp")
    here = root(tmp_path / "root", "hostb")
    join = ["join", str(tmp_path / "made/web1-secondary.bundle"), "--root", str(here)]
    before = tree(here)
    r = run(app, [*join, "--dry-run"])
    assert r.exit_code == 0 and "would write" in r.output and tree(here) == before
    r = run(app, join)
    assert r.exit_code == 0 and "systemctl enable --now colo-xdp@web1 colo-qemu-in" in r.output
    assert run(app, ["config", "check", str(here / "etc/colo-xdp/web1.toml")]).exit_code == 0
    r = run(app, [*join, "--host", "hosta"])
    assert r.exit_code == FAILED and "take the other bundle" in r.output


def test_nobody_to_ask(tmp_path: Path) -> None:
    r = run(app, ["init", "--pair", "web1", "--accel", "xen", "--bundle", str(tmp_path)])
    assert r.exit_code == USAGE
    for said in (
        "--hosts is missing",
        "--memory is missing",
        "--accel xen",
        "there is no terminal",
    ):
        assert said in r.output
    assert tree(tmp_path) == {}


def test_a_person_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = iter(["hosta/hostb", "192.0.2.1/192.0.2.2", "eth1", "2G", "br0", ""])
    monkeypatch.setattr("colo_xdp.cli.setup.sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("colo_xdp.cli.setup.typer.prompt", lambda *a, **k: next(said))
    from colo_xdp.cli.setup import init

    init(pair="web1", bundle=tmp_path / "made")
    assert (tmp_path / "made/web1-primary.bundle").exists() and next(said, None) is None


def test_contradictions(tmp_path: Path) -> None:
    r = run(app, [*INIT, "--from-qemu", "1", "--from-libvirt", "x", "--bundle", str(tmp_path)])
    assert r.exit_code == USAGE and "--from-qemu 1: not with --from-libvirt" in r.output
    r = run(app, ["init", "--from-qemu", "1", "--bundle", str(tmp_path)])
    assert r.exit_code == USAGE and "--pair is missing: --from-qemu needs it" in r.output


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    r = run(app, [*INIT, "--bundle", str(tmp_path), "--dry-run"])
    assert r.exit_code == 0 and "ExecStart=/etc/colo-xdp/web1/qemu -incoming tcp:" in r.output
    assert tree(tmp_path) == {}
