"""The command line shows the books, checks policies, and refuses politely."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.cli import main

ROOT = Path(__file__).resolve().parents[1]


def bursar(*words: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(main, words, catch_exceptions=False, prog_name="bursar")


@pytest.fixture
def store(tmp_path: Path) -> str:
    """One settled call, one refused, by the agent `=planner` (a name that a spreadsheet would take for a formula)."""
    url = f"sqlite:///{tmp_path / 'books.db'}?durability=process"
    budgets = [Budget("cap", "0.01 USD"), Budget("daily", "5 USD", per="agent", window="day")]
    with Bursar(url, budgets) as books, books.scope(agent="=planner", run="r-17"):
        with books.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=500))
        with pytest.raises(BudgetExceeded):
            books.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
    return url


def test_status_shows_the_published_budgets(store: str) -> None:
    rows = [json.loads(line) for line in bursar("status", "--store", store, "--format", "json").output.splitlines()]
    assert {row["name"]: (row["spent"], row["refused"]) for row in rows} == {
        "cap": ("0.0075", 1),
        "daily": ("0.0075", 0),
    }
    shown = bursar("status", "--store", store).output
    assert "0.0075" in shown
    assert "daily agent==planner" in shown


def test_records_are_shown_by_tag(store: str) -> None:
    done = bursar("records", "run=r-17", "--store", store, "--format", "json")
    records = [json.loads(line) for line in done.output.splitlines()]
    assert [(record["outcome"], record["cost_usd"]) for record in records] == [
        ("completed", "0.0075"),
        ("blocked", "0.00"),
    ]
    assert records[1]["reason"] == "the budget 'cap' had $0.0025 available, the call needed $0.0075"
    assert bursar("records", "run=other", "--store", store, "--format", "json").output == ""
    assert "blocked" in bursar("records", "--store", store).output


def test_no_cell_of_a_csv_is_a_formula(store: str) -> None:
    done = bursar("records", "--store", store, "--format", "csv", "--limit", "1")
    (row,) = csv.DictReader(io.StringIO(done.output))
    assert row["agent"] == "'=planner"
    assert row["cost_usd"] == "0.0075"


def test_a_missing_store_is_not_made_by_looking_at_it(tmp_path: Path) -> None:
    file = tmp_path / "none.db"
    done = bursar("status", "--store", f"sqlite:///{file}")
    assert done.exit_code != 0
    assert "There is no store" in done.output
    assert not file.exists()


def test_a_tag_without_a_value_is_refused(store: str) -> None:
    done = bursar("records", "run", "--store", store)
    assert done.exit_code != 0
    assert "no TAG=VALUE" in done.output


def test_the_published_schema_is_the_one_that_is_checked() -> None:
    """docs/policy.schema.json is what `bursar policy schema` prints."""
    printed = json.loads(bursar("policy", "schema").output)
    assert json.loads((ROOT / "docs/policy.schema.json").read_text()) == printed


def test_a_policy_with_faults_names_file_line_and_key(tmp_path: Path) -> None:
    file = tmp_path / "bursar.toml"
    file.write_text('[[budget]]\nname = "run"\nlimit = "5 USD"\nwindw = "day"\n')
    done = bursar("policy", "check", str(file))
    assert done.exit_code != 0
    assert f"{file}:4: budget.0.windw" in done.output


def test_every_command_has_a_help() -> None:
    for words in (["price"], ["prices", "show"], ["policy", "check"], ["policy", "schema"], ["records"], ["status"]):
        done = bursar(*words, "--help")
        assert done.exit_code == 0
        assert "Usage: bursar" in done.output
