/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The maps that all programs share, and the functions that access them. Which maps are pinned, to
 * outlive the controller, is the loader's to know (LASTING in colo_xdp/datapath/source.py): what is
 * compiled is the same for each NIC and each pair.
 *
 * Access goes through inline functions, never macros: bcc rewrites map.lookup() in the syntax tree
 * and refuses to do so inside a macro expansion.
 */
#ifndef COLO_MAPS_H
#define COLO_MAPS_H

/* key: enum colo_cfg. Writer: controller. Readers: all programs. */
BPF_TABLE("array", u32, u64, config, CFG_MAX);

/* key: prog * R_MAX + reason. Writer: the program. Reader: the controller, on each scrape. */
BPF_TABLE("percpu_array", u32, struct colo_count, counters, PROG_MAX *R_MAX);

static __always_inline u64 cfg(u32 slot)
{
	u64 *v = config.lookup(&slot);

	return v ? *v : 0;
}

/*
 * Whether the guest must not transmit because its host holds no lease. Checked at the start of the
 * programs that let frames out. A frame that has passed the check leaves later by the time the
 * stack below needs, which [failover] lease_margin covers. A slot that has never been written means
 * silence.
 */
static __always_inline int silenced(void)
{
#ifdef COLO_LEASE
	return bpf_ktime_get_boot_ns() >= cfg(CFG_LEASE_EXPIRY_NS);
#else
	return 0;
#endif
}

static __always_inline void count(u32 prog, u32 reason, u32 bytes)
{
	u32 key = prog * R_MAX + reason;
	struct colo_count *c = counters.lookup(&key);

	/* Per-CPU and with bottom halves off: no other writer. */
	if (c) {
		c->packets++;
		c->bytes += bytes;
	}
}

#endif
