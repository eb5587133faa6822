"""The floor of each store: two transactions of its raw driver with the least that could be right, in one place for all benches.

They hold only what fits, refill the rate, keep the reservation, and write the record that ends it. They neither create accounts
(but on Redis their own), nor tell balances, nor know windows, overruns, expiry or repeated commands.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable
from typing import Any

from pair import ACTUALS, DRAFT, FACTS, LINES, TAGS, TTL_US, USAGE, Lines, next_id

_RECORD = ", ".join(
    f'"{name}"'
    for name in (
        *("id", "kind", "corrects", "outcome", "estimated", "reason", "cost_nanos", "usage", "amounts"),
        *("reserved_us", "settled_us", "digest", "draft", "facts", *TAGS, "model_answered"),
    )
)
_RESERVATION = "id, held, reserved_us, expires_us, on_expiry, digest, draft"
_DRAFT, _USAGE, _FACTS = json.dumps(DRAFT), json.dumps(USAGE), json.dumps(FACTS)
_TAG_VALUES = tuple(
    DRAFT["tags"].get(tag)  # type: ignore[attr-defined]
    for tag in (*TAGS, "model_answered")
)


def _texts(lines: Lines) -> tuple[str, str]:
    """What the reservation holds, and what the record says was spent."""
    held = json.dumps([(rule.key, rule.unit, amount) for rule, amount in lines])
    return held, json.dumps({rule.key: ACTUALS[rule.unit] for rule, _ in lines})


def sqlite_pair(connection: sqlite3.Connection, lines: Lines = LINES) -> Callable[[], None]:
    """A pair on SQLite, on accounts that exist; its texts are made beforehand."""
    execute, many = connection.execute, connection.executemany
    windows = [(rule, amount) for rule, amount in lines if rule.kind == "window"]
    (rate, one) = next((rule, amount) for rule, amount in lines if rule.kind == "refill")
    holds = [(amount, rule.key, amount) for rule, amount in windows]
    books = [(amount, ACTUALS[rule.unit], rule.key) for rule, amount in windows]
    held, amounts = _texts(lines)
    settled = ("settlement", None, "completed", 0, "", ACTUALS["USD"], _USAGE, amounts)

    def run() -> None:
        id = next_id()
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
        assert fitting.rowcount + rated.rowcount == len(lines)
        execute(
            f"INSERT INTO reservations ({_RESERVATION}) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (id, held, now_us, now_us + TTL_US, "charge", "", _DRAFT),
        )
        execute("COMMIT")
        execute("BEGIN IMMEDIATE")
        ended = execute("DELETE FROM reservations WHERE id = ?", (id,))
        assert ended.rowcount == 1
        many("UPDATE accounts SET reserved = reserved - ?, spent = spent + ? WHERE key = ?", books)
        execute("UPDATE accounts SET reserved = reserved - ?, spent = spent + ? WHERE key = ?", (one, one, rate.key))
        execute(
            f"INSERT INTO records ({_RECORD}) VALUES ({', '.join('?' * 27)})",
            (id, *settled, now_us, now_us, "", _DRAFT, _FACTS, *_TAG_VALUES),
        )
        execute("COMMIT")

    return run


# One statement for each transaction. Accounts are updated in the order of their keys: otherwise processes that share some of
# them deadlock at once.
_ACCOUNT = """key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved, overrun, refused,
    refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks"""
_PG_HOLD = f"""
WITH fit AS (INSERT INTO accounts AS a ({_ACCOUNT})
    SELECT key, '', '', '', '', 0, 0, NULL::bigint, 0, true, 0, amount, 0, 0, 0, 0, 0, 0, %s::bigint, '', 0, ''
    FROM (VALUES {{lines}}) AS line(key, amount) ORDER BY key COLLATE "C"
    ON CONFLICT (key) DO UPDATE SET reserved = a.reserved + excluded.reserved, at_us = excluded.at_us, level = CASE a.kind
        WHEN 'refill' THEN least(a."limit", a.level + ((excluded.at_us - a.at_us)::numeric * a."limit" / a.period_us)::bigint)
            - excluded.reserved ELSE 0 END
    WHERE CASE a.kind WHEN 'refill' THEN a.level >= excluded.reserved
        ELSE a.spent + a.reserved + excluded.reserved <= a."limit" END RETURNING 1)
INSERT INTO reservations ({_RESERVATION}) VALUES (%s, %s, %s, %s, 'charge', '', %s) RETURNING (SELECT count(*) FROM fit)
"""
_PG_BOOK = f"""
WITH gone AS (DELETE FROM reservations WHERE id = %s RETURNING 1),
book AS (INSERT INTO accounts AS a ({_ACCOUNT})
    SELECT key, '', '', '', '', 0, 0, NULL::bigint, 0, true, actual, held, 0, 0, 0, 0, 0, 0, 0, '', 0, ''
    FROM (VALUES {{lines}}) AS line(key, held, actual) ORDER BY key COLLATE "C"
    ON CONFLICT (key) DO UPDATE SET reserved = a.reserved - excluded.reserved, spent = a.spent + excluded.spent RETURNING 1)
INSERT INTO records ({_RECORD}) VALUES ({", ".join(["%s"] * 27)})
    RETURNING (SELECT count(*) FROM gone), (SELECT count(*) FROM book)
"""


def postgres_pair(connection: Any, lines: Lines = LINES) -> Callable[[], None]:
    """A pair on PostgreSQL, on accounts that exist; its texts are made beforehand."""
    held, amounts = _texts(lines)
    hold = _PG_HOLD.format(lines=", ".join(["(%s, %s::bigint)"] * len(lines)))
    book = _PG_BOOK.format(lines=", ".join(["(%s, %s::bigint, %s::bigint)"] * len(lines)))
    holds = [value for rule, amount in lines for value in (rule.key, amount)]
    books = [value for rule, amount in lines for value in (rule.key, amount, ACTUALS[rule.unit])]
    told = ("settlement", None, "completed", False, "", ACTUALS["USD"], _USAGE, amounts)

    def run() -> None:
        id = next_id()
        now_us = time.time_ns() // 1_000
        values = (now_us, *holds, id, held, now_us, now_us + TTL_US, _DRAFT)
        assert connection.execute(hold, values, prepare=True).fetchone() == (len(lines),)
        values = (id, *books, id, *told, now_us, now_us, "", _DRAFT, _FACTS, *_TAG_VALUES)
        assert connection.execute(book, values, prepare=True).fetchone() == (1, len(lines))

    return run


# One script for each transaction, on accounts of their own. Amounts that a double does not hold are not looked for.
_REDIS_HOLD = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
for at = 2, #KEYS do
  local a = redis.call('HMGET', KEYS[at], 'limit', 'spent', 'reserved', 'period', 'level', 'at')
  local amount = tonumber(ARGV[at + 2])
  if a[4] then
    local level = math.min(a[1], a[5] + math.floor((now - a[6]) * a[1] / a[4]))
    if level < amount then return 0 end
    redis.call('HSET', KEYS[at], 'level', string.format('%.0f', level - amount), 'at', string.format('%.0f', now))
  elseif a[2] + a[3] + amount > tonumber(a[1]) then return 0 end
  redis.call('HINCRBY', KEYS[at], 'reserved', ARGV[at + 2])
end
redis.call('HSET', 'id:' .. ARGV[1], 'held', ARGV[2], 'at', now, 'draft', ARGV[3])
redis.call('ZADD', KEYS[1], now + ARGV[#ARGV], ARGV[1])
return 1
"""
_REDIS_BOOK = """
if redis.call('ZREM', KEYS[1], ARGV[1]) == 0 then return 0 end
for at = 2, #KEYS do
  redis.call('HINCRBY', KEYS[at], 'reserved', -ARGV[2 * at])
  redis.call('HINCRBY', KEYS[at], 'spent', ARGV[2 * at + 1])
end
redis.call('HSET', 'id:' .. ARGV[1], 'entry', ARGV[2])
redis.call('XADD', 'records', '*', 'id', ARGV[1])
return 1
"""


def redis_pair(client: Any, lines: Lines = LINES) -> Callable[[], None]:
    """A pair on Redis, called through redis-py; its texts are made beforehand."""
    hold, book = client.script_load(_REDIS_HOLD), client.script_load(_REDIS_BOOK)
    for rule, _ in lines:
        rate = {"period": rule.period_us, "level": rule.limit, "at": 0} if rule.kind == "refill" else {}
        for field, value in {"limit": rule.limit, "spent": 0, "reserved": 0, **rate}.items():
            client.hsetnx(f"raw {rule.key}", field, value)
    keys = ["due", *(f"raw {rule.key}" for rule, _ in lines)]
    held, amounts = _texts(lines)
    told = ("settlement", None, "completed", False, "", ACTUALS["USD"], USAGE, amounts, time.time_ns(), FACTS)
    entry = json.dumps(told)
    holds = [amount for _, amount in lines]
    books = [value for rule, amount in lines for value in (amount, ACTUALS[rule.unit])]

    def run() -> None:
        id = next_id()
        assert client.evalsha(hold, len(keys), *keys, id, held, _DRAFT, *holds, TTL_US) == 1
        assert client.evalsha(book, len(keys), *keys, id, entry, 0, *books) == 1

    return run
