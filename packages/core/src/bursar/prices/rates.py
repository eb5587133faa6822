"""Rates: what one unit of each kind costs, exact, and the arithmetic that turns counts into nano-dollars."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from operator import attrgetter, mul
from typing import Any

from bursar.errors import InvalidInput, shown
from bursar.money import NANOS_PER_USD, fraction
from bursar.usage import Usage

# A rate's name -> how many of the counted unit its price is for. Prices are US dollars.
UNITS: dict[str, int] = {
    "input_mtok": 10**6,
    "output_mtok": 10**6,
    "cache_read_mtok": 10**6,
    "cache_write_mtok": 10**6,  # kept 5 minutes, or as long as the provider chooses
    "cache_write_1h_mtok": 10**6,
    "reasoning_mtok": 10**6,
    "input_audio_mtok": 10**6,
    "input_image_mtok": 10**6,
    "input_video_mtok": 10**6,
    "cache_read_audio_mtok": 10**6,
    "cache_read_image_mtok": 10**6,
    "cache_read_video_mtok": 10**6,
    "output_audio_mtok": 10**6,
    "output_image_mtok": 10**6,
    "per_call": 1,
    "input_audio_hour": 3_600_000,  # counted in milliseconds
    "output_audio_hour": 3_600_000,
    "input_mchars": 10**6,
    "per_image": 1,
    "per_page": 1,
    "per_search_unit": 1,
}

# The counts of a Usage, in the order of the coefficients below: tokens, then what is counted beside them.
_tokens = attrgetter(
    "input_tokens", "output_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens",
    "reasoning_tokens", "input_audio_tokens", "input_image_tokens", "input_video_tokens",
    "cache_read_audio_tokens", "cache_read_image_tokens", "cache_read_video_tokens",
    "output_audio_tokens", "output_image_tokens",
)  # fmt: skip
_beside = attrgetter(
    "requests", "input_audio_ms", "output_audio_ms", "input_characters", "images", "pages", "search_units"
)

_BESIDE_TOKENS = tuple(UNITS)[14:]
_COUNTED = {"input_mtok": "input_tokens", "output_mtok": "output_tokens"}
_SIDES = {
    "input_mtok": ("input_mtok", "input_audio_mtok", "input_image_mtok", "input_video_mtok"),
    "output_mtok": ("output_mtok", "output_audio_mtok", "output_image_mtok", "reasoning_mtok"),
}
_OTHERWISE = frozenset(_BESIDE_TOKENS)  # a model priced by these may leave tokens unpriced

Amount = (
    str | list[Any]
)  # "1.25", or with context tiers ["1.25", [200000, "2.50"], ...]: from more than that many input tokens on


@dataclass(frozen=True, slots=True)
class Level:
    """The rates of one context tier, as coefficients of the counts: cost in nano-dollars = sum(count x coefficient) / scale."""

    start: int
    scale: int
    coefficients: tuple[int, ...]
    beside: tuple[int, ...]  # empty where nothing but tokens is billed
    dearest_input: int
    dearest_write: int
    dearest_media: int
    dearest_output: int
    per_call: int


class Rates:
    """One set of rates, ready to compute: a Level per context tier, and the fees of server-side tools in nano-dollars."""

    __slots__ = ("fees", "free", "gaps", "levels", "plain", "text")

    def __init__(
        self, amounts: Mapping[str, Amount], fees: Mapping[str, Fraction], factor: Fraction = Fraction(1)
    ) -> None:
        self.text = dict(amounts)
        self.fees = dict(fees)
        starts = sorted(
            {0, *(tier[0] for amount in amounts.values() if isinstance(amount, list) for tier in amount[1:])}
        )
        self.levels = tuple(_level(start, amounts, factor) for start in starts)
        self.plain = self.levels[0] if len(self.levels) == 1 else None
        # Priced by the token on one side only: tokens of the other side would be counted at nothing, which is never meant.
        sides = [unit for unit in ("input_mtok", "output_mtok") if not any(name in amounts for name in _SIDES[unit])]
        self.gaps = (
            tuple(_COUNTED[unit] for unit in sides) if len(sides) == 1 and not _OTHERWISE & amounts.keys() else ()
        )
        self.free = bool(amounts) and not any(any(level.coefficients) or level.beside for level in self.levels)

    def level(self, input_tokens: int) -> Level:
        """The tier of a whole request: providers bill every token of it at the rate of the tier that its input reaches."""
        chosen = self.levels[0]
        for level in self.levels[1:]:
            if input_tokens > level.start:
                chosen = level
        return chosen

    def fraction(self, usage: Usage) -> tuple[int, int]:
        """The exact cost in nano-dollars, as (numerator, denominator), without the fees of tools."""
        counts = _tokens(usage)
        level = self.plain or self.level(counts[0])
        if any(counts[2:]):
            if counts[2] + counts[3] + counts[4] > counts[0] or counts[5] + counts[12] + counts[13] > counts[1]:
                counts = _consistent(counts)
            total = sum(map(mul, counts, level.coefficients))
        else:  # text without a cache: two products
            total = counts[0] * level.coefficients[0] + counts[1] * level.coefficients[1]
        if level.beside:
            total += sum(map(mul, _beside(usage), level.beside))
        return max(total, 0), level.scale

    def fee_nanos(self, usage: Usage) -> Fraction:
        """The fees of the server-side tools that the usage counts. Raises KeyError with the tool's name when one has no price."""
        total = Fraction(0)
        for tool, count in usage.server_tools.items():
            if count:
                total += self.fees[tool] * count
        return total


def _consistent(counts: tuple[int, ...]) -> tuple[int, ...]:
    """Counts whose parts fit into their totals, so that no token is billed below nothing.

    A report in which cache reads and writes together exceed the input (OpenRouter for Gemini) counts the same tokens twice, and
    they are billed twice: as read, and as stored. Output parts above the total are cut, the reasoning first.
    """
    tokens_in, tokens_out, read, write_5m, write_1h, reasoning = counts[:6]
    media_out = counts[12] + counts[13]
    if read + write_5m + write_1h > tokens_in:
        tokens_in = max(tokens_in, read) + write_5m + write_1h
    tokens_out = max(tokens_out, media_out)
    reasoning = min(reasoning, tokens_out - media_out)
    return (tokens_in, tokens_out, read, write_5m, write_1h, reasoning, *counts[6:])


def _level(start: int, amounts: Mapping[str, Amount], factor: Fraction) -> Level:
    rate = {unit: nanos_per_unit(unit, _at(amount, start)) * factor for unit, amount in amounts.items()}
    zero = Fraction(0)
    text_in, text_out = rate.get("input_mtok", zero), rate.get("output_mtok", zero)
    # Where a provider names no rate of its own for a part, the part is billed as the whole that holds it.
    read = rate.get("cache_read_mtok", text_in)
    write_5m = rate.get("cache_write_mtok", text_in)
    write_1h = rate.get("cache_write_1h_mtok", max(write_5m, text_in))
    media_in = [rate.get(f"input_{medium}_mtok", text_in) for medium in ("audio", "image", "video")]
    media_read = [rate.get(f"cache_read_{medium}_mtok", read) for medium in ("audio", "image", "video")]
    audio_out, image_out = rate.get("output_audio_mtok", text_out), rate.get("output_image_mtok", text_out)
    reasoning = rate.get("reasoning_mtok", text_out)
    parts = [
        text_in, text_out,
        # a part's coefficient is what it costs beyond the total that it is counted in
        read - text_in, write_5m - text_in, write_1h - text_in, reasoning - text_out,
        *(medium - text_in for medium in media_in),
        # counted as read and as its medium: both surcharges are taken back, and its own rate put in their place
        *(own - read - medium + text_in for own, medium in zip(media_read, media_in, strict=True)),
        audio_out - text_out, image_out - text_out,
        *(rate.get(unit, zero) for unit in _BESIDE_TOKENS),
    ]  # fmt: skip
    scale = lcm(*(part.denominator for part in parts), text_in.denominator)
    exact = [int(part * scale) for part in parts]
    return Level(
        start=start,
        scale=scale,
        coefficients=tuple(exact[:14]),
        beside=tuple(exact[14:]) if any(exact[14:]) else (),
        dearest_input=int(max(text_in, read) * scale),
        dearest_write=int(max(text_in, read, write_5m, write_1h) * scale),
        dearest_media=int(max(text_in, *media_in, *media_read) * scale),
        dearest_output=int(max(text_out, reasoning, audio_out, image_out) * scale),
        per_call=int(rate.get("per_call", zero) * scale),
    )


def _at(amount: Amount, start: int) -> str:
    if isinstance(amount, str):
        return amount
    price: str = amount[0]
    for tier_start, tier_price in amount[1:]:
        if tier_start <= start:
            price = tier_price
    return price


def nanos_per_unit(unit: str, amount: object) -> Fraction:
    """A price in US dollars as exact nano-dollars per counted unit. Raises InvalidInput for what is not a price."""
    try:
        value = fraction(amount) if isinstance(amount, str) else Fraction(-1)
    except ValueError:
        value = Fraction(-1)
    if not 0 <= value <= 10**9:
        raise InvalidInput(
            f'{unit}={shown(amount)} is not a price in US dollars. Write it as a text, like "1.25".',
            argument=unit,
            value=amount,
        )
    return value * NANOS_PER_USD / UNITS[unit]
