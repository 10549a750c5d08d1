/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Connections of the SVM: which state they are in, and how far the SVM's
 * numbers are from the PVM's. colo_xdp/conntrack/rewriter.py is the same in Python; a test
 * compares the two packet by packet.
 *
 * Learning. The client only ever sees the PVM's ISN; the SVM's guest chooses
 * its own. The offset is known once both are:
 *
 *   ISN_S  sequence number of the guest's SYN or SYN-ACK
 *   ISN_P  sequence number of the PVM's SYN-ACK for the same client ISN: pvm_out sends a copy of
 *          each SYN of the PVM over the peer link (COLO_KIND_SYN), once when the PVM has said it
 *          and once more as it leaves.
 *
 * Where both copies were lost, and where the guest opened, it is what the client says: ack - 1 of
 * its SYN-ACK or of its first ACK. That is ISN_P + 1 if nothing is acked but the SYN. It is: the
 * PVM's data leaves only after the SVM has produced it, so not while the SVM is silent. Once the
 * guest has said anything behind its SYN, or with it, or the client with its own (RFC 7413), the
 * ack may cover data and teaches nothing: R_PASS_OFFSET_UNKNOWN. (Output that is not compared may leave
 * before the SVM has produced it. For such a connection the ack is wrong if it covers data and
 * both copies and all earlier acks were lost.) To a SYN of the guest that had data the answer is
 * told apart by the copy of the PVM's SYN, which gives ISN_P itself.
 *
 * Timestamps likewise: TSval of the same guest segments, TSecr of the same client segment.
 * They may come in any order.
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
 *  - The PVM's SYN is noted in words of its own, whatever connection it is of, and counts when its
 *    ack names the client ISN that the entry has: so it may come before the SVM has left the old
 *    connection on the key. The newest counts: the PVM had given up and begun again. Its epoch does
 *    not matter, for the PVM is never set back. MODE_RUN only: after a takeover the client may have
 *    been told the SVM's own ISN. Entries for good (below) take note of other connections only.
 *
 * A SYN itself goes untranslated to the primary, which knows one that is repeated by its number.
 *
 * Two tables. A stranger's SYN must not take the place of a live connection, and a live one is not
 * to be evicted in silence. So a connection begins in `opening`, where the least recently used goes
 * first, and moves to `flows` when the client acks what only somebody who has heard the guest can:
 * what has been told to nobody is not worth a place. An old connection's entry in `flows` serves the
 * next one on the key.
 *
 * Epochs. A checkpoint makes the SVM a copy of the PVM, so all offsets are 0:
 * the epoch grows and entries of older epochs count as unknown. Only a
 * handshake begins an entry; connections from before need none.
 *
 * An offset can also be the guest's for good (COLO_EPOCH_BASE): a guest that has taken over has
 * its own numbers for the connections of that time, and keeps them as the PVM of the next pair.
 * Then promoted_in and promoted_out (promoted.bpf.c) translate at its tap, so that mirror and comparison
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
 *    have_client the client's; isn_s, ts_s, fin_guest and have the guest's; those of pvm_ the
 *    PVM's SYN. A value is written before its bit.
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
 *    not been seen for a long time. What has moved to `flows` stays in `opening` as a void copy,
 *    of another epoch. What the guest's side writes to it meanwhile is lost (see above), and an
 *    entry that is evicted while the other CPU works on it has not been used for thousands of SYNs.
 */
#ifndef COLO_CONNTRACK_H
#define COLO_CONNTRACK_H

/* key: the connection. Writers: svm_*. Reader: controller, which also deletes. Not an LRU: that
 * would evict a live connection in silence. Full: R_PASS_FLOW_TABLE_FULL, the frame goes untranslated. */
BPF_TABLE_PINNED("hash", struct colo_flow_key, struct colo_flow, flows, COLO_MAX_FLOWS,
		 PIN_DIR "/flows");

/* The same for connections of which the client has not yet shown that it hears the guest. */
BPF_TABLE_PINNED("lru_hash", struct colo_flow_key, struct colo_flow, opening, COLO_MAX_FLOWS,
		 PIN_DIR "/opening");

/* key: state * EV_TCP_MAX + event, value: next state. Writer: controller, once, from the table
 * in colo_xdp/conntrack/tcp_state.py. */
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
	u32 unknown; /* the client's ack would have to teach the offset, and may not */
};

/* Of `opening`, and its connection has moved to `flows`. */
#define EPOCH_VOID(epoch) ((epoch) ^ 0x40000000u)

/* Another connection: its offset, if there is one, is of this epoch. */
static __always_inline void flow_forget(struct colo_flow *n, u32 epoch)
{
	n->have = 0;
	n->have_client = 0;
	n->state = TCP_CLOSED;
	barrier();
	n->epoch = epoch;
}

/* Whether a SYN-ACK that acks `acked` + 1 answers the client's SYN, which may have had data. */
static __always_inline int flow_answers(const struct colo_flow *n, u32 acked)
{
	return acked == n->isn_c ||
	       ((n->have_client & FLOW_EARLY) && acked - n->isn_c <= LEARN_WINDOW);
}

/* Whether the PVM has told its ISN for the connection that the entry is of. */
static __always_inline int flow_isn_known(const struct colo_flow *n)
{
	return (n->have_pvm & FLOW_PVM_ACK) && (n->have_client & FLOW_HAVE_ISN_C) &&
	       flow_answers(n, n->pvm_c);
}

/* Whether ISN_P is known. */
static __always_inline int flow_known(const struct colo_flow *n)
{
	return (n->have_client & FLOW_HAVE_ISN_P) || flow_isn_known(n);
}

static __always_inline void flow_learn_pvm(struct colo_flow *n)
{
	n->isn_p = n->pvm_isn;
	if (n->have_pvm & FLOW_PVM_TS) {
		n->ts_p = n->pvm_ts;
		n->have_client |= FLOW_HAVE_ISN_P | FLOW_HAVE_TS_P;
	} else {
		n->have_client |= FLOW_HAVE_ISN_P;
	}
}

static __always_inline void flow_learn_client(struct colo_flow *n, const struct pkt *p,
					      const struct tcp_ts *ts, u64 mode, u32 epoch,
					      struct shift *s)
{
	u32 flags = p->flags & (TCP_SYN | TCP_RST | TCP_ACK), learn;

	if (flags == TCP_SYN) {
		if ((n->have & FLOW_HAVE_ISN_S) && flow_known(n))
			return;
		if ((n->have_client & FLOW_HAVE_ISN_C) && n->isn_c != p->seq) {
			flow_forget(n, epoch);
			if (mode == MODE_TAKEOVER)
				return;
		}
		n->isn_c = p->seq;
		n->have_client |= p->payload_len ? FLOW_HAVE_ISN_C | FLOW_EARLY : FLOW_HAVE_ISN_C;
		return;
	}
	if (!(flags & TCP_ACK) || (flags & TCP_RST))
		return;
	if (flow_isn_known(n)) {
		/* Kept, since the next connection's SYN may be noted before this one is over. */
		if (!(n->have_client & FLOW_HAVE_ISN_P) || n->isn_p != n->pvm_isn)
			flow_learn_pvm(n);
		return;
	}
	if (n->have_client & FLOW_HAVE_ISN_P)
		return;
	if (flags & TCP_SYN)
		learn = (n->have & FLOW_HAVE_ISN_S) &&
			(!(n->have_client & FLOW_HAVE_ISN_C) || n->isn_c == p->seq);
	else
		learn = (n->have_client & FLOW_HAVE_ISN_C) && p->seq - n->isn_c - 1 <= LEARN_WINDOW;
	if (!learn)
		return;
	if (flags & TCP_SYN) {
		n->isn_c = p->seq;
		n->have_client |= FLOW_HAVE_ISN_C;
	}
	if ((n->have | n->have_client) & FLOW_EARLY) {
		if ((flags & TCP_SYN) && (n->have_pvm & FLOW_PVM_SYN) &&
		    p->ack - n->pvm_isn - 1 <= LEARN_WINDOW)
			flow_learn_pvm(n);
		else
			s->unknown = 1;
		return;
	}
	n->isn_p = p->ack - 1;
	if (ts->there) {
		n->ts_p = ts->ecr;
		n->have_client |= FLOW_HAVE_ISN_P | FLOW_HAVE_TS_P;
	} else {
		n->have_client |= FLOW_HAVE_ISN_P;
	}
}

static __always_inline void flow_learn_guest(struct colo_flow *n, const struct pkt *p,
					     const struct tcp_ts *ts, u64 mode, u32 epoch)
{
	u32 known = n->have & FLOW_HAVE_ISN_S, other = known && n->isn_s != p->seq, fresh;

	if ((p->flags & (TCP_SYN | TCP_RST)) != TCP_SYN) {
		if (known && !(n->have & FLOW_EARLY) && !(p->flags & TCP_RST) &&
		    (p->payload_len || (p->flags & TCP_FIN)) && !flow_known(n))
			n->have |= FLOW_EARLY;
		return;
	}
	if (p->flags & TCP_ACK) {
		if (n->have_client & FLOW_HAVE_ISN_C)
			fresh = !flow_answers(n, p->ack - 1);
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
	if (ts->there &&
	    (!known || other ||
	     !(flow_isn_known(n) ? n->have_pvm & FLOW_PVM_TS : n->have_client & FLOW_HAVE_TS_P))) {
		n->ts_s = ts->val;
		n->have |= FLOW_HAVE_TS_S;
	}
	n->isn_s = p->seq;
	n->have |= p->payload_len ? FLOW_HAVE_ISN_S | FLOW_EARLY : FLOW_HAVE_ISN_S;
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

/* to_svm is a constant: one of the two copies is all that remains. */
static __always_inline void flow_key(struct colo_flow_key *key, const struct pkt *p, int to_svm)
{
	if (to_svm) {
		__builtin_memcpy(key->guest, p->dst, 16);
		__builtin_memcpy(key->client, p->src, 16);
		key->guest_port = p->dport;
		key->client_port = p->sport;
	} else {
		__builtin_memcpy(key->guest, p->src, 16);
		__builtin_memcpy(key->client, p->dst, 16);
		key->guest_port = p->sport;
		key->client_port = p->dport;
	}
	key->vlan = p->vlan;
}

/* The entry of the key, if it counts; else 0, and *old is one that may be used again. */
static __always_inline struct colo_flow *flow_lookup(struct colo_flow_key *key, u32 epoch,
						     struct colo_flow **old, u32 *opened)
{
	struct colo_flow *n = flows.lookup(key);

	if (n && (n->epoch == epoch || n->epoch == COLO_EPOCH_BASE))
		return n;
	*old = n;
	n = opening.lookup(key);
	if (n && n->epoch == epoch) {
		*opened = 1;
		return n;
	}
	if (!*old)
		*old = n;
	return 0;
}

/* The entry, if it counts; begins one if this segment may. */
static __always_inline struct colo_flow *flow_find(struct colo_flow_key *key, const struct pkt *p,
						   int to_svm, u64 mode, u32 epoch, u32 *reason,
						   u32 *opened)
{
	u32 flags = p->flags & (TCP_SYN | TCP_RST | TCP_ACK);
	struct colo_flow *n, *old = 0;

	n = flow_lookup(key, epoch, &old, opened);
	if (n)
		return n;
	/* A client's SYN-ACK begins nothing: it answers a SYN that would have. */
	if (mode == MODE_TAKEOVER || (flags != TCP_SYN && (to_svm || flags != (TCP_SYN | TCP_ACK))))
		return 0;
	if (!old) {
		struct colo_flow fresh = {};

		fresh.epoch = epoch;
		opening.update(key, &fresh);
		*opened = 1;
		n = opening.lookup(key);
		if (!n)
			*reason = R_PASS_FLOW_TABLE_FULL;
		return n;
	}
	old->off = 0;
	old->tsoff = 0;
	/* The epoch last: a reader on the other CPU takes the old parts for old. */
	flow_forget(old, epoch);
	return old;
}

/* What is known by now. Computed anew each time, see Races. */
static __always_inline void flow_shift(const struct colo_flow *n, struct shift *s, u32 *isn_p)
{
	u32 ts_p, ts_known;

	if (!(n->have & FLOW_HAVE_ISN_S) || !flow_known(n))
		return;
	if (flow_isn_known(n)) {
		*isn_p = n->pvm_isn;
		ts_p = n->pvm_ts;
		ts_known = n->have_pvm & FLOW_PVM_TS;
	} else {
		*isn_p = n->isn_p;
		ts_p = n->ts_p;
		ts_known = n->have_client & FLOW_HAVE_TS_P;
	}
	s->off = n->isn_s - *isn_p;
	if ((n->have & FLOW_HAVE_TS_S) && ts_known)
		s->tsoff = n->ts_s - ts_p;
}

static __always_inline u32 flow_track(struct colo_flow *n, const struct pkt *p,
				      const struct tcp_ts *ts, int to_svm, u64 mode, u32 epoch,
				      struct shift *s)
{
	u32 key, event, *next, isn_p = 0;
	u64 now = bpf_ktime_get_ns();

	if (to_svm)
		flow_learn_client(n, p, ts, mode, epoch, s);
	else
		flow_learn_guest(n, p, ts, mode, epoch);
	flow_shift(n, s, &isn_p);
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
	return isn_p;
}

/* Whether the client acks what it can know from the guest only. */
static __always_inline int flow_client_seen(const struct colo_flow *n, const struct pkt *p,
					    u32 isn_p)
{
	return n->state >= TCP_ESTABLISHED && (p->flags & (TCP_RST | TCP_ACK)) == TCP_ACK &&
	       (n->have & FLOW_HAVE_ISN_S) && flow_known(n) && p->ack - isn_p - 1 <= LEARN_WINDOW;
}

/* From `opening` to `flows`. Where there is no room the connection is given up, and counted. */
static __always_inline u32 flow_promote(struct colo_flow_key *key, struct colo_flow *n, u32 epoch)
{
	struct colo_flow copy = *n;
	u32 full = flows.update(key, &copy) != 0;

	n->epoch = EPOCH_VOID(epoch);
	return full;
}

/* A SYN of the PVM has come over the peer link. */
static __always_inline u32 flow_note_pvm(const struct pkt *p, const struct tcp_ts *ts, u32 epoch)
{
	u32 bits = FLOW_PVM_SYN, acks = p->flags & TCP_ACK, same, opened = 0;
	struct colo_flow_key key = {};
	struct colo_flow *n, *old = 0;

	if (!p->is_tcp || (p->flags & (TCP_SYN | TCP_RST)) != TCP_SYN)
		return R_NOTE_UNPARSED;
	flow_key(&key, p, 0);
	n = flow_lookup(&key, epoch, &old, &opened);
	if (!n)
		return R_DROP_PVM_SYN_UNKNOWN;
	/* For good: either guest's own number, or the client's: as both hosts learn it from. */
	if (n->epoch == COLO_EPOCH_BASE &&
	    (!acks || !(n->have_client & FLOW_HAVE_ISN_C) || flow_answers(n, p->ack - 1)))
		return R_DROP_PVM_SYN_UNKNOWN;
	same = (n->have_pvm & FLOW_PVM_SYN) && n->pvm_isn == p->seq;
	if (acks)
		bits |= FLOW_PVM_ACK;
	if (same && (n->have_pvm & FLOW_PVM_TS))
		bits |= FLOW_PVM_TS; /* of the first, as the guest's own */
	if (same && n->have_pvm == bits && (!acks || n->pvm_c == p->ack - 1) &&
	    (!ts->there || (bits & FLOW_PVM_TS)))
		return R_DROP_PVM_SYN;
	n->have_pvm = 0;
	barrier();
	n->pvm_isn = p->seq;
	n->pvm_c = acks ? p->ack - 1 : 0;
	if (ts->there && !(bits & FLOW_PVM_TS)) {
		n->pvm_ts = ts->val;
		bits |= FLOW_PVM_TS;
	}
	barrier();
	n->have_pvm = bits;
	return R_DROP_PVM_SYN;
}

#endif
