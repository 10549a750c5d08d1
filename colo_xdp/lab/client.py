# SPDX-License-Identifier: GPL-2.0-or-later
"""Run clients of the lab guest. Each checks every byte that it receives."""

from __future__ import annotations

import contextlib
import hashlib
import random
import re
import socket
import threading
import time
from dataclasses import dataclass, field

from .guest import content
from .net import NETWORKS, in_ns

TIMEOUT_S = 30.0


def wrong_bytes(got: bytes, want: bytes) -> int:
    """Count the bytes that differ, including missing and surplus ones."""
    if got == want:
        return 0
    n = min(len(got), len(want))
    return sum(a != b for a, b in zip(got[:n], want[:n], strict=True)) + abs(len(got) - len(want))


@dataclass(slots=True)
class Fetch:
    """One HTTP answer."""

    ok: bool
    body: bytes
    seconds: float
    error: str = ""
    port: int = 0  # the client's port
    head: int = 0  # bytes before the body


def guest_address(v6: bool = False, nic: int = 0) -> str:
    """Return the address of one of the guest's NICs."""
    _, v4, prefix = NETWORKS[nic]
    return f"{prefix}:2" if v6 else f"{v4}.2"


def _connect(
    port: int, v6: bool = False, timeout: float = TIMEOUT_S, nic: int = 0
) -> socket.socket:
    return socket.create_connection((guest_address(v6, nic), port), timeout)


class Client:
    """Run workloads inside the client's namespace."""

    def __init__(self, ns: str, nic: int = 0) -> None:
        """`nic`: the number of the guest's NIC, on whose network the client is."""
        self.ns, self.nic = ns, nic

    def http(
        self, path: str, *, v6: bool = False, timeout: float = TIMEOUT_S, port: int = 80
    ) -> Fetch:
        """Send a GET; the answer is complete only if the server closed at the announced length."""

        def run() -> Fetch:
            t, mine, broken = time.monotonic(), 0, ""
            data = bytearray()
            try:
                with _connect(port, v6, timeout, self.nic) as s:
                    mine = s.getsockname()[1]
                    s.sendall(f"GET /{path} HTTP/1.0\r\nHost: guest\r\n\r\n".encode())
                    while part := s.recv(1 << 17):
                        data += part
            except OSError as e:
                broken = str(e) or type(e).__name__
            head, body, *_ = [*re.split(rb"\r?\n\r?\n", bytes(data), maxsplit=1), b""]
            m = re.search(rb"Content-Length: (\d+)", head, re.I)
            whole = m is None or int(m[1]) == len(body)
            ok = b" 200 " in head[:16] and whole and not broken
            why = "" if ok else broken or repr(head[:80])
            return Fetch(ok, body, time.monotonic() - t, why, mine, len(data) - len(body))

        return in_ns(self.ns, run)

    def download(self, name: str, *, v6: bool = False) -> tuple[int, int]:
        """Return (bytes received, wrong bytes) for a file with known content."""
        f = self.http(name, v6=v6)
        want = content(name)
        return len(f.body), wrong_bytes(f.body, want) if f.ok else max(1, wrong_bytes(f.body, want))

    def uptime_page(self) -> tuple[bool, str]:
        """Return whether the page that differs on each guest came from one guest, and why not."""
        f = self.http("cgi-bin/uptime", port=8080)
        if not f.ok:
            return False, f.error
        m = re.fullmatch(rb"token (\w{24}) up ([\d.]+)\n(?:again \1 \2\n){8}end \1\n", f.body)
        return (True, "") if m else (False, repr(f.body[:400]))

    def run(self, command: str) -> str:
        """Run a shell command inside the guest, through its web server."""
        quoted = "".join(c if c.isalnum() else f"%{ord(c):02x}" for c in command)
        return self.http(f"cgi-bin/run?{quoted}", port=8080).body.decode(errors="replace")

    def upload(self, size: int, *, v6: bool = False, seed: int = 1) -> str:
        """Send random bytes to the sink and compare its digest; return "" or what is wrong."""
        data = random.Random(seed).randbytes(size)

        def go() -> str:
            try:
                with _connect(9, v6, nic=self.nic) as s:
                    s.sendall(data)
                    s.shutdown(socket.SHUT_WR)
                    answer = b""
                    while part := s.recv(4096):
                        answer += part
            except OSError as e:
                return str(e) or type(e).__name__
            want = hashlib.md5(data).hexdigest()
            got = answer.split(b" ")[0].decode()
            return "" if got == want else f"digest {got!r}, sent {want}"

        return in_ns(self.ns, go)

    def udp_echo(self, count: int, *, v6: bool = False, size: int = 200) -> tuple[int, int]:
        """Return (answered, wrong) of `count` datagrams, sent one at a time with 5 s for each."""

        def go() -> tuple[int, int]:
            answered = wrong = 0
            family = socket.AF_INET6 if v6 else socket.AF_INET
            with socket.socket(family, socket.SOCK_DGRAM) as s:
                s.settimeout(5)
                s.connect((guest_address(v6, self.nic), 7))
                for i in range(count):
                    data = random.Random(i).randbytes(size)
                    s.send(data)
                    try:
                        got = s.recv(65536)
                    except TimeoutError:
                        continue
                    answered += 1
                    wrong += wrong_bytes(got, data)
            return answered, wrong

        return in_ns(self.ns, go)


@dataclass(slots=True)
class EchoStats:
    """Statistics of an echo stream; times are unix time, s."""

    sent: int = 0
    received: int = 0
    wrong: int = 0
    dead: str = ""
    # the first wrong answer: when, received, expected
    odd: tuple[float, bytes, bytes] | None = None
    answered_at: list[float] = field(default_factory=list)

    def max_gap(self) -> float:
        """Return the longest time between two answers, s."""
        a = self.answered_at
        return max((y - x for x, y in zip(a, a[1:], strict=False)), default=0.0)

    def answered_after(self, at: float) -> int:
        return sum(t > at for t in self.answered_at)


class EchoStream:
    """Keep one TCP connection: send a line every `period` seconds and check each answer."""

    def __init__(self, ns: str, *, v6: bool = False, period: float = 0.02, nic: int = 0) -> None:
        self.stats = EchoStats()
        self._period = period
        self._stop = threading.Event()
        self._socket = in_ns(ns, lambda: _connect(7, v6, nic=nic))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        st, s, n = self.stats, self._socket, 0
        try:
            while not self._stop.wait(self._period):
                n += 1
                line = f"echo {n} {n * 2654435761 % 2**32:08x}\n".encode()
                s.sendall(line)
                st.sent += len(line)
                got = b""
                while len(got) < len(line):
                    part = s.recv(len(line) - len(got))
                    if not part:
                        st.dead = "closed by the guest"
                        return
                    got += part
                st.received += len(got)
                st.wrong += wrong_bytes(got, line)
                if got != line and st.odd is None:
                    st.odd = (time.time(), got, line)
                st.answered_at.append(time.time())
        except OSError as e:
            st.dead = str(e) or type(e).__name__

    def stop(self) -> EchoStats:
        """Stop, close and return the statistics."""
        self._stop.set()
        self._thread.join(TIMEOUT_S)
        self._socket.close()
        return self.stats


class LineStream:
    """Keep one connection on which the guest counts: "line N", with nothing lost or repeated."""

    def __init__(self, ns: str) -> None:
        self.lines = 0
        self.wrong = 0
        self.odd = ""  # the first wrong line
        self.odd_line: tuple[float, bytes, bytes] | None = None  # when, received, expected
        self.dead = ""
        self.times: list[float] = []
        self._stop = threading.Event()
        self._socket = in_ns(ns, lambda: _connect(1234))
        self.port = int(self._socket.getsockname()[1])
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with self._socket.makefile("rb") as f:
                while not self._stop.is_set():
                    line = f.readline()
                    if not line.endswith(b"\n"):
                        if not self._stop.is_set():
                            self.dead = f"closed by the guest after {line!r}"
                        return
                    self.lines += 1
                    self.times.append(time.time())
                    want = f"line {self.lines}\n".encode()
                    if line != want:
                        self.wrong += 1
                        self.odd = self.odd or f"{line!r} in place of line {self.lines}"
                        self.odd_line = self.odd_line or (time.time(), line, want)
        except OSError as e:
            if not self._stop.is_set():
                self.dead = str(e) or type(e).__name__

    def stop(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):  # the guest's end may be gone
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self._socket.close()


class RecordStream:
    """Have the guest write records durably, one after the other, on one connection.

    What it has confirmed must be on the disk that survives (lab/disk.py checks that).
    """

    def __init__(self, ns: str, port: int = 2001, first: int = 1) -> None:
        self.first, self.last = first, first - 1  # the last record that the guest has confirmed
        self.dead = ""
        self.longest_s = 0.0  # from a record to its confirmation
        self._stop = threading.Event()
        self._socket = in_ns(ns, lambda: _connect(port))
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def confirmed(self) -> range:
        return range(self.first, self.last + 1)

    def _run(self) -> None:
        try:
            with self._socket.makefile("rb") as f:
                while not self._stop.is_set():
                    began, n = time.monotonic(), self.last + 1
                    self._socket.sendall(b"%d\n" % n)
                    line = f.readline()
                    if line != b"ok %d\n" % n:
                        if not self._stop.is_set():
                            self.dead = f"{line!r} in place of a confirmation of record {n}"
                        return
                    self.last = n
                    self.longest_s = max(self.longest_s, time.monotonic() - began)
        except OSError as e:
            if not self._stop.is_set():
                self.dead = str(e) or type(e).__name__

    def stop(self) -> None:
        self._stop.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(TIMEOUT_S)
        self._socket.close()
