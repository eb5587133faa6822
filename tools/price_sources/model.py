"""The form that every price source is read into: models with names, limits, and dated rates in US dollars per natural unit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

Rates = dict[str, Any]  # unit -> "1.25" or ["1.25", [200000, "2.5"], ...]


@dataclass
class Period:
    """Rates that hold from a date on: the standard ones, those of other tiers, and those of hours of the day."""

    start: str | None
    rates: Rates
    tiers: dict[str, Rates] = field(default_factory=dict)
    hours: list[tuple[int, int, Rates, dict[str, Rates]]] = field(default_factory=list)


@dataclass
class Model:
    """One model of one provider."""

    provider: str
    id: str
    source: int
    names: set[str] = field(default_factory=set)
    context: int | None = None
    output: int | None = None
    mode: str = "chat"
    periods: list[Period] = field(default_factory=list)
    uplift: dict[str, str] = field(default_factory=dict)
    tools: dict[str, Any] = field(default_factory=dict)
    free: bool = False

    def latest(self) -> Rates:
        return self.periods[-1].rates

    def fill_limits(self, other: Model) -> None:
        self.context = self.context or other.context
        self.output = self.output or other.output
        self.uplift = self.uplift or other.uplift
        self.tools = {**other.tools, **self.tools}
        if other.mode != "chat":
            self.mode = other.mode

    def fill(self, other: Model) -> None:
        """Take the figures that only the other has, into the newest period: no source says since when they held."""
        self.fill_limits(other)
        mine, theirs = self.periods[-1], other.periods[-1]
        both_tiered = any(isinstance(v, list) for v in mine.rates.values()) == any(
            isinstance(v, list) for v in theirs.rates.values()
        )
        for unit, amount in theirs.rates.items():
            if both_tiered or isinstance(amount, str):
                mine.rates.setdefault(unit, amount)
        for tier, rates in theirs.tiers.items():
            mine.tiers.setdefault(tier, rates)

    def complete(self) -> None:
        """Rules that a provider states once for all its models, and tiers that only half a price is known of."""
        if (
            self.provider in ("google", "vertex")
            and "gemini" in self.id
            and (fee := self.tools.pop("web_search", None))
        ):
            # Google Search grounding: $35 per 1,000 prompts up to Gemini 2.5, $14 per 1,000 queries from Gemini 3 on.
            by_prompt = Decimal(fee) > Decimal("0.02")
            self.tools |= {"grounding": fee if by_prompt else "0", "grounding_queries": "0" if by_prompt else fee}
        for period in self.periods:
            whole = {unit for unit in ("input_mtok", "output_mtok") if unit in period.rates}
            period.tiers = {tier: rates for tier, rates in period.tiers.items() if whole <= rates.keys()}
            for rates in (period.rates, *period.tiers.values(), *(hour[2] for hour in period.hours)):
                write = rates.get("cache_write_mtok")
                if (
                    "claude" in self.id
                    and "cache_write_1h_mtok" not in rates
                    and write is not None
                    and "input_mtok" in rates
                ):
                    # Anthropic: writes kept an hour cost twice the input (platform.claude.com, prompt caching, pricing).
                    rates["cache_write_1h_mtok"] = _each(rates["input_mtok"], lambda price: text(Decimal(price) * 2))
                if (
                    self.provider == "mistral"
                    and "input_mtok" in rates
                    and "cache_read_mtok" not in rates
                    and self.mode == "chat"
                ):
                    # Mistral: cached prompt tokens cost 10 % of the input (docs.mistral.ai, prompt caching).
                    rates["cache_read_mtok"] = _each(rates["input_mtok"], lambda price: text(Decimal(price) / 10))

                for unit, whole_unit in _INSIDE.items():
                    if rates.get(unit) is not None and rates[unit] == rates.get(whole_unit):
                        del rates[unit]  # a part is billed as its whole anyway, in every tier

    def priced(self) -> bool:
        """Whether there is a price: a row of zeros is none, unless the model is known to be free."""
        if self.free:
            for period in self.periods:
                period.rates = period.rates or {"input_mtok": "0", "output_mtok": "0"}
        else:
            self.periods = [p for p in self.periods if any(_dear(amount) for amount in p.rates.values())]
        return bool(self.periods)

    def as_json(self, intern: Callable[[Rates], int]) -> dict[str, Any]:
        prices = []
        for period in self.periods:
            tiers = {tier: intern(rates) for tier, rates in sorted(period.tiers.items())}
            hours = [
                [a, b, intern(rates), {t: intern(r) for t, r in sorted(more.items())}]
                for a, b, rates, more in period.hours
            ]
            prices.append(
                [period.start, intern(period.rates), *([tiers] if tiers or hours else []), *([hours] if hours else [])]
            )
        row: dict[str, Any] = {"prices": prices, "source": self.source}
        names = sorted(self.names - {self.id.lower()})
        extra = {
            "names": names,
            "context": self.context,
            "output": self.output,
            "uplift": self.uplift,
            "tools": self.tools,
        }
        row.update({key: value for key, value in extra.items() if value})
        if self.mode != "chat":
            row["mode"] = self.mode
        return row


_INSIDE = {
    "reasoning_mtok": "output_mtok", "output_audio_mtok": "output_mtok", "output_image_mtok": "output_mtok",
    "cache_read_audio_mtok": "cache_read_mtok", "cache_read_image_mtok": "cache_read_mtok",
    "input_audio_mtok": "input_mtok", "input_image_mtok": "input_mtok", "input_video_mtok": "input_mtok",
}  # fmt: skip


def _dear(amount: Any) -> bool:
    return Decimal(amount if isinstance(amount, str) else amount[0]) > 0


def _each(amount: Any, change: Callable[[str], str]) -> Any:
    return (
        change(amount)
        if isinstance(amount, str)
        else [change(amount[0]), *([start, change(price)] for start, price in amount[1:])]
    )


def text(value: Decimal) -> str:
    return format(value.normalize(), "f")
