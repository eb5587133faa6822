"""Records of PostgreSQL in partitions: made ahead, unique over all of them (I6), and come by while others go on settling."""

from __future__ import annotations

import gzip
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from postgres_server import SCHEMA, connect, fresh_url, server
from psycopg import sql

from bursar import Operator
from bursar.audit import audit
from bursar.commands import Ended, Granted, Rejected, Release
from bursar.migrations import upgrade
from bursar.schema import RecordRow
from bursar.stores.postgres import PostgresStore, partitions
from bursar.stores.postgres.partitions import MAX_MOVED, Month, announce, existing, make_ahead
from bursar.stores.postgres.server import is_passing
from bursar.stores.pruning import batch
from bursar.testing.store_contract.made import charge, reserve, rule, settle

DOLLAR = rule("b", 10**12)
OLD_LAW = Path(__file__).parent / "data" / "postgres" / "law_of_schema_0002.sql.gz"
OLD = f"{SCHEMA}_old"


def table_of(connection: psycopg.Connection[Any], id: str) -> str:
    ((name,),) = connection.execute("SELECT tableoid::regclass::text FROM records WHERE id = %s", (id,)).fetchall()
    return str(name)


@pytest.fixture
def store() -> Iterator[PostgresStore]:
    store = PostgresStore(fresh_url())
    yield store
    store.close()


@pytest.fixture
def old() -> Iterator[psycopg.Connection[Any]]:
    """A schema as Bursar made it before there were partitions, with the functions that it had then."""
    from sqlalchemy import create_engine

    with connect() as connection:
        connection.execute(f"CREATE SCHEMA {OLD}; SET search_path = {OLD}")
        connection.autocommit = False
        with create_engine("postgresql+psycopg://", creator=lambda: connection).begin() as bound:
            upgrade(bound, "0002")
    with psycopg.connect(server().get_uri(), autocommit=True, options=f"-c search_path={OLD}") as connection:
        connection.execute(gzip.decompress(OLD_LAW.read_bytes()).replace(b"bursar_", b"bursar_old_"))
        yield connection
        connection.execute(f"DROP SCHEMA {OLD} CASCADE")


class OldWorker:
    """What a process of the old version sends, one command after another."""

    def __init__(self) -> None:
        self.connection = psycopg.connect(
            server().get_uri(),
            autocommit=True,
            options=f"-c search_path={OLD} -c plan_cache_mode=force_generic_plan -c enable_seqscan=off",
        )

    def say(self, **command: Any) -> dict[str, Any]:
        text = json.dumps([command])
        for careful in (False, True):
            (answer,) = json.loads(self._apply(text, careful))["answers"]
            if answer["t"] != "careful":
                return dict(answer)
        raise AssertionError("unreachable")

    def _apply(self, text: str, careful: bool) -> str:
        """As any process does, it makes a command again that the migration has undone."""
        query = "SELECT bursar_old_apply(%s::jsonb, %s, NULL, NULL)"
        for last in (False, True):
            try:
                return str(self.connection.execute(query, (text, careful), prepare=True).fetchall()[0][0])
            except psycopg.Error as error:
                if last or not is_passing(error):
                    raise
        raise AssertionError("unreachable")

    def reserve(self, id: str, amount: int) -> str:
        new = {
            "spent": 0, "overrun": 0, "refused": 0, "refused_minute": 0, "refused_in_minute": 0, "level": 0, "remainder": 0,
            "at_us": 0, "buckets": "", "crossed": 0, "marks": "", "reserved": amount,
        }  # fmt: skip
        line = {**DOLLAR._asdict(), **new}
        short = [DOLLAR.key, amount, DOLLAR.limit, DOLLAR.end_us, DOLLAR.period_us, DOLLAR.enforce, ""]
        draft = {"path": [], "tags": {"run": "r"}, "cost_nanos": amount, "usage": {}}
        answer = self.say(
            c="reserve", id=id, held=json.dumps([(DOLLAR.key, "USD", amount)]), ttl_us=600_000_000, draft=json.dumps(draft),
            digest="", on_expiry="charge", version=0, max=10, quiet=False, complied={}, behind="",
            lines=json.dumps([line]), fast=[short],
        )  # fmt: skip
        return str(answer["t"])

    def settle(self, id: str, amount: int) -> str:
        answer = self.say(
            c="settle", id=id, actuals={"USD": amount}, cost_nanos=amount, usage="{}", outcome="completed",
            estimated=False, reason="", facts="{}", answered=None,
        )  # fmt: skip
        return str(answer["t"])

    def release(self, id: str) -> str:  # one of the long ways, where functions hand each other rows of records
        return str(
            self.say(c="release", id=id, outcome="cancelled", reason="", facts="{}", actuals={})["t"],
        )


def test_an_id_lies_in_the_month_that_it_begins_with(store: PostgresStore) -> None:
    now = Month.of(store.now_us())
    ids = {
        f"{now.start_us:014x}-a": now.table,
        f"{now.later(1).start_us - 1:014x}-b": now.table,
        f"{now.later(1).start_us:014x}-c": now.later(1).table,
        f"{now.later(40).start_us:014x}-d": "records_ahead",
        f"{now.later(-9).start_us:014x}-e": "records_other",
        "my own": "records_other",
    }
    with connect() as connection:
        for id, table in ids.items():
            store.execute(reserve(id, (DOLLAR, 60)))
            assert type(store.execute(settle(id, 25))) is Ended
            assert table_of(connection, id) == table
            assert store.execute(settle(id, 25)).again  # type: ignore[union-attr]
            assert store.execute(charge(id, (DOLLAR, 1))) == Rejected("conflict", id)
    assert [entry.id for entry in store.entries()] == sorted(ids)
    assert audit(store) == []


def test_months_get_their_tables_ahead_and_what_came_before_moves_in(store: PostgresStore) -> None:
    with connect() as connection:
        try:
            this = Month.of(store.now_us())
            later = this.later(40)
            for number in range(3):
                store.execute(charge(f"{later.later(number).start_us:014x}-a", (DOLLAR, 1)))
            assert make_ahead(connection, this.start_us) == []
            assert make_ahead(connection, later.start_us) == [later, later.later(1), later.later(2)]
            assert existing(connection)[-1] == later.later(2)
            for number in range(3):
                id = f"{later.later(number).start_us:014x}-a"
                assert table_of(connection, id) == later.later(number).table
                assert store.execute(charge(id, (DOLLAR, 1))).again  # type: ignore[union-attr]
            assert audit(store) == []
        finally:
            for month in existing(connection):
                if month > this.later(2):
                    connection.execute(f"DROP TABLE {month.table}")


def test_a_month_with_many_records_gets_no_table_late(store: PostgresStore) -> None:
    """Moving them into it would lock the others out for as long, or take longer than a statement may, at every start."""
    later = Month.of(store.now_us()).later(40)
    store.execute(charge(f"{later.start_us:014x}-a", (DOLLAR, 1)))
    with connect() as connection:
        try:
            columns = [name for name in RecordRow.model_fields if name != "id"]
            named = ", ".join(f'"{name}"' for name in columns)
            connection.execute(
                f"INSERT INTO records(id, {named}) SELECT id || number, {named} FROM records, generate_series(1, %s) AS number "
                "WHERE id LIKE %s",
                (MAX_MOVED, f"{later.start_us:014x}%"),
            )
            assert make_ahead(connection, later.start_us) == [later.later(1), later.later(2)]
            assert table_of(connection, f"{later.start_us:014x}-a") == "records_ahead"
        finally:
            for month in (later.later(1), later.later(2)):
                connection.execute(f"DROP TABLE {month.table}")
            connection.execute("DELETE FROM records_ahead")


def test_two_may_prune_at_once(store: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a month that one has taken out the other, who had seen it before, says nothing."""
    old, day_us = Month.of(store.now_us()).later(-20), 86_400_000_000
    with connect() as connection:
        names = {
            "table": sql.Identifier(old.table),
            "low": sql.Literal(old.first_id),
            "high": sql.Literal(old.later(1).first_id),
        }
        text = "CREATE TABLE {table} PARTITION OF records_timed FOR VALUES FROM ({low}) TO ({high})"
        connection.execute(sql.SQL(text).format(**names))
    for number in range(3):
        store.execute(charge(f"{old.first_id}-{number}", (DOLLAR, 5)))
    with connect() as connection:
        connection.execute("UPDATE records SET reserved_us = %s, settled_us = %s", (old.start_us, old.start_us))
    found, others = partitions.existing, []

    def meanwhile(connection: psycopg.Connection[Any]) -> list[Month]:
        seen = found(connection)
        if not others:
            others.append(None)
            others.append(Operator(store, by="bob").prune(store.now_us() - 200 * day_us)[0].records)
        return seen

    monkeypatch.setattr(partitions, "existing", meanwhile)
    assert Operator(store, by="ann").prune(store.now_us() - 200 * day_us)[0].records == 0
    assert others == [None, 3]
    assert audit(store) == []


def test_a_prune_gives_way_to_calls_that_count_accounts_in_another_order(store: PostgresStore) -> None:
    pruned: list[int] = []
    ones = [rule(name, 10**12, of="r") for name in ("a", "z")]
    for one in ones:
        assert type(store.execute(reserve(one.budget, (one, 0)))) is Granted
        assert type(store.execute(Release(one.budget))) is Ended
    with connect() as somebody:
        somebody.execute("DELETE FROM records")
        count = "UPDATE account_counts SET accounts = accounts + 0 WHERE budget = %s"
        prune = Operator(store, by="ann").prune
        thread = threading.Thread(target=lambda: pruned.append(prune(store.now_us())[0].accounts))
        with somebody.transaction():
            somebody.execute(count, ("z",))
            thread.start()
            with connect() as watch:
                while watch.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchall() == []:
                    assert not pruned
            somebody.execute(count, ("a",))
        thread.join()
    assert pruned == [2]


def test_an_erasure_waits_for_sums_that_are_being_written(store: PostgresStore) -> None:
    """Else they would keep the name, and their account has another."""
    person = rule("b", 10**12, of="alice")
    store.execute(charge("a", (person, 5)))
    erased: list[object] = []
    thread = threading.Thread(
        target=lambda: erased.append(Operator(store, by="bob").erase("run", "alice", marker="erased-1"))
    )
    before_us = store.now_us()
    Operator(store, by="ann").prune(before_us - 1)  # which is a decision to do so
    with connect() as connection:
        with connection.transaction(), connection.cursor() as cursor:
            assert partitions._is_alone(connection, "records_other")
            assert batch(cursor, "%s", "records_other", "true", before_us, {}) == (1, 5, 0)
            thread.start()
            with connect() as watch:
                while watch.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchall() == []:
                    assert not erased
        thread.join()
    assert {key for entry in store.entries() for key in entry.amounts} == {
        account.rule.key for account in store.accounts()
    }
    assert '"alice"' not in "".join(account.rule.key for account in store.accounts())


def test_who_reads_all_the_time_holds_up_no_settlement(store: PostgresStore) -> None:
    """The table of a month is left for later, and a settlement waits for neither."""
    later = Month.of(store.now_us()).later(40)
    store.execute(reserve("a", (DOLLAR, 60)))
    with connect() as reader, connect() as connection, reader.transaction():
        reader.execute("SELECT * FROM records").fetchall()
        assert make_ahead(connection, later.start_us) == []
        assert type(store.execute(settle("a", 25))) is Ended


def test_i7_old_workers_go_on_while_their_schema_gets_partitions(old: psycopg.Connection[Any]) -> None:
    """Reservations that are open meanwhile are ended afterwards, by the old functions and by the new ones."""
    worker = OldWorker()
    for id in ("by old", "by new", "to release"):
        assert worker.reserve(id, 60).startswith("granted")
    later = f"{Month.of(2_000_000_000_000_000).start_us:014x}-given"  # an id of a month to come, which is moved
    worker.reserve(later, 60)
    worker.settle(later, 25)
    told: list[str] = []
    stop, wrong = threading.Event(), []

    def work(number: int) -> None:
        mine = OldWorker()
        try:
            count = 0
            while not stop.is_set() or count < 20:
                id = f"{number}-{count}"
                answers = mine.reserve(id, 60), mine.release(id) if count % 2 else mine.settle(id, 25)
                told.append(id)
                count += 1
                wrong.extend(one for one in answers if one not in ("granted", "granted fast", "ended", "settled fast"))
        except psycopg.Error as error:
            wrong.append(error)
        finally:
            mine.connection.close()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    new = PostgresStore(f"{server().get_uri()}&schema={OLD}")
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert worker.settle("by old", 25) in ("settled fast", "ended")
    assert worker.release("to release") == "ended"
    assert type(new.execute(settle("by new", 25))) is Ended
    assert type(new.execute(reserve("after", (DOLLAR, 60)))) is Granted
    assert worker.settle("after", 25) == "settled fast"
    assert table_of(old, "by old") == "records_other"
    assert table_of(old, later) == "records_ahead"
    found = {entry.id for entry in new.entries()}
    assert found == {*told, "by old", "by new", "to release", "after", later}
    assert audit(new) == []
    new.close()
    worker.connection.close()


def test_no_record_is_looked_at_while_the_table_is_locked(old: psycopg.Connection[Any]) -> None:
    """The server says that it knows from the constraint that no record belongs into the months to come."""
    from sqlalchemy import create_engine

    worker, said = OldWorker(), []
    worker.reserve("a", 60)
    worker.settle("a", 25)
    worker.connection.close()
    announce(old, Month.of(1_790_000_000_000_000).start_us)
    old.execute("SET client_min_messages = debug1")
    old.add_notice_handler(lambda notice: said.append(notice.message_primary))
    old.autocommit = False
    with create_engine("postgresql+psycopg://", creator=lambda: old).begin() as bound:
        upgrade(bound)
    assert [one for one in said if "records_other" in str(one) and "implied by existing constraints" in str(one)]


def test_whoever_may_use_the_records_may_do_so_in_partitions(old: psycopg.Connection[Any]) -> None:
    role = f"{SCHEMA}_reader"
    old.execute(f"CREATE ROLE {role}; GRANT SELECT, INSERT ON records TO {role}")
    try:
        PostgresStore(f"{server().get_uri()}&schema={OLD}").close()
        may = "SELECT has_table_privilege(%s, 'records', 'INSERT'), has_table_privilege(%s, 'records', 'DELETE')"
        assert old.execute(may, (role, role)).fetchone() == (True, False)
    finally:
        old.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")
