# SPDX-License-Identifier: GPL-2.0-or-later
"""Define the fuzz targets: each takes arbitrary bytes and raises only if the product is wrong.

Each has its corpus in corpus/NAME: small inputs to start with, and what the fuzzer has found (`make
fuzz TARGET=packet`).
"""

from __future__ import annotations

import hmac
import json
import os
import tempfile
from collections.abc import Callable

from colo_xdp.colo_proxy.notify import NotifyDecoder, NotifyError
from colo_xdp.colo_proxy.packet_stream import (
    MAX_PACKET,
    PacketDecoder,
    PacketStreamError,
    StreamPacket,
    encode,
)
from colo_xdp.compare.limits import Limits
from colo_xdp.compare.policy import Policy
from colo_xdp.config.file import ConfigError, as_toml, parse
from colo_xdp.conntrack import rewriter
from colo_xdp.engine.engine import Engine
from colo_xdp.net.frame import Frame
from colo_xdp.net.packet import parse as parse_packet
from colo_xdp.net.packet import tcp_options
from colo_xdp.peer import messages
from colo_xdp.peer.heartbeat_datagram import MAC, NONCE, SIZE, Flag, HeartbeatSession, session_key
from colo_xdp.qemu import events
from colo_xdp.tools.pcap import PcapError, read

TARGETS: dict[str, Callable[[bytes], None]] = {}


def target(f: Callable[[bytes], None]) -> Callable[[bytes], None]:
    TARGETS[f.__name__] = f
    return f


@target
def packet(data: bytes) -> None:
    """Both parsers and the rewriter on one frame."""
    p = parse_packet(data)
    assert 0 <= p.off <= p.end <= len(data)
    if p.proto == 6 and p.l4 < p.off:
        tcp_options(p)
    for way in (rewriter.Rewriter().to_svm, rewriter.Rewriter().from_svm):
        out, _ = way(data)
        assert len(out) == len(data)


def frames(data: bytes) -> list[tuple[int, bytes]]:
    """Decode a script: a byte for the sender, two for the length, then the frame."""
    out = []
    while len(data) > 3:
        n = int.from_bytes(data[1:3], "big") % 1600
        out.append((data[0], data[3 : 3 + n]))
        data = data[3 + n :]
    return out


@target
def engine(data: bytes) -> None:
    """Frames of both guests, time and checkpoints, with small limits."""
    limits = Limits(
        compare_timeout_ns=10**6, max_queue_size=6, max_held_bytes=4000, max_flows=5,
        max_stream_bytes=3000, history_bytes=600, history_total=2000,
    )  # fmt: skip
    released: list[bytes] = []
    pvm: list[bytes] = []
    e = Engine(
        limits, Policy(), lambda rec: released.append(rec.frame),
        request_checkpoint=lambda d: None, on_wait=lambda ns: None,
    )  # fmt: skip
    now = 10**9
    for who, frame in frames(data):
        now += 10**5
        kind = who & 7
        if kind < 3:
            pvm.append(frame)
            e.from_pvm(Frame(frame, now, gso_size=who & 0x80 and 500), now)
        elif kind < 6:
            e.from_svm(Frame(frame, now), (e.epoch + (who >> 6 & 1)) & 0xFFF, now)
        elif kind == 6:
            e.tick(now)
        else:
            e.begin_checkpoint()
            e.commit_checkpoint(now - 10**5, e.epoch + 1, now)
        e.flush(now)
        assert e.held_packets >= 0 and e.held_bytes >= 0 and e.svm_packets >= 0
    e.release_all()
    assert e.held_packets == 0


@target
def peer(data: bytes) -> None:
    """A line of the control channel."""
    try:
        msg = messages.decode(data)
    except messages.WireError as e:
        assert str(e)
        return
    kind = msg.pop("type")
    assert messages.decode(messages.encode(kind, **msg)) == {"type": kind, **msg}


@target
def datagram(data: bytes) -> None:
    """Datagrams on a heartbeat link: as they are, and signed with the right key."""
    key = session_key("web1", "11" * NONCE, "22" * NONCE)
    b, other = (HeartbeatSession("web1", side, ["a", "b"]) for side in ("secondary", "primary"))
    for x in (b, other):
        x.rekey(key, same_peer=False)
    head = other.make(0, 1, Flag.VM, 0, 0)[:16]
    for n, (who, text) in enumerate(frames(data), 1):
        b.receive(who & 1, text, n)
        body = (head + text)[: SIZE - MAC].ljust(SIZE - MAC, b"\0")
        word = b.receive(who & 1, body + hmac.digest(key, body, "sha256"), n)
        assert word is None or word.after <= n
        assert len(b.make(who & 1, n, Flag.VM, n, n)) == SIZE
        assert b.silent_ms(who & 1, n) >= 0 and b.links[who & 1].rtt_ns >= 0
    p = b.links
    assert sum(x.received + sum(x.refused.values()) for x in p) == 2 * len(frames(data))


@target
def qmp(data: bytes) -> None:
    """An event of QEMU."""
    try:
        msg = json.loads(data)
    except (ValueError, RecursionError):
        return
    e = events.read(msg, 10**18, 10**12)
    assert e is None or (e.name and isinstance(e.ts_ns, int) and isinstance(e.data, dict))


@target
def config(data: bytes) -> None:
    """A configuration file: errors are ConfigError, and a valid file reads the same again."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        c = parse(text)
    except ConfigError as e:
        assert e.errors and all(e.errors)
        return
    assert as_toml(parse(as_toml(c))) == as_toml(c)


@target
def capture(data: bytes) -> None:
    """A capture file."""
    with tempfile.NamedTemporaryFile(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as f:
        f.write(data)
        f.flush()
        try:
            for n, _ in enumerate(read(f.name)):
                if n > 1000:
                    break
        except PcapError as e:
            assert f.name in str(e)


@target
def filters(data: bytes) -> None:
    """A connection from QEMU's filters, and one of notify_dev: a byte of options, the stream."""
    if not data:
        return
    options, data = data[0], data[1:]
    cut = options >> 2
    vnet_hdr, at_proxy = bool(options & 1), bool(options & 2)
    packets, back = PacketDecoder(vnet_hdr=vnet_hdr), b""
    try:
        for part in (data[:cut], data[cut:]):
            packets.receive(part)
            while (packet := packets.next_packet()) is not None:
                assert 0 < len(packet.data) <= MAX_PACKET
                assert 0 <= packet.vnet_hdr_len <= len(packet.data)
                back += encode(StreamPacket(packet.data, packet.vnet_hdr_len), vnet_hdr=vnet_hdr)
        packets.end()
        assert back == data
    except PacketStreamError as e:
        assert str(e) and data.startswith(back)
    said = NotifyDecoder(at_proxy=at_proxy, vnet_hdr=vnet_hdr)
    said.receive(data)
    while True:
        try:
            if said.next_message() is None:
                return
        except NotifyError as e:
            assert str(e)
        except PacketStreamError as e:
            assert str(e)
            return
