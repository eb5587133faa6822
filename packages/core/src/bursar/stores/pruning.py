"""Pruning: old records give way to records of their sums, so that records alone still rebuild every balance (I10)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from pydantic_core import from_json

from bursar.commands import Entry
from bursar.stores import sqlite_rows as rows

LATE_US = 93 * 86_400_000_000  # how long an expired reservation may still be settled
BATCH = 2_000  # records of one transaction
MAX_KEYS = 1_000  # accounts of one record of sums
_REASONS = {
    "carried": "the sums of records that were pruned",
    "retired": "what stood on accounts on which nothing was booked any more",
}
TIMED = "0f"  # ids that Bursar makes begin with a time, and come before this


class Pruned(NamedTuple):
    """How many records gave way, and what they had cost; `accounts`: how many were retired."""

    records: int = 0
    cost_nanos: int = 0
    accounts: int = 0

    def plus(self, other: Pruned) -> Pruned:
        return Pruned(*(mine + its for mine, its in zip(self, other, strict=True)))


@runtime_checkable
class Prunable(Protocol):
    """A store whose records can be pruned."""

    def prune(self, before_us: int, facts: Mapping[str, Any]) -> Pruned:
        """Put sums in the place of records settled before that time, and retire the accounts that nothing else names; `facts` go
        on record with both. Alerts of before that time go too. Raises StoreError.

        Each step is one transaction, so that whoever is cut off goes on the next time. What can still be settled late stays.
        """
        ...


def prunable(before_us: int, now_us: int) -> str:
    """The condition, in SQL, of records that may go. A correction stays as long as what it corrects, which is older."""
    late_us = now_us - LATE_US
    return f"settled_us < {before_us} AND (kind NOT IN ('expiry', 'correction', 'reversal') OR settled_us < {late_us})"


def carried(
    name: str, before_us: int, sums: Mapping[str, int], pruned: Pruned, facts: Mapping[str, Any]
) -> list[Entry]:
    """The records that stand for what was pruned: sums by account key. `name` tells these from others of the same time."""
    keys = [key for key, amount in sums.items() if amount]
    found = []
    for start in range(0, max(len(keys), 1), MAX_KEYS):
        records, cost_nanos, _ = pruned if start == 0 else Pruned()
        told = {**facts, "before_us": before_us, "records": records}
        some = {key: sums[key] for key in keys[start : start + MAX_KEYS]}
        found.append(_sums("carried", f"{name}-{start // MAX_KEYS}", before_us, cost_nanos, some, told))
    return found


def retired(before_us: int, gone: Mapping[str, int], facts: Mapping[str, Any]) -> list[Entry]:
    """The record that takes off the books what stood on these accounts, at most MAX_KEYS, by what records of sums say of them."""
    amounts = {key: -booked for key, booked in gone.items() if booked}
    if not amounts:
        return []
    told = {**facts, "before_us": before_us, "records": 0}
    return [_sums("retired", _digest(next(iter(amounts))), before_us, 0, amounts, told)]


def _sums(
    kind: str, name: str, before_us: int, cost_nanos: int, amounts: dict[str, int], facts: dict[str, Any]
) -> Entry:
    return Entry(
        f"{before_us:014x}-{kind}-{name}",
        kind,
        None,
        "completed",
        False,
        _REASONS[kind],
        cost_nanos,
        {},
        amounts,
        before_us - 1,
        before_us - 1,
        "",
        {"path": [], "tags": {}},
        facts,
    )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def records_in(entry_facts: Mapping[str, Any]) -> int:
    """For how many records a record stands: itself, or what a record of sums tells."""
    count = entry_facts.get("records", 1) if "before_us" in entry_facts else 1
    return count if isinstance(count, int) else 0


def batch(
    cursor: Any, mark: str, table: str, condition: str, before_us: int, facts: Mapping[str, Any]
) -> Pruned | None:
    """Prune some records of a table in the transaction that is open; None when none is left. `mark`: the driver's placeholder."""
    cursor.execute(
        f"SELECT id, cost_nanos, amounts, facts FROM {table} WHERE {condition} "
        f"AND (id < {mark} OR id >= {mark}) ORDER BY id LIMIT {BATCH}",
        (f"{before_us:014x}", TIMED),
    )
    found: Sequence[tuple[str, int, str, str]] = cursor.fetchall()
    if not found:
        return None
    sums: dict[str, int] = {}
    pruned = Pruned()
    for _, cost_nanos, amounts, told in found:
        pruned = pruned.plus(Pruned(records_in(from_json(told)), cost_nanos))
        for key, amount in from_json(amounts).items():
            sums[key] = sums.get(key, 0) + amount
    cursor.executemany(f"DELETE FROM {table} WHERE id = {mark}", [(row[0],) for row in found])
    put(cursor, mark, carried(_digest(found[0][0]), before_us, sums, pruned, facts))
    return pruned


def forget_alerts(cursor: Any, before_us: int, now_us: int) -> bool:
    """Delete some alerts of before that time, in the transaction that is open: those that were told, and those that nobody takes
    any more. Whether there may be others.
    """
    done = f"at_us < {before_us} AND (delivered_us > 0 OR at_us < {now_us - LATE_US})"
    cursor.execute(f"DELETE FROM alerts WHERE id IN (SELECT id FROM alerts WHERE {done} LIMIT {BATCH})")
    return bool(cursor.rowcount == BATCH)


def put(cursor: Any, mark: str, entries: Sequence[Entry]) -> None:
    """Write these records."""
    marks = ", ".join([mark] * 27)
    cursor.executemany(f"INSERT INTO records({rows.RECORD}) VALUES ({marks})", [rows.values(one) for one in entries])
