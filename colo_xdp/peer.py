# SPDX-License-Identifier: GPL-2.0-or-later
"""The control channel between the two controllers: TCP, mutual TLS, heartbeats.

The secondary listens, the primary connects and keeps trying. With certificates
configured both sides present one and accept only the other's (pinned): there is
no way in for a stranger. Frames never travel here, only decisions.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
import time
import uuid
from collections.abc import Callable
from typing import Any

from . import abi, wire

log = logging.getLogger("colo_xdp.peer")

RETRY_S = 0.2
HELLO_TIMEOUT_S = 3.0
MAX_BACKLOG = 1 << 20


class PeerError(RuntimeError):
    """The channel cannot be set up (address, certificate)."""


def tls_context(server: bool, cert: str, key: str, peer_cert: str) -> ssl.SSLContext:
    """TLS 1.3 with our certificate, trusting exactly the peer's.

    Raises PeerError when a file is missing or not what it should be.
    """
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    ctx.minimum_version = ssl.TLSVersion.TLSv1_3
    ctx.check_hostname = False  # the pinned certificate is the identity, not a name in it
    ctx.verify_mode = ssl.CERT_REQUIRED
    try:
        ctx.load_cert_chain(cert, key)
        ctx.load_verify_locations(peer_cert)
    except (OSError, ssl.SSLError) as e:
        raise PeerError(f"[peer] cert, key, peer_cert: {e}") from e
    return ctx


def split_address(text: str) -> tuple[str, int]:
    """ "ip:port" or "[ip6]:port"."""
    host, _, port = text.rpartition(":")
    return host.strip("[]"), int(port)


class Peer:
    """One end of the channel. Callbacks run in the event loop and must not block."""

    def __init__(
        self,
        *,
        pair: str,
        role: str,
        local: str,
        remote: str,
        tls: tuple[str, str, str] | None,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_message: Callable[[dict[str, Any]], None],
    ) -> None:
        self.pair, self.role = pair, role
        self.local, self.remote, self.tls = local, remote, tls
        self._on_up, self._on_down, self._on_message = on_up, on_down, on_message
        self.boot = uuid.uuid4().hex
        self.connected = False
        self.last_seen_ns = 0
        self.rtt_ns = 0
        self.refused = 0
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to listen (secondary) or to connect (primary).

        Raises PeerError when the address cannot be bound or a certificate cannot be read.
        """
        if self.role == "secondary":
            ctx = tls_context(True, *self.tls) if self.tls else None
            host, port = split_address(self.local)
            try:
                self._server = await asyncio.start_server(
                    self._serve, host, port, ssl=ctx, limit=wire.MAX_LINE
                )
            except OSError as e:
                raise PeerError(f"[peer] local {self.local}: {e}") from e
        else:
            ctx = tls_context(False, *self.tls) if self.tls else None
            self._task = asyncio.create_task(self._dial(ctx))

    async def _dial(self, ctx: ssl.SSLContext | None) -> None:
        host, port = split_address(self.remote)
        bind = (split_address(self.local)[0], 0)
        last = ""
        while True:
            try:
                reader, writer = await asyncio.wait_for(
                    asyncio.open_connection(
                        host, port, ssl=ctx, limit=wire.MAX_LINE, local_addr=bind
                    ),
                    HELLO_TIMEOUT_S,
                )
            except (OSError, TimeoutError) as e:
                if str(e) != last:
                    last = str(e)
                    log.info("peer %s: %s; trying on", self.remote, e or "timeout")
                await asyncio.sleep(RETRY_S)
                continue
            await self._session(reader, writer)
            await asyncio.sleep(RETRY_S)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._session(reader, writer)

    async def _session(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        why = "closed by the peer"
        mine = False
        try:
            writer.write(
                wire.encode(
                    "hello",
                    v=wire.VERSION,
                    pair=self.pair,
                    role=self.role,
                    boot=self.boot,
                    abi=abi.ABI,
                )
            )
            line = await asyncio.wait_for(reader.readline(), HELLO_TIMEOUT_S)
            self._greet(wire.decode(line))
            if self._writer is not None:  # a reconnecting peer: the old connection is dead
                self._drop("replaced by a new connection")
            self._writer, mine, self.connected = writer, True, True
            self.last_seen_ns = time.monotonic_ns()
            self._on_up()
            while line := await reader.readline():
                if self._writer is not writer:
                    return
                msg = wire.decode(line)
                self.last_seen_ns = time.monotonic_ns()
                self._on_message(msg)
        except (wire.WireError, ValueError) as e:
            why = f"protocol: {e}"
            self.refused += 1
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as e:
            why = str(e) or type(e).__name__
        finally:
            if mine and self._writer is writer:
                self._drop(why)
            elif not mine:
                log.warning("peer connection refused: %s", why)
            writer.close()
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), 1)

    def _greet(self, msg: dict[str, Any]) -> None:
        if msg["type"] != "hello":
            raise wire.WireError(f"{msg['type']} before hello")
        if msg["v"] != wire.VERSION or msg["abi"] != abi.ABI:
            raise wire.WireError(
                f"the peer speaks version {msg['v']} (data path {msg['abi']}), "
                f"this side {wire.VERSION} ({abi.ABI}): use the same release on both hosts"
            )
        if msg["pair"] != self.pair:
            raise wire.WireError(f"the peer belongs to pair {msg['pair']!r}, this is {self.pair!r}")
        if msg["role"] == self.role:
            raise wire.WireError(f"both sides are configured as {self.role}")

    def drop(self, why: str) -> None:
        """Give the connection up: no FIN comes from a host that lost its power."""
        self._drop(why)

    def _drop(self, why: str) -> None:
        writer, self._writer = self._writer, None
        was, self.connected = self.connected, False
        if writer is not None:
            writer.close()
        if was:
            self._on_down(why)

    def send(self, kind: str, **fields: Any) -> bool:
        """Queue a message; False when there is no connection. A peer that does not read is cut."""
        writer = self._writer
        if writer is None or writer.is_closing():
            return False
        if writer.transport.get_write_buffer_size() > MAX_BACKLOG:
            self._drop("the peer does not read")
            return False
        writer.write(wire.encode(kind, **fields))
        return True

    def silent_ms(self) -> float:
        """Time since the peer's last word; infinite when it has never spoken."""
        if not self.last_seen_ns:
            return float("inf")
        return (time.monotonic_ns() - self.last_seen_ns) / 1e6

    async def close(self) -> None:
        """Close without calling on_down."""
        self.connected = False
        if self._task is not None:
            self._task.cancel()
        if self._server is not None:
            self._server.close()
        writer, self._writer = self._writer, None
        if writer is not None:
            with contextlib.suppress(OSError, TimeoutError):
                await asyncio.wait_for(writer.drain(), 1)
            writer.close()
