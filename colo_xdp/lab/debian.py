# SPDX-License-Identifier: GPL-2.0-or-later
"""Build Debian roots: a directory of packages, and from one the disk image of a Debian guest.

The guest is Debian 12 with systemd, its root an ext4 file system on the first disk, with the
services of the small guest as a unit. It boots the same kernel and initramfs. The image is the same
one, byte for byte, for the same versions of the packages. A Variant has more packages, and files of
its own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import ext4, guest
from .net import LabError, sh

SUITE = "bookworm"
SIZE_MIB = 512
MEMORY_MIB = 160
#: where the guest's recordd writes, on its root
RECORDS = "/mnt/vda"
LEFT_OUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*")
PROGRAMS = "usr/local/bin"
APPLETS = ("httpd", "nc", "usleep", "wget")  # of busybox, which the services need
BUILD_S = 900.0
#: as good as any other, and the same in each image
MACHINE_ID = "c0109d0a000040008000000000000001"
#: units that would find nothing to do and cost seconds of a boot under TCG: nobody logs in, nothing
#: is on the root that they would load or mount
MASKED = (
    "getty.target", "serial-getty@.service", "modprobe@.service", "systemd-modules-load.service",
    "kmod-static-nodes.service", "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount",
    "dev-mqueue.mount", "sys-fs-fuse-connections.mount", "sys-kernel-config.mount",
    "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service", "systemd-sysusers.service",
)  # fmt: skip
UNIT = """[Unit]
Description=Services of the laboratory

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/usr/local/bin/services
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""


@dataclass(frozen=True, slots=True)
class Packages:
    """What a root consists of: a variant of mmdebstrap, packages, paths to leave out, a release."""

    names: tuple[str, ...]
    variant: str = "minbase"
    left_out: tuple[str, ...] = LEFT_OUT
    suite: str = field(default=SUITE, repr=False)

    @property
    def digest(self) -> str:
        """Return what changes when anything here changes."""
        return hashlib.sha256(repr((self.suite, self)).encode()).hexdigest()


#: without usr-is-merged, systemd brings usrmerge and Perl
GUEST = Packages(
    ("systemd-sysv", "iproute2", "busybox-static", "usr-is-merged"), variant="essential"
)


def _nothing(root: Path) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Variant:
    """A Debian guest: what it consists of, and what it needs.

    `add` puts files into its root; `sources` are what these come from, to tell whether an image is
    up to date.
    """

    name: str
    packages: Packages = GUEST
    size_mib: int = SIZE_MIB
    memory_mib: int = MEMORY_MIB
    boot_s: float = 120.0
    add: Callable[[Path], None] = _nothing
    sources: bytes = b""

    def base(self, directory: Path) -> Path:
        """Return where its packages are unpacked."""
        return directory / self.name


PLAIN = Variant("debian")


def _run(*cmd: str) -> None:
    r = subprocess.run(
        cmd, capture_output=True, text=True, check=False, timeout=BUILD_S,
        stdin=subprocess.DEVNULL, env={**os.environ, "SOURCE_DATE_EPOCH": str(ext4.TIME)},
    )  # fmt: skip
    if r.returncode:
        raise LabError(f"{' '.join(cmd)}: {(r.stdout + r.stderr)[-4000:]}")


def fresh(result: Path, digest: str) -> bool:
    """Return whether a result is there and made from the inputs with this digest."""
    stamp = result.with_name(f"{result.name}.stamp")
    return result.exists() and stamp.exists() and stamp.read_text() == digest


def renew(result: Path, digest: str, make: Callable[[Path], None]) -> None:
    """Have `make` write a result anew: it is complete, or not there."""
    stamp = result.with_name(f"{result.name}.stamp")
    stamp.unlink(missing_ok=True)
    part = result.with_name(f"{result.name}.part")
    for old in (result, part):
        if old.is_dir():
            shutil.rmtree(old)
        old.unlink(missing_ok=True)
    make(part)
    part.rename(result)
    stamp.write_text(digest)


def bootstrap(root: Path, packages: Packages) -> Path:
    """Install packages of Debian into a directory; once, and again when the list changes.

    Raises LabError with mmdebstrap's output.
    """

    def make(part: Path) -> None:
        _run(
            "mmdebstrap", "--quiet", f"--variant={packages.variant}",
            "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr",
            f"--include={','.join(packages.names)}",
            '--aptopt=APT::Install-Recommends "false"', '--aptopt=Acquire::Languages "none"',
            *(f"--dpkgopt=path-exclude={p}" for p in packages.left_out),
            packages.suite, str(part),
        )  # fmt: skip

    if not fresh(root, packages.digest):
        root.parent.mkdir(parents=True, exist_ok=True)
        renew(root, packages.digest, make)
    return root


def prepare(root: Path) -> None:
    """Make the guest of a directory of packages."""
    guest.add_services(root, PROGRAMS)
    for applet in APPLETS:
        (root / PROGRAMS / applet).symlink_to("/bin/busybox")
    (root / "etc/hostname").write_text("guest\n")
    (root / "etc/fstab").write_text("/dev/vda / ext4 errors=remount-ro 0 1\n")
    (root / "etc/machine-id").write_text(f"{MACHINE_ID}\n")
    units = root / "etc/systemd/system"
    (units / "lab.service").write_text(UNIT)
    (units / "multi-user.target.wants").mkdir(parents=True, exist_ok=True)
    (units / "multi-user.target.wants/lab.service").symlink_to("../lab.service")
    for name in MASKED:
        (units / name).symlink_to("/dev/null")


def build(
    directory: Path,
    small: guest.Guest,
    variant: Variant = PLAIN,
    say: Callable[[str], None] = lambda text: None,
) -> guest.Guest:
    """Return a Debian guest, building its image only when something in it has changed.

    Raises LabError naming the failed step.
    """
    image = directory / f"{variant.name}.qcow2"
    sizes = f"{variant.size_mib}".encode()
    digest = hashlib.sha256(
        variant.packages.digest.encode()
        + guest.sources()
        + Path(__file__).read_bytes()
        + Path(ext4.__file__).read_bytes()
        + sizes
        + variant.sources
    ).hexdigest()

    def make(part: Path) -> None:
        base = bootstrap(variant.base(directory), variant.packages)
        with tempfile.TemporaryDirectory(dir=directory) as tmp:
            root = Path(tmp) / "root"
            sh("cp", "-a", str(base), str(root))
            prepare(root)
            variant.add(root)
            ext4.make_image(root, part, variant.size_mib)

    if not fresh(image, digest):
        say("a Debian root for the guest, from packages: once, about a minute")
        renew(image, digest, make)
    return replace(small, root=image, append="root=/dev/vda rw", memory_mib=variant.memory_mib)


def missing(programs: Sequence[str] = ("mmdebstrap", "mke2fs", "qemu-img")) -> str:
    """Return why no root can be built here; "" if it can."""
    if os.geteuid():
        return "needs root"
    absent = [c for c in programs if not shutil.which(c)]
    return f"not installed: {', '.join(absent)}" if absent else ""
