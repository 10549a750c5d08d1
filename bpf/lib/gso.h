/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * What a frame leaves for others to do: its checksum, its segmentation.
 *
 * struct __sk_buff shows of this gso_size and nothing else. A frame with a gso_size can be TCP to
 * be segmented, datagrams behind one header (UDP_L4, "USO"), one datagram to be fragmented
 * (UDP, "UFO"), or TCP within a tunnel; and a partial checksum may be anybody's, of an inner
 * header too. A frame that leaves by way of user space needs all of it again, and by its headers
 * it can only be guessed at: wrongly, for each kind but the first. So, with COLO_SKB, the kernel's
 * own struct sk_buff is read, at the places that its BTF names (colo_xdp/datapath/btf.py).
 *
 * A kernel without BTF gets what is certain without: that a checksum is partial, since
 * bpf_l4_csum_replace() leaves a field alone exactly then; and where it is, since
 * bpf_skb_change_tail() cuts it off never. UDP with a gso_size is refused there.
 *
 * What cannot be carried is refused by name (R_DROP_GSO_UNSUPPORTED) and never sent on as something else.
 */
#ifndef COLO_GSO_H
#define COLO_GSO_H

/* struct virtio_net_hdr.gso_type (uapi/linux/virtio_net.h) */
#define VNET_TCPV4  1
#define VNET_UDP    3
#define VNET_TCPV6  4
#define VNET_UDP_L4 5
#define VNET_ECN    0x80

#define GSO_REFUSED 0x100

#ifdef COLO_SKB
/* Of no meaning to a receiver: from whom it came, how it was put together. */
#define COLO_GSO_IGNORED                                                                           \
	(COLO_GSO_DODGY | COLO_GSO_TCP_FIXEDID | COLO_GSO_TCP_FIXEDID_INNER | COLO_GSO_FRAGLIST)

/* CWR is set: of the first segment only, or (what GRO has put together since Linux 6.15) of all.
 * VNET_ECN is the only word for either. */
#define COLO_GSO_ANY_ECN (COLO_GSO_TCP_ECN | COLO_GSO_TCP_ACCECN)

/*
 * An integer of the kernel's memory; 0 if it cannot be read. The address is no more than a number to
 * the verifier, so nothing can be written by it. Eight bytes of stack, all of them set first:
 * else the verifier takes what happens to be there for something that is still needed, and all paths
 * that differ in it for different ones.
 */
static __always_inline u64 kernel_word(u64 at, u32 size)
{
	u64 word = 0;

	bpf_probe_read_kernel(&word, size, (void *)at);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	word >>= 64 - 8 * size;
#endif
	return word;
}

/* Of the struct sk_buff that `skb` is to the kernel. */
static __always_inline u64 skb_word(struct __sk_buff *skb, u32 at, u32 size)
{
	return kernel_word((u64)(void *)skb + at, size);
}

static __always_inline int is_partial(struct __sk_buff *skb)
{
	u32 bits = skb_word(skb, COLO_SKB_IP_SUMMED, 1) >> COLO_SKB_IP_SUMMED_SHIFT & 3;

	return bits & bits >> 1; /* CHECKSUM_PARTIAL is 3; without a branch */
}

/* SKB_GSO_* of a frame with a gso_size; 0: could not be read. */
static __always_inline u32 skb_gso_kind(struct __sk_buff *skb)
{
	u64 end = skb_word(skb, COLO_SKB_END, COLO_SKB_END_SIZE);

	if (COLO_SKB_END_SIZE == 4) /* an offset then, else a pointer */
		end += skb_word(skb, COLO_SKB_HEAD, 8);
	return kernel_word(end + COLO_SHINFO_GSO_TYPE, 4);
}

/* Where the sum of a partial checksum begins, from the start of the frame, and where, from there, it
 * is put. */
static __always_inline void csum_place(struct __sk_buff *skb, u32 *start, u32 *offset)
{
	*start = skb_word(skb, COLO_SKB_CSUM_START, 2) + skb_word(skb, COLO_SKB_HEAD, 8) -
		 skb_word(skb, COLO_SKB_DATA, 8);
	*offset = skb_word(skb, COLO_SKB_CSUM_OFFSET, 2);
}

/* A CRC (SCTP's), not a sum. */
static __always_inline int is_crc(struct __sk_buff *skb)
{
#ifdef COLO_SKB_NOT_INET
	return skb_word(skb, COLO_SKB_NOT_INET, 1) >> COLO_SKB_NOT_INET_SHIFT & 1;
#else
	return 0;
#endif
}

/* virtio_net_hdr.gso_type that makes of the frame what it is; 0: no GSO; or GSO_REFUSED. */
static __always_inline u32 gso_type(struct __sk_buff *skb, const struct pkt *p)
{
	u64 tcp = p->is_tcp, udp = p->is_udp, v6 = p->is_v6;
	u32 kind;

	if (!skb->gso_size)
		return 0;
	kind = skb_gso_kind(skb) & ~COLO_GSO_IGNORED;
	if (tcp && (kind & ~COLO_GSO_ANY_ECN) == (v6 ? COLO_GSO_TCPV6 : COLO_GSO_TCPV4))
		return (v6 ? VNET_TCPV6 : VNET_TCPV4) | (kind & COLO_GSO_ANY_ECN ? VNET_ECN : 0);
	if (udp && kind == COLO_GSO_UDP_L4)
		return VNET_UDP_L4;
	if (udp && kind == COLO_GSO_UDP)
		return VNET_UDP;
	return GSO_REFUSED;
}

/* The checksum is partial, and it is not that of the frame's own TCP or UDP header. One branch only:
 * each would double what the verifier has to walk behind it. */
static __always_inline int sums_elsewhere(struct __sk_buff *skb, const struct pkt *p)
{
	u32 start, offset;
	u64 wrong;

	csum_place(skb, &start, &offset);
	wrong = (start ^ p->l4_off) | ((start + offset) ^ p->csum_at);
	return wrong * is_partial(skb) != 0;
}

/* A TCP frame with a gso_size waits for something else than plain segmentation. As above. */
static __always_inline int cut_elsewise(struct __sk_buff *skb, const struct pkt *p)
{
	u32 plain = COLO_GSO_TCPV4 + p->is_v6 * (COLO_GSO_TCPV6 - COLO_GSO_TCPV4);

	return (skb_gso_kind(skb) & ~(COLO_GSO_IGNORED | COLO_GSO_ANY_ECN)) != plain;
}

/* Fills in what user space must know of the frame's checksum; 0, or R_DROP_GSO_UNSUPPORTED. */
static __always_inline u32 csum_offload(struct __sk_buff *skb, const struct pkt *p,
					struct colo_event *head)
{
	u64 l4 = p->l4_off, at = p->csum_at;
	u32 start, offset;

	if (!is_partial(skb))
		return 0;
	csum_place(skb, &start, &offset);
	if (at && start == l4 && start + offset == at) {
		head->flags |= EV_PARTIAL;
		return 0;
	}
	/* Nobody segments by such a header, and where CRCs are computed we are not. */
	if (skb->gso_size || is_crc(skb) || start > 0xFFFF || offset > 0xFF)
		return R_DROP_GSO_UNSUPPORTED;
	head->flags |= EV_UNSUMMED;
	head->csum_start = start;
	head->csum_offset = offset;
	return 0;
}
#else
/* Changes two bytes if it is not, and changes them back. */
static __always_inline int is_partial(struct __sk_buff *skb)
{
	u16 before = 0, after = 0;

	if (bpf_skb_load_bytes(skb, 0, &before, 2))
		return 0;
	if (bpf_l4_csum_replace(skb, 0, 0, bpf_htons(0x0101), 2))
		return 0;
	if (bpf_skb_load_bytes(skb, 0, &after, 2))
		return 0;
	if (before != after)
		bpf_skb_store_bytes(skb, 0, &before, 2, 0);
	return before == after;
}

static __always_inline u32 gso_type(struct __sk_buff *skb, const struct pkt *p)
{
	return !skb->gso_size || p->is_tcp ? 0 : GSO_REFUSED;
}

/* Not to be told without spoiling the frame: user space's capture will. */
static __always_inline int sums_elsewhere(struct __sk_buff *skb, const struct pkt *p)
{
	return is_partial(skb);
}

static __always_inline int cut_elsewise(struct __sk_buff *skb, const struct pkt *p)
{
	return 0;
}

/* As above. The frame's bytes have been copied, and it is about to be dropped: it is cut short. */
static __always_inline u32 csum_offload(struct __sk_buff *skb, const struct pkt *p,
					struct colo_event *head)
{
	u64 at = p->csum_at;

	if (!is_partial(skb))
		return 0;
	if (!at)
		return R_DROP_GSO_UNSUPPORTED;
	head->flags |= EV_PARTIAL;
#ifndef COLO_EVENTS_PERF /* which still has to copy the frame: a tunnel's would not be noticed */
	if (!bpf_skb_change_tail(skb, at + 1, 0) || bpf_skb_change_tail(skb, at + 2, 0))
		return R_DROP_GSO_UNSUPPORTED;
#endif
	return 0;
}
#endif

#endif
