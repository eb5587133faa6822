"""The PostgreSQL store: budgets shared by the processes of many hosts, one statement per command or batch of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import psycopg
from pydantic_core import from_json

from bursar.clock import Clock, StoreClock
from bursar.commands import (
    Alert,
    Answer,
    Command,
    Draw,
    Entry,
    Rejected,
    Release,
    Settle,
)
from bursar.errors import StoreError
from bursar.signing import changes
from bursar.stores import forks
from bursar.stores import sqlite_rows as rows
from bursar.stores.base import expire_all
from bursar.stores.entry_text import COLUMNS
from bursar.stores.erasing import Erased, Erasure, Sign, erase
from bursar.stores.group_commit import GroupCommit
from bursar.stores.postgres import queries
from bursar.stores.postgres.asking import Asking
from bursar.stores.postgres.fast import STATEMENTS, Fast
from bursar.stores.postgres.partitions import PRUNING, make_ahead, prune
from bursar.stores.postgres.server import (
    LAW,
    MIGRATING,
    NOW,
    concerns_one,
    connect,
    fault_of,
    is_lost,
    is_passing,
    prepare,
    server_time_us,
    split,
)
from bursar.stores.postgres.wire import Wire, answer_of, copied, late
from bursar.stores.pruning import Pruned
from bursar.stores.reading import TableReading, definitions_of
from bursar.stores.retiring import granted
from bursar.stores.server_clock import ServerClock

SWEEP_BATCH = 500
MAX_STATEMENT = 64  # commands of one statement: each holds a lock of the server's table of locks
MAX_DRAWS = 8
MAX_ERASURES = 50
DAY_US = 86_400_000_000
_DRAW = f"SELECT {LAW}draw(%s::jsonb, %s::bigint, %s::bigint)"
_COPY = f"COPY records({COLUMNS}) FROM STDIN"
_APPLY = f"SELECT {LAW}apply($1::jsonb, $2::boolean, $3::bigint, $4::bigint)"


class PostgresStore(TableReading):
    """Budgets in a PostgreSQL database, in a schema of their own (`?schema=`, by default "bursar").

    The server's clock decides; with `clock` (for tests and simulations), that one. `durability` is what the server is set to:
    `full` where a commit waits for the disk (`fsync`, `synchronous_commit`), else `process`. Raises StoreError (unreachable,
    locked, full, readonly, damaged, newer, clock).
    """

    _queries = queries

    def __init__(self, url: str, *, clock: Clock | None = None, timeout_s: float = 10.0) -> None:
        self._url, self._schema = split(url)
        self._timeout_s = timeout_s  # of a statement, its wait for locks included
        self._using = threading.RLock()  # held while the connection for commands is in use
        self._reading = threading.RLock()  # held while that for everything else is
        self._connection: psycopg.Connection[Any] | None = None
        self._asking: Asking  # over that connection
        self._reader: psycopg.Connection[Any] | None = None
        self._closed = False
        self._wire, self._fast = Wire(), Fast()
        with _faults():
            prepare(self._url, self._schema, timeout_s)
        try:
            (fsync, commit), last = self._query(queries.DURABILITY)[0], self._query(rows.LAST_TIME)[0][0] or 0
            self.durability = "full" if fsync == "on" and commit != "off" else "process"
            self._server = None if clock is not None else ServerClock(self._ask_time, last)
            given = StoreClock(clock, last) if clock is not None else self._server
            assert given is not None
            self.now_us = given.now_us
        except BaseException:
            self._drop()
            raise
        self._months_due_us = 0  # when to see again whether those to come have their tables
        self._commits = GroupCommit(self._apply)
        forks.watch(self)

    def _connect(self, *, lawful: bool = False) -> psycopg.Connection[Any]:
        return connect(self._url, self._schema, timeout_s=self._timeout_s, lawful=lawful)

    def _ask_time(self) -> int:
        return int(self._query(NOW)[0][0])

    def execute(self, command: Command) -> Answer:
        return self._commits.run(command)

    async def aexecute(self, command: Command) -> Answer:
        return await self._commits.arun(command)

    def post(self, command: Command) -> None:
        self._commits.post(command)

    # -- commands

    def _apply(self, commands: Sequence[Command], first_time: bool) -> list[Answer | BaseException]:
        """A statement may be made again: the law gives a command that comes twice the same answer (I6)."""
        if len(commands) == 1:
            return self._apply_some(commands, first_time)
        answers: list[Answer | BaseException] = []
        for draws, some in groupby(commands, lambda command: type(command) is Draw):
            together = list(some)
            size = 1 if draws else MAX_STATEMENT
            for start in range(0, len(together), size):
                answers += self._apply_some(together[start : start + size], first_time)
        return answers

    def _apply_some(self, commands: Sequence[Command], first_time: bool) -> list[Answer | BaseException]:
        for last in (False, True):
            try:
                with self._using:
                    return self._send(commands, first_time and not last)
            except psycopg.Error as error:
                if len(commands) > 1 and concerns_one(error):
                    return [answer for command in commands for answer in self._apply_some([command], False)]
                if last or not (is_lost(error) or is_passing(error)):
                    failure = fault_of(error)
                    failure.__cause__ = error
                    return [failure for _ in commands]
            except Exception as error:  # noqa: BLE001 - no caller may be left without an answer
                return [error for _ in commands]
        raise AssertionError("unreachable")

    def _send(self, commands: Sequence[Command], first_time: bool) -> list[Answer | BaseException]:
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")
        if type(commands[0]) is Draw:
            return [self._draw(commands[0])]
        known = [self._wire.knows(command) for command in commands]
        careful = len(commands) > 1 or not known[0]
        ways = [
            self._fast.values(command, first_time=first_time) if met else None  # it makes no accounts
            for command, met in zip(commands, known, strict=True)
        ]
        if not careful and ways[0] is not None:
            told = self._ask(STATEMENTS[type(commands[0])], *ways[0])
            if told is not None:
                return [self._answer(commands[0], told.decode())]
        texts = [self._wire.text(command, fast=fast) for command, fast in zip(commands, ways, strict=True)]
        answers = self._call(texts, careful=careful)
        if answers[0] == {"t": "careful"}:
            answers = self._call(texts, careful=True)
        return [self._answer(command, one) for command, one in zip(commands, answers, strict=True)]

    def _answer(self, command: Command, told: Mapping[str, Any] | str) -> Answer:
        """What the server says to a command: a text where it went the fast way."""
        if isinstance(told, str):
            answer, now_us = self._fast.answer(command, told)
            self._learn(now_us)
            return answer
        self._fast.forget(command)
        if told["t"] == "late":
            assert type(command) is Settle or type(command) is Release
            (told,) = self._call([self._wire.text(command, late=late(command, told))], careful=False)
            assert not isinstance(told, str)
        return answer_of(command, told)

    def _draw(self, command: Draw) -> Answer:
        """In one transaction: the entries by COPY, which takes a fifth of an insert's time, the sums by a call of the law.

        The law last: it locks the accounts, for which the other holders of leases wait until the commit.
        """
        new = command
        for _ in range(MAX_DRAWS):
            try:
                times, connection = self._times(), self._speak()
                with connection.transaction() as transaction:
                    if new.entries:
                        with connection.cursor().copy(_COPY) as copy:
                            copy.write(copied(new))
                    row = connection.execute(_DRAW, (self._wire.draw(new), *times), prepare=True).fetchone()
                    assert row is not None
                    answer = answer_of(new, from_json(row[0]))
                    if type(answer) is Rejected:
                        raise psycopg.Rollback(transaction)
                return answer
            except psycopg.errors.UniqueViolation:
                entries = {entry.id: entry for entry in command.entries}
                ids = list(entries)
                known = {row[0]: rows.entry(row) for row in self._query(queries.SOME_ENTRIES, (ids,))}
                conflict = next((id for id in ids if id in known and _plain(known[id]) != _plain(entries[id])), None)
                if conflict is not None:
                    return Rejected("conflict", conflict)
                new = command._replace(entries=tuple(one for one in command.entries if one.id not in known))
            except BaseException as error:
                self._end_speech(error)
                raise
        raise StoreError(
            "Others write the same records all the time. Recover a journal by one process.", fault="locked"
        )

    def _call(self, texts: list[str], *, careful: bool) -> list[dict[str, Any] | str]:
        """One statement by the whole law."""
        told = self._ask(_APPLY, f"[{','.join(texts)}]", careful)
        assert told is not None
        answer = from_json(told)
        self._learn(answer["now_us"])
        answers: list[dict[str, Any] | str] = answer["answers"]
        return answers

    def _ask(self, statement: str, *values: str | int | None) -> bytes | None:
        try:
            times = self._times()
            self._speak()
            return self._asking.value(statement, *values, *times)
        except BaseException as error:
            self._end_speech(error)
            raise

    def _times(self) -> tuple[int | None, int | None]:
        """What a command is told of the time: the one that is given, or what has been seen of the server's."""
        if self._server is None:
            return self.now_us(), None
        self._server.check()
        return None, self._server.seen_us

    def _learn(self, now_us: int) -> None:
        if self._server is not None:
            self._server.learn(now_us)

    def _speak(self) -> psycopg.Connection[Any]:
        """The connection for commands."""
        if self._connection is None:
            self._connection = self._connect(lawful=True)
            self._asking = Asking(self._connection)
        return self._connection

    def _end_speech(self, error: BaseException) -> None:
        """A connection that was interrupted is not used again."""
        if self._connection is not None and not _still_good(error):
            self._connection.close()
            self._connection = None

    def sweep(self) -> int:
        if self.now_us() >= self._months_due_us:
            self._months_due_us = self.now_us() + DAY_US
            with _faults(), self._read() as connection:
                make_ahead(connection, server_time_us(connection))
        due = self._query(queries.DUE_RESERVATIONS, (self.now_us(), SWEEP_BATCH))
        return expire_all(self, (id for (id,) in due))

    # -- definitions

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """In one transaction, by one process at a time; a definition that is the newest already is left alone."""
        asked = (kind, list(definitions))
        if not changes(kind, definitions, definitions_of(self._query(queries.STANDING_DEFINITIONS, asked))):
            return self.version()
        now_us = self.now_us()
        with _faults(), self._read() as connection, connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATING,))
            held = definitions_of(connection.execute(queries.STANDING_DEFINITIONS, asked).fetchall())
            ((newest,),) = connection.execute(rows.VERSION).fetchall()
            version = newest or 0
            for name, definition in changes(kind, definitions, held).items():
                version += 1
                connection.execute(queries.PUBLISH, (version, kind, name, rows.dumps(definition), now_us))
        return version

    # -- the outbox

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        now_us = self.now_us()
        found = self._query(queries.CLAIM, (now_us + lease_us, now_us, limit))
        return sorted(((rows.alert(row), row[4]) for row in found), key=lambda one: (one[0].at_us, one[0].id))

    def delivered(self, ids: Iterable[str]) -> None:
        self._query(queries.DELIVERED, (self.now_us(), list(ids)))

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self._query(queries.RETRY, (at_us, list(ids)))

    def prune(self, before_us: int, facts: Mapping[str, Any]) -> Pruned:
        more = granted(self.definitions()[1], self.now_us())
        with _faults(), connect(self._url, self._schema, timeout_s=0) as connection:  # sums over a month take long
            return prune(connection, more, before_us, self.now_us(), facts)

    def erase(self, erasure: Erasure, sign: Sign) -> Erased:
        with _faults(), connect(self._url, self._schema, timeout_s=0) as connection:
            for last in (*[False] * MAX_ERASURES, True):
                try:
                    with connection.transaction(), connection.cursor() as cursor:
                        # else sums that are being written would keep what is erased from the records behind them
                        cursor.execute("SELECT pg_advisory_xact_lock(%s)", (PRUNING,))
                        # shorter than the time after which the server looks for deadlocks: calls never have to give way
                        cursor.execute("SET LOCAL lock_timeout = '300ms'")
                        return erase(cursor, "%s", "strpos({}, %s) > 0", erasure, sign, lock=" FOR UPDATE")
                except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
                    if last:
                        raise
        raise AssertionError("unreachable")

    def _query(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """One statement beside the commands; what it returns. Made again on a new connection where the old one was lost."""
        with _faults():
            try:
                return self._query_once(query, values)
            except psycopg.Error as error:
                if not is_lost(error) and not is_passing(error):
                    raise
            return self._query_once(query, values)

    def _query_once(self, query: str, values: Sequence[Any]) -> list[Any]:
        with self._read() as connection:
            cursor = connection.execute(query.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    @contextlib.contextmanager
    def _read(self) -> Iterator[psycopg.Connection[Any]]:
        """The connection for everything but commands."""
        with self._reading:
            if self._closed:
                raise StoreError("The store is closed. Open a new Bursar.", fault="closed")
            try:
                if self._reader is None:
                    self._reader = self._connect()
                yield self._reader
            except BaseException as error:
                if self._reader is not None and not _still_good(error):
                    self._reader.close()
                    self._reader = None
                raise

    def close(self) -> None:
        self._commits.close()
        self._drop()

    def _drop(self) -> None:
        with self._using, self._reading:
            self._closed = True
            for connection in (self._connection, self._reader):
                if connection is not None:
                    connection.close()
            self._connection = self._reader = None

    # A connection must not cross a fork: both sides would speak on one socket.

    def before_fork(self) -> None:
        self._using.acquire()  # first, as by a command that has to look something up
        self._reading.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            _inherited.extend(one for one in (self._connection, self._reader) if one is not None)
            self._connection = self._reader = None
            self._commits = GroupCommit(self._apply)  # the parent's callers and its worker do not exist here
        self._reading.release()
        self._using.release()


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """What the driver raises inside, as the StoreError that says what to do."""
    try:
        yield
    except psycopg.Error as error:
        raise fault_of(error) from error


def _plain(entry: Entry) -> Entry:
    """The entry without what an erasure may have changed in it since it was written: its tags, and the names of accounts."""
    amounts = {str(number): amount for number, amount in enumerate(sorted(entry.amounts.values()))}
    return entry._replace(amounts=amounts, draft={}, facts={})


def _still_good(error: BaseException) -> bool:
    """Whether the connection is in a known state: the server has refused one statement, and goes on."""
    if isinstance(error, psycopg.Error):
        return not is_lost(error)
    return isinstance(error, StoreError)


_inherited: list[psycopg.Connection[Any]] = []  # a parent's, kept for ever: closing one here would end it there
