# SPDX-License-Identifier: GPL-2.0-or-later
"""A history behaves as the byte string it stands for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.compare.history import JOIN, History, HistoryBudget

SIZES = st.sampled_from((0, 1, 7, 1448, JOIN - 1, JOIN, 3 * JOIN))
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), SIZES),
        st.tuples(st.just("cut"), SIZES),
        st.tuples(st.just("trim"), SIZES),
        st.tuples(st.just("clear"), st.just(0)),
    ),
    max_size=30,
)


@given(steps=STEPS, distance=st.integers(0, 4 * JOIN), n=st.integers(0, 4 * JOIN))
def test_as_a_byte_string(steps: list[tuple[str, int]], distance: int, n: int) -> None:
    history, model, serial = History(), b"", 0
    for what, size in steps:
        if what == "add":
            serial += 1
            data = bytes((serial + i) & 255 for i in range(size))
            history.add(data)
            model += data
        elif what == "cut":
            history.cut(size)
            model = model[: max(0, len(model) - size)]
        elif what == "clear":
            history.clear()
            model = b""
        else:
            history.trim(size)
            assert len(history) >= min(size, len(model))
            assert len(history) <= max(size + 4 * JOIN, 0)
            model = model[len(model) - len(history) :]
        assert len(history) == len(model)
        assert history.back(len(model), len(model)) == model
    distance = min(distance, len(model))
    assert history.back(distance, n) == model[len(model) - distance :][:n]


def test_a_budget_gives_up_the_history_that_has_not_grown_for_longest() -> None:
    gone: list[int] = []
    budget = HistoryBudget(8192, 20_000, lambda: gone.append(1))
    histories = [History() for _ in range(3)]
    for history in histories[:2]:
        history.add(bytes(8192))
        budget.charge(history)
    histories[0].add(bytes(10))
    budget.charge(histories[0])  # grows, and is trimmed no earlier than a quarter above
    assert len(histories[0]) == 8202 and budget.charged == 10_240 + 8192 and not gone
    histories[2].add(bytes(3000))
    budget.charge(histories[2])
    assert len(gone) == 1 and [len(h) for h in histories] == [8202, 0, 3000]
    assert budget.charged == sum(h.charged for h in histories) <= 20_000
    budget.drop(histories[0])
    budget.drop(histories[0])
    assert not histories[0] and budget.charged == histories[2].charged == 4096
    budget.clear()
    assert not budget.charged


def test_one_history_may_be_as_large_as_it_may_be() -> None:
    """Though that is more than all of them should be."""
    gone: list[int] = []
    budget, history = HistoryBudget(10 * JOIN, JOIN, lambda: gone.append(1)), History()
    for _ in range(20):
        history.add(bytes(JOIN))
        if len(history) > history.charged:
            budget.charge(history)
        assert len(history) <= 13 * JOIN
    assert len(history) >= 10 * JOIN and not gone
