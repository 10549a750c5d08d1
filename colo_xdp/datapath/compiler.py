# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiles bpf/*.bpf.c to an image: in a process of its own, the only one that imports bcc.

libbcc contains clang and LLVM. In a controller they would stay, 84 MiB and what they have allocated
besides, for something that takes seconds once per kernel and release. So run() starts this module
as a program, which gets the source as JSON at its standard input, writes the image (or, with exit
status 1, an error as JSON) to its standard output, and ends.

Tests and benchmarks compile programs that are not ours in their own process (compile_text()).
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .. import user_command
from . import btf, kernel_headers, syscall
from .image import Image, ImageError, MapSpec, ProgramSpec, decode, separate
from .source import LoadError, NotCompiled, Refused, Source, Unfinished, compiler

log = logging.getLogger("colo_xdp.datapath.compiler")

#: Longest time, s. It takes 3 to 6 s of CPU time; a host that boots has more to do.
DEADLINE_S = 120
_TEXT = 6000  # bytes of what clang writes, the last ones
_SCHED_CLS, _XDP = 3, 6  # BPF_PROG_TYPE_*
_PDEATHSIG = 1  # PR_SET_PDEATHSIG, in linux/prctl.h
_ERRORS = {e.__name__: e for e in (LoadError, Refused, NotCompiled)}


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


@contextlib.contextmanager
def _stderr_to(sink: list[str]) -> Iterator[None]:
    """Collect what clang writes to fd 2, for the error message."""
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


@contextlib.contextmanager
def _headers() -> Iterator[kernel_headers.Headers]:
    """Find kernel headers, and have bcc use them. Raises LoadError when there are none."""
    try:
        headers = kernel_headers.find()
    except kernel_headers.NoHeaders as e:
        raise LoadError(str(e)) from e
    if headers.path:
        os.environ["BCC_KERNEL_SOURCE"] = headers.path
    try:
        yield headers
    finally:
        if headers.path:
            del os.environ["BCC_KERNEL_SOURCE"]


def compile_text(text: str) -> Any:
    """Compile a program that is not one of ours (tests and benchmarks); return the bcc object.

    Raises LoadError when there are no kernel headers.
    """
    with _headers():
        return import_bcc().BPF(text=text.encode())


def _tables(lib: Any, module: Any) -> dict[int, str]:
    """Return the names of a compiled module's maps by descriptor.

    bcc's Python does not declare these functions.
    """
    lib.bpf_num_tables.argtypes, lib.bpf_num_tables.restype = [ct.c_void_p], ct.c_size_t
    lib.bpf_table_name.argtypes = [ct.c_void_p, ct.c_size_t]
    lib.bpf_table_name.restype = ct.c_char_p
    names = [lib.bpf_table_name(module, i) for i in range(lib.bpf_num_tables(module))]
    return {lib.bpf_table_fd(module, n): n.decode() for n in names}


def compile_here(source: Source) -> Image:
    """Compile in this process. Raises LoadError, or Refused with clang's text.

    bcc creates the maps as well, with the sizes in the sources, which are small; they end with it.
    """
    bcc = import_bcc()
    flags = source.flags
    if source.btf:
        try:
            flags += btf.kernel_flags()
        except (btf.BtfError, OSError) as e:
            raise Refused(f"{btf.VMLINUX}: {e}") from e
    output: list[str] = []
    with _headers() as headers:
        try:
            with _stderr_to(output):
                bpf = bcc.BPF(text=source.text.encode(), cflags=list(flags))
        except Exception as e:  # bcc raises bare Exception
            text = "\n".join(output).strip()[-_TEXT:]
            raise NotCompiled(f"{source.name} ({headers.origin}): {e}\n{text}".strip()) from e
    names = _tables(bcc.libbcc.lib, bpf.module)
    license_ = bcc.libbcc.lib.bpf_module_license(bpf.module).decode()
    maps = []
    for fd, name in sorted(names.items(), key=lambda item: item[1]):
        i = syscall.map_info(fd)
        maps.append(MapSpec(name, i.type, i.key_size, i.value_size, i.max_entries, i.flags))
    programs = []
    for kind, wanted in ((_SCHED_CLS, source.tc), (_XDP, source.xdp)):
        for name in wanted:
            try:
                code, where = separate(bpf.dump_func(name.encode()), names)
            except ImageError as e:
                raise Refused(f"{source.name}: {name}: {e}") from e
            programs.append(ProgramSpec(name, kind, license_, code, where))
    origin = f"bcc {compiler()}, {headers.origin}"
    return Image(source.role, source.tag, origin, tuple(maps), tuple(programs))


def run(source: Source, *, nice: int = 0) -> Image:
    """Compile in a child process; blocks for seconds. Raises as compile_here(), and Unfinished."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        # -P: not what lies in the directory in which somebody runs `colo-xdp compile`
        [sys.executable, "-P", "-m", __name__],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=user_command.environment() | {"PYTHONPATH": path},
    ) as child:  # fmt: skip
        if nice:
            with contextlib.suppress(OSError):  # it has ended already, which is seen below
                os.setpriority(os.PRIO_PROCESS, child.pid, nice)
        try:
            out, said = child.communicate(json.dumps(asdict(source)).encode(), DEADLINE_S)
        except subprocess.TimeoutExpired as e:
            raise Unfinished(f"{source.name}: the compiler took more than {DEADLINE_S} s") from e
        finally:
            child.kill()
    if child.returncode == 0:
        try:
            return decode(out)
        except ImageError as e:
            raise Unfinished(f"{source.name}: what the compiler has written: {e}") from e
    try:
        answer = json.loads(out)
        error = _ERRORS[answer["error"]](answer["text"])
    except (ValueError, KeyError, TypeError):
        text = said.decode(errors="replace").strip()[-_TEXT:]
        error = Unfinished(
            f"{source.name}: the compiler ended with {child.returncode}\n{text}".strip()
        )
    raise error


def main() -> int:
    """Do what the module's head says; return the exit status."""
    ct.CDLL(None).prctl(_PDEATHSIG, ct.c_ulong(signal.SIGKILL))  # nobody else wants the image
    out = os.dup(1)
    os.dup2(2, 1)  # libbcc may print
    request = json.load(sys.stdin)
    for name in ("flags", "tc", "xdp"):
        request[name] = tuple(request[name])
    try:
        answer, status = compile_here(Source(**request)).encode(), 0
    except LoadError as e:
        answer = json.dumps({"error": type(e).__name__, "text": str(e)}).encode()
        status = 1
    with os.fdopen(out, "wb") as f:
        f.write(answer)
    return status


if __name__ == "__main__":
    sys.exit(main())
