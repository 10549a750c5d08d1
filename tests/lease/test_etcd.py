# SPDX-License-Identifier: GPL-2.0-or-later
"""Test the lease in a real etcd: one server, and a proxy per host that can be cut in either
direction.

Both Leadership objects are the product's, with its store. Their permissions are read from outside,
as the programs would: never two at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import requests

from colo_xdp.config.file import load
from colo_xdp.failover.etcd import Etcd, EtcdStore
from colo_xdp.failover.lease import GIVEN_UP, Leadership, StoreError, boot_ns
from colo_xdp.tools.doctor import Patient, _failover
from colo_xdp.tools.findings import OK, WARN

P, S = "192.0.2.1:9846", "192.0.2.2:9846"
TTL_MS, MARGIN_MS = 2000, 400
PIDS: dict[str, int] = {}  # of the servers, by URL


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run an etcd server with one member on loopback; return its URL."""
    if not shutil.which("etcd"):
        if os.environ.get("CI"):
            pytest.fail("etcd is not installed (package etcd-server)")
        pytest.skip("etcd is not installed (package etcd-server)")
    directory = tmp_path_factory.mktemp("etcd")
    client, peer = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    log = (directory / "log").open("wb")
    server = subprocess.Popen(
        ["etcd", "--data-dir", str(directory / "data"), "--name", "e1", "--unsafe-no-fsync",
         "--listen-client-urls", client, "--advertise-client-urls", client,
         "--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer,
         "--initial-cluster", f"e1={peer}"],
        stdout=log, stderr=log,
    )  # fmt: skip
    try:
        wait_for(client, server, directory / "log")
        PIDS[client] = server.pid
        yield client
    finally:
        server.kill()
        server.wait()
        log.close()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    async def ask() -> None:
        store = EtcdStore(Etcd((url,)), "probe", 1)
        try:
            end = time.monotonic() + 30
            while True:
                try:
                    await store.record("nobody", "")
                    return
                except StoreError:
                    if server.poll() is not None or time.monotonic() > end:
                        raise RuntimeError(log.read_text()[-2000:]) from None
                    await asyncio.sleep(0.05)
        finally:
            await store.close()

    asyncio.run(ask())


class Wire:
    """A TCP proxy to the server: `out` loses what the host sends, `inn` what it receives."""

    def __init__(self, url: str) -> None:
        self._to = int(url.rpartition(":")[2])
        self.cut_out = self.cut_in = False
        self.url = ""
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._to)
        self._open |= {writer, far_writer}
        await asyncio.gather(
            self._pump(reader, far_writer, lambda: self.cut_out),
            self._pump(far_reader, writer, lambda: self.cut_in),
            return_exceptions=True,
        )
        for w in (writer, far_writer):
            w.close()
            self._open.discard(w)

    @staticmethod
    async def _pump(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter, cut: Callable[[], bool]
    ) -> None:
        try:
            while data := await reader.read(65536):
                if not cut():  # otherwise it is lost, and the request never gets an answer
                    writer.write(data)
                    await writer.drain()
        finally:
            writer.close()

    def cut(self, how: str) -> None:
        self.cut_out = how in ("out", "both")
        self.cut_in = how in ("in", "both")

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for w in list(self._open):
            w.close()


class Host:
    """One host: its Leadership, its link to the server, and the permission its kernel has."""

    def __init__(
        self, node: str, url: str, boot: str = "b1", *, transmitting: bool = False
    ) -> None:
        self.node, self.wire, self.until = node, Wire(url), 0
        self._boot, self._transmitting = boot, transmitting
        self.leadership: Leadership | None = None

    async def start(self, pair: str) -> None:
        await self.wire.start()
        self.store = EtcdStore(Etcd((self.wire.url,)), pair, TTL_MS / 10_000)
        self.leadership = Leadership(
            self.store, node=self.node, address=self.node, boot=self._boot,
            ttl_ms=TTL_MS, margin_ms=MARGIN_MS, transmitting=self._transmitting,
            allow=lambda ns: setattr(self, "until", ns), changed=lambda: None,
        )  # fmt: skip
        self.task = asyncio.create_task(self.leadership.run())

    @property
    def transmits(self) -> bool:
        """Return whether the guest may transmit, as COLO_LEASE in the programs decides."""
        return boot_ns() < self.until

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        await self.store.close()
        await self.wire.stop()


class Pair:
    """Two hosts, watched."""

    def __init__(self, p: Host, s: Host) -> None:
        self.p, self.s, self.both = p, s, 0

    async def watch(self) -> None:
        while True:
            self.both += self.p.transmits and self.s.transmits
            await asyncio.sleep(0.005)

    async def until(self, cond: Callable[[], object], timeout: float = 15) -> None:
        async with asyncio.timeout(timeout):
            while not cond():
                await asyncio.sleep(0.01)
        assert not self.both

    async def stays(self, cond: Callable[[], object], seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert cond()
            await asyncio.sleep(0.01)
        assert not self.both


@contextlib.asynccontextmanager
async def pair(etcd: str, name: str) -> AsyncIterator[Pair]:
    p, s = Host(P, etcd, transmitting=True), Host(S, etcd)
    for h in (p, s):
        await h.start(name)
    both = Pair(p, s)
    watcher = asyncio.create_task(both.watch())
    try:
        yield both
    finally:
        watcher.cancel()
        for h in (p, s):
            await h.stop()
    assert not both.both


def test_one_holds_the_other_waits(etcd: str) -> None:
    async def go() -> None:
        async with pair(etcd, "one") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.s.leadership.want = True
            await x.until(lambda: x.s.leadership.seen.holder == f"{P}@{P} b1")
            await x.stays(lambda: x.p.transmits and not x.s.transmits, 1.5 * TTL_MS / 1000)
            x.p.leadership.want = False  # it gives the key up
            assert not x.p.transmits
            await x.until(lambda: x.s.transmits, TTL_MS / 1000)

    asyncio.run(go())


@pytest.mark.parametrize("how", ["out", "in", "both"])
def test_a_holder_that_is_cut_off_falls_silent_first(etcd: str, how: str) -> None:
    """P-store is cut in either direction: S gets the key only after P has fallen silent."""

    async def go() -> None:
        async with pair(etcd, f"cut-{how}") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.p.wire.cut(how)
            x.s.leadership.want = True
            if how == "in":
                # Its renewals arrive, so the key stays with it; nobody transmits until it is back.
                await x.until(lambda: not x.p.transmits)
                await x.stays(lambda: not x.p.transmits, 0.5)
                x.p.wire.cut("")
                await x.until(lambda: x.p.transmits or x.s.transmits)
                return
            await x.until(lambda: x.s.transmits)
            x.p.wire.cut("")
            await x.until(lambda: x.p.leadership.seen.holder == f"{S}@{S} b1")
            await x.stays(lambda: x.s.transmits and not x.p.transmits, 1.0)

    asyncio.run(go())


def test_the_store_is_gone_and_a_promise_keeps_the_primary_transmitting(etcd: str) -> None:
    async def go() -> None:
        async with pair(etcd, "gone") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            for h in (x.p, x.s):
                h.wire.cut("both")
            end = time.monotonic() + 2 * TTL_MS / 1000
            while time.monotonic() < end:  # heartbeats
                sent = boot_ns()
                assert x.s.leadership.promise()
                x.p.leadership.promised(sent)
                assert x.p.transmits
                await asyncio.sleep(0.05)
            assert not x.p.leadership.held
            # The heartbeats end. S must not transmit before its last promise is over, nor without
            # the key.
            x.s.wire.cut("")
            x.s.leadership.want = True
            assert not x.s.leadership.promise()
            await x.until(lambda: x.s.transmits)

    asyncio.run(go())


@pytest.mark.parametrize("seed", range(2))
def test_flapping_cuts_of_all_edges(etcd: str, seed: int) -> None:
    """Both want to transmit all the time, over links that flap."""
    import random

    rnd = random.Random(seed)

    async def go() -> None:
        async with pair(etcd, f"flap{seed}") as x:
            x.p.leadership.want = x.s.leadership.want = True
            transmitted = {"p": 0, "s": 0}
            end = time.monotonic() + 8
            while time.monotonic() < end:
                host = rnd.choice((x.p, x.s))
                host.wire.cut(rnd.choice(("", "", "out", "in", "both")))
                if rnd.random() < 0.15:
                    host.leadership.want = False
                    await asyncio.sleep(0.05)
                    host.leadership.want = True
                stop = time.monotonic() + rnd.choice((0.1, 0.5, 1.5))
                while time.monotonic() < stop:
                    transmitted["p"] += x.p.transmits
                    transmitted["s"] += x.s.transmits
                    assert not (x.p.transmits and x.s.transmits)
                    await asyncio.sleep(0.005)
            for h in (x.p, x.s):
                h.wire.cut("")
            await x.until(lambda: x.p.transmits or x.s.transmits)
            assert transmitted["p"] + transmitted["s"] > 0

    asyncio.run(go())


def test_the_record_outlives_the_lease_and_its_holder(etcd: str) -> None:
    async def go() -> None:
        async with pair(etcd, "alone") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.p.leadership.ran_standalone()
            await x.until(lambda: x.p.leadership.recorded)
            x.p.wire.cut("both")
            x.s.leadership.want = True
            await x.until(lambda: x.s.leadership.peer_standalone)
            await x.stays(lambda: not x.s.transmits, 0.3)  # though nobody else has the key
            # its own record cannot replace the other's
            x.s.leadership.ran_standalone()
            await x.stays(lambda: not x.s.leadership.recorded, 1.0)
            x.s.leadership.want = False
            x.p.wire.cut("")
            await x.until(lambda: x.p.leadership.held and x.p.leadership.recorded)
            x.p.leadership.paired()
            await x.until(lambda: x.p.leadership.seen.standalone == "")
            await x.until(lambda: not x.s.leadership.peer_standalone)  # it only watches
            assert not x.s.transmits

    asyncio.run(go())


def test_a_controller_started_anew_keeps_the_key(etcd: str) -> None:
    async def go() -> None:
        async with pair(etcd, "again") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.p.task.cancel()
            again = Host(P, etcd, "b2", transmitting=True)
            await again.start("again")
            again.leadership.want = True  # type: ignore[union-attr]
            async with asyncio.timeout(TTL_MS / 1000):
                while not again.transmits:
                    await asyncio.sleep(0.01)
            seen = again.leadership.seen  # type: ignore[union-attr]
            assert (seen.holder, seen.standalone, seen.last) == (f"{P}@{P} b2", "", f"{P}@{P} b2")
            await again.stop()

    asyncio.run(go())


def test_a_key_is_taken_from_who_said_that_it_is_shut(etcd: str) -> None:
    async def go() -> None:
        async with pair(etcd, "steal") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.p.task.cancel()  # reports `shut`, shuts its path, and dies: its lease lives on
            x.p.until = 0
            assert x.s.leadership.promise()
            began = time.monotonic()
            x.s.leadership.want = True
            x.s.leadership.freed("b0")  # another process of that host
            await x.stays(lambda: not x.s.transmits, 0.3)
            x.s.leadership.freed("b1")
            await x.until(lambda: x.s.transmits)
            assert time.monotonic() - began < TTL_MS / 1000

    asyncio.run(go())


def revoke_all(etcd: str) -> int:
    """Revoke all leases, as an administrator or a hung leader does (etcd #15247)."""
    post = partial(requests.post, timeout=5)
    leases = post(f"{etcd}/v3/lease/leases", json={}).json().get("leases", [])
    answers = [post(f"{etcd}/v3/lease/revoke", json={"ID": lease["ID"]}) for lease in leases]
    for answer in answers:
        if answer.status_code != requests.codes.not_found:  # one that a former test left, and ended
            answer.raise_for_status()
    return sum(answer.ok for answer in answers)


@pytest.mark.parametrize("hangs", [True, False], ids=["holder-hangs", "holder-lives"])
def test_a_lease_that_is_revoked_gives_its_holder_the_time_that_it_had(
    etcd: str, hangs: bool
) -> None:
    """Its kernel lets it transmit until the old end, so the other host waits for a whole ttl."""

    async def go() -> None:
        async with pair(etcd, f"revoked-{hangs}") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            x.s.leadership.want = True
            await x.until(lambda: x.s.leadership.seen.holder == f"{P}@{P} b1")
            if hangs:
                x.p.task.cancel()
            assert await asyncio.to_thread(revoke_all, etcd) > 0
            began = boot_ns()
            if not hangs:
                await x.stays(lambda: x.p.transmits and not x.s.transmits, 1.5 * TTL_MS / 1000)
                return
            await x.until(lambda: x.s.transmits)
            assert boot_ns() - began >= TTL_MS * 1_000_000

    asyncio.run(go())


def test_a_key_that_was_given_up_is_free_at_once(etcd: str) -> None:
    """If that is recorded; a key that merely vanished is not, nor one that is unknown."""

    async def go() -> None:
        store = EtcdStore(Etcd((etcd,)), "words", 5)
        mine, other = f"{P}@{P} b1", f"{S}@{S} b1"
        assert (await store.hold(mine, TTL_MS, "", False)).holder == ""
        assert (await store.hold(mine, TTL_MS, "", True)).holder == mine
        await asyncio.to_thread(revoke_all, etcd)
        seen = await store.hold(other, TTL_MS, "", False)
        assert (seen.holder, seen.last) == ("", mine)
        seen = await store.hold(mine, TTL_MS, "", False)
        assert seen.holder == mine
        since = seen.since
        await store.release()
        seen = await store.look()
        assert (seen.holder, seen.last) == ("", GIVEN_UP) and seen.since > since
        assert (await store.hold(other, TTL_MS, "", False)).holder == other
        await store.release()
        await store.close()

    asyncio.run(go())


def test_a_request_that_was_given_up_ties_the_key_to_no_old_lease(etcd: str) -> None:
    """Its last write is late: it arrives when another attempt has got the key."""

    async def go() -> None:
        store = EtcdStore(Etcd((etcd,)), "late", 5)
        holder = f"{P} b1"
        diverged: list[tuple[object, ...]] = []
        attempt_class = __import__("colo_xdp.failover.etcd", fromlist=["_Attempt"])._Attempt
        original = attempt_class.post

        def post(self: object, path: str, body: dict[str, object]) -> object:
            if not diverged and "request_put" in str(body):
                diverged.append((self, path, body))
                raise ValueError("no answer")
            return original(self, path, body)

        attempt_class.post = post
        try:
            with pytest.raises(StoreError):
                await store.hold(holder, TTL_MS, "", True)
            assert (await store.hold(holder, TTL_MS, "", True)).holder == holder
        finally:
            attempt_class.post = original
        _, path, body = diverged[0]
        other = attempt_class(Etcd((etcd,)), etcd, 5)
        assert not other.post(path, body).get("succeeded")
        other.end()
        await store.close()

    asyncio.run(go())


def test_a_server_that_hangs_is_left(etcd: str) -> None:
    """Of two endpoints, the first accepts connections and never answers."""

    async def go() -> None:
        with socket.create_server(("127.0.0.1", 0)) as dead:
            url = f"http://127.0.0.1:{dead.getsockname()[1]}"
            store = EtcdStore(Etcd((url, etcd)), "hang", 0.2)
            with pytest.raises(StoreError, match=url):
                await store.hold(f"{P} b1", TTL_MS, "", True)
            assert (await store.hold(f"{P} b1", TTL_MS, "", True)).holder == f"{P} b1"
            await store.close()

    asyncio.run(go())


def test_a_stopped_server_stops_nobody_for_longer_than_asked(etcd: str) -> None:
    """SIGSTOP: connections stay, answers do not come; the loop continues, the permission ends."""

    async def go() -> None:
        async with pair(etcd, "stop") as x:
            x.p.leadership.want = True
            await x.until(lambda: x.p.transmits)
            os.kill(PIDS[etcd], signal.SIGSTOP)
            try:
                began = time.monotonic()
                await x.until(lambda: not x.p.transmits)
                assert time.monotonic() - began < TTL_MS / 1000
            finally:
                os.kill(PIDS[etcd], signal.SIGCONT)
            await x.until(lambda: x.p.transmits)

    asyncio.run(go())


def test_doctor_asks_each_endpoint(etcd: str, tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "deploy/examples/primary.toml").read_text()
    head, _, rest = text.partition("fence = ")
    dead = f"http://127.0.0.1:{free_port()}"
    path = tmp_path / "c.toml"
    path.write_text(f'{head}arbiter = "lease"\netcd = ["{etcd}", "{dead}"]\n'
                    + rest.partition("\n")[2])  # fmt: skip
    found = [(c.key, c.level) for c in _failover(Patient(load(path)))]
    assert found == [("etcd", OK), ("etcd", WARN)]
