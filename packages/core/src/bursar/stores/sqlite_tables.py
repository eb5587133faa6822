"""The tables of a SQLite store: its file, and everything beside commands, each time on a connection of its own."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bursar.commands import Alert
from bursar.errors import InvalidInput, StoreError, shown
from bursar.migrations import HEAD, REVISIONS
from bursar.signing import changes
from bursar.stores import sqlite_rows as rows
from bursar.stores import sqlite_schema as schema
from bursar.stores.erasing import Erased, Erasure, Sign, erase
from bursar.stores.pruning import Pruned, batch, forget_alerts, prunable
from bursar.stores.reading import TableReading, definitions_of
from bursar.stores.retiring import SQLITE, granted, idle, retire

CHECKPOINT_PAGES = 6_000  # at 24 MiB of the log whoever commits has to fold it into the file
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


class SqliteTables(TableReading):
    """One file: how it is opened, definitions, the outbox, what is kept of records, and reports; safe for threads.

    Raises StoreError.
    """

    _queries = rows
    now_us: Callable[[], int]

    def __init__(self, path: str | Path, durability: str, busy_timeout_s: float) -> None:
        if durability not in _SYNCHRONOUS:
            raise InvalidInput(f'{durability!r} is no durability. Use "full" or "process".', durability=durability)
        self.path = Path(path)
        if "\0" in str(path) or self.path.name in ("", ":memory:"):
            raise InvalidInput(f"{shown(str(path))} names no file. Use the path of one, or memory:.", argument="store")
        self.durability = durability
        self._busy_timeout_s = busy_timeout_s
        self._reading = threading.RLock()  # held while such a connection is open

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
        others = True
        while others:
            with self._transaction() as cursor:
                others = forget_alerts(cursor, before_us, now_us)
        with self._faults(), self._reading, contextlib.closing(self._reader()) as connection:
            more = granted(self.definitions()[1], now_us)
            found = idle(connection.cursor(), SQLITE, more, before_us, now_us)
        for some in found:
            with self._transaction() as cursor:
                total = total.plus(Pruned(accounts=retire(cursor, SQLITE, some, before_us, facts)))
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
