# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and meanings of the compare engine's counters, for metrics and documentation."""

from __future__ import annotations

from ..compare.causes import DESCRIPTIONS
from ..net.packet import DEFECTS

#: every counter of Engine.counters: name, meaning
COUNTERS: tuple[tuple[str, str], ...] = (
    ("pvm_frames", "frames of the primary guest seen"),
    ("svm_frames", "frames of the secondary guest seen"),
    ("released", "frames of the primary guest released, for whatever reason"),
    ("released_by_checkpoint", "released because a complete checkpoint contains them"),
    ("released_late", "as above, but read after the checkpoint's commit"),
    ("released_solo", "released because the pair was lost"),
    ("released_in_parts", "parts of a frame released before its rest was verified"),
    ("window_shrunk", "released with a smaller window: the secondary offered less"),
    ("window_updates", "bare ACKs made to tell a client of the secondary's grown window"),
    ("signed_connections", "connections with signed segments (TCP-MD5, TCP-AO): left unchanged"),
    ("released_in_shadow", "released at once in shadow mode, compared behind"),
    ("uncompared", "released uncompared by policy"),
    ("differences_monitored", "differences of flows that are only watched (mirror-only)"),
    (
        "monitor_given_up",
        "times that a watched flow was not compared up to the next checkpoint, as "
        "more waited for it than max_queue_size or max_held_bytes",
    ),
    ("acks_superseded", "bare ACKs of the primary dropped before the RST of both guests"),
    ("datagrams_assembled", "datagrams of the primary put together from IP fragments"),
    ("svm_uncompared_dropped", "of the secondary, not compared by policy"),
    ("svm_stale", "of the secondary, from another epoch"),
    ("svm_superseded", "of the secondary, dropped as a checkpoint was under way"),
    ("svm_buffered", "of the secondary, kept for the epoch that a checkpoint begins"),
    ("svm_buffer_overflow", "as above, dropped as there were too many"),
    ("svm_retransmit", "of the secondary, sent again and not needed"),
    ("svm_out_of_order", "of the secondary, stashed until a hole is filled"),
    ("svm_out_of_window", "of the secondary, dropped as far from the stream's place"),
    ("svm_datagram_expired", "of the secondary, a datagram that the primary never sent"),
    ("svm_queue_full_dropped", "of the secondary, dropped as max_queue_size were waiting"),
    ("stream_full_dropped", "of the secondary, dropped as max_stream_bytes ahead"),
    ("queue_full_dropped", "of the primary, dropped as max_queue_size were held"),
    ("flow_table_full_dropped", "of either guest, dropped as no flow could be evicted"),
    ("flows_evicted", "idle flows forgotten to make room"),
    ("flows_aged", "idle flows forgotten by age"),
    ("history_evicted", "connections whose history was given up for history_total"),
    ("offload_offered", "connections made known to the kernel"),
    ("offload_accepted", "times that a connection was given to the kernel"),
    (
        "offload_backpressured",
        "times that frames were kept back for a moment to give their connection",
    ),
    ("offload_reclaimed", "times that a connection was taken back from it"),
    ("checkpoints", "checkpoints committed"),
    ("checkpoints_aborted", "checkpoints aborted"),
    ("checkpoint_requests", "checkpoints the engine asked for"),
    ("opaque", "malformed frames of either guest, see the defects"),
    *((f"defect_{d}", f"malformed: {text}") for d, text in DEFECTS.items()),
    *((f"cause_{c}", text) for c, text in DESCRIPTIONS.items()),
)
