"""Thresholds, the switch and the detectors: what of them reaches LlamaIndex's calls, streams, agents and tools."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

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

    def make(*thresholds: Threshold, limit: str = "1 USD", **said: Any) -> Bursar:
        bursar = Bursar("memory:", [Budget("b", limit, thresholds=thresholds)], **said)
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
    "astream_complete": lambda llm: asyncio.run(drained(llm.astream_complete("hello"))),
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
