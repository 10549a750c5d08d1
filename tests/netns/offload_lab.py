# SPDX-License-Identifier: GPL-2.0-or-later
"""Run two stand-in guests that send the same streams from two processes, and a client that checks.

The guests segment their streams arbitrarily, run ahead of each other, retransmit, and acknowledge
as they go. What the client receives must be the streams, byte by byte, and acks that both have
given. Positions are in shared memory; nobody knows more than that.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing as mp
import os
import random
import select
import socket
import struct
import threading
import time
from multiprocessing.connection import Connection
from multiprocessing.sharedctypes import Synchronized
from queue import Queue
from typing import Any

from colo_xdp import abi
from colo_xdp.abi import Mode
from colo_xdp.datapath.datapath import DataPath
from colo_xdp.datapath.ring import CapturedFrame
from colo_xdp.engine.engine import Engine, Frame, Limits, Policy
from colo_xdp.engine.journal import Divergence
from tests.netns.conftest import Net, Sniffer, Tap, inside
from tests.netns.frames import checksum_fits, tcp, udp

SEQ, ACK = 0xFFFFF000, 5000  # the streams wrap around early
MASK = 0xFFFFFFFF
WINDOW = 150_000  # of the client
RTO = 0.03  # s
LEAD = 64  # datagrams by which one guest may be ahead
REST_AFTER, REST = 15, 0.01  # datagrams of a flow, then s in which nothing of it is on its way
REST_BYTES = 256 << 10  # the same of a connection, of the upper half of several
MSS = 1428  # of IPv6 with timestamps
_FORK = mp.get_context("fork")


def stream(port: int, length: int) -> bytes:
    """Return what both guests send on the connection to this port."""
    return random.Random(port).randbytes(length)


def datagram(i: int, number: int) -> bytes:
    """Return what both guests send in the datagram of this number on flow i."""
    rnd = random.Random(number << 8 | i)
    return number.to_bytes(4, "big") + rnd.randbytes(rnd.choice((0, 20, 200, 1180, 1400)))


def ack_at(pos: int) -> int:
    """Return what a guest acknowledges with the bytes from `pos` on."""
    return ACK + pos // 3000


class Shared:
    """What the processes share; index: 0 PVM, 1 SVM."""

    def __init__(self, conns: int) -> None:
        self.pos: list[Any] = [_FORK.Array(ctypes.c_uint64, conns, lock=False) for _ in range(2)]
        self.acked: list[Any] = [_FORK.Array(ctypes.c_uint64, conns, lock=False) for _ in range(2)]
        self.have: Any = _FORK.Array(ctypes.c_uint64, conns, lock=False)  # of the client
        self.pause: Synchronized[int] = _FORK.Value(ctypes.c_int, 0)
        self.paused: Any = _FORK.Array(ctypes.c_int, 2, lock=False)
        self.epoch: Synchronized[int] = _FORK.Value(ctypes.c_int, 1)
        self.stop: Synchronized[int] = _FORK.Value(ctypes.c_int, 0)


class Queues:
    """The queues of a tap, each with a thread and a CPU: what is put in one overtakes the others.

    No guest that is well behaved has frames of one flow in two queues at once.
    """

    def __init__(self, count: int) -> None:
        self.taps = [Tap("tap0", multi_queue=True) for _ in range(count)]
        self.work: list[Queue[bytes]] = [Queue(8) for _ in range(count)]
        for i in range(count):
            threading.Thread(target=self._serve, args=(i,), daemon=True).start()

    def _serve(self, i: int) -> None:
        cpus = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cpus[i % len(cpus)]})
        os.set_blocking(self.taps[i].fd, True)
        while True:
            raw = self.work[i].get()
            os.write(self.taps[i].fd, raw)
            self.work[i].task_done()

    def send(self, queue: int, raw: bytes) -> None:
        self.work[queue].put(raw)

    def flush(self) -> None:
        for w in self.work:
            w.join()


class Guest:
    """One guest's sending process. `queues`: of the PVM's tap, with frames in all of them."""

    def __init__(
        self, net: Net, side: int, shared: Shared, conns: int, length: int, seed: int,
        queues: int = 1,
    ) -> None:  # fmt: skip
        self.net, self.side, self.shared, self.conns, self.length = net, side, shared, conns, length
        self.count = queues
        self.queues: Queues | None = None
        self.rnd = random.Random(seed * 2 + side)
        self.process = _FORK.Process(target=self._run, daemon=True)

    def _open(self) -> None:
        if self.side == 0 and self.count > 1:
            with inside(self.net.host):
                self.queues = Queues(self.count)
        elif self.side == 0:
            with inside(self.net.host):
                self.tap = Tap("tap0")
            os.set_blocking(self.tap.fd, True)
        else:
            with inside(self.net.other):
                self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                self.sock.bind(("peer0", 0))

    def _send(self, frame: bytes, gso: int) -> None:
        if self.side == 0:
            v6 = frame[12:14] == b"\x86\xdd"
            l4 = 54 if v6 else 34
            kind = (4 if v6 else 1) if gso else 0
            at = 6 if frame[20 if v6 else 23] == 17 else 16
            head = struct.pack("<BBHHHH", 1, kind, l4 + 32 if gso else 0, gso, l4, at)
            if self.queues:
                self.queues.send(self.rnd.randrange(self.count), head + frame)
            else:
                os.write(self.tap.fd, head + frame)
        else:
            tci = abi.KIND_SVM << abi.KIND_SHIFT | self.shared.epoch.value & abi.EPOCH_MASK
            self.sock.send(frame[:12] + struct.pack("!HH", abi.TPID, tci) + frame[12:])

    def _run(self) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            self._open()
            if not self.length:
                return self._chat()
            streams = [stream(40000 + i, self.length) for i in range(self.conns)]
            mine, other = self.shared.pos[self.side], self.shared.pos[1 - self.side]
            rnd, shared = self.rnd, self.shared
            moved = [(0, time.monotonic())] * self.conns  # where the client is, and since when
            # On a busy machine, no connection that never rests is offloaded for a long time.
            stops = [REST_BYTES if i > self.conns // 2 else self.length for i in range(self.conns)]
            rests: list[float | None] = [None] * self.conns  # until when
            while not shared.stop.value:
                if shared.pause.value:
                    self._pause()
                i = rnd.randrange(self.conns)
                at = mine[i]
                # Retransmit from time to time; the last bytes until the end of the run.
                have = shared.have[i]
                if have != moved[i][0]:
                    moved[i] = have, time.monotonic()
                if have >= stops[i] < self.length:
                    rests[i] = end = rests[i] or time.monotonic() + REST
                    if time.monotonic() > end:
                        stops[i], rests[i] = stops[i] + REST_BYTES, None
                blocked = at >= stops[i] or at > min(other[i] + 100_000, have + WINDOW)
                if blocked and time.monotonic() - moved[i][1] < RTO:
                    time.sleep(0.00005)
                    continue
                if blocked or rnd.random() < 0.0005:
                    moved[i] = have, time.monotonic()
                    back = max(0, min(at, stops[i]) - rnd.randrange(1, 20000))
                    at = rnd.choice((back, have))
                big = self.side == 0 and rnd.random() < 0.2
                n = rnd.randrange(1500, 50000) if big else rnd.choice((1, 200, MSS, MSS, MSS))
                data = streams[i][at : min(at + n, stops[i])]
                partial = self.side == 0
                acked = shared.acked[self.side]
                ack = max(acked[i], ack_at(at))
                frame = tcp(
                    data, seq=(SEQ + at) & MASK, ack=ack, dport=40000 + i,
                    v6=bool(i & 1), partial=partial,
                )  # fmt: skip
                # Before it is sent: what the client has received must never be beyond this.
                mine[i] = max(mine[i], at + len(data))
                acked[i] = ack
                self._send(frame, MSS if len(data) > MSS else 0)

    def _chat(self) -> None:
        """Send numbered datagrams as far as the other guest and the client follow."""
        mine, other, heard = *self._both_pos(), self.shared.have
        rnd, shared = self.rnd, self.shared
        rests = [(-1, 0.0)] * self.conns  # at which number, and until when
        while not shared.stop.value:
            if shared.pause.value:
                self._pause()
            i = rnd.randrange(self.conns)
            at = mine[i]
            # With several flows on few CPUs one guest's lead never ends by itself, and only what is
            # settled is offloaded.
            if at % REST_AFTER == 0 and other[i] <= at:
                if other[i] == at and rests[i][0] != at:
                    rests[i] = at, time.monotonic() + REST
                if other[i] < at or time.monotonic() < rests[i][1]:
                    time.sleep(0.00005)
                    continue
            # A lost datagram never arrives: slow down and continue.
            if at > other[i] + LEAD or at > heard[i] + LEAD:
                time.sleep(0.00005)
                if at > other[i] + LEAD or rnd.random() < 0.999:
                    continue
            mine[i] = at + 1  # before it is sent, as above
            partial = self.side == 0
            body = datagram(i, at)
            self._send(udp(body, dport=40000 + i, v6=bool(i & 1), partial=partial), 0)
            if rnd.random() < 0.001:
                time.sleep(0.002)

    def _both_pos(self) -> tuple[Any, Any]:
        return self.shared.pos[self.side], self.shared.pos[1 - self.side]

    def _pause(self) -> None:
        if self.queues:
            self.queues.flush()
        self.shared.paused[self.side] = 1
        while self.shared.pause.value and not self.shared.stop.value:
            time.sleep(0.0002)
        self.shared.paused[self.side] = 0


class Client:
    """Receive, in its own process, and report at the end what was wrong."""

    def __init__(self, net: Net, shared: Shared, conns: int, length: int) -> None:
        self.sniffer = Sniffer(net.client, "c0")
        self.shared, self.conns, self.length = shared, conns, length
        self.theirs, self.mine = _FORK.Pipe()
        self.process = _FORK.Process(target=self._run, args=(self.mine,), daemon=True)

    def _listen(self, pipe: Connection) -> None:
        got: list[set[int]] = [set() for _ in range(self.conns)]
        wrong: list[str] = []
        while not self.shared.stop.value and not wrong:
            for head, frame in self.sniffer.frames(0.2):
                l4 = 34 if frame[12:14] == b"\x08\x00" else 54
                sport, dport, size = struct.unpack_from("!HHH", frame, l4)
                if sport != 53:
                    continue
                i, body = dport - 40000, frame[l4 + 8 : l4 + size]
                number = int.from_bytes(body[:4], "big")
                if body != datagram(i, number):
                    wrong.append(f"port {dport}: other bytes in number {number}")
                if number in got[i]:
                    wrong.append(f"port {dport}: {number} twice")
                if number >= min(self.shared.pos[s][i] for s in (0, 1)):
                    wrong.append(f"port {dport}: {number} before both had said it")
                if not checksum_fits(frame[: l4 + size], l4, bool(head[0] & 1)):
                    wrong.append(f"port {dport}: checksum of {number}, {head.hex()}")
                got[i].add(number)
                self.shared.have[i] = max(self.shared.have[i], number)
        pipe.send((sum(map(len, got)), list(map(len, got)), wrong[:3]))

    def _run(self, pipe: Connection) -> None:
        if not self.length:
            return self._listen(pipe)
        streams = [stream(40000 + i, self.length) for i in range(self.conns)]
        have = self.shared.have
        early: list[dict[int, int]] = [{} for _ in range(self.conns)]
        wrong: list[str] = []
        frames = 0
        while not self.shared.stop.value and not wrong:
            for head, frame in self.sniffer.frames(0.2):
                l4 = 34 if frame[12:14] == b"\x08\x00" else 54
                sport, dport, seq, ack = struct.unpack_from("!HHII", frame, l4)
                if sport != 80:
                    continue
                i, frames = dport - 40000, frames + 1
                at = (seq - SEQ) & MASK
                data = frame[l4 + (frame[l4 + 12] >> 4) * 4 :]
                if data != streams[i][at : at + len(data)]:
                    wrong.append(f"port {dport}: other bytes at {at}")
                if at + len(data) > min(self.shared.pos[s][i] for s in (0, 1)):
                    wrong.append(f"port {dport}: {at + len(data)} before both had said it")
                if ack > min(self.shared.acked[s][i] for s in (0, 1)):
                    wrong.append(f"port {dport}: ack {ack} before both had acked it")
                if not checksum_fits(frame, l4, bool(head[0] & 1)):
                    wrong.append(f"port {dport}: checksum at {at}, {len(data)} bytes, {head.hex()}")
                early[i][at] = max(early[i].get(at, 0), at + len(data))
                moved = True
                while moved:
                    moved = False
                    for a in [a for a in early[i] if a <= have[i]]:
                        have[i], moved = max(have[i], early[i].pop(a)), True
                if wrong or all(x >= self.length for x in have):
                    break
            if all(x >= self.length for x in have):
                break
        pipe.send((frames, list(have), wrong[:3]))


class Proxy:
    """The primary controller's data side: engine and data path, without QEMU."""

    def __init__(self, dp: DataPath, shared: Shared, limits: Limits | None = None) -> None:
        self.dp, self.shared = dp, shared
        self.asked: list[Divergence] = []
        self.engine = Engine(
            limits or Limits(), Policy(), self._release, request_checkpoint=self.asked.append,
            on_wait=lambda ns: None, fast=dp.fast,
        )  # fmt: skip
        self.engine.epoch = dp.epoch = 1
        dp.mode = Mode.RUN

    def _release(self, rec: Frame) -> None:
        self.dp.injectors["release"].send(rec.frame, rec.gso_size, rec.partial, rec.gso_type)

    def _on(self, e: CapturedFrame) -> None:
        rec = Frame(
            e.frame, e.ts_ns, e.gso_size, e.partial, punt_seq=e.punt_seq, gso_type=e.gso_type
        )
        now = time.monotonic_ns()
        if e.source == abi.Source.PVM:
            self.engine.from_pvm(rec, now)
        else:
            self.engine.from_svm(rec, e.epoch, now)

    def step(self, wait: float = 0.002) -> None:
        select.select(self.dp.reader.fds, [], [], wait)
        self.dp.drain(self._on, 256)
        self.dp.beat()
        self.engine.flush(time.monotonic_ns())
        self.engine.tick(time.monotonic_ns())

    def checkpoint(self) -> None:
        """Make the SVM a copy of the PVM; both are stopped meanwhile."""
        s = self.shared
        self.engine.begin_checkpoint()
        self.dp.mode = Mode.CHECKPOINT
        s.pause.value = 1
        end = time.monotonic() + 5
        while not all(s.paused) and time.monotonic() < end:
            self.step(0.001)
        assert all(s.paused)
        stop = time.monotonic_ns()
        for i in range(len(s.pos[0])):
            s.pos[1][i] = s.pos[0][i]
            s.acked[1][i] = s.acked[0][i]
        while self.dp.drain(self._on):
            pass
        epoch = self.engine.epoch + 1
        s.epoch.value = epoch
        self.engine.commit_checkpoint(stop, epoch, time.monotonic_ns())
        self.dp.epoch = epoch
        self.dp.mode = Mode.RUN
        self.asked.clear()
        s.pause.value = 0


def run(
    net: Net, dp: DataPath, *, conns: int, length: int, seed: int, seconds: float,
    checkpoint_every: float = 0.0, queues: int = 1,
) -> tuple[Proxy, int, list[int], list[str]]:  # fmt: skip
    """Run until the client has everything, something is wrong, or time is up.

    length 0: datagrams, which never end. queues: of the PVM, see Queues.
    """
    shared = Shared(conns)
    proxy = Proxy(dp, shared)
    client = Client(net, shared, conns, length)
    guests = [Guest(net, side, shared, conns, length, seed, queues) for side in (0, 1)]
    everybody = [client.process, *(g.process for g in guests)]
    for p in everybody:
        p.start()
    end = time.monotonic() + seconds
    due = time.monotonic() + checkpoint_every
    try:
        while time.monotonic() < end and not client.theirs.poll():
            proxy.step()
            if proxy.asked or (checkpoint_every and time.monotonic() > due):
                proxy.checkpoint()
                due = time.monotonic() + checkpoint_every
        for _ in range(0 if length else 300):  # what is on its way
            shared.pause.value = 1
            proxy.step()
        shared.stop.value = 1
        if not client.theirs.poll(5):
            return proxy, 0, [], ["the client says nothing"]
        return (proxy, *client.theirs.recv())
    finally:
        shared.stop.value = 1
        for p in everybody:
            p.join(2)
            if p.is_alive():
                p.kill()
                p.join()
        client.sniffer.close()
