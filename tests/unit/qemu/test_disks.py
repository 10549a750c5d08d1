# SPDX-License-Identifier: GPL-2.0-or-later
"""Which disks are refused: `query-block` of QEMU 7.2, a QEMU with real drives, the config."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.config.file import ConfigError, as_toml, parse
from colo_xdp.qemu import disks
from colo_xdp.qemu.qmp import Qmp, QmpError, refusal
from colo_xdp.tools.findings import FAIL, OK, WARN
from colo_xdp.tools.guest_checks import replicated

EXAMPLE = (Path(__file__).parents[3] / "deploy/examples/primary.toml").read_text()


def drive(device: str, qdev: str, node: str = "", ro: bool = False, file: str = "") -> Any:
    entry: dict[str, Any] = {"device": device, "qdev": qdev, "removable": False}
    if node:
        entry["inserted"] = {"node-name": node, "ro": ro, "drv": "raw", "file": file}
    return entry


BLOCKS = [
    drive("d0", "/machine/peripheral/vd0/virtio-backend", "#block126", file="/a/d.qcow2"),
    drive("", "/machine/peripheral/vd1/virtio-backend", "n1", file="/a/n1.raw"),
    drive("ide0-cd0", "/machine/unattached/device[18]", "#block550", ro=True, file="/a/cd.iso"),
    drive("ide0-cd1", "/machine/unattached/device[19]"),
    drive("pflash1", "/machine/system.flash1", "#block379", file="/a/vars.fd"),
    drive("", "/machine/system.flash1", "p1", file="/a/vars.fd"),
]


def test_only_what_is_writable_and_undeclared_is_named() -> None:
    found = disks.uncovered(BLOCKS, ())
    assert len(found) == 2
    assert "d0" in found[0] and "#block126" in found[0] and "/a/d.qcow2" in found[0]
    assert "n1" in found[1] and "/a/n1.raw" in found[1]
    why = disks.refusal(BLOCKS, ("d0",))
    assert "n1" in why and "d.qcow2" not in why and "[[disk]]" in why


@pytest.mark.parametrize("names", [("d0", "n1"), ("vd0", "vd1"), ("#block126", "vd1")])
def test_a_disk_has_several_names(names: tuple[str, ...]) -> None:
    assert not disks.refusal(BLOCKS, names)
    assert not disks.missing(BLOCKS, names)


def test_a_name_that_qemu_does_not_know() -> None:
    assert disks.missing(BLOCKS, ("d0", "d1")) == ["d1"]
    assert disks.uncovered([], ()) == [] and disks.uncovered(None, ()) == []


def test_the_config_declares_them() -> None:
    text = EXAMPLE + '\n[[disk]]\nname = "drive0"\nexternal = true\n'
    c = parse(text)
    assert c.external_disks == ("drive0",)
    assert parse(as_toml(c)) == c
    assert parse(EXAMPLE).differences(c) == ["disk"]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('name = "a"\nexternal = false', 'overlays = "": required'),
        ('name = "a"\nexternal = 3', "expected true or false"),
        ('name = "a"\noverlays = "/o"', '\\[nbd\\] local = "": required'),
        ('name = "a"\noverlays = "/o"\nexternal = true', "only without external"),
        ('name = "a"\noverlays = "o"', "absolute path"),
        ("external = true", "name is missing"),
        ('name = "a"\nexternal = true\n[[disk]]\nname = "a"\nexternal = true', "of its own"),
        ('nam = "a"\nexternal = true', "did you mean 'name'"),
    ],
)
def test_mistakes_are_named(body: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        parse(f"{EXAMPLE}\n[[disk]]\n{body}\n")
    with pytest.raises(ConfigError, match=r"\[\[disk\]\]"):
        parse(f"disk = 3\n{EXAMPLE}")


NBD = '[nbd]\nlocal = "10.0.0.1:10809"\nremote = "10.0.0.2:10809"\n'


def test_a_replicated_disk_needs_a_server_and_a_way_past_a_hanging_qemu() -> None:
    example = 'qmp_oob = "/run/oob"\nqmp ='.join(EXAMPLE.split("qmp =", 1))
    text = f'{example}\n{NBD}[[disk]]\nname = "d0"\noverlays = "/var/lib/o"\n'
    c = parse(text)
    assert [d.name for d in c.replicated_disks] == ["d0"] and not c.external_disks
    assert parse(as_toml(c)) == c
    with pytest.raises(ConfigError, match="another address than local"):
        parse(text.replace("10.0.0.2:10809", "10.0.0.1:10809"))
    no_way = "\n".join(x for x in text.splitlines() if not x.startswith("qmp_oob"))
    with pytest.raises(ConfigError, match="only this socket ends that"):
        parse(no_way)


def test_names_of_nodes_fit_into_qemu_and_do_not_depend_on_the_order() -> None:
    assert disks.Nodes.of("d0").active == "colo-d0-active"
    for name in ("d0", "x" * 255, "#block126", "/machine/peripheral/vd0/virtio-backend", "a.b_c-9"):
        n = disks.Nodes.of(name)
        for node in (n.replication, n.active, n.hidden, n.target):
            assert len(node) <= 31 and node[0].isalpha(), node
    assert disks.Nodes.of("#block126") != disks.Nodes.of("block126")


def test_doctor_says_which() -> None:
    c = parse(EXAMPLE + "".join(f'\n[[disk]]\nname = "{n}"\nexternal = true' for n in ("d0", "d7")))
    found = [(f.key, f.level, f.text) for f in replicated(c, BLOCKS)]
    assert [f[:2] for f in found] == [("disk", FAIL), ("disk", WARN)]
    assert "n1" in found[0][2] and "d7" in found[1][2]
    assert [f.level for f in replicated(parse(EXAMPLE), BLOCKS[2:])] == [OK]


QEMU = shutil.which("qemu-system-x86_64")


@pytest.mark.skipif(QEMU is None and not os.environ.get("CI"), reason="no QEMU")
def test_a_real_qemu_tells(tmp_path: Path) -> None:
    for name in ("d.raw", "n.raw", "cd.raw", "code.fd", "vars.fd"):
        (tmp_path / name).write_bytes(bytes(528 << 10))
    args = [
        "-drive", f"file={tmp_path}/d.raw,format=raw,if=none,id=d0",
        "-device", "virtio-blk-pci,drive=d0",
        "-blockdev", f"driver=file,filename={tmp_path}/n.raw,node-name=n1",
        "-device", "virtio-blk-pci,drive=n1,id=vd1",
        "-drive", f"file={tmp_path}/cd.raw,format=raw,if=ide,media=cdrom",
        "-drive", "if=ide,media=cdrom",
        "-drive", f"if=pflash,unit=0,readonly=on,format=raw,file={tmp_path}/code.fd",
        "-drive", f"if=pflash,unit=1,format=raw,file={tmp_path}/vars.fd",
    ]  # fmt: skip

    async def ask(q: Qmp) -> tuple[Any, str | None]:
        end = asyncio.get_running_loop().time() + 20
        while True:
            try:
                info = await q.connect()
                break
            except QmpError:
                if asyncio.get_running_loop().time() > end:
                    raise
                await asyncio.sleep(0.05)
        try:
            return await q.execute("query-block"), refusal(info)
        finally:
            await q.close()

    for machine, refused in (("pc", False), ("q35", True)):
        sock = tmp_path / f"{machine}.sock"
        p = subprocess.Popen(
            [QEMU or "", "-M", machine, "-S", "-nodefaults", "-nographic", "-m", "32",
             "-qmp", f"unix:{sock},server=on,wait=off", *args]
        )  # fmt: skip
        try:
            q = Qmp(str(sock), "PVM", 5, lambda e: None, lambda why: None)
            blocks, why = asyncio.run(ask(q))
        finally:
            p.terminate()
            p.wait(10)
        found = disks.uncovered(blocks, ())
        assert [f.split(" ")[1] for f in found] == ["d0", "n1"], found
        assert not disks.refusal(blocks, ("d0", "vd1"))
        if refused and p.args:
            assert why is None or "q35" in why
            version = subprocess.run([QEMU or "", "--version"], capture_output=True, text=True)
            old = int(version.stdout.split("version ")[1].split(".")[0]) < 11
            assert (why is not None) == old
        else:
            assert why is None


def mirror(job: str, done: int, total: int) -> disks.Mirror:
    return disks.Mirror(job, done, total, True, "")


def test_a_wait_begins_where_nothing_ends_any_more() -> None:
    w = disks.Waits()
    assert w.longest(1.0) == ("", 0.0)
    w.saw([mirror("a", 5, 5), mirror("b", 5, 9)], 1.0)
    w.saw([mirror("a", 5, 6), mirror("b", 5, 12)], 2.0)
    assert w.longest(3.0) == ("b", 2.0), "further writes are no end of the first"
    w.saw([mirror("a", 5, 6), mirror("b", 6, 12)], 3.0)
    assert w.longest(3.5) == ("a", 1.5), "one has ended"
    w.saw([mirror("a", 6, 6)], 4.0)
    assert w.longest(9.0) == ("", 0.0)
