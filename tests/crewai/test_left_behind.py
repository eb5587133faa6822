"""What goes on when a crew, flow or agent has ended, and what ends without being told of: it is held, and booked once."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from collecting import Collecting

pytest.importorskip("bursar_crewai")

from canned import Canned, CannedProvider
from crewai import Agent
from crewai.flow.flow import Flow, start
from crewai.llms.base_llm import BaseLLM
from crewai.llms.providers.openai.completion import OpenAICompletion
from crewai.memory.unified_memory import Memory
from crewai.rag.embeddings.factory import build_embedder

from bursar import Budget, Bursar
from bursar.commands import Tell
from bursar.ending import drain
from bursar.testing.provider import Answer, Fault, Provider
from bursar_crewai import BursarCrew, CrewBudgetExceeded, install

Make = Callable[..., Any]
SLOW = Answer(text="Final Answer: done", input_tokens=1_000, output_tokens=500, latency_s=0.1)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(SLOW) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    one = Budget("one embedding", "1 requests", match={"model": "text-embedding-*"}, per="run")
    with Bursar("memory:", [Budget("ample", "100 USD"), one]) as bursar:
        yield bursar


def embedder(provider: Provider) -> dict[str, Any]:
    config = {"api_key": "replayed", "api_base": f"{provider.url}/v1", "model_name": "text-embedding-3-small"}
    return {"provider": "openai", "config": config}


@pytest.mark.parametrize("way", ["crew", "agent", "flow"])
def test_memory_that_is_read_before_and_saved_after_is_held_too(
    way: str, provider: Provider, client: Make, crew: Make
) -> None:
    """CrewAI looks into an agent's memory before it says that the agent begins, and saves it after the end, in the background."""
    llm = client(provider.url)
    memory = Memory(llm=llm, embedder=embedder(provider))

    class Remembering(Flow[Any]):
        @start()
        def remember(self) -> None:
            memory.remember_many(["The user likes tea."])

    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        guard = BursarCrew(bursar)
        if way == "crew":
            crew(llm, memory=memory, step_callback=guard.step_callback).kickoff()
        elif way == "agent":
            guard.attach(Agent(role="planner", goal="g", backstory="b", llm=llm, memory=memory)).kickoff("hi")
        else:
            guard.attach(Remembering()).kickoff()
        memory.drain_writes()
        provider.wait_idle()
        assert len(list(bursar.records())) == provider.requests >= 2
        assert bursar.store.open_reservations() == 0


@pytest.mark.parametrize("way", ["agent", "crew"])
def test_what_is_called_after_a_cancellation_is_another_call(
    way: str, provider: Provider, bursar: Bursar, client: Make, crew: Make
) -> None:
    """CrewAI tells of no end there."""
    guard, llm = BursarCrew(bursar), client(provider.url)
    provider.script([Answer(latency_s=1.0)])

    def kickoff() -> Any:
        if way == "agent":
            return guard.attach(Agent(role="planner", goal="g", backstory="b", llm=llm)).kickoff_async("hi")
        return crew(llm, step_callback=guard.step_callback).akickoff()

    async def both() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await kickoff()
        await client(provider.url).acall("hi")

    asyncio.run(both())
    assert (provider.requests, len(list(bursar.records()))) == (2, 1)


def test_a_crew_that_is_interrupted_in_a_tool_leaves_nothing_open(
    provider: Provider, bursar: Bursar, client: Make, crew: Make, search: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Any, query: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(search), "_run", interrupted)
    provider.script([Answer(tool_calls=[("search", {"query": "x"})])])
    with pytest.raises(KeyboardInterrupt):
        crew(client(provider.url), search, step_callback=BursarCrew(bursar).step_callback).kickoff()
    assert bursar.store.open_reservations() == 0
    client(provider.url).call("hi")
    assert [record.tags.get("tool") for record in bursar.records()] == [None, "search"]


def test_a_scope_tells_of_a_refused_embedding_once(provider: Provider, bursar: Bursar, client: Make) -> None:
    embed = build_embedder(embedder(provider))
    with BursarCrew(bursar).scope():
        embed(["one"])
        with pytest.raises(CrewBudgetExceeded):
            embed(["two"])
        assert client(provider.url).call("hi") == "Final Answer: done"


def test_a_client_that_adds_to_how_usage_is_tracked_is_booked_once(provider: Provider, bursar: Bursar) -> None:
    class Counting(OpenAICompletion):
        def _track_token_usage_internal(self, usage_data: dict[str, Any]) -> None:
            super()._track_token_usage_internal(usage_data)

    with BursarCrew(bursar).scope():
        Counting(model="gpt-4o", base_url=f"{provider.url}/v1", api_key="replayed", max_tokens=500).call("hi")
    assert [record.cost_nanos for record in bursar.records()] == [provider.billed_nanos]


@pytest.mark.parametrize("way", ["call", "acall"])
def test_what_the_providers_own_tools_cost_is_booked(way: str, bursar: Bursar) -> None:
    """CrewAI reads the tokens of an answer of OpenAI's Responses, and no searches. Opening a page is free."""
    pages = [{"type": "search", "query": "x"}, {"type": "open_page", "url": "http://x"}]
    output = [
        {"type": "web_search_call", "id": f"ws_{number}", "status": "completed", "action": action}
        for number, action in enumerate(pages)
    ]
    response = {
        "id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "gpt-4o", "output": output,
        "parallel_tool_calls": True, "tool_choice": "auto", "tools": [{"type": "web_search"}], "metadata": {},
        "usage": {
            "input_tokens": 1_000, "output_tokens": 50, "total_tokens": 1_050,
            "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
        },
    }  # fmt: skip
    with CannedProvider({"POST /v1/responses": Canned(response)}) as provider, BursarCrew(bursar).scope():
        said = {"base_url": f"{provider.url}/v1", "api_key": "replayed", "max_tokens": 500, "max_retries": 0}
        llm: Any = OpenAICompletion(model="gpt-4o", api="responses", builtin_tools=["web_search"], **said)
        if way == "call":
            llm.call("hi")
        else:
            asyncio.run(llm.acall("hi"))
    (record,) = bursar.records()
    assert record.usage["server_tools"] == {"web_search": 1}
    assert (record.cost_nanos, record.estimated) == (13_000_000, False)


def test_a_copy_of_litellms_client_is_retried_as_the_client_is(provider: Provider, bursar: Bursar) -> None:
    pytest.importorskip("litellm")
    from crewai import LLM

    llm = LLM(model="openai/gpt-4o", is_litellm=True, base_url=f"{provider.url}/v1", api_key="replayed", max_tokens=500)
    provider.script([SLOW, Fault("refuse", status=500)])
    with BursarCrew(bursar).scope():
        llm.call("hi")
        copy.deepcopy(llm).call("hi")
    assert [record.outcome for record in bursar.records(model="gpt-4o")].count("completed") == 2


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # CrewAI's own, in such a task
def test_a_call_that_is_collected_amid_a_transaction_of_the_same_thread_ends_after_it(tmp_path: Path) -> None:
    """A task that its event loop leaves behind: it must not wait for that transaction's lock."""
    clock, loop, sent = Collecting(), asyncio.new_event_loop(), asyncio.Event()
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("b", "1 USD")], clock=clock)

    class Waiting(BaseLLM):
        def call(self, messages: Any, *args: Any, **options: Any) -> str:
            return ""

        async def acall(self, messages: Any, *args: Any, **options: Any) -> None:
            sent.set()
            await loop.create_future()

    uninstall = install(bursar)
    try:
        task: Any = loop.create_task(Waiting(model="gpt-4o").acall("hi"))
        loop.run_until_complete(sent.wait())
    finally:
        uninstall()
    loop.close()
    task._log_destroy_pending = False
    del task
    clock.collects = True
    store = threading.Thread(target=lambda: bursar.store.execute(Tell("one", "policy", {})), daemon=True)
    store.start()
    store.join(20)
    clock.collects = False
    assert not store.is_alive()
    assert drain(20)
    assert [record.estimated for record in bursar.records()] == [True]
    assert bursar.store.open_reservations() == 0
    bursar.close()


def test_a_stream_that_the_provider_ends_by_an_error_of_a_refusals_code_is_booked(bursar: Bursar, client: Make) -> None:
    """As OpenRouter tells of its provider's: what had been generated is billed."""
    part = {"index": 0, "delta": {"role": "assistant", "content": "hello "}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [part]}
    events = [chunk, chunk, {**chunk, "error": {"code": 403, "message": "Flagged"}}]
    told = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    routes = {"POST /v1/chat/completions": Canned(told, "text/event-stream")}
    with CannedProvider(routes) as provider, BursarCrew(bursar).scope(), pytest.raises(Exception, match="Flagged"):
        client(provider.url, stream=True).call("hi")
    (record,) = bursar.records()
    assert (record.kind, record.estimated) == ("settlement", True)


def test_a_flow_that_starts_itself_within_goes_on_when_the_inner_one_fails(
    provider: Provider, bursar: Bursar, client: Make
) -> None:
    class Again(Flow):  # type: ignore[type-arg]
        @start()
        async def go(self) -> Any:
            if self.kicked.pop():
                raise LookupError("the inner one")
            with contextlib.suppress(LookupError):
                await self.kickoff_async()
            return await client(provider.url).acall("hi")

    flow = BursarCrew(bursar).attach(Again())
    object.__setattr__(flow, "kicked", [True, False])
    asyncio.run(flow.kickoff_async())
    (record,) = bursar.records()
    assert record.tags["workflow"] == "Again"
