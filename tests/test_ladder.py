"""The ladder: thresholds that tell, change, slow, ask, block and kill, on memory and SQLite, through the public face."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bursar import (
    ApprovalRequired,
    Budget,
    BudgetExceeded,
    Bursar,
    IdempotencyConflict,
    InvalidInput,
    Operator,
    OperatorKey,
    OperatorRequired,
    PolicyError,
    Stopped,
    StoreError,
    Threshold,
    Usage,
    signing,
)
from bursar.commands import Refused, Stepped
from bursar.policy import Policy
from bursar.stores import open_store
from bursar.stores.memory import MemoryStore
from bursar.testing import ManualClock

# gpt-4o: $2.50 and $10 per million; 1,000 in and 750 out are one cent
CENT = Usage(input_tokens=1_000, output_tokens=750)


@pytest.fixture(params=["memory:", "sqlite:///FILE?durability=process"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).replace("FILE", str(tmp_path / "ladder.db"))


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


class Desk:
    """A Bursar with one budget of ten cents, and the operator of its store."""

    def __init__(self, store: str, clock: ManualClock, thresholds: list[Threshold], **said: Any) -> None:
        budget = Budget("b", said.pop("limit", "0.10 USD"), thresholds=thresholds, **said)
        self.bursar = Bursar(store, [budget], clock=clock)
        self.operator = Operator(self.bursar.store, by="ann")
        self.operator = Operator(self.bursar.store, self.operator.appoint(), by="ann")

    def spend(self, cents: int = 1, **said: Any) -> Any:
        """Calls of a cent each; the last one's record."""
        for _ in range(cents):
            said = {"model": "gpt-4o", "input_tokens": 1_000, "max_output_tokens": 750} | said
            reservation = self.bursar.reserve("openai", **said)
            record = reservation.settle(CENT)
        return record

    def marks(self) -> list[tuple[str, int]]:
        """What was told: the action, and the share of the limit."""
        alerts = [alert for alert, _ in self.bursar.store.alerts() if alert.kind == "threshold"]
        alerts.sort(key=lambda one: (one.at_us, one.facts["spent"], one.facts["at"]))
        return [(one.facts["action"], round(100 * one.facts["at"] / one.facts["limit"])) for one in alerts]

    @property
    def spent(self) -> Decimal:
        return self.bursar.status()[0].spent


@pytest.fixture
def desk(store: str, clock: ManualClock) -> Iterator[Any]:
    made: list[Desk] = []

    def make(*thresholds: Threshold, **said: Any) -> Desk:
        made.append(Desk(store, clock, list(thresholds), **said))
        return made[-1]

    yield make
    for one in made:
        one.bursar.close()


def test_each_mark_is_told_once(desk: Any) -> None:
    here = desk(Threshold("50%", "notify"), Threshold("80%", "notify"))
    here.spend(4)
    assert here.marks() == []
    here.spend()
    assert here.marks() == [("notify", 50)]
    here.spend(5)
    assert here.marks() == [("notify", 50), ("notify", 80)]
    told = min((alert.facts for alert, _ in here.bursar.store.alerts()), key=lambda one: one["spent"])
    assert told["tags"]["model"] == "gpt-4o"
    assert (told["budget"], told["spent"], told["limit"]) == ("b", 50_000_000, 100_000_000)


def test_one_settlement_may_cross_several_marks(desk: Any) -> None:
    here = desk(Threshold("10%", "notify"), Threshold("20%", "notify"), Threshold("100%", "notify"))
    here.bursar.charge("0.05 USD")
    assert here.marks() == [("notify", 10), ("notify", 20)]


def test_alerts_of_many_runs_leave_memory_with_their_entries() -> None:
    store = MemoryStore(max_entries=20)
    with Bursar(store, [Budget("b", "1 USD", per="run", thresholds=[Threshold("10%", "notify")])]) as bursar:
        for number in range(100):
            with bursar.scope(run=f"r{number}"):
                bursar.charge("0.50 USD")
    assert len(list(store.entries())) + len(list(store.alerts())) in (20, 21)


def test_a_new_window_tells_again_and_a_correction_does_not(desk: Any, clock: ManualClock) -> None:
    here = desk(Threshold("50%", "notify"), window="day")
    here.spend(5)
    here.spend()
    clock.advance(86_400)
    here.spend(5)
    assert here.marks() == [("notify", 50)] * 2


def test_a_rolling_window_tells_again_once_it_has_let_go(desk: Any, clock: ManualClock) -> None:
    here = desk(Threshold("50%", "notify"), window="rolling 10m")
    here.spend(6)
    clock.advance(700)
    here.spend(4)
    assert here.marks() == [("notify", 50)]
    here.spend(1)
    assert here.marks() == [("notify", 50)] * 2


def test_a_charge_by_an_older_policy_tells_no_mark_twice(desk: Any) -> None:
    """A process that only charges, or whose charge was kept while the store was away, knows an older limit."""
    here = desk(Threshold("80%", "notify"), limit="10 USD")
    late = Bursar(here.bursar.store, [here.bursar.guard.policy.budgets[0]])
    kept = late._charging("0.01 USD", None)
    command = kept.send(None)
    here.operator.publish_budgets([Budget("b", "5 USD", thresholds=[Threshold("80%", "notify")])])
    here.bursar.charge("4.20 USD")
    here.bursar.store.execute(command)
    late.charge("0.01 USD")
    here.bursar.charge("0.01 USD")
    assert here.marks() == [("notify", 80)]
    (account,) = here.bursar.store.accounts()
    assert account.rule.limit == 5_000_000_000


def test_another_currency_is_not_taken_for_dollars(desk: Any) -> None:
    """An operator and a threshold know no rates: 100 JPY are not 100 USD."""
    here = desk(Threshold("50%", "ask"))
    here.spend(5)
    with pytest.raises(InvalidInput, match="5 USD"):
        here.operator.raise_limit("b", "100 JPY")
    with pytest.raises(ApprovalRequired) as caught:
        here.spend()
    with pytest.raises(InvalidInput, match="5 USD"):
        here.operator.approve(caught.value.id, raise_by="100 JPY")
    with pytest.raises(PolicyError, match="USD"):
        Threshold("50%", "throttle", rate="100 JPY/hour")
    assert Threshold("50%", "throttle", rate="0.10 USD/hour").rate


def test_a_raised_limit_arms_the_marks_that_lie_above_again(desk: Any) -> None:
    here = desk(Threshold("20%", "notify"), Threshold("80%", "notify"))
    here.spend(8)
    assert here.marks() == [("notify", 20), ("notify", 80)]
    here.operator.raise_limit("b", "0.10 USD", why="a launch")
    here.spend(7)
    assert len(here.marks()) == 2
    here.spend(1)
    assert here.marks()[2:] == [("notify", 80)]
    with pytest.raises(BudgetExceeded):
        here.spend(5)
    assert here.spent == Decimal("0.20")


def test_downgrade_swaps_the_model_and_the_record_says_so(desk: Any) -> None:
    here = desk(Threshold("50%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}))
    here.spend(5)
    reservation = here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750)
    assert reservation.model == "gpt-4o-mini"
    record = reservation.settle(CENT)
    assert (record.model, record.model_asked) == ("gpt-4o-mini", "gpt-4o")
    assert record.cost_nanos == 1_000 * 150 + 750 * 600
    assert record.actions == ("downgrade gpt-4o to gpt-4o-mini at 50%",)
    # other models are left alone, and a user who sends the dear model all the same is charged for it
    assert here.bursar.reserve("openai", "gpt-4.1-nano", input_tokens=10, max_output_tokens=10).model == "gpt-4.1-nano"
    ignoring = here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750)
    assert ignoring.settle(Usage(input_tokens=1_000, output_tokens=750, model="gpt-4o")).cost_nanos == 10_000_000


def test_a_model_that_the_provider_does_not_sell_is_asked_for(desk: Any) -> None:
    """A swap across providers is another request, to another address: nobody here can send it."""
    here = desk(Threshold("50%", "downgrade", models={"gpt-4o": "claude-haiku-4-5"}))
    here.spend(5)
    with pytest.raises(ApprovalRequired):
        here.spend()
    assert here.spent == Decimal("0.05")


def test_a_call_that_was_downgraded_may_be_repeated(desk: Any) -> None:
    """I6: the same id and content is the same call, whatever a threshold made of it; and it is cut to what its model can."""
    said = {"input_tokens": 10, "max_output_tokens": 16_384, "id": "mine"}
    here = desk(Threshold("1%", "downgrade", models={"gpt-4o": "gpt-4-turbo"}), limit="9 USD")
    here.bursar.charge("1 USD")
    first = here.bursar.reserve("openai", "gpt-4o", **said)
    assert (first.model, first.max_output_tokens, first.capped) == ("gpt-4-turbo", 4_096, True)
    again = here.bursar.reserve("openai", "gpt-4o", **said)
    assert (again.id, again.model, again.max_output_tokens, again.capped) == (first.id, "gpt-4-turbo", 4_096, True)
    assert here.bursar.store.open_reservations() == 1
    with pytest.raises(IdempotencyConflict):
        here.bursar.reserve("openai", "gpt-4o-mini", **said)


def test_downgrade_holds_while_spent_and_reserved_are_at_the_mark(desk: Any) -> None:
    here = desk(Threshold("50%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}))
    held = [here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750) for _ in range(5)]
    assert here.bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).model == "gpt-4o-mini"
    for one in held:
        one.release()
    assert here.bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).model == "gpt-4o"


@pytest.mark.parametrize("thresholds", [[], [Threshold("1%", "downgrade", models={"gpt-4o": "gpt-4o-mini"})]])
def test_a_policy_that_comes_into_force_between_two_steps_of_a_call_is_looked_at(
    desk: Any, monkeypatch: pytest.MonkeyPatch, thresholds: list[Threshold]
) -> None:
    """Another thread may have read it: the refusal, or the step, is of an account that the policy no longer has."""
    here = desk(*thresholds)
    here.bursar.charge("0.09 USD")
    execute = here.bursar.store.execute

    def and_reload(command: Any) -> Any:
        answer = execute(command)
        if type(answer) in (Refused, Stepped):
            here.bursar.guard.policy = Policy([], version=here.bursar.guard.policy.version)
        return answer

    monkeypatch.setattr(here.bursar.store, "execute", and_reload)
    here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=3_000).release()


def test_clamp_limits_the_answer(desk: Any) -> None:
    here = desk(Threshold("50%", "clamp", max_output_tokens=100))
    here.spend(5)
    reservation = here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750)
    assert (reservation.max_output_tokens, reservation.capped) == (100, True)
    assert reservation.settle(Usage(input_tokens=1_000, output_tokens=100)).actions == ("clamp to 100 tokens at 50%",)
    small = here.bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=50)
    assert (small.max_output_tokens, small.capped) == (50, False)


def test_what_the_caller_cannot_change_falls_to_the_next_stricter_action(desk: Any) -> None:
    here = desk(
        Threshold("50%", "downgrade", models={"gpt-4o": "gpt-4o-mini"}),
        Threshold("90%", "clamp", max_output_tokens=100),
    )
    here.spend(5)
    clamped = here.bursar.reserve(
        "openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750, changeable=("max_output_tokens",)
    )
    assert (clamped.model, clamped.max_output_tokens) == ("gpt-4o", 100)
    record = clamped.settle(Usage(input_tokens=1_000, output_tokens=100))
    assert record.actions[0] == "downgrade cannot be carried out here: clamp instead (at 50% of b)"
    with pytest.raises(ApprovalRequired) as caught:
        here.spend(changeable=())
    here.operator.approve(caught.value.id)
    assert here.spend(changeable=()).model == "gpt-4o"


def test_throttle_lets_calls_through_at_its_rate(desk: Any, clock: ManualClock) -> None:
    here = desk(Threshold("50%", "throttle", rate="2 requests/minute"))
    here.spend(5)
    assert here.spend(2).actions == ("throttle 2 requests/minute at 50% of b",)
    began_us = clock.now_us()
    done = threading.Event()

    def third() -> None:
        here.spend()
        done.set()

    thread = threading.Thread(target=third)
    thread.start()
    while not done.wait(0.01):
        clock.advance(1)
    thread.join()
    assert clock.now_us() - began_us >= 30_000_000


def test_the_stricter_of_two_throttles_holds(desk: Any) -> None:
    """Of the same unit and period: the second mark's rate takes the place of the first one's, whose account it goes on with."""
    slow, slower = (Threshold(at, "throttle", rate=f"{n} requests/minute") for at, n in (("20%", 6), ("50%", 2)))
    here = desk(slow, slower)
    for cents, limit in ((2, 6), (2, 2)):  # the call after these meets the next mark
        here.spend(cents)
        here.spend()
        (throttle,) = (one for one in here.bursar.store.accounts() if "throttle" in one.rule.key)
        assert throttle.rule.limit == limit


def test_ask_stops_until_an_operator_approves(desk: Any) -> None:
    here = desk(Threshold("50%", "ask"), owner="ann@example.com")
    here.spend(5)
    with pytest.raises(ApprovalRequired, match=r"bursar approve ask-\w+") as caught:
        here.spend()
    assert isinstance(caught.value, BudgetExceeded)
    with pytest.raises(ApprovalRequired) as again:
        here.spend()
    assert again.value.id == caught.value.id
    (question,) = here.operator.questions()
    assert (question.id, question.state, question.owner) == (caught.value.id, "open", "ann@example.com")
    assert [alert.kind for alert, _ in here.bursar.store.alerts()] == ["threshold", "approval"]
    here.operator.approve(question.id, why="it is worth it")
    here.spend(5)
    with pytest.raises(BudgetExceeded) as over:
        here.spend()
    assert not isinstance(over.value, ApprovalRequired)
    assert here.operator.questions()[0].state == "approved"


def test_an_approval_may_raise_the_limit_for_a_time(desk: Any, clock: ManualClock) -> None:
    here = desk(Threshold("90%", "ask"))
    here.spend(9)
    with pytest.raises(ApprovalRequired) as caught:
        here.spend()
    here.operator.approve(caught.value.id, raise_by="0.10 USD", for_s=3_600)
    here.spend(9)  # up to 90% of twenty cents
    with pytest.raises(ApprovalRequired) as second:
        here.spend()
    assert second.value.id != caught.value.id
    clock.advance(3_600)
    with pytest.raises(BudgetExceeded) as over:
        here.spend()
    assert over.value.limit == Decimal("0.1")


def test_a_question_whose_window_is_over_waits_for_no_answer(clock: ManualClock) -> None:
    """To approve it would change nothing, and the operator would take it for done."""
    store = open_store("memory:", clock)
    operator = Operator(store, Operator(store).appoint())
    daily = Budget("b", "1 USD", window="day", thresholds=[Threshold("50%", "ask")])
    with Bursar(store, [daily], clock=clock) as bursar:
        bursar.charge("0.60 USD")
        with pytest.raises(ApprovalRequired) as caught:
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        assert [one.state for one in operator.questions()] == ["open"]
        clock.advance(86_400)
        assert [one.state for one in operator.questions()] == ["over"]
        with pytest.raises(InvalidInput, match="is over"):
            operator.approve(caught.value.id)


def test_a_kill_of_a_window_that_is_long_over_is_not_listed(clock: ManualClock) -> None:
    """Among those of every day before, nobody would find the one that stops calls now."""
    operator = Operator(store := open_store("memory:", clock))
    daily = Budget("b", "1 USD", window="day", thresholds=[Threshold("50%", "kill")])
    with Bursar(store, [daily], clock=clock) as bursar:
        bursar.charge("0.60 USD")
        with pytest.raises(BudgetExceeded):
            bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        operator.freeze({"agent": "a"})
        assert len(operator.frozen()) == 2
        clock.advance(4 * 86_400)
        assert list(operator.frozen()) == ["agent=a"]


def test_a_denied_question_refuses(desk: Any) -> None:
    here = desk(Threshold("50%", "ask"))
    here.spend(5)
    with pytest.raises(ApprovalRequired) as caught:
        here.spend()
    here.operator.deny(caught.value.id, why="not today")
    with pytest.raises(BudgetExceeded, match="ann denied more \\(not today\\)") as refused:
        here.spend()
    assert not isinstance(refused.value, ApprovalRequired)
    here.operator.approve(caught.value.id)
    here.spend()


def test_block_refuses_and_is_on_record(desk: Any) -> None:
    here = desk(Threshold("50%", "block"))
    here.spend(5)
    with pytest.raises(BudgetExceeded, match=r"it blocks calls from \$0.05 on"):
        here.spend()
    (blocked,) = [record for record in here.bursar.records() if record.outcome == "blocked"]
    assert blocked.reason == "the budget 'b' blocks calls: it had $0.05 available, the call needed $0.01"


def test_kill_stops_every_call_and_what_is_in_flight(desk: Any) -> None:
    here = desk(Threshold("50%", "kill"))
    with here.bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as flying:
        assert flying.stopped is None
        here.spend(5)
        here.bursar._driver.keeper.look()
        assert isinstance(flying.stopped, Stopped)
        assert flying.stopped.cause == "killed"
        flying.settle(Usage(input_tokens=10, output_tokens=1))
    with pytest.raises(Stopped, match="kill threshold") as caught:
        here.spend()
    assert caught.value.cause == "killed"
    ((name, switch),) = here.operator.frozen().items()
    assert switch["cause"] == "killed"
    here.operator.resume(name)
    with pytest.raises(Stopped):  # the mark stays crossed: the limit has to be raised
        here.spend()


def test_a_charge_that_crosses_a_mark_kills_too(desk: Any) -> None:
    here = desk(Threshold("50%", "kill"))
    with here.bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as flying:
        here.bursar.charge("0.05 USD")
        here.bursar._driver.keeper.look()
        assert isinstance(flying.stopped, Stopped)
        flying.settle(Usage(input_tokens=10, output_tokens=1))


def test_an_expiry_that_crosses_a_mark_kills_too(desk: Any, clock: ManualClock) -> None:
    here = desk(Threshold("50%", "kill"))
    here.bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=5_000)
    with here.bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as flying:
        clock.advance(601)
        here.bursar.tend()
        here.bursar._driver.keeper.look()
        assert isinstance(flying.stopped, Stopped)
        flying.settle(Usage(input_tokens=10, output_tokens=1))


def test_a_kill_that_was_answered_by_a_raise_is_not_thrown_again(desk: Any) -> None:
    here = desk(Threshold("50%", "kill"))
    with here.bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10):
        here.spend(5)
        (name,) = here.operator.frozen()
        here.operator.raise_limit("b", "1 USD")
        here.operator.resume(name)
        here.bursar._driver.keeper.look()
        here.bursar.tend()
        assert here.operator.frozen() == {}


def test_a_switch_that_could_not_be_thrown_is_thrown_later(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = desk(Threshold("50%", "kill"))
    with here.bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as flying:
        with monkeypatch.context() as away:
            away.setattr(here.bursar.store, "publish", _out_of_reach)
            here.spend(5)
        assert here.spent == Decimal("0.05")
        here.bursar.tend()
        here.bursar._driver.keeper.look()
        assert isinstance(flying.stopped, Stopped)


def _out_of_reach(*_: Any) -> None:
    raise StoreError("The store is away. Try again.", fault="unreachable")


def test_kill_ends_one_run_and_leaves_the_others(desk: Any) -> None:
    here = desk(Threshold("50%", "kill"), per="run")
    with here.bursar.scope(run="r1"):
        here.spend(5)
        with pytest.raises(Stopped):
            here.spend()
    with here.bursar.scope(run="r2"):
        here.spend()


def test_the_switch_of_an_account_is_forgotten_when_no_call_of_its_window_can_last(
    desk: Any, clock: ManualClock
) -> None:
    here = desk(Threshold("50%", "kill"), window="day")
    here.spend(5)
    guard = here.bursar.guard
    (account,) = (account.rule.key for account in here.bursar.store.accounts())

    def is_stopped_after(days: int) -> bool:
        clock.advance(days * 86_400)
        here.operator.freeze({"run": f"another, {days}"})  # so that there is something to read
        here.bursar._load_policy()
        return bool(guard.policy.decisions.is_stopped(account))

    assert is_stopped_after(1)
    assert not is_stopped_after(2)
    assert account not in str(here.bursar._held)
    here.spend()


def test_shadow_records_what_would_have_happened(desk: Any) -> None:
    here = desk(Threshold("50%", "block"), mode="shadow")
    here.spend(5)
    assert here.marks() == [("block", 50)]
    record = here.spend()
    assert record.shadowed == ("b",)
    here.spend(10)
    assert here.spent == Decimal("0.16")


# -- the switch ----------------------------------------------------------------------------------------------------------


def test_a_frozen_agent_is_stopped_and_others_go_on(desk: Any) -> None:
    here = desk()
    name = here.operator.freeze({"agent": "x"}, why="loops")
    with here.bursar.scope(agent="x"):
        with pytest.raises(Stopped, match=r"agent=x was stopped .* by ann: loops") as caught:
            here.spend()
        with here.bursar.scope(run="inner"), pytest.raises(Stopped):
            here.spend()
        with pytest.raises(Stopped), here.bursar.tool("search"):
            raise AssertionError("a frozen agent's tool ran")
    assert (caught.value.cause, caught.value.why) == ("frozen", "loops")
    with here.bursar.scope(agent="y"):
        here.spend()
    here.operator.resume(name)
    with here.bursar.scope(agent="x"):
        here.spend()


def test_everything_can_be_frozen(desk: Any) -> None:
    here = desk()
    assert here.operator.freeze({}) == "everything"
    with pytest.raises(Stopped):
        here.spend()


def test_a_call_in_flight_learns_of_the_switch_within_a_second(desk: Any) -> None:
    here = desk()
    with (
        here.bursar.scope(agent="x"),
        here.bursar.call("openai", "gpt-4o", input_tokens=1, max_output_tokens=9) as call,
    ):
        here.operator.freeze({"agent": "x"})
        for _ in range(100):
            if call.stopped is not None:
                break
            threading.Event().wait(0.02)
        assert isinstance(call.stopped, Stopped)


def test_a_call_in_flight_learns_of_a_switch_that_another_call_has_met(desk: Any) -> None:
    """Who reads the newer policy first takes it away from nobody."""
    here = desk()
    with (
        here.bursar.scope(agent="x"),
        here.bursar.call("openai", "gpt-4o", input_tokens=1, max_output_tokens=9) as call,
    ):
        here.operator.freeze({"agent": "x"})
        with pytest.raises(Stopped):
            here.bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=9)
        here.bursar._driver.keeper.look()
        assert isinstance(call.stopped, Stopped)


def test_housekeeping_outlives_whatever_goes_wrong_in_it(desk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bursar.keeper.LOOK_S", 0.01)
    monkeypatch.setattr("bursar.keeper.TEND_S", 0.01)
    here = desk()
    tended = threading.Semaphore(0)
    monkeypatch.setattr(here.bursar.store, "sweep", lambda: tended.release())

    def fail() -> None:
        raise TypeError("a definition that no version of Bursar wrote")

    here.bursar._driver.keeper.look_too(fail)
    assert all(tended.acquire(timeout=5) for _ in range(3))


# -- who may decide -------------------------------------------------------------------------------------------------------


def test_without_an_operator_nobody_may_raise(store: str) -> None:
    with Bursar(store, [Budget("b", "1 USD")]) as bursar:
        bursar.charge("0.1 USD")
        with pytest.raises(OperatorRequired, match="operator init"):
            Operator(bursar.store, OperatorKey.generate()).raise_limit("b", "5 USD")
        with pytest.raises(OperatorRequired, match="--key"):
            Operator(bursar.store).raise_limit("b", "5 USD")


def test_a_wrong_key_decides_nothing(desk: Any) -> None:
    here = desk(Threshold("50%", "ask"))
    here.spend(5)
    with pytest.raises(ApprovalRequired) as caught:
        here.spend()
    here.operator.freeze({"agent": "x"})
    thief = Operator(here.bursar.store, OperatorKey.generate())
    for decide in (
        lambda: thief.approve(caught.value.id),
        lambda: thief.raise_limit("b", "5 USD"),
        lambda: thief.resume("agent=x"),
        lambda: thief.appoint(),
        lambda: thief.publish_budgets([Budget("b", "500 USD")]),
    ):
        with pytest.raises(OperatorRequired):
            decide()
    with pytest.raises(OperatorRequired):  # nor may the agent's own code give itself more
        Bursar(here.bursar.store, [Budget("b", "500 USD")])
    with pytest.raises(ApprovalRequired):
        here.spend()


def test_a_signature_does_not_serve_twice(desk: Any) -> None:
    here = desk()
    here.operator.freeze({"agent": "x"}, why="first")
    here.operator.resume("agent=x")
    store = here.bursar.store
    _, held = store.definitions()
    signed = held["freeze"]["agent=x"].definition
    here.operator.freeze({"agent": "x"}, why="second")
    with pytest.raises(OperatorRequired):
        store.publish({"agent=x": signed}, "freeze")
    assert "agent=x" in here.operator.frozen()


def test_a_raise_written_past_the_store_counts_for_nothing(tmp_path: Path) -> None:
    """An agent that writes to the file itself cannot forge what only the key can sign."""
    import sqlite3

    file = tmp_path / "b.db"
    with Bursar(f"sqlite:///{file}", [Budget("b", "0.01 USD")]) as bursar:
        Operator(bursar.store).appoint()
        bursar.charge("0.01 USD")
        account = bursar.store.accounts().__next__().rule.key
        forged = json.dumps(
            {"account": account, "raise_by": 10**12, "until_us": None, "why": "", "signature": "x" * 88}
        )
        with sqlite3.connect(file) as connection:
            connection.execute(
                "INSERT INTO definitions(kind, name, definition, published_us) VALUES ('raise', 'mine', ?, 0)",
                (forged,),
            )
        with pytest.raises(BudgetExceeded):
            bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)


def test_a_decision_is_verified_once_however_often_it_is_read(desk: Any) -> None:
    here = desk()
    here.bursar.charge("0.01 USD")
    here.operator.raise_limit("b", "1 USD")
    here.bursar._load_policy()
    before = signing._signed.cache_info().misses
    here.bursar._load_policy()
    assert signing._signed.cache_info().misses == before
    assert here.bursar.status()[0].limit > 1


def test_the_key_is_not_shown_by_accident() -> None:
    key = OperatorKey.generate()
    assert key.text not in repr(key)
    assert OperatorKey(key.text).public == key.public
    with pytest.raises(InvalidInput) as caught:
        OperatorKey("bursar-operator-nonsense")
    assert "nonsense" not in str(caught.value)


# -- together -------------------------------------------------------------------------------------------------------------


def test_many_threads_cross_each_mark_once(desk: Any) -> None:
    here = desk(Threshold("25%", "notify"), Threshold("50%", "notify"), Threshold("75%", "notify"))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: here.spend(), range(10)))
    assert here.marks() == [("notify", 25), ("notify", 50), ("notify", 75)]


@pytest.mark.parametrize(
    ("threshold", "remedy"),
    [
        ({"at": "80", "action": "notify"}, "80%"),
        ({"at": "0%", "action": "notify"}, "100%"),
        ({"at": "101%", "action": "notify"}, "100%"),
        ({"at": "80%", "action": "warn"}, "notify"),
        ({"at": "80%", "action": "downgrade"}, "downgrade needs it"),
        ({"at": "80%", "action": "notify", "rate": "1 requests/minute"}, "nothing else takes it"),
        ({"at": "80%", "action": "throttle", "rate": "5 USD"}, "requests/minute"),
        ({"at": "80%", "action": "clamp", "max_output_tokens": 0}, "whole number"),
        ({"at": "80%", "action": "downgrade", "models": {}}, "gpt-4o"),
        ({"at": "80%", "action": "notify", "colour": "red"}, "at"),
    ],
)
def test_a_wrong_threshold_says_what_is_wrong(threshold: dict[str, Any], remedy: str) -> None:
    with pytest.raises(PolicyError, match=remedy):
        Budget("b", "1 USD", thresholds=[threshold])


def test_rates_and_slots_have_no_thresholds() -> None:
    for limit in ("60 requests/minute", "8 slots"):
        with pytest.raises(PolicyError, match="Rates and slots"):
            Budget("b", limit, thresholds=[Threshold("50%", "notify")])


def test_a_budget_is_its_definition() -> None:
    budget = Budget("b", "1 USD", thresholds=[Threshold("80%", "block"), {"at": "50%", "action": "notify"}])
    assert [one.at for one in budget.ladder] == ["50%", "80%"]
    assert Budget(**budget.definition()) == budget


EIGHTH = """
import sys
from bursar import Budget, BudgetExceeded, Bursar, Usage
bursar = Bursar(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for _ in range(100):  # until it is refused: who settles the last of all tries once more
    try:
        call = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=750)
        call.settle(Usage(input_tokens=1_000, output_tokens=750))
    except BudgetExceeded as error:
        print(type(error).__name__, flush=True)
        break
"""


def test_eight_processes_fire_each_action_once(tmp_path: Path) -> None:
    """A hundred calls fit; of eight processes one settles the fiftieth, one the eightieth, and one the last."""
    url = f"sqlite:///{tmp_path / 'eight.db'}?durability=process"
    ladder = [Threshold("50%", "notify"), Threshold("80%", "clamp", max_output_tokens=800), Threshold("100%", "kill")]
    with Bursar(url, [Budget("b", "1 USD", window="year", thresholds=ladder)]) as bursar:
        command = [sys.executable, "-c", EIGHTH, url]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        workers = [subprocess.Popen(command, **pipes) for _ in range(8)]  # type: ignore[call-overload]
        assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 8
        for worker in workers:
            worker.stdin.write("go\n")
            worker.stdin.flush()
        ends = [worker.communicate(timeout=120)[0].strip() for worker in workers]
        fired = [alert.facts["action"] for alert, _ in bursar.store.alerts() if alert.kind == "threshold"]
        assert sorted(fired) == ["clamp", "kill", "notify"]
        assert len(Operator(bursar.store).frozen()) == 1
        assert bursar.status()[0].spent == 1
        assert "Stopped" in ends
