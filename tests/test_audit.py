"""The audit finds whatever was changed past the store, names it, and repairs nothing."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bursar import Budget, Bursar, Operator, Usage
from bursar.audit import audit
from bursar.cli import main
from bursar.testing import ManualClock


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "books.db"


@pytest.fixture
def books(file: Path) -> Iterator[Bursar]:
    """Settled, open, released, expired and late calls, tools and charges, on every kind of account."""
    clock = ManualClock()
    clock.set(time.time_ns() // 1_000 - 1_000_000_000)  # it ends near now, where the command line stands
    budgets = [
        Budget("day", "10 USD", window="day", per="agent"),
        Budget("hour", "5 USD", window="rolling 1h"),
        Budget("rate", "1000 tokens/minute"),
        Budget("flight", "9 slots"),
    ]
    with Bursar(f"sqlite:///{file}?durability=process", budgets, clock=clock) as bursar, bursar.scope(agent="a"):
        for number in range(4):
            with bursar.call("openai", "gpt-4o", input_tokens=100, max_output_tokens=50) as call:
                call.settle(Usage(input_tokens=100, output_tokens=number))
            clock.advance(200)
        bursar.charge("0.05 USD")
        late = bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=50, ttl_s=60)
        clock.advance(61)
        bursar.tend()
        late.settle(Usage(input_tokens=100, output_tokens=9))
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5)
        yield bursar


def test_books_that_nobody_touched_add_up(books: Bursar, file: Path) -> None:
    assert audit(books.store) == []
    done = CliRunner().invoke(main, ["audit", "--store", f"sqlite:///{file}"], prog_name="bursar")
    assert (done.exit_code, done.output) == (0, "Every balance is what its records say.\n")


@pytest.mark.parametrize(
    ("statement", "what"),
    [
        ("UPDATE accounts SET spent = spent - 1 WHERE budget = 'day'", {"spent"}),
        ("UPDATE accounts SET spent = 0 WHERE budget = 'hour'", {"spent"}),
        ("UPDATE accounts SET buckets = '[]', spent = 0 WHERE budget = 'hour'", {"window"}),
        ("UPDATE accounts SET buckets = json_set(buckets, '$[0][1]', 1) WHERE budget = 'hour'", {"window", "spent"}),
        ("UPDATE accounts SET reserved = 0 WHERE budget = 'rate'", {"reserved"}),
        ("DELETE FROM reservations", {"reserved"}),
        ("DELETE FROM records WHERE kind = 'charge'", {"spent", "window"}),
        ("DELETE FROM records WHERE kind = 'expiry'", {"spent", "window", "correction"}),
        ("DELETE FROM accounts WHERE budget = 'day'", {"account"}),
        (
            "INSERT INTO definitions(kind, name, definition, published_us) "
            "VALUES ('raise', 'mine', '{\"account\": \"x\", \"raise_by\": 9}', 0)",
            {"signature"},
        ),
    ],
)
def test_what_was_changed_past_the_store_is_found(books: Bursar, file: Path, statement: str, what: set[str]) -> None:
    with sqlite3.connect(file) as connection:
        assert connection.execute(statement).rowcount > 0
    before = file.read_bytes()
    assert {one.what for one in audit(books.store)} == what
    done = CliRunner().invoke(main, ["audit", "--store", f"sqlite:///{file}", "--format", "json"], prog_name="bursar")
    assert done.exit_code == 1
    assert {json.loads(line)["what"] for line in done.output.splitlines()} == what
    assert file.read_bytes() == before


def test_a_raise_that_an_operator_signed_is_in_order(books: Bursar) -> None:
    operator = Operator(books.store)
    Operator(books.store, operator.appoint()).raise_limit("day", "5 USD", {"agent": "a"})
    assert audit(books.store) == []
