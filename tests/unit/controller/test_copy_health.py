# SPDX-License-Identifier: GPL-2.0-or-later
"""Test which secondary guests are given up, and which are only different."""

from __future__ import annotations

import pytest

from colo_xdp.compare.causes import Cause
from colo_xdp.controller.copy_health import DISAGREES, RESETS, SILENT, CopyHealth, Traffic


class Copy:
    """A copy, and what is counted of it."""

    def __init__(self) -> None:
        self.agreements = 0
        self.health = CopyHealth(self._agreed)
        self.agreed = self.arrived = self.delivered = self.sent = 0
        self.health.new_copy(0)

    def _agreed(self) -> None:
        self.agreements += 1

    def checkpoint(
        self,
        cause: Cause = Cause.COMPARE_TIMEOUT,
        *,
        deaf: bool = True,
        agreed: int = 0,
        arrived: int = 0,
        delivered: int = 4,
        sent: int = 0,
    ) -> str:
        """Make a checkpoint after so many further frames."""
        self.agreed += agreed
        self.arrived += arrived
        self.delivered += delivered
        self.sent += sent
        return self.health.checkpointed(
            cause,
            deaf=deaf,
            agreed=self.agreed,
            arrived=self.arrived,
            traffic=Traffic(self.delivered, self.sent),
        )


def test_a_silent_guest_is_given_up() -> None:
    copy = Copy()
    said = [copy.checkpoint() for _ in range(SILENT)]
    assert said[:-1] == [""] * (SILENT - 1)
    assert said[-1] == (
        "the SVM has sent nothing over 3 checkpoints, though 8 frames were delivered to it: it is "
        "no copy"
    )


def test_a_guest_that_is_silent_is_given_up_whatever_waits() -> None:
    """Datagrams ack nothing, so nothing tells there whether the SVM has got what came."""
    copy = Copy()
    said = [copy.checkpoint(deaf=False) for _ in range(SILENT)]
    assert said[:-1] == [""] * (SILENT - 1) and "has sent nothing over 3" in said[-1]


def test_counters_that_begin_anew_are_no_silence() -> None:
    copy = Copy()
    copy.delivered, copy.sent = 90, 70
    assert copy.checkpoint() == ""
    copy.delivered = copy.sent = 0
    said = [copy.checkpoint() for _ in range(SILENT)]
    assert said[:-1] == [""] * (SILENT - 1) and "though 8 frames" in said[-1]


def test_a_guest_that_is_reset_after_each_checkpoint_is_given_up() -> None:
    copy, said = Copy(), ""
    for _ in range(RESETS):
        assert not said
        copy.health.svm_changed()
        said = copy.checkpoint(Cause.GUEST_EVENT, deaf=False, agreed=1)
    assert said.startswith("the SVM was reset, has panicked or was stopped before each of the last")


def test_a_guest_whose_output_never_matches_is_given_up_late() -> None:
    copy = Copy()
    said = [copy.checkpoint(arrived=2, sent=2) for _ in range(DISAGREES)]
    assert said[:-1] == [""] * (DISAGREES - 1)
    assert "nothing that the SVM has sent over 8 checkpoints agrees with the PVM" in said[-1]


@pytest.mark.parametrize(
    "what",
    [
        {"agreed": 1},  # something else agrees
        {"deaf": False, "sent": 1, "arrived": 1},  # its output, or the PVM's, is different
        {"cause": Cause.PAYLOAD_DIFFERS, "arrived": 1, "sent": 1},
        {"cause": Cause.CROSSED, "deaf": False, "arrived": 1, "sent": 1},
        {"delivered": 0},  # nothing comes over the peer link, in this direction
        {"sent": 3},  # or in the other one: the device watch has a sentence for that
        {"cause": Cause.PEER_LINK},
        {"cause": Cause.OPERATOR, "deaf": False},
    ],
    ids=str,
)
def test_other_trouble_gives_no_copy_up(what: dict[str, object]) -> None:
    copy = Copy()
    assert [copy.checkpoint(**what) for _ in range(3 * DISAGREES)] == [""] * 3 * DISAGREES  # type: ignore[arg-type]


def test_a_silence_is_not_forgotten_over_checkpoints_that_say_nothing() -> None:
    copy = Copy()
    said = ""
    for _ in range(SILENT):
        assert not said
        copy.checkpoint(Cause.PERIODIC, deaf=False)
        said = copy.checkpoint()
    assert "has sent nothing" in said


def test_a_report_may_be_older_than_the_silence() -> None:
    """What the SVM had sent before may be reported with the first checkpoints after it."""
    copy = Copy()
    said = [copy.checkpoint(sent=2), copy.checkpoint(sent=3)]
    said += [copy.checkpoint() for _ in range(SILENT - 1)]
    assert said[:-1] == [""] * SILENT
    assert "has sent nothing over 3 checkpoints" in said[-1]


def test_what_agrees_ends_a_silence_and_counts_once() -> None:
    copy = Copy()
    for _ in range(3):
        for _ in range(SILENT - 1):
            assert copy.checkpoint() == ""
        assert copy.checkpoint(agreed=5) == ""
    assert copy.agreements == 1


def test_a_reset_now_and_then_is_no_reason() -> None:
    copy = Copy()
    for _ in range(3 * RESETS):
        copy.health.svm_changed()
        assert copy.checkpoint(Cause.GUEST_EVENT, deaf=False) == ""
        assert copy.checkpoint(Cause.PAYLOAD_DIFFERS, deaf=False, agreed=3) == ""


def test_another_copy_begins_without_the_guilt_of_the_last_one() -> None:
    copy = Copy()
    for _ in range(SILENT - 1):
        assert copy.checkpoint() == ""
    copy.health.new_copy(copy.agreed)
    for _ in range(SILENT - 1):
        assert copy.checkpoint() == ""
    assert "it is no copy" in copy.checkpoint()
