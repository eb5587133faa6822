"""Reserve and settle over four accounts by one caller: memory, and SQLite against the raw driver."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from floors import sqlite_pair
from measure import at_most, in_turns, table
from pair import pair

from bursar.stores.memory import MemoryStore
from bursar.stores.sqlite import SqliteStore


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


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pairs(Path(folder))


if __name__ == "__main__":
    main()
