# SPDX-License-Identifier: GPL-2.0-or-later
"""Carry out what `doctor --fix` may do: see Fix in tools/findings.py for what that is."""

from __future__ import annotations

import os

from .findings import Fix, FixKind

RUN_DIR_MODE = 0o750


class NotMended(RuntimeError):
    """A fix could not be carried out; the text says why."""


def mend(fix: Fix) -> None:
    """Carry out one fix. Raises NotMended."""
    from ..datapath import bridge, devices, route
    from ..datapath.netlink import NetlinkError

    try:
        match fix.kind:
            case FixKind.LINK_UP:
                devices.set_up(fix.args[0])
            case FixKind.JOIN_BRIDGE:
                bridge.set_master(*fix.args)
            case FixKind.QUICKACK:
                route.set_quickack(*fix.args)
            case FixKind.RUN_DIR:
                os.makedirs(fix.args[0], RUN_DIR_MODE, exist_ok=True)
            case FixKind.KEY_MODE:
                os.chmod(fix.args[0], 0o600)
    except (OSError, NetlinkError, devices.NoSuchDevice, devices.DeviceError) as e:
        raise NotMended(str(e)) from e
