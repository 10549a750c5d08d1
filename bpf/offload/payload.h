/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Copy a frame's payload into a buffer, or compare the two. */
#ifndef COLO_PAYLOAD_H
#define COLO_PAYLOAD_H

/* w->act: what decide() is about to do. */
#define ACT_NOTHING 0
#define ACT_PASS    1 /* the PVM's frame passes */
#define ACT_REWRITE 2 /* the SVM's frame is turned into the PVM's */
#define ACT_PIECES  3 /* send up to w->upto in pieces, or a bare ack */

/*
 * Scratch space for one frame. A value that is stored here and read back is unknown to the
 * verifier, wherever it came from. Different paths therefore merge, and each loop is verified once
 * instead of once for each path that leads to it. That is why the fields are volatile, and why
 * decide() is in three parts.
 */
struct colo_work {
	__u8 data[2 * COLO_STEP + 128];
	__u8 old[128]; /* the frame's own header */
	__u8 new[128]; /* the header to write over it */
	volatile __u64 udp, side, len, flags, ack, win, l4, doff, partial; /* of the frame */
	volatile __u64 at;    /* offset in the frame of the next byte to process */
	volatile __u64 seq;   /* sequence number of that byte */
	volatile __u64 equal; /* number of bytes to compare with the buffer */
	volatile __u64 left;  /* bytes left in all; those after `equal` are put into the buffer */
	volatile __u64 now, out, redirect_flags, mark; /* out: egress ifindex */
	/* how far `released` moves if the frame leaves */
	volatile __u64 moves;
	volatile __u64 released, adv_ack, p_ack, p_win,
		ack_pending;	   /* of the connection, as it was before this frame */
	volatile __u64 fin, meets; /* carries a FIN; meets bytes that wait */
	/* >0: send a bare ack that the client must answer, so many bytes below `released` */
	volatile __u64 probe;
	/* a retransmission; and whether its released bytes are still in the buffer */
	volatile __u64 again, kept;
	volatile __u64 n, pos, err, upto, sum, addresses, act;
};

/* One per CPU: programs run with bottom halves off. */
BPF_TABLE("array", u32, struct colo_work, works, COLO_AS_CONFIGURED);

/*
 * Tell the verifier that 1 <= x <= mask + 1, where mask + 1 is a power of two. Changes no value in
 * that range.
 */
#define BOUND1(x, mask) asm volatile("%0 += -1\n%0 &= %1\n%0 += 1" : "+r"(x) : "i"(mask))

#define DIFFER64(p, q)                                                                             \
	(((p)[0] ^ (q)[0]) | ((p)[1] ^ (q)[1]) | ((p)[2] ^ (q)[2]) | ((p)[3] ^ (q)[3]) |           \
	 ((p)[4] ^ (q)[4]) | ((p)[5] ^ (q)[5]) | ((p)[6] ^ (q)[6]) | ((p)[7] ^ (q)[7]))

/*
 * Compare w->n (1 to COLO_STEP) bytes at w->data + 64 with the buffer at `pos`; returns 0 if they
 * are equal. The last 64 bytes are compared as one more block, which overlaps the block before it.
 * With fewer than 64 bytes, that block starts with bytes before the data, which are made equal
 * first. So there is no tail to handle, whose masks would cost the verifier more than everything
 * else.
 */
static __always_inline u64 differ(struct colo_work *w, struct colo_buffer *st, u64 pos)
{
	u64 *p = (u64 *)w->data, *q = (u64 *)(st->before + pos), x = 0, n = w->n;

#pragma unroll
	for (int i = 0; i < 8; i++)
		p[i] = q[i];
#pragma clang loop unroll(disable)
	for (u64 i = 1; i <= COLO_STEP / 64; i++) {
		if (i * 64 > n)
			break;
		x |= DIFFER64(p + i * 8, q + i * 8);
	}
	n = w->n;
	BOUND1(n, COLO_STEP - 1);
	p = (u64 *)(w->data + n);
	q = (u64 *)(st->before + pos + n);
	return x | DIFFER64(p, q);
}

/*
 * Walk the payload: compare the first w->equal bytes of w->left with the buffer, and store the
 * rest. Sets w->err to the reason for handing over; otherwise it stays 0.
 */
static __always_inline void compare_payload(struct __sk_buff *skb, struct colo_conn *c,
					    struct colo_buffer *st, struct colo_work *w)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < COLO_STEPS; i++) {
		u64 n = (u32)w->left, pos, till, equal = (u32)w->equal;

		if (!n)
			return;
		pos = (u32)((u32)w->seq - c->base_seq) & (COLO_BUFFER - 1);
		till = COLO_BUFFER - pos;
		if (equal && n > equal)
			n = equal;
		if (n > COLO_STEP)
			n = COLO_STEP;
		if (n > till)
			n = till;
		w->n = n;
		w->pos = pos;
		n = w->n;
		pos = w->pos;
		BOUND1(n, COLO_STEP - 1);
		VERIFIER_BOUND(pos, COLO_BUFFER - 1);
		if (w->equal) {
			if (bpf_skb_load_bytes(skb, (u32)w->at, w->data + 64, n)) {
				w->err = R_PUNT_HELPER_FAILED;
				return;
			}
			if (differ(w, st, pos)) {
				w->err = R_PUNT_DIFFERS;
				return;
			}
			w->equal -= w->n;
		} else if (bpf_skb_load_bytes(skb, (u32)w->at, st->ring + pos, n)) {
			w->err = R_PUNT_HELPER_FAILED;
			return;
		}
		w->seq = (u32)w->seq + (u32)w->n;
		w->at += w->n;
		w->left -= w->n;
	}
	if (w->left)
		w->err = R_PUNT_BUFFER_FULL;
}

#endif
