/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Parses a frame into one `struct pkt`; the only place that walks headers. colo_xdp/net/packet.py
 * stops at the same places (tests/bpf/test_parsers.py), so what is compared as TCP there has been
 * translated as TCP here.
 *
 * parse_skb() and parse_xdp() share one body, so that both hooks decide alike. Headers are read in
 * place: a load helper costs more than the whole parser. A GSO frame is mostly non-linear, but its
 * headers are nearly always linear; if they are not, they are pulled and the frame is parsed again.
 *
 * Lengths come from the IP header (Ethernet padding is not payload) and each is checked against the
 * frame. A frame that contradicts itself is unparsable: it is treated as bytes and never
 * translated.
 */
#ifndef COLO_PARSING_H
#define COLO_PARSING_H

#define PARSE_BAD  -1
#define PARSE_MORE -2 /* internal: the headers reach beyond the linear part */

/* Enough for two tags, IPv4 and TCP with all options, and for 130 bytes of IPv6 extensions. */
#define PARSE_PULL 256

/*
 * IANA protocol numbers under our own names, since uapi headers define some as enumerators in one
 * file and as macros in another.
 */
#define PROTO_HOPOPTS  0
#define PROTO_TCP      6
#define PROTO_UDP      17
#define PROTO_ROUTING  43
#define PROTO_FRAGMENT 44
#define PROTO_DSTOPTS  60

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_PSH 0x08
#define TCP_ACK 0x10

struct pkt {
	__be32 src[4]; /* source, as in the frame; IPv4 is v4-mapped. Set for all IP frames */
	__be32 dst[4];
	__u32 vlan;	   /* as colo_flow_key.vlan; a tag in the skb's metadata is the outer one */
	__u32 l3_off;	   /* from the start of the frame, after all tags */
	__u32 l4_off;	   /* after IP options and extension headers; 0: not IP */
	__u32 csum_at;	   /* TCP or UDP checksum field; 0: none, fragment, or unparsable */
	__u32 payload_len; /* TCP, UDP: payload bytes of the whole GSO frame */
	__u32 seq;	   /* TCP, host order */
	__u32 ack;	   /* TCP, host order; valid only with TCP_ACK */
	__be16 sport;	   /* TCP, UDP */
	__be16 dport;
	__be16 ethertype; /* after all tags */
	__u8 l4_proto;	  /* PROTO_*, also of a fragment; 0: not IP (or PROTO_HOPOPTS) */
	__u8 is_v6;
	__u8 frag;   /* any fragment, the first too, but not an atomic one: never translated */
	__u8 is_tcp; /* the whole TCP header is present: the TCP fields are valid */
	__u8 is_udp; /* the whole UDP header is present: ports and payload_len are valid */
	__u8 flags;  /* TCP_*: the 14th byte of the TCP header */
	__u8 doff;   /* TCP: header length, 20 to 60, all in the linear part */
};

/*
 * LLVM optimises away range tests that the verifier needs; it cannot do so here. Changes no value.
 */
#define VERIFIER_BOUND(x, mask) asm volatile("%0 &= %1" : "+r"(x) : "i"(mask))

/* 0x9100: the QinQ tag before 802.1ad; the kernel never strips it. */
static __always_inline int is_tag(__be16 ethertype)
{
	return ethertype == bpf_htons(0x8100) || ethertype == bpf_htons(0x88A8) ||
	       ethertype == bpf_htons(0x9100);
}

/*
 * The VLAN of a frame (colo_flow_key.vlan) after one more tag. VID 0 names no VLAN (IEEE 802.1Q
 * section 9.6, a priority tag): such a frame is in the same network as one without the tag, and a
 * guest may send both within one connection, depending on each segment's priority. VID 4095 is
 * reserved; if it is used, it counts as any other VLAN. There are no branches, so that the verifier
 * does not walk what follows twice. The result is fixed here: with LLVM's own choice the verifier
 * takes 140,000 more steps in pvm_out.
 */
static __always_inline u32 vlan_within(u32 vlan, u16 tci)
{
	u32 vid = tci & 0x0FFF;

	vlan = vlan << ((vid + 0x0FFF) >> 12 << 4) | vid; /* shift by 16 or by 0 */
	asm volatile("" : "+r"(vlan));
	return vlan;
}

/* Called if `need` bytes are not all in the linear part: does the frame have them at all? */
static __always_inline int parse_short(u64 need, u64 len)
{
	return need > len ? PARSE_BAD : PARSE_MORE;
}

/*
 * data..end: the linear part; len: the whole frame. tags, vlan: what was found outside the frame's
 * bytes. Offsets are 64-bit scalars added to `data` each time, which the verifier follows better
 * than a moving pointer.
 *
 * zero: is 0, but the verifier does not know that. Added to an offset, it makes the verifier forget
 * which of some fifty paths (tags, extension headers) led to it. Otherwise it would walk everything
 * that follows once for each.
 */
static __always_inline int parse_frame(void *data, void *end, u64 len, u32 tags, u32 vlan, u64 zero,
				       struct pkt *p)
{
	u64 off = 14, stop = 0, doff;
	u8 proto = 0, *h = data, frag = 0;
	__be16 ethertype;
	__be32 ports;

	if (data + 14 > end)
		return parse_short(14, len);
	ethertype = *(__be16 *)(h + 12);
#pragma unroll
	for (int i = 0; i < COLO_VLAN_DEPTH; i++) {
		if (!is_tag(ethertype))
			break;
		h = data + off;
		off += 4;
		if (++tags > 2)
			return PARSE_BAD; /* colo_flow_key.vlan holds two */
		if ((void *)h + 4 > end)
			return parse_short(off, len);
		vlan = vlan_within(vlan, bpf_ntohs(*(__be16 *)h));
		ethertype = *(__be16 *)(h + 2);
	}
	if (is_tag(ethertype))
		return PARSE_BAD;
	p->vlan = vlan + zero;
	p->l3_off = off + zero;
	p->ethertype = ethertype;

	h = data + off;
	if (ethertype == bpf_htons(0x0800)) {
		u64 ihl, total;

		if ((void *)h + 20 > end)
			return parse_short(off + 20, len);
		ihl = (h[0] & 0x0F) * 4;
		total = bpf_ntohs(*(__be16 *)(h + 2));
		if (h[0] >> 4 != 4 || ihl < 20 || total < ihl)
			return PARSE_BAD;
		p->src[0] = p->src[1] = p->dst[0] = p->dst[1] = zero;
		p->src[2] = p->dst[2] = bpf_htonl(0xFFFF) + zero;
		p->src[3] = *(__be32 *)(h + 12);
		p->dst[3] = *(__be32 *)(h + 16);
		p->is_v6 = zero;
		proto = h[9];
		frag = (*(__be16 *)(h + 6) & bpf_htons(0x3FFF)) != 0;
		stop = off + total;
		off += ihl;
	} else if (ethertype == bpf_htons(0x86DD)) {
		if ((void *)h + 40 > end)
			return parse_short(off + 40, len);
		if (h[0] >> 4 != 6)
			return PARSE_BAD;
		__builtin_memcpy(p->src, h + 8, 16);
		__builtin_memcpy(p->dst, h + 24, 16);
		p->is_v6 = 1 + zero;
		proto = h[6];
		off += 40;
		/* A jumbogram has 0 here and then no room for TCP: unparsable. */
		stop = off + bpf_ntohs(*(__be16 *)(h + 4));
#pragma unroll
		for (int i = 0; i < COLO_IP6_EXT_DEPTH; i++) {
			if (proto != PROTO_HOPOPTS && proto != PROTO_ROUTING &&
			    proto != PROTO_DSTOPTS)
				break;
			h = data + off;
			if (off + 8 > stop)
				return PARSE_BAD;
			if ((void *)h + 8 > end)
				return parse_short(off + 8, len);
			proto = h[0];
			off += ((u64)h[1] + 1) * 8;
		}
		if (proto == PROTO_HOPOPTS || proto == PROTO_ROUTING || proto == PROTO_DSTOPTS)
			return PARSE_BAD;
		/*
		 * No extension headers are skipped after it: RFC 8200 section 4.1 allows only one.
		 */
		if (proto == PROTO_FRAGMENT) {
			h = data + off;
			if (off + 8 > stop)
				return PARSE_BAD;
			if ((void *)h + 8 > end)
				return parse_short(off + 8, len);
			/* Otherwise an atomic fragment, which is a whole packet (RFC 6946). */
			frag = (*(__be16 *)(h + 2) & bpf_htons(0xFFF9)) != 0;
			proto = h[0];
			off += 8;
		}
	} else {
		p->l4_off = 0;
		p->l4_proto = 0;
		return 0;
	}
	if (stop > len || off > stop)
		return PARSE_BAD;
	p->l4_off = off;
	p->l4_proto = proto;
	p->frag = frag;
	if (frag)
		return 0;
	if (proto == PROTO_UDP) {
		if (off + 8 > stop)
			return PARSE_BAD;
		h = data + off;
		if ((void *)h + 8 > end)
			return PARSE_MORE;
		ports = *(__be32 *)h;
		off += zero;
		VERIFIER_BOUND(off, 0x3FFF);
		p->l4_off = off;
		__builtin_memcpy(&p->sport, (u8 *)&ports, 2);
		__builtin_memcpy(&p->dport, (u8 *)&ports + 2, 2);
		p->payload_len = stop - off - 8;
		stop = off + 6; /* same range whatever the protocol */
		VERIFIER_BOUND(stop, 0x3FFF);
		p->csum_at = stop;
		p->is_udp = 1 + zero;
	} else if (proto == PROTO_TCP) {
		if (off + 20 > stop)
			return PARSE_BAD;
		h = data + off;
		if ((void *)h + 20 > end)
			return PARSE_MORE;
		doff = (h[12] >> 4) * 4;
		if (doff < 20 || off + doff > stop)
			return PARSE_BAD;
		if ((void *)h + doff > end)
			return PARSE_MORE;
		off += zero;
		VERIFIER_BOUND(off, 0x3FFF);
		p->l4_off = off;
		p->sport = *(__be16 *)h;
		p->dport = *(__be16 *)(h + 2);
		p->seq = bpf_ntohl(*(__be32 *)(h + 4));
		p->ack = bpf_ntohl(*(__be32 *)(h + 8));
		p->flags = h[13];
		p->doff = doff;
		p->payload_len = stop - off - doff;
		stop = off + 16;
		VERIFIER_BOUND(stop, 0x3FFF);
		p->csum_at = stop;
		p->is_tcp = 1 + zero;
	}
	return 0;
}

/*
 * Whether nothing follows IP's length but the padding that a wire may add (IEEE 802.3 section
 * 3.2.8).
 */
static __always_inline int is_whole(struct __sk_buff *skb, u32 end)
{
	return skb->len == end || (skb->len > end && skb->len <= ETH_ZLEN);
}

/*
 * Parse the frame. Returns 0, also for frames that are not IP, or PARSE_BAD for a frame that cannot
 * be parsed. May pull, so pointers into the frame are stale afterwards.
 */
static __always_inline int parse_skb(struct __sk_buff *skb, struct pkt *p)
{
	volatile struct __sk_buff *ctx = skb;
	u32 tags = 0, vlan = 0;
	u64 zero = ctx->len - ctx->len; /* two reads: the verifier cannot know that they agree */
	int err = PARSE_BAD;

	p->csum_at = zero;
	p->is_tcp = p->is_udp = zero; /* what is read after a loop must look alike */
	if (skb->vlan_present) {
		tags = 1;
		vlan = vlan_within(0, skb->vlan_tci);
	}
	/* A loop, so that the parser is in the program only once. */
#pragma clang loop unroll(disable)
	for (int again = 0; again < 2; again++) {
		err = parse_frame((void *)(long)skb->data, (void *)(long)skb->data_end, skb->len,
				  tags, vlan, zero, p);
		if (err != PARSE_MORE || again)
			break;
		if (bpf_skb_pull_data(skb, skb->len < PARSE_PULL ? skb->len : PARSE_PULL))
			break;
	}
	return err ? PARSE_BAD : 0;
}

/* XDP has no metadata for tags, and the frame is linear. */
static __always_inline int parse_xdp(struct xdp_md *xdp, struct pkt *p)
{
	void *data = (void *)(long)xdp->data, *end = (void *)(long)xdp->data_end;
	volatile struct xdp_md *ctx = xdp;
	u64 zero = ctx->rx_queue_index - ctx->rx_queue_index;

	p->csum_at = 0;
	p->is_tcp = p->is_udp = 0;
	return parse_frame(data, end, end - data, 0, 0, zero, p) ? PARSE_BAD : 0;
}

/* Offsets of TCP options from the start of the TCP header; 0: not present. */
struct tcp_opts {
	u64 ts;	  /* the timestamp option's kind byte */
	u64 sack; /* the SACK option's kind byte */
	u64 sack_blocks;
};

/*
 * Read the option list as Linux does (tcp_parse_options): stop at the first malformed option; the
 * last of a kind counts; ignore a SACK option that does not hold whole blocks.
 */
static __always_inline void parse_tcp_options(void *data, void *end, const struct pkt *p,
					      struct tcp_opts *o)
{
	u64 i = 20, doff = p->doff, l4 = p->l4_off, size;
	u8 *t;

	VERIFIER_BOUND(l4, 0x3FFF);
	t = data + l4;
	if ((void *)t + 32 <= end && doff == 32 && *(__be32 *)(t + 20) == bpf_htonl(0x0101080A)) {
		o->ts = 22; /* RFC 7323 appendix A: nearly every segment */
		return;
	}
#pragma clang loop unroll(disable)
	for (int n = 0; n < COLO_TCP_OPTIONS; n++) {
		u8 *opt;

		VERIFIER_BOUND(i, 0x3F);
		opt = t + i;
		if (i + 1 > doff || (void *)opt + 1 > end || opt[0] == 0)
			break;
		if (opt[0] == 1) {
			i++;
			continue;
		}
		if (i + 2 > doff || (void *)opt + 2 > end)
			break;
		size = opt[1];
		if (size < 2 || i + size > doff)
			break;
		if (opt[0] == 8 && size == 10)
			o->ts = i;
		if (opt[0] == 5 && size >= 10 && !((size - 2) & 7)) {
			o->sack = i;
			o->sack_blocks = (size - 2) >> 3;
		}
		i += size;
	}
}

/* Four bytes of the frame at an offset that the verifier cannot bound, or NULL. */
static __always_inline __be32 *word_at(void *data, void *end, u64 at)
{
	void *w;

	VERIFIER_BOUND(at, 0x3FFF);
	w = data + at;
	if (w + 4 > end)
		return 0;
	return w;
}

#endif
