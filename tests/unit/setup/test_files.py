# SPDX-License-Identifier: GPL-2.0-or-later
"""The files of a pair: what the documents demand of them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.setup.files import commands, configs, host_files, notes

from .pairs import made


def files(role: str = "primary", **changes: Any) -> dict[str, str]:
    return {f.path: f.text for f in host_files(made(**changes), role, {}).files}


def test_a_pair_has_certificates_in_a_directory_of_its_own() -> None:
    found = host_files(made(), "secondary", {"secondary.key": "KEY"}).files
    keys = {f.path: f for f in found if "/etc/colo-xdp/web1/" in f.path}
    assert keys["/etc/colo-xdp/web1/secondary.key"].mode == 0o600
    assert keys["/etc/colo-xdp/web1/secondary.key"].text == "KEY"
    assert "/etc/colo-xdp/web1/ca.crt" in keys and "/etc/colo-xdp/web1/primary.key" not in keys


def test_comments_are_the_schemas_own() -> None:
    text = files()["/etc/colo-xdp/web1.toml"]
    assert "# Address of this controller; the secondary listens on it.\nlocal = " in text
    keys = [line for line in text.splitlines() if " = " in line and line[0] != "#"]
    before = re.findall(r"^#.*\n(?=[a-z_]+ = )", text, re.M)
    assert len(before) == len(keys)


def test_the_tap_is_persistent_and_in_no_bridge() -> None:
    found = files(queues="4", qemu_user="libvirt-qemu")
    dev = found["/etc/systemd/network/30-colo-xdp.web1.tap-web1.netdev"]
    assert "VNetHeader=yes\nMultiQueue=yes\nUser=libvirt-qemu\n" in dev
    net = found["/etc/systemd/network/30-colo-xdp.web1.tap-web1.network"]
    assert "Bridge=" not in net and "ConfigureWithoutCarrier=yes" in net
    assert "MultiQueue" not in files()["/etc/systemd/network/30-colo-xdp.web1.tap-web1.netdev"]
    script = found["/etc/colo-xdp/web1/qemu"]
    assert ",queues=4" in script and "mq=on,vectors=10" in script


def test_quickack_is_a_drop_in_of_the_file_that_has_the_device() -> None:
    where = "/etc/systemd/network/20-eth2.network.d/50-colo-xdp.web1.conf"
    text = files("secondary", migration_network="20-eth2.network/20-ens3.network")
    assert where not in text
    text = files("primary", migration_network="20-eth2.network/20-ens3.network")
    assert (
        "Destination=192.0.2.2/32\nPreferredSource=192.0.2.1\nScope=link\nQuickAck=yes"
        in (text[where])
    )
    six = files(addresses="fd00::1/fd00::2", migration_network="20-eth2.network")[where]
    assert "Destination=fd00::2/128\nPreferredSource=fd00::1\nQuickAck=yes" in six


def test_a_vxlan_needs_no_file_of_its_own() -> None:
    found = files(peer_link="", vxlan="10.99.0.1/10.99.0.2")
    assert [f for f in found if ".cx-web1." in f] == []
    c = configs(made(peer_link="", vxlan="10.99.0.1/10.99.0.2"))["secondary"]
    assert c.network.peer_link == "cx-web1" and c.network.vxlan_local == "10.99.0.2"


def test_what_differs_between_the_hosts() -> None:
    both = configs(made(peer_link="eth1/ens5", bridge="br0/br1"))
    p, s = both["primary"], both["secondary"]
    assert (p.network.peer_link, s.network.peer_link) == ("eth1", "ens5")
    assert (p.network.bridge, s.network.bridge) == ("br0", "br1")
    assert (p.failover.fence, s.failover.fence) == (("/sbin/off", "b"), ("/sbin/off", "a"))
    assert p.qemu.reverse_uri == "" and s.qemu.reverse_uri == "tcp:192.0.2.1:9848"
    files_of = {r: files(r, disk=("file=/a,secondary-file=/b",)) for r in ("primary", "secondary")}
    assert "file=/b," in files_of["secondary"]["/etc/colo-xdp/web1/qemu"]
    assert "file=/a," in files_of["primary"]["/etc/colo-xdp/web1/qemu"]


def test_the_lease() -> None:
    c = configs(made(fence_primary="", fence_secondary="", etcd=("https://192.0.2.3:2379",),
                     etcd_ca="/etc/etcd/ca.crt"))["primary"].failover  # fmt: skip
    assert (c.arbiter, c.automatic, c.etcd_ca) == ("lease", True, "/etc/etcd/ca.crt")


def test_without_an_arbiter_nobody_is_promised_anything() -> None:
    a = made(fence_primary="", fence_secondary="")
    assert configs(a)["primary"].failover.automatic is False
    assert any("nobody fails over by itself" in text for text in notes(a, "primary"))


def test_qemu_has_two_monitors_and_waits_where_the_other_one_sends() -> None:
    a = made()
    for role in ("primary", "secondary"):
        script = files(role)["/etc/colo-xdp/web1/qemu"]
        c = configs(a)[role]
        for path in (c.qemu.qmp, c.qemu.qmp_oob):
            assert f"-qmp unix:{path},server=on,wait=off" in script
        unit = files(role)["/etc/systemd/system/colo-qemu-incoming@web1.service"]
        uri = (
            c.qemu.migrate_uri if role == "secondary" else configs(a)["secondary"].qemu.reverse_uri
        )
        assert f"ExecStart=/etc/colo-xdp/web1/qemu -incoming {uri}\n" in unit
        assert c.qemu.incoming == ("systemctl", "restart", "colo-qemu-incoming@web1.service")
        assert not re.search("^(Requires|BindsTo|PartOf)=", unit, re.M)


def test_the_commands_start_the_right_unit() -> None:
    assert commands("web1", "primary")[-1].endswith("colo-xdp@web1 colo-qemu@web1")
    assert commands("web1", "secondary")[-1].endswith("colo-xdp@web1 colo-qemu-incoming@web1")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not here")
@pytest.mark.parametrize("user", ["", "daemon"])
def test_systemd_has_nothing_to_say_about_the_units(tmp_path: Path, user: str) -> None:
    found = files(qemu_user=user)
    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    (tmp_path / "colo-xdp@web1.service").write_text("[Service]\nExecStart=/bin/true\n")
    paths = []
    for name in ("colo-qemu@web1.service", "colo-qemu-incoming@web1.service"):
        text = found[f"/etc/systemd/system/{name}"]
        (tmp_path / name).write_text(text.replace("/etc/colo-xdp/web1/qemu", str(script)))
        paths.append(str(tmp_path / name))
    r = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *paths],
        capture_output=True, text=True, check=False, env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
    )  # fmt: skip
    assert [x for x in r.stderr.splitlines() if str(tmp_path) in x or "colo-" in x] == []
