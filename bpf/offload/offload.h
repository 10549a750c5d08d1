/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The fast path. TCP segments that arrive in order, from the end of the handshake to the FIN, are
 * compared and released here; Python never sees them. UDP is in offload/udp.h.
 * tests/sim/offload_model.py implements the same rules in Python, and
 * tests/netns/test_offload_differential.py compares the two frame by frame.
 *
 * One guest is ahead of the other. Its bytes, released..next, are in a buffer. When the other
 * guest's bytes arrive they are compared, and what is equal leaves at once:
 * - if the PVM is the late one, its own frame passes;
 * - if the SVM is the late one, its frame is turned into the PVM's by writing the PVM's newest
 *   header over its own, since the payload is the same;
 * - if their segments end at different places, new segments are built from the buffer.
 * A header that leaves carries the smaller of the two guests' acks and the smaller of their window
 * fields, so the client is never promised more than both guests have. An ack that came too early
 * for that leaves with the SVM's next frame. Verified bytes never wait: `released` is both the end
 * of what has left and the end of what is known to be equal.
 *
 * Anything else is an exception. The whole connection is punted to user space together with the
 * frame that caused it. Python takes over the connection state and the buffer, decides as it always
 * does, and offloads the connection again when nothing is outstanding.
 *
 * Concurrency. Frames of the two guests arrive on any CPU at the same time, and user space reclaims
 * connections. Everything in colo_conn except client_ack and shift is changed only by the CPU that
 * changed `lock` from 0 to 1, and pvm_in reads little of it (offload/ahead.h). bpf_spin_lock() does
 * not work here: no helper may be called while it is held.
 * - No byte leaves uncompared. Comparing, moving `released` and deciding are one critical section,
 *   and a frame's verdict comes from it alone.
 * - No frame is lost. A CPU that does not get the lock in COLO_SPINS tries (because the owner's
 *   virtual CPU was stopped, for example) captures its frame for user space, which reclaims the
 *   connection before it looks at the frame.
 * - The lock cannot deadlock against itself. Programs run with bottom halves off. offload_ctl may
 *   run with them on, but does little under the lock, and a program that interrupts it punts its
 *   frame to user space.
 * - A connection leaves OWNER_USER only by CTL_OFFLOAD, under the lock, and only if no frame has
 *   been captured since the last one that user space has seen (`punt_seq`). So no frame in the
 *   event ring can belong before those that the fast path decides from then on. A frame that was
 *   captured without the lock, or before the entry existed, is not counted. It makes user space
 *   reclaim the connection again, and until then its bytes are a gap here.
 * - A frame that leaves here may overtake one that another CPU has just released, as on every path
 *   with two CPUs. Steer flows (RPS) where that matters. Released bytes stay released, so only the
 *   order can change. A guest that moves a flow to another queue of its tap does so when the frame
 *   before has left: docs/design/queues.md.
 * - The epoch is part of the connection state. State from another epoch is handed over, not used. A
 *   checkpoint first sets MODE_CHECKPOINT, in which every connection that has traffic is handed
 *   over; user space then reclaims those that have a buffer before it commits.
 * - User space makes and deletes the entries. It deletes them only in OWNER_USER, when they have
 *   not been used for a long time.
 */
#ifndef COLO_OFFLOAD_H
#define COLO_OFFLOAD_H

#include "conn.h"
#include "ahead.h"
#include "buffer.h"
#include "payload.h"
#include "transmit.h"
#include "udp.h"

#define CTL_SEEN_STEP_NS 1000000000ULL

/*
 * Returned in place of a reason: not decided here, or handed over (c->punt_reason has the reason).
 */
#define OFFLOAD_NO 0

/*
 * Header fields that the parser does not report: NEAR_SIZE bytes, from NEAR bytes before the TCP
 * header, are loaded into w->old.
 */
#define NEAR	    14
#define NEAR_FRAG   0		/* IPv4: flags and fragment offset */
#define NEAR_DOFF   (NEAR + 12) /* TCP header length; low half: reserved bits and AE */
#define NEAR_WINDOW (NEAR + 14)
#define NEAR_SIZE   (NEAR + 16)

/*
 * Plain means: Ethernet, IP and TCP without tags or IP options; only ACK, PSH and FIN; timestamps
 * or no TCP options. Everything else belongs to the frame that carries it and must not appear in a
 * header that leaves with other bytes: URG and its pointer; ECE, CWR and AE (RFC 3168, RFC 9768),
 * which count what has arrived; signatures (RFC 2385, RFC 5925). The IP ID of a PVM that allows
 * fragmentation (no DF) is not plain either: each such packet needs an ID of its own (RFC 6864
 * section 4.2).
 */
static __always_inline int is_plain(struct __sk_buff *skb, const struct pkt *p,
				    const struct colo_work *w, u32 side)
{
	__be32 option;

	if (skb->vlan_present || p->l3_off != 14 || p->l4_off != (p->is_v6 ? 54 : 34))
		return 0;
	if ((p->flags & ~(TCP_PSH | TCP_FIN)) != TCP_ACK || (w->old[NEAR_DOFF] & 0x0F))
		return 0;
	if (side == SIDE_PVM && !p->is_v6 && !(w->old[NEAR_FRAG] & 0x40))
		return 0;
	if (skb->gso_size && cut_elsewise(skb, p))
		return 0;
	if (p->doff == 20)
		return 1;
	if (p->doff != 32 || bpf_skb_load_bytes(skb, p->l4_off + 20, &option, 4))
		return 0;
	return option == bpf_htonl(0x0101080A); /* RFC 7323 appendix A */
}

/*
 * Update c->mss, the segment size that the PVM uses now, from a segment of `n` bytes. No segment
 * built from the PVM's bytes may be larger: its path may have become narrower (RFC 1191, RFC 8201),
 * and only the PVM need know. The value follows upwards at once, and downwards on
 * - the first bytes that wait, since only bytes that wait are ever sent from here;
 * - a GSO frame, which states the size;
 * - a segment without PSH, which did not end with what the application wrote but is full.
 * A short segment that only looks full costs a few more segments until the next longer one. Once it
 * has been at COLO_SURE_MSS or above, the value does not fall below that: no path is so narrow.
 */
static __always_inline void note_size(struct colo_conn *c, u32 n, int surely)
{
	u32 floor = c->mss < COLO_SURE_MSS ? c->mss : COLO_SURE_MSS;

	if (n > c->mss)
		c->mss = n;
	else if (n && surely)
		c->mss = n > floor ? n : floor;
}

/*
 * Record the PVM's ack and window, and keep its header if others will need it. Returns 0 or a
 * reason.
 */
static __always_inline u32 note_pvm_header(struct __sk_buff *skb, const struct pkt *p,
					   struct colo_conn *c, struct colo_flow_key *key, u32 span,
					   u16 win)
{
	int early = seq_later(p->ack, c->s_ack);
	u32 n = skb->gso_size ? skb->gso_size : p->payload_len;

	if (c->l4 && (c->l4 != p->l4_off || c->doff != p->doff))
		return R_PUNT_EXCEPTION;
	/*
	 * The client counts duplicate acks (RFC 5681 section 2), so two of them must not be merged.
	 */
	if (!span && c->ack_pending && p->ack == c->p_ack && win == c->p_win)
		return R_PUNT_EXCEPTION;
	note_size(c, n,
		  skb->gso_size || !(p->flags & TCP_PSH) || c->released == c->next ||
			  c->leader != SIDE_PVM);
	if (early && !buffer_claim(c, key))
		return R_PUNT_NO_BUFFER;
	if (seq_later(c->p_ack, p->ack)) /* without a header the buffered bytes could not leave */
		return c->l4 || !span ? 0 : R_PUNT_EXCEPTION;
	if ((early || span || win > c->s_win) && keep_header(skb, c, p))
		return R_PUNT_HELPER_FAILED;
	c->p_ack = p->ack;
	c->p_win = win;
	if (early)
		c->ack_pending = 1;
	return 0;
}

/*
 * Check that the segment is plain, is the next one, and fits. Fill in what is to be compared and
 * stored, and w->act. Returns 0, R_OFFLOAD_DUPLICATE, or R_PUNT_* with the connection state such
 * that user space can continue from it with this frame.
 */
static __always_inline u32 prepare_segment(struct __sk_buff *skb, const struct pkt *p,
					   struct colo_conn *c, struct colo_flow_key *key,
					   struct colo_work *w, u32 side)
{
	u32 len = p->payload_len, out = c->next - c->released, err, end;
	u32 span;
	/* Read once: pvm_in writes it on another CPU, and both uses must see the same ack. */
	u64 acked = *(volatile __u64 *)&c->client_ack;
	u32 client_ack = acked;
	u32 have = out && c->leader == side ? c->next : c->released;
	/* Just after an offload; see below. */
	u32 back = c->released - c->begun <= COLO_BUFFER ? COLO_MAX_FLIGHT : COLO_BUFFER;
	u32 size = skb->gso_size ? skb->gso_size : len;
	u16 win;

	w->again = 0;
	w->kept = 1;
	w->fin = p->flags & TCP_FIN;
	w->meets = out && c->leader != side;
	span = len + w->fin;
	if (bpf_skb_load_bytes(skb, p->l4_off - NEAR, w->old, NEAR_SIZE))
		return R_PUNT_HELPER_FAILED;
	if (!is_plain(skb, p, w, side))
		return R_PUNT_EXCEPTION;
	win = w->old[NEAR_WINDOW] << 8 | w->old[NEAR_WINDOW + 1];
	end = p->seq + span;
	if (p->seq != have) {
		/* A retransmission? The SVM's has already been accounted for. */
		if (!len || w->fin || have - p->seq > back || seq_later(end, have))
			return R_PUNT_OUT_OF_ORDER;
		w->again = 1;
		if (side == SIDE_PVM && seq_later(end, c->released)) {
			if (seq_later(c->released, p->seq))
				return R_PUNT_OUT_OF_ORDER;
			return R_OFFLOAD_DUPLICATE; /* still waiting */
		}
		/*
		 * A retransmission by the PVM must still be in the buffer, or the client must have
		 * acked all of it. In the second case the client only has to ack again, because an
		 * ack is still on its way or was lost behind pvm_in, where the PVM would never get
		 * it. Just after an offload the PVM is doubted once, and the client asked: what was
		 * kept back for the offload leaves through user space, and may be overtaken by what
		 * leaves from here, which the PVM takes for a loss (RFC 8985). If the client does
		 * miss it, its answer says so, and the PVM sends it again.
		 */
		w->kept = c->buffer && p->seq - oldest(c) <= COLO_BUFFER;
		if (side == SIDE_PVM && !w->kept) {
			int missed = seq_later(end, client_ack);

			if (!(acked & CLIENT_ACK_KNOWN) || seq_later(client_ack, c->released) ||
			    (missed && (c->doubted || back == COLO_BUFFER)))
				return R_PUNT_OUT_OF_ORDER;
			if (missed)
				c->doubted = 1;
		}
	}
	/*
	 * A FIN takes one sequence number. It leaves with the frame that carries it, provided the
	 * other guest has its FIN at the same place; otherwise, or if it would have to be sent
	 * again, the segment is not plain. Nothing may follow it, and no data byte may take its
	 * place.
	 */
	if (c->fin_known && (seq_later(end, c->fin) || (!w->fin && len && end == c->fin)))
		return R_PUNT_EXCEPTION;
	if (w->fin && w->meets && !(c->fin_known && end == c->fin))
		return R_PUNT_EXCEPTION;
	if (len && !is_whole(skb, p->l4_off + p->doff + len))
		return R_PUNT_EXCEPTION;
	if (!w->again && end - c->released > COLO_BUFFER)
		return R_PUNT_BUFFER_FULL;
	if (side == SIDE_PVM) {
		err = note_pvm_header(skb, p, c, key, span, win);
		if (err)
			return err;
	} else if (!seq_later(c->s_ack, p->ack)) {
		c->s_ack = p->ack;
		c->s_win = win;
	}
	if (span && !w->again && !buffer_claim(c, key))
		return R_PUNT_NO_BUFFER;
	/*
	 * Nothing waits and the client has acked everything: restart the ring where the cache is
	 * warm.
	 */
	if (span && !w->again && !out && acked == (CLIENT_ACK_KNOWN | c->released))
		c->base_seq = c->released;
	w->len = len;
	w->flags = p->flags;
	w->ack = p->ack;
	w->win = win;
	w->l4 = p->l4_off;
	w->doff = p->doff;
	w->at = p->l4_off + p->doff;
	w->seq = p->seq;
	w->equal = w->again ? len : w->meets ? (len < out ? len : out) : 0;
	/* Built in pieces: segments that end elsewhere, and SVM segments longer than the PVM's. */
	w->upto = c->released;
	if (!w->again && w->equal && (len > out || (side == SIDE_SVM && size > c->mss)))
		w->upto = c->released + (u32)w->equal;
	w->left = w->again && (side == SIDE_SVM || !w->kept) ? 0 : len;
	/*
	 * As a keep-alive (RFC 9293 section 3.8.4), but one below what the PVM sends again: a client
	 * answers it, whether or not it has all that follows.
	 */
	w->probe = w->again && side == SIDE_PVM && !w->kept ? c->released - p->seq + 1 : 0;
	w->moves = w->again ? 0 : span;
	w->meets = w->meets && span && !w->again;
	/* Pieces need the PVM's header, and this skb must have a header of the same size. */
	if (w->meets && (side == SIDE_SVM || len > out) &&
	    (c->l4 != p->l4_off || c->doff != p->doff ||
	     (u32)w->upto - c->released > piece_size(c) * (COLO_MAX_PIECES - 2) ||
	     (w->fin && (u32)w->upto != c->released)))
		return R_PUNT_EXCEPTION;
	w->act = ACT_NOTHING;
	if (w->again && side == SIDE_PVM)
		w->act = w->kept ? ACT_PASS : ACT_PIECES;
	else if (w->meets)
		w->act = (u32)w->upto != c->released ? ACT_PIECES
			 : side == SIDE_PVM	     ? ACT_PASS
						     : ACT_REWRITE;
	else if (side == SIDE_PVM && !span && !(out && c->leader == SIDE_PVM) &&
		 !seq_later(p->ack, c->s_ack))
		w->act = ACT_PASS;
	else if (side == SIDE_SVM && ack_due(c) && c->l4 == p->l4_off && c->doff == p->doff)
		w->act = ACT_PIECES; /* without payload */
	return 0;
}

/* From here on only helpers can fail; the frame is decided. */
static __always_inline u32 finish_segment(struct __sk_buff *skb, struct colo_conn *c,
					  struct colo_buffer *st, struct colo_work *w, int *verdict)
{
	u32 len = w->moves, act = w->act, side = w->side, reason;
	u32 end = w->seq + w->fin;

	w->released = c->released;
	w->adv_ack = c->adv_ack;
	reason = len || side == SIDE_PVM ? R_OFFLOAD_HELD : R_OFFLOAD_DUPLICATE;
	if (len && seq_later(end, c->next)) {
		c->next = end;
		c->leader = side;
	}
	if (w->fin) {
		c->fin = end;
		c->fin_known = 1;
	}
	if (len)
		note_moved(w->now);
	if (act && len && c->since_ns) /* a frame of the PVM that passes has not waited */
		note_wait(act == ACT_PASS ? 0 : w->now - c->since_ns);
	if (act)
		set_egress(w, c->hdr, act > ACT_PASS);
	if (act == ACT_PASS) {
		limit_pvm(skb, c, w);
		c->released += len;
		*verdict = w->out ? bpf_redirect(w->out, 0) : TC_ACT_OK;
		reason = R_OFFLOAD_PASSED;
	} else if (act == ACT_REWRITE) {
		if (rewrite_as_pvm(skb, c, w)) {
			/* still outstanding: will be retransmitted */
			reason = R_DROP_HELPER_FAILED;
		} else {
			note_advertised(c, allowed_ack(c), allowed_win(c));
			c->released += len;
			skb->mark = w->mark;
			*verdict = bpf_redirect(w->out, w->redirect_flags);
			reason = R_OFFLOAD_RELEASED;
		}
	} else if (act == ACT_PIECES) {
		reason = (u32)w->upto == c->released ? R_OFFLOAD_ACKED : R_OFFLOAD_REBUILT;
		w->partial = is_partial(skb);
		if (send_pieces(skb, c, st, w))
			reason = R_DROP_HELPER_FAILED;
	}
	/* An ack that leaves does not restart the age of bytes that wait. */
	settle(c, w->now,
	       c->released != w->released || (c->released == c->next && c->adv_ack != w->adv_ack));
	return reason;
}

/*
 * Decide on a frame of a flow that is locked and in the fast path. Returns R_OFFLOAD_* or R_PUNT_*.
 * TCP and UDP share this path, and the verifier must not be able to tell which kind it follows: see
 * colo_work.
 */
static __always_inline u32 decide(struct __sk_buff *skb, const struct pkt *p, struct colo_conn *c,
				  struct colo_flow_key *key, struct colo_work *w, u32 side,
				  int *verdict)
{
	struct colo_buffer *st;
	u32 slot, r;

	w->udp = p->is_udp;
	w->side = side;
	w->err = 0;
	r = p->is_udp ? prepare_datagram(skb, p, c, key, w, side)
		      : prepare_segment(skb, p, c, key, w, side);
	if (r)
		return r;
	/* a bare ack has no buffer, but the verifier needs one */
	slot = c->buffer ? c->buffer - 1 : 0;
	st = buffers.lookup(&slot);
	if (!st)
		return R_PUNT_HELPER_FAILED;
	compare_payload(skb, c, st, w);
	r = w->err;
	if (r)
		return r;
	return w->udp ? finish_datagram(skb, c, st, w, verdict)
		      : finish_segment(skb, c, st, w, verdict);
}

/*
 * Process a TCP or UDP frame of either guest. Returns OFFLOAD_NO if the fast path does not decide;
 * *punt_seq is then the number that the event must carry. Otherwise returns the reason to count,
 * and sets *verdict.
 */
static __always_inline u32 offload(struct __sk_buff *skb, const struct pkt *p, u32 side, u64 mode,
				   u32 epoch, u32 *punt_seq, int *verdict)
{
	u32 cpu = bpf_get_smp_processor_id(), r = OFFLOAD_NO, len = skb->len;
	struct colo_flow_key key = {};
	struct colo_work *w = works.lookup(&cpu);
	struct colo_conn *c;
	u64 now;

	__builtin_memcpy(key.guest, p->src, 16);
	__builtin_memcpy(key.client, p->dst, 16);
	key.guest_port = p->sport;
	key.client_port = p->dport;
	key.vlan = p->vlan | (p->is_udp ? COLO_KEY_UDP : 0);
	c = conn_find(&key);
	if (!c || !w)
		return OFFLOAD_NO;
	if (!conn_lock(c)) {
		count(PROG_OFFLOAD, R_PUNT_BUSY, len);
		return OFFLOAD_NO;
	}
	now = bpf_ktime_get_ns();
	if (now - c->seen_ns > CTL_SEEN_STEP_NS)
		c->seen_ns = now;
	w->now = now;
	if (c->owner == OWNER_KERNEL) {
		w->p_ack = c->p_ack;
		w->p_win = c->p_win;
		w->ack_pending = c->ack_pending;
		if (mode != MODE_RUN || c->epoch != epoch || cfg(CFG_EPOCH) != epoch ||
		    cfg(CFG_MODE) != MODE_RUN || !cfg(CFG_OFFLOAD))
			r = R_PUNT_MODE;
		else
			r = decide(skb, p, c, &key, w, side, verdict);
		if (r >= R_PUNT_MODE) {
			count(PROG_OFFLOAD, r, len);
			/* User space will judge this frame, so undo what it changed. */
			c->p_ack = w->p_ack;
			c->p_win = w->p_win;
			c->ack_pending = w->ack_pending;
			c->owner = OWNER_USER;
			c->punt_reason = r;
			r = OFFLOAD_NO;
		}
	}
	if (r == OFFLOAD_NO)
		*punt_seq = ++c->punt_seq;
	conn_unlock(c);
	return r;
}

#include "control.h"

#endif
