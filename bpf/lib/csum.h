/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Checksums are updated by what a change adds to the sum (RFC 1624, equation 3: HC' = ~(~HC + ~m +
 * m')) and never recomputed, so a segment that was corrupt on arrival stays corrupt. The additions
 * of all changes of a segment are collected and applied once.
 *
 * tc applies them with bpf_l4_csum_replace(), which knows what a program cannot see: with
 * CHECKSUM_PARTIAL the field holds only the pseudo header's sum. Sequence numbers and options are
 * not part of that, so the field must stay as it is, and the helper leaves it alone. XDP has no
 * such knowledge. It uses csum_apply() and runs only on taps whose frames carry full checksums.
 */
#ifndef COLO_CSUM_H
#define COLO_CSUM_H

/*
 * Add to `sum` the change of a 32-bit word `at` bytes into the TCP header. One's complement sums
 * are over 16-bit words. At an odd offset the bytes lie in the other halves, which is the same as
 * rotating the word by 8 (RFC 1071 section 2(B)).
 */
static __always_inline u64 csum_change(u64 sum, __be32 from, __be32 to, u64 at)
{
	if (at & 1) {
		from = from << 8 | from >> 24;
		to = to << 8 | to >> 24;
	}
	return sum + (u32)~from + to;
}

/* Fold to a __wsum for bpf_l4_csum_replace(..., 0, diff, 0). */
static __always_inline u32 csum_fold32(u64 sum)
{
	sum = (sum & 0xFFFFFFFF) + (sum >> 32);
	return (sum & 0xFFFFFFFF) + (sum >> 32);
}

/* Compute exactly what bpf_l4_csum_replace() makes of a full checksum (csum_replace_by_diff). */
static __always_inline __sum16 csum_apply(__sum16 check, u32 diff)
{
	u64 sum = (u64)diff + (u32) ~(u32)check;

	sum = csum_fold32(sum);
	sum = (sum & 0xFFFF) + (sum >> 16);
	sum = (sum & 0xFFFF) + (sum >> 16);
	return ~sum;
}

#endif
