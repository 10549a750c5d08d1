# SPDX-License-Identifier: GPL-2.0-or-later
"""What is compiled when: once for all NICs, pairs, roles and starts of a host."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.abi import Mode
from colo_xdp.config.file import as_toml
from colo_xdp.datapath import compiler, programs
from colo_xdp.datapath.cache import Cache
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.host import HostDataPath
from colo_xdp.datapath.image import Image
from colo_xdp.datapath.source import Source
from colo_xdp.tools import cleanup
from tests.netns import test_nics, test_secondary_path
from tests.netns.conftest import Net, inside, own
from tests.netns.test_nics import two  # noqa: F401
from tests.netns.test_secondary_path import Host

pytestmark = pytest.mark.usefixtures("no_reuse")


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Provide an empty cache, and the roles whose programs are compiled."""
    monkeypatch.setenv("COLO_XDP_CACHE", str(tmp_path / "cache"))
    roles: list[str] = []
    run = compiler.run

    def counted(source: Source, *, nice: int = 0) -> Image:
        roles.append(source.role)
        return run(source, nice=nice)

    monkeypatch.setattr(compiler, "run", counted)
    return roles


def test_one_run_of_the_compiler_serves_every_nic_start_and_pair(
    two: Net,  # noqa: F811
    tmp_path: Path,
    compiled: list[str],
) -> None:
    config = test_nics.config(tmp_path, "lan", "san")

    def start(name: str, memory: int) -> list[dict[str, str]]:
        d = replace(config.datapath, ring_pages=memory)
        dp = HostDataPath.load(replace(config, pair=name, datapath=d))
        tags = [{p.name: p.tag for p in nic.objects.programs.values()} for nic in dp.nics]
        assert not dp.nics[0].objects.warm
        dp.close(detach=True)
        cleanup.cleanup(name, "/sys/fs/bpf", str(tmp_path), force=True)
        return tags

    first = start(config.pair, 64)
    assert compiled == ["primary"] and first[0] == first[1]
    assert start(config.pair, 64) == start(own("nsr"), 128) == first
    assert compiled == ["primary"]
    (image,) = (tmp_path / "cache").glob("*.image")
    raw = bytearray(image.read_bytes())
    raw[len(raw) // 2] ^= 1
    image.write_bytes(raw)
    assert start(config.pair, 64) == first, "compiled anew"
    assert compiled == ["primary"] * 2 and bytes(raw) != image.read_bytes()


@pytest.fixture
def survivor(tmp_path: Path, compiled: list[str]) -> Iterator[Host]:
    h = Host(own("cxp"), tmp_path, True)
    yield h
    h.close()


def test_a_change_of_roles_waits_for_no_compiler(survivor: Host, compiled: list[str]) -> None:
    h = survivor
    assert compiled == ["secondary"]
    config = test_secondary_path.config(h.tmp)
    with inside(h.net.host):
        filled = list(programs.fill(config))
    assert [(f.role, f.seconds == 0) for f in filled] == [
        ("secondary", True), ("primary", False), ("promoted", False),
    ]  # fmt: skip
    assert compiled == ["secondary", "primary", "promoted"]
    h.dp.mode, h.dp.epoch = Mode.RUN, 5
    h.handshake()
    h.dp.mode = Mode.TAKEOVER
    with inside(h.net.host):
        h.dp.open_network()
    h.dp.change_role()
    h.dp.close()
    with inside(h.net.host):
        h.dp = DataPath(config)
    assert h.dp.role == "primary" and h.dp.guest is not None
    assert len(compiled) == 3


def test_two_processes_that_compile_at_once_end_well(net: Net, tmp_path: Path) -> None:
    path = tmp_path / "pair.toml"
    path.write_text(as_toml(test_secondary_path.config(tmp_path)))
    environment = os.environ | {"COLO_XDP_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "colo_xdp.cli", "compile", str(path)]
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    said = [p.communicate(timeout=150)[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], said
    assert all(text.count("compiled ") == 3 for text in said)
    cache = Cache(tmp_path / "cache")
    found = programs.wanted(test_secondary_path.config(tmp_path))
    assert len(found) == 3 and all(cache.find(s) for s in found)
