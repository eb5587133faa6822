"""What a test tells the provider to do: answers, faults, and the rates that it bills."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from bursar.errors import InvalidInput
from bursar.money import round_half_up

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
MAX_TOKENS = 10_000_000  # of one answer: beyond any model, and what the filler text may cost in memory
MAX_WAIT_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Billed counts of one call. `input_tokens` and `output_tokens` are totals; the other counts are inside them."""

    input_tokens: int = 0
    output_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0

    def __post_init__(self) -> None:
        cached_tokens = self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens
        if cached_tokens > self.input_tokens or self.reasoning_tokens > self.output_tokens:
            raise InvalidInput(
                f"{self} has parts above their total. Input and output are totals that hold their parts."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the provider bills: nano-dollars per token, stated by the test and independent of Bursar's price book.

    $2.50 per million tokens are 2,500 nano-dollars per token. Parts of a nano-dollar are a `Fraction`; a float is
    refused. A rate of the cache that is None is the rate of input. Reasoning is billed as output. A call's cost is
    rounded once, half up.
    """

    input_nanos: int | Fraction
    output_nanos: int | Fraction
    cache_read_nanos: int | Fraction | None = None
    cache_write_5m_nanos: int | Fraction | None = None
    cache_write_1h_nanos: int | Fraction | None = None
    request_nanos: int | Fraction = 0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            rate = getattr(self, name)
            if rate is not None and (type(rate) not in (int, Fraction) or rate < 0):
                raise InvalidInput(
                    f"Rates.{name} must be nano-dollars per token as int or Fraction, got {rate!r}.",
                    argument=name,
                    value=rate,
                )

    def cost_nanos(self, counts: Counts) -> int:
        """The bill of one call in nano-dollars."""
        parts = (
            (counts.cache_read_tokens, self.cache_read_nanos),
            (counts.cache_write_5m_tokens, self.cache_write_5m_nanos),
            (counts.cache_write_1h_tokens, self.cache_write_1h_nanos),
        )
        plain = counts.input_tokens - sum(count for count, _ in parts)
        total = Fraction(plain * self.input_nanos + counts.output_tokens * self.output_nanos + self.request_nanos)
        for count, rate in parts:
            total += count * (self.input_nanos if rate is None else rate)
        return round_half_up(total)


GPT_4O = Rates(input_nanos=2_500, output_nanos=10_000, cache_read_nanos=1_250)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer that the provider generates, in whichever wire format the request asks for.

    `text` empty and no `tool_calls`: words are made up, one for each output token. `input_tokens` None: the characters
    of the request's messages, system prompt and tools over 4, rounded up. `output_tokens` None: the characters of the
    text and the tool calls over 4, or 16 when there are none. The request's maximum cuts the output, and its `n`
    multiplies it. `tool_calls` are pairs of a tool's name and its arguments. A stream has `chunks` pieces of text;
    `event_delay_s` passes before each of its events but the first. `latency_s` (None: the provider's) passes before the
    answer begins. `headers` are added to the answer.
    """

    text: str = ""
    tool_calls: Sequence[tuple[str, Mapping[str, Any]]] = ()
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    reasoning_tokens: int = 0
    model: str | None = None  # as answered; None: as asked
    chunks: int = 8
    event_delay_s: float = 0.0
    latency_s: float | None = None
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)

    def __post_init__(self) -> None:
        for name in (
            "input_tokens",
            "output_tokens",
            "cache_read_tokens",
            "cache_write_5m_tokens",
            "cache_write_1h_tokens",
            "reasoning_tokens",
        ):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or not 0 <= value <= MAX_TOKENS):
                raise InvalidInput(
                    f"Answer.{name} must be from 0 to {MAX_TOKENS}, got {value!r}.", argument=name, value=value
                )
        if self.input_tokens is not None and self.cached_tokens > self.input_tokens:
            raise InvalidInput(
                f"Answer has {self.cached_tokens} cached and {self.input_tokens} input tokens. The input holds them.",
                argument="input_tokens",
            )
        if not 1 <= self.chunks <= 10_000:
            raise InvalidInput(f"Answer.chunks must be from 1 to 10000, got {self.chunks!r}.", argument="chunks")
        _check_wait("Answer.event_delay_s", self.event_delay_s)
        _check_wait("Answer.latency_s", self.latency_s)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the input that were read from the cache or written to it."""
        return self.cache_read_tokens + self.cache_write_5m_tokens + self.cache_write_1h_tokens


@dataclass(frozen=True, slots=True)
class Fault:
    """One call that goes wrong.

    - `refuse`: the answer is `status` (429, 500, ...), with `retry_after_s` as the header Retry-After and `message` as
      its text (some clients go by it: "maximum context length"); never billed.
    - `drop`: the connection is cut after `after_events` events of a stream, or in the middle of a plain body.
    - `hang`: at that point nothing more comes, until the client goes or the provider stops.
    - `malformed`: at that point the JSON of the event, or of the plain body, is cut in half.
    - `no_usage`: a whole answer that says nothing of usage.

    `after_events` 0 is before the status is sent (None: 0 for `hang`, else 1). All but `refuse` generate `answer`
    (None: the provider's own) and bill it in full, because that is what real providers do; with `billed=False` the call
    is lost before generation. `latency_s` passes before the status (None: the answer's).
    """

    kind: Literal["refuse", "drop", "hang", "malformed", "no_usage"]
    status: int = 429
    retry_after_s: float | None = None
    after_events: int | None = None
    answer: Answer | None = None
    billed: bool = True
    latency_s: float | None = None
    message: str = ""

    def __post_init__(self) -> None:
        if self.kind not in ("refuse", "drop", "hang", "malformed", "no_usage"):
            raise InvalidInput(
                f"Fault {self.kind!r} is not known. Use refuse, drop, hang, malformed or no_usage.", argument="kind"
            )
        if not 400 <= self.status <= 599:
            raise InvalidInput(f"Fault.status must be from 400 to 599, got {self.status!r}.", argument="status")
        if self.after_events is not None and self.after_events < 0:
            raise InvalidInput(
                f"Fault.after_events cannot be negative: {self.after_events!r}.", argument="after_events"
            )
        _check_wait("Fault.retry_after_s", self.retry_after_s)
        _check_wait("Fault.latency_s", self.latency_s)


def _check_wait(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value <= MAX_WAIT_S:
        raise InvalidInput(
            f"{name} must be seconds from 0 to {MAX_WAIT_S:.0f}, got {value!r}.", argument=name, value=value
        )
