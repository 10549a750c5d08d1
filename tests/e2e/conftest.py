# SPDX-License-Identifier: GPL-2.0-or-later
"""Provide real pairs: two QEMU guests, two controllers, a client. One lab at a time.

They run the installed QEMU, or the one that COLO_QEMU names (`make test-qemu-11`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from colo_xdp.lab.pair import Lab

NEEDED = ("qemu-system-x86_64", "busybox", "cpio", "tcpdump", "openssl", "nsenter", "ip", "cc")
BUILD = Path(__file__).parents[2] / "build"


def _missing() -> str:
    if os.geteuid():
        return "needs root"
    absent = [c for c in NEEDED if not shutil.which(c)]
    return f"not installed: {', '.join(absent)}" if absent else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    why = _missing()
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)
            if why and not os.environ.get("CI"):
                item.add_marker(pytest.mark.skip(reason=why))


LabMaker = Callable[..., Lab]


def fixed_wait(overrides: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Add the wait under which tests may count checkpoints: a busy machine makes the SVM late.

    test_waits.py and the demo have the adaptive one.
    """
    compare = {"wait": "fixed", **overrides.get("compare", {})}
    return overrides | {"compare": compare}


@pytest.fixture
def make_lab() -> Iterator[LabMaker]:
    """Create labs that are removed after the test, whatever happened."""
    made: list[Lab] = []

    def make(**options: Any) -> Lab:
        options["overrides"] = fixed_wait(options.get("overrides", {}))
        lab = Lab(BUILD, tag="cxe2e", **options)
        made.append(lab)
        lab.up()
        return lab

    yield make
    for lab in made:
        lab.down()


@contextmanager
def protected_pair(**options: Any) -> Iterator[Lab]:
    lab = Lab(BUILD, tag="cxe2e", **options)
    try:
        lab.up()
        lab.protect()
        yield lab
    finally:
        lab.down()


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    """Provide a protected pair for the tests of a module, which leave it protected."""
    with protected_pair(overrides=fixed_wait({})) as lab:
        yield lab
