# SPDX-License-Identifier: GPL-2.0-or-later
"""Encode and decode the packet stream of QEMU's filters. Pure.

filter-mirror, filter-redirector and colo-compare exchange packets over stream sockets. A packet is

    uint32, big endian    its length in bytes: virtio-net header and frame, not these fields
    uint32, big endian    the length of the virtio-net header; only with vnet_hdr_support=on
    bytes                 the virtio-net header (if there is one), then the Ethernet frame

Nothing in the stream says whether the second field is there: both ends must have the same
vnet_hdr_support. The stream carries no sequence number, no epoch and no time.

Source: filter_send() in QEMU's net/filter-mirror.c, _compare_chr_send() in net/colo-compare.c and
net_fill_rstate() in net/net.c.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

#: the longest packet that QEMU takes, bytes (NET_BUFSIZE in include/net/net.h)
MAX_PACKET = 4096 + 65536
_FIELD = struct.Struct("!I")


class PacketStreamError(ValueError):
    """The stream cannot be read any further: what follows has no known boundary."""


class OversizedPacketError(PacketStreamError):
    """A length is above the limit: the other end is no filter, or has another vnet_hdr_support."""


class EmptyPacketError(PacketStreamError):
    """A length is 0, which no filter sends."""


class VnetHeaderError(PacketStreamError):
    """A virtio-net header is longer than its packet: the other end has vnet_hdr_support=off."""


class TruncatedPacketError(PacketStreamError):
    """The stream has ended within a packet."""


@dataclass(frozen=True, slots=True)
class StreamPacket:
    """One packet. `vnet_hdr_len`: bytes of virtio-net header at the beginning of `data`."""

    data: bytes
    vnet_hdr_len: int = 0

    @property
    def frame(self) -> bytes:
        """The Ethernet frame."""
        return self.data[self.vnet_hdr_len :]


def encode(packet: StreamPacket, *, vnet_hdr: bool) -> bytes:
    """Return a packet as QEMU reads it.

    `vnet_hdr`: whether the other end has vnet_hdr_support=on. Raises OversizedPacketError and
    EmptyPacketError, and VnetHeaderError also if there is a header that the other end would take
    for the frame.
    """
    _check_length(len(packet.data), MAX_PACKET)
    if not vnet_hdr:
        if packet.vnet_hdr_len:
            raise VnetHeaderError(
                f"a virtio-net header of {packet.vnet_hdr_len} bytes needs vnet_hdr_support=on"
            )
        return _FIELD.pack(len(packet.data)) + packet.data
    _check_header(packet.vnet_hdr_len, len(packet.data))
    return _FIELD.pack(len(packet.data)) + _FIELD.pack(packet.vnet_hdr_len) + packet.data


def _check_length(length: int, limit: int) -> None:
    if not length:
        raise EmptyPacketError("a packet of 0 bytes")
    if length > limit:
        raise OversizedPacketError(f"a packet of {length} bytes, and {limit} is the limit")


def _check_header(header: int, length: int) -> None:
    if not 0 <= header <= length:
        raise VnetHeaderError(f"a virtio-net header of {header} bytes in a packet of {length}")


class PacketDecoder:
    """Takes the bytes of one connection in any pieces, and gives whole packets.

    It keeps what was received and not taken with next_packet(). If all packets are taken after each
    receive(), that is less than one packet of the greatest length with its fields.
    """

    def __init__(self, *, vnet_hdr: bool, max_packet: int = MAX_PACKET) -> None:
        """Begin with a new connection. `max_packet`: the longest packet that is accepted, bytes."""
        self._fields = 2 if vnet_hdr else 1
        self._limit = max_packet
        self._data = bytearray()
        self._error: PacketStreamError | None = None

    @property
    def pending(self) -> int:
        """Number of bytes received and not yet taken as part of a packet."""
        return len(self._data)

    def receive(self, data: bytes) -> None:
        """Take bytes from the connection. After an error they are dropped."""
        if self._error is None:
            self._data += data

    def next_packet(self) -> StreamPacket | None:
        """Return the next whole packet; None: more bytes are needed.

        Raises PacketStreamError as soon as a field is wrong, and at each call from then on.
        """
        if self._error is not None:
            raise self._error
        try:
            return self._next()
        except PacketStreamError as e:
            self._error = e
            self._data.clear()
            raise

    def _next(self) -> StreamPacket | None:
        if len(self._data) < _FIELD.size:
            return None
        (length,) = _FIELD.unpack_from(self._data)
        _check_length(length, self._limit)
        start, header = _FIELD.size * self._fields, 0
        if len(self._data) < start:
            return None
        if self._fields == 2:
            (header,) = _FIELD.unpack_from(self._data, _FIELD.size)
            _check_header(header, length)
        if len(self._data) < start + length:
            return None
        packet = StreamPacket(bytes(self._data[start : start + length]), header)
        del self._data[: start + length]
        return packet

    def end(self) -> None:
        """Note the end of the stream. Raises TruncatedPacketError within a packet."""
        if self._error is None and self._data:
            self._error = TruncatedPacketError(
                f"the stream ended {len(self._data)} bytes after the last whole packet"
            )
            self._data.clear()
            raise self._error
