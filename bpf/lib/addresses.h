/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The guest's MAC addresses and the IP addresses that it claims. colo_xdp/net/address_claims.py
 * does the same in Python; a test compares the two frame by frame.
 *
 * MAC addresses. pvm_in mirrors what is for the guest, and no frame that the bridge has flooded.
 * For the guest are group addresses, CFG_GUEST_MAC (from QEMU or the configuration), and each
 * source address of the guest's own frames (VRRP, macvlan, machines behind it). While none is known
 * everything is mirrored; so it is when `macs` is full, which only the guest itself can cause. A
 * MAC that has never sent is not known, and the first answer from it costs a checkpoint.
 *
 * IP addresses are announced at a takeover, so only certain ones may be noted. The source address
 * of an IP packet is not certain: a guest that routes forwards other machines' packets. What counts
 * is what the guest states about itself (claimed()), with a MAC address of its own: the sender of
 * an ARP request or reply (RFC 826; a probe has none, RFC 5227 section 2.1.1); the source of
 * neighbour discovery messages, which is an address of the interface (RFC 4861 sections 4.1 to
 * 4.4); and the target of an advertisement with the override flag (proxies and anycast must not set
 * it, sections 7.2.7 and 7.2.8). If another machine claims the same from outside, the address is
 * that machine's from then on: the entry is deleted, and so is a virtual MAC.
 *
 * Epochs. On the secondary an entry is valid in its epoch only. An SVM of an older epoch claimed it
 * in a state that is gone and may have diverged (a VRRP router that received no advertisements from
 * its master, for example). What the copied state has claimed is reported by the primary before the
 * checkpoint, as entries of the next epoch; the controller keeps the entries that they replace, in
 * case that epoch never comes. On the primary the guest continues, and all entries are valid.
 *
 * Races. Both maps are written by the guest's side (process context or softirq) and the network's
 * side (softirq), on any CPU. An entry of `addresses` is replaced as a whole, which the map's own
 * lock orders. In an entry of `macs`, seen_ns and epoch are single words, written by the guest's
 * side only. If the guest and another machine claim an address at the same instant either may win,
 * just as in their neighbours' tables. A MAC that is deleted while the guest sends is noted again
 * with its next frame. CFG_GUEST_MAC is written whole, and only by the controller. The controller
 * sets MAC_ALL when it next checks; until then a MAC that found no room is not mirrored to, and
 * costs checkpoints.
 */
#ifndef COLO_ADDRESSES_H
#define COLO_ADDRESSES_H

/*
 * key: mac_key(). Writers: pvm_out, svm_out; pvm_in, svm_in and svm_net delete what has moved; the
 * controller deletes what is old. Readers: pvm_in, controller. Full: MAC_ALL.
 */
BPF_TABLE("hash", u64, struct colo_claim, macs, COLO_MAX_MACS);

/*
 * As above; in addition, the secondary's controller writes what the primary reports. Reader: the
 * controller. Full: counted, and the address is not announced.
 */
BPF_TABLE("hash", struct colo_address, struct colo_claim, addresses, COLO_MAX_ADDRESSES);

#define ETHERTYPE_ARP  0x0806
#define ETHERTYPE_IPV6 0x86DD
#define PROTO_ICMPV6   58

#define ND_ROUTER_SOLICIT 133
#define ND_ROUTER_ADVERT  134
#define ND_SOLICIT	  135
#define ND_ADVERT	  136

/* A MAC's seen_ns is renewed only when older than this: CPUs share its cache line. */
#define MAC_STEP_NS 10000000000ULL

/* Everything that note_guest() and note_network() have on their stack. */
struct note {
	u64 mac;
	struct colo_address a;
	struct colo_claim c;
};

/*
 * Make the stack look the same to the verifier on every path; otherwise it walks everything that
 * follows once for each.
 */
#define SAME_STACK(n)                                                                              \
	do {                                                                                       \
		__builtin_memset(&(n), 0, sizeof(n));                                              \
		asm volatile("" : : "r"(&(n)) : "memory");                                         \
	} while (0)

/*
 * The address as a number that is the same on every CPU; colo_xdp/net/address_claims.py has the
 * same.
 */
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

	/*
	 * Never after an extension header in a fragment (RFC 6980); others are not used in
	 * practice.
	 */
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

/*
 * Whether the frame claims an address for its sender; if so, which one, and at which MAC address.
 * on_link: the tag in the metadata is the peer link's.
 */
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

/* Note the source of one of the guest's own frames as a MAC address of the guest. */
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
		return; /* it is about another machine */
	old = addresses.lookup(&n->a);
	if (old) {
		if ((s32)(old->epoch - epoch) > 0)
			return; /* belongs to the state that is about to be loaded */
		if (old->mac == n->mac && !(n->c.flags & CLAIM_SAYS_ROUTER))
			n->c.flags = old->flags;
	}
	n->c.seen_ns = bpf_ktime_get_ns();
	n->c.epoch = epoch;
	if (addresses.update(&n->a, &n->c))
		count(PROG_ADDRESSES, R_NOTE_ADDRESSES_FULL, 0);
}

/* Note the addresses in a frame of the guest, as it sent it. */
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

/* Note the addresses in a frame that comes from the network. */
static __always_inline void note_network(struct __sk_buff *skb, int on_link)
{
	u8 *eth = (void *)(long)skb->data;
	struct note n = {};

	if ((void *)eth + 14 <= (void *)(long)skb->data_end) {
		n.mac = mac_key(eth + 6);
		/*
		 * A group address: this is how a machine that takes over a virtual MAC informs
		 * switches.
		 */
		if (eth[0] & 1 && macs.lookup(&n.mac) && macs.delete(&n.mac) == 0)
			count(PROG_ADDRESSES, R_NOTE_MAC_MOVED, 0);
		if (claimed(skb, on_link, &n.a, &n.c) && addresses.lookup(&n.a) &&
		    addresses.delete(&n.a) == 0)
			count(PROG_ADDRESSES, R_NOTE_ADDRESS_MOVED, 0);
	}
	SAME_STACK(n);
}

/*
 * Whether a frame on its way to the guest's tap is for the guest; otherwise the bridge flooded it.
 */
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
