"""One answer's usage, or the reason why there is none: not billable, not reported, or unreadable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.answers.bedrock import header_counts
from bursar.answers.chat import usual_usage
from bursar.answers.counts import count, part, unreadable, usage_of, word
from bursar.answers.plain import events_of, plain
from bursar.answers.stream import StreamReader
from bursar.errors import UnreadableAnswer
from bursar.usage import Usage

_REMEDY = {
    "no_usage": "Turn on the reporting of usage for streams, or settle with a Usage of your own.",
    "not_billable": "Release the call's reservation.",
}
# A whole answer with nothing but these names is a count, a lookup or a setup that no provider bills.
_FREE: tuple[frozenset[str], ...] = (
    frozenset({"input_tokens", "object", "context_management"}),  # Anthropic and OpenAI token counts
    frozenset({"inputTokens"}),  # Bedrock CountTokens
    frozenset(
        {"totalTokens", "totalBillableCharacters", "promptTokensDetails", "cachedContentTokenCount"}
    ),  # Google countTokens
    frozenset(
        {
            "total_tokens",
            "total_billable_characters",
            "prompt_tokens_details",
            "cached_content_token_count",
            "sdk_http_response",
        }
    ),
    frozenset({"tokens", "token_strings", "meta"}),  # Cohere tokenize
    frozenset({"retrievalResults", "nextToken", "guardrailAction"}),  # Bedrock knowledge base retrieve
    frozenset({"value", "expires_at", "session"}),  # OpenAI realtime client secrets
)
_AFTER_GENERATION = frozenset(
    {"api_error", "server_error", "internal_server_error", "timeout", "timeout_error", "internal"}
)
_UNSURE_STATUS = frozenset({408, 409, 499})  # the provider may have worked on, or done it before


def read_usage(provider: str, body: Any, *, headers: Mapping[str, Any] | None = None, status: int = 200) -> Usage:
    """The usage that a provider's answer reports.

    `body`: the JSON as a dict, text or bytes; an SDK's answer object; a stream as a list of its events (dicts, SDK
    events, or `{"event", "data"}`) or as its text; a recording `{"format", "events"}`; a line of a batch result.
    `headers` and `status` are what HTTP said beside it: some Bedrock models count in headers alone.

    Raises UnreadableAnswer, whose `reason` is `no_usage` (billed, or perhaps billed, and not reported; `partial` holds
    what a cut stream told), `not_billable` (refused before generation, or free), or `unreadable`. Nothing is ever
    guessed as zero.
    """
    try:
        return _read(provider, body, headers or {}, status)
    except UnreadableAnswer as error:
        error.fields.setdefault("provider", provider)
        raise


def _read(provider: str, body: Any, headers: Mapping[str, Any], status: int) -> Usage:
    is_answer = isinstance(body, (dict, list)) or hasattr(
        type(body), "model_dump"
    )  # pydantic looks long for what is not there
    code = None if is_answer else getattr(body, "status_code", None)
    if isinstance(code, int) and hasattr(body, "content") and hasattr(body, "headers"):
        body, headers, status = body.content, body.headers, code  # an HTTP response
    data = plain(body)
    if isinstance(data, str):
        if data.startswith("v=0"):
            raise _none(provider, "not_billable", "it is a session description")
        data = _text(provider, data, headers, status)
    if isinstance(data, dict):
        usual = usual_usage(data)
        if usual is not None:
            return usual
        meta = part(data, "ResponseMetadata")  # boto3 keeps the HTTP side in the answer
        headers = headers or part(meta, "HTTPHeaders")
        status = count(meta.get("HTTPStatusCode")) or status
    data, batch = _unbatched(provider, data)
    reader = StreamReader(provider)
    streamed = isinstance(data, list) or (isinstance(data, dict) and isinstance(data.get("events"), list))
    if isinstance(data, dict) and streamed:
        data = data["events"]
    for event in data if isinstance(data, list) else [data]:
        reader.feed(event)
    usage = reader.usage() if streamed else reader.partial()
    if usage is None:
        words = header_counts(headers)
        usage = usage_of(words) if words else None
    if usage is None:
        raise _missing(provider, data, reader, status)
    return usage.replace(batch=True) if batch else usage


def _text(provider: str, text: str, headers: Mapping[str, Any], status: int) -> Any:
    """Text that is no JSON may still belong to a refusal, or to an answer that is counted in its headers."""
    try:
        return events_of(text)
    except UnreadableAnswer:
        if status >= 400 or header_counts(headers):
            return {}
        if not text.strip():
            raise _none(provider, "no_usage", "it is empty") from None
        raise


def _unbatched(provider: str, data: Any) -> tuple[Any, bool]:
    """The answer inside a line of a batch's results: OpenAI's, Anthropic's, Google's."""
    if not isinstance(data, dict):
        if not isinstance(data, list):
            raise unreadable("it is neither an object nor a list of events")
        return data, False
    if "custom_id" in data:
        inner = part(data, "response").get("body") if "response" in data else part(data, "result").get("message")
        if isinstance(inner, dict):
            return inner, True
        raise _none(provider, "not_billable", "the batch did not run this request")
    if isinstance(data.get("response"), dict) and "usageMetadata" in data["response"]:
        return data["response"], True
    return data, False


def _missing(provider: str, data: Any, reader: StreamReader, status: int) -> UnreadableAnswer:
    """Why there is no usage. Only a clear refusal before generation is free."""
    partial = reader.partial()
    if partial is not None or isinstance(data, list):
        return _none(provider, "no_usage", "the stream ended without its final counts", partial=partial)
    refused = data.get("error") or status >= 400
    if refused and _generated(data, status):
        return _none(provider, "no_usage", "the call failed after it may have been billed")
    if refused:
        return _none(provider, "not_billable", "the provider refused the call")
    if data and any(set(data) <= names for names in _FREE):
        return _none(provider, "not_billable", "it is a count, a lookup or a setup")
    if (
        data.get("object") in ("realtime.session", "list", "model", "file", "batch", "vector_store")
        and "data" not in data
    ):
        return _none(provider, "not_billable", "it is a setup")
    return _none(provider, "no_usage", "nothing was reported")


def _generated(data: dict[str, Any], status: int) -> bool:
    error = data.get("error")
    facts = error if isinstance(error, dict) else data
    if "failed_generation" in facts:
        return True  # Groq: the model wrote a tool call, which then failed its schema
    code = facts.get("code")
    known = status if status >= 400 else code if isinstance(code, int) else 400
    kinds = {(word(facts.get(name)) or "").lower() for name in ("type", "code", "status")}
    return known >= 500 or known in _UNSURE_STATUS or bool(kinds & _AFTER_GENERATION)


def _none(provider: str, reason: str, why: str, **fields: Any) -> UnreadableAnswer:
    return UnreadableAnswer(
        f"The answer of {provider} holds no usage: {why}. {_REMEDY[reason]}", provider=provider, reason=reason, **fields
    )
