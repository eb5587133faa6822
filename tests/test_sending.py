"""A call that passes two doors is charged by the outermost alone; whatever else is called beside it is charged too."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bursar import Budget, Bursar
from bursar.sending import Sending, passing
from bursar.testing.provider import Answer, Fault, Provider

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why is the sky blue?"}]


GUARD, OTHER = Bursar("memory:", []), Bursar("memory:", [])


def passes(model: str = "gpt-4o", messages: Any = ASKED, guard: Bursar = GUARD) -> bool:
    with passing(guard, model, messages) as is_held:
        return is_held


def test_one_call_passes_and_only_while_it_is_sent() -> None:
    assert not passes()
    with Sending(GUARD, "gpt-4o", ASKED):
        assert not passes(guard=OTHER)  # whose budgets nobody has asked
        assert passes()
        assert not passes()  # a second one, after the answer
    with Sending(GUARD, "gpt-4o", ASKED):
        pass
    assert not passes()


@pytest.mark.parametrize(
    "same",
    [
        "Why is the sky blue?",
        ["Why is the sky blue?"],
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Why is the sky blue?"}]}]},
        {"messages": [*ASKED[:1], {"role": "user", "content": [{"text": "Why is "}, {"text": "the sky blue?"}]}]},
        {"contents": [{"parts": [{"text": "Why is the sky blue?"}]}]},
        {"input": [{"type": "function_call_output", "output": "Why is the sky blue?"}]},
        [SimpleNamespace(content="Why is the sky blue?")],
        [SimpleNamespace(blocks=[SimpleNamespace(text="Why is the sky "), SimpleNamespace(text="blue?")])],
    ],
    ids=["text", "prompts", "responses", "parts", "gemini", "tool", "object", "blocks"],
)
def test_the_same_call_is_known_in_any_form(same: Any) -> None:
    with Sending(GUARD, "openai/gpt-4o", ASKED):
        assert passes("gpt-4o", same)
    with Sending(GUARD, "gpt-4o", same):
        assert passes("azure/gpt-4o", ASKED)


class Strange:
    @property
    def content(self) -> str:
        raise RuntimeError("not now")


@pytest.mark.parametrize(
    ("model", "messages"),
    [
        ("gpt-4o-mini", ASKED),
        ("gpt-4o", [*ASKED, {"role": "user", "content": "And at night?"}]),
        ("gpt-4o", []),
        ("gpt-4o", None),
        ("gpt-4o", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("gpt-4o", [Strange()]),
    ],
    ids=["model", "text", "none", "nothing", "image", "strange"],
)
def test_what_cannot_be_told_to_be_that_call_is_another(model: str, messages: Any) -> None:
    with Sending(GUARD, "gpt-4o", ASKED):
        assert not passes(model, messages)
        assert passes()
    with Sending(GUARD, model, messages):
        assert not passes("gpt-4o", ASKED)


def test_a_call_that_failed_may_be_sent_again() -> None:
    def fail() -> None:
        with passing(GUARD, "gpt-4o", ASKED) as is_held:
            assert is_held
            raise TimeoutError

    with Sending(GUARD, "gpt-4o", ASKED):
        for _ in range(2):
            with pytest.raises(TimeoutError):
                fail()
        assert passes()


def test_doors_further_in_pass_by_the_same_call() -> None:
    with Sending(GUARD, "gpt-4o", ASKED), passing(GUARD, "gpt-4o", ASKED) as second:
        assert second
        assert passes()
        assert not passes()


def test_of_a_batch_each_passes_once() -> None:
    """All are announced before the first is sent, and end elsewhere than where they began."""
    first, second = (Sending(GUARD, "gpt-4o", text).begin() for text in ("one", "two"))
    assert passes("gpt-4o", "one")
    assert passes("gpt-4o", "two")
    thread = threading.Thread(target=lambda: (first.end(), second.end()))
    thread.start()
    thread.join()
    assert not passes("gpt-4o", "two")


def test_a_thread_or_task_sees_it_where_the_context_is_handed_on() -> None:
    seen: list[bool] = []
    with Sending(GUARD, "gpt-4o", ASKED):
        plain = threading.Thread(target=lambda: seen.append(passes()))
        plain.start()
        plain.join()
        handed = threading.Thread(target=contextvars.copy_context().run, args=(lambda: seen.append(passes()),))
        handed.start()
        handed.join()
    assert seen == [False, True]

    async def task() -> bool:
        with Sending(GUARD, "gpt-4o", ASKED):
            return await asyncio.create_task(asyncio.to_thread(passes))

    assert asyncio.run(task())


def test_of_many_threads_one_passes() -> None:
    with Sending(GUARD, "gpt-4o", ASKED):
        start, seen = threading.Barrier(16), []

        def race() -> None:
            start.wait()
            seen.append(passes())

        contexts = [contextvars.copy_context() for _ in range(16)]
        threads = [threading.Thread(target=context.run, args=(race,)) for context in contexts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sum(seen) == 1


# -- one framework inside of another ---------------------------------------------------------------------------------


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=5)) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        yield bursar


def charged_once(bursar: Bursar, provider: Provider, calls: int = 1) -> None:
    provider.wait_idle()
    assert provider.billed_calls == calls
    assert sum(record.cost_nanos for record in bursar.records()) == provider.billed_nanos
    assert not any(record.estimated for record in bursar.records())
    assert bursar.store.open_reservations() == 0


STYLES = ("call", "acall", "stream", "astream")


def consume(style: str, call: Any, acall: Any, stream: Any, astream: Any) -> Any:
    async def awaited() -> Any:
        return await acall() if style == "acall" else [chunk async for chunk in astream()]

    return asyncio.run(awaited()) if style.startswith("a") else call() if style == "call" else list(stream())


def langchain(bursar: Bursar, provider: Provider, **options: Any) -> Any:
    """LangChain's OpenAI model over wrapped clients."""
    langchain_openai, openai = pytest.importorskip("langchain_openai"), pytest.importorskip("openai")
    settings = {"base_url": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}
    root, aroot = bursar.wrap(openai.OpenAI(**settings)), bursar.wrap(openai.AsyncOpenAI(**settings))
    return langchain_openai.ChatOpenAI(
        model="gpt-4o",
        max_tokens=500,
        stream_usage=True,
        root_client=root,
        root_async_client=aroot,
        client=root.chat.completions,
        async_client=aroot.chat.completions,
        **settings,
        **options,
    )


@pytest.mark.parametrize("style", STYLES)
def test_a_wrapped_client_inside_of_langchain(style: str, bursar: Bursar, provider: Provider) -> None:
    model = langchain(bursar, provider)
    from langchain_core.messages import HumanMessage

    from bursar_langchain import install

    uninstall = install(bursar)
    try:
        text = "Why is the sky blue?"
        consume(
            style,
            lambda: model.invoke(text),
            lambda: model.ainvoke(text),
            lambda: model.stream(text),
            lambda: model.astream(text),
        )
        charged_once(bursar, provider)
        model.batch([text, text, "another"])
        model.generate([[HumanMessage(text)], [HumanMessage("b")]])  # announced together, before either is sent
        charged_once(bursar, provider, 6)
    finally:
        uninstall()
    model.invoke(text)
    charged_once(bursar, provider, 7)  # by the wrapped client, now that LangChain's handler is gone


def test_what_is_called_beside_a_langchain_call_is_charged(bursar: Bursar, provider: Provider) -> None:
    """The very same question, asked on a wrapped client: in another handler's callbacks, in a stream's loop, in a tool."""
    pytest.importorskip("langchain_openai")
    import openai
    from langchain_core.callbacks import BaseCallbackHandler
    from langchain_core.tools import tool
    from langchain_openai import ChatOpenAI

    from bursar_langchain import BursarCallbackHandler

    settings = {"base_url": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}
    beside = bursar.wrap(openai.OpenAI(**settings))
    model = ChatOpenAI(model="gpt-4o", max_tokens=500, stream_usage=True, **settings)

    def ask(text: str = "Why?", name: str = "gpt-4o") -> None:
        beside.chat.completions.create(
            model=name, max_completion_tokens=500, messages=[{"role": "user", "content": text}]
        )

    class Judge(BaseCallbackHandler):
        run_inline = True

        def on_llm_end(self, response: Any, **more: Any) -> None:
            ask(f"Is it good? {response.generations[0][0].text}")

    @tool
    def search(query: str) -> str:
        """Search."""
        ask(query)
        return "found"

    handler = BursarCallbackHandler(bursar)
    for chunk in model.stream("Why?", config={"callbacks": [handler]}):
        if chunk.content:
            ask()
            break
    handler.drain()
    charged = [record for record in bursar.records() if not record.estimated]
    assert len(charged) == 1
    model.invoke("Why?", config={"callbacks": [Judge(), handler]})
    search.invoke({"query": "Why?"}, config={"callbacks": [handler]})
    models = [record for record in bursar.records() if record.model]
    assert len(models) == provider.billed_calls == 5


def test_a_failed_call_inside_of_langchain_is_charged_once_when_it_is_made_again(
    bursar: Bursar, provider: Provider
) -> None:
    model = langchain(bursar, provider)
    from bursar_langchain import BursarCallbackHandler

    provider.script([Fault("refuse", status=429, retry_after_s=0.001)])
    again = model.with_retry(stop_after_attempt=2, wait_exponential_jitter=False)
    again.invoke("Why?", config={"callbacks": [BursarCallbackHandler(bursar)]})
    assert provider.requests == 2
    charged_once(bursar, provider)


def test_litellm_inside_of_langchain(bursar: Bursar, provider: Provider) -> None:
    langchain_litellm = pytest.importorskip("langchain_litellm")
    import litellm

    from bursar_langchain import install
    from bursar_litellm import install as install_litellm

    settings = {"api_base": f"{provider.url}/v1", "api_key": "any", "max_tokens": 500}
    model = langchain_litellm.ChatLiteLLM(model="openai/gpt-4o", max_retries=0, **settings)
    uninstalls = [install(bursar), install_litellm(bursar)]
    try:
        for style in STYLES:
            consume(
                style,
                lambda: model.invoke("Why?"),
                lambda: model.ainvoke("Why?"),
                lambda: model.stream("Why?"),
                lambda: model.astream("Why?"),
            )
        assert len(list(bursar.records())) == 4
        litellm.completion("openai/gpt-4o", [{"role": "user", "content": "Why?"}], **settings)
        provider.wait_idle()
        assert len(list(bursar.records())) == provider.billed_calls == 5
        assert bursar.store.open_reservations() == 0
    finally:
        for uninstall in uninstalls:
            uninstall()
