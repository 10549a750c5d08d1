# SPDX-License-Identifier: GPL-2.0-or-later
"""Maps and programs through bpf(2) alone: entries, per-CPU values, threads, the verifier's text."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from colo_xdp import abi
from colo_xdp.datapath import loader, syscall
from colo_xdp.datapath.image import INSTRUCTION
from colo_xdp.datapath.maps import Map, possible_cpus
from colo_xdp.datapath.source import Options

HASH, ARRAY, PERCPU_HASH, PERCPU_ARRAY, LRU_HASH = 1, 2, 5, 6, 9
Make = Callable[..., Map]


@pytest.fixture
def make() -> Iterator[Make]:
    fds = []

    def create(kind: int, key: int, value: int, entries: int) -> Map:
        fds.append(syscall.map_create(kind, key, value, entries, name="a_name_of_more_than_15"))
        return Map(fds[-1])

    yield create
    for fd in fds:
        os.close(fd)


def test_counters_of_another_release_are_not_taken_over(bpffs: Path) -> None:
    """`colo-xdp compile` has to say so before a controller is restarted for nothing."""
    reasons = abi.Prog.MAX * abi.Reason.MAX
    for entries in (reasons, reasons - abi.Prog.MAX):
        directory = bpffs / f"shape{entries}"
        directory.mkdir()
        fd = syscall.map_create(PERCPU_ARRAY, 4, abi.COUNT.size, entries, name="counters")
        try:
            syscall.obj_pin(fd, str(directory / "counters"))
        finally:
            os.close(fd)
        bad = loader.check_pins(str(directory), Options())
        loader.remove_pins(str(directory))
        assert [f"{entries} entries where" in text for text in bad] == [True] * (entries != reasons)


@pytest.mark.parametrize("kind", [HASH, LRU_HASH])
def test_a_hash_is_a_dictionary(make: Make, kind: int) -> None:
    table, model = make(kind, 6, 10, 1000), dict[bytes, bytes]()
    rng = random.Random(kind)
    for _ in range(2000):
        key, value = bytes([rng.randrange(50)]) * 6, rng.randbytes(10)
        action = rng.randrange(4)
        if action == 0:
            assert table.get(key) == model.get(key)
        elif action == 1:
            assert table.delete(key) is (model.pop(key, None) is not None)
        elif action == 2 and key in model:
            with pytest.raises(OSError) as e:
                table.set(key, value, new=True)
            assert e.value.errno == errno.EEXIST
        else:
            table.set(key, value, new=key not in model)
            model[key] = value
    assert dict(table.items()) == model and sorted(table.keys()) == sorted(model)
    assert len(list(table.keys(3))) == 3


def test_a_full_map_says_so(make: Make) -> None:
    table = make(HASH, 4, 4, 1)
    table.set(bytes(4), bytes(4))
    with pytest.raises(OSError) as e:
        table.set(b"1234", bytes(4))
    assert e.value.errno == errno.E2BIG


@pytest.mark.parametrize("kind", [PERCPU_HASH, PERCPU_ARRAY])
def test_a_value_for_each_cpu(make: Make, kind: int) -> None:
    table, cpus = make(kind, 4, 12, 2), possible_cpus()
    value = b"".join(struct.pack("=12s4x", b"of cpu %d" % i) for i in range(cpus))
    assert table.size == len(value)
    table.set(bytes(4), value)
    assert table.get(bytes(4)) == value


def test_what_has_another_size_is_refused_and_harms_nothing(make: Make) -> None:
    table = make(ARRAY, 4, 8, 2)
    table.set(bytes(4), b"abcdefgh")
    for key in (b"", bytes(3), bytes(5), bytes(400)):
        for call in (table.get, table.delete, lambda k: table.set(k, bytes(8))):
            with pytest.raises(ValueError, match="a key of"):
                call(key)
    for value in (b"", bytes(7), bytes(9), bytes(9000)):
        with pytest.raises(ValueError, match="a value of"):
            table.set(bytes(4), value)
    assert table.get(bytes(4)) == b"abcdefgh"
    assert table.get(b"\2\0\0\0") is None


def test_a_descriptor_that_is_no_map_is_an_error_not_an_absence(make: Make) -> None:
    table = make(HASH, 4, 4, 1)
    table._at.fd = table._after.fd = 99999
    for call in (
        lambda: table.get(bytes(4)), lambda: table.delete(bytes(4)), lambda: list(table.keys()),
    ):  # fmt: skip
        with pytest.raises(OSError) as e:
            call()
        assert e.value.errno == errno.EBADF


def test_threads_do_not_mix_up_their_entries(make: Make) -> None:
    """The event loop and the threads beside it share each Map."""
    table, wrong = make(HASH, 4, 64, 100), list[int]()

    def work(me: int) -> None:
        key, value = struct.pack("=I", me), bytes([me]) * 64
        for _ in range(3000):
            table.set(key, value)
            if table.get(key) != value or value != dict(table.items()).get(key):
                wrong.append(me)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(1, 5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert not wrong


def test_the_verifier_is_quoted() -> None:
    move = INSTRUCTION.pack(0xBF, 5 << 4, 0, 0)  # r0 = r5, which nobody has set
    with pytest.raises(syscall.Verifier) as e:
        syscall.prog_load(3, move + INSTRUCTION.pack(0x95, 0, 0, 0), "GPL", "bad")
    assert e.value.errno == errno.EACCES and "R5 !read_ok" in e.value.log


def test_a_program_has_its_name() -> None:
    two = INSTRUCTION.pack(0xB7, 0, 0, 2) + INSTRUCTION.pack(0x95, 0, 0, 0)
    fd = syscall.prog_load(3, two, "GPL", "a_name_of_more_than_15")
    try:
        assert syscall.prog_info(fd).name == "a_name_of_more_"
        assert syscall.test_run(fd, bytes(64)).retval == 2
    finally:
        os.close(fd)
