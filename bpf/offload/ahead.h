/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Limits how far a guest can be ahead of what has been released, by the window that clients offer.
 *
 * A guest may send whatever its client's window allows before the other guest has sent any of it,
 * and the fast path can keep COLO_BUFFER bytes of that. A sender whose congestion window is larger
 * would fill the buffer again and again, and the connection would go to user space each time. So
 * the right edge that a client's ack offers (RFC 9293 section 3.8.6) is lowered to COLO_AHEAD bytes
 * beyond the last released one (less up to EDGE_STEP), for both guests alike. That does not limit
 * a connection with a long round trip: what has been released and is on its way to the client does
 * not count.
 *
 * The window field of a segment is in units of the client's window scale (RFC 7323 section 2.2),
 * which only its SYN tells. Where that was not seen, or the guest does not scale, nothing is
 * limited, and a full buffer ends the stay in the fast path.
 *
 * The edge that a guest sees moves back only by rounding, or when a connection begins to be
 * limited; RFC 9293 has senders cope with that.
 */
#ifndef COLO_AHEAD_H
#define COLO_AHEAD_H

/*
 * The edge moves in steps, so that acks which repeat one another mostly have the same window: a
 * sender without SACK counts only such acks as duplicates (RFC 5681 section 2).
 */
#define EDGE_STEP 65536u

/* key: connection; value: the shift count in the client's SYN (note_scale()). Writer: pvm_in. */
BPF_TABLE("lru_hash", struct colo_flow_key, u32, scales, COLO_MAX_SCALES);

static __always_inline void client_key(struct colo_flow_key *key, const struct pkt *p)
{
	__builtin_memcpy(key->guest, p->dst, 16);
	__builtin_memcpy(key->client, p->src, 16);
	key->guest_port = p->dport;
	key->client_port = p->sport;
	key->vlan = p->vlan;
}

/*
 * Note the window scale of a client's SYN; 0: it has none. Two SYNs that differ count as none, with
 * which nothing is limited: a forged one could make the windows of a connection tiny.
 */
static __always_inline void note_scale(const struct pkt *p, u32 shift)
{
	struct colo_flow_key key = {};
	u32 *known;

	client_key(&key, p);
	known = scales.lookup(&key);
	if (known && *known != shift)
		shift = 0;
	scales.update(&key, &shift);
}

/*
 * Lower the window of a client's frame. Returns 1 if it was, 0 if not, < 0 if the frame must be
 * dropped.
 *
 * Race: `owner`, `released` and `shift` are read without the lock, each once. An older `released`
 * gives a smaller window, and another ack follows whatever has been released since. While the
 * connection is user space's, `released` stands still; then nothing is limited.
 */
static __always_inline int limit_ahead(struct __sk_buff *skb, const struct pkt *p,
				       struct colo_conn *c, const struct colo_flow_key *key)
{
	u32 released = *(volatile u32 *)&c->released, shift = *(volatile u8 *)&c->shift, *known;
	u32 room = (released & -EDGE_STEP) + COLO_AHEAD - p->ack;
	__be16 from, to;

	if (*(volatile u32 *)&c->owner != OWNER_KERNEL || shift == SHIFT_NONE)
		return 0;
	if (seq_later(p->ack, released)) /* released meanwhile, or nonsense */
		room = COLO_AHEAD;
	if (shift == SHIFT_UNKNOWN) {
		known = scales.lookup((struct colo_flow_key *)key);
		shift = known ? *known : SHIFT_NONE;
		*(volatile u8 *)&c->shift = shift;
		if (!known)
			return 0;
	}
	if (bpf_skb_load_bytes(skb, p->l4_off + 14, &from, 2))
		return 0;
	room >>= shift & 15;
	if (bpf_ntohs(from) <= room)
		return 0;
	to = bpf_htons(room);
	if (bpf_skb_store_bytes(skb, p->l4_off + 14, &to, 2, 0))
		return -1;
	return bpf_l4_csum_replace(skb, p->csum_at, from, to, 2) ? -1 : 1;
}

/*
 * Note what a client's frame says about its connection, and limit what it allows the guests.
 * Returns as limit_ahead().
 */
static __always_inline int note_client_segment(struct __sk_buff *skb, const struct pkt *p)
{
	struct colo_flow_key key = {};
	struct colo_conn *c;

	if (!p->is_tcp || (p->flags & (TCP_ACK | TCP_SYN | TCP_RST)) != TCP_ACK)
		return 0;
	client_key(&key, p);
	c = conn_find(&key);
	if (!c)
		return 0;
	note_ack(c, p);
	return limit_ahead(skb, p, c, &key);
}

#endif
