"""The SQLite store: the law run over the rows it read, inside SQLite's write lock, one transaction per batch."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bursar.clock import Clock, StoreClock, SystemClock
from bursar.commands import (
    Alert,
    Answer,
    Command,
    Reserve,
    Row,
)
from bursar.errors import BursarError, InvalidInput, StoreError, shown
from bursar.files import open_to_all
from bursar.law import decide
from bursar.migrations import HEAD, REVISIONS
from bursar.signing import changes
from bursar.stores import forks
from bursar.stores import sqlite_rows as rows
from bursar.stores import sqlite_schema as schema
from bursar.stores.base import expire_all
from bursar.stores.erasing import Erased, Erasure, Sign, erase
from bursar.stores.group_commit import GroupCommit
from bursar.stores.pruning import BATCH, Pruned, batch, forget_alerts, prunable, strays
from bursar.stores.reading import TableReading, definitions_of
from bursar.stores.retiring import SQLITE, granted, idle, retire

log = logging.getLogger("bursar")

SWEEP_BATCH = 500
# The log is folded into the file, with three fsyncs, by whoever may wait, after so many transactions: it is 19 MiB then, for
# each writes some 3 pages. SQLite's own 4 MiB take a fifth of a pair's time on a slow disk. Where they write more, whoever
# commits has to do it at 24 MiB.
FOLD_COMMITS = 1_500
CHECKPOINT_PAGES = 6_000
OPENING = 4  # a store that many processes make at once is worth waiting for so many times as long as for a command
_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
# sqlite's primary result code -> (our fault, what the user does next)
_FAULTS = {
    sqlite3.SQLITE_BUSY: (
        "locked",
        "Another process holds it for too long: end that process. "
        "Dozens that share budgets are better served by PostgreSQL or Redis.",
    ),
    sqlite3.SQLITE_LOCKED: ("locked", "Another connection holds it: end it, then try again."),
    sqlite3.SQLITE_FULL: ("full", "Free disk space, then try again; nothing was lost."),
    sqlite3.SQLITE_READONLY: (
        "readonly",
        "Give this user write permission for the file and its folder, then try again.",
    ),
    sqlite3.SQLITE_CORRUPT: ("damaged", "Stop all writers, and restore the file from a backup."),
    sqlite3.SQLITE_NOTADB: ("damaged", "The file is no Bursar database: name another, or restore it from a backup."),
    sqlite3.SQLITE_CANTOPEN: ("unreachable", "Create the folder, or correct the path in the store's URL."),
    sqlite3.SQLITE_IOERR: ("unreachable", "The disk failed: check it, then try again."),
}


class SqliteStore(TableReading):
    """Budgets in one SQLite file, shared by the threads and processes of a host.

    `durability`: `full` (default) has an fsync per commit, shared by the callers that wait at the same time, so an
    acknowledged settlement survives a power cut; `process` has none, so it survives the end of every process
    (kill -9 included), but not of the machine. Raises StoreError (locked, full, readonly, damaged, newer, unreachable).
    """

    _queries = rows

    def __init__(
        self,
        path: str | Path,
        *,
        durability: str = "full",
        clock: Clock | None = None,
        busy_timeout_s: float = 15.0,
    ) -> None:
        if durability not in _SYNCHRONOUS:
            raise InvalidInput(f'{durability!r} is no durability. Use "full" or "process".', durability=durability)
        self.path = Path(path)
        if "\0" in str(path) or self.path.name in ("", ":memory:"):
            raise InvalidInput(f"{shown(str(path))} names no file. Use the path of one, or memory:.", argument="store")
        self.durability = durability
        self._busy_timeout_s = busy_timeout_s
        self._using = threading.RLock()  # held while the connection is in use
        self._reading = threading.RLock()  # held while a report's connection is open
        self._connection: sqlite3.Connection | None = None
        self._rows: rows.Rows | None = None  # what the connection knows
        self._closed = False
        with self._faults():
            connection = self._connect()
            try:
                self._migrate(connection)
                last = connection.execute(rows.LAST_TIME).fetchone()[0]
            except BaseException:
                connection.close()
                raise
        if may := open_to_all(self.path):
            log.warning(
                "%s: every user of this machine may %s it. Take that from them: chmod o-rwx on it, "
                "and keep it in a folder that only its users may write to.",
                self.path,
                may,
            )
        self._connection, self._rows = connection, rows.Rows(connection)
        self._clock = StoreClock(clock or SystemClock(), last or 0)
        self.now_us = self._clock.now_us
        self._unfolded = 0  # commits since the log was folded into the file
        self._commits = self._new_commits()
        forks.watch(self)

    def _new_commits(self) -> GroupCommit:
        return GroupCommit(self._apply, self._apply_at_once if self.durability == "process" else None)

    def _connect(self) -> sqlite3.Connection:
        if not os.path.lexists(self.path) and self.path.parent.is_dir() and os.access(self.path.parent, os.W_OK):
            with contextlib.suppress(FileExistsError):  # another process was faster
                # budgets are nobody else's business; and what is there, a link too, is not made
                os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
        elif self.path.is_symlink() and not self.path.exists():
            raise StoreError(
                f"The store {self.path} is a link to a file that does not exist. Create it, or remove the link.",
                fault="unreachable",
                path=str(self.path),
            )
        connection = sqlite3.connect(
            self.path,
            timeout=self._busy_timeout_s,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=256,
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute(f"PRAGMA synchronous={_SYNCHRONOUS[self.durability]}")
            connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}")
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self, connection: sqlite3.Connection) -> None:
        revision = schema.revision(connection)
        if revision is not None and revision not in REVISIONS:
            raise StoreError(
                f"{self.path} was written by a newer Bursar (schema {revision}). Upgrade Bursar to open it.",
                fault="newer",
                path=str(self.path),
            )
        if revision != HEAD:
            schema.upgrade(self.path, OPENING * self._busy_timeout_s)

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        """What SQLite raises inside, as the StoreError that says what to do."""
        try:
            yield
        except sqlite3.Error as error:
            raise self._fault(error) from error
        except OSError as error:
            raise StoreError(
                f"The store {self.path} cannot be opened: {error.strerror}. Check its path.",
                fault="unreachable",
                path=str(self.path),
            ) from error

    def _fault(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_CANTOPEN and self.path.parent.is_dir() and not self._may_write():
            code = sqlite3.SQLITE_READONLY
        fault, remedy = _FAULTS.get(code, ("unreachable", "Check the file and its disk, then try again."))
        return StoreError(f"The store {self.path} failed: {error}. {remedy}", fault=fault, path=str(self.path))

    def _may_write(self) -> bool:
        return os.access(self.path.parent, os.W_OK) and (not self.path.exists() or os.access(self.path, os.W_OK))

    def execute(self, command: Command) -> Answer:
        return self._commits.run(command)

    def aexecute(self, command: Command) -> Coroutine[Any, Any, Answer]:
        return self._commits.arun(command)

    def post(self, command: Command) -> None:
        self._commits.post(command)

    def _apply_at_once(self, command: Command) -> Answer | BaseException | None:
        """None, with nothing done, where that would wait: for another process's lock, or for the disk."""
        if self._connection is None or self._unfolded >= FOLD_COMMITS:
            return None
        (answer,) = self._apply((command,), True, wait_s=0.0)
        return None if isinstance(answer, StoreError) and answer.fault == "locked" else answer

    def _apply(
        self, commands: Sequence[Command], trusting: bool, wait_s: float | None = None
    ) -> list[Answer | BaseException]:
        """The answers, or what became of it instead; `wait_s`: for another process's lock, rather than as the store does."""
        if wait_s is None:
            wait_s = self._busy_timeout_s
        try:
            with self._using:
                return self._commit(commands, wait_s, trusting=trusting)
        except Exception as error:  # noqa: BLE001 - no caller may be left without an answer, nor take the blame of another
            if len(commands) > 1 and not _concerns_all(error):
                return [answer for command in commands for answer in self._apply([command], trusting, wait_s)]
            if not _is_constraint(error):
                return [self._failure(error, commands[0]) for _ in commands]
        try:
            with self._using:  # an id that was to be fresh is not
                return self._commit(commands, wait_s, trusting=False)
        except Exception as error:  # noqa: BLE001 - as above
            return [self._failure(error, commands[0])]

    def _failure(self, error: Exception, command: Command) -> Exception:
        if isinstance(error, sqlite3.Error):
            failure = self._fault(error)
        elif isinstance(error, OverflowError):
            failure = StoreError(
                f"The store {self.path} cannot hold the amounts of {command.id!r}: a sum would pass 2^63. "
                "Correct the amount, or give the budget a window.",
                fault="overflow",
                path=str(self.path),
            )
        elif isinstance(error, (ValueError, AssertionError)):
            failure = StoreError(
                f"The rows of {self.path} contradict each other: {error}. Stop all writers, and restore the file from a backup.",
                fault="damaged",
                path=str(self.path),
            )
        else:
            return error
        failure.__cause__ = error
        return failure

    def _commit(self, commands: Sequence[Command], wait_s: float, *, trusting: bool) -> list[Answer | BaseException]:
        """One transaction: read the touched rows once, apply the law in memory, write each row once, commit.

        `trusting`: the id of a reserve without a digest was made to be unique, so it is not looked up. Where that proves wrong
        at the insert the transaction fails with a constraint, and has to be made again without trust.
        """
        connection, known = self._connection, self._rows
        if connection is None or known is None:
            connection, known = self._open_anew()
        if self._unfolded >= FOLD_COMMITS:
            self._unfolded = 0
            with contextlib.suppress(sqlite3.Error):  # as SQLite does: the log holds all, and the next fold may go well
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
        try:
            known.begin(wait_s)
            now_us = self._clock.now_us()  # with the lock held: no other process can be ahead of this
            answers: list[Answer | BaseException] = []
            written: dict[str, Row] = {}
            for command in commands:
                if trusting and type(command) is Reserve and not command.digest:
                    known.setdefault(command.id, None)
                answer, puts = decide(known.__getitem__, command, now_us)
                known.update(puts)
                written.update(puts)
                answers.append(answer)
            known.commit(written, wait_s)
        except BaseException:
            known.forget()
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise
        self._unfolded += 1
        return answers

    def _open_anew(self) -> tuple[sqlite3.Connection, rows.Rows]:
        """The connection to write with, after a fork."""
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")
        self._connection = self._connect()
        self._rows = rows.Rows(self._connection)
        return self._connection, self._rows

    def sweep(self) -> int:
        due = self._query("SELECT id FROM reservations WHERE expires_us <= ? LIMIT ?", (self.now_us(), SWEEP_BATCH))
        return expire_all(self, (id for (id,) in due))

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """In one transaction; a definition that is the newest already is left alone."""
        asked = (kind, rows.array(list(definitions)))
        if not changes(kind, definitions, definitions_of(self._query(rows.STANDING_DEFINITIONS, asked))):
            return self.version()
        with self._transaction() as cursor:
            held = definitions_of(cursor.execute(rows.STANDING_DEFINITIONS, asked).fetchall())
            now_us = self.now_us()
            new = [(kind, name, rows.dumps(one), now_us) for name, one in changes(kind, definitions, held).items()]
            cursor.executemany(rows.PUBLISH, new)
            return int(cursor.execute(rows.VERSION).fetchone()[0] or 0)

    def claim(self, limit: int, lease_us: int) -> list[tuple[Alert, int]]:
        now_us = self.now_us()
        if not self._query(rows.DUE, (now_us,)):  # looking takes no lock
            return []
        found = self._write(rows.CLAIM, [(now_us + lease_us, now_us, limit)])
        return sorted(((rows.alert(row), row[4]) for row in found), key=lambda one: (one[0].at_us, one[0].id))

    def delivered(self, ids: Iterable[str]) -> None:
        now_us = self.now_us()
        self._write(rows.DELIVERED, [(now_us, id) for id in ids])

    def retry(self, ids: Iterable[str], at_us: int) -> None:
        self._write(rows.RETRY, [(at_us, id) for id in ids])

    def prune(self, before_us: int, facts: Mapping[str, Any]) -> Pruned:
        now_us = self.now_us()
        condition, total = prunable(before_us, now_us), Pruned()
        pruned: Pruned | None = total
        while pruned is not None:
            total = total.plus(pruned)
            with self._transaction() as cursor:
                pruned = batch(cursor, "?", "records", condition, before_us, facts)
        ids = [id for (id,) in self._query(strays(before_us, condition))]  # looking takes no lock
        for start in range(0, len(ids), BATCH):
            with self._transaction() as cursor:
                some = batch(cursor, "?", "records", condition, before_us, facts, ids[start : start + BATCH])
            total = total.plus(some or Pruned())
        others = True
        while others:
            with self._transaction() as cursor:
                others = forget_alerts(cursor, before_us, now_us)
        with self._faults(), self._reading, contextlib.closing(self._reader()) as connection:
            more = granted(self.definitions()[1], now_us)
            found = idle(connection.cursor(), SQLITE, more, before_us, now_us)
        for idle_ones in found:
            with self._transaction() as cursor:
                total = total.plus(Pruned(accounts=retire(cursor, SQLITE, idle_ones, before_us, facts)))
        return total

    def erase(self, erasure: Erasure, sign: Sign) -> Erased:
        with self._transaction("PRAGMA secure_delete=ON") as cursor:
            return erase(cursor, "?", "instr({}, ?) > 0", erasure, sign)

    def _write(self, sql: str, values: Sequence[Sequence[Any]]) -> list[Any]:
        """One transaction; what the statement returns."""
        with self._transaction() as cursor:
            return [row for each in values for row in cursor.execute(sql, each).fetchall()]

    @contextlib.contextmanager
    def _transaction(self, *before: str) -> Iterator[sqlite3.Cursor]:
        """On a connection of its own, after these statements."""
        with self._faults(), self._reading, contextlib.closing(self._connect()) as connection:
            for statement in (*before, "BEGIN IMMEDIATE"):
                connection.execute(statement)
            yield connection.cursor()
            connection.execute("COMMIT")

    def _query(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """Read on a connection of its own, so that reports never stand in the way of commands."""
        with self._faults(), self._reading, contextlib.closing(self._reader()) as connection:
            return connection.execute(query, values).fetchall()

    def _reader(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=self._busy_timeout_s)

    def close(self) -> None:
        self._commits.close()
        with self._using:
            self._closed = True
            if self._connection is not None:
                self._connection.close()
                self._connection = self._rows = None

    # A connection must not cross a fork: SQLite's bookkeeping of locks is per process, and a child that inherits it
    # holds none of them, so that the parent's last close would take the write-ahead log away from under the child.

    def before_fork(self) -> None:
        self._reading.acquire()
        self._using.acquire()
        if self._connection is not None:
            self._connection.close()
            self._connection = self._rows = None  # each side opens its own when it needs one

    def after_fork(self, *, in_child: bool) -> None:
        self._using.release()
        self._reading.release()
        if in_child:
            self._commits = self._new_commits()  # the parent's callers and its worker do not exist here


def _is_constraint(error: Exception) -> bool:
    return isinstance(error, sqlite3.IntegrityError)


def _concerns_all(error: Exception) -> bool:
    """Whether a batch failed for the state of the store, rather than for what one of its commands is."""
    return isinstance(error, BursarError) or (isinstance(error, sqlite3.Error) and not _is_constraint(error))
