"""What the benchmarks share: timing in turns, the table, and the figure that each row is held against."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence


def in_turns(works: Mapping[str, Callable[[], object]], calls: int, *, rounds: int = 15) -> dict[str, float]:
    """The median microseconds of one call of each work, timed A B A B, so that the machine's moods fall on all of them."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        for _ in range(calls):
            work()
    gc.collect()
    for _ in range(rounds):
        for name, work in works.items():
            begun = time.perf_counter_ns()
            for _ in range(calls):
                work()
            times[name].append((time.perf_counter_ns() - begun) / calls / 1_000)
    return {name: statistics.median(taken) for name, taken in times.items()}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table."""
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def at_most(value: float, limit: float, unit: str = "") -> str:
    """A figure beside its limit."""
    return f"{'met' if value <= limit else 'MISSED'}: at most {limit:g}{unit}"


def at_least(value: float, limit: float, unit: str = "") -> str:
    """A figure beside the least that it should be."""
    return f"{'met' if value >= limit else 'MISSED'}: at least {limit:g}{unit}"
