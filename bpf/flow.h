/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Connections of the SVM: which state they are in, and how far the SVM's
 * numbers are from the PVM's. colo_xdp/rewrite.py is the same in Python; a test
 * compares the two packet by packet.
 *
 * Learning. The client only ever sees the PVM's ISN; the SVM's guest chooses
 * its own. The offset is known once both are:
 *
 *   ISN_S  sequence number of the guest's SYN or SYN-ACK
 *   ISN_P  ack - 1 of the client's SYN-ACK (the guest opened), or of its first
 *          ACK (the client opened). That ack is ISN_P + 1 for certain: the PVM's
 *          data leaves only after the SVM has produced it, and for that the SVM
 *          must have seen an ACK through this very place.
 *
 * They may come in either order. Timestamps likewise: TSval of the same guest
 * segment, TSecr of the same client segment.
 *
 * Which segments may teach, since duplicates and leftovers of an older
 * connection carry the same addresses:
 *  - A client's SYN never touches a known offset, for it may be a stray
 *    duplicate. The guest knows: it answers a duplicate with a plain ACK, and a
 *    new connection with a SYN-ACK that acks another client ISN. So the guest's
 *    SYN-ACK decides.
 *  - A SYN-ACK with another ISN for the same client ISN: the guest had given up
 *    and begun again, the PVM had not. ISN_S is replaced, ISN_P stays.
 *  - A SYN-ACK for another client ISN, or a SYN of the guest with another ISN:
 *    a new connection, everything is learnt anew.
 *  - A client's ACK teaches ISN_P only within one unscaled window (64 KiB) of
 *    the client's ISN: all it can have sent before the guest's first ACK.
 *
 * Epochs. A checkpoint makes the SVM a copy of the PVM, so all offsets are 0:
 * the epoch grows and entries of older epochs count as unknown. Only a
 * handshake begins an entry; connections from before need none.
 *
 * An offset can also be the guest's for good (COLO_EPOCH_BASE): a guest that has taken over has
 * its own numbers for the connections of that time, and keeps them as the PVM of the next pair.
 * Then guest_in and guest_out (guest.bpf.c) translate at its tap, so that mirror and comparison
 * see what the client sees, and its clone, the new SVM, has the same offset as long as the
 * connection lives: checkpoints do not end it. No connection has both kinds. A new connection on
 * the key ends the old one's offset, and what is learnt then is of the epoch: so is any handshake
 * in which the guest says an ISN that the entry does not know.
 *
 * TAKEOVER. The SVM speaks to the network itself: new connections need no
 * translation, so no entry begins, and a new connection on an old key ends the
 * old one's translation. A handshake that was under way may still complete:
 * its client may have been told the PVM's ISN.
 *
 * Races. svm_in (softirq) and svm_out (QEMU's thread, or XDP) meet in one value
 * on two CPUs, without a lock: bpf_spin_lock needs BTF that bcc does not make.
 *  - Each word has one writing side: isn_c, isn_p, ts_p, fin_client and
 *    have_client the client's; isn_s, ts_s, fin_guest and have the guest's. A
 *    value is written before its bit.
 *  - The offset is never "fixed by whoever comes last", since both could miss
 *    each other: every segment computes it from the parts. off and tsoff are
 *    copies for the controller to read.
 *  - Exceptions are the starts of a new connection, where one side clears the
 *    other's bits. Those sides are in a causal chain (the guest answers what
 *    svm_in has let through; the client answers what the PVM said after the
 *    SVM), so meeting needs a stray segment at the same instant.
 *  - `state` and `seen_ns` are written by both; the last one wins. They decide
 *    ageing only.
 *  The worst that a lost update does is a wrong or missing offset. Nothing then
 *  reaches a client: the SVM's output does not match, which costs a checkpoint,
 *  and that ends all offsets.
 *  - Entries are never deleted here: a preallocated element is reused at once,
 *    and the other CPU may still write to it. The controller deletes what has
 *    not been seen for a long time.
 */
#ifndef COLO_FLOW_H
#define COLO_FLOW_H

/* key: the connection. Writers: svm_*. Reader: controller, which also deletes. Not an LRU: that
 * would evict a live connection in silence. Full: R_FLOW_TABLE_FULL, the frame goes untranslated. */
BPF_TABLE_PINNED("hash", struct colo_flow_key, struct colo_flow, flows, COLO_MAX_FLOWS,
		 PIN_DIR "/flows");

/* key: state * EV_TCP_MAX + event, value: next state. Writer: controller, once, from the table
 * in colo_xdp/tcp_state.py. */
BPF_TABLE_PINNED("array", u32, u32, transitions, TCP_STATES *EV_TCP_MAX, PIN_DIR "/transitions");

/* seen_ns is renewed only when older than this: the value's cache line is shared by two CPUs. */
#define SEEN_STEP_NS 1000000000ULL

#define LEARN_WINDOW 65535

/* A segment's timestamp option, host order. */
struct tcp_ts {
	u32 there;
	u32 val;
	u32 ecr;
};

/* What to add to numbers that go to the SVM, and to take off those that come from it. */
struct shift {
	u32 off;
	u32 tsoff;
};

/* Another connection: its offset, if there is one, is of this epoch. */
static __always_inline void flow_forget(struct colo_flow *n, u32 epoch)
{
	n->have = 0;
	n->have_client = 0;
	n->state = TCP_CLOSED;
	barrier();
	n->epoch = epoch;
}

static __always_inline void flow_learn_client(struct colo_flow *n, const struct pkt *p,
					      const struct tcp_ts *ts, u64 mode, u32 epoch)
{
	u32 flags = p->flags & (TCP_SYN | TCP_RST | TCP_ACK), learn;

	if (flags == TCP_SYN) {
		if ((n->have & FLOW_HAVE_ISN_S) && (n->have_client & FLOW_HAVE_ISN_P))
			return;
		if ((n->have_client & FLOW_HAVE_ISN_C) && n->isn_c != p->seq) {
			flow_forget(n, epoch);
			if (mode == MODE_TAKEOVER)
				return;
		}
		n->isn_c = p->seq;
		n->have_client |= FLOW_HAVE_ISN_C;
		return;
	}
	if (!(flags & TCP_ACK) || (flags & TCP_RST) || (n->have_client & FLOW_HAVE_ISN_P))
		return;
	if (flags & TCP_SYN)
		learn = (n->have & FLOW_HAVE_ISN_S) &&
			(!(n->have_client & FLOW_HAVE_ISN_C) || n->isn_c == p->seq);
	else
		learn = (n->have_client & FLOW_HAVE_ISN_C) && p->seq - n->isn_c - 1 <= LEARN_WINDOW;
	if (!learn)
		return;
	n->isn_p = p->ack - 1;
	if (flags & TCP_SYN)
		n->isn_c = p->seq;
	if (ts->there) {
		n->ts_p = ts->ecr;
		n->have_client |= FLOW_HAVE_ISN_P | FLOW_HAVE_ISN_C | FLOW_HAVE_TS_P;
	} else {
		n->have_client |= FLOW_HAVE_ISN_P | FLOW_HAVE_ISN_C;
	}
}

static __always_inline void flow_learn_guest(struct colo_flow *n, const struct pkt *p,
					     const struct tcp_ts *ts, u64 mode, u32 epoch)
{
	u32 known = n->have & FLOW_HAVE_ISN_S, other = known && n->isn_s != p->seq, fresh;

	if ((p->flags & (TCP_SYN | TCP_RST)) != TCP_SYN)
		return;
	if (p->flags & TCP_ACK) {
		if (n->have_client & FLOW_HAVE_ISN_C)
			fresh = n->isn_c != p->ack - 1;
		else
			fresh = other;
	} else {
		fresh = other;
	}
	/* What an entry for good holds both guests have; an ISN that it has not is each one's own. */
	if (n->epoch == COLO_EPOCH_BASE && (!known || other))
		fresh = 1;
	if (fresh) {
		flow_forget(n, epoch);
		known = 0;
		if (mode == MODE_TAKEOVER)
			return;
	}
	if ((p->flags & TCP_ACK) && !(n->have_client & FLOW_HAVE_ISN_C)) {
		n->isn_c = p->ack - 1;
		n->have_client |= FLOW_HAVE_ISN_C;
	}
	/* A repeated SYN has a newer TSval, and its answer echoes that one. */
	if (ts->there && (!known || other || !(n->have_client & FLOW_HAVE_TS_P))) {
		n->ts_s = ts->val;
		n->have |= FLOW_HAVE_TS_S;
	}
	n->isn_s = p->seq;
	n->have |= FLOW_HAVE_ISN_S;
}

static __always_inline u32 flow_event(struct colo_flow *n, const struct pkt *p, int to_svm)
{
	u32 flags = p->flags, acks_fin, end = p->seq + p->payload_len + 1;

	if (!to_svm) {
		if (flags & TCP_RST)
			return EV_GUEST_RST;
		if (flags & TCP_SYN)
			return flags & TCP_ACK ? EV_GUEST_SYNACK : EV_GUEST_SYN;
		if (!(flags & TCP_FIN))
			return EV_GUEST_DATA;
		n->fin_guest = end;
		n->have |= FLOW_FIN_GUEST;
		return EV_GUEST_FIN;
	}
	if (flags & TCP_RST)
		return EV_CLIENT_RST;
	if (flags & TCP_SYN)
		return flags & TCP_ACK ? EV_CLIENT_SYNACK : EV_CLIENT_SYN;
	/* Both in the SVM's space: the FIN as the guest sent it, the ack as the guest will see it. */
	acks_fin = (n->have & FLOW_FIN_GUEST) && (flags & TCP_ACK) &&
		   (s32)(p->ack + n->off - n->fin_guest) >= 0;
	if (flags & TCP_FIN) {
		n->fin_client = end;
		n->have_client |= FLOW_FIN_CLIENT;
		return acks_fin ? EV_CLIENT_FIN_ACK : EV_CLIENT_FIN;
	}
	if (!(flags & TCP_ACK))
		return EV_TCP_MAX;
	return acks_fin ? EV_CLIENT_ACK_FIN : EV_CLIENT_ACK;
}

/* The entry, if it counts; begins one if this segment may. */
static __always_inline struct colo_flow *flow_find(const struct pkt *p, int to_svm, u64 mode,
						   u32 epoch, u32 *reason)
{
	u32 flags = p->flags & (TCP_SYN | TCP_RST | TCP_ACK);
	struct colo_flow_key key = {};
	struct colo_flow *n;

	/* to_svm is a constant: one of the two copies is all that remains. */
	if (to_svm) {
		__builtin_memcpy(key.guest, p->dst, 16);
		__builtin_memcpy(key.client, p->src, 16);
		key.guest_port = p->dport;
		key.client_port = p->sport;
	} else {
		__builtin_memcpy(key.guest, p->src, 16);
		__builtin_memcpy(key.client, p->dst, 16);
		key.guest_port = p->sport;
		key.client_port = p->dport;
	}
	key.vlan = p->vlan;
	n = flows.lookup(&key);
	if (n && (n->epoch == epoch || n->epoch == COLO_EPOCH_BASE))
		return n;
	/* A client's SYN-ACK begins nothing: it answers a SYN that would have. */
	if (mode == MODE_TAKEOVER || (flags != TCP_SYN && (to_svm || flags != (TCP_SYN | TCP_ACK))))
		return 0;
	if (!n) {
		struct colo_flow fresh = {};

		fresh.epoch = epoch;
		flows.insert(&key, &fresh);
		n = flows.lookup(&key);
		if (!n)
			*reason = R_FLOW_TABLE_FULL;
		return n;
	}
	n->off = 0;
	n->tsoff = 0;
	/* The epoch last: a reader on the other CPU takes the old parts for old. */
	flow_forget(n, epoch);
	return n;
}

static __always_inline void flow_track(struct colo_flow *n, const struct pkt *p,
				       const struct tcp_ts *ts, int to_svm, u64 mode, u32 epoch,
				       struct shift *s)
{
	u32 key, event, *next;
	u64 now = bpf_ktime_get_ns();

	if (to_svm)
		flow_learn_client(n, p, ts, mode, epoch);
	else
		flow_learn_guest(n, p, ts, mode, epoch);
	if ((n->have & FLOW_HAVE_ISN_S) && (n->have_client & FLOW_HAVE_ISN_P)) {
		s->off = n->isn_s - n->isn_p;
		if ((n->have & FLOW_HAVE_TS_S) && (n->have_client & FLOW_HAVE_TS_P))
			s->tsoff = n->ts_s - n->ts_p;
	}
	/* Writes only what changes: the cache line is shared with the other direction's CPU. */
	if (n->off != s->off)
		n->off = s->off;
	if (n->tsoff != s->tsoff)
		n->tsoff = s->tsoff;
	event = flow_event(n, p, to_svm);
	if (event < EV_TCP_MAX) {
		key = n->state * EV_TCP_MAX + event;
		next = transitions.lookup(&key);
		if (next && *next != n->state)
			n->state = *next;
	}
	if (now - n->seen_ns > SEEN_STEP_NS)
		n->seen_ns = now;
}

#endif
