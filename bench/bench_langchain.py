"""What guarding adds to a LangChain call: `invoke` with the handler against `invoke` without it, in turns."""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from langchain_openai import ChatOpenAI
from measure import at_most, in_turns, provider, table

from bursar import Budget, Bursar
from bursar_langchain import BursarCallbackHandler

PROMPT = " ".join(["cat"] * 1_000)  # 4,000 bytes
BUDGETS = [
    Budget("run", limit="100_000 USD", per="run"),
    Budget("team", limit="100_000 USD", per="team"),
    Budget("month", limit="1_000_000 USD", window="month"),
    Budget("rate", limit="100_000_000 requests/minute"),
]
STORES = {"memory": ("memory:", 0.5), "sqlite, process": ("sqlite:///{}/process.db?durability=process", 0.5)}
SLOW_STORES = {"sqlite, full": ("sqlite:///{}/full.db", None)}


def main() -> None:
    rows = []
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder, provider() as url_of_provider:
        model = ChatOpenAI(model="gpt-4o", base_url=f"{url_of_provider}/v1", api_key="local", max_tokens=50)
        for name, (url, limit_ms) in (STORES | SLOW_STORES).items():
            with Bursar(url.format(folder), budgets=BUDGETS) as guard:
                config: Any = {"callbacks": [BursarCallbackHandler(guard, team="research")]}
                works: dict[str, Callable[[], object]] = {
                    "plain": lambda: model.invoke(PROMPT),
                    "guarded": lambda config=config: model.invoke(PROMPT, config),
                    "plain, async": lambda: loop.run_until_complete(model.ainvoke(PROMPT)),
                    "guarded, async": lambda config=config: loop.run_until_complete(model.ainvoke(PROMPT, config)),
                }
                found = in_turns(works, 1, rounds=200)
            for way in ("", ", async"):
                added_ms = (found[f"guarded{way}"] - found[f"plain{way}"]) / 1_000
                plain_ms = found[f"plain{way}"] / 1_000
                figure = at_most(added_ms, limit_ms, " ms") if limit_ms else ""
                rows.append((f"{name}{way}", f"{plain_ms:.2f}", f"{added_ms:.2f}", figure))
    loop.close()
    columns = ("store", "a call without a guard, ms", "what the guard adds, ms", "figure")
    table("Guarded over unguarded: ChatOpenAI over HTTP, four accounts, medians", columns, rows)


if __name__ == "__main__":
    main()
