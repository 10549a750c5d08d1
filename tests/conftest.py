# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for all tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from colo_xdp.failover import states

#: What one test has compiled serves the others, and the controllers that they start. A user's own:
#: the project trusts no directory of anybody else (datapath/cache.py).
os.environ.setdefault(
    "COLO_XDP_CACHE", str(Path(__file__).parents[1] / f"build/cache-{os.geteuid()}")
)


@pytest.fixture(autouse=True)
def strict_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that follows one which it cannot follow is an error, and not only counted."""
    monkeypatch.setattr(states, "STRICT", True)
