"""Two doors of one guard: a wrapped client, or LiteLLM, inside of LlamaIndex is charged by LlamaIndex alone."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("llama_index.core")
pytest.importorskip("openai")

import openai

from bursar import Budget, Bursar
from bursar.testing.provider import Answer, Provider


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=5)) as provider:
        yield provider


@pytest.fixture
def bursar() -> Iterator[Bursar]:
    from bursar_llamaindex import install

    with Bursar("memory:", [Budget("ample", "100 USD")]) as bursar:
        uninstall = install(bursar)
        yield bursar
        uninstall()


def ask_in_every_style(llm: Any) -> None:
    async def stream() -> None:
        async for _ in await llm.astream_complete("Why?"):
            continue

    llm.complete("Why?")
    list(llm.stream_complete("Why?"))
    asyncio.run(llm.acomplete("Why?"))
    asyncio.run(stream())


def charged_once(bursar: Bursar, provider: Provider, calls: int) -> None:
    provider.wait_idle()
    records = list(bursar.records())
    assert len(records) == provider.billed_calls == calls
    assert sum(record.cost_nanos for record in records) == provider.billed_nanos
    assert not any(record.estimated for record in records)
    assert bursar.store.open_reservations() == 0


def test_a_wrapped_client(bursar: Bursar, provider: Provider) -> None:
    from llama_index.llms.openai import OpenAI

    settings = {"api_key": "any", "max_retries": 0}
    client = bursar.wrap(openai.OpenAI(base_url=f"{provider.url}/v1", **settings))
    aclient = bursar.wrap(openai.AsyncOpenAI(base_url=f"{provider.url}/v1", **settings))
    options = {"api_base": f"{provider.url}/v1", "openai_client": client, "async_openai_client": aclient}
    ask_in_every_style(OpenAI("gpt-4o", max_tokens=500, reuse_client=False, **settings, **options))
    charged_once(bursar, provider, 4)
    client.chat.completions.create(
        model="gpt-4o", messages=[{"role": "user", "content": "Why?"}], max_completion_tokens=500
    )
    charged_once(bursar, provider, 5)


def test_litellm(bursar: Bursar, provider: Provider) -> None:
    llama = pytest.importorskip("llama_index.llms.litellm")
    from bursar_litellm import install

    uninstall = install(bursar)
    options = {"api_base": f"{provider.url}/v1", "api_key": "any", "max_tokens": 500, "max_retries": 0}
    ask_in_every_style(llama.LiteLLM(model="openai/gpt-4o", **options))
    uninstall()
    provider.wait_idle()
    assert len(list(bursar.records())) == provider.billed_calls == 4
    assert bursar.store.open_reservations() == 0


def test_the_same_question_to_a_wrapped_client_between_two_parts_of_a_stream(
    bursar: Bursar, provider: Provider
) -> None:
    """It is another call, which the stream's reservation does not cover."""
    from llama_index.llms.openai import OpenAI

    settings = {"api_key": "any", "max_retries": 0}
    client = bursar.wrap(openai.OpenAI(base_url=f"{provider.url}/v1", **settings))
    llm = OpenAI("gpt-4o", max_tokens=500, api_base=f"{provider.url}/v1", **settings)

    def ask() -> None:
        client.chat.completions.create(
            model="gpt-4o", messages=[{"role": "user", "content": "Why?"}], max_completion_tokens=500
        )

    async def stream() -> None:
        parts = await llm.astream_complete("Why?")
        await anext(parts)
        ask()
        async for _ in parts:
            continue

    parts = llm.stream_complete("Why?")
    next(parts)
    ask()
    list(parts)
    charged_once(bursar, provider, 2)
    asyncio.run(stream())
    charged_once(bursar, provider, 4)
