"""Overrides: the user's own models and negotiated rates, for all calls or for given tags, from and to given dates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, date, datetime, timedelta
from fractions import Fraction
from types import MappingProxyType

from bursar.errors import InvalidInput, shown
from bursar.money import fraction
from bursar.prices.names import provider_name
from bursar.prices.rates import UNITS, Amount, nanos_per_unit
from bursar.usage import MAX_COUNT

_NOTHING: Mapping[str, str] = MappingProxyType({})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A price that replaces or changes what the price book says. Prices are US dollars, written as text.

    `model`: the name as it is asked for, or `*` for every model; `provider`: any spelling, None for every provider.
    The rates (`*_mtok`: per million tokens; `input_mchars`: per million characters; `*_hour`: per hour of audio;
    `per_*`: each) replace the book's, in every service tier; `discount="15%"` takes that much off everything that the
    override does not name itself. `tools`: fees of the provider's own tools, each. `effective_from` (inclusive) and
    `effective_to` (exclusive) are dates, or instants with a time zone; `match`: tags that a call must carry. Of two
    overrides that name the same rate, the later one in the list holds.
    Raises InvalidInput for what is no price, no date or no percentage.
    """

    model: str
    provider: str | None = None
    input_mtok: str | None = None
    output_mtok: str | None = None
    cache_read_mtok: str | None = None
    cache_write_mtok: str | None = None
    cache_write_1h_mtok: str | None = None
    reasoning_mtok: str | None = None
    input_audio_mtok: str | None = None
    input_image_mtok: str | None = None
    input_video_mtok: str | None = None
    cache_read_audio_mtok: str | None = None
    cache_read_image_mtok: str | None = None
    cache_read_video_mtok: str | None = None
    output_audio_mtok: str | None = None
    output_image_mtok: str | None = None
    per_call: str | None = None
    input_audio_hour: str | None = None
    output_audio_hour: str | None = None
    input_mchars: str | None = None
    per_image: str | None = None
    per_page: str | None = None
    per_search_unit: str | None = None
    discount: str | None = None
    tools: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    effective_from: str | date | datetime | None = None
    effective_to: str | date | datetime | None = None
    match: Mapping[str, str] = field(default_factory=lambda: _NOTHING)
    context_window: int | None = None
    max_output_tokens: int | None = None
    # From when to when the override holds, in microseconds since 1970; made of the dates once, read at every call.
    span_us: tuple[int | None, int | None] = field(init=False, repr=False, compare=False, default=(None, None))

    def __post_init__(self) -> None:
        for unit, amount in self.rates().items():
            nanos_per_unit(unit, amount)
        for tool, amount in self.tools.items():
            nanos_per_unit("per_call", amount)
            if not tool:
                raise InvalidInput(
                    'A tool of an Override needs a name, like tools={"web_search": "0.01"}.', argument="tools"
                )
        self.factor()
        start, end = _instant_us(self.effective_from), _instant_us(self.effective_to)
        object.__setattr__(self, "span_us", (start, end))
        if start is not None and end is not None and start >= end:
            raise InvalidInput(
                f"The override of {self.model!r} ends on {self.effective_to}, before it begins on {self.effective_from}. "
                "Swap the dates.",
                argument="effective_to", value=self.effective_to,
            )  # fmt: skip
        for key in ("context_window", "max_output_tokens"):
            tokens = getattr(self, key)
            if tokens is not None and (type(tokens) is not int or not 1 <= tokens <= MAX_COUNT):
                raise InvalidInput(
                    f"{key} must be a whole number from 1 to 2^48, got {shown(tokens)}. Leave it out where it is not known.",
                    argument=key, value=tokens,
                )  # fmt: skip
        if not self.model:
            raise InvalidInput(
                'An Override needs a model\'s name, or "*" for every model.', argument="model", value=self.model
            )

    def rates(self) -> dict[str, str]:
        """The rates that this override names."""
        return {unit: value for unit in UNITS if (value := getattr(self, unit)) is not None}

    def factor(self) -> Fraction:
        """What is left of a price after the discount: 17/20 for 15%."""
        if self.discount is None:
            return Fraction(1)
        text = self.discount.strip() if isinstance(self.discount, str) else ""
        try:
            part = fraction(text[:-1].strip()) / 100 if text.endswith("%") else Fraction(-1)
        except ValueError:
            part = Fraction(-1)
        if not 0 <= part < 1:
            raise InvalidInput(
                f"discount={shown(self.discount)} is not a percentage from 0% to below 100%. Write it like \"15%\".",
                argument="discount", value=self.discount,
            )  # fmt: skip
        return 1 - part

    def holds(self, at_us: int, tags: Mapping[str, str]) -> bool:
        """Whether the override holds at an instant for a call with these tags."""
        start, end = self.span_us
        inside = (start is None or at_us >= start) and (end is None or at_us < end)
        return inside and all(tags.get(key) == value for key, value in self.match.items())

    def meets(self, provider: str, model: str) -> bool:
        """Whether the override speaks of a model; both names as `places` gives them."""
        same_provider = self.provider is None or provider_name(self.provider) == provider
        return same_provider and self.model.strip().lower() in ("*", model)

    def text(self) -> str:
        """The override as one line, the same for equal overrides: what the price book's version is made of."""
        parts = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return repr(
            {name: dict(value) if isinstance(value, Mapping) else str(value) for name, value in parts.items() if value}
        )


def discounted(amount: Amount, factor: Fraction) -> Amount:
    """An amount of the table with a discount taken off, tier by tier, exact."""
    if isinstance(amount, str):
        return str(Fraction(amount) * factor)
    return [str(Fraction(amount[0]) * factor), *([start, str(Fraction(price) * factor)] for start, price in amount[1:])]


def _instant_us(moment: str | date | datetime | None) -> int | None:
    if moment is None:
        return None
    try:
        value = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
        if not isinstance(value, datetime):
            value = datetime(value.year, value.month, value.day)  # noqa: DTZ001 - made UTC in the next line
        aware = value if value.tzinfo else value.replace(tzinfo=UTC)
        return (aware - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, AttributeError, TypeError):
        raise InvalidInput(
            f'{shown(moment)} is not a date. Write it like "2026-07-01".', argument="effective", value=moment
        ) from None
