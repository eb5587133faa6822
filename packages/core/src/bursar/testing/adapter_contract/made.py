"""What the contract of adapters is made of: what an adapter's author supplies, and the fixtures of its tests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest

from bursar import Budget, Bursar, UsageRecord
from bursar.testing.provider import Answer, Provider

INPUT_TOKENS = 1_000
OUTPUT_TOKENS = 500
COST_NANOS = 7_500_000  # of INPUT_TOKENS and OUTPUT_TOKENS of gpt-4o
WARM_CALLS = 50
BUDGETED = 10
PROMPT = "abc " * INPUT_TOKENS
STYLES = ("call", "acall", "stream", "astream")


class Base:
    """What an adapter's author supplies, and what every part of the contract starts from."""

    lacks: frozenset[str] = frozenset()

    def install(self, bursar: Bursar) -> AbstractContextManager[Any]:
        """Switch the adapter on for this Bursar until the context ends."""
        raise NotImplementedError("an adapter's test class supplies install(bursar)")

    def call(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        """One plain call; what it returns does not matter."""
        raise NotImplementedError("an adapter's test class supplies call(...)")

    async def acall(
        self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30, n: int = 1, retries: int = 0
    ) -> Any:
        """The same, asynchronous."""
        raise NotImplementedError("an adapter's test class supplies acall(...)")

    def stream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> Iterator[Any]:
        """One streamed call: its chunks."""
        raise NotImplementedError("an adapter's test class supplies stream(...)")

    def astream(self, url: str, prompt: str, *, max_tokens: int = 500, timeout_s: float = 30) -> AsyncIterator[Any]:
        """The same, asynchronous."""
        raise NotImplementedError("an adapter's test class supplies astream(...)")

    def agent(self, url: str, prompt: str, tool: Callable[[str], str]) -> Any:
        """Run an agent named `planner` with one tool named `search` (an argument `query`) to its end."""
        raise NotImplementedError("an adapter's test class supplies agent(...)")

    def embed(self, url: str, texts: Sequence[str]) -> Any:
        """Embed texts with text-embedding-3-small."""
        raise NotImplementedError("an adapter's test class supplies embed(...)")

    def cached(self, url: str, prompt: str) -> Any:
        """The same plain call twice, the second one answered by the framework's own cache."""
        raise NotImplementedError("an adapter's test class supplies cached(...)")

    def fall_back(self, url: str, prompt: str) -> Any:
        """One plain call that the framework makes to a second model, gpt-4o too, where the first one fails."""
        raise NotImplementedError("an adapter's test class supplies fall_back(...)")

    # -- helpers -------------------------------------------------------------------------------------------------

    def consume(self, style: str, url: str, prompt: str = PROMPT, **options: Any) -> Any:
        """One call in this style, to its end."""
        if style == "call":
            return self.call(url, prompt, **options)
        if style == "acall":
            return asyncio.run(_awaited(self.acall(url, prompt, **options)))
        if style == "stream":
            return list(self.stream(url, prompt, **options))
        return asyncio.run(_listed(self.astream(url, prompt, **options)))

    def need(self, feature: str) -> None:
        if feature in self.lacks:
            pytest.skip(f"this framework has no {feature}")

    def warm(self, bursar: Bursar) -> None:
        """Let the guard learn what such calls use."""
        for _ in range(WARM_CALLS):
            with bursar.call(
                "openai", "gpt-4o", messages=PROMPT, max_output_tokens=500, tags={"agent": "warm-up"}
            ) as call:
                call.settle(
                    {"model": "gpt-4o", "usage": {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}}
                )

    @pytest.fixture
    def provider(self) -> Iterator[Provider]:
        """Answers of $0.0075 each."""
        with Provider(Answer(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, chunks=10)) as provider:
            yield provider

    @pytest.fixture
    def bursar(self) -> Iterator[Bursar]:
        """A budget that never runs out."""
        with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
            yield bursar

    @contextlib.contextmanager
    def capped(self, limit: str = "0.078 USD", **options: Any) -> Iterator[Bursar]:
        """A budget for ten calls, warmed by calls outside of it, with the adapter on."""
        budget = Budget("cap", limit, match={"team": "capped"}, **options)
        with Bursar("memory:", [budget]) as bursar:
            self.warm(bursar)
            with self.install(bursar), bursar.scope(team="capped"):
                yield bursar


def records(bursar: Bursar) -> list[UsageRecord]:
    """The records of what the test called, without those of the warm-up."""
    return [record for record in bursar.records() if record.tags.get("agent") != "warm-up"]


def covered(bursar: Bursar, provider: Provider) -> None:
    """Nothing is open, and the ledger equals the provider's account, or exceeds it by estimated records alone."""
    provider.wait_idle()
    assert bursar.store.open_reservations() == 0
    calls = [record for record in records(bursar) if "model" in record.tags]
    ledger = sum(record.cost_nanos for record in calls)
    known = sum(record.cost_nanos for record in calls if not record.estimated)
    assert known <= provider.billed_nanos <= ledger, [(r.kind, r.outcome, r.reason, r.cost_nanos) for r in calls]
    if known == ledger:
        assert ledger == provider.billed_nanos


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


async def _listed(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]
