# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from colo_xdp.peer import messages

GOOD = {
    "begin": {"n": 3, "cause": "operator", "initial": False},
    "resumed": {"n": 3, "pause_us": 9},
}


def test_round_trip() -> None:
    for kind, fields in GOOD.items():
        assert messages.decode(messages.encode(kind, **fields)) == {"type": kind, **fields}


@pytest.mark.parametrize(
    ("line", "word"),
    [
        (b"", "not JSON"),
        (b"[]", "object"),
        (b"{}", "unknown message type None"),
        (b'{"type": 7}', "unknown message type 7"),
        (b'{"type": "begin", "n": 1}', "fields"),
        (b'{"type": "begin_ack", "n": "1"}', "str where int"),
        (b'{"type": "begin_ack", "n": true}', "bool where int"),
        (b'{"type": "begin_ack", "n": -1}', "out of range"),
        (b'{"type": "begin_ack", "n": 1, "x": 1}', "fields"),
        (b'{"type": "switchover", "why": "' + b"x" * 5000 + b'"}', "5000 characters"),
        (b"x" * (messages.MAX_LINE + 1), "line of"),
        (b"[" * 60000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
    ],
)
def test_refused_by_name(line: bytes, word: str) -> None:
    with pytest.raises(messages.WireError, match=word):
        messages.decode(line)


@given(st.binary(max_size=300))
def test_garbage_never_escapes(line: bytes) -> None:
    try:
        messages.decode(line)
    except messages.WireError:
        return


@example("\x1f", "promoted")
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=4),
    ),
    st.sampled_from(sorted(messages.MESSAGES)),
)
def test_wrong_shapes_never_escape(value: object, kind: str) -> None:
    msg = {"type": kind, **{k: value for k in messages.MESSAGES[kind]}}
    try:
        got = messages.decode(json.dumps(msg).encode())
    except messages.WireError:
        return
    assert got == {k: shown(v) if isinstance(v, str) else v for k, v in msg.items()}


def shown(text: str) -> str:
    """Return a text without control characters."""
    bad = "\N{REPLACEMENT CHARACTER}"
    return "".join(bad if c not in "\t\n" and unicodedata.category(c) == "Cc" else c for c in text)


def test_offsets_may_be_long_and_nothing_else() -> None:
    text = "ab" * (messages.MAX_FLOWS_TEXT // 2)
    line = messages.encode("offsets", n=0, nic=0, first=True, last=True, flows=text)
    assert len(line) <= messages.MAX_LINE and messages.decode(line)["flows"] == text
    with pytest.raises(messages.WireError, match="characters"):
        messages.encode("offsets", n=0, nic=0, first=True, last=True, flows=text + "ab")
    with pytest.raises(messages.WireError, match="characters"):
        messages.encode("begin", n=1, cause=text, initial=False)


def test_a_reason_of_any_length_arrives() -> None:
    """It names files, of as many disks as the guest has: no reason to end a controller."""
    line = messages.encode("failed", n=1, why="/\u00e9" * messages.MAX_TEXT)
    assert messages.decode(line)["why"] == "/\u00e9" * (messages.MAX_TEXT // 2)


def test_what_the_peer_writes_steers_no_terminal() -> None:
    """Its texts are in the log, the status and the events, which people read."""
    why = "two\nlines\tand \x1b]0;title\x07 \x9b2J \r é"
    got = messages.decode(messages.encode("failed", n=1, why=why))["why"]
    bad = "\N{REPLACEMENT CHARACTER}"
    assert got == f"two\nlines\tand {bad}]0;title{bad} {bad}2J {bad} é"
