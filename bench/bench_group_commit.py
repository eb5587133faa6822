"""One fsync for many callers: SQLite full with 32 tasks and 32 threads, against its lone caller with and without the executor.

Run: `python bench/bench_group_commit.py`. An fsync's time differs from disk to disk and from hour to hour: each round has
all four, and the table ends with what an fsync took.
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

from measure import at_least, table
from pair import commands

from bursar.commands import Answer, Command, Ended
from bursar.stores.sqlite import SqliteStore

CALLERS, EACH, ROUNDS = 32, 20, 15
ALONE = 100


def alone(execute: Callable[[Command], Answer]) -> float:
    """Pairs a second of one caller."""
    begun = time.perf_counter()
    for _ in range(ALONE):
        reserve, settle = commands()
        execute(reserve)
        assert type(execute(settle)) is Ended
    return ALONE / (time.perf_counter() - begun)


def threads(store: SqliteStore) -> float:
    """Pairs a second of all threads together."""
    barrier = threading.Barrier(CALLERS + 1)

    def caller() -> None:
        barrier.wait()
        for _ in range(EACH):
            reserve, settle = commands()
            store.execute(reserve)
            assert type(store.execute(settle)) is Ended
        barrier.wait()

    started = [threading.Thread(target=caller) for _ in range(CALLERS)]
    for thread in started:
        thread.start()
    barrier.wait()
    begun = time.perf_counter()
    barrier.wait()
    taken = time.perf_counter() - begun
    for thread in started:
        thread.join()
    return CALLERS * EACH / taken


def tasks(store: SqliteStore) -> float:
    """Pairs a second of all tasks together."""

    async def caller() -> None:
        for _ in range(EACH):
            reserve, settle = commands()
            await store.aexecute(reserve)
            assert type(await store.aexecute(settle)) is Ended

    async def all_of_them() -> float:
        begun = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(CALLERS)))
        return time.perf_counter() - begun

    return CALLERS * EACH / asyncio.run(all_of_them())


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        store = SqliteStore(Path(folder) / "full.db")

        def directly(command: Command) -> Answer:
            (answer,) = store._apply((command,))
            assert not isinstance(answer, BaseException)
            return answer

        works: dict[str, Callable[[], float]] = {
            "a lone caller": lambda: alone(store.execute),
            "a lone caller, without the executor": lambda: alone(directly),
            f"{CALLERS} threads": lambda: threads(store),
            f"{CALLERS} asyncio tasks": lambda: tasks(store),
        }
        found: dict[str, list[float]] = {name: [] for name in works}
        for _ in range(ROUNDS):
            for name, work in works.items():
                found[name].append(work())
        store.close()
    rates = {name: statistics.median(rate) for name, rate in found.items()}
    lone = rates["a lone caller"]
    figures = {
        "a lone caller": at_least(lone / rates["a lone caller, without the executor"], 0.95, " of the one without"),
        f"{CALLERS} threads": at_least(rates[f"{CALLERS} threads"] / lone, 4),
        f"{CALLERS} asyncio tasks": at_least(rates[f"{CALLERS} asyncio tasks"] / lone, 8),
    }
    table(
        "SQLite full: an fsync per commit, shared",
        ("callers", "pairs/s, median", "to the lone caller", "figure"),
        [(name, f"{rate:,.0f}", f"{rate / lone:.2f}", figures.get(name, "")) for name, rate in rates.items()],
    )


if __name__ == "__main__":
    main()
