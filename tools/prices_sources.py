"""Reads the price sources into one form: models with names, limits, and dated rates in US dollars per natural unit."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bursar.prices.names import provider_name
from bursar.prices.rates import UNITS

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
        both_tiered = any(isinstance(v, list) for v in mine.rates.values()) == any(isinstance(v, list) for v in theirs.rates.values())
        for unit, amount in theirs.rates.items():
            if both_tiered or isinstance(amount, str):
                mine.rates.setdefault(unit, amount)
        for tier, rates in theirs.tiers.items():
            mine.tiers.setdefault(tier, rates)

    def complete(self) -> None:
        """Rules that a provider states once for all its models, and tiers that only half a price is known of."""
        if self.provider in ("google", "vertex") and "gemini" in self.id and (fee := self.tools.pop("web_search", None)):
            # Google Search grounding: $35 per 1,000 prompts up to Gemini 2.5, $14 per 1,000 queries from Gemini 3 on.
            by_prompt = Decimal(fee) > Decimal("0.02")
            self.tools |= {"grounding": fee if by_prompt else "0", "grounding_queries": "0" if by_prompt else fee}
        for period in self.periods:
            whole = {unit for unit in ("input_mtok", "output_mtok") if unit in period.rates}
            period.tiers = {tier: rates for tier, rates in period.tiers.items() if whole <= rates.keys()}
            for rates in (period.rates, *period.tiers.values(), *(hour[2] for hour in period.hours)):
                write = rates.get("cache_write_mtok")
                if "claude" in self.id and "cache_write_1h_mtok" not in rates and write is not None and "input_mtok" in rates:
                    # Anthropic: writes kept an hour cost twice the input (platform.claude.com, prompt caching, pricing).
                    rates["cache_write_1h_mtok"] = _each(rates["input_mtok"], lambda price: _text(Decimal(price) * 2))
                if self.provider == "mistral" and "input_mtok" in rates and "cache_read_mtok" not in rates and self.mode == "chat":
                    # Mistral: cached prompt tokens cost 10 % of the input (docs.mistral.ai, prompt caching).
                    rates["cache_read_mtok"] = _each(rates["input_mtok"], lambda price: _text(Decimal(price) / 10))

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
            hours = [[a, b, intern(rates), {t: intern(r) for t, r in sorted(more.items())}] for a, b, rates, more in period.hours]
            prices.append([period.start, intern(period.rates), *([tiers] if tiers or hours else []), *([hours] if hours else [])])
        row: dict[str, Any] = {"prices": prices, "source": self.source}
        names = sorted(self.names - {self.id.lower()})
        extra = {"names": names, "context": self.context, "output": self.output, "uplift": self.uplift, "tools": self.tools}
        row.update({key: value for key, value in extra.items() if value})
        if self.mode != "chat":
            row["mode"] = self.mode
        return row


def _dear(amount: Any) -> bool:
    return Decimal(amount if isinstance(amount, str) else amount[0]) > 0


def _each(amount: Any, change: Callable[[str], str]) -> Any:
    return change(amount) if isinstance(amount, str) else [change(amount[0]), *([start, change(price)] for start, price in amount[1:])]


def _text(value: Decimal) -> str:
    return format(value.normalize(), "f")


# --- genai-prices -------------------------------------------------------------------------------------------------

_GENAI_UNITS = {
    "input_mtok": ("input_mtok", 1), "output_mtok": ("output_mtok", 1), "cache_read_mtok": ("cache_read_mtok", 1),
    "cache_write_mtok": ("cache_write_mtok", 1), "cache_write_1h_mtok": ("cache_write_1h_mtok", 1),
    "output_reasoning_mtok": ("reasoning_mtok", 1), "input_audio_mtok": ("input_audio_mtok", 1),
    "input_image_mtok": ("input_image_mtok", 1), "input_video_mtok": ("input_video_mtok", 1),
    "cache_audio_read_mtok": ("cache_read_audio_mtok", 1), "cache_image_read_mtok": ("cache_read_image_mtok", 1),
    "output_audio_mtok": ("output_audio_mtok", 1), "output_image_mtok": ("output_image_mtok", 1),
    "audio_hours": ("input_audio_hour", 1), "input_audio_hours": ("input_audio_hour", 1),
    "output_audio_hours": ("output_audio_hour", 1), "input_mchars": ("input_mchars", 1),
    "requests_kcount": ("per_call", 1000), "input_document_kpages": ("per_page", 1000),
    "rerank_searches_kcount": ("per_search_unit", 1000),
}  # fmt: skip
_GENAI_TOOLS = {
    "web_searches_kcount": "web_search", "social_searches_kcount": "x_search", "storage_searches_kcount": "file_search",
    "code_executions_kcount": "code_execution",
}  # fmt: skip
_FREE_NAME = re.compile(r":free$|(?:^|[-/])moderation|^omni-moderation")


def genai_models(source: int) -> list[Model]:
    """The rows of genai-prices, every condition resolved into periods."""
    from genai_prices.data import providers

    return [_genai_model(provider_name(p.id), m, source) for p in providers for m in p.models]


def _genai_model(provider: str, raw: Any, source: int) -> Model:
    model = Model(provider, raw.id, source, set(_genai_names(provider, raw.match)), context=raw.context_window)
    model.free = bool(_FREE_NAME.search(raw.id)) or provider == "github-copilot"
    conditions = raw.prices if isinstance(raw.prices, list) else []
    variants = raw.price_variants or []
    starts = sorted({c.constraint.start_date for c in conditions if hasattr(c.constraint, "start_date")})
    clock = sorted({t for c in conditions if hasattr(c.constraint, "start_time") for t in (c.constraint.start_time, c.constraint.end_time)})
    for start in (None, *starts):
        day = start or ((starts[0] if starts else date(2026, 1, 1)) - timedelta(days=1))
        tiers = _genai_tiers(raw, variants, day)

        def at(moment: time, day: date = day) -> Rates:
            return _genai_rates(raw.get_prices(datetime.combine(day, moment.replace(tzinfo=None), UTC)), model)

        period = Period(start.isoformat() if start else None, at(time(0)), tiers)
        for begin, end in zip(clock, clock[1:], strict=False):
            if (rates := at(begin)) != period.rates:
                period.hours.append((begin.hour * 60 + begin.minute, end.hour * 60 + end.minute, rates, {}))
        model.periods.append(period)
    return model


def _genai_tiers(raw: Any, variants: Iterable[Any], day: date) -> dict[str, Rates]:
    """The tiers on a day. A tier's first known price also stands for the days before it, in proportion to the standard price."""
    tiers: dict[str, Rates] = {}
    for variant in variants:
        (kind, tier), *more = variant.when.items()
        if more or kind not in ("processing", "service_tier", "speed") or tier == "default":
            continue
        known = getattr(variant.constraint, "start_date", None)
        figures = _genai_rates(variant.prices, None)
        if known is not None and day < known:
            now = _genai_rates(raw.get_prices(datetime.combine(known, time(12), UTC)), None)
            then = _genai_rates(raw.get_prices(datetime.combine(day, time(12), UTC)), None)
            if now != then:
                continue
        if figures:
            tiers.setdefault(tier, {}).update({unit: amount for unit, amount in figures.items() if unit not in tiers.get(tier, {})})
    return tiers


def _genai_rates(prices: Any, model: Model | None) -> Rates:
    rates: Rates = {}
    for key, value in vars(prices).items():
        if value is None:
            continue
        if key in _GENAI_TOOLS:
            if model is not None and not hasattr(value, "tiers"):
                model.tools[_GENAI_TOOLS[key]] = _text(value / 1000)
        elif key in _GENAI_UNITS:
            unit, per = _GENAI_UNITS[key]
            if key == "audio_hours":  # either direction
                rates["output_audio_hour"] = _text(value)
            if hasattr(value, "tiers"):
                rates[unit] = [_text(value.base / per), *([tier.start, _text(tier.price / per)] for tier in value.tiers)]
            else:
                rates[unit] = _text(value / per)
    return rates


def _genai_names(provider: str, match: Any) -> Iterable[str]:
    """The whole names that a matcher speaks of. Prefixes and fragments are taken as whole names: nothing is guessed from them."""
    for clause in getattr(match, "or_", [match]):
        for kind in ("equals", "starts_with", "ends_with", "contains"):
            text = getattr(clause, kind, None)
            if text and not re.search(r"-20\d\d$|-0$|preview-$", text):
                yield text.lower().lstrip("/").rstrip("-@")


# --- LiteLLM ------------------------------------------------------------------------------------------------------

_LITELLM_UNITS = {
    "input_cost_per_token": "input_mtok", "output_cost_per_token": "output_mtok", "cache_read_input_token_cost": "cache_read_mtok",
    "cache_creation_input_token_cost": "cache_write_mtok", "cache_creation_input_token_cost_above_1hr": "cache_write_1h_mtok",
    "output_cost_per_reasoning_token": "reasoning_mtok", "input_cost_per_audio_token": "input_audio_mtok",
    "input_cost_per_image_token": "input_image_mtok", "input_cost_per_video_token": "input_video_mtok",
    "cache_read_input_audio_token_cost": "cache_read_audio_mtok", "cache_read_input_image_token_cost": "cache_read_image_mtok",
    "output_cost_per_audio_token": "output_audio_mtok", "output_cost_per_image_token": "output_image_mtok",
}  # fmt: skip
_TIERS = {"_priority": "priority", "_flex": "flex", "_batches": "batch"}
_LITELLM_KEY = re.compile(r"^(?P<base>.+?)(?:_above_(?P<k>\d+)k_tokens)?(?P<tier>_priority|_flex|_batches)?$")
_LITELLM_SKIP = re.compile(r"month-commitment|^sample_spec$|\*")
_LOCAL = {"ollama"}  # runs on the user's own machine: known to cost nothing


def litellm_models(source: int) -> list[Model]:
    """The rows of the cost map inside the litellm wheel, read as a file: the package itself is not imported."""
    spec = find_spec("litellm")
    assert spec is not None and spec.submodule_search_locations
    text = Path(spec.submodule_search_locations[0], "model_prices_and_context_window_backup.json").read_text()
    rows = json.loads(text, parse_float=Decimal)
    return [
        _litellm_model(key, row, source)
        for key, row in sorted(rows.items())
        if not _LITELLM_SKIP.search(key) and row.get("litellm_provider")
    ]


def _litellm_model(key: str, row: dict[str, Any], source: int) -> Model:
    provider = provider_name(row["litellm_provider"])
    first, _, rest = key.partition("/")
    name = rest if rest and (provider_name(first) == provider or first.replace("_", "-") == row["litellm_provider"].replace("_", "-")) else key
    mode = row.get("mode") or "chat"
    model = Model(provider, name, source, mode="chat" if mode in ("responses", "completion") else mode)
    model.context = _whole(row.get("max_input_tokens")) or _whole(row.get("max_tokens"))
    model.output = _whole(row.get("max_output_tokens"))
    model.free = row["litellm_provider"] in _LOCAL or name.endswith(":free")
    period = Period(None, {})
    tiered: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for field_name, value in row.items():
        found = _LITELLM_KEY.match(field_name)
        if found and found["base"] in _LITELLM_UNITS and isinstance(value, (int, Decimal)):
            spot = (_TIERS.get(found["tier"] or "", ""), _LITELLM_UNITS[found["base"]])
            tiered.setdefault(spot, []).append((int(found["k"] or 0) * 1000, _text(Decimal(value) * 10**6)))
    for (tier, unit), levels in tiered.items():
        base, *more = sorted(levels)
        if base[0] == 0:
            target = period.tiers.setdefault(tier, {}) if tier else period.rates
            target[unit] = [base[1], *([start, price] for start, price in more)] if more else base[1]
    for step in row.get("tiered_pricing") or ():
        _litellm_step(period.rates, step)
    _litellm_others(row, mode, name, period.rates, model)
    model.periods.append(period)
    return model


def _litellm_step(rates: Rates, step: dict[str, Any]) -> None:
    if "range" not in step:
        return
    start = int(step["range"][0])
    for field_name, unit in _LITELLM_UNITS.items():
        if field_name in step:
            price = _text(Decimal(step[field_name]) * 10**6)
            rates[unit] = price if start == 0 else [*([rates[unit]] if isinstance(rates.get(unit), str) else rates.get(unit, ["0"])), [start, price]]


def _litellm_others(row: dict[str, Any], mode: str, name: str, rates: Rates, model: Model) -> None:
    """Prices by time, character, image, page, query and request, and the fees of tools."""

    def take(unit: str, *fields: str, times: int = 1) -> None:
        value = next((row[f] for f in fields if isinstance(row.get(f), (int, Decimal)) and row[f] > 0), None)
        if value is not None:
            rates.setdefault(unit, _text(Decimal(value) * times))

    if mode == "audio_transcription" and not rates:
        take("input_audio_hour", "input_cost_per_second", "output_cost_per_second", "cost_per_second", times=3600)
    if mode == "realtime" and not rates:
        take("input_audio_hour", "input_cost_per_second", times=3600)
    if mode == "audio_speech" and not rates:
        take("input_mchars", "input_cost_per_character", times=10**6)
    if mode in ("image_generation", "image_edit") and not rates:
        size = re.search(r"(\d+)-x-(\d+)", name)
        take("per_image", "output_cost_per_image", "input_cost_per_image")
        if "per_image" not in rates and size:
            take("per_image", "input_cost_per_pixel", "output_cost_per_pixel", times=int(size[1]) * int(size[2]))
    if mode == "rerank":
        take("per_search_unit", "input_cost_per_query")
    if mode == "search":
        take("per_call", "input_cost_per_query")
    take("per_call", "input_cost_per_request")
    take("per_page", "ocr_cost_per_page")
    if mode == "embedding" and rates.get("output_mtok") == "0":
        del rates["output_mtok"]
    search = row.get("search_context_cost_per_query") or {}
    if isinstance(search, dict) and (price := search.get("search_context_size_medium")):
        model.tools["web_search"] = _text(Decimal(price))
    if isinstance(maps := row.get("google_maps_grounding_cost_per_query"), (int, Decimal)):
        model.tools["maps_grounding"] = _text(Decimal(maps))
    extra = row.get("provider_specific_entry") or {}
    if "us" in extra:
        model.uplift["us"] = _text(Decimal(extra["us"]))
    for region in ("us", "eu"):
        if factor := row.get(f"regional_processing_uplift_multiplier_{region}"):
            model.uplift[region] = _text(Decimal(factor))
    if factor := row.get("regional_endpoint_uplift_multiplier"):
        model.uplift["regional"] = _text(Decimal(factor))


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, Decimal)) and value > 0 else None


# --- corrections --------------------------------------------------------------------------------------------------


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
