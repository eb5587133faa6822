"""Functions in a provider's own format: Google's contents and interactions, compaction, and requests passed on as they are."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import litellm
import pytest
from canned import Canned, CannedProvider
from litellm import google_genai, interactions

from bursar import Bursar
from bursar.errors import UnboundedEstimate
from bursar_litellm import LiteLLMBudgetExceeded

Guarded = Callable[..., AbstractContextManager[Bursar]]

CLAUDE = "anthropic.claude-3-5-sonnet-20240620-v1:0"
CONTENTS = [{"role": "user", "parts": [{"text": "hi"}]}]
GENERATED = {
    "candidates": [{"content": {"parts": [{"text": "x"}], "role": "model"}, "finishReason": "STOP", "index": 0}],
    "usageMetadata": {"promptTokenCount": 1_000, "candidatesTokenCount": 400, "thoughtsTokenCount": 100},
}
INTERACTION = {
    "id": "i",
    "object": "interaction",
    "model": "gemini-2.5-flash",
    "status": "completed",
    "role": "model",
    "outputs": [{"type": "text", "text": "x"}],
    "usage": {"total_input_tokens": 1_000, "total_output_tokens": 400, "total_thought_tokens": 100},
}
COMPACTED = {
    "id": "r",
    "object": "response.compaction",
    "created_at": 1,
    "output": [{"id": "c", "type": "compaction", "encrypted_content": "x"}],
    "usage": {"input_tokens": 1_000, "output_tokens": 500, "total_tokens": 1_500},
}
CONVERSED = {
    "output": {"message": {"role": "assistant", "content": [{"text": "x"}]}},
    "stopReason": "end_turn",
    "usage": {"inputTokens": 1_000, "outputTokens": 500, "totalTokens": 1_500},
}
GEMINI = "/models/gemini-2.5-flash"


@pytest.fixture
def serving() -> Iterator[CannedProvider]:
    routes = {
        f"POST {GEMINI}:generateContent": Canned(GENERATED),
        f"POST {GEMINI}:streamGenerateContent": Canned(b"data: %s\n\n" % json.dumps(GENERATED).encode()),
        "POST /v1beta/interactions": Canned(INTERACTION),
        "POST /responses/compact": Canned(COMPACTED),
        f"POST /model/{CLAUDE}/converse": Canned(CONVERSED),
    }
    with CannedProvider(routes) as provider:
        yield provider


def run(call: Any) -> Any:
    async def awaited() -> Any:
        answer = await call
        return [chunk async for chunk in answer] if hasattr(type(answer), "__anext__") else answer

    return asyncio.run(awaited())


def google(url: str) -> dict[str, Any]:
    return {"model": "gemini/gemini-2.5-flash", "contents": CONTENTS, "api_base": url, "api_key": "any"}


def asked(url: str, model: str) -> dict[str, Any]:
    return {"model": model, "input": "hi", "api_base": url, "api_key": "any"}


def passed_on(url: str, model: str = f"bedrock/{CLAUDE}") -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": [{"text": "hi"}]}], "inferenceConfig": {"maxTokens": 600}}
    keys = {"aws_access_key_id": "a", "aws_secret_access_key": "b", "aws_region_name": "us-east-1"}
    sent = {"method": "POST", "endpoint": f"/model/{CLAUDE}/converse", "json": body}
    return {"model": model, "api_base": url, "api_key": "any", **keys, **sent}


async def routed(url: str) -> Any:
    """As the proxy does with Bedrock's routes."""
    call = passed_on(url)
    sent = {name: call.pop(name) for name in ("method", "endpoint", "json")}
    router = litellm.Router([{"model_name": "main", "litellm_params": call}])
    return await router.allm_passthrough_route(model="main", **sent)


GEMINI_NANOS = 1_550_000  # 1,000 x $0.30 + 500 x $2.50 per million
CALLS: dict[str, tuple[Callable[[str], Any], int]] = {
    "contents": (lambda url: google_genai.generate_content(**google(url)), GEMINI_NANOS),
    "acontents": (lambda url: run(google_genai.agenerate_content(**google(url))), GEMINI_NANOS),
    "contents-stream": (lambda url: list(google_genai.generate_content_stream(**google(url))), GEMINI_NANOS),
    "acontents-stream": (lambda url: run(google_genai.agenerate_content_stream(**google(url))), GEMINI_NANOS),
    "interaction": (lambda url: interactions.create(**asked(url, "gemini/gemini-2.5-flash")), GEMINI_NANOS),
    "ainteraction": (lambda url: run(interactions.acreate(**asked(url, "gemini/gemini-2.5-flash"))), GEMINI_NANOS),
    "compaction": (lambda url: litellm.compact_responses(**asked(url, "openai/gpt-4o")), 7_500_000),
    "acompaction": (lambda url: run(litellm.acompact_responses(**asked(url, "openai/gpt-4o"))), 7_500_000),
    "passed-on": (lambda url: litellm.llm_passthrough_route(**passed_on(url)), 10_500_000),
    "apassed-on": (lambda url: run(litellm.allm_passthrough_route(**passed_on(url))), 10_500_000),
    "passed-on-by-router": (lambda url: run(routed(url)), 10_500_000),
}


@pytest.mark.parametrize("name", list(CALLS))
def test_it_is_settled_to_what_was_billed(name: str, serving: CannedProvider, guarded: Guarded) -> None:
    call, cost_nanos = CALLS[name]
    with guarded() as bursar:
        call(serving.url)
    assert [(one.estimated, one.cost_nanos) for one in bursar.records()] == [(False, cost_nanos)]
    assert len(serving.requests) == 1


@pytest.mark.parametrize("name", list(CALLS))
def test_it_is_refused_before_anything_is_sent(name: str, serving: CannedProvider, broke: Guarded) -> None:
    with broke() as bursar, pytest.raises(LiteLLMBudgetExceeded):
        CALLS[name][0](serving.url)
    assert not serving.requests
    assert [record.outcome for record in bursar.records()] == ["blocked"]


def test_an_interaction_with_an_agent_is_refused_with_a_reason(serving: CannedProvider, guarded: Guarded) -> None:
    call = {**asked(serving.url, ""), "model": None, "agent": "deep-research", "custom_llm_provider": "gemini"}
    with guarded():
        with pytest.raises(UnboundedEstimate, match="an agent is billed when it has ended"):
            interactions.create(**call)
        with pytest.raises(UnboundedEstimate, match="an agent is billed when it has ended"):
            run(interactions.acreate(**call))
    assert not serving.requests


def test_what_asks_no_model_is_passed_on(serving: CannedProvider, broke: Guarded) -> None:
    call = {**passed_on(serving.url), "method": "GET", "endpoint": "/foundation-models", "json": None}
    with broke() as bursar, pytest.raises(Exception, match="none"):
        litellm.llm_passthrough_route(**call)
    assert len(serving.requests) == 1
    assert not list(bursar.records())


CHUNK = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o", "service_tier": "priority"}
PIECES: list[dict[str, Any]] = [
    CHUNK | {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "x"}, "finish_reason": None}]},
    CHUNK | {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
    CHUNK | {"choices": [], "usage": {"prompt_tokens": 1_000, "completion_tokens": 500, "total_tokens": 1_500}},
]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_stream_is_booked_at_the_rates_of_its_tier(is_async: bool, guarded: Guarded) -> None:
    stream = b"".join(b"data: %s\n\n" % json.dumps(piece).encode() for piece in PIECES) + b"data: [DONE]\n\n"
    call: dict[str, Any] = {"model": "openai/gpt-4o", "api_key": "any", "max_tokens": 500, "stream": True}
    call["messages"] = [{"role": "user", "content": "hi"}]
    with CannedProvider({"POST /v1/chat/completions": Canned(stream, "text/event-stream")}) as provider:
        call["api_base"] = f"{provider.url}/v1"
        with guarded() as bursar:
            run(litellm.acompletion(**call)) if is_async else list(litellm.completion(**call))
    (record,) = bursar.records()
    assert (record.usage["service_tier"], record.cost_nanos) == ("priority", 12_750_000)  # $4.25 and $17 per million


COUNTED = {"input_tokens": 1_000, "output_tokens": 500}
BEGUN = {"id": "m", "type": "message", "role": "assistant", "model": "claude-opus-4-6", "content": []}


@pytest.mark.parametrize(("told", "cost_nanos"), [({}, 17_500_000), ({"inference_geo": "us"}, 19_250_000)])
def test_a_stream_is_booked_at_the_rates_of_its_region(told: dict[str, str], cost_nanos: int, guarded: Guarded) -> None:
    """1,000 x $5 + 500 x $25 per million; a tenth more in one region."""
    events = (
        {"type": "message_start", "message": BEGUN | {"usage": {"input_tokens": 1_000, "output_tokens": 1, **told}}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": COUNTED | told},
        {"type": "message_stop"},
    )
    stream = b"".join(b"data: %s\n\n" % json.dumps(event).encode() for event in events)
    call: dict[str, Any] = {"model": "anthropic/claude-opus-4-6", "api_key": "any", "max_tokens": 500, "stream": True}
    call["messages"] = [{"role": "user", "content": "hi"}]
    with CannedProvider({"POST /v1/messages": Canned(stream, "text/event-stream")}) as provider, guarded() as bursar:
        list(litellm.completion(**call, api_base=provider.url))
    (record,) = bursar.records()
    assert (record.estimated, record.cost_nanos) == (False, cost_nanos)
