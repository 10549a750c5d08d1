# SPDX-License-Identifier: GPL-2.0-or-later
"""Run Debian's own clients in the client's namespace, from the directory of the guest's packages.

They are the versions that belong to the servers, and the host needs none of them installed.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from colo_xdp.lab import debian
from colo_xdp.lab.client import guest_address
from colo_xdp.lab.guest import content
from colo_xdp.lab.net import LabError

from . import image

PGBENCH = "/usr/lib/postgresql/15/bin/pgbench"
SSH_OPTIONS = (
    "-o", "StrictHostKeyChecking=no",
    "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "-o", "BatchMode=yes",
)  # fmt: skip
GUEST = guest_address()
UPLOAD = "f1m"


@dataclass(frozen=True, slots=True)
class Ran:
    """What became of a client."""

    text: str
    seconds: float
    code: int | None  # None: killed at its deadline

    @property
    def hung(self) -> bool:
        return self.code is None


class Tools:
    """The clients of one laboratory."""

    def __init__(self, build: Path, namespace: str) -> None:
        """`build`: where the guests' files are. Raises LabError if its packages are not there."""
        self.root = image.variant(build).base(build)
        debian.bootstrap(self.root, image.PACKAGES)
        self.namespace = namespace
        self.files = self.root / image.CLIENT_FILES / namespace
        self.files.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copy(image.keys(build) / "id", self.files / "id")
        (self.files / "id").chmod(0o600)
        (self.files / UPLOAD).write_bytes(content(UPLOAD))

    def run(self, *argv: str, deadline: float) -> Ran:
        """Run a client to its end, or kill it at its deadline (s)."""
        inside = ["nsenter", f"--net=/run/netns/{self.namespace}", "chroot", str(self.root)]
        began = time.monotonic()
        p = subprocess.Popen(
            [*inside, *argv], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, env={"PATH": "/usr/bin:/usr/sbin:/bin", "HOME": "/root"},
        )  # fmt: skip
        try:
            text, _ = p.communicate(timeout=deadline)
        except subprocess.TimeoutExpired:
            p.kill()
            text, _ = p.communicate()
            return Ran(text.decode(errors="replace"), time.monotonic() - began, None)
        except BaseException:
            p.kill()
            p.wait()
            raise
        return Ran(text.decode(errors="replace"), time.monotonic() - began, p.returncode)

    def must(self, *argv: str, deadline: float) -> Ran:
        """Run a client that is expected to succeed. Raises LabError with what it said."""
        ran = self.run(*argv, deadline=deadline)
        if ran.code:
            raise LabError(f"{' '.join(argv)}: {ran.text[-500:]}")
        return ran

    def inside(self, name: str) -> str:
        """Return where a client finds one of `files`."""
        return f"/{image.CLIENT_FILES}/{self.namespace}/{name}"

    def ssh(self, program: str) -> tuple[str, ...]:
        """Return ssh or scp, with what every call of it has."""
        return (program, "-i", self.inside("id"), *SSH_OPTIONS)

    def pgbench(self, *options: str) -> tuple[str, ...]:
        """Return the command of pgbench, with a log of each transaction in `files`."""
        log = ("--log", f"--log-prefix={self.inside('pgbench')}")
        return (PGBENCH, "-h", GUEST, "-U", "postgres", "-n", *log, *options, "postgres")

    def take(self, pattern: str) -> str:
        """Return what files of this pattern contain, and remove them."""
        text = ""
        for path in sorted(self.files.glob(pattern)):
            text += path.read_text()
            path.unlink()
        return text
