/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Programs for a PVM that once took over and still has connections with numbers of its own.
 *
 *   promoted_in   tc egress of tap P, after pvm_in: from the client's numbers to the guest's
 *   promoted_out  tc ingress of tap P, before pvm_out: from the guest's numbers to the client's
 *
 * Its own numbers appear only between these programs and the guest, the client's everywhere else.
 * They are attached only while such connections exist. As after a takeover, no new entry begins
 * here.
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
		reason = R_PASS_RELEASED; /* translated before it was held */
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
