# SPDX-License-Identifier: GPL-2.0-or-later
"""Build the small lab guest: Debian's cloud kernel and a busybox initramfs.

The files that it serves are generated here from a seed, so that a client can tell right bytes from
wrong ones without asking a guest.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .net import LabError, sh

MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_blk",
)
PROGRAMS = ("udpecho", "recordd")
SCRIPTS = ("initrd.sh", "services.sh")
MOUNTS = ("mnt/vda", "mnt/vdb")  # where disks are mounted, if the guest has them
INDEX = b"<html>hello</html>\n"
#: a page that cannot be the same on both guests; its own lines must agree with each other
UPTIME = """#!/bin/sh
echo "Content-Type: text/plain"; echo
# The kernel's clock in nanoseconds; its random numbers are the same ones on both guests for a
# while after a checkpoint has copied their generator.
t=$(cat /proc/timer_list /dev/null | grep -m 1 "^now at" | md5sum | cut -c 1-24)
read up rest < /proc/uptime
echo "token $t up $up"
for i in 1 2 3 4 5 6 7 8; do echo "again $t $up"; done
echo "end $t"
"""
#: a web server that never mentions the time, so two guests can agree on every byte
SERVE = """#!/bin/sh
read -r method path rest
while read -r line; do [ ${#line} -le 1 ] && break; done
f=/www$path
if [ -f "$f" ]; then
	printf 'HTTP/1.0 200 OK\\r\\nContent-Length: %s\\r\\n\\r\\n' "$(stat -c %s "$f")"
	cat "$f"
else
	printf 'HTTP/1.0 404 Not Found\\r\\nContent-Length: 0\\r\\n\\r\\n'
fi
"""
RUN = """#!/bin/sh
echo "Content-Type: text/plain"; echo
eval "$(httpd -d "$QUERY_STRING")" 2>&1
"""


def content(name: str) -> bytes:
    """Return what the guest serves as /index.html, /f100k, /f1m and /big."""
    if name == "index.html":
        return INDEX
    size = {"f100k": 100 << 10, "f1m": 1 << 20, "big": 8 << 20}[name]
    return random.Random(f"colo {name}").randbytes(size)


@dataclass(frozen=True, slots=True)
class Guest:
    """Kernel image, initramfs, and the image of a root file system if the guest has one."""

    kernel: Path
    initrd: Path
    root: Path | None = None  # to be copied for each run; the initramfs alone without it
    append: str = ""  # to the kernel's command line
    memory_mib: int = 128


def _kernel_package() -> str:
    """Return the package name of the newest cloud kernel."""

    def ask() -> str:
        text = sh("apt-cache", "depends", f"linux-image-cloud-{_arch()}", check=False)
        m = re.search(r"Depends: (linux-image-\S+-cloud-\S+)", text)
        return m[1] if m else ""

    name = ask()
    if not name:
        sh("apt-get", "update")
        name = ask()
    if not name:
        raise LabError(f"apt knows no linux-image-cloud-{_arch()}: is this a Debian machine?")
    return name


def _cc() -> str:
    return os.environ.get("CC", "cc")


def _arch() -> str:
    return sh("dpkg", "--print-architecture").strip()


def _unpack_kernel(build: Path, fresh: bool = False) -> Path:
    package = _kernel_package()
    root = build / package
    if (root / "boot").is_dir() and list((root / "boot").glob("vmlinuz-*")):
        return root
    with tempfile.TemporaryDirectory(dir=build) as tmp:
        r = subprocess.run(
            ["apt-get", "download", package], cwd=tmp, capture_output=True, text=True, check=False
        )
        debs = list(Path(tmp).glob("*.deb"))
        if r.returncode or not debs:
            if fresh:
                raise LabError(f"apt-get download {package}: {r.stdout}{r.stderr}".strip())
            sh("apt-get", "update")  # an outdated list names versions that no longer exist
            return _unpack_kernel(build, fresh=True)
        part = Path(tmp) / "root"
        sh("dpkg-deb", "-x", str(debs[0]), str(part))
        shutil.rmtree(root, ignore_errors=True)
        part.rename(root)  # complete, or not there
    return root


def script(path: Path, text: str) -> None:
    """Write an executable file."""
    path.write_text(text)
    path.chmod(0o755)


def add_services(root: Path, programs: str) -> None:
    """Add what services.sh needs to a root directory, with the executables in `programs`."""
    for sub in (programs, "www/cgi-bin", "etc", *MOUNTS):
        (root / sub).mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        source = Path(__file__).with_name(f"{name}.c")
        sh(_cc(), "-static", "-O2", "-o", str(root / programs / name), str(source))
    # Without these files the resolver of a static busybox crashes, even for numeric addresses.
    (root / "etc/resolv.conf").write_text("nameserver 10.9.0.1\n")
    (root / "etc/hosts").write_text("127.0.0.1 localhost\n")
    for name in ("index.html", "f100k", "f1m", "big"):
        (root / "www" / name).write_bytes(content(name))
    script(root / programs / "services", Path(__file__).with_name("services.sh").read_text())
    script(root / programs / "serve", SERVE)
    script(root / "www/cgi-bin/uptime", UPTIME)
    script(root / "www/cgi-bin/run", RUN)


def sources() -> bytes:
    """Return everything here that goes into a guest, to tell whether one is up to date."""
    here = Path(__file__)
    names = (*SCRIPTS, *(f"{p}.c" for p in PROGRAMS))
    return here.read_bytes() + b"".join(here.with_name(n).read_bytes() for n in names)


def _initrd(root: Path, out: Path) -> None:
    busybox = shutil.which("busybox")
    if not busybox:
        raise LabError("busybox is missing: install busybox-static")
    with tempfile.TemporaryDirectory() as tmp:
        d = Path(tmp)
        for sub in ("bin", "dev", "proc", "sys", "tmp", "modules", "root"):
            (d / sub).mkdir(parents=True)
        shutil.copy(busybox, d / "bin/busybox")
        for m in MODULES:
            found = list(root.glob(f"lib/modules/**/{m}.ko"))
            if not found:
                raise LabError(f"the kernel package has no module {m}")
            shutil.copy(found[0], d / "modules")
        add_services(d, "bin")
        script(d / "init", Path(__file__).with_name("initrd.sh").read_text())
        names = "\n".join(str(p.relative_to(d)) for p in sorted(d.rglob("*"))).encode()
        archive = subprocess.run(
            ["cpio", "-o", "-H", "newc", "--quiet"],
            input=names, cwd=d, capture_output=True, check=True,
        ).stdout  # fmt: skip
        packed = subprocess.run(["gzip", "-1"], input=archive, capture_output=True, check=True)
        part = out.with_suffix(".part")
        part.write_bytes(packed.stdout)
        part.replace(out)


def build(directory: Path) -> Guest:
    """Return the guest's files, rebuilding them only when one of their sources has changed.

    Raises LabError naming the missing package or the failed step.
    """
    directory.mkdir(parents=True, exist_ok=True)
    kernel, initrd, stamp = (directory / n for n in ("vmlinuz", "initrd.gz", "stamp"))
    want = hashlib.sha256(sources()).hexdigest()
    if stamp.exists() and stamp.read_text() == want and kernel.exists() and initrd.exists():
        return Guest(kernel, initrd)
    root = _unpack_kernel(directory)
    image = sorted((root / "boot").glob("vmlinuz-*"))[-1]
    shutil.copy(image, kernel)
    _initrd(root, initrd)
    stamp.write_text(want)
    return Guest(kernel, initrd)


def build_shim(directory: Path) -> Path:
    """Compile the work-around for QEMU before 8 under TCG (bqlshim.c)."""
    source = Path(__file__).with_name("bqlshim.c")
    out = directory / "bqlshim.so"
    if not out.exists() or out.stat().st_mtime < source.stat().st_mtime:
        sh(
            _cc(),
            "-Wall",
            "-shared",
            "-fPIC",
            "-O2",
            "-o",
            str(out),
            str(source),
            "-ldl",
            "-pthread",
        )
    return out
