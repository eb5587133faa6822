"""Nothing is sent past a refusal: every way to call an LLM or an embedding model, however it was wired."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core import PromptTemplate, Settings
from llama_index.core.base.llms.types import TextBlock, ToolCallBlock
from llama_index.core.callbacks import CallbackManager, CBEventType, TokenCountingHandler
from llama_index.core.callbacks.base_handler import BaseCallbackHandler
from llama_index.core.embeddings import MockEmbedding
from llama_index.core.llms import ChatMessage, CompletionResponse, CustomLLM, LLMMetadata, MockLLM
from llama_index.core.llms.callbacks import llm_completion_callback
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from bursar import Budget, BudgetExceeded, Bursar, BursarError, UnknownPrice
from bursar.estimate import Request
from bursar.testing.provider import Answer, Provider
from bursar_llamaindex import BursarCallbackHandler, guard_llm, install

HELLO = [ChatMessage(role="user", content="hello")]


def search(query: str) -> str:
    """Search."""
    return query


TOOLS = [FunctionTool.from_defaults(search)]


async def drained(stream: Any) -> list[Any]:
    return [part async for part in await stream]


# thirteen ways to call an LLM, six to call an embedding model
LLM_CALLS: dict[str, Callable[[Any], Any]] = {
    "chat": lambda llm: llm.chat(HELLO),
    "complete": lambda llm: llm.complete("hello"),
    "stream_chat": lambda llm: list(llm.stream_chat(HELLO)),
    "stream_complete": lambda llm: list(llm.stream_complete("hello")),
    "achat": lambda llm: asyncio.run(awaited(llm.achat, HELLO)),
    "acomplete": lambda llm: asyncio.run(awaited(llm.acomplete, "hello")),
    "astream_chat": lambda llm: asyncio.run(drained(llm.astream_chat(HELLO))),
    "astream_complete": lambda llm: asyncio.run(drained(llm.astream_complete("hello"))),
    "predict": lambda llm: llm.predict(PromptTemplate("hello")),
    "apredict": lambda llm: asyncio.run(awaited(llm.apredict, PromptTemplate("hello"))),
    "stream": lambda llm: list(llm.stream(PromptTemplate("hello"))),
    "chat_with_tools": lambda llm: llm.chat_with_tools(TOOLS, user_msg="hello"),
    "achat_with_tools": lambda llm: asyncio.run(awaited(llm.achat_with_tools, TOOLS, user_msg="hello")),
}
EMBEDDING_CALLS: dict[str, Callable[[Any], Any]] = {
    "get_query_embedding": lambda model: model.get_query_embedding("hello"),
    "get_text_embedding": lambda model: model.get_text_embedding("hello"),
    "get_text_embedding_batch": lambda model: model.get_text_embedding_batch(["a", "b", "c"]),
    "aget_query_embedding": lambda model: asyncio.run(awaited(model.aget_query_embedding, "hello")),
    "aget_text_embedding": lambda model: asyncio.run(awaited(model.aget_text_embedding, "hello")),
    "aget_text_embedding_batch": lambda model: asyncio.run(awaited(model.aget_text_embedding_batch, ["a", "b", "c"])),
}


async def awaited(method: Any, *args: Any, **options: Any) -> Any:
    return await method(*args, **options)


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=50)) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        yield bursar


@pytest.fixture
def broke() -> Iterator[Bursar]:
    """A budget that nothing fits into."""
    with Bursar("memory:", [Budget("nothing", "0.000000001 USD")]) as bursar:
        yield bursar


@pytest.fixture
def guarding() -> Iterator[Callable[[Bursar], None]]:
    """`install`, undone after the test."""
    undo: list[Callable[[], None]] = []
    yield lambda bursar: undo.append(install(bursar))
    for one in undo:
        one()


@pytest.fixture
def settings() -> Iterator[Any]:
    """LlamaIndex's settings as they were before."""
    yield Settings
    Settings._callback_manager = None
    Settings._llm = None


def llm_at(url: str, **options: Any) -> OpenAI:
    return OpenAI(model="gpt-4o", api_base=f"{url}/v1", api_key="sk-secret", max_retries=0, **options)


def embedding_at(url: str, **options: Any) -> OpenAIEmbedding:
    return OpenAIEmbedding(
        model="text-embedding-3-small", api_base=f"{url}/v1", api_key="sk-secret", max_retries=0, **options
    )


@pytest.mark.parametrize("way", LLM_CALLS)
def test_every_way_to_call_an_llm_is_refused_before_it_sends(
    way: str, provider: Provider, broke: Bursar, guarding: Any
) -> None:
    llm = llm_at(provider.url)  # created before the guard is installed
    guarding(broke)
    with pytest.raises(BudgetExceeded) as caught:
        LLM_CALLS[way](llm)
    assert type(caught.value) is BudgetExceeded
    assert caught.value.budget == "nothing"
    assert provider.requests == 0
    assert broke.store.open_reservations() == 0


@pytest.mark.parametrize("way", LLM_CALLS)
def test_every_way_to_call_an_llm_settles_once(way: str, provider: Provider, bursar: Bursar, guarding: Any) -> None:
    guarding(bursar)
    LLM_CALLS[way](llm_at(provider.url))
    (record,) = bursar.records()
    assert not record.estimated
    assert record.cost_nanos == provider.billed_nanos > 0


@pytest.mark.parametrize("way", EMBEDDING_CALLS)
def test_every_way_to_embed_is_refused_before_it_sends(
    way: str, provider: Provider, broke: Bursar, guarding: Any
) -> None:
    model = embedding_at(provider.url)
    guarding(broke)
    with pytest.raises(BudgetExceeded):
        EMBEDDING_CALLS[way](model)
    assert provider.requests == 0
    assert broke.store.open_reservations() == 0


@pytest.mark.parametrize("way", EMBEDDING_CALLS)
def test_every_way_to_embed_is_one_call_a_request(way: str, provider: Provider, bursar: Bursar, guarding: Any) -> None:
    guarding(bursar)
    EMBEDDING_CALLS[way](embedding_at(provider.url, embed_batch_size=2))
    records = list(bursar.records())
    assert len(records) == provider.billed_calls == (2 if "batch" in way else 1)
    assert {record.tags["model"] for record in records} == {"text-embedding-3-small"}
    assert not any(record.estimated for record in records)
    assert [record.usage["input_tokens"] for record in records] == [one.input_tokens for one in provider.account]
    assert bursar.store.open_reservations() == 0


def test_a_batch_that_is_refused_half_way_leaves_nothing_open(provider: Provider, guarding: Any) -> None:
    """The parts of an async batch are announced at once; those that were not sent when one was refused are not sent."""
    with Bursar("memory:", [Budget("two", "2 requests")]) as bursar:
        guarding(bursar)
        model = embedding_at(provider.url, embed_batch_size=1)

        async def embed() -> None:
            with pytest.raises(BudgetExceeded):
                await model.aget_text_embedding_batch(["a", "b", "c", "d", "e"])
            others = asyncio.all_tasks() - {asyncio.current_task()}
            await asyncio.gather(*others, return_exceptions=True)

        asyncio.run(embed())
        assert provider.billed_calls <= 2
        assert bursar.store.open_reservations() == 0
        assert len([record for record in bursar.records() if record.outcome != "blocked"]) == 2


def test_a_cached_embedding_costs_nothing(provider: Provider, bursar: Bursar, guarding: Any) -> None:
    from llama_index.core.storage.kvstore import SimpleKVStore

    guarding(bursar)
    model = embedding_at(provider.url, embeddings_cache=SimpleKVStore())
    for _ in range(3):
        model.get_text_embedding("hello")
    assert provider.billed_calls == 1
    assert len(list(bursar.records())) == 1


def test_an_async_batch_with_a_cache_is_guarded_though_it_asks_no_rate_limiter(
    provider: Provider, broke: Bursar, guarding: Any
) -> None:
    from llama_index.core.storage.kvstore import SimpleKVStore

    guarding(broke)
    model = embedding_at(provider.url, embeddings_cache=SimpleKVStore())
    with pytest.raises(BudgetExceeded):
        asyncio.run(awaited(model.aget_text_embedding_batch, ["a", "b"]))
    assert provider.requests == 0
    assert broke.store.open_reservations() == 0


TOLD = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "search", "arguments": '{"query": "' + "x" * 400 + '"}'},
}


@pytest.mark.parametrize(
    "message",
    [
        ChatMessage(role="user", content="a b " * 100),
        ChatMessage(role="user", blocks=[TextBlock(text="a b " * 100), TextBlock(text="c d " * 100)]),
        ChatMessage(
            role="assistant", blocks=[ToolCallBlock(tool_call_id="1", tool_name="search", tool_kwargs={"q": "x" * 400})]
        ),
        ChatMessage(role="assistant", content="", additional_kwargs={"tool_calls": [TOLD]}),
        ChatMessage(role="tool", content="found " * 60, additional_kwargs={"tool_call_id": "call_1"}),
    ],
    ids=["text", "texts", "a tool's call", "a tool's call, as it was kept", "a tool's result"],
)
def test_what_is_reserved_covers_what_is_sent(
    message: ChatMessage, provider: Provider, bursar: Bursar, guarding: Any
) -> None:
    """Every byte of the messages, and little more."""
    guarding(bursar)
    measured: list[Any] = []
    call = bursar.call
    bursar.call = lambda *of, **asked: (measured.append(asked["body"]["messages"]), call(*of, **asked))[1]  # type: ignore[method-assign]
    llm_at(provider.url).chat([message])
    sent = Request("openai", "gpt-4o", provider.account[0].request["messages"]).size
    assert sent <= Request("openai", "gpt-4o", measured[0]).size <= sent + 100


# -- wiring ------------------------------------------------------------------------------------------------------


def test_a_handler_in_the_settings_guards_what_is_created_after(
    provider: Provider, broke: Bursar, settings: Any
) -> None:
    settings.callback_manager = CallbackManager([BursarCallbackHandler(broke)])
    with pytest.raises(BudgetExceeded):
        llm_at(provider.url).chat(HELLO)
    assert provider.requests == 0


def test_an_installed_guard_holds_whatever_the_settings_do(
    provider: Provider, broke: Bursar, settings: Any, guarding: Any
) -> None:
    """Objects created before, with managers of their own, or whose manager is overwritten."""
    before = llm_at(provider.url)
    own = llm_at(provider.url, callback_manager=CallbackManager([TokenCountingHandler()]))
    guarding(broke)
    settings.callback_manager = CallbackManager([TokenCountingHandler()])
    settings.llm = llm_at(provider.url, callback_manager=CallbackManager([]))
    for llm in (before, own, settings.llm):
        with pytest.raises(BudgetExceeded):
            llm.chat(HELLO)
    assert provider.requests == 0


def test_a_handler_and_an_installed_guard_count_once(provider: Provider, bursar: Bursar, guarding: Any) -> None:
    guarding(bursar)
    handlers = [BursarCallbackHandler(bursar), BursarCallbackHandler(bursar)]
    llm_at(provider.url, callback_manager=CallbackManager(handlers)).chat(HELLO)
    assert len(list(bursar.records())) == 1


def test_two_guards_each_keep_their_books(provider: Provider, bursar: Bursar, broke: Bursar) -> None:
    """What the first has reserved is given back when the second refuses."""
    manager = CallbackManager([BursarCallbackHandler(bursar), BursarCallbackHandler(broke)])
    with pytest.raises(BudgetExceeded):
        llm_at(provider.url, callback_manager=manager).chat(HELLO)
    assert provider.requests == 0
    assert bursar.store.open_reservations() == 0
    assert [record.outcome for record in bursar.records()] == ["cancelled"]


def test_an_uninstalled_guard_is_gone(provider: Provider, broke: Bursar) -> None:
    llm = llm_at(provider.url)
    uninstall = install(broke)
    with pytest.raises(BudgetExceeded):
        llm.chat(HELLO)
    uninstall()
    llm.chat(HELLO)
    assert provider.requests == 1
    assert not llm.callback_manager.handlers


def test_a_second_guard_is_not_installed_beside_the_first(bursar: Bursar, broke: Bursar, guarding: Any) -> None:
    guarding(bursar)
    with pytest.raises(BursarError, match="installed already"):
        install(broke)


def test_the_users_rate_limiter_and_handlers_still_work(provider: Provider, bursar: Bursar, guarding: Any) -> None:
    """The limiter is asked before anything is reserved, and a shared list of handlers stays shared."""
    from llama_index.core.rate_limiter import BaseRateLimiter

    open_then: list[int] = []

    class Limiter(BaseRateLimiter):
        def acquire(self, num_tokens: int = 0) -> None:
            open_then.append(bursar.store.open_reservations())

        async def async_acquire(self, num_tokens: int = 0) -> None:
            self.acquire()

    guarding(bursar)
    llm = llm_at(provider.url, rate_limiter=Limiter())
    counter = TokenCountingHandler()
    llm.callback_manager.add_handler(counter)
    llm.chat(HELLO)
    asyncio.run(awaited(llm.achat, HELLO))
    assert open_then == [0, 0]
    assert counter.total_llm_token_count == 2 * 1_050


def test_copies_of_a_guarded_llm_are_guarded(provider: Provider, broke: Bursar, guarding: Any) -> None:
    guarding(broke)
    llm = llm_at(provider.url)
    with pytest.raises(BudgetExceeded):
        llm.chat(HELLO)
    for copied in (llm.model_copy(), llm.model_copy(deep=True)):
        with pytest.raises(BudgetExceeded):
            copied.chat(HELLO)
    assert provider.requests == 0


# -- other handlers ----------------------------------------------------------------------------------------------


class Failing(BaseCallbackHandler):
    """Somebody else's handler that raises."""

    def __init__(self, at: str) -> None:
        super().__init__([], [])
        self.at = at

    def on_event_start(self, event_type: CBEventType, *args: Any, **more: Any) -> str:
        if self.at == "start" and event_type is CBEventType.LLM:
            raise ValueError("not mine")
        return ""

    def on_event_end(self, event_type: CBEventType, *args: Any, **more: Any) -> None:
        if self.at == "end" and event_type is CBEventType.LLM:
            raise ValueError("not mine")

    def start_trace(self, trace_id: str | None = None) -> None: ...

    def end_trace(self, trace_id: str | None = None, trace_map: Any = None) -> None: ...


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("at", ["start", "end"])
@pytest.mark.parametrize("way", ["chat", "achat", "stream_chat"])
def test_another_handler_that_raises_leaves_nothing_open(
    way: str, at: str, order: str, provider: Provider, bursar: Bursar
) -> None:
    ours = BursarCallbackHandler(bursar)
    handlers: list[BaseCallbackHandler] = [ours, Failing(at)]
    llm = llm_at(provider.url, callback_manager=CallbackManager(handlers if order == "after" else handlers[::-1]))
    with pytest.raises(ValueError, match="not mine"):
        LLM_CALLS[way](llm)
    assert ours.drain()
    assert provider.requests == (0 if at == "start" else 1)
    assert bursar.store.open_reservations() == 0
    assert sum(record.cost_nanos for record in bursar.records()) >= provider.billed_nanos


# -- LLMs of one's own -------------------------------------------------------------------------------------------


class Own(CustomLLM):
    """An LLM of the user's, over the user's client; `complete` and `stream_complete` tell LlamaIndex of their calls."""

    model: str = "gpt-4o"
    url: str = ""

    @property
    def metadata(self) -> LLMMetadata:
        return LLMMetadata(model_name=self.model)

    def _send(self, prompt: str) -> Any:
        from openai import OpenAI as Client

        client = Client(base_url=f"{self.url}/v1", api_key="any", max_retries=0)
        return client.chat.completions.create(model=self.model, messages=[{"role": "user", "content": prompt}])

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        answer = self._send(prompt)
        return CompletionResponse(text=answer.choices[0].message.content, raw=answer)

    @llm_completion_callback()
    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        def parts() -> Iterator[CompletionResponse]:
            answer = self._send(prompt)
            text = answer.choices[0].message.content
            yield CompletionResponse(text=text, delta=text, raw=answer)

        return parts()


class Silent(Own):
    """One that tells LlamaIndex nothing."""

    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        answer = self._send(prompt)
        return CompletionResponse(text=answer.choices[0].message.content, raw=answer)

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> Any:
        answer = self._send(prompt)
        for word in answer.choices[0].message.content.split():
            yield CompletionResponse(text=word, delta=word + " ", raw=answer)

    def chat(self, messages: Any, **kwargs: Any) -> Any:
        from llama_index.core.base.llms.generic_utils import completion_response_to_chat_response

        return completion_response_to_chat_response(self.complete(str(messages)))


OWN_CALLS = {name: call for name, call in LLM_CALLS.items() if "tools" not in name}


@pytest.mark.parametrize("way", OWN_CALLS)
def test_nested_events_are_counted_once(way: str, provider: Provider, guarding: Any) -> None:
    """`achat` of such an LLM is announced three times for one request."""
    from bursar import Override, PriceBook

    rates = Override(
        provider="own",
        model="gpt-4o",
        input_mtok="2.50",
        output_mtok="10.00",
        max_output_tokens=500,
        context_window=9_000,
    )
    prices = PriceBook.packaged().with_overrides([rates])
    with Bursar("memory:", [Budget("ample", "100 USD")], prices=prices) as bursar:
        guarding(bursar)
        OWN_CALLS[way](Own(url=provider.url))
        records = list(bursar.records())
        assert len(records) == provider.requests == 1
        assert bursar.store.open_reservations() == 0


def test_an_llm_without_a_price_is_refused(provider: Provider, bursar: Bursar, guarding: Any) -> None:
    """I11: an unknown price is never 0."""
    guarding(bursar)
    with pytest.raises(UnknownPrice):
        Own(url=provider.url).complete("hello")
    assert provider.requests == 0


def test_the_stand_ins_for_tests_send_nothing_and_cost_nothing(broke: Bursar, guarding: Any) -> None:
    guarding(broke)
    assert MockLLM().complete("hello").text == "hello"
    assert len(MockEmbedding(embed_dim=3).get_text_embedding("hello")) == 3


@pytest.mark.parametrize("kind", [Own, Silent])
@pytest.mark.parametrize("way", OWN_CALLS)
def test_a_guarded_copy_settles_once(way: str, kind: type[Own], provider: Provider, bursar: Bursar) -> None:
    llm = guard_llm(kind(url=provider.url), bursar, provider="openai", team="research")
    assert isinstance(llm, kind)
    OWN_CALLS[way](llm)
    (record,) = bursar.records()
    assert record.cost_nanos == provider.billed_nanos > 0
    assert (record.tags["provider"], record.tags["team"]) == ("openai", "research")
    assert bursar.store.open_reservations() == 0


@pytest.mark.parametrize("way", OWN_CALLS)
def test_a_guarded_copy_is_refused_before_it_sends(way: str, provider: Provider, broke: Bursar) -> None:
    with pytest.raises(BudgetExceeded):
        OWN_CALLS[way](guard_llm(Silent(url=provider.url), broke, provider="openai"))
    assert provider.requests == 0


def test_a_guarded_copy_and_an_installed_guard_count_once(provider: Provider, bursar: Bursar, guarding: Any) -> None:
    guarding(bursar)
    for way in OWN_CALLS:
        OWN_CALLS[way](guard_llm(llm_at(provider.url)))
    assert len(list(bursar.records())) == len(OWN_CALLS)
    assert sum(record.cost_nanos for record in bursar.records()) == provider.billed_nanos


def test_there_is_no_guarded_copy_without_a_guard(provider: Provider) -> None:
    with pytest.raises(BursarError, match="install"):
        guard_llm(llm_at(provider.url))


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_that_outgrows_its_budget_is_stopped(is_async: bool, provider: Provider) -> None:
    """A learned estimate falls short of 20,000 tokens; the stream ends where the budget does."""
    provider.script([Answer(input_tokens=1_000, output_tokens=20_000)])
    with Bursar("memory:", [Budget("small", "0.05 USD")]) as bursar:
        llm = guard_llm(Silent(url=provider.url), bursar, provider="openai", stop_streams=True)
        seen: list[str] = []

        async def read() -> None:
            async for part in await llm.astream_complete("hello"):
                seen.append(part.delta)

        def read_sync() -> None:
            for part in llm.stream_complete("hello"):
                seen.append(part.delta)

        with pytest.raises(BudgetExceeded):
            asyncio.run(read()) if is_async else read_sync()
        assert 100 < len(seen) < 10_000
        assert bursar.store.open_reservations() == 0
        assert [r.estimated for r in bursar.records() if r.outcome == "failed"] == [True]


# -- secrets -----------------------------------------------------------------------------------------------------


def test_no_key_and_no_text_reaches_records_or_logs(
    provider: Provider, broke: Bursar, bursar: Bursar, caplog: Any
) -> None:
    caplog.set_level(logging.DEBUG, "bursar")
    secret = [ChatMessage(role="user", content="my-private-words")]
    for guard in (bursar, broke):
        uninstall = install(guard)
        try:
            for way in ("chat", "stream_chat"):
                try:
                    getattr(llm_at(provider.url), way)(secret)
                except BudgetExceeded as refused:
                    told = f"{refused} {refused.fields}"
                    assert "sk-secret" not in told
                    assert "my-private-words" not in told
        finally:
            uninstall()
        kept = " ".join(repr(record) for record in guard.records()) + caplog.text
        assert "sk-secret" not in kept
        assert "my-private-words" not in kept
