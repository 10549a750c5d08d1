# SPDX-License-Identifier: GPL-2.0-or-later
"""A history behaves as the byte string it stands for."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from colo_xdp.history import JOIN, History

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
