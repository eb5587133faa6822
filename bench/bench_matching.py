"""What it takes to find the accounts of a call among 20 budgets. Run: `python bench/bench_matching.py`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from measure import at_most, in_turns, table

from bursar import Budget
from bursar.policy import Policy
from bursar.scope import Scope

UNITS = ("USD", "tokens", "requests", "slots")
TAGS = {
    "org": "acme",
    "team": "research",
    "project": "atlas",
    "user": "ada",
    "agent": "planner",
    "run": "r-17",
}
LIMITS = ("5 USD", "200_000 tokens", "60 requests/minute", "8 slots")


def budgets() -> list[Budget]:
    """Twenty: totals, months, rates and slots; per tag and for all; sixteen of them match the call."""
    names = list(TAGS)
    return [
        Budget(
            f"budget {number}",
            LIMITS[number % 4],
            window="month" if number % 4 < 2 else "total",
            per=names[number % 6] if number % 3 == 0 else (),
            match={"team": ["research", "sales", "support", "ops", "legal"][number % 5]} if number % 4 == 1 else None,
        )
        for number in range(20)
    ]


def main() -> None:
    policy = Policy(budgets())
    scope = Scope(TAGS)
    now_us = time.time_ns() // 1_000

    def matched() -> object:
        return policy.match(scope, UNITS, now_us, "openai", "gpt-4o", "", "openai")

    def afresh() -> object:
        policy._cache.clear()
        return matched()

    def nested() -> object:
        return policy.match(inner, UNITS, now_us, "openai", "gpt-4o", "", "openai")

    inner = Scope({"agent": "reader", "run": "r-18"}, scope)
    works: dict[str, Callable[[], object]] = {
        "the accounts of a call": matched,
        "the same, in a scope inside a scope": nested,
    }
    found = in_turns(works, 5_000) | in_turns({"the first call of a scope": afresh}, 300)
    rows = [(name, f"{us:.2f}", at_most(us, 2, " us") if name in works else "") for name, us in found.items()]
    table("Matching a call against 20 budgets", ("work", "us, median", "figure"), rows)


if __name__ == "__main__":
    main()
