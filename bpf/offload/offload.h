/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The fast path: TCP in order, from behind the handshake to the FIN, is compared and
 * released here, and Python never sees it (UDP: offload/udp.h). tests/sim/offload_model.py is
 * the same in Python; tests/netns/test_offload_differential.py compares the two frame
 * by frame.
 *
 * One guest is ahead of the other. Its bytes, rel..next, are in a buffer; when the
 * other's arrive they are compared, and what is equal leaves at once:
 *  - the PVM is the late one: its own frame passes;
 *  - the SVM is the late one: its frame becomes the PVM's, the payload being
 *    the same, by writing the PVM's newest header over its own;
 *  - their segments end elsewhere: new ones are built from the buffer.
 * A header that leaves carries the smaller of both guests' acks and the smaller
 * of their window fields, so that the client is never told more than both have
 * said (I2). An ack that came too early for that leaves with the SVM's next
 * frame. Nothing verified ever waits: rel is both what has left and what is equal.
 *
 * Everything else is a surprise: the connection goes to user space, whole, with
 * the frame that surprised. Python takes over the words and the buffer, decides as
 * it always does, and gives the connection back when nothing is outstanding.
 *
 * Races. Frames of the two guests come on any CPU at the same time, and user
 * space wants to take connections away. Everything in colo_conn but the lock is
 * touched only by who has changed `lock` from 0 to 1. bpf_spin_lock() would not
 * do: no helper may be called under it.
 *  - No byte leaves uncompared: comparing, moving rel and deciding are one
 *    critical section, and a frame's verdict is taken from it alone.
 *  - No frame is lost: who does not get the lock in COLO_SPINS tries (its owner's
 *    virtual CPU has been stopped, say) captures its frame for user space, which
 *    takes the connection over before it looks at the frame.
 *  - The owner cannot wait for itself: programs run with bottom halves off, and
 *    offload_ctl, which may not, does little; whoever interrupts it goes to user space.
 *  - OWNER_USER is left by CTL_OFFLOAD only, under the lock, and only if no frame has been
 *    captured since the one user space has last seen (`captured`): no frame in the
 *    event ring can belong before those that the fast path decides from then on. A frame that
 *    went there without the lock, or before there was an entry, is not counted; it makes
 *    user space reclaim again, and until then its bytes are a gap here.
 *  - A frame that leaves here may overtake one that another CPU has just let go, as on
 *    every path with two CPUs; steer flows (RPS) where that matters. Released bytes stay
 *    released, so order is all that it can change.
 *  - The epoch is part of the words: what was learnt in another one is handed over,
 *    not used (I7). A checkpoint first sets MODE_CHECKPOINT, in which every connection that
 *    moves is handed over; user space then seizes those with a buffer before it commits.
 *  - Entries are made and deleted by user space, which deletes them in OWNER_USER only, when they
 *    have not been used for a long time.
 */
#ifndef COLO_OFFLOAD_H
#define COLO_OFFLOAD_H

#include "conn.h"
#include "buffer.h"
#include "payload.h"
#include "transmit.h"
#include "udp.h"

#define CTL_SEEN_STEP_NS 1000000000ULL

/* In place of a reason: not decided, or handed over (then c->punt_reason tells). */
#define OFFLOAD_NO 0

/* What the parser does not tell: `near` bytes from NEAR before TCP's header on, into w->old. */
#define NEAR	    14
#define NEAR_FRAG   0		/* IPv4: flags and fragment offset */
#define NEAR_DOFF   (NEAR + 12) /* TCP: header length; the low half is reserved, but for AE */
#define NEAR_WINDOW (NEAR + 14)
#define NEAR_SIZE   (NEAR + 16)

/*
 * Plain Ethernet, IP and TCP: no tags, no IP options, ACK, PSH and FIN, timestamps or no options.
 * Others belong to the frame that has them, and are not for a header that leaves with other bytes:
 * URG and its pointer; ECE, CWR and AE (RFC 3168, RFC 9768), which count what has arrived; a
 * signature (RFC 2385, RFC 5925). Nor is the IP id of a PVM that lets its packets be cut on their
 * way (no DF): there each one needs an id of its own (RFC 6864 4.2).
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
 * The PVM sends segments of `n` bytes. c->mss is what it sends now, which no segment that is made
 * of its bytes may exceed: its path may have become narrower (RFC 1191, 8201), and only the PVM
 * need know. So it follows at once upwards, and downwards
 *  - with the first bytes that wait, since only what waits is sent from here on;
 *  - by a GSO frame, which says the size;
 *  - by a segment without PSH: it has not ended with what the application wrote, but is full.
 * A short one that only looks so makes more segments, and is over with the next longer one. Below
 * COLO_SURE_MSS it does not fall, if it has been there: no path is that narrow.
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
 * The PVM's ack and window, and its header where others will need it. 0, or a reason.
 */
static __always_inline u32 note_pvm_header(struct __sk_buff *skb, const struct pkt *p,
					   struct colo_conn *c, struct colo_flow_key *key, u32 span,
					   u16 win)
{
	int early = seq_later(p->ack, c->s_ack);
	u32 n = skb->gso_size ? skb->gso_size : p->payload_len;

	if (c->l4 && (c->l4 != p->l4_off || c->doff != p->doff))
		return R_PUNT_EXCEPTION;
	/* The client counts equal acks (RFC 5681 2): they must not melt into one. */
	if (!span && c->ack_pending && p->ack == c->p_ack && win == c->p_win)
		return R_PUNT_EXCEPTION;
	note_size(c, n,
		  skb->gso_size || !(p->flags & TCP_PSH) || c->released == c->next ||
			  c->leader != SIDE_PVM);
	if (early && !buffer_claim(c, key))
		return R_PUNT_NO_BUFFER;
	if (seq_later(c->p_ack, p->ack)) /* without a header the buffer's bytes could not leave */
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
 * Is it plain, the next one, and is there room? What is to be compared and kept, and w->act. 0, or
 * R_PUNT_* with all words such that user space can go on from them with this frame, or
 * R_OFFLOAD_DUPLICATE.
 */
static __always_inline u32 prepare_segment(struct __sk_buff *skb, const struct pkt *p,
					   struct colo_conn *c, struct colo_flow_key *key,
					   struct colo_work *w, u32 side)
{
	u32 len = p->payload_len, out = c->next - c->released, err, end;
	u32 span;
	/* Read once: pvm_in writes it on another CPU, and both uses must mean the same ack. */
	u64 acked = *(volatile __u64 *)&c->client_ack;
	u32 client_ack = acked;
	u32 have = out && c->leader == side ? c->next : c->released;
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
		/* Sent again? What the SVM has said counts already. */
		if (!len || w->fin || have - p->seq > COLO_BUFFER || seq_later(end, have))
			return R_PUNT_OUT_OF_ORDER;
		w->again = 1;
		if (side == SIDE_PVM && seq_later(end, c->released)) {
			if (seq_later(c->released, p->seq))
				return R_PUNT_OUT_OF_ORDER;
			return R_OFFLOAD_DUPLICATE; /* waits already */
		}
		/*
		 * Bytes of the PVM must still be here, or the client must have all of them: then
		 * it only has to say so again, as an ack that nobody lost is on its way, or one
		 * was lost behind pvm_in, and the PVM would never hear it.
		 */
		w->kept = c->buffer && p->seq - oldest(c) <= COLO_BUFFER;
		if (side == SIDE_PVM && !w->kept &&
		    (!(acked & CLIENT_ACK_KNOWN) || seq_later(end, client_ack) ||
		     seq_later(client_ack, c->released)))
			return R_PUNT_OUT_OF_ORDER;
	}
	/*
	 * A FIN has a place of its own, as one byte more. It leaves with the frame that has it, where
	 * the other guest has it too; else, and if it were to be sent again, it is not plain. Nothing
	 * comes behind it, and no byte in its place.
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
	/* Nothing waits and the client has it all: begin anew, where the cache is warm. */
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
	/* In pieces: what ends elsewhere, and segments of the SVM that are longer than the PVM's. */
	w->upto = c->released;
	if (!w->again && w->equal && (len > out || (side == SIDE_SVM && size > c->mss)))
		w->upto = c->released + (u32)w->equal;
	w->left = w->again && (side == SIDE_SVM || !w->kept) ? 0 : len;
	w->probe =
		w->again && side == SIDE_PVM && !w->kept; /* RFC 9293 3.8.4: one below the next */
	w->moves = w->again ? 0 : span;
	w->meets = w->meets && span && !w->again;
	/* Pieces need the PVM's header, and this skb must have one of its size. */
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
		w->act = ACT_PIECES; /* of no byte */
	return 0;
}

/* Nothing can go wrong from here on but helpers; the frame is decided. */
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
	if (act && len && c->since_ns)
		note_wait(w->now - c->since_ns);
	if (act)
		set_egress(w, c->hdr, act > ACT_PASS);
	if (act == ACT_PASS) {
		limit_pvm(skb, c, w);
		c->released += len;
		*verdict = w->out ? bpf_redirect(w->out, 0) : TC_ACT_OK;
		reason = R_OFFLOAD_PASSED;
	} else if (act == ACT_REWRITE) {
		if (rewrite_as_pvm(skb, c, w)) {
			reason = R_DROP_HELPER_FAILED; /* the bytes stay outstanding: sent again */
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
	/* Acks that leave do not make bytes that wait any younger. */
	settle(c, w->now,
	       c->released != w->released || (c->released == c->next && c->adv_ack != w->adv_ack));
	return reason;
}

/*
 * A frame of a flow that is locked and in the fast path. Returns R_OFFLOAD_*, or R_PUNT_*. Both kinds of flows
 * take the same walk, in which the verifier is not to know of which kind it is: see colo_work.
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
	slot = c->buffer ? c->buffer - 1 : 0; /* a bare ack has none, but the verifier wants one */
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
 * A TCP or UDP frame of the pair. Returns OFFLOAD_NO if the fast path has no say: captured is then what the
 * event must carry. Else the reason to count, *verdict being what to do with the frame.
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
			/* The frame is user space's to judge, so it has not been here. */
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
