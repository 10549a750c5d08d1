# SPDX-License-Identifier: GPL-2.0-or-later
"""Say what a request waits for while it is being carried out.

The request is sent by a thread. Meanwhile this host's controller is asked for its status, from
AFTER_S on, and each change of its state or reason is said. It costs a request that ends at once
nothing.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from ..controller.command import Command
from .control_socket import ControlError, request

AFTER_S = 1.0
EVERY_S = 0.5
ANSWER_S = 2.0

Ask = Callable[..., dict[str, Any]]


def watched(
    path: str,
    command: str,
    args: dict[str, Any],
    say: Callable[[str], None],
    ask: Ask = request,
    *,
    after_s: float = AFTER_S,
    every_s: float = EVERY_S,
) -> dict[str, Any]:
    """Send a request and return its answer; say() gets lines meanwhile.

    Raises what request() does.
    """
    answers: list[dict[str, Any]] = []
    errors: list[Exception] = []

    def send() -> None:
        try:
            answers.append(ask(path, command, args))
        except Exception as e:
            errors.append(e)

    thread = threading.Thread(target=send, daemon=True)
    began = time.monotonic()
    thread.start()
    thread.join(after_s)
    last = ""
    while thread.is_alive():
        try:
            s = ask(path, Command.STATUS, timeout=ANSWER_S)
            text = f"{s['state']}: {s['reason']}"
        except ControlError as e:
            text = f"the controller does not answer: {e}"
        if text != last and thread.is_alive():
            last = text
            say(f"{command}, {time.monotonic() - began:.0f} s: {text}")
        thread.join(every_s)
    if errors:
        raise errors[0]
    return answers[0]
