"""Retiring: accounts on which nothing will be booked any more go, and a record takes what stood on them off the books (I4)."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bursar.accounts import Account, age
from bursar.commands import Definitions
from bursar.stores import sqlite_rows as rows
from bursar.stores.pruning import put, retired

BATCH = 500  # accounts of one transaction
_BLOCK = re.compile(
    r'\{"scope": "[0-9a-f]{14}-[0-9a-f]{16}"\}'
)  # of a block with a budget and no tags: nobody has its id again
_SUMS = "kind IN ('carried', 'retired')"
_DELETE = "DELETE FROM accounts WHERE key = {0} AND reserved = 0 AND spent = {0} AND level = {0} AND at_us = {0} AND buckets = {0}"
_COUNT = "UPDATE account_counts SET accounts = accounts - {0} WHERE budget = {0}"
_NO_COUNT = "DELETE FROM account_counts WHERE budget = {0} AND accounts <= 0"

Idle = tuple[Account, int]  # an account that may go, and what the sums of pruned records say of it


class Dialect(NamedTuple):
    """How a database says it. `mark`: its placeholder; `each`: the pairs of `amounts`, as a table of `key` and `value`; `held`:
    the keys that open reservations name; `lock`: what keeps accounts as they are until the transaction ends.
    """

    mark: str
    each: str
    held: str
    lock: str = ""


SQLITE = Dialect(
    "?", "json_each(amounts)", "SELECT DISTINCT json_extract(value, '$[0]') FROM reservations, json_each(held)"
)
POSTGRES = Dialect(
    "%s",
    "json_each_text(amounts::json)",
    "SELECT DISTINCT one ->> 0 FROM reservations, json_array_elements(held::json) AS one",
    'SELECT key FROM accounts WHERE key = ANY(%s) ORDER BY key COLLATE "C" FOR UPDATE',
)


def granted(held: Definitions, now_us: int) -> frozenset[str]:
    """The accounts that an operator has granted more, which holds still: made anew they would have it once more."""
    found = [one.definition for kind in ("raise", "approval") for one in held.get(kind, {}).values()]
    return frozenset(
        str(one.get("account"))
        for one in found
        if one.get("state", "approved") == "approved"
        and not (isinstance(until_us := one.get("until_us"), int) and 0 < until_us <= now_us)
    )


def idle(
    cursor: Any, dialect: Dialect, granted: Container[str], before_us: int, now_us: int
) -> Iterator[Sequence[Idle]]:
    """The accounts that mean nothing any more, in batches for `retire`: no record names them but sums of those that were pruned.

    Of these: those of windows that have ended, those of runs and blocks, and what stands as if it were new of rates, slots and
    rolling windows; but none of those `granted`. An account that differs from its records stays, for the audit to find.
    """
    cursor.execute(rows.ALL_ACCOUNTS)  # first: a record of whatever moves them from here on may be missed below
    accounts = [rows.account(row) for row in cursor.fetchall()]
    cursor.execute(f"SELECT DISTINCT key FROM records, {dialect.each} AS each WHERE NOT {_SUMS}")
    named = {key for (key,) in cursor.fetchall()}
    total = "CAST(sum(CAST(value AS bigint)) AS bigint)"
    cursor.execute(f"SELECT key, {total} FROM records, {dialect.each} AS each WHERE {_SUMS} GROUP BY key")
    sums = dict(cursor.fetchall())
    found = [
        (account, booked)
        for account in accounts
        if account.rule.key not in named
        and account.rule.key not in granted
        and is_done_with(account, before_us, now_us)
        and (account.spent == (booked := sums.get(account.rule.key, 0)) or account.rule.kind != "window")
    ]
    return (found[start : start + BATCH] for start in range(0, len(found), BATCH))


def is_done_with(account: Account, before_us: int, now_us: int) -> bool:
    """Whether an account that nothing was booked on since then means nothing any more."""
    rule = account.rule
    if account.reserved:
        return False
    if rule.kind == "window":
        if rule.end_us is not None:
            return rule.end_us <= before_us
        return "run" in json.loads(rule.scope) or _BLOCK.fullmatch(rule.scope) is not None
    if rule.kind == "refill":
        return age(account, now_us).level == rule.limit
    return not age(account, now_us).spent


def retire(cursor: Any, dialect: Dialect, batch: Sequence[Idle], before_us: int, facts: Mapping[str, Any]) -> int:
    """Take those away, in the transaction that is open, that nobody has moved since they were read; how many went."""
    if dialect.lock:
        cursor.execute(dialect.lock, ([account.rule.key for account, _ in batch],))
    cursor.execute(dialect.held)
    held = {key for (key,) in cursor.fetchall()}
    gone: dict[str, int] = {}
    budgets: Counter[str] = Counter()
    for account, booked in batch:
        key = account.rule.key
        if key not in held:
            buckets = rows.dumps(account.buckets) if account.buckets else ""
            figures = (key, account.spent, account.level, account.at_us, buckets)
            cursor.execute(_DELETE.format(dialect.mark), figures)
            if cursor.rowcount:
                gone[key] = booked
                budgets[account.rule.budget] += 1
    for budget, count in sorted(budgets.items()):
        cursor.execute(_COUNT.format(dialect.mark), (count, budget))
        cursor.execute(_NO_COUNT.format(dialect.mark), (budget,))
    put(cursor, dialect.mark, retired(before_us, gone, facts))
    return len(gone)
