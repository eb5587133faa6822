"""Rows of the SQLite store: the hot path's plain statements on the schema of `bursar.schema`, and what they carry."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json, to_json  # a quarter of the time of json, which was a fifth of a shared commit

from bursar.accounts import Account, Mark, Rule
from bursar.commands import Alert, Entry, Reservation, Row
from bursar.law import OPERATOR_KEY, POLICY_KEY

PAGE = 1_000  # entries read at a time
MAX_ROWS = 50_000  # rows that a connection remembers
# How long SQLite's own busy handler waits for another connection's lock, time after time; the last again and again.
_DELAYS_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.025, 0.025, 0.05, 0.05, 0.1)

_ACCOUNT = (
    'key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, '
    "spent, reserved, overrun, refused, refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks"
)
ALL_ACCOUNTS = f"SELECT {_ACCOUNT} FROM accounts ORDER BY key"
SOME_ACCOUNTS = f"SELECT {_ACCOUNT} FROM accounts WHERE key IN (SELECT value FROM json_each(?))"
_DEFINITIONS = "SELECT version, kind, name, definition FROM definitions"
NEWER_DEFINITIONS = (
    f"{_DEFINITIONS} WHERE version IN (SELECT max(version) FROM definitions WHERE version>? GROUP BY kind, name)"
)
# What a publisher has to know: how the same things stand, and who the operator is.
STANDING_DEFINITIONS = (
    f"{_DEFINITIONS} WHERE version IN (SELECT max(version) FROM definitions WHERE name='operator' AND kind='operator' "
    "OR kind=? AND name IN (SELECT value FROM json_each(?)) GROUP BY kind, name)"
)
HISTORY = "SELECT version, kind, name, definition FROM definitions ORDER BY version"
PUBLISH = "INSERT INTO definitions(kind, name, definition, published_us) VALUES (?, ?, ?, ?)"
VERSION = "SELECT max(version) FROM definitions"
ALERTS = "SELECT id, kind, at_us, facts, delivered_us FROM alerts ORDER BY at_us, id"
CLAIM = (
    "UPDATE alerts SET due_us=?, claims=claims+1 WHERE id IN (SELECT id FROM alerts WHERE delivered_us=0 AND due_us<=? "
    "ORDER BY due_us, id LIMIT ?) RETURNING id, kind, at_us, facts, claims-1"
)
DUE = "SELECT 1 FROM alerts WHERE delivered_us=0 AND due_us<=? LIMIT 1"
DELIVERED = "UPDATE alerts SET delivered_us=? WHERE id=?"
RETRY = "UPDATE alerts SET due_us=? WHERE id=?"
ENTRY = (
    "id, kind, corrects, outcome, estimated, reason, cost_nanos, usage, amounts, "
    "reserved_us, settled_us, digest, draft, facts"
)
# The tags that have a column of their own in `records`; all tags, free ones too, stand in the JSON of its column `draft`.
TAGS = (
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
_TAG_COLUMNS = ", ".join(f'"{tag}"' for tag in TAGS)

_PUT_ACCOUNT = f"INSERT OR REPLACE INTO accounts({_ACCOUNT}) VALUES ({', '.join('?' * 22)})"
_MOVE_ACCOUNT = (
    "UPDATE accounts SET spent=?, reserved=?, overrun=?, refused=?, refused_minute=?, refused_in_minute=?, "
    "level=?, remainder=?, at_us=?, buckets=?, crossed=? WHERE key=?"
)
_NEW_RESERVATION = "INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?)"
_MOVE_RESERVATION = "UPDATE reservations SET held=?, expires_us=?, draft=? WHERE id=?"
_GET_ACCOUNT = f"SELECT {_ACCOUNT} FROM accounts WHERE key=?"
RESERVATIONS = "SELECT id, held, reserved_us, expires_us, on_expiry, digest, draft FROM reservations ORDER BY id"
_GET_RESERVATION = "SELECT id, held, reserved_us, expires_us, on_expiry, digest, draft FROM reservations WHERE id=?"
_ENDS = frozenset({"settlement", "release", "expiry"})  # the kinds of entries that take a reservation's place
_END_RESERVATION = "DELETE FROM reservations WHERE id=?"
RECORD = f"{ENTRY}, {_TAG_COLUMNS}, model_answered"
_PUT_ENTRY = f"INSERT INTO records({RECORD}) VALUES ({', '.join('?' * 27)})"
_GET_ENTRY = f"SELECT {ENTRY} FROM records WHERE id=?"
_PUT_COUNT = "INSERT OR REPLACE INTO account_counts VALUES (?, ?)"
_GET_COUNT = "SELECT accounts FROM account_counts WHERE budget=?"
_GET_OPERATOR = (
    "SELECT json_extract(definition, '$.public') FROM definitions WHERE kind='operator' AND name='operator' "
    "ORDER BY version DESC LIMIT 1"
)
_GET_ALERT = "SELECT id, kind, at_us, facts FROM alerts WHERE id=?"
# Whoever has told of it before: a settlement must not fail for an alert.
_PUT_ALERT = "INSERT INTO alerts VALUES (?, ?, ?, ?, 0, 0, 0) ON CONFLICT(id) DO NOTHING"
# Ids rise with time unless callers give their own, so the newest of many records are found without reading them all.
LAST_TIME = (
    "SELECT max(at_us) FROM (SELECT max(reserved_us) AS at_us FROM reservations "
    "UNION ALL SELECT max(settled_us) FROM (SELECT settled_us FROM records ORDER BY id DESC LIMIT 100) AS newest) AS times"
)


def dumps(value: object) -> str:
    """Compact JSON, keys in the order in which they stand."""
    return to_json(value).decode()


array = dumps  # a list of texts, as a statement takes it


def account(row: tuple[Any, ...]) -> Account:
    """The account in a row of `accounts`."""
    buckets = tuple((index, amount) for index, amount in from_json(row[19])) if row[19] else ()
    marks = tuple(Mark(at, action) for at, action in from_json(row[21])) if row[21] else ()
    return Account._make((Rule._make((*row[:9], bool(row[9]), marks)), *row[10:19], buckets, row[20]))


def alert(row: tuple[Any, ...]) -> Alert:
    """The alert in the first columns of a row of `alerts`."""
    return Alert(row[0], row[1], row[2], from_json(row[3]))


def reservation(row: tuple[Any, ...]) -> Reservation:
    """The reservation in a row of `reservations`."""
    held = tuple((key, unit, amount) for key, unit, amount in from_json(row[1]))
    return Reservation._make((row[0], held, *row[2:6], from_json(row[6])))


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
        from_json(usage),
        from_json(amounts),
        reserved,
        settled,
        digest,
        from_json(draft),
        from_json(facts),
    )


class Rows(dict[str, Row | None]):
    """What a connection knows of the file: rows that it read or wrote, by key; one that it lacks is read when asked for.

    They stay true until another connection writes, which SQLite tells at the begin of each transaction (`PRAGMA
    data_version`), so a process alone with its file hardly ever reads. Locks are waited for here alone, as long as told.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        super().__init__()
        connection.execute("PRAGMA busy_timeout=0")
        cursor = connection.cursor()  # one for all statements: another for each takes 3 us of a pair of commands
        self._execute = cursor.execute
        self._many = cursor.executemany
        self._data_version = -1
        self._stored: dict[str, Rule] = {}  # the rules of accounts as the table has them
        self._drafts: dict[str, str] = {}  # of reservations in the table: the JSON of their drafts

    def begin(self, wait_s: float) -> None:
        """Begin a transaction, and forget what another connection may have changed; wait so long for its lock."""
        self._patiently("BEGIN IMMEDIATE", wait_s)
        (data_version,) = self._execute("PRAGMA data_version").fetchone()
        if data_version != self._data_version or len(self) > MAX_ROWS:
            self.forget()
            self._data_version = data_version

    def forget(self) -> None:
        """Know nothing: what comes next reads the file."""
        self._data_version = -1
        self.clear()
        self._stored.clear()
        self._drafts.clear()

    def __missing__(self, key: str) -> Row | None:
        row: Row | None
        if key[0] == "[":
            found = self._execute(_GET_ACCOUNT, (key,)).fetchone()
            row = account(found) if found else None
            if row is not None:
                self._stored[key] = row.rule
        elif key[0] == "#":
            found = self._execute(_GET_COUNT, (key[1:],)).fetchone()
            row = found[0] if found else None
        elif key == POLICY_KEY:
            row = self._execute(VERSION).fetchone()[0]
        elif key == OPERATOR_KEY:
            found = self._execute(_GET_OPERATOR).fetchone()
            row = found[0] if found else None
        elif key[0] == "^":
            found = self._execute(_GET_ALERT, (key[1:],)).fetchone()
            row = alert(found) if found else None
        else:
            row = self._read_id(key)
        self[key] = row
        return row

    def _read_id(self, id: str) -> Row | None:
        found = self._execute(_GET_RESERVATION, (id,)).fetchone()
        if found:
            self._drafts[id] = found[6]
            return reservation(found)
        found = self._execute(_GET_ENTRY, (id,)).fetchone()
        return entry(found) if found else None

    def _patiently(self, sql: str, wait_s: float) -> None:
        waits = 0
        while True:
            try:
                self._execute(sql)
                return
            except sqlite3.OperationalError as error:
                delay_s = min(_DELAYS_S[min(waits, len(_DELAYS_S) - 1)], wait_s)
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or delay_s <= 0:
                    raise
            waits, wait_s = waits + 1, wait_s - delay_s
            time.sleep(delay_s)

    def commit(self, puts: dict[str, Row], wait_s: float) -> None:
        """Write the rows that were put, each once, and commit. It waits for readers on disks that cannot have a log."""
        moved, new, opened, ended, entries, alerts = [], [], [], [], [], []
        stored, drafts = self._stored, self._drafts
        for key, row in puts.items():
            if type(row) is Account:
                rule, known = row.rule, stored.get(key)
                text = dumps(row.buckets) if row.buckets else ""
                if known is rule or known == rule:
                    moved.append((*row[1:10], text, row.crossed, key))
                else:
                    marks = dumps(rule.marks) if rule.marks else ""
                    new.append((*rule[:10], *row[1:10], text, row.crossed, marks))
                    stored[key] = rule
            elif type(row) is Reservation:
                moves = key in drafts
                draft = drafts[key] = dumps(row.draft)
                if moves:
                    self._execute(_MOVE_RESERVATION, (dumps(row.held), row.expires_us, draft, key))
                else:
                    opened.append((key, dumps(row.held), *row[2:6], draft))
            elif type(row) is Entry:
                del self[key]  # nobody asks for it but a repeated command
                if row.kind in _ENDS:
                    ended.append((key,))
                entries.append(values(row, drafts.pop(key, None)))
            elif type(row) is Alert:
                del self[key]
                alerts.append((*row[:3], dumps(row.facts)))
            else:
                self._execute(_PUT_COUNT, (key[1:], row))
        if moved:
            self._many(_MOVE_ACCOUNT, moved)
        if new:
            self._many(_PUT_ACCOUNT, new)
        if opened:
            self._many(_NEW_RESERVATION, opened)
        if ended:
            self._many(_END_RESERVATION, ended)
        if entries:
            self._many(_PUT_ENTRY, entries)
        if alerts:
            self._many(_PUT_ALERT, alerts)
        self._patiently("COMMIT", wait_s)


def values(entry: Entry, draft: str | None = None) -> tuple[Any, ...]:
    """The columns RECORD of an entry; `draft`: the JSON of its draft where that is known."""
    tag, facts = entry.draft["tags"].get, entry.facts
    return (
        *entry[:7],
        dumps(entry.usage),
        dumps(entry.amounts),
        *entry[9:12],
        draft or dumps(entry.draft),
        dumps(facts),
        *map(tag, TAGS),
        facts.get("model_answered"),
    )


def entries_after(last: str, tags: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The query of one page of entries with these tags, by id, as text and values; made from the report schema."""
    from sqlalchemy import func
    from sqlalchemy.dialects.sqlite import dialect
    from sqlmodel import select

    from bursar.schema import RecordRow

    columns = [getattr(RecordRow, name.strip()) for name in ENTRY.split(",")]
    query = select(*columns).where(RecordRow.id > last).order_by(RecordRow.id).limit(PAGE)
    for name, value in tags.items():
        column = getattr(RecordRow, name) if name in TAGS else func.json_extract(RecordRow.draft, f'$.tags."{name}"')
        query = query.where(column == value)
    compiled = query.compile(dialect=dialect(paramstyle="qmark"))
    return compiled.string, [compiled.params[name] for name in compiled.positiontup or ()]
