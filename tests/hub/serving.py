"""HTTP for the loopback Hub: bodies, ranges, the record of requests, and faults on the way."""

import json
import re
import socket
import struct
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import Fault
from .repositories import Refused


@dataclass
class Request:
    """A request as the record keeps it: that a token came, not which one."""

    method: str
    path: str
    authorized: bool
    status: int | None = None
    token: str | None = field(default=None, repr=False)
    query: dict[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)

    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(content: object, status: int = 200, **headers: str) -> Answer:
    own = {"Content-Type": "application/json; charset=utf-8"}
    return Answer(status, json.dumps(content).encode(), {**own, **headers})


def as_error(refused: Refused, **headers: str) -> Answer:
    headers["X-Error-Message"] = refused.message
    if refused.code:
        headers["X-Error-Code"] = refused.code
    return as_json({"error": refused.message}, refused.status, **headers)


class Ended(Exception):
    """The connection is gone, and no answer with it."""


class Server(ThreadingHTTPServer):
    """A server on a free port of the loopback interface; `routes` name methods of `target`."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, hub: Any, routes: list[tuple[str, str, str]]) -> None:
        self.hub = hub
        self.routes = [(method, re.compile(path), name) for method, path, name in routes]
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def route(self, request: Request) -> Answer:
        for method, pattern, name in self.routes:
            match = pattern.fullmatch(request.path)
            if match and method in (request.method, "GET" if request.method == "HEAD" else None):
                named = {k: unquote(v) for k, v in match.groupdict(default="").items()}
                return getattr(self.hub, name)(request, **named)
        raise Refused(404, f"The loopback Hub has no {request.method} {request.path}")

    def handle_error(self, request: object, client_address: object) -> None:
        """Stay silent when a client leaves; what fails in a route is answered as 500."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: the second would wait for the client's delayed answer.
    disable_nagle_algorithm = True
    server: Server

    def any_method(self) -> None:
        address = urlsplit(self.path)
        token = self.headers.get("Authorization")
        query = {k: v[-1] for k, v in parse_qs(address.query).items()}
        request = Request(self.command, address.path, token is not None, None, token, query)
        hub = self.server.hub
        hub.requests.append(request)
        fault = hub.faults.meets(self.command, address.path)
        try:
            if fault and fault.kind == "reset":
                self.read_body(fault.after)
                raise Ended
            request.body = self.read_body()
            if fault and fault.kind == "stall":
                fault.released.wait()
                if hub.stopped.is_set():
                    raise Ended
            answer = self.answer(request, fault)
            if fault and fault.kind == "lose":
                raise Ended
        except Ended:
            self.reset()
            return
        finally:
            # The record tells that a token came, and keeps none.
            request.token, request.body = None, b""
        self.take_range(answer)
        request.status = answer.status
        self.send(answer, fault.after if fault and fault.kind == "truncate" else None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = any_method

    def answer(self, request: Request, fault: Fault | None) -> Answer:
        try:
            if fault and fault.kind == "status":
                message = {
                    401: "Invalid credentials in Authorization header",
                    403: "Forbidden: you need write access",
                }.get(fault.status, "Service Unavailable")
                return as_error(Refused(fault.status, message, fault.code), **fault.headers)
            return self.server.route(request)
        except Refused as refused:
            return as_error(refused, **refused.headers)
        except Exception as error:
            # A client retries some 5xx: a fault of the loopback itself is to be seen at once.
            return as_error(Refused(599, f"{type(error).__name__}: {error}".replace("\n", " ")))

    def read_body(self, limit: int | None = None) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            pieces, size = [], 0
            while limit is None or size < limit:
                length = int(self.rfile.readline(), 16)
                pieces.append(self.rfile.read(length))
                size += length
                self.rfile.readline()
                if not length:
                    break
            return b"".join(pieces)
        length = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(length if limit is None else min(limit, length))

    def take_range(self, answer: Answer) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and answer.status == 200:
            size = len(answer.body)
            first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
            answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
            answer.status, answer.body = 206, answer.body[first : last + 1]

    def send(self, answer: Answer, limit: int | None) -> None:
        self.send_response(answer.status)
        own = {"Content-Length": str(len(answer.body)), "Accept-Ranges": "bytes"}
        for name, value in {**own, **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[:limit])
        if limit is not None:
            self.close_connection = True

    def reset(self) -> None:
        """End the connection at once; the client sees a reset, not an orderly end."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.rfile.close()
        self.wfile.close()
        self.connection.close()

    def log_message(self, *arguments: object) -> None:
        """The record of requests is the log."""
