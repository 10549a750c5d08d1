# SPDX-License-Identifier: GPL-2.0-or-later
"""QEMU's events about its guest's life: what each means, in QEMU's own words."""

from __future__ import annotations

from typing import Any

import pytest

from colo_xdp.qemu.events import Fate, QmpEvent, news

IO = {"operation": "write", "device": "drive0", "node-name": "#block1", "nospace": True}


@pytest.mark.parametrize(
    ("name", "data", "who", "fate", "says"),
    [
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}, "PVM", Fate.OFF, "shut itself"),
        ("SHUTDOWN", {"guest": True, "reason": "guest-reset"}, "PVM", Fate.OFF, "-no-reboot"),
        ("SHUTDOWN", {"guest": True}, "PVM", Fate.OFF, "ended itself"),  # QEMU before 4.0
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}, "SVM", Fate.DEAD, "SVM has panick"),
        ("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"}, "PVM", Fate.ENDED, "`quit`"),
        ("SHUTDOWN", {"guest": False, "reason": "host-signal"}, "PVM", Fate.ENDED, "signal"),
        ("SHUTDOWN", {}, "PVM", Fate.ENDED, "no reason given"),
        ("RESET", {"guest": True, "reason": "guest-reset"}, "PVM", Fate.CHANGED, "by itself"),
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}, "SVM", Fate.CHANGED,
         "SVM was reset from outside"),
        ("POWERDOWN", {}, "PVM", Fate.CHANGED, "system_powerdown"),
        ("GUEST_PANICKED", {"action": "pause"}, "PVM", Fate.DEAD, "panicked"),
        ("GUEST_PANICKED", {"action": "poweroff"}, "SVM", Fate.DEAD, "panicked"),
        ("GUEST_PANICKED", {"action": "run"}, "SVM", Fate.CHANGED, "panicked"),
        ("GUEST_CRASHLOADED", {"action": "run"}, "PVM", Fate.CHANGED, "panicked"),
        ("BLOCK_IO_ERROR", IO | {"action": "stop"}, "PVM", Fate.HALTED, "drive0 (write: no space"),
        ("BLOCK_IO_ERROR", {"action": "stop", "operation": "read", "node-name": "n1",
                            "reason": "Input/output error"}, "SVM", Fate.HALTED,
         "n1 (read: Input/output error)"),
    ],
)  # fmt: skip
def test_what_an_event_means(
    name: str, data: dict[str, Any], who: str, fate: Fate, says: str
) -> None:
    n = news(QmpEvent(name, data, 1, 2), who)
    assert n is not None and n.fate is fate and says in n.why


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("STOP", {}),
        ("RESUME", {}),
        ("COLO_EXIT", {"mode": "primary", "reason": "error"}),
        ("BLOCK_IO_ERROR", IO | {"action": "report"}),
        ("BLOCK_IO_ERROR", {}),
        ("GUEST_PANICKED", {"action": "pause"}),  # of the SVM: STOP follows
    ],
)
def test_what_is_no_news(name: str, data: dict[str, Any]) -> None:
    assert news(QmpEvent(name, data, 1, 2), "SVM") is None
