# SPDX-License-Identifier: GPL-2.0-or-later
"""The numbers and shapes of bpf/colo_common.h, for Python.

tests/unit/test_abi.py parses the header and fails when the two differ.
"""

from __future__ import annotations

import struct
from enum import IntEnum

ABI = 6
MARK = 0xC0105EED
TPID = 0x88A8
EPOCH_MASK = 0x0FFF
EPOCH_BASE = 0xFFFFFFFF
KIND_SHIFT = 13
KIND_MIRROR = 1
KIND_SVM = 2
KIND_SYN = 3

EV_PARTIAL = 1
EV_VLAN = 2
EV_UNSUMMED = 4


class Mode(IntEnum):
    """What the data path does (slot CFG_MODE)."""

    DROP = 0
    BYPASS = 1
    RUN = 2
    CHECKPOINT = 3
    TAKEOVER = 4


class Cfg(IntEnum):
    """Slots of the `config` array, u64 each."""

    ABI = 0
    MODE = 1
    EPOCH = 2
    TAP = 3
    PEER = 4
    CONTROLLER_NS = 5
    LOSS_NS = 6
    LOSS_POLICY = 7
    UNMIRRORED = 8
    SHADOW = 9
    FAST = 10
    FAST_SINCE = 11
    UPLINK = 12
    SPEAK_UNTIL_NS = 13
    ORDER = 16
    ROLE = 17
    BASE_EPOCH = 18
    BOND = 19
    GUEST_MAC = 24
    UNDECIDED = 26
    PEER_STOPPED = 27
    MAX = 32


class HostRole(IntEnum):
    """Which guest this host runs (slot CFG_ROLE)."""

    CONFIGURED = 0
    PRIMARY = 1
    SECONDARY = 2


class Bond(IntEnum):
    """What this host's guest is to the other one (slot CFG_BOND): outlives the controller."""

    NONE = 0  # nothing is known: not a copy of the other one, as far as anybody has confirmed
    EQUAL = 1  # a checkpoint was confirmed, and nobody has spoken alone since
    ALONE = 2  # clients may know bytes of it that the other one has never heard of


#: values of CFG_UPLINK that are no device
UPLINK_BRIDGE, UPLINK_LEARNED = 0, 0xFFFFFFFF


class LossPolicy(IntEnum):
    """on_controller_loss."""

    HOLD = 0
    RELEASE = 1


class Prog(IntEnum):
    """Programs: first index of the counters."""

    PVM_IN = 0
    PVM_OUT = 1
    SVM_ARRIVAL = 2
    PVM_RELEASE = 3
    SVM_IN = 4
    SVM_OUT = 5
    SVM_DELIVER = 6
    SVM_FORWARD = 7
    SVM_NET = 8
    SVM_OUT_XDP = 9
    FAST = 10
    GUEST_IN = 11
    GUEST_OUT = 12
    ADDRESSES = 13
    MAX = 14


class Reason(IntEnum):
    """What became of a frame, and why: second index of the counters."""

    PASSED = 0
    MIRRORED = 1
    MIRROR_FAILED = 2
    CAPTURED = 3
    RELEASED = 4
    REDIRECTED = 5
    REWRITTEN = 6
    FENCED = 7
    ISOLATED = 8
    RING_FULL = 9
    TOO_LARGE = 10
    CONTROLLER_LOST_HELD = 11
    CONTROLLER_LOST_PASSED = 12
    FOREIGN = 13
    BAD_FRAME = 14
    FLOW_TABLE_FULL = 15
    HELPER_FAILED = 16
    NO_CONFIG = 17
    UNMIRRORED = 18
    FAST_HELD = 19
    FAST_PASSED = 20
    FAST_RELEASED = 21
    FAST_REBUILT = 22
    FAST_ACKED = 23
    FAST_ENDED = 24
    HAND_MODE = 25
    HAND_ODD = 26
    HAND_GAP = 27
    HAND_DIFFERS = 28
    HAND_FULL = 29
    HAND_NO_STASH = 30
    HAND_BUSY = 31
    HAND_HELPER = 32
    LEASE_OVER = 33
    OTHER_MAC = 34
    MACS_FULL = 35
    ADDRESSES_FULL = 36
    MAC_MOVED = 37
    ADDRESS_MOVED = 38
    OFFLOAD_REFUSED = 39
    PVM_SYN = 40
    PVM_SYN_LATE = 41
    OFFSET_UNKNOWN = 42
    MPTCP_OFF = 43
    MAX = 44


class Gso(IntEnum):
    """struct virtio_net_hdr.gso_type without GSO_ECN (linux/virtio_net.h)."""

    NONE = 0
    TCPV4 = 1
    UDP = 3  # UFO: one datagram, to be fragmented
    TCPV6 = 4
    UDP_L4 = 5  # USO: datagrams behind one header


GSO_ECN = 0x80


class Source(IntEnum):
    """Whose frame an event carries."""

    PVM = 0
    SVM = 1
    CLIENT = 2


PROGRAMS = {p.name.lower(): int(p) for p in Prog if p is not Prog.MAX}
REASONS = {r.name.lower(): int(r) for r in Reason if r is not Reason.MAX}

#: struct colo_event: ts_ns, len, epoch, gso_size, vlan_tci, vlan_proto, source, flags,
#: captured, csum_start, csum_offset, gso_type
EVENT = struct.Struct("=QIIHHHBBIHBB")
#: struct colo_count: packets, bytes
COUNT = struct.Struct("=QQ")
#: struct colo_flow_key: guest, client (network order), ports (network order), vlan (host order)
FLOW_KEY = struct.Struct("=16s16s2s2sI")

#: in FLOW_KEY's vlan, for a flow of `conns`: UDP, not TCP
KEY_UDP = 0x80000000

#: struct colo_unmirrored_key: a flow key and the protocol
UNMIRRORED_KEY = struct.Struct("=16s16s2s2sII")
#: struct colo_flow: seen_ns, epoch, off, tsoff, isn_p, isn_s, ts_p, ts_s, fin_guest, fin_client,
#: state, have, have_client, have_pvm, isn_c, pvm_isn, pvm_c, pvm_ts
FLOW = struct.Struct("=QIIIIIIIIIBBBBIIII")

TIER_U, TIER_K = 0, 1
CLIENT_ACK_KNOWN = 1 << 32
SIDE_PVM, SIDE_SVM = 0, 1

#: struct colo_conn: lock, since_ns, seen_ns, client_ack, tier, epoch, rel, nxt, org, stash,
#: captured, p_ack, s_ack, out_ack, p_win, s_win, out_win, mss, ahead, pending, l4, doff, why,
#: fin_known, pad, fin, pad2, hdr, memo
CONN = struct.Struct("=QQQQIIIIIIIIIIHHHHBBBBBB2xI4x128s64s")
#: struct colo_dgram: ts_ns, len, partial, pad, hdr; records begin at multiples of DGRAM_ALIGN
DGRAM, DGRAM_ALIGN = struct.Struct("=QIB3x112s"), 128
#: struct colo_owner: taken, since_ns, key
OWNER = struct.Struct("=QQ40s")
#: struct colo_ctl: ethernet header, op, captured, key, what GIVE is to set, since_ns
CTL = struct.Struct("=14xHI40s232sQ")
#: struct colo_client: seen_ns, ifindex, pad
CLIENT = struct.Struct("=QII")
#: in CFG_GUEST_MAC, above the 48 bits of the address
MAC_KNOWN, MAC_ALL = 1 << 48, 1 << 49
#: struct colo_address: ip (IPv4 mapped), vlan (host order)
ADDRESS = struct.Struct("=16sI")
#: struct colo_claim: seen_ns, mac, epoch, flags
CLAIM = struct.Struct("=QQII")
CLAIM_SAYS_ROUTER, CLAIM_ROUTER = 1, 2
#: epoch, rel, p_ack, s_ack, out_ack, p_win, s_win, out_win, mss, nxt, org, ahead, pending, l4,
#: doff, hdr, memo
GIVE = struct.Struct("=IIIIIHHHHIIBBBB128s64s")
#: bytes of a stash's ring, and where it begins in struct colo_stash
STASH, STASH_BEFORE = 512 * 1024, 64
STASH_SLACK = 2 * 4096 + 128


class CtlOp(IntEnum):
    """What fast_ctl is asked to do."""

    SEIZE = 1
    GIVE = 2
    FREE = 3
    CLAIM = 4


class CtlResult(IntEnum):
    """What fast_ctl answers."""

    DONE = 0
    REFUSED = 1
    BUSY = 2
    UNKNOWN = 3
    FULL = 4
