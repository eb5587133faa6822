"""Reserve and settle over four accounts: memory, and SQLite against the raw driver; with few records and with a million.

Run: `python bench/bench_stores.py [RECORDS]`; RECORDS (default 1,000,000) are written in about half a minute.
"""

from __future__ import annotations

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from floors import sqlite_pair
from measure import at_most, in_turns, table
from pair import commands, pair

from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore

FEW = 1_000
_COPY = """
WITH RECURSIVE number(i) AS (VALUES (1) UNION ALL SELECT i + 1 FROM number WHERE i < ?)
INSERT INTO records SELECT printf('%014x-%016x', i, i), {columns} FROM records, number WHERE records.id = ?
"""


def fill(store: SqliteStore, records: int) -> None:
    """As many records as this, each a copy of a real one under an earlier id."""
    reserve, settle = commands()
    store.execute(reserve)
    store.execute(settle)
    connection = store._connect()
    with closing(connection):
        names = [row[1] for row in connection.execute("PRAGMA table_info(records)")]
        columns = ", ".join(f'"{name}"' for name in names if name != "id")
        connection.execute(_COPY.format(columns=columns), (records - 1, reserve.id))
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def pairs(folder: Path) -> None:
    memory, process = MemoryStore(), SqliteStore(folder / "process.db", durability="process")
    full, raw = SqliteStore(folder / "full.db"), SqliteStore(folder / "raw.db", durability="process")
    pair(raw.execute)()  # its accounts exist
    assert raw._connection is not None
    fast = in_turns({"memory": pair(memory.execute)}, 1_000)
    durable = in_turns(
        {"raw driver": sqlite_pair(raw._connection), "SQLite process": pair(process.execute)}, 300, rounds=31
    )
    synced = in_turns({"SQLite full, a lone caller": pair(full.execute)}, 50)
    floor = durable["raw driver"]
    ratio = durable["SQLite process"] / floor
    table(
        "Reserve and settle over four accounts, one of them a rate",
        ("store", "us a pair, median", "to the raw driver", "figure"),
        [
            ("memory", f"{fast['memory']:.1f}", "", at_most(fast["memory"], 10, " us")),
            ("the raw driver's two transactions, process", f"{floor:.0f}", "1", ""),
            ("SQLite process", f"{durable['SQLite process']:.0f}", f"{ratio:.2f}", at_most(ratio, 1.5)),
            *((name, f"{us:.0f}", f"{us / floor:.2f}", "") for name, us in synced.items()),
        ],
    )
    for store in (process, full, raw):
        store.close()


def records(folder: Path, many: int) -> None:
    few, full = (
        SqliteStore(folder / "few.db", durability="process"),
        SqliteStore(folder / "many.db", durability="process"),
    )
    fill(few, FEW)
    begun = time.perf_counter()
    fill(full, many)
    filled_s = time.perf_counter() - begun
    found = in_turns({"few": pair(few.execute), "many": pair(full.execute)}, 300, rounds=31)
    ratio = found["many"] / found["few"]
    size = (folder / "many.db").stat().st_size / 2**20
    table(
        "The same with records in the file (SQLite process)",
        ("records", "us a pair, median", "ratio", "figure"),
        [
            (f"{FEW:,}", f"{found['few']:.0f}", "1", ""),
            (
                f"{many:,} ({size:.0f} MiB, filled in {filled_s:.0f} s)",
                f"{found['many']:.0f}",
                f"{ratio:.2f}",
                at_most(ratio, 1.3),
            ),
        ],
    )
    for store in (few, full):
        store.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs(Path(folder))
        records(Path(folder), int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)


if __name__ == "__main__":
    main()
