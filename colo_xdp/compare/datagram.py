# SPDX-License-Identifier: GPL-2.0-or-later
"""Compares the datagrams of one flow: UDP, ICMP, fragments, and everything else that is not TCP.

The PVM's datagrams leave in the order in which they came (QEMU's colo-compare takes the newest
first). The counterpart of a datagram is any unused datagram of the SVM in this epoch with an equal
body: the order of the SVM's output, and on the peer link, does not matter. A frame of several UDP
datagrams (GSO) leaves when each of them has its counterpart. Fragments come here as the datagram
that they make up (compare/fragments.py).
"""

from __future__ import annotations

from collections import Counter, deque
from typing import Self

from ..net.flow_key import FlowKey, datagram_name, describe_datagram
from ..net.frame import Evidence, Frame
from ..net.packet import Kind, Packet, datagram_body
from .causes import Cause
from .compared import ComparedFlow
from .flow import BEFORE, CONTEXT, FlowContext
from .held_queue import Held
from .offload_port import OffloadCodec
from .policy import Verdict

Bodies = tuple[bytes, ...]


def bodies(p: Packet, size: int = 0) -> Bodies:
    """Return what is compared of a frame: its body.

    A UDP frame that stands for several datagrams of `size` bytes each (Frame.datagram_size) has one
    body for each.
    """
    if p.kind is Kind.UDP and 0 < size < p.end - p.off:
        return tuple(p.frame[i : min(i + size, p.end)] for i in range(p.off, p.end, size))
    return (datagram_body(p),)


class DatagramFlow(ComparedFlow):
    """One flow, in the direction in which the guest sends."""

    __slots__ = ("_frames", "bodies", "bytes_sent", "copies")

    def __init__(
        self,
        host: FlowContext,
        key: FlowKey,
        epoch: int,
        verdict: Verdict,
        direction: str,
        codec: OffloadCodec[Self],
    ) -> None:
        super().__init__(host, key, epoch, verdict, direction, codec)
        self.bytes_sent = 0  # payload bytes of the PVM
        self.bodies: deque[Bodies] = deque()  # parallel to `held`
        self.copies: dict[bytes, list[int]] = {}  # unused body of the SVM -> arrivals
        self._frames: dict[bytes, bytes] = {}  # frames of the above, for reports

    def text(self) -> str:
        """Return the flow's name for operators."""
        return describe_datagram(self.key)

    def service(self) -> tuple[str, int]:
        """Return the protocol and the service's port; 0 if it has none."""
        return datagram_name(self.key)

    def svm_since(self) -> int:
        """Return the arrival (ns) of the SVM's oldest unused datagram; 0 if none."""
        return min((times[0] for times in self.copies.values()), default=0)

    def closed(self) -> bool:
        """Return True: datagram flows have no end, so they age like closed connections."""
        return True

    def unhold(self) -> list[Held]:
        """Remove and return the held frames."""
        self.bodies.clear()
        return self.held.drain()

    def new_epoch(self, epoch: int) -> None:
        """Begin an epoch: forget the output of the previous epoch's SVM."""
        self.epoch = epoch
        self.asked = False
        self.forget_svm()

    def forget_svm(self) -> None:
        """Forget unused output of the SVM."""
        self.host.ledger.discharge_svm(sum(map(len, self.copies.values())))
        self.copies.clear()
        self._frames.clear()

    def commit(self, p: Packet) -> None:
        """Ignore a frame that a checkpoint contains: no state is kept."""

    def pvm(self, rec: Frame, p: Packet, now_ns: int) -> None:
        """Release or hold a frame of the PVM in the current epoch."""
        self.bytes_sent += p.end - p.off
        all_of_it = bodies(p, rec.datagram_size)
        if not self.held.frames and self._use(all_of_it):
            self.outbox.release(rec)
            return
        if not self.host.ledger.room():
            self.outbox.count("queue_full_dropped")
            self.outbox.request(Cause.QUEUE_FULL, self)
            return
        self.hold(rec, p, now_ns)

    def hold(self, rec: Frame, p: Packet, since_ns: int) -> None:
        """Hold a frame regardless of the limit."""
        host = self.host
        self.held.push(rec, p, since_ns)
        self.bodies.append(bodies(p, rec.datagram_size))
        self.wait_for(since_ns + (host.grace_ns if self.copies else host.patience.ns))

    def svm(self, p: Packet, now_ns: int) -> None:
        """Compare a frame of the SVM in the current epoch. It is never sent anywhere."""
        host = self.host
        for body in bodies(p, p.datagram_size):
            if not host.ledger.admit_svm():
                self.outbox.count("svm_queue_full_dropped")
                self.outbox.request(Cause.QUEUE_FULL, self)
                return
            self._keep(body, p, now_ns)
        if self.held:
            self.release_ready(now_ns)
        if self.copies:
            host.timers.arm(self, now_ns + (host.grace_ns if self.held else host.timeout_ns))

    def keep(self, p: Packet, since_ns: int) -> None:
        """Add a datagram of the SVM regardless of the limit."""
        self.host.ledger.charge_svm()
        self._keep(datagram_body(p), p, since_ns)
        self.host.timers.arm(self, since_ns + self.host.timeout_ns)

    def _keep(self, body: bytes, p: Packet, since_ns: int) -> None:
        self.copies.setdefault(body, []).append(since_ns)
        self._frames[body] = p.frame

    def frame_of(self, body: bytes) -> bytes:
        """Return the newest frame of the SVM with this unused body."""
        return self._frames[body]

    def _use(self, wanted: Bodies) -> bool:
        copies = self.copies
        if len(wanted) == 1:
            if wanted[0] not in copies:
                return False
        elif any(len(copies.get(body, ())) < n for body, n in Counter(wanted).items()):
            return False
        self.host.ledger.discharge_svm(len(wanted))
        for body in wanted:
            del copies[body][0]
            if not copies[body]:
                del copies[body], self._frames[body]
        return True

    def release_ready(self, now_ns: int) -> None:
        """Release from the head whatever has its counterpart."""
        held = self.held
        while held.frames and self._use(self.bodies[0]):
            self.bodies.popleft()
            rec, _, _ = held.pop()
            self.host.patience.answered(rec.ts_ns, self.asked)
            self.outbox.release(rec)

    def expire(self, now_ns: int) -> int:
        """Request a checkpoint if the head is overdue or both guests differ.

        Returns the next deadline, 0 for none.
        """
        host = self.host
        self._drop_old(now_ns - host.timeout_ns)
        if not self.held:
            return next(iter(self.copies.values()))[0] + host.timeout_ns if self.copies else 0
        at = self.held[0][2]
        due, cause = host.patience.due_ns(at), Cause.COMPARE_TIMEOUT
        other = self._unpaired()
        if other is not None and max(at, other[1]) + host.grace_ns < due:
            due, cause = max(at, other[1]) + host.grace_ns, Cause.DATAGRAM_DIFFERS
        if due > now_ns:
            return host.patience.look_ns(due, now_ns)
        if not self.asked:
            self.asked = True
            self.outbox.request(cause, self, self._evidence(other[0] if other else b""))
        return now_ns + host.timeout_ns  # keep the timer

    def _evidence(self, theirs: bytes) -> Evidence:
        mine = next((b for b in self.bodies[0] if b not in self.copies), self.bodies[0][0])
        both = range(min(len(mine), len(theirs)))
        i = next((i for i in both if mine[i] != theirs[i]), len(both))
        start = max(0, i - BEFORE)
        return Evidence(
            i,
            i - start,
            mine[start : i + CONTEXT],
            theirs[start : i + CONTEXT],
            self.held[0][0],
            self._frames.get(theirs, b""),
        )

    def _unpaired(self) -> tuple[bytes, int] | None:
        """Return the SVM's oldest body that none of the held frames has, and its arrival.

        Bodies of frames behind the head are only waiting for the head.
        """
        waiting = Counter(body for each in self.bodies for body in each)
        for body, copies in self.copies.items():
            n = waiting[body]
            if len(copies) > n:
                return body, copies[n]
        return None

    def _drop_old(self, before_ns: int) -> None:
        # Surplus of the SVM: none of it has left this host, so it costs no checkpoint.
        for body in [b for b, c in self.copies.items() if c[0] <= before_ns]:
            copies = self.copies[body]
            keep = [at for at in copies if at > before_ns]
            self.host.ledger.discharge_svm(len(copies) - len(keep))
            self.outbox.count("svm_datagram_expired", len(copies) - len(keep))
            if keep:
                self.copies[body] = keep
            else:
                del self.copies[body], self._frames[body]
