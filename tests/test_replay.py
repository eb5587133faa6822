"""Replaying records under another policy says what really running under it says: the same refused calls, the same dollars."""

from __future__ import annotations

import heapq
import json
import random
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from bursar import Budget, BudgetExceeded, Bursar, Override, PriceBook, Threshold, Usage
from bursar.cli import main
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


# -- what else a policy does to a call -------------------------------------------------------------------------------------


CALL_NANOS = 7_500_000  # 1,000 tokens in and 500 out of gpt-4o
USAGE = Usage(input_tokens=1_000, output_tokens=500)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def a_call(bursar: Bursar, clock: ManualClock, busy_s: float = 0.0, model: str = "gpt-4o", **tags: str) -> None:
    with bursar.scope(**{"agent": "a", "run": "r", **tags}):
        reservation = bursar.reserve("openai", model, input_tokens=1_000, max_output_tokens=500)
        clock.advance(busy_s)
        reservation.settle(USAGE)
    clock.advance(us=1)  # ids rise with time


def test_a_throttle_slows_the_call_and_all_that_came_after_it_in_its_run(clock: ManualClock) -> None:
    with Bursar("memory:", [], clock=clock) as bursar:
        for second in range(6):
            clock.set(START_US + second * SECOND_US)
            a_call(bursar, clock)
        clock.set(START_US + 60 * SECOND_US)
        a_call(bursar, clock, run="another")
        entries = list(bursar.store.entries())
    outcomes = replay(entries, {"budgets": [Budget("rate", "4 requests/minute", on_exceed="wait 60s")]})
    sent = [(one.sent_us or 0) - START_US for one in outcomes]
    waited = [one.slowed.get("rate", 0) for one in outcomes]
    # four at once; then one each 15 seconds; the last two come when the agent gets to them
    assert sent[:6] == [0, 1_000_000, 2_000_000, 3_000_000, 15_000_000, 30_000_000]
    assert waited[:6] == [0, 0, 0, 0, 11_000_000, 14_000_000]
    assert waited[6] == 0
    assert effects(outcomes)["rate"].slowed_us == 25_000_000
    refused = replay(entries, {"budgets": [Budget("rate", "4 requests/minute", on_exceed="wait 5s")]})
    assert [one.by for one in refused] == ["", "", "", "", "rate", "rate", ""]


def test_a_ladder_swaps_and_cuts_and_says_what_it_saved(clock: ManualClock) -> None:
    ladder = [
        Threshold("10%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}),
        Threshold("20%", "clamp", max_output_tokens=100),
        Threshold("24%", "ask"),
    ]
    with Bursar("memory:", [], clock=clock) as bursar:
        for _ in range(60):
            a_call(bursar, clock)
        entries = list(bursar.store.entries())
    outcomes = replay(entries, {"budgets": [Budget("day", "0.05 USD", window="day", thresholds=ladder)]})
    assert [(dict(one.swapped), one.cost_nanos) for one in outcomes[:3]] == [
        ({}, CALL_NANOS),
        ({"day": "gpt-4o-mini"}, 450_000),
        ({"day": "gpt-4o-mini"}, 450_000),
    ]
    assert [one.cost_nanos for one in outcomes if not one.is_refused][-1] == 1_000 * 150 + 100 * 600
    asked = [one for one in outcomes if one.is_refused]
    assert asked
    assert all("asks before more is spent" in one.why for one in asked)
    acted = effects(outcomes)["day"]
    assert acted.saved_nanos == sum(one.recorded_nanos - one.cost_nanos for one in outcomes)
    assert (acted.swapped, acted.refused) == (60 - 1 - len(asked), len(asked))


def test_a_swap_of_the_past_is_undone_before_the_new_policy_has_its_say(clock: ManualClock) -> None:
    """The model that was asked for is asked for again; what it would have cost is worked out from what the other used."""
    ladder = [Threshold("1%", "downgrade", models={"gpt-4o": "gpt-4o-mini"})]
    with Bursar("memory:", [Budget("day", "0.5 USD", thresholds=ladder)], clock=clock) as bursar:
        for _ in range(3):
            a_call(bursar, clock)
        entries = list(bursar.store.entries())
    assert [one.past.cost_nanos for one in replay(entries, {"budgets": []})] == [CALL_NANOS, 450_000, 450_000]
    assert [one.cost_nanos for one in replay(entries, {"budgets": []})] == [CALL_NANOS] * 3


def test_models_are_mapped_within_and_across_providers(clock: ManualClock) -> None:
    with Bursar("memory:", [], clock=clock) as bursar:
        a_call(bursar, clock)
        a_call(bursar, clock, model="gpt-4.1")
        a_call(bursar, clock, model="o3")
        entries = list(bursar.store.entries())
    models = {"gpt-4o": "gpt-4o-mini", "gpt-4.*": "anthropic/claude-sonnet-4-5", "o3": "no-such-model"}
    first, second, third = replay(entries, {"budgets": [Budget("b", "5 USD")]}, models=models)
    assert (first.cost_nanos, first.swapped) == (450_000, {"(map)": "gpt-4o-mini"})
    assert second.cost_nanos == 1_000 * 3_000 + 500 * 15_000
    assert (third.by, third.is_refused) == ("(no price)", True)


def test_the_policys_prices_are_taken_where_it_has_some(clock: ManualClock) -> None:
    with Bursar("memory:", [], clock=clock) as bursar:
        a_call(bursar, clock)
        entries = list(bursar.store.entries())
    halved = PriceBook.packaged().with_overrides([Override(model="gpt-4o", provider="openai", discount="50%")])
    given = {"budgets": [], "prices": halved}
    assert [one.cost_nanos for one in replay(entries, given)] == [CALL_NANOS]
    assert [one.cost_nanos for one in replay(entries, given, reprice=True)] == [CALL_NANOS // 2]


def test_what_was_spent_before_is_on_the_books_as_far_as_windows_reach(clock: ManualClock) -> None:
    with Bursar("memory:", [], clock=clock) as bursar:
        for hour in range(6):
            clock.set(START_US + hour * 3_600 * SECOND_US)
            a_call(bursar, clock)
        entries = list(bursar.store.entries())
    since = START_US + 3 * 3_600 * SECOND_US
    for window, refused in (("day", [False, True, True]), ("hour", [False] * 3), ("rolling 2h", [False] * 3)):
        budget = Budget("b", "0.031 USD", window=window)  # four calls
        outcomes = replay(entries, {"budgets": [budget]}, since_us=since)
        assert [one.is_refused for one in outcomes] == refused, window
    assert len(replay(entries, {"budgets": []}, since_us=since, until_us=since + 1)) == 1


def test_a_call_that_had_been_refused_is_asked_for_again_at_its_estimate(clock: ManualClock) -> None:
    with Bursar("memory:", [Budget("small", "0.01 USD")], clock=clock) as bursar:
        a_call(bursar, clock)
        with pytest.raises(BudgetExceeded):
            a_call(bursar, clock)
        entries = list(bursar.store.entries())
    outcomes = replay(entries, {"budgets": [Budget("large", "1 USD")]})
    assert [(one.was_refused, one.is_refused, one.cost_nanos) for one in outcomes] == [
        (False, False, CALL_NANOS),
        (True, False, CALL_NANOS),
    ]
    assert effects(outcomes) == {}
    assert [one.is_other for one in outcomes] == [False, True]


def test_costs_that_cannot_be_refused_and_corrections_are_booked(clock: ManualClock) -> None:
    with Bursar("memory:", [], clock=clock) as bursar, bursar.scope(agent="a", run="r"):
        bursar.charge("0.02 USD", tool="crawler")
        clock.advance(1)
        late = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=1_000)
        clock.advance(700)
        assert bursar.store.sweep() == 1
        late.settle(USAGE)
        entries = list(bursar.store.entries())
    outcomes = replay(entries, {"budgets": [Budget("tiny", "0.021 USD")]})
    assert [(one.past.kind, one.cost_nanos, one.is_refused) for one in outcomes] == [
        ("charge", 20_000_000, False),
        ("settlement", 0, True),
    ]
    assert outcomes[1].recorded_nanos == CALL_NANOS


def test_what_a_framework_nests_is_held_on_every_levels_accounts(clock: ManualClock) -> None:
    """The outer run's budget holds for what inner runs spend, as it did when they were recorded."""
    budgets = [Budget("run", "0.05 USD", per="run")]
    with Bursar("memory:", budgets, clock=clock) as bursar, bursar.scope(run="outer", agent="planner"):
        for inner in range(5):
            with bursar.scope(run=f"inner-{inner}", agent="worker"):
                bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500).settle(USAGE)
        entries = list(bursar.store.entries())
    refused = replay(entries, {"budgets": [Budget("run", "0.025 USD", per="run")]})
    assert [one.by for one in refused] == ["", "", "", "run", "run"]
    assert "run=outer" in refused[3].why


# -- the command ---------------------------------------------------------------------------------------------------------


def test_the_command_shows_budgets_sums_and_calls_and_changes_nothing(tmp_path: Path, clock: ManualClock) -> None:
    url, policy = f"sqlite:///{tmp_path / 'books.db'}?durability=process", tmp_path / "new.toml"
    with Bursar(url, [Budget("cap", "5 USD")], clock=clock) as bursar:
        for _ in range(4):
            a_call(bursar, clock)
            clock.advance(1)
    policy.write_text('[[budget]]\nname = "half"\nlimit = "0.02 USD"\n')

    def run(*words: str) -> str:
        asked = ["replay", "--policy", str(policy), "--store", url, *words]
        done = CliRunner(env={"COLUMNS": "200"}).invoke(main, asked, catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.output

    rows = [json.loads(line) for line in run("--format", "json").splitlines()]
    assert [(row["budget"], row["refused"], row["saved"]) for row in rows] == [
        ("half", 2, "0.015"),
        ("in all", 2, "0.015"),
    ]
    assert (rows[1]["recorded_usd"], rows[1]["replayed_usd"]) == ("0.03", "0.015")
    assert "4 calls: $0.03 as recorded, $0.015 under this policy." in run()
    calls = [json.loads(line) for line in run("--calls", "--format", "json").splitlines()]
    assert [(call["then"], call["by"]) for call in calls] == [("refused", "half")] * 2
    assert json.loads(run("--since", "1h", "--format", "json"))["calls"] == 0
    assert "gpt-4o-mini" in run("--map", "gpt-4o=gpt-4o-mini", "--calls")
    wrong = CliRunner().invoke(main, ["replay", "--store", url, "--since", "yesterday"])
    assert wrong.exit_code == 2
    assert "7d for a week ago" in wrong.output
    with Bursar(url) as books:
        assert len(list(books.records())) == 4
        assert [status.name for status in books.status()] == ["cap"]
