"""Leases on PostgreSQL with fsync: one hot budget and 8 processes against direct calls, what is stranded, and one call's time.

Run: `python bench/bench_leases.py [SECONDS]`, each turn being so many seconds (default 4). A turn is over when the shared store
has every record. Journals lie on the disk of the temporary folder; an fsync's time differs from minute to minute, so ratios
are taken within each round, and their median is shown.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import servers
from contenders import LEASED
from measure import at_least, at_most, table
from pair import ACTUALS, Lines, commands

from bursar.audit import audit
from bursar.commands import Ended, Granted
from bursar.stores.leases import LeasedStore
from bursar.stores.postgres import PostgresStore

PROCESSES, CALLERS, ROUNDS = 8, 32, 3


def of(kind: str) -> Lines:
    """The accounts of one kind of turn: those of the benchmark's pair, one budget each for everybody."""
    return tuple((rule._replace(key=f"{rule.key} {kind}"), amount) for rule, amount in LEASED)


def one_caller(store: PostgresStore | LeasedStore, lines: Lines, until: float) -> int:
    """Pairs until that time."""
    pairs = 0
    while time.perf_counter() < until:
        reserve, settle = commands(lines)
        assert type(store.execute(reserve)) is Granted
        assert type(store.execute(settle)) is Ended
        pairs += 1
    return pairs


async def many_callers(store: LeasedStore, lines: Lines, until: float) -> int:
    """Pairs of so many tasks until that time."""

    async def caller() -> int:
        pairs = 0
        while time.perf_counter() < until:
            reserve, settle = commands(lines)
            assert type(await store.aexecute(reserve)) is Granted
            assert type(await store.aexecute(settle)) is Ended
            pairs += 1
        return pairs

    return sum(await asyncio.gather(*(caller() for _ in range(CALLERS))))


def work(url: str, folder: str, turns: Connection, seconds: float) -> None:
    """One process: as many pairs as it can in each turn that it is told of."""
    turns.send(0)
    while (kind := turns.recv()) is not None:
        store: PostgresStore | LeasedStore = PostgresStore(url)
        if kind != "direct":
            store = LeasedStore(store, folder, durability="full" if kind == "full" else "process")
            one_caller(store, of(kind), time.perf_counter() + 0.3)  # until there is a lease
        turns.send(0)
        turns.recv()
        until = time.perf_counter() + seconds
        if kind == "full":
            assert isinstance(store, LeasedStore)
            pairs = asyncio.run(many_callers(store, of(kind), until))
        else:
            pairs = one_caller(store, of(kind), until)
        store.close()  # with the last record sent
        turns.send(pairs)


def rates(url: str, folder: str, seconds: float) -> dict[str, list[float]]:
    """Pairs a second of all processes together, direct and with leases, in turns."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    for _ in range(PROCESSES):
        mine, its = context.Pipe()
        process = context.Process(target=work, args=(url, folder, its, seconds))
        process.start()
        its.close()  # a process that fails is heard of
        pipes.append(mine)
        started.append(process)
    for pipe in pipes:
        pipe.recv()
    found: dict[str, list[float]] = {"direct": [], "process": [], "full": []}
    for _ in range(ROUNDS):
        for kind, taken in found.items():
            for message in (kind, "go"):
                for pipe in pipes:
                    pipe.send(message)
                if message == kind:
                    for pipe in pipes:
                        pipe.recv()
            begun = time.perf_counter()
            taken.append(sum(pipe.recv() for pipe in pipes) / (time.perf_counter() - begun))
    for pipe in pipes:
        pipe.send(None)
    for process in started:
        process.join()
    return found


def stranded(url: str, folder: str) -> tuple[float, int]:
    """The share of a budget that silent processes hold when it has run out, two of eight being silent; and what was overspent."""
    limit = 20_000 * ACTUALS["USD"]
    lines = ((LEASED[0][0]._replace(key=f"{LEASED[0][0].key} stranded", limit=limit), ACTUALS["USD"]),)
    stores = [LeasedStore(PostgresStore(url), folder, durability="process", background=False) for _ in range(PROCESSES)]

    def call(store: LeasedStore) -> bool:
        reserve, settle = commands(lines)
        if type(store.execute(reserve._replace(quiet=True))) is not Granted:
            return False
        store.execute(settle)
        return True

    for store in stores:  # each takes its first lease from a full budget
        for _ in range(60):
            call(store)
        store.tend()
    busy = stores[2:]
    granted = True
    while granted:
        granted = sum(call(store) for store in busy) > 0
        for store in busy:
            if store._tender.books.wanted:
                store.tend()
    for store in busy:
        store.close()
    with_all = PostgresStore(url)
    (account,) = with_all.accounts([lines[0][0].key])
    with_all.close()
    for store in stores[:2]:
        store.close()
    return (limit - account.spent) / limit, max(0, account.spent + account.reserved - limit)


def one_call(url: str, folder: str) -> tuple[float, float]:
    """The median microseconds of a leased pair in this process, and of a memory store's."""
    from bursar.stores.memory import MemoryStore

    leased = LeasedStore(PostgresStore(url), folder, durability="process")
    one_caller(leased, of("alone"), time.perf_counter() + 0.5)
    taken = [_timed(leased.execute) for _ in range(10_000)]
    memory = MemoryStore()
    floor = [_timed(memory.execute) for _ in range(10_000)]
    leased.close()
    return statistics.median(taken), statistics.median(floor)


def _timed(execute: Callable[..., object]) -> float:
    reserve, settle = commands(of("alone"))
    begun = time.perf_counter_ns()
    execute(reserve)
    execute(settle)
    return (time.perf_counter_ns() - begun) / 1_000


def main(seconds: float) -> None:
    with servers.postgres() as (url, commit_us), tempfile.TemporaryDirectory(prefix="bursar-journals-") as folder:
        found = rates(url, folder, seconds)
        rows: list[tuple[object, ...]] = [("direct", 1, f"{statistics.median(found['direct']):.0f}", "", "")]
        for kind, callers, wanted in (("process", 1, 30), ("full", CALLERS, 20)):
            ratio = statistics.median(
                leased / direct for leased, direct in zip(found[kind], found["direct"], strict=True)
            )
            rows.append(
                (
                    f"leased, {kind}",
                    callers,
                    f"{statistics.median(found[kind]):.0f}",
                    f"{ratio:.1f}",
                    at_least(ratio, wanted),
                )
            )
        table(
            f"One hot budget, {PROCESSES} processes (a commit of one row: {commit_us:.0f} us)",
            ("calls", "callers a process", "pairs/s", "ratio", "figure"),
            rows,
        )
        share, overspent = stranded(url, folder)
        leased_us, memory_us = one_call(url, folder)
        table(
            "Leases otherwise",
            ("what", "found", "figure"),
            [
                ("stranded with 2 of 8 processes silent", f"{share:.2%}", at_most(share, 0.01)),
                ("overspent, nano-dollars", overspent, at_most(overspent, 0)),
                ("a leased pair, median us", f"{leased_us:.1f}", at_most(leased_us, 60, " us")),
                ("the same in memory, median us", f"{memory_us:.1f}", ""),
            ],
        )
        store = PostgresStore(url)
        wrong = audit(store)
        store.close()
        print(f"\nEvery balance is what its records say: {not wrong}")
        sys.exit(bool(wrong))


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 4.0)
