# SPDX-License-Identifier: GPL-2.0-or-later
"""Ask a running controller what `doctor` wants to know: of this host, and of the other one."""

from __future__ import annotations

from ..config.file import Config
from ..controller.checkup import ASK_S, SURVEY_S
from ..controller.command import Command
from ..qemu.survey import Survey
from ..tools.doctor import Beside, control_socket
from ..tools.findings import Check, Report, between
from .control_socket import ControlError, NotRunning, request

STATUS_S = 5.0


def beside(config: Config) -> Beside | None:
    """Return what the running controller of this pair says; None: none answers."""
    path = control_socket(config)
    try:
        status = request(path, Command.STATUS, timeout=STATUS_S)
    except ControlError:
        return None
    try:
        found = request(path, Command.DOCTOR, timeout=SURVEY_S + STATUS_S)
        survey = Survey.from_json(found["survey"]) if found["survey"] else None
        return Beside(int(found["pid"]), status, survey, str(found["why"]))
    except (ControlError, ValueError, KeyError, TypeError) as e:  # of another release, or busy
        return Beside(-1, status, None, f"the controller has not asked QEMU: {e}")


def other_host(config: Config, ours: Report) -> tuple[Report, list[Check]]:
    """Return the other host's report and what is found of the two together.

    Raises ControlError, whose text says why there is none.
    """
    try:
        found = request(
            control_socket(config), Command.DOCTOR, {"peer": True}, timeout=ASK_S + STATUS_S
        )
    except NotRunning:
        raise ControlError(
            "no controller runs here, and only controllers can ask the other host: start it, or "
            "run doctor there"
        ) from None
    try:
        doc = found["report"]
        if isinstance(doc, dict) and "trouble" in doc:
            raise ControlError(f"the other host: {str(doc['trouble'])[:500]}")
        theirs = Report.from_json(doc)
        # Its clock was read just before the answer was sent.
        blur = max(0.0, float(found["answered"]) - float(found["asked"]))
        ahead = float(found["at"]) - float(found["answered"])
    except (ValueError, KeyError, TypeError) as e:
        raise ControlError(f"the other host's answer is no report: {e}") from e
    return theirs, between(ours, theirs, ahead, min(blur, 1.0))
