"""Leases: what a process makes of slices of shared accounts, in whatever way it ends."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sqlite3
import stat
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.accounts import Account, Mark, Rule
from bursar.audit import audit
from bursar.cli import main
from bursar.commands import (
    Answer,
    Charge,
    Command,
    Draw,
    Ended,
    Expire,
    Extend,
    Granted,
    Refused,
    Rejected,
    Release,
    Reserve,
    Settle,
)
from bursar.errors import InvalidInput, StoreError
from bursar.foresight.past import read_past
from bursar.stores import open_store
from bursar.stores.entry_text import entry_of
from bursar.stores.leases import LeasedStore, journal, recover
from bursar.stores.leases.books import MAX_BUNDLES
from bursar.stores.leases.journal import Journal
from bursar.stores.leases.sizing import MIN_CALLS, SHARE, Demand
from bursar.stores.leases.tender import IDLE_US, PUT_OFF_US, TTL_US
from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite_rows import dumps
from bursar.testing import ManualClock

CALL = 10
LIMIT = 1_000_000


def rule(budget: str = "org", limit: int = LIMIT, **more: Any) -> Rule:
    key = json.dumps([budget, "USD", "total UTC", {}, more.get("start_us", 0)])
    return Rule(key, budget, "{}", "USD", "window", limit, **more)


class Shared(MemoryStore):
    """The shared store, which counts what reaches it and can be cut off before a command or before its answer."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.commands: list[Command] = []
        self.cut = ""

    def execute(self, command: Command) -> Answer:
        self.commands.append(command)
        if self.cut == "before":
            raise StoreError("no way. Try again.", fault="unreachable")
        answer = super().execute(command)
        if self.cut == "after":
            raise StoreError("no answer. Try again.", fault="unreachable")
        return answer

    def version(self) -> int:
        if self.cut:
            raise StoreError("no way. Try again.", fault="unreachable")
        return super().version()


class Process:
    """One process with leases; it makes calls on the accounts of `rules`."""

    numbers = iter(range(10**9))

    def __init__(
        self, shared: Shared, folder: Path, *rules: Rule, durability: str = "process", background: bool = False
    ) -> None:
        self.shared = shared
        self.rules = rules
        self.store = LeasedStore(shared, folder, durability=durability, background=background)
        self.version = 0

    def reserving(self, amount: int = CALL, **more: Any) -> Reserve:
        id = self.last = f"{next(self.numbers):08}"
        draft = {"path": ["r"], "tags": {"run": "r"}, "cost_nanos": amount, "usage": {}}
        fields = {"version": self.version, **more}
        return Reserve(id, tuple((one, amount) for one in self.rules), 600_000_000, draft, **fields)

    def reserve(self, amount: int = CALL, **more: Any) -> Answer:
        return self.store.execute(self.reserving(amount, **more))

    def settle(self, id: str, cost: int) -> Answer:
        return self.store.execute(Settle(id, {"USD": cost}, cost, {"output_tokens": cost}))

    def call(self, amount: int = CALL, cost: int | None = None) -> str:
        """One whole call; its id."""
        answer = self.reserve(amount)
        assert type(answer) is Granted, answer
        assert type(self.settle(self.last, amount if cost is None else cost)) is Ended
        return self.last

    def warm_up(self, calls: int = 40) -> None:
        """Make calls until they are made out of a lease."""
        for _ in range(calls):
            self.call()
        self.store.tend()
        before = len(self.shared.commands)
        self.call()
        assert len(self.shared.commands) == before, "the call went to the shared store"

    def die(self) -> None:
        """As kill -9 does: nothing is sent, the journal's lock is free."""
        journal = self.store._tender.books.journal
        if journal is not None:
            journal.close(delete=False)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def shared(clock: ManualClock) -> Shared:
    return Shared(clock)


@pytest.fixture
def start(shared: Shared, tmp_path: Path) -> Callable[..., Process]:
    started: list[Process] = []

    def begin(*rules: Rule, **more: Any) -> Process:
        started.append(Process(shared, tmp_path, *(rules or (rule(),)), **more))
        return started[-1]

    return begin


def account(shared: Shared, of: Rule | None = None) -> Account:
    (found,) = shared.accounts([(of or rule()).key])
    return found


def journals(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.journal"))


def test_hot_calls_are_made_in_memory_and_every_record_arrives(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start(rule("org"), rule("team"))
    one.warm_up()
    before = len(shared.commands)
    ids = {one.call(cost=7) for _ in range(15)}
    assert len(shared.commands) == before
    (held,) = shared.reservations()
    assert held.draft["tags"]["lease"].endswith(str(os.getpid()))
    assert account(shared).spent + account(shared).reserved < LIMIT // SHARE * 2
    found = {entry.id: entry for entry in one.store.entries()}  # a report sends what is on its way first
    assert ids <= set(found)
    for id in ids:
        entry = found[id]
        assert (entry.kind, entry.cost_nanos, entry.outcome) == ("settlement", 7, "completed")
        assert entry.amounts == {rule("org").key: 7, rule("team").key: 7}
    assert audit(shared) == []
    assert account(shared).spent == 41 * CALL + 15 * 7
    one.store.close()
    assert shared.open_reservations() == 0
    assert account(shared).reserved == 0
    assert journals(tmp_path) == []


def test_seldom_calls_small_budgets_rates_slots_and_given_ids_go_to_the_shared_store(
    start: Callable[..., Process], shared: Shared, clock: ManualClock
) -> None:
    slow = start()
    for _ in range(40):
        slow.call()
        clock.advance(0.5)
    small = start(rule("small", SHARE * (MIN_CALLS - 1) * CALL))
    rate = start(rule(), Rule('["rate"]', "rate", "{}", "USD", "refill", LIMIT, period_us=1_000_000))
    shadow = start(rule("shadow", enforce=False))
    for process in (small, rate, shadow):
        for _ in range(40):
            process.call()
    named = start(rule("named"))
    for _ in range(40):
        assert type(named.reserve(digest="d")) is Granted
    for process in (slow, small, rate, shadow, named):
        process.store.tend()
        assert not process.store._tender.books.leases
    waiting = start(rule("waiting"))
    waiting.warm_up()
    before = len(shared.commands)
    waiting.reserve(behind=rule("waiting").key)
    waiting.reserve(complied={rule("waiting").key: 1})
    assert len(shared.commands) == before + 2


def test_I1_no_process_passes_the_limit_and_nothing_is_stranded_at_the_end(
    start: Callable[..., Process], shared: Shared, clock: ManualClock
) -> None:
    """Eight processes, two of them silent after their first lease: less than 1 % stays with them."""
    limit, own = 200_000, rule(limit=200_000)
    processes = [start(own) for _ in range(8)]
    for process in processes:
        process.warm_up()
    busy = processes[2:]
    refused = 0
    for _ in range(LIMIT):
        for process in busy:
            answer = process.reserve()
            if type(answer) is Granted:
                process.settle(process.last, CALL)
            else:
                refused += 1
            process.store._tender.books.wanted and process.store.tend()
        held = account(shared)
        assert held.spent + held.reserved <= LIMIT
        if refused > 100:
            break
        clock.advance(us=50_000)
    for process in busy:
        process.store.tend()
        process.store._tender.books.retire(lambda lease: True)
        process.store.tend()
    assert limit - account(shared).spent <= limit // 100
    clock.advance(us=IDLE_US)
    for process in processes:
        process.store.tend()
        process.store.tend()
    assert account(shared).reserved == 0
    assert audit(shared) == []


def test_a_lease_stops_before_the_next_mark_that_acts(start: Callable[..., Process], shared: Shared) -> None:
    marks = (Mark(1_000, "notify"), Mark(2_000, "block"))
    one = start(rule(marks=marks))
    for _ in range(60):
        one.call()
        one.store.tend()
    told = [alert.facts["mark"] for alert, _ in shared.alerts()]
    assert told in ([], [0])
    made = 60
    while type(one.reserve()) is Granted:
        one.settle(one.last, CALL)
        one.store.tend()
        made += 1
    assert made == 200  # to the call: the 201st met the mark
    assert [alert.facts["mark"] for alert, _ in shared.alerts()] == [0, 1]


def test_what_crosses_a_mark_is_told_to_the_guard(start: Callable[..., Process], shared: Shared) -> None:
    one = start(rule(marks=(Mark(450, "notify"),)))
    told: list[Any] = []
    one.store.on_crossed(lambda alerts, accounts: told.extend((alerts, accounts)))
    one.warm_up()
    for _ in range(10):
        one.call()
    one.store.tend()
    (alerts, accounts) = told
    assert [alert.facts["mark"] for alert in alerts] == [0]
    assert accounts[0].rule.marks


def test_a_newer_policy_gives_leases_back_and_makes_the_caller_read_it(
    start: Callable[..., Process], shared: Shared
) -> None:
    one = start()
    one.warm_up()
    one.reserve()
    in_flight = one.last
    shared.publish({"org": {"name": "org", "limit": "1 USD"}})
    one.store.tend()
    assert one.reserve() == Rejected("stale", "1")
    one.version, one.rules = 1, (rule(limit=600),)
    assert type(one.reserve(200)) is not Granted  # the old lease lends nothing for the new limit
    one.settle(in_flight, 3)
    one.store.tend()
    assert not one.store._tender.books.leases
    assert account(shared).reserved == 0
    assert audit(shared) == []


def test_the_store_is_away_leases_last_as_far_as_they_go(start: Callable[..., Process], shared: Shared) -> None:
    one = start()
    one.warm_up()
    shared.cut = "before"
    made = 0
    while one.store._tender.books.reserve(one.reserving()) is not None:
        one.settle(one.last, CALL)
        made += 1
    assert MIN_CALLS <= made < 100
    with pytest.raises(StoreError, match="no way"):
        one.call()
    with pytest.raises(StoreError):
        one.store.tend()
    shared.cut = ""
    one.store.tend()
    assert account(shared).spent == (41 + made) * CALL
    assert audit(shared) == []


@pytest.mark.parametrize("cut", ["before", "after"])
def test_I10_a_lost_answer_books_nothing_twice_and_loses_nothing(
    start: Callable[..., Process], shared: Shared, cut: str, clock: ManualClock
) -> None:
    one = start()
    for _ in range(20):
        one.call()
    shared.cut = cut  # of the lease itself
    with pytest.raises(StoreError):
        one.store.tend()
    shared.cut = ""
    clock.advance(us=PUT_OFF_US)
    one.store.tend()
    assert account(shared).reserved == 0
    one.warm_up()
    for _ in range(5):
        one.call(cost=3)
    shared.cut = cut  # of what was booked on it
    with pytest.raises(StoreError):
        one.store.tend()
    shared.cut = ""
    one.store.tend()
    assert account(shared).spent == 61 * CALL + 5 * 3
    assert audit(shared) == []
    shared.cut = cut  # of its end
    one.store._tender.books.retire(lambda lease: True)
    with pytest.raises(StoreError):
        one.store.tend()
    shared.cut = ""
    one.store.close()
    assert (account(shared).reserved, account(shared).spent) == (0, 61 * CALL + 5 * 3)
    assert audit(shared) == []


def test_I5_a_lease_that_expired_while_its_process_was_held_up_is_corrected(
    start: Callable[..., Process], shared: Shared, clock: ManualClock
) -> None:
    one = start()
    one.warm_up()
    one.call(cost=4)
    one.reserve()
    in_flight = one.last
    clock.advance(us=TTL_US)
    assert shared.sweep() == 1
    one.store.tend()
    assert account(shared).spent > 42 * CALL  # what it held stands for calls in flight
    assert type(one.settle(in_flight, 6)) is Ended
    one.store.tend()
    one.store.tend()
    assert (account(shared).spent, account(shared).reserved) == (41 * CALL + 4 + 6, 0)
    assert audit(shared) == []


def test_a_live_process_extends_its_lease_while_a_call_is_in_flight(
    start: Callable[..., Process], shared: Shared, clock: ManualClock
) -> None:
    one = start()
    one.warm_up()
    one.reserve()
    for _ in range(12):
        clock.advance(us=TTL_US // 3)
        one.store.tend()
        assert shared.sweep() == 0
    assert type(one.settle(one.last, CALL)) is Ended
    one.store.tend()
    assert account(shared).reserved == 0


def test_a_call_that_nobody_ends_expires_and_a_late_settlement_corrects_it(
    start: Callable[..., Process], shared: Shared, clock: ManualClock
) -> None:
    one = start()
    one.warm_up()
    one.reserve()
    late = one.last
    clock.advance(600)
    assert one.store.sweep() >= 1
    assert one.store.execute(Extend(late, 1_000_000)) == Rejected("ended", "expiry")
    assert type(one.settle(late, 4)) is Ended
    again = one.settle(late, 4)
    assert type(again) is Ended
    assert again.again
    found = {entry.id: entry for entry in one.store.entries()}
    assert (found[late].estimated, found[late].cost_nanos) == (True, CALL)
    assert (found[late + "~"].corrects, found[late + "~"].cost_nanos) == (late, 4 - CALL)
    assert account(shared).spent == 41 * CALL + 4
    assert audit(shared) == []


# -- death -------------------------------------------------------------------------------------------------------------


def test_a_dead_process_is_recovered_by_the_next_and_what_nobody_knows_stays_booked(
    start: Callable[..., Process], shared: Shared, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = start()
    one.warm_up()
    ids = [one.call(cost=7) for _ in range(5)]
    one.reserve()  # in flight for ever
    (lease,) = shared.reservations()
    granted = lease.held[0][2]
    one.die()
    assert len(journals(tmp_path)) == 1
    with caplog.at_level(logging.WARNING, "bursar"):
        two = start()
        two.store.tend()
    assert "recovered" in caplog.text
    assert journals(tmp_path) == []
    entries = {entry.id: entry for entry in shared.entries()}
    assert {entries[id].cost_nanos for id in ids} == {7}
    left = entries[lease.id]
    assert (left.kind, left.estimated, left.outcome) == ("settlement", True, "cancelled")
    # one call had been made out of the lease before these
    assert left.cost_nanos == left.amounts[rule().key] == granted - 5 * 7 - CALL
    assert account(shared).reserved == 0
    assert account(shared).spent == 40 * CALL + granted
    assert audit(shared) == []


def test_a_journal_that_is_recovered_after_the_lease_has_expired_comes_to_the_same(
    start: Callable[..., Process], shared: Shared, tmp_path: Path, clock: ManualClock
) -> None:
    one = start()
    one.warm_up()
    for _ in range(5):
        one.call(cost=7)
    one.store.tend()
    one.call(cost=8)
    (lease,) = shared.reservations()
    undrawn = lease.held[0][2]
    before = account(shared).spent
    one.die()
    clock.advance(us=TTL_US)
    shared.sweep()
    assert account(shared).spent == before + undrawn
    (found,) = recover(shared, tmp_path)
    assert (found.records, found.estimated) == (1, {"USD": undrawn - 8})
    assert account(shared).spent == before + undrawn
    assert audit(shared) == []
    assert recover(shared, tmp_path) == []


def test_a_lost_journal_leaves_the_whole_lease_booked_as_estimated(
    start: Callable[..., Process], shared: Shared, tmp_path: Path, clock: ManualClock
) -> None:
    one = start()
    one.warm_up()
    (lease,) = shared.reservations()
    before = account(shared).spent
    one.die()
    for path in tmp_path.iterdir():
        path.unlink()
    clock.advance(us=TTL_US)
    shared.sweep()
    entry = next(entry for entry in shared.entries() if entry.id == lease.id)
    assert (entry.kind, entry.estimated, entry.cost_nanos) == ("expiry", True, lease.held[0][2])
    assert account(shared).spent == before + lease.held[0][2]
    assert audit(shared) == []


def flip(path: Path) -> None:
    """As a disk does that lies: one page is other bytes than were written."""
    data = bytearray(path.read_bytes())
    data[4096:4196] = b"\xff" * 100
    path.write_bytes(data)


def overwrite(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1_000)


def tear(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE entries SET entry = substr(entry, 1, 20)")
    connection.close()


@pytest.mark.parametrize("damage", [flip, overwrite, tear])
def test_a_damaged_journal_is_put_aside_and_holds_up_no_other(
    start: Callable[..., Process],
    shared: Shared,
    clock: ManualClock,
    tmp_path: Path,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    processes = [start(), start()]
    for process in processes:
        process.warm_up()
        process.call(cost=3)
    for process in processes:
        process.die()
    first, second = journals(tmp_path)
    damage(tmp_path / first)
    assert [one.journal.name for one in recover(shared, tmp_path)] == [second]
    assert journals(tmp_path) == []
    assert (tmp_path / f"{first}.damaged").exists()
    assert "booked as estimated" in caplog.text
    assert recover(shared, tmp_path) == []
    clock.advance(us=TTL_US)
    shared.sweep()
    assert account(shared).reserved == 0
    assert audit(shared) == []


def test_a_journal_that_the_store_rejects_is_kept_and_holds_up_no_other(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    last: dict[str, str] = {}
    processes = [start(), start()]
    for process in processes:
        process.warm_up()
        held = process.store._tender.books.journal
        assert held is not None
        last[held.path.name] = process.call(cost=3)
    for process in processes:
        process.die()
    first, second = journals(tmp_path)
    draft = {"path": [], "tags": {}, "cost_nanos": 8, "usage": {}}
    shared.execute(Charge(last[first], ((rule(), 8),), 8, {}, draft))  # another record stands under that id
    with pytest.raises(StoreError, match="rejects the records") as caught:
        recover(shared, tmp_path)
    assert first in str(caught.value)
    assert journals(tmp_path) == [first]
    assert next(entry.cost_nanos for entry in shared.entries() if entry.id == last[second]) == 3
    assert audit(shared) == []


def test_what_recovery_tells_of_a_lease_that_was_given_back_or_never_granted_is_that_nothing_stays(
    shared: Shared, tmp_path: Path
) -> None:
    """Its process died before the journal said so."""
    left = Journal(tmp_path / "a.journal", full=False)
    for id in ("given back", "never granted"):
        left.begin(id, (rule(),), {rule().key: 100})
    left.close(delete=False)
    draft = {"path": [], "tags": {}, "cost_nanos": 100, "usage": {}}
    assert type(shared.execute(Reserve("given back", ((rule(), 100),), TTL_US, draft))) is Granted
    assert type(shared.execute(Release("given back"))) is Ended
    assert [one.estimated for one in recover(shared, tmp_path)] == [{"USD": 0}] * 2
    assert account(shared).spent == 0


def test_recovery_that_is_cut_off_goes_on_from_there(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start()
    one.warm_up()
    one.call(cost=3)
    one.die()
    for cut in ("before", "after"):
        shared.cut = cut
        with pytest.raises(StoreError):
            recover(shared, tmp_path)
        assert len(journals(tmp_path)) == 1
    shared.cut = ""
    assert len(recover(shared, tmp_path)) == 1
    assert account(shared).reserved == 0
    assert audit(shared) == []


def test_recovery_that_the_stores_absence_cut_off_is_tried_in_the_next_round(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start()
    one.warm_up()
    id = one.call(cost=3)
    one.die()
    two = start()
    shared.cut = "before"
    with pytest.raises(StoreError):
        two.store.tend()
    shared.cut = ""
    two.store.tend()
    assert journals(tmp_path) == []
    assert next(entry.cost_nanos for entry in shared.entries() if entry.id == id) == 3


def test_the_journal_of_a_process_that_lives_is_left_alone_and_is_nobody_elses_to_read(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start()
    one.warm_up()
    (name,) = journals(tmp_path)
    assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600
    assert recover(shared, tmp_path) == []
    two = start()
    two.warm_up()
    assert len(journals(tmp_path)) == 2
    one.store.close()
    assert len(journals(tmp_path)) == 1


def test_closing_while_the_store_is_away_keeps_the_journal(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start()
    one.warm_up()
    one.call(cost=2)
    shared.cut = "before"
    one.store.close()
    with pytest.raises(StoreError, match="closed"):
        one.reserve()
    shared.cut, shared._closed = "", False
    recover(shared, tmp_path)
    assert account(shared).reserved == 0
    assert any(entry.cost_nanos == 2 for entry in shared.entries())
    assert audit(shared) == []


def test_I7_nothing_is_answered_that_the_journal_does_not_have(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    one = start()
    one.warm_up()
    assert type(one.reserve()) is Granted
    books = one.store._tender.books
    assert books.journal is not None
    books.journal._full = False
    with books.journal._use() as connection:
        pages = connection.execute("PRAGMA page_count").fetchone()[0]
        connection.execute(f"PRAGMA max_page_count={pages}")
    failed = None
    for _ in range(200):
        try:
            one.settle(one.last, 7)
            assert type(one.reserve()) is Granted
        except StoreError as error:
            failed = error
            break
    assert failed is not None
    assert failed.fault == "full"
    with books.journal._use() as connection:
        connection.execute("PRAGMA max_page_count=1000000")
    answer = one.settle(one.last, 7)  # the keeper tries again
    assert type(answer) is Ended
    assert answer.again
    one.store.tend()
    assert sum(entry.id == one.last for entry in shared.entries()) == 1
    assert audit(shared) == []


def test_the_command_recovers(tmp_path: Path, clock: ManualClock) -> None:
    url = f"sqlite:///{tmp_path / 's.db'}?durability=process"
    sqlite = open_store(url, clock)
    store = LeasedStore(sqlite, tmp_path, durability="process", background=False)
    process = Process.__new__(Process)
    process.store, process.rules, process.version = store, (rule(limit=10**12),), 0
    for _ in range(60):
        process.call()
    store.tend()
    process.call(cost=4)
    process.die()
    done = CliRunner().invoke(main, ["recover", str(tmp_path), "--store", url, "--format", "json"])
    assert done.exit_code == 0, done.output
    (row,) = map(json.loads, done.output.splitlines())
    assert (row["records"], row["estimated"]) == (1, f"{(60 * CALL - 4) / 1e9:.9f}".rstrip("0") + " USD")
    again = CliRunner().invoke(main, ["recover", str(tmp_path), "--store", url])
    assert again.output == "Nothing is left to recover.\n"
    sqlite.close()


@pytest.mark.parametrize("durability", ["process", "full"])
def test_kill_9_in_mid_flight_loses_no_settlement_that_was_answered(tmp_path: Path, durability: str) -> None:
    """A child on SQLite as the shared store is killed at once after its last answer; what it was answered is on the books."""
    from bursar.stores.sqlite import SqliteStore

    answered, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            store = LeasedStore(SqliteStore(tmp_path / "s.db", durability="process"), tmp_path, durability=durability)
            lines = ((rule(limit=10**12), CALL),)
            for number in range(10**6):
                id = f"{number:08}"
                draft = {"path": ["r"], "tags": {"run": "r"}, "cost_nanos": CALL, "usage": {}}
                assert type(store.execute(Reserve(id, lines, 600_000_000, draft))) is Granted
                assert type(store.execute(Settle(id, {"USD": 3}, 3, {}))) is Ended
                if store._tender.books.ends(Expire(id)):
                    os.write(told, id.encode())
        finally:
            os._exit(1)
    got = b"".join(os.read(answered, 8) for _ in range(200))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(told)
    while more := os.read(answered, 1 << 16):
        got += more
    os.close(answered)
    ids = {got[start : start + 8].decode() for start in range(0, len(got), 8)}
    shared = SqliteStore(tmp_path / "s.db", durability="process")
    found = recover(shared, tmp_path)
    entries = {entry.id: entry for entry in shared.entries()}
    assert ids <= set(entries)
    assert all(entries[id].cost_nanos == 3 for id in ids)
    assert audit(shared) == []
    assert not list(shared.reservations())
    assert {entries[one.lease].cost_nanos for one in found} == {one.estimated["USD"] for one in found}
    shared.close()


def test_a_forks_child_has_leases_of_its_own(tmp_path: Path, clock: ManualClock) -> None:
    from bursar.stores.sqlite import SqliteStore

    sqlite = SqliteStore(tmp_path / "s.db", durability="process", clock=clock)
    store = LeasedStore(sqlite, tmp_path, durability="process", background=False)
    process = Process.__new__(Process)
    process.store, process.rules, process.version = store, (rule(limit=10**12),), 0
    for _ in range(60):
        process.call()
    store.tend()
    process.call()
    mine = store._tender.books
    assert mine.leases
    child = os.fork()
    if child == 0:
        try:
            assert not store._tender.books.leases
            Process.numbers = iter(range(10**7, 10**8))
            for _ in range(60):
                process.call()
            store.tend()
            process.call()
            assert store._tender.books.leases
            store.close()
            os._exit(0)
        except BaseException:
            (tmp_path / "child").write_text(traceback.format_exc())
            raise
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "child").read_text()
    assert store._tender.books is mine
    process.call()
    store.tend()
    assert audit(store.shared) == []
    assert not recover(store.shared, tmp_path)  # the parent holds its journal's lock still
    store.close()
    assert journals(tmp_path) == []


# -- in use ------------------------------------------------------------------------------------------------------------


def test_async_callers_and_posted_ends(start: Callable[..., Process], shared: Shared) -> None:
    for durability in ("process", "full"):
        one = start(rule(durability), durability=durability)
        one.warm_up()

        async def pairs(store: LeasedStore, of: Rule) -> None:
            async def pair(number: int) -> None:
                id = f"a{of.budget}{number:04}"
                draft = {"path": ["r"], "tags": {"run": "r"}, "cost_nanos": CALL, "usage": {}}
                assert type(await store.aexecute(Reserve(id, ((of, CALL),), 600_000_000, draft))) is Granted
                if number % 3:
                    assert type(await store.aexecute(Settle(id, {"USD": 2}, 2, {}))) is Ended
                else:
                    store.post(Release(id))

            await asyncio.gather(*(pair(number) for number in range(20)))

        asyncio.run(pairs(one.store, rule(durability)))
        one.store.close()
        shared._closed = False
        assert account(shared, rule(durability)).spent == 41 * CALL + 13 * 2
    assert audit(shared) == []


class Held(Shared):
    """The shared store, which grants a lease only when the gate is opened."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.gate = threading.Event()
        self.asked = threading.Event()

    def execute(self, command: Command) -> Answer:
        if type(command) is Reserve and command.quiet:
            self.asked.set()
            assert self.gate.wait(60)
        return super().execute(command)


def test_who_comes_while_a_lease_is_asked_for_waits_for_it(clock: ManualClock, tmp_path: Path) -> None:
    """Else many callers would queue at the hot account, and the lease that serves them all behind them."""
    shared = Held(clock)
    process = Process(shared, tmp_path, rule(), background=True)
    for _ in range(4):
        process.reserve()
    before = len(shared.commands)

    async def calls() -> list[Answer]:
        waiting = [asyncio.create_task(process.store.aexecute(process.reserving())) for _ in range(10)]
        given_up = asyncio.create_task(process.store.aexecute(process.reserving()))
        for _ in range(10):
            await asyncio.sleep(0)
        assert shared.asked.wait(60)
        given_up.cancel()  # who waits no longer ends nobody else's waiting
        threading.Timer(0.05, shared.gate.set).start()
        return [await asyncio.to_thread(process.reserve), *await asyncio.gather(*waiting)]

    assert all(type(answer) is Granted for answer in asyncio.run(calls()))
    assert [
        type(command) for command in shared.commands[before:] if type(command) is Reserve and not command.quiet
    ] == []
    process.store.close()


def test_who_waits_for_a_lease_that_cannot_be_had_makes_the_call_without_one(
    clock: ManualClock, tmp_path: Path
) -> None:
    shared = Held(clock)
    process = Process(shared, tmp_path, rule(limit=100 * CALL), background=True)  # too little for a lease
    shared.gate.set()
    assert [type(process.reserve()) for _ in range(101)] == [Granted] * 100 + [Refused]
    process.store.close()


def test_a_lease_that_was_used_up_at_once_is_followed_by_a_larger_one() -> None:
    """Calls that had to wait for the shared store tell little of how fast they come."""
    demand = Demand(0)
    for _ in range(20):
        demand.note(900_000)
    assert demand.calls() == 20
    demand.used_up(20, 10_000)
    assert demand.calls() == 2_000


def test_through_the_face_of_it_all(tmp_path: Path) -> None:
    """Calls of a Bursar over a leased store: exact records, thresholds told, a budget that ends."""
    clock = ManualClock()
    shared = Shared(clock)
    store = LeasedStore(shared, tmp_path, durability="process", background=False)
    budget = Budget("org", "100 USD", per="org", thresholds=[{"at": "50%", "action": "notify"}])  # type: ignore[list-item]
    bursar = Bursar(store, [budget], clock=clock, detectors="off")
    with bursar.scope(org="acme", run="r"):
        for _ in range(200):
            clock.advance(us=1_000)
            reservation = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
            record = reservation.settle(Usage(input_tokens=1_000, output_tokens=400))
            assert record is not None
            assert record.cost_nanos == 6_500_000
            store.tend()
        before = len(shared.commands)
        for _ in range(10):
            bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500).settle(
                Usage(input_tokens=1_000, output_tokens=400)
            )
        assert len(shared.commands) == before
    assert sum(record.cost_nanos for record in bursar.records(org="acme")) == 210 * 6_500_000
    clock.advance(us=IDLE_US)
    store.tend()
    assert any(entry.kind == "release" for entry in store.entries())
    assert len(read_past(store.entries())) == 210  # a lease is no call
    (status,) = bursar.status(org="acme")
    assert int(status.spent * 10**9) == 210 * 6_500_000
    with bursar.scope(org="acme", run="r"), pytest.raises(BudgetExceeded):
        bursar.reserve("openai", "gpt-4o", input_tokens=100_000_000, max_output_tokens=16_000)
    bursar.close()
    assert shared.open_reservations() == 0


def test_what_cannot_be_is_said(tmp_path: Path, clock: ManualClock) -> None:
    with pytest.raises(InvalidInput, match="durability"):
        LeasedStore(Shared(clock), tmp_path, durability="fast")
    with pytest.raises(StoreError, match="Create the folder"):
        LeasedStore(Shared(clock), tmp_path / "none")
    with pytest.raises(InvalidInput, match="leases=FOLDER"):
        Bursar("postgresql://nowhere/x?durability=process")


def test_i5_what_an_operator_took_off_the_books_is_not_corrected_out_of_a_lease(
    shared: Shared, clock: ManualClock, tmp_path: Path
) -> None:
    """The expiry has been sent, so that whoever settles late asks the shared store; the lease goes on."""
    process = Process(shared, tmp_path, rule())
    process.warm_up()
    process.reserve()
    late = process.last
    process.reserve()
    process.store.execute(Extend(process.last, 2_000_000_000))  # the lease has a call in flight
    clock.advance(600)
    process.store.sweep()
    process.store.tend()
    assert type(shared.execute(Release(late))) is Ended
    assert process.settle(late, 7) == Rejected("ended", "reversal")
    assert type(process.settle(process.last, 7)) is Ended
    process.store.tend()
    process.store.close()
    assert audit(shared) == []
    assert not list(tmp_path.glob("*.journal"))


def test_a_journal_of_an_earlier_version_is_recovered(
    start: Callable[..., Process], shared: Shared, tmp_path: Path
) -> None:
    """Entries were JSON at first."""
    one = start()
    one.warm_up()
    ids = [one.call(cost=7) for _ in range(3)]
    one.die()
    (name,) = journals(tmp_path)
    with sqlite3.connect(tmp_path / name) as connection:
        for number, text in connection.execute("SELECT number, entry FROM entries").fetchall():
            connection.execute("UPDATE entries SET entry = ? WHERE number = ?", (dumps(entry_of(text)), number))
    connection.close()
    (found,) = recover(shared, tmp_path)
    assert found.records == 4  # one call had been made out of the lease before these
    assert {entry.cost_nanos for entry in shared.entries() if entry.id in ids} == {7}
    assert audit(shared) == []


def test_a_journal_has_its_name_when_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for journals of dead processes at that moment would hold it, and its own process could not have it."""
    lock, found = journal.flock, []

    def looked_at(file: int, operation: int) -> None:
        found.append(list(tmp_path.glob(f"*{journal.SUFFIX}")))
        lock(file, operation)

    monkeypatch.setattr(journal, "flock", looked_at)
    Journal(tmp_path / f"mine{journal.SUFFIX}", full=False).close(delete=True)
    assert found == [[]]
    assert list(tmp_path.iterdir()) == []


def test_what_the_shared_store_has_is_forgotten(shared: Shared, clock: ManualClock, tmp_path: Path) -> None:
    """A lease that is used for long keeps its accounts and the calls in flight; who asks for others again is answered as before."""
    one = Process(shared, tmp_path, rule())
    one.warm_up()
    assert type(one.reserve()) is Granted
    in_flight = one.last
    ended = [one.call(cost=3) for _ in range(10)]
    one.store.tend()
    books = one.store._tender.books
    (lease,) = books.leases.values()
    assert {id for id in lease.rows if id[0] not in "[#"} == {in_flight} == set(books._holders)
    again = one.settle(ended[0], 3)
    assert type(again) is Ended
    assert again.again
    assert one.settle(ended[1], 4) == Rejected("conflict", ended[1])
    assert type(one.settle(in_flight, 5)) is Ended
    one.store.close()
    shared._closed = False
    assert account(shared).spent == 41 * CALL + 10 * 3 + 5
    assert audit(shared) == []


def test_bundles_whose_demand_is_known_are_the_last_ones(clock: ManualClock, start: Callable[..., Process]) -> None:
    one = start()
    for number in range(MAX_BUNDLES + 10):
        one.rules = (rule(f"run {number}"),)
        one.call()
    demand = one.store._tender.books._demand
    assert len(demand) == MAX_BUNDLES
    assert (one.rules[0].key,) in demand


def test_a_call_that_is_settled_late_while_its_expiry_is_sent_is_not_forgotten(
    clock: ManualClock, tmp_path: Path
) -> None:
    class Slow(Shared):
        def execute(self, command: Command) -> Answer:
            if type(command) is Draw and any(entry.id == late for entry in command.entries):
                answers.append(process.settle(late, 7))
            return super().execute(command)

    answers: list[Answer] = []
    late = ""
    shared = Slow(clock)
    process = Process(shared, tmp_path, rule())
    process.warm_up()
    process.reserve()
    late = process.last
    clock.advance(600)
    process.store.sweep()
    process.store.tend()
    answers.append(process.settle(late, 7))
    assert [type(answer) is Ended and answer.again for answer in answers] == [False, True]
    process.store.close()
    assert sum(entry.cost_nanos for entry in shared.entries() if entry.id.startswith(late)) == 7
    assert audit(shared) == []


@pytest.mark.parametrize(("pause_s", "leased"), [(0.0, True), (0.1, True), (2.0, False), (60.0, False)])
def test_calls_that_are_seldom_because_they_wait_for_the_store_get_a_lease(
    clock: ManualClock, tmp_path: Path, pause_s: float, leased: bool
) -> None:
    """A store that takes 0.3 s lets nobody make five calls a second. Who would make few with a fast one takes no lease."""

    class Busy(Shared):
        def execute(self, command: Command) -> Answer:
            clock.advance(0.3)
            return super().execute(command)

    one = Process(Busy(clock), tmp_path, rule())
    taken = 0
    for _ in range(40):
        one.call()
        clock.advance(pause_s)
        one.store.tend()
        taken = max(taken, len(one.store._tender.books.leases))
    assert bool(taken) is leased
    for _ in range(3):  # nobody who has become quiet takes one
        clock.advance(60)
        one.store.tend()
        one.call()
        assert not one.store._tender.books.wanted
    one.store.close()
