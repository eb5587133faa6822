"""The packaged table of prices: its rows, their dates, and the index of names."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

DAY_US = 86_400_000_000
_EPOCH = date(1970, 1, 1)


def day_number(day: str) -> int:
    """Days since 1970 of an ISO date."""
    return (date.fromisoformat(day) - _EPOCH) // timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Row:
    """One model of one provider, as the table holds it.

    `prices`: periods in the order of their dates, each `[from, rates, {tier: rates}, [[from minute, to minute, rates, {tier:
    rates}], ...]]`, where rates are indices into `Table.rates` and the minutes are those of the day, in UTC.
    """

    provider: str
    model: str
    prices: list[list[Any]]
    names: tuple[str, ...]
    mode: str
    source: str
    context_window: int | None
    max_output_tokens: int | None
    uplift: dict[str, str]
    tools: dict[str, str]

    def period(self, at_us: int) -> tuple[str | None, int, dict[str, int]]:
        """What holds at an instant: (since which date, rates, rates per tier). Before the first date the first period holds."""
        day, since_midnight_us = divmod(at_us, DAY_US)
        chosen = self.prices[0]
        for period in self.prices[1:]:
            if day >= day_number(period[0]):
                chosen = period
        minute = since_midnight_us // 60_000_000
        for start, end, rates, tiers in chosen[3] if len(chosen) > 3 else ():
            if start <= minute < end or (end < start and not end <= minute < start):
                return chosen[0], rates, tiers
        return chosen[0], chosen[1], chosen[2] if len(chosen) > 2 else {}


class Table:
    """All rows. Names are indexed per provider when a provider is first asked for."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.date: str = data["date"]
        self.digest: str = data["digest"]
        self.sources: list[dict[str, str]] = data["sources"]
        self.rates: list[dict[str, Any]] = data["rates"]
        self.fees: dict[str, dict[str, str]] = data["fees"]
        self._providers: dict[str, dict[str, dict[str, Any]]] = data["providers"]
        self._names: dict[str, dict[str, str]] = {}

    @property
    def providers(self) -> list[str]:
        """The names of all providers that have rows."""
        return sorted(self._providers)

    def models(self, provider: str) -> list[str]:
        """The models of a provider, by the table's own names."""
        return list(self._providers.get(provider, ()))

    def row(self, provider: str, name: str) -> Row | None:
        """The row that holds exactly this name (lower case), or None."""
        model = self._index(provider).get(name)
        if model is None:
            return None
        raw = self._providers[provider][model]
        return Row(
            provider=provider,
            model=model,
            prices=raw["prices"],
            names=tuple(raw.get("names", ())),
            mode=raw.get("mode", "chat"),
            source=self.sources[raw["source"]]["name"],
            context_window=raw.get("context"),
            max_output_tokens=raw.get("output"),
            uplift=raw.get("uplift", {}),
            tools={**self.fees.get(provider, {}), **raw.get("tools", {})},
        )

    def _index(self, provider: str) -> dict[str, str]:
        index = self._names.get(provider)
        if index is None:
            rows = self._providers.get(provider, {})
            index = {name: model for model, raw in rows.items() for name in raw.get("names", ())}
            index.update((model.lower(), model) for model in rows)  # a model's own name wins over another's alias
            self._names[provider] = index
        return index


@lru_cache(maxsize=1)
def packaged() -> Table:
    """The table that comes with Bursar, read once per process."""
    return Table(json.loads(Path(__file__).with_name("table.json").read_bytes()))
