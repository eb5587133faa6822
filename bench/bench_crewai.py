"""What guarding adds to CrewAI: a call of its client, and a crew of one task, with the guard and without it, in turns."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.update(CREWAI_DISABLE_TELEMETRY="true", CREWAI_TRACING_ENABLED="false", OTEL_SDK_DISABLED="true")

from crewai import LLM, Agent, Crew, Task
from measure import at_most, in_turns, provider, table

from bursar import Budget, Bursar
from bursar_crewai import BursarCrew

PROMPT = " ".join(["cat"] * 1_000)  # 4,000 bytes
BUDGETS = [
    Budget("run", limit="100_000 USD", per="run"),
    Budget("team", limit="100_000 USD", per="team"),
    Budget("month", limit="1_000_000 USD", window="month"),
    Budget("rate", limit="100_000_000 requests/minute"),
]
STORES = {"memory": "memory:", "sqlite, process": "sqlite:///{}/process.db?durability=process"}
LIMIT_MS = 1.5


def measured(way: Callable[[], object], guard: BursarCrew) -> tuple[float, float]:
    """The milliseconds of one call without the guard, and what the guard adds."""

    def work(scope: Callable[[], Any]) -> None:
        with scope():
            way()

    found = in_turns({"plain": lambda: work(nullcontext), "guarded": lambda: work(guard.scope)}, 1, rounds=300)
    return found["plain"] / 1_000, (found["guarded"] - found["plain"]) / 1_000


def main() -> None:
    logging.disable()  # CrewAI warns at every call that it counts tokens by their letters
    rows = []
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder, provider() as url:
        os.environ["CREWAI_STORAGE_DIR"] = folder
        llm = LLM(model="gpt-4o", base_url=f"{url}/v1", api_key="local", max_tokens=100)
        agent = Agent(role="reader", goal="Read.", backstory="Reads.", llm=llm)
        crew = Crew(agents=[agent], tasks=[Task(description=PROMPT, expected_output="one word", agent=agent)])
        ways: dict[str, Callable[[], object]] = {
            "LLM.call": lambda: llm.call(PROMPT),
            "LLM.acall": lambda: loop.run_until_complete(llm.acall(PROMPT)),
            "Crew.kickoff": crew.kickoff,
        }
        for store, address in STORES.items():
            with Bursar(address.format(folder), budgets=BUDGETS) as bursar:
                guard = BursarCrew(bursar, team="research")
                for name, way in ways.items():
                    plain_ms, added_ms = measured(way, guard)
                    figure = at_most(added_ms, LIMIT_MS, " ms")
                    rows.append((store, name, f"{plain_ms:.2f}", f"{added_ms:.2f}", figure))
    loop.close()
    columns = ("store", "way", "without a guard, ms", "what the guard adds, ms", "figure")
    table("Guarded over unguarded: CrewAI over HTTP, four accounts, medians", columns, rows)


if __name__ == "__main__":
    main()
