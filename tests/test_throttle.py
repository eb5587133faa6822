"""Throttles: a rate is never exceeded nor left unused while somebody wants it, and who came first goes first."""

from __future__ import annotations

import pytest
from arrivals import Arrival, Outcome, Simulation, excess, ideal, ideal_slots, trace, used_while_wanted
from hypothesis import given
from hypothesis import strategies as st

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.testing import ManualClock

SECOND_US = 1_000_000
MINUTE_US = 60 * SECOND_US
HOUR_US = 60 * MINUTE_US
WAIT_US = 30 * SECOND_US
PERIODS_US = {"second": SECOND_US, "minute": MINUTE_US, "hour": HOUR_US, "day": 24 * HOUR_US}

# Stretches of the traces in which more arrives than the limit lets through.
CASES = [
    ("azure_code", 0, 700, "100 requests/minute", 100, MINUTE_US),
    ("azure_conv", 0, 700, "3 requests/second", 3, SECOND_US),
    ("mooncake_conv", 0, 700, "60 requests/minute", 60, MINUTE_US),
    ("azure_code", 0, 500, "90_000 tokens/minute", 90_000, MINUTE_US),
    ("azure_conv", 500, 1_000, "200_000 tokens/minute", 200_000, MINUTE_US),
    ("mooncake_conv", 900, 1_400, "900_000 tokens/minute", 900_000, MINUTE_US),
    ("azure_conv", 0, 700, "0.90 USD/hour", 900_000_000, HOUR_US),
]


def stretch(name: str, first: int, last: int) -> list[Arrival]:
    arrivals = trace(name)[first:last]
    begun_us = arrivals[0].at_us
    return [one._replace(at_us=one.at_us - begun_us) for one in arrivals]


def asked(arrivals: list[Arrival], unit: str) -> list[int]:
    """What each call takes of the limit; dollars at the prices of gpt-4o, $2.50 and $10 a million."""
    if unit == "requests":
        return [1] * len(arrivals)
    prices = (1, 1) if unit == "tokens" else (2_500, 10_000)
    return [one.input_tokens * prices[0] + one.output_tokens * prices[1] for one in arrivals]


@pytest.mark.parametrize(
    ("name", "first", "last", "limit", "amount", "period_us"), CASES, ids=[f"{case[0]}-{case[3]}" for case in CASES]
)
def test_each_call_of_a_trace_goes_at_the_microsecond_that_the_arithmetic_says(
    name: str, first: int, last: int, limit: str, amount: int, period_us: int
) -> None:
    arrivals = stretch(name, first, last)
    run = Simulation(Budget("throttle", limit, on_exceed="wait 30s"), arrivals).run()
    amounts = asked(arrivals, limit.split()[1].split("/")[0])
    at_us = [one.at_us for one in arrivals]
    assert [one.sent_us for one in run.outcomes] == ideal(at_us, amounts, amount, period_us, WAIT_US)
    assert run.most_waiting > 20, "the limit is felt"
    assert run.overtakings == 0
    moves = [(one.sent_us, one.held) for one in run.outcomes if one.sent_us is not None]
    assert excess(moves, amount, period_us) == 0
    taken, given = used_while_wanted(arrivals, run.outcomes, moves, amount, period_us)
    assert taken >= 0.98 * given


def test_slots_of_a_trace_are_taken_the_moment_they_are_free() -> None:
    arrivals = stretch("azure_conv", 0, 500)
    run = Simulation(Budget("flight", "8 slots", on_exceed="wait 30s"), arrivals).run()
    busy_us = [one.busy_us for one in arrivals]
    assert [one.sent_us for one in run.outcomes] == ideal_slots([one.at_us for one in arrivals], busy_us, 8, WAIT_US)
    assert run.overtakings == 0


def test_what_was_reserved_in_vain_is_used_by_others() -> None:
    """Twenty times the output is reserved; what comes back at settlement is lent again, and the rate stays used."""
    arrivals = stretch("azure_conv", 0, 700)
    budget = Budget("throttle", "200_000 tokens/minute", on_exceed="wait 30s")
    run = Simulation(budget, arrivals, max_output_tokens=2_000).run()
    moves = [(one.sent_us, one.held) for one in run.outcomes if one.sent_us is not None]
    moves += [(at_us, -back) for at_us, back in run.returns]
    assert run.overtakings == 0
    assert excess(moves, 200_000, MINUTE_US) == 0
    taken, given = used_while_wanted(arrivals, run.outcomes, moves, 200_000, MINUTE_US)
    assert taken >= 0.98 * given


def test_those_behind_the_first_sleep_until_it_is_their_turn() -> None:
    """Two hundred who wait for minutes cost a few steps each, not some every second."""
    arrivals = [Arrival(number, 1, 1) for number in range(200)]
    run = Simulation(Budget("rate", "1 requests/second", on_exceed="wait 10m"), arrivals).run()
    assert [one.sent_us for one in run.outcomes] == [1_000_000 * number for number in range(200)]
    assert run.steps < 10 * len(arrivals)


def test_the_arithmetic_sees_what_is_wrong() -> None:
    assert ideal([0, 0, 0, 1], [10, 1, 5, 4], 10, 10, 4) == [0, 1, None, 5]
    assert excess([(0, 10), (1, 1)], 10, 10) == 0
    assert excess([(0, 10), (1, 2)], 10, 10) == 1
    assert excess([(0, 3), (100, 10), (100, 1)], 10, 10) == 1
    arrivals = [Arrival(0, 0, 0), Arrival(0, 0, 0)]
    late = [Outcome(0, 0, 10), Outcome(20, 20, 5)]
    assert used_while_wanted(arrivals, late, [(0, 10), (20, 5)], 10, 10) == (5, 20)


def reserve(bursar: Bursar, tokens: int = 10) -> None:
    usage = Usage(input_tokens=tokens)
    bursar.reserve("openai", "gpt-4o", usage=usage).settle(usage)


def retried_to_the_microsecond(bursar: Bursar, clock: ManualClock, refused: BudgetExceeded, tokens: int = 10) -> None:
    """Time alone makes room when the refusal said so, and not before."""
    assert refused.retry_after is not None
    clock.advance(us=round(refused.retry_after * SECOND_US) - 1)
    with pytest.raises(BudgetExceeded) as early:
        reserve(bursar, tokens)
    assert early.value.retry_after == 1e-6
    clock.advance(us=1)
    reserve(bursar, tokens)


@given(
    limit=st.integers(1, 10**7),
    period=st.sampled_from(list(PERIODS_US)),
    calls=st.lists(st.tuples(st.integers(1, 100), st.integers(0, HOUR_US)), min_size=2, max_size=6),
)
def test_a_retry_succeeds_at_the_time_that_the_refusal_gave(
    limit: int, period: str, calls: list[tuple[int, int]]
) -> None:
    clock = ManualClock()
    with Bursar("memory:", [Budget("rate", f"{limit} tokens/{period}")], clock=clock) as bursar:
        for share, pause_us in calls:
            tokens = max(1, limit * share // 100)
            try:
                reserve(bursar, tokens)
            except BudgetExceeded as refused:
                retried_to_the_microsecond(bursar, clock, refused, tokens)
            clock.advance(us=pause_us)


@pytest.mark.parametrize(
    ("limit", "window"),
    [
        ("6 requests/minute", "total"),
        ("3 requests/second", "total"),
        ("0.00017 USD/hour", "total"),
        ("5 requests", "minute"),
        ("0.00015 USD", "rolling 10m"),
    ],
)
def test_limits_of_each_kind_say_when_they_have_room(limit: str, window: str) -> None:
    clock = ManualClock()
    with Bursar("memory:", [Budget("limit", limit, window=window)], clock=clock) as bursar:
        for _ in range(7):
            clock.advance(us=12_347)
            try:
                reserve(bursar)
            except BudgetExceeded as refused:
                return retried_to_the_microsecond(bursar, clock, refused)
        pytest.fail("the limit let seven calls through")
