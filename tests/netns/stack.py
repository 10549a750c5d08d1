# SPDX-License-Identifier: GPL-2.0-or-later
"""Use a Linux kernel as the guest: a namespace whose eth0 is wired to the host's tap."""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.netns.conftest import Tap, inside, sh
from tests.netns.frames import CLIENT_MAC, GUEST_MAC


def until(what: Callable[[], bool], why: str) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end, why
        select.select([], [], [], 0.01)


class Stack:
    """The guest's namespace `ns`.

    `tap`: QEMU's end of the host's tap. `far`: the last parts of the addresses, 10.9.0.n or
    fd09::n, that are at `mac`. `tag`: tells several guests of one test apart.
    """

    def __init__(
        self, tap: Tap, v6: bool, far: Iterable[int] = (1,), mac: bytes = CLIENT_MAC, tag: str = ""
    ) -> None:
        self.ns, self.host_tap, self.v6 = f"cxg{tag}{os.getpid() % 100000}", tap, v6
        self.address = "fd09::2" if v6 else "10.9.0.2"
        self.net = "fd09::" if v6 else "10.9.0."
        self.stop = threading.Event()
        sh("ip", "netns", "add", self.ns)
        with inside(self.ns):
            self.tap = Tap("eth0", tap.vnet)
        ip = ("ip", "-n", self.ns)
        sh(*ip, "link", "set", "eth0", "address", GUEST_MAC.hex(":"), "up")
        sh(*ip, "addr", "add", f"{self.address}/{64 if v6 else 24}", "dev", "eth0",
           *(["nodad"] if v6 else []))  # fmt: skip
        for n in far:
            sh(*ip, "neigh", "add", f"{self.net}{n}", "lladdr", mac.hex(":"), "dev", "eth0")
        self.thread = threading.Thread(target=self._wire, daemon=True)
        self.thread.start()

    def seen(self, frame: bytes, to_guest: bool) -> None:
        """Note each frame, with its virtio_net_hdr if the tap has it. Runs in the wire's thread."""

    def _wire(self) -> None:
        ends = {self.host_tap.fd: self.tap.fd, self.tap.fd: self.host_tap.fd}
        while not self.stop.is_set():
            for fd in select.select(list(ends), [], [], 0.1)[0]:
                try:
                    raw = os.read(fd, 70000)
                    self.seen(raw, fd == self.host_tap.fd)
                    os.write(ends[fd], raw)
                except (BlockingIOError, OSError):
                    continue

    def counter(self, group: str, name: str) -> int:
        """Return a counter of this namespace by its nstat name, such as OutOfWindowIcmps."""
        with inside(self.ns):
            text = "".join(
                Path(f"/proc/thread-self/net/{file}").read_text() for file in ("snmp", "netstat")
            )
        of_group = [line.split()[1:] for line in text.splitlines() if line.startswith(f"{group}:")]
        return int(of_group[1][of_group[0].index(name)])

    def close(self) -> None:
        self.stop.set()
        self.thread.join(5)
        self.tap.close()
        sh("ip", "netns", "del", self.ns)
