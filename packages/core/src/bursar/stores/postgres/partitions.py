"""Partitions of the usage records on PostgreSQL: one for each month of the time with which ids begin, made before it comes.

`records` is split by ranges of its key, so that an id stays unique over all of them (I6). `records_timed` takes ids that begin
with a time, in `records_2026_11` and its like; the months that have no table yet fall into `records_ahead`. `records_other`
takes every other id: those that callers gave, and whatever was there before there were partitions.
"""

from __future__ import annotations

import logging
from collections.abc import Container, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import psycopg
from psycopg import sql

from bursar.stores.pruning import BATCH, LATE_US, Pruned, batch, carried, forget_alerts, prunable, put, strays
from bursar.stores.retiring import POSTGRES, Idle, idle, retire

AHEAD = 2  # months that have their table before they begin
MAKING = 0x62757273617271  # the advisory lock of whoever makes or drops one
PRUNING = 0x62757273617272  # that of whoever puts sums in the place of records, or changes what records name
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_EXISTING = (
    "SELECT relname FROM pg_inherits JOIN pg_class ON pg_class.oid = inhrelid "
    "WHERE inhparent = to_regclass('records_timed') AND relname <> 'records_ahead' ORDER BY relname"
)

_FLOOR = (  # months before that lie in `records_other`
    "SELECT substring(pg_get_expr(relpartbound, oid) from '[0-9a-f]{14}') FROM pg_class "
    "WHERE oid = to_regclass('records_timed')"
)
_THERE = "SELECT count(*) FROM (SELECT FROM records_ahead WHERE id >= %s AND id < %s LIMIT %s) AS there"
_TAKES_PART = "SELECT EXISTS (SELECT FROM pg_class WHERE oid = to_regclass(%s) AND (relispartition OR relkind = 'p'))"
_LEFT = (  # tables of months that were taken out, by somebody who was cut off before they were dropped
    "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' "
    "AND relname ~ '^records_[0-9]{4}_[0-9]{2}$' AND NOT relispartition"
)
MAX_MOVED = 10_000  # records of a month that come late into its table
MAX_TRIES = 20  # of a third of a second, to get a lock that everybody holds for moments

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
    because records of months without a table are safe in `records_ahead` meanwhile. A month of which many lie there already stays
    there: moving them would hold up every record for as long.
    """
    known = existing(connection)
    this = Month.of(now_us)
    ((floor,),) = connection.execute(_FLOOR).fetchall()
    coming = (this.later(ahead) for ahead in range(AHEAD + 1))
    missing = [month for month in coming if month not in known and month.first_id >= floor]
    made: list[Month] = []
    for month in missing:
        ((there,),) = connection.execute(_THERE, (month.first_id, month.later(1).first_id, MAX_MOVED + 1)).fetchall()
        if there > MAX_MOVED:
            continue
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


def prune(
    connection: psycopg.Connection[Any], granted: Container[str], before_us: int, now_us: int, facts: Mapping[str, Any]
) -> Pruned:
    """Put sums in the place of records settled before that time: months are dropped whole, all others go in batches; then retire
    accounts, but those `granted`.

    A month in which anything has to stay is left as it is, until only ids that callers gave can be why: then it goes in batches.
    """
    condition, total = prunable(before_us, now_us), Pruned()
    for month in existing(connection):
        if month.later(1).start_us <= before_us:
            total = total.plus(_drop(connection, month, condition, before_us, facts))
    for (name,) in connection.execute(_LEFT).fetchall():
        connection.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(name)))
    settled_us = min(before_us, now_us - 2 * LATE_US)  # then nothing that a month holds back is of its own time
    held_up = [month.table for month in existing(connection) if month.later(1).start_us <= settled_us]
    for table in ("records_other", "records_ahead", *held_up):
        while pruned := _batch(connection, table, condition, before_us, facts):
            total = total.plus(pruned)
    ids = [id for (id,) in connection.execute(strays(before_us, condition).encode()).fetchall()]
    for start in range(0, len(ids), BATCH):
        some = _batch(connection, "records", condition, before_us, facts, ids[start : start + BATCH])
        total = total.plus(some or Pruned())
    while forget_alerts(connection.cursor(), before_us, now_us):
        pass
    for idle_ones in idle(connection.cursor(), POSTGRES, granted, before_us, now_us):
        total = total.plus(Pruned(accounts=_retire(connection, idle_ones, before_us, facts)))
    return total


def _retire(
    connection: psycopg.Connection[Any], idle_ones: Sequence[Idle], before_us: int, facts: Mapping[str, Any]
) -> int:
    for last in (*[False] * (MAX_TRIES - 1), True):
        try:
            with connection.transaction(), connection.cursor() as cursor:
                return retire(cursor, POSTGRES, idle_ones, before_us, facts)
        except psycopg.errors.DeadlockDetected:  # calls that make accounts of several budgets count them in any order
            if last:
                raise
    raise AssertionError("unreachable")


def _batch(
    connection: psycopg.Connection[Any],
    table: str,
    condition: str,
    before_us: int,
    facts: Mapping[str, Any],
    ids: Sequence[str] = (),
) -> Pruned | None:
    with connection.transaction(), connection.cursor() as cursor:
        if not _is_alone(connection, table):
            return None
        return batch(cursor, "%s", table, condition, before_us, facts, ids)


def _is_alone(connection: psycopg.Connection[Any], table: str) -> bool:
    """Whether the table still takes part in the records, when nobody else prunes or erases any more until the transaction ends."""
    connection.execute("SELECT pg_advisory_xact_lock(%s), pg_advisory_xact_lock(%s)", (PRUNING, MAKING))
    ((there,),) = connection.execute(_TAKES_PART, (table,)).fetchall()
    return bool(there)


def _drop(
    connection: psycopg.Connection[Any], month: Month, condition: str, before_us: int, facts: Mapping[str, Any]
) -> Pruned:
    """Take a month's table out, in the transaction that writes its sums. The file is deleted after that, when nothing waits."""
    for last in (*[False] * (MAX_TRIES - 1), True):
        try:
            with connection.transaction():
                if not _is_alone(connection, month.table):
                    return Pruned()
                pruned = _take_out(connection, sql.Identifier(month.table), month, condition, before_us, facts)
            return pruned
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            if last:
                raise
    raise AssertionError("unreachable")


def _take_out(
    connection: psycopg.Connection[Any],
    table: sql.Identifier,
    month: Month,
    condition: str,
    before_us: int,
    facts: Mapping[str, Any],
) -> Pruned:
    connection.execute("SET LOCAL lock_timeout = '300ms'")
    connection.execute(sql.SQL("LOCK TABLE {} IN SHARE MODE").format(table))  # what is summed up is what is taken out
    counted = sql.SQL(
        "SELECT coalesce(sum(CASE WHEN kind IN ('carried', 'retired') THEN (facts::json ->> 'records')::bigint ELSE 1 END), 0)"
        "::bigint, "
        "coalesce(sum(cost_nanos), 0)::bigint, count(*) FILTER (WHERE NOT ({condition})) FROM {table}"
    ).format(table=table, condition=sql.SQL(condition))
    ((records, cost_nanos, staying),) = connection.execute(counted).fetchall()
    if staying:
        return Pruned()
    summed = "SELECT key, sum(value::bigint)::bigint FROM {}, json_each_text(amounts::json) GROUP BY key ORDER BY key"
    sums = dict(connection.execute(sql.SQL(summed).format(table)).fetchall())
    pruned = Pruned(records, cost_nanos)
    connection.execute(sql.SQL("ALTER TABLE records_timed DETACH PARTITION {}").format(table))
    if records or sums:
        put(connection.cursor(), "%s", carried(month.table, before_us, sums, pruned, facts))
    return pruned
