# SPDX-License-Identifier: GPL-2.0-or-later
"""Model the fast path in Python: what bpf/offload/offload.h does, on bytes, with the same names.

The order and the connection state are the same, too. The model is the readable statement of the
rules, the other half of the differential test (tests/netns/test_offload_differential.py) and the
kernel of the simulated primary host. Sans-IO. User space reaches it as it reaches the kernel,
through BpfKernelPath (colo_xdp/datapath/offload_maps.py) itself: `Objects` stands in for the loaded
programs and maps, `Bpf` for bpf(2).
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from colo_xdp import abi
from colo_xdp.abi import (
    OWNER_KERNEL,
    OWNER_USER,
    SIDE_PVM,
    SIDE_SVM,
    CtlOp,
    CtlResult,
    Mode,
    Reason,
)
from colo_xdp.conntrack.headers import BadFrame, Segment, parse
from colo_xdp.datapath import offload_maps

M32 = 0xFFFFFFFF
FIN, SYN, RST, PSH, ACK = 0x01, 0x02, 0x04, 0x08, 0x10
BUFFER, PROBES, MAX_PIECES = abi.BUFFER, 8, 50  # COLO_BUFFER, COLO_BUFFER_PROBES, COLO_MAX_PIECES
MAX_FLIGHT = 1 << 30  # COLO_MAX_FLIGHT
STEP, STEPS = 4096, 20  # COLO_STEP, COLO_STEPS
MAX_PIECE, SURE_MSS = 2047, 500  # COLO_MAX_PIECE, COLO_SURE_MSS
SEEN_STEP_NS = 1_000_000_000
OFFLOAD_NO = 0
WAIT_BUCKETS = 24
TIMESTAMPS = b"\x01\x01\x08\x0a"  # RFC 7323 appendix A

BUFFER_SIZE = abi.BUFFER_BEFORE + abi.BUFFER + abi.BUFFER_SLACK

#: what decide() is about to do
NOTHING, PASS, TURN, PIECES = range(4)


def seq_later(a: int, b: int) -> bool:
    return 0 < (a - b) & M32 < 0x80000000


def is_whole(frame: bytes, end: int) -> bool:
    return len(frame) == end or end < len(frame) <= 60


def fold(data: bytes) -> int:
    """RFC 1071 sum of 16-bit words, folded, not inverted: 0 only if all of them are."""
    n = int.from_bytes(data + b"\0" * (len(data) & 1), "big")
    return (n - 1) % 0xFFFF + 1 if n else 0


def replaced(check: int, old: bytes, new: bytes) -> int:
    """Return what bpf_l4_csum_replace() makes of a full checksum (RFC 1624, equation 3)."""
    total = (0xFFFF & ~check) + (0xFFFF - fold(old)) + fold(new)
    return 0xFFFF & ~((total - 1) % 0xFFFF + 1 if total else 0)


@dataclass(slots=True)
class Conn:
    """struct colo_conn."""

    lock: int = 0
    since_ns: int = 0
    seen_ns: int = 0
    client_ack: int = 0
    owner: int = OWNER_USER
    epoch: int = 0
    released: int = 0
    next: int = 0
    base_seq: int = 0
    buffer: int = 0
    punt_seq: int = 0
    p_ack: int = 0
    s_ack: int = 0
    adv_ack: int = 0
    p_win: int = 0
    s_win: int = 0
    adv_win: int = 0
    mss: int = 0
    leader: int = 0
    ack_pending: int = 0
    l4: int = 0
    doff: int = 0
    punt_reason: int = 0
    fin_known: int = 0
    doubted: int = 0
    fin: int = 0
    begun: int = 0
    hdr: bytes = bytes(128)
    cookie: bytes = bytes(64)

    def pack(self) -> bytes:
        return abi.CONN.pack(*(getattr(self, n) for n in self.__slots__))

    @classmethod
    def unpack(cls, raw: bytes) -> Conn:
        return cls(*abi.CONN.unpack(raw))


@dataclass(frozen=True, slots=True)
class Out:
    """A frame that leaves. `partial`: its checksum field holds the pseudo header's sum."""

    frame: bytes
    gso_size: int = 0
    partial: bool = False


def completed(out: Out) -> bytes:
    """Return the frame with its full checksum, as the device completes a partial one."""
    if not out.partial:
        return out.frame
    p = parse(out.frame)
    frame, end = bytearray(out.frame), p.l4_off + (p.doff or 8) + p.payload_len
    check = 0xFFFF & ~fold(out.frame[p.l4_off : end])  # the field holds the pseudo header's sum
    struct.pack_into("!H", frame, p.csum_at, check)
    return bytes(frame)


@dataclass(slots=True)
class Fate:
    """What became of a frame: the reason counted, or OFFLOAD_NO and the number of its event."""

    reason: int = OFFLOAD_NO
    punt_seq: int = 0
    out: list[Out] = field(default_factory=list)


@dataclass(slots=True)
class Work:
    """The current frame, and struct colo_work."""

    frame: bytes
    gso_size: int
    partial: bool
    side: int
    now: int
    p: Segment
    key: bytes
    elsewhere: bool = False
    win: int = 0
    act: int = NOTHING
    equal: int = 0
    left: int = 0
    upto: int = 0
    moves: int = 0
    probe: int = 0
    fin: int = 0
    seq: int = 0
    at: int = 0
    out: list[Out] = field(default_factory=list)


class KernelModel:
    """The maps of bpf/offload/offload.h, and what the programs do with them.

    It survives its controllers. mode, epoch and on are the slots of `config`; busy(): another CPU
    holds the connection.
    """

    def __init__(self, buffers: int, busy: Callable[[], bool] = lambda: False) -> None:
        self.conns: dict[bytes, Conn] = {}
        self.buffers, self.busy = buffers, busy
        self.mode, self.epoch, self.on, self.since = Mode.BYPASS, 0, False, 0
        self.counts: Counter[Reason] = Counter()  # as PROG_FAST
        self.waits = [0] * WAIT_BUCKETS
        self.moved_ns = 0
        self.fds = [os.memfd_create(n) for n in ("buffers", "owners")]
        sizes = (buffers * BUFFER_SIZE, buffers * abi.OWNER.size)
        whole = [-(-n // mmap.PAGESIZE) * mmap.PAGESIZE for n in sizes]
        for fd, n in zip(self.fds, whole, strict=True):
            os.ftruncate(fd, n)
        self.rings, self.owners = (
            memoryview(mmap.mmap(fd, n)) for fd, n in zip(self.fds, whole, strict=True)
        )

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)
        self.fds = []

    def ring(self, buffer: int) -> memoryview:
        """The bytes of buffer number `buffer`, 1 being the first, as indexed by
        compare_payload()."""
        at = (buffer - 1) * BUFFER_SIZE + abi.BUFFER_BEFORE
        return self.rings[at : at + BUFFER]

    def owner(self, slot: int) -> tuple[int, int, bytes]:
        """(taken, since_ns, key)"""
        taken, since, key = abi.OWNER.unpack_from(self.owners, slot * abi.OWNER.size)
        return taken, since, key

    def _own(self, slot: int, taken: int, since: int, key: bytes) -> None:
        abi.OWNER.pack_into(self.owners, slot * abi.OWNER.size, taken, since, key)

    # -- buffers

    def buffer_claim(self, c: Conn, key: bytes) -> bool:
        if c.buffer:
            return True
        state = struct.unpack("=10I", key)
        guest_port, client_port = struct.unpack_from("=HH", key, 32)
        h = client_port << 16 | guest_port
        h ^= state[7] ^ state[4]
        h ^= h >> 16
        h = h * 0x85EBCA6B & M32
        h ^= h >> 13
        h = h * 0xC2B2AE35 & M32
        h ^= h >> 16
        for i in range(2 * PROBES):
            slot = (h + i % PROBES & M32) % self.buffers
            taken, since, whose = self.owner(slot)
            mine = not taken
            if taken and i >= PROBES and not since:
                other = self.conns.get(whose)
                if other is None or other.lock or other is c:
                    continue
                if other.buffer == slot + 1 and not other.since_ns:
                    other.buffer = 0
                    mine = True
            if mine:
                self._own(slot, 1, c.since_ns, key)
                c.buffer, c.base_seq = slot + 1, c.released
                return True
        return False

    def buffer_free(self, c: Conn) -> None:
        slot, c.buffer = c.buffer - 1, 0
        self._own(slot, 0, 0, self.owner(slot)[2])

    def outstanding_since(self, c: Conn, now: int) -> None:
        c.since_ns = now
        if c.buffer:
            taken, _, key = self.owner(c.buffer - 1)
            self._own(c.buffer - 1, taken, now, key)

    def settle(self, c: Conn, now: int, moved: bool) -> None:
        if (c.next - c.base_seq) & M32 >= 2 * BUFFER:
            c.base_seq = (c.base_seq + BUFFER) & M32
        if c.released == c.next and not c.ack_pending:
            if c.since_ns:
                self.outstanding_since(c, 0)
        elif moved or not c.since_ns:
            self.outstanding_since(c, now)

    @staticmethod
    def oldest(c: Conn) -> int:
        return (c.next - BUFFER) & M32 if (c.next - c.base_seq) & M32 > BUFFER else c.base_seq

    def compare_payload(self, c: Conn, w: Work) -> int:
        """Return 0, or the reason to punt."""
        ring = self.ring(c.buffer or 1)
        for _ in range(STEPS):
            if not w.left:
                return 0
            pos = (w.seq - c.base_seq) % BUFFER
            n = min(w.left, w.equal or w.left, STEP, BUFFER - pos)
            part = w.frame[w.at : w.at + n]
            if w.equal:
                if ring[pos : pos + n] != part:
                    return Reason.PUNT_DIFFERS
                w.equal -= n
            else:
                ring[pos : pos + n] = part
            w.seq = (w.seq + n) & M32
            w.at += n
            w.left -= n
        return Reason.PUNT_BUFFER_FULL if w.left else 0

    # -- headers

    @staticmethod
    def allowed_ack(c: Conn) -> int:
        return c.s_ack if seq_later(c.p_ack, c.s_ack) else c.p_ack

    @staticmethod
    def allowed_win(c: Conn) -> int:
        return min(c.p_win, c.s_win)

    @staticmethod
    def note_advertised(c: Conn, ack: int, win: int) -> None:
        c.adv_ack, c.adv_win = ack, win
        if c.ack_pending and not seq_later(c.p_ack, ack):
            c.ack_pending = 0

    def ack_due(self, c: Conn) -> bool:
        win = self.allowed_win(c)
        if not c.l4:
            return False
        if c.ack_pending and seq_later(self.allowed_ack(c), c.adv_ack):
            return True
        return c.adv_win < c.p_win and win > c.adv_win and (
            win == c.p_win or win >= 2 * c.adv_win + 1
        )  # fmt: skip

    @staticmethod
    def keep_header(c: Conn, w: Work) -> None:
        n = w.p.l4_off + w.p.doff
        c.hdr = w.frame[:n] + c.hdr[n:]
        c.l4, c.doff = w.p.l4_off, w.p.doff

    @staticmethod
    def set_lengths(c: Conn, new: bytearray, n: int) -> None:
        if c.l4 != 34:
            struct.pack_into("!H", new, 18, c.doff + n)
            return
        struct.pack_into("!H", new, 16, 20 + c.doff + n)
        new[24:26] = bytes(2)
        struct.pack_into("!H", new, 24, 0xFFFF & ~fold(bytes(new[14:34])))

    def new_header(self, c: Conn, seq: int, n: int, flags: int) -> bytearray:
        new = bytearray(c.hdr[: c.l4 + c.doff])
        self.set_lengths(c, new, n)
        struct.pack_into("!II", new, c.l4 + 4, seq, self.allowed_ack(c))
        new[c.l4 + 13] = ACK | flags
        struct.pack_into("!H", new, c.l4 + 14, self.allowed_win(c))
        return new

    # -- what leaves

    def rewrite_as_pvm(self, c: Conn, w: Work) -> None:
        n, at = c.l4 + c.doff, c.l4 + 16
        new = self.new_header(c, c.released, w.p.payload_len, w.p.flags & (PSH | FIN))
        new[at : at + 2] = w.frame[at : at + 2]
        if not w.partial:
            check = int.from_bytes(new[at : at + 2], "big")
            check = replaced(check, w.frame[c.l4 : n], bytes(new[c.l4 : n]))
            struct.pack_into("!H", new, at, check)
        w.out.append(Out(bytes(new) + w.frame[n:], w.gso_size, w.partial))

    def limit_pvm(self, c: Conn, w: Work) -> None:
        frame, at, ack, win = bytearray(w.frame), w.p.l4_off, w.p.ack, w.win

        def change(off: int, new: bytes) -> None:
            old = bytes(frame[at + off : at + off + len(new)])
            if not w.partial:
                (check,) = struct.unpack_from("!H", frame, at + 16)
                struct.pack_into("!H", frame, at + 16, replaced(check, old, new))
            frame[at + off : at + off + len(new)] = new

        if seq_later(ack, c.s_ack):
            ack = c.s_ack
            change(8, struct.pack("!I", ack))
        if win > c.s_win:
            win = c.s_win
            change(14, struct.pack("!H", win))
        if not seq_later(c.adv_ack, ack):
            self.note_advertised(c, ack, win)
        w.out.append(Out(bytes(frame), w.gso_size, w.partial))

    @staticmethod
    def piece_size(c: Conn) -> int:
        return min(c.mss, MAX_PIECE)

    def send_piece(self, c: Conn, w: Work, new: bytearray, n: int, pos: int) -> None:
        assert n <= MAX_PIECE, "BOUND1 in send_piece()"
        body = bytes(self.ring(c.buffer)[pos : pos + n]) if n else b""
        self.set_lengths(c, new, n)
        struct.pack_into("!I", new, c.l4 + 4, (c.released - w.probe) & M32)
        new[c.l4 + 16 : c.l4 + 18] = bytes(2)
        ends = bytes(new[26:34] if c.l4 == 34 else new[22:54])
        pseudo = ends + struct.pack("!HH", 6, c.doff + n)
        if w.partial:
            check = fold(pseudo)
        else:
            check = 0xFFFF & ~fold(pseudo + bytes(new[c.l4 :]) + body)
        struct.pack_into("!H", new, c.l4 + 16, check)
        w.out.append(Out(bytes(new) + body, 0, w.partial))
        c.released = (c.released + n) & M32

    def send_pieces(self, c: Conn, w: Work) -> None:
        new = self.new_header(c, c.released, 0, 0)
        if w.upto == c.released:
            new[15] &= 0xFC if c.l4 == 34 else 0xCF
        for i in range(MAX_PIECES):
            n = (w.upto - c.released) & M32
            if i and not n:
                break
            pos = (c.released - c.base_seq) % BUFFER
            n = min(n, self.piece_size(c), BUFFER - pos)
            self.send_piece(c, w, new, n, pos)
        self.note_advertised(c, self.allowed_ack(c), self.allowed_win(c))

    # -- the decision

    @staticmethod
    def is_plain(w: Work) -> bool:
        p = w.p
        v6 = w.frame[12:14] == b"\x86\xdd"
        if w.frame[12:14] not in (b"\x08\x00", b"\x86\xdd") or p.l4_off != (54 if v6 else 34):
            return False
        if p.flags & ~(PSH | FIN) != ACK or w.frame[p.l4_off + 12] & 0x0F:
            return False
        if w.side == SIDE_PVM and not v6 and not w.frame[20] & 0x40:
            return False
        options = w.frame[p.l4_off + 20 : p.l4_off + 24]
        return p.doff == 20 or (p.doff == 32 and options == TIMESTAMPS)

    @staticmethod
    def note_size(c: Conn, n: int, surely: bool) -> None:
        if n > c.mss:
            c.mss = n
        elif n and surely:
            c.mss = max(n, min(c.mss, SURE_MSS))

    @staticmethod
    def larger(c: Conn, w: Work) -> bool:
        """Return whether the SVM's segments are longer than the PVM's."""
        return w.side == SIDE_SVM and (w.gso_size or w.p.payload_len) > c.mss

    def note_pvm_header(self, c: Conn, w: Work) -> int:
        p, win, span = w.p, w.win, w.p.payload_len + w.fin
        early = seq_later(p.ack, c.s_ack)
        n = w.gso_size or p.payload_len
        if c.l4 and (c.l4 != p.l4_off or c.doff != p.doff):
            return Reason.PUNT_EXCEPTION
        if not span and c.ack_pending and p.ack == c.p_ack and win == c.p_win:
            return Reason.PUNT_EXCEPTION
        anew = c.released == c.next or c.leader != SIDE_PVM
        self.note_size(c, n, bool(w.gso_size) or not p.flags & PSH or anew)
        if early and not self.buffer_claim(c, w.key):
            return Reason.PUNT_NO_BUFFER
        if seq_later(c.p_ack, p.ack):
            return 0 if c.l4 or not span else Reason.PUNT_EXCEPTION
        if early or span or win > c.s_win:
            self.keep_header(c, w)
        c.p_ack, c.p_win = p.ack, win
        if early:
            c.ack_pending = 1
        return 0

    @staticmethod
    def hear_svm(c: Conn, w: Work) -> None:
        if not seq_later(c.s_ack, w.p.ack):
            c.s_ack, c.s_win = w.p.ack, w.win

    def prepare_segment(self, c: Conn, w: Work) -> int:
        p, side = w.p, w.side
        size, out = p.payload_len, (c.next - c.released) & M32
        have = c.next if out and c.leader == side else c.released
        back = MAX_FLIGHT if self.just_begun(c) else BUFFER
        again, kept = False, True
        w.fin, meets = p.flags & FIN, bool(out) and c.leader != side
        span = size + w.fin
        if not self.is_plain(w):
            return Reason.PUNT_EXCEPTION
        end = (p.seq + span) & M32
        if p.seq != have:
            if not size or w.fin or (have - p.seq) & M32 > back or seq_later(end, have):
                return Reason.PUNT_OUT_OF_ORDER
            again = True
            if side == SIDE_PVM and seq_later(end, c.released):
                return (
                    Reason.PUNT_OUT_OF_ORDER
                    if seq_later(c.released, p.seq)
                    else Reason.OFFLOAD_DUPLICATE
                )
            kept = self.kept(c, p.seq)
            if side == SIDE_PVM and not kept and not self.believed(c, end):
                return Reason.PUNT_OUT_OF_ORDER
        if c.fin_known and (seq_later(end, c.fin) or (size and not w.fin and end == c.fin)):
            return Reason.PUNT_EXCEPTION
        if w.fin and meets and not (c.fin_known and end == c.fin):
            return Reason.PUNT_EXCEPTION
        if size and not is_whole(w.frame, p.l4_off + p.doff + size):
            return Reason.PUNT_EXCEPTION
        if not again and (end - c.released) & M32 > BUFFER:
            return Reason.PUNT_BUFFER_FULL
        (w.win,) = struct.unpack_from("!H", w.frame, p.l4_off + 14)
        if side == SIDE_PVM:
            err = self.note_pvm_header(c, w)
            if err:
                return err
        else:
            self.hear_svm(c, w)
        if span and not again and not self.buffer_claim(c, w.key):
            return Reason.PUNT_NO_BUFFER
        if span and not again and not out and self.all_acked(c):
            c.base_seq = c.released
        w.at, w.seq = p.l4_off + p.doff, p.seq
        w.equal = size if again else min(size, out) if meets else 0
        w.upto = c.released
        if not again and w.equal and (size > out or self.larger(c, w)):
            w.upto = (c.released + w.equal) & M32
        w.left = 0 if again and (side == SIDE_SVM or not kept) else size
        w.probe = (c.released - p.seq + 1) & M32 if again and side == SIDE_PVM and not kept else 0
        w.moves = 0 if again else span
        meets = meets and bool(span) and not again
        same = c.l4 == p.l4_off and c.doff == p.doff
        pieces = (w.upto - c.released) & M32
        limit = self.piece_size(c) * (MAX_PIECES - 2)
        made = meets and (side == SIDE_SVM or size > out)
        if made and (not same or pieces > limit or (w.fin and pieces)):
            return Reason.PUNT_EXCEPTION
        if again and side == SIDE_PVM:
            w.act = PASS if kept else PIECES
        elif meets:
            w.act = PIECES if pieces else PASS if side == SIDE_PVM else TURN
        elif side == SIDE_PVM:
            if not span and not (out and c.leader == SIDE_PVM) and not seq_later(p.ack, c.s_ack):
                w.act = PASS
        elif self.ack_due(c) and same:
            w.act = PIECES
        return 0

    def finish_segment(self, c: Conn, w: Work) -> int:
        side, act, size, rel, told_ack = w.side, w.act, w.moves, c.released, c.adv_ack
        reason = Reason.OFFLOAD_HELD if size or side == SIDE_PVM else Reason.OFFLOAD_DUPLICATE
        end = (w.seq + w.fin) & M32
        if size:
            self.moved_ns = w.now
        if size and seq_later(end, c.next):
            c.next, c.leader = end, side
        if w.fin:
            c.fin, c.fin_known = end, 1
        if act == PASS:
            self.limit_pvm(c, w)
            c.released = (c.released + size) & M32
            reason = Reason.OFFLOAD_PASSED
        elif act == TURN:
            self.rewrite_as_pvm(c, w)
            self.note_advertised(c, self.allowed_ack(c), self.allowed_win(c))
            c.released = (c.released + size) & M32
            reason = Reason.OFFLOAD_RELEASED
        elif act == PIECES:
            reason = Reason.OFFLOAD_ACKED if w.upto == c.released else Reason.OFFLOAD_REBUILT
            self.send_pieces(c, w)
        self.settle(c, w.now, c.released != rel or (c.released == c.next and c.adv_ack != told_ack))
        return reason

    @staticmethod
    def is_plain_datagram(w: Work) -> bool:
        p, v6 = w.p, w.frame[12:14] == b"\x86\xdd"
        if w.frame[12:14] not in (b"\x08\x00", b"\x86\xdd") or p.l4_off != (54 if v6 else 34):
            return False
        size = 8 + p.payload_len
        at = p.l4_off + 4
        return (
            not w.gso_size and not w.elsewhere and is_whole(w.frame, p.l4_off + size)
            and int.from_bytes(w.frame[at : at + 2], "big") == size
        )  # fmt: skip

    def record_at(self, c: Conn, place: int) -> int:
        """Where a record's head is in the mapping of all rings."""
        return (c.buffer - 1) * BUFFER_SIZE + abi.BUFFER_BEFORE + (place - c.base_seq) % BUFFER

    def head_at(self, c: Conn, place: int) -> tuple[int, int, int, bytes]:
        """Return ts_ns, length, partial and header of the record there."""
        return abi.DGRAM.unpack_from(self.rings, self.record_at(c, place))

    def prepare_datagram(self, c: Conn, w: Work) -> int:
        p, side, out = w.p, w.side, (c.next - c.released) & M32
        size = -(-(abi.DGRAM.size + p.payload_len) // abi.DGRAM_ALIGN) * abi.DGRAM_ALIGN
        meets = bool(out) and c.leader != side
        if not self.is_plain_datagram(w):
            return Reason.PUNT_EXCEPTION
        if not meets and out + size > BUFFER:
            return Reason.PUNT_BUFFER_FULL
        if not meets and not self.buffer_claim(c, w.key):
            return Reason.PUNT_NO_BUFFER
        if not out:
            c.base_seq = c.next = c.released
        place = c.released if meets else c.next
        if meets and self.head_at(c, place)[1] != p.payload_len:
            return Reason.PUNT_DIFFERS
        w.moves, w.at, w.seq = size, p.l4_off + 8, (place + abi.DGRAM.size) & M32
        w.left = p.payload_len
        w.equal = w.left if meets else 0
        w.act = NOTHING if not meets else PASS if side == SIDE_PVM else TURN
        return 0

    def finish_datagram(self, c: Conn, w: Work) -> int:
        p = w.p
        self.moved_ns = w.now
        if w.act == NOTHING:
            head = abi.DGRAM.pack(w.now, p.payload_len, w.partial, w.frame[: p.l4_off + 8])
            at = self.record_at(c, c.next)
            self.rings[at : at + len(head)] = head
            c.next, c.leader = (c.next + w.moves) & M32, w.side
            self.settle(c, w.now, False)
            return Reason.OFFLOAD_HELD
        frame = w.frame
        if w.act == TURN:
            frame = self.head_at(c, c.released)[3][: p.l4_off] + frame[p.l4_off :]
        w.out.append(Out(frame, 0, w.partial))
        c.released = (c.released + w.moves) & M32
        self.settle(c, self.head_at(c, c.released)[0], True)
        return Reason.OFFLOAD_PASSED if w.act == PASS else Reason.OFFLOAD_RELEASED

    def decide(self, c: Conn, w: Work) -> int:
        udp = w.p.is_udp
        err = self.prepare_datagram(c, w) if udp else self.prepare_segment(c, w)
        if err:
            return err
        err = self.compare_payload(c, w)
        if err:
            return err
        return self.finish_datagram(c, w) if udp else self.finish_segment(c, w)

    def kept(self, c: Conn, seq: int) -> bool:
        """Return whether released bytes from seq on are still in the buffer."""
        return bool(c.buffer) and (seq - self.oldest(c)) & M32 <= BUFFER

    @staticmethod
    def believed(c: Conn, end: int) -> bool:
        """Return whether the client has all released bytes below end, or may have: once."""
        known, ack = c.client_ack & abi.CLIENT_ACK_KNOWN, c.client_ack & M32
        if not known or seq_later(ack, c.released):
            return False
        if seq_later(end, ack):
            if c.doubted or not KernelModel.just_begun(c):
                return False
            c.doubted = 1
        return True

    @staticmethod
    def just_begun(c: Conn) -> bool:
        """Return whether little has been released since user space handed it over."""
        return (c.released - c.begun) & M32 <= BUFFER

    @staticmethod
    def all_acked(c: Conn) -> bool:
        return c.client_ack == abi.CLIENT_ACK_KNOWN | c.released

    def note_ack(self, frame: bytes) -> None:
        """Handle a client's frame for the PVM."""
        try:
            p = parse(frame)
        except BadFrame:
            return
        if p.is_tcp and p.flags & (ACK | SYN | RST) == ACK:
            c = self.conns.get(abi.FLOW_KEY.pack(p.dst, p.src, p.dport, p.sport, p.vlan))
            if c is not None:
                c.client_ack = abi.CLIENT_ACK_KNOWN | p.ack

    def in_force(self, c: Conn, mode: Mode, epoch: int) -> bool:
        """Return whether the connection's state is valid for a frame of this epoch."""
        seen = mode is Mode.RUN and c.epoch == epoch
        return seen and self.epoch == epoch and self.mode is Mode.RUN and self.on

    def fast(
        self, side: int, frame: bytes, now: int, *, gso_size: int = 0, partial: bool = False,
        epoch: int | None = None, elsewhere: bool = False,
    ) -> Fate:  # fmt: skip
        """Handle a frame of the pair.

        `epoch` is its epoch (ours if None; a different one never matches). `elsewhere`: the
        checksum of an inner header is partial.
        """
        try:
            p = parse(frame)
        except BadFrame:
            return Fate()
        if not p.is_tcp and not p.is_udp:
            return Fate()
        kind = abi.KEY_UDP if p.is_udp else 0
        key = abi.FLOW_KEY.pack(p.src, p.dst, p.sport, p.dport, p.vlan | kind)
        c = self.conns.get(key)
        if c is None:
            return Fate()
        if c.lock or self.busy():
            self.counts[Reason.PUNT_BUSY] += 1
            return Fate()
        if now - c.seen_ns > SEEN_STEP_NS:
            c.seen_ns = now
        w = Work(frame, gso_size, partial, side, now, p, key, elsewhere)
        r = OFFLOAD_NO
        if c.owner == OWNER_KERNEL:
            p_ack, p_win, pending = c.p_ack, c.p_win, c.ack_pending
            since, released = c.since_ns, c.released
            if self.in_force(c, self.mode, self.epoch if epoch is None else epoch):
                r = self.decide(c, w)
            else:
                r = Reason.PUNT_MODE
            if r >= Reason.PUNT_MODE:
                self.counts[Reason(r)] += 1
                c.p_ack, c.p_win, c.ack_pending = p_ack, p_win, pending
                c.owner, c.punt_reason = OWNER_USER, int(r)
                r = OFFLOAD_NO
        if r == OFFLOAD_NO:
            c.punt_seq = (c.punt_seq + 1) & M32
            return Fate(punt_seq=c.punt_seq)
        self.counts[Reason(r)] += 1
        if w.out and since and c.released != released:
            waited = now - since if side == SIDE_SVM else 0  # only the PVM's counts
            self.waits[min((waited // 1000).bit_length(), WAIT_BUCKETS - 1)] += 1
        return Fate(r, 0, w.out)

    # -- user space

    def control(self, message: bytes, now: int) -> CtlResult:
        """offload_ctl."""
        op, punt_seq, key, state, since = abi.CTL.unpack(message)
        c = self.conns.get(key)
        if c is None:
            return CtlResult.UNKNOWN
        if c.lock:
            return CtlResult.BUSY
        if op == CtlOp.RECLAIM:
            c.owner = OWNER_USER
        elif c.owner != OWNER_USER:
            return CtlResult.REFUSED
        elif op == CtlOp.FREE:
            if c.buffer:
                self.buffer_free(c)
            c.next, c.ack_pending, c.since_ns, c.epoch = c.released, 0, 0, 0
        elif op == CtlOp.CLAIM:
            c.since_ns = 0
            if not self.buffer_claim(c, key):
                return CtlResult.FULL
            self.outstanding_since(c, now)
        else:
            return self.offload(c, punt_seq, state, since or now, now)
        return CtlResult.DONE

    def offload(self, c: Conn, punt_seq: int, state: bytes, since: int, now: int) -> CtlResult:
        (
            epoch, rel, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss, nxt, org, ahead, pending,
            l4, doff, _scaled, hdr, cookie,
        ) = abi.OFFLOAD.unpack(state)  # fmt: skip
        if self.frames_on_their_way(c, punt_seq):
            return CtlResult.REFUSED
        if (nxt != org or pending) and not c.buffer:
            return CtlResult.FULL
        c.epoch, c.released, c.base_seq, c.next, c.leader = epoch, rel, org, nxt, ahead
        c.p_ack, c.s_ack, c.adv_ack = p_ack, s_ack, adv_ack
        c.p_win, c.s_win, c.adv_win, c.mss = p_win, s_win, adv_win, mss
        c.ack_pending, c.l4, c.doff, c.hdr, c.cookie, c.seen_ns = (
            pending,
            l4,
            doff,
            hdr,
            cookie,
            now,
        )
        if c.begun != rel:
            c.doubted = 0
        c.fin_known, c.begun = 0, rel
        self.outstanding_since(c, since if nxt != rel or pending else 0)
        c.owner = OWNER_KERNEL
        return CtlResult.DONE

    @staticmethod
    def frames_on_their_way(c: Conn, punt_seq: int) -> bool:
        return c.punt_seq != punt_seq

    # -- for inspection

    def waiting(self) -> list[tuple[int, bytes]]:
        """Return (since_ns, key) of what is outstanding."""
        return [(s, k) for t, s, k in (self.owner(i) for i in range(self.buffers)) if t and s]

    def decided(self) -> int:
        """Return the number of frames that never reached user space."""
        return sum(n for r, n in self.counts.items() if r < Reason.PUNT_MODE)


class _Conns:
    """The map `conns`, as colo_xdp.datapath.loader.Map."""

    def __init__(self, k: KernelModel) -> None:
        self._k = k

    def set(self, key: bytes, value: bytes, *, new: bool = False) -> None:
        if new and key in self._k.conns:
            raise OSError(errno.EEXIST, "map update")
        self._k.conns[key] = Conn.unpack(value)

    def get(self, key: bytes) -> bytes | None:
        c = self._k.conns.get(key)
        return None if c is None else c.pack()

    def delete(self, key: bytes) -> bool:
        return self._k.conns.pop(key, None) is not None

    def keys(self) -> Iterator[bytes]:
        return iter(list(self._k.conns))


class _Waits:
    """The map `offload_waits`."""

    info = SimpleNamespace(max_entries=WAIT_BUCKETS)

    def __init__(self, k: KernelModel) -> None:
        self._k = k

    def get(self, key: bytes) -> bytes | None:
        return struct.pack("=Q", self._k.waits[struct.unpack("=I", key)[0]])


class _Moved:
    """The map `offload_moved`."""

    def __init__(self, k: KernelModel) -> None:
        self._k = k

    def get(self, key: bytes) -> bytes | None:
        return struct.pack("=Q", self._k.moved_ns)


class Objects:
    """Stand in for colo_xdp.datapath.loader.Objects, as far as BpfKernelPath needs it."""

    def __init__(self, k: KernelModel) -> None:
        buffers = SimpleNamespace(max_entries=k.buffers)
        self.maps: dict[str, Any] = {
            "conns": _Conns(k),
            "offload_waits": _Waits(k),
            "offload_moved": _Moved(k),
            "buffers": SimpleNamespace(fd=k.fds[0], info=buffers),
            "owners": SimpleNamespace(fd=k.fds[1], info=buffers),
        }
        self.programs = {"offload_ctl": SimpleNamespace(fd=k)}

    def map(self, name: str) -> Any:
        return self.maps[name]


class Bpf:
    """Stand in for colo_xdp.datapath.syscall in datapath/offload_maps.py.

    The program's descriptor is the kernel model itself.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self._now = now

    def test_run(self, fd: KernelModel, message: bytes, data_out: int = 0) -> Any:
        return SimpleNamespace(retval=int(fd.control(message, self._now())))


def user_space(
    k: KernelModel, alive: Callable[[], bool] = lambda: True
) -> offload_maps.BpfKernelPath:
    """Return what a controller has of it; while not alive(), it does not switch anything."""

    def switch(on: bool) -> None:
        if alive():
            k.on = on

    def keep_since(epoch: int) -> None:
        if alive():
            k.since = epoch

    objects: Any = Objects(k)
    return offload_maps.BpfKernelPath(objects, 300_000_000_000, k.since, switch, keep_since)
