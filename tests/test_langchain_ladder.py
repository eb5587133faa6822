"""Thresholds, switches and detectors through LangChain and LangGraph: what is changed is on the wire, what is stopped ends once."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents import middleware as builtin
from langchain.agents.middleware import AgentMiddleware
from langchain_core.messages import ToolMessage
from langchain_core.runnables import RunnableLambda
from langchain_core.tools import StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, interrupt
from rungs import CHEAPER, RATES
from test_langchain import CORE
from test_langchain_agents import LANGCHAIN, both, run
from test_langchain_agents import _middleware as middleware_of

from bursar import ApprovalRequired, Budget, Bursar, Operator, Stopped, Threshold
from bursar.detect import Detectors
from bursar.testing.provider import Answer, Provider
from bursar_langchain import BursarCallbackHandler, BursarMiddleware, LangChainBudgetExceeded

BURSAR = str(Path(sysconfig.get_path("scripts")) / "bursar")
HI: Any = {"messages": [("user", "hi")]}
# gpt-4o: $2.50 and $10 per million tokens; half a cent
HALF_A_CENT = Answer(input_tokens=400, output_tokens=400)
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'ahandle_event' was never awaited", "ignore:The method")


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(HALF_A_CENT, rates=RATES) as running:
        yield running


@pytest.fixture
def ran() -> list[str]:
    return []


@pytest.fixture
def search(ran: list[str]) -> StructuredTool:
    def search(query: str) -> str:
        ran.append(query)
        return f"nothing of {query}"

    return StructuredTool.from_function(search, description="Search.")


def chat(provider: Provider, model: str = "gpt-4o", **options: Any) -> ChatOpenAI:
    options = {"max_retries": 0, "max_tokens": 500, **options}
    return ChatOpenAI(model=model, base_url=f"{provider.url}/v1", api_key="local", **options)


def claude(provider: Provider) -> Any:
    module = pytest.importorskip("langchain_anthropic", reason="the lowest versions are tested without it")
    return module.ChatAnthropic(model="claude-sonnet-4-6", base_url=provider.url, api_key="local", max_tokens=500)


MODELS: dict[str, Callable[[Provider], Any]] = {
    "chat": chat,
    "chat with its limit under another name": lambda provider: chat(provider, max_completion_tokens=500),
    "responses": lambda provider: chat(provider, use_responses_api=True),
    "messages": claude,
}


def asks(*queries: str, **counts: int) -> Answer:
    counts = {"input_tokens": 400, "output_tokens": 400, **counts}
    return Answer(tool_calls=[("search", {"query": query}) for query in queries], **counts)


@contextmanager
def desk(*thresholds: Threshold, limit: str = "0.10 USD", **said: Any) -> Iterator[tuple[Bursar, Operator]]:
    """A guard with one budget, and the operator of its store."""
    with Bursar("memory:", [Budget("b", limit, thresholds=thresholds)], **said) as guard:
        yield guard, Operator(guard.store, Operator(guard.store).appoint(), by="ann")


def agent(provider: Provider, guard: Bursar, *tools: Any, model: Any = None, **options: Any) -> Any:
    return create_agent(model or chat(provider), list(tools), middleware=[BursarMiddleware(guard)], **options)


def thread(name: str = "t") -> Any:
    return {"configurable": {"thread_id": name}, "recursion_limit": 100}


def settled(guard: Bursar) -> list[Any]:
    return [record for record in guard.records() if record.model and record.outcome != "blocked"]


def is_exact(guard: Bursar, provider: Provider) -> bool:
    """Whether the records are the provider's account, to the nano-dollar, and nothing is held any more."""
    provider.wait_idle()
    booked = [record.cost_nanos for record in settled(guard)]
    return booked == [one.cost_nanos for one in provider.account] and not any(one.reserved for one in guard.status())


# -- what is changed -------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("streams", [False, True], ids=["invoke", "stream"])
@pytest.mark.parametrize("name", MODELS)
def test_the_model_and_the_maximum_that_were_granted_are_on_the_wire(
    name: str, streams: bool, is_async: bool, provider: Provider
) -> None:
    """Of this request alone: the model that others share stays as it is."""
    if (name, streams) == ("responses", True) and CORE < (1, 7):
        pytest.skip("there, a stream of responses that was cut states no usage: it is booked as estimated")
    model = MODELS[name](provider)
    before = dict(model)
    steps = Threshold("50%", "downgrade", models=CHEAPER), Threshold("50%", "clamp", max_output_tokens=100)
    with desk(*steps) as (guard, _):
        guard.charge("0.05 USD")
        made = agent(provider, guard, model=model)
        if streams:
            stream_agent(made, is_async)
        else:
            run(made, is_async)
        assert is_exact(guard, provider)
        (record,) = settled(guard)
    (served,) = provider.account
    assert (served.model, served.output_tokens) == (CHEAPER[record.model_asked], 100)
    assert (record.model, record.estimated) == (served.model, False)
    assert [action.partition(" ")[0] for action in record.actions] == ["downgrade", "clamp"]
    assert dict(model) == before


def stream_agent(made: Any, is_async: bool) -> None:
    async def drain() -> None:
        async for _ in made.astream(HI, stream_mode="messages"):
            continue

    if is_async:
        asyncio.run(drain())
    else:
        list(made.stream(HI, stream_mode="messages"))


def test_a_model_alone_is_swapped_where_the_request_says_no_maximum(provider: Provider) -> None:
    with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, _):
        guard.charge("0.05 USD")
        agent(provider, guard, model=chat(provider, max_tokens=None)).invoke(HI)
        assert is_exact(guard, provider)
    (served,) = provider.account
    assert served.model == "gpt-4o-mini"
    assert not {"max_tokens", "max_completion_tokens"} & served.request.keys()


def test_what_a_handler_cannot_change_is_asked_for_instead(provider: Provider) -> None:
    with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, operator):
        guard.charge("0.05 USD")
        config: Any = {"callbacks": [BursarCallbackHandler(guard)]}
        with pytest.raises(ApprovalRequired) as asked:
            chat(provider).invoke("hi", config)
        assert isinstance(asked.value, LangChainBudgetExceeded)
        assert provider.requests == 0
        operator.approve(asked.value.id)
        chat(provider).invoke("hi", config)
        (record,) = settled(guard)
    assert record.model == "gpt-4o"
    assert record.actions == ("downgrade cannot be carried out here: ask instead (at 50% of b)",)


def test_a_model_that_a_middleware_further_in_puts_back_is_asked_for(provider: Provider) -> None:
    """Nothing is sent by another model than was reserved for."""
    dear = chat(provider)

    class Stubborn(AgentMiddleware):
        def wrap_model_call(self, request: Any, handler: Callable[[Any], Any]) -> Any:
            return handler(request.override(model=dear))

    with desk(Threshold("50%", "downgrade", models=CHEAPER)) as (guard, _):
        guard.charge("0.05 USD")
        made = create_agent(dear, [], middleware=[BursarMiddleware(guard), Stubborn()])
        with pytest.raises(ApprovalRequired):
            made.invoke(HI)
        assert provider.requests == 0
        assert guard.status()[0].reserved == 0


def test_a_maximum_that_has_to_be_above_the_thinking_is_asked_for(provider: Provider) -> None:
    model = claude(provider).model_copy(
        update={"thinking": {"type": "enabled", "budget_tokens": 1_024}, "max_tokens": 2_000}
    )
    with desk(Threshold("50%", "clamp", max_output_tokens=100)) as (guard, _):
        guard.charge("0.05 USD")
        with pytest.raises(ApprovalRequired):
            agent(provider, guard, model=model).invoke(HI)
    assert provider.requests == 0


# -- the whole ladder ------------------------------------------------------------------------------------------------


def test_the_ladder_from_end_to_end(
    provider: Provider, search: Any, ran: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """50 % notify, 80 % downgrade, 95 % ask, approved in another process, resumed, killed at 100 %."""
    url, key = f"sqlite:///{tmp_path / 'ladder.db'}?durability=process", tmp_path / "operator.key"
    ladder = [
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}),
        Threshold("95%", "ask"),
        Threshold("100%", "kill"),
    ]
    # Eight calls of 1.2 cents, two of 0.9 by the cheaper model, and one of 0.6 or more: 12 cents.
    calls = [asks(f"dear {n}", input_tokens=1_000, output_tokens=950) for n in range(8)]
    calls += [asks(f"cheap {n}", input_tokens=1_000, output_tokens=14_750) for n in range(2)]
    provider.script([*calls, asks("approved", input_tokens=5_000, output_tokens=9_000), asks("never")])
    with Bursar(url, [Budget("month", "0.12 USD", window="month", thresholds=ladder, owner="ann")]) as guard:
        key.write_text(Operator(guard.store).appoint().text)
        made = agent(provider, guard, search, model=chat(provider, max_tokens=None), checkpointer=InMemorySaver())
        paused = made.invoke(HI, thread())
        (question,) = (one.value for one in paused["__interrupt__"])
        assert (question["budget"], question["limit"], question["spent"]) == ("month", "0.12", "0.114")
        assert [one.model for one in provider.account] == ["gpt-4o"] * 8 + ["gpt-4o-mini"] * 2
        held = made.invoke(Command(resume=True), thread())  # who resumes does not approve
        assert held["__interrupt__"][0].value["id"] == question["id"]
        assert provider.requests == 10
        assert not [record for record in caplog.records if record.name.startswith("langchain")]  # nothing went wrong

        command = [BURSAR, "approve", question["id"], "--store", url, "--key", str(key)]
        environment = {name: value for name, value in os.environ.items() if name != "BURSAR_OPERATOR_KEY"}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True)
        assert told.stdout == f"Approved: {question['id']}\n"
        with pytest.raises(Stopped, match="kill") as stopped:
            made.invoke(Command(resume=True), thread())
        assert isinstance(stopped.value, LangChainBudgetExceeded)
        assert stopped.value.cause == "killed"
        with pytest.raises(Stopped):
            agent(provider, guard).invoke(HI)

        assert provider.requests == provider.billed_calls == 11
        assert [one.model for one in provider.account[10:]] == ["gpt-4o-mini"]
        assert ran == [*(f"dear {n}" for n in range(8)), "cheap 0", "cheap 1"]
        assert is_exact(guard, provider)
        records = settled(guard)
        assert len({record.tags["run"] for record in records}) == 1
        assert {record.model_asked for record in records[8:]} == {"gpt-4o"}
        alerts = [alert.facts["action"] for alert, _ in guard.store.alerts() if alert.kind == "threshold"]
        assert sorted(alerts) == ["ask", "downgrade", "kill", "notify"]


# -- asking ----------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("how", [Command(resume="go on"), None], ids=["resume", "None"])
def test_an_approved_graph_goes_on_with_the_call_that_asked(is_async: bool, how: Any, provider: Provider) -> None:
    """Any graph with a checkpointer, by the handler alone."""

    def node(state: MessagesState) -> Any:
        return {"messages": [chat(provider).invoke(state["messages"])]}

    async def anode(state: MessagesState) -> Any:
        return {"messages": [await chat(provider).ainvoke(state["messages"])]}

    graph = StateGraph(MessagesState)
    for name, after in (("first", "second"), ("second", END)):
        graph.add_node(name, anode if is_async else node)
        graph.add_edge(name, after)
    graph.add_edge(START, "first")
    made = graph.compile(checkpointer=InMemorySaver())
    with desk(Threshold("5%", "ask")) as (guard, operator):
        config = {**thread(), "callbacks": [BursarCallbackHandler(guard)]}
        paused = run(made, is_async, config)
        (question,) = (one.value for one in paused["__interrupt__"])
        assert provider.requests == 1
        operator.approve(question["id"])
        run(made, is_async, config, how)
        assert provider.requests == 2
        assert is_exact(guard, provider)


@both
def test_a_tool_that_asks_pauses_and_its_sibling_does_not_run_twice(
    is_async: bool, provider: Provider, search: Any, ran: list[str]
) -> None:
    provider.script([asks("one", "two")])
    budgets = [Budget("tools", "10 calls", thresholds=[Threshold("10%", "ask")])]
    with Bursar("memory:", budgets) as guard:
        operator = Operator(guard.store, Operator(guard.store).appoint())
        made = agent(provider, guard, search, checkpointer=InMemorySaver())
        # Both at once may both be granted: a mark is crossed by what is booked.
        one_by_one = thread() | {"max_concurrency": 1}
        paused = run(made, is_async, one_by_one)
        assert len(ran) == 1
        operator.approve(paused["__interrupt__"][0].value["id"])
        done = run(made, is_async, one_by_one, Command(resume=True))
    assert sorted(ran) == ["one", "two"]
    assert provider.requests == 2
    assert {message.status for message in done["messages"] if isinstance(message, ToolMessage)} == {"success"}


@both
def test_a_subagent_goes_on_where_it_was_paused(is_async: bool, provider: Provider, search: Any) -> None:
    """Neither the agent's nor the subagent's paid calls are repeated."""
    with desk(Threshold("10%", "ask")) as (guard, operator):
        helper = agent(provider, guard, search, name="helper")

        def help_me(query: str) -> str:
            return str(helper.invoke(HI)["messages"][-1].content)

        async def ahelp_me(query: str) -> str:
            return str((await helper.ainvoke(HI))["messages"][-1].content)

        helping = StructuredTool.from_function(help_me, ahelp_me, name="help_me", description="Ask the helper.")
        boss = agent(provider, guard, helping, name="boss", checkpointer=InMemorySaver())
        provider.script(
            [Answer(tool_calls=[("help_me", {"query": "x"})], input_tokens=400, output_tokens=400), asks("x")]
        )
        paused = run(boss, is_async, thread())
        assert provider.requests == 2
        operator.approve(paused["__interrupt__"][0].value["id"])
        run(boss, is_async, thread(), Command(resume=True))
        assert provider.requests == 4
        assert is_exact(guard, provider)


@both
@pytest.mark.parametrize("how", ["value", "None", "by id"])
def test_what_resumes_the_call_is_no_answer_to_another_question(is_async: bool, how: str, provider: Provider) -> None:
    """A node with interrupts of its own, before the call that asks and after it."""
    answers: list[tuple[str, str]] = []

    def node(state: MessagesState) -> Any:
        name = interrupt("name?")
        said = chat(provider).invoke(name)
        answers.append((name, interrupt("sure?")))
        return {"messages": [said]}

    graph = StateGraph(MessagesState)
    graph.add_node("node", node)
    graph.add_edge(START, "node")
    made = graph.compile(checkpointer=InMemorySaver())
    with desk(Threshold("50%", "ask")) as (guard, operator):
        guard.charge("0.05 USD")
        config = {**thread(), "callbacks": [BursarCallbackHandler(guard)]}

        def goes_on(given: Any) -> Any:
            (asked,) = run(made, is_async, config, given)["__interrupt__"]
            return asked

        assert goes_on(HI).value == "name?"
        asked = goes_on(Command(resume="ann"))
        again = goes_on(Command(resume=True))  # nobody has approved yet
        assert asked.value == again.value
        operator.approve(asked.value["id"])
        means = {"value": Command(resume=True), "None": None, "by id": Command(resume={again.id: True})}
        assert goes_on(means[how]).value == "sure?"
        run(made, is_async, config, Command(resume="no"))
    assert answers == [("ann", "no")]


@both
def test_what_is_denied_is_refused_and_what_cannot_pause_raises(is_async: bool, provider: Provider) -> None:
    with desk(Threshold("50%", "ask")) as (guard, operator):
        guard.charge("0.05 USD")
        made = agent(provider, guard, checkpointer=InMemorySaver())
        question = run(made, is_async, thread())["__interrupt__"][0].value
        with pytest.raises(ApprovalRequired) as asked:
            run(agent(provider, guard), is_async)
        assert isinstance(asked.value, LangChainBudgetExceeded)
        assert asked.value.id == question["id"]
        operator.deny(question["id"], why="not today")
        with pytest.raises(LangChainBudgetExceeded, match="not today") as denied:
            run(made, is_async, thread(), Command(resume=True))
        assert not isinstance(denied.value, ApprovalRequired)
    assert provider.requests == 0


def test_no_fallback_takes_the_place_of_an_approval(provider: Provider) -> None:
    with desk(
        Threshold(
            "50%",
            "ask",
        )
    ) as (guard, _):
        guard.charge("0.05 USD")
        middleware = BursarMiddleware(guard, fallback=chat(provider, "gpt-4o-mini"))
        with pytest.raises(ApprovalRequired):
            create_agent(chat(provider), [], middleware=[middleware]).invoke(HI)
        assert len([record for record in guard.records() if record.outcome == "blocked"]) == 1


# -- the switch ------------------------------------------------------------------------------------------------------


async def _each(stream: Any, seen: Callable[[], None]) -> None:
    async for _ in stream:
        seen()


def _each_of(stream: Any, seen: Callable[[], None]) -> None:
    for _ in stream:
        seen()


class _Seen(BursarCallbackHandler):
    """Tells of the first part of an answer, for calls that hand out no stream."""

    def __init__(self, bursar: Bursar, seen: Callable[[], None]) -> None:
        super().__init__(bursar)
        self._seen = seen

    def on_llm_new_token(self, token: Any, **more: Any) -> None:
        self._seen()
        super().on_llm_new_token(token, **more)


STREAMS: dict[str, Callable[[Any, Any, Callable[[], None]], Any]] = {
    "stream": lambda m, c, seen: _each_of(m.stream("hi", c), seen),
    "astream": lambda m, c, seen: asyncio.run(_each(m.astream("hi", c), seen)),
    "invoke(streaming=True)": lambda m, c, seen: m.model_copy(update={"streaming": True}).invoke("hi", c),
    "ainvoke(streaming=True)": lambda m, c, seen: asyncio.run(
        m.model_copy(update={"streaming": True}).ainvoke("hi", c)
    ),
    "agent": lambda m, c, seen: _each_of(create_agent(m, []).stream(HI, c, stream_mode="messages"), seen),
}
if CORE >= (1, 4):
    STREAMS["stream_events v3"] = lambda m, c, seen: _each_of(m.stream_events("hi", c, version="v3"), seen)


@pytest.mark.parametrize("style", STREAMS)
def test_a_stream_is_stopped_where_it_is(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guard looks every half a second; here more often."""
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    long = Answer(input_tokens=400, output_tokens=400, chunks=100, event_delay_s=0.02)
    with Provider(long) as provider, desk() as (guard, operator):
        frozen: list[str] = []

        def freeze() -> None:
            if not frozen:
                frozen.append(operator.freeze({"team": "x"}, why="enough"))

        handler = _Seen(guard, freeze)
        with guard.scope(team="x"), pytest.raises(Stopped) as stopped:
            STREAMS[style](chat(provider, stream_usage=True), {"callbacks": [handler]}, freeze)
        assert isinstance(stopped.value, LangChainBudgetExceeded)
        assert (stopped.value.cause, stopped.value.why) == ("frozen", "enough")
        assert handler.drain()
        provider.wait_idle()
        assert provider.requests == 1
        if CORE >= (1, 7) or style != "astream":  # there, its connection waits for the garbage collector
            assert provider.account[0].client_gone  # it is not generated to its end
        (record,) = settled(guard)
        assert (record.outcome, record.estimated) == ("failed", True)
        assert record.reason == "stopped in mid-stream (frozen)"
        assert guard.status()[0].reserved == 0


@both
@pytest.mark.parametrize("name", ["none", "ModelRetryMiddleware", "ModelFallbackMiddleware"])
def test_what_is_stopped_stays_stopped(is_async: bool, name: str, provider: Provider) -> None:
    if LANGCHAIN < (1, 4) and name == "ModelRetryMiddleware":
        pytest.skip("before 1.4 the retry swallows every error into an answer of its own")
    others: list[Any] = []
    if name == "ModelRetryMiddleware":
        others = [middleware_of(name, max_retries=2, initial_delay=0.0)]
    elif name == "ModelFallbackMiddleware":
        others = [builtin.ModelFallbackMiddleware(chat(provider, "gpt-4o-mini"))]
    with desk() as (guard, operator):
        operator.freeze({})
        middleware = [*others, BursarMiddleware(guard, fallback=chat(provider, "gpt-4o-mini"))]
        with pytest.raises(Stopped):
            run(create_agent(chat(provider), [], middleware=middleware), is_async)
    assert provider.requests == 0


@both
def test_a_tool_that_is_stopped_ends_the_run(is_async: bool, provider: Provider, search: Any, ran: list[str]) -> None:
    provider.script([asks("x")])
    with desk() as (guard, operator):
        operator.freeze({"tool": "search"})
        with pytest.raises(Stopped):
            run(agent(provider, guard, search), is_async)
    assert (ran, provider.requests) == ([], 1)


# -- detectors -------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("door", ["middleware", "handler"])
def test_an_agent_that_loops_is_stopped(
    door: str, is_async: bool, provider: Provider, search: Any, ran: list[str]
) -> None:
    """The same tool, the same arguments, the same result; and another run may go on."""
    provider.script([asks("weather")] * 20)
    with desk(limit="10 USD", detectors=Detectors()) as (guard, _):
        config: Any = {"recursion_limit": 100}
        made = agent(provider, guard, search)
        if door == "handler":
            made, config["callbacks"] = create_agent(chat(provider), [search]), [BursarCallbackHandler(guard)]
        with pytest.raises(Stopped) as stopped:
            run(made, is_async, config)
        assert isinstance(stopped.value, LangChainBudgetExceeded)
        assert stopped.value.cause == "loop"
        assert 2 <= len(ran) <= provider.requests <= 4
        assert is_exact(guard, provider)
        with Provider(HALF_A_CENT) as other:
            run(agent(other, guard, search), is_async)


def test_a_tool_that_is_called_again_and_again_is_stopped(search: Any, ran: list[str]) -> None:
    """Where no model is asked, the tools' arguments tell."""

    def chain(given: str) -> None:
        for _ in range(20):
            search.invoke({"query": "weather"})

    with desk(detectors=Detectors()) as (guard, _):
        with pytest.raises(Stopped) as stopped:
            RunnableLambda(chain).invoke("hi", {"callbacks": [BursarCallbackHandler(guard)]})
        assert stopped.value.cause == "loop"
    assert 2 <= len(ran) <= 4


def test_an_agent_that_gets_on_is_not_stopped(provider: Provider, search: Any, ran: list[str]) -> None:
    queries = [
        "rivers of Norway",
        "price of copper",
        "who wrote Emma",
        "best bread",
        "Ohm's law",
        "tides",
        "jade",
        "owls",
    ]
    provider.script([asks(query) for query in queries])
    with desk(limit="10 USD", detectors=Detectors()) as (guard, _):
        agent(provider, guard, search).invoke(HI, {"recursion_limit": 100})
    assert (ran, provider.requests) == (queries, len(queries) + 1)
