# SPDX-License-Identifier: GPL-2.0-or-later
"""Test two pairs, or two controllers of one, on one host: nobody takes what belongs to another."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.config.file import load
from colo_xdp.datapath import attach
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.service import control_socket
from colo_xdp.service.daemon import REFUSED
from colo_xdp.tools import cleanup, doctor
from tests.netns.conftest import Net, Tap, inside, own, sh
from tests.netns.frames import tcp
from tests.netns.test_primary_path import events

A, B = own("nsta"), own("nstb")


def write(tmp: Path, pair: str, n: int, **other: Any) -> Path:
    """Write a primary's file; `n` keeps what it uses apart from the other one's."""
    keys = {"tap": f"tap{n}", "peer_link": f"peer{n}", "metrics": f"127.0.0.1:{19850 + n}"} | other
    path = tmp / f"{pair}.toml"
    path.write_text(
        f"""
        pair = "{pair}"
        role = "primary"
        [network]
        tap = "{keys["tap"]}"
        peer_link = "{keys["peer_link"]}"
        [qemu]
        qmp = "/nonexistent"
        migrate_uri = "unix:/nonexistent"
        [peer]
        local = "127.0.0.1:{19860 + n}"
        remote = "127.0.0.1:{19870 + n}"
        [datapath]
        run_dir = "{tmp}"
        ring_pages = 256
        fast_path = "off"
        [metrics]
        listen = "{keys["metrics"]}"
        """
    )
    return path


@pytest.fixture
def two(net: Net, tmp_path: Path) -> Iterator[Net]:
    """Provide a host with room for two pairs."""
    for text in (
        "link set lo up",
        "tuntap add tap1 mode tap vnet_hdr",
        "link set tap1 up",
        f"link add peer1 type veth peer name peer1 netns {net.other}",
        "link set peer1 up",
    ):
        sh("ip", "-n", net.host, *text.split())
    sh("ip", "-n", net.other, "link", "set", "peer1", "up")
    yield net
    for pair in (A, B):
        cleanup.cleanup(pair, "/sys/fs/bpf", str(tmp_path))


class Run:
    """Run `colo-xdp run` in the host's namespace."""

    def __init__(self, net: Net, path: Path) -> None:
        self.path, self.sock = path, path.parent / f"{path.stem}.primary.sock"
        cmd = [sys.executable, "-m", "colo_xdp.cli", "run", str(path)]
        self.log = path.with_suffix(".log")
        with self.log.open("wb") as out:
            self.p = subprocess.Popen(
                ["nsenter", f"--net=/run/netns/{net.host}", *cmd], stdout=out, stderr=out
            )

    def status(self) -> dict[str, Any]:
        try:
            return control_socket.request(str(self.sock), "status", timeout=5)
        except control_socket.ControlError:
            return {}

    def until(self, what: str, seconds: float = 60.0) -> dict[str, Any]:
        """Wait until the status' reason contains these words."""
        end = time.monotonic() + seconds
        while what not in (s := self.status()).get("reason", ""):
            assert time.monotonic() < end and self.p.poll() is None, (s, self.log.read_text())
            self._pause()
        return s

    def until_on(self, dev: str, prog: str, seconds: float = 60.0) -> None:
        """Wait until a program is on the device."""
        end = time.monotonic() + seconds
        while prog not in filters(dev):
            assert time.monotonic() < end and self.p.poll() is None, self.log.read_text()
            self._pause()

    def _pause(self) -> None:
        try:
            self.p.wait(0.05)
        except subprocess.TimeoutExpired:
            return

    def ends(self, seconds: float = 60.0) -> tuple[int, str]:
        return self.p.wait(seconds), self.log.read_text()

    def stop(self) -> None:
        if self.p.poll() is None:
            self.p.terminate()
            self.p.wait(20)


def filters(dev: str) -> str:
    return sh("tc", "filter", "show", "dev", dev, "ingress")


def test_another_pairs_devices_are_refused_and_stay_its_own(two: Net, tmp_path: Path) -> None:
    """Recognized by what is attached to them, even if the other controller does not run. Nothing is
    loaded

    or replaced.
    """
    a = DataPath(load(write(tmp_path, A, 0)))
    try:
        a.mode = Mode.RUN
        for keys in ({"tap": "tap0"}, {"peer_link": "peer0"}, {"peer_link": "tap0"}):
            path = write(tmp_path, B, 1, **keys)
            with pytest.raises(attach.Taken, match=f"pair {A} has its program .* here"):
                DataPath(load(path))
            assert not Path(f"/sys/fs/bpf/colo-xdp/{B}-primary").exists()
            said = [c for c in doctor.examine(path) if c.key == "other pairs"]
            assert any(c.level == doctor.FAIL and f"pair {A}" in c.text for c in said)
        for dev, prog in (("tap0", "pvm_out"), ("peer0", "svm_arrival")):
            assert f"colo-xdp:{A}:{prog}" in filters(dev) and B not in filters(dev)
        with pytest.raises(attach.Taken, match=f"pair {A}"):
            attach.attach_tc("tap0", "ingress", a.objects.programs["pvm_out"], B, None)
        b = DataPath(load(write(tmp_path, B, 1)))
        b.close()
        cleanup.cleanup(B, "/sys/fs/bpf", str(tmp_path))
        assert a.look().restored == [] and a.look().trouble == []
        guest = Tap("tap0")
        a.beat()
        guest.send(tcp(b"still ours"))
        assert any(b"still ours" in e.frame for e in events(a))
        guest.close()
    finally:
        a.close()


def test_another_pair_that_takes_a_device_is_told(two: Net, tmp_path: Path) -> None:
    """An older release replaces the filter: it is not replaced in turn, and that is reported."""
    a = DataPath(load(write(tmp_path, A, 0)))
    try:
        attach.detach_tc("peer0", "ingress", attach.label(A, "svm_arrival"))
        attach.attach_tc("peer0", "ingress", a.objects.programs["svm_arrival"], B, None)
        look = a.look()
        assert look.missed and f"pair {B} has its program" in look.trouble[0]
        assert f"colo-xdp:{B}" in filters("peer0")
        attach.detach_tc("peer0", "ingress", attach.label(B, "svm_arrival"))
        assert a.look().restored == ["svm_arrival on peer0"]
    finally:
        a.close()


def test_who_runs_and_what_is_taken(two: Net, tmp_path: Path) -> None:
    """Exit status 2 and a sentence that names the pair and the key, before anything is attached.

    A missing device is waited for; kill -9 leaves no lock.
    """
    sh("ip", "-n", two.host, "link", "del", "tap0")
    first = write(tmp_path, A, 0)
    a, more = Run(two, first), []
    try:
        s = a.until("waiting for a device")
        assert s["state"] == "starting" and "tap0 does not exist" in s["reason"]
        sh("ip", "-n", two.host, "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
        sh("ip", "-n", two.host, "link", "set", "tap0", "up")
        a.until_on("tap0", "pvm_out")
        # under a live controller: while the tap is gone, the status reports it
        sh("ip", "-n", two.host, "link", "del", "tap0")
        assert a.until("tap0 does not exist, the guest is cut off")["state"] != "protected"
        sh("ip", "-n", two.host, "tuntap", "add", "tap0", "mode", "tap", "vnet_hdr")
        a.until_on("tap0", "pvm_out")

        def refused(path: Path, *words: str) -> None:
            more.append(Run(two, path))
            status, text = more[-1].ends()
            assert status == REFUSED and all(w in text for w in words), (status, text)

        same = tmp_path / "same.toml"
        same.write_text(first.read_text())
        refused(same, f"another controller of {A} (primary) runs here", f"process {a.p.pid}")
        taken = "127.0.0.1:19850"
        refused(write(tmp_path, B, 1, metrics=taken), f"[metrics] listen {taken}", f"by pair {A}")
        refused(write(tmp_path, B, 1, tap="tap0"), f"[network] tap: tap0 is the tap of pair {A}")
        refused(write(tmp_path, B, 1, peer_link="peer0"), f"peer0 is the peer_link of pair {A}")
        assert B not in filters("peer0") + filters("peer1") + filters("tap1")
        said = {c.key: c for c in doctor.examine(write(tmp_path, B, 1, metrics=taken))}
        assert taken in said["in use"].text and said["in use"].level == doctor.FAIL
        own = {c.key: c for c in doctor.examine(first)}
        assert f"process {a.p.pid}" in own["other pairs"].text and "in use" not in own
        with pytest.raises(cleanup.StillRunning):
            cleanup.cleanup(A, "/sys/fs/bpf", str(tmp_path))

        show = [sys.executable, "-m", "colo_xdp.cli", "status", A, "--json", "--run-dir"]
        r = subprocess.run([*show, str(tmp_path)], capture_output=True, text=True, check=False)
        assert json.loads(r.stdout)["pair"] == A

        a.p.kill()
        a.p.wait()
        more.append(Run(two, first))
        assert more[-1].until("does not know what happened before")["pair"] == A
    finally:
        for run in (a, *more):
            run.stop()


def test_a_port_that_nobody_we_know_has(two: Net, tmp_path: Path) -> None:
    with inside(two.host), socket.create_server(("127.0.0.1", 19850)):
        run = Run(two, write(tmp_path, A, 0))
        status, text = run.ends()
    assert status == REFUSED and "[metrics] listen 127.0.0.1:19850: in use" in text
    assert "colo-xdp" not in filters("tap0")
