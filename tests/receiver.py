"""What delivery of alerts is tested against: a real HTTP receiver that can fail in every way, and alerts in a real store."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from bursar.alerts import Alert
from bursar.commands import Tell
from bursar.stores.base import Store

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


def tell(store: Store, number: int, kind: str = "threshold", budget: str = "team", **facts: Any) -> str:
    """Put an alert into a store's outbox, with an id of its own; the id."""
    alert = an_alert(number, 0, kind, budget, **facts)
    store.execute(Tell(alert.id, kind, alert.facts))
    return alert.id


def an_alert(number: int, at_us: int, kind: str = "threshold", budget: str = "team", **facts: Any) -> Alert:
    """An alert as a store would give it."""
    facts = {"unit": "USD", "limit": 10_000_000_000, "spent": 8_000_000_000, "at": 8_000_000_000, **facts}
    return Alert(f"alert-{kind}-{budget}-{number}", kind, at_us, {"budget": budget, **facts})


def untold(store: Store) -> list[str]:
    """What still waits in the outbox."""
    return [alert.id for alert, told in store.alerts() if not told]
