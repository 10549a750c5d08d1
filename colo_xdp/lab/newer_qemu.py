# SPDX-License-Identifier: GPL-2.0-or-later
"""Unpack the QEMU of Debian sid beside the installed one, with the libraries that it was built for.

apt downloads the package and all that it needs, as on a machine where nothing is installed, into a
directory of its own, and checks the archive's signature. Nothing is installed and no package's
script runs. The result is a script that runs this QEMU by its own dynamic linker.

`python -m colo_xdp.lab.newer_qemu DIRECTORY` does that once and prints the script's path, which
COLO_QEMU takes.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from .net import LabError, sh

SUITE = "sid"
PACKAGE = "qemu-system-x86"
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
DOWNLOAD_S = 150.0
RUN = """#!/bin/sh
# QEMU looks for modules in a directory of the host's QEMU unless it is told another one.
root=$(dirname "$(readlink -f "$0")")/root
lib=$root/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$lib/qemu"
exec "$lib/ld-linux-x86-64.so.2" --library-path "$lib:$lib/systemd" \\
	"$root/usr/bin/qemu-system-x86_64" \\
	-L "$root/usr/share/qemu" -L "$root/usr/share/seabios" "$@"
"""


def mirror() -> str:
    """Return the URI from which this machine's apt gets Debian. Raises LabError."""

    def ask() -> list[str]:
        shape = "$(REPO_URI) $(ORIGIN) $(LABEL)"
        text = sh("apt-get", "indextargets", "--format", shape, "Created-By: Packages", check=False)
        rows = [line.split() for line in text.splitlines()]
        return [r[0] for r in rows if r[1:] == ["Debian", "Debian"]]

    found = ask()
    if not found:
        sh("apt-get", "update")  # who publishes a source is in its downloaded index
        found = ask()
    if not found:
        raise LabError("none of apt's sources is Debian's archive")
    return found[0]


class _Apt:
    """apt with a state of its own, in a temporary directory."""

    def __init__(self, directory: Path) -> None:
        self._dir = directory
        for sub in ("lists/partial", "archives/partial", "parts"):
            (directory / sub).mkdir(parents=True)
        (directory / "status").touch()  # nothing is installed
        (directory / "parts/debian.sources").write_text(
            f"Types: deb\nURIs: {mirror()}\nSuites: {SUITE}\nComponents: main\n"
            f"Signed-By: {KEYRING}\n"
        )
        options = {
            "Dir::Etc::SourceList": "/dev/null",
            "Dir::Etc::SourceParts": directory / "parts",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": directory,
            "Dir::State::Lists": directory / "lists",
            "Dir::State::Status": directory / "status",
            "Dir::Cache": directory,
            "Dir::Cache::Archives": directory / "archives",
            "Acquire::Languages": "none",
            "Acquire::Retries": 3,
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "root",  # another user may not reach this directory
        }
        self._options = [x for k, v in options.items() for x in ("-o", f"{k}={v}")]

    def get(self, *command: str) -> None:
        sh("apt-get", "-qq", *self._options, *command, timeout=DOWNLOAD_S)

    def download(self) -> list[Path]:
        """Return the files of the package and of all that it needs. Raises LabError."""
        self.get("update")
        self.get("install", "--download-only", "--yes", PACKAGE)
        return sorted((self._dir / "archives").glob("*.deb"))


def fetch(directory: Path) -> Path:
    """Return the script that runs sid's QEMU, unpacked below the directory the first time.

    Raises LabError with what apt or dpkg-deb printed.
    """
    directory = directory.absolute()
    run, stamp = directory / "qemu-system-x86_64", directory / "stamp"
    want = f"{SUITE} {PACKAGE}\n{RUN}"
    if run.exists() and stamp.exists() and stamp.read_text() == want:
        return run
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    with tempfile.TemporaryDirectory(dir=directory) as tmp:
        for deb in _Apt(Path(tmp)).download():
            sh("dpkg-deb", "-x", str(deb), str(directory / "root"))
    run.write_text(RUN)
    run.chmod(0o755)
    sh(str(run), "--version")
    stamp.write_text(want)
    return run


def main() -> None:
    try:
        run = fetch(Path(sys.argv[1]))
    except LabError as e:
        sys.exit(f"QEMU of Debian {SUITE}: {e}")
    print(os.path.relpath(run))


if __name__ == "__main__":
    main()
