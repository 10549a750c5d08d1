# SPDX-License-Identifier: GPL-2.0-or-later
"""Test controllers with a guest that ends itself, entries that fail, and a flood of differences.

The random runs contain these now and then; here each case contains them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from colo_xdp.abi import Mode
from colo_xdp.compare.causes import URGENT, Cause
from colo_xdp.controller import pacing
from colo_xdp.controller.colo_entry import ColoEntry
from colo_xdp.controller.guest_lifecycle import GuestLifecycle
from colo_xdp.controller.pacing import BURST_NS
from colo_xdp.controller.primary import Primary
from colo_xdp.failover.states import State

from . import world as world_module
from .test_controllers import Gates
from .world import Fault, Scene, Violation, World, config

SEEDS = 10
#: for how long a guest may stand still that serves alone; a stuck migration is cut after 500 ms
STILL_MS = {"entry_completed": 250, "entry_stuck": 1000}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def gates(seed: int, *faults: Fault, **other: Any) -> Gates:
    """Return a pair without clients, after the faults."""
    w = Gates(Scene(seed, conns=0, loss=0, dup=0, link_loss=0, fast=False, faults=faults, **other))
    w.run()
    return w


class Standing(Gates):
    """Notices a guest that serves alone and stands still, also if a later entry ends that."""

    since_ms, limit_ms = 0.0, 0

    def _operate(self) -> None:
        super()._operate()
        p = self.p
        still = p.primary and p.qemu.alive and not p.qemu.running and p.mode is Mode.BYPASS
        self.since_ms = (self.since_ms or self.ms()) if still else 0.0
        if still and self.ms() - self.since_ms > self.limit_ms:
            raise Violation(f"the PVM serves alone, and stands still for {self.limit_ms} ms")


def went_through(w: World, name: str) -> set[str]:
    c = (w.p if name == "P" else w.s).controller
    return {h["state"] for h in c.history}


def nobody_takes_over() -> None:
    for seed in range(SEEDS):
        w = gates(seed, Fault(600 + 7 * seed, "poweroff"))
        assert w.pairs, "nothing was tried"
        for side in (w.p, w.s):
            c = side.controller
            if c.state is not State.STOPPED or "shut itself down" not in c.reason:
                raise Violation(f"seed {seed}: {side.name} is {c.state.value}: {c.reason}")
        if w.alone["S"] or "promoted" in went_through(w, "S"):
            raise Violation(f"seed {seed}: S has taken over for a guest that is off")


def the_pvm_runs() -> None:
    for seed in range(SEEDS):
        for kind in ("entry_completed", "entry_stuck"):
            scene = Scene(seed, conns=0, loss=0, dup=0, link_loss=0, fast=False, roles=True)
            faults = (Fault(0, kind), Fault(14_000, "checkpoint"))
            w = Standing(replace(scene, faults=faults))
            w.limit_ms = STILL_MS[kind]
            w.run()
            assert "starting" in went_through(w, "P"), "the entry has failed"
            if not w.pairs or not w.p.qemu.running:
                raise Violation(f"seed {seed}: {w.p.controller.state}: {w.p.controller.reason}")


def both_run_on() -> None:
    for seed in range(SEEDS):
        for kind in ("stop_p", "stop_s", "reset_p", "reset_s"):
            w = gates(seed, Fault(700, kind))
            c = w.p.controller
            if not c.checkpoints.by_cause[Cause.GUEST_EVENT.value]:
                raise Violation(f"seed {seed}: {kind} is no checkpoint: {c.checkpoints.by_cause}")
            if not (w.whole() and w.p.qemu.running and w.s.qemu.running):
                raise Violation(f"seed {seed}: {kind}: {c.state.value}: {c.reason}")
            if w.p.epoch != w.s.epoch:
                raise Violation(f"seed {seed}: {kind}: epochs {w.p.epoch} and {w.s.epoch}")


def a_flood_gets_its_share(share: int = 5) -> None:
    """Run clients whose every request is answered differently; each of them gets its answers."""
    real = config

    def paced(role: str, s: Scene) -> Any:
        c = real(role, s)
        return replace(c, checkpoint=replace(c.checkpoint, share=share))

    world_module.config = paced
    try:
        for seed in range(6):
            w = World(
                Scene(seed, conns=8, loss=0, dup=0, link_loss=0, odd=1.0, compare_timeout=8000)
            )
            seen: list[Primary] = []
            end = w._finish

            def last_look(w: World = w, seen: list[Primary] = seen, end: Any = end) -> None:
                seen.append(w.p.controller)
                end()

            w._finish = last_look  # type: ignore[method-assign]
            w.run()
            p = seen[0]
            made = [e for e in p.journal.entries if e.cause not in URGENT]
            used, span = sum(e.total_ms for e in made), w.ms()
            longest = max(e.total_ms for e in p.journal.entries)
            assert len(made) > 3, "nothing was tried"
            if used > share / 100 * span + BURST_NS / 1e6 + longest:
                raise Violation(f"seed {seed}: {used:.0f} of {span} ms in {len(made)} checkpoints")
            if used > share / 100 * span + BURST_NS / 1e6 and not p.checkpoints.delayed:
                raise Violation(f"seed {seed}: {used:.0f} ms of checkpoints, none delayed")
    finally:
        world_module.config = real


SCENES: tuple[Callable[[], None], ...] = (
    nobody_takes_over,
    the_pvm_runs,
    both_run_on,
    a_flood_gets_its_share,
)


@pytest.mark.parametrize("scene", SCENES, ids=lambda f: f.__name__)
def test_as_it_is(scene: Callable[[], None]) -> None:
    scene()


# ---- deliberate faults: each must be noticed


def a_shutdown_is_a_death(mp: Any) -> None:
    mp.setattr(Primary, "ends_the_pair", False)


def events_are_not_looked_at(mp: Any) -> None:
    mp.setattr(GuestLifecycle, "on_news", lambda self, news: None)


def a_failed_entry_lets_nobody_run(mp: Any) -> None:
    async def run_on(self: Any, since_s: float) -> bool:
        return True

    mp.setattr(ColoEntry, "run_on", run_on)


def only_cont(mp: Any) -> None:
    async def run_on(self: Any, since_s: float) -> bool:
        return bool(await self.cont())

    mp.setattr(ColoEntry, "run_on", run_on)


def an_entry_waits_for_its_deadline(mp: Any) -> None:
    async def watch(self: Any, ck: Any) -> None:
        await self._release_proven(ck)

    mp.setattr(ColoEntry, "watch", watch)


def a_stop_is_a_checkpoint(mp: Any) -> None:
    async def nobody(self: Any, *_: Any) -> None:
        pass

    mp.setattr("colo_xdp.controller.secondary.Secondary._stopped_by_whom", nobody)


def nothing_is_delayed(mp: Any) -> None:
    mp.setattr(pacing.Pacer, "begin_ns", lambda self, now_ns: now_ns)


@pytest.mark.parametrize(
    ("fault", "scene"),
    [
        (a_shutdown_is_a_death, nobody_takes_over),
        (events_are_not_looked_at, nobody_takes_over),
        (events_are_not_looked_at, both_run_on),
        (a_failed_entry_lets_nobody_run, the_pvm_runs),
        (only_cont, the_pvm_runs),
        (an_entry_waits_for_its_deadline, the_pvm_runs),
        (a_stop_is_a_checkpoint, both_run_on),
        (nothing_is_delayed, a_flood_gets_its_share),
    ],
    ids=lambda f: f.__name__,
)
def test_faults_are_noticed(fault: Callable[[Any], None], scene: Callable[[], None]) -> None:
    with pytest.MonkeyPatch.context() as mp:
        fault(mp)
        with pytest.raises(Violation):
            scene()
