# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the control channel between the two controllers: TCP, mutual TLS, heartbeats.

The secondary listens; the primary connects and keeps trying. With certificates configured both
sides present one and accept only the other's (peer/tls.py), so nobody else gets in. Frames never
travel here, only decisions. The controller owns one Peer and receives its callbacks.

Strangers: a caller from an address other than the peer's is turned away before TLS. From the peer's
address at most PENDING connections may be without a hello, for HANDSHAKE_S and HELLO_S each. The
oldest gives way to a new one, so that nobody can keep the peer out by occupying all places. A line
has at most messages.MAX_LINE bytes, and at most MAX_BACKLOG bytes are queued for a peer that does
not read.

Replay: TLS keys are new for each connection (no resumption, no early data), so a recorded message
is useless on another one. Nothing is queued across a reconnection: what was not read on one
connection is never read on the next, and a replaced connection is ignored even while its last lines
are in the reader. What remains is a message that is valid but late on its own connection. Messages
about checkpoints carry their epoch, which is used once. `shut` is final: the data path that it
reports on is opened again only after a `ready` of a new guest. `demote` and `promoted` shut a guest
in, which is safe at any time. The rest of a heartbeat is overwritten by the next one. Each hello
carries a nonce; both sides derive the key of the heartbeats on other links from the two
(peer/heartbeat_datagram.py). An older release sends none. Two processes of one side cannot both be
connected: the newer connection wins, and the controller's lock (service/daemon.py) keeps two of
them from running.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import secrets
import socket
import ssl
import struct
import time
import uuid
from collections.abc import Callable
from typing import Any

from ..failover.facts import Ending
from . import heartbeat_datagram, messages
from .tls import Tls, TlsError

log = logging.getLogger("colo_xdp.peer.channel")

RETRY_S = 0.2
CONNECT_S = 3.0
HANDSHAKE_S = 3.0
HELLO_S = 3.0
PENDING = 8
MAX_BACKLOG = 1 << 20
OTHER = {"primary": "secondary", "secondary": "primary"}


class PeerError(RuntimeError):
    """The channel cannot be set up (address, certificate)."""


def split_address(text: str) -> tuple[str, int]:
    """Split "ip:port" or "[ip6]:port"."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


def _ip(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(text.partition("%")[0])


def _text(e: BaseException) -> str:
    if isinstance(e, ssl.SSLError):
        return f"{e.reason or type(e).__name__}: {getattr(e, 'verify_message', '') or e}"
    return str(e) or ("no answer in time" if isinstance(e, TimeoutError) else type(e).__name__)


def _ending(writer: asyncio.StreamWriter, silent_ms: float) -> Ending:
    """Judge whether the other host's kernel was alive until the end of a silence.

    It reads struct tcp_info (linux/tcp.h). If only the process hangs, its kernel still acknowledges
    what nobody reads.
    """
    sock = writer.get_extra_info("socket")
    try:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 60)
    except (OSError, AttributeError):
        return Ending.UNKNOWN
    if len(info) < 60:
        return Ending.UNKNOWN
    (unacked,) = struct.unpack_from("=I", info, 24)
    (last_ack_ms,) = struct.unpack_from("=I", info, 56)
    hung = unacked == 0 or last_ack_ms < silent_ms / 2
    return Ending.HUNG if hung else Ending.LOST


class Peer:
    """One end of the channel. Callbacks run in the event loop and must not block."""

    def __init__(
        self,
        *,
        pair: str,
        role: str,
        local: str,
        remote: str,
        tls: Tls | None,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: Callable[[dict[str, Any]], None],
        versions: tuple[int, int] = (messages.MIN_VERSION, messages.VERSION),
    ) -> None:
        self.pair, self.role = pair, role
        self.versions, self.version = versions, 0  # offered; agreed
        self.local, self.remote, self.tls = local, remote, tls
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self.boot, self.peer_boot = uuid.uuid4().hex, ""
        self.connected = False
        self.heartbeat_key = b""  # of this connection; empty: the peer knows no heartbeat datagrams
        self.ending = Ending.UNKNOWN  # of the last connection
        self.last_seen_ns = 0
        self.rtt_ns = 0
        self.refused = 0
        self._writer: asyncio.StreamWriter | None = None
        self._listener: socket.socket | None = None
        self._task: asyncio.Task[None] | None = None
        self._pending: list[asyncio.Task[None]] = []  # have not sent a hello yet; oldest first
        self._sessions: set[asyncio.Task[None]] = set()
        self._said: dict[str, str] = {}

    async def start(self) -> None:
        """Begin to listen (secondary) or to connect (primary).

        Raises PeerError when the address cannot be bound or a certificate cannot be read.
        """
        try:
            if self.tls:
                self.tls.context(server=self.role == "secondary")
        except TlsError as e:
            raise PeerError(str(e)) from e
        if self.role == "primary":
            self._task = asyncio.create_task(self._dial())
            return
        host, port = split_address(self.local)
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._listener = socket.create_server((host, port), family=family, backlog=PENDING)
        except OSError as e:
            raise PeerError(f"[peer] local {self.local}: {e}") from e
        self._listener.setblocking(False)
        self._task = asyncio.create_task(self._listen(self._listener))

    async def _dial(self) -> None:
        host, port = split_address(self.remote)
        bind = (split_address(self.local)[0], 0)
        while True:
            try:
                ctx = self.tls.context(server=False) if self.tls else None
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(
                        host, port, ssl=ctx, limit=messages.MAX_LINE, local_addr=bind
                    ),
                    CONNECT_S,
                )
            except (OSError, TimeoutError, TlsError) as e:
                self._note(self.remote, f"{_text(e)}; retrying")
            else:
                await self._session(reader, writer, self.remote)
            await asyncio.sleep(RETRY_S)

    async def _listen(self, listener: socket.socket) -> None:
        loop, friend = asyncio.get_running_loop(), _ip(split_address(self.remote)[0])
        while True:
            try:
                sock, where = await loop.sock_accept(listener)
            except OSError as e:  # out of descriptors, or the caller is gone already
                self._note("accept", str(e))
                await asyncio.sleep(RETRY_S)
                continue
            if _ip(where[0]) != friend:
                sock.close()
                self._refuse(where[0], f"[peer] remote is {friend}, nobody else may connect")
                continue
            while len(self._pending) >= PENDING:
                self._pending.pop(0).cancel()
                self._refuse(where[0], "too many connections without a hello")
            task = asyncio.create_task(self._incoming(sock, str(where[0])))
            self._pending.append(task)
            self._sessions.add(task)
            task.add_done_callback(self._over)

    def _over(self, task: asyncio.Task[None]) -> None:
        self._sessions.discard(task)
        self._admitted(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("peer connection: internal error", exc_info=task.exception())

    def _admitted(self, task: asyncio.Task[Any] | None) -> None:
        with contextlib.suppress(ValueError):
            self._pending.remove(task)  # type: ignore[arg-type]

    async def _incoming(self, sock: socket.socket, where: str) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(limit=messages.MAX_LINE)
        protocol = asyncio.StreamReaderProtocol(reader)
        try:
            try:
                ctx = self.tls.context(server=True) if self.tls else None
            except TlsError:
                sock.close()
                raise
            transport, _ = await loop.connect_accepted_socket(
                lambda: protocol, sock, ssl=ctx,
                ssl_handshake_timeout=HANDSHAKE_S if ctx else None,
            )  # fmt: skip
        except (OSError, TimeoutError, TlsError) as e:
            self._refuse(where, f"no TLS: {_text(e)}")
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        await self._session(reader, writer, where)

    def _refuse(self, where: str, why: str) -> None:
        self.refused += 1
        self._note(where, f"refused: {why}")

    def _note(self, where: str, why: str) -> None:
        """Log a problem once per remote address, until it changes."""
        if self._said.get(where) == why:
            return
        if len(self._said) >= 64:
            self._said.clear()
        self._said[where] = why
        log.warning("peer %s: %s", where, why)

    def _identify(self, writer: asyncio.StreamWriter) -> None:
        """Check whose certificate it is; TLS has proved that the other end holds its key."""
        if self.tls is None:
            return
        tls = writer.get_extra_info("ssl_object")
        found, der = tls.getpeercert(), tls.getpeercert(binary_form=True)
        self.tls.check(found, der or b"", self.pair, OTHER[self.role])

    async def _session(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, where: str
    ) -> None:
        why = "closed by the peer"
        mine = False
        try:
            self._identify(writer)
            oldest, newest = self.versions
            nonce = secrets.token_hex(heartbeat_datagram.NONCE)
            writer.write(
                messages.encode(
                    "hello", v=newest, min=oldest, pair=self.pair, role=self.role, boot=self.boot,
                    nonce=nonce,
                )
            )  # fmt: skip
            line = await asyncio.wait_for(reader.readline(), HELLO_S)
            if not line:
                raise OSError("closed without a message: the peer refused this host, see its log")
            hello = messages.decode(line)
            self.version = self._greet(hello)
            self._admitted(asyncio.current_task())
            self._said.clear()
            if self._writer is not None:  # the peer reconnected: the old connection is dead
                self._drop("replaced by a new connection")
            self._writer, mine, self.connected = writer, True, True
            nonces = {self.role: nonce, OTHER[self.role]: str(hello.get("nonce", ""))}
            self.heartbeat_key = heartbeat_datagram.session_key(
                self.pair, nonces["primary"], nonces["secondary"]
            )
            self.ending = Ending.UNKNOWN
            self.last_seen_ns = time.monotonic_ns()
            self._on_up()
            while line := await reader.readline():
                if self._writer is not writer:
                    return
                msg = messages.decode(line)
                if msg["type"] == "hello":
                    raise messages.WireError("a second hello")
                self.last_seen_ns = time.monotonic_ns()
                self._on_message(msg)
            if self._writer is writer:
                self.ending = Ending.CLOSED
        except TlsError as e:
            why = str(e)
        except (messages.WireError, ValueError) as e:
            why = f"protocol: {e}"
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
            why = _text(e)
            if mine and self._writer is writer and isinstance(e, ConnectionError):
                self.ending = Ending.CLOSED
        finally:
            if mine and self._writer is writer:
                self._drop(why)
            elif not mine:
                self._refuse(where, why)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1)

    def _greet(self, msg: dict[str, Any]) -> int:
        """Check a hello and return the version to use. Raises WireError."""
        if msg["type"] != "hello":
            raise messages.WireError(f"{msg['type']} before hello")
        version = messages.agree(self.versions, (msg["min"], msg["v"]))
        if msg["pair"] != self.pair:
            raise messages.WireError(
                f"the peer belongs to pair {msg['pair']!r}, this is {self.pair!r}"
            )
        if msg["role"] != OTHER[self.role]:
            raise messages.WireError(
                f"the peer is configured as {msg['role']!r:.40}, expected {OTHER[self.role]}"
            )
        self.peer_boot = msg["boot"]
        return version

    def drop(self, why: str) -> None:
        """Give the connection up: a host that lost its power sends no FIN."""
        if self._writer is not None:
            self.ending = _ending(self._writer, self.silent_ms())
        self._drop(why)

    def discount(self, ns: int) -> None:
        """Do not count the last `ns` as the peer's silence: this side was not receiving."""
        if self.last_seen_ns:
            self.last_seen_ns += ns

    def _drop(self, why: str) -> None:
        writer, self._writer = self._writer, None
        was, self.connected = self.connected, False
        if writer is not None:
            writer.close()
        if was:
            self._on_down(why)

    def send(self, kind: str, **fields: Any) -> bool:
        """Queue a message; return False if there is no connection. Drop a peer that does not
        read."""
        writer = self._writer
        if writer is None or writer.is_closing():
            return False
        if writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            self._drop("the peer does not read")
            return False
        writer.write(messages.encode(kind, **fields))
        return True

    def silent_ms(self) -> float:
        """Return the time since the peer's last message, ms; infinite if there was none."""
        if not self.last_seen_ns:
            return float("inf")
        return (time.monotonic_ns() - self.last_seen_ns) / 1e6

    async def close(self) -> None:
        """Close without calling on_down."""
        self.connected = False
        if self._task is not None:
            self._task.cancel()
        if self._listener is not None:
            self._listener.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1)
            writer.close()
        for task in list(self._sessions):
            task.cancel()
        await asyncio.gather(*self._sessions, return_exceptions=True)
