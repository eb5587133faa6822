"""What is reckoned of a loop is what the real guard and law do with it; every cause is found open, and found closed."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bursar import Budget, Bursar, PriceBook, Threshold, Usage
from bursar.cli import main
from bursar.detect import Detectors
from bursar.foresight.exposure import (
    ATTRIBUTION,
    NO_CAP,
    RETRIES,
    TERMINATION,
    VIEW,
    Exposure,
    exposures,
)
from bursar.foresight.loop import Loop, Step, drive
from bursar.foresight.options import Options
from bursar.foresight.reckoning import HORIZON_US, reckon
from bursar.foresight.sightings import ANY_OTHER
from bursar.testing import ManualClock
from bursar.testing.clock import START_US

SECOND_US, MINUTE_US = 1_000_000, 60_000_000
USAGE = Usage(input_tokens=1_000, output_tokens=500)  # $0.0075 of gpt-4o
ANSWER = Step("openai", "gpt-4o", USAGE)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Hundreds of simulated alerts are no news."""
    log = logging.getLogger("bursar")
    level = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(level)


# -- the reckoning and the law -------------------------------------------------------------------------------------------

WAITS = ["refuse", "refuse", "wait 5s", "wait 90s", "wait"]
WINDOWS = ["total", "minute", "hour", "day", "rolling 10m", "rolling 1h", "week", "month"]
LIMITS = {
    "USD": ["0.03 USD", "0.1 USD", "0.5 USD", "2 USD"],
    "tokens": ["5000 tokens", "50000 tokens"],
    "requests": ["3 requests", "40 requests"],
    "calls": ["3 calls", "40 calls"],
    "failures": ["5 failures/minute", "10 failures/hour", "1 failures/second"],
    "rate": ["10 requests/minute", "60 requests/minute", "0.5 USD/hour", "20000 tokens/minute", "7 calls/minute"],
    "slots": ["2 slots"],
}
RATES = ["6 requests/minute", "1 USD/hour", "5000 tokens/minute", "10 calls/minute"]


def a_threshold(draw: random.Random, at: int) -> Threshold:
    action = draw.choice(["notify", "downgrade", "clamp", "throttle", "ask", "block", "kill"])
    models = {"gpt-4o": "gpt-4o-mini"} if draw.random() < 0.8 else {"gpt-*": "gpt-4.1-nano"}
    options: dict[str, Any] = {
        "downgrade": {"models": models},
        "clamp": {"max_output_tokens": draw.choice([50, 200, 1_000])},
        "throttle": {"rate": draw.choice(RATES)},
    }
    return Threshold(f"{at}%", action, **options.get(action, {}))


def a_budget(draw: random.Random, number: int) -> Budget:
    kind = draw.choice(["USD", "USD", "USD", "tokens", "requests", "calls", "rate", "rate", "failures", "slots"])
    options: dict[str, Any] = {
        "per": draw.choice([(), ("agent",), ("run",), ("model",)]),
        "estimate": draw.choice(["learned", "strict"]),
        "mode": draw.choice(["enforce"] * 5 + ["shadow"]),
        "on_exceed": draw.choice(WAITS),
    }
    if kind in ("USD", "tokens", "requests", "calls"):
        options["window"] = draw.choice(WINDOWS)
        marks = sorted(draw.sample(range(10, 101), draw.randrange(4)))
        options["thresholds"] = [a_threshold(draw, at) for at in marks]
    return Budget(f"b{number}", draw.choice(LIMITS[kind]), **options)


def a_case(seed: int) -> tuple[Loop, dict[str, Any], int]:
    """A loop, a policy and a time to begin, by chance."""
    draw = random.Random(seed)
    acting = Detectors(
        velocity="notify", burn="notify", storms="notify", context="notify",
        loops=draw.choice(["block", "ask", "notify", "off", "kill"]), repetitions=draw.choice([2, 3, 5]),
        stale=draw.choice(["ask", "notify"]), stale_steps=draw.choice([4, 16]),
        uncapped=draw.choice(["notify", "block"]), retries=draw.choice(["block", "notify", "off", "ask"]),
        max_steps=draw.choice([None, None, 25]), max_minutes=draw.choice([None, None, 3, 100]),
    )  # fmt: skip
    given = {
        "budgets": [a_budget(draw, number) for number in range(draw.randrange(1, 5))],
        "detectors": draw.choice(["report", "off", acting]),
        "require": draw.choice([()] * 9 + [("team",)]),
    }
    usage = Usage(input_tokens=draw.randrange(10, 5_000), output_tokens=draw.randrange(1, 1_500))
    if draw.random() < 0.3:
        usage = usage.replace(cache_read_tokens=usage.input_tokens // 2)
    tools = [Step(tool=name, cost_nanos=draw.choice([0, 10**6])) for name in draw.sample(["a", "b"], draw.randrange(3))]
    kind = draw.choice(["varying", "varying", "repeating", "failing"])
    if isinstance(given["detectors"], str) and kind == "repeating":
        kind = "varying"  # nobody looks
    turn = (Step("openai", "gpt-4o", usage), *([] if kind == "failing" else tools))
    interval_us = draw.choice([1_000, 300_000, 1_000_000, 7_300_000, 60_000_000, 61_000_001, 3_600_000_000])
    loop = Loop(kind, {"agent": "a", "run": "r"}, turn, interval_us, draw.choice([1, 1, 3]))
    return loop, given, START_US + draw.randrange(10**11)


def agree(seed: int, most_calls: int) -> bool:
    """Whether the loop was stopped, after checking that both say the same: to the call, the nano-dollar and the microsecond."""
    loop, given, start_us = a_case(seed)
    driven = drive(loop, given, start_us, most_calls)
    reckoned = reckon(loop, given, start_us)
    if driven.by is None or driven.elapsed_us > HORIZON_US:
        within = reckoned.by is None or reckoned.calls + reckoned.tool_calls >= driven.calls + driven.tool_calls
        assert within, (seed, reckoned, driven)
        return False
    assert reckoned[:4] == driven[:4], (seed, reckoned, driven)
    return True


# a kill in a rolling window; two waits of unlike patience; a kill beside a wait; a mark on the account of the model left behind
FOUND = [20_258, 30_517, 50_024, 701_036]


def test_what_is_reckoned_is_what_the_law_does() -> None:
    assert sum(agree(seed, 60) for seed in [*range(40), *FOUND]) > 20


@pytest.mark.nightly
def test_what_is_reckoned_is_what_the_law_does_in_many_more_cases() -> None:
    begin = random.SystemRandom().randrange(10**9)
    assert sum(agree(seed, 1_000) for seed in range(begin, begin + 500)) > 250


@pytest.mark.parametrize(
    ("budget", "calls", "elapsed_s"),
    [
        (Budget("b", "0.10 USD"), 13, 13),
        (Budget("b", "0.10 USD", thresholds=[Threshold("60%", "block")]), 8, 8),
        (Budget("b", "0.10 USD", thresholds=[Threshold("60%", "kill")]), 8, 8),
        (Budget("b", "0.10 USD", thresholds=[Threshold("60%", "downgrade", models={"gpt-4o": "gpt-4o-mini"})]), 96, 96),
        (Budget("b", "0.10 USD", thresholds=[Threshold("60%", "throttle", rate="6 requests/minute")]), 13, 13),
        (Budget("b", "60 requests/hour"), 61, 61),
        (Budget("b", "10 requests/minute"), 11, 11),
        (Budget("b", "0.10 USD", window="minute"), 13, 13),
        (Budget("b", "1.00 USD", window="minute"), None, None),
    ],
)
def test_one_control_stops_a_call_a_second_where_arithmetic_says(
    budget: Budget, calls: int | None, elapsed_s: int | None
) -> None:
    loop = Loop("varying", {"agent": "a", "run": "r"}, (ANSWER,), SECOND_US)
    end = reckon(loop, {"budgets": [budget]}, START_US - START_US % (86_400 * SECOND_US))
    if calls is None:
        assert end.by is None
        return
    assert (end.calls, end.elapsed_us) == (calls, (elapsed_s or 0) * SECOND_US)
    assert end[:4] == drive(loop, {"budgets": [budget]}, START_US - START_US % (86_400 * SECOND_US), 1_000)[:4]


def test_a_hundred_thousand_calls_are_reckoned_at_once() -> None:
    """A loop of days is not gone through call by call: the figures are those of the division."""
    loop = Loop("varying", {"agent": "a", "run": "r"}, (ANSWER,), SECOND_US)
    end = reckon(loop, {"budgets": [Budget("month", "1000 USD", window="month")]}, START_US)
    assert (end.calls, end.nanos) == (133_333, 133_333 * 7_500_000)


# -- who is exposed, and how ---------------------------------------------------------------------------------------------


def options(*budgets: Budget, is_told: bool = False, **given: Any) -> Options:
    return Options({"budgets": list(budgets), **given}, False, is_told, True, "memory:")


def exposed(given: Options, bursar: Bursar | None = None, **asked: Any) -> dict[str, Exposure]:
    entries = () if bursar is None else bursar.store.entries()
    return {f"{one.subject.tag} {one.subject.value}": one for one in exposures(given, entries, START_US, **asked)}


def test_the_demos_loop_and_burn_is_foreseen_to_the_call() -> None:
    """From the records of its run, the worst case is the 7 model calls and 7 searches that it made, under its own policy."""
    pytest.importorskip("langchain.agents")
    from bursar_langchain.demo.scenes import BUDGETS, TOOLS, Stage, loop_and_burn, recorded_agent

    prices = PriceBook.packaged().with_overrides(tools=TOOLS)
    with Bursar("memory:", BUDGETS, prices=prices) as bursar:
        recorded_agent(Stage(bursar, "gpt-4o", False))  # it leaves what the next estimates learn from
        played = loop_and_burn(Stage(bursar, "gpt-4o", False))
        spent = sum(record.cost_nanos for record in bursar.records(agent="looper"))
        (one,) = exposures(options(*BUDGETS, prices=prices), bursar.store.entries({"agent": "looper"}), START_US)[:1]
    worst = one.loops[0]
    assert one.subject.value == "looper"
    assert worst.loop.kind == "varying"
    assert worst.is_confirmed
    assert (worst.reckoned.calls, worst.reckoned.tool_calls, worst.reckoned.by) == (7, 7, "looping-run: limit")
    assert played.calls == worst.reckoned.calls
    assert spent <= worst.reckoned.nanos <= 50_000_000


def test_a_loop_that_begins_just_before_midnight_costs_two_days_budgets() -> None:
    found = exposed(options(Budget("day", "0.10 USD", window="day", per="agent")), call=ANSWER)
    worst = found[f"agent {ANY_OTHER}"].loops[0]
    assert worst.is_confirmed
    assert worst.reckoned.calls == 2 * 13
    assert (worst.begins_us + 13 * SECOND_US) % (86_400 * SECOND_US) == 0


def test_a_speed_is_given_in_dollars_or_in_calls() -> None:
    given = options(Budget("run", "1 USD", per="run"))
    from bursar.budget import parse_limit

    for speed, elapsed_s in (("2 USD/minute", 30), ("60 calls/minute", 133), ("60 requests/minute", 133)):
        (one,) = exposed(given, speed=parse_limit(Budget("speed", speed)), call=ANSWER).values()
        assert one.loops[0].reckoned.elapsed_us == pytest.approx(elapsed_s * SECOND_US, rel=0.01)
        assert one.loops[0].is_confirmed


def test_what_was_observed_is_the_loop() -> None:
    """The dear call, the tools that go with one, the pause of ten calls in a row, the client's retries, the overrun."""
    clock = ManualClock()
    with Bursar("memory:", [], clock=clock) as bursar:
        for number in range(40):
            with bursar.scope(team="red", agent="planner", workflow="nightly", run="r-1"):
                tokens = 4_000 if number > 35 else 100
                held = bursar.reserve("openai", "gpt-4o", input_tokens=100, max_output_tokens=50, retries=1)
                held.settle(Usage(input_tokens=tokens, output_tokens=50))
                for _ in range(2):
                    with bursar.tool("search", cost="0.001 USD"):
                        clock.advance(0.25)
            clock.advance(1.5)
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5).settle(
            Usage(input_tokens=10, output_tokens=5)
        )
        found = exposed(options(Budget("b", "1 USD", match={"agent": ["planner", "robot-*"]})), bursar)
    assert list(found) == ["agent planner", "workflow nightly", "agent (none)", "agent robot-*"]
    seen = found["agent planner"].subject
    assert [step.tool or step.usage.input_tokens for step in seen.turn] == [4_000, "search", "search"]
    assert (seen.interval_us, seen.attempts, seen.seen) == (2 * SECOND_US, 2, 40)
    assert seen.overrun_nanos == 3_900 * 2_500
    assert seen.tags == {"team": "red", "agent": "planner", "workflow": "nightly", "run": "(a loop)"}
    assert not found["agent (none)"].subject.has_run
    assert found["agent robot-*"].subject.seen == 0


ALL_OPEN = {NO_CAP, RETRIES, TERMINATION, VIEW, ATTRIBUTION}
ACTING = Detectors(max_steps=50)


@pytest.mark.parametrize(
    ("given", "closed"),
    [
        (options(), {ATTRIBUTION}),
        (options(Budget("day", "0.05 USD", window="day")), {NO_CAP}),
        (options(Budget("day", "0.05 USD", window="day"), require=["agent"]), {NO_CAP, ATTRIBUTION}),
        (options(Budget("each", "0.05 USD", per="agent")), {NO_CAP, ATTRIBUTION}),
        (options(Budget("run", "0.05 USD", per="run")), {ATTRIBUTION}),
        (options(Budget("day", "0.05 USD", mode="shadow")), {ATTRIBUTION}),
        (options(default_limit="1 USD"), {ATTRIBUTION}),
        (options(is_told=True), {VIEW, ATTRIBUTION}),
        (options(Budget("storm", "20 failures/minute")), {RETRIES, ATTRIBUTION}),
        (options(Budget("steps", "20 requests", per="run")), {TERMINATION, ATTRIBUTION}),
        (options(detectors=ACTING), {RETRIES, TERMINATION, ATTRIBUTION}),
        (options(detectors=Detectors(uncapped="block", loops="notify", retries="notify")), {NO_CAP, ATTRIBUTION}),
        (options(detectors=Detectors(loops="off", max_steps=9)), {RETRIES, TERMINATION, ATTRIBUTION}),
        (
            options(Budget("each", "0.05 USD", per="agent"), detectors=ACTING, is_told=True),
            {NO_CAP, RETRIES, TERMINATION, VIEW, ATTRIBUTION},
        ),
    ],
)
def test_each_cause_is_open_until_something_closes_it(given: Options, closed: set[str]) -> None:
    clock = ManualClock()
    with Bursar("memory:", [], clock=clock) as bursar, bursar.scope(agent="a", run="r"):
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=5).settle(USAGE)
        one = exposed(given, bursar)["agent a"]
    assert {cause for cause, why in one.causes.items() if why is None} == closed
    assert set(one.causes) == ALL_OPEN


def test_a_loop_that_nothing_stops_is_said_to_go_on() -> None:
    one = exposed(options(), speed=None)[f"agent {ANY_OTHER}"]
    assert {worst.reckoned.by for worst in one.loops} == {None}
    assert {worst.is_confirmed for worst in one.loops} == {None}
    assert one.loops[0].reckoned.elapsed_us > 30 * 1_440 * MINUTE_US


def test_a_model_without_a_price_is_not_called_at_all() -> None:
    one = exposed(options(Budget("b", "1 USD")), call=Step("openai", "no-such-model", USAGE))[f"agent {ANY_OTHER}"]
    assert {(worst.reckoned.calls, worst.reckoned.by, worst.is_confirmed) for worst in one.loops} == {
        (0, "no price", True)
    }


# -- the command ---------------------------------------------------------------------------------------------------------


def bursar(*words: str, **env: str) -> Result:
    return CliRunner(env={"COLUMNS": "200", **env}).invoke(main, words, catch_exceptions=False, prog_name="bursar")


@pytest.fixture
def policy(tmp_path: Path) -> str:
    file = tmp_path / "bursar.toml"
    file.write_text(
        f"""store = "sqlite:///{tmp_path / "none.db"}"
        [detectors]
        max_steps = 100
        [[alert]]
        log = true
        [[budget]]
        name = "run"
        limit = "0.50 USD"
        per = "run"
        match = {{agent = "planner"}}
        """
    )
    return str(file)


def test_a_policy_alone_is_enough(policy: str) -> None:
    shown = bursar("exposure", "--policy", policy, "--speed", "2 USD/minute", "--call", "openai/gpt-4o 1000 500")
    assert shown.exit_code == 0, shown.output
    for words in ("agent planner", "no live view", "run: limit", "detector: loop", "66", "0.25", "the same"):
        assert words in shown.output
    lines = bursar("exposure", "--policy", policy, "--call", "openai/gpt-4o 1000 500", "--format", "json").output
    (one,) = map(json.loads, lines.splitlines())
    assert one["agent"] == "planner"
    assert [(loop["loop"], loop["calls"], loop["confirmed"]) for loop in one["loops"]] == [
        ("varying", 66, True),
        ("repeating", 4, True),
        ("failing", 5, True),
    ]
    assert one["loops"][0]["simulated"]["cost_usd"] == one["loops"][0]["cost_usd"] == "0.495"


def test_the_books_alone_are_enough_and_are_left_as_they_were(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}?durability=process"
    with Bursar(url, [Budget("cap", "0.05 USD", per="agent")]) as books, books.scope(agent="planner", run="r-1"):
        books.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500).settle(USAGE)
        before = list(books.store.entries())
    shown = bursar("exposure", "agent=planner", "--store", url)
    assert "cap: limit" in shown.output
    assert "give the --policy" in shown.output
    assert "(any other)" not in shown.output
    with Bursar(url) as books:
        assert list(books.store.entries()) == before


def test_what_cannot_be_meant_is_refused(policy: str, tmp_path: Path) -> None:
    assert "no store" in bursar("exposure", "--store", f"sqlite:///{tmp_path / 'other.db'}").output
    for wrong in (
        ["--speed", "5 USD"],
        ["--speed", "8 slots"],
        ["--speed", "2 JPY/minute"],
        ["--call", "gpt-4o"],
        ["--call", "openai/gpt-4o 1000"],
    ):
        done = bursar("exposure", "--policy", policy, *wrong)
        assert done.exit_code != 0
        assert "Write it like" in done.output
