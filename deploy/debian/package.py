# SPDX-License-Identifier: GPL-2.0-or-later
"""What building the Debian package needs beside debhelper; the standard library only.

    package.py changelog CHANGELOG.md       debian/changelog, to standard output
    package.py unpack WHEELS DIR SBOM       the libraries of WHEELS in DIR, and a list of them

The list is a software bill of materials in CycloneDX's JSON, the same for the same wheels.
"""

from __future__ import annotations

import datetime
import email.message
import email.parser
import email.utils
import hashlib
import json
import os
import re
import sys
import textwrap
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REVISION = 1
SECTION = re.compile(r"^## (?P<version>\d[\w.]*) - (?P<day>\S+)\n", re.M)
#: licences of metadata that is older than License-Expression
LICENSES = {
    "GNU Lesser General Public License v2 or later (LGPLv2+)": "LGPL-2.0-or-later",
    "GNU General Public License v2 (GPLv2)": "GPL-2.0-only",
}


def _epoch() -> int:
    return int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))


# ---- changelog


def maintainer() -> str:
    """Return whom debian/control names."""
    m = re.search(r"^Maintainer: (.+)$", (HERE / "control").read_text(), re.M)
    assert m
    return m[1]


def changes(section: str) -> Iterator[str]:
    """Yield the entries of one release, each in one line."""
    for part in re.split(r"^- ", section, flags=re.M)[1:]:
        entry = re.split(r"\n\n|\n#", part)[0]
        yield " ".join(entry.split())


def changelog(text: str, epoch: int) -> str:
    """Return CHANGELOG.md in Debian's form; an unreleased version has the date of the source."""
    parts = SECTION.split(text)[1:]
    out = []
    for version, day, section in zip(parts[::3], parts[1::3], parts[2::3], strict=True):
        at = datetime.datetime.fromtimestamp(epoch, datetime.UTC)
        if day != "unreleased":
            at = datetime.datetime.fromisoformat(day).replace(tzinfo=datetime.UTC)
        items = [
            textwrap.fill(c, 78, initial_indent="  * ", subsequent_indent="    ")
            for c in changes(section)
        ]
        out.append(
            f"colo-xdp ({version}-{REVISION}) unstable; urgency=medium\n\n"
            + "\n".join(items)
            + f"\n\n -- {maintainer()}  {email.utils.format_datetime(at)}\n"
        )
    return "\n".join(out)


# ---- libraries


def license_of(metadata: email.message.Message) -> str:
    """Return a library's licence as an SPDX expression. Raises ValueError if it is not known."""
    for key in ("License-Expression", "License"):
        if re.fullmatch(r"[\w.+-]+( (AND|OR|WITH) [\w.+-]+)*", metadata.get(key, "")):
            return str(metadata[key])
    names = [c.split(" :: ")[-1] for c in metadata.get_all("Classifier", ()) if "License ::" in c]
    if not names or set(names) - set(LICENSES):
        raise ValueError(f"{metadata['Name']}: licence {names or 'not given'}")
    return " AND ".join(LICENSES[n] for n in names)


def component(wheel: Path, metadata: email.message.Message) -> dict[str, Any]:
    """Return a library's entry of the list."""
    name, version = metadata["Name"], metadata["Version"]
    return {
        "type": "library",
        "name": name,
        "version": version,
        "purl": f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{version}",
        "licenses": [{"expression": license_of(metadata)}],
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(wheel.read_bytes()).hexdigest()}],
        "properties": [{"name": "file", "value": wheel.name}],
    }


def unpack(wheels: Path, directory: Path) -> list[dict[str, Any]]:
    """Unpack all wheels, and return their entries. Raises ValueError if one is not pure Python."""
    found = []
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as z:
            # NAME-VERSION.data: man pages and the like for a prefix of its own
            names = [n for n in z.namelist() if ".data/" not in n]
            text = {n.rpartition("/")[2]: n for n in names if ".dist-info/" in n}
            if not wheel.name.endswith("-none-any.whl"):
                raise ValueError(f"{wheel.name} depends on a machine or on a version of Python")
            metadata = email.parser.BytesParser().parsebytes(z.read(text["METADATA"]))
            z.extractall(directory, names)
        found.append(component(wheel, metadata))
    return found


def bill(components: list[dict[str, Any]], version: str, epoch: int) -> dict[str, Any]:
    """Return the list for the package of that version."""
    at = datetime.datetime.fromtimestamp(epoch, datetime.UTC)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": at.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "component": {
                "type": "application",
                "name": "colo-xdp",
                "version": version,
                "purl": f"pkg:deb/colo-xdp@{version}?arch=all",
                "licenses": [{"expression": "GPL-2.0-or-later"}],
            },
        },
        "components": components,
    }


def main(what: str, *args: str) -> None:
    """Run one of the commands of the module's head."""
    if what == "changelog":
        sys.stdout.write(changelog(Path(args[0]).read_text(), _epoch()))
    else:
        wheels, directory, sbom = map(Path, args)
        m = re.match(r"colo-xdp \((.+?)\)", (HERE / "changelog").read_text())
        assert m
        text = json.dumps(bill(unpack(wheels, directory), m[1], _epoch()), indent=2)
        sbom.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
