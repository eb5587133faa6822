"""Rows of the SQLite store: the hot path's plain statements on the schema of `bursar.schema`, and what they carry."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from bursar.accounts import Account, Rule
from bursar.commands import Charge, Command, Entry, Reservation, Reserve, Row
from bursar.law import POLICY_KEY

PAGE = 1_000  # entries read at a time
MAX_RULES = 10_000  # rules of accounts seen, kept so that reading one again is cheap

_ACCOUNT = (
    'key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, '
    "spent, reserved, overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets"
)
ALL_ACCOUNTS = f"SELECT {_ACCOUNT} FROM accounts ORDER BY key"
SOME_ACCOUNTS = f"SELECT {_ACCOUNT} FROM accounts WHERE key IN (SELECT value FROM json_each(?))"
NEWEST_BUDGETS = (
    "SELECT name, definition FROM budgets WHERE version IN (SELECT max(version) FROM budgets GROUP BY name)"
)
_ENTRY = (
    "id, kind, corrects, outcome, estimated, reason, cost_nanos, usage, amounts, "
    "reserved_us, settled_us, digest, draft, facts"
)
_TAGS = (
    "org",
    "team",
    "project",
    "user",
    "customer",
    "workflow",
    "agent",
    "run",
    "tool",
    "connection",
    "provider",
    "model",
)
_TAG_COLUMNS = ", ".join(f'"{tag}"' for tag in _TAGS)

_PUT_ACCOUNT = f"INSERT OR REPLACE INTO accounts({_ACCOUNT}) VALUES ({', '.join('?' * 20)})"
_MOVE_ACCOUNT = (
    "UPDATE accounts SET spent=?, reserved=?, overrun=?, refused=?, refused_minute=?, refused_in_minute=?, "
    "level=?, remainder=?, at_us=?, buckets=? WHERE key=?"
)
_NEW_RESERVATION = "INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?)"
_EXTEND_RESERVATION = "UPDATE reservations SET expires_us=? WHERE id=?"
_GET_RESERVATION = "SELECT id, held, reserved_us, expires_us, on_expiry, digest, draft FROM reservations WHERE id=?"
_END_RESERVATION = "DELETE FROM reservations WHERE id=?"
_PUT_ENTRY = f"INSERT INTO records({_ENTRY}, {_TAG_COLUMNS}, model_answered) VALUES ({', '.join('?' * 27)})"
_GET_ENTRY = f"SELECT {_ENTRY} FROM records WHERE id=?"
_PUT_COUNT = "INSERT OR REPLACE INTO account_counts VALUES (?, ?)"
_GET_COUNT = "SELECT accounts FROM account_counts WHERE budget=?"
_GET_POLICY = "SELECT max(version) FROM budgets"
# Ids rise with time unless callers give their own, so the newest of many records are found without reading them all.
LAST_TIME = (
    "SELECT max(at_us) FROM (SELECT max(reserved_us) AS at_us FROM reservations "
    "UNION ALL SELECT max(settled_us) FROM (SELECT settled_us FROM records ORDER BY id DESC LIMIT 100))"
)

dumps = json.JSONEncoder(separators=(",", ":"), sort_keys=False, ensure_ascii=False).encode
_loads = json.loads


@cache
def _accounts_of(count: int) -> str:
    return f"SELECT {_ACCOUNT} FROM accounts WHERE key IN ({', '.join('?' * count)})"


def account(row: tuple[Any, ...], rules: dict[str, Rule] | None = None) -> Account:
    """The account in a row of `accounts`."""
    rule = None if rules is None else rules.get(row[0])
    if rule is None or rule[5] != row[5] or rule[9] != row[9]:
        rule = Rule._make((*row[:9], bool(row[9])))
        if rules is not None:
            if len(rules) >= MAX_RULES:
                rules.clear()
            rules[rule.key] = rule
    buckets = tuple((index, amount) for index, amount in _loads(row[19])) if row[19] else ()
    return Account._make((rule, *row[10:19], buckets))


def entry(row: tuple[Any, ...]) -> Entry:
    id, kind, corrects, outcome, estimated, reason, cost, usage, amounts, reserved, settled, digest, draft, facts = row
    return Entry(
        id,
        kind,
        corrects,
        outcome,
        bool(estimated),
        reason,
        cost,
        _loads(usage),
        _loads(amounts),
        reserved,
        settled,
        digest,
        _loads(draft),
        _loads(facts),
    )


class Batch:
    """The rows that one transaction reads, each once, and the rows that it will write, each once.

    `trusting`: an id without a digest was made to be unique, so it is not looked up. Where that proves wrong at the insert
    the transaction fails with a constraint, and has to be made again without trust.
    """

    def __init__(self, connection: sqlite3.Connection, rules: dict[str, Rule], *, trusting: bool) -> None:
        self._trusting = trusting
        self._execute = connection.execute
        self._many = connection.executemany
        self._rules = rules
        self._rows: dict[str, Row | None] = {}
        self._stored: dict[str, Rule] = {}  # rules as the table has them
        self._puts: dict[str, Row] = {}
        self._found: set[str] = set()  # reservations that the table has

    def expect(self, command: Command) -> None:
        """Read the accounts that the command will touch in one statement."""
        if type(command) is Reserve or type(command) is Charge:
            self._read_accounts([rule.key for rule, _ in command.lines])
            if self._trusting and not command.digest:
                self._rows.setdefault(command.id, None)
        else:
            row = self.read(command.id)
            if type(row) is Reservation:
                self._read_accounts([key for key, _, _ in row.held])

    def _read_accounts(self, keys: list[str]) -> None:
        known = self._rows
        wanted = [key for key in keys if key not in known]
        for at in range(0, len(wanted), 100):
            some = wanted[at : at + 100]
            for row in self._execute(_accounts_of(len(some)), some):
                held = account(row, self._rules)
                known[row[0]] = held
                self._stored[row[0]] = held.rule
        for key in wanted:
            known.setdefault(key, None)

    def read(self, key: str) -> Row | None:
        """The row under a key, as this transaction has left it so far."""
        if key in self._rows:
            return self._rows[key]
        row: Row | None
        if key == POLICY_KEY:
            row = self._execute(_GET_POLICY).fetchone()[0]
        elif key[0] == "#":
            found = self._execute(_GET_COUNT, (key[1:],)).fetchone()
            row = found[0] if found else None
        elif key[0] == "[":
            self._read_accounts([key])
            return self._rows[key]
        else:
            row = self._read_id(key)
        self._rows[key] = row
        return row

    def _read_id(self, id: str) -> Row | None:
        found = self._execute(_GET_RESERVATION, (id,)).fetchone()
        if found:
            self._found.add(id)
            held = tuple((key, unit, amount) for key, unit, amount in _loads(found[1]))
            return Reservation._make((id, held, *found[2:6], _loads(found[6])))
        found = self._execute(_GET_ENTRY, (id,)).fetchone()
        return entry(found) if found else None

    def put(self, puts: dict[str, Row]) -> None:
        """Take the rows of one decision."""
        self._rows.update(puts)
        self._puts.update(puts)

    def write(self) -> None:
        """Write every row of the batch once."""
        moved, new, ended, entries = [], [], [], []
        for key, row in self._puts.items():
            if type(row) is Account:
                rule, *sums, buckets = row
                text = dumps(buckets) if buckets else ""
                if self._stored.get(key) == rule:
                    moved.append((*sums, text, key))
                else:
                    new.append((*rule, *sums, text))
            elif type(row) is Reservation:
                if key in self._found:
                    self._execute(_EXTEND_RESERVATION, (row.expires_us, key))
                else:
                    self._execute(_NEW_RESERVATION, (key, dumps(row[1]), *row[2:6], dumps(row[6])))
            elif type(row) is Entry:
                if row.kind in ("settlement", "release", "expiry"):
                    ended.append((key,))
                entries.append(_values(row))
            else:
                self._execute(_PUT_COUNT, (key[1:], row))
        if moved:
            self._many(_MOVE_ACCOUNT, moved)
        if new:
            self._many(_PUT_ACCOUNT, new)
        if ended:
            self._many(_END_RESERVATION, ended)
        if entries:
            self._many(_PUT_ENTRY, entries)


def _values(entry: Entry) -> tuple[Any, ...]:
    tag = entry.draft["tags"].get
    return (
        *entry[:7],
        dumps(entry.usage),
        dumps(entry.amounts),
        *entry[9:12],
        dumps(entry.draft),
        dumps(entry.facts),
        *map(tag, _TAGS),
        entry.facts.get("model_answered"),
    )


def entries_after(last: str, tags: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The query of one page of entries with these tags, by id, as text and values; made from the report schema."""
    from sqlalchemy import func
    from sqlalchemy.dialects.sqlite import dialect
    from sqlmodel import select

    from bursar.schema import RecordRow

    columns = [getattr(RecordRow, name.strip()) for name in _ENTRY.split(",")]
    query = select(*columns).where(RecordRow.id > last).order_by(RecordRow.id).limit(PAGE)
    for name, value in tags.items():
        column = getattr(RecordRow, name) if name in _TAGS else func.json_extract(RecordRow.draft, f'$.tags."{name}"')
        query = query.where(column == value)
    compiled = query.compile(dialect=dialect(paramstyle="qmark"))
    return compiled.string, [compiled.params[name] for name in compiled.positiontup or ()]


def upgrade(path: Path, timeout_s: float) -> None:
    """Run the migrations under the write lock; processes that open at once wait for each other, one does the work."""
    from sqlalchemy import create_engine, event
    from sqlalchemy.exc import DBAPIError

    from bursar.migrations import upgrade as migrate

    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    engine = create_engine("sqlite://", creator=lambda: connection)
    event.listen(engine, "begin", lambda bound: bound.exec_driver_sql("BEGIN IMMEDIATE"))
    try:
        with engine.begin() as bound:
            migrate(bound)
    except DBAPIError as error:
        raise error.orig or error from error  # the driver's own, which says what the fault is
    finally:
        engine.dispose()
        connection.close()
