# SPDX-License-Identifier: GPL-2.0-or-later
"""Connections between tier U (stream.py) and tier K (bpf/fast.h): sans-IO.

A settled stream becomes the few words that the kernel goes on from; what the kernel had when
a frame surprised it becomes a stream again: its stash is what the SVM said and the PVM did not
yet, or the PVM's frames that wait, built anew from the PVM's newest header.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from . import abi
from ._seq import MASK, diff, later
from .flow import FlowKey, unmirrored_key
from .packet import ACK, PSH, Packet, parse
from .record import Record
from .segment import finish
from .stream import Stream
from .window import Words as Windows

#: payload of one frame built from a stash
PIECE = 32 * 1024
#: bytes of history that go with it: the PVM may be waiting for acks, and send again next
HISTORY = 64 * 1024

_MEMO = struct.Struct("=BBBxIIHH")  # flags, direction, scale, isn, origin, window of the SYN
_DIRECTIONS = ("", "in", "out")
_NO_SCALE = 255
_DEFAULT_MSS = 536  # RFC 9293 3.7.1
#: tier K makes no larger segments (send_piece() in bpf/fast.h)
MAX_MSS = 2047


@dataclass(frozen=True, slots=True)
class Words:
    """struct colo_conn, and the bytes outstanding. Windows are fields, not scaled."""

    tier: int
    epoch: int
    rel: int
    captured: int
    p_ack: int
    s_ack: int
    out_ack: int
    p_win: int
    s_win: int
    out_win: int
    mss: int
    pvm_ahead: bool
    pending: bool
    header: bytes  # of the PVM, Ethernet to TCP options; empty: none was needed
    l4: int
    since_ns: int
    seen_ns: int
    memo: bytes
    stash: bytes  # from rel on, of whoever is ahead
    history: bytes  # up to rel


class Answer(Enum):
    """Of tier K to a stream that it is given."""

    TAKEN = "taken"
    ON_THEIR_WAY = "frames are on their way here"
    NOT_NOW = "not now"  # no stash is free, it is locked, it is not known any more


class Fast(Protocol):
    """Tier K as the engine sees it. Keys are those of TCP flows."""

    enabled: bool

    def offer(self, key: FlowKey) -> bool:
        """Make the connection known to the kernel; False: the table is full."""
        ...

    def give(self, key: FlowKey, gift: Gift, captured: int) -> Answer:
        """To tier K, the last frame of it that was seen here being `captured`."""
        ...

    def seize(self, key: FlowKey) -> Words | None:
        """To tier U, with what is outstanding; None if the kernel does not know it."""
        ...

    def outstanding(self) -> list[FlowKey]:
        """Connections of which anything is outstanding."""
        ...

    def overdue(self, before_ns: int) -> list[FlowKey]:
        """Those of them that have waited since before_ns or longer."""
        ...

    def void(self, epoch: int) -> None:
        """What it knew in earlier epochs than this is of no more use."""
        ...


class NoFast:
    """There is no tier K."""

    enabled = False

    def offer(self, key: FlowKey) -> bool:
        return False

    def give(self, key: FlowKey, gift: Gift, captured: int) -> Answer:
        return Answer.NOT_NOW

    def seize(self, key: FlowKey) -> Words | None:
        return None

    def outstanding(self) -> list[FlowKey]:
        return []

    def overdue(self, before_ns: int) -> list[FlowKey]:
        return []

    def void(self, epoch: int) -> None:
        pass


def conn_key(key: FlowKey) -> bytes:
    """struct colo_flow_key of a TCP flow."""
    raw = unmirrored_key(key, True)
    assert raw is not None
    return raw[: abi.FLOW_KEY.size]


def flow_key(raw: bytes) -> FlowKey:
    """The TCP flow of a struct colo_flow_key without VLANs."""
    guest, client, sport, dport, _ = abi.FLOW_KEY.unpack(raw)
    mapped = bytes(10) + b"\xff\xff"
    if guest.startswith(mapped) and client.startswith(mapped):
        guest, client = guest[12:], client[12:]
    return bytes(guest + client + sport + dport)


def untagged(key: FlowKey) -> bool:
    """Whether a TCP flow has no VLAN tag: tier K takes no others."""
    return len(key) in (12, 36)


@dataclass(frozen=True, slots=True)
class Gift:
    """A stream for tier K: abi.GIVE packed; the latest history, and what is outstanding; whether
    an ack waits, which needs a stash too: by its owner user space finds what waits; and since
    when (0: nothing does)."""

    words: bytes
    stash: bytes
    pending: bool = False
    since_ns: int = 0


def ready(st: Stream) -> bool:
    """Whether tier K could go on from here: established, and nothing waits but plain bytes."""
    return (
        not st.ooo and not (st.held and st.chunks)
        and st.base is not None and st.base == st.ver
        and st.committed_ack is not None and st.fin_done is None and not st.rst_done
        and st.sfin is None and not st.srst and (st.ssyn is None or st.ssyn.twin)
        and not st.stuck and not st.asked and not st.unverifiable
        and st.windows.shrunk is None and untagged(st.key)
    )  # fmt: skip


def waits_since(st: Stream) -> int:
    """Since when anything of a ready stream waits; 0: nothing does."""
    return st.held[0][2] if st.held else st.svm_since()


def _plain(p: Packet) -> bool:
    """A frame as tier K takes them (is_plain() in bpf/fast.h)."""
    frame, l4 = p.frame, p.l4
    size = p.off - l4
    return (
        p.flags & ~PSH == ACK
        and l4 == (34 if frame[14] >> 4 == 4 else 54)
        and (size == 20 or (size == 32 and frame[l4 + 20 : l4 + 24] == b"\x01\x01\x08\x0a"))
    )


def pack(st: Stream, epoch: int) -> Gift | None:
    """A ready stream for Fast.give(); None: not plain, or no window is known yet."""
    assert st.base is not None and st.committed_ack is not None
    s_ack = later(st.sack, st.committed_ack)
    w = st.windows.words(st.committed_ack, s_ack)
    if w is None:
        return None
    p_ack, p_win, nxt = st.committed_ack, w.pvm, st.base
    parts: list[bytes] = []
    header, l4, size, ahead, mss = b"", 0, 0, abi.SIDE_PVM, _DEFAULT_MSS
    for rec, p, _ in st.held:
        if not _plain(p) or (l4 and p.off - p.l4 != size):
            return None
        known = diff(nxt, p.seq)  # sent again while it waited: once is enough
        if not 0 <= known <= diff(nxt, st.base):
            return None
        fresh = p.frame[p.off + known : p.end]
        parts.append(fresh)
        nxt = (nxt + len(fresh)) & MASK
        l4, size = p.l4, p.off - p.l4
        if diff(p.ack, p_ack) >= 0:
            p_ack, p_win, header = p.ack, p.window, p.frame[: p.off]
        if rec.gso_size <= MAX_MSS:
            mss = max(mss, rec.gso_size)
    if st.held and not header:
        return None
    for frame, off, end, _ in st.chunks:
        parts.append(frame[off:end])
        nxt = (nxt + end - off) & MASK
        ahead = abi.SIDE_SVM
    past = min(st.hist.size, HISTORY)
    stash = st.hist.back(past, past) + b"".join(parts)
    if len(stash) > abi.STASH // 2:
        return None
    scale, pending = _NO_SCALE if w.scale is None else w.scale, diff(p_ack, s_ack) > 0
    memo = _MEMO.pack(
        st.isn is not None, _DIRECTIONS.index(st.direction), scale, st.isn or 0, st.origin, w.syn, 0
    )
    return Gift(
        abi.GIVE.pack(
            epoch, st.base, p_ack, s_ack, st.committed_ack, p_win, w.svm, w.told, mss, nxt,
            (st.base - past) & MASK, ahead, pending, l4, size, header, memo,
        ),
        stash,
        pending,
        waits_since(st),
    )  # fmt: skip


def given(st: Stream) -> None:
    """Tier K has the stream, and what waited in it."""
    host = st.host
    for rec, _, _ in st.held:
        host.pvm_packets -= 1
        host.pvm_bytes -= len(rec.frame)
    st.held.clear()
    st.head_ok = None
    host.svm_packets -= len(st.chunks)
    st.chunks.clear()


def probe(key: FlowKey, words: Words) -> Packet:
    """A frame of the connection, for the policy to judge."""
    return _frame(key, words, words.rel, b"", 0)[1]


def direction(words: Words) -> str:
    """Who opened the connection, as the policy knows it."""
    return _DIRECTIONS[words.memo[1]]


def recall(st: Stream, words: Words, now_ns: int) -> None:
    """Let an empty or given stream go on from what the kernel had."""
    has_isn, _, scale, isn, origin, syn, _ = _MEMO.unpack_from(words.memo)
    st.isn, st.origin = (isn if has_isn else None), origin
    st.epoch = words.epoch
    known = 0 if st.ver is None else (st.ver - words.rel + len(words.history)) & MASK
    if known > len(words.history):
        st.hist.clear()  # there is a hole between what is in it and what tier K has kept
        known = 0
    st.hist.add(words.history[known:])
    st.host.charge_history(st)
    st.base = st.ver = st.send = words.rel
    st.committed_ack, st.sack = words.out_ack, words.s_ack
    ack = None
    if words.header:
        ack = _frame(st.key, words, words.rel, b"", 0)
    st.windows.resume(
        Windows(
            None if scale == _NO_SCALE else scale, syn, words.p_win, words.s_win, words.out_win
        ),
        (words.p_ack, words.s_ack, words.out_ack),
        ack if words.out_win < words.p_win else None,
    )
    host = st.host
    since = words.since_ns or now_ns
    if words.stash and not words.pvm_ahead:
        for at in range(0, len(words.stash), PIECE):
            piece = words.stash[at : at + PIECE]
            rec, p = _frame(st.key, words, (words.rel + at) & MASK, piece, PSH)
            st.chunks.append((rec.frame, p.off, p.end, since))
            host.svm_packets += 1
        st.send = (words.rel + len(words.stash)) & MASK
    elif words.stash:
        for at in range(0, len(words.stash), PIECE):
            piece = words.stash[at : at + PIECE]
            st.hold(*_frame(st.key, words, (words.rel + at) & MASK, piece, PSH), since)
    if words.pending and not (words.stash and words.pvm_ahead) and ack is not None:
        st.hold(*ack, since)
    if (st.held or st.chunks) and not st.when:
        host.arm(st, since + host.timeout_ns)


def _frame(
    key: FlowKey, words: Words, seq: int, payload: bytes, push: int
) -> tuple[Record, Packet]:
    """A frame of the PVM as it might have come, under its newest header."""
    gso = words.mss if len(payload) > words.mss else 0
    head = bytearray(words.header or _header(key))
    l4 = len(head) - 20 if not words.header else words.l4
    struct.pack_into("!II", head, l4 + 4, seq, words.p_ack)
    head[l4 + 13] = ACK | (push if payload else 0)
    struct.pack_into("!H", head, l4 + 14, words.p_win)
    rec = Record(finish(head, l4, payload), words.since_ns or words.seen_ns, gso, True)
    return rec, parse(rec.frame)


def _header(key: FlowKey) -> bytes:
    """For bytes of the SVM when the PVM has sent nothing yet: only compared, never released."""
    if len(key) == 12:
        ip = b"\x08\x00\x45" + bytes(8) + b"\x06\0\0" + key[:8]
    else:
        ip = b"\x86\xdd\x60" + bytes(5) + b"\x06\x40" + key[:32]
    return bytes(12) + ip + key[-4:] + bytes(8) + b"\x50" + bytes(7)


def conn_words(raw: bytes, ring: bytes | memoryview) -> Words:
    """Decodes struct colo_conn; `ring`: struct colo_stash, empty if there is none."""
    (
        _, since, seen, _, tier, epoch, rel, nxt, org, stash, captured, p_ack, s_ack, out_ack,
        p_win, s_win, out_win, mss, ahead, pending, l4, doff, _, hdr, memo,
    ) = abi.CONN.unpack(raw)  # fmt: skip
    out, kept = (nxt - rel) & MASK, (nxt - org) & MASK
    data = past = b""
    if stash and ring and out <= abi.STASH:
        kept = min(kept, abi.STASH)
        at = (nxt - kept - org) % abi.STASH
        first, last = abi.STASH_BEFORE + at, abi.STASH_BEFORE + abi.STASH
        both = bytes(ring[first : min(last, first + kept)])
        both += bytes(ring[abi.STASH_BEFORE : abi.STASH_BEFORE + kept - len(both)])
        past, data = both[: kept - out], both[kept - out :]
    return Words(
        tier, epoch, rel, captured, p_ack, s_ack, out_ack, p_win, s_win, out_win, mss,
        ahead == abi.SIDE_PVM, bool(pending), hdr[: l4 + doff] if l4 else b"", l4, since, seen,
        memo, data, past,
    )  # fmt: skip
