/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * ICMP errors about segments that the guest has sent: path MTU, unreachable, time exceeded,
 * parameter problem. They quote the segment as the network saw it, in the PVM's numbers. A guest
 * with other numbers would take the error for a forgery (RFC 5927 section 4.1) and go on sending
 * what never arrives. So the quoted sequence number and TSval are translated, like an ack, to what
 * the guest sent.
 *
 * Left unchanged: the quoted ack and TSecr, which are the client's own numbers; a TSval that is not
 * in its usual place (RFC 7323 appendix A), since no stack checks it; fragments of a segment other
 * than the first; quotes that end before the sequence number does; connections that are not known.
 * An error changes nothing in the entry: it does not come from the client.
 *
 * In errors that the guest itself sends, the quoted ack is in the guest's own numbers. No client
 * checks it (a quote is checked by its sequence number), and the comparison uses only the first 8
 * bytes of the quoted segment, so it stays.
 *
 * Both checksums are updated by the change: that of the quoted segment, if the quote reaches that
 * far, and ICMP's, which covers the quote. (IPv4's covers its own header only.)
 */
#ifndef COLO_ICMP_H
#define COLO_ICMP_H

#define PROTO_ICMP   1
#define PROTO_ICMPV6 58

/*
 * Everything before the quoted sequence number, and all that is read after it: two IPv6 headers,
 * extensions, ICMP, and TCP with its options.
 */
#define QUOTE_PULL 512

static __always_inline int is_icmp_error(const struct pkt *p, u8 type)
{
	if (p->is_v6)
		return p->l4_proto == PROTO_ICMPV6 && type >= 1 && type <= 4;
	/* RFC 792: unreachable, source quench, time exceeded, parameter problem */
	return p->l4_proto == PROTO_ICMP && (type == 3 || type == 4 || type == 11 || type == 12);
}

/*
 * Parse the quoted TCP segment as one that the guest sends; -1 if there is none to translate.
 * `stop`: end of the quote; `zero`: as in parse_frame().
 */
static __always_inline int parse_quote(void *data, void *end, const struct pkt *p, u64 stop,
				       u64 zero, struct pkt *q)
{
	u64 off = p->l4_off + 8;
	u8 *h, proto;

	VERIFIER_BOUND(off, 0x3FFF);
	h = data + off;
	if (!p->is_v6) {
		if ((void *)h + 20 > end || h[0] >> 4 != 4 || (h[0] & 0x0F) < 5)
			return -1;
		if (*(__be16 *)(h + 6) & bpf_htons(0x1FFF))
			return -1;
		proto = h[9];
		q->src[0] = q->src[1] = q->dst[0] = q->dst[1] = zero;
		q->src[2] = q->dst[2] = bpf_htonl(0xFFFF) + zero;
		q->src[3] = *(__be32 *)(h + 12);
		q->dst[3] = *(__be32 *)(h + 16);
		off += (h[0] & 0x0F) * 4;
	} else {
		if ((void *)h + 40 > end || h[0] >> 4 != 6)
			return -1;
		proto = h[6];
		__builtin_memcpy(q->src, h + 8, 16);
		__builtin_memcpy(q->dst, h + 24, 16);
		off += 40;
#pragma clang loop unroll(disable)
		for (int i = 0; i < COLO_IP6_EXT_DEPTH + 1; i++) {
			if (proto != PROTO_HOPOPTS && proto != PROTO_ROUTING &&
			    proto != PROTO_DSTOPTS && proto != PROTO_FRAGMENT)
				break;
			VERIFIER_BOUND(off, 0x3FFF);
			h = data + off;
			if ((void *)h + 8 > end)
				return -1;
			if (proto == PROTO_FRAGMENT) {
				if (*(__be16 *)(h + 2) & bpf_htons(0xFFF8))
					return -1;
				off += 8;
			} else {
				off += ((u64)h[1] + 1) * 8;
			}
			proto = h[0];
		}
	}
	off += zero;
	VERIFIER_BOUND(off, 0x3FFF);
	h = data + off;
	if (proto != PROTO_TCP || off + 8 > stop || (void *)h + 8 > end)
		return -1;
	q->l4_off = off;
	q->vlan = p->vlan;
	q->sport = *(__be16 *)h;
	q->dport = *(__be16 *)(h + 2);
	q->doff = q->flags = q->seq = zero;
	if (off + 20 <= stop && (void *)h + 20 <= end) {
		q->doff = (h[12] >> 4) * 4;
		q->flags = h[13];
		q->seq = bpf_ntohl(*(__be32 *)(h + 4));
	}
	return 0;
}

/* Offset in the frame at which the IP packet ends; 0: unknown. */
static __always_inline u64 packet_end(void *data, void *end, const struct pkt *p, u64 len)
{
	u64 off = p->l3_off, stop;
	u8 *h;

	VERIFIER_BOUND(off, 0x3FFF);
	h = data + off;
	if ((void *)h + 8 > end)
		return 0;
	stop = off +
	       (p->is_v6 ? 40 + bpf_ntohs(*(__be16 *)(h + 4)) : bpf_ntohs(*(__be16 *)(h + 2)));
	return stop < len ? stop : len;
}

/*
 * Translate the quoted segment. Returns R_PASS_REWRITTEN, `same`, or R_DROP_HELPER_FAILED, on which
 * the frame must be dropped. Pointers into the frame are stale afterwards.
 */
static __always_inline u32 rewrite_quote(struct __sk_buff *skb, const struct pkt *p, u32 epoch,
					 u32 same)
{
	volatile struct __sk_buff *ctx = skb;
	u64 at = p->l4_off, len = skb->len, stop, zero = ctx->len - ctx->len;
	struct colo_flow_key key = {};
	struct colo_flow *n, *old = 0;
	u32 isn_p = 0, opened = 0;
	struct shift s = {};
	struct change c = {};
	struct pkt q = {};
	void *data, *end;
	u8 *icmp;

	if (p->frag || (p->l4_proto != PROTO_ICMP && p->l4_proto != PROTO_ICMPV6))
		return same;
	/* The parser has examined only the outer header. */
	if ((void *)(long)skb->data + QUOTE_PULL > (void *)(long)skb->data_end &&
	    bpf_skb_pull_data(skb, len < QUOTE_PULL ? len : QUOTE_PULL))
		return same;
	data = (void *)(long)skb->data;
	end = (void *)(long)skb->data_end;
	VERIFIER_BOUND(at, 0x3FFF);
	icmp = data + at;
	if ((void *)icmp + 8 > end || !is_icmp_error(p, icmp[0]))
		return same;
	stop = packet_end(data, end, p, len);
	if (parse_quote(data, end, p, stop, zero, &q))
		return same;
	flow_key(&key, &q, 0);
	n = flow_lookup(&key, epoch, &old, &opened);
	if (!n)
		return same;
	flow_shift(n, &s, &isn_p);
	/* As in rewrite(): what was sent unchanged is quoted unchanged. */
	if ((q.flags & (TCP_RST | TCP_ACK)) == (TCP_RST | TCP_ACK) && !q.seq)
		return same;
	if (s.off)
		move_word(data, end, &q, 4, s.off, &c);
	if (q.doff == 32 && s.tsoff && q.l4_off + 32 <= stop) {
		__be32 *lead = word_at(data, end, q.l4_off + 20);

		if (lead && *lead == bpf_htonl(0x0101080A))
			move_word(data, end, &q, 24, s.tsoff, &c);
	}
	if (!c.moves)
		return same;
	at = q.l4_off + 16;
	VERIFIER_BOUND(at, 0x3FFF);
	if (at + 2 <= stop && data + at + 2 <= end) {
		__sum16 *check = data + at, was = *check;

		*check = csum_apply(was, csum_fold32(c.sum));
		c.sum += (u16)~was + (u32)*check;
	}
	at = p->l4_off + 2;
	if (bpf_l4_csum_replace(skb, at, 0, csum_fold32(c.sum), 0))
		return R_DROP_HELPER_FAILED;
	return R_PASS_REWRITTEN;
}

#endif
