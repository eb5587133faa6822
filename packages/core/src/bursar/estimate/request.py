"""The request as it is known before it is sent: measured once, classified by its own fields and its model alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from bursar.errors import InvalidInput
from bursar.estimate.additions import Additions, read_additions
from bursar.estimate.measure import CONVERSATION, Meter, json_bytes

_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_gen_len", "max_tokens_to_sample")
_NESTED_LIMITS = (
    ("generationConfig", ("maxOutputTokens", "max_output_tokens")),
    ("generation_config", ("max_output_tokens", "maxOutputTokens")),
    ("inferenceConfig", ("maxTokens", "max_new_tokens")),
    ("textGenerationConfig", ("maxTokenCount",)),
    ("options", ("num_predict",)),
)
_DIGIT, _SERIES = re.compile(r"\d"), re.compile(r"o\d")
_NO_OUTPUT = ("embed", "rerank", "moderation", "count")
_FAMILIES = (
    ("claude", ("claude",)),
    ("gpt", ("gpt", "o1", "o3", "o4", "davinci", "babbage", "text-embedding-3", "text-embedding-ada", "codex")),
    ("gemini", ("gemini", "gemma", "learnlm")),
    ("mistral", ("mistral", "mixtral", "magistral", "codestral", "ministral", "pixtral", "devstral", "voxtral")),
    ("grok", ("grok",)),
    ("llama", ("llama",)),
    ("qwen", ("qwen", "qwq")),
    ("deepseek", ("deepseek",)),
    ("nova", ("nova", "titan")),
    ("command", ("command", "c4ai", "embed-", "rerank")),
    ("glm", ("glm",)),
    ("kimi", ("kimi",)),
)


@lru_cache(maxsize=4096)
def family_of(provider: str, model: str) -> str:
    """The model family whose tokenizer and prompt format a model shares: `claude`, `gpt`, `gemini`, ..., else `other`."""
    name = model.lower().rsplit("/", 1)[-1]
    if "gpt-oss" in name:
        return "gpt-oss"
    for family, marks in _FAMILIES:
        if any(mark in name for mark in marks if len(mark) > 2) or name.startswith(tuple(mark for mark in marks if len(mark) == 2)):
            return family
    return {"openai": "gpt", "azure": "gpt", "anthropic": "claude", "mistral": "mistral", "xai": "grok"}.get(provider, "other")


# What `Request.features` holds, in order: the terms of the learned estimate. Bytes, but for the flags and counts.
FEATURES = ("constant", "has_tools", "has_format", "thinks", "letters", "dense", "wide", "unbroken", "data", "schema", "format", "reasoning",
            "stale", "messages", "calls", "tools", "hidden")
_VERSIONED = frozenset(("claude", "gpt", "gemini", "llama", "nova", "grok", "deepseek"))


@lru_cache(maxsize=4096)
def line_of(family: str, provider: str, model: str, embeds: bool) -> str:
    """The product line inside a family that shares a prompt format: `claude-4`, `gpt-5`, `gpt-o`, `gpt-embed`, `mistral`, ..."""
    if embeds:
        return f"{family}-embed"
    if family not in _VERSIONED:
        return family
    name = model.lower().rsplit("/", 1)[-1]
    if family == "gpt" and _SERIES.match(name):
        return "gpt-o"
    version = _DIGIT.search(name.split(family, 1)[-1])
    line = f"{family}-{version[0]}" if version else family
    # Vertex does not bill the thought signatures that the Gemini API bills.
    return f"{line}-vertex" if family == "gemini" and "vertex" in provider else line


class Request:
    """What is known of one call before dispatch.

    `body` is the whole wire request (OpenAI chat, responses, completions or embeddings, Anthropic, Gemini, Bedrock, Cohere, ...);
    `messages` a text, a list of dicts, or SDK message objects, for callers that have no body. Both may be given: the messages
    then count where the body has none. `input_tokens` is the caller's own count and is believed, in strict mode too.
    `max_output_tokens` is the enforced maximum of one answer (read from the body where not given), `n` the answers asked for,
    `retries` the client's own retries. Raises InvalidInput for a count that is none. The text itself is not kept.
    """

    __slots__ = ("additions", "embeds", "endpoint", "family", "features", "input_tokens", "line", "marks", "max_output_tokens", "media",
                 "measured", "messages", "model", "n", "prediction_bytes", "provider", "retries", "size", "stored", "token_ids")

    def __init__(
        self,
        provider: str,
        model: str,
        messages: str | Sequence[Any] | None = None,
        input_tokens: int | None = None,
        max_output_tokens: int | None = None,
        body: Mapping[str, Any] | Sequence[Any] | None = None,
        n: int = 1,
        retries: int = 0,
        endpoint: str | None = None,
    ) -> None:
        self.provider = provider
        self.model = model
        self.endpoint = endpoint or ""
        name = model.lower()
        self.family = family_of(provider, model)
        session = not isinstance(body, Mapping) and body is not None
        fields: Mapping[str, Any] = body if isinstance(body, Mapping) else {}
        meter = Meter()
        meter.body(fields)
        if session:
            meter.content(body, 0)
        if messages is not None and not any(fields.get(key) for key in CONVERSATION):
            meter.conversation([messages] if isinstance(messages, str) else messages)
        meter.close()
        self.additions: Additions = read_additions(provider.lower(), name, self.endpoint, fields)
        self.measured = messages is not None or bool(fields) or session
        self.stored = meter.stored or self.additions.stored
        if session:
            self.stored = "a live session, where each answer bills the whole conversation again"
            self.additions.rounds = None
        if self.family == "grok" and any(item.kind == "document" for item in meter.media):
            self.additions.server.append("its search in attached files")
            self.additions.rounds = None
        self.embeds = any(part in name or part in self.endpoint for part in _NO_OUTPUT)
        self.line = line_of(self.family, provider, model, self.embeds)
        self.input_tokens = _count("input_tokens", input_tokens)
        self.max_output_tokens = _count("max_output_tokens", max_output_tokens, _output_limit(fields))
        self.n = max(_count("n", n, 1), _answers(fields)) or 1
        self.retries = _count("retries", retries) or 0
        self.prediction_bytes = json_bytes(fields["prediction"]) if fields.get("prediction") else 0
        self.media = tuple(meter.media)
        self.marks = tuple(meter.marks)
        self.messages = meter.messages
        tools = self.additions.tools
        letters = meter.text_bytes - meter.wide_bytes - meter.dense_bytes
        self.features = (
            1, tools > 0, meter.format_bytes > 20, bool(fields.get("thinking") or fields.get("additionalModelRequestFields")), letters, meter.dense_bytes,
            meter.wide_bytes, meter.unbroken_bytes, meter.data_bytes, meter.schema_bytes, meter.format_bytes, meter.reasoning_bytes,
            meter.stale_bytes, meter.messages, meter.calls, tools, self.additions.hidden,
        )
        self.token_ids = meter.token_ids
        self.size = (meter.text_bytes + meter.data_bytes + meter.schema_bytes + meter.format_bytes + meter.reasoning_bytes
                     + meter.stale_bytes + meter.syntax_bytes + meter.token_ids)

    @property
    def kind(self) -> str:
        """The class that decides how it is bounded: declared, routed, session, server_tools, stored, unmeasured, media or text."""
        if self.input_tokens is not None:
            return "declared"
        if self.additions.routed:
            return "routed"
        if self.additions.server:
            return "server_tools"
        if self.stored:
            return "session" if self.additions.rounds is None else "stored"
        if not self.measured:
            return "unmeasured"
        return "media" if self.media else "text"

    @property
    def limit_covers_reasoning(self) -> bool:
        """Whether the request's maximum output limits the reasoning too: all providers but xAI, where 100 gave 161 tokens."""
        return self.family != "grok" or "non-reasoning" in self.model or self.provider not in ("xai", "grok", "x-ai")

    @property
    def unbounded_reason(self) -> str | None:
        """Why no upper bound exists, whatever the model's context window is; None where there is one."""
        kind = self.kind
        if kind == "routed":
            return self.additions.routed
        if kind == "session":
            return self.stored
        if kind == "server_tools" and self.additions.rounds is None:
            return f"the provider runs {', '.join(self.additions.server[:3])} on its side, with no limit on the rounds"
        return None


def _count(name: str, value: Any, default: int | None = None) -> int | None:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidInput(f"{name} must be a whole number of 0 or more, got {value!r}. Leave it out where it is not known.",
                           argument=name, value=value)
    return value


def _output_limit(body: Mapping[str, Any]) -> int | None:
    found = [body.get(name) for name in _OUTPUT_LIMITS]
    for section, names in _NESTED_LIMITS:
        part = body.get(section)
        if isinstance(part, Mapping):
            found += [part.get(name) for name in names]
    limits = [value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    return max(limits) if limits else None


def _answers(body: Mapping[str, Any]) -> int:
    config = body.get("generationConfig") or body.get("generation_config")
    found = [body.get("n"), body.get("best_of"), body.get("num_generations")]
    if isinstance(config, Mapping):
        found += [config.get("candidateCount"), config.get("candidate_count")]
    prompts = body.get("prompt")
    texts = len(prompts) if isinstance(prompts, (list, tuple)) and prompts and not isinstance(prompts[0], int) else 1
    return texts * max([1, *(value for value in found if isinstance(value, int) and value > 0)])
