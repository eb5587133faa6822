"""What the benchmarks share: timing in turns, the table, the figure that each row is held against, a provider."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# In a process of its own, so that it does not take the clients' turns.
PROVIDER = """
import sys
from bursar.testing.provider import Answer, Provider
with Provider(Answer(input_tokens=100, output_tokens=20, chunks=20)) as provider:
    print(provider.url, flush=True)
    sys.stdin.read()
"""


@contextmanager
def provider() -> Iterator[str]:
    """The URL of a provider that runs meanwhile."""
    with subprocess.Popen(
        [sys.executable, "-c", PROVIDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.communicate()


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


def options(**defaults: Any) -> argparse.Namespace:
    """What the command line says: the first of these by its position, the others by name, and `--json` for `save`."""
    parser = argparse.ArgumentParser()
    for number, (name, value) in enumerate(defaults.items()):
        given = {"nargs": "?"} if number == 0 else {}
        parser.add_argument(f"{'--' if number else ''}{name}", type=type(value), default=value, **given)  # type: ignore[arg-type]
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def save(file: Path | None, results: Sequence[Mapping[str, Any]]) -> None:
    """The results as JSON, with what they were measured on, for bench/plots.py."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        machine = {"cores": os.cpu_count(), "python": platform.python_version(), "load": os.getloadavg()[2]}
        file.write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n", "utf-8")


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
