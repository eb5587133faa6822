"""Policies: the budgets of a world."""

from __future__ import annotations

from random import Random
from typing import Any

from bursar import Budget

LEVELS = ("org", "team", "project", "user", "customer", "workflow", "agent", "run")
WINDOWS = ("total", "total", "minute", "hour", "day", "rolling 1m", "rolling 10m")


def usd(nanos: int) -> str:
    return f"{nanos // 10**9}.{nanos % 10**9:09d} USD"


def budgets(
    random: Random, levels: tuple[str, ...], *, strict: bool, open: bool, scale: int, beside: float
) -> list[Budget]:
    """A path of that many levels, of which one is tight; and perhaps a rate, slots, and a limit of steps."""
    estimate = "strict" if strict else "learned"
    unreachable = "open" if open else "closed"
    marked = random.random() < 0.4
    found = []
    tight = random.choice(levels)
    for level in levels:
        if level != "org" and random.random() < 0.2:
            continue
        limit = random.choice((1_000, 5_000, 10_000, 20_000) if level == tight else (50_000, 200_000)) * scale
        found.append(
            Budget(
                level,
                usd(limit),
                window=random.choice(WINDOWS),
                per=() if level == "org" else level,
                estimate=estimate,
                on_unreachable=unreachable,
                thresholds=_ladder(random) if marked and random.random() < 0.5 else (),
                mode="shadow" if random.random() < 0.05 else "enforce",
            )
        )
    wait = random.choice(("refuse", "refuse", "refuse", "wait 500ms"))
    others = {
        "rate": random.choice(("12 requests/minute", "120 requests/minute", "6000 tokens/minute")),
        "flight": f"{random.randrange(1, 7)} slots",
        "steps": f"{random.choice((5, 20, 60))} requests",
    }
    for name, limit in others.items():
        if random.random() < beside:
            per = "run" if name == "steps" else ()
            found.append(Budget(name, limit, per=per, on_exceed=wait, on_unreachable=unreachable))
    return found


def _ladder(random: Random) -> list[dict[str, Any]]:
    ladder: list[dict[str, Any]] = [{"at": "50%", "action": "notify"}]
    if random.random() < 0.3:
        ladder.append({"at": "60%", "action": "downgrade", "models": {"coarse": "fine"}})
    if random.random() < 0.3:
        ladder.append({"at": "70%", "action": "clamp", "max_output_tokens": 20})
    if random.random() < 0.4:
        ladder.append({"at": "90%", "action": random.choice(("block", "kill", "ask"))})
    return ladder
