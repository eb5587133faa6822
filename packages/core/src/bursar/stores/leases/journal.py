"""The journal: what one process has booked on its leases and the shared store does not have yet, in a SQLite file of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import NamedTuple

from pydantic_core import from_json

from bursar.accounts import Mark, Rule
from bursar.commands import Entry
from bursar.errors import StoreError
from bursar.stores.entry_text import entry_of
from bursar.stores.sqlite_rows import dumps

log = logging.getLogger("bursar")

SUFFIX = ".journal"
# How often the log is folded into the file, in pages. Rarely where that waits for the disk: what has been sent is deleted soon, so
# the file stays small. Else often: a log that stays in the processor's cache takes an eighth less of a write's time.
CHECKPOINT_PAGES = {True: 8_000, False: 500}
CACHE_KB = 1_000  # of pages in memory: what one draw sends is still there when it is deleted
_SCHEMA = """
CREATE TABLE IF NOT EXISTS leases(
    id TEXT PRIMARY KEY, rules TEXT NOT NULL, granted TEXT NOT NULL, drawn TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS entries(number INTEGER PRIMARY KEY, lease TEXT NOT NULL, entry TEXT NOT NULL);
"""
_FAULTS = {
    sqlite3.SQLITE_BUSY: "locked",
    sqlite3.SQLITE_FULL: "full",
    sqlite3.SQLITE_READONLY: "readonly",
    sqlite3.SQLITE_CORRUPT: "damaged",
    sqlite3.SQLITE_NOTADB: "damaged",
}
_WRITE = "INSERT INTO entries(number, lease, entry) VALUES (?, ?, ?)"


class Kept(NamedTuple):
    """One lease as a journal knows it: what it was granted, and what of it the shared store has, by account key.

    `entries`: those that the shared store may lack, by their numbers here.
    """

    id: str
    rules: tuple[Rule, ...]
    granted: dict[str, int]
    drawn: dict[str, int]
    entries: dict[int, Entry]


class Journal:
    """The journal of a process, which holds the file's lock as long as it lives. `full`: every write waits for the disk.

    Raises StoreError (locked: its process lives; unreachable, full, readonly: the folder cannot be written).
    """

    def __init__(self, path: Path, *, full: bool) -> None:
        self.path = path
        self._full = full
        self._using = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        with self._faults():
            # a new one gets its name when it is locked: else whoever looks for journals of the dead might be faster
            begun = path if path.exists() else path.with_name(f"{path.name}.new")
            # what was spent is nobody else's business
            self._file = os.open(begun, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                flock(self._file, LOCK_EX | LOCK_NB)
                if begun != path:
                    os.rename(begun, path)
                if not path.exists() or os.stat(path).st_ino != os.fstat(self._file).st_ino:
                    raise BlockingIOError(f"{path} was recovered a moment ago")
                with self._use() as connection:
                    connection.executescript(_SCHEMA)
                    self._last = connection.execute("SELECT max(number) FROM entries").fetchone()[0] or 0
            except BaseException:
                os.close(self._file)
                raise

    @contextlib.contextmanager
    def _use(self) -> Iterator[sqlite3.Connection]:
        with self._using, self._faults():
            yield self._connection or self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")  # nobody else writes: half of a write's time
            connection.execute("PRAGMA journal_mode=WAL")
            # not even at a checkpoint: where the machine's end may lose all, nobody shall wait for the disk
            connection.execute(f"PRAGMA synchronous={'FULL' if self._full else 'OFF'}")
            connection.execute(f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES[self._full]}")
            # the log keeps what was deleted anyway, until it is written over; some builds would write zeros for it, too
            connection.execute("PRAGMA secure_delete=OFF")
            connection.execute(f"PRAGMA cache_size=-{CACHE_KB}")
            # one cursor for every settlement: another for each takes a tenth of its time
            execute = connection.cursor().execute
            self._connection, self._execute = connection, execute
        except BaseException:  # an interrupt: it holds the file's lock, and its caller's traceback holds it
            connection.close()
            raise
        return connection

    @contextlib.contextmanager
    def _faults(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise self._fault(error) from error

    def _fault(self, error: Exception) -> StoreError:
        if isinstance(error, BlockingIOError):
            return StoreError(
                f"The journal {self.path} is in use: its process lives. End that process, then try again.",
                fault="locked",
                path=str(self.path),
            )
        return StoreError(
            f"The journal {self.path} failed: {error}. Check the folder's disk and permissions, then try again.",
            fault=_FAULTS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF, "unreachable"),
            path=str(self.path),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._use() as connection:
            try:
                connection.execute("BEGIN")
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    def begin(self, id: str, rules: Sequence[Rule], granted: Mapping[str, int]) -> None:
        """Know a lease, before it is asked for."""
        with self._use() as connection:
            connection.execute("INSERT INTO leases VALUES (?, ?, ?, '{}')", (id, dumps(rules), dumps(granted)))

    def write(self, booked: Sequence[tuple[str, str]]) -> int:
        """Keep these entries, each as its lease's id and its text, before their callers are answered.

        The number that the first of them has here; the others follow.
        """
        with self._using:
            first = self._last + 1
            self._last += len(booked)  # now: an interrupt may come right after the write, and no number is used twice
            try:  # every settlement comes here: no context managers
                connection = self._connection or self._connect()
                if len(booked) == 1:
                    self._execute(_WRITE, (first, *booked[0]))
                else:
                    with self._transaction():
                        connection.executemany(_WRITE, [(first + at, *one) for at, one in enumerate(booked)])
            except sqlite3.Error as error:
                raise self._fault(error) from error
        return first

    def sent(self, lease: str, numbers: Iterable[int], drawn: Mapping[str, int]) -> None:
        """The shared store has these entries; all in all it has this much of the lease, by account key."""
        with self._transaction() as connection:
            connection.executemany("DELETE FROM entries WHERE number BETWEEN ? AND ?", _runs(numbers))
            connection.execute("UPDATE leases SET drawn = ? WHERE id = ?", (dumps(drawn), lease))

    def ended(self, lease: str) -> None:
        """The lease is over, and the shared store has all of it."""
        with self._use() as connection:
            connection.execute("DELETE FROM leases WHERE id = ?", (lease,))

    def kept(self) -> list[Kept]:
        """Every lease that is not over, with the entries that the shared store may lack."""
        with self._use() as connection:
            checked = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            rows = connection.execute("SELECT number, lease, entry FROM entries ORDER BY number").fetchall()
            leases = connection.execute("SELECT id, rules, granted, drawn FROM leases ORDER BY id").fetchall()
        try:
            if checked != "ok":
                raise ValueError(checked)
            entries: dict[str, dict[int, Entry]] = {}
            for number, lease, text in rows:
                entries.setdefault(lease, {})[number] = _entry(text)
            return [
                Kept(id, _rules(rules), from_json(granted), from_json(drawn), entries.get(id, {}))
                for id, rules, granted, drawn in leases
            ]
        except (ValueError, TypeError) as error:
            raise StoreError(
                f"The journal {self.path} is damaged: {error}.", fault="damaged", path=str(self.path)
            ) from error

    def close(self, *, delete: bool) -> None:
        """Let go of the file; `delete`: nothing in it is needed any more."""
        with self._using, self._faults():
            if self._connection is not None:
                self._connection.close()
                self._connection = None
            if delete:
                for end in ("", "-wal", "-shm"):
                    self.path.with_name(self.path.name + end).unlink(missing_ok=True)
            if self._file >= 0:
                os.close(self._file)
                self._file = -1

    # SQLite's connection must not cross a fork; the file's lock stays with the parent, whose child closes its copy alone.

    def before_fork(self) -> None:
        self._using.acquire()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def after_fork(self, *, in_child: bool) -> None:
        if in_child and self._file >= 0:
            os.close(self._file)
        self._using.release()


def put_aside(path: Path, error: StoreError) -> None:
    """Rename a journal that cannot be read, so that it is not tried again and again."""
    kept = path.with_name(f"{path.name}.damaged")
    for end in ("-wal", ""):  # the journal last: who is interrupted finds it again
        with contextlib.suppress(FileNotFoundError):  # another process was faster
            path.with_name(path.name + end).rename(kept.with_name(kept.name + end))
    path.with_name(path.name + "-shm").unlink(missing_ok=True)
    log.error(
        "%s It is kept as %s. What the leases in it still hold is booked as estimated when they expire, in two minutes.",
        *(error, kept),
    )


def left_behind(folder: Path, *, but: Path | None = None) -> Iterator[Journal]:
    """The journals of processes that live no more, each locked while it is looked at; the caller closes it."""
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        if path == but:
            continue
        try:
            journal = Journal(path, full=True)
        except StoreError as error:
            if error.fault == "locked":  # its process lives, or somebody else recovers it
                continue
            if error.fault == "damaged":
                put_aside(path, error)
                continue
            raise
        yield journal


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """These numbers as the first and the last of every run of them."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return runs


def _entry(text: str) -> Entry:
    return (
        Entry._make(from_json(text)) if text.startswith("[") else entry_of(text)
    )  # JSON: as they were written at first


def _rules(text: str) -> tuple[Rule, ...]:
    return tuple(Rule._make((*row[:10], tuple(Mark(*mark) for mark in row[10]))) for row in from_json(text))
