/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * By which device a frame leaves that the fast path releases.
 *
 * By way of the tap's bridge it has to be queued first, as if it had come from the tap, and
 * that costs more than comparing it. So pvm_in notes at which port of the bridge each client
 * was heard, as the bridge itself does, and the client's frames leave there directly. Whatever
 * is not certain goes by way of the bridge: a client not heard for CLIENT_FRESH_NS, one that
 * came over the host's own stack, a bridge or a port with rules of its own (user space looks, and
 * leaves it out of `ports`), and everything while there is no controller, which would see a port
 * leave the bridge. The bridge forgets the guest's address if none of its frames come by: user
 * space reminds it.
 *
 * Races. An entry's ifindex never changes, a new entry takes its place; seen_ns is one word.
 * A client that moves to another port is sent to the old one until it is heard there, by pvm_in
 * at the latest with its next frame for the guest: as with any switch between the two.
 */
#ifndef COLO_EGRESS_H
#define COLO_EGRESS_H

#define CLIENT_FRESH_NS 1000000000LL

/* key: ifindex of a port. Writer: controller. Reader: pvm_in. */
BPF_TABLE_PINNED("hash", u32, u64, ports, COLO_MAX_PORTS, PIN_DIR "/ports");

/* key: MAC address. Writer: pvm_in; the controller clears it when ports change. Reader: the fast path.
 * When it is full the least used one goes by way of the bridge. */
BPF_TABLE_PINNED("lru_hash", u64, struct colo_client, clients, COLO_MAX_CLIENTS,
		 PIN_DIR "/clients");

/* A client's frame for the guest has come. */
static __always_inline void note_client(struct __sk_buff *skb)
{
	void *data = (void *)(long)skb->data;
	struct colo_client *c, new = {};
	u64 key, now;
	u32 port = skb->ingress_ifindex;

	if (cfg(CFG_UPLINK) != UPLINK_LEARNED || data + 14 > (void *)(long)skb->data_end)
		return;
	key = mac_key(data + 6);
	c = clients.lookup(&key);
	now = bpf_ktime_get_ns();
	if (c && c->ifindex == port) {
		if ((s64)(now - c->seen_ns) > CLIENT_FRESH_NS / 16)
			c->seen_ns = now;
		return;
	}
	if (ports.lookup(&port)) {
		new.seen_ns = now;
		new.ifindex = port;
		clients.update(&key, &new);
	} else if (c) {
		clients.delete(&key);
	}
}

/* ifindex of the port of the client with this MAC address; 0: by way of the bridge. */
static __always_inline u32 egress_ifindex(const void *mac, u64 now)
{
	u64 up = cfg(CFG_UPLINK), loss = cfg(CFG_LOSS_NS), key;
	struct colo_client *c;

	if (up != UPLINK_LEARNED)
		return up;
	if (loss && (s64)(now - cfg(CFG_CONTROLLER_NS)) > (s64)loss)
		return 0;
	key = mac_key(mac);
	c = clients.lookup(&key);
	return c && (s64)(now - c->seen_ns) < CLIENT_FRESH_NS ? c->ifindex : 0;
}

#endif
