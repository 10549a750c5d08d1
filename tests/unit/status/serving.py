# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP endpoint with a document of a test's own."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from colo_xdp.status import server
from colo_xdp.status.document import empty
from colo_xdp.status.history import History


class Source:
    def __init__(self) -> None:
        self.doc: dict[str, Any] = empty("web1", "primary").to_json()
        self.broken = False

    def __call__(self) -> dict[str, Any]:
        if self.broken:
            raise TimeoutError("the loop does not answer")
        return self.doc


@contextmanager
def serving(
    listen: str = "127.0.0.1:0", history: History | None = None
) -> Iterator[tuple[Source, str]]:
    source = Source()
    running = server.start(listen, source, history=history)
    try:
        yield source, f"http://{listen.rpartition(':')[0]}:{running.port}"
    finally:
        running.close()


def get(url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    request = urllib.request.Request(url, method=method, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=10) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, e.read().decode()
