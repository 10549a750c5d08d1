# SPDX-License-Identifier: GPL-2.0-or-later
"""Finds where the running kernel keeps a frame's offloads, from its own BTF.

BPF shows neither what kind of segmentation a frame waits for nor where its checksum begins (struct
__sk_buff has only gso_size). But a program may read the kernel's struct sk_buff if it knows the
offsets, and those are in /sys/kernel/btf/vmlinux. datapath/compiler.py compiles them into the
programs (bpf/lib/gso.h). Format: Documentation/bpf/btf.rst; integers are in the host's byte order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
LOCKDOWN = Path("/sys/kernel/security/lockdown")

_HEADER = struct.Struct("=HBBIIIII")
_TYPE = struct.Struct("=III")
_MEMBER = struct.Struct("=III")
_MAGIC = 0xEB9F
_INT, _ARRAY, _STRUCT, _UNION, _ENUM = 1, 3, 4, 5, 6
_FUNC_PROTO, _VAR, _DATASEC, _DECL_TAG, _ENUM64 = 13, 14, 15, 17, 19
_TYPEDEF, _MODIFIERS = 8, frozenset((8, 9, 10, 11, 18))
#: bytes that follow a type's head: once per type, and for each of its vlen entries
_EXTRA = {
    _INT: (4, 0), _ARRAY: (12, 0), _STRUCT: (0, 12), _UNION: (0, 12), _ENUM: (0, 8),
    _FUNC_PROTO: (0, 8), _VAR: (4, 0), _DATASEC: (0, 12), _DECL_TAG: (4, 0), _ENUM64: (0, 12),
}  # fmt: skip

#: what a program has to know: name of its macro, struct and member
_PLACES = {
    "COLO_SKB_HEAD": ("sk_buff", "head"),
    "COLO_SKB_DATA": ("sk_buff", "data"),
    "COLO_SKB_END": ("sk_buff", "end"),
    "COLO_SKB_IP_SUMMED": ("sk_buff", "ip_summed"),
    "COLO_SKB_CSUM_START": ("sk_buff", "csum_start"),
    "COLO_SKB_CSUM_OFFSET": ("sk_buff", "csum_offset"),
    "COLO_SHINFO_GSO_TYPE": ("skb_shared_info", "gso_type"),
}
#: Bits of skb_shared_info.gso_type; those of the second line are not in every kernel.
_KINDS = ("TCPV4", "TCPV6", "TCP_ECN", "DODGY", "UDP", "UDP_L4")
_MORE_KINDS = ("TCP_FIXEDID", "TCP_FIXEDID_INNER", "FRAGLIST", "TCP_ACCECN")


class BtfError(RuntimeError):
    """The kernel's BTF lacks something that is needed; the text states what."""


@dataclass(frozen=True, slots=True)
class Place:
    """Position of a struct member: bits from its start, and bits of a bit field (0: it is none)."""

    bit: int
    width: int = 0
    pointer: bool = False


class Btf:
    """Structs and enumerators by name. Raises BtfError if the bytes are not BTF."""

    def __init__(self, raw: bytes) -> None:
        try:
            magic, _v, _f, size, types, types_len, strings, strings_len = _HEADER.unpack_from(raw)
        except struct.error as e:
            raise BtfError(f"BTF of {len(raw)} bytes") from e
        if magic != _MAGIC:
            raise BtfError("no BTF of this machine's byte order")
        self._raw = raw
        self._strings = raw[size + strings : size + strings + strings_len]
        self._at = [0]  # by type ID; 0 is void
        at, end = size + types, size + types + types_len
        try:
            while at < end:
                self._at.append(at)
                _, info, _ = _TYPE.unpack_from(raw, at)
                head, each = _EXTRA.get(info >> 24 & 0x1F, (0, 0))
                at += 12 + head + each * (info & 0xFFFF)
        except struct.error as e:
            raise BtfError("BTF ends within a type") from e

    def _name(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _named(self, name: str, kinds: tuple[int, ...]) -> Iterator[int]:
        want = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        for at in self._at[1:]:
            offset, info, _ = _TYPE.unpack_from(self._raw, at)
            if offset == want and info >> 24 & 0x1F in kinds:
                yield at

    def _members(self, at: int) -> Iterator[tuple[str, int, Place]]:
        _, info, _ = _TYPE.unpack_from(self._raw, at)
        for i in range(info & 0xFFFF):
            name, kind, where = _MEMBER.unpack_from(self._raw, at + 12 + 12 * i)
            place = Place(where & 0xFFFFFF, where >> 24) if info >> 31 else Place(where)
            yield self._name(name), kind, place

    def _plain(self, kind: int) -> tuple[int, int]:
        """Return offset and kind of a type without its typedefs and qualifiers."""
        at = self._at[kind]
        while at:
            _, info, ref = _TYPE.unpack_from(self._raw, at)
            if info >> 24 & 0x1F not in _MODIFIERS:
                return at, info >> 24 & 0x1F
            at = self._at[ref]
        return 0, 0

    def _find(self, at: int, member: str, base: int) -> Place | None:
        for name, kind, place in self._members(at):
            inner, what = self._plain(kind)
            if name == member:
                return Place(base + place.bit, place.width, what == 2)
            if not name and what in (_STRUCT, _UNION):
                found = self._find(inner, member, base + place.bit)
                if found:
                    return found
        return None

    def place(self, struct_name: str, member: str) -> Place:
        """Return the position of a member, which may be in an anonymous struct or union within.

        Raises BtfError.
        """
        for at in self._named(struct_name, (_STRUCT,)):
            found = self._find(at, member, 0)
            if found:
                return found
        raise BtfError(f"struct {struct_name} has no member {member}")

    def enumerators(self, prefix: str) -> dict[str, int]:
        """Return all 32-bit enumerators whose names start with `prefix`."""
        out = {}
        for at in self._at[1:]:
            _, info, _ = _TYPE.unpack_from(self._raw, at)
            if info >> 24 & 0x1F != _ENUM:
                continue
            for i in range(info & 0xFFFF):
                offset, value = struct.unpack_from("=II", self._raw, at + 12 + 8 * i)
                if self._strings.startswith(prefix.encode(), offset):
                    out[self._name(offset)] = value
        return out


def skb_flags(raw: bytes) -> tuple[str, ...]:
    """Return the compiler flags for bpf/lib/gso.h. Raises BtfError."""
    btf = Btf(raw)
    flags = ["-DCOLO_SKB"]
    for macro, (struct_name, member) in _PLACES.items():
        place = btf.place(struct_name, member)
        flags.append(f"-D{macro}={place.bit // 8}")
        if member == "ip_summed":
            flags.append(f"-DCOLO_SKB_IP_SUMMED_SHIFT={place.bit % 8}")
            if place.width != 2 or place.bit % 8 > 6:
                raise BtfError(f"sk_buff.ip_summed has {place.width} bits at {place.bit}")
        elif place.bit % 8 or place.width:
            raise BtfError(f"{struct_name}.{member} is at bit {place.bit}")
        if member == "end":  # with 64-bit pointers: an offset from head
            flags.append(f"-DCOLO_SKB_END_SIZE={8 if place.pointer else 4}")
    try:  # only if the kernel has SCTP or another user of CRC32c
        place = btf.place("sk_buff", "csum_not_inet")
        flags.append(f"-DCOLO_SKB_NOT_INET={place.bit // 8}")
        flags.append(f"-DCOLO_SKB_NOT_INET_SHIFT={place.bit % 8}")
    except BtfError:
        pass
    kinds = btf.enumerators("SKB_GSO_")
    for name in (*_KINDS, *_MORE_KINDS):
        value = kinds.get(f"SKB_GSO_{name}", 0)
        if not value and name in _KINDS:
            raise BtfError(f"no enumerator SKB_GSO_{name}")
        flags.append(f"-DCOLO_GSO_{name}={value}u")
    return tuple(flags)


def why_not() -> str:
    """Return why programs cannot read the kernel's own struct here; "": they probably can."""
    if not VMLINUX.exists():
        return f"this kernel has no BTF ({VMLINUX})"
    if LOCKDOWN.exists() and "[confidentiality]" in LOCKDOWN.read_text():
        return "the kernel is locked down (confidentiality)"
    return ""


def kernel_flags() -> tuple[str, ...]:
    """Return skb_flags() of the running kernel. Raises BtfError, OSError."""
    return skb_flags(VMLINUX.read_bytes())
