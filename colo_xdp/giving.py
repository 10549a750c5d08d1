# SPDX-License-Identifier: GPL-2.0-or-later
"""When a flow goes to tier K: sans-IO. What it takes along is fastpath.py's, or fastgram.py's.

A flow that has been settled for some batches is offered, and given when no frame of it is on its
way here. Of a busy one some always are: then its own frames, compared and ready, are kept back for
a moment (the brake). No acks come for them, both guests' windows fill, the last frame arrives.

Datagrams have no windows; those who send many over a network listen to acks of their own (QUIC,
RTP with feedback), and for them the brake does the same. Others are given when they pause.

All times are CLOCK_MONOTONIC ns.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from . import fastgram, fastpath
from .comparer import Comparer, Host
from .datagram import DatagramFlow
from .flows import GIVEN
from .record import Record
from .stream import Stream
from .tier_k import Answer, Fast, Lane, Words

#: settled batches before a connection is offered to the kernel, and at most between two stays there
OFFER_AFTER, MAX_PATIENCE = 12, 256
#: but so many if only its handshake has been, or if it has said so much that there is more to come
OFFER_SOON, OFFER_BYTES = 1, 8192
#: a stay in the kernel that was shorter than this doubles the patience
SHORT_STAY_NS = 50_000_000
#: batches between two tries to give a stream of which frames are always on their way
RETRY = 4
#: so many tries that failed for this reason, and the brake is put on
BRAKE_AFTER = 3
#: but for no longer than this, and for no more of its frames: what a guest sends without an ack
BRAKE_NS, BRAKE_FRAMES, BRAKE_BYTES = 20_000_000, 512, 8 << 20
#: and for so many streams at a time: 128 MiB at most
BRAKE_STREAMS = 16


#: a comparer that tier K can have
FastFlow = Stream | DatagramFlow
_LANES: dict[type, Lane[Any]] = {Stream: fastpath.LANE, DatagramFlow: fastgram.LANE}


class Clock(Host, Protocol):
    """The engine; `now` is the time of the batch."""

    now: int


@dataclass(slots=True)
class Brake:
    """Frames of one stream that may leave and are kept back, in order; until when at most."""

    until_ns: int
    frames: list[Record] = field(default_factory=list)
    size: int = 0

    def keep(self, rec: Record) -> None:
        """One more, the last to leave."""
        self.frames.append(rec)
        self.size += len(rec.frame)

    def full(self) -> bool:
        """Whether the guest sends on and on without an ack."""
        return len(self.frames) > BRAKE_FRAMES or self.size > BRAKE_BYTES


def _wait(st: FastFlow) -> int:
    """Settled batches before a flow that the kernel does not know is offered to it."""
    lane = _LANES[type(st)]
    return OFFER_SOON if lane.young(st) or lane.said(st) >= OFFER_BYTES else OFFER_AFTER


class Giving:
    """The flows of one engine on their way to tier K."""

    def __init__(self, host: Clock, fast: Fast) -> None:
        self._host, self._fast = host, fast
        self._calm: dict[FastFlow, None] = {}  # anything came in this batch
        self._braked: list[FastFlow] = []
        self._back: FastFlow | None = None  # the last that has come back

    def note(self, st: Comparer, rec: Record) -> None:
        """A frame has been taken in; its stream may be settled at the end of the batch.

        A frame that tier K has not counted, as the connection was locked, has made user space take
        it back: others may be on their way as it was, and no number would tell.
        """
        if not isinstance(st, Stream | DatagramFlow):
            return
        if rec.captured:
            st.captured = rec.captured
        elif st is self._back:
            self._back = None
            return
        self._calm[st] = None

    def end_batch(self, may_give: bool) -> None:
        """All frames that came together have been noted."""
        if self._calm:
            calm, self._calm = self._calm, {}
            if may_give:
                self._give(calm)
        if self._braked:
            self.look()

    def _give(self, calm: dict[FastFlow, None]) -> None:
        host = self._host
        for st in calm:
            if st.brake is not None:
                continue  # look() has it
            st.calm += 1
            if st.calm < (st.patience if st.offered else _wait(st)):
                continue
            st.release_part(host.now, False)
            if st.epoch != host.epoch or not _LANES[type(st)].ready(st):
                continue
            if not st.offered:
                st.offered, st.calm = self._fast.offer(st.key), 0
                host.count("fast_offered", st.offered)
                if not (st.offered and _LANES[type(st)].young(st)):
                    continue
            answer = self._gave(st)
            if answer is Answer.TAKEN:
                continue
            st.calm -= RETRY
            if answer is Answer.ON_THEIR_WAY:
                st.refused += 1
                if st.refused >= BRAKE_AFTER and len(self._braked) < BRAKE_STREAMS:
                    st.brake = Brake(host.now + BRAKE_NS)
                    self._braked.append(st)
                    host.count("fast_braked")

    def _gave(self, st: FastFlow) -> Answer:
        """Tier K's answer to a ready flow."""
        host, lane = self._host, _LANES[type(st)]
        since = lane.waits_since(st)
        if since and host.now - since > host.timeout_ns // 2:
            return Answer.NOT_NOW  # the engine would take it back at once
        gift = lane.pack(st, host.epoch)
        if gift is None:
            return Answer.NOT_NOW
        answer = self._fast.give(st.key, gift, st.captured)
        if answer is Answer.TAKEN:
            lane.given(st)
            st.epoch, st.given_ns, st.calm, st.refused = GIVEN, host.now, 0, 0
            host.count("fast_given")
        return answer

    def recalled(self, st: FastFlow, words: Words) -> None:
        """Tier K had the flow until now: go on from these words."""
        stay = self._host.now - st.given_ns
        st.patience = min(2 * st.patience, MAX_PATIENCE) if stay < SHORT_STAY_NS else 1
        st.offered, st.calm, st.captured = True, 0, words.captured
        self._back = st
        _LANES[type(st)].recall(st, words, self._host.now)

    # -- the brake

    @property
    def braking(self) -> bool:
        """Whether frames of any flow are kept back."""
        return bool(self._braked)

    def look(self) -> None:
        """Give what is braked and can be given now; let go what has been braked for long enough.
        To be called with each batch and with each tick."""
        host = self._host
        for st in self._braked[:]:
            assert st.brake is not None
            st.release_part(host.now, False)
            ready = st.epoch == host.epoch and _LANES[type(st)].ready(st)
            if ready and self._gave(st) is Answer.TAKEN:
                self._unbrake(st)
            elif host.now >= st.brake.until_ns or st.brake.full():
                st.refused, st.calm = 0, -MAX_PATIENCE
                self._unbrake(st)

    def _unbrake(self, st: FastFlow) -> None:
        brake, st.brake = st.brake, None
        self._braked.remove(st)
        assert brake is not None
        for rec in brake.frames:
            self._host.emit(rec, self._host.now)

    def unbrake_all(self) -> None:
        """What is kept back leaves: it may, and something else happens now."""
        for st in self._braked[:]:
            self._unbrake(st)

    def clear(self) -> None:
        """Forget all streams, of which none is braked."""
        self._calm.clear()
        self._back = None

    def kept(self) -> tuple[int, int]:
        """Frames that are kept back, and their bytes."""
        brakes = [st.brake for st in self._braked if st.brake is not None]
        return sum(len(b.frames) for b in brakes), sum(b.size for b in brakes)
