"""Google's shapes: generateContent and its streams, Live, embeddings, caches, interactions, Vertex predictions."""

from __future__ import annotations

from typing import Any

from bursar.answers.counts import Json, Keywords, count, items, part, reported, tidy, tier, tools, unreadable, word
from bursar.answers.tally import Tally

# Enums come as names, or as numbers from the protobuf clients (google.ai.generativelanguage, Modality).
_MODALITIES = {1: "TEXT", 2: "IMAGE", 3: "VIDEO", 4: "AUDIO", 5: "DOCUMENT"}
_TRAFFIC = {
    "ON_DEMAND": "standard",
    "ON_DEMAND_PRIORITY": "priority",
    "ON_DEMAND_FLEX": "flex",
    "PROVISIONED_THROUGHPUT": "provisioned",
}
_MARKS = frozenset({"usageMetadata", "candidates", "promptFeedback", "modelVersion", "serverContent"})


class Google(Tally):
    """The last `usageMetadata` with counts is the bill: streams repeat it as a running total."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: Json = {}
        self.queries: set[str] = set()

    @staticmethod
    def claims(data: Json) -> bool:
        kind = data.get("event_type")
        if isinstance(kind, str) and kind.startswith("interaction."):
            return True
        if not _MARKS.isdisjoint(data) or data.get("object") == "interaction":
            return True
        usage = data.get("usage")
        if isinstance(usage, dict) and "total_input_tokens" in usage:
            return True
        return "predictions" in data or "usage_metadata" in data or "model_version" in data

    def feed(self, data: Json) -> None:
        data = _camel(data)
        if "predictions" in data:
            self.usage, self.final = _predictions(data), True
            return
        answer = part(data, "interaction") if "interaction" in data else data
        self.note(model=word(answer.get("modelVersion")) or word(answer.get("model")))
        usage = part(answer, "usageMetadata", "usage", "metadata")
        if reported({name: value for name, value in usage.items() if name not in ("trafficType", "serviceTier")}):
            self.usage = usage
            if not items(answer, "candidates") and not data.get("promptFeedback"):
                self.final = True  # embeddings, caches, Live turns and interactions come whole
        self.facts.update(_tier(usage) or tier(answer.get("serviceTier")) or tier(answer.get("service_tier")))
        candidates = [_camel(candidate) for candidate in items(answer, "candidates")]
        if candidates:  # a round of the provider's own tools ends too, and others follow
            self.final = any(candidate.get("finishReason") for candidate in candidates)
        for candidate in candidates:
            self._tools(candidate)
        self.final = self.final or bool(data.get("promptFeedback"))

    def counts(self) -> Keywords | None:
        if not reported(self.usage):
            return None
        words = _interaction(self.usage) if "total_input_tokens" in self.usage else _metadata(self.usage)
        if not any(words.values()):
            return None
        if self.queries:
            self.used["grounding_queries"] = len(self.queries)
        return tools(self.facts | words, self.used)

    def _tools(self, candidate: Json) -> None:
        """Grounding is billed by the prompt up to Gemini 2.5, by the query from Gemini 3 on: both are counted."""
        grounding = _camel(part(candidate, "groundingMetadata"))
        chunks = items(grounding, "groundingChunks")
        asked = grounding.get("webSearchQueries")
        if isinstance(asked, list) and len(self.queries) < 1000:
            self.queries.update(query[:500] for query in asked if isinstance(query, str) and query)
        if self.queries or any(chunk.get("web") for chunk in chunks):
            self.used["grounding"] = 1
        if any(chunk.get("maps") for chunk in chunks):
            self.used["maps_grounding"] = 1
        if any(chunk.get("retrievedContext") or chunk.get("retrieved_context") for chunk in chunks):
            self.used["file_search"] = 1
        pieces = items(part(candidate, "content"), "parts")
        self.used["code_execution"] += sum(
            1 for piece in pieces if piece.get("executableCode") or piece.get("executable_code")
        )


def _metadata(usage: Json) -> Keywords:
    """Counts of `usageMetadata`. Thoughts and the prompts of tools stand beside prompt and candidates.

    Early previews counted the thoughts inside the candidates: the total, which then equals prompt and candidates,
    tells. Live leaves the thoughts out of its total though they are billed as output. Source:
    ai.google.dev/gemini-api/docs/thinking, "Pricing".
    """
    prompt, tool = count(usage.get("promptTokenCount")), count(usage.get("toolUsePromptTokenCount"))
    shown = count(usage.get("candidatesTokenCount"))
    thought = count(usage.get("thoughtsTokenCount"))
    whole = count(usage.get("totalTokenCount"))
    if "promptTokenCount" not in usage and not shown and not thought:
        # A cache that was made: writing it costs the input price (Vertex AI, "Context caching overview"). Its storage,
        # which is billed by the hour, is not in the answer.
        return tidy({"input_tokens": whole})
    inside = 0 < thought <= shown and whole == prompt + tool + shown
    out = shown + count(usage.get("responseTokenCount")) + (0 if inside else thought)
    out += max(0, whole - prompt - tool - out)
    media = _modalities(usage, "promptTokensDetails", "promptTokenDetails", "toolUsePromptTokensDetails")
    cached = _modalities(usage, "cacheTokensDetails")
    said = _modalities(usage, "candidatesTokensDetails", "responseTokensDetails")
    return tidy(
        {
            "input_tokens": prompt + tool,
            "output_tokens": out,
            "cache_read_tokens": count(usage.get("cachedContentTokenCount")),
            "reasoning_tokens": thought,
            "tool_prompt_tokens": tool,
            "input_audio_tokens": media.get("AUDIO", 0),
            "input_image_tokens": media.get("IMAGE", 0),
            "input_video_tokens": media.get("VIDEO", 0),
            "cache_read_audio_tokens": cached.get("AUDIO", 0),
            "cache_read_image_tokens": cached.get("IMAGE", 0),
            "cache_read_video_tokens": cached.get("VIDEO", 0),
            "output_audio_tokens": said.get("AUDIO", 0),
            "output_image_tokens": said.get("IMAGE", 0),
            "input_characters": count(usage.get("billableCharacterCount")),
        }
    )


def _interaction(usage: Json) -> Keywords:
    media = _modalities(usage, "input_tokens_by_modality", "tool_use_tokens_by_modality")
    cached = _modalities(usage, "cached_tokens_by_modality")
    said = _modalities(usage, "output_tokens_by_modality")
    tool, thought = count(usage.get("total_tool_use_tokens")), count(usage.get("total_thought_tokens"))
    return tidy(
        {
            "input_tokens": count(usage.get("total_input_tokens")) + tool,
            "output_tokens": count(usage.get("total_output_tokens")) + thought,
            "cache_read_tokens": count(usage.get("total_cached_tokens")),
            "reasoning_tokens": thought,
            "tool_prompt_tokens": tool,
            **{f"input_{name.lower()}_tokens": media.get(name, 0) for name in ("AUDIO", "IMAGE", "VIDEO")},
            **{f"cache_read_{name.lower()}_tokens": cached.get(name, 0) for name in ("AUDIO", "IMAGE", "VIDEO")},
            **{f"output_{name.lower()}_tokens": said.get(name, 0) for name in ("AUDIO", "IMAGE")},
        }
    )


def _predictions(data: Json) -> Json:
    """Vertex embeddings: a token count with each prediction, billable characters for all."""
    statistics = [part(part(entry, "embeddings"), "statistics") for entry in items(data, "predictions")]
    return {
        "promptTokenCount": sum(count(entry.get("token_count")) for entry in statistics),
        "billableCharacterCount": part(data, "metadata").get("billableCharacterCount"),
    }


def _modalities(usage: Json, *names: str) -> dict[str, int]:
    """Token counts by modality over several lists of details."""
    result: dict[str, int] = {}
    for name in names:
        for entry in items(usage, name)[:100]:
            kind = entry.get("modality")
            kind = _MODALITIES.get(kind) if isinstance(kind, int) else (word(kind) or "").upper()
            tokens = next((entry[key] for key in ("tokenCount", "token_count", "tokens") if key in entry), None)
            result[kind or "TEXT"] = result.get(kind or "TEXT", 0) + count(tokens)
    return result


def _tier(usage: Json) -> dict[str, str]:
    traffic = getattr(usage.get("trafficType"), "value", usage.get("trafficType"))
    if isinstance(traffic, str) and traffic in _TRAFFIC:
        return {"service_tier": _TRAFFIC[traffic]}
    return tier(usage.get("serviceTier"))


def _camel(data: Json) -> Json:
    """The SDK's snake_case names as the wire's camelCase; interactions have snake_case on the wire and keep it."""
    return _inner(_renamed(data) if _is_snake(data) else data)


def _is_snake(data: Json) -> bool:
    return "total_input_tokens" not in data and any("_" in name for name in data if isinstance(name, str))


def _renamed(data: Json) -> Json:
    result: dict[str, Any] = {}
    for name, value in data.items():
        if not isinstance(name, str):
            raise unreadable("a key is not a text")
        head, *rest = name.split("_")
        result[head + "".join(word.capitalize() for word in rest) if head else name] = value
    return result


def _inner(data: Json) -> Json:
    usage = data.get("usageMetadata")
    if isinstance(usage, dict) and _is_snake(usage):
        return {**data, "usageMetadata": _renamed(usage)}
    return data
