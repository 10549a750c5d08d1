/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A PVM that has once taken over, and still has connections in numbers of its own.
 *
 *   promoted_in   tc egress of tap P, behind pvm_in: the client's numbers into the guest's
 *   promoted_out  tc ingress of tap P, before pvm_out: the guest's into the client's
 *
 * Between them and the guest are its own numbers, everywhere else the client's. They are on
 * the tap only while there are such connections. As after the takeover, none begins here.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/pkt_cls.h>
#include "lib/abi.h"
#include "lib/limits.h"
#include "lib/maps.h"
#include "lib/parsing.h"
#include "lib/csum.h"
#include "lib/conntrack.h"
#include "lib/rewrite.h"
#include "lib/icmp.h"

static __always_inline int translate(struct __sk_buff *skb, u32 prog, int to_guest)
{
	u32 len = skb->len, reason = R_PASS, epoch = cfg(CFG_PROMOTED_EPOCH);
	int verdict = TC_ACT_UNSPEC;
	struct tcp_options t = {};
	struct pkt p = {};

	if (skb->mark == COLO_MARK) {
		reason = R_PASS_RELEASED; /* it has been here before it was held */
	} else if (parse_skb(skb, &p)) {
		reason = R_NOTE_UNPARSED;
	} else if (p.is_tcp) {
		read_options((void *)(long)skb->data, (void *)(long)skb->data_end, &p, &t);
		reason = rewrite_skb(skb, &p, &t, to_guest, MODE_TAKEOVER, epoch, R_PASS);
	} else if (to_guest) {
		reason = rewrite_quote(skb, &p, epoch, R_PASS);
	}
	if (reason == R_DROP_HELPER_FAILED)
		verdict = TC_ACT_SHOT;
	count(prog, reason, len);
	return verdict;
}

int promoted_in(struct __sk_buff *skb)
{
	return translate(skb, PROG_PROMOTED_IN, 1);
}

int promoted_out(struct __sk_buff *skb)
{
	return translate(skb, PROG_PROMOTED_OUT, 0);
}
