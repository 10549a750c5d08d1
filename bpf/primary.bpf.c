/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Programs of the primary host.
 *
 *   pvm_in       tc egress of tap P: a client's frame goes to the PVM, its clone to the peer link
 *   pvm_out      tc ingress of tap P: the PVM's output goes to user space and nowhere else
 *   svm_arrival  tc ingress of the peer link: the SVM's output goes to user space
 *   pvm_release  tc ingress of the release tap: what the controller releases enters the stack
 *                as if it came from tap P
 *   offload_ctl  not attached: offloads connections to the fast path and reclaims them
 *
 * With the fast path, pvm_out and svm_arrival decide on most frames themselves.
 */
#include <uapi/linux/bpf.h>
#include <uapi/linux/if_ether.h>
#include <uapi/linux/in.h>
#include <uapi/linux/in6.h>
#include <uapi/linux/pkt_cls.h>
#include "lib/abi.h"
#include "lib/limits.h"
#include "lib/maps.h"
#include "lib/parsing.h"
#include "lib/addresses.h"
#include "lib/gso.h"
#include "lib/events.h"
#include "lib/csum.h"
#include "lib/syn.h"
#include "lib/mptcp.h"
#ifdef COLO_OFFLOAD
#include "lib/egress.h"
#include "offload/offload.h"
#else
#define OFFLOAD_NO 0
#define note_client(skb)
#define note_scale(p, shift)
#define note_client_segment(skb, p) 0
#define offload(...)		    OFFLOAD_NO /* kernels before 5.12, or [datapath] fast_path = "off" */
#endif

static __always_inline int finish(u32 prog, u32 reason, u32 len, int verdict)
{
	count(prog, reason, len);
	return verdict;
}

/*
 * value: 1. Writer: the controller, as flows match a drop-secondary rule. Reader: pvm_in. When it
 * is full, the least recently used flow is mirrored again, and the controller discards the SVM's
 * answers.
 */
BPF_TABLE("lru_hash", struct colo_unmirrored_key, u64, unmirrored, COLO_MAX_UNMIRRORED);

static __always_inline int is_unmirrored(const struct pkt *p)
{
	struct colo_unmirrored_key key = {};

	if (!p->is_tcp && !p->is_udp)
		return 0;
	__builtin_memcpy(key.ends.guest, p->dst, 16);
	__builtin_memcpy(key.ends.client, p->src, 16);
	key.ends.guest_port = p->dport;
	key.ends.client_port = p->sport;
	key.ends.vlan = p->vlan;
	key.proto = p->l4_proto;
	return unmirrored.lookup(&key) != 0;
}

/* No branches on its fields: the verifier would walk everything that follows once per outcome. */
static __always_inline int is_syn(const struct pkt *p)
{
	u32 other = ((p->flags & (TCP_SYN | TCP_RST)) ^ TCP_SYN) | (p->is_tcp ^ 1);

	asm volatile("" : "+r"(other));
	return !other;
}

#define DID_REMOVE_MPTCP 1
#define DID_LIMIT_WINDOW 2

/*
 * Note what a client's segment says, and change what must not reach the guests as it is. Returns
 * DID_*, or < 0 if the frame must be dropped.
 */
static __always_inline int prepare_segment_to_guest(struct __sk_buff *skb, const struct pkt *p,
						    u64 mode)
{
	struct syn_options o = {};

	if (!is_syn(p))
		return note_client_segment(skb, p) * DID_LIMIT_WINDOW;
	if (mode == MODE_DROP)
		return 0;
	read_syn_options(skb, p, &o);
	note_scale(p, o.wscale);
	return mptcp_off(skb, p, o.mp_capable) * DID_REMOVE_MPTCP;
}

int pvm_in(struct __sk_buff *skb)
{
	u32 len = skb->len, reason = R_PASS;
	/* Epoch before mode: see svm_out(). A stale tag costs only a retransmission. */
	u64 epoch = cfg(CFG_EPOCH), mode = cfg(CFG_MODE);
	u32 peer = cfg(CFG_PEER);
	u16 tci = COLO_KIND_MIRROR << COLO_KIND_SHIFT | (epoch & COLO_EPOCH_MASK);
	int verdict = TC_ACT_UNSPEC; /* passes, and promoted_in may follow (promoted.bpf.c) */
	int parsed = 0, did = 0;
	struct pkt p = {};

	note_network(skb, 0);
	if (mode == MODE_RUN || mode == MODE_CHECKPOINT || cfg(CFG_UNMIRRORED) || cfg(CFG_OFFLOAD))
		parsed = !parse_skb(skb, &p);
	/*
	 * A PVM that has stopped in a planned failover mirrors until the clients' frames go
	 * elsewhere.
	 */
	if (mode != MODE_RUN && mode != MODE_CHECKPOINT && mode != MODE_DROP) {
		reason = R_PASS;
	} else if (!is_for_guest(skb)) {
		reason = R_PASS_OTHER_MAC;
	} else if (parsed && cfg(CFG_UNMIRRORED) && is_unmirrored(&p)) {
		reason = R_PASS_UNMIRRORED;
	} else if (parsed && (did = prepare_segment_to_guest(skb, &p, mode)) < 0) {
		reason = R_DROP_HELPER_FAILED;
		verdict = TC_ACT_SHOT;
	} else {
		if (did & DID_REMOVE_MPTCP)
			count(PROG_PVM_IN, R_NOTE_MPTCP_REMOVED, len);
		if (did & DID_LIMIT_WINDOW)
			count(PROG_PVM_IN, R_NOTE_WINDOW_LIMITED, len);
		note_client(skb);
		/*
		 * The tag is pushed before the clone and popped after it, since a clone cannot be
		 * changed once it has been sent. If the pop fails, the PVM must not see the tag:
		 * drop, and the client sends again.
		 */
		reason = R_PASS_MIRROR_FAILED;
		if (bpf_skb_vlan_push(skb, bpf_htons(COLO_TPID), tci) == 0) {
			if (bpf_clone_redirect(skb, peer, 0) == 0)
				reason = R_PASS_MIRRORED;
			if (bpf_skb_vlan_pop(skb)) {
				reason = R_DROP_HELPER_FAILED;
				verdict = TC_ACT_SHOT;
			}
		}
	}
	return finish(PROG_PVM_IN, reason, len, verdict);
}

/*
 * Send a copy of a SYN of the PVM to the secondary, whose rewriter learns the PVM's ISN from it. As
 * in pvm_in the tag is pushed before the clone. If the copy is lost, another is sent when the SYN
 * is released.
 */
static __always_inline int copy_syn(struct __sk_buff *skb, u64 epoch)
{
	u16 tci = COLO_KIND_SYN << COLO_KIND_SHIFT | (epoch & COLO_EPOCH_MASK);
	u32 peer = cfg(CFG_PEER);

	if (bpf_skb_vlan_push(skb, bpf_htons(COLO_TPID), tci)) {
		count(PROG_PVM_OUT, R_PASS_MIRROR_FAILED, skb->len);
		return 0;
	}
	if (bpf_clone_redirect(skb, peer, 0))
		count(PROG_PVM_OUT, R_PASS_MIRROR_FAILED, skb->len);
	return bpf_skb_vlan_pop(skb);
}

/* Whether the controller has not been seen for CFG_LOSS_NS. */
static __always_inline int controller_lost(void)
{
	u64 seen = cfg(CFG_CONTROLLER_NS), limit = cfg(CFG_LOSS_NS);

	return limit && bpf_ktime_get_ns() - seen > limit;
}

int pvm_out(struct __sk_buff *skb)
{
	note_guest(skb);

	u64 mode = cfg(CFG_MODE), epoch = cfg(CFG_EPOCH);
	u32 len = skb->len, reason = R_DROP_NO_CONFIG, punt_seq = 0, fate = OFFLOAD_NO,
	    mark = skb->mark;
	int verdict = TC_ACT_SHOT;
	struct pkt p = {};

	if (mode == MODE_DROP) {
		reason = R_DROP_MODE; /* released ones too: the other guest may be active */
	} else if (silenced()) {
		reason = R_DROP_LEASE_EXPIRED; /* released ones too */
	} else if (mode != MODE_BYPASS && ((void)parse_skb(skb, &p), is_syn(&p)) &&
		   copy_syn(skb, epoch)) {
		reason = R_DROP_HELPER_FAILED;
	} else if (mark == COLO_MARK) {
		skb->mark = 0; /* the host's own rules see an ordinary frame */
		reason = R_PASS_RELEASED;
		verdict = TC_ACT_OK;
	} else if (mode == MODE_BYPASS) {
		reason = R_PASS;
		verdict = TC_ACT_OK;
	} else if ((p.is_tcp || p.is_udp) &&
		   (fate = offload(skb, &p, SIDE_PVM, mode, epoch, &punt_seq, &verdict))) {
		reason = fate; /* even without a controller */
	} else if (controller_lost()) {
		if (cfg(CFG_LOSS_POLICY) == LOSS_RELEASE) {
			reason = R_PASS_CONTROLLER_LOST;
			verdict = TC_ACT_OK;
		} else {
			reason = R_DROP_CONTROLLER_LOST;
		}
	} else {
		reason = capture(skb, &p, SRC_PVM, epoch, punt_seq);
	}
	return finish(PROG_PVM_OUT, reason, len, verdict);
}

int svm_arrival(struct __sk_buff *skb)
{
	u32 len = skb->len, tci = skb->vlan_tci, reason = R_PASS_FOREIGN, punt_seq = 0,
	    fate = OFFLOAD_NO;
	u32 epoch = cfg(CFG_EPOCH);
	u64 mode = cfg(CFG_MODE);
	int verdict = TC_ACT_OK;

	/* The kernel has moved the outer tag to the metadata before this hook runs. */
	if (skb->vlan_present && skb->vlan_proto == bpf_htons(COLO_TPID)) {
		verdict = TC_ACT_SHOT; /* a tagged frame never reaches the host's stack */
		if (tci >> COLO_KIND_SHIFT != COLO_KIND_SVM) {
			reason = R_DROP_ISOLATED;
		} else if (mode != MODE_RUN && mode != MODE_CHECKPOINT) {
			reason = R_DROP_MODE;
		} else if (silenced()) {
			reason = R_DROP_LEASE_EXPIRED; /* the fast path lets frames out from here */
		} else if (bpf_skb_vlan_pop(skb)) {
			reason = R_DROP_HELPER_FAILED;
		} else {
			struct pkt p = {};

			/* The fast path must not use a frame of another epoch. */
			if ((tci & COLO_EPOCH_MASK) != (epoch & COLO_EPOCH_MASK))
				epoch = ~epoch;
			if (!parse_skb(skb, &p) && (p.is_tcp || p.is_udp))
				fate = offload(skb, &p, SIDE_SVM, mode, epoch, &punt_seq, &verdict);
			if (fate)
				reason = fate;
			else
				reason = capture(skb, &p, SRC_SVM, tci & COLO_EPOCH_MASK, punt_seq);
		}
	}
	return finish(PROG_SVM_ARRIVAL, reason, len, verdict);
}

int pvm_release(struct __sk_buff *skb)
{
	u32 tap = cfg(CFG_TAP), len = skb->len;

	skb->mark = COLO_MARK;
	return finish(PROG_PVM_RELEASE, R_PASS_REDIRECTED, len, bpf_redirect(tap, BPF_F_INGRESS));
}

#ifdef COLO_OFFLOAD
int offload_ctl(struct __sk_buff *skb)
{
	return control((void *)(long)skb->data, (void *)(long)skb->data_end);
}
#endif
