# SPDX-License-Identifier: GPL-2.0-or-later
"""Flows of UDP datagrams between compare/datagram.py and the fast path (bpf/offload/udp.h).

Sans-IO; offload/scheduler.py uses the codec. What waits of one guest is a queue of records
(abi.DGRAM and the payload) on both sides. The fast path compares in order only, so whatever comes
in another order comes back here.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from .. import abi
from ..compare.datagram import DatagramFlow
from ..net.flow_key import UDP, FlowKey
from ..net.frame import Frame
from ..net.packet import Packet, parse
from .kernel_format import ConnState, OffloadRequest, direction_number, known

_COOKIE = struct.Struct(
    "=xB62x"
)  # direction, at the byte where kernel_format.direction() expects it
_NO_SEGMENT = (0,) * 7  # acks and windows


def _plain(p: Packet) -> bool:
    """Return whether the fast path takes the frame (is_plain_datagram() in bpf/offload/udp.h)."""
    frame, l4 = p.frame, p.l4
    return (
        p.l3 == 14
        and l4 == (34 if frame[14] >> 4 == 4 else 54)
        and p.off == l4 + 8
        and (p.end == len(frame) or len(frame) <= 60)  # padding is not handed over
        and int.from_bytes(frame[l4 + 4 : l4 + 6], "big") == p.end - l4
    )


def _waiting(flow: DatagramFlow) -> Iterator[tuple[int, bool, bytes]]:
    """Yield (since when, partial, frame) of what waits, in order of arrival.

    The frame is empty if the fast path cannot take it.
    """
    for rec, p, at in flow.held:
        plain = _plain(p) and not rec.gso_size and not rec.parts
        yield at, rec.partial, rec.frame[: p.end] if plain else b""
    copies = [(at, body) for body, times in flow.copies.items() for at in times]
    for at, body in sorted(copies, key=lambda c: c[0]):
        p = parse(flow.frame_of(body))
        whole = _plain(p) and p.frame[p.off : p.end] == body  # not one of several (GSO)
        yield at, False, p.frame[: p.end] if whole else b""


def records(queue: bytes) -> Iterator[tuple[int, bool, bytes]]:
    """Yield (since when, partial, frame) of each record."""
    at = 0
    while at < len(queue):
        ts, size, partial, head = abi.DGRAM.unpack_from(queue, at)
        at += abi.DGRAM.size
        off = 42 if head[14] >> 4 == 4 else 62
        yield ts, bool(partial), head[:off] + queue[at : at + size]
        at += -(-size // abi.DGRAM_ALIGN) * abi.DGRAM_ALIGN


class UdpCodec:
    """offload_port.OffloadCodec for flows of UDP datagrams."""

    def ready(self, flow: DatagramFlow) -> bool:
        """Return whether the fast path could continue: UDP, and at most one guest is ahead."""
        return known(flow.key) and not flow.asked and not (flow.held and flow.copies)

    def young(self, flow: DatagramFlow) -> bool:
        """Return False: nothing indicates more than a question and an answer."""
        return False

    def bytes_sent(self, flow: DatagramFlow) -> int:
        """Return the number of bytes that the guest has sent in frames that came here."""
        return flow.bytes_sent

    def waits_since(self, flow: DatagramFlow) -> int:
        """Return since when (ns) anything of a ready flow waits; 0: nothing does."""
        if flow.held:
            return flow.held[0][2]
        return min((times[0] for times in flow.copies.values()), default=0)

    def pack(self, flow: DatagramFlow, epoch: int) -> OffloadRequest | None:
        """Return a ready flow's state; None: what waits is not all plain, or is too much."""
        queue = bytearray()
        for at, partial, frame in _waiting(flow):
            if not frame:
                return None
            off = 42 if frame[14] >> 4 == 4 else 62
            queue += abi.DGRAM.pack(at, len(frame) - off, partial, frame[:off]) + frame[off:]
            queue += bytes(-len(queue) % abi.DGRAM_ALIGN)
            if len(queue) > abi.BUFFER // 2:
                return None
        ahead = abi.SIDE_PVM if flow.held else abi.SIDE_SVM
        cookie = _COOKIE.pack(direction_number(flow.direction))
        return OffloadRequest(
            abi.OFFLOAD.pack(epoch, 0, *_NO_SEGMENT, len(queue), 0, ahead, 0, 0, 0, 0, b"", cookie),
            bytes(queue),
            since_ns=self.waits_since(flow),
        )

    def on_offloaded(self, flow: DatagramFlow) -> None:
        """Note that the fast path owns the flow now, and what waited in it."""
        flow.unhold()
        flow.forget_svm()

    def restore(self, flow: DatagramFlow, state: ConnState, now_ns: int) -> None:
        """Continue an empty or offloaded flow from the kernel's state."""
        flow.epoch = state.epoch
        for ts, partial, frame in records(state.buffer):
            p = parse(frame)
            if state.pvm_ahead:
                flow.hold(Frame(frame, ts, 0, partial), p, ts)
            else:
                flow.keep(p, ts)

    def probe(self, key: FlowKey, state: ConnState) -> Packet:
        """Return a frame of the flow for the policy to judge."""
        v6 = key[1] == 6
        ends, udp = key[3:-4], key[-4:] + struct.pack("!HH", 8, 0)
        if v6:
            ip = b"\x86\xdd\x60" + bytes(3) + struct.pack("!HBB", 8, 17, 64) + ends
        else:
            ip = b"\x08\x00\x45\0" + struct.pack("!HIBBH", 28, 0, 64, 17, 0) + ends
        p = parse(bytes(12) + ip + udp)
        assert p.key == key and key[0] == UDP
        return p
