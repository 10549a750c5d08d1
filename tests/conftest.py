# SPDX-License-Identifier: GPL-2.0-or-later
"""What holds for all tests."""

from __future__ import annotations

import pytest

from colo_xdp.failover import states


@pytest.fixture(autouse=True)
def strict_states(monkeypatch: pytest.MonkeyPatch) -> None:
    """A state that follows one which it cannot follow is an error, and not only counted."""
    monkeypatch.setattr(states, "STRICT", True)
