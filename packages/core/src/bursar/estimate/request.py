"""The request as it is known before it is sent: measured once, classified by its own fields and its model alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import copy
from functools import lru_cache
from typing import Any

from bursar.errors import InvalidInput, shown
from bursar.estimate.additions import Additions, read_additions
from bursar.estimate.families import family_of, line_of
from bursar.estimate.measure import CONVERSATION, OBJECT, Meter
from bursar.estimate.plain import json_bytes
from bursar.usage import MAX_COUNT

_OUTPUT_LIMITS = ("max_completion_tokens", "max_output_tokens", "max_tokens", "max_gen_len", "max_tokens_to_sample")
_NESTED_LIMITS = (
    ("generationConfig", ("maxOutputTokens", "max_output_tokens")),
    ("generation_config", ("max_output_tokens", "maxOutputTokens")),
    ("inferenceConfig", ("maxTokens", "max_new_tokens")),
    ("textGenerationConfig", ("maxTokenCount",)),
    ("options", ("num_predict",)),
)
_ANSWERS = frozenset(("n", "best_of", "num_generations", "generationConfig", "generation_config", "prompt"))
_GENERATES = re.compile(r"images|audio/|speech|transcri|videos|dall-e|gpt-image|imagen|whisper|tts|sora-|veo-")
_EMPTY_FORMAT = 24  # {"type": "json_object"} describes nothing
_NO_OUTPUT_MODELS, _NO_OUTPUT_ENDPOINTS = ("embed", "rerank"), ("embed", "rerank", "moderation", "count")
# What `Request.features` holds, in order: the terms of the learned estimate. Bytes, but for the flags and counts.
FEATURES = (
    "constant",
    "has_tools",
    "has_format",
    "thinks",
    "letters",
    "dense",
    "wide",
    "unbroken",
    "data",
    "schema",
    "format",
    "reasoning",
    "stale",
    "messages",
    "calls",
    "tools",
    "hidden",
)


class Request:
    """What is known of one call before dispatch.

    `body` is the whole wire request (OpenAI chat, responses, completions or embeddings, Anthropic, Gemini, Bedrock,
    Cohere, ...); `messages` a text, a list of dicts, or SDK message objects, for callers that have no body. Both may
    be given: the messages then count where the body has none. `input_tokens` is the caller's own count and is
    believed, in strict mode too. `max_output_tokens` is the enforced maximum of one answer (read from the body where
    not given), `n` the answers asked for, `retries` the client's own retries. Raises InvalidInput for a count that is
    none. The text itself is not kept.
    """

    __slots__ = (
        "additions",
        "embeds",
        "endpoint",
        "family",
        "features",
        "input_tokens",
        "kind",
        "line",
        "marks",
        "max_output_tokens",
        "measured",
        "media",
        "messages",
        "model",
        "n",
        "prediction_bytes",
        "provider",
        "retries",
        "size",
        "stored",
        "token_ids",
        "usual",
    )

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
        self.family = family_of(provider, model)
        fields: Mapping[str, Any] = body if isinstance(body, OBJECT) else {}
        session = body is not None and fields is not body
        meter = Meter()
        meter.body(fields)
        if session:
            meter.content(body, 0)
        if messages is not None and not any(fields.get(key) for key in CONVERSATION):
            meter.conversation([messages] if isinstance(messages, str) else messages)
        meter.close()
        name = model.lower()
        self.embeds = _embeds(self.endpoint, name)
        self.line = line_of(self.family, provider, model, self.embeds)
        additions = read_additions(provider.lower(), name, self.endpoint, fields)
        self.stored = meter.stored or additions.stored
        if session:
            self.stored = "a live session, where each answer bills the whole conversation again"
            additions = additions._replace(rounds=None)
        if self.family == "grok" and any(item.kind == "document" for item in meter.media):
            server = (*additions.server, "its search in attached files")
            additions = additions._replace(server=server, rounds=None)
        self.additions = additions
        self.input_tokens = _count("input_tokens", input_tokens)
        limit = _output_limit(fields) if max_output_tokens is None else None
        self.max_output_tokens = _count("max_output_tokens", max_output_tokens, limit)
        self.n = max(1, _count("n", n) or 1, 1 if _ANSWERS.isdisjoint(fields) else _answers(fields))
        self.retries = _count("retries", retries) or 0
        self.prediction_bytes = json_bytes(fields["prediction"]) if fields.get("prediction") else 0
        self.media = tuple(meter.media)
        self.marks = tuple(meter.marks)
        self.messages = meter.messages
        self.token_ids = meter.token_ids
        self.size = meter.size
        self.measured = messages is not None or session or bool(meter.messages or meter.text_bytes or self.media)
        self.features = _features(meter, fields, additions)
        self.kind = self._kind()
        self.usual: tuple[object, float, float] | None = None  # the learner's: what its priors say of this request

    def for_model(self, model: str) -> Request:
        """The same request to another model of the same provider."""
        other = copy(self)
        other.model = model
        other.family = family_of(self.provider, model)
        other.line = line_of(other.family, self.provider, model, self.embeds)
        other.kind = other._kind()
        other.usual = None
        return other

    def _kind(self) -> str:
        """How it is bounded: declared, routed, server_tools, generated, session, stored, unmeasured, media, text."""
        if self.input_tokens is not None:
            return "declared"
        if self.additions.routed:
            return "routed"
        if self.additions.server:
            return "server_tools"
        if _generates(self.endpoint, self.model):
            return "generated"
        if self.stored:
            return "session" if self.additions.rounds is None else "stored"
        if not self.measured:
            return "unmeasured"
        return "media" if self.media else "text"

    @property
    def limit_covers_reasoning(self) -> bool:
        """Whether its maximum output limits the reasoning too: so with all but xAI, where 100 gave 161 tokens."""
        return self.family != "grok" or "non-reasoning" in self.model or self.provider not in ("xai", "grok", "x-ai")

    @property
    def unbounded_reason(self) -> str | None:
        """Why no upper bound exists, whatever the model's context window is; None where there is one."""
        kind = self.kind
        if kind == "routed":
            return self.additions.routed
        if kind == "generated":
            return "pictures, sound and films are not billed by the tokens of an answer that has a maximum"
        if kind == "session":
            return self.stored
        if kind == "server_tools" and self.additions.rounds is None:
            return f"the provider runs {', '.join(self.additions.server[:3])} on its side, with no limit on the rounds"
        return None


@lru_cache(maxsize=4096)
def _embeds(endpoint: str, name: str) -> bool:
    """Whether its answer has no text."""
    return any(part in name for part in _NO_OUTPUT_MODELS) or any(part in endpoint for part in _NO_OUTPUT_ENDPOINTS)


@lru_cache(maxsize=4096)
def _generates(endpoint: str, model: str) -> bool:
    """Whether it makes pictures, sound or films."""
    return bool(_GENERATES.search(endpoint) or _GENERATES.search(model))


def _features(meter: Meter, fields: Mapping[str, Any], additions: Additions) -> tuple[int, ...]:
    """The terms of the learned estimate, in the order of FEATURES."""
    return (
        1,
        additions.tools > 0,
        meter.format_bytes > _EMPTY_FORMAT,
        bool(fields.get("thinking") or fields.get("additionalModelRequestFields")),
        meter.text_bytes - meter.wide_bytes - meter.dense_bytes,
        meter.dense_bytes,
        meter.wide_bytes,
        meter.unbroken_bytes,
        meter.data_bytes,
        meter.schema_bytes,
        meter.format_bytes,
        meter.reasoning_bytes,
        meter.stale_bytes,
        meter.messages,
        meter.calls,
        additions.tools,
        additions.hidden,
    )


def _count(name: str, value: Any, default: int | None = None) -> int | None:
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_COUNT:
        raise InvalidInput(
            f"{name} must be a whole number of 0 or more, got {shown(value)}. Leave it out where it is not known.",
            argument=name,
            value=value,
        )
    return value


def _output_limit(body: Mapping[str, Any]) -> int | None:
    found = [body.get(name) for name in _OUTPUT_LIMITS]
    for section, names in _NESTED_LIMITS:
        part = body.get(section)
        if part is not None and isinstance(part, OBJECT):
            found += [part.get(name) for name in names]
    limits = [value for value in found if isinstance(value, int) and not isinstance(value, bool) and value > 0]
    return max(limits) if limits else None


def _answers(body: Mapping[str, Any]) -> int:
    config = body.get("generationConfig") or body.get("generation_config")
    found = [body.get("n"), body.get("best_of"), body.get("num_generations")]
    if config is not None and isinstance(config, OBJECT):
        found += [config.get("candidateCount"), config.get("candidate_count")]
    prompts = body.get("prompt")
    texts = len(prompts) if isinstance(prompts, (list, tuple)) and prompts and not isinstance(prompts[0], int) else 1
    return texts * max([1, *(value for value in found if isinstance(value, int) and value > 0)])
