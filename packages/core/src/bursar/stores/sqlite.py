"""The SQLite store: the law run over the rows it read, inside SQLite's write lock, one transaction per batch."""

from __future__ import annotations

import contextlib
import logging
import sqlite3
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from bursar.clock import Clock, StoreClock, SystemClock
from bursar.commands import (
    Answer,
    Command,
    Reserve,
    Row,
)
from bursar.errors import BursarError, StoreError
from bursar.files import open_to_all
from bursar.law import decide
from bursar.stores import forks
from bursar.stores import sqlite_rows as rows
from bursar.stores.base import expire_all
from bursar.stores.group_commit import GroupCommit
from bursar.stores.sqlite_tables import SqliteTables

log = logging.getLogger("bursar")

SWEEP_BATCH = 500
# The log is folded into the file, with three fsyncs, by whoever may wait, after so many transactions: it is 19 MiB then, for
# each writes some 3 pages. SQLite's own 4 MiB take a fifth of a pair's time on a slow disk.
FOLD_COMMITS = 1_500


class SqliteStore(SqliteTables):
    """Budgets in one SQLite file, shared by the threads and processes of a host.

    `durability`: `full` (default) has an fsync per commit, shared by the callers that wait at the same time, so an
    acknowledged settlement survives a power cut; `process` has none, so it survives the end of every process
    (kill -9 included), but not of the machine. Raises StoreError (locked, full, readonly, damaged, newer, unreachable).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        durability: str = "full",
        clock: Clock | None = None,
        busy_timeout_s: float = 15.0,
    ) -> None:
        super().__init__(path, durability, busy_timeout_s)
        self._using = threading.RLock()  # held while the connection is in use
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
