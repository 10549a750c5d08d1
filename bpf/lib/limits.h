/* SPDX-License-Identifier: GPL-2.0-or-later */
/* Limits of the data path and what each costs. The loader can override them with -D. */
#ifndef COLO_LIMITS_H
#define COLO_LIMITS_H

/*
 * Size of a map that the configuration sets. The loader creates the map with it (Options.entries()
 * in colo_xdp/datapath/source.py), so that what is compiled does not depend on it.
 *
 *   flows, opening  tracked connections at S, and as many handshakes; 320 bytes for both
 *   conns           offloaded connections; 350 bytes each, allocated when used
 *   buffers, owners offloaded connections with bytes outstanding; COLO_BUFFER bytes each
 *   events          ring for captured frames, 4 KiB pages; never swapped
 *   scratch, works  one for each CPU, 64 KiB each; a CPU without one fails its events, counted
 */
#define COLO_AS_CONFIGURED 1

#ifndef COLO_MAX_UNMIRRORED
#define COLO_MAX_UNMIRRORED 16384 /* flows under drop-secondary rules; about 130 bytes each */
#endif

#ifndef COLO_BUFFERS
#define COLO_BUFFERS 512 /* entries of `buffers`: the code spreads connections over so many */
#endif

#ifndef COLO_MAX_CLIENTS
#define COLO_MAX_CLIENTS 4096 /* MAC addresses whose ports are known; about 80 bytes each */
#endif

#ifndef COLO_MAX_MACS
#define COLO_MAX_MACS 1024 /* the guest's own, besides the first; about 90 bytes each */
#endif

#ifndef COLO_MAX_ADDRESSES
#define COLO_MAX_ADDRESSES 256 /* IP addresses of the guest; about 110 bytes each */
#endif

#define COLO_MAX_PORTS 1024 /* ports of the tap's bridge; about 60 bytes each */

/* Bytes that one guest may be ahead in the fast path; a power of two. */
#define COLO_BUFFER (512 * 1024)

/* What is further back is no retransmission: the largest window (RFC 7323 section 2.3). */
#define COLO_MAX_FLIGHT (1 << 30)

/* Bytes that clients' windows allow a guest to be ahead: one more 64 KiB frame fits. */
#define COLO_AHEAD (COLO_BUFFER - 65536)

#ifndef COLO_MAX_SCALES
#define COLO_MAX_SCALES 16384 /* connections whose client's SYN was seen; about 110 bytes each */
#endif

/* Slots searched for a free buffer: at half load, one in 250 connections finds none. */
#define COLO_BUFFER_PROBES 8

/* Bytes compared or copied in one step; a power of two. More steps cost verifier time. */
#define COLO_STEP	4096
#define COLO_STEPS	20 /* a 64 KiB frame, plus the steps where a buffer wraps */
#define COLO_MAX_PIECES 50 /* segments built from one frame; if more are needed it is punted */

#define COLO_MAX_PIECE 2047 /* bytes in each; a power of two minus one */

/* Payload that fits any path: Linux's smallest path MTU (min_pmtu, 552) minus the headers. */
#define COLO_SURE_MSS 500

/* Attempts to lock a connection that another CPU holds, 200 ns each: twice the longest hold. */
#define COLO_SPINS 250

/* Largest frame that can be captured: a 64 KiB GSO frame with its headers. */
#define COLO_MAX_FRAME 65600

#ifndef COLO_VLAN_DEPTH
#define COLO_VLAN_DEPTH 2 /* tags in the frame's bytes that the parser skips; a few ns each */
#endif

#ifndef COLO_IP6_EXT_DEPTH
#define COLO_IP6_EXT_DEPTH 4 /* IPv6 extension headers skipped; costs verifier states, not time */
#endif

#ifndef COLO_TCP_OPTIONS
#define COLO_TCP_OPTIONS 12 /* TCP options examined: 40 bytes hold no more useful ones; 5 ns each */
#endif

#endif
