# SPDX-License-Identifier: GPL-2.0-or-later
"""Loads a role's programs: from what a former controller has left, else from an image.

Maps whose state must outlive the controller are pinned below `<bpffs>/colo-xdp/<pair>-<role>/`
under their own names. Before they are reused, their shape and ABI number are checked. Programs that
have to be compiled come from the cache (datapath/cache.py), which compiles what it has not.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from .. import abi
from . import syscall
from .cache import Cache
from .image import Image, ImageError, MapSpec
from .maps import Map
from .source import ENTRIES, LASTING, LoadError, NotCompiled, Options, Refused, Source, source

log = logging.getLogger("colo_xdp.datapath.loader")

_LOG = 6000  # characters of what the verifier says, the last ones
_U32, _U64 = struct.Struct("=I"), struct.Struct("=Q")


@dataclass(frozen=True, slots=True)
class Program:
    """A loaded program: its descriptor, and its name, ID and tag in the kernel."""

    name: str
    fd: int
    id: int
    tag: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What is loaded: programs from `source`, and maps with the sizes in `options`."""

    source: Source
    options: Options

    @property
    def role(self) -> str:
        """Return the role whose programs these are."""
        return self.source.role

    @property
    def entries(self) -> dict[str, int]:
        """Return the sizes of the maps that the sources leave open."""
        return self.options.entries(self.source.events)

    @property
    def tag(self) -> str:
        """Return what distinguishes this set of pins: the programs, and the sizes of their maps."""
        sizes = " ".join(f"{name}={n}" for name, n in sorted(self.entries.items()))
        return hashlib.sha256(f"{self.source.tag} {sizes}".encode()).hexdigest()[:16]

    def blind(self) -> Plan:
        """Return the same for a kernel whose own structs programs may not read."""
        return replace(self, source=replace(self.source, btf=False))


def plan(role: str, options: Options) -> Plan:
    """Return what load() would load for a role on this host."""
    return Plan(source(role, options, events(options)), options)


class Objects:
    """Programs and maps of one role, either compiled or (`warm`) those of a former controller.

    Besides the maps that the sources pin, everything is pinned as prog_<role>_<tag>_<name> and
    map_<role>_<tag>_<name>, and whole_<role>_<tag>_ last. The event ring is among them: what was
    captured while there was no controller waits in it for the next one. Objects that a host needs
    when its role changes back are marked idle_<role>_<tag>_ meanwhile: compiling takes seconds of
    CPU time, just when the guest has no copy.
    """

    def __init__(self, plan: Plan, pin_dir: str, image: Image | None) -> None:
        """Load the image; None: take what is pinned.

        Raises Refused if the kernel refuses it, LoadError if a pinned map is in the way.
        """
        self.events = plan.source.events
        self.pin_dir = pin_dir
        self.programs: dict[str, Program] = {}
        self.warm = image is None
        #: offloads are read from the kernel's structs; otherwise some are refused (bpf/lib/gso.h)
        self.btf = plan.source.btf
        self._fds: list[int] = []
        self._maps: dict[str, int] = {}
        try:
            if image is None:
                self._adopt(plan)
            else:
                self._load(plan, image)
        except BaseException:
            self.close()
            raise

    def _load(self, plan: Plan, image: Image) -> None:
        entries = plan.entries
        for spec in image.maps:
            spec = replace(spec, entries=entries.get(spec.name, spec.entries))
            fd = self._lasting(spec) if spec.name in LASTING else _create(spec)
            self._fds.append(fd)
            self._maps[spec.name] = fd
        for p in image.programs:
            try:
                fd = syscall.prog_load(p.type, p.relocated(self._maps), p.license, p.name)
            except (OSError, ImageError) as e:
                text = e.log.strip()[-_LOG:] if isinstance(e, syscall.Verifier) else ""
                why = e.strerror if isinstance(e, OSError) else str(e)
                raise Refused(
                    f"{plan.source.name} ({image.origin}): {p.name}: {why}\n{text}".strip()
                ) from e
            self._fds.append(fd)
            self.programs[p.name] = _program(p.name, fd)

    def _lasting(self, spec: MapSpec) -> int:
        """Open the pinned map, or create and pin it."""
        path = f"{self.pin_dir}/{spec.name}"
        if not os.path.exists(path):
            fd = _create(spec)
            try:
                syscall.obj_pin(fd, path)
            except OSError:
                os.close(fd)
                raise
            return fd
        fd = syscall.obj_get(path)
        i = syscall.map_info(fd)
        found = (i.type, i.key_size, i.value_size, i.max_entries)
        want = (spec.type, spec.key_size, spec.value_size, spec.entries)
        if found != want:
            os.close(fd)
            raise _in_the_way([_mismatch(path, found, want)])
        return fd

    def _adopt(self, plan: Plan) -> None:
        for kind, name, path in _pins(self.pin_dir, plan):
            fd = syscall.obj_get(path)
            self._fds.append(fd)
            if kind == "prog":
                self.programs[name] = _program(name, fd)
            else:
                self._maps[name] = fd

    def keep(self, plan: Plan) -> None:
        """Pin everything, so that the next controller need not load anything.

        Atomic: the mark comes last.
        """
        if self.events != "ring":
            return  # perf buffers belong to a process: nothing waits in them for the next one
        base = f"{self.pin_dir}/{{}}_{plan.role}_{plan.tag}_"
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


def _create(spec: MapSpec) -> int:
    """Create a map. Raises Refused, as there may be too little memory for what is configured."""
    try:
        return syscall.map_create(
            spec.type, spec.key_size, spec.value_size, spec.entries, spec.flags, spec.name
        )
    except OSError as e:
        raise Refused(f"map {spec.name} of {spec.entries} entries: {e.strerror}") from e


def _program(name: str, fd: int) -> Program:
    info = syscall.prog_info(fd)
    return Program(name, fd, info.id, info.tag)


def _pins(directory: str, plan: Plan) -> list[tuple[str, str, str]]:
    """Return (prog or map, name, path) of what keep() has pinned; empty unless it is complete."""
    found = []
    mark = f"whole_{plan.role}_{plan.tag}_"
    if not os.path.exists(f"{directory}/{mark}"):
        return []
    for entry in sorted(os.listdir(directory)):
        kind, _, rest = entry.partition("_")
        head = f"{plan.role}_{plan.tag}_"
        if kind in ("prog", "map") and rest.startswith(head):
            found.append((kind, rest[len(head) :], f"{directory}/{entry}"))
    return found


def _set_aside(directory: str, plan: Plan, beside: tuple[str, ...], *, whole: bool) -> None:
    """Retire other sets of pins: mark those of other roles idle, and unpin leftovers of this role.

    Roles in `beside` coexist with this one and stay. If this set is complete (`whole`), all other
    sets of this role are unpinned. Otherwise all of them are, since a controller may have died
    while it pinned this one.
    """
    mine = f"{plan.role}_{plan.tag}_"
    # The marks first: what is half removed must be neither complete nor idle.
    for entry in sorted(os.listdir(directory), key=lambda e: e.startswith(("prog_", "map_"))):
        kind, _, rest = entry.partition("_")
        if kind not in ("whole", "idle", "prog", "map") or rest.startswith(beside):
            continue
        if rest.startswith(f"{plan.role}_"):
            if not (whole and rest.startswith(mine)):
                os.unlink(f"{directory}/{entry}")
        elif kind == "whole":
            os.rename(f"{directory}/{entry}", f"{directory}/idle_{rest}")


def _wake(directory: str, plan: Plan) -> bool:
    """Mark an idle set of this role as complete again; return whether there was one.

    What its ring holds was captured before this host had another role, and is of no more use.
    """
    rest = f"{plan.role}_{plan.tag}_"
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

    Raises LoadError without a bpffs, and where others may have pinned something: who can do that
    may change what is compared, and where frames go.
    """
    if not syscall.is_bpffs(bpffs):
        try:
            syscall.mount_bpffs(bpffs)
        except OSError as e:
            raise LoadError(f"{bpffs} is not a BPF file system and cannot be mounted: {e}") from e
    directory = Path(pin_dir(bpffs, pair, role, nic))
    for path in (Path(bpffs) / "colo-xdp", Path(pin_dir(bpffs, pair, role)), directory):
        path.mkdir(mode=0o700, exist_ok=True)
        st = path.lstat()
        if st.st_uid not in (0, os.geteuid()) or st.st_mode & 0o022 or not path.is_dir():
            raise LoadError(
                f"{path} belongs to user {st.st_uid} and has mode {st.st_mode & 0o7777:o}: others "
                "may have pinned something there. Look at it, and remove it"
            )
    return str(directory)


def check_pins(directory: str, options: Options) -> list[str]:
    """Return the names of pinned maps that cannot be reused, each with the reason."""
    bad, entries = [], ENTRIES | options.entries(events(options))
    for name, (key, value) in LASTING.items():
        path = f"{directory}/{name}"
        if not os.path.exists(path):
            continue
        fd = syscall.obj_get(path)
        try:
            info = syscall.map_info(fd)
        finally:
            os.close(fd)
        found = (info.type, info.key_size, info.value_size, info.max_entries)
        want = (info.type, key, value, entries.get(name, info.max_entries))
        if found != want:
            bad.append(_mismatch(path, found, want))
    return bad


def _mismatch(path: str, found: tuple[int, ...], want: tuple[int, ...]) -> str:
    kind = f", type {found[0]}" if found[0] != want[0] else ""
    return (
        f"{path}: key {found[1]}, value {found[2]}, {found[3]} entries{kind}"
        f" where {want[1]}, {want[2]}, {want[3]} are needed"
    )


def _in_the_way(bad: list[str]) -> LoadError:
    return LoadError(
        "pinned maps of another version or size are in the way (their connections' state "
        "would be lost): run `colo-xdp cleanup` first\n  " + "\n  ".join(bad)
    )


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
    try:
        os.close(syscall.map_create(syscall.RINGBUF, 0, 0, 4096, name="colo_probe"))
    except OSError:
        return False
    return True


def pinned_slot(directory: str, slot: abi.Cfg) -> int:
    """Return a slot of the pinned `config` map; 0 when there is none."""
    path = f"{directory}/config"
    if not os.path.exists(path):
        return 0
    fd = syscall.obj_get(path)
    try:
        raw = Map(fd).get(_U32.pack(slot))
        return int(_U64.unpack(raw)[0]) if raw else 0
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
    """Load a role's programs for a NIC, compiled if need be; take over maps of the same shape.

    home: the host's role as configured, which names the pins, if it is another one. Raises
    LoadError with the compiler's or verifier's output.
    """
    directory = make_pins(bpffs, pair, home or role, nic)
    bad = check_pins(directory, options)
    if bad:
        raise _in_the_way(bad)
    wanted = plan(role, options)
    beside = ("primary_",) if role == "promoted" else ()  # it coexists with a primary
    for p in (wanted, wanted.blind()):
        if _pins(directory, p) or _wake(directory, p):
            also = ("promoted_",) if role == "primary" else beside
            _set_aside(directory, p, also, whole=True)
            return Objects(p, directory, None)
    cache = Cache()
    try:
        objects = Objects(wanted, directory, cache.obtain(wanted.source))
    except Refused as e:
        if not wanted.source.btf or isinstance(e, NotCompiled):
            raise
        # This kernel may not allow bpf_probe_read_kernel() (before 5.10, or locked down).
        blind = wanted.blind()
        # raises its own error if that was not the cause
        objects = Objects(blind, directory, cache.obtain(blind.source))
        first, *said = str(e).splitlines()
        # the verifier's last words, without its statistics
        why = [x for x in said if not x.startswith(("processed ", "verification time", "stack "))]
        log.warning("offloads are not read from the kernel: %s: %s", first, "; ".join(why[-2:]))
        wanted = blind
    _set_aside(directory, wanted, beside, whole=False)
    objects.keep(wanted)
    return objects
