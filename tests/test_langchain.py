"""LangChain's calls are held against budgets before anything is sent, in every call style, and booked as the provider bills."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from langchain_core.caches import InMemoryCache
from langchain_core.callbacks import BaseCallbackHandler, CallbackManager
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, LLMResult
from langchain_core.runnables import RunnableConfig
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, InvalidInput, Stopped, UnknownPrice, Usage
from bursar.testing.provider import Answer, Fault, Provider
from bursar_langchain import BursarCallbackHandler, GuardedEmbeddings, LangChainBudgetExceeded, install
from bursar_langchain.answer import read_end, read_error
from bursar_langchain.errors import langchain_error

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CORE = tuple(int(part) for part in version("langchain-core").split(".")[:2])


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=50)) as running:
        yield running


@pytest.fixture
def guard() -> Iterator[Bursar]:
    with Bursar("memory:", budgets=[Budget("all", limit="10 USD")]) as guard:
        yield guard


@pytest.fixture
def broke() -> Iterator[Bursar]:
    """A guard that refuses everything."""
    with Bursar("memory:", budgets=[Budget("all", limit="0.000001 USD")]) as guard:
        yield guard


def chat(provider: Provider, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        **{
            "model": "gpt-4o",
            "base_url": f"{provider.url}/v1",
            "api_key": "local",
            "max_tokens": 50,
            "max_retries": 0,
            **options,
        }
    )


def claude(provider: Provider, **options: Any) -> BaseChatModel:
    module = pytest.importorskip("langchain_anthropic", reason="the lowest versions are tested without it")
    return module.ChatAnthropic(
        **{"model": "claude-haiku-4-5", "base_url": provider.url, "api_key": "local", "max_tokens": 100, **options}
    )


def with_(handler: BaseCallbackHandler) -> Any:
    return {"callbacks": [handler]}


def one_record(guard: Bursar) -> Any:
    (record,) = guard.records()
    return record


def reserved(guard: Bursar) -> int:
    return sum(int(status.reserved * 10**9) for status in guard.status())


# -- the gate --------------------------------------------------------------------------------------------------------


async def _drain(stream: Any) -> None:
    async for _ in stream:
        continue


STYLES: dict[str, Callable[[BaseChatModel, Any], Any]] = {
    "invoke": lambda m, c: m.invoke("hi", c),
    "stream": lambda m, c: list(m.stream("hi", c)),
    "batch": lambda m, c: m.batch(["hi", "ho"], c),
    "batch_as_completed": lambda m, c: list(m.batch_as_completed(["hi", "ho"], c)),
    "generate": lambda m, c: m.generate([[HumanMessage("hi")], [HumanMessage("ho")]], callbacks=c["callbacks"]),
    "ainvoke": lambda m, c: asyncio.run(m.ainvoke("hi", c)),
    "astream": lambda m, c: asyncio.run(_drain(m.astream("hi", c))),
    "abatch": lambda m, c: asyncio.run(m.abatch(["hi", "ho"], c)),
    "agenerate": lambda m, c: asyncio.run(
        m.agenerate([[HumanMessage("hi")], [HumanMessage("ho")]], callbacks=c["callbacks"])
    ),
    "astream_events": lambda m, c: asyncio.run(_drain(m.astream_events("hi", c, version="v2"))),
    "invoke inside a running loop": lambda m, c: asyncio.run(_invoke_inside(m, c)),
}
if CORE >= (1, 4):

    async def _v3(model: Any, config: Any) -> None:
        await _drain(await model.astream_events("hi", config, version="v3"))

    STYLES["stream_events v3"] = lambda m, c: list(m.stream_events("hi", c, version="v3"))
    STYLES["astream_events v3"] = lambda m, c: asyncio.run(_v3(m, c))


async def _invoke_inside(model: BaseChatModel, config: Any) -> None:
    model.invoke("hi", config)


@pytest.mark.filterwarnings("ignore:coroutine 'ahandle_event' was never awaited", "ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The method")  # v3 is in beta
class TestEveryStyle:
    @pytest.mark.parametrize("style", STYLES)
    def test_a_refused_call_is_not_sent(self, style: str, provider: Provider, broke: Bursar) -> None:
        with pytest.raises(LangChainBudgetExceeded) as refused:
            STYLES[style](chat(provider), with_(BursarCallbackHandler(broke)))
        assert provider.requests == 0
        assert refused.value.budget == "all"
        assert reserved(broke) == 0

    @pytest.mark.parametrize("style", STYLES)
    def test_an_allowed_call_is_booked_as_billed(self, style: str, provider: Provider, guard: Bursar) -> None:
        handler = BursarCallbackHandler(guard)
        STYLES[style](chat(provider, stream_usage=True), with_(handler))
        assert handler.drain()
        assert provider.requests > 0
        assert sum(record.cost_nanos for record in guard.records()) == provider.billed_nanos
        assert not any(record.estimated for record in guard.records())
        assert reserved(guard) == 0

    @pytest.mark.parametrize("style", ["invoke", "ainvoke"])
    def test_without_raise_error_the_call_would_pass(self, style: str, provider: Provider, broke: Bursar) -> None:
        """What the gate stands on: with LangChain's default the refusal is logged and the call sent."""
        handler = BursarCallbackHandler(broke)
        handler.raise_error = False
        STYLES[style](chat(provider), with_(handler))
        assert provider.requests == 1


def test_an_unknown_price_is_refused(provider: Provider, guard: Bursar) -> None:
    with pytest.raises(UnknownPrice):
        chat(provider, model="gpt-no-such").invoke("hi", with_(BursarCallbackHandler(guard)))
    assert provider.requests == 0


def test_several_handlers_of_one_guard_reserve_once(provider: Provider, guard: Bursar) -> None:
    config = {"callbacks": [BursarCallbackHandler(guard, team="a"), BursarCallbackHandler(guard, team="b")]}
    uninstall = install(guard)
    try:
        chat(provider).invoke("hi", config)
        asyncio.run(chat(provider).ainvoke("hi", config))
    finally:
        uninstall()
    records = list(guard.records())
    assert [record.tags["team"] for record in records] == ["a", "a"]
    assert sum(record.cost_nanos for record in records) == provider.billed_nanos
    assert reserved(guard) == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_calls_that_are_given_the_same_run_id_at_once_are_all_booked(
    is_async: bool, provider: Provider, guard: Bursar
) -> None:
    """Each handler of a call knows its begin and its end for the same; none takes another one's end for its own."""
    provider.script(Answer(input_tokens=100 + number, output_tokens=20) for number in range(8))
    config: RunnableConfig = {
        "callbacks": [BursarCallbackHandler(guard), BursarCallbackHandler(guard)],
        "run_id": uuid4(),
    }
    asked = [f"question {number}" for number in range(8)]
    if is_async:

        async def ask() -> None:
            await asyncio.gather(*(chat(provider).ainvoke(text, config) for text in asked))

        asyncio.run(ask())
    else:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda text: chat(provider).invoke(text, config), asked))
    assert provider.requests == 8
    assert sorted(record.usage["input_tokens"] for record in guard.records()) == list(range(100, 108))
    assert not any(record.estimated for record in guard.records())
    assert sum(record.cost_nanos for record in guard.records()) == provider.billed_nanos
    assert reserved(guard) == 0


def test_a_call_that_begins_between_two_handlers_of_another_with_its_run_id_is_not_ended_by_that(
    provider: Provider, guard: Bursar
) -> None:
    provider.script(Answer(input_tokens=100 + number, output_tokens=20) for number in range(2))
    run, begun, goes_on = uuid4(), threading.Event(), threading.Event()

    class Held(BaseCallbackHandler):
        def on_chat_model_start(self, *given: Any, **more: Any) -> None:
            begun.set()
            goes_on.wait(20)

    other: RunnableConfig = {"callbacks": [BursarCallbackHandler(guard), Held()], "run_id": run}

    class Between(BaseCallbackHandler):
        def on_llm_end(self, *given: Any, **more: Any) -> None:
            later.append(pool.submit(chat(provider).invoke, "second", other))
            begun.wait(20)

    later: list[Future[Any]] = []
    handlers = [BursarCallbackHandler(guard), Between(), BursarCallbackHandler(guard)]
    with ThreadPoolExecutor(1) as pool:
        chat(provider).invoke("first", {"callbacks": handlers, "run_id": run})
        goes_on.set()
        later[0].result(20)
    assert [record.usage["input_tokens"] for record in guard.records()] == [100, 101]
    assert not any(record.estimated for record in guard.records())


def test_two_guards_each_reserve_once(provider: Provider, guard: Bursar) -> None:
    with Bursar("memory:", budgets=[Budget("other", limit="1 USD")]) as other:
        chat(provider).invoke("hi", {"callbacks": [BursarCallbackHandler(guard), BursarCallbackHandler(other)]})
        assert one_record(guard).cost_nanos == one_record(other).cost_nanos == provider.billed_nanos


def test_a_refusal_by_the_second_guard_leaves_nothing_open_in_the_first(
    provider: Provider, guard: Bursar, broke: Bursar
) -> None:
    first = BursarCallbackHandler(guard)
    with pytest.raises(LangChainBudgetExceeded):
        chat(provider).with_config(callbacks=[first, BursarCallbackHandler(broke)]).invoke("hi")
    gc.collect()
    assert first.drain()
    assert (provider.requests, reserved(guard)) == (0, 0)
    assert [record.kind for record in guard.records()] == ["release"]


def test_a_refusal_by_another_guard_gives_back_no_other_call(guard: Bursar) -> None:
    """Tools that are announced by hand may say nothing of themselves."""
    with Bursar("memory:", [Budget("one", "1 calls")]) as other:
        one, two = BursarCallbackHandler(guard), BursarCallbackHandler(other)
        CallbackManager([two]).on_tool_start(None, "a").on_tool_end("done")
        begun = CallbackManager([one]).on_tool_start(None, "b")
        with pytest.raises(LangChainBudgetExceeded):
            CallbackManager([two]).on_tool_start(None, "c")
    begun.on_tool_end("done")
    assert [record.kind for record in guard.records()] == ["settlement"]


def test_install_guards_every_thread_and_uninstall_ends_it(provider: Provider, broke: Bursar, guard: Bursar) -> None:
    uninstall = install(broke)
    try:
        with ThreadPoolExecutor(1) as pool, pytest.raises(LangChainBudgetExceeded):
            pool.submit(chat(provider).invoke, "hi").result()
        with pytest.raises(InvalidInput):
            install(guard)
    finally:
        uninstall()
    assert provider.requests == 0
    chat(provider).invoke("hi")
    assert provider.requests == 1


def test_the_refusal_is_one_that_the_framework_lets_through(provider: Provider, broke: Bursar) -> None:
    from langgraph.errors import GraphBubbleUp

    with pytest.raises(BudgetExceeded) as refused:
        chat(provider).invoke("hi", with_(BursarCallbackHandler(broke)))
    error = refused.value
    assert isinstance(error, RuntimeError)
    assert isinstance(error, GraphBubbleUp)
    assert isinstance(error, LangChainBudgetExceeded)
    assert error.is_retryable is False
    if CORE >= (1, 6):
        from langchain_core.exceptions import ModelError

        assert isinstance(error, ModelError)
    for kind in (BudgetExceeded, ApprovalRequired, Stopped):
        made = langchain_error(kind(str(error), **error.fields))
        copy = pickle.loads(pickle.dumps(made))
        assert all(isinstance(copy, one) for one in (kind, LangChainBudgetExceeded, GraphBubbleUp))
        assert (type(copy), str(copy), copy.fields) == (type(made), str(error), error.fields)


def test_a_refusal_can_be_answered_by_a_cheaper_model(provider: Provider) -> None:
    with Bursar("memory:", budgets=[Budget("all", limit="0.0005 USD")]) as guard:
        config = with_(BursarCallbackHandler(guard))
        cheap = chat(provider, model="gpt-4o-mini")
        model = chat(provider).with_fallbacks([cheap], exceptions_to_handle=(BudgetExceeded,))
        model.invoke("hi", config)
        assert [entry.model for entry in provider.account] == ["gpt-4o-mini"]


def test_no_retry_sends_a_refused_call(provider: Provider, broke: Bursar) -> None:
    config = with_(BursarCallbackHandler(broke))
    for model in (
        chat(provider).with_retry(stop_after_attempt=3, wait_exponential_jitter=False),
        chat(provider).with_fallbacks([chat(provider)]),
    ):
        with pytest.raises(LangChainBudgetExceeded):
            model.invoke("hi", config)
    assert provider.requests == 0


# -- what was used ---------------------------------------------------------------------------------------------------


def test_cached_and_reasoning_tokens_are_counted_inside_the_totals(guard: Bursar) -> None:
    answer = Answer(input_tokens=1_000, output_tokens=50, cache_read_tokens=200, reasoning_tokens=10)
    with Provider(answer) as provider:
        for options in ({}, {"use_responses_api": True}):
            model = chat(provider, **options)
            model.invoke("hi", with_(BursarCallbackHandler(guard)))
            list(model.stream("hi", with_(BursarCallbackHandler(guard)), **({} if options else {"stream_usage": True})))
        records = list(guard.records())
        assert [(r.usage["cache_read_tokens"], r.usage["reasoning_tokens"]) for r in records] == [(200, 10)] * 4
        assert [r.cost_nanos for r in records] == [entry.cost_nanos for entry in provider.account]


@pytest.mark.parametrize("stream", [False, True])
def test_claude_s_cache_writes_are_priced_by_their_time_to_live(guard: Bursar, stream: bool) -> None:
    answer = Answer(
        input_tokens=1_000,
        output_tokens=50,
        cache_read_tokens=300,
        cache_write_5m_tokens=100,
        cache_write_1h_tokens=0 if stream else 40,  # a stream's last event does not tell the two apart
    )
    with Provider(answer) as provider:
        model = claude(provider)
        config = with_(BursarCallbackHandler(guard))
        list(model.stream("hi", config)) if stream else model.invoke("hi", config)
    record = one_record(guard)
    plain = 600 if stream else 560
    expected = plain * 1_000 + 300 * 100 + 100 * 1_250 + (0 if stream else 40 * 2_000) + 50 * 5_000
    assert (record.cost_nanos, record.estimated) == (expected, False)


def test_several_answers_are_reserved_and_billed(provider: Provider, guard: Bursar) -> None:
    chat(provider).bind(n=3).invoke("hi", with_(BursarCallbackHandler(guard)))
    assert one_record(guard).usage["output_tokens"] == 150
    assert one_record(guard).cost_nanos == provider.billed_nanos
    with Bursar("memory:", budgets=[Budget("all", limit="0.002 USD")]) as tight:  # room for two answers
        chat(provider).bind(n=2).invoke("hi", with_(BursarCallbackHandler(tight)))
        with pytest.raises(LangChainBudgetExceeded):
            chat(provider).bind(n=3).invoke("hi", with_(BursarCallbackHandler(tight)))


def test_a_hit_of_langchains_cache_costs_nothing(provider: Provider, guard: Bursar) -> None:
    model = chat(provider, cache=InMemoryCache())
    for _ in range(2):
        model.invoke("hi", with_(BursarCallbackHandler(guard)))
    assert [record.kind for record in guard.records()] == ["settlement", "release"]
    assert sum(record.cost_nanos for record in guard.records()) == provider.billed_nanos
    assert provider.requests == 1


class Shape(BaseModel):
    """A shape to answer in."""

    sides: int


def test_an_answer_that_fails_its_schema_is_billed(provider: Provider, guard: Bursar) -> None:
    model = chat(provider).with_structured_output(Shape, method="json_schema")
    with pytest.raises(ValueError):
        model.invoke("hi", with_(BursarCallbackHandler(guard)))
    record = one_record(guard)
    assert (record.cost_nanos, record.estimated, record.outcome) == (provider.billed_nanos, False, "failed")


def test_a_declared_shape_counts_as_input(provider: Provider, guard: Bursar) -> None:
    wide = type("Wide", (BaseModel,), {"__annotations__": {f"field_{number}": int for number in range(300)}})
    with Bursar("memory:", budgets=[Budget("all", limit="0.005 USD")]) as tight:
        config = with_(BursarCallbackHandler(tight))
        chat(provider).bind_tools([Shape]).invoke("hi", config)
        for model in (chat(provider).bind_tools([wide]), chat(provider).bind(response_format=wide)):
            with pytest.raises(LangChainBudgetExceeded):
                model.invoke("hi", config)


def test_a_stream_that_states_no_usage_is_booked_at_what_was_reserved(provider: Provider, guard: Bursar) -> None:
    list(chat(provider).stream("hi", with_(BursarCallbackHandler(guard))))
    record = one_record(guard)
    assert record.estimated
    assert record.cost_nanos > 0
    assert "stream_usage" in record.reason


@pytest.mark.parametrize(
    ("fault", "booked"),
    [
        (Fault("refuse", status=400), "released"),
        (Fault("refuse", status=429), "released"),
        (Fault("refuse", status=500), "estimated"),
        (Fault("drop"), "estimated"),
        (Fault("malformed"), "estimated"),
        (Fault("no_usage"), "estimated"),
    ],
)
def test_only_a_clear_refusal_releases(fault: Fault, booked: str, provider: Provider, guard: Bursar) -> None:
    provider.script([fault, fault])
    for call in (chat(provider).invoke, lambda *given: asyncio.run(chat(provider).ainvoke(*given))):
        with contextlib.suppress(Exception):  # whatever the client makes of the fault
            call("hi", with_(BursarCallbackHandler(guard)))
    records = list(guard.records())
    assert len(records) == 2
    for record in records:
        assert (record.kind, record.estimated) == (("release", False) if booked == "released" else ("settlement", True))
    assert reserved(guard) == 0


def test_a_connection_that_was_never_made_is_released(guard: Bursar) -> None:
    with Provider() as provider:
        gone = chat(provider)
    with pytest.raises(Exception, match="onnect"):
        gone.invoke("hi", with_(BursarCallbackHandler(guard)))
    assert one_record(guard).kind == "release"


@pytest.mark.parametrize("more", [{}, {"cost": 0.01}, {"service_tier": "flex"}], ids=["plain", "bill", "tier"])
def test_both_readings_of_an_answer_agree(more: dict[str, Any]) -> None:
    """LangChain's reading serves where the provider's own words say no more; where they do, theirs count."""
    from langchain_core.messages import AIMessage
    from langchain_core.outputs import ChatGeneration, LLMResult

    usage = {
        "prompt_tokens": 1_000,
        "completion_tokens": 50,
        "total_tokens": 1_050,
        "prompt_tokens_details": {"cached_tokens": 200, "audio_tokens": 30},
        "completion_tokens_details": {"reasoning_tokens": 10, "audio_tokens": 5, "rejected_prediction_tokens": 0},
    }
    facts = {"model_name": "gpt-4o-2024-08-06", **({"service_tier": "flex"} if "service_tier" in more else {})}
    if "cost" in more:
        usage["cost"] = more["cost"]
    tokens = {
        "input_tokens": 1_000,
        "output_tokens": 50,
        "total_tokens": 1_050,
        "input_token_details": {"cache_read": 200, "audio": 30},
        "output_token_details": {"reasoning": 10, "audio": 5},
    }
    message = AIMessage("", usage_metadata=tokens, response_metadata={**facts, "token_usage": usage})
    provider = "openrouter" if "cost" in more else "openai"
    read = read_end(provider, LLMResult(generations=[[ChatGeneration(message=message)]]))
    stated = Usage.from_response(
        provider,
        {"model": facts["model_name"], "usage": usage, **{k: v for k, v in facts.items() if k == "service_tier"}},
    )
    assert read.args == (stated,)


def test_a_completion_model_s_batch_is_counted_once(provider: Provider, guard: Bursar) -> None:
    """Its usage is told with the first prompt alone; the second's is in it."""
    from langchain_core.outputs import Generation, LLMResult

    usage = {"token_usage": {"prompt_tokens": 20, "completion_tokens": 8, "total_tokens": 28}, "model_name": "gpt"}
    whole = LLMResult(generations=[[Generation(text="a")], [Generation(text="b")]], llm_output=usage)
    endings = [read_end("openai", part, in_batch=True) for part in whole.flatten()]
    assert [(ending.verb, ending.args[0].input_tokens) for ending in endings] == [("settle", 20), ("settle", 0)]


def test_a_refused_completion_is_not_sent(provider: Provider, broke: Bursar) -> None:
    model = OpenAI(model="gpt-3.5-turbo-instruct", base_url=f"{provider.url}/v1", api_key="local")
    for call in (model.invoke, lambda *given: asyncio.run(model.ainvoke(*given))):
        with pytest.raises(LangChainBudgetExceeded):
            call("hi", with_(BursarCallbackHandler(broke)))
    assert provider.requests == 0


# -- the maximum output ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("made", "called", "limit"),
    [
        ({"max_tokens": 77}, {}, 77),
        ({"max_tokens": 77}, {"max_tokens": 5}, 5),
        ({"max_tokens": 77}, {"max_completion_tokens": 5}, 5),
        ({"max_tokens": 77}, {"max_tokens": None}, 16_384),  # that takes the limit off, so the model's own holds
        ({"max_tokens": None}, {}, 16_384),
        ({"max_tokens": 77, "use_responses_api": True}, {"max_tokens": 5}, 77),  # there the model's own wins
        ({"max_tokens": 77, "include": ["reasoning.encrypted_content"]}, {"max_completion_tokens": 5}, 5),
    ],
)
def test_what_is_reserved_is_what_the_wire_says(
    made: dict[str, Any], called: dict[str, Any], limit: int, provider: Provider, guard: Bursar
) -> None:
    provider.script([Fault("no_usage")])
    chat(provider, **made).invoke("hi", with_(BursarCallbackHandler(guard)), **called)
    sent = provider.account[0].request
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    assert next((sent[name] for name in names if sent.get(name)), 16_384) == limit
    assert one_record(guard).usage["output_tokens"] == limit


def test_a_strict_budget_reserves_the_client_s_own_retries(provider: Provider) -> None:
    with Bursar("memory:", budgets=[Budget("all", limit="10 USD", estimate="strict")]) as guard:
        provider.script([Fault("no_usage"), Fault("no_usage")])
        for retries in (0, 2):
            chat(provider, max_retries=retries).invoke("hi", with_(BursarCallbackHandler(guard)))
        once, thrice = guard.records()
        assert thrice.cost_nanos == 3 * once.cost_nanos
        assert (once.attempts, thrice.attempts) == (1, 3)


@pytest.mark.parametrize(
    ("base_url", "provider_name"),
    [
        (None, "openai"),
        ("https://openrouter.ai/api/v1", "openrouter"),
        ("https://api.x.ai/v1", "xai"),
        ("https://acme.openai.azure.com/openai/v1", "azure"),
        ("https://notopenrouter.ai/v1", "openai"),
    ],
)
def test_whoever_answers_at_the_base_url_decides_the_price(base_url: str | None, provider_name: str) -> None:
    from bursar_langchain.request import read_start

    serialized = {"id": ["langchain", "ChatOpenAI"], "kwargs": {"openai_api_base": base_url} if base_url else {}}
    read = read_start(serialized, ["hi"], {"model": "gpt-4o"}, {"ls_provider": "openai"})
    assert read["provider"] == provider_name


# -- embeddings ------------------------------------------------------------------------------------------------------


def test_embeddings_are_reserved_and_booked_as_estimated(provider: Provider, guard: Bursar, broke: Bursar) -> None:
    inner = OpenAIEmbeddings(
        model="text-embedding-3-small", base_url=f"{provider.url}/v1", api_key="local", check_embedding_ctx_length=False
    )

    def guarded(by: Bursar) -> GuardedEmbeddings:
        return GuardedEmbeddings(inner, by, provider="openai", model="text-embedding-3-small", team="search")

    assert len(guarded(guard).embed_documents(["one", "two"])) == 2
    assert asyncio.run(guarded(guard).aembed_query("three"))
    assert guarded(guard).embed_documents([]) == []
    records = list(guard.records())
    assert [(record.estimated, record.tags["team"]) for record in records] == [(True, "search")] * 2
    assert all(record.cost_nanos > 0 for record in records)
    sent = provider.requests
    with Bursar("memory:", budgets=[Budget("all", limit="2 requests")]) as tight:
        for text in ("one", "two"):
            guarded(tight).embed_query(text)
        with pytest.raises(LangChainBudgetExceeded):
            guarded(tight).embed_query("three")
        with pytest.raises(LangChainBudgetExceeded):
            asyncio.run(guarded(tight).aembed_documents(["three"]))
    assert provider.requests == sent + 2


# -- manners ---------------------------------------------------------------------------------------------------------


def test_what_goes_wrong_in_settling_never_reaches_the_caller(
    provider: Provider, guard: Bursar, caplog: pytest.LogCaptureFixture
) -> None:
    """A store that is gone by then costs the caller neither the answer nor the call's own error."""
    handler = BursarCallbackHandler(guard)

    class Closer(BaseCallbackHandler):
        def on_chat_model_start(self, *given: Any, **more: Any) -> None:
            guard.store.close()

    assert chat(provider).invoke("hi", {"callbacks": [handler, Closer()]}).content
    assert "while ending a call" in caplog.text


def test_importing_the_adapter_adds_little_to_langchain_core() -> None:
    """At most 50 ms; it loads neither langchain, langgraph nor the tracers, and the price book with the first call."""
    code = """
import json, sys, time
import langchain_core.callbacks
start = time.process_time()
from bursar_langchain import BursarCallbackHandler, LangChainBudgetExceeded
print(json.dumps([time.process_time() - start, sorted(sys.modules)]))
"""
    runs = [
        json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
        for _ in range(3)  # the fastest of three: other tests run beside this one
    ]
    assert min(took_s for took_s, _ in runs) < 0.05
    assert not {"langchain", "langgraph", "langchain_core.tracers.context", "bursar.prices.book"} & set(runs[0][1])


def test_no_coroutine_of_the_handler_is_left_unawaited(provider: Provider, guard: Bursar) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        asyncio.run(chat(provider).ainvoke("hi", with_(BursarCallbackHandler(guard))))
    assert not [warning for warning in caught if issubclass(warning.category, RuntimeWarning)]


def test_an_error_in_mid_stream_releases_nothing_whatever_its_code() -> None:
    """As OpenRouter tells of its provider's, by a number: what had been generated is billed."""

    class APIError(Exception):
        code = 403

    part = LLMResult(generations=[[ChatGeneration(message=AIMessage("hello"))]])
    none = LLMResult(generations=[[ChatGeneration(message=AIMessage(""))]])
    assert read_error("openrouter", APIError(), part).verb == "settle_unknown"
    assert read_error("openrouter", APIError(), none).verb == "settle_error"
