"""OpenAI's chat shape, which most providers speak: completions, embeddings, rerank, xAI over gRPC, images, audio."""

from __future__ import annotations

from collections import Counter
from typing import Any

from bursar.answers.counts import (
    Json,
    Keywords,
    cost_nanos,
    count,
    fields_of,
    items,
    milliseconds,
    part,
    reported,
    ticks_nanos,
    tidy,
    tier,
    tools,
    total,
    unreadable,
    usage_of,
    word,
)
from bursar.answers.tally import Tally
from bursar.usage import MAX_COUNT, Usage

_TOKENS = frozenset({"prompt_tokens", "completion_tokens", "total_tokens"})
_ANSWERS = frozenset({"choices", "x_groq", "outputs"})
_TOOLS = frozenset(
    {
        "server_tool_use",
        "server_tool_use_details",
        "server_side_tool_usage_details",
        "server_side_tools_used",
        "connectors",
        "num_search_queries",
    }
)  # where `usage_tools` looks
_NO_TOOLS: Counter[str] = Counter()
_GROQ_TOOLS = {
    "search": "web_search",
    "visit": "web_fetch",
    "python": "code_execution",
    "browser_search": "browser_search",
}

# What `usual_usage` reads: an answer that has nothing but these is of no other family, and bills nothing beside.
_USUAL = frozenset(
    {
        *("id", "object", "created", "model", "choices", "usage", "system_fingerprint", "service_tier"),
        *("obfuscation", "metadata", "moderation", "prompt_filter_results"),
        "_request_id",  # of an SDK's object
    }
)
_USUAL_OBJECTS = ("chat.completion", "chat.completion.chunk")
_USUAL_USAGE = _TOKENS | {"prompt_tokens_details", "completion_tokens_details"}
_HEARD = ("cached_tokens", "audio_tokens", "image_tokens", "cache_write_tokens")
_SAID = ("reasoning_tokens", "audio_tokens")
_USUAL_HEARD = frozenset({*_HEARD, "text_tokens"})
_USUAL_SAID = frozenset({*_SAID, "text_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens"})


class Chat(Tally):
    """`usage.prompt_tokens` and its kin, wherever providers put it: top level, `x_groq`, or inside the choice."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: Json | None = None
        self.ended = False  # an answer has said why it ends
        self.breakdown: list[Json] = []
        self.plain: Keywords = {}  # what is billed without a usage object: images, seconds of audio

    @staticmethod
    def claims(data: Json) -> bool:
        usage = data.get("usage")
        if isinstance(usage, dict) and "input_tokens" in usage:
            return False
        if isinstance(usage, dict) and not _TOKENS.isdisjoint(usage):
            return True
        return not _ANSWERS.isdisjoint(data) or images_made(data) > 0 or _heard(data)

    def feed(self, data: Json) -> None:
        self.note(model=word(data.get("model")))
        self.facts.update(tier(data.get("service_tier")))
        usage = _usage_of(data)
        choices = items(data, "choices")
        self.ended = self.ended or any(choice.get("finish_reason") for choice in choices)
        if usage is not None:
            self.usage = usage
            self.final = self.final or not any(_is_piece(choice) for choice in choices)
        # Perplexity and vLLM tell with every chunk what was billed up to there.
        self.final = self.final or (self.ended and self.usage is not None)
        self.breakdown = items(part(data, "usage_breakdown"), "models") or self.breakdown
        images = images_made(data)
        if images:
            self.plain, self.final = {"images": images}, True
        elif _heard(data):
            self.plain, self.final = {"input_audio_ms": milliseconds(data["duration"])}, True
        for choice in choices:
            for name in ("message", "delta"):
                message = choice.get(name)
                if isinstance(message, dict) and "executed_tools" in message:
                    self.used.update(_GROQ_TOOLS.get(kind, kind) for kind in _kinds(items(message, "executed_tools")))

    def counts(self) -> Keywords | None:
        if self.usage is None:
            return self.facts | self.plain if self.plain else None
        words = chat_counts(self.usage) | self.plain
        spent = usage_tools(self.usage)
        others = tuple(
            usage_of(chat_counts(part(entry, "usage")) | {"model": word(entry.get("model"))})
            for entry in self.breakdown[:50]
            if reported(part(entry, "usage"))
        )
        words = words | ({"other_models": others} if others else {})
        return tools(
            self.facts | tier(self.usage.get("service_tier")) | words, self.used | spent if spent else self.used
        )


def _is_piece(choice: Json) -> bool:
    """Whether it is of a stream's chunk. Those of text completions look like whole ones, but for an end that is still open."""
    return "delta" in choice or ("text" in choice and choice.get("finish_reason", "") is None)


def usual_usage(answer: Any) -> Usage | None:
    """The usage of an answer, or chunk, that tells nothing but what most do: what `Chat` makes of it. None for any other.

    Most answers are read so, because whoever reads one has waited for the network, and all that is long unused takes longer.
    A dict, or an SDK's object: to have that written out as a dict takes longer than all else.
    """
    data = fields_of(answer)
    if data is None or data.get("object") not in _USUAL_OBJECTS or not data.keys() <= _USUAL:
        return None
    usage = fields_of(data.get("usage"))
    if usage is None or not usage.keys() <= _USUAL_USAGE or data.get("metadata") is not None:
        return None
    heard = _parts(usage.get("prompt_tokens_details"), _HEARD, _USUAL_HEARD)
    said = _parts(usage.get("completion_tokens_details"), _SAID, _USUAL_SAID)
    if heard is None or said is None:
        return None
    counts: list[Any] = [usage.get(name) for name in ("prompt_tokens", "completion_tokens", "total_tokens")]
    counts += heard + said
    into, out, whole, read, sound, drawn, written, thought, spoken = counts
    if {*map(type, counts)} != {int} or min(counts) < 0 or not 0 < into + out == whole <= MAX_COUNT:
        return None
    if max(read, sound) > into or drawn or written or thought + spoken > out:
        return None
    choices = data.get("choices")
    for choice in map(fields_of, choices) if isinstance(choices, (list, tuple)) else ():
        if choice is None or (choice.get("delta") is not None and not choice.get("finish_reason")):
            return None
        for told in (choice.get("message"), choice.get("delta")):
            if told is not None and ((fields := fields_of(told)) is None or "executed_tools" in fields):
                return None
    stated = data.get("service_tier")
    return Usage(
        input_tokens=into,
        output_tokens=out,
        cache_read_tokens=read,
        reasoning_tokens=thought,
        input_audio_tokens=sound,
        output_audio_tokens=spoken,
        model=word(data.get("model")),
        service_tier=tier(stated).get("service_tier") if stated else None,
    )


def _parts(told: Any, names: tuple[str, ...], usual: frozenset[str]) -> list[Any] | None:
    """What details say under these names, 0 where nothing; None where they say what is not usual."""
    if told is None:
        return [0] * len(names)
    details = fields_of(told)
    if details is None or not details.keys() <= usual:
        return None
    return [0 if (value := details.get(name)) is None else value for name in names]


def chat_counts(usage: Json) -> Keywords:
    """The counts of one chat-shaped usage object.

    Cached, audio and image tokens are inside `prompt_tokens`; reasoning is inside `completion_tokens`, except where
    `total_tokens` exceeds the sum (xAI, Google's compatible endpoint): what lies outside the parts is output that was
    billed and not shown.
    """
    into, out = count(usage.get("prompt_tokens")), count(usage.get("completion_tokens"))
    whole = count(usage.get("total_tokens"))
    heard = part(usage, "prompt_tokens_details", "prompt_token_details")
    said = part(usage, "completion_tokens_details", "completion_token_details")
    thought = max(total(said, "reasoning_tokens"), total(usage, "reasoning_tokens"))
    connectors = count(usage.get("connector_tokens"))  # Mistral: what its connectors put into the prompt
    into += connectors
    if "completion_tokens" not in usage and "prompt_tokens" not in usage:
        into, outside = whole, 0  # embeddings and rerank report a total alone
    elif whole:
        outside = max(0, whole - into - out)
    else:
        outside = thought if "prompt_text_tokens" in usage else 0
    if thought > out + outside:
        outside = thought
    read = max(
        total(heard, "cached_tokens"),
        # not Mistral's `num_cached_tokens`: its engine counted them before caching was sold, and they were billed in full
        total(usage, "cached_tokens", "prompt_cache_hit_tokens", "cached_prompt_text_tokens"),
        count(usage.get("cache_read_input_tokens")),
    )
    written = max(
        total(heard, "cache_write_tokens", "cache_creation_tokens"), count(usage.get("cache_creation_input_tokens"))
    )
    words = tidy(
        {
            "input_tokens": into,
            "output_tokens": out + outside,
            "cache_read_tokens": read,
            "cache_write_5m_tokens": written,
            "reasoning_tokens": max(thought, outside),
            "input_audio_tokens": total(heard, "audio_tokens"),
            "input_image_tokens": max(total(heard, "image_tokens"), total(usage, "prompt_image_tokens")),
            "input_video_tokens": total(heard, "video_tokens"),
            "output_audio_tokens": total(said, "audio_tokens"),
            "output_image_tokens": total(said, "image_tokens"),
            "tool_prompt_tokens": connectors,
            "input_audio_ms": milliseconds(usage.get("prompt_audio_seconds")),
        }
    )
    bill = stated(usage)
    return words if bill is None else words | {"stated_cost_nanos": bill}


def stated(usage: Json) -> int | None:
    """The bill that the provider states: OpenRouter's `cost`, xAI's ticks.

    With the user's own key (`is_byok`) OpenRouter's cost is its fee, and the upstream provider bills
    `upstream_inference_cost` beside it.
    """
    if usage.get("cost_in_usd_ticks") is not None:
        return ticks_nanos(usage["cost_in_usd_ticks"])
    cost = usage.get("cost")
    if isinstance(cost, dict):
        cost = cost.get("total_cost")  # Perplexity
    if cost is None:
        return None
    if usage.get("is_byok") is True:
        upstream = part(usage, "cost_details").get("upstream_inference_cost")
        return None if upstream is None else cost_nanos(cost) + cost_nanos(upstream)
    return cost_nanos(cost)


def usage_tools(usage: Json) -> Counter[str]:
    """Server-side tools as usage objects count them, under Bursar's names."""
    if _TOOLS.isdisjoint(usage):
        return _NO_TOOLS
    used: Counter[str] = Counter()
    for name in ("server_tool_use", "server_tool_use_details"):  # Anthropic, OpenRouter
        for key, value in part(usage, name).items():
            tool, _, what = (word(key) or "").rpartition("_")
            if what == "requests":
                used[tool] = max(used[tool], count(value))
    for key, value in part(usage, "server_side_tool_usage_details").items():  # xAI
        used[(word(key) or "other").removesuffix("_calls")] = count(value)
    for tool in _listed(usage.get("server_side_tools_used")):  # xAI over gRPC, one entry a call
        used[tool.removeprefix("SERVER_SIDE_TOOL_").lower()] += 1
    for key, value in part(usage, "connectors").items():  # Mistral
        used[word(key) or "other"] = count(value)
    used["web_search"] = max(used["web_search"], count(usage.get("num_search_queries")))  # Perplexity
    return +used


def _listed(value: Any) -> list[str]:
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise unreadable("`server_side_tools_used` is not a list")
    return [word(tool) or "other" for tool in value[:10_000]]


def _kinds(executed: list[Json]) -> list[str]:
    return [kind for kind in (word(tool.get("type")) for tool in executed) if kind]


def _usage_of(data: Json) -> Json | None:
    """The usage object of an answer or of a chunk: streams send null until the end."""
    places = [data, part(data, "x_groq")]
    places += [choice for choice in items(data, "choices")[:1] if "usage" in choice]
    for place in places:
        usage = place.get("usage")
        if usage is not None:
            if not isinstance(usage, dict):
                raise unreadable("`usage` is not an object")
            if not _TOKENS.isdisjoint(usage):
                return usage
    return None


def images_made(data: Json) -> int:
    """Images that were made: `data: [{url | b64_json}]`."""
    return sum(1 for item in items(data, "data") if item.get("url") or item.get("b64_json")) if "data" in data else 0


def _heard(data: Json) -> bool:
    """A verbose transcription, billed by its duration."""
    return "duration" in data and "text" in data and data.get("usage") is None
