"""Does a pair take longer when much is kept? From 1,000 to 10,000,000 records, and from 1,000 to 1,000,000 accounts.

Run: `python bench/bench_growth.py [RECORDS] [--accounts MANY] [--json FILE]`; the largest step needs 20 GB of disk. Each size is
timed in turns with a store of 1,000, so that the machine's moods fall on both. Among many accounts, each pair falls on a run
drawn anew, and once on a run that has no account yet.
"""

from __future__ import annotations

import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import servers
from bulk import MAX_ACCOUNTS, Bulk, of_run
from contenders import LEASED, ours
from measure import at_most, in_turns, options, save, table
from pair import LINES, Lines, commands

from bursar import Budget, Bursar, Usage
from bursar.commands import Ended, Granted
from bursar.stores import open_store
from bursar.stores.base import Store

FEW = 1_000
STEPS = (FEW, 100_000, 1_000_000, 10_000_000)
LIMIT, LEASED_LIMIT_US = 1.3, 60
BUDGETS = (
    Budget("run", "1_000_000 USD", per="run"),
    Budget("team", "1_000_000 USD", window="month", per="team"),
    Budget("tokens", "1_000_000_000_000 tokens"),
)
Works = dict[str, tuple[Callable[[], object], int]]  # each work, and how often it is done in a turn


@contextmanager
def places(folder: Path) -> Iterator[list[tuple[str, str]]]:
    """URLs of two empty stores of each kind: that which stays small, and that which grows."""
    with ExitStack() as stack:
        urls = [stack.enter_context(servers.postgres())[0] for _ in range(2)]
        files = (f"sqlite:///{folder}/{size}.db?durability=process" for size in ("few", "many"))
        yield [tuple(files), tuple(urls)]  # type: ignore[list-item]


@contextmanager
def stores(url: str, folder: Path) -> Iterator[dict[str, Store]]:
    """The store behind the URL, and on PostgreSQL one with leases beside it."""
    with ExitStack() as stack:
        opened = {"SQLite process" if url.startswith("sqlite") else "PostgreSQL": open_store(url)}
        if url.startswith("postgres"):
            opened["PostgreSQL, leased"] = open_store(f"{url}&leases={folder}&durability=process")
        for store in opened.values():
            stack.callback(store.close)
        yield opened


def with_records(opened: dict[str, Store], stack: ExitStack) -> Works:
    """A pair on the same accounts on each store; and where there are leases, a guarded call, estimate to record."""
    works: Works = {}
    for name, store in opened.items():
        if name.endswith("leased"):
            guard = stack.enter_context(Bursar(store, budgets=BUDGETS))
            stack.enter_context(guard.scope(team="research", run="r-1"))
            works[f"{name}: a guarded call"] = (guarded(guard), 200)
    for name, store in opened.items():  # now that the guard's policy is there
        leased = name.endswith("leased")
        works[name] = (ours(store, LEASED if leased else LINES), 500 if leased else 50)
    return works


def guarded(guard: Bursar) -> Callable[[], None]:
    used = Usage(input_tokens=1_000, output_tokens=420)

    def run() -> None:
        with guard.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500) as call:
            call.settle(used)

    return run


def with_accounts(store: Store, name: str, many: int) -> Works:
    """A pair on one of so many runs; and one on a run that is new."""
    draw = random.Random(17)
    numbers = itertools.count()

    def pair(lines: Lines) -> None:
        reserve, settle = commands(lines)
        assert type(store.execute(reserve._replace(max_accounts=MAX_ACCOUNTS))) is Granted
        assert type(store.execute(settle)) is Ended

    return {
        f"{name}: a run of those": (lambda: pair(of_run(f"n-{draw.randint(1, many)}")), 50),
        f"{name}: a new run": (lambda: pair(of_run(f"new-{next(numbers)}")), 50),
    }


def compared(few: Works, many: Works, *, rounds: int = 15) -> dict[str, tuple[float, float]]:
    """The microseconds of each work on the small and on the large store, in turns."""
    found = {}
    for name, (work, times) in few.items():
        taken = in_turns({"few": work, "many": many[name][0]}, times, rounds=rounds)
        found[name] = (taken["few"], taken["many"])
    return found


def records(folder: Path, most: int) -> list[dict[str, Any]]:
    """One row for each store and number of records."""
    rows = []
    with places(folder) as pairs:
        for urls in pairs:
            few, many = map(Bulk, urls)
            few.records(0, FEW)
            have = 0
            for want in [step for step in STEPS if step <= most]:
                begun = time.perf_counter()
                many.records(have, want)
                have, filled_s = want, time.perf_counter() - begun
                with ExitStack() as stack:
                    small, large = (with_records(stack.enter_context(stores(url, folder)), stack) for url in urls)
                    for name, (few_us, us) in compared(small, large).items():
                        rows.append(row("records", name, want, few_us, us, many.size_bytes()))
                print(f"{urls[1].partition(':')[0]}: {want:,} records in {filled_s:.0f} s", file=sys.stderr)
    return rows


def accounts(folder: Path, most: int) -> list[dict[str, Any]]:
    """One row for each store and number of accounts."""
    rows = []
    with places(folder) as pairs:
        for urls in pairs:
            few, many = map(Bulk, urls)
            few.accounts(0, FEW)
            have = 0
            for want in [step for step in STEPS if step <= most]:
                many.accounts(have, want)
                have = want
                with stores(urls[0], folder) as small, stores(urls[1], folder) as large:
                    name, *_ = small
                    works = (with_accounts(small[name], name, FEW), with_accounts(large[name], name, want))
                    for work, (few_us, us) in compared(*works).items():
                        rows.append(row("accounts", work, want, few_us, us, many.size_bytes()))
    return rows


def row(what: str, name: str, count: int, few_us: float, us: float, size_bytes: int) -> dict[str, Any]:
    return {
        "what": what,
        "work": name,
        "count": count,
        "few_us": few_us,
        "us": us,
        "ratio": us / few_us,
        "size_mib": size_bytes / 2**20,
    }


def show(title: str, what: str, rows: list[dict[str, Any]]) -> None:
    table(
        title,
        ("work", what, f"us with {FEW:,}", "us, median", "ratio", "MiB on the disk", "figure"),
        [
            (
                *(one["work"], f"{one['count']:,}", f"{one['few_us']:.0f}", f"{one['us']:.0f}", f"{one['ratio']:.2f}"),
                f"{one['size_mib']:,.0f}",
                at_most(one["us"], LEASED_LIMIT_US, " us") if "leased" in one["work"] else at_most(one["ratio"], LIMIT),
            )
            for one in sorted(rows, key=lambda one: one["work"])
        ],
    )


def main() -> None:
    said = options(records=STEPS[-1], accounts=1_000_000)
    with tempfile.TemporaryDirectory(prefix="bursar-bench-") as first, tempfile.TemporaryDirectory() as second:
        by_records = records(Path(first), said.records)
        show("A pair, by how many records there are", "records", by_records)
        by_accounts = accounts(Path(second), said.accounts)
        show("A pair, by how many accounts the budget has", "accounts", by_accounts)
    save(said.json, by_records + by_accounts)


if __name__ == "__main__":
    main()
