# SPDX-License-Identifier: GPL-2.0-or-later
"""The few bpf(2) commands that bcc 0.26 does not wrap.

These are object pins, information about maps and programs, ring buffer positions, and
BPF_PROG_TEST_RUN for the fast path's control program and the tests. Source:
include/uapi/linux/bpf.h. Every function raises OSError with the kernel's errno and the command's
name.
"""

from __future__ import annotations

import ctypes as ct
import errno
import mmap
import os
import platform
import sys
from dataclasses import dataclass

_SYS_BPF = {"x86_64": 321, "aarch64": 280, "riscv64": 280, "ppc64le": 361, "s390x": 351}
_libc = ct.CDLL(None, use_errno=True)

_OBJ_PIN, _OBJ_GET, _PROG_TEST_RUN = 6, 7, 10
_PROG_GET_FD_BY_ID, _OBJ_GET_INFO_BY_FD, _PROG_QUERY = 13, 15, 16
_TCX = {"ingress": 46, "egress": 47}  # BPF_TCX_INGRESS, BPF_TCX_EGRESS

BPFFS_MAGIC = 0xCAFE4A11


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


def _bpf(cmd: int, attr: ct.Structure, what: str) -> int:
    nr = _SYS_BPF.get(platform.machine())
    if nr is None:
        raise OSError(38, f"bpf(2): number unknown on {platform.machine()}")
    r = _libc.syscall(ct.c_long(nr), ct.c_long(cmd), ct.byref(attr), ct.c_long(ct.sizeof(attr)))
    if r < 0:
        e = ct.get_errno()
        raise OSError(e, f"bpf {what}: {os.strerror(e)}")
    return int(r)


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
    return MapInfo(info.id, info.type, info.key_size, info.value_size, info.max_entries)


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
    """Mount a BPF file system on `path`."""
    os.makedirs(path, exist_ok=True)
    if _libc.mount(b"bpf", path.encode(), b"bpf", 0, None):
        e = ct.get_errno()
        raise OSError(e, f"mount bpf on {path}: {os.strerror(e)}")
