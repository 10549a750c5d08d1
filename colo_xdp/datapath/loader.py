# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles and loads bpf/*.bpf.c; the only module that imports bcc.

bcc rewrites map accesses in the main source only, so local includes are first merged into one text.
Maps whose state must outlive the controller are pinned below `<bpffs>/colo-xdp/<pair>-<role>/`.
Before they are reused, their shape and ABI number are checked, since bcc itself would accept a map
of another size.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import hashlib
import logging
import os
import platform
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from .. import abi
from . import btf, kernel_headers, syscall

log = logging.getLogger("colo_xdp.datapath.loader")

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

#: additional programs for the fast path
FAST: dict[str, tuple[str, ...]] = {"primary": ("offload_ctl",)}

#: key and value sizes that a pinned map must have, in bytes
_PINNED_SHAPES = {
    "config": (4, 8),
    "counters": (4, abi.COUNT.size),
    "flows": (abi.FLOW_KEY.size, abi.FLOW.size),
    "opening": (abi.FLOW_KEY.size, abi.FLOW.size),
    "conns": (abi.FLOW_KEY.size, abi.CONN.size),
    "owners": (4, abi.OWNER.size),
    "ports": (4, 8),
    "clients": (8, abi.CLIENT.size),
    "transitions": (4, 4),
    "macs": (8, abi.CLAIM.size),
    "addresses": (abi.ADDRESS.size, abi.CLAIM.size),
    "unmirrored": (abi.UNMIRRORED_KEY.size, 8),
}


class LoadError(RuntimeError):
    """The programs cannot be compiled or loaded; the text names the remedy."""


class Refused(LoadError):
    """The compiler or the verifier refuses a program."""


def import_bcc() -> Any:
    """Return the real bcc module.

    Raises LoadError when it is missing, or when it is the unrelated package of the same name on
    PyPI.
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


@contextlib.contextmanager
def _stderr_to(sink: list[str]) -> Iterator[None]:
    """Collect what clang and the verifier write to fd 2, for the error message."""
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
    """A loaded program: its descriptor, and its name, ID and tag in the kernel."""

    name: str
    fd: int
    id: int
    tag: str


class Map:
    """Access to one map by raw bytes; values as in the kernel."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.info = syscall.map_info(self.fd)

    def set(self, key: bytes, value: bytes, *, new: bool = False) -> None:
        """Insert or replace an entry.

        Raises OSError: E2BIG if the map is full, EEXIST if `new` is set and the entry exists.
        """
        k = ct.create_string_buffer(key, len(key))
        v = ct.create_string_buffer(value, len(value))
        lib = import_bcc().libbcc.lib
        if lib.bpf_update_elem(self.fd, k, v, int(new)):
            raise OSError(ct.get_errno(), f"map update: {os.strerror(ct.get_errno())}")

    def get(self, key: bytes, size: int | None = None) -> bytes | None:
        """Return the value of `key`, or None. `size` overrides the value size (per-CPU maps)."""
        k = ct.create_string_buffer(key, len(key))
        v = ct.create_string_buffer(size or self.info.value_size)
        lib = import_bcc().libbcc.lib
        if lib.bpf_lookup_elem(self.fd, k, v):
            return None
        return v.raw

    def delete(self, key: bytes) -> bool:
        """Remove an entry; return False if it was not there."""
        k = ct.create_string_buffer(key, len(key))
        return bool(import_bcc().libbcc.lib.bpf_delete_elem(self.fd, k) == 0)

    def keys(self, limit: int | None = None) -> Iterator[bytes]:
        """Yield all keys, but at most `limit` (default: the map's size), as it may change."""
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
        """Yield all pairs, except those that vanish meanwhile."""
        for k in self.keys():
            v = self.get(k)
            if v is not None:
                yield k, v


@dataclass(frozen=True, slots=True)
class Options:
    """Options and limits compiled into the programs (bpf/lib/limits.h)."""

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


def compile_text(text: str) -> Any:
    """Compile a program that is not one of ours (tests and benchmarks); return the bcc object.

    Raises LoadError when there are no kernel headers.
    """
    try:
        headers = kernel_headers.find()
    except kernel_headers.NoHeaders as e:
        raise LoadError(str(e)) from e
    if headers.path:
        os.environ["BCC_KERNEL_SOURCE"] = headers.path
    try:
        return import_bcc().BPF(text=text.encode())
    finally:
        os.environ.pop("BCC_KERNEL_SOURCE", None)


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
    def tag(self) -> str:
        """Return a hash of the text, its flags and the kernel."""
        kernel = f"{platform.release()} {platform.version()} {self.btf}"
        parts = (self.text, *self.flags, *self.tc, *self.xdp, self.events, kernel)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _source(role: str, directory: str, options: Options, events: str) -> Source:
    src, tc, xdp = OBJECTS[role]
    flags = [
        "-Wno-macro-redefined",
        "-Wno-unused-value",
        f'-DPIN_DIR="{directory}"',
        f"-DCOLO_MAX_FLOWS={options.flow_table}",
        f"-DCOLO_RING_PAGES={options.ring_pages}",
        f"-DCOLO_MAX_CPUS={max(os.cpu_count() or 1, possible_cpus())}",
    ]
    if options.fast:
        flags += [
            "-DCOLO_OFFLOAD",
            f"-DCOLO_BUFFERS={options.buffers}",
            f"-DCOLO_MAX_CONNS={options.conns}",
        ]
        tc += FAST.get(role, ())
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


class Objects:
    """Programs and maps of one role, either compiled or (`warm`) those of a former controller.

    Besides the maps that the sources pin, everything is pinned as prog_<role>_<tag>_<name> and
    map_<role>_<tag>_<name>, and whole_<role>_<tag>_ last. The event ring is among them: what was
    captured while there was no controller waits in it for the next one. Objects that a host needs
    when its role changes back are marked idle_<role>_<tag>_ meanwhile: compiling takes seconds of
    CPU time, just when the guest has no copy.
    """

    def __init__(
        self, source: Source, pin_dir: str, headers: kernel_headers.Headers | None
    ) -> None:
        self.events = source.events
        self.pin_dir = pin_dir
        self.programs: dict[str, Program] = {}
        self.bpf: Any = None
        self.warm = headers is None
        #: offloads are read from the kernel's structs; otherwise some are refused (bpf/lib/gso.h)
        self.btf = source.btf
        self._fds: list[int] = []
        self._maps: dict[str, int] = {}
        if headers is None:
            self._adopt(source)
        else:
            self._compile(source, headers)

    def _compile(self, source: Source, headers: kernel_headers.Headers) -> None:
        bcc = import_bcc()
        flags = source.flags
        if source.btf:
            try:
                flags += btf.kernel_flags()
            except (btf.BtfError, OSError) as e:
                raise Refused(f"{btf.VMLINUX}: {e}") from e
        if headers.path:
            os.environ["BCC_KERNEL_SOURCE"] = headers.path
        output: list[str] = []
        try:
            with _stderr_to(output):
                self.bpf = bcc.BPF(text=source.text.encode(), cflags=list(flags))
                funcs = {n: self.bpf.load_func(n.encode(), bcc.BPF.SCHED_CLS) for n in source.tc}
                funcs |= {n: self.bpf.load_func(n.encode(), bcc.BPF.XDP) for n in source.xdp}
        except Exception as e:  # bcc raises bare Exception
            text = "\n".join(output).strip()
            name = OBJECTS[source.role][0]
            raise Refused(f"{name} ({headers.origin}): {e}\n{text[-6000:]}".strip()) from e
        finally:
            if headers.path:
                del os.environ["BCC_KERNEL_SOURCE"]
        self.programs = {name: _program(name, f.fd) for name, f in funcs.items()}
        self._maps = _tables(bcc.libbcc.lib, self.bpf.module)

    def _adopt(self, source: Source) -> None:
        for kind, name, path in _pins(self.pin_dir, source):
            fd = syscall.obj_get(path)
            self._fds.append(fd)
            if kind == "prog":
                self.programs[name] = _program(name, fd)
            else:
                self._maps[name] = fd

    def keep(self, source: Source) -> None:
        """Pin everything, so that the next controller need not compile.

        Atomic: the mark comes last.
        """
        if self.events != "ring":
            return  # bcc's perf readers belong to a process
        base = f"{self.pin_dir}/{{}}_{source.role}_{source.tag}_"
        for name, p in self.programs.items():
            syscall.obj_pin(p.fd, base.format("prog") + name)
        for name, fd in self._maps.items():
            syscall.obj_pin(fd, base.format("map") + name)
        syscall.obj_pin(self._maps["config"], base.format("whole"))

    def map(self, name: str) -> Map:
        """Return a map by its C name."""
        return Map(self._maps[name])

    def close(self) -> None:
        """Drop our references; what is attached or pinned stays."""
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()
        if self.bpf is not None:
            self.bpf.cleanup()


def _tables(lib: Any, module: Any) -> dict[str, int]:
    """Return the descriptors of a compiled module's maps.

    bcc's Python does not declare these functions.
    """
    lib.bpf_num_tables.argtypes, lib.bpf_num_tables.restype = [ct.c_void_p], ct.c_size_t
    lib.bpf_table_name.argtypes = [ct.c_void_p, ct.c_size_t]
    lib.bpf_table_name.restype = ct.c_char_p
    names = [lib.bpf_table_name(module, i) for i in range(lib.bpf_num_tables(module))]
    return {n.decode(): lib.bpf_table_fd(module, n) for n in names}


def _program(name: str, fd: int) -> Program:
    info = syscall.prog_info(fd)
    return Program(name, fd, info.id, info.tag)


def _pins(directory: str, source: Source) -> list[tuple[str, str, str]]:
    """Return (prog or map, name, path) of what keep() has pinned; empty unless it is complete."""
    found = []
    mark = f"whole_{source.role}_{source.tag}_"
    if not os.path.exists(f"{directory}/{mark}"):
        return []
    for entry in sorted(os.listdir(directory)):
        kind, _, rest = entry.partition("_")
        head = f"{source.role}_{source.tag}_"
        if kind in ("prog", "map") and rest.startswith(head):
            found.append((kind, rest[len(head) :], f"{directory}/{entry}"))
    return found


def _set_aside(directory: str, source: Source, beside: tuple[str, ...], *, whole: bool) -> None:
    """Retire other sets of pins: mark those of other roles idle, and unpin leftovers of this role.

    Roles in `beside` coexist with this one and stay. If this set is complete (`whole`), all other
    sets of this role are unpinned. Otherwise all of them are, since a controller may have died
    while it pinned this one.
    """
    mine = f"{source.role}_{source.tag}_"
    # The marks first: what is half removed must be neither complete nor idle.
    for entry in sorted(os.listdir(directory), key=lambda e: e.startswith(("prog_", "map_"))):
        kind, _, rest = entry.partition("_")
        if kind not in ("whole", "idle", "prog", "map") or rest.startswith(beside):
            continue
        if rest.startswith(f"{source.role}_"):
            if not (whole and rest.startswith(mine)):
                os.unlink(f"{directory}/{entry}")
        elif kind == "whole":
            os.rename(f"{directory}/{entry}", f"{directory}/idle_{rest}")


def _wake(directory: str, source: Source) -> bool:
    """Mark an idle set of this role as complete again; return whether there was one.

    What its ring holds was captured before this host had another role, and is of no more use.
    """
    rest = f"{source.role}_{source.tag}_"
    if not os.path.exists(f"{directory}/idle_{rest}"):
        return False
    ring = f"{directory}/map_{rest}events"
    if os.path.exists(ring):
        fd = syscall.obj_get(ring)
        try:
            syscall.ring_skip(fd)
        finally:
            os.close(fd)
    os.rename(f"{directory}/idle_{rest}", f"{directory}/whole_{rest}")
    return True


@cache
def possible_cpus() -> int:
    """Return how many values a per-CPU map has for each key."""
    text = Path("/sys/devices/system/cpu/possible").read_text().strip()
    return int(re.split(r"[-,]", text)[-1]) + 1


def pin_dir(bpffs: str, pair: str, role: str, nic: int = 0) -> str:
    """Return the directory of a pair's pins for one NIC (a bpffs allows no dot in names).

    That of the first NIC has those of the others in it.
    """
    first = f"{bpffs}/colo-xdp/{pair}-{role}"
    return f"{first}/nic{nic}" if nic else first


def nic_pins(directory: str) -> list[str]:
    """Return the directories with a pair's pins, given the first NIC's."""
    inner = sorted(Path(directory).glob("nic*/")) if os.path.isdir(directory) else []
    return [directory, *(str(path) for path in inner if path.is_dir())]


def make_pins(bpffs: str, pair: str, role: str, nic: int = 0) -> str:
    """Return the directory of a pair's pins, created if necessary.

    Raises LoadError without a bpffs.
    """
    if not syscall.is_bpffs(bpffs):
        try:
            syscall.mount_bpffs(bpffs)
        except OSError as e:
            raise LoadError(f"{bpffs} is not a BPF file system and cannot be mounted: {e}") from e
    directory = pin_dir(bpffs, pair, role, nic)
    os.makedirs(directory, exist_ok=True)
    return directory


def check_pins(directory: str, options: Options) -> list[str]:
    """Return the names of pinned maps that cannot be reused, each with the reason."""
    bad = []
    for name, (key, value) in _PINNED_SHAPES.items():
        path = f"{directory}/{name}"
        if not os.path.exists(path):
            continue
        fd = syscall.obj_get(path)
        try:
            info = syscall.map_info(fd)
        finally:
            os.close(fd)
        want = {
            "flows": options.flow_table,
            "opening": options.flow_table,
            "owners": options.buffers,
            "conns": options.conns,
        }.get(name, info.max_entries)
        if (info.key_size, info.value_size, info.max_entries) != (key, value, want):
            bad.append(
                f"{path}: key {info.key_size}, value {info.value_size}, {info.max_entries} entries"
                f" where {key}, {value}, {want} are needed"
            )
    return bad


def remove_pins(directory: str) -> list[str]:
    """Unpin everything of one pair, the first NIC's last; return what was removed."""
    gone = []
    if os.path.isdir(directory):
        names = sorted(os.listdir(directory))
        for name in names:
            if os.path.isdir(f"{directory}/{name}"):
                gone += remove_pins(f"{directory}/{name}")
        for name in names:
            if os.path.exists(f"{directory}/{name}"):
                os.unlink(f"{directory}/{name}")
                gone.append(f"{directory}/{name}")
        os.rmdir(directory)
    return gone


def ring_supported() -> bool:
    """Return whether this kernel has BPF ring buffers (5.8), by trying one."""
    bcc = import_bcc()
    fd = bcc.libbcc.lib.bcc_create_map(27, b"colo_probe", 0, 0, 4096, 0)
    if fd < 0:
        return False
    os.close(fd)
    return True


def pinned_slot(directory: str, slot: abi.Cfg) -> int:
    """Return a slot of the pinned `config` map; 0 when there is none."""
    path = f"{directory}/config"
    if not os.path.exists(path):
        return 0
    fd = syscall.obj_get(path)
    try:
        k, v = ct.c_uint32(slot), ct.c_uint64()
        found = import_bcc().libbcc.lib.bpf_lookup_elem(fd, ct.byref(k), ct.byref(v)) == 0
        return v.value if found else 0
    finally:
        os.close(fd)


def events(options: Options) -> str:
    """Return how frames reach user space here: "ring" or "perf"."""
    if options.events == "auto":
        return "ring" if ring_supported() else "perf"
    return options.events


def load(
    role: str, pair: str, bpffs: str, options: Options, home: str = "", nic: int = 0
) -> Objects:
    """Compile and load a role's programs for a NIC, taking over pinned maps of the same shape.

    home: the host's role as configured, which names the pins, if it is another one. Raises
    LoadError with the compiler's or verifier's output.
    """
    import_bcc()
    directory = make_pins(bpffs, pair, home or role, nic)
    bad = check_pins(directory, options)
    if bad:
        raise LoadError(
            "pinned maps of another version or size are in the way (their connections' state "
            "would be lost): run `colo-xdp cleanup` first\n  " + "\n  ".join(bad)
        )
    source = _source(role, directory, options, events(options))
    beside = ("primary_",) if role == "promoted" else ()  # it coexists with a primary
    for s in (source, replace(source, btf=False)):
        if _pins(directory, s) or _wake(directory, s):
            also = ("promoted_",) if role == "primary" else beside
            _set_aside(directory, s, also, whole=True)
            return Objects(s, directory, None)
    try:
        headers = kernel_headers.find()
    except kernel_headers.NoHeaders as e:
        raise LoadError(str(e)) from e
    try:
        objects = Objects(source, directory, headers)
    except Refused as e:
        if not source.btf or "Failed to compile" in str(e):
            raise
        # This kernel may not allow bpf_probe_read_kernel() (before 5.10, or locked down).
        blind = replace(source, btf=False)
        # raises its own error if that was not the cause
        objects = Objects(blind, directory, headers)
        log.warning("offloads are not read from the kernel: %s", str(e).splitlines()[0])
        source = blind
    _set_aside(directory, source, beside, whole=False)
    objects.keep(source)
    return objects
