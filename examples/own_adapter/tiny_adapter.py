"""An adapter for `tiny`, a chat client of one's own over httpx: what a framework's adapter has to do, in sixty lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import httpx

from bursar import Bursar, Reservation

_guard: list[Bursar] = []  # the guard that is installed, for all threads


class Tiny:
    """The framework: one client, two ways to call it, and the seam around a call that its adapter needs."""

    def __init__(self, url: str, timeout_s: float = 30) -> None:
        self.http = httpx.Client(base_url=url, timeout=timeout_s)

    def chat(self, prompt: str, **more: Any) -> str:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": prompt}], **more}
        with _guarded(body) as reservation:
            response = self.http.post("/v1/chat/completions", json=body)
            response.raise_for_status()  # the block sees the status: a 4xx is released, a 5xx may have been billed
            answer = response.json()
            if reservation is not None:
                reservation.settle(answer, headers=dict(response.headers))
        return str(answer["choices"][0]["message"]["content"])

    def stream(self, prompt: str, **more: Any) -> Iterator[dict[str, Any]]:
        body = {"model": "gpt-4o", "messages": [{"role": "user", "content": prompt}], "stream": True, **more}
        body["stream_options"] = {"include_usage": True}  # else OpenAI's streams say nothing of usage
        events: list[dict[str, Any]] = []
        # A generator that is closed or forgotten leaves the block, and what was reserved is booked.
        with _guarded(body) as reservation, self.http.stream("POST", "/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line.removeprefix("data: ")))
                    yield events[-1]
            if reservation is not None:
                reservation.settle(events)


def _guarded(body: dict[str, Any]) -> AbstractContextManager[Reservation | None]:
    """The gate: BudgetExceeded is raised here, before anything is sent, and reaches the caller as it is."""
    return _guard[0].call("openai", body["model"], body=body) if _guard else _nothing()


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def install(bursar: Bursar) -> Iterator[None]:
    """Guard every call of `tiny` until the context ends."""
    _guard.append(bursar)
    try:
        yield
    finally:
        _guard.remove(bursar)
