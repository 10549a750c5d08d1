# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp compile`, `doctor`'s line about it, and the same in the background of a controller."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from colo_xdp import cli
from colo_xdp.config.file import Config, load
from colo_xdp.datapath import compiler, devices, loader, programs
from colo_xdp.datapath.image import Image
from colo_xdp.datapath.source import LoadError, NotCompiled, Options, Refused, Source
from colo_xdp.tools import doctor
from tests.unit.datapath.test_cache import image_of

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"
PRIMARY, SECONDARY = EXAMPLES / "primary.toml", EXAMPLES / "secondary.toml"
Run = Callable[..., Image]


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Source, int]]:
    """Provide what is compiled, at which niceness, on a host without devices and privileges."""
    out: list[tuple[Source, int]] = []

    def run(source: Source, *, nice: int = 0) -> Image:
        out.append((source, nice))
        return image_of(source)

    def absent(name: str) -> devices.LinkInfo:
        raise devices.NoSuchDevice(name)

    monkeypatch.setenv("COLO_XDP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(compiler, "run", run)
    monkeypatch.setattr(devices, "link_info", absent)
    monkeypatch.setattr(loader, "ring_supported", lambda: True)
    return out


def test_a_host_has_every_role_compiled_its_own_first(made: list[tuple[Source, int]]) -> None:
    run = CliRunner().invoke
    r = run(cli.app, ["compile", str(SECONDARY)])
    assert r.exit_code == 0 and r.output.count("compiled in") == 3
    assert [s.role for s, _ in made] == ["secondary", "primary", "promoted"]
    r = run(cli.app, ["compile", str(PRIMARY), str(SECONDARY)])
    assert r.exit_code == 0 and r.output.count("compiled before") == 6, "one host's serve another's"
    assert len(made) == 3


def test_all_pairs_are_the_default(
    made: list[tuple[Source, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli.target, "CONFIG_DIR", str(tmp_path))
    assert CliRunner().invoke(cli.app, ["compile"]).exit_code == cli.USAGE
    (tmp_path / "web1.toml").write_text(PRIMARY.read_text())
    r = CliRunner().invoke(cli.app, ["compile"])
    assert r.exit_code == 0 and "web1 primary: compiled in" in r.output


def test_what_was_compiled_and_not_kept_is_no_success(
    made: list[tuple[Source, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk, for example: who compiles ahead of a restart must know that it was in vain."""
    monkeypatch.setenv("COLO_XDP_CACHE", "/dev/null/cache")
    r = CliRunner().invoke(cli.app, ["compile", str(PRIMARY)])
    assert r.exit_code == cli.FAILED and "compiled, but not kept: /dev/null/cache" in r.output


def test_pins_that_a_restarted_controller_could_not_take_over(
    made: list[tuple[Source, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upgrade must not stop a controller whose successor would refuse to start."""

    def check(directory: str, options: Options) -> list[str]:
        return [f"{directory}/flows: {options.flow_table} entries"]

    monkeypatch.setattr(loader, "check_pins", check)
    r = CliRunner().invoke(cli.app, ["compile", str(PRIMARY)])
    assert r.exit_code == cli.FAILED and "could not take over" in r.output
    assert "/sys/fs/bpf/colo-xdp/web1-primary/flows: 65536 entries" in r.output


def test_what_cannot_be_compiled_is_said(
    made: list[tuple[Source, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(source: Source, *, nice: int = 0) -> Image:
        raise LoadError("no kernel headers for 1.2.3")

    monkeypatch.setattr(compiler, "run", run)
    r = CliRunner().invoke(cli.app, ["compile", str(PRIMARY)])
    assert r.exit_code == cli.FAILED and f"{PRIMARY}: no kernel headers for 1.2.3" in r.output


def config(path: Path = PRIMARY) -> Config:
    return load(path)


def test_nics_share_an_image_and_both_hooks_are_made_where_both_are_used() -> None:
    c = config(SECONDARY)
    nics = (replace(c.network, name="san", tap="tap1", peer_link="peer1", hook="xdp"),)
    two = replace(c, further=nics)
    roles = [s.role for s in programs.wanted(two)]
    assert roles == ["secondary", "secondary", "primary", "promoted"]
    xdp = [bool(s.xdp) for s in programs.wanted(two)]
    assert xdp == [False, True, False, False]
    assert len(programs.wanted(replace(two, further=(replace(nics[0], hook="tc"),)))) == 3


@pytest.mark.parametrize("error", [Refused, NotCompiled])
def test_a_kernel_without_usable_structs_gets_its_programs_too(
    made: list[tuple[Source, int]], monkeypatch: pytest.MonkeyPatch, error: type[Refused]
) -> None:
    monkeypatch.setattr("colo_xdp.datapath.btf.why_not", lambda: "")
    real = compiler.run

    def run(source: Source, *, nice: int = 0) -> Image:
        if source.btf:
            raise error("sk_buff has no member csum_start")
        return real(source, nice=nice)

    monkeypatch.setattr(compiler, "run", run)
    if error is NotCompiled:
        with pytest.raises(NotCompiled):
            list(programs.fill(config()))
    else:
        assert len(list(programs.fill(config()))) == 3


def test_the_background_disturbs_nobody(
    made: list[tuple[Source, int]], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    programs.fill_quietly(config())
    assert [nice for _, nice in made] == [programs.NICE] * 3

    def run(source: Source, *, nice: int = 0) -> Image:
        raise LoadError("the Python module bcc is missing\nand more")

    monkeypatch.setattr(compiler, "run", run)
    c = config()
    programs.fill_quietly(replace(c, datapath=replace(c.datapath, fast_path="off")))
    (record,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert record.message.endswith("when it is taken: the Python module bcc is missing")


def test_doctor_says_who_would_have_to_wait(made: list[tuple[Source, int]]) -> None:
    check = doctor._compiled(config())
    assert check.level == doctor.WARN and "primary, promoted, secondary" in check.text
    list(programs.fill(config()))
    assert doctor._compiled(config()).level == doctor.OK
