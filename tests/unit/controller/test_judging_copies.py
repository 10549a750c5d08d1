# SPDX-License-Identifier: GPL-2.0-or-later
"""When the primary judges its copy at all."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.controller.copy_health import DISAGREES
from colo_xdp.failover.states import State
from tests.unit.controller.fakes import in_loop, primary


@pytest.mark.parametrize("shadow", [True, False])
def test_shadow_mode_gives_no_copy_up(shadow: bool) -> None:
    """An SVM that has differed agrees with nothing more there, as its clients answer the PVM."""

    async def body() -> None:
        c, _, _ = primary()
        c.state = State.PROTECTED
        lost: list[str] = []
        c.copy_lost = lost.append  # type: ignore[method-assign]
        c.view.set_shadow(shadow)
        c.output.agreed = lambda: 0  # type: ignore[method-assign]
        frames = count()
        c.dp.nics[0].arrived = lambda: next(frames)  # type: ignore[method-assign]
        made: Any = SimpleNamespace(initial=False, cause=Cause.COMPARE_TIMEOUT)
        for _ in range(2 * DISAGREES):
            c.checkpoints._judge_copy(made, deaf=True)
        assert bool(lost) == (not shadow)

    in_loop(body)
