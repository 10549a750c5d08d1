# SPDX-License-Identifier: GPL-2.0-or-later
"""Constants and structures of bpf/lib/abi.h, for Python.

tests/unit/test_abi.py parses the header and fails when the two differ.
"""

from __future__ import annotations

import struct
from enum import IntEnum

ABI = 9
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
    """Mode of the data path (slot CFG_MODE)."""

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
    OFFLOAD = 10
    OFFLOAD_SINCE = 11
    UPLINK = 12
    LEASE_EXPIRY_NS = 13
    ORDER = 16
    ROLE = 17
    PROMOTED_EPOCH = 18
    SYNC_STATE = 19
    GUEST_MAC = 24
    UNDECIDED = 26
    PEER_STOPPED = 27
    DISKS_WHOLE = 28
    MIRRORED_UNTIL_NS = 29
    MAX = 32


class HostRole(IntEnum):
    """Which guest this host runs (slot CFG_ROLE)."""

    CONFIGURED = 0
    PRIMARY = 1
    SECONDARY = 2


class SyncState(IntEnum):
    """Relation of this host's guest to the other one; outlives the controller.

    Slot CFG_SYNC_STATE.
    """

    NONE = 0  # not confirmed to be a copy of the other one
    IN_SYNC = 1  # a checkpoint was confirmed, and neither guest has been active alone since
    STANDALONE = 2  # clients may know bytes of it that the other one never received


#: values of CFG_UPLINK that are not a device
UPLINK_BRIDGE, UPLINK_LEARNED = 0, 0xFFFFFFFF


class LossPolicy(IntEnum):
    """Values of [datapath] on_controller_loss."""

    HOLD = 0
    RELEASE = 1


class Prog(IntEnum):
    """Programs: the first index of the counters."""

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
    OFFLOAD = 10
    PROMOTED_IN = 11
    PROMOTED_OUT = 12
    ADDRESSES = 13
    MAX = 14


class Reason(IntEnum):
    """Outcome of a frame and its reason: the second index of the counters."""

    PASS = 0
    PASS_MIRRORED = 1
    PASS_MIRROR_FAILED = 2
    PUNT = 3
    PASS_RELEASED = 4
    PASS_REDIRECTED = 5
    PASS_REWRITTEN = 6
    DROP_MODE = 7
    DROP_ISOLATED = 8
    DROP_RING_FULL = 9
    DROP_TOO_LARGE = 10
    DROP_CONTROLLER_LOST = 11
    PASS_CONTROLLER_LOST = 12
    PASS_FOREIGN = 13
    NOTE_UNPARSED = 14
    PASS_FLOW_TABLE_FULL = 15
    DROP_HELPER_FAILED = 16
    DROP_NO_CONFIG = 17
    PASS_UNMIRRORED = 18
    OFFLOAD_HELD = 19
    OFFLOAD_PASSED = 20
    OFFLOAD_RELEASED = 21
    OFFLOAD_REBUILT = 22
    OFFLOAD_ACKED = 23
    OFFLOAD_DUPLICATE = 24
    PUNT_MODE = 25
    PUNT_EXCEPTION = 26
    PUNT_OUT_OF_ORDER = 27
    PUNT_DIFFERS = 28
    PUNT_BUFFER_FULL = 29
    PUNT_NO_BUFFER = 30
    PUNT_BUSY = 31
    PUNT_HELPER_FAILED = 32
    DROP_LEASE_EXPIRED = 33
    PASS_OTHER_MAC = 34
    NOTE_MACS_FULL = 35
    NOTE_ADDRESSES_FULL = 36
    NOTE_MAC_MOVED = 37
    NOTE_ADDRESS_MOVED = 38
    DROP_GSO_UNSUPPORTED = 39
    DROP_PVM_SYN = 40
    DROP_PVM_SYN_UNKNOWN = 41
    PASS_OFFSET_UNKNOWN = 42
    NOTE_MPTCP_REMOVED = 43
    DROP_PROMOTED = 44
    NOTE_WINDOW_LIMITED = 45
    MAX = 46


class Gso(IntEnum):
    """struct virtio_net_hdr.gso_type without GSO_ECN (linux/virtio_net.h)."""

    NONE = 0
    TCPV4 = 1
    UDP = 3  # UFO: one datagram, to be fragmented
    TCPV6 = 4
    UDP_L4 = 5  # USO: datagrams behind one header


GSO_ECN = 0x80


class Source(IntEnum):
    """The guest or client that sent an event's frame."""

    PVM = 0
    SVM = 1
    CLIENT = 2


PROGRAMS = {p.name.lower(): int(p) for p in Prog if p is not Prog.MAX}
REASONS = {r.name.lower(): int(r) for r in Reason if r is not Reason.MAX}

#: struct colo_event: ts_ns, len, epoch, gso_size, vlan_tci, vlan_proto, source, flags, punt_seq,
#: csum_start, csum_offset, gso_type
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

OWNER_USER, OWNER_KERNEL = 0, 1
CLIENT_ACK_KNOWN = 1 << 32
SIDE_PVM, SIDE_SVM = 0, 1

#: struct colo_conn: lock, since_ns, seen_ns, client_ack, owner, epoch, released, next, base_seq,
#: buffer, punt_seq, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss, leader, ack_pending, l4,
#: doff, punt_reason, fin_known, shift, doubted, fin, begun, hdr, cookie
CONN = struct.Struct("=QQQQIIIIIIIIIIHHHHBBBBBBxBII128s64s")
#: struct colo_dgram: ts_ns, len, partial, pad, hdr; records start at multiples of DGRAM_ALIGN
DGRAM, DGRAM_ALIGN = struct.Struct("=QIB3x112s"), 128
#: struct colo_owner: taken, since_ns, key
OWNER = struct.Struct("=QQ40s")
#: struct colo_ctl: Ethernet header, op, punt_seq, key, what CTL_OFFLOAD sets (OFFLOAD), since_ns
CTL = struct.Struct("=14xHI40s233sQ")
#: struct colo_client: seen_ns, ifindex, pad
CLIENT = struct.Struct("=QII")
#: in CFG_GUEST_MAC, above the 48 bits of the address
MAC_KNOWN, MAC_ALL = 1 << 48, 1 << 49
#: struct colo_address: ip (IPv4 mapped), vlan (host order)
ADDRESS = struct.Struct("=16sI")
#: struct colo_claim: seen_ns, mac, epoch, flags
CLAIM = struct.Struct("=QQII")
CLAIM_SAYS_ROUTER, CLAIM_ROUTER = 1, 2
#: part of struct colo_ctl: epoch, released, p_ack, s_ack, adv_ack, p_win, s_win, adv_win, mss,
#: next, base_seq, leader, ack_pending, l4, doff, scaled, hdr, cookie
OFFLOAD = struct.Struct("=IIIIIHHHHIIBBBBB128s64s")
#: bytes of a buffer's ring, and where it begins in struct colo_buffer
BUFFER, BUFFER_BEFORE = 512 * 1024, 64
BUFFER_SLACK = 2 * 4096 + 128


class CtlOp(IntEnum):
    """Operations of the program offload_ctl."""

    RECLAIM = 1
    OFFLOAD = 2
    FREE = 3
    CLAIM = 4


class CtlResult(IntEnum):
    """Results of the program offload_ctl."""

    DONE = 0
    REFUSED = 1
    BUSY = 2
    UNKNOWN = 3
    FULL = 4
