# SPDX-License-Identifier: GPL-2.0-or-later
"""Test heartbeats over a real peer link without addresses, and how a socket notices a cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from colo_xdp.config.file import load
from colo_xdp.failover.facts import Ending
from colo_xdp.peer.channel import Peer
from colo_xdp.peer.heartbeat_datagram import NONCE, Flag, Heartbeat, session_key
from colo_xdp.peer.heartbeat_links import ETHERTYPE, GROUP, HeartbeatLinks
from tests.netns.conftest import Net, inside, sh

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"
KEY = session_key("web1", "11" * NONCE, "22" * NONCE)


class End:
    """One host's side; its sockets are created in its namespace."""

    def __init__(self, ns: str, role: str) -> None:
        self.ns = ns
        self.words: list[Heartbeat] = []
        c = load(EXAMPLES / f"{role}.toml")
        c = replace(c, network=replace(c.network, peer_link="peer0"))
        self.paths = HeartbeatLinks(c, self.words.append)
        self.paths.core.rekey(KEY, same_peer=False)
        with inside(ns):
            self.paths.start()

    def say(self, flags: Flag = Flag.VM) -> None:
        with inside(self.ns):
            self.paths.send(flags, 0, 1)

    @property
    def trouble(self) -> str:
        return str(self.paths.status()[0]["trouble"])


async def until(cond: Callable[[], object], again: Callable[[], None] = lambda: None) -> None:
    async with asyncio.timeout(5):
        while not cond():
            again()
            await asyncio.sleep(0.01)


def test_the_peer_link_carries_datagrams_without_an_address(net: Net) -> None:
    async def go() -> None:
        p, s = End(net.host, "primary"), End(net.other, "secondary")

        def both() -> None:
            p.say()
            s.say()

        def heard() -> bool:
            return bool(p.words and s.words)

        def forget() -> None:
            p.words.clear()
            s.words.clear()

        await until(heard, both)
        await until(lambda: p.words[-1].after and s.words[-1].after, both)
        # strangers on the same link, also with the type of our frames
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as stranger:
            stranger.bind(("peer0", 0))
            kind = ETHERTYPE.to_bytes(2, "big")
            stranger.send(GROUP + bytes(6) + kind + b"x" * 88)
            stranger.send(b"\xff" * 6 + bytes(6) + kind + b"x" * 1400)
            refused = s.paths.core.links[0].refused
            await until(lambda: refused["stranger"] == 2, lambda: s.say())

        # the link goes down and comes back
        sh("ip", "-n", net.host, "link", "set", "peer0", "down")
        await until(lambda: p.trouble, both)
        forget()
        sh("ip", "-n", net.host, "link", "set", "peer0", "up")
        await until(heard, both)
        await until(lambda: not p.trouble, both)

        # it is created again, as a VXLAN may be
        sh("ip", "-n", net.host, "link", "del", "peer0")
        await until(lambda: p.trouble and s.trouble, both)
        forget()
        sh("ip", "-n", net.host, "link", "add", "peer0", "type", "veth", "peer", "name", "peer0",
           "netns", net.other)  # fmt: skip
        for ns in (net.host, net.other):
            sh("ip", "-n", ns, "link", "set", "peer0", "up")
        await until(heard, both)

        # so quickly that no datagram meets its absence; and away, and back with its old ifindex
        sh("ip", "-n", net.host, "link", "del", "peer0")
        sh("ip", "-n", net.host, "link", "add", "peer0", "type", "veth", "peer", "name", "peer0",
           "netns", net.other)  # fmt: skip
        for ns in (net.host, net.other):
            sh("ip", "-n", ns, "link", "set", "peer0", "up")
        forget()
        await until(heard, both)
        sh("ip", "-n", net.host, "link", "set", "peer0", "netns", net.client)
        sh("ip", "-n", net.client, "link", "set", "peer0", "netns", net.host)
        sh("ip", "-n", net.host, "link", "set", "peer0", "up")
        forget()
        await until(heard, both)
        for e in (p, s):
            e.paths.close()

    asyncio.run(go())


def test_a_cut_is_no_hung_controller(net: Net) -> None:
    """Nothing is acknowledged: the other host's kernel is not reachable."""
    here, there = "198.51.100.1", "198.51.100.2"
    for ns, address in ((net.host, here), (net.other, there)):
        sh("ip", "-n", ns, "addr", "add", f"{address}/24", "dev", "peer0")

    async def go() -> None:
        def peer(role: str, local: str, remote: str) -> Peer:
            return Peer(
                pair="p", role=role, local=local, remote=remote, tls=None,
                on_up=lambda: None, on_down=lambda why: None, on_message=lambda msg: None,
            )  # fmt: skip

        p = peer("primary", f"{here}:9846", f"{there}:9846")
        s = peer("secondary", f"{there}:9846", f"{here}:9846")
        with inside(net.other):
            await s.start()
        await p.start()
        await until(lambda: p.connected and s.connected)
        for ns, far in ((net.host, there), (net.other, here)):
            sh("ip", "-n", ns, "neigh", "replace", far, "lladdr", "02:00:00:00:00:99", "dev",
               "peer0", "nud", "permanent")  # fmt: skip
        before = p.last_seen_ns
        await until(lambda: p.silent_ms() > 500, lambda: p.send("switchover", why="x") and None)
        assert p.last_seen_ns == before
        p.drop("silent")
        assert p.ending is Ending.LOST
        await p.close()
        await s.close()

    asyncio.run(go())
