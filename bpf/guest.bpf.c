/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * A PVM that has once taken over, and still has connections in numbers of its own.
 *
 *   guest_in   tc egress of tap P, behind pvm_in: the client's numbers into the guest's
 *   guest_out  tc ingress of tap P, before pvm_out: the guest's into the client's
 *
 * Between them and the guest are its own numbers, everywhere else the client's. They are on
 * the tap only while there are such connections. As after the takeover, none begins here.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/pkt_cls.h>
#include "colo_common.h"
#include "colo_config.h"
#include "colo_maps.h"
#include "parsing.h"
#include "csum.h"
#include "flow.h"
#include "rewrite.h"
#include "quote.h"

static __always_inline int translate(struct __sk_buff *skb, u32 prog, int to_guest)
{
	u32 len = skb->len, reason = R_PASSED, epoch = cfg(CFG_BASE_EPOCH);
	int verdict = TC_ACT_UNSPEC;
	struct told t = {};
	struct pkt p = {};

	if (skb->mark == COLO_MARK) {
		reason = R_RELEASED; /* it has been here before it was held */
	} else if (parse_skb(skb, &p)) {
		reason = R_BAD_FRAME;
	} else if (p.is_tcp) {
		read_options((void *)(long)skb->data, (void *)(long)skb->data_end, &p, &t);
		reason = rewrite_skb(skb, &p, &t, to_guest, MODE_TAKEOVER, epoch, R_PASSED);
	} else if (to_guest) {
		reason = rewrite_quote(skb, &p, epoch, R_PASSED);
	}
	if (reason == R_HELPER_FAILED)
		verdict = TC_ACT_SHOT;
	count(prog, reason, len);
	return verdict;
}

int guest_in(struct __sk_buff *skb)
{
	return translate(skb, PROG_GUEST_IN, 1);
}

int guest_out(struct __sk_buff *skb)
{
	return translate(skb, PROG_GUEST_OUT, 0);
}
