"""The HTTP side of the provider: loopback, HTTP/1.1 with keep-alive, one thread a connection, faults on the wire."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http.client import responses
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, cast
from urllib.parse import urlsplit

from bursar.testing.provider.account import Account, Served
from bursar.testing.provider.script import Fault
from bursar.testing.provider.wire import Event, dumps

MAX_REQUEST_BYTES = 64 * 2**20
STOP_S = 10.0


@dataclass(slots=True, kw_only=True)
class Reply:
    """What goes out for one request. `events` None: the plain `body`."""

    entry: Served
    headers: Mapping[str, str] = field(default_factory=dict)
    body: Any = None
    events: Sequence[Event] | None = None
    sse: bool = True
    fault: Fault | None = None
    latency_s: float = 0.0
    event_delay_s: float = 0.0


# (path, query, parsed body; None where it is no JSON object) -> what goes out
Planner = Callable[[str, str, Mapping[str, Any] | None], Reply]


class Server(ThreadingHTTPServer):
    """Carries hundreds of clients; `stop` ends every connection and returns when their threads are done."""

    request_queue_size = 1024

    def __init__(self, port: int, plan: Planner, account: Account) -> None:
        self.plan = plan
        self.account = account
        self.stopping = threading.Event()
        self.failures: list[BaseException] = []
        self._lock = threading.Lock()
        self._connections: dict[socket.socket, threading.Thread] = {}
        super().__init__(("127.0.0.1", port), _Handler)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name="bursar-provider", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop(self) -> None:
        """End all connections, wait for their threads, close; raises what went wrong inside the server."""
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        with self._lock:
            open_connections = dict(self._connections)
        deadline_s = time.monotonic() + STOP_S
        for connection in open_connections:
            _cut(connection)
        for thread in open_connections.values():
            thread.join(max(0.0, deadline_s - time.monotonic()))
        self.server_close()
        if self.failures:
            raise self.failures[0]
        if any(thread.is_alive() for thread in open_connections.values()):
            raise RuntimeError(f"Connections of the provider did not end within {STOP_S:.0f} s.")

    def process_request(self, request: Any, client_address: Any) -> None:
        thread = threading.Thread(target=self.process_request_thread, args=(request, client_address), daemon=True)
        with self._lock:
            self._connections[request] = thread
        thread.start()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._lock:
                del self._connections[request]

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exception()
        if error is not None and not isinstance(error, OSError):  # a client that went away is no failure of the server
            self.failures.append(error)


class _ClientGone(Exception):
    """The client closed its side before the answer was whole."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: the account holds what happened."""

    def do_POST(self) -> None:
        self.server.account.arrive()
        try:
            arrived_s = time.monotonic()
            length = int(self.headers.get("Content-Length") or 0)
            if length > MAX_REQUEST_BYTES or "Transfer-Encoding" in self.headers:
                length, self.close_connection = 0, True  # what is not read must not be taken for the next request
            raw = self.rfile.read(length)
            url = urlsplit(self.path)
            reply = self.server.plan(url.path, url.query, _json_object(raw))
            try:
                self._send(reply, arrived_s)
            except (_ClientGone, ConnectionError):
                self.close_connection = True
                reply.entry.client_gone = not self.server.stopping.is_set()
            reply.entry.done = True
        finally:
            self.server.account.leave()

    do_GET = do_POST

    def _send(self, reply: Reply, arrived_s: float) -> None:
        self._wait(arrived_s + reply.latency_s - time.monotonic())
        fault = reply.fault
        if fault is not None and fault.kind in ("drop", "hang") and _place(fault) == 0:
            return self._break_off(fault)
        head = {"x-request-id": reply.entry.id, **reply.headers}
        if reply.events is None:
            return self._send_body(reply, head)
        head["Content-Type"] = "text/event-stream; charset=utf-8" if reply.sse else "application/json; charset=utf-8"
        self._write_head(reply.entry.status, head | {"Transfer-Encoding": "chunked"})
        breaks_at = min(_place(fault), len(reply.events) - 1) if fault is not None else None
        for index, (name, data) in enumerate(reply.events):
            if index:
                self._wait(reply.event_delay_s)
            text = data if isinstance(data, str) else dumps(data)
            if fault is not None and index == breaks_at:
                if fault.kind in ("drop", "hang"):
                    return self._break_off(fault)
                if fault.kind == "malformed":
                    text = text[: len(text) // 2]
            self._write_chunk(_framed(name, text, reply, index))
            reply.entry.events_sent = index + 1
        self._write(b"0\r\n\r\n")

    def _send_body(self, reply: Reply, head: dict[str, str]) -> None:
        body, fault = dumps(reply.body).encode(), reply.fault
        if fault is not None and fault.kind == "malformed":
            body = body[: len(body) // 2]
        is_broken = fault is not None and fault.kind in ("drop", "hang")
        head |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
        self._write_head(reply.entry.status, head, body[: len(body) // 2] if is_broken else body)
        if is_broken:
            self._break_off(cast(Fault, fault))

    def _break_off(self, fault: Fault) -> None:
        if fault.kind == "hang":
            while True:
                self._wait(60.0)  # ends by _ClientGone
        self.close_connection = True
        _cut(self.connection)

    def _wait(self, seconds: float) -> None:
        """Let time pass while watching the client; raises _ClientGone as soon as it closes or the server stops."""
        if self.server.stopping.is_set():
            raise _ClientGone
        if seconds <= 0:
            return
        self.connection.settimeout(seconds)
        begun_s = time.monotonic()
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                raise _ClientGone
        except TimeoutError:
            return
        finally:
            self.connection.settimeout(None)
        # The client has sent its next request ahead: that one can wait.
        self.server.stopping.wait(begun_s + seconds - time.monotonic())

    def _write_head(self, status: int, head: Mapping[str, str], body: bytes = b"") -> None:
        lines = [
            f"HTTP/1.1 {status} {responses.get(status, 'Status')}",
            *(f"{name}: {value}" for name, value in head.items()),
        ]
        if self.close_connection:
            lines.append("Connection: close")
        self._write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def _write_chunk(self, data: bytes) -> None:
        self._write(b"%x\r\n%s\r\n" % (len(data), data))

    def _write(self, data: bytes) -> None:
        self.connection.sendall(data)


def _place(fault: Fault) -> int:
    """After how many events a fault strikes."""
    if fault.after_events is not None:
        return fault.after_events
    return 0 if fault.kind == "hang" else 1


def _framed(name: str | None, text: str, reply: Reply, index: int) -> bytes:
    """One event on the wire: a server-sent event, or an element of Gemini's JSON array."""
    if reply.sse:
        return f"event: {name}\ndata: {text}\n\n".encode() if name else f"data: {text}\n\n".encode()
    opening = "[" if index == 0 else ",\r\n"
    is_last = index == len(reply.events or ()) - 1
    return f"{opening}{text}{']' if is_last else ''}".encode()


def _json_object(raw: bytes) -> Mapping[str, Any] | None:
    try:
        body = json.loads(raw)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


def _cut(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # the client was faster
