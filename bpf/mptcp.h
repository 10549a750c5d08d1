/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Neither guest negotiates MPTCP (RFC 8684) while there are two of them. Each draws keys of its own
 * for a connection, so after a takeover the other one's data sequence numbers would mean nothing to
 * the client; and the comparison, which sees one subflow at a time, would not know.
 *
 * MP_CAPABLE is taken out of what a client says in its SYN, or in its SYN-ACK to the guest's, by pvm_in
 * before the frame is mirrored. That is enough for either direction: a guest that was not offered it
 * does not answer with it, and one whose offer was not answered goes on with plain TCP, which its
 * first ACK tells the other end (RFC 8684 3.7). So what the guests send stays as they made it.
 *
 * What a guest has negotiated while it was alone is whole in its copy, and goes on. So MP_JOIN is
 * left: without its option it would open a new connection. For a token that no guest has (all that
 * is opened under protection is plain TCP) both answer RST; for one that both have the answers
 * differ by a random number (RFC 8684 3.2), and the new subflow costs a checkpoint.
 */
#ifndef COLO_MPTCP_H
#define COLO_MPTCP_H

#define TCPOPT_MPTCP 30
#define MP_CAPABLE   0 /* subtype, the high half of the third byte */
#define TCPOPTS_MAX  40

/*
 * Overwrites MP_CAPABLE with NOPs. Returns 0 if there is none, 1 if it is gone, < 0 if the frame must
 * be dropped. Reads in place and writes by helper: in-place writes would make the kernel copy the
 * headers of each cloned frame, and nearly none is a SYN.
 */
static __always_inline int mptcp_off(struct __sk_buff *skb, const struct pkt *p)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u64 i = 20, doff = p->doff, l4 = p->l4_off, size = 0, found = 0, sum = 0;
	u8 nops[TCPOPTS_MAX];
	u8 *t;

	__builtin_memset(nops, 1, sizeof(nops));
	VERIFIER_BOUND(l4, 0x3FFF);
	t = data + l4;
	/* One option at most is looked at for each byte: none can hide behind NOPs. */
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
		if (opt[0] == TCPOPT_MPTCP && size > 2 && opt[2] >> 4 == MP_CAPABLE) {
			found = i;
			break;
		}
		i += size;
	}
	if (!found)
		return 0;
#pragma clang loop unroll(disable)
	for (u64 k = 0; k < TCPOPTS_MAX; k++) {
		u64 at = found + k;
		u8 *b;

		if (k >= size)
			break;
		VERIFIER_BOUND(at, 0x3F);
		b = t + at;
		if ((void *)b + 1 > end)
			return -1;
		sum = csum_change(sum, bpf_htonl((u32)*b << 24), bpf_htonl(1u << 24), found + k);
	}
	l4 += found;
	VERIFIER_BOUND(size, 0x3F);
	if (size < 3 || size > TCPOPTS_MAX || bpf_skb_store_bytes(skb, l4, nops, size, 0))
		return -1;
	return bpf_l4_csum_replace(skb, p->csum_at, 0, csum_fold32(sum), 0) ? -1 : 1;
}

#endif
