"""Reading a store of tables beside its commands: definitions, alerts, reports; the same for SQLite and PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from pydantic_core import from_json

from bursar.accounts import Account
from bursar.commands import Alert, Definition, Definitions, Entry, Reservation
from bursar.stores import sqlite_rows as rows


class TableReading(ABC):
    """What a store with the tables of `bursar.schema` reads. `_queries`: the statements, in its own words."""

    _queries: ModuleType

    @abstractmethod
    def _query(self, query: str, values: Sequence[Any] = ()) -> list[Any]:
        """What one statement returns, beside the commands. Raises StoreError."""

    def definitions(self, since: int = 0) -> tuple[int, Definitions]:
        version = self.version()  # first: what is published between the two belongs to what is found
        found = definitions_of(self._query(self._queries.NEWER_DEFINITIONS, (since,)))
        return max((one.version for held in found.values() for one in held.values()), default=version), found

    def history(self) -> Iterator[tuple[int, str, str, dict[str, Any]]]:
        return (
            (version, kind, name, from_json(text)) for version, kind, name, text in self._query(self._queries.HISTORY)
        )

    def version(self) -> int:
        return int(self._query(self._queries.VERSION)[0][0] or 0)

    def alerts(self) -> Iterator[tuple[Alert, bool]]:
        return ((rows.alert(row), bool(row[4])) for row in self._query(self._queries.ALERTS))

    def reservations(self) -> Iterator[Reservation]:
        return (rows.reservation(row) for row in self._query(self._queries.RESERVATIONS))

    def open_reservations(self) -> int:
        return int(self._query("SELECT count(*) FROM reservations")[0][0])

    def accounts(self, keys: Iterable[str] | None = None) -> Iterator[Account]:
        if keys is None:
            found = self._query(self._queries.ALL_ACCOUNTS)
        else:
            found = self._query(self._queries.SOME_ACCOUNTS, (self._queries.array(list(keys)),))
        return (rows.account(row) for row in found)

    def entries(self, tags: Mapping[str, str] | None = None) -> Iterator[Entry]:
        last = ""
        while True:
            page = [rows.entry(row) for row in self._query(*self._queries.entries_after(last, tags or {}))]
            yield from page
            if len(page) < rows.PAGE:
                return
            last = page[-1].id


def definitions_of(found: Iterable[tuple[int, str, str, str]]) -> Definitions:
    """The definitions in these rows."""
    held: Definitions = {}
    for version, kind, name, text in found:
        held.setdefault(kind, {})[name] = Definition(version, from_json(text))
    return held
