# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that disagree by waiting: a client pays about a checkpoint, not compare_timeout."""

from __future__ import annotations

from colo_xdp.engine.outbox import WAITS
from colo_xdp.lab.net import in_ns
from tests.bench import waits

from .conftest import LabMaker


def test_a_client_does_not_wait_for_compare_timeout(make_lab: LabMaker) -> None:
    # The longest wait is so long that a slow machine cannot be taken for it.
    lab = make_lab(overrides={"compare": {"wait": "adaptive", "compare_timeout": 20_000}})
    lab.protect()
    waits.install(lab, "lock", waits.LOCK, waits.LOCK_PORT)
    seen = waits.Seen()
    for n in range(30):
        in_ns(lab.net.client, lambda n=n: waits.pair_of_clients(n, seen))  # type: ignore[misc]
        by_cause = lab.status("primary")["checkpoints"]["by_cause"]
        if n > 5 and sum(by_cause[c] for c in WAITS) > 2:
            break
    status = lab.status("primary")
    assert sum(status["checkpoints"]["by_cause"][c] for c in WAITS) > 2, status["checkpoints"]
    assert not seen.wrong
    assert max(seen.times) < 15, seen.times
    patience = status["patience"]
    assert 50 <= patience["ms"] < 20_000 and patience["source"] in ("lag", "checkpoint", "floor")
    lab.wait_state("primary", "protected", 20)
