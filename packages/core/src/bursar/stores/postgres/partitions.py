"""Partitions of the usage records on PostgreSQL: one for each month of the time with which ids begin, made before it comes.

`records` is split by ranges of its key, so that an id stays unique over all of them (I6). `records_timed` takes ids that begin
with a time, in `records_2026_11` and its like; the months that have no table yet fall into `records_ahead`. `records_other`
takes every other id: those that callers gave, and whatever was there before there were partitions.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

AHEAD = 2  # months that have their table before they begin
MAKING = 0x62757273617271  # the advisory lock of whoever makes or drops one
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EXISTING = (
    "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
    "WHERE inhparent = to_regclass('records_timed') AND relname <> 'records_ahead' ORDER BY relname"
)

log = logging.getLogger("bursar")


class Month(NamedTuple):
    """A calendar month in UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, at_us: int) -> Month:
        at = datetime.fromtimestamp(at_us // 1_000_000, UTC)
        return cls(at.year, at.month)

    def later(self, months: int) -> Month:
        years, month = divmod(self.month - 1 + months, 12)
        return Month(self.year + years, month + 1)

    @property
    def start_us(self) -> int:
        return int((datetime(self.year, self.month, 1, tzinfo=UTC) - _EPOCH).total_seconds()) * 1_000_000

    @property
    def first_id(self) -> str:
        """What no id of the month comes before, and every id of earlier months does."""
        return f"{self.start_us:014x}"

    @property
    def table(self) -> str:
        return f"records_{self.year:04}_{self.month:02}"


def existing(connection: psycopg.Connection[Any]) -> list[Month]:
    """The months that have a table, oldest first."""
    return [Month(int(name[8:12]), int(name[13:15])) for (name,) in connection.execute(_EXISTING).fetchall()]


def make_ahead(connection: psycopg.Connection[Any], now_us: int) -> list[Month]:
    """Make the tables that are missing for this month and the next ones; those that were made.

    Nothing waits for this: where somebody reads all the time, or this user may not make tables, it is left for the next time,
    because records of months without a table are safe in `records_ahead` meanwhile.
    """
    known = existing(connection)
    this = Month.of(now_us)
    missing = [month for ahead in range(AHEAD + 1) if (month := this.later(ahead)) not in known and month > known[0]]
    made: list[Month] = []
    for month in missing:
        try:
            with connection.transaction():
                _make(connection, month)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.InsufficientPrivilege) as error:
            log.info("no table for the records of %s yet: %s", month.table, error.diag.message_primary)
            return made
        except psycopg.errors.DuplicateTable:
            continue  # another process was faster
        made.append(month)
    return made


def _make(connection: psycopg.Connection[Any], month: Month) -> None:
    """Locks nothing that is in use but `records_ahead`, which reading takes along: for the moment, as it is empty."""
    bounds = {"low": sql.Literal(month.first_id), "high": sql.Literal(month.later(1).first_id)}
    names = {"table": sql.Identifier(month.table), "key": sql.Identifier(f"{month.table}_pkey")}
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (MAKING,))
    for text in (
        "SET LOCAL lock_timeout = '300ms'",
        "CREATE TABLE {table} (LIKE records_ahead INCLUDING ALL)",
        "LOCK TABLE records_ahead IN ACCESS EXCLUSIVE MODE",
        "WITH moved AS (DELETE FROM records_ahead WHERE id >= {low} AND id < {high} RETURNING *) "
        "INSERT INTO {table} SELECT * FROM moved",
        "ALTER TABLE records_timed ATTACH PARTITION {table} FOR VALUES FROM ({low}) TO ({high})",
    ):
        connection.execute(sql.SQL(text).format(**bounds, **names))


def announce(connection: psycopg.Connection[Any], now_us: int) -> None:
    """Before a schema without partitions gets them: prove, while others go on writing, that no record of the months to come is
    there already. Otherwise the server would look through all records with the table locked.

    The proof is a constraint, which the migration takes away. It begins a week from now at the soonest, so that what is written
    meanwhile keeps to it.
    """
    month = Month.of(now_us + 7 * 86_400_000_000).later(1)
    bounds = {"low": sql.Literal(month.first_id), "high": sql.Literal("0f")}
    there = connection.execute(
        sql.SQL(
            "SELECT EXISTS (SELECT FROM records WHERE id >= {low} AND id < {high}), EXISTS (SELECT FROM records)"
        ).format(**bounds)
    ).fetchone()
    if there != (False, True):  # then the migration moves them; or nothing is there
        return
    try:
        for text in (
            "ALTER TABLE records DROP CONSTRAINT IF EXISTS records_timed_elsewhere",
            "ALTER TABLE records ADD CONSTRAINT records_timed_elsewhere CHECK (id < {low} OR id >= {high}) NOT VALID",
            "ALTER TABLE records VALIDATE CONSTRAINT records_timed_elsewhere",
        ):
            connection.execute(sql.SQL(text).format(**bounds))
    except psycopg.Error:
        connection.execute("ALTER TABLE records DROP CONSTRAINT IF EXISTS records_timed_elsewhere")
        raise
