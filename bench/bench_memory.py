"""The memory of a process that guards its calls, on each store, beside one that has only the driver open.

Run: `python bench/bench_memory.py [CALLS]`. Each figure is of a fresh interpreter (proportional set size, Linux), after CALLS
guarded calls (default 500) and after ten times as many.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import servers
from measure import options, table

GUARDED = """
from bursar import Budget, Bursar, Usage
budgets = [
    Budget("run", "1_000 USD", per="run"),
    Budget("team", "1_000_000 USD", window="month", per="team"),
    Budget("tokens", "1_000_000_000_000 tokens"),
]
with Bursar({url!r}, budgets=budgets) as guard, guard.scope(team="research", run="r-1"):
    for number in range(10 * {calls}):
        with guard.call("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500) as call:
            call.settle(Usage(input_tokens=1_000, output_tokens=420))
        if number + 1 == {calls}:
            print(pss_bytes())
    print(pss_bytes())
"""
DRIVERS = {
    "SQLite process": "import sqlite3; kept = sqlite3.connect({where!r}); kept.execute('SELECT 1')",
    "PostgreSQL": "import psycopg; kept = psycopg.connect({where!r}); kept.execute('SELECT 1')",
    "Redis": "import redis; kept = redis.Redis.from_url({where!r}); kept.ping()",
}


def memory_mib(source: str) -> list[float]:
    """What a fresh interpreter prints after running this, in MiB."""
    begin = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from turns import pss_bytes\n"
    done = subprocess.run([sys.executable, "-c", begin + source], capture_output=True, text=True, check=True)
    return [int(value) / 2**20 for value in done.stdout.split()]


def main() -> None:
    calls = options(calls=500).calls
    (bare,) = memory_mib("print(pss_bytes())")
    rows: list[tuple[object, ...]] = [("Python itself", f"{bare:.0f}", "", "")]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bursar-bench-"))
        postgres, redis = (stack.enter_context(given)[0] for given in (servers.postgres(), servers.redis("everysec")))
        places = {
            "memory": ("", "memory:"),
            "SQLite process": (f"{folder}/raw.db", f"sqlite:///{folder}/bursar.db?durability=process"),
            "PostgreSQL": (postgres, postgres),
            "PostgreSQL, leased": (postgres, f"{postgres}&leases={folder}&durability=process"),
            "Redis": (redis, redis),
            "Redis, leased": (redis, f"{redis}?leases={folder}&durability=process"),
        }
        for name, (where, url) in places.items():
            driver = DRIVERS.get(name.partition(",")[0])
            alone = f"{memory_mib(driver.format(where=where) + '; print(pss_bytes())')[0]:.0f}" if driver else ""
            memory_mib(GUARDED.format(url=url, calls=1))  # whoever makes the schema loads what the others do not
            first, last = memory_mib(GUARDED.format(url=url, calls=calls))
            rows.append((name, alone, f"{first:.0f}", f"{last:.0f}"))
    after = (f"Bursar, {many:,} calls" for many in (calls, 10 * calls))
    table("Memory of a process, MiB", ("store", "its driver alone", *after), rows)


if __name__ == "__main__":
    main()
