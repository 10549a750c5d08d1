/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * UDP in the fast path: whole datagrams in order, instead of bytes by sequence number.
 *
 * The datagrams by which one guest is ahead are a queue of records in a buffer, oldest first; each
 * record is struct colo_dgram and the payload. `released` and `next` are positions in it and mean
 * nothing elsewhere. The other guest's next datagram is compared with the oldest record. If they
 * are equal, the PVM's leaves: its own frame if the PVM is the late one, else the SVM's frame under
 * the PVM's Ethernet and IP headers. UDP's own header stays: it has the same ports and length, and
 * a checksum (or half of one) that fits this frame.
 *
 * Datagrams may be lost or overtake each other, so the first one that differs proves nothing. It is
 * an exception like any other: the flow goes to user space, which pairs datagrams in any order
 * (compare/datagram.py). There are no acks, retransmissions or windows. Locking, and the argument
 * for it, are those of offload/offload.h.
 */
#ifndef COLO_UDP_H
#define COLO_UDP_H

/*
 * A plain datagram has no tag, is neither a fragment nor a GSO frame, has consistent lengths, and
 * has no partial checksum other than its own. In particular it has no partial checksum of an
 * encapsulated packet, which the SVM's copy may carry in full.
 */
static __always_inline int is_plain_datagram(struct __sk_buff *skb, const struct pkt *p)
{
	__be16 size;

	if (skb->vlan_present || skb->gso_size || p->l3_off != 14 ||
	    p->l4_off != (p->is_v6 ? 54 : 34))
		return 0;
	if (!is_whole(skb, p->l4_off + 8 + p->payload_len) || sums_elsewhere(skb, p))
		return 0;
	if (bpf_skb_load_bytes(skb, p->l4_off + 4, &size, 2))
		return 0;
	return bpf_ntohs(size) == 8 + p->payload_len;
}

static __always_inline struct colo_dgram *record_at(struct colo_buffer *st,
						    const struct colo_conn *c, u32 place)
{
	u64 pos = (place - c->base_seq) & (COLO_BUFFER - 1);

	VERIFIER_BOUND(pos, COLO_BUFFER - 1);
	return (struct colo_dgram *)(st->ring + pos);
}

/* Load the Ethernet, IP and UDP headers; constant sizes, for the verifier. */
static __always_inline long load_headers(struct __sk_buff *skb, const struct pkt *p, void *to)
{
	if (p->is_v6)
		return bpf_skb_load_bytes(skb, 0, to, 62);
	return bpf_skb_load_bytes(skb, 0, to, 42);
}

/* The counterpart of prepare_segment() for UDP. */
static __always_inline u32 prepare_datagram(struct __sk_buff *skb, const struct pkt *p,
					    struct colo_conn *c, struct colo_flow_key *key,
					    struct colo_work *w, u32 side)
{
	u32 out = c->next - c->released, len = p->payload_len, slot;
	u32 size = (sizeof(struct colo_dgram) + len + DGRAM_ALIGN - 1) & ~(DGRAM_ALIGN - 1);
	int meets = out && c->leader != side;
	struct colo_buffer *st;
	struct colo_dgram *d;

	if (!is_plain_datagram(skb, p))
		return R_PUNT_EXCEPTION;
	if (!meets && out + size > COLO_BUFFER)
		return R_PUNT_BUFFER_FULL;
	if (!meets && !buffer_claim(c, key))
		return R_PUNT_NO_BUFFER;
	if (!out) /* restart where the cache is warm */
		c->base_seq = c->next = c->released;
	slot = c->buffer - 1;
	st = buffers.lookup(&slot);
	if (!st)
		return R_PUNT_HELPER_FAILED;
	d = record_at(st, c, meets ? c->released : c->next);
	if (meets && d->len != len)
		return R_PUNT_DIFFERS;
	if (!meets && load_headers(skb, p, d->hdr))
		return R_PUNT_HELPER_FAILED;
	w->len = len;
	w->moves = size;
	w->l4 = p->l4_off;
	w->at = p->l4_off + 8;
	w->seq = (meets ? c->released : c->next) + sizeof(*d);
	w->left = len;
	w->equal = meets ? len : 0;
	w->act = !meets ? ACT_NOTHING : side == SIDE_PVM ? ACT_PASS : ACT_REWRITE;
	return 0;
}

/* The counterpart of finish_segment() for UDP. */
static __always_inline u32 finish_datagram(struct __sk_buff *skb, struct colo_conn *c,
					   struct colo_buffer *st, struct colo_work *w,
					   int *verdict)
{
	u32 turn = w->act == ACT_REWRITE;
	struct colo_dgram *d;

	note_moved(w->now);
	if (w->act == ACT_NOTHING) {
		d = record_at(st, c, c->next);
		d->ts_ns = w->now;
		d->len = w->len;
		d->partial = is_partial(skb);
		c->next += (u32)w->moves;
		c->leader = w->side;
		settle(c, w->now, 0);
		return R_OFFLOAD_HELD;
	}
	d = record_at(st, c, c->released);
	if (turn) {
		/* If this fails, it fails before it writes: no memory for headers of its own. */
		if (w->l4 == 54 ? bpf_skb_store_bytes(skb, 0, d->hdr, 54, 0)
				: bpf_skb_store_bytes(skb, 0, d->hdr, 34, 0))
			return R_PUNT_HELPER_FAILED;
	} else if (bpf_skb_load_bytes(skb, 0, w->new, 14)) {
		return R_PUNT_HELPER_FAILED;
	}
	set_egress(w, turn ? d->hdr : w->new, turn);
	note_wait(turn ? w->now - d->ts_ns : 0);
	c->released += (u32)w->moves;
	d = record_at(st, c, c->released); /* the next record that waits, if any */
	settle(c, d->ts_ns, 1);
	if (!turn) {
		*verdict = w->out ? bpf_redirect(w->out, 0) : TC_ACT_OK;
		return R_OFFLOAD_PASSED;
	}
	skb->mark = w->mark;
	*verdict = bpf_redirect(w->out, w->redirect_flags);
	return R_OFFLOAD_RELEASED;
}

#endif
