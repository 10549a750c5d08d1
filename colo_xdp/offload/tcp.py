# SPDX-License-Identifier: GPL-2.0-or-later
"""TCP streams between the slow path (compare/tcp.py) and the fast path (bpf/offload/offload.h).

Sans-IO; offload/scheduler.py uses the codec. A settled stream becomes the state from which the
kernel continues. When a frame is punted, the kernel's state becomes a stream again: its buffer is
output of the SVM that the PVM has not produced yet, or held frames of the PVM, rebuilt under the
PVM's newest header.
"""

from __future__ import annotations

import struct

from .. import abi
from ..compare.tcp import TcpFlow
from ..compare.window import WindowState as Windows
from ..net.flow_key import FlowKey
from ..net.frame import Frame
from ..net.packet import ACK, FIN, PSH, Packet, parse
from ..net.segment import finish
from ..net.seqnum import MASK, diff, later
from ..net.tcp_headers import is_atomic, reserved
from .kernel_format import ConnState, OffloadRequest, direction_number, known

#: payload of one frame rebuilt from a buffer
PIECE = 32 * 1024
#: Bytes of history handed over with a stream: the PVM may be waiting for acks, and retransmit next.
HISTORY = 64 * 1024

_COOKIE = struct.Struct("=BBBxIIHH")  # flags, direction, scale, isn, origin, window of the SYN
_NO_SCALE = 255
_DEFAULT_MSS = 536  # RFC 9293 section 3.7.1


def _plain(p: Packet) -> bool:
    """Return whether the fast path takes the frame (is_plain() in bpf/offload/offload.h)."""
    frame, l4 = p.frame, p.l4
    size = p.off - l4
    return (
        p.flags & ~PSH == ACK
        and not reserved(p)
        and is_atomic(p)
        and p.l3 == 14
        and l4 == (34 if frame[14] >> 4 == 4 else 54)
        and (size == 20 or (size == 32 and frame[l4 + 20 : l4 + 24] == b"\x01\x01\x08\x0a"))
    )


def _frame(
    key: FlowKey, state: ConnState, seq: int, payload: bytes, flags: int
) -> tuple[Frame, Packet]:
    """Build a frame of the PVM as it might have come, under its newest header."""
    mss = state.mss or _DEFAULT_MSS
    gso = mss if len(payload) > mss else 0
    head = bytearray(state.header or _header(key))
    l4 = len(head) - 20 if not state.header else state.l4
    struct.pack_into("!II", head, l4 + 4, seq, state.p_ack)
    head[l4 + 13] = ACK | flags
    struct.pack_into("!H", head, l4 + 14, state.p_win)
    rec = Frame(finish(head, l4, payload), state.since_ns or state.seen_ns, gso, True)
    return rec, parse(rec.frame)


def _header(key: FlowKey) -> bytes:
    """Build a header for bytes of the SVM while the PVM has sent nothing, to compare them only."""
    if len(key) == 12:
        ip = b"\x08\x00\x45" + bytes(8) + b"\x06\0\0" + key[:8]
    else:
        ip = b"\x86\xdd\x60" + bytes(5) + b"\x06\x40" + key[:32]
    return bytes(12) + ip + key[-4:] + bytes(8) + b"\x50" + bytes(7)


class TcpCodec:
    """offload_port.OffloadCodec for TCP streams."""

    def ready(self, st: TcpFlow) -> bool:
        """Return whether the fast path could continue: established, and only plain bytes wait."""
        sent, theirs = st.sent, st.theirs
        return (
            not theirs.out_of_order
            and not (st.held and theirs.chunks)
            and sent.released_nxt is not None
            and sent.released_nxt == sent.verified
            and sent.committed_ack is not None
            and not sent.over()
            and theirs.svm_fin is None
            and not theirs.svm_rsts
            and (theirs.svm_syn is None or theirs.svm_syn.matched)
            and not st.diverged
            and not st.asked
            and not st.unverifiable
            and not st.marks.unfit
            and not theirs.svm_urgent
            and st.windows.shrunk is None
            and known(st.key)
        )

    def young(self, st: TcpFlow) -> bool:
        """Return whether only the handshake has happened: what follows comes a round trip later."""
        return st.sent.isn is not None and st.sent.released_nxt == (st.sent.isn + 1) & MASK

    def bytes_sent(self, st: TcpFlow) -> int:
        """Return the number of bytes that the guest has sent."""
        return 0 if st.sent.released_nxt is None else diff(st.sent.released_nxt, st.sent.origin)

    def waits_since(self, st: TcpFlow) -> int:
        """Return since when (ns) anything of a ready stream waits; 0: nothing does."""
        return st.held[0][2] if st.held else st.svm_since()

    def pack(self, st: TcpFlow, epoch: int) -> OffloadRequest | None:
        """Return a ready stream's state; None: it is not plain, or no window is known yet."""
        assert st.sent.released_nxt is not None and st.sent.committed_ack is not None
        s_ack = later(st.theirs.svm_ack, st.sent.committed_ack)
        w = st.windows.state(st.sent.committed_ack, s_ack)
        if w is None:
            return None
        p_ack, p_win, nxt = st.sent.committed_ack, w.pvm, st.sent.released_nxt
        parts: list[bytes] = []
        header, l4, size, ahead, mss = b"", 0, 0, abi.SIDE_PVM, 0
        for rec, p, _ in st.held:
            if not _plain(p) or (l4 and p.off - p.l4 != size):
                return None
            known = diff(nxt, p.seq)  # retransmitted while it waited: once is enough
            if not 0 <= known <= diff(nxt, st.sent.released_nxt):
                return None
            fresh = p.frame[p.off + known : p.end]
            parts.append(fresh)
            nxt = (nxt + len(fresh)) & MASK
            l4, size = p.l4, p.off - p.l4
            if diff(p.ack, p_ack) >= 0:
                p_ack, p_win, header = p.ack, p.window, p.frame[: p.off]
            mss = max(mss, rec.gso_size or p.end - p.off)
        if st.held and not header:
            return None
        for frame, off, end, _ in st.theirs.chunks:
            parts.append(frame[off:end])
            nxt = (nxt + end - off) & MASK
            ahead = abi.SIDE_SVM
        past = min(st.sent.history.size, HISTORY)
        buffer = st.sent.history.back(past, past) + b"".join(parts)
        if len(buffer) > abi.BUFFER // 2:
            return None
        scale, pending = _NO_SCALE if w.scale is None else w.scale, diff(p_ack, s_ack) > 0
        cookie = _COOKIE.pack(
            st.sent.isn is not None,
            direction_number(st.direction),
            scale,
            st.sent.isn or 0,
            st.sent.origin,
            w.syn,
            0,
        )
        return OffloadRequest(
            abi.OFFLOAD.pack(
                epoch,
                st.sent.released_nxt,
                p_ack,
                s_ack,
                st.sent.committed_ack,
                p_win,
                w.svm,
                w.advertised,
                mss,
                nxt,
                (st.sent.released_nxt - past) & MASK,
                ahead,
                pending,
                l4,
                size,
                bool(w.scale),
                header,
                cookie,
            ),
            buffer,
            pending,
            self.waits_since(st),
        )

    def on_offloaded(self, st: TcpFlow) -> None:
        """Note that the fast path owns the stream now, and what waited in it."""
        st.unhold()
        st.host.ledger.discharge_svm(len(st.theirs.chunks))
        st.theirs.chunks.clear()

    def restore(self, st: TcpFlow, state: ConnState, now_ns: int) -> None:
        """Continue an empty or offloaded stream from the kernel's state."""
        has_isn, _, scale, isn, origin, syn, _ = _COOKIE.unpack_from(state.cookie)
        st.sent.isn, st.sent.origin = (isn if has_isn else None), origin
        st.epoch = state.epoch
        known = (
            0
            if st.sent.verified is None
            else (st.sent.verified - state.released + len(state.history)) & MASK
        )
        if known > len(state.history):
            # there is a gap between its contents and what the fast path has kept
            st.sent.history.clear()
            known = 0
        st.sent.history.add(state.history[known:])
        st.host.histories.charge(st.sent.history)
        st.sent.released_nxt = st.sent.verified = st.theirs.svm_nxt = state.released
        st.sent.committed_ack, st.theirs.svm_ack = state.adv_ack, state.s_ack
        ack = None
        if state.header:
            ack = _frame(st.key, state, state.released, b"", 0)
        st.windows.resume(
            Windows(
                None if scale == _NO_SCALE else scale, syn, state.p_win, state.s_win, state.adv_win
            ),
            (state.p_ack, state.s_ack, state.adv_ack),
            ack if state.adv_win < state.p_win else None,
        )
        host = st.host
        since = state.since_ns or now_ns
        waits = (
            state.fin if state.fin is not None and diff(state.fin, state.released) >= 0 else None
        )
        if state.fin is not None and waits is None:
            st.sent.fin_done = state.fin
        if waits is not None and not state.pvm_ahead:
            st.theirs.svm_fin, st.theirs.svm_fin_at = waits, since
        if state.buffer and not state.pvm_ahead:
            for at in range(0, len(state.buffer), PIECE):
                piece = state.buffer[at : at + PIECE]
                rec, p = _frame(st.key, state, (state.released + at) & MASK, piece, 0)
                st.theirs.chunks.append((rec.frame, p.off, p.end, since))
                host.ledger.charge_svm()
            st.theirs.svm_nxt = (state.released + len(state.buffer)) & MASK
        elif state.buffer:
            for at in range(0, len(state.buffer), PIECE):
                piece = state.buffer[at : at + PIECE]
                last = at + PIECE >= len(state.buffer)
                flags = PSH | FIN if last and waits is not None else PSH
                st.hold(*_frame(st.key, state, (state.released + at) & MASK, piece, flags), since)
        elif waits is not None and state.pvm_ahead:
            st.hold(*_frame(st.key, state, waits, b"", FIN), since)
        if state.pending and not (state.pvm_ahead and st.held) and ack is not None:
            st.hold(*ack, since)
        if (st.held or st.theirs.chunks or st.theirs.svm_fin is not None) and not st.when:
            host.timers.arm(st, since + host.timeout_ns)

    def probe(self, key: FlowKey, state: ConnState) -> Packet:
        """Return a frame of the connection for the policy to judge."""
        return _frame(key, state, state.released, b"", 0)[1]
