"""Anthropic's messages, whole and streamed, from Anthropic itself and from clouds that pass them on."""

from __future__ import annotations

from typing import Any

from bursar.answers.chat import usage_tools
from bursar.answers.counts import (
    Json,
    Keywords,
    count,
    fields_of,
    items,
    part,
    reported,
    tidy,
    tier,
    tools,
    usage_of,
    word,
)
from bursar.answers.tally import Tally
from bursar.usage import MAX_COUNT, Usage

_EVENTS = frozenset(
    {
        "message_start",
        "message_delta",
        "message_stop",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
    }
)
_OWN_KEYS = ("cache_creation_input_tokens", "cache_read_input_tokens", "server_tool_use", "iterations")
# What `usual_message` reads: a message that has nothing but these is of no other family, and bills nothing beside.
_USUAL = frozenset(
    {
        *("id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"),
        *("container", "stop_details", "_request_id"),
    }
)
_USUAL_USAGE = frozenset(
    {
        *("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens"),
        *("cache_creation", "service_tier", "inference_geo"),
    }
)
_SPLIT = ("ephemeral_1h_input_tokens", "ephemeral_5m_input_tokens")
_NO_GEO, _TIERS = (None, "", "not_available"), (None, "standard")
_CODE = frozenset({"code_execution", "bash_code_execution", "text_editor_code_execution"})


class Anthropic(Tally):
    """`message_start` tells the input; `message_delta` the final counts, which replace the earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.usage: dict[str, Any] = {}

    @staticmethod
    def claims(data: Json) -> bool:
        kind = data.get("type")
        if isinstance(kind, str) and (kind in _EVENTS or kind == "message"):
            return True
        usage = data.get("usage")
        return isinstance(usage, dict) and "input_tokens" in usage and any(name in usage for name in _OWN_KEYS)

    def feed(self, data: Json) -> None:
        kind = data.get("type")
        if kind in ("content_block_delta", "content_block_stop"):
            return
        message = part(data, "message") if kind == "message_start" else data
        self.note(model=word(message.get("model")))
        blocks = items(message, "content") if kind != "content_block_start" else [part(data, "content_block")]
        for block in blocks:
            if block.get("type") == "server_tool_use" and word(block.get("name")) in _CODE:
                self.used["code_execution"] += 1
        usage = part(message, "usage")
        if usage:
            if "cache_creation" not in usage and _shrinks(usage, self.usage):
                self.usage.pop("cache_creation", None)  # the split of an earlier total would outlive it
            self.usage.update({name: value for name, value in usage.items() if value is not None})
            self.final = self.final or kind != "message_start"

    def counts(self) -> Keywords | None:
        if not reported({name: self.usage.get(name) for name in (*_COUNTS, "iterations", "cache_creation")}):
            return None
        geo = word(self.usage.get("inference_geo"))
        if geo and geo != "not_available":
            self.note(region=geo)
        speed = word(self.usage.get("speed"))
        facts = self.facts | tier(self.usage.get("service_tier"))
        if speed and speed != "standard":
            facts = facts | {"service_tier": speed}  # `fast` has its own price
        if facts.get("service_tier") == "batch":
            facts = facts | {"batch": True}
        words = _with_iterations(self.usage, _message_counts(self.usage), facts.get("model"))
        return tools(facts | words, self.used | usage_tools(self.usage))


def usual_message(answer: Any) -> Usage | None:
    """The usage of a whole message that tells nothing but what most do: what `Anthropic` makes of it. None for any other.

    See `usual_usage`, which does the same for OpenAI's chats.
    """
    data = fields_of(answer)
    if data is None or data.get("type") != "message":
        return None
    if not _USUAL.issuperset(name for name, told in data.items() if told is not None):
        return None
    usage = fields_of(data.get("usage"))
    if usage is None or usage.get("inference_geo") not in _NO_GEO:
        return None
    if not _USUAL_USAGE.issuperset(name for name, told in usage.items() if told is not None):
        return None
    split = {} if usage.get("cache_creation") is None else fields_of(usage["cache_creation"])
    if split is None:
        return None
    counts = [usage.get(name) for name in _COUNTS] + [split.get(name) for name in _SPLIT]
    into, out, read, written, hour, five = (0 if count is None else count for count in counts)
    if {*map(type, (into, out, read, written, hour, five))} != {int} or min(into, out, read, written, hour, five) < 0:
        return None
    stated, blocks = usage.get("service_tier"), data.get("content")
    if (split and hour + five != written) or not 0 < into + out + read + written <= MAX_COUNT or stated not in _TIERS:
        return None
    for block in map(fields_of, blocks) if isinstance(blocks, (list, tuple)) else ():
        if block is None or block.get("type") == "server_tool_use":
            return None
    return Usage(
        input_tokens=into + read + written,
        output_tokens=out,
        cache_read_tokens=read,
        cache_write_5m_tokens=written - hour,
        cache_write_1h_tokens=hour,
        model=word(data.get("model")),
        service_tier=stated,
    )


_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")


def _shrinks(usage: Json, before: Json) -> bool:
    """Whether it tells of fewer tokens written to the cache than before. `message_delta` repeats the total, not its split."""
    told = usage.get("cache_creation_input_tokens")
    return told is not None and count(told) < count(before.get("cache_creation_input_tokens"))


def _message_counts(usage: Json) -> Keywords:
    """Anthropic's `input_tokens` leaves cache reads and writes out; Bursar's total holds them.

    Source: docs.anthropic.com, prompt caching, "Tracking cache performance".
    """
    split = part(usage, "cache_creation")
    hour, five = count(split.get("ephemeral_1h_input_tokens")), count(split.get("ephemeral_5m_input_tokens"))
    written = max(count(usage.get("cache_creation_input_tokens")), hour + five)
    read = count(usage.get("cache_read_input_tokens"))
    return {
        "input_tokens": count(usage.get("input_tokens")) + read + written,
        "output_tokens": count(usage.get("output_tokens")),
        "cache_read_tokens": read,
        "cache_write_5m_tokens": written - hour,  # five minutes is the default lifetime
        "cache_write_1h_tokens": hour,
        "reasoning_tokens": count(part(usage, "output_tokens_details").get("thinking_tokens")),
    }


def _with_iterations(usage: Json, top: Keywords, model: str | None) -> Keywords:
    """Add the rounds that the top level leaves out: compaction, and an advisor, another model at its own price.

    The top level counts the rounds of type `message` alone.
    Source: Claude API documentation, "Compaction at a token threshold", usage.
    """
    rounds = items(usage, "iterations")[:1000]
    if not rounds:
        return tidy(top)
    own: Keywords = dict.fromkeys(top, 0)
    others: list[Usage] = []
    for entry in rounds:
        words = _message_counts(entry)
        other = word(entry.get("model"))
        if other and other != model:
            others.append(usage_of(tidy(words) | {"model": other}))
            continue
        own = {name: own[name] + words[name] for name in own}
    if own["input_tokens"] + own["output_tokens"] > top["input_tokens"] + top["output_tokens"]:
        own["reasoning_tokens"] = max(own["reasoning_tokens"], top["reasoning_tokens"])
        top = own
    merged = tidy({name: top[name] + sum(getattr(other, name) for other in others) for name in top})
    return merged | ({"other_models": tuple(others)} if others else {})
