"""The pair that the store benchmarks time: reserve and settle over four accounts, and the least that a raw driver can do."""

from __future__ import annotations

import itertools
import json
import sqlite3
import time
from collections.abc import Callable

from bursar.accounts import Rule
from bursar.commands import Command, Ended, Reserve, Settle

TTL_US = 600_000_000
_ids = (f"{time.time_ns() // 1_000:014x}-{number:016x}" for number in itertools.count())


def _rule(budget: str, unit: str, scope: dict[str, str], limit: int, period_us: int = 0) -> Rule:
    key = json.dumps([budget, unit, f"/{period_us}" if period_us else "total UTC", scope, 0])
    kind = "refill" if period_us else "window"
    return Rule(key, budget, json.dumps(scope), unit, kind, limit, period_us=period_us)  # type: ignore[arg-type]


LINES = (
    (_rule("per run", "USD", {"run": "r-17"}, 10**15), 7_500_000),
    (_rule("team", "USD", {"team": "research"}, 10**15), 7_500_000),
    (_rule("tokens", "tokens", {}, 10**15), 1_500),
    (_rule("rate", "requests", {}, 10**8, 60_000_000), 1),
)
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
DRAFT = {
    "path": ["r-17"],
    "tags": {
        "org": "acme",
        "team": "research",
        "agent": "planner",
        "run": "r-17",
        "provider": "openai",
        "model": "gpt-4o",
        "connection": "openai",
    },
    "cost_nanos": 7_500_000,
    "usage": {"input_tokens": 1_000, "output_tokens": 500},
    "price_version": "2026-11-20",
}
ACTUALS = {"USD": 6_500_000, "tokens": 1_400, "requests": 1}
USAGE = {"input_tokens": 1_000, "output_tokens": 400}
FACTS = {"model_answered": "gpt-4o-2024-08-06", "latency_ms": 150}


def commands() -> tuple[Reserve, Settle]:
    """A reserve and its settle, under a new id."""
    id = next(_ids)
    return (
        Reserve(id, LINES, TTL_US, DRAFT),
        Settle(id, ACTUALS, ACTUALS["USD"], USAGE, facts=FACTS),
    )


def pair(execute: Callable[[Command], object], pairs: int = 20_000) -> Callable[[], None]:
    """One reserve and settle through the store, as often as `pairs`; the commands are made beforehand, as the guard makes them."""
    made = iter([commands() for _ in range(pairs)])

    def run() -> None:
        reserve, settle = next(made)
        execute(reserve)
        assert type(execute(settle)) is Ended

    return run


def raw_pair(connection: sqlite3.Connection) -> Callable[[], None]:
    """The floor: two transactions on the same schema, with the least that could be right, its texts made beforehand.

    It holds only what fits, refills the rate, keeps the reservation, and writes the record that ends it; it neither creates
    accounts, nor tells balances, nor knows windows, overruns, expiry or repeated commands.
    """
    execute, many = connection.execute, connection.executemany
    windows, (rate, one) = LINES[:3], LINES[3]
    holds = [(amount, rule.key, amount) for rule, amount in windows]
    books = [(amount, ACTUALS[rule.unit], rule.key) for rule, amount in windows]
    held = json.dumps([(rule.key, rule.unit, amount) for rule, amount in LINES])
    draft, usage, facts = json.dumps(DRAFT), json.dumps(USAGE), json.dumps(FACTS)
    amounts = json.dumps({rule.key: ACTUALS[rule.unit] for rule, _ in LINES})
    tags = tuple(
        DRAFT["tags"].get(tag)  # type: ignore[attr-defined]
        for tag in (*TAGS, "model_answered")
    )
    settled = ("settlement", None, "completed", 0, "", ACTUALS["USD"], usage, amounts)

    def run() -> None:
        id = next(_ids)
        now_us = time.time_ns() // 1_000
        execute("BEGIN IMMEDIATE")
        fitting = many(
            'UPDATE accounts SET reserved = reserved + ? WHERE key = ? AND spent + reserved + ? <= "limit"', holds
        )
        rated = execute(
            "UPDATE accounts SET reserved = reserved + ?1, at_us = ?2, "
            'level = min("limit", level + (?2 - at_us) * "limit" / period_us) - ?1 '
            "WHERE key = ?3 AND level >= ?1",
            (one, now_us, rate.key),
        )
        assert fitting.rowcount + rated.rowcount == 4
        execute(
            "INSERT INTO reservations VALUES (?, ?, ?, ?, ?, ?, ?)",
            (id, held, now_us, now_us + TTL_US, "charge", "", draft),
        )
        execute("COMMIT")
        execute("BEGIN IMMEDIATE")
        ended = execute("DELETE FROM reservations WHERE id = ?", (id,))
        assert ended.rowcount == 1
        many("UPDATE accounts SET reserved = reserved - ?, spent = spent + ? WHERE key = ?", books)
        execute("UPDATE accounts SET reserved = reserved - ?, spent = spent + ? WHERE key = ?", (one, one, rate.key))
        execute(
            f"INSERT INTO records VALUES ({', '.join('?' * 27)})",
            (id, *settled, now_us, now_us, "", draft, facts, *tags),
        )
        execute("COMMIT")

    return run
