"""Usage: the counted units of one call, as the provider bills them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bursar.errors import InvalidInput, shown
from bursar.money import MAX_NANOS

_NOTHING: Mapping[str, int] = MappingProxyType({})
MAX_COUNT = 2**48
MAX_FACT = 512


@dataclass(frozen=True, kw_only=True)
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

    if not TYPE_CHECKING:

        def __init__(self, **given: Any) -> None:  # the dataclass's own sets 29 fields, which takes five times as long
            """Keeps and checks what is given; all else reads as the class's defaults."""
            for name, value in given.items():
                if name in _COUNTS:
                    if type(value) is not int or not 0 <= value <= MAX_COUNT:
                        raise _wrong_count(name, value)
                elif name in _CHECKS:
                    given[name] = _CHECKS[name](name, value)
                else:
                    raise TypeError(f"Usage has no {name!r}. Use the fields that its documentation lists.")
            self.__dict__.update(given)

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
        given = self.__dict__
        # in the order of the fields, however they were given
        result = {name: given[name] for name in sorted(given, key=_ORDER.__getitem__) if given[name] != _EMPTY[name]}
        if self.server_tools:
            result["server_tools"] = dict(self.server_tools)
        if self.other_models:
            result["other_models"] = [other.as_dict() for other in self.other_models]
        return result


def _wrong_count(name: str, value: object) -> InvalidInput:
    return InvalidInput(
        f"Usage.{name} must be a whole number from 0 to 2^48, got {shown(value)}. Pass the provider's count as it is.",
        argument=name,
        value=value,
    )


def _tools(_: str, tools: Mapping[str, int]) -> Mapping[str, int]:
    for tool, count in tools.items():
        named = isinstance(tool, str) and len(tool) <= MAX_FACT and tool.isprintable()
        if type(count) is not int or not 0 <= count <= MAX_COUNT or not named:
            raise InvalidInput(
                f"Usage.server_tools[{shown(tool)}] must be a whole number, got {shown(count)}. Pass the count of calls.",
                argument="server_tools",
                value=count,
            )
    return tools


def _bill(name: str, bill: int | None) -> int | None:
    if bill is not None and (type(bill) is not int or not 0 <= bill <= MAX_NANOS):
        raise InvalidInput(
            f"Usage.{name} must be a whole number from 0 to 2^62, got {shown(bill)}. "
            "Leave it out where the provider states no bill.",
            argument=name,
            value=bill,
        )
    return bill


def _fact(name: str, fact: str | None) -> str | None:
    if fact is not None and not (isinstance(fact, str) and len(fact) <= MAX_FACT and fact.isprintable()):
        raise InvalidInput(
            f"Usage.{name} must be a text of {MAX_FACT} printable characters at most, got {shown(fact)}. "
            "Leave it out where it is not known.",
            argument=name,
            value=fact,
        )
    return fact


def _others(_: str, others: Iterable[Usage | Mapping[str, Any]]) -> tuple[Usage, ...]:
    return tuple(other if isinstance(other, Usage) else Usage(**other) for other in others)


def _any(_: str, value: object) -> object:
    return value


type.__setattr__(Usage, "server_tools", _NOTHING)  # a default that the dataclass takes only from a factory
_EMPTY = {f.name: _NOTHING if f.name == "server_tools" else f.default for f in fields(Usage)}
_ORDER = {name: number for number, name in enumerate(_EMPTY)}
_COUNTS = frozenset(name for name, empty in _EMPTY.items() if type(empty) is int)
_CHECKS: dict[str, Callable[[str, Any], object]] = {
    **dict.fromkeys(("model", "service_tier", "region"), _fact),
    "server_tools": _tools,
    "batch": _any,
    "stated_cost_nanos": _bill,
    "other_models": _others,
}
