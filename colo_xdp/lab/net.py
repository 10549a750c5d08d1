# SPDX-License-Identifier: GPL-2.0-or-later
"""Build three namespaces: a client with the switch, a primary host, a secondary host.

    <p>c   lan (bridge, 10.9.0.1, fd09::1) ----- to-p, to-s
    <p>p   uplink - br0 (tap0 is outside)  peer0 10.99.0.1
    <p>s   uplink - br0 (tap0 is outside)  peer0 10.99.0.2

A second NIC of the guest is on a network of its own: san (10.8.0.1, fd08::1), br1 and tap1. Its
frames go between the hosts on the same wire, in a VXLAN that the controllers create: peer1.

A tap joins its bridge when the controller there allows the guest to transmit (`join` without a
controller).

Processes enter by `nsenter --net`, never by `ip netns exec`, whose private mount namespace would
hide the BPF file system.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

GUEST_IP, CLIENT_IP = "10.9.0.2", "10.9.0.1"
GUEST_IP6, CLIENT_IP6 = "fd09::2", "fd09::1"
#: the networks of the guest's NICs: the client's bridge, and the first part of the addresses
NETWORKS = (("lan", "10.9.0", "fd09:"), ("san", "10.8.0", "fd08:"))
PEER_P, PEER_S = "10.99.0.1", "10.99.0.2"
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


class LabError(RuntimeError):
    """The laboratory could not be built, or did not reach the expected state in time."""


def sh(*cmd: str, check: bool = True, timeout: float = 60) -> str:
    """Run a command and return its output. Raises LabError with the output on failure, or at the
    deadline."""
    try:
        r = subprocess.run(cmd, capture_output=True, text=True, check=False, timeout=timeout)
    except subprocess.TimeoutExpired as e:
        raise LabError(f"{' '.join(cmd)}: not finished within {timeout:g} s") from e
    if check and r.returncode:
        raise LabError(f"{' '.join(cmd)}: {r.stdout}{r.stderr}".strip())
    return r.stdout


def wait_for(what: str, cond: Callable[[], T | None], timeout: float, poll: float = 0.02) -> T:
    """Return the first true value of `cond`. Raises LabError at the deadline."""
    end = time.monotonic() + timeout
    while True:
        v = cond()
        if v:
            return v
        if time.monotonic() > end:
            raise LabError(f"no {what} within {timeout:g} s")
        time.sleep(poll)


def in_ns(name: str, fn: Callable[[], T]) -> T:
    """Run fn in its own thread that has joined the namespace."""

    def body() -> T:
        fd = os.open(f"/run/netns/{name}", os.O_RDONLY)
        try:
            if _libc.setns(fd, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), f"setns {name}")
        finally:
            os.close(fd)
        return fn()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(body).result()


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat: with it a pid identifies one process for ever."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return ""


class Processes:
    """Processes of the lab, recorded on disk so that the next run can end a crash's leftovers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[int, str] = {}

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.known))

    def start(
        self,
        cmd: list[str],
        log: Path,
        ns: str | None = None,
        env: dict[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a command in a namespace, with its output to a file."""
        if ns:
            cmd = ["nsenter", f"--net=/run/netns/{ns}", *cmd]
        with log.open("ab") as out:
            p = subprocess.Popen(
                cmd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={**os.environ, **(env or {})},
                start_new_session=True,
            )
        self.known[p.pid] = _start_time(p.pid)
        self._save()
        return p

    def end_leftovers(self) -> None:
        """Kill what a former run left behind, by pid and start time."""
        with contextlib.suppress(OSError, ValueError):
            for pid, started in json.loads(self.path.read_text()).items():
                if started and _start_time(int(pid)) == started:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
        self.path.unlink(missing_ok=True)


def stop_process(p: subprocess.Popen[bytes] | None, timeout: float = 5.0) -> None:
    """Terminate a process, and kill it at the deadline."""
    if p is None or p.poll() is not None:
        return
    p.terminate()
    try:
        p.wait(timeout)
    except subprocess.TimeoutExpired:
        p.kill()
        p.wait()


class Topology:
    """The namespaces of one lab; `tag` keeps labs apart."""

    def __init__(self, tag: str, vnet_hdr: bool = True, nics: int = 1, queues: int = 1) -> None:
        self.client, self.primary, self.secondary = (f"{tag}{x}" for x in "cps")
        self.vnet_hdr, self.nics, self.queues = vnet_hdr, nics, queues

    @property
    def all(self) -> tuple[str, str, str]:
        return self.client, self.primary, self.secondary

    def down(self) -> None:
        """Remove the namespaces, whoever created them."""
        for ns in self.all:
            if Path(f"/run/netns/{ns}").exists():
                sh("ip", "netns", "del", ns, check=False)

    def up(self) -> None:
        """Build everything from scratch."""
        self.down()
        for ns in self.all:
            sh("ip", "netns", "add", ns)
            in_ns(ns, lambda ns=ns: self._sysctls(ns))  # type: ignore[misc]
            self._ip(ns, "link set lo up")
        for i, (lan, v4, v6) in enumerate(NETWORKS[: self.nics]):
            self._network(i, lan, v4, v6)
        self.peer_link()

    def _network(self, nic: int, lan: str, v4: str, v6: str) -> None:
        """Create a client's network, and on each host the bridge and the tap of the guest's NIC."""
        c, n = self.client, nic or ""
        self._ip(c, f"link add {lan} type bridge")
        self._ip(c, f"addr add {v4}.1/24 dev {lan}")
        self._ip(c, f"addr add {v6}:1/64 dev {lan} nodad")
        self._ip(c, f"link set {lan} up")
        for ns, port in ((self.primary, f"to-p{n}"), (self.secondary, f"to-s{n}")):
            self._ip(ns, f"link add uplink{n} type veth peer name {port} netns {c}")
            self._ip(c, f"link set dev {port} master {lan} up")
            self._ip(ns, f"link add br{nic} type bridge")
            self._ip(ns, f"link set br{nic} up")
            self._ip(ns, f"link set dev uplink{n} master br{nic} up")
            flags = " vnet_hdr" * self.vnet_hdr + " multi_queue" * (self.queues > 1)
            self._ip(ns, f"tuntap add dev tap{nic} mode tap{flags}")
            self._ip(ns, f"link set tap{nic} up")

    def peer_link(self) -> None:
        """Create the peer link, also again after it was removed."""
        self._ip(
            self.primary,
            f"link add peer0 mtu 1600 type veth peer name peer0 mtu 1600 netns {self.secondary}",
        )
        for ns, addr in ((self.primary, PEER_P), (self.secondary, PEER_S)):
            self._ip(ns, f"addr add {addr}/30 dev peer0")
            self._ip(ns, "link set peer0 up")

    @contextlib.contextmanager
    def control_cut(self) -> Iterator[None]:
        """Cut the control channel only.

        IP between the hosts goes to a MAC address that nobody has; frames on the link continue to
        pass.
        """
        ends = ((self.primary, PEER_S), (self.secondary, PEER_P))
        for ns, there in ends:
            self._ip(ns, f"neigh replace {there} lladdr 02:00:00:00:00:99 dev peer0 nud permanent")
        try:
            yield
        finally:
            for ns, there in ends:
                self._ip(ns, f"neigh del {there} dev peer0")

    @contextlib.contextmanager
    def port_cut(self, port: int) -> Iterator[None]:
        """Drop what the hosts send to this TCP port of each other; nothing else is cut."""
        rule = f"pref 1 ipproto tcp dport {port} blackhole"
        for ns in (self.primary, self.secondary):
            self._ip(ns, f"rule add {rule}")
        try:
            yield
        finally:
            for ns in (self.primary, self.secondary):
                self._ip(ns, f"rule del {rule}")

    @contextlib.contextmanager
    def port_slow(self, port: int, rate: str) -> Iterator[None]:
        """Slow down what the hosts send to this TCP port of each other, to a rate of tc(8)."""
        ends = (self.primary, self.secondary)
        for ns in ends:
            for what in (
                "qdisc add dev peer0 root handle 1: htb",  # what has no class is not slowed
                f"class add dev peer0 parent 1: classid 1:1 htb rate {rate}",
                "filter add dev peer0 parent 1: protocol ip u32 "
                f"match ip dport {port} 0xffff flowid 1:1",
            ):
                sh("tc", "-n", ns, *what.split())
        try:
            yield
        finally:
            for ns in ends:
                sh("tc", "-n", ns, "qdisc", "del", "dev", "peer0", "root")

    def join(self, ns: str) -> None:
        """Add a guest's tap to its bridge by hand, where no controller does."""
        self._ip(ns, "link set dev tap0 master br0")

    def part(self, ns: str) -> None:
        """Take a guest's tap off its bridge again."""
        self._ip(ns, "link set dev tap0 nomaster")

    def _ip(self, ns: str, args: str) -> None:
        sh("ip", "-n", ns, *args.split())

    def _sysctls(self, ns: str) -> None:
        # The hosts send nothing of their own on these links; the client needs IPv6.
        off = "0" if ns == self.client else "1"
        for scope in ("all", "default"):
            base = Path(f"/proc/sys/net/ipv6/conf/{scope}")
            (base / "disable_ipv6").write_text(off)
            (base / "accept_ra").write_text("0")
