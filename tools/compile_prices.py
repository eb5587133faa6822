"""Compiles the packaged price table from genai-prices, LiteLLM's cost map and corrections, and reports their disagreements.

Run: `python tools/compile_prices.py` with genai-prices 0.2.3 and litellm 1.109.1 (installed without its dependencies) at hand.
Only figures, dates and names are taken. The output is the same for the same input, byte for byte.
"""

from __future__ import annotations

import json
import re
import sys
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from price_sources.corrections import Corrections
from price_sources.cost_map import litellm_models
from price_sources.genai import genai_models
from price_sources.model import Model

from bursar.prices.names import bedrock_base, places

ROOT = Path(__file__).parent.parent
TABLE = ROOT / "packages/core/src/bursar/prices/table.json"
REPORT = ROOT / "docs/price-disagreements.md"
LIMIT_BYTES = 1_500_000
_REGION = re.compile(
    r"(?:us|eu|apac|au|jp|in|ca|sa|us-gov|global)[./]|.*/"
)  # names that are finer than the first source
Disagreement = tuple[str, str, str, dict[str, Any], dict[str, Any]]  # provider, row, name, one's figures, the other's
COMPARED = (
    "input_mtok",
    "output_mtok",
    "cache_read_mtok",
    "cache_write_mtok",
    "cache_write_1h_mtok",
    "input_audio_mtok",
    "output_audio_mtok",
)


def merge(first: dict[tuple[str, str], Model], second: list[Model]) -> list[Disagreement]:
    """Lay the second source over the first: fill what the first lacks, add what it does not have. Returns rows that disagree.

    The first source keeps price histories, so it holds where both have a row; the second adds a row of its own for a snapshot whose
    figures differ from those of the model that the first would take it for.
    """
    names = {
        (provider, name): model for (provider, _), model in first.items() for name in (*model.names, model.id.lower())
    }
    names.update({(provider, model.id.lower()): model for (provider, _), model in first.items()})
    disagreements = []
    for model in second:
        name = model.id.lower()
        exact = names.get((model.provider, name))
        if exact is None and model.provider == "bedrock" and not _REGION.match(name):
            exact = names.get((model.provider, bedrock_base(name)))  # the first source leaves versions out
        if exact is not None and exact.source == model.source:
            exact.fill_limits(model)  # the same model under two keys of one source
            continue
        if exact is not None:
            if agrees(exact, model):
                exact.fill(model)
            else:
                disagreements.append((exact.provider, exact.id, model.id, dict(exact.latest()), dict(model.latest())))
                exact.fill_limits(model)
            continue
        near = next(
            (names[place] for place in places(model.provider, name) if place in names and place[0] == model.provider),
            None,
        )
        if near is not None and near.source != model.source and agrees(near, model):
            near.fill(model)
            near.names.add(name)
            names[model.provider, name] = near
            continue
        first[model.provider, model.id] = names[model.provider, name] = model
    return disagreements


def agrees(one: Model, other: Model) -> bool:
    """Whether the figures of the newest period that both state are the same."""
    a, b = one.latest(), other.latest()
    shared = [unit for unit in COMPARED if unit in a and unit in b]
    return (
        bool(shared)
        and all(a[unit] == b[unit] for unit in shared)
        and ("input_mtok" in shared or "output_mtok" in shared)
    )


def compiled(
    models: dict[tuple[str, str], Model], corrections: Corrections, sources: list[dict[str, str]]
) -> dict[str, Any]:
    """The table as JSON data; equal sets of rates are stored once."""
    rates: list[dict[str, Any]] = []
    index: dict[str, int] = {}

    def intern(amounts: dict[str, Any]) -> int:
        key = json.dumps(amounts, sort_keys=True)
        if key not in index:
            index[key] = len(rates)
            rates.append(json.loads(key))
        return index[key]

    providers: dict[str, dict[str, Any]] = {}
    for (provider, _), model in sorted(models.items()):
        providers.setdefault(provider, {})[model.id] = model.as_json(intern)
    body = {"rates": rates, "fees": corrections.fees, "providers": providers}
    digest = sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    return {"format": 1, "date": corrections.date, "digest": digest, "sources": sources, **body}


def report(disagreements: list[Disagreement], sources: list[dict[str, str]], corrections: Corrections) -> str:
    """The rows whose newest figures differ, as a table. What is written above the mark in the page stays."""
    named = ", ".join(f"{source['name']} {source['version']}" for source in sources)
    lines = [
        f"{len(disagreements)} rows of the two sources name the same model and differ in a figure of today "
        f"({named}). "
        f"The first holds, unless one of the {len(corrections.rows)} corrections in `tools/corrections.toml` says otherwise.",
        "",
        "| provider | model | figure | genai-prices | LiteLLM | held |",
        "|---|---|---|---|---|---|",
    ]
    corrected = {(row["provider"], row["model"]) for row in corrections.rows if "model" in row}
    for provider, model, name, a, b in sorted(disagreements, key=lambda row: row[:3]):
        for unit in (unit for unit in COMPARED if unit in a and unit in b and a[unit] != b[unit]):
            held = "correction" if (provider, model) in corrected else "genai-prices"
            lines.append(f"| {provider} | {name} | {unit} | {_short(a[unit])} | {_short(b[unit])} | {held} |")
    return "\n".join(lines) + "\n"


def _short(amount: Any) -> str:
    return (
        amount
        if isinstance(amount, str)
        else amount[0] + "".join(f"; over {start}: {price}" for start, price in amount[1:])
    )


def main() -> None:
    """Write the table and the report."""
    corrections = Corrections.read(ROOT / "tools/corrections.toml")
    sources = [
        {"name": "genai-prices", "version": version("genai-prices"), "licence": "MIT"},
        {"name": "litellm", "version": version("litellm"), "licence": "MIT"},
        {"name": "corrections", "version": corrections.date, "licence": "Apache-2.0"},
    ]
    models = {(model.provider, model.id): model for model in genai_models(source=0) if model.priced()}
    disagreements = merge(models, [model for model in litellm_models(source=1) if model.priced()])
    corrections.apply(models, source=2)
    for model in models.values():
        model.complete()
    table = compiled({key: model for key, model in models.items() if model.priced()}, corrections, sources)
    text = json.dumps(table, sort_keys=True, separators=(",", ":")) + "\n"
    if len(text) > LIMIT_BYTES:
        sys.exit(f"The table has {len(text)} bytes; {LIMIT_BYTES} are allowed. Drop rows in tools/prices_sources.py.")
    TABLE.write_text(text)
    mark = "<!-- generated below by tools/compile_prices.py -->\n"
    written = REPORT.read_text().partition(mark)[0] if REPORT.exists() else "# Where the sources disagree\n\n"
    REPORT.write_text(written + mark + "\n" + report(disagreements, sources, corrections))
    rows = sum(map(len, table["providers"].values()))
    print(
        f"{rows} models of {len(table['providers'])} providers, {len(table['rates'])} sets of rates, "
        f"{len(text)} bytes, {table['digest'][:12]}"
    )


if __name__ == "__main__":
    main()
