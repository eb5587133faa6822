"""Retries wait and end, storms are seen, and spending is held against what is usual and against the budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.detect import CAUSES, Detectors, RunWatch, Storm, Velocity
from bursar.detect.velocity import MINUTE_US, Buckets
from bursar.errors import InvalidInput

S = 1_000_000
DAY_US = 86_400 * S
CENT = 10_000_000


def test_each_attempt_waits_twice_as_long_and_there_is_a_last_one() -> None:
    watch, now_us, waits = RunWatch(), 0, []
    for at in range(5):
        assert watch.model_called(str(at), "Do it.", now_us) is None
        waits.append(watch.model_failed(str(at), now_us))
        if at < 4:
            early = watch.model_called("early", "Do it.", now_us + waits[-1] - 1)
            assert early is not None
            assert (early.detector, early.action, early.wait_us) == ("backoff", "throttle", 1)
        now_us += waits[-1]
    assert waits == [1 * S, 2 * S, 4 * S, 8 * S, 16 * S]
    last = watch.model_called("6", "Do it.", now_us)
    assert last is not None
    assert (last.detector, last.cause, last.action, last.repetitions) == ("attempts", "retries", "block", 5)
    assert watch.model_called("7", "Do something else.", now_us) is None


def test_the_floor_is_what_the_provider_asks_for_and_never_above_the_maximum_of_its_own() -> None:
    watch = RunWatch(Detectors(max_attempts=1_000, max_backoff_ms=3_000))
    now_us, waits = 0, []
    for at in range(100):
        assert watch.model_called(str(at), "Do it.", now_us) is None
        waits.append(watch.model_failed(str(at), now_us, retry_after_us=30 * S if at == 0 else 0))
        now_us += waits[-1]
    assert waits[:3] == [30 * S, 2 * S, 3 * S]
    assert set(waits[3:]) == {3 * S}


def test_a_call_that_went_through_is_forgiven_its_failures() -> None:
    watch = RunWatch()
    for at in range(20):
        assert watch.model_called(f"a{at}", "Do it.", at * 10 * S) is None
        watch.model_failed(f"a{at}", at * 10 * S)
        assert watch.model_called(f"b{at}", "Do it.", at * 10 * S + S) is None
        watch.model_answered(f"b{at}")


def test_another_model_is_another_call_and_need_not_wait() -> None:
    watch = RunWatch()
    assert watch.model_called("1", "Do it.", 0, model="large") is None
    watch.model_failed("1", 0)
    assert watch.model_called("2", "Do it.", 0, model="large") is not None
    assert watch.model_called("3", "Do it.", 0, model="small") is None


def test_a_storm_is_many_failures_and_half_of_all() -> None:
    storm = Storm(Detectors())
    assert storm.ended(100, 10, 0) is None  # a tenth fails: no storm
    assert storm.ended(10, 10, 30 * S) is None
    blowing = storm.ended(90, 90, 40 * S)  # the counts of other processes may come in one
    assert blowing is not None
    assert (blowing.detector, blowing.action, blowing.repetitions) == ("storm", "throttle", 110)
    assert storm.check(99 * S) is not None
    assert storm.check(101 * S) is None


def test_few_calls_are_no_storm() -> None:
    storm = Storm(Detectors())
    assert all(storm.ended(1, 1, at * S) is None for at in range(19))


@given(st.lists(st.tuples(st.integers(0, 90), st.integers(0, 9)), max_size=60), st.integers(1, 12))
def test_buckets_sum_what_lies_in_their_window(events: list[tuple[int, int]], count: int) -> None:
    buckets, now, seen = Buckets(10, count), 0, []
    for wait, amount in events:
        now += wait
        buckets.add(amount, now)
        seen.append((now, amount))
        for last in (1, count):
            inside = sum(amount for at, amount in seen if now // 10 - at // 10 < last)
            assert buckets.sum(now, last) == inside <= buckets.most


def learned(minutes: int = 30, cost: int = 10 * CENT) -> Velocity:
    velocity = Velocity(Detectors())
    for minute in range(minutes):
        for second in (0, 20, 40):
            assert velocity.spent(cost // 3, minute * MINUTE_US + second * S) is None
    return velocity


def test_a_minute_that_costs_many_times_the_usual_is_found_at_once() -> None:
    velocity = learned()
    assert velocity.baseline_nanos is not None
    assert abs(velocity.baseline_nanos - 10 * CENT) <= 10
    assert velocity.spent(99 * CENT, 30 * MINUTE_US) is None
    found = velocity.spent(2 * CENT, 30 * MINUTE_US + S)
    assert found is not None
    assert (found.detector, found.cause, found.action) == ("velocity", "velocity", "notify")
    assert "$1.01" in found.why


def test_a_runaway_does_not_teach_that_it_is_normal_at_once() -> None:
    velocity = learned()
    found = [velocity.spent(10_000 * CENT, (30 + minute) * MINUTE_US) for minute in range(8)]
    assert all(found)


def test_small_money_and_new_spenders_raise_no_alarm() -> None:
    velocity = learned(cost=3_000)
    assert velocity.spent(90 * CENT, 30 * MINUTE_US) is None  # thousands of times the usual, and below a dollar
    fresh = Velocity(Detectors())
    assert all(fresh.spent(1_000 * CENT, minute * MINUTE_US) is None for minute in range(10))
    assert Velocity(Detectors()).baseline_nanos is None


@pytest.mark.parametrize(
    ("share_of_even_rate", "minutes", "found"),
    [(20, 60, "fast"), (8, 360, "slow"), (8, 20, None), (5, 360, None), (1, 360, None)],
)
def test_a_budget_burns_too_fast_by_two_windows(share_of_even_rate: int, minutes: int, found: str | None) -> None:
    """A month's budget of 43,200 dollars lasts the month at a dollar a minute."""
    velocity, dollar = Velocity(Detectors(velocity="off")), 100 * CENT
    for minute in range(minutes):
        velocity.spent(share_of_even_rate * dollar, minute * MINUTE_US)
    now_us = minutes * MINUTE_US - 1
    finding = velocity.burn(43_200 * dollar, 30 * DAY_US, now_us)
    assert (finding is not None) == (found is not None)
    if finding is not None:
        assert f"({found} burn)" in finding.why
        assert velocity.burn(43_200 * dollar, 30 * DAY_US, now_us + 31 * MINUTE_US) is None  # it is over


def test_short_budgets_have_no_burn_rate() -> None:
    velocity = Velocity(Detectors())
    velocity.spent(10_000 * CENT, 0)
    assert velocity.burn(100 * CENT, 60 * MINUTE_US, 1) is None
    assert velocity.burn(0, 30 * DAY_US, 1) is None


@pytest.mark.parametrize(
    "wrong",
    [{"loops": "stop"}, {"repetitions": 1}, {"repetitions": True}, {"max_steps": 0}, {"backoff_ms": 1.5}, {"burn": None},
     {"velocity_floor_nanos": -1}, {"max_attempts": None}],
)  # fmt: skip
def test_settings_that_cannot_be_meant_are_refused(wrong: dict[str, object]) -> None:
    (name,) = wrong
    with pytest.raises(InvalidInput, match=name):
        Detectors(**wrong)  # type: ignore[arg-type]


def test_every_detector_stands_for_a_cause() -> None:
    assert set(CAUSES.values()) == {"no cap", "ambiguous termination", "retries", "velocity"}
