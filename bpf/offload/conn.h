/* SPDX-License-Identifier: GPL-2.0-or-later */
/* The table of offloaded connections and the lock of each; offload/offload.h has the argument. */
#ifndef COLO_CONN_H
#define COLO_CONN_H

/*
 * key: the connection. Not preallocated. Writers: user space makes and deletes entries; the
 * programs of the fast path change them.
 */
BPF_F_TABLE("hash", struct colo_flow_key, struct colo_conn, conns, COLO_AS_CONFIGURED,
	    BPF_F_NO_PREALLOC);

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
		for (int j = 0; j < 8; j++) /* burns time in few instructions */
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
 * Note the ack of a client's frame for the PVM. The client will not ask again for what it has
 * acked, so the fast path may forget those bytes. That is the only decision based on this value:
 * whatever it is, no byte leaves uncompared. It is the latest ack, not the highest. A forged or
 * overtaken one lasts until the client's next segment, and so does one of an earlier connection
 * with the same key.
 *
 * Race: any CPU writes this without the lock. It is one aligned word, so a reader gets either this
 * ack or the one before it. An older ack is just as true, only less recent. The worst that follows
 * is that more bytes are kept than needed, or that a retransmission of the PVM is punted.
 */
static __always_inline void note_ack(struct colo_conn *c, const struct pkt *p)
{
	u64 ack = CLIENT_ACK_KNOWN | p->ack;

	if (c->client_ack != ack)
		c->client_ack = ack;
}

#endif
