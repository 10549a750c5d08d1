# SPDX-License-Identifier: GPL-2.0-or-later
"""Injects frames into the kernel through a tap to which only the controller writes.

The program on that tap's ingress decides where they enter the stack. Offload state travels in
struct virtio_net_hdr (linux/virtio_net.h), so a 64 KiB frame with a partial checksum leaves as it
came.
"""

from __future__ import annotations

import os
import struct
from collections import Counter

from ..abi import GSO_ECN, Gso
from ..net.packet import Kind, parse

_VNET = struct.Struct("<BBHHHH")
_PLAIN = bytes(10)
NEEDS_CSUM = 1


def vnet_header(frame: bytes, gso_size: int, partial: bool, gso_type: int = 0) -> bytes:
    """Return struct virtio_net_hdr, 10 bytes, for a frame as it was captured.

    gso_type: as in the struct. For TCP it may be 0 (not known); it is then what the guests' stacks
    make of such a header.

    Raises ValueError when the frame has an offload on something other than TCP or UDP, for which
    the kernel would compute a checksum at the wrong place; and for UDP of which it is not known
    whether it is one datagram or several.
    """
    if not partial and not gso_size:
        return _PLAIN
    p = parse(frame)
    if p.kind not in (Kind.TCP, Kind.UDP):
        raise ValueError(f"offload on a frame that is neither TCP nor UDP (protocol {p.proto})")
    l4 = p.l4
    tcp = p.proto == 6
    header = 0
    if not gso_size:
        gso_type = 0
    elif tcp:
        if not gso_type:
            gso_type = Gso.TCPV6 if frame[p.l3] >> 4 == 6 else Gso.TCPV4
            if frame[l4 + 13] & 0x80:
                gso_type |= GSO_ECN
        header = l4 + (frame[l4 + 12] >> 4) * 4
    elif gso_type in (Gso.UDP, Gso.UDP_L4):
        header = l4 + 8
    else:
        raise ValueError(f"UDP to be segmented, and not known how (type {gso_type})")
    return _VNET.pack(
        NEEDS_CSUM if partial else 0, gso_type, header, gso_size, l4, 16 if tcp else 6
    )


class Injector:
    """Writes frames to one tap (`name`); failures are counted by errno text, never raised."""

    def __init__(self, fd: int, name: str = "") -> None:
        self.fd, self.name = fd, name
        self.sent = 0
        self.failed: Counter[str] = Counter()

    def send(
        self, frame: bytes, gso_size: int = 0, partial: bool = False, gso_type: int = 0
    ) -> bool:
        """Write one frame; return False if the kernel refused it (to a guest: loss on the wire)."""
        try:
            head = _PLAIN
            if partial or gso_size:
                head = vnet_header(frame, gso_size, partial, gso_type)
            os.write(self.fd, head + frame)
        except ValueError:
            self.failed["offload"] += 1
            return False
        except OSError as e:
            self.failed[os.strerror(e.errno or 0)] += 1
            return False
        self.sent += 1
        return True

    def reopen(self, fd: int) -> None:
        """Write to another tap from now on; `fd` becomes this object's.

        Atomic: the descriptor's number stays, so a write of another thread goes to the one or the
        other.
        """
        os.dup2(fd, self.fd, inheritable=False)
        os.close(fd)

    def close(self) -> None:
        """Close the descriptor, which removes the tap."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
