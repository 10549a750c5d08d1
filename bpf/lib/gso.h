/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Offloads of a frame: the checksum and segmentation that it leaves for others to do.
 *
 * struct __sk_buff shows only gso_size. A frame with a gso_size can be TCP to be segmented,
 * datagrams behind one header (UDP_L4, "USO"), one datagram to be fragmented (UDP, "UFO"), or TCP
 * in a tunnel. A partial checksum can belong to any header, an inner one too. A frame that leaves
 * through user space needs all of that again, and guessing it from the headers is wrong for every
 * kind but the first. So, with COLO_SKB, the kernel's own struct sk_buff is read, at the offsets
 * that its BTF gives (colo_xdp/datapath/btf.py).
 *
 * Without BTF only this is certain: that a checksum is partial, since exactly then
 * bpf_l4_csum_replace() leaves a field alone; and where it is, since bpf_skb_change_tail() never
 * cuts it off. UDP with a gso_size is refused there.
 *
 * What cannot be carried over is refused explicitly (R_DROP_GSO_UNSUPPORTED) and never sent on as
 * something else.
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
/* Irrelevant to a receiver: where the frame came from and how it was assembled. */
#define COLO_GSO_IGNORED                                                                           \
	(COLO_GSO_DODGY | COLO_GSO_TCP_FIXEDID | COLO_GSO_TCP_FIXEDID_INNER | COLO_GSO_FRAGLIST)

/*
 * CWR is set, either on the first segment only or (frames merged by GRO since Linux 6.15) on all.
 * VNET_ECN is the only flag for both.
 */
#define COLO_GSO_ANY_ECN (COLO_GSO_TCP_ECN | COLO_GSO_TCP_ACCECN)

/*
 * bpf_probe_read_kernel() under a name of our own. bcc turns a call of that name into the older
 * bpf_probe_read(), which these programs may not call, where it cannot read /proc/kallsyms: in a
 * container, and in the unit's sandbox.
 */
static long (*const read_kernel)(void *to, u32 size,
				 const void *from) = (void *)BPF_FUNC_probe_read_kernel;

/*
 * Read an integer of kernel memory; 0 if it cannot be read. To the verifier the address is only a
 * number, so nothing can be written through it. All eight bytes of stack are set first: otherwise
 * the verifier counts their previous contents as needed, and treats paths that differ in them as
 * different.
 */
static __always_inline u64 kernel_word(u64 at, u32 size)
{
	u64 word = 0;

	read_kernel(&word, size, (void *)at);
#if __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
	word >>= 64 - 8 * size;
#endif
	return word;
}

/* Read a field of the struct sk_buff that `skb` is to the kernel. */
static __always_inline u64 skb_word(struct __sk_buff *skb, u32 at, u32 size)
{
	return kernel_word((u64)(void *)skb + at, size);
}

static __always_inline int is_partial(struct __sk_buff *skb)
{
	u32 bits = skb_word(skb, COLO_SKB_IP_SUMMED, 1) >> COLO_SKB_IP_SUMMED_SHIFT & 3;

	return bits & bits >> 1; /* CHECKSUM_PARTIAL is 3; no branch */
}

/* SKB_GSO_* of a frame with a gso_size; 0: could not be read. */
static __always_inline u32 skb_gso_kind(struct __sk_buff *skb)
{
	u64 end = skb_word(skb, COLO_SKB_END, COLO_SKB_END_SIZE);

	if (COLO_SKB_END_SIZE == 4) /* then an offset, otherwise a pointer */
		end += skb_word(skb, COLO_SKB_HEAD, 8);
	return kernel_word(end + COLO_SHINFO_GSO_TYPE, 4);
}

/*
 * Where the sum of a partial checksum starts (from the start of the frame) and where it is stored
 * (from there).
 */
static __always_inline void csum_place(struct __sk_buff *skb, u32 *start, u32 *offset)
{
	*start = skb_word(skb, COLO_SKB_CSUM_START, 2) + skb_word(skb, COLO_SKB_HEAD, 8) -
		 skb_word(skb, COLO_SKB_DATA, 8);
	*offset = skb_word(skb, COLO_SKB_CSUM_OFFSET, 2);
}

/* Whether the checksum is a CRC (SCTP's), not a sum. */
static __always_inline int is_crc(struct __sk_buff *skb)
{
#ifdef COLO_SKB_NOT_INET
	return skb_word(skb, COLO_SKB_NOT_INET, 1) >> COLO_SKB_NOT_INET_SHIFT & 1;
#else
	return 0;
#endif
}

/* virtio_net_hdr.gso_type that describes the frame; 0: no GSO; or GSO_REFUSED. */
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

/*
 * Whether the checksum is partial but not that of the frame's own TCP or UDP header. Uses one
 * branch only: each doubles what the verifier has to walk afterwards.
 */
static __always_inline int sums_elsewhere(struct __sk_buff *skb, const struct pkt *p)
{
	u32 start, offset;
	u64 wrong;

	csum_place(skb, &start, &offset);
	wrong = (start ^ p->l4_off) | ((start + offset) ^ p->csum_at);
	return wrong * is_partial(skb) != 0;
}

/*
 * Whether a TCP frame with a gso_size needs something other than plain segmentation. Branch-free
 * for the same reason.
 */
static __always_inline int cut_elsewise(struct __sk_buff *skb, const struct pkt *p)
{
	u32 plain = COLO_GSO_TCPV4 + p->is_v6 * (COLO_GSO_TCPV6 - COLO_GSO_TCPV4);

	return (skb_gso_kind(skb) & ~(COLO_GSO_IGNORED | COLO_GSO_ANY_ECN)) != plain;
}

/* Fill in what user space must know about the frame's checksum; 0 or R_DROP_GSO_UNSUPPORTED. */
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
	/* No device segments with such a header, and CRCs are computed elsewhere. */
	if (skb->gso_size || is_crc(skb) || start > 0xFFFF || offset > 0xFF)
		return R_DROP_GSO_UNSUPPORTED;
	head->flags |= EV_UNSUMMED;
	head->csum_start = start;
	head->csum_offset = offset;
	return 0;
}
#else
/* Changes two bytes if the checksum is not partial, and changes them back. */
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

/* Cannot be determined without damaging the frame; user space's capture determines it. */
static __always_inline int sums_elsewhere(struct __sk_buff *skb, const struct pkt *p)
{
	return is_partial(skb);
}

static __always_inline int cut_elsewise(struct __sk_buff *skb, const struct pkt *p)
{
	return 0;
}

/*
 * The same without BTF. The frame's bytes have been copied and it is about to be dropped, so it is
 * truncated here.
 */
static __always_inline u32 csum_offload(struct __sk_buff *skb, const struct pkt *p,
					struct colo_event *head)
{
	u64 at = p->csum_at;

	if (!is_partial(skb))
		return 0;
	if (!at)
		return R_DROP_GSO_UNSUPPORTED;
	head->flags |= EV_PARTIAL;
#ifndef COLO_EVENTS_PERF /* perf still has to copy the frame, so an inner checksum goes unnoticed */
	if (!bpf_skb_change_tail(skb, at + 1, 0) || bpf_skb_change_tail(skb, at + 2, 0))
		return R_DROP_GSO_UNSUPPORTED;
#endif
	return 0;
}
#endif

#endif
