# SPDX-License-Identifier: GPL-2.0-or-later
"""Where compiled programs are kept: who is trusted, what is damaged, how much is kept."""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.datapath import cache, cache_dir, compiler
from colo_xdp.datapath.cache import Cache
from colo_xdp.datapath.image import Image, MapSpec, ProgramSpec
from colo_xdp.datapath.source import Source, Unfinished

SOURCE = Source("promoted", "text", (), ("promoted_in",), (), "ring")


def image_of(source: Source) -> Image:
    programs = tuple(
        ProgramSpec(name, 3, "GPL", bytes(8), ()) for name in (*source.tc, *source.xdp)
    )
    return Image(source.role, source.tag, "a test", (MapSpec("config", 2, 4, 8, 1, 0),), programs)


class Compiler:
    """Count what is compiled."""

    def __init__(self) -> None:
        self.made: list[Source] = []
        self.takes = 0.0

    def run(self, source: Source, *, nice: int = 0) -> Image:
        time.sleep(self.takes)
        self.made.append(source)
        return image_of(source)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Compiler:
    c = Compiler()
    monkeypatch.setattr(compiler, "run", c.run)
    return c


@pytest.fixture
def kept(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_was_compiled_once_is_not_compiled_again(kept: Cache, made: Compiler) -> None:
    first = kept.obtain(SOURCE)
    assert kept.obtain(SOURCE) == Cache(kept.where).obtain(SOURCE) == first
    assert made.made == [SOURCE]


@pytest.mark.parametrize(
    "other",
    [
        replace(SOURCE, text="other"), replace(SOURCE, flags=("-DX",)), replace(SOURCE, btf=True),
        replace(SOURCE, events="perf"), replace(SOURCE, tc=("promoted_out",)),
    ],
)  # fmt: skip
def test_what_differs_is_compiled(kept: Cache, made: Compiler, other: Source) -> None:
    kept.obtain(SOURCE)
    kept.obtain(other)
    assert made.made == [SOURCE, other] and kept.path(SOURCE) != kept.path(other)


def test_another_compiler_or_kernel_makes_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {SOURCE.tag}
    for name in ("release", "version", "machine"):
        with monkeypatch.context() as m:
            m.setattr(f"platform.{name}", lambda: "another")
            tags.add(SOURCE.tag)
    monkeypatch.setattr("colo_xdp.datapath.source.compiler", lambda: "another")
    assert len(tags | {SOURCE.tag}) == 5


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def _other(path: Path) -> None:
    source = replace(SOURCE, text="other")
    path.write_bytes(image_of(source).encode())


def _fewer(path: Path) -> None:
    path.write_bytes(replace(image_of(SOURCE), programs=()).encode())


def _link(path: Path) -> None:
    aside = path.with_suffix(".aside")
    path.rename(aside)
    path.symlink_to(aside)


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("harm", [_truncate, _flip, _other, _fewer, _link, _pipe])
def test_a_file_that_is_not_ours_is_replaced(
    kept: Cache, made: Compiler, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None]
) -> None:
    kept.obtain(SOURCE)
    harm(kept.path(SOURCE))
    assert kept.obtain(SOURCE) == image_of(SOURCE)
    assert len(made.made) == 2 and str(kept.path(SOURCE)) in caplog.text
    caplog.clear()
    assert kept.find(SOURCE) and not caplog.records


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_not_used(
    kept: Cache, made: Compiler, caplog: pytest.LogCaptureFixture, mode: int
) -> None:
    kept.obtain(SOURCE)
    kept.path(SOURCE).chmod(mode)
    assert kept.find(SOURCE) is None and f"writable for others ({mode:o})" in caplog.text


def test_a_directory_that_others_may_write_is_neither_read_nor_written(
    kept: Cache, made: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    kept.obtain(SOURCE)
    kept.where.chmod(0o777)
    other = replace(SOURCE, text="other")
    assert kept.obtain(SOURCE) and kept.obtain(other)
    assert made.made == [SOURCE, SOURCE, other] and not kept.path(other).exists()
    assert "nothing can be kept" in caplog.text


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a file away")
@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_belongs_to_another_user_is_not_used(
    kept: Cache, made: Compiler, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    kept.obtain(SOURCE)
    os.chown(kept.path(SOURCE) if what == "file" else kept.where, 12345, 12345)
    assert kept.find(SOURCE) is None and "belongs to user 12345" in caplog.text


def test_without_a_directory_everything_works(
    tmp_path: Path, made: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    none = Cache(tmp_path / "file/below")
    assert none.obtain(SOURCE) == none.obtain(SOURCE) == image_of(SOURCE)
    assert len(made.made) == 2 and "the next start compiles again" in caplog.text


def test_what_cannot_be_replaced_is_left(kept: Cache, made: Compiler) -> None:
    kept.obtain(SOURCE)
    _directory(kept.path(SOURCE))
    assert kept.obtain(SOURCE) == image_of(SOURCE)
    assert not [p for p in kept.where.iterdir() if p.name.startswith(".")], "no rest of it"


def test_the_latest_used_are_kept(
    kept: Cache, made: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    sources = [replace(SOURCE, text=str(i)) for i in range(5)]
    for i, source in enumerate(sources):
        kept.obtain(source)
        os.utime(kept.path(source), (1000 + i, 1000 + i))
        assert kept.find(sources[0]), "in use all the time"
    alive = [s.text for s in sources if kept.path(s).exists()]
    assert alive == ["0", "3", "4"]


def test_what_a_killed_writer_has_left_goes(kept: Cache, made: Compiler) -> None:
    kept.obtain(SOURCE)
    old, new, foreign = (kept.where / n for n in (".tmpold", ".tmpnew", "notes"))
    for path in (old, new, foreign):
        path.touch()
    os.utime(old, (1, 1))
    kept.obtain(replace(SOURCE, text="other"))
    assert (old.exists(), new.exists(), foreign.exists()) == (False, True, True)


def test_those_who_want_the_same_at_once_compile_once(kept: Cache, made: Compiler) -> None:
    made.takes = 0.2
    got: list[Image] = []
    threads = [
        threading.Thread(target=lambda: got.append(Cache(kept.where).obtain(SOURCE)))
        for _ in range(5)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join(20)
    assert got == [image_of(SOURCE)] * 5 and len(made.made) == 1


def test_a_compiler_that_hangs_is_not_waited_for(
    kept: Cache, made: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "WAIT_S", 0.1)
    kept.where.mkdir()
    with open(kept.where / "lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert kept.obtain(SOURCE) == image_of(SOURCE)
    assert made.made == [SOURCE]


def test_who_waits_for_an_image_does_not_wait_for_those_who_do_not(
    kept: Cache, made: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept.where.mkdir()
    monkeypatch.setattr(cache, "IDLE_WAIT_S", 0.0)
    with open(kept.where / "lock-idle", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(Unfinished, match="other pairs"):
            kept.obtain(SOURCE, nice=19)
        began = time.monotonic()
        assert kept.obtain(SOURCE) and time.monotonic() - began < cache.WAIT_S / 2
        assert kept.obtain(SOURCE, nice=19), "there is nothing to wait for"
    assert made.made == [SOURCE]


def test_the_log_says_what_was_compiled(
    kept: Cache, made: Compiler, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        kept.obtain(SOURCE)
        kept.obtain(SOURCE)
    assert caplog.text.count("compiled promoted.bpf.c in ") == 1


def test_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLO_XDP_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir.cache_dir() == Path("/var/cache/colo-xdp")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    assert Cache().where == Path("/home/me/.cache/colo-xdp")
    monkeypatch.setenv("COLO_XDP_CACHE", "/elsewhere")
    assert Cache().where == Path("/elsewhere")
