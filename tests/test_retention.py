"""Retention: records give way to their sums, and every balance can still be worked out anew (I4, I10)."""

from __future__ import annotations

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bursar import Budget, BudgetExceeded, Bursar, InvalidInput, Operator, OperatorRequired, StoreError, Usage
from bursar.audit import audit
from bursar.cli import main
from bursar.commands import Ended, Entry, Granted, Refused, Rejected, Tell
from bursar.retention import bound, kept
from bursar.stores import open_store, retiring
from bursar.stores.base import Store
from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import charge, reserve, rule, settle

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


def told(store: Store, before_us: int) -> tuple[object, int]:
    """What pruning must not change: every account but of windows that had ended by then, and the sum of all costs."""
    accounts = [one for one in store.accounts() if one.rule.end_us is None or one.rule.end_us > before_us]
    return accounts, sum(entry.cost_nanos for entry in store.entries())


def test_i10_balances_are_rebuilt_from_sums_and_records(books: Bursar, clock: ManualClock) -> None:
    store, wanted_us = books.store, clock.now_us() - 60 * DAY_S * 1_000_000
    before = told(store, wanted_us)
    count, tables = len(list(store.entries())), months(store)
    operator = Operator(store, by="ann")
    pruned, until = operator.prune(wanted_us)
    assert months(store) <= max(0, tables - 3)  # dropped whole
    assert not until.why
    assert 15 < pruned.records < count
    assert told(store, wanted_us) == before
    assert pruned.accounts > 0
    assert audit(store) == []
    assert kept(store.entries())[:2] == (pruned.records, until.before_us)
    assert operator.prune(until.before_us)[0].records == 0
    clock.advance(100 * DAY_S)
    further, until = operator.prune(clock.now_us() - DAY_S * 1_000_000)
    assert further.records > pruned.records  # the sums of the first time, too
    assert kept(store.entries()).records == further.records
    assert told(store, 0)[1] == before[1]
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


def test_an_audit_meanwhile_raises_no_false_alarm(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opens(clock)
    with_tables(store, clock)
    for number in range(1_100):  # more than are read at a time
        store.post(charge(f"{store.now_us():014x}-{number:04}", (EVERYBODY, 5)))
    assert type(store.execute(charge(f"{store.now_us():014x}-last", (EVERYBODY, 5)))) is Ended
    clock.advance(200 * DAY_S)
    read = store.entries

    def meanwhile() -> Iterator[Entry]:
        found = read()
        yield next(found)
        Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)
        yield from found

    monkeypatch.setattr(store, "entries", meanwhile)
    assert audit(store) == []
    store.close()


def scopes(store: Store, budget: str) -> list[str]:
    return [account.rule.scope for account in store.accounts() if account.rule.budget == budget]


def test_accounts_that_are_done_with_go_and_may_come_back(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    budgets = [
        Budget("run", "1 USD", per="run"),
        Budget("pace", "5 requests/minute", per="run"),
        Budget("flight", "2 slots", per="run"),
        Budget("team", "90 USD", per="team"),
        Budget("day", "9 USD", window="day", per="team"),
    ]

    def spend(run: str, output_tokens: int) -> None:
        with bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=40_000, tags={"run": run}) as call:
            call.settle(Usage(input_tokens=10, output_tokens=output_tokens))

    def team_spent() -> int:
        return next(account.spent for account in store.accounts() if account.rule.budget == "team")

    with Bursar(opens(clock), budgets, clock=clock, max_accounts=2) as bursar, bursar.scope(team="red"):
        store, operator = bursar.store, Operator(bursar.store, by="ann")
        spend("old", 40_000)
        clock.advance(200 * DAY_S)
        spend("new", 40_000)
        with pytest.raises(StoreError, match="bursar prune"):
            spend("next", 1)
        pruned, until = operator.prune(clock.now_us() - 100 * DAY_S * 1_000_000)
        assert pruned[:3:2] == (1, 4)  # the run's three accounts, and a day's
        assert scopes(store, "run") == scopes(store, "pace") == scopes(store, "flight") == ['{"run": "new"}']
        assert len(scopes(store, "team")) == len(scopes(store, "day")) == 1
        assert team_spent() == sum(record.cost_nanos for record in bursar.records()) > 0
        assert audit(store) == []
        assert operator.prune(until.before_us)[0] == (0, 0, 0)

        spend("old", 40_000)  # which begins anew: with what it had spent before, this would pass its limit
        assert sorted(scopes(store, "run")) == ['{"run": "new"}', '{"run": "old"}']
        assert audit(store) == []
        clock.advance(200 * DAY_S)
        assert operator.prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].accounts == 7  # two runs, and a day of both
        assert scopes(store, "run") == []
        assert audit(store) == []
        assert team_spent() == sum(record.cost_nanos for record in bursar.records())


def test_the_account_of_a_block_goes_and_that_of_a_tag_stays(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    with Bursar(opens(clock), [], clock=clock) as bursar:
        for tags in ({}, {"scope": "nightly"}, {"customer": "c-1"}):
            with bursar.scope(budget="1 USD", **tags):
                bursar.charge("0.01 USD")
        clock.advance(200 * DAY_S)
        assert Operator(bursar.store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].accounts == 1
        assert [status.scope for status in bursar.status()] == [{"customer": "c-1"}, {"scope": "nightly"}]
        assert audit(bursar.store) == []


def test_alerts_go_that_were_told_or_that_nobody_takes(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    store = opens(clock)
    for name, days in (("old", 90), ("told", 50), ("untold", 50), ("new", 0)):
        store.execute(Tell(name, "frozen", {}))
        clock.advance(days * DAY_S)
    store.delivered(["told"])
    Operator(store, by="ann").prune(clock.now_us() - 40 * DAY_S * 1_000_000)
    assert [alert.id for alert, _ in store.alerts()] == ["untold", "new"]
    store.close()


def test_what_an_operator_granted_a_run_is_not_granted_again(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    with Bursar(opens(clock), [Budget("run", "1 USD", per="run")], clock=clock) as bursar:
        store = bursar.store
        operator = Operator(store, Operator(store, by="ann").appoint(), by="ann")
        for run, for_s in (("raised", None), ("raised once", 60.0), ("as it was", None)):
            with bursar.scope(run=run):
                bursar.charge("1 USD")
            if run != "as it was":
                operator.raise_limit("run", "1 USD", {"run": run}, for_s=for_s)
        clock.advance(200 * DAY_S)
        assert operator.prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].accounts == 2
        (status,) = bursar.status(run="raised")
        assert (status.limit, status.spent) == (2, 1)
        assert audit(store) == []


def test_what_an_open_reservation_names_stays_and_what_differs_from_its_records(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    free, wrong, over = (rule(name, 10**9, of=name) for name in ("free", "wrong", "over"))
    store = opens(clock)
    for held in (wrong, over):
        store.execute(charge(f"{store.now_us():014x}-{held.budget}", (held, 5)))
    store.execute(reserve("open", (free, 0), ttl_us=900 * DAY_S * 1_000_000))
    clock.advance(200 * DAY_S)
    statement = "UPDATE accounts SET spent = 4 WHERE budget = 'wrong'"
    if isinstance(store, SqliteStore):
        with sqlite3.connect(store.path) as connection:
            connection.execute(statement)
    else:
        from postgres_server import connect

        with connect() as connection:
            connection.execute(f"SET search_path = {KEPT}")
            connection.execute(statement)
    pruned, _ = Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)
    assert pruned.accounts == 1
    assert sorted(account.rule.budget for account in store.accounts()) == ["free", "wrong"]
    assert [(one.what, one.key) for one in audit(store)] == [("spent", wrong.key)]
    assert type(store.execute(settle("open", 0))) is Ended
    store.close()


def test_runs_that_come_back_meanwhile_lose_nothing(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    """Several callers meet accounts at the moment when they go; as many rest."""
    store, others = opens(clock), [opens(clock) for _ in range(3)]
    runs = [rule("run", 10**9, of=f"r{number}") for number in range(1_200)]
    back = runs[:600]
    with_tables(store, clock)
    for number, one in enumerate(runs):
        store.execute(charge(f"{store.now_us():014x}-{number}", (one, 5)))
    clock.advance(200 * DAY_S)
    with_tables(store, clock)
    wrong: list[object] = []

    def work(its: Store, name: int) -> None:
        for number, one in enumerate(back):
            id = f"{its.now_us():014x}-{name}-{number}"
            for command in (reserve(id, (one, 60), version=99), settle(id, 25)):
                if type(answer := its.execute(command)) not in (Granted, Ended):
                    wrong.append(answer)

    threads = [threading.Thread(target=work, args=(its, name)) for name, its in enumerate(others)]
    for thread in threads:
        thread.start()
    pruned, _ = Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)
    for thread in threads:
        thread.join()
    assert not wrong
    assert pruned.accounts >= len(runs) - len(back)
    assert audit(store) == []
    assert len(list(store.accounts())) == len(back)
    for one in (store, *others):
        one.close()


def test_a_rolling_window_that_is_used_again_meanwhile_forgets_nothing(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that rested is used at the moment when it is to go, for as much as had been spent in it before."""
    store = opens(clock)
    pace, idle = rule("pace", 3, "rolling", "requests", period_us=3_600_000_000, of="r"), retiring.idle

    def use() -> None:
        for number in range(3):
            clock.advance(61)
            assert type(store.execute(charge(f"{store.now_us():014x}-{number}", (pace, 1)))) is Ended

    def meanwhile(*said: Any) -> Any:
        found = list(idle(*said))
        use()
        return found

    use()
    clock.advance(200 * DAY_S)
    with_tables(store, clock)
    module = "sqlite_tables" if isinstance(store, SqliteStore) else "postgres.partitions"
    monkeypatch.setattr(f"bursar.stores.{module}.idle", meanwhile)
    assert Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].accounts == 0
    assert type(store.execute(reserve("more", (pace, 1), version=99))) is Refused
    assert audit(store) == []
    monkeypatch.undo()
    clock.advance(200 * DAY_S)
    assert Operator(store, by="ann").prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].accounts == 1
    assert audit(store) == []
    store.close()


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
        before = told(store, 0)
        for kept_days in (1, 90):  # the second time, less goes than the first time
            clock.advance(50 * DAY_S)
            operator.prune(clock.now_us() - kept_days * DAY_S * 1_000_000)
            assert told(store, 0) == before
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


def test_a_correction_may_go_long_after_its_expiry(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    store = opens(clock)
    operator = Operator(store, by="ann")
    store.execute(reserve("given", (EVERYBODY, 10), ttl_us=1_000_000))
    clock.advance(2)
    assert store.sweep() == 1
    clock.advance(3 * DAY_S)
    between_us = clock.now_us()
    clock.advance(3 * DAY_S)
    assert type(store.execute(settle("given", 6))) is Ended
    clock.advance(200 * DAY_S)
    assert operator.prune(between_us)[0][:2] == (1, 10)
    assert operator.prune(clock.now_us() - 100 * DAY_S * 1_000_000)[0].records == 2
    assert sum(entry.cost_nanos for entry in store.entries()) == 6
    assert audit(store) == []
    store.close()


def test_ids_that_look_like_a_time_keep_nothing(
    opens: Callable[[ManualClock | None], Store], clock: ManualClock
) -> None:
    """Of random ids that callers give, one in thirty looks like one of a later year, one in thousands like one of any month."""
    store = opens(clock)
    with_tables(store, clock)
    old_us = clock.now_us()
    for id in (f"{old_us:014x}-made", "0e1c7a52-9f0b-4f6e", f"{old_us + 230 * DAY_S * 1_000_000:014x}"):
        assert type(store.execute(charge(id, (EVERYBODY, 5)))) is Ended
    clock.advance(230 * DAY_S)
    with_tables(store, clock)
    assert type(store.execute(charge(f"{old_us + 1:014x}", (EVERYBODY, 5)))) is Ended  # in the old month, of today
    pruned, _ = Operator(store, by="ann").prune(clock.now_us() - 10 * DAY_S * 1_000_000)
    assert pruned.records == 3
    assert {entry.id for entry in store.entries() if entry.kind == "charge"} == {f"{old_us + 1:014x}"}
    assert audit(store) == []
    store.close()


def test_an_operator_alone_decides_to_prune(books: Bursar, clock: ManualClock) -> None:
    store, long_ago = books.store, clock.now_us() - 100 * DAY_S * 1_000_000
    key = Operator(store, by="ann").appoint()
    count = len(list(store.entries()))
    with pytest.raises(OperatorRequired):
        Operator(store, by="mallory").prune(long_ago)
    assert len(list(store.entries())) == count
    assert Operator(store, key, by="ann").prune(long_ago)[0].records > 0
    assert audit(store) == []


def test_memory_is_not_pruned(clock: ManualClock) -> None:
    with pytest.raises(InvalidInput, match="Only stores on SQLite"):
        Operator(open_store("memory:", clock)).prune(0)


def test_ended_windows_make_room_in_memory(clock: ManualClock) -> None:
    """Nobody can prune it: with a budget per user and day it would refuse everybody some day. What is open or named stays."""
    store = MemoryStore(clock, max_entries=4)
    with Bursar(store, [Budget("day", "1 USD", window="day", per="user")], clock=clock, max_accounts=6) as bursar:
        for number in range(20):
            clock.advance(DAY_S)
            with bursar.scope(user=f"u{number}"):
                bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=50, ttl_s=DAY_S)
                bursar.charge("1 USD")
                bursar.tend()
        with bursar.scope(user="u19"), pytest.raises(BudgetExceeded):
            bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=50)
        left = {account.rule.key for account in store.accounts()}
        assert len(left) <= 6
        assert {key for entry in store.entries() for key in entry.amounts} <= left
        assert {key for one in store.reservations() for key, _, _ in one.held} <= left


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


def test_more_cannot_be_retired_than_was_pruned(tmp_path: Path, clock: ManualClock) -> None:
    """Spending that somebody moves under a prune that an operator decided is told of."""
    file = tmp_path / "books.db"
    store = open_store(f"sqlite:///{file}", clock)
    store.execute(charge(f"{store.now_us():014x}", (EVERYBODY, 5)))
    _, until = Operator(store, by="ann").prune(clock.now_us())
    with sqlite3.connect(file) as connection:
        told = f"'x', 'retired', NULL, {until.before_us - 1}, '{json.dumps({EVERYBODY.key: -5})}'"
        named, rest = (
            "id, kind, corrects, settled_us, amounts",
            "outcome, estimated, reason, cost_nanos, usage, reserved_us",
        )
        rest += ", digest, draft, facts"
        connection.execute(f"INSERT INTO records({named}, {rest}) SELECT {told}, {rest} FROM records")
        connection.execute("UPDATE records SET cost_nanos = 0 WHERE kind = 'retired'")
        connection.execute("UPDATE accounts SET spent = 0")
    assert [(one.what, one.held) for one in audit(store)] == [("record", -5)]
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


def test_commands_take_the_url_of_processes_with_leases_and_take_none(tmp_path: Path, clock: ManualClock) -> None:
    from postgres_server import fresh_url

    plain = fresh_url()
    url, run = f"{plain}&leases={tmp_path}", CliRunner()
    with Bursar(url, BUDGETS) as bursar, bursar.scope(user="alice"):
        bursar.charge("1 USD")
    asked = (
        ["prune", "--keep", "1d"],
        ["erase", "--user", "alice"],
        ["audit"],
        ["status"],
        ["records"],
        ["recover", str(tmp_path)],
    )
    for command in asked:
        done = run.invoke(main, [*command, "--store", url], prog_name="bursar")
        assert done.exit_code == 0, done.output
        assert not list(tmp_path.iterdir())
    with Bursar(plain) as bursar:
        assert [record.tags["user"][:7] for record in bursar.records()] == ["erased-"]
