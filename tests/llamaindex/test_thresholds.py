"""Thresholds, the switch and the detectors: what of them reaches LlamaIndex's calls, streams, agents and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx
import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.agent.workflow import AgentWorkflow, FunctionAgent, ReActAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.workflow import Context
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index.llms.openai_like import OpenAILike

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Operator, Stopped, Threshold, UsageRecord
from bursar.detect import Detectors
from bursar.testing.provider import Answer, Provider
from bursar_llamaindex import BursarCallbackHandler, guard_llm, guard_tool, install

HELLO = [ChatMessage(role="user", content="hello")]
STEP = {"input_tokens": 1_000, "output_tokens": 500}
DOWN = Threshold("1%", "downgrade", models={"gpt-4o": "gpt-4o-mini", "claude-sonnet-4-5": "claude-haiku-4-5"})
CLAMP = Threshold("1%", "clamp", max_output_tokens=100)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(**STEP)) as provider:
        yield provider


@pytest.fixture
def guarded() -> Iterator[Callable[..., Bursar]]:
    """guarded(*thresholds): a Bursar with one budget of a dollar, installed."""
    undo: list[Callable[[], None]] = []

    def make(*thresholds: Threshold, limit: str = "1 USD", beside: Sequence[Budget] = (), **said: Any) -> Bursar:
        bursar = Bursar("memory:", [Budget("b", limit, thresholds=thresholds), *beside], **said)
        undo.extend([install(bursar), bursar.close])
        return bursar

    yield make
    for one in undo:
        one()


def llm_at(provider: Provider, kind: Any = OpenAI, **options: Any) -> Any:
    settings = {"api_key": "any", "max_retries": 0}
    if kind is Anthropic:
        return Anthropic(
            **{"model": "claude-sonnet-4-5", "base_url": provider.url, "max_tokens": 500} | settings | options
        )
    limit = {} if kind is OpenAIResponses else {"max_tokens": 500}
    return kind(**{"model": "gpt-4o", "api_base": f"{provider.url}/v1"} | limit | settings | options)


async def drained(stream: Any) -> list[Any]:
    return [part async for part in await stream]


async def awaited(method: Any, *args: Any, **options: Any) -> Any:
    return await method(*args, **options)


STYLES: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat(HELLO),
    "complete": lambda llm: llm.complete("hello"),
    "stream_chat": lambda llm: list(llm.stream_chat(HELLO)),
    "achat": lambda llm: asyncio.run(awaited(llm.achat, HELLO)),
    "astream_chat": lambda llm: asyncio.run(drained(llm.astream_chat(HELLO))),
}


def spend(bursar: Bursar, cost: str) -> None:
    bursar.charge(cost, tool="before")


def model_calls(bursar: Bursar) -> list[UsageRecord]:
    return [record for record in bursar.records() if "model" in record.tags and record.outcome != "blocked"]


def booked_as_billed(bursar: Bursar, provider: Provider) -> None:
    assert bursar.store.open_reservations() == 0
    assert not any(record.estimated for record in model_calls(bursar))
    assert [record.usage["output_tokens"] for record in model_calls(bursar)] == [
        one.output_tokens for one in provider.account
    ]


# -- what is changed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("kind", [OpenAI, OpenAIResponses, Anthropic])
def test_a_downgrade_is_on_the_wire(kind: Any, style: str, provider: Provider, guarded: Any) -> None:
    bursar = guarded(DOWN, CLAMP)
    spend(bursar, "0.02 USD")
    STYLES[style](llm_at(provider, kind))
    (served,), (record,) = provider.account, model_calls(bursar)
    asked, given = ("claude-sonnet-4-5", "claude-haiku-4-5") if kind is Anthropic else ("gpt-4o", "gpt-4o-mini")
    assert served.request["model"] == record.tags["model"] == given
    assert record.model_asked == asked
    assert {served.request.get(name) for name in ("max_tokens", "max_output_tokens")} == {100, None}
    assert [one.split()[0] for one in record.actions] == ["downgrade", "clamp"]
    assert served.output_tokens == 100
    booked_as_billed(bursar, provider)


@pytest.mark.parametrize(
    ("options", "settings", "changed"),
    [
        ({"max_tokens": None}, {}, {"model": "gpt-4o-mini", "max_tokens": 100}),
        ({"max_tokens": None}, {"max_tokens": 400}, {"model": "gpt-4o-mini", "max_tokens": 100}),
        ({"max_tokens": None}, {"max_completion_tokens": 400}, {"max_completion_tokens": 100}),
        ({"additional_kwargs": {"max_tokens": 400}}, {}, {"model": "gpt-4o-mini", "max_tokens": 100}),
        (
            {},
            {"model": "gpt-4o", "extra_body": {"user": "ann"}},
            {"model": "gpt-4o-mini", "max_tokens": 100, "user": "ann"},
        ),
        ({"max_tokens": 50}, {}, {"model": "gpt-4o-mini", "max_tokens": 50}),
        ({"model": "o3-mini"}, {}, {"model": "o3-mini", "max_completion_tokens": 100, "max_tokens": None}),
    ],
)
def test_wherever_the_request_is_set_what_is_granted_is_sent(
    options: Any, settings: Any, changed: Any, provider: Provider, guarded: Any
) -> None:
    bursar = guarded(DOWN, CLAMP)
    spend(bursar, "0.02 USD")
    llm_at(provider, **options).chat(HELLO, **settings)
    (served,) = provider.account
    assert {name: served.request.get(name) for name in changed} == changed
    booked_as_billed(bursar, provider)


@pytest.mark.parametrize(
    "options", [{"additional_kwargs": {"model": "gpt-4o"}}, {"additional_kwargs": {"extra_body": {"user": "ann"}}}]
)
def test_what_cannot_be_changed_falls_to_the_next_stricter(options: Any, provider: Provider, guarded: Any) -> None:
    """Where the object's own settings win over the call's; the record says so."""
    bursar = guarded(DOWN, CLAMP, Threshold("2%", "throttle", rate="60 requests/minute"))
    spend(bursar, "0.02 USD")
    llm_at(provider, **options).chat(HELLO)
    (record,), (served,) = model_calls(bursar), provider.account
    fixed = next(iter(options["additional_kwargs"]))
    if fixed == "model":
        assert (served.request["model"], served.request["max_tokens"]) == ("gpt-4o", 100)
        assert record.actions[0].startswith("downgrade cannot be carried out here: clamp instead")
    else:
        assert (served.request["model"], served.request["max_tokens"]) == ("gpt-4o-mini", 500)
        assert "clamp cannot be carried out here: throttle instead" in " ".join(record.actions)
    booked_as_billed(bursar, provider)


class Azure(OpenAI):
    """As LlamaIndex's integration of Azure, which is told by its module: its deployments stand in the address."""


Azure.__module__ = "llama_index.llms.azure_openai.base"


@pytest.mark.parametrize("what", ["a deployment", "thinking"])
def test_what_would_fail_at_the_provider_is_asked_about(what: str, provider: Provider, guarded: Any) -> None:
    """Nothing is sent that the provider would refuse, or that would not do what the record says."""
    bursar = guarded(DOWN if what == "a deployment" else CLAMP)
    spend(bursar, "0.02 USD")
    thinking = {"max_tokens": 2_000, "temperature": 1, "thinking_dict": {"type": "enabled", "budget_tokens": 1_024}}
    llm = llm_at(provider, Azure) if what == "a deployment" else llm_at(provider, Anthropic, **thinking)
    with pytest.raises(ApprovalRequired) as caught:
        llm.chat(HELLO)
    assert provider.requests == 0
    operator_of(bursar).approve(caught.value.id)
    llm.chat(HELLO)
    (served,) = provider.account
    assert served.request["model"] == llm.model


def test_embeddings_are_not_changed_but_asked_about(provider: Provider, guarded: Any) -> None:
    bursar = guarded(Threshold("1%", "downgrade", models={"text-embedding-3-large": "text-embedding-3-small"}))
    spend(bursar, "0.02 USD")
    url = f"{provider.url}/v1"
    embeddings = OpenAIEmbedding(model="text-embedding-3-large", api_base=url, api_key="any", max_retries=0)
    for embed in (
        embeddings.get_text_embedding,
        lambda text: asyncio.run(awaited(embeddings.aget_text_embedding, text)),
    ):
        with pytest.raises(ApprovalRequired):
            embed("hello")
    assert provider.requests == 0
    assert bursar.store.open_reservations() == 0


def test_a_guarded_copy_sends_what_is_granted(provider: Provider) -> None:
    with Bursar("memory:", [Budget("b", "1 USD", thresholds=[DOWN, CLAMP])]) as bursar:
        spend(bursar, "0.02 USD")
        for style in ("chat", "stream_chat", "astream_chat"):
            STYLES[style](guard_llm(llm_at(provider, OpenAILike, is_chat_model=True), bursar))
        assert {(one.request["model"], one.request["max_tokens"]) for one in provider.account} == {("gpt-4o-mini", 100)}
        booked_as_billed(bursar, provider)


def test_a_wrapped_client_inside_lets_the_swapped_call_pass(provider: Provider, guarded: Any) -> None:
    """What is charged once under the model asked for is charged once under the one that took its place."""
    import openai

    bursar = guarded(DOWN, CLAMP)
    spend(bursar, "0.02 USD")
    client = bursar.wrap(openai.OpenAI(base_url=f"{provider.url}/v1", api_key="any", max_retries=0))
    llm_at(provider, openai_client=client).chat(HELLO)
    list(llm_at(provider, openai_client=client).stream_chat(HELLO))
    assert [one.tags["model"] for one in model_calls(bursar)] == ["gpt-4o-mini"] * 2
    assert [one.request["model"] for one in provider.account] == ["gpt-4o-mini"] * 2
    booked_as_billed(bursar, provider)


# -- stopped in mid-stream ---------------------------------------------------------------------------------------


def freeze(bursar: Bursar, **tags: str) -> None:
    """Thrown, and seen by this process: the look that it takes twice a second is taken at once."""
    Operator(bursar.store, by="ann").freeze(tags, why="loops")
    bursar._driver.keeper.look()


def stopped_as_it_streamed(bursar: Bursar, error: Stopped) -> None:
    """Booked at the worst case, and nothing is held."""
    assert (type(error), error.cause, error.why) == (Stopped, "frozen", "loops")
    assert BursarCallbackHandler(bursar).drain()
    assert bursar.store.open_reservations() == 0
    assert [(one.outcome, one.estimated) for one in model_calls(bursar)] == [("failed", True)]


@pytest.mark.parametrize("kind", [OpenAI, OpenAIResponses, Anthropic])
@pytest.mark.parametrize("is_async", [False, True])
def test_a_switch_ends_a_stream(is_async: bool, kind: Any, provider: Provider, guarded: Any) -> None:
    """The connection is closed with it, so that the provider stops too."""
    bursar = guarded()
    provider.script([Answer(**STEP, chunks=100, event_delay_s=0.02)])
    llm = llm_at(provider, kind)
    seen: list[Any] = []

    def see(part: Any) -> None:
        if not seen:
            freeze(bursar)
        seen.append(part)

    async def aread() -> None:
        async for part in await llm.astream_chat(HELLO):
            see(part)

    def read() -> None:
        for part in llm.stream_chat(HELLO):
            see(part)

    with pytest.raises(Stopped) as caught:
        asyncio.run(aread()) if is_async else read()
    assert 1 <= len(seen) < 20
    stopped_as_it_streamed(bursar, caught.value)
    provider.wait_idle()
    assert provider.account[0].client_gone


def test_the_mark_of_a_stream_does_not_leave(provider: Provider, guarded: Any) -> None:
    """Nor does it take the place of the user's own headers."""
    seen: list[httpx.Headers] = []

    class Transport(httpx.HTTPTransport):
        def handle_request(self, request: httpx.Request) -> httpx.Response:
            seen.append(request.headers)
            return super().handle_request(request)

    guarded()
    llm = llm_at(provider, http_client=httpx.Client(transport=Transport()))
    list(llm.stream_chat(HELLO, extra_headers={"x-mine": "yes"}))
    (headers,) = seen
    assert headers["x-mine"] == "yes"
    assert not [name for name in headers if "bursar" in name]


def test_a_stream_is_told_apart_from_others_of_its_client(provider: Provider, guarded: Any) -> None:
    """Made one after the other, read together in another order: only the frozen agent's ends."""
    bursar = guarded()
    provider.script([Answer(**STEP, chunks=20, event_delay_s=0.01)] * 2)
    llm = llm_at(provider)
    streams: dict[str, Any] = {}
    for agent in ("first", "second"):
        with bursar.scope(agent=agent):
            streams[agent] = llm.stream_chat(HELLO)
    next(streams["second"])
    next(streams["first"])
    freeze(bursar, agent="first")
    assert len(list(streams["second"])) > 10
    with pytest.raises(Stopped):
        list(streams["first"])


@pytest.mark.parametrize("is_async", [False, True])
def test_a_guarded_copy_ends_any_stream(is_async: bool, provider: Provider) -> None:
    """Also that of an LLM of one's own, over a client that nothing is known of."""
    from llama_index.core.llms import CompletionResponse, CustomLLM, LLMMetadata

    read: list[str] = []

    class Own(CustomLLM):
        @property
        def metadata(self) -> LLMMetadata:
            return LLMMetadata(model_name="gpt-4o")

        def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
            return CompletionResponse(text="x")

        def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
            for _ in range(20):
                read.append("x")
                yield CompletionResponse(text="x", delta="x")

    with Bursar("memory:", [Budget("b", "1 USD")]) as bursar:
        llm = guard_llm(Own(), bursar, provider="openai")

        async def aread() -> None:
            async for _ in await llm.astream_complete("hello"):
                freeze(bursar)

        def plain() -> None:
            for _ in llm.stream_complete("hello"):
                freeze(bursar)

        with pytest.raises(Stopped) as caught:
            asyncio.run(aread()) if is_async else plain()
        assert len(read) == 2
        stopped_as_it_streamed(bursar, caught.value)


# -- agents ------------------------------------------------------------------------------------------------------


def calls(name: str, **arguments: Any) -> Answer:
    return Answer(tool_calls=[(name, arguments)], **STEP)


def run(agent: Any, text: str = "go", **options: Any) -> Any:
    async def go() -> Any:
        return await agent.run(text, **options)

    return asyncio.run(go())


def operator_of(bursar: Bursar) -> Operator:
    return Operator(bursar.store, Operator(bursar.store).appoint(), by="ann")


def test_a_switch_ends_an_agent_in_mid_stream(provider: Provider, guarded: Any) -> None:
    bursar = guarded()
    provider.script([Answer(**STEP, chunks=100, event_delay_s=0.02)])

    async def go() -> None:
        handler = FunctionAgent(name="looper", llm=llm_at(provider), tools=[]).run("go")
        await asyncio.to_thread(provider.wait_requests, 1)
        freeze(bursar, agent="looper")
        await handler

    with pytest.raises(Stopped) as caught:
        asyncio.run(go())
    stopped_as_it_streamed(bursar, caught.value)
    assert provider.requests == 1


@pytest.mark.parametrize("kind", [FunctionAgent, ReActAgent, AgentWorkflow])
def test_an_agent_that_has_to_ask_goes_on_when_it_is_approved(kind: Any, provider: Provider, guarded: Any) -> None:
    """The question comes out of `await agent.run()`, once, with its id; what was paid for is not paid again."""
    bursar = guarded(Threshold("70%", "ask"), limit="0.02 USD")
    ran: list[str] = []

    def note(text: str) -> str:
        """Note."""
        ran.append(text)
        bursar.charge("0.007 USD")
        return "noted"

    wish = Answer(text='Thought: x\nAction: note\nAction Input: {"text": "x"}', **STEP)
    done = Answer(text="Thought: I can answer without using any more tools.\nAnswer: done", **STEP)
    provider.script([wish if kind is ReActAgent else calls("note", text="x"), done])
    single = (ReActAgent if kind is ReActAgent else FunctionAgent)(
        name="planner", description="plans", llm=llm_at(provider), tools=[note]
    )
    agent = AgentWorkflow(agents=[single], root_agent="planner") if kind is AgentWorkflow else single

    async def go() -> str:
        context = Context(agent)
        with pytest.raises(ApprovalRequired) as caught:
            await agent.run("go", ctx=context)
        assert type(caught.value) is ApprovalRequired
        assert provider.requests == 1
        operator_of(bursar).approve(caught.value.id, raise_by="1 USD")
        return str(await agent.run("go on", ctx=context))

    assert "done" in asyncio.run(go())
    assert (ran, provider.requests) == (["x"], 2)
    booked_as_billed(bursar, provider)
    assert len([one for one in bursar.records() if one.outcome == "blocked"]) == 1


@pytest.mark.parametrize("inside", ["tool", "model"])
def test_a_question_of_a_tool_ends_its_agent_too(inside: str, provider: Provider, guarded: Any) -> None:
    """LlamaIndex hands every error of a tool back to the model; this one comes out before the model is asked again."""
    ask = Budget(
        "tools",
        "2 calls" if inside == "tool" else "0.01 USD",
        match={"tool": "note"},
        thresholds=[Threshold("50%", "ask")],
    )
    guarded(beside=[ask])

    async def note(
        text: str,
    ) -> str:  # the oldest LlamaIndex runs plain functions in threads that know nothing of the run
        """Note."""
        return text if inside == "tool" else str(await llm_at(provider).acomplete(text))

    answers = [Answer(text="x", **STEP)] if inside == "model" else []
    provider.script([calls("note", text="a"), *answers, calls("note", text="b")])
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[guard_tool(note) if inside == "tool" else note])
    with pytest.raises(ApprovalRequired) as caught:
        run(agent)
    assert caught.value.budget == "tools"
    sent = provider.requests
    assert sent == (2 if inside == "tool" else 3)
    provider.script([Answer(text="done", **STEP)])
    run(agent, "another task")  # the next run asks for itself
    assert provider.requests == sent + 1


def test_a_frozen_agent_is_stopped_and_others_go_on(provider: Provider, guarded: Any) -> None:
    bursar = guarded()
    freeze(bursar, agent="looper")
    with pytest.raises(Stopped) as caught:
        run(FunctionAgent(name="looper", llm=llm_at(provider), tools=[]))
    assert caught.value.cause == "frozen"
    assert provider.requests == 0
    run(FunctionAgent(name="worker", llm=llm_at(provider), tools=[]))
    assert provider.requests == 1


# -- detectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FunctionAgent, ReActAgent])
@pytest.mark.parametrize("guards_tools", [False, True])
def test_a_looping_agent_is_stopped_within_a_few_rounds(
    kind: Any, guards_tools: bool, provider: Provider, guarded: Any
) -> None:
    """The same tool, the same arguments, the same result."""
    bursar = guarded(detectors=Detectors())
    ran: list[str] = []

    def search(query: str) -> str:
        """Search."""
        ran.append(query)
        return "no such service"

    looping = Answer(
        text='Thought: look\nAction: search\nAction Input: {"query": "x"}',
        tool_calls=[("search", {"query": "x"})] if kind is FunctionAgent else (),
        **STEP,
    )
    provider.script([looping] * 20)
    agent = kind(name="looper", llm=llm_at(provider), tools=[guard_tool(search) if guards_tools else search])
    with pytest.raises(Stopped) as caught:
        run(agent, max_iterations=20)
    assert caught.value.cause == "loop"
    assert 3 <= len(ran) <= 4
    assert provider.requests <= 4
    assert bursar.store.open_reservations() == 0


def test_the_same_question_of_many_is_no_loop(provider: Provider, guarded: Any) -> None:
    """Calls that stand alone belong to the process, and each agent's run to itself."""
    bursar = guarded(detectors=Detectors())
    for _ in range(8):
        llm_at(provider).chat(HELLO)
    agent = FunctionAgent(name="planner", llm=llm_at(provider), tools=[])
    for _ in range(8):
        run(agent)
    assert provider.requests == 16
    assert [alert for alert, _ in bursar.store.alerts() if alert.kind == "detector"] == []


# -- together ----------------------------------------------------------------------------------------------------


def test_the_whole_ladder(provider: Provider, guarded: Any) -> None:
    """One agent, told of at 50 %, sent to a cheaper model at 80 %, asked for at 95 %, and killed at 100 % for good."""
    bursar = guarded(
        Threshold("50%", "notify"),
        Threshold("80%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}),
        Threshold("95%", "ask"),
        Threshold("100%", "kill"),
        limit="0.05 USD",
    )
    pages = iter(range(1_000))

    def search(query: str) -> str:
        """Search."""
        return f"page {next(pages)} of the answer"

    provider.script([calls("search", query=f"topic {number}") for number in range(500)])
    agent = FunctionAgent(name="planner", llm=llm_at(provider, max_tokens=1_000), tools=[guard_tool(search)])
    operator = operator_of(bursar)

    async def go() -> None:
        context = Context(agent)
        with pytest.raises(ApprovalRequired) as asked:
            await agent.run("go", ctx=context, max_iterations=500)
        before = provider.requests
        operator.approve(asked.value.id)
        with pytest.raises(BudgetExceeded) as over:
            await agent.run("go on", ctx=context, max_iterations=500)
        assert not isinstance(over.value, ApprovalRequired)
        assert provider.requests > before
        bursar.charge(f"{over.value.available} USD")  # the last cent
        with pytest.raises(Stopped) as killed:
            await agent.run("go on", ctx=context)
        assert killed.value.cause == "killed"

    asyncio.run(go())
    models = [one.tags["model"] for one in model_calls(bursar)]
    swapped = models.index("gpt-4o-mini")
    assert models == ["gpt-4o"] * swapped + ["gpt-4o-mini"] * (len(models) - swapped)
    assert models == [one.request["model"] for one in provider.account]
    told = [alert.facts["action"] for alert, _ in bursar.store.alerts() if alert.kind == "threshold"]
    assert sorted(told) == ["ask", "downgrade", "kill", "notify"]
    booked_as_billed(bursar, provider)
