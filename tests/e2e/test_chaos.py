# SPDX-License-Identifier: GPL-2.0-or-later
"""A few rounds of chaos; `make chaos ROUNDS=200` for more."""

from __future__ import annotations

import os

from .chaos import clean, run


def test_chaos() -> None:
    report = run(int(os.environ.get("ROUNDS", "3")), int(os.environ.get("SEED", "3")), seconds=70)
    assert clean(report), report["problems"]
    assert report["rounds"] >= 1 and report["downloads"] > 10, report
