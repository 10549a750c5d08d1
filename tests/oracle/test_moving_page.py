# SPDX-License-Identifier: GPL-2.0-or-later
"""docs/operator/moving.md: QEMU's properties are all there, and what it names of ours exists."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest

from colo_xdp import validate
from colo_xdp.cli import app
from colo_xdp.setup import libvirt_domain
from tests.docs.generate import TABLES

from . import qemu

PAGE = Path(__file__).parents[2] / "docs/operator/moving.md"
OBJECTS = ("colo-compare", "filter-mirror", "filter-redirector", "filter-rewriter")
#: of docs/COLO-FT.txt
DOCUMENTED = (
    "x-checkpoint-delay", "x-colo", "x-colo-lost-heartbeat", "nbd-server-start", "nbd-server-add",
    "x-blockdev-change", "query-colo-status", "migrate", "quorum", "replication", "-incoming",
    "-chardev", "iothread1", "drive-mirror",
)  # fmt: skip


def section(title: str) -> str:
    return PAGE.read_text().split(f"\n### {title}\n")[1].split("\n#")[0]


def listed(title: str) -> set[str]:
    rows = [x.split("|")[1] for x in section(title).splitlines() if x.startswith("| `")]
    return {name for cell in rows for name in re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("word", DOCUMENTED)
def test_what_qemu_documents_is_on_the_page(word: str) -> None:
    assert word in PAGE.read_text()


def test_the_keys_that_it_names_exist() -> None:
    keys = {f"{t}.{k}" for t, cls in TABLES.items() for k in validate.keys(cls)}
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", PAGE.read_text()))
    assert len(named) > 20
    assert named - keys == set()


def test_the_defaults_that_it_repeats_are_the_same() -> None:
    page = section("colo-compare")
    for key, cls in (("compare_timeout", "compare"), ("expired_scan_cycle", "compare"),
                     ("max_queue_size", "compare")):  # fmt: skip
        (row,) = (x for x in page.splitlines() if x.startswith(f"| `{key}`"))
        default = validate.keys(TABLES[cls])[key].default
        assert f"default ({default})" in row, row


def test_the_commands_that_it_names_exist() -> None:
    names = {c.name or (c.callback.__name__ if c.callback else "") for c in app.registered_commands}
    named = set(re.findall(r"colo-xdp ([a-z][a-z-]+)", PAGE.read_text()))
    assert len(named) > 6 and named - names == set()


def _properties() -> dict[str, set[str]]:
    """Ask a QEMU that has each object what it consists of.

    Not qom-list-properties, nor `-object colo-compare,help`: the first makes QEMU 7.2 abort, the
    second lists nothing.
    """
    arguments = [
        "-M", "pc", "-accel", "tcg", "-m", "16", "-S", "-qmp", "unix:qmp,server=on,wait=off",
        "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=net",
        "-device", "rtl8139,netdev=n,romfile=", "-object", "iothread,id=io",
        "-object", "colo-compare,id=colo-compare,primary_in=p,secondary_in=s,outdev=o,iothread=io",
        "-object", "filter-mirror,id=filter-mirror,netdev=n,outdev=m",
        "-object", "filter-redirector,id=filter-redirector,netdev=n,outdev=r",
        "-object", "filter-rewriter,id=filter-rewriter,netdev=n",
    ]  # fmt: skip
    with qemu.running(arguments, "psomr", ["qmp"]) as ch:
        qemu.ask(ch["qmp"], "qmp_capabilities")
        return {
            name: {p["name"] for p in qemu.ask(ch["qmp"], "qom-list", path=f"/objects/{name}")}
            - {"type"}
            for name in OBJECTS
        }


def test_its_domain_is_one_for_init_and_needs_no_bridge() -> None:
    (xml,) = re.findall(r"```xml\n(.*?)```", PAGE.read_text(), re.S)
    g = libvirt_domain.guest("web1", xml)
    assert [(n.tap, n.bridge, n.mac) for n in g.nics] == [("tap-web1", "", "52:54:00:12:34:56")]
    assert (g.memory, g.cpus, g.machine) == (4096, 2, "pc")


@pytest.mark.e2e
def test_each_property_of_qemus_objects_is_on_the_page() -> None:
    if shutil.which(qemu.QEMU) is None:
        assert not os.environ.get("CI"), "no QEMU here"
        pytest.skip(f"{qemu.QEMU} is not installed")
    assert {name: listed(name) for name in OBJECTS} == _properties()
