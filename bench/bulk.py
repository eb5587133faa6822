"""Records and accounts by the million, written past the law: copies of a real row, on SQLite and PostgreSQL, by columns' names."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pair import LINES, Lines, commands

from bursar.stores import open_store

MONTH_US = 28 * 86_400_000_000  # over which the records' ids are spread
CHUNK = 250_000  # rows of a transaction
RUN = "r-17"  # whose account is copied
MAX_ACCOUNTS = 10_000_000

_RECORDS = "INSERT INTO {schema}records (id, {columns}) SELECT {id}, {columns} FROM {schema}records, {numbers} WHERE id = '{model}'"
_ACCOUNTS = (
    "INSERT INTO {schema}accounts (key, scope, {columns}) "
    "SELECT replace(key, '{run}', 'n-' || i), replace(scope, '{run}', 'n-' || i), {columns} FROM {schema}accounts, {numbers} "
    "WHERE key = '{model}'"
)
_COUNT = "UPDATE {schema}account_counts SET accounts = {count} WHERE budget = 'per run'"
_DIALECTS = {
    "sqlite": {
        "schema": "",
        "id": "printf('%014x-%016x', {since} + i * {step}, i)",
        "numbers": "(WITH RECURSIVE n(i) AS (VALUES ({first}) UNION ALL SELECT i + 1 FROM n WHERE i < {last}) SELECT i FROM n)",
    },
    "postgresql": {
        "schema": "bursar.",
        "id": "lpad(to_hex({since} + i * {step}), 14, '0') || '-' || lpad(to_hex(i), 16, '0')",
        "numbers": "generate_series({first}::bigint, {last}) AS n(i)",
    },
}


def of_run(name: str) -> Lines:
    """The pair's accounts, with that of another run."""
    (rule, amount), *others = LINES
    return ((rule._replace(key=rule.key.replace(RUN, name), scope=rule.scope.replace(RUN, name)), amount), *others)


def first(url: str) -> str:
    """Make the store, its accounts, and the record that is copied; that record's id."""
    store = open_store(url)
    reserve, settle = commands()
    store.execute(reserve)
    store.execute(settle)
    store.close()
    return reserve.id


class Bulk:
    """A store that is filled step by step, while nobody else uses it. `model`: the id of the record that is copied."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._model = first(url)
        self._since_us = time.time_ns() // 1_000 - MONTH_US
        self._texts = _DIALECTS["sqlite" if url.startswith("sqlite") else "postgresql"]

    def records(self, have: int, want: int) -> None:
        """So many records, of which so many are there. Their ids rise from a month ago until now."""
        id = self._texts["id"].format(since=self._since_us, step=max(1, MONTH_US // 10_000_000))
        self._fill("records", _RECORDS, have, want, {"id": id, "model": self._model}, {"id"})

    def accounts(self, have: int, want: int) -> None:
        """So many accounts of the budget for runs, that of n-1 being the first; so many are there."""
        given = {"run": RUN, "model": LINES[0][0].key}
        self._fill("accounts", _ACCOUNTS, have, want, given, {"key", "scope"})
        self._execute([_COUNT.format(count=want, **self._texts)])

    def _fill(self, name: str, text: str, have: int, want: int, given: dict[str, str], but: set[str]) -> None:
        columns = ", ".join(f'"{column}"' for column in self._columns(name) if column not in but)
        chunks = []
        for begin in range(have, want, CHUNK):
            numbers = self._texts["numbers"].format(first=begin + 1, last=min(begin + CHUNK, want))
            said = {**self._texts, **given, "columns": columns, "numbers": numbers}
            chunks.append(text.format(**said))
        self._execute(chunks)

    def _columns(self, name: str) -> list[str]:
        question = f"SELECT * FROM {self._texts['schema']}{name} WHERE false"
        return self._with(lambda connection: [column[0] for column in connection.execute(question).description])

    def _execute(self, statements: list[str]) -> None:
        def run(connection: Any) -> None:
            for statement in statements:
                connection.execute(statement)

        self._with(run)

    def _with(self, work: Callable[[Any], Any]) -> Any:
        if self.url.startswith("sqlite"):
            file = sqlite3.connect(self._path, isolation_level=None)
            file.execute("PRAGMA synchronous=OFF")
            try:
                found = work(file)
                file.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                return found
            finally:
                file.close()
        import psycopg

        with psycopg.connect(self.url, autocommit=True) as connection:
            connection.execute("SET synchronous_commit = off")
            found = work(connection)
            connection.execute("CHECKPOINT")
            return found

    @property
    def _path(self) -> Path:
        return Path(self.url.removeprefix("sqlite:///").partition("?")[0])

    def size_bytes(self) -> int:
        """What the store takes on the disk, indices included."""
        if self.url.startswith("sqlite"):
            return self._path.stat().st_size
        question = (
            "SELECT sum(pg_total_relation_size(oid))::bigint FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = 'bursar'::regnamespace"
        )
        (size,) = self._with(lambda connection: connection.execute(question).fetchone())
        return int(size)
