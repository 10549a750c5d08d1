/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Connections given to the fast path and taken from it, by user space. */
#ifndef COLO_CTL_H
#define COLO_CTL_H

struct colo_ctl {
	__u8 eth[14];
	__u16 op;
	__u32 punt_seq; /* GIVE: the last one that user space has seen */
	struct colo_flow_key key;
	__u32 epoch;
	__u32 rel;
	__u32 p_ack;
	__u32 s_ack;
	__u32 adv_ack;
	__u16 p_win;
	__u16 s_win;
	__u16 adv_win;
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
	if (m->op == CTL_RECLAIM) {
		c->owner = OWNER_USER;
	} else if (c->owner != OWNER_USER) {
		r = CTL_REFUSED;
	} else if (m->op == CTL_FREE) {
		if (c->buffer)
			buffer_free(c);
		c->nxt = c->rel;
		c->pending = 0;
		c->since_ns = 0;
		c->epoch = 0; /* the words are void */
	} else if (m->op == CTL_CLAIM) {
		c->since_ns = 0;
		/* User space writes into it next: it is not for others to take. */
		if (buffer_claim(c, &key))
			outstanding_since(c, bpf_ktime_get_ns());
		else
			r = CTL_FULL;
	} else if (c->punt_seq != m->punt_seq) {
		r = CTL_REFUSED;
	} else if ((m->nxt != m->org || m->pending) && !c->buffer) {
		r = CTL_FULL; /* somebody has taken it meanwhile */
	} else {
		c->epoch = m->epoch;
		c->rel = m->rel;
		c->org = m->org;
		c->nxt = m->nxt;
		c->ahead = m->ahead;
		c->p_ack = m->p_ack;
		c->s_ack = m->s_ack;
		c->adv_ack = m->adv_ack;
		c->p_win = m->p_win;
		c->s_win = m->s_win;
		c->adv_win = m->adv_win;
		c->mss = m->mss;
		c->pending = m->pending;
		c->fin_known = 0;
		c->l4 = m->l4;
		c->doff = m->doff;
		__builtin_memcpy(c->hdr, m->hdr, sizeof(c->hdr));
		c->seen_ns = bpf_ktime_get_ns();
		since = m->since_ns ? m->since_ns : c->seen_ns;
		outstanding_since(c, m->nxt != m->rel || m->pending ? since : 0);
		__builtin_memcpy(c->memo, m->memo, sizeof(c->memo));
		c->owner = OWNER_KERNEL;
	}
	conn_unlock(c);
	return r;
}

#endif
