# SPDX-License-Identifier: GPL-2.0-or-later
"""The pair's own authority: what is written, with which rights, and that nothing is lost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp.cli import FAILED, USAGE, app
from colo_xdp.config.file import load
from colo_xdp.tools import pki
from colo_xdp.tools.doctor import Patient, _certificates
from colo_xdp.tools.findings import FAIL, OK, WARN

ROOT = Path(__file__).parents[3]
run = CliRunner().invoke


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    d = tmp_path_factory.mktemp("pki") / "new"
    assert run(app, ["pki", "init", str(d), "--pair", "web1"]).exit_code == 0
    assert run(app, ["pki", "issue", str(d)]).exit_code == 0
    return d


def test_files_and_their_rights(made: Path) -> None:
    modes = {p.name: oct(p.stat().st_mode & 0o777) for p in made.iterdir()}
    assert modes == {
        "ca.crt": "0o644", "ca.key": "0o600", "primary.crt": "0o644", "primary.key": "0o600",
        "secondary.crt": "0o644", "secondary.key": "0o600",
    }  # fmt: skip
    assert made.stat().st_mode & 0o077 == 0


def test_openssl_agrees(made: Path) -> None:
    for role in pki.ROLES:
        cmd = ["openssl", "verify", "-x509_strict", "-CAfile", str(made / "ca.crt")]
        subprocess.run([*cmd, str(made / f"{role}.crt")], check=True, capture_output=True)
        cmd = ["openssl", "x509", "-noout", "-ext", "subjectAltName", "-in"]
        out = subprocess.run(
            [*cmd, str(made / f"{role}.crt")], check=True, capture_output=True, text=True
        ).stdout
        assert f"URI:colo-xdp://web1/{role}" in out


def test_nothing_is_overwritten(made: Path) -> None:
    before = {p: p.read_bytes() for p in made.iterdir()}
    for args in (["init", str(made), "--pair", "web1"], ["issue", str(made)]):
        r = run(app, ["pki", *args])
        assert r.exit_code == FAILED and "not overwritten" in r.output
    assert {p: p.read_bytes() for p in made.iterdir()} == before


def test_renewal_replaces_one_host_only(made: Path, tmp_path: Path) -> None:
    for p in made.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    r = run(app, ["pki", "issue", str(tmp_path), "--role", "primary", "--renew"])
    assert r.exit_code == 0
    assert (tmp_path / "primary.key").read_bytes() != (made / "primary.key").read_bytes()
    assert (tmp_path / "secondary.key").read_bytes() == (made / "secondary.key").read_bytes()
    assert sorted(os.listdir(tmp_path)) == sorted(os.listdir(made))  # no temporary file is left


@pytest.mark.parametrize("pair", ["", "Web1", "a/b", "x" * 11])
def test_a_name_that_no_pair_has(tmp_path: Path, pair: str) -> None:
    r = run(app, ["pki", "init", str(tmp_path / "d"), "--pair", pair])
    assert r.exit_code == USAGE and not (tmp_path / "d").exists()


def test_without_an_authority(tmp_path: Path) -> None:
    r = run(app, ["pki", "issue", str(tmp_path)])
    assert r.exit_code == FAILED and "pki init" in r.output


def test_a_foreign_key(made: Path, tmp_path: Path) -> None:
    pki.init(tmp_path, "web1")
    (tmp_path / "ca.crt").write_bytes((made / "ca.crt").read_bytes())
    with pytest.raises(pki.PkiError, match="not the key of"):
        pki.issue(tmp_path, "primary")


def test_doctor_looks_at_certificates(made: Path, tmp_path: Path) -> None:
    text = (ROOT / "deploy/examples/primary.toml").read_text()

    def levels(directory: Path, role: str = "primary") -> list[int]:
        changed = text.replace("/etc/colo-xdp/web1/primary", f"/etc/colo-xdp/web1/{role}")
        path = tmp_path / "c.toml"
        path.write_text(changed.replace("/etc/colo-xdp/web1", str(directory)))
        return [c.level for c in _certificates(Patient(load(path)))]

    assert levels(made) == [OK, OK]
    assert levels(made, "secondary") == [OK, OK, FAIL]  # another host's
    assert levels(tmp_path) == [FAIL]
    for p in made.iterdir():
        (tmp_path / p.name).write_bytes(p.read_bytes())
    pki.issue(tmp_path, "primary", days=3, renew=True)
    assert levels(tmp_path) == [WARN, OK]
    os.chmod(tmp_path / "primary.key", 0o644)
    assert levels(tmp_path) == [WARN, WARN, OK]
