"""Reads genai-prices: dated prices, every condition resolved into periods, tiers and hours of the day."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import UTC, date, datetime, time, timedelta
from itertools import pairwise
from typing import Any

from bursar.prices.names import provider_name
from price_sources.model import Model, Period, Rates, text

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
    clock = sorted(
        {
            t
            for c in conditions
            if hasattr(c.constraint, "start_time")
            for t in (c.constraint.start_time, c.constraint.end_time)
        }
    )
    for start in (None, *starts):
        day = start or ((starts[0] if starts else date(2026, 1, 1)) - timedelta(days=1))
        tiers = _genai_tiers(raw, variants, day)

        def at(moment: time, day: date = day) -> Rates:
            return _genai_rates(raw.get_prices(datetime.combine(day, moment.replace(tzinfo=None), UTC)), model)

        period = Period(start.isoformat() if start else None, at(time(0)), tiers)
        for begin, end in pairwise(clock):
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
            tiers.setdefault(tier, {}).update(
                {unit: amount for unit, amount in figures.items() if unit not in tiers.get(tier, {})}
            )
    return tiers


def _genai_rates(prices: Any, model: Model | None) -> Rates:
    rates: Rates = {}
    for key, value in vars(prices).items():
        if value is None:
            continue
        if key in _GENAI_TOOLS:
            if model is not None and not hasattr(value, "tiers"):
                model.tools[_GENAI_TOOLS[key]] = text(value / 1000)
        elif key in _GENAI_UNITS:
            unit, per = _GENAI_UNITS[key]
            if key == "audio_hours":  # either direction
                rates["output_audio_hour"] = text(value)
            if hasattr(value, "tiers"):
                rates[unit] = [
                    text(value.base / per),
                    *([tier.start, text(tier.price / per)] for tier in value.tiers),
                ]
            else:
                rates[unit] = text(value / per)
    return rates


def _genai_names(provider: str, match: Any) -> Iterable[str]:
    """The whole names that a matcher speaks of. Prefixes and fragments are taken as whole names: nothing is guessed from them."""
    for clause in getattr(match, "or_", [match]):
        for kind in ("equals", "starts_with", "ends_with", "contains"):
            name = getattr(clause, kind, None)
            if name and not re.search(r"-20\d\d$|(?:flash|gpt-4)-0$|preview-$", name):
                yield name.lower().lstrip("/").rstrip("-@")
