"""Queries of the PostgreSQL store beside its commands: reports, definitions, the outbox of alerts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bursar.stores import sqlite_rows as rows

ALL_ACCOUNTS, HISTORY, RESERVATIONS, VERSION = rows.ALL_ACCOUNTS, rows.HISTORY, rows.RESERVATIONS, rows.VERSION
array = list  # a list of texts, as a statement takes it
DURABILITY = "SELECT current_setting('fsync'), current_setting('synchronous_commit')"
DUE_RESERVATIONS = "SELECT id FROM reservations WHERE expires_us <= %s ORDER BY expires_us, id LIMIT %s"
PUBLISH = "INSERT INTO definitions(version, kind, name, definition, published_us) VALUES (%s, %s, %s, %s, %s)"
NEWER_DEFINITIONS = rows.NEWER_DEFINITIONS.replace("?", "%s")
STANDING_DEFINITIONS = rows.STANDING_DEFINITIONS.replace("=?", "=%s").replace(
    "IN (SELECT value FROM json_each(?))", "= ANY (%s)"
)
CLAIM = (
    "UPDATE alerts SET due_us = %s, claims = claims + 1 WHERE id IN (SELECT id FROM alerts WHERE delivered_us = 0 "
    "AND due_us <= %s ORDER BY due_us, id LIMIT %s FOR UPDATE SKIP LOCKED) RETURNING id, kind, at_us, facts, claims - 1"
)
DELIVERED = "UPDATE alerts SET delivered_us = %s WHERE id = ANY (%s)"
RETRY = "UPDATE alerts SET due_us = %s WHERE id = ANY (%s)"
ALERTS = 'SELECT id, kind, at_us, facts, delivered_us FROM alerts ORDER BY at_us, id COLLATE "C"'
SOME_ENTRIES = f"SELECT {rows.ENTRY} FROM records WHERE id = ANY (%s)"
SOME_ACCOUNTS = rows.ALL_ACCOUNTS.replace("ORDER BY", "WHERE key = ANY (%s) ORDER BY")


def entries_after(last: str, tags: Mapping[str, str]) -> tuple[str, list[Any]]:
    """The query of one page of entries with these tags, by id, as text and values."""
    wanted, values = "", [last]
    for name, value in tags.items():
        if name in rows.TAGS:
            wanted += f' AND "{name}" = %s'
        else:
            wanted += " AND draft::json -> 'tags' ->> %s = %s"
            values.append(name)
        values.append(value)
    return f"SELECT {rows.ENTRY} FROM records WHERE id > %s{wanted} ORDER BY id LIMIT {rows.PAGE}", values
