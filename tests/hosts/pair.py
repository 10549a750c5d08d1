# SPDX-License-Identifier: GPL-2.0-or-later
"""Set the pair web1 up on two such hosts: a has the Debian package, b what `make install` installs.

Examples and units are taken from where these have put them.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from colo_xdp.lab import guest as guest_files
from colo_xdp.lab import vm as vms
from colo_xdp.lab.net import LabError, Processes, wait_for
from colo_xdp.tools import pki

from . import root as roots
from .host import Host, client_down, client_up

PAIR = "web1"
CONTROLLER = f"colo-xdp@{PAIR}.service"
SHIPPED = "/usr/share/doc/colo-xdp"
ROLES = {"a": "primary", "b": "secondary"}
PROTECT_S = 120.0
#: status 0 only if the other host is certainly off, which the test decides; each call is recorded
FENCE = """#!/bin/sh
echo $(hostname) >> /exchange/fenced
[ -e /exchange/off-{other} ]
"""
#: deploy/examples/qemu for the lab's guest
QEMU = """#!/bin/sh
{preload}
exec qemu-system-x86_64 -accel {accel} -cpu {cpu} -m 128 -nodefaults \\
	-display none -no-user-config \\
	-kernel /share/vmlinuz -initrd /share/initrd.gz -append "console=ttyS0 quiet panic=1" \\
	-chardev file,id=s0,path=/run/colo-vm/web1.console -serial chardev:s0 \\
	-qmp unix:/run/colo-vm/web1.qmp,server=on,wait=off \\
	-netdev tap,id=n0,ifname=tap-web1,script=no,downscript=no,vnet_hdr=on \\
	-device virtio-net-pci,netdev=n0,mac={mac},guest_announce=off,romfile= \\
	"$@"
"""
#: host a's `qemu.incoming`: a script as a user may write it, which leaves its QEMU running
INCOMING = """#!/bin/sh
systemctl stop vm@web1 vm-incoming@web1
mkdir -p /run/colo-vm
setsid /etc/colo-xdp/web1/qemu -incoming tcp:0:9998 < /dev/null &
"""
#: the hosts' network, as an administrator configures it
NETWORK = {
    "10-br0.netdev": "[NetDev]\nName=br0\nKind=bridge\n",
    "20-br0.network": "[Match]\nName=br0\n[Network]\nLinkLocalAddressing=no\n"
    "ConfigureWithoutCarrier=yes\n",
    "20-eth0.network": "[Match]\nName=eth0\n[Network]\nBridge=br0\nLinkLocalAddressing=no\n",
}


class Pair:
    """Host a, whose file says primary, and host b."""

    def __init__(self, build: Path) -> None:
        self.dir = build.absolute() / "hosts"
        self.dir.mkdir(parents=True, exist_ok=True)
        self.guest_dir = build.absolute() / "guest"
        self.exchange = self.dir / "exchange"
        self.a, self.b = (
            Host(self.dir, name, n, self.guest_dir) for name, n in (("a", 1), ("b", 2))
        )
        self._lock = (self.dir / "lock").open("a")

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.a, self.b

    def up(self) -> None:
        """Boot both hosts, with files in place and networks up; no unit of the pair is started."""
        # all processes that run these tests use the same names
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._remove()  # leftovers of a crash
        base = roots.base(self.dir)
        shutil.rmtree(self.exchange, ignore_errors=True)
        self.exchange.mkdir()
        guest = guest_files.build(self.guest_dir)
        procs = Processes(self.dir / "pids.json")
        self.accel = vms.choose_accel(procs, self.guest_dir, guest)
        self.shim = vms.shim_for(self.accel, self.guest_dir)
        keys = self.dir / "pki"
        if not (keys / "ca.crt").exists():
            pki.init(keys, PAIR)
        client_up()
        for h, other in ((self.a, "b"), (self.b, "a")):
            h.make(base)
            self._install(h)
            pki.issue(keys, ROLES[h.name], renew=True)
            self._files(h, other, keys)
            h.boot()
        for h in self.hosts:
            h.booted()
        self._first_start()

    def _install(self, h: Host) -> None:
        """Install what is tested into a root that is not booted."""
        if h is self.a:
            roots.install_package(h.root, roots.package())
        else:
            roots.install(h.root)

    def _first_start(self) -> None:
        # The very first start: on the primary guest's host the tap reaches the network.
        self.a.run("ip", "link", "set", "tap-web1", "master", "br0")
        self.wait_guest("/run/colo-vm/web1.console")

    def wait_guest(self, path: str) -> None:
        """Wait until the guest of host a has booted, which its console says."""
        console = self.a.inside(path)
        wait_for(
            "boot of the guest",
            lambda: console.exists() and b"GUEST-READY" in console.read_bytes(), vms.BOOT_S * 2,
        )  # fmt: skip

    def _files(self, h: Host, other: str, keys: Path) -> None:
        role, shipped = ROLES[h.name], h.root / SHIPPED.lstrip("/")
        for name, text in NETWORK.items():
            h.write(f"/etc/systemd/network/{name}", text)
        for f in (shipped / "networkd").iterdir():
            h.write(f"/etc/systemd/network/{f.name}", f.read_text().replace(
                "192.0.2.1", f"192.0.2.{h.number}"))  # fmt: skip
        for f in (shipped / "examples").glob("vm*.service"):
            h.write(f"/etc/systemd/system/{f.name}", f.read_text())
        for name in ("ca.crt", f"{role}.crt", f"{role}.key"):
            h.write(f"/etc/colo-xdp/web1/{name}", (keys / name).read_text(), 0o600)
        config = (shipped / f"examples/{role}.toml").read_text()
        line = next(x for x in config.splitlines() if x.startswith("# incoming = "))
        script = "/usr/local/sbin/incoming-web1"
        config = config.replace(line, f'incoming = ["{script}"]' if h is self.a else line[2:])
        h.write("/etc/colo-xdp/web1.toml", config)
        h.write(script, INCOMING, 0o755)
        h.write("/usr/local/sbin/fence-web1-peer", FENCE.format(other=other), 0o755)
        preload = f"export LD_PRELOAD=/share/{self.shim.name}" if self.shim else ""
        cpu = "max" if self.accel == "tcg" else "host"
        qemu = QEMU.format(preload=preload, accel=self.accel, cpu=cpu, mac=vms.MACS[0])
        h.write("/etc/colo-xdp/web1/qemu", qemu, 0o755)
        h.enable("systemd-networkd", CONTROLLER, f"vm{'' if h is self.a else '-incoming'}@{PAIR}")

    def down(self) -> None:
        self._remove()
        self._lock.close()

    def _remove(self) -> None:
        for h in self.hosts:
            h.remove()
        client_down()

    # ---- observations

    def status(self, h: Host) -> dict[str, Any]:
        return h.status(PAIR, ROLES[h.name])

    def wait(
        self, h: Host, what: str, cond: Callable[[dict[str, Any]], Any], seconds: float = PROTECT_S
    ) -> dict[str, Any]:
        """Wait until `cond` is true for the controller's status, and return that status."""
        last: dict[str, Any] = {}

        def look() -> dict[str, Any]:
            nonlocal last
            last = self.status(h)
            return last if last and cond(last) else {}

        try:
            return wait_for(f"{what} on host{h.name}", look, seconds, poll=0.1)
        except LabError as e:
            raise LabError(f"{e}: {last.get('state')}: {last.get('reason')}") from e

    def wait_protected(self, seconds: float = PROTECT_S) -> None:
        for h in self.hosts:
            self.wait(h, "protection", lambda s: s["state"] == "protected", seconds)

    @property
    def fences(self) -> list[str]:
        """Return the hosts that have run their fence command, in that order."""
        f = self.exchange / "fenced"
        return f.read_text().split() if f.exists() else []

    def forget_fences(self) -> None:
        (self.exchange / "fenced").unlink(missing_ok=True)

    def power_off(self, h: Host) -> None:
        """Cut the power, so that the other host's fence command can be sure of it."""
        h.cut()
        (self.exchange / f"off-{h.name}").touch()

    def power_on(self, h: Host) -> None:
        (self.exchange / f"off-{h.name}").unlink()
        h.boot()
        h.booted()

    def logs(self) -> str:
        """Return the end of both hosts' journals, for a failed test."""
        out = []
        for h in self.hosts:
            try:
                out.append(f"---- host{h.name}\n{h.journal(lines=120)}" if h.pid1 else "off")
            except LabError as e:
                out.append(f"---- host{h.name}: {e}")
        return "\n".join(out)
