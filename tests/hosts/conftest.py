# SPDX-License-Identifier: GPL-2.0-or-later
"""Provide two hosts with systemd for a module's tests, and their journals when a test fails."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from . import root
from .pair import Pair

BUILD = Path(__file__).parents[2] / "build"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = root.missing()
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.timeout(600))
            if why and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    p = Pair(BUILD)
    try:
        p.up()
        yield p
    finally:
        p.down()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Any:
    report = yield
    p = getattr(item, "funcargs", {}).get("pair")
    if report.failed and isinstance(p, Pair):
        report.sections.append(("journals of the hosts", p.logs()))
    return report
