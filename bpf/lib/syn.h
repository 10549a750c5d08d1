/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Reads what pvm_in needs of the options of a client's SYN, in one walk. */
#ifndef COLO_SYN_H
#define COLO_SYN_H

#define TCPOPT_WSCALE 3
#define TCPOPT_MPTCP  30
#define MP_CAPABLE    0 /* subtype, the high half of the third byte */
#define TCPOPTS_MAX   40
#define WSCALE_MAX    14 /* RFC 7323 section 2.3: more counts as this */

struct syn_options {
	/* The bytes that belong to MP_CAPABLE, as bits; of all of them, since Linux uses the last. */
	u64 mp_capable;
	u32 wscale; /* shift count; 0: none */
};

static __always_inline void read_syn_options(struct __sk_buff *skb, const struct pkt *p,
					     struct syn_options *o)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u64 i = 20, doff = p->doff, l4 = p->l4_off, size;
	u8 *t;

	VERIFIER_BOUND(l4, 0x3FFF);
	t = data + l4;
	/* At most one option is examined per byte, so none can hide behind NOPs. */
#pragma clang loop unroll(disable)
	for (int n = 0; n < TCPOPTS_MAX; n++) {
		u8 *opt;

		VERIFIER_BOUND(i, 0x3F);
		opt = t + i;
		if (i + 3 > doff || (void *)opt + 3 > end || opt[0] == 0)
			break;
		if (opt[0] == 1) {
			i++;
			continue;
		}
		size = opt[1];
		if (size < 2 || i + size > doff)
			break;
		if (opt[0] == TCPOPT_MPTCP && size > 2 && opt[2] >> 4 == MP_CAPABLE)
			o->mp_capable |= ((1ULL << size) - 1) << (i - 20);
		if (opt[0] == TCPOPT_WSCALE && size == 3)
			o->wscale = opt[2];
		i += size;
	}
	if (o->wscale > WSCALE_MAX)
		o->wscale = WSCALE_MAX;
}

#endif
