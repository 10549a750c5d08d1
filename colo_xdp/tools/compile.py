# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp compile`: have the programs of pairs compiled before anything waits for them."""

from __future__ import annotations

from collections.abc import Iterator

from ..config.file import Config
from ..datapath.programs import fill
from ..datapath.source import LoadError


class Uncompiled(RuntimeError):
    """It did not work out; the text says why."""


def compile_for(config: Config) -> Iterator[str]:
    """Compile for every role that this host may have; yield a line for each. Raises Uncompiled."""
    try:
        for found in fill(config):
            what = f"compiled in {found.seconds:.1f} s" if found.seconds else "compiled before"
            yield f"{config.pair} {found.role}: {what} ({found.path})"
    except (LoadError, OSError) as e:
        raise Uncompiled(str(e)) from e
