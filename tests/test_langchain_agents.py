"""Agents and graphs: the middleware, tools, retries and fallbacks, who a call belongs to, and runs that are resumed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from functools import cache
from importlib.metadata import version
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents import middleware as builtin
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import ToolMessage
from langchain_core.tools import StructuredTool, tool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, interrupt

from bursar import Budget, Bursar, PriceBook
from bursar.testing.provider import Answer, Fault, Provider
from bursar_langchain import BursarCallbackHandler, BursarMiddleware, LangChainBudgetExceeded, install

LANGCHAIN = tuple(int(part) for part in version("langchain").split(".")[:2])
HI: Any = {"messages": [("user", "hi")]}
FINAL = Answer(input_tokens=200, output_tokens=30)
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'ahandle_event' was never awaited")


def asks(*tools: str) -> Answer:
    """An answer that calls these tools at once."""
    return Answer(input_tokens=100, output_tokens=20, tool_calls=[(name, {"query": "x"}) for name in tools])


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(FINAL) as running:
        yield running


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def tools(ran: list[str]) -> list[StructuredTool]:
    def of(name: str) -> StructuredTool:
        def run(query: str) -> str:
            ran.append(name)
            return f"{name} of {query}"

        return StructuredTool.from_function(run, name=name, description=f"Do {name}.")

    return [of("search"), of("mail")]


def guard_of(*limits: str, **options: Any) -> Bursar:
    return Bursar("memory:", budgets=[Budget(limit, limit=limit, **options) for limit in limits])


def chat(provider: Provider, model: str = "gpt-4o", **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=f"{provider.url}/v1", api_key="local", **{"max_retries": 0, "max_tokens": 100, **options}
    )


def run(agent: Any, is_async: bool = False, config: Any = None, given: Any = HI) -> Any:
    return loop().run_until_complete(agent.ainvoke(given, config)) if is_async else agent.invoke(given, config)


@cache
def loop() -> asyncio.AbstractEventLoop:
    """One for all: langchain-openai keeps its connections for as long as the process lives."""
    return asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def _close_loop() -> Iterator[None]:
    yield
    loop().close()


def costs(guard: Bursar) -> int:
    return sum(record.cost_nanos for record in guard.records())


def nothing_is_reserved(guard: Bursar) -> bool:
    return all(status.reserved == 0 for status in guard.status())


both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


# -- the middleware --------------------------------------------------------------------------------------------------


@both
def test_the_middleware_alone_guards_model_calls_and_tools(
    is_async: bool, provider: Provider, tools: Any, ran: list[str]
) -> None:
    provider.script([asks("search")])
    with guard_of("1 USD") as guard:
        run(create_agent(chat(provider), tools, middleware=[BursarMiddleware(guard, team="core")]), is_async)
        records = list(guard.records())
        assert [record.tags.get("tool", "") for record in records] == ["", "search", ""]
        assert {record.tags["team"] for record in records} == {"core"}
        assert len({record.tags["run"] for record in records}) == 1
        assert costs(guard) == provider.billed_nanos


@both
def test_handler_installed_and_middleware_reserve_once(is_async: bool, provider: Provider, tools: Any) -> None:
    provider.script([asks("search")])
    with guard_of("1 USD") as guard:
        uninstall = install(guard)
        try:
            agent = create_agent(chat(provider), tools, middleware=[BursarMiddleware(guard)])
            run(agent, is_async, {"callbacks": [BursarCallbackHandler(guard)]})
        finally:
            uninstall()
        assert len(list(guard.records())) == 3
        assert costs(guard) == provider.billed_nanos
        assert nothing_is_reserved(guard)


@both
@pytest.mark.parametrize("estimate", ["learned", "strict"])
def test_an_answer_is_made_smaller_where_the_budget_has_no_room(
    is_async: bool, estimate: str, provider: Provider
) -> None:
    """The request says no maximum, so gpt-4o's counts: $0.16. Nobody but the middleware may change that."""
    model = chat(provider, max_tokens=None)
    with guard_of("0.02 USD", estimate=estimate) as guard:
        with pytest.raises(LangChainBudgetExceeded):
            run(create_agent(model, []), is_async, {"callbacks": [BursarCallbackHandler(guard)]})
        assert provider.requests == 0
        run(create_agent(model, [], middleware=[BursarMiddleware(guard)]), is_async)
        (sent,) = provider.account
        assert 16 <= sent.request["max_completion_tokens"] < 2_000
        (_, record) = guard.records()  # the refusal, then one settlement
        assert (record.cost_nanos, record.estimated) == (provider.billed_nanos, False)
        assert nothing_is_reserved(guard)


def test_a_smaller_answer_that_an_inner_middleware_takes_back_is_refused(provider: Provider) -> None:
    class Stubborn(AgentMiddleware):
        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            return handler(request.override(model_settings={"max_tokens": 16_000}))

    with guard_of("0.02 USD") as guard:
        agent = create_agent(chat(provider), [], middleware=[BursarMiddleware(guard), Stubborn()])
        with pytest.raises(LangChainBudgetExceeded):
            agent.invoke(HI)
        assert provider.requests == 0
        assert nothing_is_reserved(guard)


@both
def test_the_fallback_answers_where_the_first_model_is_too_dear(is_async: bool, provider: Provider) -> None:
    with guard_of("0.0004 USD") as guard:
        middleware = BursarMiddleware(guard, fallback=chat(provider, "gpt-4o-mini"))
        run(create_agent(chat(provider, max_tokens=None), [], middleware=[middleware]), is_async)
        assert [entry.model for entry in provider.account] == ["gpt-4o-mini"]


@both
@pytest.mark.parametrize("mode", ["values", "updates", "messages"])
def test_streams_state_their_usage(is_async: bool, mode: str, provider: Provider) -> None:
    async def drain(stream: Any) -> None:
        async for _ in stream:
            continue

    with guard_of("1 USD") as guard:
        agent = create_agent(chat(provider), [], middleware=[BursarMiddleware(guard)])
        if is_async:
            asyncio.run(drain(agent.astream(HI, stream_mode=mode)))
        else:
            list(agent.stream(HI, stream_mode=mode))
        (record,) = guard.records()
        assert (record.cost_nanos, record.estimated) == (provider.billed_nanos, False)


@both
def test_a_refused_tool_becomes_an_error_that_the_model_reads(
    is_async: bool, provider: Provider, tools: Any, ran: list[str]
) -> None:
    provider.script([asks("search", "mail")])
    with guard_of("1 USD", "1 calls") as guard:
        answer = run(create_agent(chat(provider), tools, middleware=[BursarMiddleware(guard)]), is_async)
        results = [message for message in answer["messages"] if isinstance(message, ToolMessage)]
        assert sorted(message.status for message in results) == ["error", "success"]
        assert len(ran) == 1
        assert provider.requests == 2  # the agent went on


@both
def test_without_the_middleware_a_refused_tool_ends_the_run(
    is_async: bool, provider: Provider, tools: Any, ran: list[str]
) -> None:
    provider.script([asks("search")])
    with guard_of("1 calls") as guard:
        uninstall = install(guard)
        with guard.tool("another"):
            assert guard.status()[0].reserved == 1
        try:
            with pytest.raises(LangChainBudgetExceeded):
                run(create_agent(chat(provider), tools), is_async)
        finally:
            uninstall()
    assert ran == []


def test_a_priced_tool_is_reserved_and_settled_and_its_failure_counts(provider: Provider, ran: list[str]) -> None:
    @tool
    def crawl(query: str) -> str:
        """Crawl the web."""
        raise ValueError("no such page")

    book = PriceBook.packaged().with_overrides(tools={"crawl": "0.002"})
    provider.script([asks("crawl"), asks("crawl")])
    for limit, outcomes in (("1 USD", ["failed"]), ("0.0021 USD", [])):
        with Bursar("memory:", budgets=[Budget("all", limit=limit)], prices=book) as guard:
            agent = create_agent(chat(provider), [crawl])
            with pytest.raises((ValueError, LangChainBudgetExceeded)):
                agent.invoke(HI, {"callbacks": [BursarCallbackHandler(guard)]})
            booked = [record for record in guard.records() if record.tags.get("tool") and record.kind == "settlement"]
            assert [record.outcome for record in booked] == outcomes
            assert [record.cost_nanos for record in booked] == [2_000_000] * len(outcomes)


def test_a_cancelled_agent_leaves_nothing_open(provider: Provider) -> None:
    provider.script([Fault("hang")] * 2)
    with guard_of("1 USD") as guard:
        handler = BursarCallbackHandler(guard)

        async def late(agent: Any, config: Any, count: int) -> None:
            task = asyncio.ensure_future(agent.ainvoke(HI, config))
            await asyncio.to_thread(provider.wait_requests, count)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await asyncio.to_thread(handler.drain, 10.0)

        asyncio.run(late(create_agent(chat(provider), [], middleware=[BursarMiddleware(guard)]), {}, 1))
        asyncio.run(late(create_agent(chat(provider), []), {"callbacks": [handler]}, 2))
        assert [(record.kind, record.estimated) for record in guard.records()] == [("settlement", True)] * 2
        assert nothing_is_reserved(guard)


# -- retries and fallbacks: no request gets through ------------------------------------------------------------------


def _middleware(name: str, **options: Any) -> Any:
    kind = getattr(builtin, name, None)
    if kind is None:
        pytest.skip(f"langchain {version('langchain')} has no {name}")
    return kind(**options)


@both
@pytest.mark.parametrize("name", ["none", "ModelRetryMiddleware", "ModelFallbackMiddleware"])
def test_no_retry_and_no_fallback_sends_a_refused_call(is_async: bool, name: str, provider: Provider) -> None:
    with guard_of("0.000001 USD") as guard:
        others: list[Any] = []
        if name == "ModelRetryMiddleware":
            others = [_middleware(name, max_retries=2, initial_delay=0.0)]
        elif name == "ModelFallbackMiddleware":
            others = [builtin.ModelFallbackMiddleware(chat(provider))]
        agent = create_agent(chat(provider), [], middleware=[*others, BursarMiddleware(guard)])
        if LANGCHAIN >= (1, 4) or name != "ModelRetryMiddleware":
            with pytest.raises(LangChainBudgetExceeded):
                run(agent, is_async)
        else:
            run(agent, is_async)  # before 1.4 the retry swallows every error into an answer of its own
        assert provider.requests == 0


@both
@pytest.mark.parametrize("name", ["ToolRetryMiddleware", "ToolErrorMiddleware"])
def test_no_tool_middleware_swallows_a_refusal(
    is_async: bool, name: str, provider: Provider, tools: Any, ran: list[str]
) -> None:
    if LANGCHAIN < (1, 4):
        pytest.skip("before 1.4 they swallow every error, and the run goes on without the tool")
    provider.script([asks("search")])
    options: dict[str, Any] = {"max_retries": 2, "initial_delay": 0.0}
    if name == "ToolErrorMiddleware":
        options = {"on_error": lambda error, request: "swallowed"}
    with guard_of("1 calls") as guard:
        with guard.tool("another"):
            assert guard.status()[0].reserved == 1
        agent = create_agent(chat(provider), tools, middleware=[_middleware(name, **options)])
        with pytest.raises(LangChainBudgetExceeded):
            run(agent, is_async, {"callbacks": [BursarCallbackHandler(guard)]})
    assert ran == []


def test_a_graph_s_retry_policy_does_not_repeat_a_refusal(provider: Provider) -> None:
    attempts = []
    with guard_of("0.000001 USD") as guard:

        def node(state: MessagesState) -> Any:
            attempts.append(1)
            return {"messages": [chat(provider).invoke(state["messages"])]}

        graph = StateGraph(MessagesState)
        graph.add_node("node", node, retry_policy=RetryPolicy(max_attempts=3, initial_interval=0.0))
        graph.add_edge(START, "node")
        with pytest.raises(LangChainBudgetExceeded):
            graph.compile().invoke(HI, {"callbacks": [BursarCallbackHandler(guard)]})
    assert len(attempts) == 1
    assert provider.requests == 0


# -- attribution -----------------------------------------------------------------------------------------------------


@both
def test_each_call_says_who_made_it(is_async: bool, provider: Provider, tools: Any) -> None:
    provider.script([asks("search")])
    with guard_of("1 USD") as guard:
        search = tools[0].model_copy(update={"metadata": {"connection": "tavily"}})
        agent = create_agent(chat(provider), [search], name="planner", checkpointer=InMemorySaver())
        config: Any = {
            "callbacks": [BursarCallbackHandler(guard, team="research", user="nobody")],
            "configurable": {"thread_id": "t-1"},
            "metadata": {"bursar": {"user": "ann"}},
        }
        run(agent, is_async, config)
        first, called, second = (record.tags for record in guard.records())
        assert {tags["agent"] for tags in (first, called, second)} == {"planner"}
        assert {(tags["thread"], tags["team"], tags["user"]) for tags in (first, called, second)} == {
            ("t-1", "research", "ann")
        }
        assert len({tags["run"] for tags in (first, called, second)}) == 1
        assert len({tags["parent_run"] for tags in (first, called, second)}) == 3
        assert (first["node"], called["node"]) == ("model", "tools")
        assert (first["provider"], first["connection"], first["model"]) == ("openai", "openai", "gpt-4o")
        assert (called["tool"], called["connection"]) == ("search", "tavily")
        assert "tool" not in first


def test_a_scope_has_the_last_word(provider: Provider) -> None:
    with guard_of("1 USD") as guard:
        config: Any = {
            "callbacks": [BursarCallbackHandler(guard, customer="mallory")],
            "metadata": {"bursar": {"customer": "mallory", "run": "mine"}},
        }
        with guard.scope(customer="acme", run="r-17"):
            create_agent(chat(provider), []).invoke(HI, config)
        (record,) = guard.records()
        assert (record.tags["customer"], record.tags["run"]) == ("acme", "r-17")


def test_tags_that_no_store_takes_are_made_printable(provider: Provider) -> None:
    with guard_of("1 USD") as guard:
        config: Any = {"callbacks": [BursarCallbackHandler(guard)], "metadata": {"thread_id": "a\nb" + "c" * 1_000}}
        chat(provider).invoke("hi", config)
        (record,) = guard.records()
        assert record.tags["thread"] == "a?b" + "c" * 509


@both
def test_a_subagent_in_a_tool_belongs_to_the_outermost_run(is_async: bool, provider: Provider) -> None:
    with guard_of("1 USD") as guard:
        helper = create_agent(chat(provider), [], name="helper", middleware=[BursarMiddleware(guard)])

        @tool
        def ask(query: str) -> str:
            """Ask the helper."""
            helper.invoke(HI)
            return "done"

        provider.script([asks("ask")])
        boss = create_agent(chat(provider), [ask], name="boss", middleware=[BursarMiddleware(guard)])
        run(boss, is_async)
        records = list(guard.records())
        assert len(records) == 4
        assert len({record.tags["run"] for record in records}) == 1
        if LANGCHAIN >= (1, 4):
            assert {record.tags["agent"] for record in records} == {"boss", "helper"}
            assert [r.tags.get("tool") for r in records if r.tags["agent"] == "helper"] == ["ask"]


def test_plain_calls_belong_to_the_process_and_plain_threads_to_the_documented_default(provider: Provider) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with guard_of("1 USD") as guard, ThreadPoolExecutor(1) as pool:
        config: Any = {"callbacks": [BursarCallbackHandler(guard)]}
        with guard.scope(run="r-1"):
            chat(provider).batch(["a", "b"], config)  # LangChain's own threads inherit the scope
            pool.submit(chat(provider).invoke, "c", config).result()  # a plain thread does not
        runs = [record.tags["run"] for record in guard.records()]
        assert runs[:2] == ["r-1", "r-1"]
        assert runs[2].startswith("process-")


# -- resuming --------------------------------------------------------------------------------------------------------


def _with_approval(provider: Provider, saver: InMemorySaver) -> Any:
    def model(state: MessagesState) -> Any:
        return {"messages": [chat(provider).invoke(state["messages"])]}

    def approve(state: MessagesState) -> Any:
        interrupt("go on?")
        return {}

    graph = StateGraph(MessagesState)
    for name, node in (("first", model), ("approve", approve), ("second", model)):
        graph.add_node(name, node)
    for start, end in ((START, "first"), ("first", "approve"), ("approve", "second"), ("second", END)):
        graph.add_edge(start, end)
    return graph.compile(checkpointer=saver)


@both
@pytest.mark.parametrize("elsewhere", [False, True], ids=["same process", "another process"])
def test_a_resumed_run_is_the_same_run(is_async: bool, elsewhere: bool, provider: Provider) -> None:
    """A budget per run holds across the interruption; new input on the same thread begins a new run."""
    with guard_of("1 USD", per="run") as guard:
        agent = _with_approval(provider, InMemorySaver())

        def config() -> Any:
            return {"callbacks": [BursarCallbackHandler(guard)], "configurable": {"thread_id": "t-1"}}

        run(agent, is_async, config())
        if elsewhere:
            BursarCallbackHandler(guard)._gate.runs._threads.clear()
        run(agent, is_async, config(), Command(resume="yes"))
        run(agent, is_async, config())
        first, second, third = (record.tags["run"] for record in guard.records())
        assert first == second != third


@both
def test_a_refused_agent_goes_on_when_the_budget_is_raised(
    is_async: bool, provider: Provider, tools: Any, ran: list[str]
) -> None:
    """The checkpoint keeps what was paid for: neither the model's first call nor the tool is repeated."""
    provider.script([asks("search", "mail")])
    saver = InMemorySaver()
    agent = create_agent(chat(provider), tools, checkpointer=saver)
    with guard_of("1 USD", "1 requests") as tight:
        config: Any = {"callbacks": [BursarCallbackHandler(tight)], "configurable": {"thread_id": "t-1"}}
        with pytest.raises(LangChainBudgetExceeded):
            run(agent, is_async, config)
    assert (provider.requests, sorted(ran)) == (1, ["mail", "search"])
    with guard_of("1 USD") as wide:
        config = {"callbacks": [BursarCallbackHandler(wide)], "configurable": {"thread_id": "t-1"}}
        run(agent, is_async, config, None)
    assert (provider.requests, sorted(ran)) == (2, ["mail", "search"])
