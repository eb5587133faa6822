"""A provider of whatever the test says, over real HTTP: for endpoints that `bursar.testing.provider` does not serve."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple, Self


class Canned(NamedTuple):
    """One answer: JSON for a dict, else the bytes as they are."""

    body: Any
    kind: str = "application/json"
    headers: Mapping[str, str] = {}
    status: int = 200


Route = Callable[[bytes], Canned]


class CannedProvider:
    """Serves `routes`, by method and path; `requests` holds what arrived, as (method, path, body)."""

    def __init__(self, routes: Mapping[str, Canned | Route]) -> None:
        self.requests: list[tuple[str, str, bytes]] = []
        provider = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = self.path.partition("?")[0]
                provider.requests.append((self.command, path, body))
                found = routes.get(f"{self.command} {path}", Canned({"error": {"message": "none"}}, status=404))
                answer = found if isinstance(found, Canned) else found(body)
                data = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
                self.send_response(answer.status)
                for name, value in {
                    "Content-Type": answer.kind,
                    "Content-Length": str(len(data)),
                    **answer.headers,
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            do_GET = do_DELETE = do_POST

            def log_message(self, format: str, *args: Any) -> None:
                """Say nothing: `requests` holds what happened."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
