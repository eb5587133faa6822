"""The pair that the store benchmarks time: reserve and settle over four accounts, one of them a rate."""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable

from bursar.accounts import Rule
from bursar.commands import Command, Ended, Reserve, Settle

TTL_US = 600_000_000
Lines = tuple[tuple[Rule, int], ...]
_numbers = itertools.count()


def next_id() -> str:
    """An id as the guard makes them: it begins with the time; here the process and a number follow."""
    return f"{time.time_ns() // 1_000:014x}-{os.getpid():08x}{next(_numbers):08x}"


def _rule(budget: str, unit: str, scope: dict[str, str], limit: int, period_us: int = 0) -> Rule:
    key = json.dumps([budget, unit, f"/{period_us}" if period_us else "total UTC", scope, 0])
    kind = "refill" if period_us else "window"
    return Rule(key, budget, json.dumps(scope), unit, kind, limit, period_us=period_us)  # type: ignore[arg-type]


LINES: Lines = (
    (_rule("per run", "USD", {"run": "r-17"}, 10**15), 7_500_000),
    (_rule("team", "USD", {"team": "research"}, 10**15), 7_500_000),
    (_rule("tokens", "tokens", {}, 10**15), 1_500),
    (_rule("rate", "requests", {}, 10**8, 60_000_000), 1),
)
TAGS = (
    "org",
    "team",
    "project",
    "user",
    "customer",
    "workflow",
    "agent",
    "run",
    "tool",
    "connection",
    "provider",
    "model",
)
DRAFT = {
    "path": ["r-17"],
    "tags": {
        "org": "acme",
        "team": "research",
        "agent": "planner",
        "run": "r-17",
        "provider": "openai",
        "model": "gpt-4o",
        "connection": "openai",
    },
    "cost_nanos": 7_500_000,
    "usage": {"input_tokens": 1_000, "output_tokens": 500},
    "price_version": "2026-11-20",
}
ACTUALS = {"USD": 6_500_000, "tokens": 1_400, "requests": 1}
USAGE = {"input_tokens": 1_000, "output_tokens": 400}
FACTS = {"model_answered": "gpt-4o-2024-08-06", "latency_ms": 150}


def own(lines: Lines, name: str) -> Lines:
    """The same limits on accounts that nobody else has."""
    scope = json.dumps({"run": name})
    return tuple((rule._replace(key=f"{rule.key} {name}", scope=scope), amount) for rule, amount in lines)


def commands(lines: Lines = LINES, version: int = 0) -> tuple[Reserve, Settle]:
    """A reserve and its settle, under a new id; `version`: of the policy that is in the store."""
    id = next_id()
    return (
        Reserve(id, lines, TTL_US, DRAFT, version=version),
        Settle(id, ACTUALS, ACTUALS["USD"], USAGE, facts=FACTS),
    )


def pair(execute: Callable[[Command], object], pairs: int = 20_000) -> Callable[[], None]:
    """One reserve and settle through the store, as often as `pairs`; the commands are made beforehand, as the guard makes them."""
    made = iter([commands() for _ in range(pairs)])

    def run() -> None:
        reserve, settle = next(made)
        execute(reserve)
        assert type(execute(settle)) is Ended

    return run
