/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Translates a segment between the SVM's numbers and those that the client knows.
 *
 * To the SVM: ack (if the segment has one), all SACK edges, TSecr. From the SVM: sequence number,
 * also of an RST, and TSval. TSval is included because the client has seen only the PVM's clock,
 * and after a failover it must not see that clock go back (PAWS, RFC 7323 section 5). The SVM's ack
 * and TSecr are the client's own numbers.
 *
 * Both hooks change the frame in place. For tc, the kernel then puts a prologue in front of the
 * program which makes the headers of a cloned skb private first; if there is no memory for that, it
 * drops the frame.
 */
#ifndef COLO_REWRITE_H
#define COLO_REWRITE_H

#define SACK_EDGES 8 /* four blocks fill the 40 bytes of options */

struct change {
	u64 sum;   /* what all changes add to the checksum's sum */
	u32 moves; /* number of changes; counted, since a change may add 0 */
};

/* Add `by` to the word `at` bytes into the TCP header. */
static __always_inline void move_word(void *data, void *end, const struct pkt *p, u64 at, u32 by,
				      struct change *c)
{
	__be32 *w = word_at(data, end, p->l4_off + at), from, to;

	if (!w)
		return; /* cannot happen: the parser saw the whole header */
	from = *w;
	to = bpf_htonl(bpf_ntohl(from) + by);
	*w = to;
	c->sum = csum_change(c->sum, from, to, at);
	c->moves++;
}

/* Options of a TCP segment, with the timestamps. */
struct tcp_options {
	struct tcp_opts o;
	struct tcp_ts ts;
};

static __always_inline void read_options(void *data, void *end, const struct pkt *p,
					 struct tcp_options *t)
{
	__be32 *val, *ecr;

	if (p->doff > 20)
		parse_tcp_options(data, end, p, &t->o);
	if (!t->o.ts)
		return;
	val = word_at(data, end, p->l4_off + t->o.ts + 2);
	ecr = word_at(data, end, p->l4_off + t->o.ts + 6);
	if (val && ecr) {
		t->ts.there = 1;
		t->ts.val = bpf_ntohl(*val);
		t->ts.ecr = bpf_ntohl(*ecr);
	}
}

/*
 * Track and translate. Returns R_PASS_REWRITTEN with the checksum's change in *diff; `same` if
 * nothing had to change; or, also unchanged, R_PASS_FLOW_TABLE_FULL or R_PASS_OFFSET_UNKNOWN.
 */
static __always_inline u32 rewrite(void *data, void *end, const struct pkt *p,
				   const struct tcp_options *t, int to_svm, u64 mode, u32 epoch,
				   u32 same, u32 *diff)
{
	struct colo_flow_key key = {};
	struct shift s = {};
	struct colo_flow *n;
	u32 reason = same, opened = 0, isn_p;
	struct change c = {};

	flow_key(&key, p, to_svm);
	n = flow_find(&key, p, to_svm, mode, epoch, &reason, &opened);
	if (!n)
		return reason;
	isn_p = flow_track(n, p, &t->ts, to_svm, mode, epoch, &s);
	if (opened && to_svm && flow_client_seen(n, p, isn_p) && flow_promote(&key, n, epoch))
		return R_PASS_FLOW_TABLE_FULL;
	if (s.unknown)
		return R_PASS_OFFSET_UNKNOWN;
	if (!s.off && !s.tsoff)
		return reason;

	if (!to_svm) {
		/*
		 * RFC 9293 section 3.10.7.1: 0 answers a segment without an ack; it is no sequence
		 * number.
		 */
		if ((p->flags & (TCP_RST | TCP_ACK)) == (TCP_RST | TCP_ACK) && !p->seq)
			return reason;
		/* To the primary, which recognises a retransmitted SYN by its number. */
		if ((p->flags & TCP_SYN) && mode != MODE_TAKEOVER && n->epoch != COLO_EPOCH_BASE)
			return reason;
		if (s.off)
			move_word(data, end, p, 4, -s.off, &c);
		if (t->ts.there && s.tsoff)
			move_word(data, end, p, t->o.ts + 2, -s.tsoff, &c);
	} else {
		if ((p->flags & TCP_ACK) && s.off)
			move_word(data, end, p, 8, s.off, &c);
		if ((p->flags & TCP_ACK) && t->ts.there && s.tsoff)
			move_word(data, end, p, t->o.ts + 6, s.tsoff, &c);
		if (t->o.sack && s.off) {
#pragma clang loop unroll(disable)
			for (u64 i = 0; i < SACK_EDGES; i++) {
				if (i >= 2 * t->o.sack_blocks)
					break;
				move_word(data, end, p, t->o.sack + 2 + 4 * i, s.off, &c);
			}
		}
	}
	if (!c.moves)
		return reason;
	*diff = csum_fold32(c.sum);
	return R_PASS_REWRITTEN;
}

/*
 * For tc. Pointers into the frame are stale afterwards. On R_DROP_HELPER_FAILED the frame must be
 * dropped.
 */
static __always_inline u32 rewrite_skb(struct __sk_buff *skb, const struct pkt *p,
				       const struct tcp_options *t, int to_svm, u64 mode, u32 epoch,
				       u32 same)
{
	u32 diff = 0, reason;

	reason = rewrite((void *)(long)skb->data, (void *)(long)skb->data_end, p, t, to_svm, mode,
			 epoch, same, &diff);
	if (reason == R_PASS_REWRITTEN && bpf_l4_csum_replace(skb, p->csum_at, 0, diff, 0))
		reason = R_DROP_HELPER_FAILED;
	return reason;
}

/* For XDP; only where frames carry full checksums. */
static __always_inline u32 rewrite_xdp(struct xdp_md *xdp, const struct pkt *p, int to_svm,
				       u64 mode, u32 epoch, u32 same)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	u64 at = p->csum_at;
	u32 diff = 0, reason;
	struct tcp_options t = {};
	__sum16 *check;

	read_options(data, end, p, &t);
	reason = rewrite(data, end, p, &t, to_svm, mode, epoch, same, &diff);
	if (reason != R_PASS_REWRITTEN)
		return reason;
	VERIFIER_BOUND(at, 0x3FFF);
	check = data + at;
	if ((void *)check + 2 > end)
		return R_DROP_HELPER_FAILED;
	*check = csum_apply(*check, diff);
	return reason;
}

#endif
