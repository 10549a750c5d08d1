/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Data structures and constants shared by the BPF programs and the Python controller.
 * colo_xdp/abi.py mirrors them; tests/unit/test_abi.py parses this file and fails when the two
 * differ. Change COLO_ABI whenever a structure changes.
 */
#ifndef COLO_ABI_H
#define COLO_ABI_H

#define COLO_ABI 9

/*
 * skb->mark of a frame that has been decided elsewhere: the controller released it, or the mirror
 * put it on the tap. Guests cannot set it, since tun clears it.
 */
#define COLO_MARK 0xC0105EEDu

/*
 * Peer link framing: one 802.1ad tag in front of the guest's own frame, so that GSO and partial
 * checksums survive any L2 device. TCI = kind << 13 | epoch.
 */
#define COLO_TPID	 0x88A8
#define COLO_EPOCH_MASK	 0x0FFFu
#define COLO_KIND_SHIFT	 13
#define COLO_KIND_MIRROR 1u /* a client's frame, for the SVM */
#define COLO_KIND_SVM	 2u /* the SVM's output, for comparison */
#define COLO_KIND_SYN	 3u /* a SYN of the PVM: carries its ISN, reaches no guest */

/* Mode of the data path; config[CFG_MODE]. */
enum colo_mode {
	MODE_DROP = 0,	     /* fenced: nothing leaves the guest, nothing reaches the SVM */
	MODE_BYPASS = 1,     /* primary only: PVM alone, frames pass, nothing is mirrored */
	MODE_RUN = 2,	     /* protected */
	MODE_CHECKPOINT = 3, /* every frame goes to user space with its timestamp */
	MODE_TAKEOVER = 4,   /* secondary only: the SVM is on the network */
};

/* Slots of the `config` array; u64 each, so that one slot is read and written whole. */
enum colo_cfg {
	CFG_ABI = 0,
	CFG_MODE = 1,
	CFG_EPOCH = 2,
	CFG_TAP = 3,	       /* ifindex of the guest's tap */
	CFG_PEER = 4,	       /* ifindex of the peer link */
	CFG_CONTROLLER_NS = 5, /* CLOCK_MONOTONIC ns: renewed by the live controller */
	CFG_LOSS_NS = 6,       /* ns without renewal after which the controller is lost */
	CFG_LOSS_POLICY = 7,   /* enum colo_loss_policy */
	CFG_UNMIRRORED = 8,    /* 1: look flows up in `unmirrored` */
	CFG_SHADOW = 9,	       /* user space's: 1 + epoch in which the PVM transmitted uncompared */
	CFG_OFFLOAD = 10,      /* 1: the fast path is on (offload/offload.h) */
	CFG_OFFLOAD_SINCE = 11,	  /* user space's: fast path state of older epochs is void */
	CFG_UPLINK = 12,	  /* egress of the fast path: ifindex or UPLINK_* (lib/egress.h) */
	CFG_LEASE_EXPIRY_NS = 13, /* CLOCK_BOOTTIME ns at which the lease expires (COLO_LEASE) */
	CFG_ORDER = 16, /* user space's: time of the last operator request for a failover */
	CFG_ROLE = 17,	/* user space's: enum colo_role; 0: as configured */
	CFG_PROMOTED_EPOCH = 18, /* primary: offsets of this epoch are permanent; 0: none */
	CFG_SYNC_STATE = 19,	 /* user space's: the sync state */
	CFG_GUEST_MAC = 24,	 /* MAC_* and mac_key() of lib/addresses.h; 0: not known yet */
	/* user space's: 1: it is still undecided whether this guest may transmit */
	CFG_UNDECIDED = 26,
	CFG_PEER_STOPPED = 27, /* user space's: until when the peer is stopped on purpose, ns */
	CFG_DISKS_WHOLE = 28,  /* user space's: last epoch whose disks are whole on this host */
	/* secondary: CLOCK_MONOTONIC ns until which MODE_TAKEOVER still takes mirrored frames */
	CFG_MIRRORED_UNTIL_NS = 29,
	CFG_MAX = 32,
};

/* Which guest this host runs, once that differs from the configuration. */
enum colo_role {
	ROLE_CONFIGURED = 0,
	ROLE_PRIMARY = 1,
	ROLE_SECONDARY = 2,
};

/* colo_flow.epoch of a permanent offset, which checkpoints do not end: the PVM itself has it. */
#define COLO_EPOCH_BASE 0xFFFFFFFFu

#define UPLINK_BRIDGE  0u	   /* through the tap's bridge */
#define UPLINK_LEARNED 0xFFFFFFFFu /* directly, by the port at which the client was last seen */

enum colo_loss_policy {
	LOSS_HOLD = 0,	  /* no controller: the PVM's output is dropped and counted */
	LOSS_RELEASE = 1, /* no controller: it passes uncompared and is counted */
};

/* Programs: the first index of the counters. */
enum colo_prog {
	PROG_PVM_IN = 0,      /* tap P, toward the guest: mirror */
	PROG_PVM_OUT = 1,     /* tap P, from the guest: capture */
	PROG_SVM_ARRIVAL = 2, /* peer link at P: the SVM's output */
	PROG_PVM_RELEASE = 3, /* release tap at P */
	PROG_SVM_IN = 4,      /* peer link at S: mirrored frames */
	PROG_SVM_OUT = 5,     /* tap S, from the guest */
	PROG_SVM_DELIVER = 6, /* deliver tap at S: frames for the SVM, held during a checkpoint */
	/* forward tap at S: frames for the peer, held during a checkpoint */
	PROG_SVM_FORWARD = 7,
	PROG_SVM_NET = 8,	/* tap S, toward the guest: after failover, the network's frames */
	PROG_SVM_OUT_XDP = 9,	/* tap S, from the guest, XDP: rewriting on plain taps */
	PROG_OFFLOAD = 10,	/* not a program: why the fast path handed over (R_PUNT_*) */
	PROG_PROMOTED_IN = 11,	/* tap P, toward a guest that has kept its own numbers */
	PROG_PROMOTED_OUT = 12, /* tap P, from such a guest */
	PROG_ADDRESSES = 13,	/* not a program: notes of lib/addresses.h (R_NOTE_*) */
	PROG_MAX = 14,
};

/* Outcome and its reason: the second index of the counters. */
enum colo_reason {
	R_PASS = 0,		  /* passed unchanged (bypass, or not ours) */
	R_PASS_MIRRORED = 1,	  /* cloned to the peer link and passed */
	R_PASS_MIRROR_FAILED = 2, /* passed to the PVM, but the clone was lost */
	R_PUNT = 3,		  /* captured: copied to the event ring, for the controller */
	R_PASS_RELEASED = 4,	  /* passed: decided elsewhere (COLO_MARK) */
	R_PASS_REDIRECTED = 5,	  /* redirected to the other device, unchanged */
	/* redirected with sequence, ack or timestamp numbers rewritten */
	R_PASS_REWRITTEN = 6,
	/* dropped: the data path is shut (MODE_DROP), or its mode has no use for the frame */
	R_DROP_MODE = 7,
	R_DROP_ISOLATED = 8,	     /* dropped: not from the mirror, or the SVM has no way out */
	R_DROP_RING_FULL = 9,	     /* dropped: the event ring was full */
	R_DROP_TOO_LARGE = 10,	     /* dropped: the frame exceeds the event size */
	R_DROP_CONTROLLER_LOST = 11, /* dropped: no controller, on_controller_loss = hold */
	R_PASS_CONTROLLER_LOST = 12, /* passed uncompared: on_controller_loss = release */
	R_PASS_FOREIGN = 13,	     /* peer link: has none of our tags, left to the host */
	R_NOTE_UNPARSED = 14,	     /* cannot be parsed: treated as bytes, never translated */
	R_PASS_FLOW_TABLE_FULL = 15, /* no room to track: passes untranslated, costs a checkpoint */
	R_DROP_HELPER_FAILED = 16,   /* dropped: a kernel helper failed */
	R_DROP_NO_CONFIG = 17,	     /* dropped: a slot of the config map is missing */
	R_PASS_UNMIRRORED = 18,	     /* to the PVM only: a drop-secondary policy */
	R_OFFLOAD_HELD = 19,	     /* fast path: bytes wait in the kernel for the other guest's */
	R_OFFLOAD_PASSED = 20,	     /* fast path: equal to what the SVM sent before, passed */
	R_OFFLOAD_RELEASED = 21,     /* fast path: the SVM's frame left as the PVM's */
	R_OFFLOAD_REBUILT = 22,	  /* fast path: segment boundaries differ, left in new segments */
	R_OFFLOAD_ACKED = 23,	  /* fast path: an ack of the PVM left, the SVM has acked as much */
	R_OFFLOAD_DUPLICATE = 24, /* fast path: dropped, it has nothing new */
	/* PROG_OFFLOAD: why the fast path handed a connection over */
	R_PUNT_MODE = 25,	   /* a checkpoint begins or an epoch has ended */
	R_PUNT_EXCEPTION = 26,	   /* flags, options or headers are not plain */
	R_PUNT_OUT_OF_ORDER = 27,  /* not the next byte: a gap, or a retransmission */
	R_PUNT_DIFFERS = 28,	   /* the guests' bytes differ, or the form of their headers */
	R_PUNT_BUFFER_FULL = 29,   /* more is outstanding than a buffer holds */
	R_PUNT_NO_BUFFER = 30,	   /* no buffer was free */
	R_PUNT_BUSY = 31,	   /* another CPU held the lock for too long: this frame only */
	R_PUNT_HELPER_FAILED = 32, /* a kernel helper failed */
	R_DROP_LEASE_EXPIRED = 33, /* dropped: the lease has expired (COLO_LEASE) */
	R_PASS_OTHER_MAC = 34,	   /* to the PVM only: flooded by the bridge, for another machine */
	/* PROG_ADDRESSES */
	R_NOTE_MACS_FULL = 35,	    /* no room for a MAC of the guest: everything is mirrored */
	R_NOTE_ADDRESSES_FULL = 36, /* no room for an address of the guest: not announced */
	R_NOTE_MAC_MOVED = 37,	    /* another machine sends from a MAC that was the guest's */
	R_NOTE_ADDRESS_MOVED = 38,  /* another machine claims an address that was the guest's */
	/* Dropped: its checksum or segmentation cannot be carried over (lib/gso.h). */
	R_DROP_GSO_UNSUPPORTED = 39,
	R_DROP_PVM_SYN = 40,	     /* dropped: a SYN of the PVM, its ISN has been noted */
	R_DROP_PVM_SYN_UNKNOWN = 41, /* dropped: a SYN of the PVM for an untracked connection */
	/* Passed untranslated: what it acks may be data, and the PVM's SYN was lost. */
	R_PASS_OFFSET_UNKNOWN = 42,
	R_NOTE_MPTCP_REMOVED =
		43, /* counted besides the verdict: MP_CAPABLE was removed from a SYN */
	/* dropped: mirrored, but this guest has taken over and has its clients' frames itself */
	R_DROP_PROMOTED = 44,
	/* counted besides the verdict: the client's window was lowered (offload/ahead.h) */
	R_NOTE_WINDOW_LIMITED = 45,
	R_MAX = 46,
};

enum colo_source {
	SRC_PVM = 0,	/* the PVM's output */
	SRC_SVM = 1,	/* the SVM's output (at P: from the peer link; at S: from the tap) */
	SRC_CLIENT = 2, /* at S: a mirrored frame for the SVM */
};

#define EV_PARTIAL 1u /* TCP's or UDP's checksum holds only the pseudo header's sum */
#define EV_VLAN	   2u /* vlan_tci and vlan_proto come from the skb's metadata */
/* User space must complete another checksum, at csum_start + csum_offset. */
#define EV_UNSUMMED 4u

/* Head of each event; the frame's bytes follow. Host byte order. */
struct colo_event {
	__u64 ts_ns; /* CLOCK_MONOTONIC */
	__u32 len;   /* bytes of the frame that follow */
	__u32 epoch; /* SVM frames at P: epoch of the tag; else config[CFG_EPOCH] */
	__u16 gso_size;
	__u16 vlan_tci;
	__u16 vlan_proto; /* network byte order, as the kernel keeps it */
	__u8 source;	  /* enum colo_source */
	__u8 flags;	  /* EV_* */
	__u32 punt_seq;	  /* colo_conn.punt_seq of this frame; 0: not of an offloaded connection */
	__u16 csum_start; /* EV_UNSUMMED: from the start of the frame; as in virtio_net_hdr */
	__u8 csum_offset;
	__u8 gso_type; /* as in virtio_net_hdr; 0: no GSO, or not known here */
};

struct colo_count {
	__u64 packets;
	__u64 bytes;
};

/*
 * Key of a tracked connection of the SVM, as seen from the guest. Network byte order. IPv4
 * addresses are v4-mapped (RFC 4291 section 2.5.5.2), so there is one key type.
 */
struct colo_flow_key {
	__be32 guest[4];
	__be32 client[4];
	__be16 guest_port;
	__be16 client_port;
	/* Host order: VIDs of up to two tags, outer << 16 | inner; a priority tag has none. */
	__be32 vlan;
};

/* Bit of colo_flow_key.vlan in the keys of `conns`, one that no VID uses: UDP, not TCP. */
#define COLO_KEY_UDP 0x80000000u

/* A flow whose client frames are not mirrored to the SVM. */
struct colo_unmirrored_key {
	struct colo_flow_key ends;
	__u32 proto;
};

/* Bits of colo_flow.have: what the guest's segments have shown. */
#define FLOW_HAVE_ISN_S 2u /* the SVM's ISN is known */
#define FLOW_HAVE_TS_S	8u
#define FLOW_FIN_GUEST	16u  /* fin_guest is set */
#define FLOW_EARLY	128u /* in both: sent data on a SYN, or before the offset was known */
/* Bits of colo_flow.have_client: what the client's segments have shown. */
#define FLOW_HAVE_ISN_P 1u /* the PVM's ISN is known */
#define FLOW_HAVE_TS_P	4u
#define FLOW_FIN_CLIENT 32u /* fin_client is set */
#define FLOW_HAVE_ISN_C 64u /* the client's ISN is known */
/* Bits of colo_flow.have_pvm: what the PVM's SYN has shown. */
#define FLOW_PVM_SYN 1u /* pvm_isn is valid */
#define FLOW_PVM_ACK 2u /* pvm_c is valid: it was a SYN-ACK */
#define FLOW_PVM_TS  4u /* pvm_ts is valid */

struct colo_flow {
	__u64 seen_ns; /* CLOCK_MONOTONIC of the last segment, to the second */
	__u32 epoch;   /* offsets are valid only while this is config[CFG_EPOCH] */
	__u32 off;     /* ISN_S - ISN_P; 0 until both are known */
	__u32 tsoff;   /* TSval_S - TSval_P; 0 until both are known */
	__u32 isn_p;
	__u32 isn_s;
	__u32 ts_p;
	__u32 ts_s;
	__u32 fin_guest;  /* sequence number after the guest's FIN, in the SVM's numbers */
	__u32 fin_client; /* sequence number after the client's FIN */
	__u8 state;	  /* enum colo_tcp_state */
	__u8 have;	  /* FLOW_*; only the guest's side writes it, see lib/conntrack.h */
	__u8 have_client; /* FLOW_*; only the client's side writes it */
	__u8 have_pvm;	  /* FLOW_PVM_*; like pvm_*, only COLO_KIND_SYN frames set it */
	__u32 isn_c;	  /* the client's ISN: tells a repeated SYN from a new connection */
	__u32 pvm_isn;	  /* of the PVM's newest SYN or SYN-ACK, whatever its connection */
	__u32 pvm_c;	  /* the client's ISN that it acks */
	__u32 pvm_ts;	  /* TSval of the first SYN with this ISN */
};

#define OWNER_USER   0u
#define OWNER_KERNEL 1u
#define SIDE_PVM     0u
#define SIDE_SVM     1u

#define CLIENT_ACK_KNOWN (1ULL << 32)

/* In place of a shift count: pvm_in has not looked yet; there is none. */
#define SHIFT_UNKNOWN 254u
#define SHIFT_NONE    255u

/*
 * A connection that the kernel may decide on; key: struct colo_flow_key. Host byte order. All
 * fields except lock, client_ack and shift are read and written only under `lock`; see
 * offload/offload.h.
 */
struct colo_conn {
	__u64 lock;	/* 1: taken */
	__u64 since_ns; /* since when anything is outstanding; 0: nothing is */
	__u64 seen_ns;
	/* CLIENT_ACK_KNOWN | the client's latest ack; pvm_in writes it without the lock */
	__u64 client_ack;
	__u32 owner; /* OWNER_* */
	/* of the fields below; if it is not the current one: hand over; 0: void */
	__u32 epoch;
	__u32 released; /* next byte to release; everything below has been released */
	__u32 next;	/* released..next: bytes of one guest, in the buffer */
	__u32 base_seq; /* sequence number of the buffer's first byte */
	__u32 buffer;	/* 1 + index; 0: none */
	__u32 punt_seq; /* number of the last frame captured; each event carries its own */
	__u32 p_ack;	/* the PVM's newest ack */
	__u32 s_ack;	/* the SVM's newest ack */
	__u32 adv_ack;	/* as advertised to the client */
	__u16 p_win;	/* window fields, unscaled */
	__u16 s_win;
	__u16 adv_win;
	__u16 mss;	  /* payload of the PVM's segments, as it sends now; 0: none yet */
	__u8 leader;	  /* SIDE_*: whose bytes are in the buffer */
	__u8 ack_pending; /* the PVM has acked more than has been advertised */
	__u8 l4;	  /* of hdr: offset of the TCP header; 0: no header yet */
	__u8 doff;	  /* of hdr: length of the TCP header */
	__u8 punt_reason; /* R_PUNT_* of the last punt */
	__u8 fin_known;
	__u8 shift;    /* of the client's windows, or SHIFT_*; pvm_in writes it without the lock */
	__u8 doubted;  /* a retransmission has been doubted since user space handed it over */
	__u32 fin;     /* sequence number after the FIN of one guest (in released..next) or both */
	__u32 begun;   /* `released` when user space handed it over */
	__u8 hdr[128]; /* the PVM's newest header, Ethernet to TCP options */
	__u8 cookie[64]; /* for user space */
};

/*
 * A waiting datagram; its payload follows. Records start at multiples of DGRAM_ALIGN, so that a
 * record's head never wraps. Host byte order.
 */
#define DGRAM_ALIGN 128u
struct colo_dgram {
	__u64 ts_ns;  /* CLOCK_MONOTONIC of its arrival */
	__u32 len;    /* bytes of payload */
	__u8 partial; /* its checksum is the pseudo header's sum */
	__u8 pad[3];
	__u8 hdr[112]; /* Ethernet, IP and UDP headers: 42 or 62 bytes */
};

/* Owner of a buffer. taken: 0 or 1, changed by compare and swap. */
struct colo_owner {
	__u64 taken;
	__u64 since_ns; /* as colo_conn.since_ns, for user space to find overdue bytes */
	struct colo_flow_key key;
};

/* Where a client was last seen; key: its MAC address in the low bytes of a __u64. */
struct colo_client {
	__u64 seen_ns; /* CLOCK_MONOTONIC, to 1/16 of CLIENT_FRESH_NS */
	__u32 ifindex; /* a port of the tap's bridge */
	__u32 pad;
};

/* Contents of config[CFG_GUEST_MAC]. */
#define MAC_BITS  0xFFFFFFFFFFFFULL  /* the address that QEMU or the configuration gives */
#define MAC_KNOWN 0x1000000000000ULL /* the address is known */
#define MAC_ALL	  0x2000000000000ULL /* `macs` is full: mirror everything */

/* An address of the guest. */
struct colo_address {
	__be32 ip[4]; /* IPv4 is v4-mapped */
	__u32 vlan;   /* VIDs of up to two tags, outer << 16 | inner, as an announcement has them */
};

/* What the guest has claimed about an address; for a MAC address: that it sends from it. */
struct colo_claim {
	__u64 seen_ns; /* CLOCK_MONOTONIC */
	__u64 mac;     /* mac_key() */
	__u32 epoch;   /* config[CFG_EPOCH], or the next one */
	__u32 flags;   /* CLAIM_* */
};

#define CLAIM_SAYS_ROUTER 1u /* it has stated whether it is a router (RFC 4861 sections 4.2, 4.4) */
#define CLAIM_ROUTER	  2u /* it is a router */

/* Operations of offload_ctl, which user space runs through BPF_PROG_TEST_RUN. */
enum colo_ctl_op {
	CTL_RECLAIM = 1, /* to OWNER_USER; the state stays as it is */
	CTL_OFFLOAD = 2, /* to OWNER_KERNEL, if no frame has been captured since */
	CTL_FREE = 3,	 /* state and buffer of a reclaimed connection have been read: void them */
	CTL_CLAIM = 4,	 /* get a buffer for what is outstanding when the connection is offloaded */
};

/* Results of offload_ctl. */
enum colo_ctl_result {
	CTL_DONE = 0,
	CTL_REFUSED =
		/* OFFLOAD: frames are on their way to user space; FREE: the fast path owns it */
	1,
	CTL_BUSY = 2,	 /* the connection stayed locked */
	CTL_UNKNOWN = 3, /* no such connection */
	CTL_FULL = 4,	 /* CLAIM: no buffer is free; OFFLOAD: it has none */
};

/* TCP states of RFC 9293 section 3.3.2, as seen from the guest. */
enum colo_tcp_state {
	TCP_CLOSED = 0,
	TCP_LISTEN = 1,
	TCP_SYN_SENT = 2,
	TCP_SYN_RECEIVED = 3,
	TCP_ESTABLISHED = 4,
	TCP_FIN_WAIT_1 = 5,
	TCP_FIN_WAIT_2 = 6,
	TCP_CLOSE_WAIT = 7,
	TCP_CLOSING = 8,
	TCP_LAST_ACK = 9,
	TCP_TIME_WAIT = 10,
	TCP_STATES = 11,
};

/* What a segment means to the connection: column of the transition table. */
enum colo_tcp_event {
	EV_CLIENT_SYN = 0,
	EV_CLIENT_SYNACK = 1,
	EV_CLIENT_ACK = 2, /* any other segment of the client that carries an ACK */
	EV_CLIENT_FIN = 3,
	EV_CLIENT_FIN_ACK = 4, /* FIN that also acks the guest's FIN */
	EV_CLIENT_ACK_FIN = 5, /* acks the guest's FIN */
	EV_CLIENT_RST = 6,
	EV_GUEST_SYN = 7,
	EV_GUEST_SYNACK = 8,
	EV_GUEST_DATA = 9, /* anything without SYN, FIN or RST */
	EV_GUEST_FIN = 10,
	EV_GUEST_RST = 11,
	EV_TCP_MAX = 12,
};

#endif
