# SPDX-License-Identifier: GPL-2.0-or-later
"""A headless Chromium by its DevTools protocol, over a pair of pipes; the standard library only."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROGRAM = shutil.which("chromium")
ANSWER_S = 30.0


class Browser:
    """One page of a browser. `events` are all that it has reported."""

    def __init__(self, to: int, of: int) -> None:
        self._to, self._of = to, of
        self._rest = b""
        self._last = 0
        self._session = ""
        self.events: list[dict[str, Any]] = []

    def open(self) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        found = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = found["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def _read(self, until: float) -> dict[str, Any] | None:
        """The next message, or None when there is none until then."""
        while b"\0" not in self._rest:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._of], [], [], left)[0]:
                return None
            chunk = os.read(self._of, 1 << 20)
            if not chunk:
                raise RuntimeError("the browser has ended")
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._last += 1
        message: dict[str, Any] = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        until = time.monotonic() + ANSWER_S
        while (got := self._read(until)) is not None:
            if got.get("id") == self._last:
                if "error" in got:
                    raise RuntimeError(f"{method}: {got['error']}")
                result: dict[str, Any] = got["result"]
                return result
            self.events.append(got)
        raise TimeoutError(method)

    def run(self, seconds: float) -> None:
        """Let the page run."""
        until = time.monotonic() + seconds
        while (got := self._read(until)) is not None:
            self.events.append(got)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def eval(self, script: str) -> Any:
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 20) -> Any:
        """Wait until the expression is true, and return its value."""
        until = time.monotonic() + seconds
        while not (value := self.eval(script)):
            assert time.monotonic() < until, (script, self.eval("document.body.innerText"))
            self.run(0.1)
        return value

    def look(self, theme: str, width: int, height: int) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=False,
        )  # fmt: skip
        media = [{"name": "prefers-color-scheme", "value": theme}]
        self.call("Emulation.setEmulatedMedia", features=media)
        self.run(0.3)

    def picture(self, clip: dict[str, float] | None = None) -> bytes:
        area = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True} if clip else {}
        data = self.call("Page.captureScreenshot", format="png", **area)["data"]
        return base64.b64decode(data)

    def complaints(self) -> list[Any]:
        """Errors of scripts, of the policy and of the console."""
        return [
            e["params"]
            for e in self.events
            if e["method"] == "Runtime.exceptionThrown"
            or (e["method"] == "Log.entryAdded" and e["params"]["entry"]["level"] != "info")
            or e["method"] == "Runtime.consoleAPICalled"
        ]

    def requests(self) -> list[str]:
        return [
            e["params"]["request"]["url"]
            for e in self.events
            if e["method"] == "Network.requestWillBeSent"
        ]


@contextmanager
def browser(home: Path) -> Iterator[Browser]:
    assert PROGRAM
    theirs_in, to = os.pipe()
    of, theirs_out = os.pipe()

    def pipes() -> None:  # it reads commands from 3 and writes to 4
        a, b = os.dup(theirs_in), os.dup(theirs_out)
        os.dup2(a, 3)
        os.dup2(b, 4)

    with (home / "log").open("wb") as log:
        process = subprocess.Popen(
            [PROGRAM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
             "--no-first-run", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--hide-scrollbars", f"--user-data-dir={home}/profile",
             "--remote-debugging-pipe", "about:blank"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=pipes, close_fds=False,
            env=os.environ | {"HOME": str(home), "TZ": "UTC", "LANG": "C.UTF-8"},
            start_new_session=True,
        )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        b = Browser(to, of)
        b.open()
        yield b
    finally:
        os.close(to)
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait(5)
        os.close(of)
