# SPDX-License-Identifier: GPL-2.0-or-later
"""Run the fast path's programs on real taps, with the conversations of the differential test.

It does not use BPF_PROG_TEST_RUN, which supports neither partial checksums, nor tags in the
metadata, nor frames beyond a page, and shows only one frame that leaves. A write to a tap runs its
program before it returns; everything that leaves is read from one tap, which is both the bridge's
other port and the uplink.
"""

from __future__ import annotations

import mmap
import random
import select
import struct
import time
from collections import Counter
from collections.abc import Iterator

from colo_xdp import abi
from colo_xdp.abi import SIDE_SVM, Cfg, CtlResult, Mode, Prog, Reason
from colo_xdp.datapath import attach, devices, loader, syscall
from colo_xdp.datapath.offload_maps import BpfKernelPath
from colo_xdp.datapath.ring import open_reader
from colo_xdp.datapath.source import Options
from tests.netns.conftest import Net, Tap, sh
from tests.netns.frames import checksum_fits
from tests.sim.offload_model import BUFFER, BUFFER_SIZE

M32 = 0xFFFFFFFF
ACK, PSH, FIN, SYN, RST, URG, ECE, CWR = 0x10, 0x08, 0x01, 0x02, 0x04, 0x20, 0x40, 0x80
TS = b"\1\1\x08\x0a"
BUFFERS = 5
BLOB = random.Random(1).randbytes(1 << 20)
SIZES = (1, 7, 63, 64, 65, 127, 300, 536, 1448, 1448, 2000, 3000, 3900, 5000, 9000, 20000, 60000)


def packet(frame: bytes) -> bytes:
    """Return the frame without Ethernet padding, which a bridge may remove."""
    if frame[12:14] == b"\x86\xdd":
        return frame[: 54 + int.from_bytes(frame[18:20], "big")]
    return frame[: 14 + int.from_bytes(frame[16:18], "big")]


class Lab:
    """The kernel's side: taps, programs, maps."""

    def __init__(self, bpffs: str, net: Net) -> None:
        options = Options(fast=True, buffers=BUFFERS, conns=64, ring_pages=64)
        self.objects = loader.load("primary", "fastdiff", bpffs, options)
        self.pvm, self.svm, self.up = Tap("pvm0"), Tap("svm0"), Tap("up0")
        for dev in ("pvm0", "svm0", "up0"):
            sh("ip", "-n", net.host, "link", "set", "dev", dev, "mtu", "4000", "up")
        for dev in ("pvm0", "up0"):
            sh("ip", "-n", net.host, "link", "set", "dev", dev, "master", "br0")
        self.index = {n: devices.link_info(n).index for n in ("pvm0", "svm0", "up0")}
        progs = self.objects.programs
        attach.attach_tc("pvm0", "ingress", progs["pvm_out"], "fastdiff", None)
        attach.attach_tc("pvm0", "egress", progs["pvm_in"], "fastdiff", None)
        attach.attach_tc("svm0", "ingress", progs["svm_arrival"], "fastdiff", None)
        self.reader = open_reader(self.objects)
        self.conns, self.config = self.objects.map("conns"), self.objects.map("config")
        self.counters = self.objects.map("counters")
        self.maps = BpfKernelPath(self.objects, 1, 0, lambda on: None, lambda epoch: None)
        size = -(-BUFFERS * BUFFER_SIZE // mmap.PAGESIZE) * mmap.PAGESIZE
        self.rings = memoryview(mmap.mmap(self.objects.map("buffers").fd, size))
        self.set(Cfg.TAP, self.index["pvm0"])
        self.set(Cfg.PEER, self.index["svm0"])
        self.reset()

    def reset(self) -> None:
        self.set(Cfg.MODE, Mode.RUN)
        self.set(Cfg.EPOCH, 5)
        self.set(Cfg.OFFLOAD, 1)
        self.set(Cfg.UPLINK, 0)
        for key in list(self.conns.keys()):
            self.conns.delete(key)
        self.maps._table[:] = bytes(len(self.maps._table))
        self.reader.drain(lambda e: None)
        self.leaving(1 << 30, 0.0)
        self.before = {p: self.counts(p) for p in (Prog.PVM_OUT, Prog.SVM_ARRIVAL, Prog.OFFLOAD)}

    def set(self, slot: Cfg, value: int) -> None:
        self.config.set(struct.pack("=I", slot), struct.pack("=Q", value))

    def counts(self, prog: Prog) -> Counter[str]:
        out: Counter[str] = Counter()
        for r in Reason:
            if r is Reason.MAX or (prog is Prog.OFFLOAD and r < Reason.PUNT_MODE):
                continue
            raw = self.counters.get(struct.pack("=I", prog * Reason.MAX + r)) or b""
            out[r.name] = sum(p for p, _ in abi.COUNT.iter_unpack(raw))
        return out

    def counted(self, prog: Prog) -> Counter[str]:
        """Return what has been counted since the last call."""
        before, now = self.before[prog], self.counts(prog)
        self.before[prog] = now
        return now - before

    def send(
        self, side: int, frame: bytes, gso: int, partial: bool, epoch: int, *,
        elsewhere: bool = False,
    ) -> None:  # fmt: skip
        """Send a frame; `elsewhere`: its checksum covers the payload only, as an inner UDP
        header's does."""
        shift, tap = 0, self.pvm
        if side == SIDE_SVM:
            tci = abi.KIND_SVM << abi.KIND_SHIFT | epoch & abi.EPOCH_MASK
            frame = frame[:12] + struct.pack("!HH", abi.TPID, tci) + frame[12:]
            shift, tap = 4, self.svm
        v6 = frame[12 + shift : 14 + shift] == b"\x86\xdd"
        udp = frame[(20 if v6 else 23) + shift] == 17
        l4 = (54 if v6 else 34) + shift
        size = l4 + (8 if udp else (frame[l4 + 12] >> 4) * 4) if gso else 0
        kind = 0 if not gso else 5 if udp else 4 if v6 else 1
        at = 6 if udp else 16
        head = struct.pack("<BBHHHH", partial, kind, size, gso, l4 * partial, at)
        if elsewhere:
            head = struct.pack("<BBHHHH", 1, 0, 0, 0, l4 + 8, 6)
        tap.send(frame, head)

    def client(self, frame: bytes) -> None:
        """Send a client's frame; it has reached the PVM's tap when this returns."""
        self.up.send(frame)
        end = time.monotonic() + 2
        while not self.pvm.recv(lambda got: packet(got) == packet(frame), 0.1):
            assert time.monotonic() < end, "a client's frame did not arrive"
        while self.svm.read():  # its copy
            pass

    def leaving(self, n: int, timeout: float = 2.0) -> list[tuple[bytes, int, bool]]:
        """Return (frame, gso_size, partial) of the next n that leave; fewer if they do not come."""
        out = []
        while len(out) < n and select.select([self.up.fd], [], [], timeout)[0]:
            while len(out) < n and (raw := self.up.read()):
                flags, kind, _, gso, start, _ = struct.unpack_from("<BBHHHH", raw)
                frame, partial = raw[10:], bool(flags & 1)
                l4 = 34 if frame[12:14] == b"\x08\x00" else 54
                assert checksum_fits(packet(frame), l4, partial), f"checksum: {raw[:100].hex()}"
                assert start == l4 * partial
                out.append((packet(frame), gso if kind else 0, partial))
        return out

    def control(self, message: bytes) -> CtlResult:
        r = syscall.test_run(self.objects.programs["offload_ctl"].fd, message, data_out=0)
        return CtlResult(r.retval)

    def ring(self, buffer: int) -> memoryview:
        at = (buffer - 1) * BUFFER_SIZE + abi.BUFFER_BEFORE
        return self.rings[at : at + BUFFER]

    def close(self) -> None:
        self.reader.close()
        for tap in (self.pvm, self.svm, self.up):
            tap.close()
        self.objects.close()
        loader.remove_pins(self.objects.pin_dir)


class Talk:
    """Two guests that send the same on one connection, each at its own pace."""

    def __init__(self, rnd: random.Random, port: int) -> None:
        self.port, self.v6 = port, rnd.random() < 0.4
        self.options = TS if rnd.random() < 0.7 else b""
        self.seq0 = rnd.choice((rnd.getrandbits(32), M32 - rnd.randrange(100_000)))
        self.client0 = rnd.choice((rnd.getrandbits(32), M32 - rnd.randrange(5000)))
        self.pos, self.ack, self.win = [1 << 21, 1 << 21], [0, 0], [500, 500]
        self.end: int | None = None  # where both close it

    def body(self, pos: int, n: int) -> bytes:
        at = (pos + self.port * 7919) % len(BLOB)
        return (BLOB[at:] + BLOB)[:n]

    @property
    def over(self) -> bool:
        """Return whether both have closed it."""
        return self.end is not None and min(self.pos) > self.end

    @staticmethod
    def ends(v6: bool) -> Iterator[bytes]:
        """Return addresses of the guest and of the client, as in struct colo_flow_key."""
        if v6:
            return (bytes.fromhex("fd09" + "00" * 13 + x) for x in ("02", "01"))
        return (bytes(10) + b"\xff\xff" + bytes((10, 9, 0, x)) for x in (2, 1))

    @property
    def key(self) -> bytes:
        ends = self.ends(self.v6)
        return abi.FLOW_KEY.pack(*ends, struct.pack("!H", 80), struct.pack("!H", self.port), 0)


class Datagrams:
    """The same over UDP: both send numbered datagrams one after another."""

    def __init__(self, rnd: random.Random, port: int) -> None:
        self.port, self.v6, self.seed = port, rnd.random() < 0.4, rnd.getrandbits(32)
        self.sizes = rnd.choice((SIZES[:9], SIZES[5:12]))
        self.said = [0, 0]
        self.over = False

    def body(self, number: int) -> bytes:
        rnd = random.Random(self.seed + number)
        return rnd.randbytes(rnd.choice(self.sizes) - rnd.randrange(2))

    @property
    def key(self) -> bytes:
        ends = Talk.ends(self.v6)
        ports = (struct.pack("!H", p) for p in (53, self.port))
        return abi.FLOW_KEY.pack(*ends, *ports, abi.KEY_UDP)
