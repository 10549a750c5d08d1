# SPDX-License-Identifier: GPL-2.0-or-later
"""Test how the lab's results are renewed, and that its check of an image finds what is wrong."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import pytest

from colo_xdp.lab import debian, disk, ext4
from colo_xdp.lab.debian import Packages
from colo_xdp.lab.net import LabError

TOOLS = [t for t in ("mke2fs", "e2fsck", "debugfs", "dumpe2fs", "qemu-img") if not shutil.which(t)]
needs_tools = pytest.mark.skipif(bool(TOOLS), reason=f"not installed: {', '.join(TOOLS)}")
HERE = "mnt/vda"
LAST = 40


def test_a_result_is_made_once_for_the_same_inputs(tmp_path: Path) -> None:
    result = tmp_path / "image"
    assert not debian.fresh(result, "a")
    debian.renew(result, "a", lambda part: part.write_text("1") and None)
    assert debian.fresh(result, "a") and result.read_text() == "1"
    assert not debian.fresh(result, "b")
    result.unlink()
    assert not debian.fresh(result, "a")


def test_a_result_that_fails_is_not_there(tmp_path: Path) -> None:
    result = tmp_path / "root"
    result.mkdir()
    (result / "old").touch()

    def fails(part: Path) -> None:
        part.mkdir()
        raise LabError("no network")

    with pytest.raises(LabError):
        debian.renew(result, "a", fails)
    assert not result.exists() and not debian.fresh(result, "a")
    debian.renew(result, "a", Path.mkdir)  # what the failed one has left is in nobody's way
    assert debian.fresh(result, "a") and not list(result.iterdir())


@pytest.mark.parametrize(
    "other",
    [Packages(("a", "b")), Packages(("a",), variant="essential"), Packages(("a",), left_out=())],
)
def test_a_root_is_built_anew_when_any_of_its_inputs_changes(other: Packages) -> None:
    assert Packages(("a",)).digest == Packages(("a",)).digest != other.digest


def image(tmp_path: Path) -> Path:
    """Return an image on which the guest has written all records up to LAST."""
    root = tmp_path / "root"
    (root / HERE).mkdir(parents=True)
    log, data = bytearray((LAST + 1) * disk.RECORD), bytearray(disk.BLOCKS * disk.BLOCK)
    for n in range(1, LAST + 1):
        log[n * disk.RECORD : (n + 1) * disk.RECORD] = b"%015d\n" % n
        words = [n, *(disk._mix((n * 1024 + i) & 0xFFFFFFFF) for i in range(1, 1024))]
        at = disk._mix(n) % disk.BLOCKS * disk.BLOCK
        data[at : at + disk.BLOCK] = struct.pack("<1024I", *words)
    (root / HERE / "log").write_bytes(log)
    (root / HERE / "data").write_bytes(data)
    out = tmp_path / "d0.qcow2"
    ext4.make_image(root, out, 32)
    return out


@needs_tools
def test_records_are_found_below_a_directory_of_a_root(tmp_path: Path) -> None:
    found = disk.check(image(tmp_path), range(1, LAST + 1), "/" + HERE)
    assert found.good and found.clean


@needs_tools
def test_what_was_acknowledged_and_is_not_there_is_lost(tmp_path: Path) -> None:
    found = disk.check(image(tmp_path), range(1, LAST + 3), "/" + HERE)
    assert found.lost == [LAST + 1, LAST + 2] and not found.good
    assert len(found.wrong_blocks) == 2


@needs_tools
def test_an_image_without_the_records_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no file /log"):
        disk.check(image(tmp_path), [1])


def tree(root: Path, names: list[str]) -> Path:
    (root / "etc").mkdir(parents=True)
    for name in names:
        (root / "etc" / name).write_text(name)
    (root / "etc/a").chmod(0o4711)
    (root / "lib").symlink_to("usr/lib")
    return root


def test_what_debugfs_is_told_has_one_order_and_one_time(tmp_path: Path) -> None:
    one = list(ext4.commands(tree(tmp_path / "x", ["a", "b b"])))
    two = list(ext4.commands(tree(tmp_path / "y", ["b b", "a"])))
    assert [c.replace(f"{tmp_path}/y", f"{tmp_path}/x") for c in two] == one
    assert one[:3] == ['cd "/"', 'mkdir "etc"', 'sif "etc" mode 040755']
    assert 'sif "a" mode 0104711' in one and 'symlink "lib" "usr/lib"' in one
    assert f'write "{tmp_path}/x/etc/b b" "b b"' in one
    assert f'sif "b b" ctime @{ext4.TIME}' in one


def test_a_file_that_debugfs_cannot_be_told_of_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'a"b').touch()
    with pytest.raises(LabError, match="cannot be told"):
        list(ext4.commands(tmp_path))


@needs_tools
def test_an_image_is_the_same_byte_for_byte(tmp_path: Path) -> None:
    images = [tmp_path / "1.qcow2", tmp_path / "2.qcow2"]
    for i, names in enumerate((["a", "b b"], ["b b", "a"])):
        ext4.make_image(tree(tmp_path / str(i), names), images[i], 16)
    assert images[0].read_bytes() == images[1].read_bytes()


@needs_tools
def test_an_image_that_is_too_small_is_an_error(tmp_path: Path) -> None:
    root = tree(tmp_path / "root", ["a"])
    (root / "etc/large").write_bytes(bytes(range(256)) * (6 << 12))
    with pytest.raises(LabError, match="debugfs"):
        ext4.make_image(root, tmp_path / "image", 4)
