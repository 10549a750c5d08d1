/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Control messages of user space: offload, reclaim and buffer operations on connections. */
#ifndef COLO_CONTROL_H
#define COLO_CONTROL_H

struct colo_ctl {
	__u8 eth[14];
	__u16 op;
	__u32 punt_seq; /* CTL_OFFLOAD: the last one that user space has seen */
	struct colo_flow_key key;
	__u32 epoch;
	__u32 released;
	__u32 p_ack;
	__u32 s_ack;
	__u32 adv_ack;
	__u16 p_win;
	__u16 s_win;
	__u16 adv_win;
	__u16 mss;
	__u32 next;
	__u32 base_seq;
	__u8 leader;
	__u8 ack_pending;
	__u8 l4;
	__u8 doff;
	__u8 scaled; /* the guest scales windows, so the client's SYN says how it does */
	__u8 hdr[128];
	__u8 cookie[64];
	__u64 since_ns; /* since when bytes wait; 0: now */
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
		c->next = c->released;
		c->ack_pending = 0;
		c->since_ns = 0;
		c->epoch = 0; /* the state is void */
	} else if (m->op == CTL_CLAIM) {
		c->since_ns = 0;
		/* User space writes into it next, so no other connection may take it. */
		if (buffer_claim(c, &key))
			outstanding_since(c, bpf_ktime_get_ns());
		else
			r = CTL_FULL;
	} else if (c->punt_seq != m->punt_seq) {
		r = CTL_REFUSED;
	} else if ((m->next != m->base_seq || m->ack_pending) && !c->buffer) {
		r = CTL_FULL; /* another connection has taken it meanwhile */
	} else {
		c->epoch = m->epoch;
		c->released = m->released;
		c->base_seq = m->base_seq;
		c->next = m->next;
		c->leader = m->leader;
		c->p_ack = m->p_ack;
		c->s_ack = m->s_ack;
		c->adv_ack = m->adv_ack;
		c->p_win = m->p_win;
		c->s_win = m->s_win;
		c->adv_win = m->adv_win;
		c->mss = m->mss;
		c->ack_pending = m->ack_pending;
		c->fin_known = 0;
		/* If nothing has left since the last time, what was doubted may well be missing. */
		if (c->begun != m->released)
			c->doubted = 0;
		c->begun = m->released;
		c->shift = m->scaled ? SHIFT_UNKNOWN : SHIFT_NONE;
		c->l4 = m->l4;
		c->doff = m->doff;
		__builtin_memcpy(c->hdr, m->hdr, sizeof(c->hdr));
		c->seen_ns = bpf_ktime_get_ns();
		since = m->since_ns ? m->since_ns : c->seen_ns;
		outstanding_since(c, m->next != m->released || m->ack_pending ? since : 0);
		__builtin_memcpy(c->cookie, m->cookie, sizeof(c->cookie));
		c->owner = OWNER_KERNEL;
	}
	conn_unlock(c);
	return r;
}

#endif
