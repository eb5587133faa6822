"""Amazon Bedrock's own shapes: converse, the models' native bodies, agents' traces, and counts in HTTP headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.answers.counts import (
    OBJECT,
    Json,
    Keywords,
    count,
    items,
    part,
    reported,
    tidy,
    tier,
    tools,
    total,
    usage_of,
    word,
)
from bursar.answers.tally import Tally

_HEADER = "x-amzn-bedrock-"
METRICS = "amazon-bedrock-invocationMetrics"
_TITAN = ("inputTextTokenCount", "totalOutputTextTokenCount")
_LLAMA = ("prompt_token_count", "generation_token_count")
_COUNTS = frozenset({"inputTokens", "outputTokens", "inputTokenCount", "outputTokenCount"})
_MARKS = frozenset({METRICS, *_TITAN, *_LLAMA, "messageStart", "contentBlockDelta", "contentBlockStop", "messageStop"})


class Bedrock(Tally):
    """The last counts win: invocation metrics at a stream's end stand above what the model said on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: Json = {}

    @staticmethod
    def claims(data: Json) -> bool:
        if not _MARKS.isdisjoint(data):
            return True
        metadata = data.get("metadata")
        usage = metadata.get("usage") if metadata is not None and isinstance(metadata, OBJECT) else None
        usage = usage or data.get("usage")
        return usage is not None and isinstance(usage, OBJECT) and not _COUNTS.isdisjoint(usage)

    def feed(self, data: Json) -> None:
        inner = part(data, "metadata") if isinstance(data.get("metadata"), Mapping) else {}
        self.facts.update(tier(part(data, "serviceTier").get("type") or part(inner, "serviceTier").get("type")))
        router = part(part(part(data, "trace"), "promptRouter") or part(part(inner, "trace"), "promptRouter"))
        self.note(model=word(router.get("invokedModelId")))
        usage = part(data, METRICS) or part(inner, "usage") or part(data, "usage") or _native(data)
        if reported(usage):
            self.usage = usage
            self.final = (
                self.final
                or METRICS in data
                or not any(name in data for name in _LLAMA)
                or bool(data.get("stop_reason"))
            )
            for name, value in part(usage, "serverToolUsage").items():
                self.used[(word(name) or "other").removesuffix("Requests")] = count(value)

    def counts(self) -> Keywords | None:
        return tools(self.facts | converse_counts(self.usage), self.used) if reported(self.usage) else None


def converse_counts(usage: Json) -> Keywords:
    """Converse's `inputTokens` leaves cache reads and writes out, unlike `totalTokens`; Bursar's total holds them."""
    read = total(usage, "cacheReadInputTokens", "cacheReadInputTokenCount")
    hour = sum(
        count(entry.get("inputTokens")) for entry in items(usage, "cacheDetails")[:10] if entry.get("ttl") == "1h"
    )
    written = max(total(usage, "cacheWriteInputTokens", "cacheWriteInputTokenCount"), hour)
    return tidy(
        {
            "input_tokens": total(usage, "inputTokens", "inputTokenCount") + read + written,
            "output_tokens": total(usage, "outputTokens", "outputTokenCount"),
            "cache_read_tokens": read,
            "cache_write_5m_tokens": written - hour,
            "cache_write_1h_tokens": hour,
        }
    )


def header_counts(headers: Mapping[str, Any]) -> Keywords | None:
    """The counts that `InvokeModel` sends as headers: the bodies of Cohere, Mistral, old Claude hold none."""
    found = {
        str(name).lower().removeprefix(_HEADER): value
        for name, value in headers.items()
        if str(name).lower().startswith(_HEADER)
    }
    if "input-token-count" not in found and "output-token-count" not in found:
        return None
    usage = {
        "inputTokens": found.get("input-token-count"),
        "outputTokens": found.get("output-token-count"),
        "cacheReadInputTokens": found.get("cache-read-input-token-count"),
        "cacheWriteInputTokens": found.get("cache-write-input-token-count"),
    }
    return (converse_counts(usage) | tier(found.get("service-tier"))) if reported(usage) else None


def _native(data: Json) -> Json:
    """Titan and Llama name their counts in their own way."""
    if any(name in data for name in _TITAN):
        said = data.get("totalOutputTextTokenCount")
        if said is None:
            said = sum(count(entry.get("tokenCount")) for entry in items(data, "results"))
        return {"inputTokens": data.get("inputTextTokenCount"), "outputTokens": said}
    if any(name in data for name in _LLAMA):
        return {"inputTokens": data.get("prompt_token_count"), "outputTokens": data.get("generation_token_count")}
    return {}


class Agent(Tally):
    """A Bedrock agent's trace: every model that it invoked, routed and collaborating agents included.

    Without a trace (`enableTrace`) an agent reports nothing, though it is billed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.model: str | None = None
        self.own: Keywords = {}
        self.others: dict[str, Keywords] = {}

    @staticmethod
    def claims(data: Json) -> bool:
        return "agentAliasId" in data or "callerChain" in data or ("trace" in data and "sessionId" in data)

    def feed(self, data: Json) -> None:
        for step in part(data, "trace").values():
            if not isinstance(step, Mapping):
                continue
            self.model = word(part(step, "modelInvocationInput").get("foundationModel")) or self.model
            usage = part(part(part(step, "modelInvocationOutput"), "metadata"), "usage")
            if not reported(usage):
                continue
            self.final = True
            if "model" not in self.facts:
                self.note(model=self.model)
            words = converse_counts(usage)
            if self.model != self.facts.get("model") and len(self.others) < 50:
                self.others[self.model or ""] = _sum(self.others.get(self.model or "", {}), words)
            self.own = _sum(self.own, words)

    def counts(self) -> Keywords | None:
        if not self.final:
            return None
        others = tuple(usage_of(words | {"model": model or None}) for model, words in self.others.items())
        return self.facts | self.own | ({"other_models": others} if others else {})


def _sum(left: Keywords, right: Keywords) -> Keywords:
    return {name: left.get(name, 0) + value for name, value in right.items()}
