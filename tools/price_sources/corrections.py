"""Reads tools/corrections.toml and lays it over the models: figures, each with its reason and source."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bursar.prices.rates import UNITS
from price_sources.model import Model, Period


@dataclass
class Corrections:
    """The rows of tools/corrections.toml, each with its figure, reason and source."""

    date: str
    rows: list[dict[str, Any]]
    fees: dict[str, dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> Corrections:
        data = tomllib.loads(path.read_text())
        rows = [*data.get("price", ()), *data.get("same_as", ()), *data.get("tool", ())]
        for row in rows:
            missing = {"provider", "reason", "source"} - row.keys()
            if missing:
                raise SystemExit(f"{path}: a row lacks {', '.join(sorted(missing))}: {row}")
        fees: dict[str, dict[str, Any]] = {}
        for row in data.get("tool", ()):
            if "model" not in row:
                fees.setdefault(row["provider"], {})[row["tool"]] = row["usd"]
        return cls(data["date"], rows, fees)

    def apply(self, models: dict[tuple[str, str], Model], source: int) -> None:
        """Put the rows into the models: a price from a date on, the prices of another model from a date on, a model's tool fee."""
        for row in self.rows:
            if "tool" in row:
                if "model" in row:
                    self._tool(models, row)
                continue
            key = (row["provider"], row["model"])
            model = models.setdefault(key, Model(*key, source, mode=row.get("mode", "chat")))
            model.source = source
            model.names |= {name.lower() for name in row.get("names", ())}
            model.context, model.output = row.get("context", model.context), row.get("output", model.output)
            model.free = model.free or row.get("free", False)
            if "like" in row:
                self._same_as(models, model, row)
                continue
            rates = {unit: amount for unit, amount in row.items() if unit in UNITS}
            if row.get("patch"):
                for period in model.periods:
                    period.rates.update(rates)
                continue
            start = row.get("from")
            kept = [p for p in model.periods if start is not None and (p.start is None or p.start < start)]
            later = [p for p in model.periods if row.get("until") and p.start is not None and p.start >= row["until"]]
            model.periods = [*kept, Period(start, rates), *later]

    def _same_as(self, models: dict[tuple[str, str], Model], model: Model, row: dict[str, Any]) -> None:
        other = models[row["provider"], row["like"]]
        start = row.get("from")
        kept = [p for p in model.periods if start is not None and (p.start is None or p.start < start)]
        at_start = [p for p in other.periods if p.start is None or start is None or p.start <= start][-1]
        later = [p for p in other.periods if start is not None and p.start is not None and p.start > start]
        model.periods = [*kept, Period(start, at_start.rates, at_start.tiers, at_start.hours), *later]
        model.context, model.output = other.context, other.output

    def _tool(self, models: dict[tuple[str, str], Model], row: dict[str, Any]) -> None:
        pattern = re.compile(row["model"])
        hits = [m for m in models.values() if m.provider == row["provider"] and pattern.search(m.id)]
        if not hits:
            raise SystemExit(f"No model of {row['provider']} matches {row['model']!r} in a correction.")
        for model in hits:
            model.tools[row["tool"]] = row["usd"]
