# SPDX-License-Identifier: GPL-2.0-or-later
"""The control channel over real sockets: who gets in, what is heard, what is lost."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import socket
import ssl
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.failover.facts import Ending
from colo_xdp.peer import channel as peer_module
from colo_xdp.peer import messages
from colo_xdp.peer.channel import Peer, PeerError, split_address
from colo_xdp.peer.tls import Tls
from colo_xdp.tools import pki


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class End:
    """One end that notes what it is told."""

    def __init__(
        self, role: str, port: int, pair: str = "p", tls: Any = None, remote: str = "127.0.0.1",
        **kw: Any,
    ) -> None:  # fmt: skip
        self.up = 0
        self.down: list[str] = []
        self.got: list[dict[str, Any]] = []
        self.peer = Peer(
            pair=pair,
            role=role,
            local=f"127.0.0.1:{port if role == 'secondary' else 1}",
            remote=f"{remote}:{port}",
            tls=tls,
            on_up=self._up,
            on_down=self.down.append,
            on_message=self.got.append,
            **kw,
        )

    def _up(self) -> None:
        self.up += 1


async def until(cond: Callable[[], object], timeout: float = 5.0) -> None:
    async with asyncio.timeout(timeout):
        while not cond():
            await asyncio.sleep(0.01)


async def both(port: int, **kw: Any) -> tuple[End, End]:
    s, p = End("secondary", port, **kw), End("primary", port, **kw)
    await s.peer.start()
    await p.peer.start()
    await until(lambda: s.peer.connected and p.peer.connected)
    return p, s


def hello(**change: Any) -> bytes:
    fields = dict(v=messages.VERSION, min=messages.VERSION, pair="p", role="primary", boot="")
    return messages.encode("hello", **(fields | change))


def test_messages_and_loss() -> None:
    async def go() -> None:
        p, s = await both(free_port())
        assert p.peer.send("begin", n=1, cause="operator", initial=False)
        await until(lambda: s.got)
        assert s.got == [{"type": "begin", "n": 1, "cause": "operator", "initial": False}]
        assert s.peer.silent_ms() < 5000
        await p.peer.close()
        await until(lambda: s.down)
        assert not s.peer.connected and not s.peer.send("begin_ack", n=1)
        await s.peer.close()

    asyncio.run(go())


def test_both_make_the_same_key_for_datagrams_and_another_one_each_time() -> None:
    async def go() -> None:
        port = free_port()
        keys = set()
        s = End("secondary", port)
        await s.peer.start()
        for n in range(2):
            p = End("primary", port)
            await p.peer.start()
            await until(lambda p=p, n=n: p.peer.connected and s.up == n + 1)  # type: ignore[misc]
            assert len(p.peer.heartbeat_key) == 32 and p.peer.heartbeat_key == s.peer.heartbeat_key
            keys.add(p.peer.heartbeat_key)
            await p.peer.close()
            await until(lambda: not s.peer.connected)
        assert len(keys) == 2
        await s.peer.close()

    asyncio.run(go())


@pytest.mark.parametrize("nonce", [{}, {"nonce": "00"}, {"nonce": 7}])
def test_a_peer_that_knows_no_datagrams_is_welcome(nonce: dict[str, Any]) -> None:
    async def go() -> None:
        port = free_port()
        s = End("secondary", port)
        await s.peer.start()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(json.dumps(json.loads(hello()) | nonce).encode() + b"\n")
        await until(lambda: s.peer.connected)
        assert s.peer.heartbeat_key == b""
        writer.close()
        await s.peer.close()

    asyncio.run(go())


def unacked(p: Peer) -> int:
    assert p._writer is not None
    info = p._writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    return int(struct.unpack_from("=I", info, 24)[0])


def test_how_a_silence_began() -> None:
    """A process that hangs leaves its kernel to acknowledge; one that ends closes."""

    async def go() -> None:
        port = free_port()
        s = End("secondary", port)
        await s.peer.start()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello())
        await until(lambda: s.peer.connected)
        # from here on the other end neither reads nor says anything
        assert s.peer.send("switchover", why="x" * 1000)
        await until(lambda: not unacked(s.peer))
        s.peer.drop("silent")
        assert s.peer.ending is Ending.HUNG and s.down == ["silent"]
        writer.close()

        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(hello())
        await until(lambda: s.peer.connected)
        assert s.peer.ending is Ending.UNKNOWN
        writer.transport.abort()
        await until(lambda: not s.peer.connected)
        assert s.peer.ending is Ending.CLOSED
        await s.peer.close()

    asyncio.run(go())


def test_time_without_listening_is_no_silence() -> None:
    p = End("primary", free_port()).peer
    p.discount(10**9)
    assert p.silent_ms() == float("inf"), "never heard"
    p.last_seen_ns = time.monotonic_ns() - 3 * 10**9
    p.discount(2 * 10**9)
    assert 999 < p.silent_ms() < 60_000


def test_primary_comes_back_by_itself() -> None:
    async def go() -> None:
        port = free_port()
        p, s = await both(port)
        await s.peer.close()
        await until(lambda: p.down)
        s2 = End("secondary", port)
        await s2.peer.start()
        await until(lambda: s2.peer.connected and p.up == 2)
        await p.peer.close()
        await s2.peer.close()

    asyncio.run(go())


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        messages.encode("begin_ack", n=1),
        hello(pair="other"),
        hello(v=99, min=99),
        hello(v=2, min=1),
        hello(role="secondary"),
        hello(role="witness"),
        b"\xff" * 70000 + b"\n",
        b"\xff" * 70000,
    ],
    ids=["http", "no-hello", "other-pair", "newer", "older", "same-role", "odd-role", "flood",
         "endless-line"],
)  # fmt: skip
def test_strangers_are_refused_and_do_not_disturb(first: bytes) -> None:
    async def go() -> None:
        port = free_port()
        p, s = await both(port)
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(first)
        async with asyncio.timeout(5):
            while await reader.read(4096):  # our hello, then the end
                pass
        writer.close()
        assert s.peer.refused >= 1
        assert s.peer.connected and p.peer.connected and not s.down
        p.peer.send("begin_ack", n=3)
        await until(lambda: s.got)
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


def test_garbage_in_the_middle_cuts_the_connection() -> None:
    async def go() -> None:
        port = free_port()
        s = End("secondary", port)
        await s.peer.start()
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        for bad, words in ((b'{"type": "resumed"}\n', "fields"), (hello(), "second hello"),
                           (b"[" * 200_000, "limit")):  # fmt: skip
            s.down.clear()
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(hello())
            await until(lambda: s.peer.connected)
            writer.write(bad)
            await until(lambda: s.down)
            assert words in s.down[0]
            writer.close()
        await s.peer.close()

    asyncio.run(go())


# ---- certificates


@pytest.fixture(scope="module")
def web1(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair's directory."""
    return authority(tmp_path_factory.mktemp("web1"), "web1")


@pytest.fixture(scope="module")
def web2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return authority(tmp_path_factory.mktemp("web2"), "web2")


def authority(directory: Path, pair: str) -> Path:
    pki.init(directory, pair)
    for role in pki.ROLES:
        pki.issue(directory, role)
    return directory


def of(directory: Path, role: str, **trust: str) -> Tls:
    trust = trust or {"ca": str(directory / "ca.crt")}
    return Tls(str(directory / f"{role}.crt"), str(directory / f"{role}.key"), **trust)


async def refused(caplog: Any, server: Tls | None, client: Tls | None, *words: str) -> None:
    """The two do not meet, and somebody's log says why."""
    port = free_port()
    s, p = (End(r, port, "web1", t) for r, t in (("secondary", server), ("primary", client)))
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="colo_xdp.peer.channel"):
        await s.peer.start()
        await p.peer.start()
        await until(lambda: all(any(w in m for m in caplog.messages) for w in words))
        await asyncio.sleep(0.05)
    assert not s.up and not p.up
    await p.peer.close()
    await s.peer.close()


def test_a_pair_of_its_own_authority(web1: Path) -> None:
    async def go() -> None:
        port = free_port()
        s = End("secondary", port, "web1", of(web1, "secondary"))
        p = End("primary", port, "web1", of(web1, "primary"))
        await s.peer.start()
        await p.peer.start()
        await until(lambda: s.peer.connected and p.peer.connected)
        assert s.peer.version == messages.VERSION and s.peer.peer_boot == p.peer.boot
        tls = s.peer._writer.get_extra_info("ssl_object")  # type: ignore[union-attr]
        assert tls.version() == "TLSv1.3" and not tls.session_reused
        p.peer.send("begin_ack", n=1)
        await until(lambda: s.got)
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


def test_pinned_certificates(web1: Path, web2: Path, caplog: Any) -> None:
    """Exactly the other's: also leaves of an authority that is not given."""

    async def go() -> None:
        port = free_port()
        s = End("secondary", port, "web1",
                of(web1, "secondary", peer_cert=str(web1 / "primary.crt")))  # fmt: skip
        p = End("primary", port, "web1",
                of(web1, "primary", peer_cert=str(web1 / "secondary.crt")))  # fmt: skip
        await s.peer.start()
        await p.peer.start()
        await until(lambda: s.peer.connected and p.peer.connected)
        await p.peer.close()
        await s.peer.close()
        # the right pin, but of somebody who has the identity of another pair
        pin = of(web1, "secondary", peer_cert=str(web2 / "primary.crt"))
        await refused(
            caplog,
            pin,
            of(web2, "primary", ca=str(web1 / "ca.crt")),
            "'colo-xdp://web2/primary'",
            "expected colo-xdp://web1/primary",
        )

    asyncio.run(go())


def test_a_pin_of_an_authority_does_not_admit_what_it_signs(web1: Path, caplog: Any) -> None:
    """A self-signed certificate is often one of an authority as well."""

    async def go() -> None:
        pin = of(web1, "secondary", peer_cert=str(web1 / "ca.crt"))
        await refused(caplog, pin, of(web1, "primary"), "is not the one of")

    asyncio.run(go())


def test_a_certificate_of_another_pair(web1: Path, web2: Path, caplog: Any) -> None:
    async def go() -> None:
        # of another authority: no handshake
        await refused(caplog, of(web1, "secondary"), of(web2, "primary", ca=str(web1 / "ca.crt")),
                      "CERTIFICATE_VERIFY_FAILED")  # fmt: skip
        # of an authority that both trust: the identity is wrong
        await refused(caplog, of(web1, "secondary", ca=str(web2 / "ca.crt")),
                      of(web2, "primary", ca=str(web1 / "ca.crt")),
                      "'colo-xdp://web2/primary'", "expected colo-xdp://web1/primary")  # fmt: skip

    asyncio.run(go())


def test_a_certificate_of_the_same_role(web1: Path, caplog: Any) -> None:
    async def go() -> None:
        await refused(
            caplog,
            of(web1, "secondary"),
            of(web1, "secondary"),
            "'colo-xdp://web1/secondary'",
            "expected colo-xdp://web1/primary",
        )
        # the other way round: a listener that is no secondary
        await refused(
            caplog,
            of(web1, "primary"),
            of(web1, "primary"),
            "'colo-xdp://web1/primary'",
            "expected colo-xdp://web1/secondary",
        )

    asyncio.run(go())


def test_a_users_own_name(web1: Path, caplog: Any) -> None:
    async def go() -> None:
        ca = str(web1 / "ca.crt")
        port = free_port()
        s = End("secondary", port, "web1", of(web1, "secondary", ca=ca, identity="web1 primary"))
        p = End("primary", port, "web1", of(web1, "primary"))
        await s.peer.start()
        await p.peer.start()
        await until(lambda: s.peer.connected and p.peer.connected)
        await p.peer.close()
        await s.peer.close()
        await refused(caplog, of(web1, "secondary", ca=ca, identity="host7"), of(web1, "primary"),
                      "expected host7")  # fmt: skip

    asyncio.run(go())


def test_an_expired_certificate(web1: Path, tmp_path: Path, caplog: Any, monkeypatch: Any) -> None:
    for name in ("ca.crt", "ca.key"):
        (tmp_path / name).write_bytes((web1 / name).read_bytes())
    real = datetime.datetime.now(datetime.UTC)
    monkeypatch.setattr(pki, "_now", lambda: real - datetime.timedelta(days=10))
    pki.issue(tmp_path, "primary", days=5)
    assert pki.look(tmp_path / "primary.crt").ends < real

    async def go() -> None:
        await refused(caplog, of(web1, "secondary"), of(tmp_path, "primary"), "has expired")

    asyncio.run(go())


def test_plaintext_on_either_side(web1: Path, caplog: Any) -> None:
    async def go() -> None:
        await refused(caplog, of(web1, "secondary"), None, "no TLS")
        await refused(caplog, None, of(web1, "primary"), "not JSON")

    asyncio.run(go())


def test_renewed_files_need_no_restart(web1: Path, tmp_path: Path) -> None:
    for f in web1.iterdir():
        (tmp_path / f.name).write_bytes(f.read_bytes())

    async def go() -> None:
        port = free_port()
        s = End("secondary", port, "web1", of(tmp_path, "secondary"))
        p = End("primary", port, "web1", of(tmp_path, "primary"))
        await s.peer.start()
        await p.peer.start()
        await until(lambda: s.peer.connected and p.peer.connected)
        before = (tmp_path / "primary.crt").read_bytes()
        pki.issue(tmp_path, "primary", renew=True)
        p.peer.drop("test")
        await until(lambda: p.up == 2 and s.up == 2)
        der = s.peer._writer.get_extra_info("ssl_object").getpeercert(True)  # type: ignore[union-attr]
        assert ssl.DER_cert_to_PEM_cert(der) != before.decode()
        assert der == ssl.PEM_cert_to_DER_cert((tmp_path / "primary.crt").read_text())
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


# ---- strangers who do not even try


def test_who_calls_from_elsewhere_is_turned_away_before_tls(web1: Path) -> None:
    async def go() -> None:
        port = free_port()
        s = End("secondary", port, "web1", of(web1, "secondary"), remote="127.0.0.9")
        await s.peer.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        async with asyncio.timeout(5):
            assert await reader.read(1) == b""
        writer.close()
        assert s.peer.refused == 1 and not s.peer._sessions
        await s.peer.close()

    asyncio.run(go())


@pytest.mark.parametrize("tls", [False, True])
def test_silent_callers_are_bounded_and_cannot_keep_the_peer_out(
    web1: Path, tls: bool, monkeypatch: Any
) -> None:
    """More of them than there are places, none says a word."""

    async def go() -> None:
        port = free_port()
        files = [of(web1, r) if tls else None for r in ("secondary", "primary")]
        s = End("secondary", port, "web1", files[0])
        await s.peer.start()
        strangers = [
            await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * peer_module.PENDING)
        ]
        await until(lambda: s.peer.refused >= 2 * peer_module.PENDING)
        assert len(s.peer._pending) == peer_module.PENDING
        p = End("primary", port, "web1", files[1])
        await p.peer.start()
        await until(lambda: s.peer.connected and p.peer.connected)
        assert len(s.peer._pending) < peer_module.PENDING
        for _, w in strangers:
            w.close()
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


@pytest.mark.parametrize("tls", [False, True])
def test_a_handshake_that_stalls_ends(web1: Path, tls: bool, monkeypatch: Any) -> None:
    monkeypatch.setattr(peer_module, "HANDSHAKE_S", 0.2)
    monkeypatch.setattr(peer_module, "HELLO_S", 0.2)

    async def go() -> None:
        port = free_port()
        s = End("secondary", port, "web1", of(web1, "secondary") if tls else None)
        await s.peer.start()
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"\x16\x03\x01\x02\x00" if tls else b'{"type": "hel')  # begins, and waits
        async with asyncio.timeout(5):
            while await reader.read(4096):
                pass
        await until(lambda: not s.peer._pending)
        assert s.peer.refused == 1
        writer.close()
        await s.peer.close()

    asyncio.run(go())


# ---- versions


@pytest.mark.parametrize(
    ("server", "client", "version"),
    [((1, 3), (2, 4), 3), ((3, 3), (3, 9), 3), ((2, 5), (1, 2), 2), ((3, 4), (1, 2), 0),
     ((4, 4), (3, 3), 0)],
)  # fmt: skip
def test_versions(server: tuple[int, int], client: tuple[int, int], version: int) -> None:
    """The newest that both support; below one's minimum there is no connection."""

    async def go() -> None:
        port = free_port()
        s = End("secondary", port, versions=server)
        p = End("primary", port, versions=client)
        await s.peer.start()
        await p.peer.start()
        if version:
            await until(lambda: s.peer.connected and p.peer.connected)
            assert (s.peer.version, p.peer.version) == (version, version)
        else:
            await until(lambda: s.peer.refused and p.peer.refused)
            assert not s.up and not p.up
        await p.peer.close()
        await s.peer.close()

    asyncio.run(go())


def test_a_hello_of_the_future_may_say_more() -> None:
    msg = messages.decode(hello(v=9)[:-2] + b',"zeal":[1]}\n')
    assert (
        messages.agree((messages.VERSION, messages.VERSION), (msg["min"], msg["v"]))
        == messages.VERSION
    )


def test_a_missing_certificate_is_named() -> None:
    async def go() -> None:
        e = End("secondary", free_port(), tls=Tls("/nonexistent.crt", "/x", "/y"))
        with pytest.raises(PeerError, match="cert"):
            await e.peer.start()

    asyncio.run(go())


def test_addresses() -> None:
    assert split_address("192.0.2.1:98") == ("192.0.2.1", 98)
    assert split_address("[fd00::1]:98") == ("fd00::1", 98)
