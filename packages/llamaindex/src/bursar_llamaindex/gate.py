"""The gate: LlamaIndex asks an object's rate limiter last before it sends, in a place where an async caller can wait."""

from __future__ import annotations

from typing import Any

from llama_index.core.rate_limiter import BaseRateLimiter

from bursar.ending import released
from bursar_llamaindex.calls import Call
from bursar_llamaindex.embedded import announce_sending
from bursar_llamaindex.spans import current


class Gate(BaseRateLimiter):
    """Stands for an object's rate limiter: asks the one that the object had, if any, and then the budgets.

    Raises what `Bursar.reserve` raises; LlamaIndex hands it to the caller as it is, and nothing is sent.
    """

    def __init__(self, limiter: Any = None) -> None:
        self.limiter = limiter

    def acquire(self, num_tokens: int = 0) -> None:
        if self.limiter is not None:
            self.limiter.acquire(num_tokens)
        calls = _announced()
        try:
            for call in calls:
                call.reserve()
            announce_sending(calls)
        except BaseException:
            _give_back(calls)
            raise

    async def async_acquire(self, num_tokens: int = 0) -> None:
        if self.limiter is not None:
            await self.limiter.async_acquire(num_tokens)
        calls = _announced()
        try:
            for call in calls:
                await call.areserve()
            announce_sending(calls)
        except BaseException:
            _give_back(calls)
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "limiter":
            raise AttributeError(name)
        return getattr(self.limiter, name)


def _announced() -> list[Call]:
    span = current()
    return [] if span is None else span.next_pending()


def _give_back(calls: list[Call]) -> None:
    for call in calls:
        call.end(released("not sent: another guard refused it"))
