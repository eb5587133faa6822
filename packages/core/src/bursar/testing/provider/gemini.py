"""Gemini's wire format: generateContent, streamGenerateContent and embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import parse_qs

from bursar.testing.provider.script import Counts
from bursar.testing.provider.wire import Call, Event, Generation, characters, list_of, number_of, turns_of

_STATUSES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    429: "RESOURCE_EXHAUSTED",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}


class Gemini:
    """Source: the API reference of generativelanguage.googleapis.com (v1beta), and recorded traffic."""

    def read(self, endpoint: str, path: str, query: str, body: Mapping[str, Any]) -> Call:
        model, _, action = path.rpartition("/models/")[2].partition(":")
        if endpoint == "gemini.embed":
            given = list_of(body, "requests") if action == "batchEmbedContents" else [body.get("content")]
            return Call(
                endpoint=endpoint, model=model, body=body, prompt_chars=characters(*(_content(part) for part in given))
            )
        contents = list_of(body, "contents")
        settings = body.get("generationConfig") or {}
        return Call(
            endpoint=endpoint,
            model=model,
            body=body,
            stream=action == "streamGenerateContent",
            sse=parse_qs(query).get("alt") == ["sse"],
            max_output=number_of(settings, "maxOutputTokens"),
            n=number_of(settings, "candidateCount") or 1,
            turns=turns_of(contents, "model"),
            prompt_chars=characters(contents, body.get("systemInstruction"), body.get("tools")),
        )

    def body(self, made: Generation) -> Mapping[str, Any]:
        if made.call.endpoint == "gemini.embed":
            vector = {"values": [0.125, 0.25, 0.5, 1.0]}
            requests = made.call.body.get("requests")
            return {"embedding": vector} if requests is None else {"embeddings": [vector] * len(requests)}
        return _answer(made, [{"text": made.text}] if made.text else [], is_last=True)

    def events(self, made: Generation) -> Iterator[Event]:
        *first, last = made.text_pieces() or [""]
        for piece in first:
            yield None, _answer(made, [{"text": piece}], is_last=False)
        yield None, _answer(made, [{"text": last}] if last else [], is_last=True)

    def error(self, status: int, message: str) -> Mapping[str, Any]:
        return {"error": {"code": status, "message": message, "status": _STATUSES.get(status, "INTERNAL")}}

    def counts(self, answer: Any) -> Counts | None:
        usage: Mapping[str, Any] = {}
        for part in answer if isinstance(answer, list) else [answer]:
            if isinstance(part, Mapping):
                usage = part.get("usageMetadata") or usage
        if not usage:
            return None
        thoughts = usage.get("thoughtsTokenCount", 0)
        return Counts(
            input_tokens=usage.get("promptTokenCount", 0) + usage.get("toolUsePromptTokenCount", 0),
            output_tokens=usage.get("candidatesTokenCount", 0) + thoughts,
            cache_read_tokens=usage.get("cachedContentTokenCount", 0),
            reasoning_tokens=thoughts,
        )


def _content(part: Any) -> Any:
    return part.get("content", part) if isinstance(part, Mapping) else part


def _answer(made: Generation, parts: list[dict[str, Any]], is_last: bool) -> dict[str, Any]:
    if is_last:
        parts = parts + [
            {"functionCall": {"name": name, "args": dict(arguments)}} for name, arguments in made.tool_calls
        ]
    candidates = []
    for index in range(made.call.n):
        candidate: dict[str, Any] = {"content": {"parts": parts, "role": "model"}, "index": index}
        if is_last:
            candidate["finishReason"] = "MAX_TOKENS" if made.cut else "STOP"
        candidates.append(candidate)
    body: dict[str, Any] = {"candidates": candidates, "modelVersion": made.model, "responseId": made.id}
    return body | {"usageMetadata": _usage(made.counts, is_last)} if made.report_usage else body


def _usage(counts: Counts, is_last: bool) -> dict[str, Any]:
    # every event of a stream states usage; the output is whole in the last one only
    shown = counts.output_tokens - counts.reasoning_tokens if is_last else 0
    usage = {"promptTokenCount": counts.input_tokens, "candidatesTokenCount": shown}
    if counts.reasoning_tokens:
        usage["thoughtsTokenCount"] = counts.reasoning_tokens
    if counts.cache_read_tokens:
        usage["cachedContentTokenCount"] = counts.cache_read_tokens
    return usage | {"totalTokenCount": counts.input_tokens + shown + counts.reasoning_tokens}
