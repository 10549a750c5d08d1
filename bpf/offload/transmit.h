/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Send frames under the PVM's newest header, with an ack and a window that both guests allow. */
#ifndef COLO_TRANSMIT_H
#define COLO_TRANSMIT_H

/*
 * Choose the egress for a frame to `mac`: w->out, or, if the frame goes by way of the bridge and
 * was made here (it is not the PVM's own), the device whose ingress it is put into.
 */
static __always_inline void set_egress(struct colo_work *w, const void *mac, int made)
{
	w->out = egress_ifindex(mac, w->now);
	w->redirect_flags = w->out ? 0 : BPF_F_INGRESS;
	w->mark = w->out ? 0 : COLO_MARK; /* pvm_out lets it pass */
	if (!w->out && made)
		w->out = cfg(CFG_TAP);
}

/* The ack and the window that may be advertised to the client. */
static __always_inline u32 allowed_ack(const struct colo_conn *c)
{
	return seq_later(c->p_ack, c->s_ack) ? c->s_ack : c->p_ack;
}

static __always_inline u16 allowed_win(const struct colo_conn *c)
{
	return c->p_win < c->s_win ? c->p_win : c->s_win;
}

/* Record that a frame with this ack and window has left. */
static __always_inline void note_advertised(struct colo_conn *c, u32 ack, u16 win)
{
	c->adv_ack = ack;
	c->adv_win = win;
	if (c->ack_pending && !seq_later(c->p_ack, ack))
		c->ack_pending = 0;
}

/*
 * Whether an ack without data would tell the client anything new. Same rule as compare/window.py
 * with a scale of 0.
 */
static __always_inline int ack_due(const struct colo_conn *c)
{
	u16 win = allowed_win(c);

	if (!c->l4)
		return 0;
	if (c->ack_pending && seq_later(allowed_ack(c), c->adv_ack))
		return 1;
	return c->adv_win < c->p_win && win > c->adv_win &&
	       (win == c->p_win || win >= 2 * (u32)c->adv_win + 1);
}

/* Keep the PVM's header for all frames that leave from now on. */
static __always_inline u32 keep_header(struct __sk_buff *skb, struct colo_conn *c,
				       const struct pkt *p)
{
	u64 n = p->l4_off + p->doff;

	BOUND1(n, 127);
	if (bpf_skb_load_bytes(skb, 0, c->hdr, n))
		return R_PUNT_HELPER_FAILED;
	c->l4 = p->l4_off;
	c->doff = p->doff;
	return 0;
}

/* Set IP's length fields in w->new for `len` bytes after the TCP header, and IPv4's checksum. */
static __always_inline void set_lengths(const struct colo_conn *c, struct colo_work *w, u32 len)
{
	u64 sum;

	if (c->l4 != 34) {
		*(__be16 *)(w->new + 18) = bpf_htons(c->doff + len);
		return;
	}
	*(__be16 *)(w->new + 16) = bpf_htons(20 + c->doff + len);
	*(__be16 *)(w->new + 24) = 0;
	sum = (u32)bpf_csum_diff(0, 0, (void *)(w->new + 14), 20, 0);
	sum = (sum & 0xFFFF) + (sum >> 16);
	sum = (sum & 0xFFFF) + (sum >> 16);
	*(__be16 *)(w->new + 24) = ~sum;
}

/*
 * Build in w->new the PVM's header for `len` bytes from `seq` on. TCP's checksum stays as it was in
 * the PVM's frame.
 */
static __always_inline void new_header(const struct colo_conn *c, struct colo_work *w, u32 seq,
				       u32 len, u8 flags)
{
	u64 l4 = c->l4;
	u8 *t;

	__builtin_memcpy(w->new, c->hdr, 128);
	set_lengths(c, w, len);
	VERIFIER_BOUND(l4, 63);
	t = w->new + l4;
	*(__be32 *)(t + 4) = bpf_htonl(seq);
	*(__be32 *)(t + 8) = bpf_htonl(allowed_ack(c));
	t[13] = TCP_ACK | flags;
	*(__be16 *)(t + 14) = bpf_htons(allowed_win(c));
}

/* TCP header length, with a bound for the verifier: at most 60, at least 1. */
static __always_inline u64 header_size(const struct colo_conn *c)
{
	u64 n = c->doff;

	VERIFIER_BOUND(n, 60);
	return n;
}

/*
 * Turn the SVM's frame into the PVM's: its header, the same payload. The pseudo header does not
 * change (same addresses, same length), so a partial checksum stays correct as it is.
 */
static __always_inline u32 rewrite_as_pvm(struct __sk_buff *skb, struct colo_conn *c,
					  struct colo_work *w)
{
	u64 n = c->l4 + c->doff, l4 = c->l4, size;
	s64 change;

	BOUND1(n, 127);
	if (bpf_skb_load_bytes(skb, 0, w->old, n))
		return R_PUNT_HELPER_FAILED;
	new_header(c, w, c->released, w->len, w->flags & (TCP_PSH | TCP_FIN));
	VERIFIER_BOUND(l4, 63);
	*(u16 *)(w->new + l4 + 16) = *(u16 *)(w->old + l4 + 16);
	size = header_size(c);
	change = bpf_csum_diff((void *)(w->old + l4), size, (void *)(w->new + l4), size, 0);
	n = c->l4 + c->doff;
	BOUND1(n, 127);
	if (bpf_skb_store_bytes(skb, 0, w->new, n, 0))
		return R_PUNT_HELPER_FAILED;
	bpf_l4_csum_replace(skb, c->l4 + 16, 0, change, 0);
	return 0;
}

/* Limit the ack and the window of the PVM's own frame to what is allowed. */
static __always_inline void limit_pvm(struct __sk_buff *skb, struct colo_conn *c,
				      struct colo_work *w)
{
	u32 ack = w->ack, at = w->l4;
	u16 win = w->win, field;
	__be32 from, to;

	if (seq_later(ack, c->s_ack)) {
		from = bpf_htonl(ack);
		to = bpf_htonl(c->s_ack);
		bpf_l4_csum_replace(skb, at + 16, from, to, 4);
		bpf_skb_store_bytes(skb, at + 8, &to, 4, 0);
		ack = c->s_ack;
	}
	if (win > c->s_win) {
		from = bpf_htons(win);
		to = bpf_htons(c->s_win);
		bpf_l4_csum_replace(skb, at + 16, from, to, 2);
		field = to;
		bpf_skb_store_bytes(skb, at + 14, &field, 2, 0);
		win = c->s_win;
	}
	if (!seq_later(c->adv_ack, ack))
		note_advertised(c, ack, win);
}

static __always_inline u32 fold16(u64 x)
{
	x = (x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48);
	x = (x & 0xFFFF) + (x >> 16);
	return (x & 0xFFFF) + (x >> 16);
}

/* Older kernels sum at most 512 bytes in one call. */
#define SUM_STEP 512

/* Sum w->n bytes of the buffer at `pos`, which do not wrap. */
static __always_inline void sum_buffer(struct colo_buffer *st, struct colo_work *w)
{
	u64 n, q;

	w->at = 0;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2048 / SUM_STEP; i++) {
		n = (w->n & ~3ULL) - w->at;
		if (!n)
			break;
		if (n > SUM_STEP)
			n = SUM_STEP;
		BOUND1(n, SUM_STEP - 1);
		q = w->pos + w->at;
		VERIFIER_BOUND(q, 2 * COLO_BUFFER - 1);
		if (q >= COLO_BUFFER)
			break;
		w->sum += (u32)bpf_csum_diff(0, 0, (void *)(st->ring + q), n, 0);
		w->at += n;
	}
	q = w->pos + (w->n & ~3ULL);
	VERIFIER_BOUND(q, 2 * COLO_BUFFER - 1);
	if (q < COLO_BUFFER + 4)
		w->sum += *(u32 *)(st->ring + q) & ((1ULL << ((w->n & 3) * 8)) - 1);
}

/* Largest payload of a segment that is built here. */
static __always_inline u32 piece_size(const struct colo_conn *c)
{
	return c->mss < COLO_MAX_PIECE ? c->mss : COLO_MAX_PIECE;
}

/*
 * Send w->n bytes (0: a bare ack) from c->released on as a frame of its own, made from this skb,
 * the buffer and the header in w->new. The skb is unusable afterwards. Returns 0 or
 * R_PUNT_HELPER_FAILED.
 */
static __always_inline u32 send_piece(struct __sk_buff *skb, struct colo_conn *c,
				      struct colo_buffer *st, struct colo_work *w)
{
	u64 l4 = c->l4, n = w->n, pos = w->pos;
	u32 check;

	if (bpf_skb_change_tail(skb, l4 + c->doff + n, 0))
		return R_PUNT_HELPER_FAILED;
	if (n) {
		BOUND1(n, COLO_MAX_PIECE);
		VERIFIER_BOUND(pos, COLO_BUFFER - 1);
		if (bpf_skb_store_bytes(skb, l4 + c->doff, st->ring + pos, n, 0))
			return R_PUNT_HELPER_FAILED;
	}
	w->sum = w->addresses + bpf_htons(c->doff + w->n);
	set_lengths(c, w, w->n);
	l4 = c->l4;
	VERIFIER_BOUND(l4, 63);
	*(__be32 *)(w->new + l4 + 4) = bpf_htonl(c->released - (u32)w->probe);
	*(u16 *)(w->new + l4 + 16) = 0;
	if (!w->partial) {
		w->sum += (u32)bpf_csum_diff(0, 0, (void *)(w->new + l4), header_size(c), 0);
		sum_buffer(st, w);
	}
	check = fold16(w->sum);
	l4 = c->l4;
	VERIFIER_BOUND(l4, 63);
	*(u16 *)(w->new + l4 + 16) = check ^ (w->partial ? 0 : 0xFFFF);
	n = c->l4 + c->doff;
	BOUND1(n, 127);
	if (bpf_skb_store_bytes(skb, 0, w->new, n, 0))
		return R_PUNT_HELPER_FAILED;
	skb->mark = w->mark;
	if (bpf_clone_redirect(skb, w->out, w->redirect_flags))
		return R_PUNT_HELPER_FAILED;
	c->released += (u32)w->n;
	return 0;
}

/*
 * Send released..w->upto, which both guests have sent, in segments; if the range is empty, send a
 * bare ack. Returns 0 or R_PUNT_HELPER_FAILED.
 */
static __always_inline u32 send_pieces(struct __sk_buff *skb, struct colo_conn *c,
				       struct colo_buffer *st, struct colo_work *w)
{
	u64 sum = bpf_htons(PROTO_TCP);

	if (c->l4 == 34) {
		sum += (u64) * (u32 *)(c->hdr + 26) + *(u32 *)(c->hdr + 30);
	} else {
#pragma unroll
		for (int i = 0; i < 8; i++)
			sum += *(u32 *)(c->hdr + 22 + 4 * i);
	}
	w->addresses = sum;
	new_header(c, w, c->released, 0, 0);
	if ((u32)w->upto == c->released) /* RFC 3168 section 6.1.4: a bare ack is not ECN-capable */
		w->new[15] &= c->l4 == 34 ? 0xFC : 0xCF;
#pragma clang loop unroll(disable)
	for (int i = 0; i < COLO_MAX_PIECES; i++) {
		u64 n = (u32)((u32)w->upto - c->released), till, pos;

		if (i && !n)
			break;
		pos = (u32)(c->released - c->base_seq) & (COLO_BUFFER - 1);
		till = COLO_BUFFER - pos;
		if (n > piece_size(c))
			n = piece_size(c);
		if (n > till)
			n = till;
		w->n = n;
		w->pos = pos;
		if (send_piece(skb, c, st, w))
			return R_PUNT_HELPER_FAILED;
	}
	note_advertised(c, allowed_ack(c), allowed_win(c));
	return 0;
}

#endif
