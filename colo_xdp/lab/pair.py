# SPDX-License-Identifier: GPL-2.0-or-later
"""Run a whole pair on one machine: namespaces, two QEMUs, two controllers from two TOML files."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from ..service import control_socket, mark_file
from ..tools import cleanup, pki
from . import debian
from . import disk as disk_files
from . import guest as guest_files
from . import vm as vms
from .capture import Capture
from .client import Client
from .net import NETWORKS, PEER_P, PEER_S, LabError, Processes, Topology, stop_process, wait_for

#: two laboratories can be up at a time if they have different names
PAIR = os.environ.get("COLO_LAB", "lab")
PROTECT_S = 60.0
POWER_OFF_S = 120.0
#: of the Debian guest, which stands while its memory is copied: long, where the machine is busy
ENTER_STOP_MS = 30_000
NBD_PORT = 10809
MIGRATE_PORT = 9998


class Lab:
    """A laboratory: `up` builds it, `down` removes it, including what a crashed run left behind."""

    def __init__(
        self,
        directory: Path,
        *,
        tag: str = "cxl",
        vnet_hdr: bool = True,
        queues: int = 1,
        vcpus: int = 0,
        thread: Literal["single", "multi"] = "single",
        vhost: bool = False,
        overrides: dict[str, dict[str, Any]] | None = None,
        nics: int = 1,
        guest: Literal["small", "debian"] = "small",
        variant: debian.Variant = debian.PLAIN,
        disks: int = 0,
        overlay_limit: int = 64,
        qemu: str = "",
        tcp: bool = False,
        qemu_options: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        tag = tag if PAIR == "lab" else f"{PAIR}{tag[-1]}"
        self.dir = directory.absolute()
        self.build = self.dir / "guest"
        self.work = self.dir / f"run-{tag}"
        self.overrides = overrides or {}
        #: "debian": the first disk is the guest's root
        self.kind = guest
        self.variant = variant  # of the Debian guest
        if guest == "debian" and not disks:
            raise LabError("the root of the Debian guest is a disk")
        self.disks = [f"d{i}" for i in range(disks)]
        self.overlay_limit = overlay_limit  # MiB
        self.qemu = qemu or vms.chosen_qemu()
        self.tcp = tcp  # the migration channel: TCP over the peer link, or a unix socket
        self.qemu_options = qemu_options
        self.say = say
        self.vhost = vhost
        self.vcpus = vcpus or queues
        self.thread = thread  # TCG: one for all vCPUs, or one for each
        self.net = Topology(tag, vnet_hdr, nics, queues)
        self.patience_s = PROTECT_S * nics  # each NIC has programs of its own to compile
        self.procs = Processes(self.dir / f"{tag}.pids.json")
        self.client = Client(self.net.client)
        self.vm: dict[str, vms.Vm] = {}
        self.controllers: dict[str, subprocess.Popen[bytes]] = {}
        self.accel = ""
        self._shim: Path | None = None
        self._captures: list[Capture] = []

    # ---- life

    def __enter__(self) -> Lab:
        try:
            self.up()
        except BaseException:
            self.down()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.down()

    def up(self) -> None:
        """Set up namespaces, certificates and both guests; boot the PVM. No controller runs yet."""
        self.down()
        self.work.mkdir(parents=True, exist_ok=True)
        self.say("guest image")
        self.guest = guest_files.build(self.build)
        self.accel = vms.choose_accel(self.procs, self.build, self.guest, self.qemu)
        if self.kind == "debian":
            self.guest = debian.build(self.build, self.guest, self.variant, self.say)
        self._shim = vms.shim_for(self.accel, self.build, self.qemu)
        self.say("namespaces")
        self.net.up()
        self._certificates()
        for name in self.disks:
            self._make_disk(name)
        for role in ("primary", "secondary"):
            self.config_path(role).write_text(self._config(role))
        self.say(f"booting both guests (QEMU {self.qemu_version}, {self.accel})")
        self.start_vm("primary")
        self.start_vm("secondary")
        self.vm["primary"].wait_boot(self.variant.boot_s)
        self.say("the guest's services run")

    def down(self) -> None:
        """End every process of this lab and remove its namespaces and pins."""
        for c in self._captures:
            c.stop()
        self._captures.clear()
        for p in self.controllers.values():
            stop_process(p)
        self.controllers.clear()
        for v in self.vm.values():
            v.stop()
        self.vm.clear()
        self.procs.end_leftovers()
        self.net.down()
        # The devices are gone with their namespaces; the pins are not.
        for role in ("primary", "secondary"):
            (self.work / f"{PAIR}.{role}.attached").unlink(missing_ok=True)
            # the next laboratory has other disks
            mark_file.paths(str(self.work), PAIR)[role].unlink(missing_ok=True)
        cleanup.cleanup(PAIR, "/sys/fs/bpf", str(self.work), force=True)

    @property
    def qemu_version(self) -> str:
        return ".".join(map(str, vms.qemu_version(self.qemu)))

    def ns(self, role: str) -> str:
        return self.net.primary if role == "primary" else self.net.secondary

    # ---- guests

    def start_vm(self, role: str, *, incoming: bool | None = None) -> vms.Vm:
        """Start a host's QEMU; `incoming`: it waits for a migration (default: the secondary)."""
        waits = role == "secondary" if incoming is None else incoming
        v = vms.Vm(
            self.procs,
            role,
            self.work,
            self.guest,
            self.accel,
            qemu=self.qemu,
            ns=self.ns(role),
            vnet_hdr=self.net.vnet_hdr,
            nics=self.net.nics,
            queues=self.net.queues,
            vcpus=self.vcpus,
            thread=self.thread,
            vhost=self.vhost,
            incoming=self._incoming(role) if waits else "",
            shim=self._shim,
            extra=[
                *(arg for name in self.disks for arg in self._drive(role, name)),
                *self.qemu_options,
            ],
        )
        self.vm[role] = v
        return v

    def image(self, role: str, disk: str) -> Path:
        """Return where a host keeps its copy of a disk."""
        return self.work / f"{role}.{disk}.qcow2"

    def _make_disk(self, name: str) -> None:
        """Make a disk as the primary's guest finds it; the secondary's copy is blank."""
        here, there = self.image("primary", name), self.image("secondary", name)
        if self.guest.root and name == self.disks[0]:
            shutil.copyfile(self.guest.root, here)
            disk_files.make_blank(there, self.variant.size_mib)
        else:
            disk_files.make_filesystem(here)
            disk_files.make_blank(there)

    def check_disk(self, role: str, name: str, acknowledged: Iterable[int]) -> disk_files.Verdict:
        """Look for records on a host's image that no QEMU uses any more. Raises LabError."""
        root = self.guest.root and name == self.disks[0]
        return disk_files.check(
            self.image(role, name), acknowledged, debian.RECORDS if root else ""
        )

    def power_off(self, role: str, timeout: float = POWER_OFF_S) -> None:
        """Have the Debian guest shut itself down. Raises LabError if its QEMU does not end."""
        self.client.run("systemctl poweroff")
        wait_for(f"the guest's shutdown on the {role}", lambda: not self.vm[role].alive, timeout)

    def _drive(self, role: str, disk: str) -> list[str]:
        """Return the QEMU options of a disk, as a user writes them who knows of no pair."""
        drive = f"file={self.image(role, disk)},format=qcow2,if=none,id={disk}"
        return ["-drive", drive, "-device", f"virtio-blk-pci,drive={disk},id=v{disk}"]

    def _migrate_uri(self, role: str) -> str:
        """Return where a host's QEMU waits for the other one's state."""
        if self.tcp:
            return f"tcp:{PEER_P if role == 'primary' else PEER_S}:{MIGRATE_PORT}"
        return f"unix:{self.work}/migrate.sock"

    def _incoming(self, role: str) -> str:
        """Return a host's -incoming: with multifd its controller says where to wait."""
        multifd = self.overrides.get("migration", {}).get("multifd")
        return "defer" if multifd else self._migrate_uri(role)

    # ---- controllers

    def config_path(self, role: str) -> Path:
        return self.work / f"{role}.toml"

    def _certificates(self) -> None:
        if not (self.work / "ca.crt").exists():
            pki.init(self.work, PAIR)
        for role in pki.ROLES:
            pki.issue(self.work, role, renew=True)

    def _config(self, role: str) -> str:
        local, remote = (PEER_P, PEER_S) if role == "primary" else (PEER_S, PEER_P)
        port = 9847 if role == "primary" else 9848
        networks = [
            {"name": name, "tap": f"tap{i}", "peer_link": f"peer{i}", "bridge": f"br{i}"}
            for i, (name, _, _) in enumerate(NETWORKS[: self.net.nics])
        ]
        if len(networks) == 1:
            del networks[0]["name"]
        for network in networks[1:]:
            network |= {"vxlan_local": local, "vxlan_remote": remote}
        sections: dict[str, dict[str, Any]] = {
            "network": dict[str, Any](networks[0]),
            "qemu": {
                "qmp": str(self.work / f"{role}.qmp"),
                "qmp_oob": str(self.work / f"{role}.oob.qmp"),
                "migrate_uri": self._migrate_uri("secondary"),
                "reverse_uri": self._migrate_uri("primary"),
            },
            "peer": {
                "local": f"{local}:9846",
                "remote": f"{remote}:9846",
                "cert": str(self.work / f"{role}.crt"),
                "key": str(self.work / f"{role}.key"),
                "ca": str(self.work / "ca.crt"),
            },
            "datapath": {
                "run_dir": str(self.work),
                "state_dir": str(self.work),
                "fast_path_memory": 32,
            },
            "metrics": {"listen": f"127.0.0.1:{port}"},
        }
        if self.guest.root:
            sections["qemu"]["enter_stop"] = ENTER_STOP_MS
        if self.disks:
            sections["nbd"] = {"local": f"{local}:{NBD_PORT}", "remote": f"{remote}:{NBD_PORT}"}
        for section, keys in self.overrides.items():
            sections.setdefault(section, {}).update(keys)
        lines = [f'pair = "{PAIR}"', f'role = "{role}"']
        several = len(networks) > 1
        for section, keys in sections.items():
            lines.append("[[network]]" if several and section == "network" else f"[{section}]")
            lines += [f"{k} = {_toml(v)}" for k, v in keys.items()]
        for network in networks[1:]:
            lines += ["[[network]]", *(f"{k} = {_toml(v)}" for k, v in network.items())]
        for name in self.disks:
            overlays = self.work / f"{role}.overlays"
            overlays.mkdir(exist_ok=True)
            lines += ["[[disk]]", f'name = "{name}"', f'overlays = "{overlays}"']
            lines.append(f"overlay_limit = {self.overlay_limit}")
        return "\n".join(lines) + "\n"

    def start_controller(
        self, role: str, env: dict[str, str] | None = None
    ) -> subprocess.Popen[bytes]:
        """Run `colo-xdp run` in the host's namespace."""
        cmd = [sys.executable, "-m", "colo_xdp.cli", "run", str(self.config_path(role))]
        package = str(Path(__file__).resolve().parents[2])
        env = {
            "COLO_XDP_LOG": "INFO", "PYTHONUNBUFFERED": "1", "PYTHONPATH": package, **(env or {}),
        }  # fmt: skip
        p = self.procs.start(cmd, self.controller_log(role), self.ns(role), env)
        self.controllers[role] = p
        return p

    def controller_log(self, role: str) -> Path:
        return self.work / f"{role}.controller.log"

    def ask(self, role: str, command: str, **args: Any) -> dict[str, Any]:
        """Send a command over the control socket, as the CLI does."""
        return control_socket.request(str(self.work / f"{PAIR}.{role}.sock"), command, args)

    def status(self, role: str) -> dict[str, Any]:
        """Return the controller's status; raise LabError with its log if it has exited."""
        p = self.controllers.get(role)
        try:
            return self.ask(role, "status")
        except control_socket.NotRunning as e:
            if p is not None and p.poll() is not None:
                log = self.controller_log(role).read_text()[-3000:]
                raise LabError(f"the {role}'s controller has exited ({p.returncode}): {log}") from e
            return {}

    def wait_state(
        self,
        role: str,
        state: str,
        timeout: float | None = None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> dict[str, Any]:
        """Wait until a controller is in a state and return its status; call `meanwhile` in between.

        Raises LabError with what it says.
        """
        last: dict[str, Any] = {}

        def there() -> dict[str, Any] | None:
            nonlocal last
            meanwhile()
            last = self.status(role)
            return last if last.get("state") == state else None

        try:
            return wait_for(f"state {state} of the {role}", there, timeout or self.patience_s)
        except LabError as e:
            log = self.controller_log(role).read_text()[-2000:]
            raise LabError(f"{e}: {last.get('state')}: {last.get('reason')}\n{log}") from e

    def protect(self, meanwhile: Callable[[], None] = lambda: None) -> float:
        """Start both controllers and wait for protection; return the time it took, s."""
        t = time.monotonic()
        for role in ("secondary", "primary"):
            self.start_controller(role)
        for role in ("primary", "secondary"):
            self.wait_state(role, "protected", meanwhile=meanwhile)
        return time.monotonic() - t

    def checkpoints(self) -> int:
        """Return the number of checkpoints of the primary so far."""
        return int(self.status("primary")["checkpoints"]["total"])

    def capture(
        self, ns: str, dev: str, name: str, direction: str = "inout", *, whole: bool = False
    ) -> Capture:
        """Start a capture that ends with the lab; direction at the device: in, out, inout."""
        c = Capture(self.procs, ns, dev, self.work / f"{name}.pcap", direction, whole=whole)
        self._captures.append(c)
        return c

    def stop_capture(self, c: Capture) -> list[tuple[float, bytes]]:
        """End a capture and return its frames."""
        self._captures.remove(c)
        return c.stop()


def _toml(v: Any) -> str:
    if isinstance(v, bool):
        return str(v).lower()
    if isinstance(v, list):
        return "[" + ", ".join(_toml(x) for x in v) + "]"
    return f'"{v}"' if isinstance(v, str) else str(v)
