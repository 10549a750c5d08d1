# SPDX-License-Identifier: GPL-2.0-or-later
"""Exchange the roles of a pair and protect it again, as an operator would (`colo-xdp drill`).

It only talks to the control socket of this host. The controller behind that is replaced meanwhile,
by that of the other role, so for a while nobody answers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

from ..controller.command import Command
from .control_socket import ControlError, request

ANSWER_S = 5.0


class DrillError(RuntimeError):
    """The drill cannot begin, or did not end in time; the text is for the operator."""


def drill(path: str, wait_s: float) -> Iterator[str]:
    """Yield what happens, as it happens, on the primary host whose control socket is at `path`.

    Raises DrillError, also if the pair is not protected again within wait_s; ControlError where the
    controller refuses a command.
    """
    s = request(path, Command.STATUS)
    if (s["role"], s["state"]) != ("primary", "protected"):
        raise DrillError(
            f"a drill begins on the primary of a protected pair; this is {s['role']}, "
            f"{s['state']}: {s['reason']}"
        )
    began = time.monotonic()
    r = request(path, Command.SWITCHOVER)
    if not r["done"]:
        raise DrillError(f"no switchover: {r['state']}: {r['reason']}")
    yield f"the guest transmits on the other host after {(time.monotonic() - began) * 1e3:.0f} ms"
    gap, last, end = None, "", began + wait_s
    request(path, Command.REPROTECT)
    while time.monotonic() < end:
        try:
            s = request(path, Command.STATUS, timeout=ANSWER_S)
        except ControlError:
            time.sleep(0.2)  # the controller of the other role is being made
            continue
        if gap is None and s["last_failover"]:
            gap = s["last_failover"]["gap_ms"]
            yield f"the network received nothing from the guest for {gap:.0f} ms"
        if s["reason"] != last:
            last = s["reason"]
            yield f"  {s['role']}, {s['state']}: {last}"
        if (s["role"], s["state"]) == ("secondary", "protected"):
            yield f"protected again after {time.monotonic() - began:.1f} s, roles changed"
            return
        time.sleep(0.02)
    raise DrillError(f"not protected again within {wait_s:g} s: {last}")
