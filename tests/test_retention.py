"""Retention: records give way to their sums, and every balance can still be worked out anew (I4, I10)."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bursar import Budget, Bursar, InvalidInput, Operator, OperatorRequired, Usage
from bursar.audit import audit
from bursar.cli import main
from bursar.commands import Ended, Granted, Rejected
from bursar.retention import bound, kept
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import reserve, rule, settle

DAY_S = 86_400
KEPT = f"kept{os.getpid()}"
MONTHS = 7
EVERYBODY = rule("everybody", 10**12)
BUDGETS = [
    Budget("day", "10 USD", window="day", per="agent"),
    Budget("hour", "5 USD", window="rolling 1h"),
    Budget("total", "90 USD"),
    Budget("rate", "1000 tokens/minute"),
    Budget("flight", "90 slots"),
]


@pytest.fixture(params=["sqlite", "postgres"])
def opens(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[ManualClock | None], Store]]:
    if request.param == "sqlite":
        yield lambda clock: open_store(f"sqlite:///{tmp_path}/books.db?durability=process", clock)
        return
    from postgres_server import SCHEMA, connect, fresh_url

    url = fresh_url().replace(SCHEMA, KEPT)
    yield lambda clock: open_store(url, clock)
    with connect() as connection:
        connection.execute(f"DROP SCHEMA {KEPT} CASCADE")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock(time.time_ns() // 1_000)


@pytest.fixture
def books(opens: Callable[[ManualClock | None], Store], clock: ManualClock) -> Iterator[Bursar]:
    """Seven months of calls that were settled, released, charged, left to expire, and settled late."""
    store = opens(clock)
    with Bursar(store, BUDGETS, clock=clock) as bursar, bursar.scope(agent="a"):
        for month in range(MONTHS):
            with_tables(bursar.store, clock)
            for number in range(3):
                with bursar.call("openai", "gpt-4o", input_tokens=100, max_output_tokens=50) as call:
                    call.settle(Usage(input_tokens=100, output_tokens=number))
                clock.advance(DAY_S)
            with bursar.scope(run=f"r{month}"):
                bursar.charge("0.05 USD")
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5, id=f"never {month}", ttl_s=60)
            late = bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=50, ttl_s=60)
            clock.advance(61)
            bursar.tend()
            late.settle(Usage(input_tokens=100, output_tokens=9))
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5).release()
            clock.advance(27 * DAY_S)
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5)
        yield bursar


def months(store: Store) -> int:
    """How many months have a table of their own."""
    if not hasattr(store, "_schema"):
        return 0
    from postgres_server import connect

    from bursar.stores.postgres.partitions import existing

    with connect() as connection:
        connection.execute(f"SET search_path = {KEPT}")
        return len(existing(connection))


def with_tables(store: Store, clock: ManualClock) -> None:
    """On PostgreSQL, let the months of the test's time have their tables, as they would have in time."""
    if hasattr(store, "_schema"):
        from postgres_server import connect

        from bursar.stores.postgres.partitions import make_ahead

        with connect() as connection:
            connection.execute(f"SET search_path = {KEPT}")
            make_ahead(connection, clock.now_us())


def told(store: Store) -> tuple[object, int]:
    """What pruning must not change: every account, and the sum of all costs."""
    return list(store.accounts()), sum(entry.cost_nanos for entry in store.entries())


def test_i10_balances_are_rebuilt_from_sums_and_records(books: Bursar, clock: ManualClock) -> None:
    store, before = books.store, told(books.store)
    count, tables = len(list(store.entries())), months(store)
    operator = Operator(store, by="ann")
    pruned, until = operator.prune(clock.now_us() - 60 * DAY_S * 1_000_000)
    assert months(store) <= max(0, tables - 3)  # dropped whole
    assert not until.why
    assert 15 < pruned.records < count
    assert told(store) == before
    assert audit(store) == []
    assert kept(store.entries())[:2] == (pruned.records, until.before_us)
    assert operator.prune(until.before_us)[0].records == 0
    clock.advance(100 * DAY_S)
    further, until = operator.prune(clock.now_us() - DAY_S * 1_000_000)
    assert further.records > pruned.records  # the sums of the first time, too
    assert kept(store.entries()).records == further.records
    assert told(store)[1] == before[1]
    assert audit(store) == []


def test_calls_go_on_meanwhile(books: Bursar, clock: ManualClock) -> None:
    store, stop, wrong = books.store, threading.Event(), []

    def work(number: int) -> None:
        count = 0
        while not stop.is_set() or count < 10:
            id = f"{store.now_us():014x}-{number}-{count}"
            for command in (reserve(id, (EVERYBODY, 60), version=99), settle(id, 25)):
                if type(answer := store.execute(command)) not in (Granted, Ended):
                    wrong.append(answer)
            count += 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    pruned, _ = Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)
    stop.set()
    for thread in threads:
        thread.join()
    assert pruned.records > 0
    assert not wrong
    assert audit(store) == []


def test_what_may_still_be_settled_late_stays(books: Bursar, clock: ManualClock) -> None:
    store = books.store
    Operator(store, by="ann").prune(clock.now_us() - 20 * DAY_S * 1_000_000)
    ids = {entry.id for entry in store.entries()}
    ages = {month: (MONTHS - month) * 30 - 3 for month in range(MONTHS)}  # in days, of what expired in that month
    for month, age in ages.items():
        assert (f"never {month}" in ids) == (age < 93), age
    last = f"never {MONTHS - 1}"
    assert type(store.execute(settle(last, 7))) is Ended
    assert store.execute(settle(last, 7)).again  # type: ignore[union-attr]
    assert store.execute(settle("never 0", 7)) == Rejected("unknown", "never 0")
    assert audit(store) == []


def test_i4_what_was_taken_back_late_may_be_pruned_after_what_it_corrects(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    """Its sums are below 0 then, and those of all that was pruned are not: the audit finds nothing."""
    store = opens(clock)
    operator = Operator(store, by="ann")
    with Bursar(store, [Budget("total", "90 USD")], clock=clock) as bursar:
        with_tables(store, clock)
        late = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500, ttl_s=60)
        clock.advance(61)
        bursar.tend()
        clock.advance(50 * DAY_S)
        with_tables(store, clock)
        late.settle(Usage(input_tokens=1))
        before = told(store)
        for kept_days in (1, 90):  # the second time, less goes than the first time
            clock.advance(50 * DAY_S)
            operator.prune(clock.now_us() - kept_days * DAY_S * 1_000_000)
            assert told(store) == before
            assert audit(store) == []
        assert {entry.kind for entry in store.entries()} == {"carried"}


def test_more_than_there_was_taken_back_in_sums_is_found(tmp_path: Path) -> None:
    file = tmp_path / "books.db"
    clock = ManualClock(time.time_ns() // 1_000)
    store = open_store(f"sqlite:///{file}", clock)
    with Bursar(store, [Budget("total", "90 USD")], clock=clock) as bursar:
        bursar.charge("1 USD")
        clock.advance(3 * DAY_S)
        Operator(store, by="ann").prune(clock.now_us() - DAY_S * 1_000_000)
        assert audit(store) == []
        with sqlite3.connect(file) as connection:
            connection.execute("UPDATE records SET amounts = replace(amounts, ':1000', ':-1000')")
            connection.execute("UPDATE accounts SET spent = -spent")
        assert "record" in [one.what for one in audit(store)]


def test_no_record_of_an_open_window_goes(opens: Callable[[ManualClock | None], Store], clock: ManualClock) -> None:
    with Bursar(
        opens(clock), [Budget("year", "90 USD", window="year"), Budget("r", "9 USD", window="rolling 30d")]
    ) as bursar:
        bursar.charge("1 USD")
        clock.advance(3 * DAY_S)
        until = bound(bursar.store, clock.now_us() - DAY_S * 1_000_000)
        assert "'year' is open" in until.why or "'r' is open" in until.why
        assert until.before_us <= clock.now_us() - 30 * DAY_S * 1_000_000
        assert Operator(bursar.store).prune(clock.now_us())[0].records == 0
        assert "may be made again" in bound(open_store("memory:", clock), clock.now_us()).why


def test_an_operator_alone_decides_to_prune(books: Bursar, clock: ManualClock) -> None:
    store, long_ago = books.store, clock.now_us() - 100 * DAY_S * 1_000_000
    key = Operator(store, by="ann").appoint()
    count = len(list(store.entries()))
    with pytest.raises(OperatorRequired):
        Operator(store, by="mallory").prune(long_ago)
    assert len(list(store.entries())) == count
    assert Operator(store, key, by="ann").prune(long_ago)[0].records > 0
    assert audit(store) == []


def test_memory_and_redis_are_not_pruned(clock: ManualClock) -> None:
    with pytest.raises(InvalidInput, match="Drain those of Redis"):
        Operator(open_store("memory:", clock)).prune(0)


def test_sums_that_nobody_decided_to_keep_are_found(tmp_path: Path) -> None:
    """Spending that somebody moves under records of sums of their own is told of."""
    file = tmp_path / "books.db"
    with Bursar(f"sqlite:///{file}", BUDGETS) as bursar:
        bursar.charge("1 USD")
    with sqlite3.connect(file) as connection:
        facts = json.dumps({"records": 1, "before_us": 1_000_000})
        connection.execute("UPDATE records SET kind = 'carried', settled_us = 999999, facts = ?", (facts,))
    store = open_store(f"sqlite:///{file}")
    assert [one.what for one in audit(store)] == ["record"]
    store.close()


def test_the_command_prunes_and_the_audit_says_so(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/books.db"
    clock = ManualClock(time.time_ns() // 1_000 - 200 * DAY_S * 1_000_000)
    with Bursar(url, [Budget("total", "9 USD")], clock=clock) as bursar:
        bursar.charge("1 USD")
        clock.advance(150 * DAY_S)
        bursar.charge("2 USD")
    run = CliRunner()
    done = run.invoke(main, ["prune", "--store", url, "--keep", "100d"], prog_name="bursar")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("1 records of before 20")
    assert done.output.endswith("UTC, 1.00 USD, were pruned; their sums are kept.\n")
    said = run.invoke(main, ["audit", "--store", url], prog_name="bursar").output
    assert "Every balance is what its records say.\n1 records of before 20" in said
    again = run.invoke(main, ["prune", "--store", url, "--keep", "1h"], prog_name="bursar").output
    assert "commands of the last day may be made again" in again
    assert run.invoke(main, ["prune", "--store", url], prog_name="bursar").exit_code == 2
