"""The price of one model at one time: what a call cost, the most it can cost, and how much output a sum pays for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import NamedTuple

from bursar.errors import UnknownPrice
from bursar.prices.rates import Level, Rates
from bursar.usage import MAX_COUNT, Usage

_UNLIMITED_TOKENS = 2**31 - 1


class Price(NamedTuple):
    """One call priced: what it cost, and by which row of which version of the price book."""

    cost_nanos: int
    provider: str
    model: str
    effective_from: str | None
    source: str
    version: str


class ModelPrice:
    """The price of one model at one time. Get it from `PriceBook.find`.

    `provider`, `model`: the row of the price book; `effective_from`: the date since which these rates hold (ISO text, or None
    when they are the first known); `source`: where the figures come from; `context_window`, `max_output_tokens`: the model's
    limits, or None where no source states them; `mode`: `chat`, `embedding`, ...
    """

    __slots__ = (
        "_build", "_rates", "_standard", "context_window", "effective_from", "max_output_tokens", "mode", "model", "provider",
        "source", "tiers",
    )  # fmt: skip

    def __init__(
        self,
        provider: str,
        model: str,
        *,
        effective_from: str | None,
        source: str,
        mode: str,
        context_window: int | None,
        max_output_tokens: int | None,
        tiers: tuple[str, ...],
        build: Callable[[str, str | None], Rates],
    ) -> None:
        self.provider, self.model, self.effective_from, self.source, self.mode = (
            provider,
            model,
            effective_from,
            source,
            mode,
        )
        self.context_window, self.max_output_tokens = context_window, max_output_tokens
        self.tiers = tiers
        self._build = build
        self._rates: dict[tuple[str | None, bool, str | None], Rates] = {}
        self._standard = build("standard", None)

    def __repr__(self) -> str:
        return f"ModelPrice({self.provider}/{self.model}, from {self.effective_from}, {self.source})"

    def cost_nanos(self, usage: Usage) -> int:
        """What the call cost, in nano-dollars, rounded half up once. A bill that the provider states is believed.

        Raises UnknownPrice when the usage holds something that the price book has no price for: it is never taken for 0 (I11).
        """
        if usage.stated_cost_nanos is not None:
            return usage.stated_cost_nanos
        total, scale = self.cost_fraction(usage)
        return (2 * total + scale) // (2 * scale)  # half up: the total is never negative

    def tokens_nanos(
        self, input_tokens: int, output_tokens: int, service_tier: str | None = None, region: str | None = None
    ) -> int:
        """`cost_nanos` of a usage that counts nothing but these, without making it."""
        rates = self._tier(service_tier, region)
        level = rates.plain or rates.level(input_tokens)
        total = input_tokens * level.coefficients[0] + output_tokens * level.coefficients[1]
        if total <= 0 or level.beside or rates.gaps or input_tokens + output_tokens > MAX_COUNT:
            usage = Usage(
                input_tokens=input_tokens, output_tokens=output_tokens, service_tier=service_tier, region=region
            )
            return self.cost_nanos(usage)
        return (2 * total + level.scale) // (2 * level.scale)

    def cost_fraction(self, usage: Usage) -> tuple[int, int]:
        """The exact cost of what is counted, as (numerator, denominator) in nano-dollars, whatever bill the provider states."""
        if usage.service_tier is None and usage.region is None and not usage.batch:
            rates = self._standard
        else:
            rates = self.rates(usage.service_tier, batch=usage.batch, region=usage.region)
        total, scale = rates.fraction(usage)
        if rates.gaps and any(getattr(usage, count) for count in rates.gaps):
            raise self._uncovered(rates, rates.gaps)
        if usage.server_tools:
            try:
                cost = Fraction(total, scale) + rates.fee_nanos(usage)
            except KeyError as missing:
                raise UnknownPrice(
                    f"No price is known for the tool {missing} of {self.provider}. "
                    f"Add one: Override(provider={self.provider!r}, model={self.model!r}, tools={{{missing}: \"0.01\"}}).",
                    provider=self.provider, model=self.model, nearest=[],
                ) from None  # fmt: skip
            total, scale = cost.numerator, cost.denominator
        if not total and not rates.free and not usage.server_tools and _counts_anything(usage):
            raise self._uncovered(rates, ())
        return total, scale

    def _uncovered(self, rates: Rates, counts: tuple[str, ...]) -> UnknownPrice:
        what = f"has no rate for {' and '.join(counts)}" if counts else "covers nothing that the usage counts"
        return UnknownPrice(
            f"The price of {self.provider}/{self.model} is by {', '.join(rates.text)}, and {what}. Add an Override with that rate.",
            provider=self.provider, model=self.model, nearest=[],
        )  # fmt: skip

    def bound_nanos(
        self,
        input_tokens: int,
        output_tokens: int,
        *,
        cache_writes: bool = True,
        media: bool = False,
        service_tier: str | None = None,
        region: str | None = None,
    ) -> int:
        """The most that any split of these totals can cost, in nano-dollars: the dearest kind of input and of output.

        `cache_writes=False` where the request writes no cache; `media=True` where it holds audio, images or video. Rounded up.
        """
        rates = self._tier(service_tier, region)
        most = Fraction(0)
        for level in _reached(rates, input_tokens):
            token = max(
                level.dearest_write if cache_writes else level.dearest_input, level.dearest_media if media else 0
            )
            most = max(
                most,
                Fraction(input_tokens * token + output_tokens * level.dearest_output + level.per_call, level.scale),
            )
        return -(-most.numerator // most.denominator)

    def fit_output_tokens(
        self,
        headroom_nanos: int,
        input_cost_nanos: int,
        *,
        input_tokens: int | None = None,
        service_tier: str | None = None,
        region: str | None = None,
    ) -> int:
        """The largest output whose cost fits into the headroom beside the input's cost; 0 when none does.

        Without `input_tokens` the dearest context tier counts. Never more than the model's own maximum.
        """
        rates = self._tier(service_tier, region)
        left = headroom_nanos - input_cost_nanos
        most = self.max_output_tokens if self.max_output_tokens is not None else _UNLIMITED_TOKENS
        if left < 0:
            return 0
        for level in _reached(rates, input_tokens):
            if level.dearest_output:
                most = min(most, left * level.scale // level.dearest_output)
        return most

    def tool_fee_nanos(self, tool: str) -> int | None:
        """What one use of a server-side tool costs beside its tokens, rounded up, or None when no price is known."""
        fee = self._standard.fees.get(tool)
        return None if fee is None else -(-fee.numerator // fee.denominator)

    def dearest_tool_nanos(self, tools: Iterable[str]) -> int:
        """The most that one use of any of these server-side tools costs, named as requests name them (`web_search_20250305`).

        A tool that no fee's name begins counts as the dearest of all. Rounded up.
        """
        most = Fraction(0)
        for tool in tools:
            named = [fee for name, fee in self._standard.fees.items() if tool.startswith(name.split("/")[0])]
            most = max([most, *(named or self._standard.fees.values())])
        return -(-most.numerator // most.denominator)

    def rates(self, service_tier: str | None = None, *, batch: bool = False, region: str | None = None) -> Rates:
        """The rates of a service tier and region. A tier that the provider has no price for is served at its standard rates."""
        key = (service_tier, batch, region)
        found = self._rates.get(key)
        if found is None:
            tier = "batch" if batch else (service_tier or "standard").lower()
            found = self._build(tier if tier in self.tiers else "standard", region.lower() if region else None)
            if len(self._rates) < 64:  # providers have a handful of tiers and regions; a hostile answer may invent more
                self._rates[key] = found
        return found

    def _tier(self, service_tier: str | None, region: str | None) -> Rates:
        return self._standard if service_tier is None and region is None else self.rates(service_tier, region=region)


def _reached(rates: Rates, input_tokens: int | None) -> list[Level]:
    return [level for level in rates.levels if level.start == 0 or input_tokens is None or input_tokens > level.start]


def _counts_anything(usage: Usage) -> bool:
    return any(value for name, value in usage.as_dict().items() if name != "requests" and type(value) is int)
