# SPDX-License-Identifier: GPL-2.0-or-later
"""Names and meanings of the compare engine's counters, for metrics and documentation."""

from __future__ import annotations

from ..compare.causes import DESCRIPTIONS
from ..net.packet import DEFECTS

#: counters of frames that left for another reason than that both guests sent the same
UNCOMPARED = (
    "released_by_checkpoint", "released_late", "released_solo", "released_in_shadow", "uncompared",
)  # fmt: skip

#: every counter of Engine.counters: name, meaning
COUNTERS: tuple[tuple[str, str], ...] = (
    ("pvm_frames", "frames of the primary guest seen"),
    ("svm_frames", "frames of the secondary guest seen"),
    ("released", "frames of the primary guest released, for whatever reason"),
    ("released_by_checkpoint", "frames released because a complete checkpoint contains them"),
    ("released_late", "the same, for frames read after the checkpoint was committed"),
    ("released_solo", "frames released because the pair was lost"),
    ("released_in_parts", "parts of a frame released before the rest of it was verified"),
    (
        "window_shrunk",
        "frames released with a smaller window, because the secondary guest offered less",
    ),
    (
        "window_updates",
        "bare ACKs made to tell a client that the secondary guest's window has grown",
    ),
    (
        "signed_connections",
        "connections with signed segments (TCP-MD5, TCP-AO), which are left unchanged",
    ),
    ("released_in_shadow", "frames released at once in shadow mode and compared afterwards"),
    ("uncompared", "frames released uncompared by policy"),
    ("differences_monitored", "differences in flows that are only watched (mirror-only)"),
    (
        "monitor_given_up",
        "times that a watched flow was not compared until the next checkpoint, because "
        "more than max_queue_size or max_held_bytes waited for it",
    ),
    ("acks_superseded", "bare ACKs of the primary guest dropped ahead of an RST of both guests"),
    ("datagrams_assembled", "datagrams of the primary guest assembled from IP fragments"),
    ("svm_uncompared_dropped", "frames of the secondary guest that the policy does not compare"),
    ("svm_stale", "frames of the secondary guest from another epoch"),
    (
        "svm_superseded",
        "frames of the secondary guest dropped because a checkpoint was in progress",
    ),
    (
        "svm_buffered",
        "frames of the secondary guest buffered for the epoch that a checkpoint begins",
    ),
    ("svm_buffer_overflow", "the same, dropped because there were too many"),
    ("svm_retransmit", "retransmissions of the secondary guest that were not needed"),
    (
        "svm_out_of_order",
        "frames of the secondary guest buffered until a hole before them is filled",
    ),
    (
        "svm_out_of_window",
        "frames of the secondary guest dropped because they are far from the stream's position",
    ),
    ("svm_datagram_expired", "datagrams of the secondary guest that the primary guest never sent"),
    (
        "svm_queue_full_dropped",
        "frames of the secondary guest dropped because max_queue_size were waiting",
    ),
    (
        "stream_full_dropped",
        "frames of the secondary guest dropped because it was max_stream_bytes ahead",
    ),
    ("queue_full_dropped", "frames of the primary guest dropped because max_queue_size were held"),
    ("flow_table_full_dropped", "frames of either guest dropped because no flow could be evicted"),
    ("flows_evicted", "idle flows removed to make room"),
    ("flows_aged", "idle flows removed because of their age"),
    (
        "history_evicted",
        "connections whose history was discarded to keep all histories within their limit",
    ),
    ("offload_offered", "connections made known to the fast path"),
    ("offload_accepted", "times that a connection was offloaded to the fast path"),
    (
        "offload_backpressured",
        "times that frames were delayed for a moment so that their connection could be offloaded",
    ),
    ("offload_reclaimed", "times that a connection was reclaimed from the fast path"),
    ("checkpoints", "checkpoints committed"),
    ("checkpoints_aborted", "checkpoints aborted"),
    ("checkpoint_requests", "checkpoints that the engine requested"),
    (
        "checkpoints_needless",
        "checkpoints requested because a frame had waited, whose counterpart came before they were "
        "complete",
    ),
    ("opaque", "malformed frames of either guest; see the defects"),
    *((f"defect_{d}", f"malformed: {text}") for d, text in DEFECTS.items()),
    *((f"cause_{c}", text) for c, text in DESCRIPTIONS.items()),
)
