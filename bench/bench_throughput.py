"""Reserve and settle on every store, by 1 to 64 processes, on everybody's accounts and on their own, with and without leases.

Run: `python bench/bench_throughput.py [SECONDS] [--processes 1,4] [--stores Redis] [--json FILE]`. Each figure is the median of
three turns of so many seconds (default 1), beside the floor: the same driver doing the least that could be right (floors.py),
in the turns between. Ratios are taken within each round. A leased turn ends when the shared store has every record.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import servers
from contenders import BURSAR, CONTENDERS, FLOOR, HOT, OWN, Contender, works
from measure import at_least, options, save, table
from turns import Turn, crowd, turns

from bursar.stores import open_store

ROUNDS = 3
PROCESSES = (1, 4, 16, 64)
CONNECTIONS = 4 * PROCESSES[-1]


@contextmanager
def running(server: str) -> Iterator[tuple[str, float]]:
    """Where that server, or the folder, is; and the microseconds of its smallest durable write."""
    kind, _, mode = server.partition(" ")
    with ExitStack() as stack:
        if kind == "postgres":
            yield stack.enter_context(servers.postgres(CONNECTIONS))
        elif kind == "redis":
            yield stack.enter_context(servers.redis(mode))
        else:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bursar-bench-"))
            yield folder, servers.fsync_us(Path(folder))


def figures(contender: Contender, url: str, processes: int, seconds: float) -> list[dict[str, Any]]:
    """One row for shared accounts, one for those that each process has to itself."""
    open_store(url).close()  # it is there when they come
    names = [f"{who}, {accounts}" for accounts in (HOT, OWN) for who in (FLOOR, BURSAR)]
    with crowd(processes, works, url, contender.leased) as members:
        found = turns(members, names, seconds, ROUNDS)
        memory_mib = members.memory_bytes() / 2**20
    return [
        {
            "store": contender.name,
            "processes": processes,
            "accounts": accounts,
            **row(found[f"{FLOOR}, {accounts}"], found[f"{BURSAR}, {accounts}"]),
            "memory_mib": memory_mib,
            # leases are for accounts that everybody wants
            "wanted": 0 if contender.leased and (processes == 1 or accounts == OWN) else contender.wanted,
        }
        for accounts in (HOT, OWN)
    ]


def row(floor: Sequence[Turn], ours: Sequence[Turn]) -> dict[str, float]:
    """The medians of both, and that of the ratios within the rounds."""

    def median(taken: Sequence[Turn], field: str) -> float:
        return statistics.median(getattr(turn, field) for turn in taken)

    return {
        "ratio": statistics.median(one.per_s / least.per_s for least, one in zip(floor, ours, strict=True)),
        **{f"floor_{field}": median(floor, field) for field in ("per_s", "p50_us", "p99_us")},
        **{field: median(ours, field) for field in ("per_s", "p50_us", "p99_us")},
        "floor_failed": sum(turn.failed for turn in floor),
        "failed": sum(turn.failed for turn in ours),
    }


def show(name: str, write_us: float, rows: Sequence[dict[str, Any]]) -> None:
    """One table for each store."""
    table(
        f"{name}: pairs of reserve and settle (its smallest durable write: {write_us:.0f} us)",
        (
            *("processes", "accounts", "raw driver, pairs/s", "Bursar, pairs/s", "ratio"),
            *("raw p50, us", "p99", "Bursar p50, us", "p99", "locked out", "MiB a process", "figure"),
        ),
        [
            (
                *(one["processes"], one["accounts"], f"{one['floor_per_s']:,.0f}", f"{one['per_s']:,.0f}"),
                f"{one['ratio']:.2f}",
                *(f"{one[field]:,.0f}" for field in ("floor_p50_us", "floor_p99_us", "p50_us", "p99_us")),
                f"{one['floor_failed']}, {one['failed']}",
                f"{one['memory_mib']:.0f}",
                at_least(one["ratio"], one["wanted"]) if one["wanted"] else "",
            )
            for one in rows
        ],
    )


def main() -> None:
    said = options(seconds=1.0, processes=",".join(map(str, PROCESSES)), stores="")
    results = []
    for contender in CONTENDERS:
        if said.stores not in contender.name:
            continue
        with running(contender.server) as (where, write_us), tempfile.TemporaryDirectory(prefix="bursar-") as journals:
            url = contender.url.format(where, journals)
            rows = [
                row
                for processes in map(int, said.processes.split(","))
                for row in figures(contender, url, processes, said.seconds)
            ]
        show(contender.name, write_us, rows)
        results += [one | {"write_us": write_us} for one in rows]
    save(said.json, results)


if __name__ == "__main__":
    main()
