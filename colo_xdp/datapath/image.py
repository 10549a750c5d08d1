# SPDX-License-Identifier: GPL-2.0-or-later
"""What the compiler makes of one role's sources: programs as bytecode, and the maps they need.

An image has no descriptor, path or size of this host in it. So one serves each NIC, each pair and
each start, and can be kept in a file (datapath/cache.py). datapath/loader.py creates the maps, puts
their descriptors into the instructions (relocated()) and loads the programs.

The file, in the host's byte order, after the struct _HEAD: a JSON object of `size` bytes, and the
instructions of all programs, one after the other, in the order of that object.

    magic    8 bytes   "COLO-BPF"
    version  u32       of this format: VERSION
    abi      u32       abi.ABI of the release that compiled it
    digest   32 bytes  SHA-256 of everything after it
    size     u32       of the JSON object

    {"role", "tag", "origin",
     "maps": [{"name", "type", "key_size", "value_size", "entries", "flags"}],
     "programs": [{"name", "type", "license", "size", "maps": [[instruction, map], ...]}]}

A file that differs in any of it is refused: another compiler run costs seconds, a wrong program a
guest's connections.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from .. import abi

VERSION = 1
MAGIC = b"COLO-BPF"
_HEAD = struct.Struct("=8sII32sI")
_COVERED = _HEAD.size - 4  # where the bytes begin that the digest covers

#: struct bpf_insn: opcode, registers (destination in the low half), offset, immediate
INSTRUCTION = struct.Struct("=BBhi")
_LOAD_64, _CALL = 0x18, 0x85
_PLAIN, _MAP_FD = 0, 1  # source register of a 64-bit load: a constant, or the descriptor of a map


class ImageError(ValueError):
    """Bytes that are no image, or one that cannot be used; the text states why."""


@dataclass(frozen=True, slots=True)
class MapSpec:
    """A map to create; sizes in bytes, the type as in enum bpf_map_type."""

    name: str
    type: int
    key_size: int
    value_size: int
    entries: int
    flags: int


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """A program to load; the type as in enum bpf_prog_type.

    `maps`: the instructions that load a map's descriptor (0 in `code`), with the map's name.
    """

    name: str
    type: int
    license: str
    code: bytes
    maps: tuple[tuple[int, str], ...]

    def relocated(self, fds: Mapping[str, int]) -> bytes:
        """Return the instructions with the descriptors of the maps.

        Raises ImageError if there is no such map.
        """
        out = bytearray(self.code)
        for at, name in self.maps:
            if name not in fds:
                raise ImageError(f"{self.name} uses the map {name}, which does not exist")
            _put(out, at, fds[name])
        return bytes(out)


def separate(code: bytes, names: Mapping[int, str]) -> tuple[bytes, tuple[tuple[int, str], ...]]:
    """Return instructions without descriptors of maps, and where which map's belongs.

    names: of the maps by descriptor. Raises ImageError for a reference of any other kind.
    """
    if not code or len(code) % INSTRUCTION.size:
        raise ImageError(f"{len(code)} bytes are not instructions")
    out, found = bytearray(code), []
    at, end = 0, len(code) // INSTRUCTION.size
    while at < end:
        opcode, registers, _, immediate = INSTRUCTION.unpack_from(code, at * INSTRUCTION.size)
        source = registers >> 4
        if opcode == _LOAD_64:
            if source == _MAP_FD and immediate in names and at + 1 < end:
                found.append((at, names[immediate]))
                _put(out, at, 0)
            elif source != _PLAIN:
                raise ImageError(f"instruction {at} refers to something that is no map")
            at += 1  # it takes the room of two
        elif opcode == _CALL and source:
            raise ImageError(f"instruction {at} calls a function that is not in the program")
        at += 1
    return bytes(out), tuple(found)


def _put(code: bytearray, at: int, fd: int) -> None:
    opcode, registers, offset, _ = INSTRUCTION.unpack_from(code, at * INSTRUCTION.size)
    INSTRUCTION.pack_into(code, at * INSTRUCTION.size, opcode, registers, offset, fd)


@dataclass(frozen=True, slots=True)
class Image:
    """One role's programs and maps.

    `tag`: Image.tag == Source.tag of what was compiled; `origin`: compiler and headers, for people.
    """

    role: str
    tag: str
    origin: str
    maps: tuple[MapSpec, ...]
    programs: tuple[ProgramSpec, ...]

    def encode(self) -> bytes:
        """Return the contents of its file."""
        programs = [
            {"name": p.name, "type": p.type, "license": p.license, "size": len(p.code),
             "maps": p.maps}
            for p in self.programs
        ]  # fmt: skip
        document = {
            "role": self.role, "tag": self.tag, "origin": self.origin,
            "maps": [asdict(m) for m in self.maps], "programs": programs,
        }  # fmt: skip
        text = json.dumps(document).encode()
        covered = struct.pack("=I", len(text)) + text + b"".join(p.code for p in self.programs)
        digest = hashlib.sha256(covered).digest()
        return _HEAD.pack(MAGIC, VERSION, abi.ABI, digest, len(text))[:_COVERED] + covered


def decode(raw: bytes) -> Image:
    """Return the image in a file. Raises ImageError."""
    if len(raw) < _HEAD.size:
        raise ImageError(f"{len(raw)} bytes are no compiled programs")
    magic, version, abi_, digest, size = _HEAD.unpack_from(raw)
    if magic != MAGIC:
        raise ImageError("no compiled programs, or of a machine with another byte order")
    if (version, abi_) != (VERSION, abi.ABI):
        raise ImageError(
            f"format {version} and ABI {abi_} where {VERSION} and {abi.ABI} are needed"
        )
    if hashlib.sha256(raw[_COVERED:]).digest() != digest:
        raise ImageError("damaged: its contents do not match their digest")
    try:
        return _image(json.loads(raw[_HEAD.size : _HEAD.size + size]), raw[_HEAD.size + size :])
    except (KeyError, TypeError, ValueError) as e:
        raise ImageError(f"not as this release writes it: {type(e).__name__} {e}") from e


def _image(document: dict[str, Any], code: bytes) -> Image:
    maps = tuple(
        MapSpec(
            str(m["name"]), int(m["type"]), int(m["key_size"]), int(m["value_size"]),
            int(m["entries"]), int(m["flags"]),
        )
        for m in document["maps"]
    )  # fmt: skip
    programs, at = [], 0
    for p in document["programs"]:
        mine, at = code[at : at + int(p["size"])], at + int(p["size"])
        where = tuple((int(i), str(name)) for i, name in p["maps"])
        if any(not 0 <= i < len(mine) // INSTRUCTION.size for i, _ in where):
            raise ValueError(f"a map outside of {p['name']}")
        programs.append(ProgramSpec(str(p["name"]), int(p["type"]), str(p["license"]), mine, where))
    if at != len(code):
        raise ValueError(f"{len(code)} bytes of instructions where {at} are announced")
    return Image(
        str(document["role"]), str(document["tag"]), str(document["origin"]), maps, tuple(programs)
    )
