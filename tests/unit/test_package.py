# SPDX-License-Identifier: GPL-2.0-or-later
"""Debian's package: its dependencies are the project's, and what its build makes of files.

tests/hosts/test_package.py builds and installs it.
"""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DEBIAN = ROOT / "deploy/debian"


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("package", DEBIAN / "package.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


package = load()


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in version.split("."))


def depends() -> dict[str, str]:
    """What the package depends on, with the least version where it names one."""
    field = re.search(r"^Depends: (.*?)^\w", (DEBIAN / "control").read_text(), re.M | re.S)
    assert field
    return dict(re.findall(r"([\w.-]+)(?: \(>= ([\w.]+)\))?(?:,| \|)", field[1]))


def test_every_requirement_is_carried_or_debians() -> None:
    text = (DEBIAN / "vendored.txt").read_text()
    carried = dict(re.findall(r"^([\w.-]+)==([\d.]+) --hash=sha256:[0-9a-f]{64}$", text, re.M))
    lines = [x for x in text.splitlines() if x and x[0] != "#"]
    assert len(carried) == len(lines), "one line each, with its hash"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert depends()["python3"] == project["requires-python"].removeprefix(">=")
    for requirement in project["dependencies"]:
        m = re.fullmatch(r"([\w.-]+)>=([\d.]+)(?:,<([\d.]+))?", requirement)
        assert m
        name, least, below = m.groups()
        if name in carried:
            version = numbers(carried.pop(name))
            assert numbers(least) <= version < numbers(below or "9999"), requirement
        else:
            assert depends()[f"python3-{name}"] == least, requirement
    assert not carried, "a library that nothing requires"
    assert "python3-bpfcc" in depends() and "linux-headers-amd64" in depends()


def test_the_unit_and_the_launcher_agree() -> None:
    unit = (ROOT / "deploy/systemd/colo-xdp@.service").read_text()
    rules = (DEBIAN / "rules").read_text()
    assert "ExecStart=/usr/bin/colo-xdp " in unit and "$(ROOT)/usr/bin/colo-xdp" in rules
    launcher = (DEBIAN / "launcher").read_text()
    assert launcher.startswith("#!/usr/bin/python3 -I\n") and '"lib/colo-xdp"' in launcher


# ---- changelog

CHANGES = """# Changelog

Words about it.

## 0.2.0 - unreleased

### Added

- One thing, which is long enough that it does not fit into a single line of a Debian changelog.
- Another
  one.

### Fixed

Found by somebody:

- A third.

## 0.1.0 - 2025-01-31

- The first.
"""


def test_the_changelog_of_debian() -> None:
    text = package.changelog(CHANGES, 1_700_000_000)
    who = package.maintainer()
    assert text.split("\n\n")[:3] == [
        "colo-xdp (0.2.0-1) unstable; urgency=medium",
        "  * One thing, which is long enough that it does not fit into a single line of\n"
        "    a Debian changelog.\n  * Another one.\n  * A third.",
        f" -- {who}  Tue, 14 Nov 2023 22:13:20 +0000\n\n".strip("\n"),
    ]
    assert text.endswith(f"  * The first.\n\n -- {who}  Fri, 31 Jan 2025 00:00:00 +0000\n")


def test_its_newest_version_is_the_projects() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = package.changelog((ROOT / "CHANGELOG.md").read_text(), 0)
    assert text.startswith(f"colo-xdp ({version}-1) ")
    assert all(len(x) <= 80 for x in text.splitlines() if not x.startswith(" -- "))


# ---- libraries


def wheel(directory: Path, metadata: str, name: str = "a_b-1.2", tag: str = "py3-none-any") -> Path:
    """Make a wheel of one module."""
    path = directory / f"{name}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("a_b/__init__.py", "x = 1\n")
        z.writestr(f"{name}.data/data/share/man/man1/a.1", ".TH A 1\n")
        z.writestr(f"{name}.dist-info/METADATA", f"Name: a.b\nVersion: 1.2\n{metadata}\n")
    return path


def test_libraries_are_unpacked_and_listed(tmp_path: Path) -> None:
    wheels, target = tmp_path / "wheels", tmp_path / "lib"
    wheels.mkdir()
    path = wheel(wheels, "License-Expression: MIT OR Apache-2.0\n")
    (found,) = package.unpack(wheels, target)
    assert (target / "a_b/__init__.py").read_text() == "x = 1\n"
    assert not (target / "a_b-1.2.data").exists(), "nothing that belongs elsewhere"
    bill = package.bill([found], "0.1.0-1", 1_700_000_000)
    assert json.loads(json.dumps(bill)) == bill
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.5")
    assert bill["metadata"]["timestamp"] == "2023-11-14T22:13:20Z"
    assert (found["name"], found["version"], found["purl"]) == ("a.b", "1.2", "pkg:pypi/a-b@1.2")
    assert found["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert found["properties"] == [{"name": "file", "value": path.name}]
    (h,) = found["hashes"]
    assert h["alg"] == "SHA-256" and re.fullmatch(r"[0-9a-f]{64}", h["content"])


def test_what_depends_on_a_version_of_python_is_refused(tmp_path: Path) -> None:
    wheel(tmp_path, "License: MIT\n", tag="cp311-cp311-linux_x86_64")
    with pytest.raises(ValueError, match=r"a_b-1\.2-cp311.* depends on a machine"):
        package.unpack(tmp_path, tmp_path / "lib")


@pytest.mark.parametrize(
    ("metadata", "license_"),
    [
        ("License: Apache-2.0", "Apache-2.0"),
        (
            "License: many words\n"
            "Classifier: License :: OSI Approved :: GNU General Public License v2 (GPLv2)\n"
            "Classifier: Topic :: Something",
            "GPL-2.0-only",
        ),
    ],
)
def test_licences(tmp_path: Path, metadata: str, license_: str) -> None:
    wheel(tmp_path, metadata)
    (found,) = package.unpack(tmp_path, tmp_path / "lib")
    assert found["licenses"] == [{"expression": license_}]


@pytest.mark.parametrize("metadata", ["", "Classifier: License :: OSI Approved :: Some License"])
def test_an_unknown_licence_is_refused(tmp_path: Path, metadata: str) -> None:
    wheel(tmp_path, metadata)
    with pytest.raises(ValueError, match=r"a\.b: licence"):
        package.unpack(tmp_path, tmp_path / "lib")
