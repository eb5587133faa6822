"""What a guard adds to a call: the import, a guarded call per store, and LangChain's `invoke`, guarded and not.

Run: `python bench/bench_calls.py`. The peer, agentbudget (PyPI), is timed where it is installed; it adds up answers in a float
after each call, without a reservation, a store or attribution. shekel has no call to time: it lives inside patched clients.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from measure import at_most, in_turns, table

from bursar import Budget, Bursar, Usage

MESSAGES = [{"role": "user", "content": "cat " * 1_000}]
USED = Usage(input_tokens=1_000, output_tokens=420)
BUDGETS = (
    Budget("run", "1_000 USD", per="run"),
    Budget("team", "1_000_000 USD", window="month", per="team"),
    Budget("tokens", "1_000_000_000_000 tokens"),
    Budget("rate", "100_000_000 requests/minute"),
)
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_764_000_000,
    "model": "gpt-4o-2024-08-06",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "dog"}}],
    "usage": {"prompt_tokens": 1_000, "completion_tokens": 420, "total_tokens": 1_420},
}


def stores(folder: str) -> dict[str, str]:
    return {
        "memory": "memory:",
        "SQLite process": f"sqlite:///{folder}/process.db?durability=process",
        "SQLite full": f"sqlite:///{folder}/full.db",
    }


def imports() -> None:
    """Fresh interpreters, in turns; what an empty one takes is taken off."""
    works = {
        "import bursar": "import bursar",
        "from bursar import Bursar, Budget": "from bursar import Bursar, Budget",
        "nothing": "pass",
    }
    taken: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(15):
        for name, source in works.items():
            begun = time.perf_counter()
            subprocess.run([sys.executable, "-c", source], check=True)
            taken[name].append((time.perf_counter() - begun) * 1_000)
    empty = statistics.median(taken.pop("nothing"))
    found = [(name, statistics.median(times) - empty) for name, times in taken.items()]
    rows = [(name, f"{ms:.0f}", at_most(ms, 100, " ms")) for name, ms in found]
    table("Import, beyond an empty interpreter", ("statement", "ms, median", "figure"), rows)


def guarded(guard: Bursar, **said: Any) -> Callable[[], None]:
    def run() -> None:
        with guard.call("openai", "gpt-4o", max_output_tokens=500, **said) as call:
            call.settle(USED)

    return run


def calls(folder: str) -> None:
    rows: list[tuple[object, ...]] = []
    for name, url in stores(folder).items():
        with Bursar(url, budgets=BUDGETS) as guard, guard.scope(team="research", agent="planner", run="r-17"):
            works = {"counted": guarded(guard, input_tokens=1_000), "measured": guarded(guard, messages=MESSAGES)}
            found = in_turns(works, 100)
        rows.append((f"Bursar, {name}", f"{found['counted']:.0f}", f"{found['measured']:.0f}"))
    rows.append(("agentbudget (after the call, in memory)", agentbudget(), ""))
    table(
        "A guarded call, estimate to record, four accounts",
        ("guard", "us, tokens given", "us, 4,000 bytes measured"),
        rows,
    )


def agentbudget() -> str:
    """The peer's whole work on one answer."""
    if find_spec("agentbudget") is None:
        return "not installed"
    from agentbudget import AgentBudget  # type: ignore[import-not-found]

    usage = SimpleNamespace(prompt_tokens=1_000, completion_tokens=420)
    answer = SimpleNamespace(model="gpt-4o", usage=usage)
    with AgentBudget("$1000000", max_repeated_calls=10**9).session() as session:
        return f"{in_turns({'wrap': lambda: session.wrap(answer)}, 300)['wrap']:.0f}"


def langchain(folder: str) -> None:
    """The real ChatOpenAI, its HTTP client answered in memory, so that the wire does not hide what the guard adds."""
    if find_spec("bursar_langchain") is None or find_spec("langchain_openai") is None:
        print("\nLangChain is not installed: skipped.")
        return
    import httpx
    from langchain_openai import ChatOpenAI

    from bursar_langchain import BursarCallbackHandler

    transport = httpx.MockTransport(lambda request: httpx.Response(200, json=CHAT))
    model = ChatOpenAI(
        model="gpt-4o", api_key="any", max_tokens=500, max_retries=0, http_client=httpx.Client(transport=transport)
    )
    prompt = [("user", "cat " * 1_000)]
    works: dict[str, Callable[[], object]] = {"unguarded": lambda: model.invoke(prompt)}
    guards = {name: Bursar(url, budgets=BUDGETS) for name, url in stores(folder).items()}

    def invoke(guard: Bursar) -> Callable[[], object]:
        config = {"callbacks": [BursarCallbackHandler(guard, team="research", agent="planner")]}
        return lambda: model.invoke(prompt, config)  # type: ignore[arg-type]

    works |= {name: invoke(guard) for name, guard in guards.items()}
    found = in_turns(works, 20, rounds=31)
    bare = found.pop("unguarded")
    rows: list[tuple[object, ...]] = [("unguarded", f"{bare / 1_000:.2f}", "", "")]
    for name, us in found.items():
        added_ms = (us - bare) / 1_000
        figure = at_most(added_ms, 0.5, " ms") if name == "SQLite process" else ""
        rows.append((f"guarded, {name}", f"{us / 1_000:.2f}", f"{added_ms:.2f}", figure))
    table("LangChain: ChatOpenAI.invoke", ("call", "ms, median", "added", "figure"), rows)
    for guard in guards.values():
        guard.close()


def main() -> None:
    imports()
    with tempfile.TemporaryDirectory() as folder:
        calls(folder)
    with tempfile.TemporaryDirectory() as folder:
        langchain(folder)


if __name__ == "__main__":
    main()
