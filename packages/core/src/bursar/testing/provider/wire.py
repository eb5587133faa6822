"""The request as the provider understands it, what it generates for it, and which wire format speaks for both."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from bursar.testing.provider.script import Answer, Counts

# (event name or None, data): data that is text goes out as it is, other data as JSON
Event = tuple[str | None, Any]


class RefusedRequest(Exception):
    """The request itself is not acceptable: answered with `status`, never billed."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One accepted request. `turns` counts the answers of the model that its conversation holds already."""

    endpoint: str  # one of ENDPOINTS' names, such as `openai.chat`
    model: str
    body: Mapping[str, Any]
    stream: bool = False
    sse: bool = True  # Gemini streams a JSON array unless asked for server-sent events
    max_output: int | None = None
    n: int = 1
    turns: int = 0
    prompt_chars: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was generated for a call, and what is billed for it."""

    id: str
    created: int  # seconds since the epoch
    call: Call
    model: str
    text: str
    tool_calls: tuple[tuple[str, Mapping[str, Any]], ...]
    cut: bool  # the request's maximum ended it
    counts: Counts
    pieces: int
    report_usage: bool

    def text_pieces(self) -> list[str]:
        """The text in at most `pieces` parts; their concatenation is the text."""
        size = max(1, -(-len(self.text) // self.pieces))
        return [self.text[start : start + size] for start in range(0, len(self.text), size)]


class Wire(Protocol):
    """One provider's format: all that the server needs to know of it."""

    def read(self, endpoint: str, path: str, query: str, body: Mapping[str, Any]) -> Call:
        """The call that a request makes; raises RefusedRequest."""

    def body(self, made: Generation) -> Mapping[str, Any]:
        """The answer of a call that is not streamed."""

    def events(self, made: Generation) -> Iterator[Event]:
        """The events of a streamed answer."""

    def error(self, status: int, message: str) -> Mapping[str, Any]:
        """The body of a refusal."""

    def counts(self, answer: Any) -> Counts | None:
        """The usage that a recorded body, or a list of a recorded stream's data, states; None when it states none."""


def generate(call: Call, answer: Answer, id: str, created: int, report_usage: bool) -> Generation:
    """What `answer` amounts to under the request's limits."""
    text, tool_calls = answer.text, tuple(answer.tool_calls)
    wanted = answer.output_tokens
    if wanted is None:
        wanted = quarter(len(text) + sum(len(name) + len(dumps(arguments)) for name, arguments in tool_calls)) or 16
    wanted = max(wanted, answer.reasoning_tokens)
    is_embedding = call.endpoint in ("openai.embeddings", "gemini.embed")
    if is_embedding:
        wanted = 0
    output = wanted if call.max_output is None else min(wanted, call.max_output)
    reasoning = min(answer.reasoning_tokens, output)
    if not text and not tool_calls:
        text = " ".join(["word"] * (output - reasoning))
    elif output < wanted:  # a cut answer loses its end, and a tool call that is not finished is none
        text, tool_calls = text[: len(text) * (output - reasoning) // max(1, wanted - answer.reasoning_tokens)], ()
    counts = Counts(
        input_tokens=max(quarter(call.prompt_chars), answer.cached_tokens)
        if answer.input_tokens is None
        else answer.input_tokens,
        output_tokens=output * call.n,
        cache_read_tokens=answer.cache_read_tokens,
        cache_write_5m_tokens=answer.cache_write_5m_tokens,
        cache_write_1h_tokens=answer.cache_write_1h_tokens,
        reasoning_tokens=reasoning * call.n,
    )
    return Generation(
        id=id,
        created=created,
        call=call,
        model=answer.model or call.model,
        text=text,
        tool_calls=tool_calls,
        cut=output < wanted,
        counts=counts,
        pieces=answer.chunks,
        report_usage=report_usage,
    )


def quarter(characters: int) -> int:
    """Tokens of so many characters, by the rule of thumb of four characters a token, rounded up."""
    return -(-characters // 4)


def dumps(data: Any) -> str:
    """Compact JSON."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def characters(*parts: Any) -> int:
    """Characters of the strings in JSON data, keys not counted."""
    total, rest = 0, list(parts)
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, Mapping):
            rest.extend(part.values())
        elif isinstance(part, list):
            rest.extend(part)
    return total


def text_of(body: Mapping[str, Any], name: str) -> str:
    """A field of the request that must be a text, such as the model."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        raise RefusedRequest(400, f"you must provide a {name} parameter")
    return value


def list_of(body: Mapping[str, Any], name: str) -> list[Any]:
    """A field of the request that must be a list with something in it, such as the messages."""
    value = body.get(name)
    if not isinstance(value, list) or not value:
        raise RefusedRequest(400, f"Missing required parameter: '{name}'.")
    return value


def number_of(body: Mapping[str, Any], *names: str) -> int | None:
    """The first of the named fields that is there, a whole number from 1; None when none is."""
    for name in names:
        value = body.get(name)
        if value is not None:
            if type(value) is not int or value < 1:
                raise RefusedRequest(400, f"Invalid '{name}': expected a whole number from 1, got {value!r}.")
            return value
    return None


def turns_of(messages: Any, role: str = "assistant") -> int:
    """How many of the messages are answers of the model."""
    return sum(1 for message in messages if isinstance(message, Mapping) and message.get("role") == role)


ENDPOINTS = (
    ("openai.chat", re.compile(r".*/chat/completions")),
    ("openai.responses", re.compile(r".*/responses")),
    ("openai.embeddings", re.compile(r".*/embeddings")),
    ("anthropic.messages", re.compile(r".*/v1/messages")),
    ("gemini.generate", re.compile(r".*/models/[^/]+:(?:generateContent|streamGenerateContent)")),
    ("gemini.embed", re.compile(r".*/models/[^/]+:(?:embedContent|batchEmbedContents)")),
)


def endpoint_of(path: str) -> str | None:
    """The endpoint that a path names, whatever stands before it; None for a path that nobody serves."""
    return next((name for name, pattern in ENDPOINTS if pattern.fullmatch(path)), None)
