"""Detectors at work: what they find is told once, holds calls up, or stops a run; calls without a limit or an owner are seen."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

import pytest

from bursar import (
    ApprovalRequired,
    Budget,
    BudgetExceeded,
    Bursar,
    InvalidInput,
    Operator,
    Stopped,
    StoreError,
    Threshold,
    Usage,
)
from bursar.commands import Answer, Command, Tell
from bursar.detect import Detectors
from bursar.reservation import Reservation
from bursar.stores.memory import MemoryStore
from bursar.testing import ManualClock

TOOLS = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def make(clock: ManualClock) -> Iterator[Any]:
    made: list[Bursar] = []

    def bursar(**said: Any) -> Bursar:
        said.setdefault("budgets", [Budget("b", "100 USD")])
        made.append(Bursar("memory:", clock=clock, **said))
        return made[-1]

    yield bursar
    for one in made:
        one.close()


def asks(number: int) -> dict[str, Any]:
    """What the model asks for: the same search, each time under another id."""
    call = {"id": f"call-{number}", "type": "function", "function": {"name": "search", "arguments": '{"q": "weather"}'}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def answer(number: int) -> dict[str, Any]:
    message = asks(number)
    usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
    return {"id": "c", "object": "chat.completion", "model": "gpt-4o", "usage": usage,
            "choices": [{"index": 0, "message": message, "finish_reason": "tool_calls"}]}  # fmt: skip


def loop(bursar: Bursar, rounds: int = 20) -> int:
    """An agent that searches for the same thing and learns the same thing; the number of calls it was let make."""
    messages: list[dict[str, Any]] = [{"role": "user", "content": "What is the weather?"}]
    with bursar.scope(run="r", agent="looper"):
        for number in range(rounds):
            body = {"model": "gpt-4o", "messages": list(messages), "tools": TOOLS, "max_completion_tokens": 100}
            try:
                with bursar.call("openai", "gpt-4o", body=body) as call:
                    call.settle(answer(number))
            except BudgetExceeded:
                return number
            result = {"role": "tool", "tool_call_id": f"call-{number}", "content": "no such service"}
            messages += [asks(number), result]
    return rounds


def told(bursar: Bursar) -> list[tuple[str, str]]:
    return [
        (alert.facts["detector"], alert.facts["action"])
        for alert, _ in bursar.store.alerts()
        if alert.kind == "detector"
    ]


def test_a_loop_is_told_of_by_default_and_goes_on(make: Any) -> None:
    bursar = make()
    assert loop(bursar) == 20
    assert told(bursar).count(("loop", "notify")) == 1


def test_a_loop_is_stopped_where_detectors_act(make: Any) -> None:
    bursar = make(detectors=Detectors())
    assert loop(bursar) <= 4
    assert told(bursar) == [("loop", "block")]
    with bursar.scope(run="r"), pytest.raises(Stopped) as caught:  # whatever it sends next
        bursar.reserve("openai", "gpt-4o", messages="something else", max_output_tokens=10)
    assert caught.value.cause == "loop"
    with bursar.scope(run="other"):
        bursar.reserve("openai", "gpt-4o", messages="something else", max_output_tokens=10).release()


class Refusing(MemoryStore):
    """A store that is out of reach for some things."""

    away: tuple[type | str, ...] = ()

    def execute(self, command: Command) -> Answer:
        if type(command) in self.away:
            raise StoreError("no way. Try again.", fault="unreachable")
        return super().execute(command)

    def publish(self, definitions: Mapping[str, dict[str, Any]], kind: str = "budget") -> int:
        if kind in self.away:
            raise StoreError("no way. Try again.", fault="unreachable")
        return super().publish(definitions, kind)


def test_what_the_store_could_not_be_told_of_is_told_when_it_is_seen_again() -> None:
    store = Refusing()
    bursar = Bursar(store, [])
    store.away = (Tell,)
    with pytest.raises(StoreError):
        bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)
    store.away = ()
    for _ in range(2):
        bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1).release()
    assert told(bursar) == [("uncapped", "notify")]


@pytest.mark.parametrize("away", [Tell, "approval"])
def test_a_question_whose_asking_was_cut_off_is_told_when_it_is_asked_again(away: type | str) -> None:
    store = Refusing()
    bursar = Bursar(store, [Budget("b", "1 USD", thresholds=[Threshold("50%", "ask")])])
    bursar.charge("0.60 USD")

    def ask() -> None:
        bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)

    store.away = (away,)
    with pytest.raises(StoreError):
        ask()
    store.away = ()
    for _ in range(2):
        with pytest.raises(ApprovalRequired):
            ask()
    assert "approval" in [alert.kind for alert, _ in store.alerts()]
    assert len(store.definitions()[1]["approval"]) == 1


def test_off_sees_nothing(make: Any) -> None:
    bursar = make(detectors="off")
    assert loop(bursar) == 20
    assert told(bursar) == []


def test_an_operator_may_let_a_loop_go_on(make: Any) -> None:
    bursar = make(detectors=Detectors(loops="ask"))
    assert loop(bursar) <= 4
    assert loop(bursar) == 0
    (question,) = Operator(bursar.store).questions()
    assert question.id.startswith("ask-")
    assert question.scope == {"run": "r"}
    Operator(bursar.store, Operator(bursar.store).appoint()).approve(question.id)
    assert loop(bursar) > 0


def test_kill_freezes_the_run_for_every_process(make: Any) -> None:
    bursar = make(detectors=Detectors(loops="kill"))
    loop(bursar)
    ((_, switch),) = Operator(bursar.store).frozen().items()
    assert (switch["tags"], switch["cause"]) == ({"run": "r"}, "loop")


def test_the_same_question_of_many_users_of_one_process_is_no_loop(make: Any) -> None:
    bursar = make(detectors=Detectors())
    for _ in range(30):
        bursar.reserve("openai", "gpt-4o", messages="hi", max_output_tokens=10).settle(Usage(input_tokens=1))
    assert told(bursar) == []


def test_a_tool_that_is_called_again_and_again_does_not_run(make: Any) -> None:
    bursar = make(detectors=Detectors())
    ran = 0

    def search() -> None:
        nonlocal ran
        with bursar.tool("search", arguments={"q": "weather"}):
            ran += 1

    with bursar.scope(run="r"):
        for _ in range(20):
            with contextlib.suppress(Stopped):
                search()
    assert 2 <= ran <= 4


def test_a_failing_call_waits_before_its_next_attempt_and_is_given_up(make: Any, clock: ManualClock) -> None:
    bursar = make(detectors=Detectors(backoff_ms=1, max_backoff_ms=2))
    errors = []
    with bursar.scope(run="r"):
        for _ in range(7):
            clock.advance(1)
            try:
                with bursar.call("openai", "gpt-4o", messages="hi", max_output_tokens=10):
                    raise TimeoutError
            except (TimeoutError, Stopped) as error:
                errors.append(error)
    assert [type(error) for error in errors] == [TimeoutError] * 5 + [Stopped] * 2
    assert errors[-1].cause == "attempts"


class Unprintable:
    def __repr__(self) -> str:
        raise ValueError("nobody may look at this")


def _deep(levels: int) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for _ in range(levels):
        data = {"a": data}
    return data


HOSTILE = [
    Unprintable(),
    [{"functionCall": "x"}],
    [{"functionResponse": 5}],
    _deep(50_000),
    ["\ud800" * 300, b"x", None],
]


@pytest.mark.parametrize("content", HOSTILE)
def test_what_detectors_cannot_read_fails_no_call(make: Any, content: Any) -> None:
    bursar = make(detectors=Detectors())
    message = {"role": "assistant", "content": content, "tool_calls": [{"function": "x"}, 5]}
    for messages in ([message], [{"role": "assistant", "content": content, "tool_calls": 5}, "go on"]):
        with bursar.scope(run="r"):
            body = {**answer(1), "choices": [{"index": 0, "message": message}]}
            if not isinstance(content, dict):  # what is too deep for JSON cannot be estimated
                with bursar.call("openai", "gpt-4o", messages=messages, max_output_tokens=10) as call:
                    call.settle(body)
                with bursar.call("openai", "gpt-4o", messages=messages, max_output_tokens=10) as call:
                    call.settle_unknown("cut")
            with bursar.call("openai", "gpt-4o", messages="hi", max_output_tokens=10) as call:
                assert call.settle(body).cost_nanos > 0
            with bursar.tool("search", arguments=content):
                assert bursar.store.open_reservations() == 1
    assert bursar.store.open_reservations() == 0


def test_a_message_that_cannot_be_read_opens_no_door(make: Any) -> None:
    bursar = make(budgets=[], detectors=Detectors(uncapped="block"), require=["team"])
    messages = [{"role": "user", "content": Unprintable()}]
    for scope in ({"team": "a", "run": "r"}, {"run": "r"}):
        with bursar.scope(**scope), pytest.raises(Stopped):
            bursar.reserve("openai", "gpt-4o", messages=messages, max_output_tokens=10)


def test_calls_without_a_limit_are_told_of_refused_or_limited(make: Any) -> None:
    only_team = [Budget("team", "1 USD", match={"team": "a"})]
    reporting = make(budgets=only_team)
    for _ in range(2):
        reporting.reserve("openai", "gpt-4o", messages="hi", max_output_tokens=10).release()
    assert told(reporting) == [("uncapped", "notify")]
    with pytest.raises(Stopped, match="No budget limits this call"):
        make(budgets=only_team, detectors=Detectors(uncapped="block")).reserve("openai", "gpt-4o", messages="hi")
    limited = make(budgets=only_team, default_limit="0.01 USD")
    with pytest.raises(BudgetExceeded) as caught:
        limited.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=10)
    assert caught.value.budget == "(default)"
    assert told(limited) == []


def test_a_call_has_to_carry_the_tags_that_are_required(make: Any) -> None:
    bursar = make(require=["team", "agent"])
    with bursar.scope(team="a"), pytest.raises(Stopped, match="no agent") as caught:
        bursar.reserve("openai", "gpt-4o", messages="hi", max_output_tokens=10)
    assert caught.value.cause == "unattributed"
    with bursar.scope(team="a", agent="x"):
        bursar.reserve("openai", "gpt-4o", messages="hi", max_output_tokens=10).release()
    with pytest.raises(InvalidInput):
        make(require=["=x"])


def test_a_budget_that_burns_too_fast_is_told_of(make: Any, clock: ManualClock) -> None:
    bursar = make(budgets=[Budget("day", "10 USD", window="day")])
    with bursar.scope(run="r", agent="x"):
        for _ in range(55):
            clock.advance(60)
            call = bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=10_000)
            call.settle(Usage(input_tokens=10_000, output_tokens=10_000))
    assert ("burn", "notify") in told(bursar)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("owner", ["notices.sentry._tower", "notices.sentry", "learner", "room"])
@pytest.mark.parametrize("ends_its_parents_call", [False, True])
def test_a_fork_s_child_does_not_wait_for_its_parents_threads(
    make: Any, owner: str, ends_its_parents_call: bool
) -> None:
    """A thread of the parent may be amid a look at the time; the child has no such thread, and the lock stays held."""
    bursar = make(detectors=Detectors())

    def reserve() -> Reservation:
        return bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)

    with bursar.scope(run="r"):
        reservation = reserve()
        with attrgetter(owner)(bursar.guard)._lock:
            child = os.fork()
            if not child:
                signal.alarm(5)
                ended = reservation if ends_its_parents_call else reserve()
                ended.settle(Usage(input_tokens=1, output_tokens=1))
                os._exit(0)
        assert os.waitpid(child, 0)[1] == 0


def test_a_run_that_burns_a_budget_too_fast_is_stopped_where_that_is_asked_for(make: Any, clock: ManualClock) -> None:
    bursar = make(budgets=[Budget("day", "10 USD", window="day")], detectors=Detectors(burn="block"))

    def spend() -> None:
        clock.advance(60)
        call = bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=10_000)
        call.settle(Usage(input_tokens=10_000, output_tokens=10_000))

    with bursar.scope(run="r"):
        for _ in range(55):
            with contextlib.suppress(Stopped):
                spend()
        with pytest.raises(Stopped) as caught:
            spend()
    assert caught.value.cause == "burn"
    with bursar.scope(run="other"):
        bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10).release()
