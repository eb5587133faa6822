"""The tables of a PostgreSQL store: everything beside commands, on a connection of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import psycopg

from bursar.commands import Alert
from bursar.errors import StoreError
from bursar.signing import changes
from bursar.stores import sqlite_rows as rows
from bursar.stores.erasing import Erased, Erasure, Sign, erase
from bursar.stores.postgres import queries
from bursar.stores.postgres.partitions import PRUNING, prune
from bursar.stores.postgres.server import MIGRATING, connect, fault_of, is_lost, is_passing, split
from bursar.stores.pruning import Pruned
from bursar.stores.reading import TableReading, definitions_of
from bursar.stores.retiring import granted

MAX_ERASURES = 50


class PostgresTables(TableReading):
    """Definitions, the outbox, what is kept of records, and reports; safe for threads. Raises StoreError."""

    _queries = queries
    now_us: Callable[[], int]

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._schema = split(url)
        self._timeout_s = timeout_s  # of a statement, its wait for locks included
        self._reading = threading.RLock()  # held while the connection is in use
        self._reader: psycopg.Connection[Any] | None = None
        self._closed = False

    def _connect(self, *, lawful: bool = False) -> psycopg.Connection[Any]:
        return connect(self._url, self._schema, timeout_s=self._timeout_s, lawful=lawful)

    # -- definitions

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        """In one transaction, by one process at a time; a definition that is the newest already is left alone."""
        asked = (kind, list(definitions))
        if not changes(kind, definitions, definitions_of(self._query(queries.STANDING_DEFINITIONS, asked))):
            return self.version()
        now_us = self.now_us()
        with faults(), self._read() as connection, connection.transaction():
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
        with faults(), connect(self._url, self._schema, timeout_s=0) as connection:  # sums over a month take long
            return prune(connection, more, before_us, self.now_us(), facts)

    def erase(self, erasure: Erasure, sign: Sign) -> Erased:
        with faults(), connect(self._url, self._schema, timeout_s=0) as connection:
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
        with faults():
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
                if self._reader is not None and not still_good(error):
                    self._reader.close()
                    self._reader = None
                raise


@contextlib.contextmanager
def faults() -> Iterator[None]:
    """What the driver raises inside, as the StoreError that says what to do."""
    try:
        yield
    except psycopg.Error as error:
        raise fault_of(error) from error


def still_good(error: BaseException) -> bool:
    """Whether the connection is in a known state: the server has refused one statement, and goes on."""
    if isinstance(error, psycopg.Error):
        return not is_lost(error)
    return isinstance(error, StoreError)
