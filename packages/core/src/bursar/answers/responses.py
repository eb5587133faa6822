"""OpenAI's newer shapes: responses, realtime, transcription, image tokens; also what LangChain makes of any usage."""

from __future__ import annotations

from collections import Counter

from bursar.answers.chat import images_made, stated, usage_tools
from bursar.answers.counts import (
    Json,
    Keywords,
    count,
    items,
    milliseconds,
    part,
    reported,
    tidy,
    tier,
    tools,
    total,
    word,
)
from bursar.answers.tally import Tally

_ENDS = ("response.completed", "response.incomplete", "response.failed", "response.done", "response.cancelled")
_HEARD = "conversation.item.input_audio_transcription.completed"
_TOOLS = {
    "file_search_call": "file_search",
    "computer_call": "computer_use",
    "mcp_call": "mcp",
    "custom_tool_call": "",
    "x_search_call": "x_search",
}


class Responses(Tally):
    """`usage.input_tokens` with details. A realtime session's turns are added up, each being billed."""

    def __init__(self) -> None:
        super().__init__()
        self.turns: Keywords = {}
        self.bill: int | None = None
        self.told: str | None = None  # the id of the last answer whose usage was told

    @staticmethod
    def claims(data: Json) -> bool:
        kind = data.get("type")
        if isinstance(kind, str) and (kind.startswith(("response.", "session.")) or kind == _HEARD):
            return True
        if data.get("object") in ("response", "response.compaction", "realtime.response"):
            return True
        usage = data.get("usage")
        return isinstance(usage, dict) and ("input_tokens" in usage or usage.get("type") == "duration")

    def feed(self, data: Json) -> None:
        kind = data.get("type")
        if isinstance(kind, str) and kind.startswith("response.") and kind not in _ENDS:
            self._facts(part(data, "response"))
            return
        if isinstance(kind, str) and kind.startswith("session."):
            self.note(model=word(part(data, "session").get("model")))
            return
        answer = part(data, "response") if kind in _ENDS else data
        self._facts(answer)
        usage = part(answer, "usage") or part(data, "usage")  # xAI's voice puts it beside the response
        if not reported(usage):
            return
        told = word(answer.get("id"))
        if told is not None and told == self.told:
            return  # a stream's last event, and its answer as a whole
        self.told, self.final = told, True
        images = images_made(answer)
        for name, value in (response_counts(usage, images=images > 0) | {"images": images}).items():
            self.turns[name] = self.turns.get(name, 0) + value
        bill = stated(usage)
        if bill is not None:
            self.bill = (self.bill or 0) + bill
        self.used.update(_output_tools(answer) | usage_tools(usage))

    def counts(self) -> Keywords | None:
        if not self.final:
            return None
        words = tidy(self.turns) | ({} if self.bill is None else {"stated_cost_nanos": self.bill})
        return tools(self.facts | words, self.used)

    def _facts(self, answer: Json) -> None:
        self.note(model=word(answer.get("model")))
        self.facts.update(tier(answer.get("service_tier")))


def response_counts(usage: Json, *, images: bool = False) -> Keywords:
    """The counts of one usage object; cached and written tokens, audio and images are inside `input_tokens`.

    With `images` (the images endpoint) output that is not broken down is image output.
    """
    heard = part(usage, "input_tokens_details", "input_token_details")
    said = part(usage, "output_tokens_details", "output_token_details")
    cached = part(heard, "cached_tokens_details")
    out = count(usage.get("output_tokens"))
    hour = count(heard.get("ephemeral_1h_input_tokens"))  # LangChain's names for Anthropic's split
    written = max(
        total(heard, "cache_write_tokens", "cache_creation"), hour + count(heard.get("ephemeral_5m_input_tokens"))
    )
    drawn = total(said, "image_tokens", "image")
    # xAI bills voice by the second and says how many; the raw duration stands where it does not.
    spoken = usage.get("billable_audio_seconds", usage.get("output_audio_seconds"))
    outside = max(0, count(usage.get("total_tokens")) - count(usage.get("input_tokens")) - out)
    return {
        "input_tokens": count(usage.get("input_tokens")),
        "output_tokens": out + outside,
        "cache_read_tokens": total(heard, "cached_tokens", "cache_read"),
        "cache_write_5m_tokens": written - hour,
        "cache_write_1h_tokens": hour,
        "reasoning_tokens": max(total(said, "reasoning_tokens", "reasoning"), outside),
        "input_audio_tokens": total(heard, "audio_tokens", "audio"),
        "input_image_tokens": total(heard, "image_tokens", "image"),
        "cache_read_audio_tokens": total(cached, "audio_tokens"),
        "cache_read_image_tokens": total(cached, "image_tokens"),
        "output_audio_tokens": total(said, "audio_tokens", "audio"),
        "output_image_tokens": out if images and not drawn and not total(said, "text_tokens") else drawn,
        "input_audio_ms": milliseconds(usage.get("seconds")),
        "output_audio_ms": milliseconds(spoken),
    }


def _output_tools(answer: Json) -> Counter[str]:
    """Server-side tools in a response's output.

    Of web search only the action `search` is billed, and the code interpreter by the container. The name says what
    decides the fee: the preview of web search has its own, and an image's is by model, quality and size.
    Source: platform.openai.com, "Web search" (output and citations) and the pricing page.
    """
    used: Counter[str] = Counter()
    containers: set[str] = set()
    offered = {kind: tool for tool in items(answer, "tools") if (kind := word(tool.get("type")))}
    search = "web_search_preview" if any(kind.startswith("web_search_preview") for kind in offered) else "web_search"
    painter = word(part(offered, "image_generation").get("model")) or "gpt-image-1"
    for item in items(answer, "output"):
        kind = word(item.get("type")) or ""
        if kind == "web_search_call":
            used[search] += (part(item, "action").get("type") or "search") == "search"
        elif kind == "image_generation_call":
            quality, size = (word(item.get(name)) or "auto" for name in ("quality", "size"))
            used[f"image_generation/{painter}/{quality}/{size}"] += 1
        elif kind == "code_interpreter_call":
            containers.add(word(item.get("container_id")) or "")
        elif _TOOLS.get(kind):
            used[_TOOLS[kind]] += 1
    used["code_interpreter"] = len(containers)
    searches = part(part(answer, "tool_usage"), "web_search")
    if "num_requests" in searches:
        used[search] = max(used[search], count(searches["num_requests"]))
    return +used
