# SPDX-License-Identifier: GPL-2.0-or-later
"""Run two hosts that boot systemd, each in a container with its own namespaces, and a client.

    <tag>c   lan (bridge, 10.9.0.1, fd09::1)   sw1 (peer link)   sw2 (management)
    host     eth0 - br0                        eth1              eth2, 192.0.2.1 or .2

systemd-nspawn needs no systemd around it: each host gets control groups of its own (without them
both would share one tree) and a BPF file system. A power cut is SIGKILL for its PID 1.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from colo_xdp.lab.net import CLIENT_IP, CLIENT_IP6, LabError, in_ns, sh, wait_for
from colo_xdp.service import control_socket

from . import root as roots

TAG = "cxh"
CLIENT = f"{TAG}c"
BOOT_S = 60.0
SHUTDOWN_S = 120.0  # longer than systemd waits for any unit of ours
PR_SET_PDEATHSIG = 1
ENV = {
    "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root", "LANG": "C.UTF-8", "TERM": "dumb",
}  # fmt: skip

_libc = ctypes.CDLL(None, use_errno=True)


def _die_with_parent() -> None:
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _ip(ns: str, args: str) -> None:
    sh("ip", "-n", ns, *args.split())


def _disable_ipv6(ns: str) -> None:
    def write() -> None:
        for scope in ("all", "default"):
            Path(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6").write_text("1")

    in_ns(ns, write)


def client_up() -> None:
    """Create the clients' network, and the switches of the other two."""
    sh("ip", "netns", "add", CLIENT)
    _ip(CLIENT, "link set lo up")
    for bridge in ("lan", "sw1", "sw2"):
        _ip(CLIENT, f"link add {bridge} mtu 1600 type bridge mcast_snooping 0")
    _ip(CLIENT, f"addr add {CLIENT_IP}/24 dev lan")
    _ip(CLIENT, f"addr add {CLIENT_IP6}/64 dev lan nodad")
    for bridge in ("lan", "sw1", "sw2"):
        _ip(CLIENT, f"link set {bridge} up")


def client_down() -> None:
    if Path(f"/run/netns/{CLIENT}").exists():
        sh("ip", "netns", "del", CLIENT)


def _control_groups() -> list[Path]:
    """Return the mount points of the trees in which systemd keeps its units."""
    out = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, where, kind, options, *_ = line.split(" ")
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options):
            out.append(Path(where))
    return out


class Host:
    """One host: `boot` switches it on, `cut` takes its power away."""

    def __init__(self, directory: Path, name: str, number: int, share: Path) -> None:
        self.name, self.number = name, number
        self.ns = f"{TAG}{name}"
        self.dir = directory / name
        self.share = share  # read-only /share of the host
        #: /exchange of both hosts
        self.exchange = directory / "exchange"
        self.root = self.dir / "root"
        self._bpf, self._tun = self.dir / "bpf", self.dir / "tun"
        self._console = self.dir / "console"
        self._groups = [g / f"{TAG}-{name}" for g in _control_groups()]
        self._nspawn: subprocess.Popen[bytes] | None = None
        self.pid1 = 0

    # ---- life

    def make(self, base: Path) -> None:
        """Create a fresh root on top of the base."""
        self.root = roots.overlay(base, self.dir)
        self.write("/etc/hostname", f"host{self.name}\n")
        self.write("/etc/machine-id", "")  # a new id at the first boot
        self.write("/etc/systemd/journald.conf.d/10.conf", "[Journal]\nStorage=persistent\n")

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file of this host."""
        p = self.root / path.lstrip("/")
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text(text)
        p.chmod(mode)

    def enable(self, *units: str) -> None:
        """Enable a unit as `systemctl enable` does without a running systemd."""
        sh("systemctl", f"--root={self.root}", "enable", *units)

    def _wires(self) -> None:
        sh("ip", "netns", "add", self.ns)
        _disable_ipv6(self.ns)
        for i, switch in enumerate(("lan", "sw1", "sw2")):
            # the same card after each boot: the others' neighbour tables still have its address
            _ip(
                CLIENT,
                f"link add {self.wire(i)} mtu 1600 type veth peer name eth{i} "
                f"address 02:c0:10:00:{self.number:02x}:{i:02x} netns {self.ns}",
            )
            _ip(CLIENT, f"link set dev {self.wire(i)} master {switch} up")
            _ip(self.ns, f"link set dev eth{i} mtu {1500 if i == 0 else 1600}")

    def wire(self, i: int) -> str:
        """Connect the switch's end of the host's eth`i`."""
        return f"w{i}{self.name}"

    def boot(self) -> None:
        """Switch it on; `booted` waits."""
        self._wires()
        for d in (self._bpf, self.exchange):
            d.mkdir(parents=True, exist_ok=True)
        sh("mount", "-t", "bpf", "bpf", str(self._bpf))
        if not self._tun.exists():
            os.mknod(self._tun, 0o666 | 0o020000, os.makedev(10, 200))
            self._tun.chmod(0o666)  # as udev sets it
        devices = [f"--bind={self._tun}:/dev/net/tun"]
        if os.access("/dev/kvm", os.R_OK | os.W_OK):
            devices.append("--bind=/dev/kvm")
        for g in self._groups:
            g.mkdir(exist_ok=True)

        def enter() -> None:
            _die_with_parent()
            for g in self._groups:
                (g / "cgroup.procs").write_text(str(os.getpid()))

        cmd = [
            "systemd-nspawn", "--quiet", "--keep-unit", "--register=no", "--boot",
            f"--directory={self.root}", f"--machine={self.ns}", "--console=read-only",
            f"--network-namespace-path=/run/netns/{self.ns}", "--capability=all",
            "--system-call-filter=bpf perf_event_open @keyring",
            *devices, f"--bind={self._bpf}:/sys/fs/bpf", f"--bind-ro={self.share}:/share",
            f"--bind={self.exchange}:/exchange",
            "--resolv-conf=off", "--timezone=off", "--link-journal=no",
            "--kill-signal=SIGRTMIN+3",
        ]  # fmt: skip
        env = {
            **os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
            "SYSTEMD_NSPAWN_API_VFS_WRITABLE": "network",
        }  # fmt: skip
        with self._console.open("wb") as out:
            self._nspawn = subprocess.Popen(
                cmd, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env,
                preexec_fn=enter, start_new_session=True,
            )  # fmt: skip

    def booted(self) -> None:
        """Wait until systemd reports that it runs. Raises LabError with the console output."""
        try:
            self.pid1 = wait_for(f"PID 1 of host{self.name}", self._find_pid1, BOOT_S)
            wait_for(f"systemd of host{self.name}", self._running, BOOT_S, poll=0.1)
        except LabError as e:
            raise LabError(f"{e}\n{self._console.read_text(errors='replace')[-3000:]}") from e

    def _find_pid1(self) -> int:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise LabError(f"systemd-nspawn ended ({self._nspawn.returncode})")
        for pid in self._processes():
            with contextlib.suppress(OSError):
                text = Path(f"/proc/{pid}/status").read_text()
                if re.search(r"^NSpid:\t\d+(\t\d+)*\t1$", text, re.M):
                    return pid
        return 0

    def _running(self) -> bool:
        said = self.run("systemctl", "is-system-running", check=False).strip()
        return said in ("running", "degraded")

    def _processes(self) -> list[int]:
        out: set[int] = set()
        for g in self._groups:
            for f in g.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    out |= {int(x) for x in f.read_text().split()}
        return sorted(out)

    def cut(self) -> None:
        """Cut the power: everything ends at once, devices and pins are gone."""
        if self.pid1:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid1, signal.SIGKILL)
        if self._nspawn is not None:
            self._nspawn.wait(30)
        self.pid1, self._nspawn = 0, None
        self._sweep()

    def shut_down(self, how: str = "poweroff") -> None:
        """Let systemd shut it down, and wait for the end. `how`: poweroff, reboot, halt ...

        A reboot ends here, too: `boot` is the other half. Raises LabError with the console output.
        """
        assert self._nspawn is not None
        self.run("systemctl", how)
        try:
            self._nspawn.wait(SHUTDOWN_S)
        except subprocess.TimeoutExpired as e:
            text = self._console.read_text(errors="replace")[-3000:]
            raise LabError(f"host{self.name} does not shut down\n{text}") from e
        self.pid1, self._nspawn = 0, None
        self._sweep()

    def _sweep(self) -> None:
        """Remove whatever is left of this host."""

        def gone() -> bool:
            for pid in self._processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not self._processes()

        wait_for(f"end of host{self.name}'s processes", gone, 30)
        for g in self._groups:
            for d in sorted(g.rglob("*"), reverse=True):
                if d.is_dir():
                    d.rmdir()
            if g.is_dir():
                g.rmdir()
        if Path(f"/run/netns/{self.ns}").exists():
            sh("ip", "netns", "del", self.ns)
        if Path(f"/run/netns/{CLIENT}").exists():
            # their other ends belong to a namespace that may live slightly longer
            for i in range(3):
                sh("ip", "-n", CLIENT, "link", "del", self.wire(i), check=False)
        while self._bpf.is_mount():
            sh("umount", str(self._bpf))

    def remove(self) -> None:
        """Power off for good."""
        self.cut()
        while self.root.is_mount():
            sh("umount", str(self.root))
        for sub in ("upper", "work"):
            shutil.rmtree(self.dir / sub, ignore_errors=True)

    # ---- inside

    def _enter(self, *cmd: str, timeout: float) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["nsenter", "-t", str(self.pid1), "-m", "-u", "-i", "-n", "-p", "-C", "--", *cmd],
            capture_output=True, text=True, check=False, timeout=timeout, env=ENV,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip

    def shell(self, command: str, timeout: float) -> tuple[int, str]:
        """Run a line of bash as root in /root; return its exit status and all that it says."""
        r = self._enter("bash", "-c", f"cd /root && exec 2>&1\n{command}", timeout=timeout)
        return r.returncode, r.stdout

    def run(self, *cmd: str, check: bool = True, timeout: float = 60.0) -> str:
        """Run a command inside and return its output. Raises LabError with it on failure."""
        r = self._enter(*cmd, timeout=timeout)
        if check and r.returncode:
            raise LabError(f"host{self.name}: {' '.join(cmd)}: {r.stdout}{r.stderr}".strip())
        return r.stdout

    def inside(self, path: str) -> Path:
        """Return a file as this host sees it now, on whatever is mounted there."""
        return Path(f"/proc/{self.pid1}/root{path}")

    def show(self, unit: str, *properties: str) -> dict[str, str]:
        """Return properties of a unit, as `systemctl show` prints them."""
        text = self.run("systemctl", "show", unit, f"--property={','.join(properties)}")
        return dict(line.split("=", 1) for line in text.splitlines())

    def journal(self, unit: str = "", lines: int = 0) -> str:
        cmd = ["journalctl", "--no-pager", "--quiet", "--boot", "--output=short-precise"]
        cmd += [f"--unit={unit}"] if unit else []
        cmd += [f"--lines={lines}"] if lines else []
        return self.run(*cmd)

    def status(self, pair: str, role: str) -> dict[str, Any]:
        """Return the controller's status; {} if there is none. `role`: that of its file."""
        sock = f"/proc/{self.pid1}/root/run/colo-xdp/{pair}.{role}.sock"
        try:
            return control_socket.request(sock, "status", {})
        except control_socket.NotRunning:
            return {}

    def unit_of(self, pid: int) -> str:
        """Return the unit in whose control group a process of this host is."""
        return self.run("ps", "-o", "unit=", "-p", str(pid)).strip()

    def pids(self, pattern: str) -> list[int]:
        """Return the processes of this host, by command line."""
        return [int(x) for x in self.run("pgrep", "-f", pattern, check=False).split()]


@contextlib.contextmanager
def unplugged(host: Host, i: int) -> Iterator[None]:
    """Unplug the cable of the host's eth`i` from the switch."""
    _ip(CLIENT, f"link set dev {host.wire(i)} down")
    try:
        yield
    finally:
        _ip(CLIENT, f"link set dev {host.wire(i)} up")


def never(what: str, cond: Callable[[], Any], seconds: float) -> None:
    """Raise LabError if `cond` becomes true within this time."""
    end = time.monotonic() + seconds

    def look() -> str:
        return "seen" if cond() else "over" if time.monotonic() > end else ""

    if wait_for(what, look, seconds + 60, poll=0.1) == "seen":
        raise LabError(f"{what}, within {seconds:g} s")
