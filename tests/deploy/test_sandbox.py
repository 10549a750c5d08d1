# SPDX-License-Identifier: GPL-2.0-or-later
"""The sandboxes of our units: no wider than docs/operator/security.md says, and with reasons."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from colo_xdp.setup import qemu_unit
from tests.unit.setup.pairs import made

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "deploy/systemd/colo-xdp@.service"
pytestmark = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is not here"
)


def analyze(unit: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", *options, str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def documented(unit: str) -> int:
    """Return the exposure that the handbook gives for a unit, in tenths."""
    text = (ROOT / "docs/operator/security.md").read_text()
    (found,) = re.findall(rf"^\| {re.escape(unit)} \|[^|]*\| (\d)\.(\d) \|", text, re.M)
    return int("".join(found))


def within(unit: Path, tenths: int) -> bool:
    r = analyze(unit, f"--threshold={tenths}")
    assert "Overall exposure level" in r.stdout, r.stderr
    return r.returncode == 0


def test_the_controllers_exposure_is_the_documented_one() -> None:
    most = documented("`colo-xdp@.service`")
    assert within(UNIT, most), analyze(UNIT).stdout
    assert not within(UNIT, most - 1), "it has become less: say so in docs/operator/security.md"


@pytest.mark.parametrize("user", ["", "daemon"])
def test_the_guests_exposure_is_the_documented_one(tmp_path: Path, user: str) -> None:
    most = documented("`colo-qemu@.service`" + ", with `--qemu-user`" * bool(user))
    units = {
        Path(path).name: text
        for path, text, _ in qemu_unit.files(made(qemu_user=user), "primary")
        if path.endswith(".service")
    }
    assert len(units) == 2
    for name, text in units.items():
        (tmp_path / name).write_text(text)
        assert within(tmp_path / name, most), analyze(tmp_path / name).stdout


def test_the_examples_have_the_same_sandbox_as_what_init_makes() -> None:
    wanted = {f"CapabilityBoundingSet={qemu_unit.CAPABILITIES}", *qemu_unit.SANDBOX.splitlines()}
    for name in ("vm", "vm-incoming"):
        assert wanted <= {*(ROOT / f"deploy/examples/{name}@.service").read_text().splitlines()}


def what_is_left() -> set[str]:
    """Return the words of which the unit has to give a reason: what it does not restrict."""
    points = json.loads(analyze(UNIT, "--json=short").stdout)
    names = {p["name"].split("=")[0] for p in points if not p["set"] and p["exposure"]}
    left = {f"{x}=" for name in names for x in re.split(r"=?/", name)}
    for key in ("CapabilityBoundingSet", "RestrictAddressFamilies", "SystemCallFilter"):
        values = re.findall(rf"^{key}=([^~].*)", UNIT.read_text(), re.M)
        allowed = {word.removeprefix("CAP_") for value in values for word in value.split()}
        left = left - {f"{key}="} | allowed
    return left


def test_each_restriction_that_is_missing_has_its_reason() -> None:
    comments = [x for x in UNIT.read_text().splitlines() if x.startswith("#")]
    said = {w.strip(":,.()") for x in comments for w in x.split()}
    left = what_is_left()
    assert {"PrivateNetwork=", "User=", "NET_ADMIN", "AF_PACKET", "bpf"} <= left
    assert left <= said, f"no comment in the unit has the reason of {left - said}"
