# SPDX-License-Identifier: GPL-2.0-or-later
"""Make answers of flags. Pure.

All mistakes are reported together, each by the flag that it is in. Where the hosts differ, a value
is "the primary's/the secondary's".
"""

from __future__ import annotations

import hashlib
import ipaddress
import re
import shlex
from collections.abc import Iterable, Sequence

from .. import validate
from ..config.network import DEFAULT_NIC
from ..config.schema import Config
from . import ports
from .answers import ROLES, Answers, Both, DiskAnswers, NicAnswers
from .flags import AnswersError, Flags, flag_name, missing
from .guest import Guest
from .ports import Ports

ARBITERS = ("fence", "lease", "manual")
MAX_NICS, MAX_HEARTBEATS = 8, 4
NIC_KEYS = ("name", "peer-link", "bridge", "tap", "mac", "queues", "vxlan")
DISK_KEYS = ("file", "format", "name", "secondary-file", "external")

_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?")
#: narrower than the kernel: a name is also a pattern in systemd's files
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,14}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._,=+-]{0,254}")
_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_DISK = re.compile(r"[A-Za-z][A-Za-z0-9._-]{0,17}")
_PATH = re.compile(r"/[^\x00-\x1f\x7f]{1,4000}")
_NETWORK = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,200}\.network")


def answers(flags: Flags, taken: Iterable[int] = (), guest: Guest | None = None) -> Answers:
    """Make the answers of the flags, and of a guest that exists.

    `taken`: ports and VNIs of other pairs here. Raises AnswersError with every mistake.
    """
    reader = _Reader(flags, guest)
    made = reader.read(taken)
    if reader.errors:
        raise AnswersError(reader.errors)
    assert made is not None
    return made


def _matches(pattern: re.Pattern[str], want: str) -> validate.Check:
    return lambda v: None if pattern.fullmatch(v) else f"expected {want}"


_device = _matches(_DEVICE, "a network device (1 to 15 of A-Z, a-z, 0-9, '.', '_' and '-')")
_word = _matches(_WORD, "a word of letters, digits and ._,=+-")
_path = _matches(_PATH, "an absolute path")


def _ip(v: str) -> str | None:
    want = validate.ip(v)
    if want is None:
        address = (validate.split(f"[{v}]:1" if ":" in v else f"{v}:1") or (None,))[0]
        if (
            address is None or "%" in v or address.is_unspecified or address.is_loopback
            or address.is_multicast or address.is_link_local
        ):  # fmt: skip
            return "expected an address that the other host reaches, of no single link"
    return want


class _Reader:
    """One pass over the flags; collects a sentence for each mistake."""

    def __init__(self, flags: Flags, guest: Guest | None) -> None:
        self.flags, self.guest = flags, guest
        self.errors: list[str] = []

    def error(self, name: str, value: str, want: str) -> None:
        shown = value if len(value) <= 80 else value[:77] + "..."
        self.errors.append(f"{flag_name(name)} {shown}".rstrip() + f": {want}")

    # ---- single values

    def one(self, name: str, value: str, check: validate.Check, default: str) -> str:
        if not value:
            return default
        want = check(value)
        if want:
            self.error(name, value, want)
        return value

    def number(self, name: str, value: str, low: int, high: int, default: int) -> int:
        if not value:
            return default
        if re.fullmatch(r"[0-9]{1,9}", value) and low <= int(value) <= high:
            return int(value)
        self.error(name, value, f"expected a whole number from {low} to {high}")
        return default

    def both(
        self, name: str, value: str, check: validate.Check, *, same: bool = False
    ) -> Both[str]:
        """Read "the primary's/the secondary's"; with `same` one value may do for both."""
        parts = value.split("/")
        if len(parts) == 1 and same:
            parts = [value, value]
        if len(parts) != 2:
            want = "one value, or two with / between: " if same else "two values with / between: "
            self.error(name, value, f"expected {want}the primary host's, the secondary host's")
            return Both("", "")
        for want in dict.fromkeys(w for p in parts if (w := check(p))):
            self.error(name, value, want)
        if not same and parts[0] == parts[1]:
            self.error(name, value, "expected two different ones")
        return Both(*parts)

    def pairs_of(self, name: str, text: str, known: Sequence[str]) -> dict[str, str]:
        """Read "key=value,key=value"; `external` needs no value."""
        out: dict[str, str] = {}
        for part in text.split(","):
            key, equals, value = part.partition("=")
            if key not in known or (not equals and key != "external"):
                self.error(name, text, f"{part!r}: expected KEY=VALUE of {', '.join(known)}")
            elif key in out:
                self.error(name, text, f"{key} is there twice")
            else:
                out[key] = value
        return out

    def ips(self, name: str, value: str, default: Both[str] | None = None) -> Both[str]:
        if not value and default is not None:
            return default
        found = self.both(name, value, _ip)
        if not all(validate.ip(v) is None for v in (found.primary, found.secondary)):
            return found
        found = Both(*(str(ipaddress.ip_address(v)) for v in (found.primary, found.secondary)))
        if found.primary == found.secondary and value.partition("/")[0] != value.partition("/")[2]:
            self.error(name, value, "expected two different ones")
        if (":" in found.primary) != (":" in found.secondary):
            self.error(name, value, "expected two of one family, IPv4 or IPv6")
        return found

    # ---- groups

    def read(self, taken: Iterable[int]) -> Answers | None:
        f, guest = self.flags, self.guest
        for name, question in missing(f, guest):
            self.errors.append(f"{flag_name(name)} is missing: {question}")
        self._not_with_a_guest()
        check = validate.keys(Config)["pair"].metadata["check"]
        pair = self.one("pair", f.pair, check, "")
        addresses = self.ips("addresses", f.addresses, None if f.addresses else Both("", ""))
        hosts = Both("", "")
        if f.hosts:
            hosts = self.both("hosts", f.hosts, _matches(_HOST, "host names"))
        migration = self.ips("migration", f.migration, addresses)
        networks = Both("", "")
        if f.migration_network:
            networks = self.both(
                "migration_network", f.migration_network,
                _matches(_NETWORK, "names of systemd-networkd's files, such as 20-eth2.network"),
                same=True,
            )  # fmt: skip
        heartbeats = tuple(self._heartbeat(x, addresses) for x in f.heartbeat)
        if len(heartbeats) > MAX_HEARTBEATS:
            self.errors.append(f"--heartbeat: {len(heartbeats)}: expected {MAX_HEARTBEATS} at most")
        nics = self._nics(pair, addresses)
        disks = self._disks()
        fence, arbiter = self._arbiter()
        user = self.one("qemu_user", f.qemu_user, _matches(_USER, "the name of a user"), "")
        accel = self.one("accel", f.accel, validate.choice("kvm", "tcg"), "kvm")
        overlays = self.one("overlays", f.overlays, _path, f"/var/lib/colo-xdp/{pair}")
        if f.overlays and all(d.external for d in disks):
            self.error("overlays", f.overlays, "expected only with a disk that is replicated")
        for arg in f.qemu_arg:
            if not arg or re.search(r"[\x00-\x1f\x7f]", arg):
                self.error("qemu_arg", repr(arg), "expected an argument without control characters")
        program = self.one("qemu", f.qemu, _matches(
            re.compile(r"/?[A-Za-z0-9._+-]+(/[A-Za-z0-9._+-]+)*"), "a program"),
            "qemu-system-x86_64")  # fmt: skip
        made_ports = self._ports(taken)
        memory = self._memory()
        cpus = self.number("cpus", f.cpus, 1, 1024, guest.cpus if guest else 1)
        machine = self.one("machine", f.machine, _word, guest.machine if guest else "") or "pc"
        cpu = self.one("cpu", f.cpu, _word, guest.cpu if guest else "")
        if self.errors or made_ports is None:
            return None
        return Answers(
            pair=pair, hosts=hosts, addresses=addresses, migration=migration,
            migration_network=networks, heartbeats=heartbeats, nics=nics, disks=disks,
            overlays=overlays, ports=made_ports, memory=memory, accel=accel, qemu=program,
            qemu_user=user, qemu_args=f.qemu_arg, arbiter=arbiter, fence=fence, etcd=f.etcd,
            etcd_files=(f.etcd_ca, f.etcd_cert, f.etcd_key), guest=guest,
            cpus=cpus, machine=machine, cpu=cpu or ("host" if accel == "kvm" else "max"),
        )  # fmt: skip

    def _not_with_a_guest(self) -> None:
        """What describes the guest comes from the guest, if there is one."""
        if self.guest is None:
            return
        names = ["memory", "cpus", "machine", "cpu", "disk", "mac", "queues"]
        if self.guest.command:
            names += ["accel", "qemu", "tap"]
        for name in names:
            if getattr(self.flags, name):
                self.errors.append(f"{flag_name(name)}: not with a guest that exists: it says that")

    def _ports(self, taken: Iterable[int]) -> Ports | None:
        f, numbers = self.flags, set(taken)
        base = self.number("base_port", f.base_port, 1024, ports.LAST, 0)
        if not base:
            try:
                return ports.choose(numbers)
            except ports.NoPorts as e:
                self.errors.append(f"--base-port is missing: {e}")
                return None
        block = Ports(base)
        if used := sorted(numbers.intersection(block.numbers)):
            shown = ", ".join(map(str, used))
            self.error("base_port", f.base_port, f"{block}: another pair here uses {shown}")
        return block

    def _memory(self) -> int:
        text = self.flags.memory
        if self.guest is not None or not text:
            return self.guest.memory if self.guest else 0
        m = re.fullmatch(r"([0-9]{1,8})([MG]?)", text)
        size = int(m[1]) * (1024 if m[2] == "G" else 1) if m else 0
        if not 16 <= size <= 1 << 26:
            self.error("memory", text, "expected MiB, or such as 4G, from 16 MiB on")
        return size

    def _heartbeat(self, text: str, addresses: Both[str]) -> Both[str]:
        found = self.ips("heartbeat", text)
        if found == addresses:
            self.error("heartbeat", text, "expected other addresses than --addresses")
        return found

    # ---- network cards

    def _nics(self, pair: str, addresses: Both[str]) -> tuple[NicAnswers, ...]:
        f, guest = self.flags, self.guest
        single = {
            k: v
            for k in NIC_KEYS[1:]
            if (v := getattr(f, k.replace("-", "_")))
        }  # fmt: skip
        if f.nic:
            for key in single:
                self.errors.append(f"--{key}: not with --nic, which has it as {key}=")
            specs = [self.pairs_of("nic", text, NIC_KEYS) for text in f.nic]
        else:
            specs = [single]
        if guest is not None and len(guest.nics) != len(specs):
            self.errors.append(
                f"--nic: {len(specs)} described, and the guest has {len(guest.nics)} network "
                "cards: expected one --nic for each, in their order"
            )
            return ()
        if len(specs) > MAX_NICS:
            self.errors.append(f"--nic: {len(specs)} network cards: expected {MAX_NICS} at most")
            return ()
        found = tuple(
            self._nic(i, spec, pair, addresses, several=len(specs) > 1)
            for i, spec in enumerate(specs)
        )
        for role in ROLES:
            self._own_devices(found, role)
        for what, names in (("name", [n.name for n in found]), ("mac", [n.mac for n in found])):
            if len(set(names)) < len(names):
                self.error("nic", ", ".join(names), f"expected a {what} of its own for each")
        return found

    def _nic(
        self, i: int, spec: dict[str, str], pair: str, addresses: Both[str], *, several: bool
    ) -> NicAnswers:
        known = self.guest.nics[i] if self.guest else None
        source = "nic" if self.flags.nic else ""

        def both(key: str, default: str, check: validate.Check = _device) -> Both[str]:
            value = spec.get(key) or default
            name = source or key.replace("-", "_")
            return self.both(name, value, check, same=True) if value else Both("", "")

        vxlan = self.ips(source or "vxlan", spec["vxlan"]) if spec.get("vxlan") else None
        number = "" if i == 0 else str(i + 1)
        if source and not spec.get("peer-link") and not vxlan:
            self.error("nic", self.flags.nic[i], "peer-link= or vxlan= is missing")
        mac = self.one(source or "mac", spec.get("mac", ""), validate.mac, "")
        name = self.one(
            "nic", spec.get("name", ""), _matches(re.compile("[a-z0-9-]{1,10}"),
            "a name of 1 to 10 of a-z, 0-9 and -"), f"net{i}" if several else DEFAULT_NIC,
        )  # fmt: skip
        fixed = ("mac", "queues", *(("tap",) if self.guest and self.guest.command else ()))
        if known and source and any(spec.get(key) for key in fixed):
            self.error("nic", self.flags.nic[i], f"{', '.join(fixed)}: the guest says that")
        return NicAnswers(
            name=name,
            tap=both("tap", (known and known.tap) or f"tap{number}-{pair}"),
            peer_link=both("peer-link", f"cx{number}-{pair}" if vxlan else ""),
            bridge=both("bridge", (known and known.bridge) or ""),
            mac=((known and known.mac) or mac or _mac(pair, addresses, i)).lower(),
            queues=known.queues if known else self.number(
                source or "queues", spec.get("queues", ""), 1, 256, 1),
            vxlan=vxlan,
        )  # fmt: skip

    def _own_devices(self, nics: Iterable[NicAnswers], role: str) -> None:
        """No device of a host has two tasks; several taps may join one bridge."""
        tasks: dict[str, str] = {}
        for nic in nics:
            for device, task in ((nic.tap.of(role), "tap"), (nic.peer_link.of(role), "peer link")):
                if device and tasks.setdefault(device, f"{task} of {nic.name}") != (
                    f"{task} of {nic.name}"
                ):
                    self.errors.append(
                        f"{'--nic' if self.flags.nic else '--' + task.replace(' ', '-')} {device}: "
                        f"it is the {tasks[device]} of the {role} host already"
                    )
        for nic in nics:
            bridge = nic.bridge.of(role)
            if bridge in tasks:
                self.errors.append(f"--bridge {bridge}: it is the {tasks[bridge]} already")

    # ---- disks

    def _disks(self) -> tuple[DiskAnswers, ...]:
        if self.guest is not None:
            found = [
                DiskAnswers(name=d.name, file=Both(d.file, d.file), format=d.format)
                for d in self.guest.disks
            ]
        else:
            found = [self._disk(i, text) for i, text in enumerate(self.flags.disk)]
        names = [d.name for d in found]
        if len(set(names)) < len(names):
            self.error("disk", ", ".join(names), "expected a name of its own for each")
        for role in ROLES:
            files = [d.file.of(role) for d in found]
            if len(set(files)) < len(files):
                self.error("disk", ", ".join(files), "expected a file of its own for each")
        return tuple(found)

    def _disk(self, i: int, text: str) -> DiskAnswers:
        spec = self.pairs_of("disk", text, DISK_KEYS)
        file = spec.get("file", "")
        if "external" in spec and spec["external"] not in ("", "true"):
            self.error("disk", text, "external takes no value")
        files = Both(file, spec.get("secondary-file") or file)
        for path in {files.primary, files.secondary}:
            if want := _path(path):
                self.error("disk", text, f"file: {want}")
        name = spec.get("name") or f"d{i}"
        if not _DISK.fullmatch(name):
            self.error("disk", text, "name: expected 1 to 18 of letters, digits, '.', '_' and '-'")
        kind = spec.get("format") or ("qcow2" if file.endswith(".qcow2") else "raw")
        if not re.fullmatch("[a-z0-9-]{1,20}", kind):
            self.error("disk", text, "format: expected one of QEMU's, such as qcow2 or raw")
        return DiskAnswers(name=name, file=files, format=kind, external="external" in spec)

    # ---- who makes sure that one guest transmits

    def _arbiter(self) -> tuple[Both[tuple[str, ...]], str]:
        f = self.flags
        given = "fence" if f.fence_primary or f.fence_secondary else "lease" if f.etcd else "manual"
        arbiter = self.one("arbiter", f.arbiter, validate.choice(*ARBITERS), given)
        commands = Both(
            self._argv("fence_primary", f.fence_primary),
            self._argv("fence_secondary", f.fence_secondary),
        )
        for name, argv in (("fence_primary", commands.primary),
                           ("fence_secondary", commands.secondary)):  # fmt: skip
            if arbiter == "fence" and not argv:
                self.errors.append(f"{flag_name(name)} is missing: required with --arbiter fence")
            if arbiter != "fence" and argv:
                self.error(name, getattr(f, name), f"not with --arbiter {arbiter}")
        if arbiter == "lease" and not f.etcd:
            self.errors.append("--etcd is missing: required with --arbiter lease")
        if arbiter != "lease":
            for name in ("etcd", "etcd_ca", "etcd_cert", "etcd_key"):
                if value := getattr(f, name):
                    shown = value if isinstance(value, str) else " ".join(value)
                    self.error(name, shown, f"not with --arbiter {arbiter}")
        elif f.etcd and (want := validate.urls(f.etcd)):
            self.error("etcd", " ".join(f.etcd), want)
        if bool(f.etcd_cert) != bool(f.etcd_key):
            self.errors.append("--etcd-cert, --etcd-key: expected both or none")
        for name in ("etcd_ca", "etcd_cert", "etcd_key"):
            self.one(name, getattr(f, name), _path, "")
        # A secondary's command switches the primary's host off, and the other way round.
        return Both(commands.secondary, commands.primary), arbiter

    def _argv(self, name: str, text: str) -> tuple[str, ...]:
        try:
            argv = tuple(shlex.split(text))
        except ValueError as e:
            self.error(name, text, f"expected a command: {e}")
            return ("",)
        if re.search(r"[\x00-\x1f\x7f]", text):
            self.error(name, repr(text), "expected a command without control characters")
        elif argv and not argv[0].startswith("/"):
            self.error(name, text, "expected the program by its absolute path")
        return argv


def _mac(pair: str, addresses: Both[str], i: int) -> str:
    """Return an address that is always the same for this NIC, and another pair's is not."""
    seed = f"{pair} {addresses.primary} {addresses.secondary} {i}"
    digest = hashlib.sha256(seed.encode()).digest()
    return "52:54:00:" + digest[:3].hex(":")
