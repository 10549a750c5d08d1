# SPDX-License-Identifier: GPL-2.0-or-later
"""bpf(2): maps and programs are created, pinned, described and run through it.

No library is needed for that, and libbcc, which could do a part of it, brings a compiler along (84
MiB in each controller). Source: include/uapi/linux/bpf.h. Every function raises OSError with the
kernel's errno and the command's name, except those on the entries of a map, which return the errno.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import errno
import mmap
import os
import platform
import resource
import sys
from dataclasses import dataclass

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_NR = _SYS_BPF.get(platform.machine(), -1)
_libc = ct.CDLL(None, use_errno=True)
_syscall = _libc.syscall
_syscall.argtypes = [ct.c_long, ct.c_long, ct.c_void_p, ct.c_long]
_syscall.restype = ct.c_long

_MAP_CREATE, _MAP_LOOKUP, _MAP_UPDATE, _MAP_DELETE, _MAP_NEXT, _PROG_LOAD = 0, 1, 2, 3, 4, 5
_OBJ_PIN, _OBJ_GET, _PROG_TEST_RUN = 6, 7, 10
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_TCX = {"ingress": 46, "egress": 47}  # BPF_TCX_INGRESS, BPF_TCX_EGRESS

BPFFS_MAGIC = 0xCAFE4A11
RINGBUF = 27  # BPF_MAP_TYPE_RINGBUF
NAME_MAX = 15  # of a map or program in the kernel
#: What the verifier says: the largest size that every kernel takes. Before 6.4 it is the beginning
#: that is kept of a longer text.
_LOG_BYTES = (1 << 24) - 1


class MapAttr(ct.Structure):
    """Of the commands on a map's entries; `key` and `value` are addresses."""

    _fields_ = [
        ("fd", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("key", ct.c_uint64),
        ("value", ct.c_uint64),  # or the next key
        ("flags", ct.c_uint64),
    ]


_MAP_ATTR_SIZE = ct.sizeof(MapAttr)


class _CreateAttr(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("inner_map_fd", ct.c_uint32),
        ("numa_node", ct.c_uint32),
        ("name", ct.c_char * 16),
    ]


class _LoadAttr(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("insn_cnt", ct.c_uint32),
        ("insns", ct.c_uint64),
        ("license", ct.c_uint64),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_uint64),
        ("kern_version", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
    ]


class _ObjAttr(ct.Structure):
    _fields_ = [("path", ct.c_uint64), ("fd", ct.c_uint32), ("flags", ct.c_uint32)]


class _InfoAttr(ct.Structure):
    _fields_ = [("fd", ct.c_uint32), ("len", ct.c_uint32), ("info", ct.c_uint64)]


class _IdAttr(ct.Structure):
    _fields_ = [("id", ct.c_uint32), ("next", ct.c_uint32), ("flags", ct.c_uint32)]


class _QueryAttr(ct.Structure):
    _fields_ = [
        ("ifindex", ct.c_uint32),
        ("attach_type", ct.c_uint32),
        ("query_flags", ct.c_uint32),
        ("attach_flags", ct.c_uint32),
        ("prog_ids", ct.c_uint64),
        ("prog_cnt", ct.c_uint32),
        ("pad", ct.c_uint32),
        ("rest", ct.c_uint64 * 4),
    ]


class _MapInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("key_size", ct.c_uint32),
        ("value_size", ct.c_uint32),
        ("max_entries", ct.c_uint32),
        ("map_flags", ct.c_uint32),
        ("name", ct.c_char * 16),
        ("rest", ct.c_uint8 * 64),
    ]


class _ProgInfo(ct.Structure):
    _fields_ = [
        ("type", ct.c_uint32),
        ("id", ct.c_uint32),
        ("tag", ct.c_uint8 * 8),
        ("jited_len", ct.c_uint32),
        ("xlated_len", ct.c_uint32),
        ("jited", ct.c_uint64),
        ("xlated", ct.c_uint64),
        ("load_time", ct.c_uint64),
        ("uid", ct.c_uint32),
        ("nr_map_ids", ct.c_uint32),
        ("map_ids", ct.c_uint64),
        ("name", ct.c_char * 16),
        ("rest", ct.c_uint8 * 160),
    ]


class _TestRunAttr(ct.Structure):
    _fields_ = [
        ("prog_fd", ct.c_uint32),
        ("retval", ct.c_uint32),
        ("data_size_in", ct.c_uint32),
        ("data_size_out", ct.c_uint32),
        ("data_in", ct.c_uint64),
        ("data_out", ct.c_uint64),
        ("repeat", ct.c_uint32),
        ("duration", ct.c_uint32),
        ("ctx_size_in", ct.c_uint32),
        ("ctx_size_out", ct.c_uint32),
        ("ctx_in", ct.c_uint64),
        ("ctx_out", ct.c_uint64),
        ("flags", ct.c_uint32),
        ("cpu", ct.c_uint32),
        ("batch_size", ct.c_uint32),
    ]


@dataclass(frozen=True, slots=True)
class MapInfo:
    """Properties of a map in the kernel; sizes in bytes."""

    id: int
    type: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int = 0


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """Properties of a loaded program; `name` has at most 15 characters."""

    id: int
    type: int
    name: str
    tag: str


@dataclass(frozen=True, slots=True)
class TestRun:
    """Result of BPF_PROG_TEST_RUN; `ns` is the kernel's mean duration of one run."""

    retval: int
    data: bytes
    ns: int
    ctx: bytes


def error(e: int, what: str) -> OSError:
    """Return the exception for an errno of bpf(2)."""
    if _NR < 0:
        return OSError(errno.ENOSYS, f"bpf(2): number unknown on {platform.machine()}")
    return OSError(e, f"bpf {what}: {os.strerror(e)}")


def _bpf(cmd: int, attr: ct.Structure, what: str) -> int:
    r = _syscall(_NR, cmd, ct.byref(attr), ct.sizeof(attr))
    if r < 0:
        raise error(ct.get_errno(), what)
    return int(r)


def _charged(cmd: int, attr: ct.Structure, what: str) -> int:
    """Do what kernels before 5.11 charge to RLIMIT_MEMLOCK, which is lifted if it is too low."""
    try:
        return _bpf(cmd, attr, what)
    except PermissionError:
        limit = resource.RLIM_INFINITY
        if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == limit:
            raise
        with contextlib.suppress(ValueError, OSError):  # else the refusal is what there is to say
            resource.setrlimit(resource.RLIMIT_MEMLOCK, (limit, limit))
        return _bpf(cmd, attr, what)


def map_create(
    type_: int, key_size: int, value_size: int, max_entries: int, flags: int = 0, name: str = ""
) -> int:
    """Create a map; the caller closes the file descriptor."""
    a = _CreateAttr(type_, key_size, value_size, max_entries, flags)
    a.name = name[:NAME_MAX].encode()
    return _charged(_MAP_CREATE, a, f"map create {name}")


def map_lookup(attr: MapAttr) -> int:
    """Copy the value of the key to attr.value; return 0 or an errno."""
    return ct.get_errno() if _syscall(_NR, _MAP_LOOKUP, ct.byref(attr), _MAP_ATTR_SIZE) else 0


def map_update(attr: MapAttr, new: bool) -> int:
    """Insert or, unless `new` is set, replace the entry; return 0 or an errno."""
    attr.flags = new
    r = _syscall(_NR, _MAP_UPDATE, ct.byref(attr), _MAP_ATTR_SIZE)
    attr.flags = 0
    return ct.get_errno() if r else 0


def map_delete(attr: MapAttr) -> int:
    """Remove the entry; return 0 or an errno."""
    # The kernel demands zeros where a shorter command ends: its attr has no value and no flags.
    return ct.get_errno() if _syscall(_NR, _MAP_DELETE, ct.byref(attr), 16) else 0


def map_next(attr: MapAttr) -> int:
    """Copy the key after attr.key (0: the first one) to attr.value; return 0 or an errno."""
    return ct.get_errno() if _syscall(_NR, _MAP_NEXT, ct.byref(attr), 24) else 0


class Verifier(OSError):
    """The kernel refuses a program. `log`: what its verifier says."""

    log = ""


def prog_load(type_: int, code: bytes, license_: str, name: str) -> int:
    """Load a program; the caller closes the file descriptor. Raises Verifier."""
    insns, gpl = (
        ct.create_string_buffer(code, len(code)),
        ct.create_string_buffer(license_.encode()),
    )
    a = _LoadAttr(type_, len(code) // 8, ct.addressof(insns), ct.addressof(gpl))
    a.name = name[:NAME_MAX].encode()
    try:
        return _charged(_PROG_LOAD, a, f"prog load {name}")
    except OSError as first:
        # The text costs time, and is wanted of a failure only.
        log = ct.create_string_buffer(_LOG_BYTES)
        a.log_level, a.log_size, a.log_buf = 1, _LOG_BYTES, ct.addressof(log)
        try:
            return _bpf(_PROG_LOAD, a, f"prog load {name}")
        except OSError:
            refused = Verifier(first.errno, first.strerror)
            refused.log = log.value.decode(errors="replace")
            raise refused from first


def obj_pin(fd: int, path: str) -> None:
    """Pin a map or program at `path`, on a BPF file system."""
    buf = ct.create_string_buffer(path.encode())
    _bpf(_OBJ_PIN, _ObjAttr(ct.addressof(buf), fd, 0), f"pin {path}")


def obj_get(path: str) -> int:
    """Open a pinned object; the caller closes the file descriptor."""
    buf = ct.create_string_buffer(path.encode())
    return _bpf(_OBJ_GET, _ObjAttr(ct.addressof(buf), 0, 0), f"get {path}")


def map_info(fd: int) -> MapInfo:
    """Return the properties of the map behind `fd`."""
    info = _MapInfo()
    _bpf(_OBJ_GET_INFO_BY_FD, _InfoAttr(fd, ct.sizeof(info), ct.addressof(info)), "map info")
    return MapInfo(
        info.id, info.type, info.key_size, info.value_size, info.max_entries, info.map_flags
    )


def ring_skip(fd: int) -> None:
    """Discard what a BPF ring buffer holds: set the consumer's position to the producer's.

    Source: ringbuf_map_mmap_kern() and what follows it in kernel/bpf/ringbuf.c.
    """
    page = mmap.PAGESIZE
    with mmap.mmap(fd, page) as ours, mmap.mmap(fd, page, prot=mmap.PROT_READ, offset=page) as its:
        position = ct.c_uint64.from_buffer(ours)
        position.value = int.from_bytes(its[:8], sys.byteorder)
        del position  # otherwise the mapping is still in use


def prog_info(fd: int) -> ProgInfo:
    """Return the properties of the program behind `fd`."""
    info = _ProgInfo()
    _bpf(_OBJ_GET_INFO_BY_FD, _InfoAttr(fd, ct.sizeof(info), ct.addressof(info)), "prog info")
    return ProgInfo(info.id, info.type, info.name.decode(errors="replace"), bytes(info.tag).hex())


def prog_fd_by_id(prog_id: int) -> int:
    """Open a loaded program by its ID; needs CAP_SYS_ADMIN. The caller closes the descriptor."""
    return _bpf(_PROG_GET_FD_BY_ID, _IdAttr(prog_id, 0, 0), f"prog {prog_id}")


def prog_info_by_id(prog_id: int) -> ProgInfo:
    """Return the properties of the program with this ID; needs CAP_SYS_ADMIN."""
    fd = prog_fd_by_id(prog_id)
    try:
        return prog_info(fd)
    finally:
        os.close(fd)


def tcx_programs(ifindex: int, direction: str) -> int:
    """Return how many tcx programs a device has; 0 if the kernel has no tcx (before 6.6)."""
    a = _QueryAttr(ifindex=ifindex, attach_type=_TCX[direction])
    try:
        _bpf(_PROG_QUERY, a, "prog query")
    except OSError as e:
        if e.errno in (errno.EINVAL, errno.ENODEV, errno.EPERM, errno.ENOENT):
            return 0
        raise
    return int(a.prog_cnt)


def test_run(
    fd: int,
    data: bytes,
    *,
    repeat: int = 1,
    ctx: bytes = b"",
    ctx_out: int = 0,
    data_out: int = 70000,
) -> TestRun:
    """Run a program once (or `repeat` times) over `data`, which is at most a page."""
    src = ct.create_string_buffer(data, len(data))
    dst = ct.create_string_buffer(max(data_out, 1))
    cin = ct.create_string_buffer(ctx, len(ctx)) if ctx else None
    cout = ct.create_string_buffer(max(ctx_out, 1))
    a = _TestRunAttr(prog_fd=fd, repeat=repeat)
    a.data_in, a.data_size_in = ct.addressof(src), len(data)
    if data_out:
        a.data_out, a.data_size_out = ct.addressof(dst), data_out
    if cin is not None:
        a.ctx_in, a.ctx_size_in = ct.addressof(cin), len(ctx)
    if ctx_out:
        a.ctx_out, a.ctx_size_out = ct.addressof(cout), ctx_out
    _bpf(_PROG_TEST_RUN, a, "test run")
    return TestRun(
        a.retval,
        dst.raw[: a.data_size_out] if data_out else b"",
        a.duration,
        cout.raw[: a.ctx_size_out] if ctx_out else b"",
    )


def is_bpffs(path: str) -> bool:
    """Return whether `path` lies on a BPF file system (statfs magic, linux/magic.h)."""
    buf = (ct.c_uint64 * 32)()
    if _libc.statfs(path.encode(), ct.byref(buf)):
        return False
    return int(buf[0]) == BPFFS_MAGIC


def mount_bpffs(path: str) -> None:
    """Mount a BPF file system on `path`, for its owner only, as systemd does.

    Without the mode anybody may make directories in it.
    """
    os.makedirs(path, exist_ok=True)
    if _libc.mount(b"bpf", path.encode(), b"bpf", 0, b"mode=0700"):
        e = ct.get_errno()
        raise OSError(e, f"mount bpf on {path}: {os.strerror(e)}")
