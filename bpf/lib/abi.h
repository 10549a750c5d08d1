/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Shapes and numbers that the BPF programs and the Python controller share.
 * colo_xdp/abi.py mirrors them; tests/unit/test_abi.py parses this file and
 * fails when the two differ. Change COLO_ABI with every change of a shape.
 */
#ifndef COLO_ABI_H
#define COLO_ABI_H

#define COLO_ABI 6

/* skb->mark of a frame that the controller has let go, or that the mirror put
 * on the tap: it was decided elsewhere. Guests cannot set it (tun clears it). */
#define COLO_MARK 0xC0105EEDu

/*
 * Peer link framing: one 802.1ad tag in front of the guest's own frame, so
 * that GSO and partial checksums survive any L2 device. TCI = kind << 13 | epoch.
 */
#define COLO_TPID	 0x88A8
#define COLO_EPOCH_MASK	 0x0FFFu
#define COLO_KIND_SHIFT	 13
#define COLO_KIND_MIRROR 1u /* a client's frame, for the SVM */
#define COLO_KIND_SVM	 2u /* the SVM's output, for comparison */
#define COLO_KIND_SYN	 3u /* a SYN of the PVM: tells its ISN, and reaches no guest */

/* What the data path does; config[CFG_MODE]. */
enum colo_mode {
	MODE_DROP = 0,	     /* fenced: nothing leaves the guest, nothing reaches the SVM */
	MODE_BYPASS = 1,     /* primary only: PVM alone, frames pass, nothing mirrored */
	MODE_RUN = 2,	     /* protected */
	MODE_CHECKPOINT = 3, /* every frame goes to user space with its timestamp */
	MODE_TAKEOVER = 4,   /* secondary only: the SVM speaks to the network */
};

/* Slots of the `config` array (u64 each: one slot is read and written whole). */
enum colo_cfg {
	CFG_ABI = 0,
	CFG_MODE = 1,
	CFG_EPOCH = 2,
	CFG_TAP = 3,	       /* ifindex of the guest's tap */
	CFG_PEER = 4,	       /* ifindex of the peer link */
	CFG_CONTROLLER_NS = 5, /* CLOCK_MONOTONIC of the controller's last sign of life */
	CFG_LOSS_NS = 6,       /* the controller is lost after so many ns */
	CFG_LOSS_POLICY = 7,   /* enum colo_loss_policy */
	CFG_UNMIRRORED = 8,    /* 1: look into `unmirrored` */
	CFG_SHADOW = 9,	       /* user space's: 1 + epoch in which the PVM spoke uncompared */
	CFG_OFFLOAD = 10,      /* 1: verdicts in the kernel (offload/offload.h) */
	CFG_OFFLOAD_SINCE =
		11, /* user space's: what offload/offload.h knew in older epochs is void */
	CFG_UPLINK =
		12, /* by which the fast path releases: ifindex, or UPLINK_*; see lib/egress.h */
	CFG_LEASE_EXPIRY_NS = 13, /* CLOCK_BOOTTIME at which the guest falls silent (COLO_LEASE) */
	CFG_ORDER =
		16, /* user space's: when a person asked for a failover, see datapath/datapath.py */
	CFG_ROLE = 17, /* user space's: enum colo_role; 0: as configured */
	CFG_PROMOTED_EPOCH =
		18,	     /* primary: offsets of this epoch are the guest's for good; 0: none */
	CFG_SYNC_STATE = 19, /* user space's: enum colo_bond */
	CFG_GUEST_MAC = 24,  /* MAC_*, and mac_key() of lib/addresses.h; 0: not known yet */
	CFG_UNDECIDED = 26,  /* user space's: 1: nobody has said yet that this guest may speak */
	CFG_PEER_STOPPED = 27, /* user space's: until when the peer is away on purpose, ns */
	CFG_MAX = 32,
};

/* Which guest this host runs, when that is no longer what the configuration says. */
enum colo_role {
	ROLE_CONFIGURED = 0,
	ROLE_PRIMARY = 1,
	ROLE_SECONDARY = 2,
};

/* colo_flow.epoch of an offset that checkpoints do not end: the PVM itself has it. */
#define COLO_EPOCH_BASE 0xFFFFFFFFu

#define UPLINK_BRIDGE  0u	   /* by way of the tap's bridge */
#define UPLINK_LEARNED 0xFFFFFFFFu /* past it, by the port at which the client was last heard */

enum colo_loss_policy {
	LOSS_HOLD = 0,	  /* no controller: the PVM's output is dropped and counted */
	LOSS_RELEASE = 1, /* no controller: it passes uncompared and is counted */
};

/* Programs, as the first index of the counters. */
enum colo_prog {
	PROG_PVM_IN = 0,	/* tap P, toward the guest: mirror */
	PROG_PVM_OUT = 1,	/* tap P, from the guest: capture */
	PROG_SVM_ARRIVAL = 2,	/* peer link at P: the SVM's output */
	PROG_PVM_RELEASE = 3,	/* release tap at P */
	PROG_SVM_IN = 4,	/* peer link at S: mirrored frames */
	PROG_SVM_OUT = 5,	/* tap S, from the guest */
	PROG_SVM_DELIVER = 6,	/* deliver tap at S: frames held over a checkpoint, for the SVM */
	PROG_SVM_FORWARD = 7,	/* forward tap at S: frames held over a checkpoint, for the peer */
	PROG_SVM_NET = 8,	/* tap S, toward the guest: after failover the network's frames */
	PROG_SVM_OUT_XDP = 9,	/* tap S, from the guest, XDP: rewriting for plain taps */
	PROG_OFFLOAD = 10,	/* not a program: why the fast path handed over (R_PUNT_*) */
	PROG_PROMOTED_IN = 11,	/* tap P, toward a guest that has kept its own numbers */
	PROG_PROMOTED_OUT = 12, /* tap P, from it */
	PROG_ADDRESSES =
		13, /* not a program: what lib/addresses.h knows of the guest (R_MAC*, R_ADDR*) */
	PROG_MAX = 14,
};

/* Why a program did what it did: second index of the counters. */
enum colo_reason {
	R_PASS = 0,		     /* let through as it is (bypass, or not ours) */
	R_PASS_MIRRORED = 1,	     /* cloned to the peer link and passed */
	R_PASS_MIRROR_FAILED = 2,    /* passed to the PVM, but the clone was lost */
	R_PUNT = 3,		     /* copied to the event ring */
	R_PASS_RELEASED = 4,	     /* decided elsewhere (COLO_MARK): let through */
	R_PASS_REDIRECTED = 5,	     /* sent on to the other device, untouched */
	R_PASS_REWRITTEN = 6,	     /* sent on with sequence, ack or timestamp numbers moved */
	R_DROP_MODE = 7,	     /* dropped: MODE_DROP */
	R_DROP_ISOLATED = 8,	     /* dropped: not from the mirror, or the SVM has no way out */
	R_DROP_RING_FULL = 9,	     /* event lost, frame dropped */
	R_DROP_TOO_LARGE = 10,	     /* frame beyond the event size, dropped */
	R_DROP_CONTROLLER_LOST = 11, /* dropped: no controller, on_controller_loss = hold */
	R_PASS_CONTROLLER_LOST = 12, /* passed uncompared: on_controller_loss = release */
	R_PASS_FOREIGN = 13,	     /* peer link: carries no tag of ours, left to the host */
	R_NOTE_UNPARSED = 14,	     /* unparsable; handled as bytes, never translated */
	R_PASS_FLOW_TABLE_FULL = 15, /* no room to track: goes untranslated, costs a checkpoint */
	R_DROP_HELPER_FAILED = 16,   /* a kernel helper refused: frame dropped */
	R_DROP_NO_CONFIG = 17,	     /* config slot missing: frame dropped */
	R_PASS_UNMIRRORED = 18,	     /* to the PVM only: the policy says drop-secondary */
	R_OFFLOAD_HELD = 19, /* the fast path: the bytes wait in the kernel for the other guest's */
	R_OFFLOAD_PASSED = 20,	 /* the fast path: equal to what the SVM sent before, let through */
	R_OFFLOAD_RELEASED = 21, /* the fast path: the SVM's frame left as the PVM's */
	R_OFFLOAD_REBUILT = 22,	 /* the fast path: other boundaries, left in new segments */
	R_OFFLOAD_ACKED = 23, /* the fast path: an ack of the PVM left, the SVM has acked as much */
	R_OFFLOAD_DUPLICATE = 24, /* the fast path: dropped, it has told what it had to tell */
	/* of PROG_OFFLOAD: why the fast path gave a connection to user space */
	R_PUNT_MODE = 25,	  /* a checkpoint begins, or an epoch has ended */
	R_PUNT_EXCEPTION = 26,	  /* flags, options or headers that are not plain */
	R_PUNT_OUT_OF_ORDER = 27, /* not the next byte: a hole, or sent again */
	R_PUNT_DIFFERS = 28,	  /* the guests' bytes differ, or their headers' shapes */
	R_PUNT_BUFFER_FULL = 29,  /* more is outstanding than a buffer holds */
	R_PUNT_NO_BUFFER = 30,	  /* no buffer was free */
	R_PUNT_BUSY = 31, /* another CPU kept the connection for too long: this frame only */
	R_PUNT_HELPER_FAILED = 32, /* a kernel helper refused */
	R_DROP_LEASE_EXPIRED = 33, /* dropped: the permission to speak has ended (COLO_LEASE) */
	R_PASS_OTHER_MAC =
		34, /* to the PVM only: the bridge has flooded it, it is for another machine */
	/* of PROG_ADDRESSES */
	R_NOTE_MACS_FULL = 35,	    /* no room to note a MAC of the guest: everything is mirrored */
	R_NOTE_ADDRESSES_FULL = 36, /* no room to note an address of the guest: not announced */
	R_NOTE_MAC_MOVED = 37,	    /* another machine sends with a MAC that was the guest's */
	R_NOTE_ADDRESS_MOVED =
		38, /* another machine says to have an address that was the guest's */
	/* dropped: its checksum or segmentation cannot be carried (lib/gso.h) */
	R_DROP_GSO_UNSUPPORTED = 39,
	R_DROP_PVM_SYN = 40, /* dropped: a SYN of the PVM has told its ISN */
	R_DROP_PVM_SYN_UNKNOWN =
		41, /* dropped: the same, of a connection that is not tracked (any more) */
	/* untranslated: what it acks may be data, and the PVM's SYN was lost */
	R_PASS_OFFSET_UNKNOWN = 42,
	R_NOTE_MPTCP_REMOVED = 43, /* beside the verdict: MP_CAPABLE was taken out of a SYN */
	R_MAX = 44,
};

enum colo_source {
	SRC_PVM = 0,	/* the PVM's output */
	SRC_SVM = 1,	/* the SVM's output (at P: from the peer link; at S: from the tap) */
	SRC_CLIENT = 2, /* at S: a mirrored frame for the SVM */
};

#define EV_PARTIAL 1u /* TCP's or UDP's checksum holds the pseudo header's sum only */
#define EV_VLAN	   2u /* vlan_tci/vlan_proto were in the skb's metadata */
/* Another checksum, at csum_start + csum_offset, is to be completed by user space. */
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
	__u32 punt_seq; /* colo_conn.punt_seq of this frame; 0: not of a connection of offload/offload.h */
	__u16 csum_start; /* EV_UNSUMMED: from the start of `frame`; as virtio_net_hdr's */
	__u8 csum_offset;
	__u8 gso_type; /* virtio_net_hdr's; 0: no GSO, or not known here */
};

struct colo_count {
	__u64 packets;
	__u64 bytes;
};

/* A tracked connection of the SVM, from the guest's point of view; network byte order.
 * IPv4 addresses are v4-mapped (RFC 4291 2.5.5.2), so there is one key type. */
struct colo_flow_key {
	__be32 guest[4];
	__be32 client[4];
	__be16 guest_port;
	__be16 client_port;
	__be32 vlan; /* VIDs of up to two tags, outer << 16 | inner, none of a priority tag; host order */
};

/* In colo_flow_key.vlan of a flow of `conns`, in a bit that no VID uses: UDP, not TCP. */
#define COLO_KEY_UDP 0x80000000u

/* A flow whose clients' frames the SVM does not get. */
struct colo_unmirrored_key {
	struct colo_flow_key ends;
	__u32 proto;
};

/* Bits of colo_flow.have: what the guest's segments have told. */
#define FLOW_HAVE_ISN_S 2u /* the SVM's ISN is known */
#define FLOW_HAVE_TS_S	8u
#define FLOW_FIN_GUEST	16u  /* fin_guest is set */
#define FLOW_EARLY	128u /* in both: sent bytes on a SYN, or before the offset was known */
/* Bits of colo_flow.have_client: what the client's segments have told. */
#define FLOW_HAVE_ISN_P 1u /* the PVM's ISN is known */
#define FLOW_HAVE_TS_P	4u
#define FLOW_FIN_CLIENT 32u /* fin_client is set */
#define FLOW_HAVE_ISN_C 64u /* the client's ISN is known */
/* Bits of colo_flow.have_pvm: what the PVM's SYN has told. */
#define FLOW_PVM_SYN 1u /* pvm_isn */
#define FLOW_PVM_ACK 2u /* pvm_c: it was a SYN-ACK */
#define FLOW_PVM_TS  4u /* pvm_ts */

struct colo_flow {
	__u64 seen_ns; /* CLOCK_MONOTONIC of the last segment, to the second */
	__u32 epoch;   /* offsets count only while this is config[CFG_EPOCH] */
	__u32 off;     /* ISN_S - ISN_P; 0 until both are known */
	__u32 tsoff;   /* TSval_S - TSval_P; 0 until both are known */
	__u32 isn_p;
	__u32 isn_s;
	__u32 ts_p;
	__u32 ts_s;
	__u32 fin_guest;  /* sequence number after the guest's FIN, the SVM's space */
	__u32 fin_client; /* sequence number after the client's FIN */
	__u8 state;	  /* enum colo_tcp_state */
	__u8 have;	  /* FLOW_*, written by the guest's side only; see bpf/lib/conntrack.h */
	__u8 have_client; /* FLOW_*, written by the client's side only */
	__u8 have_pvm;	  /* FLOW_PVM_*, written as are the words below by COLO_KIND_SYN only */
	__u32 isn_c;	  /* the client's ISN: tells a repeated SYN from another connection */
	__u32 pvm_isn;	  /* of the PVM's newest SYN or SYN-ACK, of whatever connection */
	__u32 pvm_c;	  /* the client's ISN that it acks */
	__u32 pvm_ts;	  /* TSval of the first that had this ISN */
};

#define OWNER_USER   0u
#define OWNER_KERNEL 1u
#define SIDE_PVM     0u
#define SIDE_SVM     1u

#define CLIENT_ACK_KNOWN (1ULL << 32)

/* A connection that the kernel may decide on; key: struct colo_flow_key. Host byte order.
 * All fields but lock and client_ack are read and written under `lock` only; see offload/offload.h. */
struct colo_conn {
	__u64 lock;	/* 1: somebody works on it */
	__u64 since_ns; /* since when anything is outstanding; 0: nothing is */
	__u64 seen_ns;
	__u64 client_ack; /* CLIENT_ACK_KNOWN | the client's latest ack; pvm_in writes it, unlocked */
	__u32 owner;	  /* OWNER_* */
	__u32 epoch;	  /* of the words below; another one is a reason to hand over; 0: void */
	__u32 released;	  /* next byte to be released; all below has been */
	__u32 next;	  /* rel..next: bytes of one side, in the buffer */
	__u32 base_seq;	  /* sequence number of the buffer's first byte */
	__u32 buffer;	  /* 1 + index, 0: none */
	__u32 punt_seq;	  /* frames handed to user space, each event has its number */
	__u32 p_ack;	  /* the PVM's newest ack */
	__u32 s_ack;	  /* the SVM's */
	__u32 adv_ack;	  /* as the client has been told */
	__u16 p_win;	  /* window fields, not scaled */
	__u16 s_win;
	__u16 adv_win;
	__u16 mss;   /* payload of the PVM's segments, as it sends them now; 0: it has not yet */
	__u8 leader; /* SIDE_*: whose the buffer's bytes are */
	__u8 ack_pending; /* the PVM has acked more than the client was told */
	__u8 l4;	  /* of hdr: where TCP begins; 0: no header yet */
	__u8 doff;	  /* of hdr: length of TCP's header */
	__u8 punt_reason; /* R_PUNT_* of the last one */
	__u8 fin_known;
	__u8 pad[2];
	__u32 fin; /* sequence number behind the FIN, of one guest (rel..next) or of both */
	__u32 pad2;
	__u8 hdr[128];	 /* the PVM's newest header, Ethernet to TCP options */
	__u8 cookie[64]; /* user space's */
};

/* A datagram that waits; its payload follows. Records begin at multiples of DGRAM_ALIGN, so that a
 * head lies in one piece. Host byte order. */
#define DGRAM_ALIGN 128u
struct colo_dgram {
	__u64 ts_ns;  /* CLOCK_MONOTONIC of its arrival */
	__u32 len;    /* bytes of payload */
	__u8 partial; /* its checksum is the pseudo header's sum */
	__u8 pad[3];
	__u8 hdr[112]; /* Ethernet, IP and UDP header: 42 bytes, or 62 */
};

/* Who has a buffer. taken: 0 or 1, changed by compare and swap. */
struct colo_owner {
	__u64 taken;
	__u64 since_ns; /* as colo_conn.since_ns, for user space to look for what is overdue */
	struct colo_flow_key key;
};

/* Where a client was last heard; key: its MAC address in the low bytes of a __u64. */
struct colo_client {
	__u64 seen_ns; /* CLOCK_MONOTONIC, to 1/16 of CLIENT_FRESH_NS */
	__u32 ifindex; /* a port of the tap's bridge */
	__u32 pad;
};

/* Of config[CFG_GUEST_MAC]. */
#define MAC_BITS  0xFFFFFFFFFFFFULL  /* the address that QEMU or the configuration has told */
#define MAC_KNOWN 0x1000000000000ULL /* it is one */
#define MAC_ALL	  0x2000000000000ULL /* `macs` is full: mirror whatever comes */

/* An address of the guest. */
struct colo_address {
	__be32 ip[4]; /* IPv4 is v4-mapped */
	__u32 vlan;   /* VIDs of up to two tags, outer << 16 | inner, as an announcement has them */
};

/* What the guest has said of it; of a MAC address: that it sends with it. */
struct colo_claim {
	__u64 seen_ns; /* CLOCK_MONOTONIC */
	__u64 mac;     /* mac_key() */
	__u32 epoch;   /* config[CFG_EPOCH], or the one to come */
	__u32 flags;   /* CLAIM_* */
};

#define CLAIM_SAYS_ROUTER 1u /* it has said whether it is a router (RFC 4861 4.2, 4.4) */
#define CLAIM_ROUTER	  2u /* it is */

/* Operations of offload_ctl, which user space runs by BPF_PROG_TEST_RUN. */
enum colo_ctl_op {
	CTL_RECLAIM = 1, /* to OWNER_USER; the words stay as they are */
	CTL_OFFLOAD = 2, /* to OWNER_KERNEL, if no frame has been captured since */
	CTL_FREE = 3,  /* the words and the buffer of a reclaimed connection have been read: void */
	CTL_CLAIM = 4, /* a buffer, for what is outstanding when the connection is given */
};

/* What offload_ctl returns. */
enum colo_ctl_result {
	CTL_DONE = 0,
	CTL_REFUSED =
		1,    /* GIVE: frames are on their way to user space; FREE: the fast path has it */
	CTL_BUSY = 2, /* the connection stayed locked */
	CTL_UNKNOWN = 3, /* no such connection */
	CTL_FULL = 4,	 /* CLAIM: no buffer is free; GIVE: there is none */
};

/* RFC 9293 3.3.2, as seen from the guest. */
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

/* What a segment means to the connection; column of the transition table. */
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
	EV_GUEST_DATA = 9, /* anything without SYN, FIN, RST */
	EV_GUEST_FIN = 10,
	EV_GUEST_RST = 11,
	EV_TCP_MAX = 12,
};

#endif
