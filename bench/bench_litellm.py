"""What guarding adds to LiteLLM: calls with the guard installed against the same without it, in turns; and to its import."""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # else it asks the network for prices when it is imported

import litellm
from litellm.integrations.custom_logger import CustomLogger
from measure import at_most, in_turns, provider, table

from bursar import Budget, Bursar
from bursar_litellm import install

MESSAGES = [{"role": "user", "content": " ".join(["cat"] * 1_000)}]  # 4,000 bytes
BUDGETS = [
    Budget("run", limit="100_000 USD", per="run"),
    Budget("team", limit="100_000 USD", per="team"),
    Budget("month", limit="1_000_000 USD", window="month"),
    Budget("rate", limit="100_000_000 requests/minute"),
]
STORES = {
    "memory": "memory:",
    "sqlite, process": "sqlite:///{}/process.db?durability=process",
    "sqlite, full": "sqlite:///{}/full.db",
}
UNLIMITED = "sqlite, full"  # what an fsync takes is the disk's doing
LIMIT_MS, IMPORT_LIMIT_MS = 0.5, 50
# Several calls a turn: what LiteLLM does in the background after a call falls on the calls of the same turn.
CALLS, ROUNDS = 10, 20
PLAIN = {name: getattr(litellm, name) for name in ("completion", "acompletion")}
LISTS = [
    *("callbacks", "input_callback", "success_callback", "failure_callback"),
    *("_async_input_callback", "_async_success_callback", "_async_failure_callback"),
]
IMPORTS = """
import time, litellm
begun = time.perf_counter()
import bursar_litellm
print((time.perf_counter() - begun) * 1_000)
"""


def ways(url: str, functions: dict[str, Any], loop: asyncio.AbstractEventLoop) -> dict[str, Callable[[], object]]:
    call = {"model": "openai/gpt-4o", "messages": MESSAGES, "max_tokens": 50, "max_retries": 0}
    call |= {"api_base": f"{url}/v1", "api_key": "local"}
    # The guard would ask for the usage, which is one more event to read.
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    return {
        "completion": lambda: functions["completion"](**call),
        "completion, streamed": lambda: list(functions["completion"](**call, **stream)),
        "acompletion": lambda: loop.run_until_complete(functions["acompletion"](**call)),
    }


def listened(work: Callable[[], object], lists: dict[str, list[Any]]) -> Callable[[], object]:
    """The same work while LiteLLM has these callbacks."""

    def turn() -> None:
        for name, callbacks in lists.items():
            setattr(litellm, name, callbacks)
        work()

    return turn


def imports() -> None:
    """The time of importing the adapter, where LiteLLM and its like have been imported."""
    taken = [
        float(subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    added_ms = statistics.median(taken)
    rows = [(f"{added_ms:.0f}", at_most(added_ms, IMPORT_LIMIT_MS, " ms"))]
    table("What importing bursar_litellm adds to importing litellm", ("ms", "figure"), rows)


def main() -> None:
    rows, idle = [], CustomLogger()
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder, provider() as url:
        plain = ways(url, PLAIN, loop)
        for store, address in STORES.items():
            with Bursar(address.format(folder), budgets=BUDGETS) as bursar:
                none: dict[str, list[Any]] = {name: [] for name in LISTS}
                uninstall = install(bursar, team="research")
                guarded = ways(url, {name: getattr(litellm, name) for name in PLAIN}, loop)
                with_guard = {name: list(getattr(litellm, name)) for name in LISTS}
                for name in plain:
                    works = {
                        "plain": listened(plain[name], none),
                        "logged": listened(plain[name], {one: [idle] for one in LISTS}),
                        "guarded": listened(guarded[name], with_guard),
                    }
                    plain_us, logged_us, guarded_us = in_turns(works, CALLS, rounds=ROUNDS).values()
                    times = (plain_us, logged_us - plain_us, guarded_us - plain_us)
                    figure = "" if store == UNLIMITED else at_most(times[2] / 1_000, LIMIT_MS, " ms")
                    rows.append((store, name, *(f"{taken_us / 1_000:.2f}" for taken_us in times), figure))
                uninstall()
    loop.close()
    columns = ("store", "call", "without a guard, ms", "a logger that does nothing adds", "the guard adds", "figure")
    table("Guarded over unguarded: LiteLLM over HTTP, four accounts, medians", columns, rows)
    imports()


if __name__ == "__main__":
    main()
