/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Selects the device by which a frame leaves that the fast path releases.
 *
 * A frame that leaves through the tap's bridge has to be queued first, as if it had come from the
 * tap, which costs more than comparing it. So pvm_in notes at which bridge port each client was
 * seen, as the bridge itself does, and frames to that client leave there directly. Whenever this is
 * uncertain, the frame goes through the bridge: for a client not seen for CLIENT_FRESH_NS, for one
 * whose frames came through the host's own stack, for a bridge or port with rules of its own (user
 * space checks, and leaves it out of `ports`), and for everything while there is no controller to
 * notice that a port leaves the bridge. The bridge forgets the guest's address if it sees none of
 * its frames, so user space refreshes it.
 *
 * Races: an entry's ifindex never changes, a new entry replaces it; seen_ns is one word. A client
 * that moves to another port is sent to at the old one until pvm_in sees it at the new one, at the
 * latest with its next frame for the guest. Any switch between the two behaves the same.
 */
#ifndef COLO_EGRESS_H
#define COLO_EGRESS_H

#define CLIENT_FRESH_NS 1000000000LL

/* key: ifindex of a port. Writer: controller. Reader: pvm_in. */
BPF_TABLE("hash", u32, u64, ports, COLO_MAX_PORTS);

/*
 * key: MAC address. Writer: pvm_in; the controller clears it when ports change. Reader: the fast
 * path. When it is full, frames to the least recently used client go through the bridge.
 */
BPF_TABLE("lru_hash", u64, struct colo_client, clients, COLO_MAX_CLIENTS);

/* Note the port at which a client's frame for the guest arrived. */
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

/* ifindex of the port of the client with this MAC address; 0: through the bridge. */
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
