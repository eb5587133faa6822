"""Erasure: nothing in the store names a person any more, and no amount is another (I3, I4)."""

from __future__ import annotations

import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bursar import ApprovalRequired, Budget, BudgetExceeded, Bursar, InvalidInput, Operator, OperatorRequired, Usage
from bursar.audit import audit
from bursar.cli import main
from bursar.commands import Ended, Granted
from bursar.stores import open_store
from bursar.stores.base import Store
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import reserve, rule, settle

ALICE = ["alice", 'al"i\\ce {é}']
BUDGETS = [
    Budget("day", "10 USD", window="day", per="user", thresholds=[{"at": "0.01%", "action": "notify"}]),
    Budget("hour", "5 USD", window="rolling 1h", per=("user", "desk")),
    Budget("small", "0.01 USD", per="user"),
    Budget("rate", "1000 requests/minute", per="agent"),
]
MARKER = "erased-1"


class Books(str):
    """The URL of a store, and every row of every table in it as text."""

    def rows(self) -> dict[str, list[str]]:
        if self.startswith("sqlite"):
            with sqlite3.connect(self.split("///")[1].split("?")[0]) as connection:
                names = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                return {name: [repr(row) for row in connection.execute(f"SELECT * FROM {name}")] for name in names}
        from postgres_server import SCHEMA, connect

        with connect() as connection:
            found = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = %s", (SCHEMA,)).fetchall()
            return {
                name: [repr(row) for row in connection.execute(f"SELECT * FROM {name}").fetchall()] for (name,) in found
            }


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Books:
    if request.param == "sqlite":
        return Books(f"sqlite:///{tmp_path}/books.db?durability=process")
    from postgres_server import fresh_url

    return Books(fresh_url())


def calls(bursar: Bursar, user: str, clock: ManualClock) -> None:
    """Settled, refused, charged, left to expire, and one that stays open."""
    with bursar.scope(user=user, agent="a", desk="7"):
        with bursar.call("openai", "gpt-4o", input_tokens=100, max_output_tokens=50) as call:
            call.settle(Usage(input_tokens=100, output_tokens=9))
        with pytest.raises(BudgetExceeded):
            bursar.reserve("openai", "gpt-4o", input_tokens=1_000_000, max_output_tokens=50)
        bursar.charge("0.001 USD", tool="crawler")
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5, ttl_s=60, id=f"late {len(user)}")
        clock.advance(61)
        bursar.tend()
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5, id=f"open {len(user)}")


def amounts(store: Store) -> object:
    """Every amount of the books, without who it belongs to."""
    return (
        sorted(account[1:] for account in store.accounts()),
        sorted((entry.id, entry.kind, entry.cost_nanos, sorted(entry.amounts.values())) for entry in store.entries()),
        sorted((one.id, sorted(amount for _, _, amount in one.held)) for one in store.reservations()),
    )


@pytest.mark.parametrize("alice", ALICE)
def test_i4_nobody_is_named_any_more_and_no_amount_is_another(url: Books, alice: str) -> None:
    clock = ManualClock()
    store = open_store(url, clock)
    key = Operator(store, by="ann").appoint()
    operator = Operator(store, key, by="ann")
    with Bursar(store, BUDGETS, clock=clock) as bursar:
        for user in (alice, "bob"):
            calls(bursar, user, clock)
        operator.freeze({"user": alice})
        operator.resume(next(iter(operator.frozen())))
        operator.raise_limit("small", "1 USD", {"user": alice})
        before, theirs = amounts(store), bobs(url)
        assert audit(store) == []
        with pytest.raises(OperatorRequired):
            Operator(store, by="mallory").erase("user", alice, marker=MARKER)
        erased = operator.erase("user", alice, marker=MARKER)
        assert (erased.accounts, erased.reservations, erased.left) == (3, 1, 0)
        assert erased.records >= 4
        assert erased.alerts >= 2
        assert erased.definitions == 3
        named = [row for rows in url.rows().values() for row in rows if any(one in row for one in spellings(alice))]
        assert named == []
        assert amounts(store) == before
        assert bobs(url) == theirs
        assert audit(store) == []
        assert {entry.draft["tags"]["user"] for entry in store.entries({"user": MARKER})} == {MARKER}
        for id in ("open", "late"):  # what was under way ends where it began
            assert type(store.execute(settle(f"{id} {len(alice)}", 7))) is Ended
        assert audit(store) == []
        with bursar.scope(user=alice, agent="a"):
            bursar.charge("0.002 USD")
        (again,) = [one for one in bursar.status(user=alice) if one.name == "day"]
        assert str(again.spent) == "0.002"
        assert audit(store) == []


@pytest.mark.parametrize("alice", [*ALICE, "Alice Smith"])
def test_i4_what_a_threshold_asks_names_nobody_either(url: Books, alice: str) -> None:
    """The question says in words whose budget it is; that of somebody whose name begins alike stays as it is."""
    store = open_store(url)
    asking = Budget("day", "10 USD", per=("user", "desk"), thresholds=[{"at": "1%", "action": "ask"}])
    with Bursar(store, [asking]) as bursar:
        for user in (alice, f"{alice} Jr"):
            with bursar.scope(user=user, desk="7"):
                bursar.charge("0.20 USD")
                with pytest.raises(ApprovalRequired):
                    bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5)
        Operator(store).erase("user", alice, marker=MARKER)
        asked = {one.tags["user"]: one.why for one in Operator(store).questions()}
        assert f"(user={MARKER}, desk=7)" in asked[MARKER]
        assert f"(user={alice} Jr, desk=7)" in asked[f"{alice} Jr"]
        rows = [row for rows in url.rows().values() for row in rows]
        for one in spellings(f"{alice} Jr"):
            rows = [row.replace(one, "") for row in rows]
        assert [row for row in rows if any(one in row for one in spellings(alice))] == []


@pytest.mark.parametrize("alice", [*ALICE, "x" * 90 + " alice"])
def test_i4_the_budget_that_a_scope_was_opened_with_names_nobody_either(url: Books, alice: str) -> None:
    """Its name is made of the scope's tags, and is cut: in keys and rows of accounts, in counts, and as why a call was refused."""
    store = open_store(url)
    with Bursar(store) as bursar:
        with bursar.scope(user=alice, desk="7", budget="0.01 USD"):
            bursar.charge("0.001 USD")
            with pytest.raises(BudgetExceeded):
                bursar.reserve("openai", "gpt-4o", input_tokens=1_000_000, max_output_tokens=50)
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5, id="open")
        before = amounts(store)
        Operator(store).erase("user", alice, marker=MARKER)
        named = [
            row for rows in url.rows().values() for row in rows if any(one[:80] in row for one in spellings(alice))
        ]
        assert named == []
        assert amounts(store) == before
        assert type(store.execute(settle("open", 7))) is Ended
        assert audit(store) == []
        (account,) = store.accounts()
        assert json.loads(account.rule.key)[0] == account.rule.budget == f"scope user={MARKER} desk=7"


def bobs(url: Books) -> list[str]:
    return sorted(row for rows in url.rows().values() for row in rows if "bob" in row)


def spellings(value: str) -> set[str]:
    plain = json.dumps(value, ensure_ascii=False)[1:-1]
    nested = json.dumps(plain, ensure_ascii=False)[1:-1]
    return {text for one in (value, plain, nested) for text in (one, repr(one)[1:-1])}


def test_a_run_is_erased_from_the_paths_of_others_too(url: Books) -> None:
    with Bursar(url, [Budget("run", "1 USD", per="run")]) as bursar, bursar.scope(run="alices"), bursar.scope(run="r2"):
        bursar.charge("0.5 USD")
        Operator(bursar.store).erase("run", "alices", marker=MARKER)
        (record,) = bursar.records()
        assert record.path == (MARKER, "r2")
        assert not [row for rows in url.rows().values() for row in rows if "alices" in row]
        assert audit(bursar.store) == []


def test_decisions_of_a_former_operator_are_left_and_told_of(url: Books) -> None:
    store = open_store(url)
    key = Operator(store, by="ann").appoint()
    with Bursar(store, [Budget("day", "10 USD", per="user")]) as bursar, bursar.scope(user="alice"):
        bursar.charge("0.5 USD")
        Operator(store, key).raise_limit("day", "1 USD", {"user": "alice"})
        second = Operator(store, key).appoint()
        assert Operator(store, second).erase("user", "alice", marker=MARKER).left == 1
        assert audit(store) == []


def test_calls_that_go_on_meanwhile_are_booked(url: Books) -> None:
    store = open_store(url)
    mine, bob = rule("b", 10**12, of="alice"), rule("b", 10**12, of="bob")
    stop, wrong, done = threading.Event(), [], [0, 0]

    def work(number: int) -> None:
        count = 0
        while not stop.is_set() or count < 10:
            id = f"{number}-{count}"
            answers: tuple[Any, ...] = (
                store.execute(reserve(id, (mine if number else bob, 60), version=99)),
                store.execute(settle(id, 25)),
            )
            wrong.extend(one for one in answers if type(one) not in (Granted, Ended))
            count += 1
        done[number] = count

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for number in range(3):
        Operator(store).erase("run", "alice", marker=f"erased-{number}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert audit(store) == []
    spent = {json.loads(one.rule.scope)["run"]: one.spent for one in store.accounts()}
    assert sum(spent.values()) == 25 * sum(done)
    assert spent["bob"] == 25 * done[0]
    store.close()


def test_the_command_names_the_marker(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/books.db"
    with Bursar(url, [Budget("day", "10 USD", per="user")]) as bursar, bursar.scope(user="alice"):
        bursar.charge("0.5 USD")
    wrong = CliRunner().invoke(main, ["erase", "--store", url, "--user", "Alice"], prog_name="bursar")
    assert (wrong.exit_code, "Nothing in the store names user=Alice" in wrong.output) == (1, True)
    done = CliRunner().invoke(main, ["erase", "--store", url, "--user", "alice"], prog_name="bursar")
    assert done.exit_code == 0, done.output
    assert done.output.startswith(
        "Erased in 1 records, 1 accounts, 0 open reservations, 0 alerts and 0 decisions: user is erased-"
    )
    assert "alice" not in (tmp_path / "books.db").read_bytes().decode("latin-1")
    assert CliRunner().invoke(main, ["erase", "--store", url], prog_name="bursar").exit_code == 2


def test_memory_and_redis_say_what_to_do() -> None:
    with pytest.raises(InvalidInput, match="Drain the records of Redis"):
        Operator(open_store("memory:")).erase("user", "alice", marker=MARKER)
