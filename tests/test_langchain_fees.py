"""Tools that the provider runs and bills by the call: LangChain drops what the provider states of them, its content shows them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from canned import Canned, CannedProvider
from langchain_core.language_models import BaseChatModel
from langchain_openai import ChatOpenAI

from bursar import Budget, Bursar
from bursar_langchain import BursarCallbackHandler

SEARCHED = [
    {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {"type": "search", "query": "x"}},
    {
        "type": "web_search_call",
        "id": "ws_2",
        "status": "completed",
        "action": {"type": "open_page", "url": "http://x"},
    },
]
SAID = {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed"}
TEXT = {"type": "output_text", "text": "hello", "annotations": []}
RESPONSE: dict[str, Any] = {
    "id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "gpt-4o", "error": None,
    "output": [*SEARCHED, {**SAID, "content": [TEXT]}], "parallel_tool_calls": True, "tool_choice": "auto",
    "tools": [{"type": "web_search"}], "incomplete_details": None, "instructions": None, "metadata": {},
    "usage": {
        "input_tokens": 1_000, "output_tokens": 50, "total_tokens": 1_050,
        "input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0},
    },
}  # fmt: skip
BLOCKS: list[dict[str, Any]] = [
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
    {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": []},
    {"type": "server_tool_use", "id": "srvtoolu_2", "name": "web_search", "input": {"query": "y"}},
    {
        "type": "web_search_tool_result",
        "tool_use_id": "srvtoolu_2",
        "content": {"type": "web_search_tool_result_error", "error_code": "max_uses_exceeded"},
    },
    {"type": "text", "text": "hello"},
]
BILLED = {"input_tokens": 1_000, "output_tokens": 50, "server_tool_use": {"web_search_requests": 1}}
MESSAGE: dict[str, Any] = {
    "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-5", "content": BLOCKS,
    "stop_reason": "end_turn", "stop_sequence": None, "usage": BILLED,
}  # fmt: skip


def response_events() -> Iterator[dict[str, Any]]:
    yield {"type": "response.created", "response": {**RESPONSE, "status": "in_progress", "output": [], "usage": None}}
    for index, item in enumerate(SEARCHED):
        yield {"type": "response.output_item.added", "output_index": index, "item": {**item, "status": "in_progress"}}
        yield {"type": "response.output_item.done", "output_index": index, "item": item}
    at = {"output_index": 2, "content_index": 0, "item_id": "msg_1"}
    yield {"type": "response.output_item.added", "output_index": 2, "item": {**SAID, "content": []}}
    yield {"type": "response.content_part.added", **at, "part": {**TEXT, "text": ""}}
    yield {"type": "response.output_text.delta", **at, "delta": "hello", "logprobs": []}
    yield {"type": "response.output_item.done", "output_index": 2, "item": {**SAID, "content": [TEXT]}}
    yield {"type": "response.completed", "response": RESPONSE}


def message_events() -> Iterator[dict[str, Any]]:
    begun = {"input_tokens": 1_000, "output_tokens": 1}
    yield {"type": "message_start", "message": {**MESSAGE, "content": [], "stop_reason": None, "usage": begun}}
    for index, block in enumerate(BLOCKS):
        yield {"type": "content_block_start", "index": index, "content_block": block}
        yield {"type": "content_block_stop", "index": index}
    yield {"type": "message_delta", "delta": {"stop_reason": "end_turn", "stop_sequence": None}, "usage": BILLED}
    yield {"type": "message_stop"}


def served(answer: dict[str, Any], events: Iterator[dict[str, Any]], *, streamed: bool) -> Canned:
    if not streamed:
        return Canned(answer)
    told = [
        f"event: {event['type']}\ndata: {json.dumps({'sequence_number': number, **event})}\n\n"
        for number, event in enumerate(events)
    ]
    return Canned("".join(told).encode(), "text/event-stream")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("client", "version"),
    [("openai", "v0"), ("openai", "v1"), ("openai", "responses/v1"), ("anthropic", "v0"), ("anthropic", "v1")],
)
def test_searches_of_the_provider_are_booked(client: str, version: str, streamed: bool) -> None:
    """Opening a page, and a search that failed, are free."""
    routes = {
        "POST /v1/responses": served(RESPONSE, response_events(), streamed=streamed),
        "POST /v1/messages": served(MESSAGE, message_events(), streamed=streamed),
    }
    with CannedProvider(routes) as provider, Bursar("memory:", [Budget("all", "10 USD")]) as bursar:
        said: dict[str, Any] = {"api_key": "any", "max_retries": 0, "output_version": version}
        model: BaseChatModel
        if client == "openai":
            model = ChatOpenAI(model="gpt-4o", base_url=f"{provider.url}/v1", use_responses_api=True, **said)
            tool = {"type": "web_search"}
        else:
            anthropic = pytest.importorskip("langchain_anthropic")
            model = anthropic.ChatAnthropic(model="claude-sonnet-4-5", base_url=provider.url, max_tokens=500, **said)
            tool = {"type": "web_search_20250305", "name": "web_search"}
        asked = model.bind_tools([tool]).with_config(callbacks=[BursarCallbackHandler(bursar)])
        if streamed:
            list(asked.stream("hi"))
        else:
            asked.invoke("hi")
        (record,) = bursar.records()
    tokens_nanos = 3_000_000 if client == "openai" else 3_750_000
    assert record.usage["server_tools"] == {"web_search": 1}
    assert (record.cost_nanos, record.estimated) == (tokens_nanos + 10_000_000, False)
