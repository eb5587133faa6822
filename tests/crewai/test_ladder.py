"""Thresholds, switches and detectors through CrewAI: what they change is on the wire, and what they stop ends once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai.events import crewai_event_bus
from crewai.events.types.llm_events import LLMStreamChunkEvent
from crewai.llms.base_llm import BaseLLM
from rungs import CHEAPER, RATES

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Operator, Stopped, Threshold, Usage
from bursar.detect import Detectors
from bursar.testing.provider import Answer, Provider
from bursar_crewai import BursarCrew, CrewBudgetExceeded

Make = Callable[..., Any]
CLIENTS = {
    "chat": ("gpt-4o", {}),
    "responses": ("gpt-4o", {"api": "responses"}),
    "anthropic": ("anthropic/claude-sonnet-4-5", {}),
    "litellm": ("openai/gpt-4o", {"is_litellm": True}),
}


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(text="Final Answer: done", input_tokens=1_000, output_tokens=500), rates=RATES) as provider:
        yield provider


@pytest.fixture
def named(client: Make) -> Make:
    """named(name, url, **options): the client of CLIENTS."""

    def make(name: str, url: str, **options: Any) -> Any:
        if name == "litellm":
            pytest.importorskip("litellm")
        model, own = CLIENTS[name]
        return client(url, model=model, **own, **options)

    return make


@contextmanager
def ladder(*thresholds: Threshold, limit: str = "0.10 USD", **said: Any) -> Iterator[tuple[Bursar, Operator]]:
    """A strict budget with these thresholds over the calls of the block, and the operator of its store."""
    budget = Budget("b", limit, thresholds=thresholds, estimate="strict")
    with Bursar("memory:", [budget], **said) as bursar:
        yield bursar, Operator(bursar.store, Operator(bursar.store).appoint(), by="ann")


def exact(bursar: Bursar, provider: Provider) -> list[Any]:
    """The records of model calls are the provider's account, to the nano-dollar."""
    provider.wait_idle()
    records = [record for record in bursar.records() if record.model and record.outcome != "blocked"]
    assert [record.cost_nanos for record in records] == [one.cost_nanos for one in provider.account]
    assert not any(record.estimated for record in records)
    assert bursar.store.open_reservations() == 0
    return records


# -- what is changed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["call", "acall"])
@pytest.mark.parametrize("name", CLIENTS)
def test_the_model_and_the_maximum_that_were_granted_are_on_the_wire(
    name: str, is_async: bool, provider: Provider, named: Make
) -> None:
    """Of this call alone: the client, which others share, stays as it is, but for its counters."""
    # OpenAI's Responses end a stream that was cut at the maximum in a way whose usage CrewAI does not read.
    llm = named(name, provider.url, stream=is_async and name != "responses")
    before = dict(llm.__dict__)
    steps = Threshold("50%", "downgrade", models=CHEAPER), Threshold("50%", "clamp", max_output_tokens=100)
    with ladder(*steps) as (bursar, _), BursarCrew(bursar).scope():
        bursar.charge("0.05 USD")
        answer = asyncio.run(llm.acall("hi")) if is_async else llm.call("hi")
        (record,) = exact(bursar, provider)
    (served,) = provider.account
    assert answer
    assert (served.model, served.output_tokens) == (CHEAPER[record.model_asked], 100)
    assert record.model == served.model
    assert [action.partition(" ")[0] for action in record.actions] == ["downgrade", "clamp"]
    assert llm.__dict__ == before
    assert llm.get_token_usage_summary().completion_tokens == 100


def test_calls_at_once_by_one_client_are_sent_each_as_it_was_granted(provider: Provider, named: Make) -> None:
    llm = named("chat", provider.url)
    cheap = Budget("cheap", "1 USD", match={"team": "cheap"}, thresholds=[Threshold("1%", "downgrade", models=CHEAPER)])
    with Bursar("memory:", [cheap]) as bursar:
        bursar.charge("0.5 USD", tags={"team": "cheap"})

        def one(team: str) -> None:
            with BursarCrew(bursar, team=team).scope():
                llm.call(f"for {team}")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, ["cheap", "dear"] * 8))
        provider.wait_idle()
        for served in provider.account:
            asked_by = served.request["messages"][-1]["content"]
            assert served.model == ("gpt-4o-mini" if asked_by == "for cheap" else "gpt-4o")


def test_what_crewai_says_of_one_call_is_sent_by_the_other_model_too(
    provider: Provider, named: Make, crew: Make, search: Any
) -> None:
    """An agent that writes its tool calls as text stops its model at "Observation:", for the length of the call."""
    llm = named("anthropic", provider.url)
    object.__setattr__(llm, "supports_function_calling", lambda: False)
    with ladder(Threshold("50%", "downgrade", models=CHEAPER)) as (bursar, _):
        BursarCrew(bursar).attach(crew(llm, search)).kickoff()
        bursar.charge("0.05 USD")
        BursarCrew(bursar).attach(crew(llm, search)).kickoff()
    first, second = (served for served in provider.account if served.billed)  # and not the counting of tokens
    assert (first.model, second.model) == ("claude-sonnet-4-5", "claude-haiku-4-5")
    assert first.request["stop_sequences"] == second.request["stop_sequences"] != []


@pytest.mark.parametrize("name", ["chat", "responses", "litellm"])
def test_where_no_maximum_is_set_one_that_fits_the_budget_is_sent(name: str, provider: Provider, named: Make) -> None:
    llm = named(name, provider.url, max_tokens=None)
    with ladder(limit="0.006 USD") as (bursar, _), BursarCrew(bursar).scope():
        llm.call("hi")
    (served,) = provider.account
    sent = [served.request.get(key) for key in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    assert len([limit for limit in sent if limit and 400 < limit <= 600]) == 1


def test_a_client_of_the_users_own_is_asked_for_instead(provider: Provider, named: Make) -> None:
    """What it sends, nobody can change."""
    inner = named("chat", provider.url)

    class Mine(BaseLLM):
        def call(self, messages: Any, *args: Any, **options: Any) -> Any:
            return inner._client.chat.completions.create(
                model="gpt-4o", messages=[{"role": "user", "content": messages}], max_tokens=500
            )

    mine = Mine(model="gpt-4o", max_tokens=500)
    with (
        ladder(Threshold("50%", "downgrade", models=CHEAPER)) as (bursar, operator),
        BursarCrew(bursar).scope(),
    ):
        bursar.charge("0.05 USD")
        with pytest.raises(ApprovalRequired) as caught:
            mine.call("hi")
        assert provider.requests == 0
        operator.approve(caught.value.id)
        mine.call("hi")
    assert [served.model for served in provider.account] == ["gpt-4o"]


def test_a_clamp_lets_embeddings_through(provider: Provider) -> None:
    from crewai.rag.embeddings.factory import build_embedder

    config = {"api_key": "replayed", "api_base": f"{provider.url}/v1", "model_name": "text-embedding-3-small"}
    embed = build_embedder({"provider": "openai", "config": config})
    with ladder(Threshold("50%", "clamp", max_output_tokens=100)) as (bursar, _), BursarCrew(bursar).scope():
        bursar.charge("0.05 USD")
        embed(["a"])
        exact(bursar, provider)


# -- what is stopped ---------------------------------------------------------------------------------------------------


@contextmanager
def at_the_first_chunk(act: Callable[[], None]) -> Iterator[list[str]]:
    """`act` is called by the first part of a stream; gives the parts that CrewAI's handlers saw."""
    chunks: list[str] = []
    with crewai_event_bus.scoped_handlers():

        @crewai_event_bus.on(LLMStreamChunkEvent)
        def seen(_: Any, event: Any) -> None:
            chunks.append(event.chunk)
            if len(chunks) == 1:
                act()

        yield chunks


@pytest.mark.parametrize("is_async", [False, True], ids=["call", "acall"])
@pytest.mark.parametrize("name", CLIENTS)
def test_a_switch_stops_a_stream_between_its_chunks(name: str, is_async: bool, provider: Provider, named: Make) -> None:
    """The next chunk is not handed on, and no more is generated; what may have been billed is booked."""
    provider.script([Answer(text="w " * 400, chunks=400, output_tokens=500, event_delay_s=0.005)])
    llm = named(name, provider.url, stream=True)
    with ladder() as (bursar, operator), BursarCrew(bursar).scope(agent="x"):

        def freeze() -> None:
            operator.freeze({"agent": "x"}, why="loops")
            bursar._driver.keeper.look()  # as its thread does twice a second

        with at_the_first_chunk(freeze) as chunks, pytest.raises(Stopped) as caught:
            asyncio.run(llm.acall("hi")) if is_async else llm.call("hi")
        assert (caught.value.cause, caught.value.why, len(chunks)) == ("frozen", "loops", 1)
        assert isinstance(caught.value, CrewBudgetExceeded)
        if name != "litellm":  # its stream is closed by the garbage collector
            provider.wait_idle()
            assert provider.account[0].client_gone
            assert provider.account[0].events_sent < 200
        (record,) = bursar.records()
        assert (record.estimated, record.outcome) == (True, "failed")
        assert record.cost_nanos >= provider.billed_nanos
        assert bursar.store.open_reservations() == 0
        with pytest.raises(Stopped):
            llm.call("hi")
    assert provider.requests == 1


def test_a_streaming_crew_is_killed_in_mid_stream(provider: Provider, named: Make, crew: Make) -> None:
    provider.script([Answer(text="w " * 20, chunks=20, output_tokens=500, event_delay_s=0.005)])
    with ladder(Threshold("100%", "kill")) as (bursar, operator):

        def spend() -> None:
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).settle(Usage(input_tokens=40_000))
            bursar._driver.keeper.look()

        made = BursarCrew(bursar).attach(crew(named("chat", provider.url), stream=True))
        with at_the_first_chunk(spend) as chunks, pytest.raises(Stopped) as caught:
            list(made.kickoff())
        assert (caught.value.cause, len(chunks), provider.requests) == ("killed", 1, 1)
        assert [switch["cause"] for switch in operator.frozen().values()] == ["killed"]


# -- what is found -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True], ids=["plain", "cached"])
def test_an_agent_that_loops_is_stopped(cache: bool, provider: Provider, named: Make, crew: Make, search: Any) -> None:
    """The same tool, with the same arguments, and the same result; whoever answers it, the tool or CrewAI's cache."""
    provider.script([Answer(tool_calls=[("search", {"query": "x"})])] * 5)
    made = crew(named("chat", provider.url), search, cache=cache)
    with ladder(limit="10 USD", detectors=Detectors()) as (bursar, _):
        with pytest.raises(Stopped) as caught:
            BursarCrew(bursar).attach(made).kickoff()
        assert caught.value.cause == "loop"
        assert isinstance(caught.value, CrewBudgetExceeded)
        assert provider.requests == 4
        assert search.ran == ["x"] * (1 if cache else 3)  # it is not run a fourth time
        assert bursar.store.open_reservations() == 0


def test_an_agent_that_loops_in_words_is_stopped(provider: Provider, named: Make, crew: Make, search: Any) -> None:
    """CrewAI itself runs no tool twice in a row then, so two calls take turns; each third time it says what tools there are."""
    llm = named("chat", provider.url)
    object.__setattr__(llm, "supports_function_calling", lambda: False)
    provider.script(
        Answer(text=f'Thought: I look\nAction: search\nAction Input: {{"query": "{query}"}}') for query in "xy" * 10
    )
    with ladder(limit="10 USD", detectors=Detectors()) as (bursar, _), pytest.raises(Stopped, match="repeats itself"):
        BursarCrew(bursar).attach(crew(llm, search)).kickoff()
    assert provider.requests <= 9


# -- the whole ladder --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kickoff", "akickoff"])
def test_a_crew_on_the_whole_ladder(way: str, provider: Provider, named: Make, crew: Make) -> None:
    """Half of ten cents is told of, from 80 % on a cheaper model answers, at 95 % an operator is asked, at 100 % it ends."""
    answer = "Final Answer: done"
    provider.script(
        Answer(text=answer, input_tokens=input_tokens, output_tokens=500)
        for input_tokens in (18_000, 10_000, 98_000, 32_000)  # 5 and 3 cents of gpt-4o, 1.5 and 0.51 of gpt-4o-mini
    )
    steps = (
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models=CHEAPER),
        Threshold("95%", "ask"),
        Threshold("100%", "kill"),
    )
    with ladder(*steps) as (bursar, operator):
        guard = BursarCrew(bursar)
        llm = named("chat", provider.url)

        def kickoff(tasks: int) -> None:
            made = guard.attach(crew(llm, tasks=tasks))
            asyncio.run(made.akickoff()) if way == "akickoff" else made.kickoff()

        with pytest.raises(ApprovalRequired) as asked:
            kickoff(tasks=5)
        assert isinstance(asked.value, CrewBudgetExceeded)
        assert provider.requests == 3
        operator.approve(asked.value.id, why="one more")
        with pytest.raises(Stopped) as killed:
            kickoff(tasks=5)
        assert (killed.value.cause, killed.value.budget, provider.requests) == ("killed", "b", 4)
        with pytest.raises(BudgetExceeded):
            kickoff(tasks=1)
        records = exact(bursar, provider)
        assert [served.model for served in provider.account] == ["gpt-4o"] * 2 + ["gpt-4o-mini"] * 2
        assert [record.model_asked for record in records] == [None, None, "gpt-4o", "gpt-4o"]
        told = [alert.facts["action"] for alert, _ in bursar.store.alerts() if alert.kind == "threshold"]
        assert sorted(told) == ["ask", "downgrade", "kill", "notify"]
