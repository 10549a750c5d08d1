/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Prevents MPTCP (RFC 8684) from being negotiated while there are two guests. Each guest draws its
 * own keys for a connection, so after a takeover the other guest's data sequence numbers would mean
 * nothing to the client. The comparison, which sees one subflow at a time, would not notice.
 *
 * pvm_in removes MP_CAPABLE from a client's SYN, and from its SYN-ACK to the guest's SYN, before
 * the frame is mirrored. That suffices for both directions: a guest that was not offered MPTCP does
 * not answer with it, and one whose offer was not answered falls back to plain TCP, as its first
 * ACK shows the other end (RFC 8684 section 3.7). So what the guests send stays as it is.
 *
 * What a guest negotiated while it was alone is complete in its copy and continues. So MP_JOIN is
 * left in place: without the option it would open a new connection. For a token that no guest has
 * (everything opened under protection is plain TCP) both guests answer RST. For a token that both
 * have, the answers differ by a random number (RFC 8684 section 3.2), and the new subflow costs a
 * checkpoint.
 */
#ifndef COLO_MPTCP_H
#define COLO_MPTCP_H

/*
 * Overwrite each MP_CAPABLE (gone: syn_options.mp_capable) with NOPs. Returns 0 if there is none, 1
 * if all have been removed, < 0 if the frame must be dropped. Writes with a helper: in-place writes
 * would make the kernel copy the headers of each cloned frame, and hardly any frame is a SYN.
 */
static __always_inline int mptcp_off(struct __sk_buff *skb, const struct pkt *p, u64 gone)
{
	u64 at = p->l4_off + 20, size = p->doff - 20;
	__be32 opts[TCPOPTS_MAX / 4] = {};
	s64 sum;

	if (!gone)
		return 0;
	VERIFIER_BOUND(size, 0x3F);
	if (size < 4 || size > TCPOPTS_MAX || bpf_skb_load_bytes(skb, at, opts, size))
		return -1;
	sum = bpf_csum_diff(opts, sizeof(opts), 0, 0, 0);
#pragma unroll
	for (int k = 0; k < TCPOPTS_MAX; k++) {
		u8 *b = (u8 *)opts + k, keep = (gone >> k & 1) - 1; /* no bit, or all */

		*b = (*b & keep) | (1 & ~keep);
		asm volatile("" ::: "memory"); /* one byte at a time: else all are spilled */
	}
	sum = bpf_csum_diff(0, 0, opts, sizeof(opts), sum);
	if (sum < 0 || bpf_skb_store_bytes(skb, at, opts, size, 0))
		return -1;
	return bpf_l4_csum_replace(skb, p->csum_at, 0, sum, 0) ? -1 : 1;
}

#endif
