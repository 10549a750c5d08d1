# SPDX-License-Identifier: GPL-2.0-or-later
"""Guests that disagree by waiting: a client pays about a checkpoint, not compare_timeout."""

from __future__ import annotations

from colo_xdp.compare.causes import WAITS
from colo_xdp.lab.net import in_ns
from tests.bench import waits

from .conftest import LabMaker


def test_a_client_does_not_wait_for_compare_timeout(make_lab: LabMaker) -> None:
    # The longest wait is so long that a slow machine cannot be taken for it.
    lab = make_lab(overrides={"compare": {"wait": "adaptive", "compare_timeout": 20_000}})
    lab.protect()
    # Each guest decides by its own clock whether it answers at once or after LATE_S.
    waits.install(lab, "late", waits.LATE, waits.LATE_PORT)
    seen = waits.Seen()

    def asked() -> int:
        by_cause = lab.status("primary")["checkpoints"]["by_cause"]
        return sum(by_cause[c] for c in WAITS)

    for n in range(60):  # about one in five finds the SVM alone late
        in_ns(lab.net.client, lambda n=n: waits.one_client(n, seen))  # type: ignore[misc]
        if asked() >= 2:
            break
    status = lab.status("primary")
    assert asked() >= 2, status["checkpoints"]
    assert not seen.wrong
    assert max(seen.times) < waits.LATE_S - 1, seen.times
    patience = status["patience"]
    assert 50 <= patience["ms"] < 20_000 and patience["source"] in ("lag", "checkpoint", "floor")
    lab.wait_state("primary", "protected", 20)
