# SPDX-License-Identifier: GPL-2.0-or-later
"""The compiler as a process: what comes back of what it says, and of how it ends."""

from __future__ import annotations

import json
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.datapath import compiler, source
from colo_xdp.datapath.source import LoadError, NotCompiled, Refused, Source, Unfinished
from tests.unit.datapath.test_cache import image_of

SOURCE = Source("promoted", "text", (), ("promoted_in",), (), "ring")


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Provide a script that runs in place of Python."""
    path = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(path))
    return path


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_what_it_writes_is_the_image(child: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(image_of(SOURCE).encode())
    script(child, f"cat > {tmp_path}/in; echo chatter >&2; cat {tmp_path}/out")
    assert compiler.run(SOURCE, nice=1) == image_of(SOURCE)
    assert '"tc": ["promoted_in"]' in (tmp_path / "in").read_text()


@pytest.mark.parametrize("error", [LoadError, Refused, NotCompiled])
def test_its_errors_are_ours(child: Path, error: type[LoadError]) -> None:
    text = json.dumps({"error": error.__name__, "text": "install linux-headers-1"})
    script(child, f"cat > /dev/null; echo '{text}'; exit 1")
    with pytest.raises(error, match="^install linux-headers-1$") as e:
        compiler.run(SOURCE)
    assert type(e.value) is error


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("kill -9 $$", "the compiler ended with -9"),
        ("echo Traceback >&2; exit 1", "the compiler ended with 1\nTraceback"),
        ("echo '{}'; exit 1", "the compiler ended with 1"),
        ("echo '[]'; exit 1", "the compiler ended with 1"),
        ("echo nonsense", "what the compiler has written: 9 bytes are no compiled programs"),
        ("true", "what the compiler has written: 0 bytes"),
    ],
)
def test_an_end_without_a_word_is_said(child: Path, text: str, says: str) -> None:
    """And may be tried again; nothing less is loaded for it."""
    script(child, f"cat > /dev/null; {text}")
    with pytest.raises(Unfinished) as e:
        compiler.run(SOURCE)
    assert f"promoted.bpf.c: {says}" in str(e.value)


def test_it_has_a_deadline(child: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "DEADLINE_S", 0.2)
    script(child, "exec sleep 60")
    with pytest.raises(Unfinished, match="took more than"):
        compiler.run(SOURCE)


def test_its_version_is_known_without_it() -> None:
    """Loading it would cost 84 MiB in every controller."""
    before = "bcc" in sys.modules
    source.compiler.cache_clear()
    assert isinstance(source.compiler(), str)
    assert ("bcc" in sys.modules) is before


def test_nothing_in_the_current_directory_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m` looks there first, and root may be in anybody's directory."""
    for name in ("json", "ctypes", "colo_xdp"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError):
        compiler.run(replace(SOURCE, text="no program"))
    assert not (tmp_path / "ran").exists()
