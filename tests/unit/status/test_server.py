# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP endpoint: its paths, and what it does with clients that ask for anything."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from colo_xdp.status import server
from colo_xdp.status.document import empty
from colo_xdp.status.history import History
from colo_xdp.tools import pki
from tests.unit.status.serving import Source, get, serving


@pytest.fixture
def served() -> Iterator[tuple[Source, str]]:
    with serving() as found:
        yield found


def raw(url: str, request: bytes, timeout: float = 10) -> bytes:
    """What a connection answers that sends just this."""
    at = urlsplit(url)
    with socket.create_connection((at.hostname, at.port), timeout=timeout) as s:
        s.sendall(request)
        out = b""
        try:
            while chunk := s.recv(65536):
                out += chunk
        except ConnectionResetError:
            pass  # it did not read all that was sent
        return out


@pytest.mark.parametrize(
    ("role", "state", "transmits", "ready", "secondary"),
    [
        ("primary", "protected", True, 200, 503),
        ("primary", "solo", True, 503, 503),
        ("primary", "starting", True, 503, 503),
        ("primary", "starting", False, 503, 503),  # waits for the lease, or for the other host
        ("primary", "protected", False, 200, 503),  # the lease could not be renewed
        ("primary", "degraded", False, 503, 503),
        ("primary", "stopped", False, 503, 503),
        ("secondary", "protected", False, 200, 200),
        ("secondary", "promoted", True, 503, 503),
        ("secondary", "promoted", False, 503, 503),  # its QEMU has died since
        ("secondary", "starting", False, 503, 503),
    ],
)
def test_health(
    served: tuple[Source, str], role: str, state: str, transmits: bool, ready: int, secondary: int
) -> None:
    """/primary is the fact that colo_xdp_active and the status give, whatever the state is."""
    source, url = served
    source.doc.update(role=role, state=state, reason="because")
    source.doc["active"]["transmitting"] = transmits
    assert get(url + "/healthz") == (200, f"{role} {state}: because\n")
    got = tuple(get(url + p)[0] for p in ("/readyz", "/primary", "/secondary"))
    assert got == (ready, 200 if transmits else 503, secondary)
    active = f'colo_xdp_active{{pair="web1",role="{role}"}} {float(transmits)}'
    assert active in get(url + "/metrics")[1].splitlines()
    assert json.loads(get(url + "/status.json")[1])["state"] == state
    assert get(url + "/else")[0] == 404


def test_strangers_cannot_read_over_tls(tmp_path: Path) -> None:
    """Only whose certificate the readers' authority has signed; who stalls does not keep it."""
    names = ("ours", "theirs")
    for name in names:
        pki.init(tmp_path / name, name)
        pki.issue(tmp_path / name, "primary")
    ours, theirs = (tmp_path / n for n in names)

    def read(directory: Path | None) -> tuple[int, str]:
        ctx = ssl.create_default_context(cafile=str(ours / "ca.crt"))
        ctx.check_hostname = False
        if directory is not None:
            ctx.load_cert_chain(directory / "primary.crt", directory / "primary.key")
        url = f"https://127.0.0.1:{running.port}/status.json"
        with urllib.request.urlopen(url, timeout=20, context=ctx) as r:
            return r.status, r.read().decode()

    files = (str(ours / "primary.crt"), str(ours / "primary.key"), str(ours / "ca.crt"))
    running = server.start("127.0.0.1:0", Source(), files)
    try:
        with socket.create_connection(("127.0.0.1", running.port)) as stalls:
            assert read(ours)[0] == 200
            stalls.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            stalls.settimeout(20)
            assert b"colo_xdp" not in stalls.recv(4096)
        for stranger in (None, theirs):
            with pytest.raises(OSError):
                read(stranger)
        assert read(ours)[0] == 200
    finally:
        running.close()


def test_no_byte_of_the_guests_is_told(served: tuple[Source, str]) -> None:
    """Any process of the host may ask, and guests differ in what is secret: tokens, sessions."""
    source, url = served
    difference = {
        "cause": "payload", "flow": "tcp 10.9.0.1:4711 -> 10.9.0.2:80", "proto": "tcp", "port": 80,
        "rule": "default", "nic": "net0", "asked": True, "offset": 7, "at_index": 1,
        "pvm": b"session=5ecret".hex(), "svm": b"session=0ther".hex(),
    }  # fmt: skip
    source.doc["divergences"] = [difference]
    text = get(url + "/status.json")[1]
    (told,) = json.loads(text)["divergences"]
    assert told == {**difference, "pvm": "", "svm": ""}
    for path in ("/metrics", "/history.json", "/"):
        assert difference["pvm"] not in get(url + path)[1]
    assert source.doc["divergences"] == [difference], "the control socket tells it"


def test_every_answer_forbids_a_browser_everything_else(served: tuple[Source, str]) -> None:
    source, url = served
    for path in ("/", "/metrics", "/status.json", "/history.json", "/readyz", "/no"):
        source.broken = path == "/readyz"
        c = http.client.HTTPConnection(urlsplit(url).netloc, timeout=10)
        c.request("GET", path, headers={"Origin": "http://evil.example"})
        headers = c.getresponse().headers
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Cache-Control"] == "no-store"
        assert headers["Content-Security-Policy"].startswith("default-src 'none'; ")
        assert not [h for h in headers if h.lower().startswith("access-control-")], path
        c.close()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_only_get_and_head(served: tuple[Source, str], method: str) -> None:
    _, url = served
    for path in ("/", "/metrics", "/status.json"):
        code, text = get(url + path, method)
        assert code == 405 and "only GET and HEAD" in text
    assert b"\r\nAllow: GET, HEAD\r\n" in raw(url, method.encode() + b" / HTTP/1.0\r\n\r\n")


def test_head_is_get_without_the_body(served: tuple[Source, str]) -> None:
    _, url = served
    for path in ("/", "/metrics", "/status.json", "/history.json", "/readyz"):
        head = raw(url, b"HEAD %s HTTP/1.0\r\n\r\n" % path.encode())
        assert head.endswith(b"\r\n\r\n") and head.count(b"\r\n\r\n") == 1, path
        assert head.split()[1] == str(get(url + path)[0]).encode()


ODD = {
    "no path": (b"GET\r\n\r\n", b" 400 "),
    "nothing": (b"\r\n\r\n", b""),
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),
    "a long line": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", b" 414 "),
    "a long header": (b"GET / HTTP/1.1\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", b" 431 "),
    "many headers": (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 200 + b"\r\n", b" 431 "),
    "another version": (b"GET / HTTP/9.9\r\n\r\n", b" 505 "),
    "not a version": (b"GET / HTTP/x\r\n\r\n", b" 400 "),
    "upwards": (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", b" 404 "),
    "encoded": (b"GET /%2e%2e/%00%ff<script> HTTP/1.1\r\n\r\n", b" 404 "),
    "a proxy's": (b"GET http://evil.example/metrics HTTP/1.1\r\n\r\n", b" 404 "),
    "a row": (b"GET /history.json?after=-1 HTTP/1.1\r\n\r\n", b" 400 "),
    "a large row": (b"GET /history.json?after=" + b"9" * 9000 + b" HTTP/1.1\r\n\r\n", b" 400 "),
    "a word": (b"GET /history.json?after=x HTTP/1.1\r\n\r\n", b" 400 "),
    "a length": (b"GET /readyz HTTP/1.1\r\nContent-Length: -7\r\n\r\n", b" 503 "),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_requests_get_a_clear_answer(served: tuple[Source, str], name: str) -> None:
    _, url = served
    request, answer = ODD[name]
    said = raw(url, request)
    assert answer in said
    assert b"<script>" not in said and b"Traceback" not in said
    assert get(url + "/healthz")[0] == 200


def test_an_error_names_what_there_is(served: tuple[Source, str]) -> None:
    _, url = served
    code, text = get(url + "/favicon.ico")
    assert code == 404 and "/status.json" in text and "favicon" not in text
    assert "number of a row" in get(url + "/history.json?after=x")[1]


def test_clients_that_say_nothing_keep_nobody_out(served: tuple[Source, str]) -> None:
    """As browsers do, which open connections before they need them."""
    _, url = served
    at = urlsplit(url)
    idle = [socket.create_connection((at.hostname, at.port)) for _ in range(server.CONNECTIONS - 1)]
    began = time.monotonic()
    assert get(url + "/healthz")[0] == 200
    assert time.monotonic() - began < 1
    for s in idle:
        s.close()


def test_a_request_that_trickles_has_one_deadline(
    served: tuple[Source, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And even when there is one on every connection, others are answered behind it."""
    monkeypatch.setattr(server, "DEADLINE_S", 1.0)
    _, url = served
    at = urlsplit(url)
    slow = [socket.create_connection((at.hostname, at.port)) for _ in range(server.CONNECTIONS + 2)]
    stop = threading.Event()

    def trickle() -> None:
        while not stop.wait(0.1):
            for s in slow:
                with contextlib.suppress(OSError):
                    s.sendall(b"G")

    t = threading.Thread(target=trickle)
    t.start()
    try:
        began = time.monotonic()
        assert get(url + "/healthz")[0] == 200
        assert 0.5 < time.monotonic() - began < 6
    finally:
        stop.set()
        t.join()
        for s in slow:
            s.close()


def test_one_document_is_made_at_a_time() -> None:
    """Many readers cost the controller no more at once than one."""
    now, most, lock = [0], [0], threading.Lock()

    def status() -> dict[str, object]:
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.02)
        with lock:
            now[0] -= 1
        return empty("web1", "primary").to_json()

    running = server.start("127.0.0.1:0", status)
    url = f"http://127.0.0.1:{running.port}"
    codes: list[int] = []
    paths = ["/metrics", "/status.json", "/healthz", "/readyz"] * 5
    threads = [threading.Thread(target=lambda p=p: codes.append(get(url + p)[0])) for p in paths]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    running.close()
    assert len(codes) == 20 and set(codes) == {200, 503} and most == [1]


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "LOCALHOST"])
def test_its_own_names(served: tuple[Source, str], host: str) -> None:
    _, url = served
    port = urlsplit(url).port
    for header in (host, f"{host}:{port}", f"{host}:8080"):  # a tunnel's port is another one
        assert get(url + "/status.json", Host=header)[0] == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:9847", "127.0.0.1.evil.example", "localhost.evil.example", "",
     "[::1", "localhost@evil.example", "a b", "127.0.0.1:99x", "0.0.0.0", "[::ffff:7f00:1]"],
)  # fmt: skip
def test_another_sites_name_reads_nothing(served: tuple[Source, str], host: str) -> None:
    """A page of evil.example, whose name resolves to 127.0.0.1 by now."""
    _, url = served
    for path in ("/", "/status.json", "/metrics", "/history.json", "/no"):
        said = raw(url, f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert b" 421 " in said.split(b"\r\n")[0] and b"web1" not in said
        assert b"Host header is none of" in said


def test_health_checks_without_a_name_are_answered(served: tuple[Source, str]) -> None:
    assert b" 200 " in raw(served[1], b"GET /healthz HTTP/1.0\r\n\r\n")


def test_what_listens_elsewhere_has_names_of_its_own() -> None:
    assert server.hosts_of("192.0.2.1:9847") is None and server.hosts_of("[2001:db8::1]:1") is None
    assert server.hosts_of("127.0.0.5:9847") == {"localhost", "127.0.0.1", "::1", "127.0.0.5"}


def test_it_listens_on_ipv6() -> None:
    with serving("[::1]:0") as (_, url):
        assert get(url + "/healthz")[0] == 200
        assert get(url + "/healthz", Host="evil.example")[0] == 421


def test_rows_behind_a_number(served: tuple[Source, str]) -> None:
    history = History(1000.0)
    doc = empty("web1", "primary").to_json()
    for i in range(3):
        history.add(doc, 1000.0 + 10 * i, 10.0 * i)
    with serving(history=history) as (_, url):
        everything = json.loads(get(url + "/history.json")[1])
        assert [r[0] for r in everything["rows"]] == [1000, 1010, 1020]
        assert everything["last"] == 3 and everything["began"] == 1000.0
        assert [r[0] for r in json.loads(get(url + "/history.json?after=2")[1])["rows"]] == [1020]
        assert json.loads(get(url + "/history.json?after=3")[1])["rows"] == []


def test_it_closes_while_clients_are_there(served: tuple[Source, str]) -> None:
    running = server.start("127.0.0.1:0", Source())
    idle = [socket.create_connection(("127.0.0.1", running.port)) for _ in range(20)]
    time.sleep(0.2)
    began = time.monotonic()
    running.close()
    assert time.monotonic() - began < 1.5
    for s in idle:
        s.close()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", running.port), timeout=1)
