# SPDX-License-Identifier: GPL-2.0-or-later
"""Write the frames of both guests that differed to a capture file for Wireshark.

They come from a running controller (`colo-xdp capture`) or from a replay (`colo-xdp replay -w`). A
comment on each frame gives the position of the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..engine.journal import divergence_json
from .explain import comment
from .pcap import Writer
from .replay import Replay

PAGE = 8  # differences in one answer of the controller, whose size is limited
WAIT_S = 0.2

#: the controller's differences behind a serial number, so many at most (`capture` of the socket)
Page = Callable[[int, int], list[dict[str, Any]]]


def from_controller(out: Path, page: Page, seconds: float, count: int) -> tuple[int, int]:
    """Write what a controller has kept, and what comes within `seconds`; `count` at most.

    Returns the numbers of differences and of frames. Raises PcapError.
    """
    end, after, n = time.monotonic() + seconds, 0, 0
    with Writer(out) as w:
        while n < count:
            found = page(after, PAGE)
            for d in found[: count - n]:
                after, n = d["serial"], n + 1
                at = int(d["at"] * 1e9)
                for guest in ("pvm", "svm"):
                    if d[f"{guest}_frame"]:
                        w.put(guest, at, bytes.fromhex(d[f"{guest}_frame"]), comment(d))
            if not found:
                if time.monotonic() >= end:
                    break
                time.sleep(WAIT_S)
    return n, w.frames


def from_replay(out: Path, r: Replay) -> None:
    """Write the differences of a replay. Raises PcapError."""
    with Writer(out) as w:
        for n, (ts, d) in enumerate(r.pairs, 1):
            note = comment({"serial": n, **divergence_json(d)})
            e = d.evidence
            for guest, frame in (("pvm", e.pvm_frame and e.pvm_frame.frame), ("svm", e.svm_frame)):
                if frame:
                    w.put(guest, ts, frame, note)
