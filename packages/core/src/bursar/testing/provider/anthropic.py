"""Anthropic's wire format: messages."""

from __future__ import annotations

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

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    529: "overloaded_error",
}


class Anthropic:
    """Source: the API reference of api.anthropic.com (messages, streaming), and recorded traffic."""

    def read(self, endpoint: str, path: str, query: str, body: Mapping[str, Any]) -> Call:
        model, messages = text_of(body, "model"), list_of(body, "messages")
        max_output = number_of(body, "max_tokens")
        if max_output is None:
            raise RefusedRequest(400, "max_tokens: Field required")
        return Call(
            endpoint=endpoint,
            model=model,
            body=body,
            stream=body.get("stream") is True,
            turns=turns_of(messages),
            max_output=max_output,
            prompt_chars=characters(messages, body.get("system"), body.get("tools")),
        )

    def body(self, made: Generation) -> Mapping[str, Any]:
        content: list[dict[str, Any]] = [{"type": "text", "text": made.text}] if made.text else []
        content += [
            {"type": "tool_use", "id": f"toolu_{made.id[-8:]}_{index}", "name": name, "input": dict(arguments)}
            for index, (name, arguments) in enumerate(made.tool_calls)
        ]
        body = {
            "id": made.id,
            "type": "message",
            "role": "assistant",
            "model": made.model,
            "content": content,
            "stop_reason": "max_tokens" if made.cut else "tool_use" if made.tool_calls else "end_turn",
            "stop_sequence": None,
        }
        return body | {"usage": _usage(made.counts, made.counts.output_tokens)} if made.report_usage else body

    def events(self, made: Generation) -> Iterator[Event]:
        return ((kind, {"type": kind, **fields}) for kind, fields in self._steps(made))

    def _steps(self, made: Generation) -> Iterator[tuple[str, dict[str, Any]]]:
        whole = dict(self.body(made))
        begun = whole | {"content": [], "stop_reason": None}
        if made.report_usage:
            begun["usage"] = _usage(made.counts, 1)  # the real one states a first token here, and the total at the end
        yield "message_start", {"message": begun}
        for index, block in enumerate(whole["content"]):
            is_text = block["type"] == "text"
            empty: dict[str, Any] = {"text": ""} if is_text else {"input": {}}
            yield "content_block_start", {"index": index, "content_block": block | empty}
            if is_text:
                for piece in made.text_pieces():
                    yield "content_block_delta", {"index": index, "delta": {"type": "text_delta", "text": piece}}
            else:
                delta = {"type": "input_json_delta", "partial_json": dumps(block["input"])}
                yield "content_block_delta", {"index": index, "delta": delta}
            yield "content_block_stop", {"index": index}
        ended: dict[str, Any] = {"delta": {"stop_reason": whole["stop_reason"], "stop_sequence": None}}
        if made.report_usage:
            totals = _usage(made.counts, made.counts.output_tokens)
            ended["usage"] = {name: count for name, count in totals.items() if name.endswith("_tokens")}
        yield "message_delta", ended
        yield "message_stop", {}

    def error(self, status: int, message: str) -> Mapping[str, Any]:
        return {"type": "error", "error": {"type": _ERROR_TYPES.get(status, "api_error"), "message": message}}

    def counts(self, answer: Any) -> Counts | None:
        usage: dict[str, Any] = {}
        for part in answer if isinstance(answer, list) else [answer]:
            if isinstance(part, Mapping):
                stated = part.get("usage") or (part.get("message") or {}).get("usage") or {}
                usage.update({name: value for name, value in stated.items() if value is not None})
        if not usage:
            return None
        reads, writes = usage.get("cache_read_input_tokens", 0), usage.get("cache_creation_input_tokens", 0)
        hour = usage.get("cache_creation", {}).get("ephemeral_1h_input_tokens", 0)
        return Counts(
            input_tokens=usage.get("input_tokens", 0) + reads + writes,
            output_tokens=usage.get("output_tokens", 0),
            cache_read_tokens=reads,
            cache_write_5m_tokens=writes - hour,
            cache_write_1h_tokens=hour,
        )


def _usage(counts: Counts, output: int) -> dict[str, Any]:
    writes = counts.cache_write_5m_tokens + counts.cache_write_1h_tokens
    return {
        "input_tokens": counts.input_tokens - counts.cache_read_tokens - writes,  # here the parts stand outside
        "cache_creation_input_tokens": writes,
        "cache_read_input_tokens": counts.cache_read_tokens,
        "cache_creation": {
            "ephemeral_5m_input_tokens": counts.cache_write_5m_tokens,
            "ephemeral_1h_input_tokens": counts.cache_write_1h_tokens,
        },
        "output_tokens": output,
        "service_tier": "standard",
    }
