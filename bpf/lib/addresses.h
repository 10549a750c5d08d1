/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's MAC addresses, and the IP addresses that it has said to be its own.
 * colo_xdp/net/address_claims.py is the same in Python; a test compares the two frame by frame.
 *
 * MAC addresses. pvm_in mirrors what is for the guest and no frame that the bridge has flooded:
 * group addresses, CFG_GUEST_MAC (QEMU's word, or the configuration's), and each source of the
 * guest's own frames (VRRP, macvlan, machines behind it). While none is known everything is
 * mirrored, and so it is when `macs` is full: only the guest itself can fill it. A MAC that has
 * never sent is not known; the first answer from it costs a checkpoint.
 *
 * IP addresses are announced at a takeover, so what is noted must be certain. A source address of
 * an IP packet is not: a guest that routes sends other people's. What counts is what the guest
 * says of itself (claimed()), with a MAC address of its own: the sender of an ARP request or
 * reply (RFC 826; a probe has none, RFC 5227 2.1.1), the source of neighbour discovery messages,
 * which is an address of the interface (RFC 4861 4.1 to 4.4), and the target of an advertisement
 * that overrides (proxies and anycast must not, 7.2.7 and 7.2.8). Whoever says the same from
 * outside has it from then on: the entry goes, and a virtual MAC with it.
 *
 * Epochs. On the secondary an entry counts in its epoch only: what the SVM said in an older one
 * was said by a state that is gone, perhaps by one that had diverged (a VRRP router that heard no
 * master). What the copied state has said the primary tells, before the checkpoint, as entries of
 * the epoch to come; what they replace the controller keeps, in case that never comes. On the
 * primary the guest goes on, and all count.
 *
 * Races. Both maps are written by the guest's side (process context or softirq) and the network's
 * (softirq), on any CPU. An entry of `addresses` is replaced as a whole, which the map's own lock
 * orders; of one of `macs` seen_ns and epoch are single words, written by the guest's side only.
 * If the guest and another machine claim an address in the same instant either may be the last:
 * so it is in their neighbours' tables. A MAC that is deleted while the guest sends is noted with
 * its next frame. CFG_GUEST_MAC is written by the controller only, whole. MAC_ALL it sets when it
 * next looks: until then a MAC that has found no room is not mirrored to, and costs checkpoints.
 */
#ifndef COLO_ADDRESSES_H
#define COLO_ADDRESSES_H

/* key: mac_key(). Writers: pvm_out, svm_out; pvm_in, svm_in, svm_net delete what has moved;
 * the controller deletes what is old. Readers: pvm_in, controller. Full: MAC_ALL. */
BPF_TABLE_PINNED("hash", u64, struct colo_claim, macs, COLO_MAX_MACS, PIN_DIR "/macs");

/* As above; besides, the secondary's controller writes what the primary tells. Reader: the
 * controller. Full: counted, the address is not announced. */
BPF_TABLE_PINNED("hash", struct colo_address, struct colo_claim, addresses, COLO_MAX_ADDRESSES,
		 PIN_DIR "/addresses");

#define ETHERTYPE_ARP  0x0806
#define ETHERTYPE_IPV6 0x86DD
#define PROTO_ICMPV6   58

#define ND_ROUTER_SOLICIT 133
#define ND_ROUTER_ADVERT  134
#define ND_SOLICIT	  135
#define ND_ADVERT	  136

/* A MAC's seen_ns is renewed only when older than this: its cache line is shared by CPUs. */
#define MAC_STEP_NS 10000000000ULL

/* All that note_guest() and note_network() have on their stack. */
struct note {
	u64 mac;
	struct colo_address a;
	struct colo_claim c;
};

/* The verifier is to find the same stack by whichever path it came: else it walks all that follows
 * once for each. */
#define SAME_STACK(n)                                                                              \
	do {                                                                                       \
		__builtin_memset(&(n), 0, sizeof(n));                                              \
		asm volatile("" : : "r"(&(n)) : "memory");                                         \
	} while (0)

/* As a number that is the same on every CPU; colo_xdp/net/address_claims.py has it, too. */
static __always_inline u64 mac_key(const void *mac)
{
	return (u64) * (u32 *)mac << 16 | *(u16 *)(mac + 4);
}

static __always_inline int is_main_mac(u64 word, u64 key)
{
	return word << 16 == key << 16 && key;
}

/* `h`: an ARP packet. */
static __always_inline int claimed_arp(u8 *h, void *end, struct colo_address *a,
				       struct colo_claim *c)
{
	u16 op;

	if ((void *)h + 28 > end || *(__be32 *)h != bpf_htonl(0x00010800) ||
	    *(__be16 *)(h + 4) != bpf_htons(0x0604))
		return 0;
	op = bpf_ntohs(*(__be16 *)(h + 6));
	if ((op != 1 && op != 2) || h[14] == 0 || h[14] == 127 || h[14] >= 224)
		return 0;
	a->ip[2] = bpf_htonl(0xFFFF);
	a->ip[3] = *(__be32 *)(h + 14);
	c->mac = mac_key(h + 8);
	return 1;
}

/* `h`: an IPv6 packet; c->mac is the frame's source. */
static __always_inline int claimed_nd(u8 *h, void *end, struct colo_address *a,
				      struct colo_claim *c)
{
	u8 type, *ip = h + 8;

	/* Never behind an extension header in a fragment (RFC 6980); others nobody uses. */
	if ((void *)h + 48 > end || h[6] != PROTO_ICMPV6 || h[7] != 255)
		return 0;
	type = h[40];
	if (type < ND_ROUTER_SOLICIT || type > ND_ADVERT || h[41])
		return 0;
	if (type == ND_ROUTER_ADVERT)
		c->flags = CLAIM_SAYS_ROUTER | CLAIM_ROUTER;
	if (type == ND_ADVERT) {
		if ((void *)h + 64 > end)
			return 0;
		c->flags = CLAIM_SAYS_ROUTER | (h[44] & 0x80 ? CLAIM_ROUTER : 0);
		if (h[44] & 0x20) {
			ip = h + 48;
			if ((void *)h + 72 <= end && bpf_ntohs(*(__be16 *)(h + 4)) >= 32 &&
			    *(__be16 *)(h + 64) == bpf_htons(0x0201))
				c->mac = mac_key(h + 66);
		}
	}
	__builtin_memcpy(a->ip, ip, 16);
	return (a->ip[0] | a->ip[1] | a->ip[2] | a->ip[3]) && *(u8 *)a->ip != 0xFF;
}

/* Does the frame say that who sent it has an address? Then which, and at which MAC address.
 * on_link: the tag in the metadata is the peer link's. */
static __always_inline int claimed(struct __sk_buff *skb, int on_link, struct colo_address *a,
				   struct colo_claim *c)
{
	void *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;
	u8 *h = data;
	__be16 type;
	u64 off = 14;
	u32 tags = 0;

	if (data + 14 > end)
		return 0;
	type = *(__be16 *)(h + 12);
	if (type == bpf_htons(0x0800))
		return 0; /* most frames */
	if (skb->vlan_present && !on_link) {
		tags = 1;
		a->vlan = skb->vlan_tci & 0x0FFF;
	}
	c->mac = mac_key(h + 6);
#pragma unroll
	for (int i = 0; i < 2; i++) {
		if (type != bpf_htons(0x8100) && type != bpf_htons(0x88A8))
			break;
		h = data + off;
		if (++tags > 2 || (void *)h + 4 > end)
			return 0;
		a->vlan = a->vlan << 16 | (bpf_ntohs(*(__be16 *)h) & 0x0FFF);
		type = *(__be16 *)(h + 2);
		off += 4;
	}
	h = data + off;
	if (type == bpf_htons(ETHERTYPE_ARP))
		return claimed_arp(h, end, a, c);
	if (type == bpf_htons(ETHERTYPE_IPV6))
		return claimed_nd(h, end, a, c);
	return 0;
}

/* The source of one of the guest's own frames is a MAC address of the guest. */
static __always_inline void note_mac(struct note *n, u32 epoch)
{
	u64 now = bpf_ktime_get_ns();
	struct colo_claim *m = macs.lookup(&n->mac);

	if (m) {
		if (m->epoch != epoch)
			m->epoch = epoch;
		if (now - m->seen_ns > MAC_STEP_NS)
			m->seen_ns = now;
		return;
	}
	n->c.seen_ns = now;
	n->c.mac = n->mac;
	n->c.epoch = epoch;
	if (macs.update(&n->mac, &n->c))
		count(PROG_ADDRESSES, R_NOTE_MACS_FULL, 0);
}

static __always_inline void note_claim(struct __sk_buff *skb, struct note *n, u64 word, u32 epoch)
{
	struct colo_claim *old;

	if (!claimed(skb, 0, &n->a, &n->c))
		return;
	n->mac = n->c.mac;
	if (!is_main_mac(word, n->mac) && !macs.lookup(&n->mac))
		return; /* it speaks of another machine */
	old = addresses.lookup(&n->a);
	if (old) {
		if ((s32)(old->epoch - epoch) > 0)
			return; /* of the state that is about to be loaded */
		if (old->mac == n->mac && !(n->c.flags & CLAIM_SAYS_ROUTER))
			n->c.flags = old->flags;
	}
	n->c.seen_ns = bpf_ktime_get_ns();
	n->c.epoch = epoch;
	if (addresses.update(&n->a, &n->c))
		count(PROG_ADDRESSES, R_NOTE_ADDRESSES_FULL, 0);
}

/* A frame of the guest's own, as it sent it. */
static __always_inline void note_guest(struct __sk_buff *skb)
{
	u8 *eth = (void *)(long)skb->data;
	u64 word = cfg(CFG_GUEST_MAC);
	u32 epoch = cfg(CFG_EPOCH);
	struct note n = {};

	if (skb->mark != COLO_MARK && (void *)eth + 14 <= (void *)(long)skb->data_end) {
		n.mac = mac_key(eth + 6);
		if (!is_main_mac(word, n.mac) && !(eth[6] & 1))
			note_mac(&n, epoch);
		note_claim(skb, &n, word, epoch);
	}
	SAME_STACK(n);
}

/* A frame that comes from the network. */
static __always_inline void note_network(struct __sk_buff *skb, int on_link)
{
	u8 *eth = (void *)(long)skb->data;
	struct note n = {};

	if ((void *)eth + 14 <= (void *)(long)skb->data_end) {
		n.mac = mac_key(eth + 6);
		/* A group address: how a machine that takes a virtual MAC over tells switches. */
		if (eth[0] & 1 && macs.lookup(&n.mac) && macs.delete(&n.mac) == 0)
			count(PROG_ADDRESSES, R_NOTE_MAC_MOVED, 0);
		if (claimed(skb, on_link, &n.a, &n.c) && addresses.lookup(&n.a) &&
		    addresses.delete(&n.a) == 0)
			count(PROG_ADDRESSES, R_NOTE_ADDRESS_MOVED, 0);
	}
	SAME_STACK(n);
}

/* Is a frame on its way to the guest's tap for the guest? Else the bridge has flooded it. */
static __always_inline int is_for_guest(struct __sk_buff *skb)
{
	u8 *eth = (void *)(long)skb->data;
	u64 word = cfg(CFG_GUEST_MAC), key;

	if (!(word & MAC_KNOWN) || word & MAC_ALL || (void *)eth + 14 > (void *)(long)skb->data_end)
		return 1;
	key = mac_key(eth);
	return eth[0] & 1 || key == (word & MAC_BITS) || macs.lookup(&key);
}

#endif
