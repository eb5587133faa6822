"""Every call ends once: cancelled, abandoned, never read, retried, answered by other providers' clients."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import multiprocessing
import pickle
import sqlite3
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from canned import Canned, CannedProvider
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.callbacks import CallbackManager
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.llms import ChatMessage
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.anthropic import Anthropic
from llama_index.llms.openai import OpenAI, OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from llama_index_instrumentation import root_dispatcher

from bursar import Budget, BudgetExceeded, Bursar, BursarError
from bursar.testing.provider import Answer, Fault, Provider
from bursar_llamaindex import BursarCallbackHandler, guard_llm, install
from bursar_llamaindex.calls import Call
from bursar_llamaindex.stopping import Body

HELLO = [ChatMessage(role="user", content="hello")]
STEP = {"input_tokens": 1_000, "output_tokens": 500}


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(**STEP, chunks=20)) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    """Ample, and installed."""
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        uninstall = install(bursar)
        yield bursar
        uninstall()


def llm_at(provider: Provider, **options: Any) -> OpenAI:
    settings = {"api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0, "max_tokens": 500}
    return OpenAI(model="gpt-4o", **{**settings, **options})


def ended(bursar: Bursar) -> list[tuple[str, bool]]:
    """How the calls ended, as (outcome, estimated), when nothing is open any more."""
    gc.collect()
    assert BursarCallbackHandler(bursar).drain()
    assert bursar.store.open_reservations() == 0
    return [(record.outcome, record.estimated) for record in bursar.records()]


# -- streams -----------------------------------------------------------------------------------------------------


def test_a_stream_that_is_never_read(provider: Provider, bursar: Bursar) -> None:
    llm = llm_at(provider)
    llm.stream_chat(HELLO)
    assert ended(bursar) == [("failed", True)]
    assert provider.requests == 0


def test_an_async_stream_that_is_never_read(provider: Provider, bursar: Bursar) -> None:
    async def go() -> None:
        await llm_at(provider).astream_chat(HELLO)

    asyncio.run(go())
    assert ended(bursar) == [("failed", True)]


def test_a_stream_that_is_held_is_open_until_it_is_dropped(provider: Provider, bursar: Bursar) -> None:
    stream: Any = llm_at(provider).stream_chat(HELLO)
    next(stream)
    assert bursar.store.open_reservations() == 1
    del stream
    assert ended(bursar) == [("failed", True)]


@pytest.mark.parametrize("how", ["break", "aclose", "cancel", "raise"])
def test_an_async_stream_that_is_left(how: str, provider: Provider, bursar: Bursar) -> None:
    provider.script([Answer(**STEP, chunks=20, event_delay_s=0.01)])

    async def read(stream: Any) -> None:
        async for _ in stream:
            if how == "raise":
                raise ValueError("mine")
            if how == "cancel":
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            else:
                break
        if how == "aclose":
            await stream.aclose()

    async def go() -> None:
        stream = await llm_at(provider).astream_chat(HELLO)
        await asyncio.gather(read(stream), return_exceptions=True)

    asyncio.run(go())
    assert ended(bursar) == [("failed", True)]


def test_a_stream_read_in_another_thread(provider: Provider, bursar: Bursar) -> None:
    stream = llm_at(provider).stream_chat(HELLO)
    with ThreadPoolExecutor(1) as pool:
        parts = pool.submit(list, stream).result()
    assert parts
    assert ended(bursar) == [("completed", False)]


@pytest.mark.parametrize("where", ["object", "object's body", "call", "call's body"])
def test_what_the_user_says_of_stream_options_stays(where: str, provider: Provider, bursar: Bursar) -> None:
    """Without usage the worst case is booked, never nothing."""
    said: dict[str, Any] = {"stream_options": {"include_usage": False}}
    if "body" in where:
        said = {"extra_body": said}
    if where.startswith("object"):
        list(llm_at(provider, additional_kwargs=said).stream_chat(HELLO))
    else:
        list(llm_at(provider).stream_chat(HELLO, **said))
    assert provider.account[0].request["stream_options"] == {"include_usage": False}
    assert ended(bursar) == [("failed", True)]


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize("way", ["stream_chat", "astream_chat", "stream_complete", "guard_llm"])
def test_usage_that_only_bursar_asked_for_is_kept_from_the_user(
    way: str, asks: bool, provider: Provider, bursar: Bursar
) -> None:
    """The call settles to it, and LlamaIndex hands on the parts that it would hand on without a guard."""
    settings = {"stream_options": {"include_usage": True}} if asks else {}

    async def go(llm: OpenAI) -> list[Any]:
        return [part async for part in await llm.astream_chat(HELLO, **settings)]

    def read(llm: OpenAI) -> list[Any]:
        if way == "astream_chat":
            return asyncio.run(go(llm))
        return list(
            llm.stream_complete("hello", **settings) if way == "stream_complete" else llm.stream_chat(HELLO, **settings)
        )

    llm = llm_at(provider)
    guarded = read(guard_llm(llm) if way == "guard_llm" else llm)
    assert ended(bursar) == [("completed", False)]
    assert next(iter(bursar.records())).cost_nanos == 7_500_000
    install(bursar)()  # takes the guard away
    plain = read(llm_at(provider))
    assert (len(provider.account), len(list(bursar.records()))) == (2, 1)
    assert [part.delta for part in guarded] == [part.delta for part in plain]
    assert (guarded[-1].raw.usage is None) == (plain[-1].raw.usage is None) == (not asks)


@pytest.mark.parametrize("size", [1, 7, 100, 250, 10_000])
@pytest.mark.parametrize("end", ["\n\n", "\r\n\r\n"])
def test_a_stream_whose_bytes_come_otherwise_loses_nothing(size: int, end: str, bursar: Bursar) -> None:
    """The event with the usage is taken out whole, or not at all."""
    chunk = {"object": "chat.completion.chunk", "model": "gpt-4o"}
    usage = {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}
    told = [
        {**chunk, "choices": [{"index": 0, "delta": {"content": 'data: ,"usage":null,"usage":{\n\n'}}], "usage": None}
    ] * 3
    told += [{**chunk, "choices": [], "usage": usage}]
    events = [
        f"data: {text}{end}".encode() for text in [*(json.dumps(one, separators=(",", ":")) for one in told), "[DONE]"]
    ]
    sent = b"".join(events)
    call = Call(bursar, {"provider": "openai", "model": "gpt-4o"}, "event")
    parts = [sent[start : start + size] for start in range(0, len(sent), size)]
    shown = b"".join(Body(parts, call, hides_usage=True))
    entries = [json.loads(line[5:]) for line in shown.decode().splitlines() if line.startswith("data: {")]
    assert shown.endswith(events[-1])
    assert [entry["choices"] for entry in entries[:3]] == [entry["choices"] for entry in told[:3]]
    if call.usage is None:
        assert entries[3:] == told[3:]
    else:
        assert not entries[3:]
        assert (call.usage.input_tokens, call.usage.output_tokens, call.usage.model) == (1_000, 500, "gpt-4o")
    assert (call.usage is not None) == (size == 10_000 and end == "\n\n")


@pytest.mark.parametrize("where", ["object", "call"])
def test_what_else_the_user_adds_to_the_body_is_sent(where: str, provider: Provider, bursar: Bursar) -> None:
    said = {"extra_body": {"seed": 7}}
    if where == "object":
        list(llm_at(provider, additional_kwargs=said).stream_chat(HELLO))
    else:
        list(llm_at(provider).stream_chat(HELLO, **said))
    request = provider.account[0].request
    assert (request["seed"], request["stream_options"]) == (7, {"include_usage": True})
    assert ended(bursar) == [("completed", False)]


def test_plain_calls_get_no_stream_options(provider: Provider, bursar: Bursar) -> None:
    llm_at(provider).chat(HELLO)
    assert "stream_options" not in provider.account[0].request


# -- cancellation and time-outs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["achat", "acomplete", "aembed"])
def test_a_call_cancelled_in_flight_is_booked(way: str, provider: Provider, bursar: Bursar) -> None:
    provider.script([Fault("hang")])

    async def go() -> None:
        if way == "aembed":
            model = OpenAIEmbedding(
                model="text-embedding-3-small", api_base=f"{provider.url}/v1", api_key="any", max_retries=0
            )
            call = model.aget_text_embedding_batch(["a", "b"])
        else:
            call = llm_at(provider).achat(HELLO) if way == "achat" else llm_at(provider).acomplete("hello")
        task = asyncio.ensure_future(call)
        await asyncio.to_thread(provider.wait_requests, 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(go())
    assert ended(bursar) == [("failed", True)]


def test_a_call_cancelled_while_it_waits_for_headroom_holds_nothing(provider: Provider) -> None:
    with Bursar("memory:", [Budget("one", "1 slots", on_exceed="wait 30s")]) as bursar:
        uninstall = install(bursar)
        provider.script([Fault("hang")])

        async def go() -> None:
            first = asyncio.ensure_future(llm_at(provider).achat(HELLO))
            await asyncio.to_thread(provider.wait_requests, 1)
            second = asyncio.ensure_future(llm_at(provider).achat(HELLO))
            while not bursar.guard.room:
                await asyncio.sleep(0)
            for task in (second, first):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

        asyncio.run(asyncio.wait_for(go(), 20))
        uninstall()
        assert bursar.store.open_reservations() == 0
        assert provider.requests == 1


def test_an_agent_that_is_given_up_settles_when_its_call_ends(provider: Provider, bursar: Bursar) -> None:
    """`wait_for(agent.run())` stops the waiting, not the call."""
    provider.script([Answer(**STEP, latency_s=0.3)])

    async def go() -> None:
        handler = FunctionAgent(name="planner", llm=llm_at(provider), tools=[]).run("go")
        await asyncio.to_thread(provider.wait_requests, 1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handler, 0.01)
        assert bursar.store.open_reservations() == 1
        while bursar.store.open_reservations():
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(go(), 20))
    assert ended(bursar) == [("completed", False)]


def test_a_stranger_s_rate_limiter_that_raises_leaves_nothing_open(provider: Provider, bursar: Bursar) -> None:
    from llama_index.core.rate_limiter import BaseRateLimiter

    class Limiter(BaseRateLimiter):
        def acquire(self, num_tokens: int = 0) -> None:
            raise ValueError("not mine")

        async def async_acquire(self, num_tokens: int = 0) -> None:
            raise ValueError("not mine")

    llm = llm_at(provider, rate_limiter=Limiter())
    with pytest.raises(ValueError, match="not mine"):
        llm.chat(HELLO)
    assert ended(bursar) == []
    assert provider.requests == 0


# -- retries and refusals of the provider ------------------------------------------------------------------------


def test_the_clients_retries_are_reserved_by_strict_budgets(provider: Provider) -> None:
    """Two retries of LlamaIndex's around two of the SDK's: six tries, as measured on a provider that fails."""
    provider.script([Fault("refuse", status=500)] * 6)
    budget = Budget("strict", "0.060 USD", estimate="strict")  # room for six answers of 500 tokens and little more
    with Bursar("memory:", [budget]) as bursar:
        uninstall = install(bursar)
        with pytest.raises(Exception, match="500"):
            llm_at(provider, max_retries=2).chat(HELLO)
        (record,) = bursar.records()
        uninstall()
    assert provider.requests == record.attempts == 6
    assert record.cost_nanos >= 6 * 5_000_000


@pytest.mark.parametrize(("status", "outcome"), [(400, ("failed", False)), (500, ("failed", True))])
def test_a_refusal_of_the_provider(status: int, outcome: tuple[str, bool], provider: Provider, bursar: Bursar) -> None:
    provider.script([Fault("refuse", status=status)])
    with pytest.raises(Exception, match=str(status)):
        llm_at(provider).chat(HELLO)
    assert ended(bursar) == [outcome]


def test_a_cheaper_model_after_a_refusal(provider: Provider) -> None:
    """The user's own fallback: the refusal is an ordinary exception, once."""
    with Bursar("memory:", [Budget("small", "0.003 USD")]) as bursar:
        uninstall = install(bursar)
        try:
            with pytest.raises(BudgetExceeded):
                llm_at(provider).chat(HELLO)
            OpenAI(model="gpt-4o-mini", api_base=f"{provider.url}/v1", api_key="any", max_tokens=500).chat(HELLO)
        finally:
            uninstall()
        assert [r.tags["model"] for r in bursar.records() if r.outcome == "completed"] == ["gpt-4o-mini"]


# -- other clients -----------------------------------------------------------------------------------------------


def anthropic_at(provider: Provider) -> Anthropic:
    return Anthropic(model="claude-haiku-4-5", base_url=provider.url, api_key="any", max_retries=0, max_tokens=500)


@pytest.mark.parametrize("way", ["chat", "stream", "achat", "astream", "complete"])
def test_anthropic_settles_once_with_its_cache(way: str, provider: Provider, bursar: Bursar) -> None:
    """Its `complete` is announced twice."""
    provider.script([Answer(**STEP, cache_read_tokens=200, cache_write_5m_tokens=100)])
    llm = anthropic_at(provider)

    async def go() -> None:
        if way == "achat":
            await llm.achat(HELLO)
        else:
            async for _ in await llm.astream_chat(HELLO):
                pass

    if way.startswith("a"):
        asyncio.run(go())
    elif way == "stream":
        list(llm.stream_chat(HELLO))
    else:
        getattr(llm, way)(HELLO if way == "chat" else "hello")
    assert ended(bursar) == [("completed", False)]
    (record,) = bursar.records()
    assert (record.tags["provider"], record.tags["model"]) == ("anthropic", "claude-haiku-4-5")
    assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (1_000, 500)
    assert (record.usage["cache_read_tokens"], record.usage["cache_write_5m_tokens"]) == (200, 100)


@pytest.mark.parametrize("streams", [False, True])
def test_the_responses_api_settles(streams: bool, provider: Provider, bursar: Bursar) -> None:
    llm = OpenAIResponses(model="gpt-4o", api_base=f"{provider.url}/v1", api_key="any", max_retries=0)
    if streams:
        list(llm.stream_chat(HELLO))
    else:
        llm.chat(HELLO)
    assert ended(bursar) == [("completed", False)]
    assert sum(record.cost_nanos for record in bursar.records()) == provider.billed_nanos


def test_whose_models_an_openai_client_reaches_decides_the_price(bursar: Bursar) -> None:
    from bursar_llamaindex.request import provider_of

    def at(url: str | None, kind: type[OpenAI] = OpenAILike) -> str:
        return provider_of(kind(model="gpt-4o", api_key="any", api_base=url))

    assert at("https://openrouter.ai/api/v1") == "openrouter"
    assert at("https://api.groq.com/openai/v1") == "groq"
    assert at(None, OpenAI) == at("http://127.0.0.1:1/v1") == at("https://notgroq.com/v1") == "openai"


# -- the guard itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["install", "handler", "copy"])
def test_the_guards_own_failure_sends_nothing(way: str, provider: Provider) -> None:
    """I12, and what nobody foresaw: an exception inside Bursar refuses the call."""
    bursar = Bursar("memory:", [Budget("ample", "100 USD")])
    undo = install(bursar) if way == "install" else lambda: None
    manager = CallbackManager([BursarCallbackHandler(bursar)] if way == "handler" else [])
    llm = llm_at(provider, callback_manager=manager)
    llm = guard_llm(llm, bursar) if way == "copy" else llm
    bursar.guard.policy = None  # type: ignore[assignment]
    for call in (
        lambda: llm.chat(HELLO),
        lambda: list(llm.stream_chat(HELLO)),
        lambda: asyncio.run(_awaited(llm.achat, HELLO)),
    ):
        with pytest.raises(AttributeError):
            call()
    undo()
    assert provider.requests == 0


def test_a_settlement_that_fails_costs_the_user_no_answer(provider: Provider, caplog: Any) -> None:
    """The store goes away while the call is in flight."""
    bursar = Bursar("memory:", [Budget("ample", "100 USD")])
    uninstall = install(bursar)
    llm = llm_at(provider)
    stream: Any = llm.stream_chat(HELLO)
    next(stream)
    bursar.store.close()
    assert len(list(stream)) > 5
    uninstall()
    assert "while ending a call" in caplog.text


@pytest.mark.parametrize("streams", [False, True])
def test_a_guarded_copy_settles_without_holding_up_its_event_loop(
    streams: bool, provider: Provider, tmp_path: Path
) -> None:
    """Somebody else holds the books' file when the answer comes, until the loop has gone on."""
    path = tmp_path / "held.db"
    with (
        Bursar(f"sqlite:///{path}", [Budget("ample", "100 USD")]) as bursar,
        contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other,
    ):
        llm = guard_llm(llm_at(provider), bursar)
        holding = asyncio.Event()

        class Holder(BaseCallbackHandler):
            def on_event_start(self, *args: Any, **more: Any) -> str:
                return ""

            def on_event_end(self, *args: Any, **more: Any) -> None:
                if not holding.is_set():
                    other.execute("BEGIN IMMEDIATE")
                    holding.set()

            def start_trace(self, trace_id: str | None = None) -> None: ...

            def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...

        llm.callback_manager = CallbackManager([Holder([], [])])

        async def call() -> None:
            if not streams:
                await llm.achat(HELLO)
                return
            async for _ in await llm.astream_chat(HELLO):
                pass

        async def go() -> None:
            calling = asyncio.ensure_future(call())
            await holding.wait()
            await asyncio.sleep(0)
            other.execute("ROLLBACK")
            await calling

        asyncio.run(go())
        assert [(record.outcome, record.estimated) for record in bursar.records()] == [("completed", False)]


def test_nothing_is_sent_when_the_span_handler_is_gone(provider: Provider, bursar: Bursar) -> None:
    """Somebody clears the dispatcher's handlers: what was guarded once refuses instead of going out unguarded."""
    llm = llm_at(provider)
    llm.chat(HELLO)
    handlers = root_dispatcher.span_handlers
    root_dispatcher.span_handlers = []
    try:
        with pytest.raises(BursarError, match="root dispatcher"):
            llm.chat(HELLO)
    finally:
        root_dispatcher.span_handlers = handlers
    assert provider.requests == 1


def test_what_is_kept_of_ended_calls_does_not_grow(provider: Provider, bursar: Bursar) -> None:
    from bursar_llamaindex import spans

    llm = llm_at(provider)
    for _ in range(20):
        llm.chat(HELLO)
        list(llm.stream_chat(HELLO))
        llm.stream_chat(HELLO)
    ended(bursar)
    (handler,) = [one for one in llm.callback_manager.handlers if isinstance(one, BursarCallbackHandler)]
    assert not handler._calls
    assert not handler._lazy
    assert not spans._open


def test_guarded_objects_can_be_pickled(provider: Provider, bursar: Bursar) -> None:
    """LlamaIndex's ingestion sends embedding models to other processes."""
    llm = llm_at(provider)
    llm.chat(HELLO)
    sent: Any = pickle.loads(pickle.dumps(llm))
    sent.chat(HELLO)
    assert ended(bursar) == [("completed", False)] * 2


def _chat_in_child(provider_url: str, refused: Any) -> None:
    llm = OpenAI(model="gpt-4o", api_base=f"{provider_url}/v1", api_key="any", max_retries=0, max_tokens=500)
    try:
        llm.chat(HELLO)
        refused.put(False)
    except BudgetExceeded:
        refused.put(True)


def test_a_forked_child_is_guarded(provider: Provider, tmp_path: Path) -> None:
    """It inherits what was installed, and the books: of two processes one is refused."""
    store = f"sqlite:///{tmp_path / 'fork.db'}?durability=process"
    with Bursar(store, [Budget("one", "1 requests")]) as bursar:
        uninstall = install(bursar)
        llm_at(provider).chat(HELLO)
        context = multiprocessing.get_context("fork")
        refused = context.Queue()
        child = context.Process(target=_chat_in_child, args=(provider.url, refused))
        child.start()
        assert refused.get(timeout=30) is True
        child.join()
        uninstall()
    assert provider.requests == 1


async def _awaited(method: Any, *args: Any) -> Any:
    return await method(*args)


def test_a_stream_that_the_provider_ends_by_an_error_of_a_refusals_code_is_booked(bursar: Bursar) -> None:
    """As OpenRouter tells of its provider's: what had been generated is billed."""
    part = {"index": 0, "delta": {"role": "assistant", "content": "hello "}, "finish_reason": None}
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "choices": [part]}
    events = [chunk, chunk, {**chunk, "error": {"code": 403, "message": "Flagged"}}]
    told = "".join(f"data: {json.dumps(event)}\n\n" for event in events).encode()
    with CannedProvider({"POST /v1/chat/completions": Canned(told, "text/event-stream")}) as provider:
        llm = OpenAI("gpt-4o", max_tokens=500, api_base=f"{provider.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(Exception, match="Flagged"):
            list(llm.stream_chat(HELLO))
    (record,) = bursar.records()
    assert (record.kind, record.estimated) == ("settlement", True)
