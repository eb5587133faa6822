"""The command line shows the books, checks policies, and refuses politely."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, Stopped, Threshold, Usage
from bursar.cli import main
from bursar.cli.options import PAGE, show

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


def test_the_end_of_a_window_is_told_in_utc_with_its_year(tmp_path: Path) -> None:
    """A window of Kolkata ends in the evening before, of UTC; a year's ends in another year."""
    url = f"sqlite:///{tmp_path / 'books.db'}?durability=process"
    with Bursar(url, [Budget("yearly", "5 USD", window="year", tz="Asia/Kolkata")]) as books:
        books.charge("1 USD")
        (one,) = books.status()
    assert one.window[1] is not None
    shown = bursar("status", "--store", url).output
    assert "until (UTC)" in shown
    assert f"{one.window[1].year}-12-31 18:30" in shown


@pytest.mark.parametrize("width", ["40", "80", "100", "200"])
def test_a_number_is_shown_whole_however_narrow_the_terminal_is(tmp_path: Path, width: str) -> None:
    """A limit of 123456789 tokens that goes on in the next line reads as one of 12345678."""
    url = f"sqlite:///{tmp_path / 'books.db'}?durability=process"
    budgets = [Budget("all", "123_456_789 tokens", window="year"), Budget("each", "12345.678901234 USD", per="agent")]
    with Bursar(url, budgets) as books, books.scope(agent="a-planner-of-many-words", run="r-17"):
        books.charge("1234.567890123 USD")
    for command, numbers in (("status", ["123456789 tokens", "11111.111011111"]), ("records", ["1234.567890123"])):
        shown = CliRunner(env={"COLUMNS": width}).invoke(main, [command, "--store", url], prog_name="bursar").output
        assert [number for number in numbers if number not in shown] == []


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


def test_a_table_is_printed_before_all_of_its_rows_are_read(capsys: pytest.CaptureFixture[str]) -> None:
    """A year of records, as a table that is made of all of them, fits into no memory."""
    printed = []

    def rows() -> Iterator[dict[str, int]]:
        for number in range(2 * PAGE + 1):
            yield {"number": number}
            printed.append(capsys.readouterr().out)

    show(rows(), ["number"], "table", "Numbers")
    first, second = (text for text in printed if text)
    assert f"{PAGE - 1}" in first
    assert f"{2 * PAGE - 1}" in second
    assert f"{2 * PAGE}" in capsys.readouterr().out


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


# -- operators -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, Path, str]:
    """A store with an operator, where a budget's threshold has asked: its URL, the key's file, the question's id."""
    url, key = f"sqlite:///{tmp_path / 'asked.db'}?durability=process", tmp_path / "operator.key"
    with Bursar(url, [Budget("cap", "0.10 USD", thresholds=[Threshold("50%", "ask")])]) as books:
        books.charge("0.05 USD")
        with pytest.raises(ApprovalRequired) as question:
            books.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    assert bursar("operator", "init", "--store", url, "--out", str(key)).exit_code == 0
    return url, key, question.value.id


def test_a_question_is_listed_approved_and_remembered(asked: tuple[str, Path, str]) -> None:
    url, key, id = asked
    assert id in bursar("approvals", "--store", url).output
    refused = bursar("approve", id, "--store", url)
    assert refused.exit_code == 1
    assert "--key" in refused.output
    done = bursar("approve", id, "--store", url, "--key", str(key), "--raise-by", "5 USD", "--for", "1h", "--by", "ann")
    assert done.exit_code == 0, done.output
    rows = [
        json.loads(line)
        for line in bursar("approvals", "--all", "--store", url, "--format", "json").output.splitlines()
    ]
    assert [(row["id"], row["state"], row["by"]) for row in rows] == [(id, "approved", "ann")]
    with Bursar(url) as books:
        books.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).release()


def test_an_operators_key_is_for_its_owner_alone_and_not_overwritten(asked: tuple[str, Path, str]) -> None:
    url, key, _ = asked
    assert key.stat().st_mode & 0o077 == 0
    again = bursar("operator", "init", "--store", url, "--out", str(key))
    assert again.exit_code != 0
    other = bursar("operator", "init", "--store", url, "--out", f"{key}.2")
    assert other.exit_code == 1
    assert not Path(f"{key}.2").exists()
    assert bursar("operator", "init", "--store", url, "--key", str(key), "--out", f"{key}.2").exit_code == 0


def test_an_agent_is_frozen_listed_and_resumed(asked: tuple[str, Path, str]) -> None:
    url, key, _ = asked
    assert bursar("freeze", "--store", url).exit_code == 2
    assert bursar("freeze", "--agent", "x", "team=a", "--store", url, "--why", "loops", "--by", "ann").exit_code == 0
    assert "loops" in bursar("resume", "--store", url).output
    with Bursar(url) as books, books.scope(agent="x", team="a"), pytest.raises(Stopped, match="loops"):
        books.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    assert bursar("resume", "agent=x team=a", "--store", url).exit_code == 1
    assert bursar("resume", "agent=x team=a", "--store", url, "--key", str(key)).exit_code == 0
    assert "frozen" in bursar("alerts", "--store", url).output


def test_denials_raises_and_wrong_durations(asked: tuple[str, Path, str]) -> None:
    url, key, id = asked
    assert bursar("deny", id, "--store", url, "--why", "no").exit_code == 0
    assert bursar("deny", "ask-0", "--store", url).exit_code == 1
    assert bursar("raise", "cap", "1 USD", "--store", url, "--key", str(key)).exit_code == 0
    assert bursar("raise", "cap", "5 tokens", "--store", url, "--key", str(key)).exit_code == 1
    assert bursar("approve", id, "--store", url, "--key", str(key), "--for", "soon").exit_code == 2
    status = json.loads(bursar("status", "--store", url, "--format", "json").output.splitlines()[0])
    assert status["limit"] == "1.10"
