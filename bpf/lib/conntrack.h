/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Connections of the SVM: their TCP state, and the offset between the SVM's numbers and the PVM's.
 * colo_xdp/conntrack/rewriter.py does the same in Python; a test compares the two packet by packet.
 *
 * Learning. The client only ever sees the PVM's ISN, while the SVM's guest chooses its own. The
 * offset is known once both are:
 *
 *   ISN_S  sequence number of the guest's SYN or SYN-ACK
 *   ISN_P  sequence number of the PVM's SYN-ACK for the same client ISN. pvm_out sends a copy of
 *          each SYN of the PVM over the peer link (COLO_KIND_SYN), once when the PVM sends it
 *          and once more when it is released.
 *
 * If both copies were lost, or if the guest opened the connection, ISN_P comes from the client: the
 * ack of its SYN-ACK or of its first ACK is ISN_P + 1 if it covers only the SYN. It does, because
 * the PVM's data leaves only after the SVM has produced it, so not while the SVM is silent. Once
 * the guest has sent anything after or with its SYN, or the client with its own SYN (RFC 7413), the
 * ack may cover data and teaches nothing: R_PASS_OFFSET_UNKNOWN. (Output that is not compared may
 * leave before the SVM has produced it. For such a connection ISN_P is wrong if the ack covers data
 * and both copies and all earlier acks were lost.) The answer to a SYN of the guest that carried
 * data is recognised by the copy of the PVM's SYN, which gives ISN_P itself.
 *
 * Timestamps are learnt the same way: TSval of the same guest segments, TSecr of the same client
 * segment. Segments may arrive in any order.
 *
 * Which segments may teach, since duplicates and leftovers of an older connection have the same
 * addresses:
 * - A client's SYN never changes a known offset, because it may be a stray duplicate. The guest
 *   knows: it answers a duplicate with a plain ACK, and a new connection with a SYN-ACK that acks
 *   another client ISN. So the guest's SYN-ACK decides.
 * - A SYN-ACK with another ISN for the same client ISN: the guest gave up and began again, the PVM
 *   did not. ISN_S is replaced, ISN_P stays.
 * - A SYN-ACK for another client ISN, or a SYN of the guest with another ISN: a new connection;
 *   everything is learnt anew.
 * - A client's ACK teaches ISN_P only within one unscaled window (64 KiB) of the client's ISN: that
 *   is the most it can have sent before the guest's first ACK.
 * - The PVM's SYN is noted in fields of its own, whatever connection it belongs to, and counts when
 *   its ack names the client ISN of the entry. So it may arrive before the SVM has left the old
 *   connection with the same key. The newest counts: the PVM gave up and began again. Its epoch
 *   does not matter, since the PVM is never set back. MODE_RUN only: after a takeover the client
 *   may have been given the SVM's own ISN. Permanent entries (below) take note of other connections
 *   only.
 *
 * A SYN goes to the primary untranslated: the primary recognises a retransmitted SYN by its number.
 *
 * Two tables. A stranger's SYN must not take the place of a live connection, and a live connection
 * must not be evicted silently. So a connection begins in `opening`, where the least recently used
 * entry is evicted first, and moves to `flows` when the client acks something that only a receiver
 * of the guest's segments can know. State that no client has seen is not worth protecting. An old
 * connection's entry in `flows` is reused by the next connection with the same key.
 *
 * Epochs. A checkpoint makes the SVM a copy of the PVM, so all offsets are 0: the epoch grows, and
 * entries of older epochs count as unknown. Only a handshake begins an entry; connections from
 * before the checkpoint need none.
 *
 * An offset can also be permanent (COLO_EPOCH_BASE). A guest that has taken over keeps its own
 * numbers for the connections of that time when it becomes the PVM of the next pair. promoted_in
 * and promoted_out (promoted.bpf.c) then translate at its tap, so that mirror and comparison see
 * what the client sees. Its clone, the new SVM, has the same offset for as long as the connection
 * lives, and checkpoints do not end it. No connection has both kinds. A new connection with the
 * same key ends the old offset, and what is learnt then belongs to the epoch; so does any handshake
 * in which the guest uses an ISN that the entry does not know.
 *
 * MODE_TAKEOVER. The SVM is on the network itself. New connections need no translation, so no entry
 * begins, and a new connection with an old key ends the old one's translation. A handshake that was
 * under way may still complete: its client may have been given the PVM's ISN.
 *
 * Races. svm_in (softirq) and svm_out (QEMU's thread, or XDP) access one value on two CPUs without
 * a lock: bpf_spin_lock needs BTF, which bcc does not generate.
 * With several queues (docs/design/queues.md) a side may be on two CPUs itself; frames of one
 * connection come one after the other unless the guest reorders them.
 * - Each field has one writing side. isn_c, isn_p, ts_p, fin_client and have_client are written by
 *   the client's; isn_s, ts_s, fin_guest and have by the guest's; have_pvm and pvm_* by the PVM's
 *   SYN. A value is written before its bit.
 * - The offset is never fixed by "whichever side comes last", since the two could miss each other.
 *   Every segment computes it from the parts; off and tsoff are copies for the controller to read.
 * - The exceptions are starts of a new connection, where one side clears the other's bits. Those
 *   sides are in a causal chain (the guest answers what svm_in has let through; the client answers
 *   what the PVM sent after the SVM), so a conflict needs a stray segment at the same instant.
 * - `state` and `seen_ns` are written by both; the last one wins. They only control ageing.
 * - Entries are never deleted here: a preallocated element is reused at once, and the other CPU may
 *   still write to it. The controller deletes entries that have not been used for a long time. What
 *   has moved to `flows` stays in `opening` as a void copy, with another epoch; what the guest's
 *   side writes to that copy meanwhile is lost (see below). An entry that is evicted while the
 *   other CPU works on it has not been used for thousands of SYNs.
 *
 * The worst result of a lost update is a wrong or missing offset. Nothing then reaches a client:
 * the SVM's output does not match, which costs a checkpoint, and the checkpoint ends all offsets.
 */
#ifndef COLO_CONNTRACK_H
#define COLO_CONNTRACK_H

/*
 * key: the connection. Writers: svm_*. Reader: the controller, which also deletes. Not an LRU map,
 * which would silently evict a live connection. Full: R_PASS_FLOW_TABLE_FULL, and the frame passes
 * untranslated.
 */
BPF_TABLE("hash", struct colo_flow_key, struct colo_flow, flows, COLO_AS_CONFIGURED);

/* The same for connections whose client has not yet shown that it receives the guest's segments. */
BPF_TABLE("lru_hash", struct colo_flow_key, struct colo_flow, opening, COLO_AS_CONFIGURED);

/*
 * key: state * EV_TCP_MAX + event, value: next state. Writer: controller, once, from the table in
 * colo_xdp/conntrack/tcp_state.py.
 */
BPF_TABLE("array", u32, u32, transitions, TCP_STATES *EV_TCP_MAX);

/* seen_ns is renewed only when older than this: two CPUs share the value's cache line. */
#define SEEN_STEP_NS 1000000000ULL

#define LEARN_WINDOW 65535

/* A segment's timestamp option, host order. */
struct tcp_ts {
	u32 there;
	u32 val;
	u32 ecr;
};

/* What is added to numbers that go to the SVM, and subtracted from those that come from it. */
struct shift {
	u32 off;
	u32 tsoff;
	u32 unknown; /* the offset would have to come from the client's ack, which is not usable */
};

/* Epoch of an entry in `opening` whose connection has moved to `flows`. */
#define EPOCH_VOID(epoch) ((epoch) ^ 0x40000000u)

/* Reset the entry for another connection, whose offset, if any, belongs to this epoch. */
static __always_inline void flow_forget(struct colo_flow *n, u32 epoch)
{
	n->have = 0;
	n->have_client = 0;
	n->state = TCP_CLOSED;
	barrier();
	n->epoch = epoch;
}

/* Whether a SYN-ACK that acks `acked` + 1 answers the client's SYN, which may have carried data. */
static __always_inline int flow_answers(const struct colo_flow *n, u32 acked)
{
	return acked == n->isn_c ||
	       ((n->have_client & FLOW_EARLY) && acked - n->isn_c <= LEARN_WINDOW);
}

/* Whether the PVM's SYN has shown the ISN of this entry's connection. */
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
		/*
		 * Copied, since the next connection's SYN may be noted before this one has ended.
		 */
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
	/*
	 * Both guests share the ISN in a permanent entry; an ISN that it does not have is each
	 * guest's own.
	 */
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
	/* A retransmitted SYN has a newer TSval, and its answer echoes that one. */
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
	/*
	 * Both in the SVM's numbers: the FIN as the guest sent it, the ack as the guest will see
	 * it.
	 */
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

/* to_svm is a constant, so only one of the two branches remains. */
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

/* The valid entry of the key; otherwise 0, and *old is an entry that may be reused, if any. */
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

/* The valid entry of the key; begins one if this segment may. */
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
	/* The epoch last: until then a reader on the other CPU takes the old parts for old. */
	flow_forget(old, epoch);
	return old;
}

/* Compute the offsets from what is known by now. Computed anew each time; see Races. */
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
	/* Write only what changes: the cache line is shared with the other direction's CPU. */
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

/* Whether the client acks what it can know only from the guest. */
static __always_inline int flow_client_seen(const struct colo_flow *n, const struct pkt *p,
					    u32 isn_p)
{
	return n->state >= TCP_ESTABLISHED && (p->flags & (TCP_RST | TCP_ACK)) == TCP_ACK &&
	       (n->have & FLOW_HAVE_ISN_S) && flow_known(n) && p->ack - isn_p - 1 <= LEARN_WINDOW;
}

/*
 * Move a connection from `opening` to `flows`. Without room the connection is given up and counted.
 */
static __always_inline u32 flow_promote(struct colo_flow_key *key, struct colo_flow *n, u32 epoch)
{
	struct colo_flow copy = *n;
	u32 full = flows.update(key, &copy) != 0;

	n->epoch = EPOCH_VOID(epoch);
	return full;
}

/* Note a SYN of the PVM that has arrived over the peer link. */
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
	/* Permanent: the ISN is either guest's own or the client's, as both hosts learn it. */
	if (n->epoch == COLO_EPOCH_BASE &&
	    (!acks || !(n->have_client & FLOW_HAVE_ISN_C) || flow_answers(n, p->ack - 1)))
		return R_DROP_PVM_SYN_UNKNOWN;
	same = (n->have_pvm & FLOW_PVM_SYN) && n->pvm_isn == p->seq;
	if (acks)
		bits |= FLOW_PVM_ACK;
	if (same && (n->have_pvm & FLOW_PVM_TS))
		bits |= FLOW_PVM_TS; /* of the first, like the guest's own */
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
