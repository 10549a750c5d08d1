# SPDX-License-Identifier: GPL-2.0-or-later
"""Two hosts whose administrator has set their network up, and nothing of a pair."""

from __future__ import annotations

from pathlib import Path

from colo_xdp.lab.net import wait_for

from .host import Host
from .pair import NETWORK, Pair

#: the administrator's fence command: status 0 only if that other host is off; each call is recorded
OFF = """#!/bin/sh
echo $(hostname) >> /exchange/fenced
[ "$1" != $(hostname) ] && [ -e /exchange/off-${1#host} ]
"""
#: where the clients of a second pair would be
BR1 = {
    "10-br1.netdev": "[NetDev]\nName=br1\nKind=bridge\n",
    "20-br1.network": "[Match]\nName=br1\n[Network]\nLinkLocalAddressing=no\n"
    "ConfigureWithoutCarrier=yes\n",
}
ETH2 = "[Match]\nName=eth2\n[Network]\nLinkLocalAddressing=no\nAddress=192.0.2.{}/24\n"


class Bare(Pair):
    """Two hosts with a network, a fence command, and nothing of a pair."""

    def _files(self, h: Host, other: str, keys: Path) -> None:
        network = {**NETWORK, **BR1, "20-eth2.network": ETH2.format(h.number)}
        for name, text in network.items():
            h.write(f"/etc/systemd/network/{name}", text)
        h.write("/usr/local/sbin/off", OFF, 0o755)
        h.enable("systemd-networkd")
        if self.shim:  # QEMU needs it on this machine, whichever unit runs it
            text = f"[Service]\nEnvironment=LD_PRELOAD=/share/{self.shim.name}\n"
            for unit in ("colo-qemu", "colo-qemu-incoming"):
                for pair in ("web1", "web2"):
                    h.write(f"/etc/systemd/system/{unit}@{pair}.service.d/lab.conf", text)

    def _first_start(self) -> None:
        for h in self.hosts:
            wait_for(f"the address of host{h.name}", lambda h=h: "192.0.2." in h.run(
                "ip", "-brief", "addr", "show", "eth2"), 20)  # type: ignore[misc]  # fmt: skip


def etc(h: Host) -> dict[str, str]:
    """Return the sums of all files that a pair may have in /etc."""
    where = ("/etc/colo-xdp", "/etc/systemd")
    text = h.run("find", *where, "-type", "f", "-exec", "sha256sum", "{}", "+", check=False)
    return {path: digest for digest, path in (x.split(None, 1) for x in text.splitlines())}
