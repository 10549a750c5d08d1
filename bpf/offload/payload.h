/* SPDX-License-Identifier: GPL-2.0-or-later */
/* From a frame into a buffer, or against it. */
#ifndef COLO_PAYLOAD_H
#define COLO_PAYLOAD_H

/* What decide() is about to do: w->act. */
#define ACT_NOTHING 0
#define ACT_PASS    1 /* the PVM's frame passes */
#define ACT_REWRITE 2 /* the SVM's frame becomes the PVM's */
#define ACT_PIECES  3 /* w->upto is reached in pieces, or a bare ack sent */

/*
 * What a frame is worked on with. What is stored here and read again is anything to the
 * verifier, however it came about: paths meet, and the loops are walked once instead of once
 * for each path that leads to them. Hence volatile, and hence decide() in three parts.
 */
struct colo_work {
	__u8 data[2 * COLO_STEP + 128];
	__u8 old[128]; /* the frame's own header */
	__u8 new[128]; /* what is written over it */
	volatile __u64 udp, side, len, flags, ack, win, l4, doff, partial; /* of the frame */
	volatile __u64 at;    /* next byte of the frame to be looked at */
	volatile __u64 seq;   /* its sequence number */
	volatile __u64 equal; /* so many bytes are to be compared with the buffer */
	volatile __u64 left;  /* so many in all; those behind `equal` are put into the buffer */
	volatile __u64 now, out, redirect_flags, mark; /* out: egress ifindex */
	volatile __u64 moves;			       /* by how much rel does, if it leaves */
	volatile __u64 released, adv_ack, p_ack, p_win,
		ack_pending;	    /* of the connection, before all that */
	volatile __u64 fin, meets;  /* it ends with a FIN; what it says meets what waits */
	volatile __u64 probe;	    /* 1: a bare ack is to be answered */
	volatile __u64 again, kept; /* sent again; of released bytes: are they still here? */
	volatile __u64 n, pos, err, upto, sum, addresses, act;
};

/* One per CPU; programs run with bottom halves off. */
BPF_TABLE("array", u32, struct colo_work, works, COLO_MAX_CPUS);

/* 1 <= x <= mask, for the verifier; mask + 1 is a power of two. Changes no value in range. */
#define BOUND1(x, mask) asm volatile("%0 += -1\n%0 &= %1\n%0 += 1" : "+r"(x) : "i"(mask))

#define DIFFER64(p, q)                                                                             \
	(((p)[0] ^ (q)[0]) | ((p)[1] ^ (q)[1]) | ((p)[2] ^ (q)[2]) | ((p)[3] ^ (q)[3]) |           \
	 ((p)[4] ^ (q)[4]) | ((p)[5] ^ (q)[5]) | ((p)[6] ^ (q)[6]) | ((p)[7] ^ (q)[7]))

/*
 * w->n (1 to COLO_STEP) bytes at w->data + 64 against the buffer at `pos`: 0 if equal. The last 64
 * bytes are one more block, which overlaps the one before it; of fewer than 64 the block begins
 * with bytes before them, which are made equal first. So there is no tail, whose masks would
 * cost the verifier more than all the rest.
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

/* Walks the payload: compares the first w->equal bytes of w->left with the buffer, keeps the rest.
 * w->err: 0, or the reason to hand over. */
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
