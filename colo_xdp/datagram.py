# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares the datagrams of one flow: UDP, ICMP, fragments, whatever is not a TCP segment.

The PVM's datagrams leave in the order they came (QEMU's colo-compare takes the newest
first). The twin of a datagram is any datagram of the SVM in this epoch with an equal
body that was not yet used: the order on the SVM's side and on the peer link is free.
"""

from __future__ import annotations

from collections import deque

from .flow import FlowKey, describe_datagram
from .packet import Packet, datagram_body
from .reasons import Cause
from .record import Record
from .stream import Held, Host

_CONTEXT = 32


class DatagramFlow:
    """One flow, one direction: what the guest sends."""

    __slots__ = ("asked", "bodies", "epoch", "held", "host", "key", "last", "svm", "when")

    def __init__(self, host: Host, key: FlowKey, epoch: int) -> None:
        self.host, self.key, self.epoch = host, key, epoch
        self.last = self.when = 0
        self.held: deque[Held] = deque()
        self.bodies: deque[bytes] = deque()  # of `held`
        self.svm: dict[bytes, list[int]] = {}  # unused body -> arrival of each copy
        self.asked = False

    def text(self) -> str:
        """The flow's name for people."""
        return describe_datagram(self.key)

    def quiet(self) -> bool:
        """Nothing of either side waits."""
        return not self.held and not self.svm

    def closed(self) -> bool:
        """Datagram flows have no end; they age like closed connections."""
        return True

    def unhold(self) -> list[Held]:
        """Give up the frames that wait; the caller counts them."""
        held = list(self.held)
        self.held.clear()
        self.bodies.clear()
        return held

    def new_epoch(self, epoch: int) -> None:
        """Forget what the SVM of the old epoch said (I7). The engine resets its own counts."""
        self.epoch = epoch
        self.asked = False
        self.svm.clear()

    def pvm(self, rec: Record, p: Packet, now_ns: int) -> None:
        """A frame of the PVM in the current epoch: release it or hold it."""
        host = self.host
        body = datagram_body(p)
        if not self.held and self._use(body):
            host.emit(rec, now_ns)
            return
        if host.pvm_packets >= host.max_packets:
            host.count("queue_full_dropped")
            host.ask(Cause.QUEUE_FULL, self.text())
            return
        host.pvm_packets += 1
        host.pvm_bytes += len(rec.frame)
        self.held.append((rec, p, now_ns))
        self.bodies.append(body)
        host.arm(self, now_ns + (host.grace_ns if self.svm else host.timeout_ns))

    def svm_frame(self, p: Packet, now_ns: int) -> None:
        """A frame of the SVM of the current epoch: only compared, never sent anywhere."""
        host = self.host
        if host.svm_packets >= host.max_packets:
            host.count("svm_queue_full_dropped")
            host.ask(Cause.QUEUE_FULL, self.text())
            return
        host.svm_packets += 1
        self.svm.setdefault(datagram_body(p), []).append(now_ns)
        if self.held:
            self._pump(now_ns)
        if self.svm:
            host.arm(self, now_ns + (host.grace_ns if self.held else host.timeout_ns))

    def _use(self, body: bytes) -> bool:
        copies = self.svm.get(body)
        if copies is None:
            return False
        self.host.svm_packets -= 1
        del copies[0]
        if not copies:
            del self.svm[body]
        return True

    def _pump(self, now_ns: int) -> None:
        host = self.host
        while self.held and self._use(self.bodies[0]):
            self.bodies.popleft()
            rec, _, _ = self.held.popleft()
            host.pvm_packets -= 1
            host.pvm_bytes -= len(rec.frame)
            host.emit(rec, now_ns)

    def expire(self, now_ns: int) -> int:
        """Ask if the head is too old or both sides differ; the next deadline, 0 for none."""
        host = self.host
        self._drop_old(now_ns - host.timeout_ns)
        if not self.held:
            return next(iter(self.svm.values()))[0] + host.timeout_ns if self.svm else 0
        at = self.held[0][2]
        due, cause = at + host.timeout_ns, Cause.COMPARE_TIMEOUT
        other = self._unpaired()
        if other is not None and max(at, other[1]) + host.grace_ns < due:
            due, cause = max(at, other[1]) + host.grace_ns, Cause.DATAGRAM_DIFFERS
        if due > now_ns:
            return due
        if not self.asked:
            self.asked = True
            mine, theirs = self.bodies[0], other[0] if other else b""
            both = range(min(len(mine), len(theirs)))
            i = next((i for i in both if mine[i] != theirs[i]), len(both))
            host.ask(cause, self.text(), i, mine[i : i + _CONTEXT], theirs[i : i + _CONTEXT])
        return now_ns + host.timeout_ns  # stay in the engine's list of flows that wait

    def _unpaired(self) -> tuple[bytes, int] | None:
        """The SVM's oldest body that none of the PVM's waiting frames has, and its arrival.

        Bodies that a frame behind the head has are only waiting for the head.
        """
        waiting: dict[bytes, int] = {}
        for body in self.bodies:
            waiting[body] = waiting.get(body, 0) + 1
        for body, copies in self.svm.items():
            n = waiting.get(body, 0)
            if len(copies) > n:
                return body, copies[n]
        return None

    def _drop_old(self, before_ns: int) -> None:
        # surplus of the SVM: nothing of it left this host, so it costs no checkpoint
        for body in [b for b, c in self.svm.items() if c[0] <= before_ns]:
            copies = self.svm[body]
            keep = [at for at in copies if at > before_ns]
            self.host.svm_packets -= len(copies) - len(keep)
            self.host.count("svm_datagram_expired", len(copies) - len(keep))
            if keep:
                self.svm[body] = keep
            else:
                del self.svm[body]
