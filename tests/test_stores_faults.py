"""Faults of a SQLite store: each says what it is and what to do, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bursar import Budget, Bursar, StoreError, Threshold, Usage, keeper
from bursar.accounts import Rule
from bursar.commands import Answer, Ended, Granted, Release, Reserve, Settle
from bursar.stores import open_store
from bursar.stores.sqlite import SqliteStore
from bursar.stores.sqlite_schema import upgrade
from bursar.testing import ManualClock

DOLLARS = Rule('["b","USD","total UTC",{},0]', "b", "{}", "USD", "window", 10**12)
TTL_US = 600_000_000


def reserve(id: str, amount: int = 10, *, digest: str = "d") -> Reserve:
    draft = {"path": [], "tags": {"run": "r"}, "cost_nanos": amount, "usage": {}}
    return Reserve(id, ((DOLLARS, amount),), TTL_US, draft, digest)


def settle(id: str, cost: int = 10) -> Settle:
    return Settle(id, {"USD": cost}, cost, {})


def spent(store: SqliteStore) -> tuple[int, int]:
    (account,) = store.accounts([DOLLARS.key])
    return account.spent, account.reserved


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "bursar.db"


@pytest.fixture
def store(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path, busy_timeout_s=0.05)
    yield store
    store.close()


@pytest.fixture
def patient(path: Path) -> Iterator[SqliteStore]:
    store = SqliteStore(path, busy_timeout_s=60)
    yield store
    store.close()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@contextlib.contextmanager
def fails(fault: str, remedy: str) -> Iterator[None]:
    with pytest.raises(StoreError, match=remedy) as caught:
        yield
    assert caught.value.fault == fault
    assert str(caught.value).endswith(".")


def at_once(*jobs: Callable[[], object]) -> list[object]:
    """Run the jobs in a thread each; what they return or raise."""
    results: list[object] = [None] * len(jobs)

    def work(index: int) -> None:
        try:
            results[index] = jobs[index]()
        except Exception as error:  # noqa: BLE001 - the result is judged by the test
            results[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# -- locked ----------------------------------------------------------------------------------------------------------


def test_a_locked_store_says_so_and_goes_on_afterwards(store: SqliteStore, path: Path) -> None:
    store.execute(reserve("a"))
    with lock(path):
        with fails("locked", "Another process holds it"):
            store.execute(settle("a"))
        with fails("locked", "Another process holds it"):
            asyncio.run(store.aexecute(reserve("b")))
        with fails("locked", "Another process holds it"):
            store.publish({"b": {"limit": "1"}})
        assert spent(store) == (0, 10), "reports read on"
    assert type(store.execute(settle("a"))) is Ended
    assert spent(store) == (10, 0)


@pytest.mark.parametrize("durability", ["process", "full"])
def test_an_event_loop_goes_on_while_another_process_holds_the_lock(path: Path, durability: str) -> None:
    async def everything() -> None:
        with lock(path):
            task = asyncio.ensure_future(store.aexecute(reserve("a")))
            for _ in range(100):  # turns of the loop that go by meanwhile
                await asyncio.sleep(0.0005)
            assert not task.done()
        assert type(await task) is Granted

    with contextlib.closing(SqliteStore(path, durability=durability, busy_timeout_s=60)) as store:
        asyncio.run(everything())
        assert spent(store) == (0, 10)


def test_a_thread_waits_for_the_lock_of_another_process(patient: SqliteStore, path: Path) -> None:
    with lock(path):
        thread = threading.Thread(target=patient.execute, args=(reserve("a"),))
        thread.start()
        thread.join(0.05)
        assert thread.is_alive()
    thread.join(20)
    assert spent(patient) == (0, 10)


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_commit_waits_for_no_reader_but_on_a_disk_that_cannot_have_a_log(path: Path, mode: str) -> None:
    """There it waits as for a lock, without holding up the event loop."""

    async def everything() -> None:
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM records").fetchone()
            task = asyncio.ensure_future(store.aexecute(reserve("a")))
            for _ in range(100):
                await asyncio.sleep(0.0005)
            assert task.done() == (mode == "wal")
        assert type(await task) is Granted

    with contextlib.closing(SqliteStore(path, durability="process", busy_timeout_s=60)) as store:
        assert store._connection is not None
        assert store._connection.execute(f"PRAGMA journal_mode={mode}").fetchone() == (mode,)
        asyncio.run(everything())
        assert spent(store) == (0, 10)


def test_the_log_is_folded_by_no_event_loop(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is the commit made there that begins the log anew: each of them waits for the disk."""
    monkeypatch.setattr("bursar.stores.sqlite.FOLD_COMMITS", 10)
    seen: list[tuple[str, bool]] = []

    async def everything() -> None:
        for number in range(50):
            await store.aexecute(reserve(f"{number}"))
            await asyncio.sleep(0)

    with contextlib.closing(SqliteStore(path, durability="process")) as store:
        assert store._connection is not None
        loop = threading.get_ident()
        store._connection.set_trace_callback(lambda sql: seen.append((sql, threading.get_ident() == loop)))
        asyncio.run(everything())
        folded, log, done = store._connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    folds = [index for index, (sql, _) in enumerate(seen) if "wal_checkpoint" in sql]
    assert len(folds) == 5  # with that of this test
    assert all(not in_loop for fold in folds[:-1] for _, in_loop in (seen[fold], seen[fold + 1]))
    assert (
        sum(in_loop for sql, in_loop in seen if sql == "COMMIT") > 5
    )  # those that come while the worker is at it go there too
    assert (folded, done) == (0, log)
    assert log < 100


def test_a_store_that_is_locked_while_it_is_made_says_so(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("PRAGMA journal_mode=WAL")
    with lock(path), fails("locked", "Another process holds it"):
        SqliteStore(path, busy_timeout_s=0.05)
    SqliteStore(path).close()


def test_a_process_that_waited_while_another_made_the_store_does_not_migrate_it_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    SqliteStore(path).close()

    def migrate(_: object) -> None:
        raise AssertionError("64 processes that do so one after another take longer than they wait")

    monkeypatch.setattr("bursar.migrations.upgrade", migrate)
    upgrade(path, 5.0)


def test_a_settlement_while_the_store_is_locked_is_booked_later_at_its_real_cost(path: Path) -> None:
    store = SqliteStore(path, busy_timeout_s=0.05)
    usage = Usage(input_tokens=1_000, output_tokens=100)
    with Bursar(store, [Budget("b", "5 USD")]) as bursar:
        with (
            fails("locked", "Another process"),
            bursar.call("openai", "gpt-4o", input_tokens=1_000) as call,
            lock(path),
        ):
            call.settle(usage)  # the block is left while the store is locked, too
        assert store.open_reservations() == 1
        bursar.tend()
        (record,) = bursar.records()
        assert (record.kind, record.cost_nanos, record.estimated) == ("settlement", 3_500_000, False)
        assert store.open_reservations() == 0
        bursar.tend()
        assert len(list(bursar.records())) == 1


def test_i12_closed_by_default_and_open_where_every_budget_says_so(path: Path) -> None:
    store = SqliteStore(path, busy_timeout_s=0.05)
    budgets = [Budget("all", "5 USD", on_unreachable="open"), Budget("tools", "9 calls", on_unreachable="closed")]
    with Bursar(store, budgets) as bursar:
        with lock(path), fails("locked", "Another process"):
            bursar.tool("search", cost="0.01 USD").__enter__()
        with bursar.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=100))
        with lock(path):
            unguarded = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100)
        assert unguarded.state == "unguarded"
        unguarded.settle(Usage(input_tokens=1_000, output_tokens=50))
        with lock(path):
            unknown = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100)
            with fails("locked", "Another process"):
                unknown.settle_unknown("a time-out")
        bursar.tend()
        costs = sorted((record.kind, record.cost_nanos, record.estimated) for record in bursar.records())
        assert costs == [("charge", 3_000_000, False), ("charge", 3_500_000, True), ("settlement", 3_500_000, False)]
        (status,) = bursar.status()[:1]
        assert status.spent == sum(record.cost_usd for record in bursar.records())


def test_a_damaged_reservation_keeps_no_call_in_flight_from_being_killed(path: Path) -> None:
    clock = ManualClock()
    store = SqliteStore(path, clock=clock)
    kill = Threshold("50%", "kill")
    budgets = [
        Budget("lost", "5 USD", match={"agent": "lost"}),
        Budget("work", "0.10 USD", match={"agent": "work"}, thresholds=[kill]),
    ]
    with Bursar(store, budgets, clock=clock) as bursar:
        with bursar.scope(agent="lost"):
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        with bursar.scope(agent="work"):
            bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=5_000)
        with sqlite3.connect(path) as connection:
            connection.execute("DELETE FROM accounts WHERE budget = 'lost'")
        with (
            bursar.scope(agent="work"),
            bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as flying,
        ):
            clock.advance(601)
            with fails("damaged", "is missing"):
                bursar.tend()
            bursar._driver.keeper.look()
            assert flying.stopped is not None
            flying.settle(Usage(input_tokens=10, output_tokens=1))


def test_costs_that_nothing_else_would_book_wait_beyond_other_ends(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(keeper, "MAX_KEPT", 1)
    monkeypatch.setattr(keeper, "MAX_UNGUARDED", 3)
    caplog.set_level(logging.ERROR, "bursar")
    store = SqliteStore(path, busy_timeout_s=0.05)
    with Bursar(store, [Budget("all", "5 USD", on_unreachable="open")]) as bursar, bursar.scope(team="red"):
        guarded = [bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100) for _ in range(2)]
        with lock(path):
            unguarded = [
                bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=100) for _ in range(3)
            ]
            for reservation in (*guarded, *unguarded):
                with fails("locked", "Another process"):
                    reservation.settle(Usage(input_tokens=1_000, output_tokens=50))
        bursar.tend()
        kinds = sorted(record.kind for record in bursar.records())
        assert kinds == ["charge", "charge", "settlement"]
        assert [open.id for open in store.reservations()] == [guarded[1].id]
    left, lost = [record.getMessage() for record in caplog.records if "wait for the store" in record.getMessage()]
    assert left.endswith(f"{guarded[1].id} is left to its expiry")
    assert "book 0.003 USD of {" in lost
    assert "'team': 'red'" in lost


# -- full, read-only, missing ----------------------------------------------------------------------------------------


def test_a_full_disk_says_so_and_what_was_acknowledged_stays(store: SqliteStore) -> None:
    store.execute(reserve("first"))
    connection = store._connection
    assert connection is not None
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages + 2}")
    done = []
    with fails("full", "Free disk space"):
        for number in range(10_000):
            store.execute(reserve(f"{number:05}"))
            done.append(number)
    assert spent(store) == (0, 10 * (len(done) + 1))
    connection.execute("PRAGMA max_page_count=1000000")
    assert type(store.execute(settle("first"))) is Ended
    assert spent(store) == (10, 10 * len(done))


def test_a_store_that_became_read_only_says_so(store: SqliteStore) -> None:
    store.execute(reserve("a"))
    connection = store._connection
    assert connection is not None
    connection.execute("PRAGMA query_only=1")
    with fails("readonly", "write permission"):
        store.execute(settle("a"))
    connection.execute("PRAGMA query_only=0")
    store.execute(settle("a"))
    assert spent(store) == (10, 0)


def as_nobody(job: Callable[[], None]) -> str:
    """Do it in a child that may not write what root owns; the StoreError's fault and text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setuid(65_534)
            job()
        except StoreError as error:
            os.write(writing, json.dumps([error.fault, str(error)]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("exists", [True, False])
def test_a_file_or_folder_without_permission_says_so(exists: bool) -> None:
    folder = Path(tempfile.mkdtemp(prefix="bursar-readonly-"))
    try:
        if exists:
            SqliteStore(folder / "bursar.db").close()
            (folder / "bursar.db").chmod(0o444)
        folder.chmod(0o555)
        fault, text = json.loads(as_nobody(lambda: SqliteStore(folder / "bursar.db").close()))
        assert fault == "readonly"
        assert "write permission" in text
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with fails("unreachable", r"none/bursar.db.*Create the folder"):
        SqliteStore(tmp_path / "none" / "bursar.db")
    with fails("unreachable", "Create the folder, or correct the path"):
        SqliteStore(tmp_path)


def test_the_file_is_nobody_elses_business(store: SqliteStore, path: Path) -> None:
    store.execute(reserve("a"))
    assert {file.stat().st_mode & 0o077 for file in path.parent.iterdir()} == {0}


@pytest.mark.parametrize("name", ["a?b#c%20.db", "ünï cödé.db", "quote'\".db", "-rf.db"])
def test_any_file_name_will_do(tmp_path: Path, name: str) -> None:
    store = SqliteStore(tmp_path / name)
    store.execute(reserve("a"))
    store.execute(settle("a"))
    assert [entry.id for entry in store.entries()] == ["a"]
    assert spent(store) == (10, 0)
    store.close()
    assert (tmp_path / name).exists()


def test_a_url_may_quote_its_path(tmp_path: Path) -> None:
    open_store(f"sqlite:////{tmp_path}/a%3Fb.db?durability=process").close()
    assert (tmp_path / "a?b.db").exists()


# -- damaged, newer --------------------------------------------------------------------------------------------------


def damage(path: Path, at: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        file.write(data)


def test_a_damaged_header_says_so(path: Path) -> None:
    SqliteStore(path).close()
    damage(path, 0, b"garbage garbage!")
    with fails("damaged", "restore it from a backup"):
        SqliteStore(path)


def test_a_text_file_is_no_store(path: Path) -> None:
    path.write_text("budgets = 3\n" * 100)
    with fails("damaged", "no Bursar database"):
        SqliteStore(path)


def fault_in_use(path: Path) -> str:
    """The fault that using the file meets; "" when all that it says is true."""
    try:
        store = SqliteStore(path)
        try:
            assert len(list(store.entries())) == 60
            assert type(store.execute(settle("open"))) is Ended
            assert spent(store) == (610, 0)
        finally:
            store.close()
    except StoreError as error:
        return str(error.fault)
    return ""


def test_every_damaged_page_is_noticed_or_of_no_account(path: Path, tmp_path: Path) -> None:
    """Each page in turn is overwritten: the store says `damaged`, or what it says of the books is true."""
    store = SqliteStore(path)
    for number in range(60):
        store.execute(reserve(f"{number:03}"))
        store.execute(settle(f"{number:03}"))
    store.execute(reserve("open"))
    store.close()
    size = 4_096
    noticed: list[str] = []
    for page in range(path.stat().st_size // size):
        copy = tmp_path / f"page-{page}.db"
        shutil.copy(path, copy)
        damage(copy, page * size + (100 if page == 0 else 0), b"\x5a" * (size - 100))
        noticed.append(fault_in_use(copy))
    assert set(noticed) == {"damaged", ""}
    assert noticed.count("damaged") > 5


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE reservations SET held = '[[\"x'",
        "UPDATE reservations SET draft = ''",
        "DELETE FROM accounts",
        "UPDATE accounts SET reserved = 3",
    ],
)
def test_rows_that_contradict_each_other_are_noticed(store: SqliteStore, path: Path, statement: str) -> None:
    store.execute(reserve("a"))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute(statement)
        other.commit()
    with fails("damaged", "restore the file from a backup"):
        store.execute(settle("a"))
    assert list(store.entries()) == []


def test_i9_a_damaged_reservation_keeps_no_other_from_its_expiry(store: SqliteStore, path: Path) -> None:
    for id in "abc":
        store.execute(reserve(id)._replace(ttl_us=1))
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE reservations SET held = '[[\"x\",\"USD\",10]]' WHERE id = 'a'")
        other.commit()
    with fails("damaged", "x is missing"):
        store.sweep()
    assert [open.id for open in store.reservations()] == ["a"]
    assert spent(store) == (20, 10)


def test_a_store_of_a_newer_schema_is_left_alone(path: Path) -> None:
    SqliteStore(path).close()
    with contextlib.closing(sqlite3.connect(path)) as other:
        other.execute("UPDATE alembic_version SET version_num = '9999'")
        other.commit()
    before = path.read_bytes()
    with fails("newer", "schema 9999.*Upgrade Bursar"):
        SqliteStore(path)
    assert path.read_bytes() == before


# -- one among many --------------------------------------------------------------------------------------------------


def in_one_batch(store: SqliteStore, jobs: list[Callable[[], object]]) -> list[object]:
    """What the jobs come to when their commands wait for the same commit, behind one that holds it up."""
    results: list[list[object]] = []
    store._using.acquire()
    leader = threading.Thread(target=lambda: store.execute(Release("nobody")))
    crowd = threading.Thread(target=lambda: results.append(at_once(*jobs)))
    try:
        leader.start()
        while not store._commits._turn.locked():
            assert leader.is_alive()
        crowd.start()
        while len(store._commits._queue) < len(jobs):
            assert crowd.is_alive()
    finally:
        store._using.release()
    leader.join()
    crowd.join()
    return results[0]


def test_a_sum_that_no_column_holds_fails_alone(store: SqliteStore) -> None:
    big = Rule('["big","USD","total UTC",{},0]', "big", "{}", "USD", "window", 2**62, enforce=False)
    draft = {"path": [], "tags": {}, "cost_nanos": 0, "usage": {}}
    store.execute(Reserve("big", ((big, 2**62),), TTL_US, draft, "d"))
    too_much = Reserve("more", ((big, 2**62),), TTL_US, draft, "d")
    jobs: list[Callable[[], object]] = [lambda: store.execute(too_much)]
    jobs += [lambda id=f"a{n}": store.execute(reserve(id)) for n in range(8)]  # type: ignore[misc]
    failed, *fine = in_one_batch(store, jobs)
    assert isinstance(failed, StoreError)
    assert failed.fault == "overflow"
    assert [type(answer) for answer in fine] == [Granted] * 8
    assert spent(store) == (0, 80)


def test_an_id_that_was_to_be_fresh_and_is_not_holds_nothing_twice(store: SqliteStore) -> None:
    """What an interrupted caller's batch did is done: the commands of the others may come again."""
    store.execute(reserve("a0", digest=""))
    jobs: list[Callable[[], object]] = [
        lambda id=f"a{n % 4}": store.execute(reserve(id, digest=""))  # type: ignore[misc]
        for n in range(8)
    ]
    assert [type(answer) for answer in in_one_batch(store, jobs)] == [Granted] * 8
    assert spent(store) == (0, 40)


def test_two_event_loops_and_threads_share_a_store(store: SqliteStore) -> None:
    async def work(name: str) -> list[Answer]:
        ids = [f"{name}{n}" for n in range(40)]
        await asyncio.gather(*(store.aexecute(reserve(id)) for id in ids))
        return await asyncio.gather(*(store.aexecute(settle(id)) for id in ids))

    def plain() -> list[Answer]:
        return [store.execute(command) for n in range(40) for command in (reserve(f"t{n}"), settle(f"t{n}"))]

    for answers in at_once(lambda: asyncio.run(work("a")), lambda: asyncio.run(work("b")), plain):
        assert isinstance(answers, list)
        assert {type(answer) for answer in answers} <= {Ended, Granted}
    assert spent(store) == (1_200, 0)


# -- forks -----------------------------------------------------------------------------------------------------------


def child(job: Callable[[], object]) -> Callable[[], None]:
    """Start a child that does the job once told to; the function tells it, and waits for its end."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(writing)
            os.read(reading, 1)
            job()
            status = 0
        finally:
            os._exit(status)
    os.close(reading)

    def go() -> None:
        os.write(writing, b"g")
        os.close(writing)
        assert os.waitpid(pid, 0)[1] == 0

    return go


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("durability", ["process", "full"])
def test_i7_a_child_writes_on_after_its_parent_has_closed(path: Path, durability: str) -> None:
    store = SqliteStore(path, durability=durability)
    asyncio.run(store.aexecute(reserve("parent")))

    def job() -> None:
        for id in ("child-1", "child-2"):
            asyncio.run(store.aexecute(reserve(id)))
            store.execute(settle(id))

    go = child(job)
    store.execute(settle("parent"))
    store.close()
    go()
    again = SqliteStore(path)
    assert [entry.id for entry in again.entries()] == ["child-1", "child-2", "parent"]
    assert spent(again) == (30, 0)
    again.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_i2_parent_and_children_share_the_books(patient: SqliteStore) -> None:
    def work(name: str) -> None:
        for number in range(50):
            patient.execute(reserve(f"{name}{number}", digest=""))
            patient.execute(settle(f"{name}{number}"))

    going = [child(lambda name=name: work(name)) for name in ("a", "b")]  # type: ignore[misc]
    results = at_once(*going, lambda: work("parent"))
    assert results == [None, None, None]
    assert spent(patient) == (1_500, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_fork_amid_the_work_of_threads_harms_nobody(patient: SqliteStore) -> None:
    stop = threading.Event()
    done: list[int] = []

    def work(name: str) -> None:
        number = 0
        while not stop.is_set():
            patient.execute(reserve(f"{name}{number}"))
            patient.execute(settle(f"{name}{number}"))
            number += 1
        done.append(number)

    threads = [threading.Thread(target=work, args=(name,)) for name in "xyz"]
    for thread in threads:
        thread.start()
    for number in range(10):
        child(lambda number=number: patient.execute(reserve(f"child{number}")))()  # type: ignore[misc]
    stop.set()
    for thread in threads:
        thread.join()
    assert spent(patient) == (10 * sum(done), 100)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_i9_a_child_leaves_its_parents_live_calls_to_their_parent(path: Path) -> None:
    """Else a call of a dead parent would be extended by its child for hours."""
    bursar = Bursar(f"sqlite:////{path}", [Budget("b", "5 USD")])
    block = bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
    block.__enter__()

    def job() -> None:
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).release()
        assert not bursar._driver.keeper._live

    child(job)()
    assert len(bursar._driver.keeper._live) == 1
    block.__exit__(None, None, None)
    bursar.close()


def test_closing_waits_for_what_is_on_its_way(path: Path) -> None:
    store = SqliteStore(path)
    store.execute(reserve("a"))
    store.post(Release("a"))
    store.close()
    again = SqliteStore(path)
    assert again.open_reservations() == 0
    again.close()
