# SPDX-License-Identifier: GPL-2.0-or-later
"""Tunnels between a laboratory's hosts, by programs of Debian 12 that `make test-tunnel` unpacks.

Both are in user space, because a kernel may have neither WireGuard nor ESP. What they put on the
wire is the same as a kernel's: a host can have the one and its peer the other.
"""

from __future__ import annotations

import base64
import contextlib
import os
import secrets
import socket
from abc import ABC, abstractmethod
from pathlib import Path

from colo_xdp.lab.net import PEER_P, PEER_S, LabError, sh, wait_for
from colo_xdp.lab.pair import Lab

PROGRAMS = Path(__file__).parents[2] / "build/tunnel"
USUAL_LIBRARIES = "/usr/lib"
START_S = 20.0
ROLES = ("primary", "secondary")
OUTSIDE = {"primary": PEER_P, "secondary": PEER_S}
#: addresses that are reached through the tunnel only
INSIDE = {"primary": "10.98.0.1", "secondary": "10.98.0.2"}
OTHER = {"primary": "secondary", "secondary": "primary"}


def program(path: str) -> str:
    return str(PROGRAMS / path)


class Tunnel(ABC):
    """A tunnel; `device`: where a host's packets go into it, by role."""

    device: dict[str, str]

    def __init__(self, lab: Lab) -> None:
        self.lab = lab

    @abstractmethod
    def up(self) -> None:
        """Bring it up on both hosts, with the addresses of INSIDE."""

    @abstractmethod
    def is_its_own(self, frame: bytes) -> bool:
        """Return whether a frame on the wire is one of the tunnel."""

    def close(self) -> None:
        """Remove what outlives the laboratory."""

    def ip(self, role: str, args: str) -> str:
        return sh("ip", "-n", self.lab.ns(role), *args.split())


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as s:
        return s.connect_ex(str(path)) == 0


def udp_port(frame: bytes) -> int:
    """Return the destination port of a UDP packet over IPv4; 0: it is none."""
    if len(frame) < 38 or frame[12:14] != b"\x08\x00" or frame[23] != 17 or frame[20] & 0x1F:
        return 0
    at = 14 + (frame[14] & 15) * 4
    return int.from_bytes(frame[at + 2 : at + 4], "big")


class WireGuard(Tunnel):
    """wireguard-go, and wg(8) to configure it."""

    device = {"primary": "wgcx-p", "secondary": "wgcx-s"}
    PORT = 51820

    def up(self) -> None:
        keys = {role: base64.b64encode(secrets.token_bytes(32)).decode() for role in ROLES}
        for role in ROLES:
            dev, key = self.device[role], self.lab.work / f"{role}.wg"
            key.touch(0o600)
            key.write_text(keys[role])
            self.lab.procs.start(
                [program("usr/bin/wireguard-go"), "--foreground", dev],
                self.lab.work / f"{role}.wg.log", self.lab.ns(role), {"LOG_LEVEL": "error"},
            )  # fmt: skip
            wait_for(f"the device {dev}", self._socket(role).exists, START_S)
        for role in ROLES:
            there, dev = OTHER[role], self.device[role]
            key = self.lab.work / f"{role}.wg"
            self._wg(
                role, "set", dev, "listen-port", str(self.PORT), "private-key", str(key),
                "peer", self._public(keys[there]), "allowed-ips", f"{INSIDE[there]}/32",
                "endpoint", f"{OUTSIDE[there]}:{self.PORT}",
            )  # fmt: skip
            self.ip(role, f"addr add {INSIDE[role]}/24 dev {dev}")
            self.ip(role, f"link set {dev} up")

    def _socket(self, role: str) -> Path:
        return Path(f"/var/run/wireguard/{self.device[role]}.sock")

    def _wg(self, role: str, *args: str) -> str:
        return sh("nsenter", f"--net=/run/netns/{self.lab.ns(role)}", program("usr/bin/wg"), *args)

    def _public(self, key: str) -> str:
        script = f"echo {key} | {program('usr/bin/wg')} pubkey"
        return sh("sh", "-c", script).strip()

    def is_its_own(self, frame: bytes) -> bool:
        return udp_port(frame) == self.PORT

    def close(self) -> None:
        for role in ROLES:
            self._socket(role).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._socket("primary").parent.rmdir()


STRONGSWAN = """\
charon {{
  load = random nonce openssl hmac kdf vici kernel-libipsec kernel-netlink socket-default
  plugins {{ vici {{ socket = unix://{where}/vici }} }}
  filelog {{ log {{ path = {where}/charon.log
    flush_line = yes }} }}
}}
swanctl {{ load = random nonce openssl }}
"""
CONNECTION = """\
connections {{ peerlink {{
  version = 2
  local_addrs = {outside}
  remote_addrs = {outside_there}
  proposals = aes128gcm16-prfsha256-x25519
  local {{ auth = psk
    id = {outside} }}
  remote {{ auth = psk
    id = {outside_there} }}
  children {{ peerlink {{
    local_ts = {inside}/32
    remote_ts = {inside_there}/32
    esp_proposals = aes128gcm16
    start_action = start }} }}
}} }}
secrets {{ ike {{ secret = "{secret}" }} }}
"""


class Esp(Tunnel):
    """strongSwan with its plugin kernel-libipsec: IKEv2, and ESP in UDP, in one process."""

    device = {"primary": "ipsec0", "secondary": "ipsec0"}
    PORT = 4500

    def up(self) -> None:
        libraries, secret = program("usr/lib"), secrets.token_urlsafe(24)
        for role in ROLES:
            where = self.lab.work / f"{role}.esp"
            where.mkdir(mode=0o700, exist_ok=True)
            (where / "vici").unlink(missing_ok=True)
            (where / "strongswan.conf").write_text(STRONGSWAN.format(where=where))
            there = OTHER[role]
            (where / "swanctl.conf").write_text(
                CONNECTION.format(
                    outside=OUTSIDE[role], outside_there=OUTSIDE[there],
                    inside=INSIDE[role], inside_there=INSIDE[there], secret=secret,
                )
            )  # fmt: skip
            self.ip(role, f"addr add {INSIDE[role]}/32 dev lo")
            # It looks for its plugins below /usr/lib, and for others of its kind below /run.
            script = (
                f"mount -t overlay -o lowerdir={libraries}:{USUAL_LIBRARIES} overlay "
                f"{USUAL_LIBRARIES} && mount -t tmpfs tmpfs /run && exec /usr/lib/ipsec/charon"
            )
            self.lab.procs.start(
                ["unshare", "--mount", "sh", "-ec", script], where / "log", self.lab.ns(role),
                {"STRONGSWAN_CONF": str(where / "strongswan.conf")},
            )  # fmt: skip
            wait_for(f"charon of the {role}", lambda w=where: listens(w / "vici"), START_S)  # type: ignore[misc]
        for role in ROLES:
            where = self.lab.work / f"{role}.esp"
            sh(
                "env", f"LD_LIBRARY_PATH={libraries}/ipsec",
                f"STRONGSWAN_CONF={where / 'strongswan.conf'}", program("usr/sbin/swanctl"),
                "--load-all", "--uri", f"unix://{where / 'vici'}",
                "--file", str(where / "swanctl.conf"),
            )  # fmt: skip
        for role in ROLES:
            way = f"route get {INSIDE[OTHER[role]]}"
            wait_for("the tunnel", lambda r=role, w=way: self._route(r, w), START_S)  # type: ignore[misc]

    def _route(self, role: str, args: str) -> bool:
        try:
            return "dev ipsec0" in self.ip(role, args)
        except LabError:
            return False

    def is_its_own(self, frame: bytes) -> bool:
        return udp_port(frame) == self.PORT


def filter_strangers(tunnel: Tunnel, role: str) -> None:
    """Drop VXLAN frames that come from outside the tunnel, as docs/operator/security.md has it."""
    (libraries,) = (PROGRAMS / "usr/lib").glob("*-linux-gnu")
    nft = [
        "nsenter", f"--net=/run/netns/{tunnel.lab.ns(role)}",
        "env", f"LD_LIBRARY_PATH={libraries}", program("usr/sbin/nft"),
    ]  # fmt: skip
    for rule in (
        "add table inet cx",
        "add chain inet cx in { type filter hook input priority 0; }",
        f"add rule inet cx in iifname != {tunnel.device[role]} udp dport 4789 drop",
    ):
        sh(*nft, rule)


def missing() -> str:
    """Return why there can be no tunnel here; an empty string if there can."""
    if os.geteuid():
        return "needs root"
    wanted = ("usr/bin/wireguard-go", "usr/bin/wg", "usr/lib/ipsec/charon", "usr/sbin/nft")
    absent = [x for x in wanted if not Path(program(x)).exists()]
    return (
        f"not in {PROGRAMS}: {', '.join(absent)}: `make test-tunnel` unpacks them" if absent else ""
    )
