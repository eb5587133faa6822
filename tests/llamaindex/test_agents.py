"""Agents, workflows and engines: whose each call is, what a refusal does to them, and tools with budgets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.instrumentation.dispatcher import instrument_tags
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool, QueryEngineTool
from llama_index.core.workflow import Context
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI
from pydantic import BaseModel

from bursar import Budget, BudgetExceeded, Bursar, UsageRecord
from bursar.testing.provider import Answer, Fault, Provider
from bursar_llamaindex import guard_tool, install

COST_NANOS = 7_500_000
STEP = {"input_tokens": 1_000, "output_tokens": 500}


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(**STEP)) as provider:
        yield provider


@pytest.fixture
def guarded() -> Iterator[Callable[..., Bursar]]:
    """A Bursar with these budgets (an ample one by default), installed."""
    undo: list[Callable[[], None]] = []

    def make(*budgets: Budget) -> Bursar:
        bursar = Bursar("memory:", list(budgets) or [Budget("ample", "100 USD")])
        undo.extend([install(bursar), bursar.close])
        return bursar

    yield make
    for one in undo:
        one()


def llm_at(provider: Provider, **options: Any) -> OpenAI:
    settings = {"api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0, "max_tokens": 500}
    return OpenAI(model="gpt-4o", **{**settings, **options})


def embedding_at(provider: Provider) -> OpenAIEmbedding:
    return OpenAIEmbedding(model="text-embedding-3-small", api_base=f"{provider.url}/v1", api_key="any", max_retries=0)


def run(agent: Any, text: str = "go", **options: Any) -> Any:
    async def go() -> Any:
        return await agent.run(text, **options)

    return asyncio.run(go())


def model_calls(bursar: Bursar) -> list[UsageRecord]:
    return [record for record in bursar.records() if "model" in record.tags and record.outcome != "blocked"]


def settled(bursar: Bursar, provider: Provider) -> None:
    assert bursar.store.open_reservations() == 0
    assert sum(record.cost_nanos for record in model_calls(bursar)) == provider.billed_nanos
    assert not any(record.estimated for record in model_calls(bursar))


def calls(name: str, **arguments: Any) -> Answer:
    return Answer(tool_calls=[(name, arguments)], **STEP)


def search(query: str) -> str:
    """Search."""
    return "found"


async def with_context(ctx: Context, query: str) -> str:
    """Search."""
    return type(ctx).__name__


# LlamaIndex knows a tool's context by the class in its signature, and does not read the text of an annotation.
with_context.__annotations__ = {"ctx": Context, "query": str, "return": str}


@pytest.mark.parametrize("streaming", [True, False])
def test_an_agent_is_one_run_under_its_handlers_id(
    streaming: bool, provider: Provider, guarded: Callable[..., Bursar]
) -> None:
    bursar = guarded()
    provider.script([calls("search", query="x"), Answer(text="done", **STEP)])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[guard_tool(search)], streaming=streaming)

    async def go() -> str:
        handler = agent.run("go")
        await handler
        return str(handler.run_id)

    run_id = asyncio.run(go())
    settled(bursar, provider)
    records = list(bursar.records())
    assert len(records) == 3
    assert {(one.tags["run"], one.tags["agent"], one.tags["workflow"]) for one in records} == {
        (run_id, "planner", "FunctionAgent")
    }
    assert [one.tags.get("tool") for one in records if "model" not in one.tags] == ["search"]


def test_a_hand_off_changes_the_agent_and_not_the_run(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()
    provider.script(
        [
            calls("search", query="x"),
            calls("handoff", to_agent="writer", reason="write"),
            calls("search", query="y"),
            Answer(text="done", **STEP),
        ]
    )
    llm, tool = llm_at(provider), guard_tool(search)
    team = AgentWorkflow(
        agents=[
            FunctionAgent(name="planner", description="plans", llm=llm, tools=[tool], can_handoff_to=["writer"]),
            FunctionAgent(name="writer", description="writes", llm=llm, tools=[tool]),
        ],
        root_agent="planner",
    )
    run(team)
    settled(bursar, provider)
    assert [one.tags["agent"] for one in model_calls(bursar)] == ["planner", "planner", "writer", "writer"]
    assert [one.tags["agent"] for one in bursar.records(tool="search")] == ["planner", "writer"]
    assert len({one.tags["run"] for one in bursar.records()}) == 1


def test_a_react_agent_settles(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()
    provider.script(
        [
            Answer(text='Thought: look\nAction: search\nAction Input: {"query": "x"}', **STEP),
            Answer(text="Thought: I can answer without using any more tools.\nAnswer: done", **STEP),
        ]
    )
    run(ReActAgent(name="thinker", llm=llm_at(provider), tools=[guard_tool(search)]))
    settled(bursar, provider)
    assert [one.tags["agent"] for one in model_calls(bursar)] == ["thinker", "thinker"]


@pytest.mark.parametrize("kind", [FunctionAgent, ReActAgent])
def test_an_agent_stops_at_its_budget(kind: Any, provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """The same class comes out of `await agent.run()`, once."""
    bursar = guarded(Budget("per-run", "0.030 USD", per="run"))
    looping = Answer(
        text='Thought: look\nAction: search\nAction Input: {"query": "x"}',
        tool_calls=[("search", {"query": "x"})] if kind is FunctionAgent else (),
        **STEP,
    )
    provider.script([looping] * 20)
    with pytest.raises(BudgetExceeded) as caught:
        run(kind(name="looper", llm=llm_at(provider), tools=[search]), max_iterations=30)
    assert type(caught.value) is BudgetExceeded
    assert caught.value.budget == "per-run"
    assert 1 <= provider.billed_calls <= 4
    settled(bursar, provider)
    assert len([one for one in bursar.records() if one.outcome == "blocked"]) == 1


def test_an_agent_goes_on_after_its_budget_was_raised(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """With the same context and memory; the tool does not run again."""
    bursar = guarded(Budget("team", "0.016 USD", match={"team": "poor"}))
    ran: list[str] = []

    def note(text: str) -> str:
        """Note."""
        ran.append(text)
        return "noted"

    provider.script([calls("note", text="x"), Answer(text="done", **STEP)])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[note])

    async def go() -> None:
        context = Context(agent)
        with bursar.scope(team="poor"):
            await bursar.acharge("0.008 USD")
            with pytest.raises(BudgetExceeded):
                await agent.run("go", ctx=context)
        await agent.run("go on", ctx=context)

    asyncio.run(go())
    assert len(ran) <= 1
    settled(bursar, provider)


def test_an_agent_inside_a_tool_belongs_to_the_outer_run(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()
    inner = FunctionAgent(name="inner", llm=llm_at(provider), tools=[search])

    async def delegate(task: str) -> str:
        """Delegate."""
        return str(await inner.run(task))

    outer = FunctionAgent(name="outer", llm=llm_at(provider), tools=[delegate])
    provider.script([calls("delegate", task="x"), Answer(text="part", **STEP), Answer(text="done", **STEP)])
    run(outer)
    settled(bursar, provider)
    found = [(one.tags["agent"], one.tags.get("tool")) for one in model_calls(bursar)]
    assert found == [("outer", None), ("inner", "delegate"), ("outer", None)]
    assert len({one.tags["run"] for one in bursar.records()}) == 1


def test_agents_side_by_side_stay_apart(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """In one loop, with scopes and LlamaIndex's own tags; users' text in a workflow's tags is not taken over."""
    bursar = guarded()

    async def one(number: int) -> None:
        agent = FunctionAgent(name=f"agent-{number}", llm=llm_at(provider), tools=[search])
        with bursar.scope(team=f"team-{number}"), instrument_tags({"user": f"user-{number}", "note": "private words"}):
            await agent.run("private words")

    async def all_of_them() -> None:
        await asyncio.gather(*(one(number) for number in range(5)))

    asyncio.run(all_of_them())
    settled(bursar, provider)
    found = {(r.tags["agent"], r.tags["team"], r.tags["user"]) for r in model_calls(bursar)}
    assert found == {(f"agent-{n}", f"team-{n}", f"user-{n}") for n in range(5)}
    assert len({one.tags["run"] for one in bursar.records()}) == 5
    assert "private" not in repr(list(bursar.records()))


def test_a_scopes_run_wins_over_the_frameworks(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()
    with bursar.scope(run="mine"):
        run(FunctionAgent(name="planner", llm=llm_at(provider), tools=[search]))
    assert {one.tags["run"] for one in bursar.records()} == {"mine"}


# -- engines -----------------------------------------------------------------------------------------------------


def test_an_index_and_its_query_engine(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """Building embeds, a query embeds and asks: each query is a run of its own.

    A streamed query asks when its answer is read, outside of everything that LlamaIndex traces of it: a scope says whose.
    """
    bursar = guarded()
    index = VectorStoreIndex.from_documents([Document(text="a text")], embed_model=embedding_at(provider))
    engine = index.as_query_engine(llm=llm_at(provider))
    engine.query("one")
    asyncio.run(engine.aquery("two"))
    with bursar.scope(run="streamed", workflow="mine"):
        str(index.as_query_engine(llm=llm_at(provider), streaming=True).query("three"))
    asked = [one for one in bursar.records() if one.tags["model"] == "gpt-4o"]
    assert len(asked) == 3
    assert len({one.tags["run"] for one in asked}) == 3
    assert [one.tags["workflow"] for one in asked] == ["RetrieverQueryEngine", "RetrieverQueryEngine", "mine"]
    embedded = [one for one in bursar.records() if one.tags["model"] == "text-embedding-3-small"]
    assert len(embedded) == 4
    assert sum(one.cost_nanos for one in asked) == 3 * COST_NANOS
    assert bursar.store.open_reservations() == 0


def test_a_query_is_refused_before_it_embeds(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    index = VectorStoreIndex.from_documents([Document(text="a text")], embed_model=embedding_at(provider))
    sent = provider.requests
    guarded(Budget("nothing", "0.000000001 USD"))
    with pytest.raises(BudgetExceeded):
        index.as_query_engine(llm=llm_at(provider)).query("one")
    assert provider.requests == sent


@pytest.mark.parametrize("mode", ["simple", "context", "condense_question", "condense_plus_context"])
def test_chat_engines(mode: str, provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """Streamed and not: a background thread reads the stream."""
    bursar = guarded()
    index = VectorStoreIndex.from_documents([Document(text="a text")], embed_model=embedding_at(provider))
    engine = index.as_chat_engine(chat_mode=mode, llm=llm_at(provider))
    engine.chat("one")
    assert "".join(engine.stream_chat("two").response_gen)
    asyncio.run(engine.achat("three"))
    asked = [one for one in bursar.records() if one.tags["model"] == "gpt-4o"]
    assert len(asked) == len([one for one in provider.account if one.endpoint == "openai.chat"]) >= 3
    assert not any(one.estimated for one in asked)
    assert bursar.store.open_reservations() == 0


def test_a_parse_failure_after_a_billed_answer_is_booked(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    class Animal(BaseModel):
        legs: int

    bursar = guarded()
    provider.script([Answer(text="not json", **STEP)])
    with pytest.raises(Exception, match=r".+"):
        llm_at(provider).structured_predict(Animal, _prompt("an animal"))
    settled(bursar, provider)
    assert provider.billed_calls == 1


def _prompt(text: str) -> Any:
    from llama_index.core import PromptTemplate

    return PromptTemplate(text)


# -- tools -------------------------------------------------------------------------------------------------------


def test_a_refused_tool_does_not_run_and_its_agent_reads_why(
    provider: Provider, guarded: Callable[..., Bursar]
) -> None:
    bursar = guarded(Budget("tools", "1 calls"))
    ran: list[str] = []

    def note(text: str) -> str:
        """Note."""
        ran.append(text)
        return "noted"

    provider.script([calls("note", text="a"), calls("note", text="b"), Answer(text="done", **STEP)])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[guard_tool(note, cost="0.002 USD")])
    run(agent)
    assert ran == ["a"]
    told = str(provider.account[-1].request["messages"])
    assert "The budget 'tools' refused the call" in told
    (record,) = [one for one in bursar.records(tool="note") if one.outcome == "completed"]
    assert record.cost_nanos == 2_000_000
    assert bursar.store.open_reservations() == 0


def test_tools_of_every_kind_are_counted_once(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()

    async def asearch(query: str) -> str:
        """Search."""
        return "found"

    index = VectorStoreIndex.from_documents([Document(text="a text")], embed_model=embedding_at(provider))
    engine = QueryEngineTool.from_defaults(index.as_query_engine(llm=llm_at(provider)), name="library")
    tools: list[Any] = [search, asearch, FunctionTool.from_defaults(search, name="third"), engine]
    for tool in tools:
        guarded_tool = guard_tool(tool, connection="mcp:library")
        before = len([one for one in bursar.records() if "model" not in one.tags])
        guarded_tool("x") if tool is engine else guarded_tool(query="x")
        asyncio.run(_call(guarded_tool, tool is engine))
        records = [one for one in bursar.records() if "model" not in one.tags]
        assert len(records) == before + 2
        assert {one.tags["connection"] for one in records} == {"mcp:library"}
    provider.script([calls("with_context", query="x"), Answer(text="done", **STEP)])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[guard_tool(with_context)])
    run(agent)
    assert "Context" in str(provider.account[-1].request["messages"])
    inside = [one for one in model_calls(bursar) if one.tags.get("tool") == "library"]
    assert len(inside) == 4  # the engine's own embedding and question, twice


async def _call(tool: Any, is_positional: bool) -> Any:
    return await (tool.acall("x") if is_positional else tool.acall(query="x"))


def test_parallel_tools_share_a_budget(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded(Budget("tools", "3 calls"))
    many = Answer(tool_calls=[("search", {"query": str(n)}) for n in range(8)], **STEP)
    provider.script([many, Answer(text="done", **STEP)])
    run(FunctionAgent(name="planner", llm=llm_at(provider), tools=[guard_tool(search)]))
    assert len([one for one in bursar.records(tool="search") if one.outcome == "completed"]) == 3
    assert bursar.store.open_reservations() == 0


def test_a_tool_that_fails_is_counted(guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()

    def broken() -> str:
        """Break."""
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        guard_tool(broken)()
    (record,) = bursar.records()
    assert (record.outcome, record.tags["tool"]) == ("failed", "broken")


# -- ends that an agent does not wait for ------------------------------------------------------------------------


def test_a_cancelled_agent_leaves_nothing_open(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    bursar = guarded()
    provider.script([Fault("hang")])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[search])

    async def go() -> None:
        handler = agent.run("go")
        await asyncio.to_thread(provider.wait_requests, 1)
        await handler.cancel_run()
        with pytest.raises(Exception, match=r".*"):
            await handler

    asyncio.run(go())
    assert bursar.store.open_reservations() == 0
    assert [(one.estimated, one.outcome) for one in bursar.records()] == [(True, "failed")]


def test_the_messages_of_a_memory_are_read_as_they_are(provider: Provider, guarded: Callable[..., Bursar]) -> None:
    """Nothing of what LlamaIndex shares with the call is changed by guarding it."""
    guarded()
    messages = [ChatMessage(role="user", content="hello")]
    before = [message.model_dump() for message in messages]
    llm_at(provider).chat(messages)
    assert [message.model_dump() for message in messages] == before
