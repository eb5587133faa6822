"""Reads LiteLLM's cost map: limits, tiers, fees of tools, and prices by time, character, image, page and query."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bursar.prices.names import provider_name
from price_sources.model import Model, Period, Rates, text

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
    assert spec is not None
    assert spec.submodule_search_locations
    raw = Path(spec.submodule_search_locations[0], "model_prices_and_context_window_backup.json").read_text()
    rows = json.loads(raw, parse_float=Decimal)
    return [
        _litellm_model(key, row, source)
        for key, row in sorted(rows.items())
        if not _LITELLM_SKIP.search(key) and row.get("litellm_provider")
    ]


def _litellm_model(key: str, row: dict[str, Any], source: int) -> Model:
    provider = provider_name(row["litellm_provider"])
    first, _, rest = key.partition("/")
    name = (
        rest
        if rest
        and (provider_name(first) == provider or first.replace("_", "-") == row["litellm_provider"].replace("_", "-"))
        else key
    )
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
            tiered.setdefault(spot, []).append((int(found["k"] or 0) * 1000, text(Decimal(value) * 10**6)))
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
            price = text(Decimal(step[field_name]) * 10**6)
            rates[unit] = (
                price
                if start == 0
                else [*([rates[unit]] if isinstance(rates.get(unit), str) else rates.get(unit, ["0"])), [start, price]]
            )


def _litellm_others(row: dict[str, Any], mode: str, name: str, rates: Rates, model: Model) -> None:
    """Prices by time, character, image, page, query and request, and the fees of tools."""

    def take(unit: str, *fields: str, times: int = 1) -> None:
        value = next((row[f] for f in fields if isinstance(row.get(f), (int, Decimal)) and row[f] > 0), None)
        if value is not None:
            rates.setdefault(unit, text(Decimal(value) * times))

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
        model.tools["web_search"] = text(Decimal(price))
    if isinstance(maps := row.get("google_maps_grounding_cost_per_query"), (int, Decimal)):
        model.tools["maps_grounding"] = text(Decimal(maps))
    extra = row.get("provider_specific_entry") or {}
    if "us" in extra:
        model.uplift["us"] = text(Decimal(extra["us"]))
    for region in ("us", "eu"):
        if factor := row.get(f"regional_processing_uplift_multiplier_{region}"):
            model.uplift[region] = text(Decimal(factor))
    if factor := row.get("regional_endpoint_uplift_multiplier"):
        model.uplift["regional"] = text(Decimal(factor))


def _whole(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, Decimal)) and value > 0 else None
