"""Replaying records under another policy says what really running under it says: the same refused calls, the same dollars."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from itertools import count
from typing import Any, NamedTuple

import pytest

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.foresight.outcomes import effects
from bursar.foresight.replay import replay
from bursar.reservation import Reservation
from bursar.testing import ManualClock
from bursar.testing.clock import START_US

SECOND_US = 1_000_000
DAY_S = 86_400


class Doing(NamedTuple):
    """One call that somebody makes at a time: a model call, or a call of the tool `search`. `end`: settle, refused, lost."""

    at_us: int
    tags: dict[str, str]
    model: str
    input_tokens: int
    most_output: int
    output_tokens: int
    busy_us: int
    end: str = "settle"


class Gone(Exception):
    """An SDK's error: the request was refused before anything was generated."""

    status_code = 429


def a_day(seed: int, calls: int = 400) -> list[Doing]:
    """A day of five agents in two teams, whose runs overlap."""
    draw = random.Random(seed)
    day = []
    for number in range(calls):
        agent = draw.randrange(5)
        tags = {"team": f"team-{agent % 2}", "agent": f"agent-{agent}", "run": f"run-{agent}-{number // 40}"}
        model = draw.choice(["gpt-4o", "gpt-4o", "gpt-4o-mini", "claude-sonnet-4-5", ""])
        most = draw.choice([100, 500, 2_000])
        day.append(
            Doing(
                START_US + draw.randrange(DAY_S * SECOND_US),
                tags,
                model,
                draw.randrange(50, 8_000),
                most,
                draw.randrange(most + 1),
                draw.randrange(1, 60 * SECOND_US),
                draw.choice(["settle"] * 8 + ["refused", "lost"]),
            )
        )
    return sorted(day, key=lambda one: one.at_us)


def live(bursar: Bursar, clock: ManualClock, day: Iterable[Doing]) -> dict[Doing, int | None]:
    """Really make the calls at their times; what each cost, None for a refused one."""
    order = count()
    events: list[tuple[int, int, Doing, Reservation | None]] = [(one.at_us, next(order), one, None) for one in day]
    heapq.heapify(events)
    said: list[tuple[Doing, int | None]] = []
    while events:
        at_us, _, one, reservation = heapq.heappop(events)
        clock.set(at_us)
        if reservation is not None:
            said.append((one, finish(one, reservation)))
            continue
        try:
            reservation = reserve(bursar, one)
        except BudgetExceeded:
            said.append((one, None))
        else:
            heapq.heappush(events, (at_us + one.busy_us, next(order), one, reservation))
    return {key(one): cost for one, cost in said}


def reserve(bursar: Bursar, one: Doing) -> Reservation:
    with bursar.scope(**one.tags):
        if not one.model:
            block = bursar.tool("search", cost="0.01 USD")
            return block.__enter__()
        provider = "anthropic" if one.model.startswith("claude") else "openai"
        return bursar.reserve(
            provider, one.model, input_tokens=one.input_tokens, max_output_tokens=one.most_output, retries=1
        )


def finish(one: Doing, reservation: Reservation) -> int:
    record: Any
    if one.end == "refused":
        record = reservation.settle_error(Gone())
    elif one.end == "lost":
        record = reservation.settle_error(TimeoutError())
    elif one.model:
        record = reservation.settle(Usage(input_tokens=one.input_tokens, output_tokens=one.output_tokens))
    else:
        record = reservation.settle(None)
    return int(record.cost_nanos)


def key(one: Any) -> Any:
    return one.at_us, one.tags["agent"]


def budgets(share: int, **options: Any) -> list[Budget]:
    """A policy, and with `share=2` the same with halved limits."""
    return [
        Budget("day", f"{6 / share:.2f} USD", window="day", **options),
        Budget("team", f"{0.5 / share:.2f} USD", per="team", window="hour", **options),
        Budget("agent", f"{220_000 // share} tokens", per="agent", window="rolling 6h", **options),
        Budget("tools", f"{30 // share} calls", per="agent", **options),
        Budget("rate", f"{4 // share} requests/minute", per="team", **options),
        Budget("failures", f"{8 // share} failures/hour", per="connection", **options),
        Budget("run", f"{1.60 / share:.2f} USD", per="run", **options),
    ]


@pytest.mark.parametrize("seed", [1, 5, 6])
def test_a_replay_under_halved_budgets_is_what_running_under_them_is(seed: int) -> None:
    day = a_day(seed)
    clock = ManualClock()
    with Bursar("memory:", budgets(1, estimate="strict"), clock=clock) as recorded:
        first = live(recorded, clock, day)
        entries = list(recorded.store.entries())
    clock = ManualClock()
    with Bursar("memory:", budgets(2, estimate="strict"), clock=clock) as halved:
        second = live(halved, clock, day)
    outcomes = replay(entries, {"budgets": budgets(2, estimate="strict")})
    replayed = {
        (one.past.reserved_us, one.past.tags["agent"]): None if one.is_refused else one.cost_nanos for one in outcomes
    }
    assert replayed == second
    refused = [sum(cost is None for cost in run.values()) for run in (first, second)]
    assert 0 < refused[0] < refused[1] < len(day)
    assert sum(cost or 0 for cost in second.values()) < sum(cost or 0 for cost in first.values())
    acted = effects(outcomes)
    assert sum(one.refused for one in acted.values()) == refused[1] - sum(
        one.was_refused and one.is_refused for one in outcomes
    )
    assert len(acted) >= 4, f"several budgets are at work, not {acted}"
