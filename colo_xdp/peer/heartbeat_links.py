# SPDX-License-Identifier: GPL-2.0-or-later
"""Send and receive heartbeat datagrams (peer/heartbeat_datagram.py) on every heartbeat link.

*The peer link*: Ethernet frames of type 0x88B5 (IEEE 802, local experimental) to a group address.
They need no configured address, no IP firewall can block them, and a link that has lost its
addresses still carries them. They have no 802.1ad tag, so the eBPF programs on the link pass them.

*Further links*: UDP between two addresses each ([peer] heartbeat_links). The sockets are connected,
so the kernel accepts nothing from other addresses and reports a host that refuses.

While heartbeats come over the control channel, a datagram says nothing new, so nobody wakes up for
one: those that have come are read with each of these heartbeats, and with the next send(). Once the
control channel is down or silent (watch()), each datagram is read as it comes. The kernel's
timestamps would tell when one came, but a socket that wants them has every frame of the host
stamped; the sender's clock tells it well enough (HeartbeatLink.lead_ns).

Nothing here blocks: a datagram that cannot be sent is counted and reported once, and a socket whose
device or address is gone is reopened with the next datagram. At most BUDGET datagrams are read from
a link between two sends, so that a flood costs that link and nothing else. The controller owns the
HeartbeatLinks object.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .. import validate
from ..failover.lease import boot_ns
from .heartbeat_datagram import REFUSALS, SIZE, Flag, Heartbeat, HeartbeatSession

if TYPE_CHECKING:
    from ..config.file import Config
    from ..config.network import Network

log = logging.getLogger("colo_xdp.peer.heartbeat_links")

ETHERTYPE = 0x88B5
GROUP = bytes.fromhex("034358420000")  # locally administered, group
BUDGET = 64
_SOL_PACKET, _ADD_MEMBERSHIP, _MR_MULTICAST = 263, 1, 0  # linux/if_packet.h
#: errors after which the socket may work again by itself
_PASSING = {
    errno.EAGAIN, errno.ENOBUFS, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH,
    errno.ENETDOWN, errno.EPERM,
}  # fmt: skip


class _Transport(ABC):
    """The socket of one link."""

    def __init__(self, name: str, label: str = "") -> None:
        self.name, self.label = name, label
        self.sock: socket.socket | None = None
        self.trouble = ""
        # nobody listens there; the kernel reports that late, so only a received datagram clears it
        self.refused = False
        self.reading = False
        self.left = BUDGET

    @abstractmethod
    def open(self) -> socket.socket:
        """Return a non-blocking socket. Raises OSError."""

    def to(self) -> Any:
        """Return where to send; None: the socket is connected."""
        return None

    def stale(self) -> bool:
        """Return whether the socket is permanently deaf without the kernel reporting it."""
        return False


class _Link(_Transport):
    def __init__(self, network: Network) -> None:
        super().__init__(network.link_name, network.link_name.removeprefix("peer link"))
        self.device = network.peer_link

    def open(self) -> socket.socket:
        s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, 0)
        try:
            s.bind((self.device, ETHERTYPE))
            index = socket.if_nametoindex(self.device)
            member = struct.pack("=iHH8s", index, _MR_MULTICAST, len(GROUP), GROUP)
            s.setsockopt(_SOL_PACKET, _ADD_MEMBERSHIP, member)
        except OSError:
            s.close()
            raise
        return s

    def to(self) -> Any:
        return (self.device, ETHERTYPE, 0, 0, GROUP)

    def stale(self) -> bool:
        # A device that is deleted or leaves the namespace takes the binding with it, even if it is
        # created again under its name or comes back with its ifindex.
        try:
            return self.sock is not None and self.sock.getsockname()[0] != self.device
        except OSError:
            return True


class _Udp(_Transport):
    def __init__(self, text: str) -> None:
        ends = validate.path_ends(text)
        assert ends is not None, text  # the configuration was checked
        self.local, self.remote = ends
        super().__init__(f"{self.remote[0]}:{self.remote[1]}")

    def open(self) -> socket.socket:
        family = socket.AF_INET if self.remote[0].version == 4 else socket.AF_INET6
        s = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        try:
            s.bind((str(self.local[0]), self.local[1]))
            s.connect((str(self.remote[0]), self.remote[1]))
        except OSError:
            s.close()
            raise
        return s


def links_of(config: Config) -> list[_Transport]:
    """Return the links of a configuration, in the order of the status document."""
    out: list[_Transport] = []
    if config.peer.link_heartbeats:
        out += [_Link(network) for network in config.networks]
    return out + [_Udp(text) for text in config.peer.heartbeat_links]


class HeartbeatLinks:
    """All heartbeat links of one controller.

    `on_heartbeat` runs in the event loop and must not block.
    """

    def __init__(self, config: Config, on_heartbeat: Callable[[Heartbeat], None]) -> None:
        self._transports = links_of(config)
        self._on_heartbeat = on_heartbeat
        names, labels = ([w.name for w in self._transports], [w.label for w in self._transports])
        self.core = HeartbeatSession(config.pair, config.role, names, labels)
        self._interval_ns = config.peer.heartbeat_interval * 1_000_000
        self._loop: asyncio.AbstractEventLoop | None = None
        self._watched = True

    def start(self) -> None:
        """Begin to receive."""
        self._loop = asyncio.get_running_loop()
        for i in range(len(self._transports)):
            self._ready(i)

    def watch(self, on: bool) -> None:
        """Read each datagram as it comes, or with the next send()."""
        if on == self._watched:
            return
        self._watched = on
        for i, w in enumerate(self._transports):
            if not on:
                self._pause(w)
            elif self._loop is not None:
                self._ready(i)

    def read(self, only: int | None = None) -> None:
        """Read what has come over all links, or `only` one, if nobody watches them."""
        if self._loop is None or self._watched:
            return
        for i in range(len(self._transports)) if only is None else (only,):
            self._read(i)

    def send(self, flags: Flag, lag_ms: int, epoch: int) -> None:
        """Send a datagram over each link, after reading what has come."""
        if self._loop is None:
            return
        self.core.round()
        for i, w in enumerate(self._transports):
            w.left = BUDGET
            if not self._ready(i):
                continue
            self.read(i)
            data = self.core.make(i, boot_ns(), flags, lag_ms, epoch)
            if not data or w.sock is None:
                continue
            try:
                where = w.to()
                w.sock.send(data) if where is None else w.sock.sendto(data, where)
                if not w.refused:
                    self._say(w, "")
            except OSError as e:
                self._failed(w, e)

    def _ready(self, i: int) -> bool:
        """Return whether the link has a socket, opening it if necessary; read it if watched."""
        w, loop = self._transports[i], self._loop
        assert loop is not None
        if w.stale():
            self._close(w)
        if w.sock is None:
            try:
                w.sock = w.open()
            except OSError as e:
                self._say(w, str(e))
                return False
        if self._watched and not w.reading:
            loop.add_reader(w.sock.fileno(), self._read, i)
            w.reading = True
        return True

    def _read(self, i: int) -> None:
        w = self._transports[i]
        while w.sock is not None:
            if w.left <= 0:
                self._pause(w)
                return
            w.left -= 1
            try:
                data = w.sock.recv(SIZE + 1)
            except OSError as e:
                if e.errno != errno.EAGAIN:
                    self._failed(w, e)
                return
            lay_ns = 0 if self._watched else self._interval_ns
            heartbeat = self.core.receive(i, data, boot_ns(), lay_ns)
            if heartbeat is not None:
                w.refused = False
                self._say(w, "")
                self._on_heartbeat(heartbeat)

    def _pause(self, w: _Transport) -> None:
        if w.reading and w.sock is not None and self._loop is not None:
            self._loop.remove_reader(w.sock.fileno())
        w.reading = False

    def _failed(self, w: _Transport, e: OSError) -> None:
        if e.errno != errno.EAGAIN:
            w.refused = e.errno == errno.ECONNREFUSED
            self._say(w, e.strerror or str(e))
        if e.errno not in _PASSING:
            self._close(w)

    def _close(self, w: _Transport) -> None:
        self._pause(w)
        if w.sock is not None:
            w.sock.close()
        w.sock = None

    def _say(self, w: _Transport, trouble: str) -> None:
        if trouble != w.trouble:
            w.trouble = trouble
            log.warning("heartbeats over %s: %s", w.name, trouble or "working again")

    def status(self) -> list[dict[str, Any]]:
        """Return the links' state for the status document."""
        now, out = boot_ns(), []
        for i, (w, p) in enumerate(zip(self._transports, self.core.links, strict=True)):
            silent, echo_age = self.core.silent_ms(i, now), self.core.echo_age_ms(i, now)
            out.append(
                {
                    "name": w.name,
                    "silent_ms": None if silent == float("inf") else silent,
                    "echo_age_ms": None if echo_age == float("inf") else echo_age,
                    "rtt_us": p.rtt_ns / 1000,
                    "sent": p.sent,
                    "received": p.received,
                    "refused": {r: p.refused[r] for r in REFUSALS},
                    "trouble": w.trouble,
                }
            )
        return out

    def close(self) -> None:
        """Close all sockets."""
        for w in self._transports:
            self._close(w)
        self._loop = None
