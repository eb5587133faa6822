"""The gate: LlamaIndex asks an object's rate limiter last before it sends, in a place where an async caller can wait."""

from __future__ import annotations

from typing import Any

from llama_index.core.rate_limiter import BaseRateLimiter

from bursar_llamaindex.answer import released
from bursar_llamaindex.calls import Call
from bursar_llamaindex.embedded import sending
from bursar_llamaindex.spans import Span, current


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
            sending.set(tuple(calls))
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
            sending.set(tuple(calls))
        except BaseException:
            _give_back(calls)
            raise

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "limiter":
            raise AttributeError(name)
        return getattr(self.limiter, name)


def _announced() -> list[Call]:
    """The calls of the next announced event of this span: one for each guard. A batch announces all its events first."""
    span = current()
    if span is None or not span.pending:
        return []  # a call inside of a call that is reserved already, or one that no guard is for
    if span.failed is not None:
        _forget_first(span)
        raise span.failed  # the rest of a batch of which a part was refused or failed
    return _forget_first(span)


def _forget_first(span: Span) -> list[Call]:
    calls = [span.pending.popleft()]
    while span.pending and span.pending[0].event == calls[0].event:
        calls.append(span.pending.popleft())
    return calls


def _give_back(calls: list[Call]) -> None:
    for call in calls:
        call.end(released("not sent: another guard refused it"))
