# SPDX-License-Identifier: GPL-2.0-or-later
"""The HTTP endpoint: metrics, health paths, the status document, its history and the status page.

It only reads. Whatever a client sends, others are still answered: each connection has a thread and
a deadline, their number is bounded, and the controller is asked for one document at a time.
"""

from __future__ import annotations

import io
import ipaddress
import json
import logging
import re
import selectors
import socket
import socketserver
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qs
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler, WSGIServer

from . import page
from .history import History
from .metrics import Document, application

log = logging.getLogger("colo_xdp.status.server")

#: for a request to arrive, and again for its answer to leave
DEADLINE_S = 3.0
#: connections that are answered at the same time; others wait in the listen queue
CONNECTIONS = 8
#: for the documents that others have asked for before
TURN_S = 5.0

_TEXT, _JSON = "text/plain; charset=utf-8", "application/json"
_PATHS = (
    "/", "/metrics", "/healthz", "/readyz", "/primary", "/secondary", "/status.json",
    "/history.json",
)  # fmt: skip
#: of every answer: no other site's page frames, embeds or reads it, and no cache keeps it
_HEADERS = (
    ("Content-Security-Policy", page.CONTENT_SECURITY_POLICY),
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Resource-Policy", "same-origin"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)

Answer = tuple[int, str, bytes]


def health(path: str, s: Document) -> tuple[int, str] | None:
    """HTTP status and text of the health paths; None for any other path.

    The status is the answer: load balancers and scripts need not read the text.
    """
    state, role = s["state"], s["role"]
    standby = role == "secondary" and state in ("protected", "checkpointing", "paused", "degraded")
    answers = {
        "/healthz": True,
        "/readyz": state in ("protected", "checkpointing", "paused"),
        "/primary": s["active"]["transmitting"],
        "/secondary": standby,
    }
    if path not in answers:
        return None
    return (200 if answers[path] else 503), f"{role} {state}: {s['reason']}\n"


def without_payload(s: Document) -> Document:
    """Return the document without bytes of the guests' streams.

    Every process of the host reads what is here, and what guests differ in is often a secret: a
    session's number, a token. The control socket tells it to those who may know.
    """
    told = [{**d, "pvm": "", "svm": ""} for d in s["divergences"]]
    return {**s, "divergences": told}


def hosts_of(listen: str) -> frozenset[str] | None:
    """Return the names by which a request may call a loopback address; None: by any.

    Any web site can let its name resolve to 127.0.0.1, and its page in a browser on this host would
    read what is here (DNS rebinding). What listens on other addresses has names nobody knows here.
    """
    host = listen.rpartition(":")[0].strip("[]").lower()
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    return frozenset({"localhost", "127.0.0.1", "::1", host}) if loopback else None


def host_in(header: str) -> str:
    """Return the name in a Host header, without brackets and port; "" if it is malformed."""
    m = re.fullmatch(r"(?:\[([0-9a-f:.]+)\]|([^\s:\[\]/@]+))(?::\d{1,5})?", header.strip().lower())
    return (m[1] or m[2]) if m else ""


class Application:
    """What is answered to a request, as a WSGI application."""

    def __init__(
        self, get: Callable[[], Document], history: History, hosts: frozenset[str] | None
    ) -> None:
        self._get, self._history, self._hosts = get, history, hosts
        self._turn = threading.Lock()
        self._metrics = application(self._document)

    def __call__(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        refusal = self._refuse(environ)
        if refusal is None and environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = self._metrics(
                environ | {"REQUEST_METHOD": "GET"},  # it refuses HEAD
                lambda status, headers, exc=None: start(status, [*headers, *_HEADERS]),
            )
            return [] if environ["REQUEST_METHOD"] == "HEAD" else body
        code, kind, text = refusal or self._answer(environ)
        headers = [("Content-Type", kind), ("Content-Length", str(len(text))), *_HEADERS]
        if code == HTTPStatus.METHOD_NOT_ALLOWED:
            headers.append(("Allow", "GET, HEAD"))
        start(f"{code} {HTTPStatus(code).phrase}", headers)
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [text]

    def _refuse(self, environ: dict[str, Any]) -> Answer | None:
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _error(405, "only GET and HEAD: this endpoint changes nothing")
        host = environ.get("HTTP_HOST")  # a browser sends it always
        if self._hosts is not None and host is not None and host_in(host) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            return _error(421, f"the Host header is none of {known}, where this is served")
        if environ["PATH_INFO"] not in _PATHS:
            return _error(404, "not found: this endpoint has " + ", ".join(_PATHS))
        return None

    def _answer(self, environ: dict[str, Any]) -> Answer:
        path = environ["PATH_INFO"]
        if path == "/":
            return 200, "text/html; charset=utf-8", page.HTML
        if path == "/history.json":
            return self._rows(environ.get("QUERY_STRING", ""))
        try:
            s = self._document()
        except (RuntimeError, OSError, TimeoutError) as e:
            return _error(503, str(e) or "the controller does not answer in time")
        if path == "/status.json":
            return 200, _JSON, json.dumps(s).encode()
        found = health(path, s)
        assert found is not None, "_refuse() knows the paths"
        return found[0], _TEXT, found[1].encode()

    def _rows(self, query: str) -> Answer:
        after = parse_qs(query[:64]).get("after", ["0"])[-1]
        if not re.fullmatch(r"[0-9]{1,15}", after):
            return _error(400, "after: expected the number of a row, `last` of an earlier answer")
        return 200, _JSON, self._history.to_json(int(after)).encode()

    def _document(self) -> Document:
        """Return the document. Its making takes the controller's time, so readers take turns."""
        if not self._turn.acquire(timeout=TURN_S):
            raise TimeoutError("too many requests at the same time")
        try:
            return without_payload(self._get())
        finally:
            self._turn.release()


def _error(code: int, text: str) -> Answer:
    return code, _TEXT, f"{text}\n".encode()


class _Arriving(io.RawIOBase):
    """What a connection receives until its deadline, however slowly the bytes trickle in."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock, self._end = sock, time.monotonic() + DEADLINE_S

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = self._end - time.monotonic()
        if left <= 0:
            raise TimeoutError("the request did not arrive in time")
        self._sock.settimeout(left)
        try:
            return self._sock.recv_into(buffer)
        finally:
            self._sock.settimeout(DEADLINE_S)


class _Response(ServerHandler):
    server_software = "colo-xdp"

    def log_exception(self, exc_info: Any) -> None:
        """Log an error of ours; a client that is gone is none."""
        if isinstance(exc_info[1], OSError):
            log.debug("%s", exc_info[1])
        else:
            log.error("a request failed", exc_info=exc_info)


class _Request(WSGIRequestHandler):
    timeout = DEADLINE_S  # for sendall(): in all

    @property
    def app(self) -> Any:
        server: Any = self.server
        return server.get_app()

    def setup(self) -> None:
        super().setup()
        self.rfile = io.BufferedReader(_Arriving(self.connection))

    def handle(self) -> None:
        try:
            self.raw_requestline = self.rfile.readline(65537)
            if len(self.raw_requestline) > 65536:
                self.requestline = self.request_version = self.command = ""
                self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
            elif self.parse_request():  # it has answered otherwise
                make: Any = _Response  # of which typeshed knows other streams than there are
                response = make(
                    self.rfile, self.wfile, self.get_stderr(), self.get_environ(), multithread=True
                )
                response.request_handler = self
                response.run(self.app)
        except OSError as e:  # no TLS, no certificate, too slow, gone
            log.debug("%s: %s", self.client_address, e)

    def version_string(self) -> str:
        return "colo-xdp"

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


class _HttpServer(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, host: str, port: int, app: Any) -> None:
        if ":" in host:
            self.address_family = socket.AF_INET6
        self.free = threading.Semaphore(CONNECTIONS)
        super().__init__((host, port), _Request)
        self.set_app(app)
        self.timeout = 0  # handle_request() is called when there is one

    def server_bind(self) -> None:
        """Bind without asking DNS for the address's name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.socket.getsockname()[:2]
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread. Who comes while all are busy waits here: each has a deadline."""
        self.free.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("%s", client_address, exc_info=True)


class Server:
    """HTTP in threads of its own."""

    def __init__(
        self,
        listen: str,
        get: Callable[[], Document],
        tls: tuple[str, str, str] | None = None,
        history: History | None = None,
    ) -> None:
        host, _, port = listen.rpartition(":")
        # A browser lets nobody else use a name for which there is a certificate.
        hosts = None if tls else hosts_of(listen)
        app = Application(get, history or History(time.time()), hosts)
        self._httpd = _HttpServer(host.strip("[]"), int(port), app)
        if tls:
            self._httpd.socket = _client_tls(*tls).wrap_socket(
                self._httpd.socket, server_side=True, do_handshake_on_connect=False
            )
        self.port = self._httpd.server_port
        self._end, self._ended = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        """Answer until close(). serve_forever() would wake up to see whether it is to end."""
        with selectors.DefaultSelector() as ready:
            for sock in (self._httpd, self._ended):
                ready.register(sock, selectors.EVENT_READ)
            while self._ended not in [key.fileobj for key, _ in ready.select()]:
                self._httpd.handle_request()

    def close(self) -> None:
        """Stop answering."""
        self._end.close()
        self._httpd.free.release()  # whom it may wait for
        self._thread.join(2)
        self._httpd.server_close()
        self._ended.close()


def _client_tls(cert: str, key: str, client_ca: str) -> ssl.SSLContext:
    """For readers whose certificate the authority has signed, and nobody else."""
    ctx = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ctx.minimum_version = ssl.TLSVersion.TLSv1_2
    ctx.verify_mode = ssl.CERT_REQUIRED
    ctx.load_cert_chain(cert, key)
    ctx.load_verify_locations(client_ca)
    return ctx


def start(
    listen: str,
    get: Callable[[], Document],
    tls: tuple[str, str, str] | None = None,
    history: History | None = None,
) -> Server:
    """Serve the status page and its sources, metrics and health paths on "host:port".

    `tls`: paths of certificate, key and the readers' authority. Raises OSError when the address
    cannot be bound or a file is not what it should be.
    """
    return Server(listen, get, tls, history)
