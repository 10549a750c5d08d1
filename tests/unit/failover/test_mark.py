# SPDX-License-Identifier: GPL-2.0-or-later
"""The mark of a guest that ran standalone: whatever is in the file."""

from __future__ import annotations

import json
from typing import Any

import pytest

from colo_xdp.failover.mark import Mark, Standing, decode, found_why, unusable

MARK = Mark("web1", Standing.STANDALONE, "b1", 1_790_000_000.5)
PATH = "/var/lib/x/web1.secondary.standalone.json"


@pytest.mark.parametrize("standing", [Standing.STANDALONE, Standing.SUPERSEDED])
def test_what_is_written_is_read(standing: Standing) -> None:
    mark = Mark("web1", standing, "b1", 1_790_000_000.5)
    assert decode(mark.encode(), "web1") == mark
    assert mark.encode().endswith(b"}\n"), "a person reads it, too"


def changed(**fields: Any) -> bytes:
    return json.dumps(json.loads(MARK.encode()) | fields).encode()


@pytest.mark.parametrize(
    ("data", "trouble"),
    [
        (b"", "truncated"),
        (MARK.encode()[:20], "truncated"),
        (b"\0" * 4096, "truncated"),
        (b"\xff\xfe\x00", "truncated"),
        (b"[" * 100_000, "not written by colo-xdp"),
        (b"[]", "format is unknown"),
        (b"null", "format is unknown"),
        (changed(format=2), "format is unknown"),
        (changed(pair="web2"), "of another pair, 'web2'"),
        (changed(pair=None), "of another pair"),
        (changed(guest="none"), "`guest` is 'none'"),
        (changed(guest=["x" * 1000]), "`guest` is"),
        (changed(boot=7), "`boot` or `at`"),
        (changed(at="now"), "`boot` or `at`"),
        (changed(at=True), "`boot` or `at`"),
    ],
)
def test_what_cannot_be_used_counts_as_a_mark(data: bytes, trouble: str) -> None:
    mark = decode(data, "web1")
    assert mark.standing is Standing.STANDALONE and trouble in mark.trouble
    why = found_why(mark, PATH, "b1")
    assert PATH in why and trouble in why and "remove the file" in why and len(why) < 500


def test_every_truncated_file_counts_as_a_mark() -> None:
    whole = MARK.encode()
    for n in range(len(whole) - 2):
        assert decode(whole[:n], "web1").trouble


def test_what_is_found_says_until_when_the_guest_ran() -> None:
    why = found_why(MARK, PATH, "b2")
    assert "from 2026-09-21 14:13:20 UTC on, until this host booted" in why and PATH in why
    assert "until the data path was removed" in found_why(MARK, PATH, "b1")
    assert found_why(Mark("web1", Standing.SUPERSEDED, "b1", 1.0), PATH, "b2") == ""
    for at in (float("nan"), 1e300):
        assert "an unknown time" in found_why(Mark("web1", Standing.STANDALONE, "", at), PATH, "b")


def test_a_mark_that_is_unusable_is_one() -> None:
    assert unusable("web1", "x").standing is Standing.STANDALONE
