# SPDX-License-Identifier: GPL-2.0-or-later
"""One table of commands for the CLI, the control socket and the controllers of both sides."""

from __future__ import annotations

import ast
import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from colo_xdp import cli
from colo_xdp.abi import Mode
from colo_xdp.controller.command import Command
from colo_xdp.controller.primary import Primary
from colo_xdp.failover.states import State
from colo_xdp.status import builder
from tests.unit.controller.fakes import primary, secondary

PROCESS = builder.Process(0.0, SimpleNamespace(path=Path("/x"), lost=0, trouble=""))
BOTH = pytest.mark.parametrize("make", [primary, secondary])


def asked(package: Path) -> set[str]:
    """Commands that the CLI sends."""
    trees = [ast.parse(path.read_text()) for path in package.glob("*.py")]
    calls = [n for tree in trees for n in ast.walk(tree) if isinstance(n, ast.Call)]
    names = [c.args[2] for c in calls if getattr(c.func, "id", "") in ("ask", "_change")]
    return {n.value for n in names if isinstance(n, ast.Constant)}


def test_what_the_cli_asks_is_in_the_table() -> None:
    sent = asked(Path(cli.__file__).parent)
    assert len(sent) > 6 and sent <= set(Command)


@BOTH
def test_each_command_is_answered(make: Any) -> None:
    c, _, _ = make()
    builder.register(c, PROCESS)
    assert set(c.commands._table) == set(Command)
    with pytest.raises(ValueError, match="unknown command 'jump'"):
        asyncio.run(c.commands.run("jump", {}))


@BOTH
def test_what_only_one_side_knows_is_asked_there(make: Any) -> None:
    c, _, _ = make()
    builder.register(c, PROCESS)
    for name in ("explain", "capture", "flows"):
        if isinstance(c, Primary):
            assert asyncio.run(c.commands.run(name, {}))
        else:
            with pytest.raises(ValueError, match=f"{name}: ask the primary host"):
                asyncio.run(c.commands.run(name, {}))
    if not isinstance(c, Primary):
        with pytest.raises(ValueError, match="asked for on the primary"):
            asyncio.run(c.commands.run("checkpoint", {}))
        with pytest.raises(ValueError, match="set on the primary"):
            asyncio.run(c.commands.run("mode", {"mode": "shadow"}))


def test_a_failover_is_done_when_the_copy_that_it_is_about_is_given_up() -> None:
    """Asked for while COLO is entered, which fails: the order must not fence the next copy."""

    async def body() -> None:
        c, dp, _ = primary(Mode.CHECKPOINT)
        c.state, c.view.guest.standalone = State.CHECKPOINTING, True
        c.reconsider = lambda: None  # type: ignore[method-assign]
        asked = asyncio.create_task(c.commands.run("failover", {}))
        await asyncio.sleep(0)
        assert c.view.operator and not asked.done()
        c.state, dp.mode = State.STARTING, Mode.DROP
        await asyncio.wait({asked}, timeout=0.1)
        assert not asked.done(), "the network does not receive the guest yet"
        dp.mode = Mode.BYPASS
        assert (await asyncio.wait_for(asked, 5))["done"]
        assert not c.view.operator and c.view.pair.fence.result is None

    asyncio.run(body())


def test_a_failover_that_is_to_be_planned_is_refused() -> None:
    """What an older command line sends must not become a failover that fences the peer."""
    c, _, _ = primary()
    with pytest.raises(ValueError, match="`switchover`"):
        asyncio.run(c.commands.run("failover", {"planned": True}))


def test_a_page_of_frames_has_a_size() -> None:
    c, _, _ = primary()
    for args in ({"limit": 0}, {"limit": 65}, {"after": "x"}):
        with pytest.raises(ValueError, match="capture"):
            builder.capture(c, args)
