# SPDX-License-Identifier: GPL-2.0-or-later
"""The process around a controller: it stays when the roles change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from colo_xdp import daemon
from colo_xdp.config import load

EXAMPLES = Path(__file__).parents[2] / "deploy/examples"


@pytest.mark.parametrize("last", [0, 1])
def test_a_change_of_roles_makes_a_new_controller(
    monkeypatch: pytest.MonkeyPatch, last: int
) -> None:
    """What the one has left is closed before the next one looks at it."""
    story: list[str] = []
    ends = [daemon.ROLE_CHANGED, daemon.ROLE_CHANGED, last]

    class FakeDataPath:
        def __init__(self, config: Any) -> None:
            story.append("load")

        def close(self) -> None:
            story.append("close")

    async def serve(config: Any, datapath: Any) -> int:
        story.append("serve")
        return ends.pop(0)

    monkeypatch.setattr(daemon, "DataPath", FakeDataPath)
    monkeypatch.setattr(daemon, "_serve", serve)
    assert daemon._run(load(EXAMPLES / "secondary.toml")) == last
    assert story == ["load", "serve", "close"] * 3
