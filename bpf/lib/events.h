/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * Capture of frames for user space, through a BPF ring buffer or (COLO_EVENTS_PERF) perf buffers on
 * kernels before 5.8. A frame that does not fit is counted and dropped. To a guest that is loss on
 * the wire, and loss is safe.
 */
#ifndef COLO_EVENTS_H
#define COLO_EVENTS_H

#ifdef COLO_EVENTS_PERF
/*
 * perf_event_output appends at most 65535 bytes in all; bcc delivers 65,400 bytes of payload whole.
 */
#define COLO_MAX_EVENT_FRAME 65400
BPF_PERF_OUTPUT(events);
#else
#define COLO_MAX_EVENT_FRAME COLO_MAX_FRAME
BPF_RINGBUF_OUTPUT(events, COLO_AS_CONFIGURED); /* pages */

struct colo_scratch {
	struct colo_event head;
	__u8 frame[65536 + 64];
};

/* One frame per CPU: programs run with bottom halves off, so none of ours interrupts another. */
BPF_TABLE("array", u32, struct colo_scratch, scratch, COLO_AS_CONFIGURED);

static __always_inline struct colo_scratch *my_scratch(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return scratch.lookup(&cpu);
}
#endif

/*
 * Copy the frame into an event. The frame must be dropped afterwards, since it may have been
 * damaged. Returns the reason to count: R_PUNT, or why it failed.
 */
static __always_inline u32 capture(struct __sk_buff *skb, const struct pkt *p, u8 source, u32 epoch,
				   u32 punt_seq)
{
	u32 gso = gso_type(skb, p);
	u64 len = skb->len;
	struct colo_event head = {};

	if (len < 14 || len > COLO_MAX_EVENT_FRAME)
		return R_DROP_TOO_LARGE;
	if (gso == GSO_REFUSED)
		return R_DROP_GSO_UNSUPPORTED;
	head.ts_ns = bpf_ktime_get_ns();
	head.len = len;
	head.epoch = epoch;
	head.gso_size = skb->gso_size;
	head.gso_type = gso;
	head.source = source;
	head.punt_seq = punt_seq;
	if (skb->vlan_present) {
		head.flags = EV_VLAN;
		head.vlan_tci = skb->vlan_tci;
		head.vlan_proto = skb->vlan_proto;
	}
#ifdef COLO_EVENTS_PERF
	if (csum_offload(skb, p, &head))
		return R_DROP_GSO_UNSUPPORTED;
	int lost = events.perf_submit_skb(skb, (u32)len, &head, sizeof(head));

	return lost ? R_DROP_RING_FULL : R_PUNT;
#else
	struct colo_scratch *s = my_scratch();

	if (!s)
		return R_DROP_HELPER_FAILED;
	/* 1 <= len <= 131072 for the verifier; LLVM would optimise a plain range test away. */
	asm volatile("%0 += -1\n%0 &= 0x1ffff\n%0 += 1" : "+r"(len));
	if (len > 65600)
		return R_DROP_TOO_LARGE;
	if (bpf_skb_load_bytes(skb, 0, s->frame, len))
		return R_DROP_HELPER_FAILED;
	if (csum_offload(skb, p, &head))
		return R_DROP_GSO_UNSUPPORTED;
	s->head = head;
	if (events.ringbuf_output(s, sizeof(head) + len, 0))
		return R_DROP_RING_FULL;
	return R_PUNT;
#endif
}

#endif
