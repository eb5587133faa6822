"""OpenAI's wire format: chat completions, responses and embeddings."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterator, Mapping
from typing import Any

from bursar.testing.provider.script import Counts
from bursar.testing.provider.wire import (
    Call,
    Event,
    Generation,
    RefusedRequest,
    characters,
    dumps,
    list_of,
    number_of,
    text_of,
    turns_of,
)

_ERROR_TYPES = {401: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}


class OpenAI:
    """Source: the API reference of api.openai.com (chat, responses, embeddings), and recorded traffic."""

    def read(self, endpoint: str, path: str, query: str, body: Mapping[str, Any]) -> Call:
        model, stream = text_of(body, "model"), body.get("stream") is True
        if endpoint == "openai.chat":
            messages = list_of(body, "messages")
            return Call(
                endpoint=endpoint,
                model=model,
                body=body,
                stream=stream,
                n=number_of(body, "n") or 1,
                turns=turns_of(messages),
                max_output=number_of(body, "max_completion_tokens", "max_tokens"),
                prompt_chars=characters(messages, body.get("tools")),
            )
        given = body.get("input")
        if not given:
            raise RefusedRequest(400, "Missing required parameter: 'input'.")
        if endpoint == "openai.embeddings":
            return Call(endpoint=endpoint, model=model, body=body, prompt_chars=characters(given))
        return Call(
            endpoint=endpoint,
            model=model,
            body=body,
            stream=stream,
            turns=_response_turns(given),
            max_output=number_of(body, "max_output_tokens"),
            prompt_chars=characters(given, body.get("instructions"), body.get("tools")),
        )

    def body(self, made: Generation) -> Mapping[str, Any]:
        if made.call.endpoint == "openai.embeddings":
            return _embeddings(made)
        if made.call.endpoint == "openai.responses":
            return _response(made, "incomplete" if made.cut else "completed", _response_items(made))
        message: dict[str, Any] = {
            "role": "assistant",
            "content": made.text or None,
            "refusal": None,
            "annotations": [],
        }
        if made.tool_calls:
            message["tool_calls"] = _chat_tool_calls(made)
        choices = [
            {"index": index, "message": message, "logprobs": None, "finish_reason": _finish(made)}
            for index in range(made.call.n)
        ]
        body = {
            "id": made.id,
            "object": "chat.completion",
            "created": made.created,
            "model": made.model,
            "choices": choices,
        }
        return body | {"usage": _chat_usage(made.counts)} if made.report_usage else body

    def events(self, made: Generation) -> Iterator[Event]:
        return _response_events(made) if made.call.endpoint == "openai.responses" else _chat_events(made)

    def error(self, status: int, message: str) -> Mapping[str, Any]:
        kind = _ERROR_TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    def counts(self, answer: Any) -> Counts | None:
        usage = None
        for part in answer if isinstance(answer, list) else [answer]:
            if isinstance(part, Mapping):
                usage = part.get("usage") or (part.get("response") or {}).get("usage") or usage
        if not usage:
            return None
        inputs = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
        outputs = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        return Counts(
            input_tokens=usage.get("prompt_tokens", usage.get("input_tokens", 0)),
            output_tokens=usage.get("completion_tokens", usage.get("output_tokens", 0)),
            cache_read_tokens=inputs.get("cached_tokens") or 0,
            reasoning_tokens=outputs.get("reasoning_tokens") or 0,
        )


def _finish(made: Generation) -> str:
    return "length" if made.cut else "tool_calls" if made.tool_calls else "stop"


def _chat_usage(counts: Counts) -> dict[str, Any]:
    return {
        "prompt_tokens": counts.input_tokens,
        "completion_tokens": counts.output_tokens,
        "total_tokens": counts.input_tokens + counts.output_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cache_read_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": counts.reasoning_tokens, "audio_tokens": 0},
    }


def _chat_tool_calls(made: Generation) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{made.id[-8:]}_{index}",
            "type": "function",
            "function": {"name": name, "arguments": dumps(arguments)},
        }
        for index, (name, arguments) in enumerate(made.tool_calls)
    ]


def usage_event(like: Mapping[str, Any], counts: Counts) -> dict[str, Any]:
    """The last chunk of a chat stream whose request asked for usage; `like` is any other chunk of it."""
    keep = {name: like[name] for name in ("id", "object", "created", "model") if name in like}
    return keep | {"choices": [], "usage": _chat_usage(counts)}


def wants_usage(call: Call) -> bool:
    """Whether a chat stream states its usage: only where the request asks for it."""
    return (call.body.get("stream_options") or {}).get("include_usage") is True


def _chat_events(made: Generation) -> Iterator[Event]:
    states_usage = made.report_usage and wants_usage(made.call)
    head: dict[str, Any] = {
        "id": made.id,
        "object": "chat.completion.chunk",
        "created": made.created,
        "model": made.model,
    }

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        return None, head | {"choices": [choice]} | ({"usage": None} if states_usage else {})

    choices = range(made.call.n)
    for index in choices:
        yield chunk(index, {"role": "assistant", "content": "", "refusal": None})
    for piece in made.text_pieces():
        for index in choices:
            yield chunk(index, {"content": piece})
    for position, call in enumerate(_chat_tool_calls(made)):
        function = call["function"]
        for index in choices:
            yield chunk(index, {"tool_calls": [{"index": position, **call, "function": {**function, "arguments": ""}}]})
            yield chunk(index, {"tool_calls": [{"index": position, "function": {"arguments": function["arguments"]}}]})
    for index in choices:
        yield chunk(index, {}, _finish(made))
    if states_usage:
        yield None, usage_event(head, made.counts)
    yield None, "[DONE]"


def _response_turns(given: Any) -> int:
    # The items of one answer (reasoning, calls, message) stand together, up to the next item of the caller.
    turns, inside = 0, False
    for item in given if isinstance(given, list) else []:
        is_answer = isinstance(item, Mapping) and (
            item.get("role") == "assistant" or item.get("type") in ("reasoning", "function_call", "custom_tool_call")
        )
        turns += is_answer and not inside
        inside = is_answer
    return turns


def _response_items(made: Generation) -> list[dict[str, Any]]:
    status = "incomplete" if made.cut else "completed"
    items: list[dict[str, Any]] = []
    if made.text:
        content = [{"type": "output_text", "text": made.text, "annotations": [], "logprobs": []}]
        items.append(
            {"type": "message", "id": f"msg_{made.id[-8:]}", "status": status, "role": "assistant", "content": content}
        )
    for index, (name, arguments) in enumerate(made.tool_calls):
        ids = {"id": f"fc_{made.id[-8:]}_{index}", "call_id": f"call_{made.id[-8:]}_{index}"}
        items.append(
            {"type": "function_call", **ids, "name": name, "arguments": dumps(arguments), "status": "completed"}
        )
    return items


def _response(made: Generation, status: str, items: list[dict[str, Any]]) -> dict[str, Any]:
    counts = made.counts
    usage = {
        "input_tokens": counts.input_tokens,
        "input_tokens_details": {"cached_tokens": counts.cache_read_tokens},
        "output_tokens": counts.output_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens},
        "total_tokens": counts.input_tokens + counts.output_tokens,
    }
    return {
        "id": made.id,
        "object": "response",
        "created_at": made.created,
        "model": made.model,
        "status": status,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": made.call.body.get("instructions"),
        "metadata": {},
        "output": items,
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": made.call.body.get("tools") or [],
        "top_p": 1.0,
        "max_output_tokens": made.call.max_output,
        "usage": usage if made.report_usage and status != "in_progress" else None,
    }


def _response_events(made: Generation) -> Iterator[Event]:
    for sequence, (kind, fields) in enumerate(_response_steps(made)):
        yield kind, {"type": kind, "sequence_number": sequence, **fields}


def _response_steps(made: Generation) -> Iterator[tuple[str, dict[str, Any]]]:
    begun = _response(made, "in_progress", [])
    items = _response_items(made)
    yield "response.created", {"response": begun}
    yield "response.in_progress", {"response": begun}
    for index, item in enumerate(items):
        empty: dict[str, Any] = {"content": []} if item["type"] == "message" else {"arguments": ""}
        yield "response.output_item.added", {"output_index": index, "item": item | empty | {"status": "in_progress"}}
        where: dict[str, Any] = {"item_id": item["id"], "output_index": index}
        if item["type"] == "message":
            where["content_index"] = 0
            part = item["content"][0]
            yield "response.content_part.added", {**where, "part": part | {"text": ""}}
            for piece in made.text_pieces():
                yield "response.output_text.delta", {**where, "delta": piece, "logprobs": []}
            yield "response.output_text.done", {**where, "text": made.text, "logprobs": []}
            yield "response.content_part.done", {**where, "part": part}
        else:
            yield "response.function_call_arguments.delta", {**where, "delta": item["arguments"]}
            yield (
                "response.function_call_arguments.done",
                {**where, "name": item["name"], "arguments": item["arguments"]},
            )
        yield "response.output_item.done", {"output_index": index, "item": item}
    status = "incomplete" if made.cut else "completed"
    yield f"response.{status}", {"response": _response(made, status, items)}


def _embeddings(made: Generation) -> dict[str, Any]:
    given = made.call.body["input"]
    is_batch = isinstance(given, list) and not isinstance(given[0], int)
    size = number_of(made.call.body, "dimensions") or 8
    vector: Any = [(index + 1) / (size + 1) for index in range(size)]
    if made.call.body.get("encoding_format") == "base64":
        vector = base64.b64encode(struct.pack(f"<{size}f", *vector)).decode()
    data = [
        {"object": "embedding", "index": index, "embedding": vector} for index in range(len(given) if is_batch else 1)
    ]
    body: dict[str, Any] = {"object": "list", "data": data, "model": made.model}
    usage = {"prompt_tokens": made.counts.input_tokens, "total_tokens": made.counts.input_tokens}
    return body | {"usage": usage} if made.report_usage else body
