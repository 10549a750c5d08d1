# SPDX-License-Identifier: GPL-2.0-or-later
"""`colo-xdp compile`: have the programs of pairs compiled before anything waits for them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config.file import Config
from ..datapath.programs import fill, unfit_pins
from ..datapath.source import LoadError


class Uncompiled(RuntimeError):
    """It did not work out; the text says why."""


def compile_for(config: Config) -> Iterator[str]:
    """Compile for every role that this host may have; yield a line for each. Raises Uncompiled.

    A controller does without a cache that cannot be written; whoever compiles for it does not. The
    next one must also be able to take over what is pinned, or a restart would leave the guest
    without one.
    """
    try:
        for found in fill(config):
            if not Path(found.path).exists():
                raise Uncompiled(f"{found.role}: compiled, but not kept: {found.path}")
            what = f"compiled in {found.seconds:.1f} s" if found.seconds else "compiled before"
            yield f"{config.pair} {found.role}: {what} ({found.path})"
        if bad := unfit_pins(config):
            raise Uncompiled(
                "the controller of this release could not take over what the one before has "
                "pinned; see `upgrade` in docs/operator/install.md\n  " + "\n  ".join(bad)
            )
    except (LoadError, OSError) as e:
        raise Uncompiled(str(e)) from e
