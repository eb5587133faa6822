"""What delivery of alerts is tested against: a real HTTP receiver that can fail in every way, and an outbox in memory."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from bursar.alerts import Alert
from bursar.testing import ManualClock

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()


class Got(NamedTuple):
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: bytes
    status: int

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]

    @property
    def at_s(self) -> int:
        return int(self.headers["webhook-timestamp"])

    @property
    def alerts(self) -> list[str]:
        return [alert["id"] for alert in json.loads(self.body)["data"]["alerts"]]

    def is_signed(self, key: bytes = KEY) -> bool:
        """By the specification, written again from its text: id, time and body, each joined by a full stop."""
        content = b".".join([self.id.encode(), str(self.at_s).encode(), self.body])
        wanted = "v1," + base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
        return wanted in self.headers["webhook-signature"].split(" ") and "." not in self.id


class Receiver:
    """An HTTP server that answers with `statuses` in turn, the last for good; 0 takes the request and cuts the line.

    `answers`: header fields of every answer. While `held` is not set, requests hang. Close and open it at the same port.
    """

    def __init__(self, *statuses: int, **answers: str) -> None:
        self.statuses = list(statuses) or [200]
        self.got: list[Got] = []
        self.arrived = threading.Semaphore(0)
        self.held = threading.Event()
        self.held.set()
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                status = receiver.statuses.pop(0) if len(receiver.statuses) > 1 else receiver.statuses[0]
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.got.append(Got(self.path, headers, body, status))
                receiver.arrived.release()
                receiver.held.wait(30)
                if status:
                    self.send_response(status)
                    for name, value in answers.items():
                        self.send_header(name.replace("_", "-"), value)
                    self.send_header("content-length", "0")
                    self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                """Nothing: the test says what failed."""

        self._handler = Handler
        self.port = 0
        self.open()

    def open(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), self._handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.held.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/hook"

    @property
    def taken(self) -> list[str]:
        """The alerts of the requests that were answered with success."""
        return [id for got in self.got if 200 <= got.status < 300 for id in got.alerts]

    def __enter__(self) -> Receiver:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryOutbox:
    """An outbox that several deliverers share."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock
        self.rows: dict[str, tuple[Alert, int, int]] = {}  # alert, when it is due, earlier attempts
        self._lock = threading.Lock()

    def put(self, *alerts: Alert) -> None:
        self.rows |= {alert.id: (alert, 0, 0) for alert in alerts}

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        with self._lock:
            now_us = self.clock.now_us()
            due = [(alert, tries) for alert, due_us, tries in self.rows.values() if due_us <= now_us][:limit]
            for alert, tries in due:
                self.rows[alert.id] = (alert, now_us + lease_us, tries + 1)
            return due

    def delivered(self, ids: Iterable[str]) -> None:
        with self._lock:
            for id in ids:
                self.rows.pop(id, None)

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        with self._lock:
            for id in ids:
                if id in self.rows:
                    alert, _, tries = self.rows[id]
                    self.rows[id] = (alert, at_us, tries)


def alert(number: int, at_us: int, kind: str = "threshold", budget: str = "team", **facts: Any) -> Alert:
    """An alert with an id of its own."""
    facts = {"unit": "USD", "limit": 10_000_000_000, "spent": 8_000_000_000, "mark": 80, **facts}
    return Alert(f"alert-{kind}-{budget}-{number}", kind, at_us, {"budget": budget, **facts})
