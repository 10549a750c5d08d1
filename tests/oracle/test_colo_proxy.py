# SPDX-License-Identifier: GPL-2.0-or-later
"""The wire formats of QEMU's COLO proxy, with the installed QEMU at the other end. No guest."""

from __future__ import annotations

import os
import random
import shutil
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from colo_xdp.colo_proxy.notify import NotifyDecoder, NotifyMessage, encode_message
from colo_xdp.colo_proxy.packet_stream import (
    MAX_PACKET,
    PacketDecoder,
    PacketStreamError,
    StreamPacket,
    encode,
)
from colo_xdp.tools.corpus import craft
from colo_xdp.tools.filter_capture import capture
from colo_xdp.tools.pcap import read

from . import qemu

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]
SHORT_S = 0.3  # to see that something does not come
LONG_S = 10.0
INIT, ANSWER = NotifyMessage.INIT, NotifyMessage.INIT_ANSWER
ASKED, MADE = NotifyMessage.DO_CHECKPOINT, NotifyMessage.CHECKPOINT


@pytest.fixture(autouse=True)
def _installed() -> None:
    if shutil.which(qemu.QEMU) is None:
        assert not os.environ.get("CI"), "no QEMU here"
        pytest.skip(f"{qemu.QEMU} is not installed")


def udp(text: str) -> bytes:
    return craft.build(craft.spec(f"udp '{text}'"))


class Packets:
    """Our end of a packet stream."""

    def __init__(self, s: socket.socket, *, vnet_hdr: bool) -> None:
        self.socket, self._vnet_hdr = s, vnet_hdr
        self._decoder = PacketDecoder(vnet_hdr=vnet_hdr)

    def send(self, *packets: StreamPacket, rnd: random.Random | None = None) -> None:
        """Write packets; with `rnd` in random pieces."""
        data = b"".join(encode(p, vnet_hdr=self._vnet_hdr) for p in packets)
        while data:
            n = rnd.choice((1, 3, 4, 7, 1000, 30_000)) if rnd else len(data)
            self.socket.sendall(data[:n])
            data = data[n:]

    def take(self, seconds: float = LONG_S) -> StreamPacket | None:
        """Return the next packet; None: nothing came, or QEMU has closed the socket."""
        self.socket.settimeout(seconds)
        while (packet := self._decoder.next_packet()) is None:
            try:
                if not (data := self.socket.recv(1 << 16)):
                    return None
            except TimeoutError:
                return None
            self._decoder.receive(data)
        return packet


def ready(into: Packets, *outs: Packets) -> None:
    """Wait until QEMU has accepted what it writes to: before, what it writes is lost."""
    probe = StreamPacket(craft.build(craft.spec("arp")))  # which colo-compare lets pass
    for out in outs:
        for _ in range(100):
            into.send(probe)
            if out.take(0.1) is not None:
                break
        else:
            pytest.fail("nothing comes out of QEMU")
    for out in outs:
        while out.take(0.1) is not None:
            pass


class Framework:
    """A checkpoint framework, at the socket of notify_dev."""

    def __init__(self, s: socket.socket, *, vnet_hdr: bool) -> None:
        self.socket, self._vnet_hdr = s, vnet_hdr
        self._decoder = NotifyDecoder(at_proxy=False, vnet_hdr=vnet_hdr)

    def say(self, message: NotifyMessage) -> None:
        self.socket.sendall(encode_message(message, vnet_hdr=self._vnet_hdr))

    def heard(self, seconds: float = LONG_S) -> NotifyMessage | None:
        self.socket.settimeout(seconds)
        while (message := self._decoder.next_message()) is None:
            try:
                data = self.socket.recv(1 << 16)
            except TimeoutError:
                return None
            assert data, "QEMU has closed the socket"
            self._decoder.receive(data)
        return message


# ---- notify_dev


@contextmanager
def compare(vnet_hdr: bool) -> Iterator[tuple[Packets, Packets, Packets, Framework]]:
    """Start colo-compare; yield both guests' inputs, the output and the framework's socket."""
    options = ",vnet_hdr_support=on" if vnet_hdr else ""
    arguments = [
        "-machine", "none", "-S", "-object", "iothread,id=io", "-object",
        "colo-compare,id=c,primary_in=p,secondary_in=s,outdev=o,notify_dev=x,iothread=io,"
        f"compare_timeout=60000,expired_scan_cycle=60000{options}",
    ]  # fmt: skip
    with qemu.running(arguments, "psox") as ch:
        p, s, o = (Packets(ch[n].socket, vnet_hdr=vnet_hdr) for n in "pso")
        ready(p, o)
        yield p, s, o, Framework(ch["x"].socket, vnet_hdr=vnet_hdr)


@pytest.mark.parametrize("header", [None, 0, 10, 12, 20])
def test_colo_compare_asks_a_framework_and_releases_at_its_word(header: int | None) -> None:
    vnet_hdr = header is not None

    def packet(text: str) -> StreamPacket:
        return StreamPacket(bytes(header or 0) + udp(text), header or 0)

    with compare(vnet_hdr) as (p, s, out, framework):
        framework.say(INIT)
        assert framework.heard() is ANSWER
        p.send(packet("same"))
        s.send(packet("same"))
        assert out.take() == packet("same")
        assert framework.heard(SHORT_S) is None
        for turn in range(2):
            p.send(packet("one"))
            s.send(packet("two"))
            assert framework.heard() is ASKED, turn
            assert out.take(SHORT_S) is None, "it is held"
            framework.say(MADE)
            assert out.take() == packet("one")
        p.send(packet("same"))
        s.send(packet("same"))
        assert out.take() == packet("same"), "the secondary's packet was forgotten"


def test_colo_compare_asks_without_having_been_greeted() -> None:
    with compare(False) as (p, s, _, framework):
        for _ in range(20):  # each difference is one more reason
            p.send(StreamPacket(udp("one")))
            s.send(StreamPacket(udp("two")))
            if (heard := framework.heard(SHORT_S)) is not None:
                break
        assert heard is ASKED


def test_colo_compare_skips_a_message_that_it_does_not_know() -> None:
    with compare(False) as (_, _, _, framework):
        framework.socket.sendall(encode(StreamPacket(b"COLO_CHECKPOINT\0"), vnet_hdr=False))
        framework.say(INIT)
        assert framework.heard() is ANSWER


def test_with_virtio_net_headers_colo_compare_expects_a_field_that_it_does_not_send() -> None:
    with compare(True) as (_, _, _, framework):
        framework.socket.sendall(encode_message(INIT))
        assert framework.heard(SHORT_S) is None, "it waits for the rest"
    with compare(True) as (_, _, _, framework):
        framework.say(INIT)
        assert framework.heard() is ANSWER


# ---- the packet stream


@contextmanager
def filters(vnet_hdr: bool) -> Iterator[tuple[Packets, Packets, Packets]]:
    """Start two redirectors with a mirror between; yield the way in, the way out, the mirror's."""
    option = ",vnet_hdr_support=on" if vnet_hdr else ""
    arguments = [
        "-machine", "pc", "-accel", "tcg", "-m", "16", "-device", "rtl8139,netdev=n,romfile=", "-S",
        "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=net",
        "-object", f"filter-redirector,id=fi,netdev=n,queue=tx,indev=i{option}",
        "-object", f"filter-mirror,id=fm,netdev=n,queue=tx,outdev=m{option}",
        "-object", f"filter-redirector,id=fo,netdev=n,queue=tx,outdev=o{option}",
    ]  # fmt: skip
    with qemu.running(arguments, "imo") as ch:
        i, o, m = (Packets(ch[n].socket, vnet_hdr=vnet_hdr) for n in "iom")
        ready(i, o, m)
        yield i, o, m


@pytest.mark.parametrize("vnet_hdr", [False, True])
def test_redirectors_and_a_mirror_have_the_packet_stream(vnet_hdr: bool) -> None:
    """In random pieces, up to the longest packet. This netdev has no virtio-net header."""
    rnd = random.Random(7)
    sizes = [14, 60, 1514, 9014, 65_535, MAX_PACKET, 1]
    sizes += [rnd.randrange(1, 3000) for _ in range(60)]
    packets = [StreamPacket(rnd.randbytes(n)) for n in sizes]
    with filters(vnet_hdr) as (into, out, mirror):
        for packet in packets:
            into.send(packet, rnd=rnd)
            assert out.take() == packet
            assert mirror.take() == packet


def test_a_packet_above_the_limit_ends_the_stream_in_qemu_too() -> None:
    with filters(False) as (into, out, _):
        into.send(StreamPacket(b"before"))
        assert out.take() == StreamPacket(b"before")
        too_long = (MAX_PACKET + 1).to_bytes(4, "big") + bytes(MAX_PACKET + 1)
        into.socket.sendall(too_long)
        into.send(StreamPacket(b"after"))
        assert out.take(SHORT_S) is None
    decoder = PacketDecoder(vnet_hdr=False)
    decoder.receive(too_long)
    with pytest.raises(PacketStreamError):
        decoder.next_packet()


# ---- what the page on moving over says of a running QEMU

CHAIN = [
    "-machine", "none", "-qmp", "unix:qmp,server=on,wait=off",
    # what is sent to g arrives at n as a guest's output: through the hub, from the side of the card
    "-netdev", "stream,id=n,server=on,addr.type=unix,addr.path=net",
    "-netdev", "stream,id=g,server=on,addr.type=unix,addr.path=guest",
    "-netdev", "hubport,id=hn,hubid=0,netdev=n", "-netdev", "hubport,id=hg,hubid=0,netdev=g",
    "-object", "filter-mirror,id=m0,netdev=n,queue=tx,outdev=m",
    "-object", "filter-redirector,id=redire0,netdev=n,queue=rx,indev=i",
    "-object", "filter-redirector,id=redire1,netdev=n,queue=rx,outdev=o",
]  # fmt: skip


def test_a_mirror_that_is_added_later_has_the_guests_output(tmp_path: Path) -> None:
    """chardev-add, object-add, filter-capture, object-del and chardev-remove, as on the page."""
    frames = [udp(f"number {i}") for i in range(50)]
    path, file = tmp_path / "cap.sock", tmp_path / "pvm.pcapng"
    with qemu.running(CHAIN, "mio", ["qmp", "net", "guest"]) as ch:
        qmp, guest = ch["qmp"], Packets(ch["guest"].socket, vnet_hdr=False)
        out = Packets(ch["o"].socket, vnet_hdr=False)
        qemu.ask(qmp, "qmp_capabilities")
        ready(guest, out)
        address = {"type": "unix", "data": {"path": str(path)}}
        socket_ = {"addr": address, "server": True, "wait": False}
        qemu.ask(qmp, "chardev-add", id="cap", backend={"type": "socket", "data": socket_})
        qemu.ask(
            qmp, "object-add", id="cap0", netdev="n", queue="rx", outdev="cap",
            vnet_hdr_support=True, **{"qom-type": "filter-mirror"},
        )  # fmt: skip
        with ThreadPoolExecutor(1) as pool:
            capturing = pool.submit(
                capture, path, file, guest="pvm", vnet_hdr=True, seconds=3.0, max_bytes=1 << 20
            )
            time.sleep(1)  # it has connected, and QEMU has accepted
            for frame in frames:
                guest.send(StreamPacket(frame))
                assert out.take() == StreamPacket(frame), "the redirector still gets it"
            assert capturing.result(30).frames == len(frames)
        qemu.ask(qmp, "object-del", id="cap0")
        qemu.ask(qmp, "chardev-remove", id="cap")
        guest.send(StreamPacket(frames[0]))
        assert out.take() == StreamPacket(frames[0])
    assert [r.data for r in read(file)] == frames


def test_filters_can_be_removed_while_the_guest_runs() -> None:
    """Its output then leaves by its netdev, without having been anywhere else."""
    with qemu.running(CHAIN, "mio", ["qmp", "net", "guest"]) as ch:
        qmp, guest = ch["qmp"], Packets(ch["guest"].socket, vnet_hdr=False)
        net = Packets(ch["net"].socket, vnet_hdr=False)
        qemu.ask(qmp, "qmp_capabilities")
        ready(guest, Packets(ch["o"].socket, vnet_hdr=False))
        guest.send(StreamPacket(udp("held")))
        assert net.take(SHORT_S) is None
        for name in ("m0", "redire0", "redire1"):
            qemu.ask(qmp, "object-del", id=name)
        for name in "mio":
            qemu.ask(qmp, "chardev-remove", id=name)
        guest.send(StreamPacket(udp("free")))
        assert net.take() == StreamPacket(udp("free"))
