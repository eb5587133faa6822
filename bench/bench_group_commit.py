"""One fsync for many callers: SQLite full with 32 threads and 32 tasks against its lone caller, and that one without the executor.

Run: `python bench/bench_group_commit.py`. An fsync's time differs from disk to disk and from minute to minute, so the
ratios are taken within each round, and their median is shown.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measure import at_least, at_most, in_turns, table
from pair import commands, pair
from servers import fsync_us

from bursar.commands import Command, Ended, Reserve, Settle
from bursar.stores.sqlite import SqliteStore

CALLERS, EACH, ROUNDS = 32, 20, 15
ALONE = 100


def alone(execute: Callable[[Command], object]) -> float:
    """Pairs a second of one caller."""
    run = pair(execute, ALONE)
    begun = time.perf_counter()
    for _ in range(ALONE):
        run()
    return ALONE / (time.perf_counter() - begun)


def threads(store: SqliteStore) -> float:
    """Pairs a second of all threads together."""
    barrier = threading.Barrier(CALLERS + 1)

    def caller(run: Callable[[], None]) -> None:
        barrier.wait()
        for _ in range(EACH):
            run()
        barrier.wait()

    started = [threading.Thread(target=caller, args=(pair(store.execute, EACH),)) for _ in range(CALLERS)]
    for thread in started:
        thread.start()
    barrier.wait()
    begun = time.perf_counter()
    barrier.wait()
    taken_s = time.perf_counter() - begun
    for thread in started:
        thread.join()
    return CALLERS * EACH / taken_s


def tasks(store: SqliteStore) -> float:
    """Pairs a second of all tasks together."""

    async def caller(made: list[tuple[Reserve, Settle]]) -> None:
        for reserve, settle in made:
            await store.aexecute(reserve)
            assert type(await store.aexecute(settle)) is Ended

    async def all_of_them() -> float:
        made = [[commands() for _ in range(EACH)] for _ in range(CALLERS)]
        begun = time.perf_counter()
        await asyncio.gather(*map(caller, made))
        return time.perf_counter() - begun

    return CALLERS * EACH / asyncio.run(all_of_them())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "full.db")

        def directly(command: Command) -> object:
            return store._apply((command,), True)[0]

        works: dict[str, Callable[[], float]] = {
            "a lone caller": lambda: alone(store.execute),
            f"{CALLERS} threads": lambda: threads(store),
            f"{CALLERS} asyncio tasks": lambda: tasks(store),
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        synced = []
        for _ in range(ROUNDS):
            synced.append(fsync_us(Path(folder)))
            for name, work in works.items():
                found[name].append(work())
        executor = in_turns({"with": pair(store.execute), "without": pair(directly)}, 25, rounds=61)
        store.close()
    rows = []
    for (name, rates), least in zip(found.items(), (1, 4, 8), strict=True):
        ratio = statistics.median(rate / lone for rate, lone in zip(rates, found["a lone caller"], strict=True))
        rows.append((name, f"{statistics.median(rates):,.0f}", f"{ratio:.1f}", at_least(ratio, least)))
    title = f"SQLite full: an fsync per commit, shared (one fsync here: {statistics.median(synced):.0f} us)"
    table(title, ("callers", "pairs/s", "to the lone caller", "figure"), rows)
    share = executor["with"] / executor["without"]
    table(
        "SQLite full: what the executor costs its lone caller",
        ("executor", "us a pair", "ratio", "figure"),
        [
            ("without", f"{executor['without']:.0f}", "1", ""),
            ("with", f"{executor['with']:.0f}", f"{share:.2f}", at_most(share, 1.05)),
        ],
    )


if __name__ == "__main__":
    main()
