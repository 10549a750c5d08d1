# SPDX-License-Identifier: GPL-2.0-or-later
"""Shadow mode: when it begins on both hosts, and which checkpoint ends it."""

from __future__ import annotations

import asyncio
import time

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.controller.checkpoint import Checkpoint
from colo_xdp.controller.checkpoint_coordinator import CheckpointRequest
from colo_xdp.controller.secondary import Secondary
from colo_xdp.engine.journal import Divergence, JournalEntry
from colo_xdp.failover.states import State
from colo_xdp.net.frame import NO_EVIDENCE
from colo_xdp.status import builder
from tests.unit.controller.fakes import BEAT, FakeQmp, event, in_loop, primary, secondary

MS = 1_000_000


def test_a_shadow_ends_with_a_later_checkpoint_only() -> None:
    """A primary controller that was started anew does not know of it, nor a secondary's."""
    c, dp, _ = secondary()
    beat = {
        "t": 1,
        "echo": 0,
        "state": "protected",
        "vm": True,
        "shut": False,
        "standalone": False,
        "role": "primary",
    }
    beat |= {"type": "heartbeat"}
    c._peer_message(beat | {"epoch": 7, "shadow": True})
    c._peer_message(beat | {"epoch": 7, "shadow": False})
    assert c.view.shadow
    again = Secondary(c.config, dp)  # type: ignore[arg-type]
    assert again.view.shadow
    again._peer_message(beat | {"epoch": 8, "shadow": False})
    assert not again.view.shadow and not dp.shadowed


def test_a_shadow_begins_when_the_secondary_has_heard_of_it() -> None:
    """Whatever else it says of itself: a person may have paused it."""
    c, _, sent = primary()
    c.state = State.PROTECTED
    c.set_shadow(True)
    assert sent[-1]["shadow"] and not c.output.nics[0].engine.shadow
    said = BEAT | {"epoch": 7, "state": "protected", "shut": False}
    c._peer_message(said | {"role": "secondary"})
    c._peer_message(said | {"role": "primary", "shadow": True})
    assert not c.output.nics[0].engine.shadow
    c._peer_message(said | {"role": "secondary", "state": "paused", "shadow": True})
    assert c.output.nics[0].engine.shadow
    other, _, answers = secondary()
    other.view.paused = True
    other._peer_message(said | {"shadow": True})
    assert answers[-1]["shadow"], "and it says so at once"


def test_a_shadow_that_is_left_behind_the_stop_goes_on_until_the_next_checkpoint() -> None:
    """What left in between is in no state that the SVM has loaded."""

    async def body() -> None:
        c, dp, sent = primary()
        c.peer.connected = True
        c.state, c.view.shadow, dp.epoch = State.PROTECTED, True, 7
        c.qemu.qmp = FakeQmp()  # type: ignore[assignment]
        for n, early in ((8, False), (9, True)):
            task = asyncio.ensure_future(c.checkpoints.make(CheckpointRequest("operator", "asked")))
            await asyncio.sleep(0)
            c.on_message({"type": "begin_ack", "n": n})
            while c.checkpoints.running is None or not c.checkpoints.running.triggered:
                await asyncio.sleep(0)
            if early:
                c.set_shadow(False)
            t = time.monotonic_ns()
            c.on_qmp(event("STOP", t, t))
            if not early:
                c.set_shadow(False)
            c.checkpoints.wanted = None
            c.on_qmp(event("RESUME", t + 1, t + 1))
            c.on_message({"type": "resumed", "n": n, "pause_us": 1})
            await task
            assert dp.epoch == n
            assert sent[-1]["type"] == "heartbeat" and sent[-1]["shadow"] is not early
            assert (c.checkpoints.wanted is None) == early, "it is not forgotten"
        assert not c.view.shadow and not c.shadow.leaving

    in_loop(body)


def recorded(cause: Cause, *, shadow: bool, crossed_ms: int = 0) -> JournalEntry:
    """Record a checkpoint that a frame of 900 ms ago asked for, 1 s after the last one."""
    c, _, _ = primary()
    c.view.shadow = shadow
    now = time.monotonic_ns()
    c.checkpoints.ended_ns = now - 1000 * MS
    c.output.crossed_ns = lambda after_ns: crossed_ms and after_ns + crossed_ms * MS  # type: ignore[method-assign]
    why = Divergence(now, cause, "tcp x", "tcp", 80, "default", NO_EVIDENCE, True,
                     since_ns=now - 900 * MS)  # fmt: skip
    made = Checkpoint(8, cause.value, now)
    c.checkpoints._record(CheckpointRequest(cause.value, "", why), made, (0, 0))
    return c.journal.entries[-1]


@pytest.mark.parametrize("cause", [Cause.COMPARE_TIMEOUT, Cause.QUEUE_FULL, Cause.PEER_GAP])
@pytest.mark.parametrize("shadow", [True, False])
def test_a_full_queue_is_a_difference_in_shadow_mode(cause: Cause, shadow: bool) -> None:
    """What one difference leads to fills it, as clients go on."""
    entry = recorded(cause, shadow=shadow, crossed_ms=40)
    waited = cause is Cause.COMPARE_TIMEOUT or (shadow and cause is Cause.QUEUE_FULL)
    assert entry.differed is waited
    assert round(entry.agreed_ms) == (40 if waited else 100)


@pytest.mark.parametrize(
    ("crossed", "waiting", "agreed"),
    [(0, 0, 1000), (0, 300, 300), (200, 300, 200), (500, 300, 300)],
)
def test_the_guests_agree_until_something_waits(crossed: int, waiting: int, agreed: int) -> None:
    c, _, _ = primary()
    since = c.checkpoints.ended_ns = time.monotonic_ns() - 1000 * MS
    c.output.crossed_ns = lambda after_ns: crossed and after_ns + crossed * MS  # type: ignore[method-assign]
    c.output.waiting_ns = lambda: waiting and since + waiting * MS  # type: ignore[method-assign]
    said = builder.explain(c)["now"]["agreed_ms"]
    assert agreed <= said < agreed + 500
