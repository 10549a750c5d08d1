# SPDX-License-Identifier: GPL-2.0-or-later
"""What a host makes of the mark of a guest that ran standalone, and when the mark changes."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from colo_xdp.abi import Mode, SyncState
from colo_xdp.config.schema import Disk
from colo_xdp.controller.controller import Controller
from colo_xdp.controller.pair_view import PairView
from colo_xdp.controller.secondary import Secondary
from colo_xdp.failover.decision import Action, decide
from colo_xdp.failover.facts import OtherGuest, OwnGuest, other_guest
from colo_xdp.failover.mark import Mark, Standing, unusable
from colo_xdp.failover.states import Role, State
from colo_xdp.peer.heartbeat_datagram import Flag
from tests.unit.controller.fakes import (
    FakeDataPath,
    Sent,
    beat,
    in_loop,
    primary,
    secondary,
    undecided,
)

NONE, STANDALONE, SUPERSEDED = Standing
MARK = Mark("web1", STANDALONE, "b1", 1_790_000_000.0)


def marked(c: Controller, mark: Mark | None = MARK) -> list[Standing]:
    """Let a controller begin with a mark; returns what it has the file say from now on."""
    kept: list[Standing] = []
    c.use_mark(mark, kept.append, "/state/mark", "b2")
    return kept


def booted(mark: Mark | None = MARK) -> tuple[Secondary, FakeDataPath, Sent, list[Standing]]:
    """A secondary that found nothing pinned, and a mark."""
    c, dp, sent = secondary(Mode.DROP, adopted=False)
    return c, dp, sent, marked(c, mark)


def said(c: Controller, sent: Sent) -> OtherGuest:
    """What the other host makes of this one's heartbeat."""
    c.beat()
    m = sent[-1]
    return other_guest(m["role"], m["state"], standalone=m["standalone"], shut=m["shut"])


# ---- the host with the mark


@pytest.mark.parametrize(
    ("mark", "says"),
    [
        (None, OtherGuest.IDLE),
        (MARK, OtherGuest.ENDED),
        (unusable("web1", "it is truncated"), OtherGuest.ENDED),
        (replace(MARK, standing=SUPERSEDED), OtherGuest.IDLE),
    ],
)
def test_a_host_that_has_booted_says_what_its_mark_says(
    mark: Mark | None, says: OtherGuest
) -> None:
    c, _, sent, kept = booted(mark)
    assert said(c, sent) is says and not kept
    assert ("the newest" in c.announced_state()[1]) is (says is OtherGuest.ENDED)
    assert not c.heartbeats.flags() & (Flag.SHUT | Flag.STANDALONE), (
        "datagrams tell no boot from a guest that is gone now, and a pair that lives acts on them"
    )


def test_what_is_found_is_told() -> None:
    told: list[dict[str, Any]] = []
    c, _, _ = secondary(Mode.DROP, adopted=False)
    c.story.keep = told.append
    marked(c)
    assert [e["kind"] for e in told] == ["mark"] and "ran standalone" in told[0]["why"]
    c.mark_trouble("/state/mark cannot be written")
    assert told[-1]["why"] == "/state/mark cannot be written"


def test_a_lease_knows_more_than_a_mark() -> None:
    c, _, sent, _ = booted()
    c.arbiter.needs_grant = True
    assert said(c, sent) is OtherGuest.IDLE


@pytest.mark.parametrize(
    ("words", "standing"),
    [
        (beat("solo", role="primary", standalone=True), SUPERSEDED),
        (beat("starting", role="primary", standalone=True), SUPERSEDED),
        (beat("protected", role="primary"), STANDALONE),  # it may not know that it is outdated
    ],
)
def test_a_guest_that_transmits_ends_what_the_mark_says(
    words: dict[str, Any], standing: Standing
) -> None:
    """Somebody has decided that, so it is the newer one, also after the next loss of power."""
    c, _, sent, kept = booted()
    c._peer_message(words)
    assert said(c, sent) is OtherGuest.IDLE and "newest" not in c.announced_state()[1]
    assert kept == ([SUPERSEDED] if standing is SUPERSEDED else [])


@pytest.mark.parametrize(
    "words", [beat("starting", role="primary"), beat("stopped", role="primary", shut=True)]
)
def test_a_guest_that_is_silent_does_not(words: dict[str, Any]) -> None:
    c, _, sent, kept = booted()
    c._peer_message(words)
    assert said(c, sent) is OtherGuest.ENDED and not kept


def test_a_survivor_that_transmits_is_superseded_by_nobody() -> None:
    c, _, _ = secondary(Mode.TAKEOVER)
    kept = marked(c, None)
    assert kept == [STANDALONE]
    c._peer_message(beat("starting", role="primary", standalone=True))
    assert kept == [STANDALONE]
    c.view.guest_gone()
    c.view.heartbeat(beat("solo", role="primary", standalone=True))
    assert kept == [STANDALONE, SUPERSEDED], "it is gone, and an operator has chosen the other one"
    c.view.new_guest()
    assert not c.view.left_standalone


def test_a_qemu_that_waits_does_not_hide_that_a_guest_is_gone() -> None:
    """It is the next copy, of a guest that must not be an older one."""
    c, _, sent, _ = (*secondary(Mode.TAKEOVER), None)
    marked(c, None)
    c.view.new_guest()
    c.state = State.STARTING
    assert said(c, sent) is OtherGuest.ENDED


# ---- when the mark is written and removed


def test_the_life_of_a_mark() -> None:
    view, kept = PairView(Role.PRIMARY, 0, 0), list[Standing]()
    view.mark_found(NONE, kept.append, equal=False)
    view.went_standalone()
    view.went_standalone()
    assert kept == [STANDALONE] and not view.left_standalone, "it is here"
    view.checkpointed()
    view.checkpointed()
    assert kept == [STANDALONE, NONE], "each checkpoint would cost a look at the disk"
    view.went_standalone()
    assert kept[2:] == [STANDALONE]


def test_a_new_guest_that_goes_alone_renews_the_mark() -> None:
    """Its boot and its time are others."""
    view, kept = PairView(Role.SECONDARY, 0, 0), list[Standing]()
    view.mark_found(STANDALONE, kept.append, equal=False)
    assert view.left_standalone and not kept
    view.went_standalone()
    assert kept == [STANDALONE]


def test_a_copy_ends_the_mark_of_its_own_host() -> None:
    c, _, _, kept = booted()
    c.view.copy_confirmed()
    assert kept == [NONE] and not c.view.left_standalone


@pytest.mark.parametrize("found", [None, MARK, replace(MARK, standing=SUPERSEDED)])
@pytest.mark.parametrize(
    ("make", "mode", "sync", "standing"),
    [
        (primary, Mode.BYPASS, SyncState.STANDALONE, STANDALONE),
        (secondary, Mode.TAKEOVER, SyncState.STANDALONE, STANDALONE),
        (primary, Mode.RUN, SyncState.IN_SYNC, NONE),
        (secondary, Mode.RUN, SyncState.IN_SYNC, NONE),
    ],
)
def test_what_is_pinned_counts_for_more(
    make: Any, mode: Mode, sync: SyncState, standing: Standing, found: Mark | None
) -> None:
    """A controller that was killed may not have come to write the mark, or to remove it."""
    c, dp, _ = make(mode, adopted=True)
    dp.sync_state = sync
    if sync is SyncState.STANDALONE:
        c.view.went_standalone()
    before = found.standing if found else NONE
    assert marked(c, found) == ([] if before is standing else [standing])
    assert not c.view.left_standalone


def test_a_damaged_file_is_written_anew_by_a_guest_that_is_standalone() -> None:
    c, _, _ = secondary(Mode.TAKEOVER)
    assert marked(c, unusable("web1", "it is truncated")) == [STANDALONE]


@pytest.mark.parametrize("way", ["solo", "open"])
def test_a_primary_that_goes_alone_is_marked(way: str) -> None:
    async def body() -> None:
        if way == "open":
            c, dp, _ = undecided()
            kept = marked(c, None)
            await c.perform(Action.OPEN, "x")
        else:
            c, dp, _ = primary()
            kept = marked(c, None)
            c.view.guest.standalone = False
            c.state = State.PROTECTED
            await c._leave_pair("x")
        assert dp.mode is Mode.BYPASS and kept == [STANDALONE]
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)


# ---- the other host


def waiting(*, disks: bool) -> Any:
    c, dp, _ = undecided()
    c.qemu.qmp = None  # type: ignore[assignment]
    if disks:
        c.config = replace(c.config, disks=(Disk(name="d0"),))
    c._own_guest = OwnGuest.NEW
    return c, dp


LEFT = beat("starting", shut=True, standalone=True)


@pytest.mark.parametrize("disks", [False, True])
def test_a_mark_over_there_keeps_an_older_guest_silent(disks: bool) -> None:
    c, _ = waiting(disks=disks)
    c.view.heartbeat(LEFT)
    assert c.own_guest is (OwnGuest.OUTDATED if disks else OwnGuest.UNKNOWN)
    d = decide(facts(c))
    assert d.action is Action.WAIT and "ran standalone and is gone" in d.why
    c._booted_again = True
    assert decide(facts(c)).action is (Action.WAIT if disks else Action.OPEN)


def facts(c: Any) -> Any:
    c.qemu.qmp = type("Qmp", (), {"connected": True})()
    return c.facts()


@pytest.mark.parametrize("own", OwnGuest)
def test_outdated_disks_are_not_served_for_a_qemu_that_waits_over_there(own: OwnGuest) -> None:
    """Nor because there is no QEMU here yet: it would begin with these disks."""
    c, _ = waiting(disks=True)
    c._own_guest = own
    c.view.heartbeat(beat("stopped", shut=True, standalone=True))
    c.view.peer_shut(ended=True)
    c.view.heartbeat(beat("starting"))
    d = decide(facts(c))
    assert d.action is Action.WAIT and "the disks here lack" in d.why
    c.view.ordered(forced=True, until_s=1e12)
    assert decide(facts(c)).action is Action.GO_SOLO, "an operator may"


def test_marks_of_both_hosts_are_an_operators_decision() -> None:
    c, _ = waiting(disks=True)
    marked(c)
    c.view.heartbeat(LEFT)
    d = decide(facts(c))
    assert d.action is Action.WAIT and "nothing tells which one did last" in d.why
    c.view.heartbeat(beat("starting"))
    c2, _ = waiting(disks=True)
    marked(c2)
    c2.view.heartbeat(beat("starting"))
    assert decide(facts(c2)).action is Action.OPEN, "only this host's guest did"


def test_a_guest_that_transmits_there_is_no_longer_one_that_has_ended() -> None:
    c, _ = waiting(disks=True)
    c.view.heartbeat(LEFT)
    c.view.heartbeat(beat("promoted", standalone=True))
    assert facts(c).other_guest is OtherGuest.TRANSMITTING and not c.view.peer.ended


@pytest.mark.parametrize("make", [primary, secondary])
def test_a_mark_ends_no_pair_that_lives(make: Any) -> None:
    """It may be there by mistake: removing it may have failed. The pins of this host know more."""

    async def body() -> None:
        c, dp, _ = make(Mode.RUN, adopted=True)
        c.state = State.PROTECTED
        role = "primary" if c.role is Role.SECONDARY else "secondary"
        mode = dp.mode
        c._peer_message(beat("starting", shut=True, standalone=True, role=role, epoch=dp.epoch))
        await asyncio.sleep(0)
        assert not c.view.peer.shut and dp.mode is mode and c.state is not State.STOPPED
        for t in list(c._tasks):
            t.cancel()

    in_loop(body)
