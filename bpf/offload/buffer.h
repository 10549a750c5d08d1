/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The rings that hold waiting bytes, and their owners. Used under the lock of the connection. */
#ifndef COLO_BUFFER_H
#define COLO_BUFFER_H

/*
 * The slack around the ring is for offsets that the verifier considers possible, and for differ().
 */
struct colo_buffer {
	__u8 before[64];
	__u8 ring[COLO_BUFFER + 2 * COLO_STEP + 128];
};

BPF_F_TABLE("array", u32, struct colo_buffer, buffers, COLO_AS_CONFIGURED, BPF_F_MMAPABLE);
BPF_F_TABLE("array", u32, struct colo_owner, owners, COLO_AS_CONFIGURED, BPF_F_MMAPABLE);

/* Histogram of the time that released bytes have waited: log2 of microseconds. */
#define WAIT_BUCKETS 24
BPF_TABLE("percpu_array", u32, u64, offload_waits, WAIT_BUCKETS);

/* When a guest last sent something new, more than an ack (CLOCK_MONOTONIC). */
BPF_TABLE("percpu_array", u32, u64, offload_moved, 1);

/*
 * Claim a buffer for the connection: a free one, or one whose owner has nothing outstanding in it
 * and keeps only released bytes in case the PVM sends them again. That one is taken under its
 * owner's lock. There is no deadlock, because a CPU that holds one connection's lock never waits
 * for another's.
 */
static __always_inline int buffer_claim(struct colo_conn *c, struct colo_flow_key *key)
{
	u32 h = (u32)key->client_port << 16 | key->guest_port;

	if (c->buffer)
		return 1;
	/* The final mixing step of MurmurHash3: keys that differ only in ports must spread. */
	h ^= key->client[3] ^ key->client[0];
	h ^= h >> 16;
	h *= 0x85EBCA6Bu;
	h ^= h >> 13;
	h *= 0xC2B2AE35u;
	h ^= h >> 16;
#pragma clang loop unroll(disable)
	for (int i = 0; i < 2 * COLO_BUFFER_PROBES; i++) {
		u32 slot = (h + (i % COLO_BUFFER_PROBES)) % COLO_BUFFERS, mine = 0;
		struct colo_owner *o = owners.lookup(&slot);

		if (!o)
			continue;
		if (__sync_val_compare_and_swap(&o->taken, 0, 1) == 0) {
			mine = 1;
		} else if (i >= COLO_BUFFER_PROBES && !o->since_ns) {
			struct colo_flow_key whose = o->key;
			struct colo_conn *other = conns.lookup(&whose);

			if (!other || __sync_val_compare_and_swap(&other->lock, 0, 1))
				continue;
			if (other->buffer == slot + 1 && !other->since_ns) {
				other->buffer = 0;
				mine = 1;
			}
			__sync_val_compare_and_swap(&other->lock, 1, 0);
		}
		if (mine) {
			o->key = *key;
			o->since_ns = c->since_ns;
			c->buffer = slot + 1;
			c->base_seq = c->released;
			return 1;
		}
	}
	return 0;
}

static __always_inline void buffer_free(struct colo_conn *c)
{
	u32 slot = c->buffer - 1;
	struct colo_owner *o = owners.lookup(&slot);

	c->buffer = 0;
	if (o) {
		o->since_ns = 0;
		__sync_val_compare_and_swap(&o->taken, 1, 0);
	}
}

/* Record that bytes are outstanding since `now`, or that fewer are than before; 0: none are. */
static __always_inline void outstanding_since(struct colo_conn *c, u64 now)
{
	u32 slot = c->buffer - 1;
	struct colo_owner *o;

	c->since_ns = now;
	if (!c->buffer)
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
	n = offload_waits.lookup(&bucket);
	if (n)
		(*n)++;
}

static __always_inline void note_moved(u64 now)
{
	u32 slot = 0;
	u64 *moved = offload_moved.lookup(&slot);

	if (moved)
		*moved = now;
}

/*
 * Update the times after each step. A buffer with nothing outstanding is kept until others take it.
 */
static __always_inline void settle(struct colo_conn *c, u64 now, int moved)
{
	/*
	 * Keep next less than 2 * COLO_BUFFER beyond base_seq, so that differences cannot wrap
	 * around.
	 */
	if (c->next - c->base_seq >= 2 * COLO_BUFFER)
		c->base_seq += COLO_BUFFER;
	if (c->released == c->next && !c->ack_pending) {
		if (c->since_ns)
			outstanding_since(c, 0);
	} else if (moved || !c->since_ns) {
		outstanding_since(c, now);
	}
}

/* Sequence number of the oldest byte in the buffer. */
static __always_inline u32 oldest(const struct colo_conn *c)
{
	return c->next - c->base_seq > COLO_BUFFER ? c->next - COLO_BUFFER : c->base_seq;
}

#endif
