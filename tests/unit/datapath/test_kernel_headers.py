# SPDX-License-Identifier: GPL-2.0-or-later
"""Which of the installed header packages is taken, in made-up trees with Debian's names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from colo_xdp.datapath import kernel_headers


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    src = tmp_path / "src"
    src.mkdir()
    monkeypatch.setattr(kernel_headers, "SOURCES", src)
    for name in ("MODULES", "IN_KERNEL"):
        monkeypatch.setattr(kernel_headers, name, tmp_path / "none")
    monkeypatch.delenv("BCC_KERNEL_SOURCE", raising=False)
    return src


def flavour(src: Path, name: str) -> None:
    (src / name / "include/generated").mkdir(parents=True)
    (src / name / "include/generated/autoconf.h").touch()


def common(src: Path, name: str) -> None:
    (src / name / "include/linux").mkdir(parents=True)
    (src / name / "include/linux/kconfig.h").touch()


@pytest.mark.parametrize(
    ("half", "other"),
    [
        ("linux-headers-6.1.0-13-amd64", "linux-headers-6.1.0-13-common"),
        ("linux-headers-6.1.0-13-cloud-amd64", "linux-headers-6.1.0-13-common"),
        ("linux-headers-6.1.0-13-rt-amd64", "linux-headers-6.1.0-13-common-rt"),
        ("linux-headers-6.12.111+deb12-amd64", "linux-headers-6.12.111+deb12-common"),
        ("linux-headers-6.12.111+deb12-cloud-amd64", "linux-headers-6.12.111+deb12-common"),
        ("linux-headers-6.12.9+bpo-rt-amd64", "linux-headers-6.12.9+bpo-common-rt"),
        ("linux-headers-6.9.7+bpo-arm64", "linux-headers-6.9.7+bpo-common"),
        ("linux-headers-6.12.43+deb13-amd64", "linux-headers-6.12.43+deb13-common"),
    ],
)
def test_both_halves_of_a_split_package(
    sources: Path, tmp_path: Path, half: str, other: str
) -> None:
    flavour(sources, half)
    common(sources, other)
    common(sources, "linux-headers-6.1.0-1-common")  # of another kernel
    found = kernel_headers.find(tmp_path / "cache")
    assert found.origin == f"{sources / half} + {sources / other}"
    assert found.path is not None
    assert (Path(found.path) / "include/linux/kconfig.h").exists()
    assert (Path(found.path) / "include/generated/autoconf.h").exists()


def test_the_newest_whole_tree_wins_and_half_ones_do_not_count(
    sources: Path, tmp_path: Path
) -> None:
    for name in ("6.1.0-56-amd64", "6.12.111+deb12-amd64", "6.13.1+deb12-amd64"):
        flavour(sources, f"linux-headers-{name}")
    common(sources, "linux-headers-6.1.0-56-common")
    assert "6.1.0-56" in kernel_headers.find(tmp_path / "cache").origin
    common(sources, "linux-headers-6.12.111+deb12-common")
    assert "6.12.111+deb12" in kernel_headers.find(tmp_path / "cache").origin


def test_a_tree_that_is_not_split_is_taken_as_it_is(sources: Path) -> None:
    name = "linux-headers-6.8.0-41-generic"
    flavour(sources, name)
    common(sources, name)
    assert kernel_headers.find() == kernel_headers.Headers(str(sources / name), str(sources / name))


def test_none_at_all_names_the_package(sources: Path) -> None:
    flavour(sources, "linux-headers-6.12.111+deb12-amd64")
    with pytest.raises(kernel_headers.NoHeaders, match="install linux-headers-"):
        kernel_headers.find()


@pytest.mark.parametrize("harm", ["mode", "owner", "link"])
def test_a_view_that_others_may_change_is_not_used(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    """The programs would be compiled from what somebody else has put there."""
    flavour(sources, "linux-headers-6.1.0-13-amd64")
    common(sources, "linux-headers-6.1.0-13-common")
    cache = tmp_path / "cache"
    monkeypatch.setenv("COLO_XDP_CACHE", str(cache))
    usual = Path(kernel_headers.find().path or "")
    assert cache in usual.parents
    if harm == "mode":
        cache.chmod(0o777)
    elif harm == "owner":
        if os.geteuid():
            pytest.skip("gives a directory away")
        os.chown(cache / "headers", 12345, 12345)
    else:
        (cache / "headers").rename(tmp_path / "theirs")
        (cache / "headers").symlink_to(tmp_path / "theirs")
        os.chown(cache / "headers", os.geteuid(), -1, follow_symlinks=False)
    found = Path(kernel_headers.find().path or "")
    assert not {cache, tmp_path / "theirs"} & {*found.parents}
    assert (found / "include/linux/kconfig.h").exists()
    assert found.parent.stat().st_mode & 0o777 == 0o700
