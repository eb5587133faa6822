"""Every client of CrewAI, every kind of call it makes, and everything that goes wrong: the books say what was billed."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai import Agent, Process, Task
from crewai.hooks import HookAborted, register_before_llm_call_hook, unregister_before_llm_call_hook
from crewai.llms.base_llm import BaseLLM
from openai import BadRequestError
from pydantic import BaseModel, PrivateAttr

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Stopped, StoreError, UnknownPrice
from bursar.errors import UnboundedEstimate
from bursar.testing.provider import Answer, Fault, Provider, Rates
from bursar_crewai import BursarCrew, CrewBudgetExceeded, install
from bursar_crewai.errors import crew_error

Make = Callable[..., Any]
SEARCH = {
    "type": "function",
    "function": {
        "name": "search",
        "description": "Search.",
        "parameters": {"type": "object", "properties": {"query": {"type": "string"}}},
    },
}
TOOL_ROUND = Answer(tool_calls=[("search", {"query": "x"})], input_tokens=100, output_tokens=50)
CLAUDE = Rates(input_nanos=3_000, output_nanos=15_000, cache_read_nanos=300, cache_write_5m_nanos=3_750)
RATES = {
    "gpt-4o": Rates(input_nanos=2_500, output_nanos=10_000, cache_read_nanos=1_250),
    "claude-sonnet-4-5": CLAUDE,
    "text-embedding-3-small": Rates(input_nanos=20, output_nanos=0),
    "text-embedding-3-large": Rates(input_nanos=130, output_nanos=0),
    "gpt-4o-mini": Rates(input_nanos=150, output_nanos=600, cache_read_nanos=Fraction(75)),
}


class Verdict(BaseModel):
    """What structured calls are asked for."""

    valid: bool = True
    feedback: str = ""


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(text="Final Answer: done", input_tokens=1_000, output_tokens=500), rates=RATES) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    """A budget that never runs out, over every CrewAI call of the process."""
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        uninstall = install(bursar)
        yield bursar
        uninstall()


def exact(bursar: Bursar, provider: Provider, calls: int | None = None) -> list[Any]:
    """The records are the provider's account, to the nano-dollar, call by call."""
    provider.wait_idle()
    records = [record for record in bursar.records() if "tool" not in record.tags]
    assert [record.estimated for record in records] == [False] * len(records)
    assert sorted(record.cost_nanos for record in records) == sorted(one.cost_nanos for one in provider.account)
    assert bursar.store.open_reservations() == 0
    assert calls is None or len(records) == calls
    return records


# -- clients -----------------------------------------------------------------------------------------------------------

CACHED = Answer(text="x", input_tokens=1_000, output_tokens=500, cache_read_tokens=300)
WRITTEN = Answer(text="x", input_tokens=1_000, output_tokens=500, cache_read_tokens=300, cache_write_5m_tokens=200)
CLIENTS = {
    "chat": ("gpt-4o", {}, CACHED),
    "responses": ("gpt-4o", {"api": "responses"}, CACHED),
    "anthropic": ("anthropic/claude-sonnet-4-5", {}, WRITTEN),
    "litellm": ("openai/gpt-4o", {"is_litellm": True}, CACHED),
}


@pytest.mark.parametrize("is_async", [False, True], ids=["call", "acall"])
@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_settles_to_the_bill(
    name: str, stream: bool, is_async: bool, provider: Provider, bursar: Bursar, client: Make
) -> None:
    """Also a round of tools, of which LiteLLM's client reports no end."""
    model, options, answer = CLIENTS[name]
    if name == "litellm":
        pytest.importorskip("litellm")
    provider.script([answer, TOOL_ROUND])
    llm = client(provider.url, model=model, stream=stream, **options)

    async def both() -> None:
        await llm.acall("hi")
        await llm.acall("hi", tools=[SEARCH])

    if is_async:
        asyncio.run(both())
    else:
        llm.call("hi")
        llm.call("hi", tools=[SEARCH])
    assert len(exact(bursar, provider, 2)[0].usage) >= 3


@pytest.mark.parametrize("name", CLIENTS)
def test_every_client_is_refused_before_it_sends(name: str, provider: Provider, client: Make) -> None:
    model, options, _ = CLIENTS[name]
    if name == "litellm":
        pytest.importorskip("litellm")
    with Bursar("memory:", [Budget("cap", "0.0001 USD")]) as bursar, BursarCrew(bursar).scope():
        for stream in (False, True):
            llm = client(provider.url, model=model, stream=stream, **options)
            with pytest.raises(CrewBudgetExceeded):
                llm.call("hi")
            with pytest.raises(CrewBudgetExceeded):
                asyncio.run(llm.acall("hi"))
        assert provider.requests == 0


def test_a_client_of_the_users_own_is_guarded(provider: Provider, bursar: Bursar, client: Make) -> None:
    """It reports no usage, so the worst case is booked; its `acall` by way of `call` is one call."""
    inner = client(provider.url)

    class Mine(BaseLLM):
        def call(self, messages: Any, *args: Any, **options: Any) -> Any:
            return inner._client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": messages}], max_tokens=500
            )

        async def acall(self, messages: Any, *args: Any, **options: Any) -> Any:
            return await asyncio.to_thread(self.call, messages)

    mine = Mine(model="gpt-4o", max_tokens=500)
    mine.call("hi " * 1_000)
    asyncio.run(mine.acall("hi " * 1_000))
    records = list(bursar.records())
    assert [(record.estimated, record.cost_nanos >= 6_000_000) for record in records] == [(True, True)] * 2
    assert provider.requests == 2


def test_a_client_that_hands_its_calls_on_is_charged_once(provider: Provider, bursar: Bursar, client: Make) -> None:
    """As Azure's does with OpenAI's Responses."""

    class Handing(BaseLLM):
        _responses_delegate: Any = PrivateAttr(default=None)

        def call(self, messages: Any, *args: Any, **options: Any) -> Any:
            return self._responses_delegate.call(messages, *args, **options)

    handing = Handing(model="gpt-4o", max_tokens=500)
    handing._responses_delegate = client(provider.url, api="responses")
    handing.call("hi")
    exact(bursar, provider, 1)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["call", "acall"])
@pytest.mark.parametrize("name", CLIENTS)
def test_the_sdks_retries_are_calls_of_their_own(
    name: str, is_async: bool, provider: Provider, bursar: Bursar, client: Make
) -> None:
    """An answer that was cut is billed, and so is the one that the retry brings."""
    model, options, _ = CLIENTS[name]
    retries = {} if name == "litellm" else {"max_retries": 2}
    if name == "litellm":
        pytest.importorskip("litellm")
    provider.script([Fault("drop", answer=Answer(input_tokens=10, output_tokens=500))])
    llm = client(provider.url, model=model, **options, **retries)
    if name == "litellm":
        del llm.additional_params["max_retries"]
    asyncio.run(llm.acall("hi")) if is_async else llm.call("hi")
    provider.wait_idle()
    records = list(bursar.records())
    assert [record.estimated for record in records] == [True, False]
    assert provider.billed_calls == provider.requests == 2
    assert records[1].cost_nanos == provider.account[1].cost_nanos
    assert sum(record.cost_nanos for record in records) >= provider.billed_nanos


def test_an_unguarded_call_has_its_retries_back(provider: Provider, client: Make) -> None:
    llm = client(provider.url, max_retries=2)
    with Bursar("memory:", [Budget("ample", "1 USD")]) as bursar, BursarCrew(bursar).scope():
        llm.call("hi")
        assert llm._client.max_retries == 0
    llm.call("hi")
    assert llm._client.max_retries == 2


def test_a_time_out_inside_the_handling_of_a_400_is_billed(provider: Provider, bursar: Bursar, client: Make) -> None:
    """Python chains the errors; whether the second call was billed is not read from the first one's status."""
    provider.script([Fault("refuse", status=400), Fault("hang")])
    llm = client(provider.url, timeout=0.2)

    def twice() -> None:
        try:
            llm.call("hi")
        except BadRequestError:
            llm.call("hi")

    with pytest.raises(ConnectionError):
        twice()
    assert [(r.cost_nanos > 0, r.estimated) for r in bursar.records()] == [(False, False), (True, True)]


def test_an_answer_that_cannot_be_parsed_is_paid_for(provider: Provider, bursar: Bursar, client: Make) -> None:
    provider.script([Answer(text="no JSON", input_tokens=10, output_tokens=5)])
    with pytest.raises(ValueError, match="JSON"):
        client(provider.url).call("hi", response_model=Verdict)
    (record,) = bursar.records()
    assert record.estimated
    assert record.cost_nanos >= provider.billed_nanos > 0


def test_a_denial_by_another_hook_costs_nothing(provider: Provider, bursar: Bursar, client: Make) -> None:
    def deny(_: Any) -> None:
        raise HookAborted(reason="not today")

    register_before_llm_call_hook(deny)
    try:
        with pytest.raises(HookAborted, match="not today"):
            client(provider.url).call("hi")
    finally:
        unregister_before_llm_call_hook(deny)
    (record,) = bursar.records()
    assert (record.cost_nanos, provider.requests) == (0, 0)


def test_a_store_that_fails_while_settling_costs_no_answer(
    provider: Provider, bursar: Bursar, client: Make, caplog: pytest.LogCaptureFixture
) -> None:
    llm = client(provider.url)
    provider.script([Answer(text="slow", latency_s=0.05)])
    closing = asyncio.new_event_loop()

    async def meanwhile() -> Any:
        call = asyncio.ensure_future(llm.acall("hi"))
        await asyncio.to_thread(provider.wait_requests, 1)
        bursar.store.close()
        return await call

    assert closing.run_until_complete(meanwhile()) == "slow"
    assert "while booking a call" in caplog.text
    closing.close()


def test_other_errors_of_bursar_stop_a_crew_once(provider: Provider, bursar: Bursar, client: Make, crew: Make) -> None:
    """An unknown price is no failure of the task: CrewAI would try it three times."""
    with pytest.raises(UnknownPrice) as caught:
        crew(client(provider.url, model="openai/gpt-none")).kickoff()
    assert caught.value.model == "gpt-none"
    assert provider.requests == 0
    bursar.store.close()
    with pytest.raises(StoreError):
        crew(client(provider.url)).kickoff()
    assert provider.requests == 0


def test_a_refusal_by_a_budget_named_rate_limit_is_not_repeated(provider: Provider, client: Make) -> None:
    """CrewAI takes errors whose text speaks of rate limits for throttling, and tries again after seconds."""
    with Bursar("memory:", [Budget("rate limit", "0.0001 USD")]) as bursar, BursarCrew(bursar).scope():
        with pytest.raises(CrewBudgetExceeded):
            client(provider.url).call("hi")
        assert len([record for record in bursar.records() if record.outcome == "blocked"]) == 1


@pytest.mark.parametrize(
    "kind", [BudgetExceeded, ApprovalRequired, Stopped, UnknownPrice, UnboundedEstimate, StoreError]
)
def test_errors_keep_their_kind_and_fields_through_a_pickle(kind: Any) -> None:
    error = crew_error(kind("No.", budget="cap", provider="openai"))
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, kind)
    assert isinstance(again, CrewBudgetExceeded if issubclass(kind, BudgetExceeded) else HookAborted)
    assert (str(again), again.budget, again.provider, again.source) == ("No.", "cap", "openai", "bursar")


# -- every call of a crew ----------------------------------------------------------------------------------------------


def test_planning_managers_guardrails_and_converters_are_seen(
    provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    """Whatever CrewAI asks a model on the side, the number of records is the number of requests."""
    llm = client(provider.url)
    worker = Agent(role="worker", goal="g", backstory="b", llm=llm, reasoning=True, max_iter=2, max_retry_limit=0)
    task = Task(description="d", expected_output="e", output_pydantic=Verdict, guardrail="must be short", agent=worker)
    options = {"planning": True, "planning_llm": llm, "process": Process.hierarchical, "manager_llm": llm}
    made = type(crew(llm))(agents=[worker], tasks=[task], **options)
    with pytest.raises(Exception):  # noqa: B017 - the model's answers are no plans; what counts is who was asked
        raise made.kickoff() and RuntimeError
    provider.wait_idle()
    assert provider.requests >= 3
    records = list(bursar.records())
    assert len([record for record in records if "tool" not in record.tags]) == provider.requests
    assert sum(record.cost_nanos for record in records) >= provider.billed_nanos
    assert {record.tags["run"] for record in records} == {records[0].tags["run"]}
    assert bursar.store.open_reservations() == 0


def memory_of(url: str, llm: Any) -> Any:
    from crewai.memory.unified_memory import Memory

    config = {"api_key": "replayed", "api_base": f"{url}/v1", "model_name": "text-embedding-3-small"}
    return Memory(llm=llm, embedder={"provider": "openai", "config": config})


def test_memory_and_its_embeddings_are_seen(provider: Provider, bursar: Bursar, client: Make, crew: Make) -> None:
    llm = client(provider.url)
    crew(llm, memory=memory_of(provider.url, llm)).kickoff()
    provider.wait_idle()
    embedded = [one for one in provider.account if one.endpoint == "openai.embeddings"]
    records = list(bursar.records(model="text-embedding-3-small"))
    assert embedded
    assert [record.cost_nanos for record in records] == [one.cost_nanos for one in embedded]
    assert len(list(bursar.records())) == provider.requests


def test_a_refused_embedding_is_not_swallowed(provider: Provider, client: Make, crew: Make) -> None:
    """CrewAI's memory goes on without embeddings; the crew's next model call tells of the refusal."""
    llm = client(provider.url)
    budget = Budget("no embeddings", "0.000000001 USD", match={"model": "text-embedding-*"})
    with Bursar("memory:", [budget]) as bursar:
        guard = BursarCrew(bursar)
        made = crew(llm, memory=memory_of(provider.url, llm), step_callback=guard.step_callback)
        with pytest.raises(CrewBudgetExceeded) as caught:
            made.kickoff()
        assert caught.value.budget == "no embeddings"
        assert provider.requests == 0


def test_an_embedder_with_a_wrapped_client_is_charged_once(provider: Provider, bursar: Bursar) -> None:
    from crewai.rag.embeddings.factory import build_embedder

    config = {"api_key": "replayed", "api_base": f"{provider.url}/v1", "model_name": "text-embedding-3-small"}
    embed = build_embedder({"provider": "openai", "config": config})
    embed.client = bursar.wrap(embed.client)
    embed(["a"])
    assert [record.cost_nanos for record in bursar.records()] == [one.cost_nanos for one in provider.account]


def test_an_embedding_function_of_the_users_own(bursar: Bursar) -> None:
    embed = BursarCrew(bursar).embedder(
        lambda texts: [[0.0] for _ in texts], provider="openai", model="text-embedding-3-small"
    )
    assert embed(["a", "b"]) == [[0.0], [0.0]]
    (record,) = bursar.records()
    assert (record.estimated, record.tags["model"]) == (True, "text-embedding-3-small")
