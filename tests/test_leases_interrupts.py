"""Interrupts and threads among leases: whatever they come between, every settlement is in the journal once, and work goes on."""

from __future__ import annotations

import dis
import linecache
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from test_leases import Process, Shared, rule

from bursar.audit import audit
from bursar.commands import Command, Ended, Granted, Settle
from bursar.errors import StoreError
from bursar.stores.leases import journal, lease
from bursar.stores.leases.journal import Journal
from bursar.stores.leases.lease import Lease
from bursar.testing import ManualClock

FILES = {journal.__file__, lease.__file__}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def shared(clock: ManualClock) -> Shared:
    return Shared(clock)


@pytest.fixture
def process(shared: Shared, tmp_path: Path) -> Process:
    process = Process(shared, tmp_path, rule(), rule("team"))
    process.warm_up()
    process.store.tend()
    return process


def interrupted(job: Callable[[], object], at: int) -> bool:
    """Interrupt the job at the n-th line that it reaches in FILES; whether it has so many."""
    seen = 0

    def line(frame: FrameType, event: str, _arg: Any) -> Any:
        nonlocal seen
        if event == "line" and not _is_never_interrupted(frame):
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return line

    sys.settrace(lambda frame, _event, _arg: line if frame.f_code.co_filename in FILES else None)
    try:
        job()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(None)
    return False


def _is_never_interrupted(frame: FrameType) -> bool:
    """Python looks for signals neither where it leaves a `with`, nor where it has nothing to do."""
    code, at = frame.f_code, frame.f_lasti
    leaves = linecache.getline(code.co_filename, frame.f_lineno).strip().startswith("with ")
    return dis.opname[code.co_code[at]] == "NOP" or (leaves and dis.opname[code.co_code[at]] == "LOAD_CONST")


def kept(process: Process) -> list[str]:
    """The ids of the entries in the journal."""
    assert process.store._tender.books.journal is not None
    with process.store._tender.books.journal._use() as connection:
        return [text.split("\t")[1] for (text,) in connection.execute("SELECT entry FROM entries ORDER BY number")]


@pytest.mark.parametrize("calls", [1, 3])
def test_i7_an_interrupt_anywhere_in_a_settlement_costs_no_later_one(
    shared: Shared, process: Process, calls: int
) -> None:
    """Those that were cut off are made again, as the store's worker does; all are on the books, once."""
    at, made = 0, []
    apply = process.store._tender.books.apply
    while True:
        at += 1
        commands: list[Command] = []
        for _ in range(calls):
            assert type(process.reserve()) is Granted
            commands.append(Settle(process.last, {"USD": 7}, 7, {"output_tokens": 7}))
        hit = interrupted(lambda asked=tuple(commands): apply(asked), at)
        process.store.tend()
        for command in commands:
            assert type(process.store.execute(command)) is Ended
        made += [command.id for command in commands]
        made.append(process.call(cost=7))
        process.store.tend()
        if not hit:
            break
    assert at > 10
    process.store.close()
    shared._closed = False
    assert {entry.id: entry.cost_nanos for entry in shared.entries() if entry.id in made} == dict.fromkeys(made, 7)
    assert shared.open_reservations() == 0
    assert audit(shared) == []


def test_a_transaction_that_is_interrupted_as_it_begins_is_not_left_open(tmp_path: Path) -> None:
    """Else every later entry would be written into it, and none of them kept."""
    found = Journal(tmp_path / "a.journal", full=False)
    connection = found._connection
    assert connection is not None

    class Interrupted:
        def __getattr__(self, name: str) -> Any:
            return getattr(connection, name)

        def execute(self, statement: str) -> None:
            connection.execute(statement)
            if statement == "BEGIN":
                raise KeyboardInterrupt

    found._connection = Interrupted()  # type: ignore[assignment]
    with pytest.raises(KeyboardInterrupt):
        found.sent("l", [1], {})
    found._connection = connection
    found.sent("l", [1], {})
    assert not connection.in_transaction
    found.close(delete=True)


def test_a_connection_of_the_journal_that_was_interrupted_is_not_used(tmp_path: Path) -> None:
    found, at = Journal(tmp_path / "a.journal", full=False), 0
    while interrupted(lambda: found._connect(), at := at + 1):
        found.write([("l", "kind\tid")])
        found.before_fork()  # which closes it, as before the first write of all
        found.after_fork(in_child=False)
    assert at > 5
    found.close(delete=True)


def test_an_entry_that_two_threads_would_write_is_in_the_journal_once(process: Process) -> None:
    """A caller and the tender: nobody would delete the second one, and recovery would take it for spent."""
    books = process.store._tender.books
    assert type(process.reserve()) is Granted
    (used,) = [one for one in books.leases.values() if one.open]
    answer = used.end(Settle(process.last, {"USD": 7}, 7, {}), process.shared.now_us())
    assert type(answer) is Ended
    for _ in range(2):
        books.write([used])
    assert kept(process) == [process.last]
    process.store.tend()
    assert kept(process) == []


def test_what_the_journal_could_not_take_is_written_before_what_came_after_it(
    process: Process, clock: ManualClock
) -> None:
    """Whoever reads a correction has the expiry that it corrects."""
    shared, books = process.shared, process.store._tender.books
    assert type(process.reserve()) is Granted
    assert books.journal is not None
    clock.advance(600)
    with books.journal._use() as connection:
        connection.execute("PRAGMA query_only=ON")
    with pytest.raises(StoreError, match="journal") as caught:
        process.store.sweep()
    assert caught.value.fault == "readonly"
    with books.journal._use() as connection:
        connection.execute("PRAGMA query_only=OFF")
    assert type(process.settle(process.last, 7)) is Ended
    assert kept(process) == [process.last, f"{process.last}~"]
    process.store.close()
    assert sum(entry.cost_nanos for entry in shared.entries() if entry.id.startswith(process.last)) == 7
    assert audit(shared) == []


def test_a_lease_is_added_while_nobody_goes_through_them(shared: Shared, tmp_path: Path) -> None:
    """A caller who learns of a newer policy goes through the leases, in a thread of its own."""
    process = Process(shared, tmp_path, rule())
    books = process.store._tender.books

    class Leases(dict[str, Lease]):
        def __setitem__(self, id: str, lease: Lease) -> None:
            free: list[bool] = []
            other = threading.Thread(target=lambda: free.append(books.lock.acquire(blocking=False)))
            other.start()
            other.join()
            assert free == [False]
            super().__setitem__(id, lease)

    books.leases = Leases()
    process.warm_up()
    assert books.leases
