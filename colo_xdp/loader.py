# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles and loads bpf/*.bpf.c: the only module that imports bcc.

bcc rewrites map accesses in the main source only, so local includes are put
into one text first. Maps whose state must outlive the controller are pinned
below `<bpffs>/colo-xdp/<pair>-<role>/`; before they are reused their shape and
ABI number are checked, since bcc itself would take a map of another size.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from . import _bpf, abi, kheaders

#: Source file and programs (with their kind) of each role.
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
    # beside those of a primary whose guest has kept numbers of its own
    "guest": ("guest.bpf.c", ("guest_in", "guest_out"), ()),
}

#: Programs that tier K has besides.
FAST: dict[str, tuple[str, ...]] = {"primary": ("fast_ctl",)}

#: Shapes that a pinned map must have: key bytes, value bytes (None: any number of entries).
_PINNED_SHAPES = {
    "config": (4, 8),
    "counters": (4, abi.COUNT.size),
    "flows": (abi.FLOW_KEY.size, abi.FLOW.size),
    "conns": (abi.FLOW_KEY.size, abi.CONN.size),
    "owners": (4, abi.OWNER.size),
    "ports": (4, 8),
    "clients": (8, abi.CLIENT.size),
    "transitions": (4, 4),
    "unmirrored": (abi.UNMIRRORED_KEY.size, 8),
}


class LoadError(RuntimeError):
    """The programs cannot be compiled or loaded; the text names the remedy."""


def import_bcc() -> Any:
    """The real bcc module.

    Raises LoadError when it is missing, or when it is the unrelated package of
    the same name on PyPI.
    """
    try:
        import bcc
    except ImportError as e:
        raise LoadError(
            "the Python module bcc is missing: install python3-bpfcc (Debian, Ubuntu), python3-bcc "
            "(Fedora) or py3-bcc (Alpine), and run from the system's Python or a virtual "
            f"environment made with --system-site-packages ({sys.executable} does not see it)"
        ) from e
    if not hasattr(bcc, "BPF"):
        raise LoadError(
            f"{bcc.__file__} is not the BPF compiler collection but the package `bcc` from PyPI: "
            "pip uninstall bcc, then install python3-bpfcc"
        )
    return bcc


def source_dir() -> Path:
    """Where the C sources are: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    for d in (here.parent / "bpf", Path(str(resources.files("colo_xdp"))) / "_bpf_src"):
        if (d / "colo_common.h").exists():
            return d
    raise LoadError("the BPF sources (colo_common.h) are not installed beside the package")


def flatten(path: Path, seen: set[str] | None = None) -> str:
    """The source with each local `#include "x.h"` put in place, once."""
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


@contextlib.contextmanager
def _stderr_to(sink: list[str]) -> Iterator[None]:
    """clang and the verifier write to fd 2; collect it for the error message."""
    sys.stderr.flush()
    saved = os.dup(2)
    fd = os.memfd_create("colo-xdp-clang")
    os.dup2(fd, 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.lseek(fd, 0, os.SEEK_SET)
        with os.fdopen(fd, "rb") as f:
            sink.append(f.read().decode(errors="replace"))


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program: its descriptor, and what the kernel calls it."""

    name: str
    fd: int
    id: int
    tag: str


class Map:
    """Typed access to one bcc table by raw bytes; values as the kernel has them."""

    def __init__(self, table: Any) -> None:
        self._t = table
        self.fd: int = table.map_fd
        self.info = _bpf.map_info(self.fd)

    def _key(self, key: bytes) -> Any:
        return self._t.Key.from_buffer_copy(key)

    def set(self, key: bytes, value: bytes, *, new: bool = False) -> None:
        """Insert or replace; raises OSError (E2BIG: full; EEXIST: `new`, and it is there)."""
        k = ct.create_string_buffer(key, len(key))
        v = ct.create_string_buffer(value, len(value))
        lib = import_bcc().libbcc.lib
        if lib.bpf_update_elem(self.fd, k, v, int(new)):
            raise OSError(ct.get_errno(), f"map update: {os.strerror(ct.get_errno())}")

    def get(self, key: bytes, size: int | None = None) -> bytes | None:
        """Value of `key`, or None. `size` overrides the value size (per-CPU maps)."""
        k = ct.create_string_buffer(key, len(key))
        v = ct.create_string_buffer(size or self.info.value_size)
        lib = import_bcc().libbcc.lib
        if lib.bpf_lookup_elem(self.fd, k, v):
            return None
        return v.raw

    def delete(self, key: bytes) -> bool:
        """Remove; False when it was not there."""
        k = ct.create_string_buffer(key, len(key))
        return bool(import_bcc().libbcc.lib.bpf_delete_elem(self.fd, k) == 0)

    def keys(self, limit: int | None = None) -> Iterator[bytes]:
        """All keys; the map may change meanwhile, so at most `limit` (default: its size)."""
        lib = import_bcc().libbcc.lib
        size = self.info.key_size
        nxt = ct.create_string_buffer(size)
        if lib.bpf_get_first_key(self.fd, nxt, size):
            return
        for _ in range(limit or self.info.max_entries):
            cur = nxt.raw
            yield cur
            k = ct.create_string_buffer(cur, size)
            if lib.bpf_get_next_key(self.fd, k, nxt):
                return

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """All pairs; a pair that vanished meanwhile is left out."""
        for k in self.keys():
            v = self.get(k)
            if v is not None:
                yield k, v


@dataclass(frozen=True, slots=True)
class Options:
    """Limits compiled into the programs (bpf/colo_config.h)."""

    flow_table: int = 65536
    ring_pages: int = 8192
    fast: bool = False
    stashes: int = 64  # of 256 KiB each
    conns: int = 65536
    events: str = "auto"
    rewrite_at_xdp: bool = False


def compile_text(text: str) -> Any:
    """A bcc object of a program that is none of ours (tests and benchmarks).

    Raises LoadError when there are no kernel headers.
    """
    try:
        headers = kheaders.find()
    except kheaders.NoHeaders as e:
        raise LoadError(str(e)) from e
    if headers.path:
        os.environ["BCC_KERNEL_SOURCE"] = headers.path
    try:
        return import_bcc().BPF(text=text.encode())
    finally:
        os.environ.pop("BCC_KERNEL_SOURCE", None)


class Objects:
    """The loaded programs and maps of one role."""

    def __init__(
        self, role: str, pin_dir: str, options: Options, headers: kheaders.Headers, events: str
    ) -> None:
        bcc = import_bcc()
        src, tc, xdp = OBJECTS[role]
        flags = [
            "-Wno-macro-redefined",
            "-Wno-unused-value",
            f'-DPIN_DIR="{pin_dir}"',
            f"-DCOLO_MAX_FLOWS={options.flow_table}",
            f"-DCOLO_RING_PAGES={options.ring_pages}",
            f"-DCOLO_MAX_CPUS={max(os.cpu_count() or 1, possible_cpus())}",
        ]
        if options.fast:
            flags += [
                "-DCOLO_FAST",
                f"-DCOLO_STASHES={options.stashes}",
                f"-DCOLO_MAX_CONNS={options.conns}",
            ]
            tc += FAST.get(role, ())
        if events == "perf":
            flags.append("-DCOLO_EVENTS_PERF")
        if options.rewrite_at_xdp:
            flags.append("-DCOLO_REWRITE_AT_XDP")
        if headers.path:
            os.environ["BCC_KERNEL_SOURCE"] = headers.path
        said: list[str] = []
        try:
            with _stderr_to(said):
                self.bpf = bcc.BPF(text=flatten(source_dir() / src).encode(), cflags=flags)
                funcs = {n: self.bpf.load_func(n.encode(), bcc.BPF.SCHED_CLS) for n in tc}
                if options.rewrite_at_xdp:
                    funcs |= {n: self.bpf.load_func(n.encode(), bcc.BPF.XDP) for n in xdp}
        except Exception as e:  # bcc raises bare Exception
            text = "\n".join(said).strip()
            raise LoadError(f"{src} ({headers.origin}): {e}\n{text[-6000:]}".strip()) from e
        finally:
            if headers.path:
                del os.environ["BCC_KERNEL_SOURCE"]
        self.events = events
        self.pin_dir = pin_dir
        self.programs: dict[str, Program] = {}
        for name, f in funcs.items():
            info = _bpf.prog_info(f.fd)
            self.programs[name] = Program(name, f.fd, info.id, info.tag)

    def map(self, name: str) -> Map:
        """A map by its C name."""
        return Map(self.bpf[name.encode()])

    def close(self) -> None:
        """Drop our references; what is attached or pinned stays."""
        self.bpf.cleanup()


def possible_cpus() -> int:
    """How many values a per-CPU map has for each key."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def pin_dir(bpffs: str, pair: str, role: str) -> str:
    """Directory of a pair's pins (a bpffs allows no dot in names)."""
    return f"{bpffs}/colo-xdp/{pair}-{role}"


def check_pins(directory: str, options: Options) -> list[str]:
    """Names of pinned maps that cannot be reused, each with the reason."""
    bad = []
    for name, (key, value) in _PINNED_SHAPES.items():
        path = f"{directory}/{name}"
        if not os.path.exists(path):
            continue
        fd = _bpf.obj_get(path)
        try:
            info = _bpf.map_info(fd)
        finally:
            os.close(fd)
        want = {
            "flows": options.flow_table,
            "owners": options.stashes,
            "conns": options.conns,
        }.get(name, info.max_entries)
        if (info.key_size, info.value_size, info.max_entries) != (key, value, want):
            bad.append(
                f"{path}: key {info.key_size}, value {info.value_size}, {info.max_entries} entries"
                f" where {key}, {value}, {want} are needed"
            )
    return bad


def remove_pins(directory: str) -> list[str]:
    """Unpin everything of one pair; returns what was removed."""
    gone = []
    if os.path.isdir(directory):
        for name in sorted(os.listdir(directory)):
            os.unlink(f"{directory}/{name}")
            gone.append(f"{directory}/{name}")
        os.rmdir(directory)
    return gone


def ring_supported() -> bool:
    """Whether this kernel has BPF ring buffers (5.8): tried, not guessed."""
    bcc = import_bcc()
    fd = bcc.libbcc.lib.bcc_create_map(27, b"colo_probe", 0, 0, 4096, 0)
    if fd < 0:
        return False
    os.close(fd)
    return True


def pinned_slot(directory: str, slot: abi.Cfg) -> int:
    """A slot of the pinned `config` map; 0 when there is none."""
    path = f"{directory}/config"
    if not os.path.exists(path):
        return 0
    fd = _bpf.obj_get(path)
    try:
        k, v = ct.c_uint32(slot), ct.c_uint64()
        found = import_bcc().libbcc.lib.bpf_lookup_elem(fd, ct.byref(k), ct.byref(v)) == 0
        return v.value if found else 0
    finally:
        os.close(fd)


def load(role: str, pair: str, bpffs: str, options: Options, home: str = "") -> Objects:
    """Compile and load a role's programs, taking over pinned maps of the same shape.

    `home`: the host's role as configured, which names the pins, if it is another one.
    Raises LoadError with the compiler's or verifier's words.
    """
    import_bcc()
    try:
        headers = kheaders.find()
    except kheaders.NoHeaders as e:
        raise LoadError(str(e)) from e
    if not _bpf.is_bpffs(bpffs):
        try:
            _bpf.mount_bpffs(bpffs)
        except OSError as e:
            raise LoadError(f"{bpffs} is not a BPF file system and cannot be mounted: {e}") from e
    directory = pin_dir(bpffs, pair, home or role)
    os.makedirs(directory, exist_ok=True)
    bad = check_pins(directory, options)
    if bad:
        raise LoadError(
            "pinned maps of another version or size are in the way (their connections' state "
            "would be lost): run `colo-xdp cleanup` first\n  " + "\n  ".join(bad)
        )
    events = options.events
    if events == "auto":
        events = "ring" if ring_supported() else "perf"
    return Objects(role, directory, options, headers, events)
