"""The SQLite store: the law run over the rows it read, inside SQLite's write lock, one transaction per batch."""

from __future__ import annotations

import json
import os
import sqlite3
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bursar.accounts import Account, Rule
from bursar.clock import Clock, StoreClock, SystemClock
from bursar.commands import Answer, Command, Ended, Entry, Expire
from bursar.errors import BursarError, InvalidInput, StoreError
from bursar.law import decide
from bursar.migrations import HEAD, REVISIONS
from bursar.stores import sqlite_rows as rows
from bursar.stores.base import BudgetVersion
from bursar.stores.group_commit import GroupCommit

SWEEP_BATCH = 500
_SYNCHRONOUS = {"full": "FULL", "process": "NORMAL"}
# sqlite's primary result code -> (our fault, what the user does next)
_FAULTS = {
    sqlite3.SQLITE_BUSY: (
        "locked",
        "Another process holds it for too long: end that process, or raise busy_timeout_s.",
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


class SqliteStore:
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
        busy_timeout_s: float = 5.0,
    ) -> None:
        if durability not in _SYNCHRONOUS:
            raise InvalidInput(f'{durability!r} is no durability. Use "full" or "process".', durability=durability)
        self.path = Path(path)
        self.durability = durability
        self._source = clock or SystemClock()
        self._busy_timeout_s = busy_timeout_s
        self._forsaken: list[sqlite3.Connection] = []
        self._open()
        _forked.add(self)

    def _open(self) -> None:
        self._rules: dict[str, Rule] = {}
        try:
            self._connection = self._connect()
            try:
                self._migrate()
                # ids rise with time, so the last record tells what time the store has seen
                last = self._connection.execute("SELECT settled_us FROM records ORDER BY id DESC LIMIT 1").fetchone()
            except BaseException:
                self._connection.close()
                raise
        except sqlite3.Error as error:
            raise self._fault(error) from error
        self._clock = StoreClock(self._source, last[0] if last else 0)
        self.now_us = self._clock.now_us
        self._commits = GroupCommit(self._apply)

    def _connect(self) -> sqlite3.Connection:
        if not self.path.exists() and self.path.parent.is_dir() and os.access(self.path.parent, os.W_OK):
            os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))  # budgets are nobody else's business
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
        except BaseException:
            connection.close()
            raise
        return connection

    def _migrate(self) -> None:
        revision = self._revision()
        if revision is not None and revision not in REVISIONS:
            raise StoreError(
                f"{self.path} was written by a newer Bursar (schema {revision}). Upgrade Bursar to open it.",
                fault="newer",
                path=str(self.path),
            )
        if revision != HEAD:
            rows.upgrade(self.path, self._busy_timeout_s)

    def _revision(self) -> str | None:
        try:
            found = self._connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_ERROR:  # that one says: no such table
                raise
            return None
        return found[0] if found else None

    def _fault(self, error: sqlite3.Error) -> StoreError:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        fault, remedy = _FAULTS.get(code, ("unreachable", "Check the file and its disk, then try again."))
        return StoreError(f"The store {self.path} failed: {error}. {remedy}", fault=fault, path=str(self.path))

    def execute(self, command: Command) -> Answer:
        return self._commits.run(command)

    async def aexecute(self, command: Command) -> Answer:
        return await self._commits.arun(command)

    def post(self, command: Command) -> None:
        self._commits.post(command)

    def _apply(self, commands: Sequence[Command]) -> list[Answer | BaseException]:
        """One transaction: read the touched rows once, apply the law in memory, write each row once, commit."""
        try:
            now_us = self._clock.now_us()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                batch = rows.Batch(self._connection, self._rules)
                answers: list[Answer | BaseException] = []
                for command in commands:
                    batch.expect(command)
                    answer, puts = decide(batch.read, command, now_us)
                    batch.put(puts)
                    answers.append(answer)
                batch.write()
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            return answers
        except sqlite3.Error as error:
            return [self._fault(error) for _ in commands]
        except BursarError as error:
            return [error for _ in commands]

    def sweep(self) -> int:
        due = self._query("SELECT id FROM reservations WHERE expires_us <= ? LIMIT ?", (self.now_us(), SWEEP_BATCH))
        return sum(type(self.execute(Expire(id))) is Ended for (id,) in due)

    def publish(self, definitions: Mapping[str, dict[str, Any]]) -> int:
        """In one transaction; a definition that is the newest already is left alone."""
        texts = {name: rows.dumps(definition) for name, definition in definitions.items()}
        version, held = self.budgets()
        if all(name in held and rows.dumps(held[name].definition) == text for name, text in texts.items()):
            return version
        connection = self._connect()
        try:
            connection.execute("BEGIN IMMEDIATE")
            newest = dict(connection.execute(rows.NEWEST_BUDGETS).fetchall())
            changed = [(name, text, self.now_us()) for name, text in texts.items() if newest.get(name) != text]
            connection.executemany("INSERT INTO budgets(name, definition, published_us) VALUES (?, ?, ?)", changed)
            version = connection.execute("SELECT max(version) FROM budgets").fetchone()[0] or 0
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._fault(error) from error
        finally:
            connection.close()
        return int(version)

    def budgets(self) -> tuple[int, dict[str, BudgetVersion]]:
        found = self._query("SELECT version, name, definition FROM budgets ORDER BY version")
        newest = {name: BudgetVersion(version, json.loads(text)) for version, name, text in found}
        return max((held.version for held in newest.values()), default=0), newest

    def open_reservations(self) -> int:
        return int(self._query("SELECT count(*) FROM reservations")[0][0])

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        if keys is None:
            return (rows.account(row) for row in self._query(rows.ALL_ACCOUNTS))
        found = self._query(rows.SOME_ACCOUNTS, (json.dumps(list(keys)),))
        return (rows.account(row) for row in found)

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        return rows.entries(self.path, tags or {})

    def _query(self, sql: str, values: tuple[Any, ...] = ()) -> list[Any]:
        """Read on a connection of its own, so that reports never stand in the way of commands."""
        try:
            connection = sqlite3.connect(self.path, timeout=self._busy_timeout_s)
            try:
                return connection.execute(sql, values).fetchall()
            finally:
                connection.close()
        except sqlite3.Error as error:
            raise self._fault(error) from error

    def close(self) -> None:
        self._commits.close()
        self._connection.close()

    def _after_fork(self) -> None:
        # SQLite forbids a connection in a child, its closing too: it is kept, unused, and a new one opened.
        self._forsaken.append(self._connection)
        self._open()


_forked: weakref.WeakSet[SqliteStore] = weakref.WeakSet()


def _reopen() -> None:
    for store in list(_forked):
        store._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reopen)
