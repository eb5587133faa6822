"""The contract of adapters: what every adapter must do, as a pytest class that its tests derive from."""

from __future__ import annotations

import asyncio
import contextlib
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest

from bursar import Budget, BudgetExceeded, Bursar, StoreError, UsageRecord
from bursar.testing.provider import Answer, Fault, Provider

INPUT_TOKENS = 1_000
OUTPUT_TOKENS = 500
COST_NANOS = 7_500_000  # of INPUT_TOKENS and OUTPUT_TOKENS of gpt-4o
WARM_CALLS = 50
BUDGETED = 10
PROMPT = "abc " * INPUT_TOKENS
STYLES = ("call", "acall", "stream", "astream")


class AdapterContract:
    """Derive a test class, supply `install` and the calls below, and run it with pytest.

    The calls go to an OpenAI-compatible provider on `url` (its base URL is `url + "/v1"`) for the model gpt-4o, without
    retries of the client's own unless `retries` says so. `max_tokens` is the request's maximum output, `timeout_s` the
    client's time-out, `n` the number of answers. Streams yield their chunks lazily, and usage is switched on by the
    adapter or by the call where the framework leaves it off. Features that a framework does not have are named in
    `lacks`: "n", "agent", "embed", "retries", or a call style.
    """

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

    # -- the gate ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("style", STYLES)
    def test_a_refusal_sends_nothing(self, style: str, provider: Provider) -> None:
        """The user's code sees BudgetExceeded, with its fields, and the provider sees no request."""
        self.need(style)
        with self.capped("0.001 USD") as bursar:
            with pytest.raises(BudgetExceeded) as caught:
                self.consume(style, provider.url)
            assert caught.value.budget == "cap"
            assert str(caught.value.limit) == "0.001"
            assert provider.requests == 0
            assert len([r for r in records(bursar) if r.outcome == "blocked"]) == 1
            assert bursar.store.open_reservations() == 0

    @pytest.mark.parametrize("style", STYLES)
    def test_a_call_settles_to_what_the_provider_billed(self, style: str, provider: Provider, bursar: Bursar) -> None:
        self.need(style)
        with self.install(bursar):
            self.consume(style, provider.url)
        provider.wait_idle()
        (record,) = records(bursar)
        assert (record.outcome, record.estimated) == ("completed", False)
        assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (INPUT_TOKENS, OUTPUT_TOKENS)
        assert record.cost_nanos == provider.billed_nanos == COST_NANOS
        assert (record.tags["provider"], record.tags["model"]) == ("openai", "gpt-4o")
        assert record.tags["connection"]
        assert record.tags["run"]

    def test_the_scope_and_two_event_loops(self, provider: Provider, bursar: Bursar) -> None:
        """A scope's tags reach the record, in every loop."""
        self.need("acall")
        with self.install(bursar):
            for run in ("first", "second"):
                with bursar.scope(team="research", run=run):
                    self.consume("acall", provider.url)
        assert [(r.tags["team"], r.tags["run"]) for r in records(bursar)] == [
            ("research", "first"),
            ("research", "second"),
        ]

    def test_several_answers_are_one_bill(self, provider: Provider, bursar: Bursar) -> None:
        self.need("n")
        with self.install(bursar):
            self.call(provider.url, PROMPT, n=3)
        (record,) = records(bursar)
        assert record.usage["output_tokens"] == 3 * OUTPUT_TOKENS
        assert record.cost_nanos == provider.billed_nanos

    def test_an_internal_failure_fails_closed(self, provider: Provider, bursar: Bursar) -> None:
        """I12: while the store is out of reach nothing is sent."""
        with self.install(bursar):
            bursar.store.close()
            with pytest.raises(StoreError):
                self.call(provider.url, PROMPT)
            assert provider.requests == 0

    # -- what goes wrong -----------------------------------------------------------------------------------------

    @pytest.mark.parametrize("style", STYLES)
    @pytest.mark.parametrize(
        "fault",
        [
            Fault("refuse", status=429),
            Fault("refuse", status=500),
            Fault("drop", after_events=2),
            Fault("malformed"),
            Fault("no_usage"),
        ],
        ids=["429", "500", "cut", "malformed", "no_usage"],
    )
    def test_what_goes_wrong_is_covered(self, fault: Fault, style: str, provider: Provider, bursar: Bursar) -> None:
        """The ledger covers the bill: equal, or above it by entries marked estimated; a 429 itself costs nothing."""
        self.need(style)
        provider.script([fault])
        with self.install(bursar), contextlib.suppress(Exception):
            self.consume(style, provider.url)
        covered(bursar, provider)
        if fault.status == 429 and fault.kind == "refuse":
            assert sum(record.cost_nanos for record in records(bursar)) == provider.billed_nanos

    def test_a_client_that_gives_up_is_billed(self, provider: Provider, bursar: Bursar) -> None:
        provider.script([Fault("hang")])
        with self.install(bursar), contextlib.suppress(Exception):
            self.call(provider.url, PROMPT, timeout_s=0.2)
        covered(bursar, provider)
        assert [record.estimated for record in records(bursar)] == [True]

    def test_a_cancelled_call_is_billed(self, provider: Provider, bursar: Bursar) -> None:
        self.need("acall")
        provider.script([Fault("hang")])

        async def cancelled() -> None:
            task = asyncio.ensure_future(self.acall(provider.url, PROMPT))
            await asyncio.to_thread(provider.wait_requests, 1)
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task

        with self.install(bursar):
            asyncio.run(cancelled())
        covered(bursar, provider)
        assert [record.estimated for record in records(bursar)] == [True]

    @pytest.mark.parametrize("style", ["stream", "astream"])
    def test_an_abandoned_stream_is_billed(self, style: str, provider: Provider, bursar: Bursar) -> None:
        self.need(style)
        slow = Answer(input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS, chunks=30, event_delay_s=0.01)
        provider.script([slow])
        with self.install(bursar):
            if style == "stream":
                _leave_early(self.stream(provider.url, PROMPT))
            else:
                asyncio.run(_aleave_early(self.astream(provider.url, PROMPT)))
            gc.collect()
        covered(bursar, provider)
        assert records(bursar)

    def test_the_clients_own_retries_are_one_call(self, provider: Provider, bursar: Bursar) -> None:
        self.need("retries")
        provider.script(
            [Fault("refuse", status=429, retry_after_s=0.001), Fault("refuse", status=429, retry_after_s=0.001)]
        )
        with self.install(bursar):
            self.call(provider.url, PROMPT, retries=2)
        assert provider.requests == 3
        assert sum(record.cost_nanos for record in records(bursar)) == provider.billed_nanos == COST_NANOS

    # -- many at once --------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
    def test_fifty_threads_share_a_budget_for_ten(self, on_exceed: str, provider: Provider) -> None:
        with self.capped(on_exceed=on_exceed) as bursar, ThreadPoolExecutor(50) as pool:

            def one(_: int) -> None:
                with bursar.scope(team="capped"), contextlib.suppress(BudgetExceeded):
                    self.call(provider.url, PROMPT)

            list(pool.map(one, range(50)))
            assert provider.billed_calls == BUDGETED
            covered(bursar, provider)

    @pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
    def test_fifty_tasks_share_a_budget_for_ten(self, on_exceed: str, provider: Provider) -> None:
        self.need("acall")

        async def many() -> None:
            results = await asyncio.gather(
                *(self.acall(provider.url, PROMPT) for _ in range(50)), return_exceptions=True
            )
            assert all(isinstance(one, BudgetExceeded) for one in results if isinstance(one, BaseException))

        with self.capped(on_exceed=on_exceed) as bursar:
            asyncio.run(many())
            assert provider.billed_calls == BUDGETED
            covered(bursar, provider)

    # -- agents and embeddings -----------------------------------------------------------------------------------

    def test_an_agent_and_its_tool_are_attributed(self, provider: Provider, bursar: Bursar) -> None:
        self.need("agent")
        ran: list[str] = []

        def search(query: str) -> str:
            ran.append(query)
            return "found"

        provider.script(
            [
                Answer(tool_calls=[("search", {"query": "x"})], input_tokens=INPUT_TOKENS, output_tokens=OUTPUT_TOKENS),
                Answer(
                    text="Thought: I now know the answer\nFinal Answer: done",
                    input_tokens=INPUT_TOKENS,
                    output_tokens=100,
                ),
            ]
        )
        with self.install(bursar), bursar.scope(run="agent-run"):
            self.agent(provider.url, "Search for x.", search)
        covered(bursar, provider)
        assert ran == ["x"]
        calls = [record for record in records(bursar) if "tool" not in record.tags]
        assert [record.tags["agent"] for record in calls] == ["planner"] * len(calls)
        assert {record.tags["run"] for record in records(bursar)} == {"agent-run"}
        assert "search" in {record.tags.get("tool") for record in records(bursar)}

    def test_a_looping_agent_stops_at_its_budget(self, provider: Provider) -> None:
        self.need("agent")
        provider.script(
            Answer(
                tool_calls=[("search", {"query": f"x{turn}"})],
                input_tokens=INPUT_TOKENS,
                output_tokens=OUTPUT_TOKENS,
            )
            for turn in range(30)
        )
        with self.capped() as bursar:
            with pytest.raises(BudgetExceeded):
                self.agent(provider.url, "Search for x for ever.", lambda query: "nothing")
            assert 1 <= provider.billed_calls <= BUDGETED
            covered(bursar, provider)

    def test_embeddings_are_guarded(self, provider: Provider, bursar: Bursar) -> None:
        self.need("embed")
        with self.install(bursar):
            self.embed(provider.url, ["one text", "another"])
        assert [record.tags["model"] for record in records(bursar)] == ["text-embedding-3-small"]
        sent = provider.requests
        with self.capped("0.000000001 USD"), pytest.raises(BudgetExceeded):
            self.embed(provider.url, ["one text " * 100])
        assert provider.requests == sent


def records(bursar: Bursar) -> list[UsageRecord]:
    """The records of what the test called, without those of the warm-up."""
    return [record for record in bursar.records() if record.tags.get("agent") != "warm-up"]


def covered(bursar: Bursar, provider: Provider) -> None:
    """Nothing is open, and the ledger equals the provider's account, or exceeds it by estimated records alone."""
    provider.wait_idle()
    assert bursar.store.open_reservations() == 0
    calls = [record for record in records(bursar) if "tool" not in record.tags]
    ledger = sum(record.cost_nanos for record in calls)
    known = sum(record.cost_nanos for record in calls if not record.estimated)
    assert known <= provider.billed_nanos <= ledger, [(r.kind, r.outcome, r.reason, r.cost_nanos) for r in calls]
    if known == ledger:
        assert ledger == provider.billed_nanos


async def _awaited(call: Awaitable[Any]) -> Any:
    return await call


async def _listed(stream: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in stream]


def _leave_early(stream: Iterator[Any]) -> None:
    next(stream)
    next(stream)
    close = getattr(stream, "close", None)
    if close is not None:
        close()


async def _aleave_early(stream: AsyncIterator[Any]) -> None:
    await anext(stream)
    await anext(stream)
    aclose = getattr(stream, "aclose", None)
    if aclose is not None:
        await aclose()
