# SPDX-License-Identifier: GPL-2.0-or-later
"""The command line: exit codes, and that quick commands stay quick."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp import __version__
from colo_xdp.cli import DEGRADED, EXIT_CODES, FAILED, NOT_RUNNING, ORDER, USAGE, app

ROOT = Path(__file__).parents[3]
EXAMPLE = str(ROOT / "deploy/examples/primary.toml")
run = CliRunner().invoke


def test_quick_commands_need_neither_bcc_nor_netlink() -> None:
    code = (
        "import sys; from typer.testing import CliRunner; from colo_xdp.cli import app\n"
        "CliRunner().invoke(app, ['--help'])\n"
        "CliRunner().invoke(app, ['status', '--run-dir', '/x'])\n"
        "print([m for m in ('bcc', 'pyroute2', 'qemu', 'prometheus_client') if m in sys.modules])"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert r.stdout.strip() == "[]"


def test_each_command_has_its_place_in_the_help() -> None:
    """The modules register them in the order of their names."""
    assert [c.name or getattr(c.callback, "__name__", "") for c in app.registered_commands] == [
        *ORDER
    ]


def test_the_version_as_an_option_and_as_a_command() -> None:
    assert run(app, ["--version"]).output == run(app, ["version"]).output == f"{__version__}\n"


@pytest.mark.parametrize("command", ["status", "checkpoint", "failover", "mode"])
def test_nothing_runs(tmp_path: Path, command: str) -> None:
    r = run(app, [command, "--run-dir", str(tmp_path)])
    assert r.exit_code == NOT_RUNNING
    assert "no controller runs here" in r.output


def test_config_check_and_show(tmp_path: Path) -> None:
    assert run(app, ["config", "check", EXAMPLE]).exit_code == 0
    shown = run(app, ["config", "show", EXAMPLE])
    again = tmp_path / "again.toml"
    again.write_text(shown.output)
    assert run(app, ["config", "check", str(again)]).exit_code == 0
    assert run(app, ["config", "show", str(again)]).output == shown.output


def test_all_mistakes_of_a_config_are_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad.toml"
    text = Path(EXAMPLE).read_text()
    bad.write_text(
        text.replace("max_queue_size = 1024", 'max_queue_siz = 7\ncompare_timeuot = "x"')
    )
    r = run(app, ["run", str(bad)])
    assert r.exit_code == USAGE
    assert "max_queue_size" in r.output and "compare_timeout" in r.output and str(bad) in r.output
    assert run(app, ["run", str(tmp_path / "none.toml")]).exit_code == USAGE


def test_cleanup_needs_a_name_and_is_idempotent(tmp_path: Path) -> None:
    assert run(app, ["cleanup"]).exit_code == USAGE
    args = ["cleanup", "--pair", "nopair", "--bpffs", str(tmp_path), "--run-dir", str(tmp_path)]
    r = run(app, args)
    assert r.exit_code == 0 and "nothing to remove" in r.output


def test_cleanup_keeps_the_mark_of_a_guest_that_ran_standalone(tmp_path: Path) -> None:
    lines = {
        "run_dir": tmp_path / "run",
        "state_dir": tmp_path / "state",
        "bpffs": tmp_path / "bpf",
    }
    text = Path(EXAMPLE).read_text()
    there = "\n".join(f'{k} = "{v}"' for k, v in lines.items())
    file = tmp_path / "web1.toml"
    file.write_text(f"{text}\n[datapath]\n{there}\n")
    assert "kept" not in run(app, ["cleanup", str(file)]).output
    mark = tmp_path / "state/web1.primary.standalone.json"
    mark.parent.mkdir()
    mark.write_text("{}")
    r = run(app, ["cleanup", str(file)])
    assert r.exit_code == 0 and f"kept {mark}" in r.output.replace("\n", "") and mark.exists()


def test_doctor_fails_on_a_host_without_the_devices() -> None:
    r = run(app, ["doctor", EXAMPLE])
    assert r.exit_code == FAILED
    assert "tap-web1 does not exist" in r.output and "ip tuntap add" in r.output


def test_of_several_pairs_one_is_named(tmp_path: Path) -> None:
    for name in ("web1.primary", "web2.secondary", "db.primary", "db.secondary"):
        (tmp_path / f"{name}.sock").touch()
    where = ["--run-dir", str(tmp_path)]
    r = run(app, ["status", *where])
    assert r.exit_code == USAGE and "name a pair" in r.output and "  web2  (" in r.output
    r = run(app, ["status", "web2", *where])
    assert r.exit_code == NOT_RUNNING and f"{tmp_path}/web2.secondary.sock" in r.output
    r = run(app, ["status", "web3", *where])
    assert r.exit_code == NOT_RUNNING and "no controller of pair web3" in r.output
    r = run(app, ["status", "db", *where])
    assert r.exit_code == USAGE and "both roles of db" in r.output
    assert run(app, ["status", "web2.toml", *where]).exit_code == USAGE, "a file that is not there"


def test_the_exit_code_of_a_pair_that_is_not_protected() -> None:
    assert DEGRADED == 4 and "not protected" in EXIT_CODES[DEGRADED]
