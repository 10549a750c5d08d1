# SPDX-License-Identifier: GPL-2.0-or-later
"""Compiled programs as data: to a file and back, and descriptors of maps out and in again."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.datapath import image
from colo_xdp.datapath.image import Image, ImageError, MapSpec, ProgramSpec, decode, separate


def insn(opcode: int, registers: int = 0, immediate: int = 0) -> bytes:
    return image.INSTRUCTION.pack(opcode, registers, 0, immediate)


def load_map(fd: int, register: int = 1) -> bytes:
    return insn(0x18, 1 << 4 | register, fd) + insn(0)


EXIT = insn(0x95)
NAMES = {7: "config", 9: "flows"}
CODE = insn(0xB7, 0, 2) + load_map(9) + insn(0x18, 3, 7) + insn(0) + load_map(7, 2) + EXIT
BARE, WHERE = separate(CODE, NAMES)
MAPS = (MapSpec("config", 2, 4, 8, 40, 0), MapSpec("flows", 1, 40, 120, 1, 1))
IMAGE = Image(
    "secondary", "0123456789abcdef", "bcc 1.2, headers", MAPS,
    (ProgramSpec("svm_in", 3, "GPL", BARE, WHERE), ProgramSpec("svm_out", 6, "GPL", EXIT, ())),
)  # fmt: skip
RAW = IMAGE.encode()


def test_an_image_comes_back_as_it_was() -> None:
    assert decode(RAW) == IMAGE
    assert IMAGE.encode() == RAW


def test_descriptors_go_out_and_others_come_in() -> None:
    assert WHERE == ((1, "flows"), (5, "config"))
    program = IMAGE.programs[0]
    assert program.relocated({"config": 7, "flows": 9}) == CODE
    other = program.relocated({"config": 12, "flows": 13})
    assert separate(other, {12: "config", 13: "flows"}) == (BARE, WHERE)
    with pytest.raises(ImageError, match="svm_in uses the map flows"):
        program.relocated({"config": 7})


def test_a_constant_of_64_bits_is_not_a_map() -> None:
    """The number 7 is both a descriptor and, in the instruction at 3, only a number."""
    _, _, _, constant = image.INSTRUCTION.unpack_from(BARE, 3 * image.INSTRUCTION.size)
    assert constant == 7


@pytest.mark.parametrize(
    "code",
    [
        load_map(8) + EXIT,  # nobody's descriptor
        insn(0x18, 2 << 4, 7) + insn(0) + EXIT,  # a map's value
        insn(0x85, 1 << 4, 3) + EXIT,  # a call of a function
        insn(0x18, 1 << 4, 7),  # half an instruction
        EXIT + b"\0",
        b"",
    ],
)
def test_what_cannot_be_relocated_is_refused(code: bytes) -> None:
    with pytest.raises(ImageError):
        separate(code, NAMES)


def test_a_helper_is_no_function_of_ours() -> None:
    assert separate(insn(0x85, 0, 14) + EXIT, {})[1] == ()


@pytest.mark.parametrize("bit", [0, 3, 7])
@pytest.mark.parametrize("at", [0, 8, 12, 20, 47, 48, 60, len(RAW) - 8, len(RAW) - 1])
def test_one_flipped_bit_is_noticed(at: int, bit: int) -> None:
    raw = bytearray(RAW)
    raw[at] ^= 1 << bit
    with pytest.raises(ImageError):
        decode(bytes(raw))


@given(st.integers(0, len(RAW) - 1))
def test_a_part_is_no_image(size: int) -> None:
    with pytest.raises(ImageError):
        decode(RAW[:size])


@given(st.binary(max_size=200))
def test_anything_else_is_no_image(raw: bytes) -> None:
    for data in (raw, image.MAGIC + raw, RAW + raw + b"x"):
        with pytest.raises(ImageError):
            decode(data)


def _of(version: int, abi: int) -> bytes:
    return RAW[:8] + struct.pack("=II", version, abi) + RAW[16:]


def test_another_format_or_abi_says_which() -> None:
    _, version, abi = struct.unpack_from("=8sII", RAW)
    with pytest.raises(ImageError, match=f"format {version + 1} and ABI {abi} where"):
        decode(_of(version + 1, abi))
    with pytest.raises(ImageError, match=f"ABI {abi + 1} where"):
        decode(_of(version, abi + 1))


def test_a_well_kept_lie_is_noticed() -> None:
    """The digest protects from damage, not from a release that writes something else."""
    outside = replace(IMAGE.programs[0], maps=((99, "config"),))
    with pytest.raises(ImageError, match="outside of svm_in"):
        decode(replace(IMAGE, programs=(outside,)).encode())
