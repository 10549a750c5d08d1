# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds kernel headers for bcc; datapath/compiler.py calls it before it compiles.

bcc expects the build tree of the running kernel. Our programs use user API headers only, so any
recent tree works. The order is: the running kernel's own, then the newest installed one. Debian
splits a tree into two packages (-common and the flavour), and bcc looks into one directory only. So
a merged view made of links is built in a cache directory; nothing outside of it is touched.
"""

from __future__ import annotations

import atexit
import logging
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache_dir import cache_dir

log = logging.getLogger("colo_xdp.datapath.kernel_headers")

MODULES = Path("/lib/modules")
SOURCES = Path("/usr/src")
IN_KERNEL = Path("/sys/kernel/kheaders.tar.xz")


class NoHeaders(RuntimeError):
    """There are no usable kernel headers; the text names the remedy."""


@dataclass(frozen=True, slots=True)
class Headers:
    """Header tree that bcc can use: `path` for BCC_KERNEL_SOURCE, None for bcc's own choice."""

    path: str | None
    origin: str


def _version_key(name: str) -> list[int]:
    return [int(x) for x in re.findall(r"\d+", name)]


def _whole(tree: Path) -> bool:
    return (tree / "include/linux/kconfig.h").exists()


def _split_trees() -> list[tuple[Path, Path]]:
    """Return (flavour, common) pairs of Debian's split packages, newest first."""
    pairs = []
    for flavour in SOURCES.glob("linux-headers-*"):
        if not (flavour / "include/generated/autoconf.h").exists():
            continue
        common = flavour
        if not _whole(flavour):
            # ABI-FLAVOUR beside ABI-common (for rt flavours: ABI-common-rt), where the ABI is like
            # 6.1.0-13 or 6.12.111+deb12 and a flavour like amd64, cloud-amd64 or rt-amd64
            parts = flavour.name.split("-")
            abis = ["-".join(parts[:n]) for n in range(len(parts) - 1, 2, -1)]
            kinds = ("common-rt", "common") if "rt" in parts else ("common",)
            halves = (SOURCES / f"{abi}-{kind}" for abi in abis for kind in kinds)
            found = next((h for h in halves if _whole(h)), None)
            if found is None:
                continue
            common = found
        pairs.append((flavour, common))
    return sorted(pairs, key=lambda p: _version_key(p[0].name), reverse=True)


def _link(src: Path, dst: Path) -> None:
    dst.parent.mkdir(parents=True, exist_ok=True)
    if dst.is_symlink() and os.readlink(dst) == str(src):
        return
    tmp = dst.with_name(f".{dst.name}.{os.getpid()}")
    tmp.unlink(missing_ok=True)
    tmp.symlink_to(src)
    tmp.replace(dst)


def _merge(flavour: Path, common: Path, cache: Path) -> Path:
    """Build a tree of links that shows both halves as one."""
    out = cache / flavour.name
    arch = {"x86_64": "x86", "aarch64": "arm64", "riscv64": "riscv"}.get(os.uname().machine, "x86")
    for half in (common, flavour):
        for sub in ("include", f"arch/{arch}/include"):
            if (half / sub).is_dir():
                for child in (half / sub).iterdir():
                    _link(child, out / sub / child.name)
    return out


def _view() -> Path:
    """Return the directory for merged views: the cache's, or one of this process.

    Who can write there decides from what the programs in the kernel are compiled, so a cache that
    others may write is not used, as in datapath/cache.py.
    """
    where = cache_dir() / "headers"
    try:
        for path in (where.parent, where):
            path.mkdir(mode=0o755, parents=True, exist_ok=True)
            st = path.lstat()
            if st.st_uid not in (0, os.geteuid()) or st.st_mode & 0o022 or not path.is_dir():
                raise PermissionError(f"{path}: others may have written there")
    except OSError as e:
        log.warning("headers are merged elsewhere: %s", e)
        where = Path(tempfile.mkdtemp(prefix="colo-xdp-headers-"))
        atexit.register(shutil.rmtree, where, ignore_errors=True)
    return where


def find(cache: Path | None = None) -> Headers:
    """Return the headers to compile with.

    Raises NoHeaders, with the package to install, when there are none.
    """
    release = os.uname().release
    if os.environ.get("BCC_KERNEL_SOURCE"):
        return Headers(None, "BCC_KERNEL_SOURCE")
    own = MODULES / release / "build"
    if _whole(own) or _whole(MODULES / release / "source"):
        return Headers(None, str(own))
    if IN_KERNEL.exists():
        return Headers(None, str(IN_KERNEL))
    trees = _split_trees()
    if not trees:
        raise NoHeaders(
            f"no kernel headers for {release}, and no others in {SOURCES}: "
            f"install linux-headers-{release} (or linux-headers-amd64: any recent version serves)"
        )
    flavour, common = trees[0]
    if flavour == common:
        return Headers(str(flavour), str(flavour))
    return Headers(str(_merge(flavour, common, cache or _view())), f"{flavour} + {common}")
