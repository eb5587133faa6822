"""Calls of tasks that nobody goes on with, which the garbage collector ends amid Bursar's own work; and a failed embedding."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from collecting import Collecting

pytest.importorskip("llama_index.core")

import httpx
from llama_index.core.llms import ChatMessage, ChatResponse
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai import OpenAIEmbedding
from llama_index.llms.openai import OpenAI

from bursar import Budget, Bursar
from bursar.commands import Tell
from bursar.ending import drain
from bursar.testing.provider import Answer, Fault, Provider
from bursar_llamaindex import guard_llm, guard_tool, install

HELLO = [ChatMessage(role="user", content="hello")]


async def sends(*given: Any, **settings: Any) -> Any:
    """Says that it is under way, and gets no answer."""
    current = asyncio.current_task()
    assert current is not None
    current.set_name("sent")
    await asyncio.get_running_loop().create_future()


class Chat(OpenAI):
    _achat = sends


class Embedding(OpenAIEmbedding):
    _aget_query_embedding = sends


def chat(bursar: Bursar) -> Awaitable[Any]:
    return Chat(model="gpt-4o", api_key="any", max_tokens=10).achat(HELLO)


def guarded_chat(bursar: Bursar) -> Awaitable[Any]:
    return guard_llm(Chat(model="gpt-4o", api_key="any", max_tokens=10), bursar).achat(HELLO)


def embedding(bursar: Bursar) -> Awaitable[Any]:
    return Embedding(model="text-embedding-3-small", api_key="any").aget_query_embedding("hello")


def tool(bursar: Bursar) -> Awaitable[Any]:
    async def search(query: str) -> None:
        await sends()

    return guard_tool(FunctionTool.from_defaults(async_fn=search), bursar, cost="0.10 USD").acall(query="x")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # LlamaIndex's own, in such a task
@pytest.mark.parametrize("ask", [chat, guarded_chat, embedding, tool])
def test_a_task_that_is_collected_amid_a_transaction_of_the_same_thread_ends_after_it(
    ask: Callable[[Bursar], Awaitable[Any]], tmp_path: Path
) -> None:
    """It must not wait for that transaction's lock."""
    clock, loop = Collecting(), asyncio.new_event_loop()
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("b", "1 USD")], clock=clock)
    uninstall = install(bursar)
    try:
        task: Any = loop.create_task(_await(ask(bursar)))
        while task.get_name() != "sent" and not task.done():
            loop.run_until_complete(asyncio.sleep(0.001))
        assert bursar.store.open_reservations() == 1
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
    finally:
        uninstall()
    assert bursar.store.open_reservations() == 0
    assert len(list(bursar.records())) == 1
    bursar.close()


class Endless(OpenAI):
    """Says more than any estimate of it."""

    def stream_chat(self, messages: Any, **settings: Any) -> Any:
        said = ChatMessage(role="assistant", content="word ")
        return (ChatResponse(message=said, delta="word ") for _ in range(100_000))


def test_a_stream_that_outgrew_its_estimate_and_is_collected_amid_a_transaction_ends_after_it(tmp_path: Path) -> None:
    """What was reserved beside the estimate does not wait for that transaction's lock either."""
    clock = Collecting()
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("b", "1 USD")], clock=clock)
    stream = guard_llm(Endless(model="gpt-4o", api_key="any"), bursar, stop_streams=True).stream_chat(HELLO)
    while bursar.store.open_reservations() < 2:
        next(stream)  # type: ignore[call-overload]
    held: list[Any] = [stream]
    held.append(held)
    del stream, held
    clock.collects = True
    store = threading.Thread(target=lambda: bursar.store.execute(Tell("one", "policy", {})), daemon=True)
    store.start()
    store.join(20)
    clock.collects = False
    assert not store.is_alive()
    assert drain(20)
    assert bursar.store.open_reservations() == 0
    bursar.close()


@pytest.mark.parametrize("guarded", [False, True])
def test_a_stream_that_is_closed_makes_room_for_the_next_at_once(guarded: bool) -> None:
    with Provider(Answer(chunks=20)) as provider, Bursar("memory:", [Budget("one at a time", "1 slots")]) as bursar:
        llm = OpenAI(model="gpt-4o", api_base=f"{provider.url}/v1", api_key="any", max_tokens=10, max_retries=0)
        uninstall = install(bursar)
        try:
            for _ in range(30):
                stream: Any = (guard_llm(llm, bursar) if guarded else llm).stream_chat(HELLO)
                next(stream)
                stream.close()
        finally:
            uninstall()


async def _await(asked: Awaitable[Any]) -> Any:
    return await asked


def test_a_stream_after_a_failed_embedding_of_the_same_http_client_is_handed_on_as_it_arrives() -> None:
    """It was read to its end, for an embedding's usage, before its first part was shown."""
    with Provider(Answer(chunks=20)) as provider, Bursar("memory:", [Budget("b", "1 USD")]) as bursar:
        uninstall = install(bursar)
        at = {"api_base": f"{provider.url}/v1", "api_key": "any", "http_client": httpx.Client(), "max_retries": 0}
        provider.script([Fault("refuse", status=500), Fault("hang", after_events=5)])
        try:
            with pytest.raises(Exception):  # noqa: B017 - the client's own
                OpenAIEmbedding(model="text-embedding-3-small", **at).get_text_embedding("hello")
            stream = OpenAI(model="gpt-4o", max_tokens=10, timeout=2.0, **at).stream_chat(HELLO)
            assert next(stream).message.role == "assistant"
            stream.close()  # type: ignore[attr-defined]
        finally:
            uninstall()
