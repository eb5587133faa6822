"""What a model call turned out to be: the usage of its answers, and how its reservation ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from crewai.hooks import HookAborted
from crewai.llms.base_llm import LLMCallBlockedError
from crewai.types.usage_metrics import UsageMetrics

from bursar.errors import BursarError
from bursar.usage import Usage

_SUMMED = (
    "input_tokens",
    "output_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "reasoning_tokens",
    "input_audio_tokens",
    "output_audio_tokens",
    "requests",
)


class Ending(NamedTuple):
    """How a reservation ends: a method of Reservation (its async twin has an `a` in front), with its arguments."""

    verb: str
    args: tuple[Any, ...]
    options: dict[str, Any]


class Answers:
    """The answers of one call so far. Usually one; CrewAI may ask again inside a call, for instance after a refused schema."""

    __slots__ = ("complete", "count", "server_tools", "usage")

    def __init__(self) -> None:
        self.count = 0
        self.complete = True
        self.server_tools: Counter[str] = Counter()
        self.usage: Usage | None = None

    def add(self, stated: Any) -> None:
        """An answer has come; `stated` is what CrewAI read of its usage."""
        self.count += 1
        found = read_usage(stated)
        if found is None:
            self.complete = False
        else:
            self.usage = found if self.usage is None else _sum(self.usage, found)

    def add_tools(self, response: Any) -> None:
        """An answer of OpenAI's Responses, with what the provider's own tools did: CrewAI reads no more than its tokens."""
        try:
            self.server_tools.update(Usage.from_response("openai", response).server_tools)
        except BursarError:
            return  # what CrewAI reads of it says how the call ends

    def ending(self, error: BaseException | None, service_tier: str | None, *, streamed: bool) -> Ending:
        """How the call ends, with the error that came out of it, if any; `streamed`: after a part of the answer."""
        if self.usage is not None and self.usage.input_tokens and self.complete:
            tools = {**self.usage.server_tools, **self.server_tools}
            usage = self.usage.replace(service_tier=self.usage.service_tier or service_tier, server_tools=tools)
            failed = {} if error is None else {"outcome": "failed", "reason": type(error).__name__}
            return Ending("settle", (usage,), failed)
        if error is None or self.count:
            return Ending("settle_unknown", ("the answer states no usage",), {"known": self.usage})
        if isinstance(error, (HookAborted, LLMCallBlockedError)) and not streamed:
            return Ending("release", (f"denied before it was sent: {type(error).__name__}",), {})
        if streamed:  # a provider's error in mid-stream may have the code of a refusal
            return Ending("settle_unknown", (type(error).__name__,), {})
        return Ending("settle_error", (error,), {})


def read_usage(stated: Any) -> Usage | None:
    """The usage from any form that CrewAI's clients hand on; None where nothing is stated (all zeros say nothing)."""
    data = _plain(stated)
    if not data:
        return None
    if "inputTokens" in data:  # Bedrock's own words
        return _read("bedrock", data)
    if "prompt_tokens_details" in data or "completion_tokens_details" in data:  # LiteLLM's, which are OpenAI's
        return _read("openai", data)
    counts = UsageMetrics.from_provider_dict(data)
    if counts is None or not (counts.prompt_tokens or counts.completion_tokens):
        return None
    return Usage(
        input_tokens=counts.prompt_tokens,
        output_tokens=max(counts.completion_tokens, counts.reasoning_tokens),
        cache_read_tokens=min(counts.cached_prompt_tokens, counts.prompt_tokens),
        cache_write_5m_tokens=counts.cache_creation_tokens,
        reasoning_tokens=counts.reasoning_tokens,
    )


def _read(provider: str, usage: Mapping[str, Any]) -> Usage | None:
    try:
        found = Usage.from_response(provider, {"usage": dict(usage)})
    except BursarError:
        return None  # booked at the reserved amount, as estimated
    # LiteLLM puts its own calculation where some providers state their bill.
    return found.replace(stated_cost_nanos=None) if found.input_tokens or found.output_tokens else None


def _plain(stated: Any) -> dict[str, Any]:
    if isinstance(stated, Mapping):
        return dict(stated)
    dump = getattr(stated, "model_dump", None)
    return dump() if callable(dump) else {}


def _sum(one: Usage, other: Usage) -> Usage:
    return one.replace(**{name: getattr(one, name) + getattr(other, name) for name in _SUMMED})
