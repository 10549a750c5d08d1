/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Programs of the secondary host.
 *
 *   svm_in       tc ingress of the peer link: mirrored client frames, for the SVM; SYNs of the PVM
 *   svm_deliver  tc ingress of the deliver tap: the same frames, held during a checkpoint
 *   svm_out      tc ingress of tap S: the SVM's output, to the peer link or, after a takeover,
 *                to the network
 *   svm_forward  tc ingress of the forward tap: SVM output that was held during a checkpoint
 *   svm_net      tc egress of tap S: what may reach the guest
 *   svm_out_xdp  XDP of tap S: translation of the SVM's output on a tap with plain frames
 *
 * Until failover, no frame of the SVM reaches the network: svm_out returns TC_ACT_OK in
 * MODE_TAKEOVER only.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/pkt_cls.h>
#include "lib/abi.h"
#include "lib/limits.h"
#include "lib/maps.h"
#include "lib/parsing.h"
#include "lib/addresses.h"
#include "lib/gso.h"
#include "lib/events.h"
#include "lib/csum.h"
#include "lib/conntrack.h"
#include "lib/rewrite.h"
#include "lib/icmp.h"

#ifdef COLO_REWRITE_AT_XDP
#define OUT_TRANSLATED 1 /* svm_out_xdp translated before the skb was made */
#else
#define OUT_TRANSLATED 0
#endif

static __always_inline int finish(u32 prog, u32 reason, u32 len, int verdict)
{
	count(prog, reason, len);
	return verdict;
}

/*
 * 0, but the verifier does not know that (see `zero` of parse_frame()). A value to which it is
 * added is no longer a constant, for each of which the verifier would walk everything that follows.
 */
static __always_inline u32 unknown_zero(struct __sk_buff *skb)
{
	volatile struct __sk_buff *ctx = skb;

	return ctx->len - ctx->len;
}

/* Track and translate a frame of any kind; R_PASS_REDIRECTED if nothing changed. */
static __always_inline u32 translate(struct __sk_buff *skb, int to_svm, u64 mode, u32 epoch)
{
	struct tcp_options t = {};
	struct pkt p = {};

	if (parse_skb(skb, &p))
		return R_NOTE_UNPARSED;
	if (!p.is_tcp)
		return to_svm ? rewrite_quote(skb, &p, epoch, R_PASS_REDIRECTED)
			      : R_PASS_REDIRECTED;
	read_options((void *)(long)skb->data, (void *)(long)skb->data_end, &p, &t);
	return rewrite_skb(skb, &p, &t, to_svm, mode, epoch, R_PASS_REDIRECTED);
}

static __always_inline int to_tap(struct __sk_buff *skb)
{
	u32 tap = cfg(CFG_TAP);

	skb->mark = COLO_MARK; /* svm_net lets it pass */
	return bpf_redirect(tap, 0);
}

/* Send a frame of the SVM to the primary, stamped with the epoch it belongs to. */
static __always_inline u32 to_peer(struct __sk_buff *skb, u64 epoch, u32 reason, int *verdict)
{
	u16 tci = COLO_KIND_SVM << COLO_KIND_SHIFT | (epoch & COLO_EPOCH_MASK);
	u32 peer = cfg(CFG_PEER);

	if (reason == R_DROP_HELPER_FAILED || bpf_skb_vlan_push(skb, bpf_htons(COLO_TPID), tci))
		return R_DROP_HELPER_FAILED;
	*verdict = bpf_redirect(peer, 0);
	return reason;
}

/* Kind of a frame on the peer link; -1 if it has none of our tags. */
static __always_inline int peer_kind(struct __sk_buff *skb)
{
	__be16 tci;

	/* The kernel has moved the outer tag to the metadata before this hook runs. */
	if (skb->vlan_present) {
		if (skb->vlan_proto != bpf_htons(COLO_TPID))
			return -1;
		return skb->vlan_tci >> COLO_KIND_SHIFT;
	}
	/* Only in test runs is it still in the frame's bytes; never a reason to let a frame out. */
	if (skb->protocol != bpf_htons(COLO_TPID) || bpf_skb_load_bytes(skb, 14, &tci, 2))
		return -1;
	return bpf_ntohs(tci) >> COLO_KIND_SHIFT;
}

/*
 * Whether a guest that has taken over still takes mirrored frames. A primary that has handed over
 * mirrors what clients send to it until switches have learnt where the guest is now, so the
 * controller sets a deadline; it sets none where the primary is not known to live. Later, such
 * frames are not the clients': whoever writes to the peer link would talk to the guest beside the
 * firewalls of its network.
 *
 * The controller writes the deadline before MODE_TAKEOVER, and this reads it after the mode. If the
 * processor swaps the reads, it sees the deadline of an earlier takeover, which is over: one frame
 * is dropped that its client repeats. A program that has read an earlier mode delivers the one
 * frame that it has, which came before the takeover was decided. Before the mode is written nothing
 * is dropped here.
 */
static __always_inline int still_mirrored(void)
{
	return bpf_ktime_get_ns() < cfg(CFG_MIRRORED_UNTIL_NS);
}

int svm_in(struct __sk_buff *skb)
{
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 len = skb->len, reason;
	int kind = peer_kind(skb), verdict = TC_ACT_SHOT;

	/*
	 * Not in MODE_TAKEOVER: the mirror then carries what this guest itself sends, as seen by
	 * the other host.
	 */
	if (kind == COLO_KIND_MIRROR && (mode == MODE_RUN || mode == MODE_CHECKPOINT))
		note_network(skb, 1);
	if (kind < 0) {
		reason = R_PASS_FOREIGN;
		verdict = TC_ACT_OK;
	} else if (kind != COLO_KIND_MIRROR && kind != COLO_KIND_SYN) {
		reason = R_DROP_ISOLATED;
	} else if (mode != MODE_RUN && mode != MODE_CHECKPOINT && mode != MODE_TAKEOVER) {
		reason = R_DROP_MODE;
	} else if (kind == COLO_KIND_MIRROR && mode == MODE_TAKEOVER && !still_mirrored()) {
		reason = R_DROP_PROMOTED;
	} else if (bpf_skb_vlan_pop(skb)) {
		reason = R_DROP_HELPER_FAILED;
	} else {
		/* One parser for all kinds. */
		struct tcp_options t = {};
		struct pkt p = {};
		int bad;

		mode += unknown_zero(skb);
		kind += unknown_zero(skb);
		bad = parse_skb(skb, &p);
		if (p.is_tcp)
			read_options((void *)(long)skb->data, (void *)(long)skb->data_end, &p, &t);
		if (kind == COLO_KIND_SYN) {
			/*
			 * If a checkpoint interrupts the handshake, the copy sent on release
			 * carries the ISN.
			 */
			reason = mode == MODE_RUN ? flow_note_pvm(&p, &t.ts, epoch)
						  : R_DROP_PVM_SYN_UNKNOWN;
		} else if (mode == MODE_CHECKPOINT) {
			reason = capture(skb, &p, SRC_CLIENT, epoch, 0);
		} else {
			if (bad)
				reason = R_NOTE_UNPARSED;
			else if (p.is_tcp)
				reason =
					rewrite_skb(skb, &p, &t, 1, mode, epoch, R_PASS_REDIRECTED);
			else
				reason = rewrite_quote(skb, &p, epoch, R_PASS_REDIRECTED);
			if (reason != R_DROP_HELPER_FAILED)
				verdict = to_tap(skb);
		}
	}
	return finish(PROG_SVM_IN, reason, len, verdict);
}

int svm_deliver(struct __sk_buff *skb)
{
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 len = skb->len, reason = R_DROP_MODE;
	int verdict = TC_ACT_SHOT;

	if (mode == MODE_RUN || mode == MODE_CHECKPOINT || mode == MODE_TAKEOVER) {
		mode += unknown_zero(skb);
		reason = translate(skb, 1, mode, epoch);
		if (reason != R_DROP_HELPER_FAILED)
			verdict = to_tap(skb);
	}
	return finish(PROG_SVM_DELIVER, reason, len, verdict);
}

int svm_out(struct __sk_buff *skb)
{
	note_guest(skb);

	/*
	 * The epoch must be read before the mode. The controller leaves MODE_RUN, lets the
	 * checkpoint happen, advances the epoch and only then returns to MODE_RUN. A frame that the
	 * guest sent before it was stopped entered this program before the epoch moved. If the mode
	 * were read first, the program could see the old MODE_RUN, be interrupted for the whole
	 * checkpoint, and stamp the frame with the new epoch: old bytes, which the primary would
	 * compare with new ones. In this order the stamp is at worst too old, and the primary drops
	 * and counts such a frame.
	 *
	 * The processor may swap the two reads, but only by less than the milliseconds between the
	 * two writes, and an interrupt orders them.
	 */
	u64 epoch = cfg(CFG_EPOCH);
	u64 mode = cfg(CFG_MODE);
	u32 len = skb->len, reason = R_DROP_MODE;
	int verdict = TC_ACT_SHOT;

	if (mode == MODE_CHECKPOINT) {
		struct pkt p = {};

		parse_skb(skb, &p); /* only for the offloads */
		reason = capture(skb, &p, SRC_SVM, epoch, 0);
	} else if (mode == MODE_TAKEOVER && silenced()) {
		reason = R_DROP_LEASE_EXPIRED;
	} else if (mode == MODE_RUN || mode == MODE_TAKEOVER) {
		int takeover = mode == MODE_TAKEOVER;

		if (takeover && skb->mark == COLO_MARK)
			reason =
				/* the controller's own, or translated by svm_forward */
				R_PASS_RELEASED;
		else
			reason =
				OUT_TRANSLATED ? R_PASS_REDIRECTED : translate(skb, 0, mode, epoch);
		if (!takeover) {
			reason = to_peer(skb, epoch, reason, &verdict);
		} else if (reason != R_DROP_HELPER_FAILED) {
			skb->mark = 0; /* the host's own rules see an ordinary frame */
			verdict = TC_ACT_OK;
			if (reason == R_PASS_REDIRECTED)
				reason = R_PASS;
		}
	}
	return finish(PROG_SVM_OUT, reason, len, verdict);
}

int svm_forward(struct __sk_buff *skb)
{
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 len = skb->len, reason = R_DROP_MODE, tap = cfg(CFG_TAP);
	int verdict = TC_ACT_SHOT;

	if (mode == MODE_RUN || mode == MODE_CHECKPOINT || mode == MODE_TAKEOVER) {
		reason = translate(skb, 0, mode, epoch);
		if (mode != MODE_TAKEOVER) {
			reason = to_peer(skb, epoch, reason, &verdict);
		} else if (reason != R_DROP_HELPER_FAILED) {
			/* Held when the primary died; or an announcement, which is not TCP. */
			skb->mark = COLO_MARK;
			verdict = bpf_redirect(tap, BPF_F_INGRESS);
		}
	}
	return finish(PROG_SVM_FORWARD, reason, len, verdict);
}

int svm_net(struct __sk_buff *skb)
{
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 len = skb->len, reason = R_DROP_ISOLATED;
	int verdict = TC_ACT_SHOT;

	if (skb->mark == COLO_MARK) {
		reason = R_PASS_RELEASED;
		verdict = TC_ACT_OK;
	} else if (mode == MODE_TAKEOVER) {
		note_network(skb, 0);
		reason = translate(skb, 1, mode, epoch);
		if (reason != R_DROP_HELPER_FAILED)
			verdict = TC_ACT_OK;
		if (reason == R_PASS_REDIRECTED)
			reason = R_PASS;
	}
	return finish(PROG_SVM_NET, reason, len, verdict);
}

int svm_out_xdp(struct xdp_md *xdp)
{
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 len = xdp->data_end - xdp->data, reason = R_PASS;

	/* The verdict is svm_out's, which sees the same frame next. */
	if (mode == MODE_RUN || mode == MODE_TAKEOVER) {
		struct pkt p = {};

		if (parse_xdp(xdp, &p))
			reason = R_NOTE_UNPARSED;
		else if (p.is_tcp)
			reason = rewrite_xdp(xdp, &p, 0, mode, epoch, R_PASS);
	}
	return finish(PROG_SVM_OUT_XDP, reason, len, XDP_PASS);
}
