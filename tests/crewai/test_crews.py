"""Crews, flows and agents stop at their budgets, however they are started, and nobody else's calls are touched."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai import Agent
from crewai.flow.flow import Flow, listen, start

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Fault, Provider
from bursar_crewai import BursarCrew, CrewBudgetExceeded, install

Make = Callable[..., Any]
ANSWER = Answer(text="Final Answer: done", output_tokens=500)  # about $0.0055, by the length of the request
CAP_NANOS = 30_000_000


def looping() -> Iterator[Answer]:
    """A model that never stops calling its tool."""
    return (Answer(tool_calls=[("search", {"query": f"x{turn}"})], output_tokens=500) for turn in range(40))


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(ANSWER) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    """A strict budget for a few calls of the team `capped`."""
    with Bursar("memory:", [Budget("cap", "0.03 USD", match={"team": "capped"}, estimate="strict")]) as bursar:
        yield bursar


def capped(bursar: Bursar) -> BursarCrew:
    return BursarCrew(bursar, team="capped")


def spent_nanos(bursar: Bursar) -> int:
    return sum(record.cost_nanos for record in bursar.records(team="capped"))


def holds(bursar: Bursar, provider: Provider) -> None:
    """The budget was used and not passed, the books say what the provider billed, and nothing is open."""
    provider.wait_idle()
    assert CAP_NANOS / 2 < provider.billed_nanos <= CAP_NANOS
    assert spent_nanos(bursar) == provider.billed_nanos
    assert bursar.store.open_reservations() == 0


# -- every way to start ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["kickoff", "kickoff_async", "akickoff", "stream", "react"])
def test_a_loop_of_tools_stops_at_the_budget(
    way: str, provider: Provider, bursar: Bursar, client: Make, crew: Make, search: Any
) -> None:
    provider.script(looping())
    llm = client(provider.url)
    if way == "react":
        provider = _react(provider, llm)
    made = crew(llm, search, step_callback=capped(bursar).step_callback, stream=way == "stream")

    def run() -> None:
        if way == "stream":
            list(made.kickoff())
        elif way in ("kickoff", "react"):
            made.kickoff()
        else:
            asyncio.run(getattr(made, way)())

    with provider, pytest.raises(CrewBudgetExceeded) as caught:
        run()
    assert caught.value.budget == "cap"
    assert caught.value.scope == {}
    holds(bursar, provider)
    assert len(search.ran) <= provider.requests <= 6


def _react(provider: Provider, llm: Any) -> Provider:
    """The same loop for a model without function calling: it writes its tool calls as text."""
    object.__setattr__(llm, "supports_function_calling", lambda: False)
    talking = Provider()
    talking.script(
        Answer(
            text=f'Thought: I look\nAction: search\nAction Input: {{"query": "x{turn}"}}',
            output_tokens=500,
        )
        for turn in range(40)
    )
    llm._client.base_url = f"{talking.url}/v1"
    return talking


@pytest.mark.parametrize("way", ["threads", "akickoff", "for_each", "for_each_async"])
def test_twenty_crews_at_once_share_the_budget(
    way: str, provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    guard = capped(bursar)
    outcomes: list[Any] = []

    def one(_: int) -> None:
        try:
            outcomes.append(crew(client(provider.url), step_callback=guard.step_callback).kickoff())
        except BudgetExceeded as error:
            outcomes.append(error)

    async def many() -> None:
        crews = [crew(client(provider.url), step_callback=guard.step_callback) for _ in range(20)]
        outcomes.extend(await asyncio.gather(*(made.akickoff() for made in crews), return_exceptions=True))

    async def for_each() -> None:
        made = crew(client(provider.url), step_callback=guard.step_callback)
        with pytest.raises(BudgetExceeded):
            await made.kickoff_for_each_async([{"n": n} for n in range(20)])

    if way == "threads":
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(one, range(20)))
    elif way == "akickoff":
        asyncio.run(many())
    elif way == "for_each":
        with pytest.raises(BudgetExceeded):
            crew(client(provider.url), step_callback=guard.step_callback).kickoff_for_each(
                [{"n": n} for n in range(20)]
            )
    else:
        asyncio.run(for_each())
    holds(bursar, provider)
    assert 4 <= provider.requests <= 6
    if outcomes:
        assert sum(isinstance(one, CrewBudgetExceeded) for one in outcomes) == 20 - provider.requests


def test_a_summarisation_storm_stops_at_the_budget(
    provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    """One conversation that is too long becomes many calls at once, out of sight of CrewAI's hooks; most are refused."""
    provider.script([Fault("refuse", status=400, message="This model's maximum context length is exceeded.")])
    llm = client(provider.url)
    # A small model, so that the conversation is cut in many parts.
    object.__setattr__(llm, "get_context_window_size", lambda: 560)
    made = crew(llm, do="long words " * 600, step_callback=capped(bursar).step_callback)
    with pytest.raises(CrewBudgetExceeded):
        made.kickoff()
    provider.wait_idle()
    assert provider.requests < 5
    # What was cancelled on its way is booked as estimated.
    assert provider.billed_nanos <= spent_nanos(bursar) <= CAP_NANOS
    assert bursar.store.open_reservations() == 0


@pytest.mark.parametrize("stream", [False, True], ids=["plain", "stream"])
def test_a_crew_cancelled_in_the_middle_of_a_call_pays_for_it(
    stream: bool, provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    """What was sent is booked: exactly where CrewAI's thread reads the answer all the same, else as estimated."""
    provider.script([Answer(text="Final Answer: late", output_tokens=500, latency_s=0.3)])
    made = capped(bursar).attach(crew(client(provider.url, stream=stream)))

    async def cancelled() -> None:
        task = asyncio.ensure_future(made.akickoff())
        await asyncio.to_thread(provider.wait_requests, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    provider.wait_idle()
    assert 0 < provider.billed_nanos <= spent_nanos(bursar)
    assert bursar.store.open_reservations() == 0


# -- whose calls -------------------------------------------------------------------------------------------------------


def test_a_crew_is_guarded_from_its_next_kickoff_on_and_others_are_not(
    provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    """CrewAI's executors take a copy of the hooks at their first kickoff; the guard does not depend on it."""
    steps: list[Any] = []
    made, other = crew(client(provider.url), step_callback=steps.append), crew(client(provider.url))
    made.kickoff()
    assert list(bursar.records(team="capped")) == []
    guard = capped(bursar)
    assert guard.attach(made) is made
    guard.attach(made)
    made.kickoff()
    other.kickoff()
    assert len(list(bursar.records(team="capped"))) == 1
    assert provider.billed_calls == 3
    made.step_callback("a step")
    assert steps[-1] == "a step"


def test_a_flow_and_the_crews_in_it_are_one_run(provider: Provider, bursar: Bursar, client: Make, crew: Make) -> None:
    class Pipeline(Flow[dict[str, Any]]):
        @start()
        def first(self) -> Any:
            return client(provider.url).call("hi")

        @listen(first)
        async def second(self, _: Any) -> Any:
            return await crew(client(provider.url), name="writers").kickoff_async()

    flow = capped(bursar).attach(Pipeline())
    flow.kickoff()
    records = list(bursar.records(team="capped"))
    assert [record.tags["workflow"] for record in records] == ["Pipeline", "writers"]
    assert len({record.tags["run"] for record in records}) == 1
    assert client(provider.url).call("outside") is not None
    assert len(list(bursar.records(team="capped"))) == 2
    with bursar.scope(run="mine"):
        flow.kickoff()
    assert len(list(bursar.records(run="mine"))) == 2


@pytest.mark.parametrize("way", ["kickoff", "akickoff"])
def test_an_agent_alone_is_guarded(way: str, provider: Provider, bursar: Bursar, client: Make, search: Any) -> None:
    provider.script(looping())
    agent = Agent(role="loner", goal="g", backstory="b", llm=client(provider.url), tools=[search])
    capped(bursar).attach(agent)
    with pytest.raises(CrewBudgetExceeded):
        asyncio.run(agent.akickoff("go")) if way == "akickoff" else agent.kickoff("go")
    holds(bursar, provider)
    assert {record.tags["agent"] for record in bursar.records(team="capped")} == {"loner"}


def test_a_scope_guards_what_is_inside(provider: Provider, bursar: Bursar, client: Make) -> None:
    llm = client(provider.url)
    with capped(bursar).scope(agent="script"):
        llm.call("inside")
    llm.call("outside")
    assert [record.tags["agent"] for record in bursar.records(team="capped")] == ["script"]


def test_threads_of_the_users_own_are_guarded_by_install(provider: Provider, bursar: Bursar, client: Make) -> None:
    uninstall = install(bursar, team="capped")
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(client(provider.url).call, "hi").result()
    finally:
        uninstall()
    client(provider.url).call("hi")
    assert len(list(bursar.records(team="capped"))) == 1


# -- tools -------------------------------------------------------------------------------------------------------------


def test_a_refused_tool_does_not_run_and_stops_the_crew(
    provider: Provider, client: Make, crew: Make, search: Any
) -> None:
    with Bursar("memory:", [Budget("tools", "2 calls", per="run")]) as bursar:
        provider.script(looping())
        made = BursarCrew(bursar).attach(crew(client(provider.url), search))
        with pytest.raises(CrewBudgetExceeded) as caught:
            made.kickoff()
        assert (caught.value.budget, caught.value.unit) == ("tools", "calls")
        assert search.ran == ["x0", "x1"]
        assert provider.requests == 3
        assert bursar.store.open_reservations() == 0


def test_a_tool_answered_from_the_cache_costs_nothing(
    provider: Provider, client: Make, crew: Make, search: Any
) -> None:
    with Bursar("memory:", [Budget("cap", "1 USD")]) as bursar:
        same = Answer(tool_calls=[("search", {"query": "x"})])
        provider.script([same, same, same])
        BursarCrew(bursar).attach(crew(client(provider.url), search, cache=True)).kickoff()
        assert search.ran == ["x"]
        assert len([record for record in bursar.records() if record.tags.get("tool") == "search"]) == 1


def test_tools_in_parallel_and_the_agents_in_them_are_one_run(
    provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    from crewai.tools import tool

    @tool("ask")
    def ask(query: str) -> str:
        """Ask another crew."""
        return str(crew(client(provider.url), name="helpers").kickoff())

    both = [("ask", {"query": "a"}), ("ask", {"query": "b"})]
    provider.script([Answer(tool_calls=both, output_tokens=500)])
    capped(bursar).attach(crew(client(provider.url), ask)).kickoff()
    holds(bursar, provider)
    records = list(bursar.records(team="capped"))
    assert provider.billed_calls == 4
    assert len({record.tags["run"] for record in records}) == 1
    assert sum(record.tags.get("tool") == "ask" for record in records) == 4
    assert [record.tags["workflow"] for record in records].count("helpers") == 2
