# SPDX-License-Identifier: GPL-2.0-or-later
"""Encode and decode the messages of colo-compare's notify_dev. Pure.

A checkpoint framework outside of QEMU (Xen's libxl) connects to the chardev that notify_dev names.
The messages are texts without a zero byte at their end, each with its length in front:

    framework -> proxy    COLO_USERSPACE_PROXY_INIT    the framework is there
    proxy -> framework    COLO_COMPARE_GET_XEN_INIT    the answer to it
    proxy -> framework    DO_CHECKPOINT                the guests differ: make a checkpoint
    framework -> proxy    COLO_CHECKPOINT              made; release what is held, forget the rest

The length is a uint32, big endian. With vnet_hdr_support=on the proxy also expects the field for
the length of a virtio-net header in what it *receives*, though it sends none: the framework has to
put a 0 there.

DO_CHECKPOINT is repeated at each difference and each expired_scan_cycle until a COLO_CHECKPOINT
comes. It does not wait for an INIT. A COLO_CHECKPOINT is not answered, and says neither which
checkpoint it means nor when the guest stopped.

Source: notify_remote_frame(), compare_notify_rs_finalize() and _compare_chr_send() in QEMU's
net/colo-compare.c.
"""

from __future__ import annotations

from enum import StrEnum

from .packet_stream import PacketDecoder, StreamPacket, encode

#: the longest message that is accepted, bytes: more than any that exists
MAX_MESSAGE = 64


class NotifyMessage(StrEnum):
    """What is said, as it is on the wire (ASCII)."""

    INIT = "COLO_USERSPACE_PROXY_INIT"
    INIT_ANSWER = "COLO_COMPARE_GET_XEN_INIT"
    DO_CHECKPOINT = "DO_CHECKPOINT"
    CHECKPOINT = "COLO_CHECKPOINT"


#: messages that a framework sends; the proxy sends the others
OF_FRAMEWORK = frozenset((NotifyMessage.INIT, NotifyMessage.CHECKPOINT))


class NotifyError(ValueError):
    """A message is none, or comes from the wrong end. The connection can go on."""


def encode_message(message: NotifyMessage, *, vnet_hdr: bool = False) -> bytes:
    """Return a message as its other end reads it.

    `vnet_hdr`: whether colo-compare has vnet_hdr_support=on, which changes only what it receives.
    """
    packet = StreamPacket(message.value.encode("ascii"))
    return encode(packet, vnet_hdr=vnet_hdr and message in OF_FRAMEWORK)


class NotifyDecoder:
    """Takes the bytes that one end receives, in any pieces, and gives messages."""

    def __init__(self, *, at_proxy: bool, vnet_hdr: bool = False) -> None:
        """Begin with a new connection.

        `at_proxy`: whether this is colo-compare's end. `vnet_hdr`: whether colo-compare has
        vnet_hdr_support=on.
        """
        self._at_proxy = at_proxy
        self._packets = PacketDecoder(vnet_hdr=vnet_hdr and at_proxy, max_packet=MAX_MESSAGE)

    def receive(self, data: bytes) -> None:
        """Take bytes from the connection."""
        self._packets.receive(data)

    def next_message(self) -> NotifyMessage | None:
        """Return the next message; None: more bytes are needed.

        Raises NotifyError for one that is unknown, or that this end sends itself: it is skipped.
        Raises PacketStreamError where the stream itself is broken, from then on.
        """
        packet = self._packets.next_packet()
        if packet is None:
            return None
        try:
            message = NotifyMessage(packet.frame.decode("ascii"))
        except ValueError:  # UnicodeDecodeError is one
            raise NotifyError(f"unknown message {packet.frame!r}") from None
        if (message in OF_FRAMEWORK) != self._at_proxy:
            raise NotifyError(f"{message.value} comes from the wrong end")
        return message

    def end(self) -> None:
        """Note the end of the stream. Raises TruncatedPacketError within a message."""
        self._packets.end()
