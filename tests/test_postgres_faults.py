"""Faults of a PostgreSQL store: each says what it is and what to do, and loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psycopg
import pytest
from postgres_server import SCHEMA, connect, fresh_url, server

from bursar import Budget, Bursar, InvalidInput, StoreError, Usage, migrations
from bursar.accounts import Mark, Rule
from bursar.audit import audit
from bursar.clock import SystemClock
from bursar.commands import Draw, Drawn, Ended, Entry, Granted, Refused, Rejected, Release, Reserve, Tell
from bursar.signing import OperatorKey
from bursar.stores import open_store
from bursar.stores.entry_text import entry_text
from bursar.stores.erasing import Erasure
from bursar.stores.leases import recover
from bursar.stores.leases.journal import Journal
from bursar.stores.postgres import PostgresStore
from bursar.stores.postgres import server as server_module
from bursar.stores.postgres.server import _upgrade, split
from bursar.testing import ManualClock
from bursar.testing.store_contract.made import TTL_US, charge, reserve, rule, settle

DOLLAR = rule("b", 10**12)


@contextlib.contextmanager
def fails(fault: str, remedy: str) -> Iterator[None]:
    with pytest.raises(StoreError, match=remedy) as caught:
        yield
    assert caught.value.fault == fault
    assert str(caught.value).endswith(".")


@pytest.fixture
def url() -> str:
    return fresh_url()


@pytest.fixture
def store(url: str) -> Iterator[PostgresStore]:
    store = PostgresStore(url)
    yield store
    store.close()


def spent(store: PostgresStore, of: Rule = DOLLAR) -> tuple[int, int]:
    (account,) = store.accounts([of.key])
    return account.spent, account.reserved


def drawn_entry(id: str, amount: int) -> Entry:
    draft = {"path": [], "tags": {}, "cost_nanos": amount, "usage": {}}
    return Entry(id, "settlement", None, "completed", False, "", amount, {}, {DOLLAR.key: amount}, 1, 2, "", draft, {})


def in_threads(*jobs: Callable[[], object]) -> None:
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# -- connections ---------------------------------------------------------------------------------------------------


def pids(store: PostgresStore) -> list[int]:
    return [one.info.backend_pid for one in (store._connection, store._reader) if one is not None]


def cut(store: PostgresStore) -> None:
    """End the store's connections on the server's side, as its restart does."""
    with connect() as connection:
        for pid in pids(store):
            connection.execute("SELECT pg_terminate_backend(%s)", (pid,))
            while connection.execute("SELECT 1 FROM pg_stat_activity WHERE pid = %s", (pid,)).fetchone():
                continue


def test_a_store_goes_on_after_its_connections_were_ended(store: PostgresStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    assert store.open_reservations() == 1
    cut(store)
    assert type(store.execute(settle("a", 25))) is Ended
    assert spent(store) == (25, 0)
    cut(store)
    assert store.publish({"b": {"limit": "1"}}) == 1
    assert asyncio.run(store.aexecute(settle("a", 25))).again  # type: ignore[union-attr]


def test_statements_that_the_connection_has_forgotten_are_prepared_again(store: PostgresStore) -> None:
    """The driver forgets all of them when it rolls back; none may be asked under the name of another."""
    for id in ("a", "b", "c"):
        for end in (settle(id, 25), settle(id, 25), Release(id)):
            store.execute(reserve(id, (DOLLAR, 60)))
            store.execute(end)
            assert store._connection is not None
            store._connection.execute("DEALLOCATE ALL", prepare=False)
    assert spent(store) == (75, 0)
    assert [entry.kind for entry in store.entries()] == ["settlement"] * 3


@pytest.mark.parametrize("digest", ["d", ""])
def test_i6_an_answer_that_is_lost_is_asked_for_again(
    store: PostgresStore, monkeypatch: pytest.MonkeyPatch, digest: str
) -> None:
    """The server commits, and the connection ends before its answer is read. An id without a digest is taken to be new, once."""
    for command in (reserve("a", (DOLLAR, 60), digest=digest), settle("a", 25)):
        store.execute(Release("nobody"))  # there is a connection
        connection, asking = store._connection, store._asking
        assert connection is not None

        def lost(*args: Any, of: Any = connection, ask: Any = asking.value) -> NoReturn:
            ask(*args)
            of.close()
            raise psycopg.OperationalError("the answer is lost")

        monkeypatch.setattr(asking, "value", lost)
        assert type(store.execute(command)) in (Granted, Ended)
        assert store._connection is not connection
    assert spent(store) == (25, 0)


@pytest.mark.parametrize("held", ["_connection", "_reader"])
def test_a_server_that_stops_to_answer_holds_nobody_up(url: str, held: str) -> None:
    """Neither does one whose answers are swallowed on the way: the command is made again on another connection."""
    store = PostgresStore(url, timeout_s=0.5)
    store.execute(reserve("a", (DOLLAR, 60)))
    assert store.open_reservations() == 1
    stuck = getattr(store, held).info.backend_pid
    os.kill(stuck, signal.SIGSTOP)
    try:
        assert type(store.execute(settle("a", 25))) is Ended
        assert spent(store) == (25, 0)
    finally:
        os.kill(stuck, signal.SIGCONT)
        store.close()


def test_a_server_that_is_not_there_is_unreachable_and_no_password_is_told() -> None:
    with pytest.raises(StoreError, match="Check the server") as caught:
        open_store("postgresql://user:hunter2@127.0.0.1:1/none?connect_timeout=2")
    assert caught.value.fault == "unreachable"
    assert "hunter2" not in str(caught.value)
    with fails("unreachable", "Check the server, and the store's URL"):
        PostgresStore(server().get_uri(database="missing"))


def test_who_has_waited_for_a_migration_does_not_make_it_again(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else dozens of processes that open at once hold each other up for so long that some give up."""
    PostgresStore(url).close()
    made: list[object] = []
    monkeypatch.setattr(migrations, "upgrade", made.append)
    _upgrade(*split(url), None)
    assert not made


def test_a_schema_is_a_plain_name(url: str) -> None:
    with pytest.raises(InvalidInput, match="small letters"):
        PostgresStore(url.replace(SCHEMA, "x;drop"))


def test_processes_that_open_an_empty_database_at_once_make_it_once() -> None:
    url, opened = fresh_url().replace(SCHEMA, SCHEMA + "_new"), []
    try:
        in_threads(*[lambda: opened.append(PostgresStore(url)) for _ in range(4)])
        assert len(opened) == 4
        assert all(type(store.execute(reserve(f"a{n}", (DOLLAR, 1)))) is Granted for n, store in enumerate(opened))
    finally:
        for store in opened:
            store.close()
        with connect() as connection:
            connection.execute(f"DROP SCHEMA IF EXISTS {SCHEMA}_new CASCADE")


def test_a_forked_child_has_connections_of_its_own(store: PostgresStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            code = 0 if type(store.execute(settle("a", 25))) is Ended else 1
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert type(store.execute(reserve("b", (DOLLAR, 1)))) is Granted
    assert spent(store) == (25, 1)


def test_a_fork_takes_the_connections_in_the_order_of_a_command_that_looks_something_up(store: PostgresStore) -> None:
    """In the other order, a fork and a draw some of whose records are there would wait for each other for ever."""
    taken: list[str] = []

    class Noted:
        def __init__(self, name: str, lock: Any) -> None:
            self.name, self.lock = name, lock

        def acquire(self) -> None:
            taken.append(self.name)
            self.lock.acquire()

        def release(self) -> None:
            self.lock.release()

        def __enter__(self) -> None:
            self.acquire()

        def __exit__(self, *_: object) -> None:
            self.release()

    store._using, store._reading = Noted("using", store._using), Noted("reading", store._reading)  # type: ignore[assignment]
    entry = drawn_entry("e", 5)
    for _ in range(2):
        assert type(store.execute(Draw("lease", (DOLLAR,), (entry,), {}))) is Drawn
    by_command, taken[:] = list(dict.fromkeys(taken)), []
    store.before_fork()
    store.after_fork(in_child=False)
    assert taken == by_command == ["using", "reading"]


def test_without_its_driver_the_store_says_what_to_install() -> None:
    code = "import sys; sys.modules['psycopg'] = None\nfrom bursar.stores import open_store\nopen_store('postgresql://x/y')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install 'bursar[postgres]'" in ran.stderr.splitlines()[-1]


# -- what the server refuses ---------------------------------------------------------------------------------------


def test_rows_that_somebody_holds_for_too_long(url: str) -> None:
    store = PostgresStore(url, timeout_s=0.2)
    store.execute(reserve("a", (DOLLAR, 60)))
    with connect() as other:
        with other.transaction():
            other.execute("SELECT 1 FROM accounts FOR UPDATE")
            with fails("locked", "Another transaction holds"):
                store.execute(settle("a", 25))
        assert type(store.execute(settle("a", 25))) is Ended
    store.close()


def test_records_of_a_journal_that_were_booked_and_erased_since_are_no_conflict(
    store: PostgresStore, tmp_path: Path
) -> None:
    """Its process died between the draw and the note of it in the journal."""
    alice = drawn_entry("e", 5)
    alice = alice._replace(draft={**alice.draft, "tags": {"user": "alice"}})
    left = Journal(tmp_path / "a.journal", full=False)
    left.begin("lease", (DOLLAR,), {DOLLAR.key: 5})
    left.write([("lease", entry_text(alice))])
    left.close(delete=False)
    assert type(store.execute(Draw("lease", (DOLLAR,), (alice,), {}))) is Drawn
    assert store.erase(Erasure("user", "alice", "erased-1"), lambda *_: None).records == 1
    assert [one.records for one in recover(store, tmp_path)] == [0]
    assert not left.path.exists()
    assert [entry.draft["tags"] for entry in store.entries()] == [{"user": "erased-1"}]
    assert spent(store) == (5, 0)
    assert audit(store) == []


def test_whoever_stops_between_a_draw_and_its_commit_holds_the_accounts_for_a_while_only(url: str) -> None:
    """A process that is stopped, or a host that is gone without a word: its connection stays until somebody ends it."""
    store, other = PostgresStore(url, timeout_s=0.3), PostgresStore(url)
    assert type(other.execute(reserve("a", (DOLLAR, 60)))) is Granted
    connection = store._speak()
    connection.execute("BEGIN")
    connection.execute("SELECT 1 FROM accounts FOR UPDATE")
    assert type(other.execute(settle("a", 25))) is Ended
    assert type(store.execute(reserve("b", (DOLLAR, 1)))) is Granted  # on a connection of its own again
    assert type(store.execute(Draw("lease", (DOLLAR,), (drawn_entry("e", 5),), {}))) is Drawn
    assert spent(store) == (30, 1)
    other.close()
    store.close()


@pytest.mark.parametrize(
    ("state", "fault"), [("53100", "full"), ("25006", "readonly"), ("42501", "readonly"), ("XX001", "damaged")]
)
def test_what_the_server_says_becomes_a_fault(store: PostgresStore, state: str, fault: str) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    with connect() as connection:
        connection.execute(
            f"CREATE FUNCTION trouble() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{state}'; END $$; "
            "CREATE TRIGGER trouble BEFORE INSERT ON records FOR EACH ROW EXECUTE FUNCTION trouble()"
        )
        try:
            with pytest.raises(StoreError) as caught:
                store.execute(settle("a", 25))
            assert caught.value.fault == fault
        finally:
            connection.execute("DROP FUNCTION trouble CASCADE")
    assert spent(store) == (0, 60)
    assert type(store.execute(settle("a", 25))) is Ended


def test_a_sum_beyond_2_63_overflows_and_harms_no_other_command(store: PostgresStore) -> None:
    huge = rule("huge", 2**63 - 1)
    store.execute(charge("c", (huge, 2**63 - 1)))
    with fails("overflow", "give the budget a window"):
        store.execute(charge("d", (huge, 1)))

    async def together() -> list[object]:
        commands = [charge("e", (huge, 1)), *(reserve(f"r{n}", (DOLLAR, 1)) for n in range(5))]
        return await asyncio.gather(*map(store.aexecute, commands), return_exceptions=True)

    answers = asyncio.run(together())
    assert [type(answer) for answer in answers] == [StoreError, *[Granted] * 5]


def test_whoever_stops_amid_a_prune_holds_the_records_for_a_while_only(
    url: str, store: PostgresStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between taking a month out and its commit: nobody could write a record meanwhile."""
    monkeypatch.setattr(server_module, "STOPPED_S", 0.3)
    stopped = server_module.connect(*split(url), timeout_s=0)
    with contextlib.closing(stopped):
        stopped.execute("BEGIN")
        stopped.execute("LOCK TABLE records_timed IN ACCESS EXCLUSIVE MODE")
        assert type(store.execute(charge(f"{store.now_us():014x}", (DOLLAR, 5)))) is Ended
        with pytest.raises(psycopg.Error, match="idle-in-transaction"):
            stopped.execute("COMMIT")


def test_i2_rows_that_contradict_each_other_are_damage(store: PostgresStore) -> None:
    store.execute(reserve("a", (DOLLAR, 60)))
    with connect() as connection:
        connection.execute("UPDATE accounts SET reserved = 59")
        with fails("damaged", "restore"):
            store.execute(settle("a", 25))
        connection.execute("DELETE FROM accounts")
        with fails("damaged", "is missing"):
            store.execute(settle("a", 25))
    assert store.open_reservations() == 1


def test_i9_a_damaged_reservation_keeps_no_other_from_its_expiry(store: PostgresStore) -> None:
    other = rule("other", 10**12)
    for id, of in (("a", DOLLAR), ("b", other), ("c", other)):
        store.execute(reserve(id, (of, 60), ttl_us=1))
    with connect() as connection:
        connection.execute("DELETE FROM accounts WHERE budget = 'b'")
    with fails("damaged", "is missing"):
        store.sweep()
    assert [open.id for open in store.reservations()] == ["a"]
    assert spent(store, other) == (120, 0)


def test_a_schema_of_a_newer_bursar(url: str, store: PostgresStore) -> None:
    with connect() as connection:
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()  # type: ignore[misc]
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
        try:
            with fails("newer", "Upgrade Bursar"):
                PostgresStore(url)
        finally:
            connection.execute("UPDATE alembic_version SET version_num = %s", (revision,))


# -- clocks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("off_s", [-70, 70])
def test_i8_a_host_clock_a_minute_off_is_an_error(
    store: PostgresStore, url: str, monkeypatch: pytest.MonkeyPatch, off_s: int
) -> None:
    true_us = SystemClock.now_us
    monkeypatch.setattr(SystemClock, "now_us", lambda self: true_us(self) + off_s * 1_000_000)
    with fails("clock", "Set the clock"):
        store.execute(reserve("a", (DOLLAR, 1)))
    with fails("clock", "Set the clock"):
        PostgresStore(url)
    monkeypatch.undo()
    assert type(store.execute(reserve("a", (DOLLAR, 1)))) is Granted


def test_i8_a_server_whose_clock_was_set_back(store: PostgresStore) -> None:
    assert store._server is not None
    store._server.seen_us += 30_000_000
    seen_us = store.now_us()
    granted = store.execute(reserve("a", (DOLLAR, 1)))
    assert type(granted) is Granted
    assert granted.reservation.reserved_us >= seen_us
    store._server.seen_us += 90_000_000
    with fails("clock", "behind the store's"):
        store.execute(reserve("b", (DOLLAR, 1)))


def test_the_servers_time_is_known_without_asking(store: PostgresStore) -> None:
    times = [store.now_us() for _ in range(100)]
    assert times == sorted(times)
    assert abs(times[-1] - SystemClock().now_us()) < 5_000_000


# -- many at once --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def without_deadlocks() -> Iterator[None]:
    """A deadlock that was resolved by trying again counts as well. Stores have to be closed inside: they tell it then."""
    count = "SELECT pg_stat_clear_snapshot(), deadlocks FROM pg_stat_database WHERE datname = current_database()"
    with connect() as connection:
        before = connection.execute(count).fetchone()
        yield
        assert connection.execute(count).fetchone() == before


def test_shuffled_accounts_deadlock_nobody(url: str, store: PostgresStore) -> None:
    """Accounts that are made, held and booked in every order, by stores that know nothing of each other."""
    others = [PostgresStore(url) for _ in range(3)]
    rules = [rule(f"b{n}", 10**6, of=f"r{n % 2}") for n in range(5)]
    wrong: list[object] = []

    def work(of: PostgresStore, number: int) -> None:
        for round in range(25):
            turn = (number + round) % 5
            lines = [(one, 1) for one in (*rules[turn:], *rules[:turn])][:: 1 if round % 2 else -1]
            answers = (of.execute(reserve(f"{number}-{round}", *lines)), of.execute(settle(f"{number}-{round}", 1)))
            wrong.extend(answer for answer in answers if type(answer) not in (Granted, Ended))

    with without_deadlocks():
        in_threads(*[lambda of=of, n=n: work(of, n) for n, of in enumerate([store, *others] * 2)])  # type: ignore[misc]
        assert not wrong
        assert {(account.spent, account.reserved) for account in store.accounts()} == {(200, 0)}
        for one in (store, *others):
            one.close()


def test_i1_stores_that_make_the_same_accounts_at_once_count_them_once(url: str, store: PostgresStore) -> None:
    other, answers = PostgresStore(url), []

    def work(of: PostgresStore, name: str) -> None:
        for number in range(20):
            line = (rule("b", 9, of=f"r{number}"), 1)
            answers.append(of.execute(reserve(f"{name}{number}", line, max_accounts=10)))

    in_threads(lambda: work(store, "a"), lambda: work(other, "b"))
    assert [type(answer) for answer in answers].count(Granted) == 20
    assert [answer for answer in answers if type(answer) is Rejected] == [Rejected("accounts", "b")] * 20
    assert len(list(store.accounts())) == 10
    other.close()


def test_i3_an_account_that_goes_while_batches_wait_for_it_is_made_once(url: str, store: PostgresStore) -> None:
    """It is retired, or renamed, by a transaction for which both have waited: neither may write over what the other holds."""
    store.execute(charge("first", (DOLLAR, 5)))
    other, answers = PostgresStore(url), []

    def work(of: PostgresStore, name: str) -> None:
        answers.extend(of._apply([reserve(f"{name}{number}", (DOLLAR, 60)) for number in range(2)], True))

    waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with connect() as somebody:
        with somebody.transaction():
            somebody.execute("DELETE FROM accounts")
            threads = [threading.Thread(target=work, args=each) for each in ((store, "a"), (other, "b"))]
            for thread in threads:
                thread.start()
            with connect() as watch:
                while watch.execute(waiting).fetchall() != [(2,)]:
                    assert not answers
        for thread in threads:
            thread.join()
    assert [type(answer) for answer in answers] == [Granted] * 4
    assert spent(store) == (0, 240)
    other.close()


@pytest.mark.parametrize("expired", [False, True])
def test_i3_an_end_that_waits_while_its_account_is_renamed_moves_no_other(
    url: str, store: PostgresStore, *, expired: bool
) -> None:
    """An erasure gives the account another key, and somebody makes one anew that has the old key now."""
    person, marker = rule("b", 10**12, of="r23"), rule("b", 10**12, of="erased")
    store.execute(reserve("a", (person, 60), ttl_us=1))
    store.execute(reserve("b", (person, 60)))
    if expired:
        assert store.sweep() == 1
    other, answers = PostgresStore(url), []
    thread = threading.Thread(target=lambda: answers.append(other.execute(settle("a", 25))))
    with connect() as somebody:
        with somebody.transaction():
            for statement in (
                "CREATE TEMP TABLE anew ON COMMIT DROP AS SELECT * FROM accounts",
                f"UPDATE accounts SET key = '{marker.key}'",
                "UPDATE reservations SET held = replace(held, 'r23', 'erased')",
                "UPDATE records SET amounts = replace(amounts, 'r23', 'erased'), facts = replace(facts, 'r23', 'erased')",
                "INSERT INTO accounts SELECT * FROM anew",
            ):
                somebody.execute(statement)
            thread.start()
            with connect() as watch:
                while watch.execute("SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'").fetchall() == []:
                    assert not answers
        thread.join()
    assert [type(answer) for answer in answers] == [Ended]
    assert spent(store, marker) == (25, 60)
    assert spent(store, person) == ((60, 60) if expired else (0, 120))
    other.close()


def test_an_alert_is_given_to_one_only(url: str, store: PostgresStore) -> None:
    other = PostgresStore(url)
    for number in range(40):
        store.execute(Tell(f"a{number:02}", "detector", {"n": number}))
    found: list[list[str]] = []
    in_threads(
        *[lambda of=of: found.append([alert.id for alert, _ in of.claim(20, 60_000_000)]) for of in (store, other)]  # type: ignore[misc]
    )
    assert sorted(id for ids in found for id in ids) == [f"a{number:02}" for number in range(40)]
    assert store.claim(5, 1) == []
    store.retry(["a07"], 0)
    assert [(alert.id, claims) for alert, claims in store.claim(5, 1)] == [("a07", 1)]
    store.delivered(["a07"])
    assert [alert.id for alert, told in store.alerts() if told] == ["a07"]
    other.close()


# -- what the server leaves to the caller --------------------------------------------------------------------------


def test_only_the_operator_takes_an_expiry_off_the_books(url: str) -> None:
    clock, key = ManualClock(), OperatorKey.generate()
    store = PostgresStore(url, clock=clock)
    store.publish({"operator": {"public": key.public}}, "operator")
    draft = {"path": [], "tags": {}, "cost_nanos": 60, "usage": {"x": 3}}
    store.execute(Reserve("a", ((DOLLAR, 60),), TTL_US, draft, version=1))
    clock.advance(601)
    assert store.sweep() == 1
    for proof in ("", OperatorKey.generate().prove("a"), key.prove("b")):
        assert store.execute(Release("a", proof=proof)) == Rejected("operator", "a")
    answer = store.execute(Release("a", proof=key.prove("a")))
    assert type(answer) is Ended
    assert (answer.entry.kind, answer.entry.cost_nanos, answer.entry.usage) == ("reversal", -60, {"x": -3})
    assert store.execute(settle("a", 60)) == Rejected("ended", "reversal")
    store.close()


def test_marks_are_told_once_and_act_on_every_store(url: str, store: PostgresStore) -> None:
    other = PostgresStore(url)
    marked = rule("b", 100, marks=(Mark(50, "notify"), Mark(80, "block")))
    store.execute(reserve("a", (marked, 60)))
    ended = other.execute(settle("a", 60))
    assert type(ended) is Ended
    assert [json.loads(alert.facts["scope"]) for alert in ended.alerts] == [{}]
    assert type(store.execute(reserve("b", (marked, 30)))) is Granted
    refused = other.execute(reserve("c", (marked, 1)))
    assert type(refused) is Refused
    assert (refused.mark, refused.may_free) == (1, True)
    other.close()


def test_a_guarded_call_from_end_to_end(url: str) -> None:
    with Bursar(url, [Budget("b", "5 USD", per="team")]) as bursar, bursar.scope(team='it\'s "research" \\ é'):
        with bursar.call("openai", "gpt-4o", input_tokens=1_000) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=100))
        (record,) = bursar.records(team='it\'s "research" \\ é')
        assert record.cost_nanos == 3_500_000
        (status,) = bursar.status()
        assert (status.spent * 10**9, status.reserved) == (3_500_000, 0)


def test_stores_that_meet_new_accounts_in_every_order_deadlock_nobody(url: str, store: PostgresStore) -> None:
    """Refused calls leave no account, but a store that has met its rule: the next call makes it where others make it, too."""
    others = [store, *(PostgresStore(url) for _ in range(3))]
    wrong: list[object] = []

    def work(of: PostgresStore, number: int) -> None:
        for round in range(15):
            new, old = rule("a", 10**6, of=f"r{round}"), rule("z", 10**6)
            of.execute(reserve(f"{number}-{round}-", (new, 10**7), (old, 1), quiet=True))
            answer = of.execute(reserve(f"{number}-{round}", *((new, 1), (old, 1))[:: -1 if number % 2 else 1]))
            wrong.extend([answer] if type(answer) is not Granted else [])

    with without_deadlocks():
        in_threads(*[lambda of=of, n=n: work(of, n) for n, of in enumerate(others)])  # type: ignore[misc]
        assert not wrong
        for other in others:
            other.close()
