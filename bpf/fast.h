/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Tier K: established TCP in order is compared and released here, and Python
 * never sees it. tests/sim/fast.py is the same in Python;
 * tests/netns/test_fast_differential.py compares the two frame by frame.
 *
 * One guest is ahead of the other. Its bytes, rel..nxt, are in a stash; when the
 * other's arrive they are compared, and what is equal leaves at once:
 *  - the PVM is the late one: its own frame passes;
 *  - the SVM is the late one: its frame becomes the PVM's, the payload being
 *    the same, by writing the PVM's newest header over its own;
 *  - their segments end elsewhere: new ones are built from the stash.
 * A header that leaves carries the smaller of both guests' acks and the smaller
 * of their window fields, so that the client is never told more than both have
 * said (I2). An ack that came too early for that leaves with the SVM's next
 * frame. Nothing verified ever waits: rel is both what has left and what is equal.
 *
 * Everything else is a surprise: the connection goes to user space, whole, with
 * the frame that surprised. Python takes over the words and the stash, decides as
 * it always does, and gives the connection back when nothing is outstanding.
 *
 * Races. Frames of the two guests come on any CPU at the same time, and user
 * space wants to take connections away. Everything in colo_conn but the lock is
 * touched only by who has changed `lock` from 0 to 1. bpf_spin_lock() would not
 * do: no helper may be called under it.
 *  - No byte leaves uncompared: comparing, moving rel and deciding are one
 *    critical section, and a frame's verdict is taken from it alone.
 *  - No frame is lost: who does not get the lock in COLO_SPINS tries (its owner's
 *    virtual CPU has been stopped, say) captures its frame for user space, which
 *    takes the connection over before it looks at the frame.
 *  - The owner cannot wait for itself: programs run with bottom halves off, and
 *    fast_ctl, which may not, does little; whoever interrupts it goes to user space.
 *  - TIER_U is left by CTL_GIVE only, under the lock, and only if no frame has been
 *    captured since the one user space has last seen (`captured`): no frame in the
 *    event ring can belong before those that tier K decides from then on. A frame that
 *    went there without the lock is not counted; it makes user space seize again.
 *  - A frame that leaves here may overtake one that another CPU has just let go, as on
 *    every path with two CPUs; steer flows (RPS) where that matters. Released bytes stay
 *    released, so order is all that it can change.
 *  - The epoch is part of the words: what was learnt in another one is handed over,
 *    not used (I7). A checkpoint first sets MODE_CHECKPOINT, in which every connection that
 *    moves is handed over; user space then seizes those with a stash before it commits.
 *  - Entries are made and deleted by user space, which deletes them in TIER_U only, when they
 *    have not been used for a long time.
 */
#ifndef COLO_FAST_H
#define COLO_FAST_H

#define CTL_SEEN_STEP_NS 1000000000ULL

/* key: the connection. Not preallocated. Writers: user space makes and deletes; fast_*. */
BPF_F_TABLE("hash:" PIN_DIR "/conns", struct colo_flow_key, struct colo_conn, conns, COLO_MAX_CONNS,
	    BPF_F_NO_PREALLOC);

/* Slack around the ring, for what the verifier thinks possible and for differ(). */
struct colo_stash {
	__u8 before[64];
	__u8 ring[COLO_STASH + 2 * COLO_STEP + 128];
};

BPF_F_TABLE("array:" PIN_DIR "/stashes", u32, struct colo_stash, stashes, COLO_STASHES,
	    BPF_F_MMAPABLE);
BPF_F_TABLE("array:" PIN_DIR "/owners", u32, struct colo_owner, owners, COLO_STASHES,
	    BPF_F_MMAPABLE);

/*
 * What a frame is worked on with. What is stored here and read again is anything to the
 * verifier, however it came about: paths meet, and the loops are walked once instead of once
 * for each path that leads to them. Hence volatile, and hence the order in decide().
 */
struct colo_work {
	__u8 data[2 * COLO_STEP + 128];
	__u8 old[128];						      /* the frame's own header */
	__u8 new[128];						      /* what is written over it */
	volatile __u64 side, len, flags, ack, win, l4, doff, partial; /* of the frame */
	volatile __u64 at;    /* next byte of the frame to be looked at */
	volatile __u64 seq;   /* its sequence number */
	volatile __u64 equal; /* so many bytes are to be compared with the stash */
	volatile __u64 left;  /* so many in all; those behind `equal` are put into the stash */
	volatile __u64 now, out, way, mark; /* out: to which device, by which way */
	volatile __u64 moves;		    /* by how much rel does, if it leaves */
	volatile __u64 rel, out_ack;	    /* as before that */
	volatile __u64 n, pos, err, upto, sum, addresses, act;
};

/* One per CPU; programs run with bottom halves off. */
BPF_TABLE("array", u32, struct colo_work, works, COLO_MAX_CPUS);

/* How long released bytes have waited: log2 of microseconds. */
#define WAIT_BUCKETS 24
BPF_TABLE_PINNED("percpu_array", u32, u64, fast_waits, WAIT_BUCKETS, PIN_DIR "/fast_waits");

/* 1 <= x <= mask, for the verifier; mask + 1 is a power of two. Changes no value in range. */
#define BOUND1(x, mask) asm volatile("%0 += -1\n%0 &= %1\n%0 += 1" : "+r"(x) : "i"(mask))

static __always_inline int seq_later(u32 a, u32 b)
{
	return (s32)(a - b) > 0;
}

static __always_inline int conn_lock(struct colo_conn *c)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < COLO_SPINS; i++) {
		if (__sync_val_compare_and_swap(&c->lock, 0, 1) == 0)
			return 1;
#pragma unroll
		for (int j = 0; j < 8; j++) /* passes time in few instructions */
			bpf_ktime_get_ns();
	}
	return 0;
}

static __always_inline void conn_unlock(struct colo_conn *c)
{
	__sync_val_compare_and_swap(&c->lock, 1, 0);
}

static __always_inline struct colo_conn *conn_find(struct colo_flow_key *key)
{
	return conns.lookup(key);
}

/*
 * A stash of one's own: a free one, or one that its owner has nothing outstanding in, but only
 * bytes that have left, kept in case the PVM sends them again. It is taken under the owner's
 * lock, for which nobody waits who holds another: no deadlock.
 */
static __always_inline int stash_claim(struct colo_conn *c, struct colo_flow_key *key)
{
	u32 h = (u32)key->client_port << 16 | key->guest_port;

	if (c->stash)
		return 1;
	/* MurmurHash3's last step: ports alone must spread. */
	h ^= key->client[3] ^ key->client[0];
	h ^= h >> 16;
	h *= 0x85EBCA6Bu;
	h ^= h >> 13;
	h *= 0xC2B2AE35u;
	h ^= h >> 16;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2 * COLO_STASH_PROBES; i++) {
		u32 slot = (h + (i % COLO_STASH_PROBES)) % COLO_STASHES, mine = 0;
		struct colo_owner *o = owners.lookup(&slot);

		if (!o)
			continue;
		if (__sync_val_compare_and_swap(&o->taken, 0, 1) == 0) {
			mine = 1;
		} else if (i >= COLO_STASH_PROBES && !o->since_ns) {
			struct colo_flow_key whose = o->key;
			struct colo_conn *other = conns.lookup(&whose);

			if (!other || __sync_val_compare_and_swap(&other->lock, 0, 1))
				continue;
			if (other->stash == slot + 1 && !other->since_ns) {
				other->stash = 0;
				mine = 1;
			}
			__sync_val_compare_and_swap(&other->lock, 1, 0);
		}
		if (mine) {
			o->key = *key;
			o->since_ns = c->since_ns;
			c->stash = slot + 1;
			c->org = c->rel;
			return 1;
		}
	}
	return 0;
}

static __always_inline void stash_free(struct colo_conn *c)
{
	u32 slot = c->stash - 1;
	struct colo_owner *o = owners.lookup(&slot);

	c->stash = 0;
	if (o) {
		o->since_ns = 0;
		__sync_val_compare_and_swap(&o->taken, 1, 0);
	}
}

/* Something is outstanding from `now` on, or less than before; 0: nothing is. */
static __always_inline void outstanding_since(struct colo_conn *c, u64 now)
{
	u32 slot = c->stash - 1;
	struct colo_owner *o;

	c->since_ns = now;
	if (!c->stash)
		return;
	o = owners.lookup(&slot);
	if (o)
		o->since_ns = now;
}

static __always_inline void note_wait(u64 ns)
{
	u64 us = ns / 1000, *n;
	u32 bucket = 0;

#pragma unroll
	for (int i = 0; i < WAIT_BUCKETS - 1; i++)
		bucket += (us >> i) != 0;
	n = fast_waits.lookup(&bucket);
	if (n)
		(*n)++;
}

/* After each step. A stash with nothing outstanding is kept, for others to take. */
static __always_inline void settle(struct colo_conn *c, u64 now, int moved)
{
	/* Never 2 * COLO_STASH or more beyond org, so that differences do not wrap around. */
	if (c->nxt - c->org >= 2 * COLO_STASH)
		c->org += COLO_STASH;
	if (c->rel == c->nxt && !c->pending) {
		if (c->since_ns)
			outstanding_since(c, 0);
	} else if (moved || !c->since_ns) {
		outstanding_since(c, now);
	}
}

/* The oldest byte in the stash. */
static __always_inline u32 oldest(const struct colo_conn *c)
{
	return c->nxt - c->org > COLO_STASH ? c->nxt - COLO_STASH : c->org;
}

#define DIFFER64(p, q)                                                                             \
	(((p)[0] ^ (q)[0]) | ((p)[1] ^ (q)[1]) | ((p)[2] ^ (q)[2]) | ((p)[3] ^ (q)[3]) |           \
	 ((p)[4] ^ (q)[4]) | ((p)[5] ^ (q)[5]) | ((p)[6] ^ (q)[6]) | ((p)[7] ^ (q)[7]))

/*
 * w->n (1 to COLO_STEP) bytes at w->data + 64 against the stash at `pos`: 0 if equal. The last 64
 * bytes are one more block, which overlaps the one before it; of fewer than 64 the block begins
 * with bytes before them, which are made equal first. So there is no tail, whose masks would
 * cost the verifier more than all the rest.
 */
static __always_inline u64 differ(struct colo_work *w, struct colo_stash *st, u64 pos)
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

/* In place of a reason: not decided, or handed over (then c->why tells). */
#define FAST_NO 0

/* Walks the payload: compares the first w->equal bytes of w->left with the stash, keeps the rest.
 * w->err: 0, or the reason to hand over. */
static __always_inline void walk_payload(struct __sk_buff *skb, struct colo_conn *c,
					 struct colo_stash *st, struct colo_work *w)
{
#pragma clang loop unroll(disable)
	for (int i = 0; i < COLO_STEPS; i++) {
		u64 n = (u32)w->left, pos, till, equal = (u32)w->equal;

		if (!n)
			return;
		pos = (u32)((u32)w->seq - c->org) & (COLO_STASH - 1);
		till = COLO_STASH - pos;
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
		VERIFIER_BOUND(pos, COLO_STASH - 1);
		if (w->equal) {
			if (bpf_skb_load_bytes(skb, (u32)w->at, w->data + 64, n)) {
				w->err = R_HAND_HELPER;
				return;
			}
			if (differ(w, st, pos)) {
				w->err = R_HAND_DIFFERS;
				return;
			}
			w->equal -= w->n;
		} else if (bpf_skb_load_bytes(skb, (u32)w->at, st->ring + pos, n)) {
			w->err = R_HAND_HELPER;
			return;
		}
		w->seq = (u32)w->seq + (u32)w->n;
		w->at += w->n;
		w->left -= w->n;
	}
	if (w->left)
		w->err = R_HAND_FULL;
}

/* The ack and the window that the client may be told. */
static __always_inline u32 allowed_ack(const struct colo_conn *c)
{
	return seq_later(c->p_ack, c->s_ack) ? c->s_ack : c->p_ack;
}

static __always_inline u16 allowed_win(const struct colo_conn *c)
{
	return c->p_win < c->s_win ? c->p_win : c->s_win;
}

/* Something has left with them. */
static __always_inline void told(struct colo_conn *c, u32 ack, u16 win)
{
	c->out_ack = ack;
	c->out_win = win;
	if (c->pending && !seq_later(c->p_ack, ack))
		c->pending = 0;
}

/* Is there anything new for the client in an ack without data? As window.py with no scale. */
static __always_inline int ack_due(const struct colo_conn *c)
{
	u16 win = allowed_win(c);

	if (!c->l4)
		return 0;
	if (c->pending && seq_later(allowed_ack(c), c->out_ack))
		return 1;
	return c->out_win < c->p_win && win > c->out_win &&
	       (win == c->p_win || win >= 2 * (u32)c->out_win + 1);
}

/* The PVM's header, from now on that of all that leaves. */
static __always_inline u32 keep_header(struct __sk_buff *skb, struct colo_conn *c,
				       const struct pkt *p)
{
	u64 n = p->l4_off + p->doff;

	BOUND1(n, 127);
	if (bpf_skb_load_bytes(skb, 0, c->hdr, n))
		return R_HAND_HELPER;
	c->l4 = p->l4_off;
	c->doff = p->doff;
	return 0;
}

/* IP's length fields in w->new, for `len` bytes behind TCP's header, and IPv4's checksum. */
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

/* Prepares w->new: the PVM's header for `len` bytes from `seq` on. TCP's checksum is left as it
 * was in the PVM's. */
static __always_inline void new_header(const struct colo_conn *c, struct colo_work *w, u32 seq,
				       u32 len, u8 push)
{
	u64 l4 = c->l4;
	u8 *t;

	__builtin_memcpy(w->new, c->hdr, 128);
	set_lengths(c, w, len);
	VERIFIER_BOUND(l4, 63);
	t = w->new + l4;
	*(__be32 *)(t + 4) = bpf_htonl(seq);
	*(__be32 *)(t + 8) = bpf_htonl(allowed_ack(c));
	t[13] = TCP_ACK | push;
	*(__be16 *)(t + 14) = bpf_htons(allowed_win(c));
}

/* TCP's header length, for the verifier: at most 60, at least 1. */
static __always_inline u64 header_size(const struct colo_conn *c)
{
	u64 n = c->doff;

	VERIFIER_BOUND(n, 60);
	return n;
}

/*
 * The SVM's frame becomes the PVM's: its header, the same payload. The pseudo header does not
 * change (same addresses, same length), so a partial checksum stays right untouched.
 */
static __always_inline u32 become_pvm(struct __sk_buff *skb, struct colo_conn *c,
				      struct colo_work *w)
{
	u64 n = c->l4 + c->doff, l4 = c->l4, size;
	s64 change;

	BOUND1(n, 127);
	if (bpf_skb_load_bytes(skb, 0, w->old, n))
		return R_HAND_HELPER;
	new_header(c, w, c->rel, w->len, w->flags & TCP_PSH);
	VERIFIER_BOUND(l4, 63);
	*(u16 *)(w->new + l4 + 16) = *(u16 *)(w->old + l4 + 16);
	size = header_size(c);
	change = bpf_csum_diff((void *)(w->old + l4), size, (void *)(w->new + l4), size, 0);
	n = c->l4 + c->doff;
	BOUND1(n, 127);
	if (bpf_skb_store_bytes(skb, 0, w->new, n, 0))
		return R_HAND_HELPER;
	bpf_l4_csum_replace(skb, c->l4 + 16, 0, change, 0);
	return 0;
}

/* The PVM's own frame may leave, with no more of an ack and of a window than allowed. */
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
	if (!seq_later(c->out_ack, ack))
		told(c, ack, win);
}

static __always_inline u32 fold16(u64 x)
{
	x = (x & 0xFFFF) + ((x >> 16) & 0xFFFF) + ((x >> 32) & 0xFFFF) + (x >> 48);
	x = (x & 0xFFFF) + (x >> 16);
	return (x & 0xFFFF) + (x >> 16);
}

/* Older kernels sum at most 512 bytes in one call. */
#define SUM_STEP 512

/* Sum of w->n bytes of the stash at `pos`, which do not wrap. */
static __always_inline void sum_stash(struct colo_stash *st, struct colo_work *w)
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
		VERIFIER_BOUND(q, 2 * COLO_STASH - 1);
		if (q >= COLO_STASH)
			break;
		w->sum += (u32)bpf_csum_diff(0, 0, (void *)(st->ring + q), n, 0);
		w->at += n;
	}
	q = w->pos + (w->n & ~3ULL);
	VERIFIER_BOUND(q, 2 * COLO_STASH - 1);
	if (q < COLO_STASH + 4)
		w->sum += *(u32 *)(st->ring + q) & ((1ULL << ((w->n & 3) * 8)) - 1);
}

/*
 * Sends w->n bytes (0: a bare ack) from c->rel on as a frame of its own, made of this skb, the
 * stash and the header in w->new. The skb is spoilt. 0, or R_HAND_HELPER.
 */
static __always_inline u32 send_piece(struct __sk_buff *skb, struct colo_conn *c,
				      struct colo_stash *st, struct colo_work *w)
{
	u64 l4 = c->l4, n = w->n, pos = w->pos;
	u32 check;

	if (bpf_skb_change_tail(skb, l4 + c->doff + n, 0))
		return R_HAND_HELPER;
	if (n) {
		BOUND1(n, 2047);
		VERIFIER_BOUND(pos, COLO_STASH - 1);
		if (bpf_skb_store_bytes(skb, l4 + c->doff, st->ring + pos, n, 0))
			return R_HAND_HELPER;
	}
	w->sum = w->addresses + bpf_htons(c->doff + w->n);
	set_lengths(c, w, w->n);
	l4 = c->l4;
	VERIFIER_BOUND(l4, 63);
	*(__be32 *)(w->new + l4 + 4) = bpf_htonl(c->rel);
	*(u16 *)(w->new + l4 + 16) = 0;
	if (!w->partial) {
		w->sum += (u32)bpf_csum_diff(0, 0, (void *)(w->new + l4), header_size(c), 0);
		sum_stash(st, w);
	}
	check = fold16(w->sum);
	l4 = c->l4;
	VERIFIER_BOUND(l4, 63);
	*(u16 *)(w->new + l4 + 16) = check ^ (w->partial ? 0 : 0xFFFF);
	n = c->l4 + c->doff;
	BOUND1(n, 127);
	if (bpf_skb_store_bytes(skb, 0, w->new, n, 0))
		return R_HAND_HELPER;
	skb->mark = w->mark;
	if (bpf_clone_redirect(skb, w->out, w->way))
		return R_HAND_HELPER;
	c->rel += (u32)w->n;
	return 0;
}

/* Sends rel..w->upto, which both guests have sent, in segments; none if they are the same: a bare
 * ack. 0, or R_HAND_HELPER. */
static __always_inline u32 send_pieces(struct __sk_buff *skb, struct colo_conn *c,
				       struct colo_stash *st, struct colo_work *w)
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
	new_header(c, w, c->rel, 0, 0);
#pragma clang loop unroll(disable)
	for (int i = 0; i < COLO_MAX_PIECES; i++) {
		u64 n = (u32)((u32)w->upto - c->rel), till, pos;

		if (i && !n)
			break;
		pos = (u32)(c->rel - c->org) & (COLO_STASH - 1);
		till = COLO_STASH - pos;
		if (n > c->mss)
			n = c->mss;
		if (n > till)
			n = till;
		w->n = n;
		w->pos = pos;
		if (send_piece(skb, c, st, w))
			return R_HAND_HELPER;
	}
	told(c, allowed_ack(c), allowed_win(c));
	return 0;
}

/* Plain Ethernet, IP and TCP: no tags, no IP options, ACK and PSH, timestamps or no options. */
static __always_inline int is_plain(struct __sk_buff *skb, const struct pkt *p)
{
	__be32 option;

	if (skb->vlan_present || p->l3_off != 14 || p->l4_off != (p->is_v6 ? 54 : 34))
		return 0;
	if ((p->flags & ~TCP_PSH) != TCP_ACK)
		return 0;
	if (p->doff == 20)
		return 1;
	if (p->doff != 32 || bpf_skb_load_bytes(skb, p->l4_off + 20, &option, 4))
		return 0;
	return option == bpf_htonl(0x0101080A); /* RFC 7323 appendix A */
}

/* What decide() is about to do: w->act. */
#define ACT_NOTHING 0
#define ACT_PASS    1 /* the PVM's frame passes */
#define ACT_TURN    2 /* the SVM's frame becomes the PVM's */
#define ACT_PIECES  3 /* w->upto is reached in pieces, or a bare ack sent */

/*
 * The PVM's ack and window, and its header where others will need it. 0, or a reason.
 */
static __always_inline u32 hear_pvm(struct __sk_buff *skb, const struct pkt *p, struct colo_conn *c,
				    struct colo_flow_key *key, u16 win)
{
	int early = seq_later(p->ack, c->s_ack);
	u32 n = skb->gso_size ? skb->gso_size : p->payload_len;

	if (c->l4 && (c->l4 != p->l4_off || c->doff != p->doff))
		return R_HAND_ODD;
	/* The client counts equal acks (RFC 5681 2): they must not melt into one. */
	if (!p->payload_len && c->pending && p->ack == c->p_ack && win == c->p_win)
		return R_HAND_ODD;
	if (n > c->mss && n <= 2047)
		c->mss = n;
	if (early && !stash_claim(c, key))
		return R_HAND_NO_STASH;
	if (seq_later(c->p_ack, p->ack)) /* without a header the stash's bytes could not leave */
		return c->l4 || !p->payload_len ? 0 : R_HAND_ODD;
	if ((early || p->payload_len || win > c->s_win) && keep_header(skb, c, p))
		return R_HAND_HELPER;
	c->p_ack = p->ack;
	c->p_win = win;
	if (early)
		c->pending = 1;
	return 0;
}

/*
 * A frame of a connection that is locked and in tier K. Returns R_FAST_*, or R_HAND_* with
 * all words such that user space can go on from them with this frame.
 */
static __always_inline u32 decide(struct __sk_buff *skb, const struct pkt *p, struct colo_conn *c,
				  struct colo_flow_key *key, struct colo_work *w, u32 side,
				  int *verdict)
{
	u32 len = p->payload_len, out = c->nxt - c->rel, err, slot, act, reason, end, again = 0;
	u32 have = out && c->ahead == side ? c->nxt : c->rel;
	struct colo_stash *st;
	__be16 field;
	u16 win;

	/* 1. Is it plain, the next one, and is there room? */
	if (!is_plain(skb, p))
		return R_HAND_ODD;
	end = p->seq + len;
	if (p->seq != have) {
		/* Sent again, and still here? */
		if (!len || !c->stash || p->seq - oldest(c) > COLO_STASH || seq_later(end, have))
			return R_HAND_GAP;
		again = 1;
		if (side == SIDE_PVM && seq_later(end, c->rel)) {
			if (seq_later(c->rel, p->seq))
				return R_HAND_GAP;
			return R_FAST_ENDED; /* waits already */
		}
	}
	if (len && skb->len != p->l4_off + p->doff + len)
		return R_HAND_ODD; /* bytes behind the segment */
	if (!again && end - c->rel > COLO_STASH)
		return R_HAND_FULL;
	if (bpf_skb_load_bytes(skb, p->l4_off + 14, &field, 2))
		return R_HAND_HELPER;
	win = bpf_ntohs(field);
	if (side == SIDE_PVM) {
		err = hear_pvm(skb, p, c, key, win);
		if (err)
			return err;
	} else if (!seq_later(c->s_ack, p->ack)) {
		c->s_ack = p->ack;
		c->s_win = win;
	}
	if (len && !stash_claim(c, key))
		return R_HAND_NO_STASH;
	slot = c->stash ? c->stash - 1 : 0; /* a bare ack has none, but the verifier wants one */
	st = stashes.lookup(&slot);
	if (!st)
		return R_HAND_HELPER;
	w->len = len;
	w->flags = p->flags;
	w->ack = p->ack;
	w->win = win;
	w->l4 = p->l4_off;
	w->doff = p->doff;
	w->partial = p->csum_at;
	w->at = p->l4_off + p->doff;
	w->seq = p->seq;
	w->equal = again ? len : out && c->ahead != side ? (len < out ? len : out) : 0;
	w->upto = !again && w->equal && len > out ? c->nxt : c->rel;
	w->left = again && side == SIDE_SVM ? 0 : len; /* its first copy counts */
	w->moves = again ? 0 : len;
	w->err = 0;
	/* Pieces need the PVM's header, and this skb must have one of its size. */
	if (w->equal && !again && (side == SIDE_SVM || len > out) &&
	    (c->l4 != p->l4_off || c->doff != p->doff ||
	     (len > out && out > (u32)c->mss * (COLO_MAX_PIECES - 2))))
		return R_HAND_ODD;
	w->act = ACT_NOTHING;
	if (again && side == SIDE_PVM)
		w->act = ACT_PASS;
	else if (w->equal && !again)
		w->act = len > out ? ACT_PIECES : side == SIDE_PVM ? ACT_PASS : ACT_TURN;
	else if (side == SIDE_PVM && !len && !(out && c->ahead == SIDE_PVM) &&
		 !seq_later(p->ack, c->s_ack))
		w->act = ACT_PASS;
	else if (side == SIDE_SVM && ack_due(c) && c->l4 == p->l4_off && c->doff == p->doff)
		w->act = ACT_PIECES; /* of no byte */
	w->side = side;

	/* 2. Compare and keep. */
	walk_payload(skb, c, st, w);
	err = w->err;
	if (err)
		return err;

	/* 3. Nothing can go wrong from here on but helpers; the frame is decided. */
	len = w->moves;
	act = w->act;
	side = w->side;
	end = w->seq; /* behind the payload */
	w->rel = c->rel;
	w->out_ack = c->out_ack;
	reason = len || side == SIDE_PVM ? R_FAST_HELD : R_FAST_ENDED;
	if (len && seq_later(end, c->nxt)) {
		c->nxt = end;
		c->ahead = side;
	}
	if (act && len && c->since_ns)
		note_wait(w->now - c->since_ns);
	if (act > ACT_PASS) {
		w->out = way_to(c->hdr, w->now);
		w->way = w->out ? 0 : BPF_F_INGRESS;
		w->mark = w->out ? 0 : COLO_MARK; /* pvm_out lets it pass */
		if (!w->out)
			w->out = cfg(CFG_TAP);
	}
	if (act == ACT_PASS) {
		limit_pvm(skb, c, w);
		c->rel += len;
		*verdict = TC_ACT_OK;
		reason = R_FAST_PASSED;
	} else if (act == ACT_TURN) {
		if (become_pvm(skb, c, w)) {
			reason = R_HELPER_FAILED; /* the bytes stay outstanding: sent again */
		} else {
			told(c, allowed_ack(c), allowed_win(c));
			c->rel += len;
			skb->mark = w->mark;
			*verdict = bpf_redirect(w->out, w->way);
			reason = R_FAST_RELEASED;
		}
	} else if (act == ACT_PIECES) {
		reason = (u32)w->upto == c->rel ? R_FAST_ACKED : R_FAST_REBUILT;
		w->partial = is_partial(skb, w->partial);
		if (send_pieces(skb, c, st, w))
			reason = R_HELPER_FAILED;
	}
	/* Acks that leave do not make bytes that wait any younger. */
	settle(c, w->now, c->rel != w->rel || (c->rel == c->nxt && c->out_ack != w->out_ack));
	return reason;
}

/*
 * A TCP frame of the pair. Returns FAST_NO if tier K has no say: captured is then what the
 * event must carry. Else the reason to count, *verdict being what to do with the frame.
 */
static __always_inline u32 fast(struct __sk_buff *skb, const struct pkt *p, u32 side, u64 mode,
				u32 epoch, u32 *captured, int *verdict)
{
	u32 cpu = bpf_get_smp_processor_id(), r = FAST_NO, len = skb->len;
	struct colo_flow_key key = {};
	struct colo_work *w = works.lookup(&cpu);
	struct colo_conn *c;
	u64 now;

	__builtin_memcpy(key.guest, p->src, 16);
	__builtin_memcpy(key.client, p->dst, 16);
	key.guest_port = p->sport;
	key.client_port = p->dport;
	key.vlan = p->vlan;
	c = conn_find(&key);
	if (!c || !w)
		return FAST_NO;
	if (!conn_lock(c)) {
		count(PROG_FAST, R_HAND_BUSY, len);
		return FAST_NO;
	}
	now = bpf_ktime_get_ns();
	if (now - c->seen_ns > CTL_SEEN_STEP_NS)
		c->seen_ns = now;
	w->now = now;
	if (c->tier == TIER_K) {
		u32 p_ack = c->p_ack;
		u16 p_win = c->p_win;
		u8 pending = c->pending;

		if (mode != MODE_RUN || c->epoch != epoch || cfg(CFG_EPOCH) != epoch ||
		    cfg(CFG_MODE) != MODE_RUN || !cfg(CFG_FAST))
			r = R_HAND_MODE;
		else
			r = decide(skb, p, c, &key, w, side, verdict);
		if (r >= R_HAND_MODE) {
			count(PROG_FAST, r, len);
			/* The frame is user space's to judge, so it has not been here. */
			c->p_ack = p_ack;
			c->p_win = p_win;
			c->pending = pending;
			c->tier = TIER_U;
			c->why = r;
			r = FAST_NO;
		}
	}
	if (r == FAST_NO)
		*captured = ++c->captured;
	conn_unlock(c);
	return r;
}

struct colo_ctl {
	__u8 eth[14];
	__u16 op;
	__u32 captured; /* GIVE: the last one that user space has seen */
	struct colo_flow_key key;
	__u32 epoch;
	__u32 rel;
	__u32 p_ack;
	__u32 s_ack;
	__u32 out_ack;
	__u16 p_win;
	__u16 s_win;
	__u16 out_win;
	__u16 mss;
	__u32 nxt;
	__u32 org;
	__u8 ahead;
	__u8 pending;
	__u8 l4;
	__u8 doff;
	__u8 hdr[128];
	__u8 memo[64];
	__u64 since_ns; /* of what waits; 0: now */
} __attribute__((packed));

static __always_inline int control(void *data, void *data_end)
{
	struct colo_ctl *m = data;
	struct colo_flow_key key;
	struct colo_conn *c;
	int r = CTL_DONE;
	u64 since;

	if (data + sizeof(*m) > data_end)
		return CTL_UNKNOWN;
	__builtin_memcpy(&key, &m->key, sizeof(key));
	c = conn_find(&key);
	if (!c)
		return CTL_UNKNOWN;
	if (!conn_lock(c))
		return CTL_BUSY;
	if (m->op == CTL_SEIZE) {
		c->tier = TIER_U;
	} else if (c->tier != TIER_U) {
		r = CTL_REFUSED;
	} else if (m->op == CTL_FREE) {
		if (c->stash)
			stash_free(c);
		c->nxt = c->rel;
		c->pending = 0;
		c->since_ns = 0;
		c->epoch = 0; /* the words are void */
	} else if (m->op == CTL_CLAIM) {
		c->since_ns = 0;
		/* User space writes into it next: it is not for others to take. */
		if (stash_claim(c, &key))
			outstanding_since(c, bpf_ktime_get_ns());
		else
			r = CTL_FULL;
	} else if (c->captured != m->captured) {
		r = CTL_REFUSED;
	} else if ((m->nxt != m->org || m->pending) && !c->stash) {
		r = CTL_FULL; /* somebody has taken it meanwhile */
	} else {
		c->epoch = m->epoch;
		c->rel = m->rel;
		c->org = m->org;
		c->nxt = m->nxt;
		c->ahead = m->ahead;
		c->p_ack = m->p_ack;
		c->s_ack = m->s_ack;
		c->out_ack = m->out_ack;
		c->p_win = m->p_win;
		c->s_win = m->s_win;
		c->out_win = m->out_win;
		c->mss = m->mss > 2047 ? 2047 : m->mss; /* send_piece() */
		c->pending = m->pending;
		c->l4 = m->l4;
		c->doff = m->doff;
		__builtin_memcpy(c->hdr, m->hdr, sizeof(c->hdr));
		c->seen_ns = bpf_ktime_get_ns();
		since = m->since_ns ? m->since_ns : c->seen_ns;
		outstanding_since(c, m->nxt != m->rel || m->pending ? since : 0);
		__builtin_memcpy(c->memo, m->memo, sizeof(c->memo));
		c->tier = TIER_K;
	}
	conn_unlock(c);
	return r;
}

#endif
