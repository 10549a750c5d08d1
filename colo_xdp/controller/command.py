# SPDX-License-Identifier: GPL-2.0-or-later
"""Names of the commands that a controller takes, for the table there and the command line. Pure."""

from __future__ import annotations

from enum import StrEnum


class Command(StrEnum):
    """What can be asked."""

    STATUS = "status"
    MODE = "mode"
    FAILOVER = "failover"
    SWITCHOVER = "switchover"
    HANDOVER = "handover"
    DEMOTE = "demote"
    CHECKPOINT = "checkpoint"
    REPROTECT = "reprotect"
    RELOAD = "reload"
    EXPLAIN = "explain"
    CAPTURE = "capture"
    FLOWS = "flows"
    DOCTOR = "doctor"
