# SPDX-License-Identifier: GPL-2.0-or-later
"""A guest that exists: what its QEMU's command line or libvirt's description says, and what not."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.setup import libvirt_domain, qemu_arguments, qemu_unit, running
from colo_xdp.setup.files import configs
from colo_xdp.setup.guest import Guest, GuestDisk, GuestNic
from colo_xdp.setup.libvirt_domain import DomainError
from colo_xdp.setup.qemu_arguments import ArgumentsError
from colo_xdp.setup.reader import answers
from colo_xdp.setup.transaction import InstallError

from .pairs import flags

UNKNOWN = flags(memory="", disk=())
LINE = """/usr/bin/qemu-system-x86_64 -S -daemonize -pidfile /run/vm.pid -enable-kvm
 -machine pc-i440fx-7.2,accel=kvm -cpu host,+x2apic -m size=2G,slots=2 -smp 4,sockets=1
 -drive if=none,id=d0,file=/var/lib/vm/a,,b.qcow2,format=qcow2 -device virtio-blk-pci,drive=d0
 -drive file=/iso/x.iso,media=cdrom -drive if=pflash,file=/fw.fd
 -blockdev driver=file,node-name=f1,filename=/dev/vg/data
 -blockdev driver=raw,node-name=r1,file=f1 -device scsi-hd,drive=r1
 -netdev tap,id=n0,ifname=tap-web1,script=no,downscript=no,queues=2,vhost=on
 -device virtio-net-pci,netdev=n0,mac=52:54:00:AA:BB:01,mq=on,vectors=6
 -object filter-mirror,id=m0,netdev=n0,queue=tx,outdev=x -monitor stdio
 -chardev socket,id=c0,path=/run/vm/c.qmp,server=on,wait=off -mon chardev=c0,mode=control
 -qmp unix:/run/vm/a.qmp,server=on,wait=off -incoming tcp:0:4444 -vnc :1"""


def of(line: str) -> Guest:
    return qemu_arguments.guest("QEMU 7", shlex.split(line), "web1")


def test_what_a_command_line_says() -> None:
    g = of(LINE)
    assert (g.memory, g.cpus, g.machine, g.cpu) == (2048, 4, "pc-i440fx-7.2", "host")
    assert g.nics == (GuestNic(mac="52:54:00:aa:bb:01", tap="tap-web1", queues=2),)
    assert g.disks == (
        GuestDisk(name="d0", file="/var/lib/vm/a,b.qcow2", format="qcow2"),
        GuestDisk(name="r1", file="/dev/vg/data", format="raw"),
    )
    assert g.qmp == ("/run/vm/c.qmp", "/run/vm/a.qmp")


def test_the_order_of_devices_is_kept_and_what_is_left_out_is_named() -> None:
    g = of(LINE)
    kept = shlex.split(LINE)
    for word in ("-S", "-daemonize"):
        kept.remove(word)
    for word in ("-pidfile", "-object", "-monitor", "-incoming"):
        at = kept.index(word)
        del kept[at : at + 2]
    assert list(g.command) == kept
    left = "\n".join(g.left)
    for said in ("-S is left out", "-daemonize is left out", "-pidfile /run/vm.pid is left out",
                 "-incoming tcp:0:4444 is left out", "-object filter-mirror is left out",
                 "-monitor stdio is left out", "vhost=on has not been tried",
                 "add guest_announce=off"):  # fmt: skip
        assert said in left, said
    assert all(text.startswith("QEMU 7: ") for text in g.left)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-netdev user,id=n0 -device e1000,netdev=n0", "a pair needs a tap"),
        ("-nic user", "write it as -netdev and -device"),
        ("-device vfio-pci,host=01:00.0", "cannot be copied to another host"),
        ("-snapshot", "what the guest writes would be lost"),
        ("-machine q35", "before QEMU 11 it has to be pc"),
        ("", "it has 0 QMP sockets of its own, and a pair needs two"),
        ("-netdev tap,fd=9,id=n0 -device virtio-net,netdev=n0", "no name; it becomes tap-web1"),
        ("-netdev tap,id=n0,ifname=t0", "script=no,downscript=no is added"),
        ("-netdev tap,id=n,ifname=t -device e1000,netdev=n", "QEMU's own 52:54:00:12:34:56"),
    ],
)
def test_what_a_pair_cannot_have_is_named(words: str, said: str) -> None:
    assert said in "\n".join(of(f"qemu-system-x86_64 {words}").left)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("-hda /a -hdb /b", ["ide0-hd0", "ide0-hd1"]),
        ("/a", ["ide0-hd0"]),
        ("-drive file=/a -drive file=/b -drive file=/c", ["ide0-hd0", "ide0-hd1", "ide1-hd0"]),
        ("-drive if=virtio,file=/a -drive if=virtio,file=/b", ["virtio0", "virtio1"]),
        ("-drive if=virtio,index=3,file=/a", ["virtio3"]),
        ("-drive if=virtio,file=/a,readonly=on", []),
        ("""-blockdev '{"driver":"qcow2","node-name":"q","file":{"driver":"file","filename":"/a"}}'
         -device '{"driver":"virtio-blk-pci","drive":"q"}'""", ["q"]),
    ],
)  # fmt: skip
def test_disks_have_the_names_that_qemu_gives_them(words: str, names: list[str]) -> None:
    g = of(f"qemu {words}")
    assert [d.name for d in g.disks] == names
    assert all(d.file.startswith("/") for d in g.disks)


def test_a_tap_without_a_name_gets_one() -> None:
    g = of(
        "qemu -netdev tap,fds=3:4,id=n0,vhost=off -device virtio-net,netdev=n0,mac=52:54:00:0:0:1"
    )
    at = g.command.index("-netdev") + 1
    assert g.command[at] == ("tap,id=n0,vhost=off,queues=2,ifname=tap-web1,script=no,downscript=no")
    assert g.nics[0].queues == 2


def test_a_pair_of_a_guest_with_two_monitors_uses_them() -> None:
    a = answers(UNKNOWN, guest=of(LINE))
    c = configs(a)["primary"]
    assert (c.qemu.qmp, c.qemu.qmp_oob) == ("/run/vm/c.qmp", "/run/vm/a.qmp")
    assert qemu_unit.command(a, "primary") == list(a.guest.command)  # type: ignore[union-attr]
    unit = next(t for p, t, _ in qemu_unit.files(a, "primary") if p.endswith("qemu@web1.service"))
    assert 'ExecStartPre=+/usr/bin/install -d -m 0700 "/run/vm"' in unit
    one = answers(UNKNOWN, guest=of(LINE.replace("-qmp unix:/run/vm/a.qmp,server=on,wait=off", "")))
    assert configs(one)["primary"].qemu.qmp == "/run/colo-vm/web1/qmp"
    assert "-qmp" in qemu_unit.command(one, "primary")


def test_disks_that_were_plugged_in_are_known_from_qmp() -> None:
    blocks = [
        {"device": "d0", "inserted": {"ro": False, "node-name": "#b1", "file": "/a"}},
        {"device": "", "qdev": "hot", "inserted": {"node-name": "h1", "file": "/h", "drv": "raw"}},
        {"device": "cd", "inserted": {"ro": True, "file": "/iso"}},
        {"device": "pflash0", "inserted": {"file": "/fw"}},
        {"device": "empty"},
    ]
    g = qemu_arguments.with_disks(of(LINE), blocks)
    assert g.disks[-1] == GuestDisk(name="h1", file="/h", format="raw") and len(g.disks) == 3
    assert "disk h1 (/h) is not in its command line" in g.left[-1]


def test_no_command_line() -> None:
    with pytest.raises(ArgumentsError, match="there is no command line"):
        qemu_arguments.guest("QEMU 7", [], "web1")


DATA = Path(__file__).parent / "data"


def test_a_qemu_that_libvirt_runs() -> None:
    """As libvirt 9.0 has started it: JSON, descriptors, and files of this one run."""
    words = (DATA / "libvirt-9.0.cmdline").read_text().splitlines()
    g = qemu_arguments.guest("QEMU 7", words, "web1")
    assert (g.memory, g.cpus, g.machine, g.cpu, g.qmp) == (256, 2, "pc-i440fx-7.2", "qemu64", ())
    assert g.nics == (
        GuestNic(mac="52:54:00:6b:3c:58", tap="tap-web1"),
        GuestNic(mac="52:54:00:2c:49:6a", tap="tap2-web1"),
    )
    assert g.disks == (GuestDisk(
        name="libvirt-2-format", file="/var/lib/libvirt/images/web1.qcow2", format="raw"),
    )  # fmt: skip
    left = "\n".join(g.left)
    for said in ("libvirt runs it", "-chardev charmonitor is left out", "-mon charmonitor is left",
                 "-S is left out", "it has 0 QMP sockets"):  # fmt: skip
        assert said in left, left
    assert not [w for w in g.command if "fd=" in w or '"fd"' in w or "master-key" in w]
    assert g.command[-4:] == tuple(words[-4:])


# ---- the process


def test_a_process_that_is_no_qemu() -> None:
    with pytest.raises(InstallError, match="and no QEMU"):
        running.from_qemu(os.getpid(), "web1")
    with pytest.raises(InstallError, match=r"--from-qemu 4194999: No such file"):
        running.from_qemu(4194999, "web1")


def test_a_running_process_is_read(tmp_path: Path) -> None:
    """With a monitor that nobody serves: the command line is what there is."""
    path = tmp_path / "q"
    with socket.socket(socket.AF_UNIX) as s:
        s.bind(str(path))
        (tmp_path / "disk.img").touch()
        p = subprocess.Popen(
            ["qemu-fake", "-c", "import time; time.sleep(60)", "-drive",
             "if=virtio,file=disk.img,format=raw", "-qmp", f"unix:{path},server=on"],
            executable=sys.executable, cwd=tmp_path,
        )  # fmt: skip
        try:
            while not Path(f"/proc/{p.pid}/cmdline").read_bytes():
                time.sleep(0.01)  # its exec is not complete
            g = running.from_qemu(p.pid, "web1")
        finally:
            p.kill()
            p.wait()
    assert g.disks == (GuestDisk(name="virtio0", file=f"{tmp_path}/disk.img", format="raw"),)
    assert any("only its command line was read" in text for text in g.left)


# ---- libvirt

DOMAIN = """<domain type='kvm' id='3'>
  <name>web1</name>
  <memory unit='KiB'>4194304</memory><currentMemory unit='KiB'>4194304</currentMemory>
  <vcpu placement='static'>4</vcpu>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type><boot dev='hd'/></os>
  <features><acpi/><apic/></features>
  <cpu mode='host-passthrough' check='none'/>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/><source file='/var/lib/libvirt/images/web1.qcow2'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    <disk type='block' device='disk'>
      <driver name='qemu' type='raw'/><source dev='/dev/vg/web1'/><target dev='sdb' bus='scsi'/>
    </disk>
    <disk type='file' device='cdrom'>
      <source file='/iso/x.iso'/><target dev='hda' bus='ide'/><readonly/>
    </disk>
    <controller type='usb' index='0' model='piix3-uhci'/>
    <interface type='bridge'>
      <mac address='52:54:00:6B:3C:58'/><source bridge='br0'/><target dev='vnet0'/>
      <model type='virtio'/><driver name='vhost' queues='4'/>
    </interface>
    <interface type='network'>
      <mac address='52:54:00:6b:3c:59'/><source network='default' bridge='virbr0'/>
      <target dev='tap-san'/><model type='e1000'/>
    </interface>
    <hostdev mode='subsystem' type='pci'/>
    <graphics type='vnc' port='-1'/>
    <memballoon model='virtio'/>
  </devices>
</domain>
"""


def test_what_a_domain_says() -> None:
    g = libvirt_domain.guest("web1", DOMAIN)
    assert (g.memory, g.cpus, g.machine, g.cpu) == (4096, 4, "pc-i440fx-7.2", "host")
    assert g.nics == (
        GuestNic(mac="52:54:00:6b:3c:58", tap="", bridge="br0", queues=4),
        GuestNic(mac="52:54:00:6b:3c:59", tap="tap-san", bridge="virbr0"),
    )
    assert g.disks == (
        GuestDisk(name="vda", file="/var/lib/libvirt/images/web1.qcow2", format="qcow2"),
        GuestDisk(name="sdb", file="/dev/vg/web1", format="raw"),
    )
    left = "\n".join(g.left)
    for said in ("<hostdev> is left out", "<graphics> is left out", "e1000: it becomes virtio",
                 "sdb: its bus becomes virtio", "hda: read-only, and left out",
                 "<features>: QEMU's own", "leaves libvirt"):  # fmt: skip
        assert said in left, said
    a = answers(flags(memory="", disk=(), peer_link="", bridge="",
                      nic=("peer-link=eth1", "peer-link=eth2,bridge=br1")), guest=g)  # fmt: skip
    assert [n.tap.primary for n in a.nics] == ["tap-web1", "tap-san"]
    assert [n.bridge.primary for n in a.nics] == ["br0", "br1"]
    line = " ".join(qemu_unit.command(a, "primary"))
    assert "ifname=tap-web1,script=no,downscript=no,vnet_hdr=on,queues=4" in line
    assert "mac=52:54:00:6b:3c:59" in line and "file=/dev/vg/web1,format=raw" in line


@pytest.mark.parametrize("which", ["libvirt-9.0.xml", "libvirt-9.0-running.xml"])
def test_what_libvirt_has_written_itself(which: str) -> None:
    g = libvirt_domain.guest("web1", (DATA / which).read_text())
    assert (g.memory, g.cpus, g.machine, g.cpu) == (256, 2, "pc-i440fx-7.2", "qemu64")
    assert g.nics == (
        GuestNic(mac="52:54:00:6b:3c:58", bridge="br0"),
        GuestNic(mac="52:54:00:2c:49:6a", bridge="br1"),
    )
    assert g.disks == (
        GuestDisk(name="vda", file="/var/lib/libvirt/images/web1.qcow2", format="raw"),
    )
    assert not [x for x in g.left if any(f"<{t}>" in x for t in ("controller", "input", "audio"))]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "its description is no XML"),
        ("<domain type='kvm'>", "its description is no XML"),
        ("<network/>", "its description is a <network>"),
        ("<domain type='xen'/>", "is of type xen, and not QEMU's"),
        ("<domain type='kvm'/>", "its <memory> is not readable"),
        (DOMAIN.replace("<source dev='/dev/vg/web1'/>", "<source pool='p' volume='v'/>"),
         "disk sdb is in no file or block device"),
        ("<!DOCTYPE d [<!ENTITY a 'b'>]>" + DOMAIN, "declares entities"),
    ],
)  # fmt: skip
def test_a_domain_that_cannot_be_taken_is_named(text: str, said: str) -> None:
    with pytest.raises(DomainError, match="domain web1") as e:
        libvirt_domain.guest("web1", text)
    assert said in str(e.value)


def _virsh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    (tmp_path / "virsh").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "virsh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")


def test_virsh_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "web1.xml").write_text(DOMAIN)
    _virsh(tmp_path, monkeypatch, f'[ "$3 $5" = "dumpxml web1" ] && cat {tmp_path}/web1.xml')
    assert running.from_libvirt("web1").memory == 4096


def test_virsh_that_fails_hangs_or_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(name: Any = "web1") -> str:
        with pytest.raises(InstallError) as e:
            running.from_libvirt(name)
        return str(e.value)

    assert "expected the name of a domain" in said("--help")
    _virsh(tmp_path, monkeypatch, "echo 'error: failed to get domain' >&2; exit 1")
    assert "--from-libvirt web1: virsh: error: failed to get domain" in said()
    _virsh(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(running, "VIRSH_S", 0.2)
    assert "timed out" in said()
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert "there is no virsh here" in said()
