# SPDX-License-Identifier: GPL-2.0-or-later
"""The man pages have every command, option and key, and roff has nothing to say against them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from typer.models import OptionInfo

from colo_xdp import cli, validate
from tests.docs import man
from tests.docs.generate import TABLES, commands, option_names, parameters


def plain(page: str) -> str:
    """What roff would show, roughly."""
    return re.sub(r"\\f[BIR]|\\&", "", page).replace("\\-", "-").replace("\\(dq", '"')


def test_every_command_with_its_options_and_exit_codes() -> None:
    text = plain(man.commands())
    sections = {s.split('"')[0].split(" [")[0]: s for s in text.split('\n.SS "')[1:]}
    for path, callback in commands():
        words = path.removeprefix("colo-xdp ")
        (section,) = (
            s for head, s in sections.items() if re.match(rf"{words}(?=$| [A-Z\[-])", head)
        )
        for name, kind, info, _ in parameters(callback):
            wanted = (
                option_names(name, kind, info) if isinstance(info, OptionInfo) else [name.upper()]
            )
            for n in wanted:
                assert re.search(rf"^(.*, )?{re.escape(n)}([ ,]|$)", section, re.M), (path, n)
    codes = text.split(".SH EXIT STATUS")[1]
    assert all(f".TP\n{code}\n" in codes for code in cli.EXIT_CODES)
    assert "--version" in text and "colo-xdp.toml (5)" in text


def test_every_key_of_the_configuration() -> None:
    text = plain(man.configuration())
    for name, cls in TABLES.items():
        (section,) = re.findall(rf'^\.SS "\[+{name}\]+"\n(.*?)(?=^\.S[SH] )', text, re.M | re.S)
        assert set(re.findall(r"^\.TP\n(\w+)\n", section, re.M)) == set(validate.keys(cls))


def test_the_page_is_as_old_as_its_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    assert man.commands().startswith(".TH COLO-XDP 8 2023-11-14 ")


@pytest.mark.parametrize(
    "text", [".B is no macro here", "'neither\nthis", 'a "b" \\n c -- d', "`code`: it's -x"]
)
def test_text_is_no_markup(text: str) -> None:
    got = man.escaped(text)
    assert not re.search(r"^[.']", got, re.M) and "-" not in got.replace("\\-", "")


@pytest.mark.skipif(not shutil.which("groff"), reason="no groff")
def test_roff_has_nothing_to_say(tmp_path: Path) -> None:
    man.main(tmp_path)
    for name in man.PAGES:
        r = subprocess.run(
            ["groff", "-man", "-ww", "-z", "-Tutf8", "-Kutf8", str(tmp_path / name)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert not r.stderr
