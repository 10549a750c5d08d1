# SPDX-License-Identifier: GPL-2.0-or-later
"""Sockets of the heartbeats over loopback, and what the configuration takes for a path."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from colo_xdp.config.file import Config, ConfigError, load, parse
from colo_xdp.peer.heartbeat_datagram import (
    NONCE,
    SIZE,
    Flag,
    Heartbeat,
    HeartbeatSession,
    session_key,
)
from colo_xdp.peer.heartbeat_links import BUDGET, HeartbeatLinks
from colo_xdp.tools.doctor import Patient, _paths
from colo_xdp.tools.findings import FAIL, OK, WARN

EXAMPLES = Path(__file__).parents[3] / "deploy/examples"
KEY = session_key("web1", "11" * NONCE, "22" * NONCE)


def free_port(family: int = socket.AF_INET) -> int:
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.bind(("127.0.0.1" if family == socket.AF_INET else "::1", 0))
        return int(s.getsockname()[1])


def config(role: str, *paths: str) -> Config:
    c = load(EXAMPLES / f"{role}.toml")
    return replace(c, peer=replace(c.peer, link_heartbeats=False, heartbeat_links=paths))


class End:
    def __init__(self, role: str, *paths: str) -> None:
        self.words: list[Heartbeat] = []
        self.paths = HeartbeatLinks(config(role, *paths), self.words.append)
        self.paths.start()

    def key(self, key: bytes = KEY) -> None:
        self.paths.core.rekey(key, same_peer=False)

    def say(self, flags: Flag = Flag.VM) -> None:
        self.paths.send(flags, 0, 1)


async def until(cond: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not cond():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_datagrams_over_udp(host: str) -> None:
    async def go() -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        a, b = (f"{host}:{free_port(family)}" for _ in range(2))
        p, s = End("primary", f"{a}->{b}"), End("secondary", f"{b} -> {a}")
        p.say()
        await asyncio.sleep(0)
        assert not s.words, "no key yet"
        for e in (p, s):
            e.key()
        p.say(Flag.VM | Flag.ASK)
        await until(lambda: s.words)
        assert s.words[0].flags == Flag.VM | Flag.ASK
        s.say()
        await until(lambda: p.words)
        (st,) = p.paths.status()
        assert st["received"] == 1 and 0 <= st["silent_ms"] < 5000 and 0 < st["rtt_us"] < 5e6
        assert st["echo_age_ms"] < 5000 and st["trouble"] == ""
        for e in (p, s):
            e.paths.close()
        p.say()  # closed: nothing happens

    asyncio.run(go())


def test_a_host_that_refuses_and_comes_back(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        a, b = (f"127.0.0.1:{free_port()}" for _ in range(2))
        p = End("primary", f"{a}->{b}")
        p.key()
        await until(lambda: p.say() or p.paths.status()[0]["trouble"])
        assert "refused" in p.paths.status()[0]["trouble"]
        s = End("secondary", f"{b}->{a}")
        s.key()
        await until(lambda: p.say() or s.words)
        s.say()
        await until(lambda: p.words)
        await until(lambda: p.say() or not p.paths.status()[0]["trouble"])
        for e in (p, s):
            e.paths.close()

    asyncio.run(go())
    said = [r.getMessage() for r in caplog.records]
    assert len(said) <= 4, "told once, not with each datagram"


def test_an_address_that_is_not_there_yet() -> None:
    async def go() -> None:
        port = free_port()
        p = End("primary", f"192.0.2.77:{port}->192.0.2.78:{port}")
        p.key()
        p.say()
        assert p.paths.status()[0]["trouble"] and p.paths.status()[0]["sent"] == 0
        p.paths.close()

    asyncio.run(go())


def test_a_flood_costs_the_path_and_nothing_else() -> None:
    async def go() -> None:
        a, b = (f"127.0.0.1:{free_port()}" for _ in range(2))
        s = End("secondary", f"{b}->{a}")
        s.key()
        other = HeartbeatSession("web1", "primary", ["x"])
        other.rekey(KEY, same_peer=False)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            host, port = a.split(":")
            flood.bind((host, int(port)))
            where = ("127.0.0.1", int(b.split(":")[1]))
            for _ in range(3 * BUDGET):
                flood.sendto(b"x" * SIZE, where)
            refused = s.paths.core.links[0].refused
            await until(lambda: refused["stranger"] == BUDGET)
            end = time.monotonic() + 0.05
            while time.monotonic() < end:
                await asyncio.sleep(0.005)
            assert refused["stranger"] == BUDGET, "no more until the next datagram"
            for _ in range(2):
                s.say()
                seen = refused["stranger"]
                await until(lambda seen=seen: refused["stranger"] > seen)  # type: ignore[misc]
            s.say()
            other.round()
            flood.sendto(other.make(0, 1, Flag.VM, 0, 0), where)
            await until(lambda: s.words)
        s.paths.close()

    asyncio.run(go())


def test_a_link_that_nobody_watches_is_read_with_the_next_datagram() -> None:
    async def go() -> None:
        a, b = (f"127.0.0.1:{free_port()}" for _ in range(2))
        p, s = End("primary", f"{a}->{b}"), End("secondary", f"{b}->{a}")
        for e in (p, s):
            e.key()
        p.say()
        await until(lambda: len(s.words) == 1)
        s.paths.watch(False)
        sock = s.paths._transports[0].sock
        assert sock is not None

        async def lies_there() -> None:
            await until(lambda: select.select([sock], [], [], 0)[0])
            await asyncio.sleep(0.03)  # what is measured below

        p.say()
        await lies_there()
        assert len(s.words) == 1, "nobody woke up for it"
        s.say()
        assert len(s.words) == 2
        (st,) = s.paths.status()
        assert st["silent_ms"] >= 25, "it counts from when it came"
        await until(lambda: p.words)
        assert p.paths.status()[0]["rtt_us"] < 25_000, "and the peer knows how long it lay there"
        p.say()
        await lies_there()
        s.paths.read()
        assert len(s.words) == 3, "as when a heartbeat comes over the control channel"
        p.say()
        await until(lambda: select.select([sock], [], [], 0)[0])
        s.paths.watch(True)
        await until(lambda: len(s.words) == 4)
        p.say()
        await until(lambda: len(s.words) == 5)
        for e in (p, s):
            e.paths.close()

    asyncio.run(go())


def test_doctor_looks_at_the_paths() -> None:
    def levels(c: Config) -> list[int]:
        return [check.level for check in _paths(Patient(c))]

    a, b = (f"127.0.0.1:{free_port()}" for _ in range(2))
    assert levels(config("primary")) == [WARN], "none but the control channel"
    assert levels(config("primary", f"{a}->{b}")) == [OK]
    assert levels(config("primary", f"{a}->{b}", "192.0.2.77:1->192.0.2.78:1")) == [OK, FAIL]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # a controller that runs
        s.bind(("127.0.0.1", int(a.split(":")[1])))
        assert levels(config("primary", f"{a}->{b}")) == [OK]
    c = load(EXAMPLES / "primary.toml")
    c = replace(c, network=replace(c.network, peer_link="nosuchdevice"))
    assert levels(c) == [FAIL]
    made = replace(c, network=replace(c.network, vxlan_remote="192.0.2.2"))  # by `run`
    assert levels(made) == ([FAIL] if os.geteuid() else [])


TEXT = (EXAMPLES / "primary.toml").read_text()


def with_peer(line: str) -> Config:
    return parse(TEXT.replace("[peer]\n", f"[peer]\n{line}\n", 1))


def test_a_configuration_with_paths() -> None:
    c = with_peer('heartbeat_links = ["198.51.100.1:9850->198.51.100.2:9850"]')
    assert c.peer.link_heartbeats and len(c.peer.heartbeat_links) == 1
    assert load(EXAMPLES / "primary.toml").peer.heartbeat_links == ()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ('"198.51.100.1:9850->198.51.100.2:9850"', "expected a list"),
        ('["198.51.100.1:9850"]', '"198.51.100.1:9850" is none'),
        ('["198.51.100.1:9850->[fd00::1]:9850"]', "both IPv4 or both IPv6"),
        ('["198.51.100.1:0->198.51.100.2:9850"]', "is none"),
        ('["a:1->b:2"]', "is none"),
        ("[7]", "is none"),
        ('["198.51.100.1:1->198.51.100.1:1"]', "two different ends"),
        ('["192.0.2.1:9850->192.0.2.2:9850"]', "which the control channel uses"),
        ('["198.51.100.1:1->198.51.100.2:1", "198.51.100.1:1->198.51.100.3:1"]', "another local"),
        (str([f"198.51.100.1:{i}->198.51.100.2:{i}" for i in range(1, 6)]), "at most 4"),
    ],
)
def test_a_wrong_path_is_named(value: str, words: str) -> None:
    with pytest.raises(ConfigError) as e:
        with_peer(f"heartbeat_links = {value}")
    assert "[peer] heartbeat_links" in str(e.value) and words in str(e.value)
