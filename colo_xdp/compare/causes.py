# SPDX-License-Identifier: GPL-2.0-or-later
"""Causes of checkpoints. The names are values of the metrics' label `cause`.

Flows and the engine request checkpoints with a cause; the journal, the status document and
`explain` show it.
"""

from __future__ import annotations

from enum import StrEnum


class Cause(StrEnum):
    """Cause of a checkpoint."""

    PAYLOAD_DIFFERS = "payload_differs"
    FIN_DIFFERS = "fin_differs"
    RST_ONE_SIDED = "rst_one_sided"
    SYN_OPTIONS_DIFFER = "syn_options_differ"
    URGENT_DIFFERS = "urgent_differs"
    DATAGRAM_DIFFERS = "datagram_differs"
    OPENED_APART = "opened_apart"
    COMPARE_TIMEOUT = "compare_timeout"
    CROSSED = "crossed"
    REPEATED = "repeated"
    FRAME_LOST = "frame_lost"
    SVM_AHEAD = "svm_ahead"
    RETRANSMIT_UNVERIFIABLE = "retransmit_unverifiable"
    SIGNED_CONNECTION = "signed_connection"
    QUEUE_FULL = "queue_full"
    STREAM_FULL = "stream_full"
    EVENT_LOST = "event_lost"
    PEER_GAP = "peer_gap"
    CONTROLLER_RESTART = "controller_restart"
    PEER_LINK = "peer_link"
    HOOKS_LOST = "hooks_lost"
    POLICY = "policy"
    OPERATOR = "operator"
    PERIODIC = "periodic"
    SWITCHOVER = "switchover"
    INITIAL = "initial"
    GUEST_EVENT = "guest_event"
    OVERLAY_FULL = "overlay_full"


#: one-line description per cause, for operators
DESCRIPTIONS: dict[Cause, str] = {
    Cause.PAYLOAD_DIFFERS: "the guests sent different bytes at the same position of a TCP stream",
    Cause.FIN_DIFFERS: "the guests closed a TCP stream at different positions",
    Cause.RST_ONE_SIDED: "only one guest reset a TCP connection",
    Cause.SYN_OPTIONS_DIFFER: "the guests offered different TCP options (MSS, window scale, SACK, "
    "timestamps, ECN, signatures)",
    Cause.URGENT_DIFFERS: "the guests marked different bytes of a TCP stream as urgent",
    Cause.DATAGRAM_DIFFERS: "the guests sent different datagrams in the same flow",
    Cause.OPENED_APART: "the guests opened flows to the same service from different ports",
    Cause.COMPARE_TIMEOUT: "a frame of the primary guest had no counterpart for as long as it may "
    "wait (compare.wait)",
    Cause.CROSSED: "each guest had sent what the other had not, in different connections, and both "
    "had fallen silent, or had left these alone for longer",
    Cause.REPEATED: "the primary guest repeated what had no counterpart for longer than the "
    "secondary guest usually takes",
    Cause.FRAME_LOST: "a frame of the secondary guest was lost between the hosts: later ones "
    "of the same connection had arrived",
    Cause.SVM_AHEAD: "the secondary guest sent something that the primary guest did not send "
    "within compare_timeout",
    Cause.RETRANSMIT_UNVERIFIABLE: "a retransmission was older than the history that is kept to "
    "verify it",
    Cause.SIGNED_CONNECTION: "a TCP connection with signed segments (MD5, AO) began, or such a "
    "segment is verified in part and cannot be cut",
    Cause.QUEUE_FULL: "max_queue_size frames or max_held_bytes were held, or the flow table was "
    "full",
    Cause.STREAM_FULL: "the secondary guest was max_stream_bytes ahead in one connection",
    Cause.EVENT_LOST: "the data path lost a captured frame because the event buffer was full",
    Cause.PEER_GAP: "frames of the secondary guest were lost on their way to the primary host",
    Cause.CONTROLLER_RESTART: "the controller was restarted and does not know what was held",
    Cause.PEER_LINK: "output waited while nothing of the secondary guest arrived",
    Cause.HOOKS_LOST: "programs were removed from a device, so some frames were not seen",
    Cause.POLICY: "the policy changed: both guests must be equal under the new rules",
    Cause.OPERATOR: "an operator requested it",
    Cause.PERIODIC: "the configured period had passed",
    Cause.SWITCHOVER: "a switchover: the secondary guest goes on from here",
    Cause.INITIAL: "the first synchronization of the pair",
    Cause.GUEST_EVENT: "a guest was reset, its power button was pressed, or it was stopped",
    Cause.OVERLAY_FULL: "an overlay of a disk on the secondary's host reached overlay_limit",
}

# Groups. To which of them a new cause belongs has to be decided: no test knows it.

#: no difference yet: the counterpart may be on its way
WAITS = frozenset({Cause.COMPARE_TIMEOUT, Cause.CROSSED, Cause.REPEATED, Cause.RST_ONE_SIDED})
#: differences after which the guests' streams of a TCP connection are not the same ones any more
FINAL = frozenset({
    Cause.PAYLOAD_DIFFERS, Cause.FIN_DIFFERS, Cause.RST_ONE_SIDED, Cause.SYN_OPTIONS_DIFFER,
    Cause.URGENT_DIFFERS,
})  # fmt: skip
#: output waited for a counterpart that did not come: many in a row are evidence against the SVM
MISSED = frozenset({Cause.COMPARE_TIMEOUT, Cause.REPEATED})
#: nothing that the SVM did or left out, so they say nothing about it
NEUTRAL = frozenset({
    Cause.OPERATOR, Cause.PERIODIC, Cause.POLICY, Cause.OVERLAY_FULL, Cause.CONTROLLER_RESTART,
    Cause.SWITCHOVER, Cause.HOOKS_LOST, Cause.EVENT_LOST, Cause.PEER_LINK,
})  # fmt: skip
#: the guests may agree all the same: something was lost, or did not fit
LOSSES = frozenset({
    Cause.QUEUE_FULL, Cause.STREAM_FULL, Cause.EVENT_LOST, Cause.PEER_GAP, Cause.PEER_LINK,
    Cause.HOOKS_LOST, Cause.FRAME_LOST,
})  # fmt: skip
#: no client can trigger them, or somebody waits for their end: begun at once, whatever the price
URGENT = frozenset({
    Cause.SWITCHOVER, Cause.OPERATOR, Cause.INITIAL, Cause.PEER_GAP, Cause.CONTROLLER_RESTART,
    Cause.POLICY, Cause.PERIODIC,
})  # fmt: skip
