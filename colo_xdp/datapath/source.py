# SPDX-License-Identifier: GPL-2.0-or-later
"""Which programs and maps a role needs: what is compiled, and with which sizes it is loaded.

What is compiled (Source) depends on the release, the kernel, the compiler and a few options, but
not on a NIC, a pair, or the size of a map: those are the loader's. So one compiled image serves
them all.

bcc rewrites map accesses in the main source only, so local includes are first merged into one text.
"""

from __future__ import annotations

import hashlib
import importlib.util
import mmap
import os
import platform
import re
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from .. import abi
from . import btf
from .maps import possible_cpus

#: source file and programs (tc, XDP) of each role
OBJECTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "primary": (
        "primary.bpf.c",
        ("pvm_in", "pvm_out", "svm_arrival", "pvm_release"),
        (),
    ),
    "secondary": (
        "secondary.bpf.c",
        ("svm_in", "svm_deliver", "svm_out", "svm_forward", "svm_net"),
        ("svm_out_xdp",),
    ),
    # in addition to those of a primary whose guest has kept numbers of its own
    "promoted": ("promoted.bpf.c", ("promoted_in", "promoted_out"), ()),
}

#: additional programs for the fast path, of the roles that have one
FAST: dict[str, tuple[str, ...]] = {"primary": ("offload_ctl",)}

#: The maps whose contents must outlive the controller and its release, and so are pinned by their
#: own names, with the key and value sizes, in bytes, that they must have.
LASTING = {
    "config": (4, 8),
    "counters": (4, abi.COUNT.size),
    "flows": (abi.FLOW_KEY.size, abi.FLOW.size),
    "opening": (abi.FLOW_KEY.size, abi.FLOW.size),
    "conns": (abi.FLOW_KEY.size, abi.CONN.size),
    "buffers": (4, abi.BUFFER_BEFORE + abi.BUFFER + abi.BUFFER_SLACK),
    "owners": (4, abi.OWNER.size),
    "offload_waits": (4, 8),
    "offload_moved": (4, 8),
    "ports": (4, 8),
    "clients": (8, abi.CLIENT.size),
    "scales": (abi.FLOW_KEY.size, 4),
    "transitions": (4, 4),
    "macs": (8, abi.CLAIM.size),
    "addresses": (abi.ADDRESS.size, abi.CLAIM.size),
    "unmirrored": (abi.UNMIRRORED_KEY.size, 8),
}

#: entries of those maps whose number no option sets: another release may have others
ENTRIES = {"config": int(abi.Cfg.MAX), "counters": abi.Prog.MAX * abi.Reason.MAX}


class LoadError(RuntimeError):
    """The programs cannot be compiled or loaded; the text names the remedy."""


class Refused(LoadError):
    """The compiler or the verifier refuses a program."""


class NotCompiled(Refused):
    """It is the compiler, on grounds that have nothing to do with this kernel."""


class Unfinished(LoadError):
    """The compiler has not come to an end; a later attempt may. No reason to load anything less."""


@dataclass(frozen=True, slots=True)
class Options:
    """Options compiled into the programs, and the sizes of their maps (bpf/lib/limits.h)."""

    flow_table: int = 65536
    ring_pages: int = 8192
    fast: bool = False
    buffers: int = 64  # of 512 KiB each
    conns: int = 65536
    events: str = "auto"
    rewrite_at_xdp: bool = False
    lease: bool = False  # nothing leaves after CFG_LEASE_EXPIRY_NS; needs Linux 5.8
    # read offloads from the kernel's own structs, if its BTF describes them (datapath/btf.py)
    btf: bool = True

    def entries(self, events: str) -> dict[str, int]:
        """Return the sizes of the maps that the sources leave open; events: "ring" or "perf"."""
        cpus = max(os.cpu_count() or 1, possible_cpus())
        return {
            "flows": self.flow_table,
            "opening": self.flow_table,
            "conns": self.conns,
            "buffers": self.buffers,
            "owners": self.buffers,
            "scratch": cpus,
            "works": cpus,
            "events": self.ring_pages * mmap.PAGESIZE if events == "ring" else cpus,
        }


@dataclass(frozen=True, slots=True)
class Source:
    """What is compiled, and for which kernel. The same source need not be compiled again."""

    role: str
    text: str
    flags: tuple[str, ...]
    tc: tuple[str, ...]
    xdp: tuple[str, ...]
    events: str
    btf: bool = False  # compiled with btf.kernel_flags(), for which the kernel in `tag` stands

    @property
    def name(self) -> str:
        """Return the name of the source file."""
        return OBJECTS[self.role][0]

    @property
    def tag(self) -> str:
        """Return a hash of the text, its flags, the compiler and the kernel."""
        kernel = f"{platform.release()} {platform.version()} {platform.machine()} {self.btf}"
        parts = (self.text, *self.flags, *self.tc, *self.xdp, self.events, compiler(), kernel)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@cache
def compiler() -> str:
    """Return the version of bcc here, without loading it (84 MiB); "": there is none."""
    try:
        spec = importlib.util.find_spec("bcc")
        if spec is None or not spec.origin:
            return ""
        text = (Path(spec.origin).parent / "version.py").read_text()
    except (ImportError, ValueError, OSError):
        return "?"
    found = re.search(r"__version__ = ['\"]([^'\"]*)", text)
    return found[1] if found else "?"


def source_dir() -> Path:
    """Return the directory of the C sources.

    It is beside the package in a checkout, inside it in a wheel.
    """
    here = Path(__file__).resolve().parents[1]
    for d in (here.parent / "bpf", Path(str(resources.files("colo_xdp"))) / "_bpf_src"):
        if (d / "lib/abi.h").exists():
            return d
    raise LoadError("the BPF sources (lib/abi.h) are not installed beside the package")


def flatten(path: Path, seen: set[str] | None = None) -> str:
    """Return the source with each local `#include "x.h"` inserted once."""
    seen = set() if seen is None else seen
    out = [f'#line 1 "{path.name}"']
    for no, line in enumerate(path.read_text().splitlines(), 1):
        m = re.match(r'\s*#include\s+"([^"]+)"', line)
        if not m:
            out.append(line)
            continue
        if m[1] not in seen:
            seen.add(m[1])
            out.append(flatten(path.parent / m[1], seen))
            out.append(f'#line {no + 1} "{path.name}"')
    return "\n".join(out)


def source(role: str, options: Options, events: str) -> Source:
    """Return what has to be compiled for a role; events: "ring" or "perf"."""
    src, tc, xdp = OBJECTS[role]
    flags = ["-Wno-macro-redefined", "-Wno-unused-value"]
    if options.fast and role in FAST:
        flags += ["-DCOLO_OFFLOAD", f"-DCOLO_BUFFERS={options.buffers}"]
        tc += FAST[role]
    if events == "perf":
        flags.append("-DCOLO_EVENTS_PERF")
    if options.lease:
        flags.append("-DCOLO_LEASE")
    if options.rewrite_at_xdp:
        flags.append("-DCOLO_REWRITE_AT_XDP")
    else:
        xdp = ()
    text, use_btf = flatten(source_dir() / src), options.btf and not btf.why_not()
    return Source(role, text, tuple(flags), tc, xdp, events, use_btf)
