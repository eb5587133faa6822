"""Prices of recorded answers: two calculators' figures, providers' bills, the packaged table, and the commands."""

from __future__ import annotations

import gzip
import json
import random
import tomllib
from decimal import Decimal
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bursar.cli.price import command as price_command
from bursar.cli.prices import command as prices_command
from bursar.money import NANOS_PER_USD
from bursar.prices import PriceBook
from bursar.usage import Usage

HERE = Path(__file__).parent
DATA = HERE / "data/prices"
BOOK = PriceBook.packaged()
NOON_US = 1_795_348_800_000_000  # 2026-11-22 12:00 UTC
ANSWERS = [json.loads(line) for line in gzip.decompress((DATA / "answers.jsonl.gz").read_bytes()).splitlines()]
TABLE = HERE.parent / "packages/core/src/bursar/prices/table.json"


def nanos(row: dict[str, Any]) -> int:
    usage = Usage(**row["usage"])
    return BOOK.cost(row["provider"], row["model"], usage, at_us=NOON_US).cost_nanos


@pytest.mark.parametrize("row", [row for row in ANSWERS if "agreed_usd" in row], ids=lambda row: row["id"])
def test_what_two_calculators_agree_on(row: dict[str, Any]) -> None:
    """Within 1 nano-dollar: they compute in floats."""
    assert abs(nanos(row) - Decimal(row["agreed_usd"]) * NANOS_PER_USD) <= 1


@pytest.mark.parametrize("row", [row for row in ANSWERS if "stated_usd" in row], ids=lambda row: row["id"])
def test_what_the_provider_billed(row: dict[str, Any]) -> None:
    """The stated bill, computed from the counts without it, within a thousandth."""
    bill = Decimal(row["stated_usd"]) * NANOS_PER_USD
    assert abs(nanos(row) - bill) <= bill / 1000


# What docs/prices.md decides where the calculators disagree: (provider, model, usage, cost in nano-dollars).
DECIDED = {
    "web search with a reasoning model": (
        "openai", "gpt-5", {"input_tokens": 1000, "output_tokens": 100, "server_tools": {"web_search": 7}},
        1000 * 1_250 + 100 * 10_000 + 7 * 10_000_000,
    ),
    "the preview of web search": (
        "openai", "gpt-4.1", {"input_tokens": 310, "output_tokens": 290, "server_tools": {"web_search_preview": 1}},
        27_940_000,
    ),
    "an image made by a tool": (
        "openai", "gpt-5",
        {"input_tokens": 1872, "output_tokens": 1438, "server_tools": {"image_generation/gpt-image-1/high/1536x1024": 1}},
        266_720_000,
    ),
    "an alias that moved": ("mistral", "mistral-large-latest", {"input_tokens": 1000, "output_tokens": 1000}, 2_000_000),
    "cached tokens at Mistral": (
        "mistral", "mistral-tiny", {"input_tokens": 20, "output_tokens": 18, "cache_read_tokens": 10}, 7_250,
    ),
    "Vertex against the Gemini API": ("vertex", "gemini-2.0-flash", {"input_tokens": 7, "output_tokens": 9}, 6_450),
    "Together's present price": (
        "together", "meta-llama/Llama-3.3-70B-Instruct-Turbo", {"input_tokens": 41, "output_tokens": 15}, 58_240,
    ),
    "DeepSeek's last price of the name": ("deepseek", "deepseek-reasoner", {"input_tokens": 12, "output_tokens": 789}, 334_740),
    "several rounds are no long context": (
        "anthropic", "claude-sonnet-4-5",
        {"input_tokens": 404_500, "output_tokens": 943, "server_tools": {"web_search": 10}}, 1_327_645_000,
    ),
    "a snapshot with its own price": ("openai", "gpt-3.5-turbo-0613", {"input_tokens": 15, "output_tokens": 24}, 70_500),
    "a voice by the second": ("xai", "grok-voice-latest", {"output_tokens": 185, "output_audio_ms": 5000}, 6_666_667),
    "Azure's global price": ("azure", "ada", {"input_tokens": 8}, 800),
}  # fmt: skip


@pytest.mark.parametrize("case", DECIDED)
def test_what_is_decided_where_they_disagree(case: str) -> None:
    provider, model, counts, expected = DECIDED[case]
    assert BOOK.cost(provider, model, Usage(**counts), at_us=NOON_US).cost_nanos == expected  # type: ignore[arg-type]


# --- the packaged table -------------------------------------------------------------------------------------------


def test_the_table_is_what_its_digest_says_and_small() -> None:
    raw = TABLE.read_bytes()
    table = json.loads(raw)
    body = {name: table[name] for name in ("rates", "fees", "providers")}
    assert table["digest"] == sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    assert table["digest"][:12] in BOOK.version
    assert len(raw) <= 1_500_000
    assert [source["name"] for source in table["sources"]] == ["genai-prices", "litellm", "corrections"]


def test_every_row_of_the_table_can_be_computed_with_at_any_time() -> None:
    for provider in BOOK.table.providers:
        for model in BOOK.table.models(provider):
            row = BOOK.table.row(provider, model.lower())
            assert row is not None
            assert [p[0] for p in row.prices[1:]] == sorted(p[0] for p in row.prices[1:]), model
            for period in row.prices:
                tiers = [period[1], *(period[2].values() if len(period) > 2 else ())]
                assert all(BOOK.table.rates[index] for index in tiers), (provider, model)
            found = BOOK.find(provider, model, NOON_US)
            assert found.bound_nanos(1000, 1000) >= 0


def test_every_correction_names_its_reason_and_source() -> None:
    corrections = tomllib.loads((HERE.parent / "tools/corrections.toml").read_text())
    for kind in ("price", "same_as", "tool"):
        for row in corrections[kind]:
            assert row["reason"].endswith("."), row
            assert len(row["source"]) > 8, row


# --- bursar price, bursar prices show -----------------------------------------------------------------------------


def run(*words: str, stdin: str | None = None) -> list[dict[str, Any]]:
    done = CliRunner().invoke(price_command, list(words), input=stdin)
    assert done.exit_code == 0, done.output
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_bursar_price_answers_every_line_plain_and_compressed(tmp_path: Path) -> None:
    plain = DATA / "exchanges.jsonl"
    packed = tmp_path / "exchanges.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    lines = run(str(plain), "--at", "2026-11-22T12:00Z")
    assert lines == run(str(packed), "--at", "2026-11-22T12:00Z")
    asked = [json.loads(line) for line in plain.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in asked]
    assert {line["status"] for line in lines} == {"priced", "unknown_price", "no_usage", "not_billable"}
    for line in lines:
        assert list(line) == ["id", "status", "usage", "cost_usd", "cost_nanos", "price", "reason"]
        if line["status"] == "priced":
            assert Decimal(line["cost_usd"]) * NANOS_PER_USD == line["cost_nanos"]
            assert list(line["price"]) == ["provider", "model", "effective_from", "source"]
            assert line["reason"] is None
        else:
            assert line["cost_usd"] is line["cost_nanos"] is line["price"] is None
            assert line["reason"]


def test_a_stated_bill_is_believed_unless_it_is_ignored() -> None:
    answer = {
        "id": "a", "provider": "openrouter", "model": "openai/gpt-4o-mini", "status": 200,
        "response": {"model": "openai/gpt-4o-mini", "usage": {"prompt_tokens": 100, "completion_tokens": 10, "cost": 0.5}},
    }  # fmt: skip
    stated, computed = (run("-", *words, stdin=json.dumps(answer))[0] for words in ((), ("--ignore-stated",)))
    assert (stated["cost_usd"], stated["price"]["source"]) == ("0.50", "stated")
    assert (computed["cost_nanos"], computed["price"]["source"]) == (100 * 150 + 10 * 600, "genai-prices")


def test_at_recorded_takes_the_day_of_the_answer() -> None:
    usage = {"input_tokens": 1000, "output_tokens": 1000}
    answer = {
        "id": "a", "provider": "openai", "model": "gpt-5.6-sol", "status": 200,
        "response": {"object": "response", "created_at": 1_784_286_312, "model": "gpt-5.6-sol", "status": "completed",
                     "usage": usage, "output": []},
    }  # fmt: skip
    for words, cost_usd in ((("--at", "recorded"), "0.035"), (("--at", "2026-11-22"), "0.024")):
        assert run("-", *words, stdin=json.dumps(answer))[0]["cost_usd"] == cost_usd
    dated = answer | {"recorded": "Sat, 21 Nov 2026 10:00:00 GMT"}
    assert run("-", "--at", "recorded", stdin=json.dumps(dated))[0]["cost_usd"] == "0.024"


def test_no_line_stops_bursar_price() -> None:
    """Lines that are no JSON, no object, or hold the wrong things at every place."""
    whole = (DATA / "exchanges.jsonl").read_text().splitlines()[0]
    dice = random.Random(7)
    junk: list[Any] = [None, 5, "x", [], {}, [1], {"a": 1}, -1, 1e400, True]
    lines = ["{", "5", "[]", "null", '"x"', '{"id": 1', "{}"]
    for _ in range(300):
        row = json.loads(whole)
        for name in dice.sample(sorted(row), 2):
            row[name] = dice.choice(junk)
        lines.append(json.dumps(row))
    results = run("-", stdin="\n".join(lines) + "\n")
    assert len(results) == len(lines)
    statuses = {"priced", "unknown_price", "no_usage", "not_billable", "unreadable"}
    assert {line["status"] for line in results} <= statuses
    assert [line["status"] for line in results[:6]] == ["unreadable"] * 6


def test_bursar_prices_show_is_readable() -> None:
    done = CliRunner().invoke(prices_command, ["show", "gpt-5.4", "--provider", "openai", "--at", "2026-11-22"])
    assert done.exit_code == 0, done.output
    for text in ("openai/gpt-5.4", "batch", "2.50", "272,000", "genai-prices", "web_search 0.01", BOOK.version):
        assert text in done.output


def test_bursar_prices_show_names_the_nearest_of_an_unknown_model() -> None:
    from bursar.cli import main

    done = CliRunner().invoke(main, ["prices", "show", "gpt-4o-ultra-max"])
    assert done.exit_code == 1
    assert "gpt-4o-mini" in done.output
    assert "Override" in done.output
