# SPDX-License-Identifier: GPL-2.0-or-later
"""What a QEMU offers its guest, as doctor asks for it: a real QEMU that never starts its guest."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from colo_xdp.datapath import btf
from colo_xdp.qemu import qmp, survey
from colo_xdp.tools import findings, guest_checks

QEMU = shutil.which("qemu-system-x86_64") or ""


@pytest.mark.parametrize(
    ("device", "want"),
    [("", {"host_ufo"}), (",host_ufo=off", set())],
    ids=["as it is", "turned off"],
)
def test_a_qemu_says_what_it_offers(tmp_path: Path, device: str, want: set[str]) -> None:
    assert QEMU, "QEMU is not installed"
    socket = tmp_path / "qmp"
    args = (
        QEMU, "-S", "-display", "none", "-nodefaults", "-machine", "pc,accel=tcg", "-m", "16",
        "-qmp", f"unix:{socket},server=on,wait=off",
        "-device", f"virtio-net-pci,romfile={device}",
        "-device", f"virtio-net-pci,id=n1,romfile={device}",
    )  # fmt: skip
    with subprocess.Popen(args, stderr=subprocess.DEVNULL) as vm:
        try:
            end = time.monotonic() + 20
            while True:  # the socket is there a moment before QEMU listens on it
                try:
                    found = survey.probe(str(socket), 10)
                    break
                except qmp.QmpError:
                    assert time.monotonic() < end and vm.poll() is None, "QEMU did not start"
                with contextlib.suppress(subprocess.TimeoutExpired):
                    vm.wait(0.05)
        finally:
            vm.kill()
    later = {"host_uso", "host_tunnel", "host_tunnel_csum"}  # QEMU 8.2 and 10.2
    assert found.info.offers - later == want
    assert found.announcing == ("device[0]", "n1"), "guest_announce is on unless it is turned off"
    assert survey.Survey.from_json(json.loads(json.dumps(found.to_json()))) == found


def said(offers: set[str]) -> findings.Check:
    (check,) = guest_checks.offloads(frozenset(offers))
    return check


def test_doctor_names_what_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btf, "why_not", lambda: "")
    monkeypatch.setattr(btf, "kernel_flags", lambda: ())
    assert said({"host_ufo", "host_uso"}).level == findings.OK
    tunnel = said({"host_ufo", "host_tunnel", "host_tunnel_csum"})
    assert tunnel.level == findings.WARN
    assert tunnel.remedy.endswith("host_tunnel=off,host_tunnel_csum=off")


def test_without_btf_udp_is_named_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(btf, "why_not", lambda: "no BTF")
    assert said({"host_ufo", "host_uso"}).remedy.endswith("host_ufo=off,host_uso=off")
    nothing = said(set())
    assert nothing.level == findings.WARN and "no BTF" in nothing.text
