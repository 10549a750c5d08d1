# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the lab's QEMU guests: under KVM if a guest boots there, else TCG (with the shim before
8)."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .guest import Guest, build_shim
from .net import LabError, Processes, sh, stop_process, wait_for

MACS = ("52:54:00:12:34:56", "52:54:00:12:34:57")  # of the guest's NICs
BOOT_S = 120.0
KVM_PROBE_S = 10.0
INSTALLED = "qemu-system-x86_64"


def chosen_qemu() -> str:
    """Return the command of the QEMU that COLO_QEMU names, or of the installed one."""
    return os.environ.get("COLO_QEMU") or INSTALLED


def qemu_version(qemu: str = INSTALLED) -> tuple[int, int, int]:
    """Return the version of a QEMU (its command)."""
    m = re.search(r"version (\d+)\.(\d+)\.(\d+)", sh(qemu, "--version"))
    if not m:
        raise LabError(f"{qemu} --version prints nothing that looks like a version")
    return int(m[1]), int(m[2]), int(m[3])


class Vm:
    """One QEMU with two QMP sockets: `qmp` for the controller, `lab_qmp` for the lab.

    `queues`: of its network card, with as many vCPUs, since a Linux guest uses no more queues than
    it has vCPUs. Under TCG these share one thread: with a thread each, the SVM's kernel panics.
    """

    def __init__(
        self,
        procs: Processes,
        name: str,
        directory: Path,
        guest: Guest,
        accel: str,
        *,
        qemu: str = INSTALLED,
        ns: str | None,
        vnet_hdr: bool = True,
        nics: int = 1,
        queues: int = 1,
        vcpus: int = 1,
        thread: str = "single",
        vhost: bool = False,
        incoming: str = "",
        shim: Path | None = None,
        extra: Sequence[str] = (),
    ) -> None:
        self.name, self.dir = name, directory
        self.qmp = directory / f"{name}.qmp"
        self.qmp_oob = directory / f"{name}.oob.qmp"
        self.lab_qmp = directory / f"{name}.lab.qmp"
        self.console = directory / f"{name}.console"
        self.log = directory / f"{name}.log"
        for p in (self.qmp, self.qmp_oob, self.lab_qmp, self.console):
            p.unlink(missing_ok=True)
        several = queues > 1
        threads = f",thread={thread}" if vcpus > 1 and accel == "tcg" else ""
        cmd = [qemu, "-accel", f"{accel}{threads}", "-smp", str(vcpus)]
        cmd += ["-cpu", "max" if accel == "tcg" else "host", "-m", str(guest.memory_mib)]
        cmd += ["-nodefaults", "-nographic", "-no-user-config"]
        cmd += ["-kernel", str(guest.kernel), "-initrd", str(guest.initrd)]
        cmd += ["-append", f"console=ttyS0 quiet panic=1 {guest.append}".rstrip()]
        cmd += ["-chardev", f"file,id=s0,path={self.console}", "-serial", "chardev:s0"]
        cmd += ["-qmp", f"unix:{self.qmp},server=on,wait=off"]
        cmd += ["-qmp", f"unix:{self.lab_qmp},server=on,wait=off"]
        cmd += ["-qmp", f"unix:{self.qmp_oob},server=on,wait=off"]
        if ns:
            hdr = "on" if vnet_hdr else "off"
            for i, mac in enumerate(MACS[:nics]):
                tap = f"tap,id=n{i},ifname=tap{i},script=no,downscript=no,vnet_hdr={hdr}"
                tap += f",queues={queues}" * several + ",vhost=on" * vhost
                card = f"virtio-net-pci,netdev=n{i},mac={mac},romfile=,guest_announce=off"
                card += f",mq=on,vectors={2 * queues + 2}" * several
                cmd += ["-netdev", tap, "-device", card]
        if incoming:
            cmd += ["-incoming", incoming]
        cmd += extra
        env = {"LD_PRELOAD": str(shim)} if shim else {}
        self._p: subprocess.Popen[bytes] | None = procs.start(cmd, self.log, ns, env)
        self.pid = self._p.pid

    def booted(self) -> bool:
        return self.console.exists() and b"GUEST-READY" in self.console.read_bytes()

    def wait_boot(self, timeout: float = BOOT_S) -> None:
        """Wait until the guest's services run."""

        def ready() -> bool:
            if self._p is None or self._p.poll() is not None:
                raise LabError(f"{self.name}: QEMU ended: {self.log.read_text()[-2000:]}")
            return self.booted()

        wait_for(f"boot of {self.name}", ready, timeout)

    @property
    def alive(self) -> bool:
        return self._p is not None and self._p.poll() is None

    def kill9(self) -> float:
        """Kill QEMU as a power cut would; return the time (unix time, s)."""
        assert self._p is not None
        at = time.time()
        os.kill(self._p.pid, signal.SIGKILL)
        self._p.wait()
        return at

    def signal(self, sig: int) -> None:
        os.kill(self.pid, sig)

    def stop(self) -> None:
        stop_process(self._p)

    def ask(self, command: str, *, seconds: float = 10, **args: Any) -> Any:
        """Execute a QMP command over the lab's own socket, only to inspect the guest."""
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(seconds)
            s.connect(str(self.lab_qmp))
            f = s.makefile("rwb")
            f.readline()
            for msg in ({"execute": "qmp_capabilities"}, {"execute": command, "arguments": args}):
                f.write(json.dumps(msg).encode() + b"\n")
                f.flush()
                while True:
                    answer = json.loads(f.readline())
                    if "event" not in answer:
                        break
        if "error" in answer:
            raise LabError(f"{self.name} {command}: {answer['error']}")
        return answer["return"]


def choose_accel(procs: Processes, directory: Path, guest: Guest, qemu: str = INSTALLED) -> str:
    """Return `kvm` if a guest boots under it here, else `tcg`; tried once per kernel and QEMU."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    version = ".".join(map(str, qemu_version(qemu)))
    note = directory / f"accel-{version}"
    here = f"{platform.release()} {version}"
    with contextlib.suppress(OSError, ValueError):
        accel, where = note.read_text().split(" ", 1)
        if where == here:
            return accel
    accel = "tcg"
    vm = Vm(procs, "probe", directory, guest, "kvm", qemu=qemu, ns=None)
    try:
        vm.wait_boot(KVM_PROBE_S)
        accel = "kvm"
    except LabError:
        accel = "tcg"
    finally:
        vm.stop()
    note.write_text(f"{accel} {here}")
    return accel


def shim_for(accel: str, directory: Path, qemu: str = INSTALLED) -> Path | None:
    """Return the shim if this QEMU needs it (TCG before 8, see bqlshim.c)."""
    return build_shim(directory) if accel == "tcg" and qemu_version(qemu) < (8, 0, 0) else None
