"""Usage: the counted units of one call, as the provider bills them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from bursar.errors import InvalidInput, shown
from bursar.money import MAX_NANOS

_NOTHING: Mapping[str, int] = MappingProxyType({})
MAX_COUNT = 2**48
MAX_FACT = 512
_FACTS = ("model", "service_tier", "region")


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Counts of one call. Totals hold their parts, so nothing is counted twice.

    `input_tokens` and `output_tokens` are totals. Inside input: `cache_read_tokens`, `cache_write_5m_tokens`,
    `cache_write_1h_tokens`, `input_audio_tokens`, `input_image_tokens`, `input_video_tokens`, and `tool_prompt_tokens`
    (what the provider's own tools put into the prompt); `cache_read_audio_tokens` (also image, video) are inside both
    the cache reads and the medium. Inside output: `reasoning_tokens`, `output_audio_tokens`, `output_image_tokens`.
    Beside tokens: `requests`, seconds of audio in milliseconds (`input_audio_ms`, `output_audio_ms`),
    `input_characters`, `images`, `pages`, `search_units`, and `server_tools`, a count per server-side tool
    (`web_search`, `code_execution`, `grounding`, ...). Facts of the answer that decide its price: `model` (as
    answered), `service_tier`, `region`, `batch`, and `stated_cost_nanos`, the bill that the provider itself states.
    `other_models` holds the parts of the totals that other models made (an advisor, a router, a collaborating agent),
    each with its own `model`; `by_model` takes the totals apart for pricing.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    input_audio_tokens: int = 0
    input_image_tokens: int = 0
    input_video_tokens: int = 0
    cache_read_audio_tokens: int = 0
    cache_read_image_tokens: int = 0
    cache_read_video_tokens: int = 0
    output_audio_tokens: int = 0
    output_image_tokens: int = 0
    tool_prompt_tokens: int = 0
    requests: int = 1
    input_audio_ms: int = 0
    output_audio_ms: int = 0
    input_characters: int = 0
    images: int = 0
    pages: int = 0
    search_units: int = 0
    server_tools: Mapping[str, int] = field(default_factory=lambda: _NOTHING)
    model: str | None = None
    service_tier: str | None = None
    region: str | None = None
    batch: bool = False
    stated_cost_nanos: int | None = None
    other_models: tuple[Usage, ...] = ()

    def __post_init__(self) -> None:
        for value in _counts(self):
            if type(value) is not int or not 0 <= value <= MAX_COUNT:
                name = next(name for name in _COUNTS if getattr(self, name) is value)
                raise InvalidInput(
                    f"Usage.{name} must be a whole number from 0 to 2^48, got {shown(value)}. "
                    "Pass the provider's count as it is.",
                    argument=name,
                    value=value,
                )
        for tool, count in self.server_tools.items():
            named = isinstance(tool, str) and len(tool) <= MAX_FACT and tool.isprintable()
            if type(count) is not int or not 0 <= count <= MAX_COUNT or not named:
                raise InvalidInput(
                    f"Usage.server_tools[{shown(tool)}] must be a whole number, got {shown(count)}. Pass the count of calls.",
                    argument="server_tools",
                    value=count,
                )
        bill = self.stated_cost_nanos
        if bill is not None and (type(bill) is not int or not 0 <= bill <= MAX_NANOS):
            raise InvalidInput(
                f"Usage.stated_cost_nanos must be a whole number from 0 to 2^62, got {shown(bill)}. "
                "Leave it out where the provider states no bill.",
                argument="stated_cost_nanos",
                value=bill,
            )
        for name in _FACTS:
            fact = getattr(self, name)
            if fact is not None and not (isinstance(fact, str) and len(fact) <= MAX_FACT and fact.isprintable()):
                raise InvalidInput(
                    f"Usage.{name} must be a text of {MAX_FACT} printable characters at most, got {shown(fact)}. "
                    "Leave it out where it is not known.",
                    argument=name,
                    value=fact,
                )
        if self.other_models:
            others = tuple(other if isinstance(other, Usage) else Usage(**other) for other in self.other_models)
            object.__setattr__(self, "other_models", others)

    @classmethod
    def from_response(
        cls, provider: str, body: Any, *, headers: Mapping[str, Any] | None = None, status: int = 200
    ) -> Usage:
        """Read the usage of any provider's answer, or of the list of events of its stream.

        `provider`: `openai`, `azure`, `anthropic`, `google`, `bedrock`, ...; `body`: the answer's JSON as a dict, text
        or bytes, an SDK's answer object, or a list of a stream's events; `headers` and `status`: what HTTP said beside
        it, where known. Raises UnreadableAnswer when there is no usage to read; it never guesses zeros.
        """
        from bursar.answers.read import read_usage  # the readers load when an answer is read

        return read_usage(provider, body, headers=headers, status=status)

    def by_model(self) -> tuple[Usage, ...]:
        """One Usage per model, for pricing: what is left of the totals first, if anything, then `other_models`.

        The stated bill stays with the first: it covers the whole call.
        """
        if not self.other_models:
            return (self,)
        left = {
            name: max(0, getattr(self, name) - sum(getattr(other, name) for other in self.other_models))
            for name in _COUNTS
            if name != "requests"
        }
        own = self.replace(**left, other_models=())
        return (own, *self.other_models) if any(left.values()) or own.server_tools else self.other_models

    def replace(self, **changes: Any) -> Usage:
        """A copy with some fields changed."""
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """The counts and facts that are not empty, as plain JSON data; `Usage(**usage.as_dict())` gives it back."""
        result = {name: value for name, empty in _EMPTY if (value := getattr(self, name)) != empty}
        if self.server_tools:
            result["server_tools"] = dict(self.server_tools)
        if self.other_models:
            result["other_models"] = [other.as_dict() for other in self.other_models]
        return result


_EMPTY = tuple((f.name, _NOTHING if f.name == "server_tools" else f.default) for f in fields(Usage))
_COUNTS = tuple(f.name for f in fields(Usage) if type(f.default) is int)
_counts = attrgetter(*_COUNTS)  # all at once, for every Usage that is made
