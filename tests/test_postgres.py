"""The contract of stores, kept by PostgreSQL."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from postgres_server import fresh_url
from psycopg import Connection

from bursar import Budget, BudgetExceeded, Bursar
from bursar.accounts import Rule
from bursar.clock import Clock
from bursar.commands import Ended, Granted, Refused, Reserve, Settle
from bursar.errors import StoreError
from bursar.schema import AccountRow
from bursar.stores.base import Store
from bursar.stores.leases import LeasedStore
from bursar.stores.postgres import PostgresStore, fast
from bursar.testing import StoreContract


class TestPostgres(StoreContract):
    @pytest.fixture
    def open_store(self) -> Callable[[Clock], Store]:
        url = fresh_url()
        return lambda clock: PostgresStore(url, clock=clock)


class TestLeasedPostgres(StoreContract):
    """What is not hot goes through a store with leases as it is."""

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[Clock], Store]:
        url = fresh_url()
        return lambda clock: LeasedStore(PostgresStore(url, clock=clock), tmp_path)


def test_tools_are_counted_in_calls_and_slots() -> None:
    with Bursar(fresh_url(), [Budget("tools", "2 calls"), Budget("flight", "3 slots")]) as bursar:
        for _ in range(2):
            with bursar.tool("search", cost="0.001 USD"):
                pass
        with pytest.raises(BudgetExceeded), bursar.tool("search"):
            pass
        assert [record.cost_nanos for record in bursar.records() if record.kind == "settlement"] == [1_000_000] * 2


def _read(connection: Connection[Any]) -> int:
    """The rows of accounts that the connection has read."""
    (read,) = connection.execute(
        "SELECT seq_tup_read + idx_tup_fetch FROM pg_stat_xact_user_tables "
        "WHERE relname = 'accounts' AND schemaname = current_schema()"
    ).fetchone() or (0,)
    return int(read)


def test_a_call_on_an_account_that_a_process_has_not_met_reads_no_others() -> None:
    """Otherwise each call of a new run, and each statement of several callers, takes the longer the more accounts there are."""
    dollars = Rule('["all"]', "all", "{}", "USD", "window", 10**12)
    with contextlib.closing(PostgresStore(fresh_url())) as store:

        def call(id: str, rule: Rule) -> None:
            draft = {"path": [], "tags": {}, "cost_nanos": 1, "usage": {}}
            assert type(store.execute(Reserve(id, ((rule, 1),), 10**9, draft))) is Granted
            assert type(store.execute(Settle(id, {"USD": 1}, 1, {}))) is Ended

        call("first", dollars)
        connection = store._connection
        assert connection is not None
        columns = ", ".join(f'"{name}"' for name in AccountRow.model_fields if name != "key")
        connection.execute("VACUUM ANALYZE accounts")  # a plan that is made now is made for very few of them
        call("second", dollars._replace(key="second"))
        connection.execute(
            f"INSERT INTO accounts(key, {columns}) SELECT key || i, {columns} "
            "FROM (SELECT * FROM accounts LIMIT 1) AS one, generate_series(1, 1000) AS i"
        )
        connection.execute("BEGIN")
        before = _read(connection)  # what statements before this have read may not have been reported yet
        call("met by others", dollars._replace(key=f"{dollars.key}17"))
        call("new", dollars._replace(key="new"))
        read = _read(connection) - before
        connection.execute("COMMIT")
    assert 0 < read < 50


def test_a_process_that_opens_a_store_of_this_schema_does_not_load_what_migrates_and_reports() -> None:
    """It takes 30 MiB in each process, and a quarter of a second."""
    url = fresh_url()
    PostgresStore(url).close()
    source = (
        "import sys\nfrom bursar.stores import open_store\nopen_store(sys.argv[1]).close()\n"
        "print({'sqlalchemy', 'sqlmodel', 'alembic', 'pydantic'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", source, url], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_what_a_process_knows_of_its_reservations_may_be_out_of_date() -> None:
    """It settles what it has reserved without reading it: so another has ended it, or another policy holds, or has no row."""
    url = fresh_url()
    rule = Rule('["all \\"é\\\\"]', "all", "{}", "USD", "window", 10**12)
    draft = {"path": [], "tags": {"team": 'a "b" {c}, \\d', "agent": "NULL"}, "cost_nanos": 5, "usage": {}}
    with contextlib.closing(PostgresStore(url)) as mine, contextlib.closing(PostgresStore(url)) as other:

        def reserve(store: PostgresStore, id: str, rule: Rule, amount: int = 5) -> None:
            assert type(store.execute(Reserve(id, ((rule, amount),), 10**9, draft))) is Granted

        def settled(store: PostgresStore, id: str, again: bool = False) -> int:
            ended = store.execute(Settle(id, {"USD": 3}, 3, {}))
            assert type(ended) is Ended
            assert (ended.entry.amounts, ended.entry.draft, ended.again) == ({rule.key: 3}, draft, again)
            return ended.accounts[0].rule.limit if ended.accounts else 0

        for id in ("makes the account", "mine", "by the other", "under a newer rule"):
            reserve(mine, id, rule)
        assert settled(mine, "mine") == settled(other, "by the other") == rule.limit
        settled(mine, "by the other", again=True)
        reserve(other, "newer", rule._replace(limit=30))
        assert settled(mine, "under a newer rule") == 30
        assert type(mine.execute(Reserve("too much", ((rule._replace(limit=30), 12),), 10**9, draft))) is Refused
        (account,) = mine.accounts()
        assert (account.spent, account.reserved, account.refused) == (9, 10, 1)
        assert {entry.id: entry.draft["tags"] for entry in mine.entries()}["mine"] == draft["tags"]
        with mine._read() as connection:
            assert connection.execute("SELECT team, agent FROM records WHERE id = 'mine'").fetchone() == (
                draft["tags"]["team"],
                "NULL",
            )
            connection.execute("DELETE FROM accounts")
        with pytest.raises(StoreError) as caught:
            mine.execute(Settle("makes the account", {"USD": 3}, 3, {}))
        assert caught.value.fault == "damaged"
        assert [one.id for one in mine.reservations()] == ["makes the account", "newer"]  # nothing was done


def test_what_a_process_remembers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "MAX_OPEN", 2)
    rule = Rule('["all"]', "all", "{}", "USD", "window", 10**12)

    def reserve(id: str) -> Reserve:
        return Reserve(id, ((rule, 60),), 10**9, {"path": [], "tags": {}, "cost_nanos": 60, "usage": {}})

    with contextlib.closing(PostgresStore(fresh_url())) as store:
        for id in ("makes the account", "a", "b", "c"):
            assert type(store.execute(reserve(id))) is Granted
        assert list(store._fast._open) == ["b", "c"]
        # the oldest is settled beside one that is granted
        answers = store._apply([reserve("d"), Settle("b", {"USD": 25}, 25, {})], True)
        assert [type(answer) for answer in answers] == [Granted, Ended]
        assert list(store._fast._open) == ["d"]
        for id in ("makes the account", "a", "c", "d"):
            assert type(store.execute(Settle(id, {"USD": 25}, 25, {}))) is Ended
        assert not store._fast._open
        assert [account.spent for account in store.accounts()] == [125]
