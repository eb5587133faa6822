"""The price book: finds the price of any model that any provider's spelling names, at any time, for any tags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction
from hashlib import sha256
from types import MappingProxyType
from typing import Any

from bursar.errors import InvalidInput, UnknownPrice
from bursar.money import NANOS_PER_USD, nanos, round_half_up
from bursar.prices.model import ModelPrice, Price
from bursar.prices.names import places, provider_name
from bursar.prices.override import Override, discounted
from bursar.prices.rates import Amount, Rates
from bursar.prices.table import Row, Table, packaged
from bursar.usage import Usage

_NO_TAGS: Mapping[str, str] = MappingProxyType({})
_SLOT_US = 1_800_000_000  # prices change at half hours at the finest: DeepSeek's peak hours, dates elsewhere
_MAX_CACHED = 4096
# Here the name asked for says more than the name answered: a profile's region decides the price.
_ASKED_FIRST = frozenset({"bedrock"})


class PriceBook:
    """Prices of models, dated, with the user's overrides: immutable, shared between threads, begun by `PriceBook.packaged()`."""

    def __init__(
        self,
        table: Table,
        overrides: tuple[Override, ...] = (),
        ceiling: Override | None = None,
        tools: Mapping[str, int] | None = None,
    ) -> None:
        self.table, self.overrides, self.ceiling = table, overrides, ceiling
        self._tools = dict(tools or {})
        self._tagged = [(number, dict(o.match).items()) for number, o in enumerate(overrides) if o.match]
        self._slots = _SLOT_US if not any(map(_fine, overrides)) else 1
        self._nearest: dict[tuple[str, str], list[str]] = {}
        self._found: dict[tuple[Any, ...], ModelPrice] = {}
        self._built: dict[tuple[Any, ...], ModelPrice] = {}
        self.version = f"{table.date}-{table.digest[:12]}"
        if overrides or ceiling or tools:
            own = "\n".join(
                [*(o.text() for o in overrides), ceiling.text() if ceiling else "", repr(sorted(self._tools.items()))]
            )
            self.version += f"+{sha256(own.encode()).hexdigest()[:12]}"

    @classmethod
    def packaged(cls) -> PriceBook:
        """The prices that come with this version of Bursar; read when first used, then shared by the process."""
        global _packaged
        if _packaged is None:
            _packaged = cls(packaged())
        return _packaged

    def with_overrides(
        self,
        overrides: Iterable[Override] = (),
        ceiling: Override | None = None,
        tools: Mapping[str, str] | None = None,
    ) -> PriceBook:
        """A new book with more overrides. `ceiling`: the rates at which a call to an unknown model is priced instead of refused.

        `tools`: what one call of each of the user's own tools costs, like `{"web_search": "0.002 USD"}`.
        """
        prices = {
            **self._tools,
            **{
                name: nanos(text.removesuffix("USD").strip() if isinstance(text, str) else text)
                for name, text in (tools or {}).items()
            },
        }
        negative = [name for name, price in prices.items() if price < 0]
        if negative:
            raise InvalidInput(
                f"The price of the tool {negative[0]!r} is negative. Write what a call of it costs.", argument="tools"
            )
        return PriceBook(self.table, (*self.overrides, *overrides), ceiling or self.ceiling, prices)

    def tool_price(self, tool: str) -> int | None:
        """What one call of the user's own tool costs, in nano-dollars, or None when no price was given."""
        return self._tools.get(tool)

    def find(self, provider: str, model: str, at_us: int, tags: Mapping[str, str] = _NO_TAGS) -> ModelPrice:
        """The price of a model at an instant (microseconds since 1970), for a call with these tags.

        Raises UnknownPrice, naming the nearest known models, when there is none and the book has no ceiling.
        """
        return self._find(provider, model, None, at_us, tags)

    def cost(
        self, provider: str, model: str | None, usage: Usage, *, at_us: int, tags: Mapping[str, str] = _NO_TAGS
    ) -> Price:
        """What a call cost. The model that answered decides the price where it is known, else the model that was asked for.

        Raises UnknownPrice as `find` does, and for a usage that counts what no rate covers.
        """
        if usage.other_models and usage.stated_cost_nanos is None:
            return self._cost_of_several(provider, model or "", usage, at_us, tags)
        found = self._find(provider, model or "", usage.model, at_us, tags)
        return Price(
            found.cost_nanos(usage), found.provider, found.model, found.effective_from, found.source, self.version
        )

    def _cost_of_several(self, provider: str, model: str, usage: Usage, at_us: int, tags: Mapping[str, str]) -> Price:
        """A call in which other models took part (an advisor, a router): each part at its own model's price, rounded once."""
        parts = [(self._part(provider, part.model or model, part, at_us, tags), part) for part in usage.by_model()]
        total = sum((Fraction(*found.cost_fraction(part)) for found, part in parts), Fraction(0))
        first = next((found for found, _ in parts if found.source), parts[0][0])
        return Price(
            round_half_up(total), first.provider, first.model, first.effective_from, first.source, self.version
        )

    def _part(self, provider: str, model: str, part: Usage, at_us: int, tags: Mapping[str, str]) -> ModelPrice:
        if part.server_tools and not (part.input_tokens or part.output_tokens):
            return self._price(provider_name(provider), model, None, [], at_us)  # tools alone need no model's price
        return self._find(provider, model, part.model, at_us, tags)

    def _find(self, provider: str, asked: str, answered: str | None, at_us: int, tags: Mapping[str, str]) -> ModelPrice:
        meant = tags.items()
        holding = tuple([number for number, wanted in self._tagged if wanted <= meant]) if self._tagged else ()
        key = (provider, asked, answered, at_us // self._slots, holding)
        found = self._found.get(key)
        if found is None:
            found = self._resolve(provider, asked, answered, at_us, tags)
            if len(self._found) >= _MAX_CACHED:
                self._found.clear()
            self._found[key] = found
        return found

    def _resolve(
        self, provider: str, asked: str, answered: str | None, at_us: int, tags: Mapping[str, str]
    ) -> ModelPrice:
        host = provider_name(provider)
        names = [name for name in ((asked, answered) if host in _ASKED_FIRST else (answered, asked)) if name]
        row, spoken = None, set()
        for name in names:
            for place in places(provider, name):
                spoken.add(place)
                found = self.table.row(*place)
                if found is not None:
                    spoken.add((found.provider, found.model.lower()))
                    row = row or found
                    break  # a shorter name would be another model's
        active = [override for override in self.overrides if override.holds(at_us, tags)]
        own = [o for o in active if any(o.meets(host, name) or o.meets(where, name) for where, name in spoken)]
        if row is None and not any(override.rates() for override in own):
            if self.ceiling is None:
                raise self._unknown(host, asked or answered or "")
            own = [self.ceiling]
        return self._price(host, asked or answered or "", row, own, at_us)

    def _price(self, host: str, name: str, row: Row | None, own: list[Override], at_us: int) -> ModelPrice:
        since, standard, tiers = row.period(at_us) if row else (None, None, {})
        key = (
            (row.provider, row.model, since, standard, *tiers.items(), *map(id, own))
            if row
            else (host, name, *map(id, own))
        )
        built = self._built.get(key)
        if built is not None:
            return built

        def build(tier: str, region: str | None) -> Rates:
            amounts: dict[str, Amount] = {}
            if standard is not None:  # a tier names only what differs
                amounts = {**self.table.rates[standard], **self.table.rates[tiers.get(tier, standard)]}
            fees = {tool: _fee(raw) for tool, raw in (row.tools if row else self.table.fees.get(host, {})).items()}
            for override in own:
                off = override.factor()
                amounts = {**{unit: discounted(amount, off) for unit, amount in amounts.items()}, **override.rates()}
                fees = {tool: fee * off for tool, fee in fees.items()}
                fees |= {tool: _fee(price) for tool, price in override.tools.items()}
            return Rates(amounts, fees, _uplift(row, region))

        limits = {name: next((v for o in reversed(own) if (v := getattr(o, name))), None) for name in _LIMITS}
        built = ModelPrice(
            row.provider if row else host,
            row.model if row else name,
            effective_from=since,
            source=("ceiling" if own[0] is self.ceiling else "override") if own else row.source if row else "",
            mode=row.mode if row else "chat",
            context_window=limits["context_window"] or (row.context_window if row else None),
            max_output_tokens=limits["max_output_tokens"] or (row.max_output_tokens if row else None),
            tiers=tuple(tiers),
            build=build,
        )
        if len(self._built) >= _MAX_CACHED:
            self._built.clear()
        self._built[key] = built
        return built

    def _unknown(self, host: str, name: str) -> UnknownPrice:
        key = (host, name)
        if key not in self._nearest:
            if len(self._nearest) >= _MAX_CACHED:
                self._nearest.clear()
            self._nearest[key] = _nearest(name, self.table.models(host)) or _nearest(host, self.table.providers)
        nearest = self._nearest[key]
        near = f" The nearest known: {', '.join(nearest)}." if nearest else ""
        return UnknownPrice(
            f"No price is known of {host}/{name}.{near} Add one: "
            f'Override(provider={host!r}, model={name!r}, input_mtok="...", output_mtok="..."), or set a ceiling.',
            provider=host,
            model=name,
            nearest=nearest,
        )


_LIMITS = ("context_window", "max_output_tokens")
_packaged: PriceBook | None = None


def _nearest(name: str, known: list[str]) -> list[str]:
    """Up to three known names, those with the longest common beginning first."""
    from difflib import get_close_matches  # loads when a name is unknown

    plain = name.lower()
    close = get_close_matches(plain, known, n=12, cutoff=0.4)
    return sorted(close, key=lambda model: -_shared_beginning(plain, model.lower()))[:3]


def _shared_beginning(one: str, other: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _fee(dollars: str) -> Fraction:
    return Fraction(dollars) * NANOS_PER_USD


def _uplift(row: Row | None, region: str | None) -> Fraction:
    """What a region adds: its own factor, or the one for any region that is not the global one."""
    if row is None or not row.uplift or region is None:
        return Fraction(1)
    plain = region.lower()
    if plain in row.uplift:
        return Fraction(row.uplift[plain])
    return Fraction(row.uplift.get("regional", "1") if plain not in ("global", "not_available") else "1")


def _fine(override: Override) -> bool:
    """Whether an override begins or ends between two half hours, so that no two instants may share an answer."""
    return any(edge is not None and edge % _SLOT_US for edge in override.span_us)
