# SPDX-License-Identifier: GPL-2.0-or-later
"""Prometheus metrics, read at scrape time: the only importer of prometheus_client.

The source is the status document (status/document.py), so that `status --json` and the
metrics cannot disagree. Every label value that can occur is there from the first
scrape, with zero, so that rate() works.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from .. import __version__, abi
from ..engine.waits import WAIT_BUCKETS
from ..failover.states import State
from .document import OFFLOAD_WAIT_BUCKETS

log = logging.getLogger("colo_xdp.status.metrics")

Document = dict[str, Any]

#: what entitles the guest to transmit (`active.lease`) -> colo_xdp_lease_held; anything else: 0
LEASE_HELD = {"": -1.0, "held": 1.0}

#: name -> (kind, help, labels beyond `pair` and `role`); the dashboard and the alerts use these.
METRICS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "build_info": (
        "gauge",
        "always 1; the labels are the versions of the controller, the kernel and the BPF interface",
        ("version", "kernel", "abi"),
    ),
    "state": (
        "gauge",
        "1 for the state of the pair as this host sees it, 0 for all others",
        ("state",),
    ),
    "nic_flows": ("gauge", "tracked connections of one of the guest's NICs", ("nic",)),
    "nic_held_packets": ("gauge", "frames of the PVM that wait at one of its NICs", ("nic",)),
    "nic_arrived": ("counter", "tagged frames that have come over a NIC's peer link", ("nic",)),
    "nic_lost": ("counter", "frames that did not fit into a NIC's event buffer", ("nic",)),
    "nic_link_up": ("gauge", "0 while a NIC's peer link delivers nothing", ("nic",)),
    "state_since_seconds": ("gauge", "Unix time of the last change of state", ()),
    "epoch": ("gauge", "number of the checkpoint from which both guests started", ()),
    "paused": ("gauge", "1 while failover decisions are left to an operator", ()),
    "active": ("gauge", "1 while this host's guest reaches the network", ()),
    "lease_remaining_seconds": (
        "gauge",
        "how long this host's guest may still transmit; -1: the arbiter is not a lease",
        (),
    ),
    "lease_held": (
        "gauge",
        "1 while this host holds the lease, 0 while its guest transmits by the other host's "
        "promise alone or not at all; -1: the arbiter is not a lease",
        (),
    ),
    "packets": ("counter", "frames, by program and by what became of them", ("program", "reason")),
    "bytes": ("counter", "bytes, by program and by what became of them", ("program", "reason")),
    "engine_events": ("counter", "decisions of the compare engine, by kind", ("event",)),
    "rule_flows": (
        "gauge",
        "connections and datagram flows under each rule of the policy",
        ("rule",),
    ),
    "rule_uncompared": ("counter", "frames that left uncompared, by rule", ("rule",)),
    "rule_differences": ("counter", "differences found, by rule", ("rule",)),
    "checkpoints": ("counter", "completed checkpoints, by cause", ("cause",)),
    "mismatches": (
        "counter",
        "reasons for a checkpoint that the compare engine found, by cause; the first one of an "
        "epoch requests it",
        ("cause",),
    ),
    "checkpoints_failed": ("counter", "checkpoints that did not complete", ()),
    "checkpoints_delayed": (
        "counter",
        "checkpoints that were delayed to keep within checkpoint.share",
        (),
    ),
    "checkpoint_delay_seconds": ("counter", "total time for which checkpoints were delayed", ()),
    "checkpoint_requests_folded": (
        "counter",
        "requests that were served by a checkpoint already requested",
        (),
    ),
    "last_checkpoint_pause_seconds": ("gauge", "how long the last checkpoint stopped the PVM", ()),
    "last_checkpoint_timestamp_seconds": ("gauge", "Unix time of the last checkpoint", ()),
    "held_packets": ("gauge", "frames of the PVM that wait for their counterpart", ()),
    "held_bytes": ("gauge", "bytes in the frames of the PVM that wait", ()),
    "held_packets_limit": ("gauge", "limit of held_packets (max_queue_size)", ()),
    "wait_seconds": (
        "histogram",
        "time from the capture of a frame of the PVM to its release by the controller",
        (),
    ),
    "patience_seconds": (
        "gauge",
        "how long a frame of the PVM waits for its counterpart before a checkpoint is requested",
        (),
    ),
    "svm_lag_seconds": (
        "gauge",
        "lag with which the SVM has answered lately (a high quantile)",
        (),
    ),
    "checkpoint_cost_seconds": ("gauge", "what a checkpoint takes (smoothed)", ()),
    "offload_wait_seconds": (
        "histogram",
        "time that output of the PVM waited in the fast path",
        (),
    ),
    "offload_buffers": (
        "gauge",
        "number of connections that can wait in the fast path at the same time",
        (),
    ),
    "offload_buffers_waiting": (
        "gauge",
        "connections of which something waits in the fast path now",
        (),
    ),
    "offload_expired": ("counter", "connections removed from the fast path after long disuse", ()),
    "flows": ("gauge", "tracked connections", ()),
    "flows_opening": (
        "gauge",
        "handshakes of the SVM in progress, in addition to the tracked connections",
        (),
    ),
    "flows_limit": ("gauge", "limit of tracked connections", ()),
    "flows_translated": (
        "gauge",
        "connections of the SVM whose sequence numbers are translated",
        (),
    ),
    "ring_lost": (
        "counter",
        "frames that did not fit into the event buffer; each loss costs a checkpoint",
        (),
    ),
    "ring_capacity_bytes": ("gauge", "size of the event buffer", ()),
    "inject_failed": (
        "counter",
        "frames that the kernel refused when the controller released them",
        (),
    ),
    "peer_up": ("gauge", "1 while the control channel to the peer is up", ()),
    "peer_silent_seconds": (
        "gauge",
        "time since the last message of the peer; -1: there was none",
        (),
    ),
    "peer_round_trip_seconds": (
        "gauge",
        "round-trip time of the last heartbeat on the control channel",
        (),
    ),
    "heartbeat_link_silent_seconds": (
        "gauge",
        "time since the last heartbeat received on the link; -1: there was none",
        ("link",),
    ),
    "heartbeat_link_echo_age_seconds": (
        "gauge",
        "age of the newest of this host's heartbeats that the peer has acknowledged on the "
        "link; -1: none",
        ("link",),
    ),
    "heartbeat_link_round_trip_seconds": (
        "gauge",
        "round-trip time of the last heartbeat on the link",
        ("link",),
    ),
    "heartbeat_link_sent": ("counter", "heartbeats sent on the link", ("link",)),
    "heartbeat_link_received": ("counter", "heartbeats accepted on the link", ("link",)),
    "heartbeat_link_refused": (
        "counter",
        "datagrams on the link that were not accepted as heartbeats, by reason",
        ("link", "reason"),
    ),
    "data_path_whole": (
        "gauge",
        "0 while a device or a program is missing, or nothing arrives from the peer",
        (),
    ),
    "data_path_restored": (
        "counter",
        "programs and devices that were missing and have been restored",
        (),
    ),
    "silent_checkpoints": (
        "gauge",
        "consecutive checkpoints during which no frame of the SVM arrived",
        (),
    ),
    "disks_mirrored": (
        "gauge",
        "1 while each write to a replicated disk goes to both hosts' images (primary)",
        (),
    ),
    "disks_copied_bytes": ("gauge", "bytes copied in the first copy of the disks", ()),
    "disks_copy_bytes": ("gauge", "size of that copy; 0: none is in progress", ()),
    "disks_committing": (
        "gauge",
        "1 while QEMU merges the overlays after a takeover",
        (),
    ),
    "disk_overlay_bytes": ("gauge", "size of the larger overlay of a disk (secondary)", ("disk",)),
    "disk_proof_seconds": (
        "gauge",
        "how long the last checkpoint waited for the primary's confirmation of its disks, during "
        "which the secondary could not take over",
        (),
    ),
    "qemu_up": ("gauge", "1 while QMP to this host's QEMU is connected", ()),
    "scrape_errors": ("counter", "scrapes that could not be answered with fresh numbers", ()),
    "scrape_duration_seconds": ("gauge", "duration of the last scrape", ()),
}


class Collector:
    """Turns one status document into metric families."""

    def __init__(self, get: Callable[[], Document]) -> None:
        self._get = get
        self.errors = 0

    def describe(self) -> Iterable[Metric]:
        """Nothing: registering must not touch the kernel."""
        return []

    def collect(self) -> Iterator[Metric]:
        began = time.monotonic()
        try:
            s = self._get()
        except (RuntimeError, OSError, TimeoutError) as e:
            self.errors += 1
            log.warning("scrape: %s", e)
            s = {}
        if s:
            yield from self._families(s)
        base = [s.get("pair", ""), s.get("role", "")]
        yield self._one("scrape_errors", base, self.errors)
        yield self._one("scrape_duration_seconds", base, time.monotonic() - began)

    @staticmethod
    def _family(name: str) -> Any:
        kind, text, labels = METRICS[name]
        make = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily,
                "histogram": HistogramMetricFamily}[kind]  # fmt: skip
        return make(f"colo_xdp_{name}", text, labels=["pair", "role", *labels])

    def _one(self, name: str, labels: list[str], value: float) -> Metric:
        f = self._family(name)
        f.add_metric(labels, value)
        metric: Metric = f
        return metric

    def _families(self, s: Document) -> Iterator[Metric]:
        base = [s["pair"], s["role"]]

        def many(name: str, values: dict[str, float]) -> Metric:
            f = self._family(name)
            for label, v in values.items():
                f.add_metric([*base, label], v)
            metric: Metric = f
            return metric

        info = self._family("build_info")
        info.add_metric([*base, __version__, platform.release(), str(abi.ABI)], 1)
        yield info
        yield many("state", {st.value: float(st.value == s["state"]) for st in State})
        for which, name in ((0, "packets"), (1, "bytes")):
            f = self._family(name)
            for prog, row in s["programs"].items():
                for reason, pair in row.items():
                    f.add_metric([*base, prog, reason], pair[which])
            yield f
        engine = s["engine"]
        yield many("engine_events", {k: v for k, v in engine.items() if k[:6] != "cause_"})
        yield many("mismatches", {k[6:]: v for k, v in engine.items() if k[:6] == "cause_"})
        for name, field in (
            ("rule_flows", "flows"), ("rule_uncompared", "uncompared"),
            ("rule_differences", "differences"),
        ):  # fmt: skip
            yield many(name, {r["name"]: r[field] for r in s["rules"]})
        yield from self._link_families(s["heartbeat_links"], base)
        ck, peer, left = s["checkpoints"], s["peer"], s["active"]["remaining_s"]
        yield many("checkpoints", ck["by_cause"])
        for key in ("flows", "held_packets", "arrived", "lost"):
            field = key.removesuffix("_packets")
            yield many(f"nic_{key}", {n["name"]: n[field] for n in s["nics"]})
        yield many("nic_link_up", {n["name"]: float(not n["trouble"]) for n in s["nics"]})
        disks = s["disks"]
        yield many("disk_overlay_bytes", disks["overlays"])
        copying = disks["copying"] or {"done": 0, "total": 0}
        last = ck["last"] or {"pause_ms": 0.0, "at": 0.0}
        silent = peer["silent_ms"]
        plain = {
            "state_since_seconds": s["since"],
            "epoch": s["epoch"],
            "paused": float(s["paused"]),
            "active": float(s["active"]["transmitting"]),
            "lease_remaining_seconds": -1.0 if left is None else left,
            "lease_held": LEASE_HELD.get(s["active"]["lease"], 0.0),
            "checkpoints_failed": ck["failed"],
            "checkpoints_delayed": ck["delayed"],
            "checkpoint_delay_seconds": ck["delay_s"],
            "checkpoint_requests_folded": ck["folded"],
            "last_checkpoint_pause_seconds": last["pause_ms"] / 1000,
            "last_checkpoint_timestamp_seconds": last["at"],
            "held_packets": s["held"]["packets"],
            "held_bytes": s["held"]["bytes"],
            "held_packets_limit": s["held"]["limit"],
            "patience_seconds": s["patience"]["ms"] / 1000,
            "svm_lag_seconds": s["patience"]["lag_ms"] / 1000,
            "checkpoint_cost_seconds": s["patience"]["checkpoint_ms"] / 1000,
            "offload_buffers": s["offload"]["buffers"],
            "offload_buffers_waiting": s["offload"]["waiting"],
            "offload_expired": s["offload"]["forgotten"],
            "flows": s["flows"]["tracked"],
            "flows_opening": s["flows"]["opening"],
            "flows_limit": s["flows"]["limit"],
            "flows_translated": s["flows"]["translated"],
            "ring_lost": s["ring"]["lost"],
            "ring_capacity_bytes": s["ring"]["capacity_bytes"],
            "inject_failed": s["inject"]["failed"],
            "peer_up": float(peer["connected"]),
            "peer_silent_seconds": -1.0 if silent is None else silent / 1000,
            "peer_round_trip_seconds": peer["rtt_us"] / 1e6,
            "data_path_whole": float(not s["data_path"]["trouble"]),
            "data_path_restored": s["data_path"]["restored"],
            "silent_checkpoints": s["data_path"]["silent_checkpoints"],
            "disks_mirrored": float(disks["mirrored"]),
            "disks_copied_bytes": copying["done"],
            "disks_copy_bytes": copying["total"],
            "disks_committing": float(disks["committing"]),
            "disk_proof_seconds": disks["proof_ms"] / 1000,
            "qemu_up": float(s["qemu"]["connected"]),
        }
        for name, value in plain.items():
            yield self._one(name, base, value)
        for name, bounds, counts, seconds in (
            ("wait_seconds", WAIT_BUCKETS, s["wait"]["buckets"], s["wait"]["sum"]),
            ("offload_wait_seconds", OFFLOAD_WAIT_BUCKETS, s["offload"]["waits"], None),
        ):
            history = self._family(name)
            total, buckets = 0, []
            for bound, n in zip([*bounds, None], counts, strict=True):
                total += n
                buckets.append(("+Inf" if bound is None else f"{bound:g}", total))
            history.add_metric(base, buckets, seconds)  # the kernel keeps no sum
            yield history

    def _link_families(self, links: list[Document], base: list[str]) -> Iterator[Metric]:
        for name, field, scale in (
            ("heartbeat_link_silent_seconds", "silent_ms", 1e-3),
            ("heartbeat_link_echo_age_seconds", "echo_age_ms", 1e-3),
            ("heartbeat_link_round_trip_seconds", "rtt_us", 1e-6),
            ("heartbeat_link_sent", "sent", 1),
            ("heartbeat_link_received", "received", 1),
        ):  # fmt: skip
            f = self._family(name)
            for p in links:
                value = p[field]
                f.add_metric([*base, p["name"]], -1.0 if value is None else value * scale)
            yield f
        f = self._family("heartbeat_link_refused")
        for p in links:
            for reason, n in p["refused"].items():
                f.add_metric([*base, p["name"], reason], n)
        yield f


def application(get: Callable[[], Document]) -> Any:
    """Return a WSGI application that answers with the metrics of what `get` returns."""
    registry = CollectorRegistry()
    registry.register(Collector(get))
    return make_wsgi_app(registry)
