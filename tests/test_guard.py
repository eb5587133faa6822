"""The life of one guarded call: what it settles to, what it is refused with, and what nobody can talk it into."""

from __future__ import annotations

import asyncio
import json
import math
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bursar import (
    Budget,
    BudgetExceeded,
    Bursar,
    BursarError,
    IdempotencyConflict,
    InvalidInput,
    Operator,
    OperatorKey,
    OperatorRequired,
    ReservationEnded,
    UnknownPrice,
    Usage,
)
from bursar.testing import ManualClock

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "gpt-4o-2024-08-06",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 1_000, "completion_tokens": 100, "total_tokens": 1_100},
}
CHUNK = {"id": "c", "object": "chat.completion.chunk", "model": "gpt-4o-2024-08-06"}
STREAM = [
    {**CHUNK, "choices": [{"index": 0, "delta": {"content": "Hi"}, "finish_reason": None}], "usage": None},
    {**CHUNK, "choices": [], "usage": ANSWER["usage"]},
]
COST_NANOS = 3_500_000  # 1,000 x $2.50 + 100 x $10 per million tokens


class Mime:
    """An SDK's answer object, as pydantic models are."""

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return ANSWER


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=["memory:", "sqlite:///FILE?durability=process"])
def bursar(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[Bursar]:
    url = request.param.replace("FILE", f"/{tmp_path}/bursar.db")
    with Bursar(url, [Budget("b", "1 USD"), Budget("flight", "9 slots")], clock=clock) as bursar:
        yield bursar


def call(bursar: Bursar, **options: Any) -> Any:
    return bursar.call("openai", "gpt-4o", **{"input_tokens": 1_000, "max_output_tokens": 500} | options)


def spent(bursar: Bursar) -> tuple[Decimal, Decimal]:
    status = next(status for status in bursar.status() if status.name == "b")
    return status.spent, status.reserved


def only_record(bursar: Bursar) -> Any:
    (record,) = bursar.records()
    return record


# -- what a call settles to ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer",
    [
        ANSWER,
        json.dumps(ANSWER),
        json.dumps(ANSWER).encode(),
        STREAM,
        Mime(),
        Usage(input_tokens=1_000, output_tokens=100),
    ],
    ids=["dict", "text", "bytes", "stream", "object", "usage"],
)
def test_a_call_settles_to_the_answer_in_any_shape(bursar: Bursar, answer: Any) -> None:
    with call(bursar) as open_call:
        record = open_call.settle(answer)
    assert (record.cost_nanos, record.estimated, record.outcome) == (COST_NANOS, False, "completed")
    assert (record.usage["input_tokens"], record.usage["output_tokens"]) == (1_000, 100)
    assert spent(bursar) == (Decimal("0.0035"), 0)
    assert only_record(bursar) == record


@pytest.mark.parametrize("answer", [{}, "", b"\xff", [], "<html>502</html>", {"usage": {"prompt_tokens": -5}}, 7, None])
def test_an_answer_that_cannot_be_read_is_booked_at_what_was_reserved(bursar: Bursar, answer: Any) -> None:
    with call(bursar) as open_call:
        record = open_call.settle(answer)
    assert record.estimated
    assert record.cost_nanos >= 7_500_000
    assert spent(bursar)[1] == 0


def test_an_error_that_is_returned_as_an_answer_is_not_billed(bursar: Bursar) -> None:
    with call(bursar) as open_call:
        open_call.settle(
            {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
        )
    assert spent(bursar) == (0, 0)
    assert only_record(bursar).kind == "release"


class Refusal(Exception):
    status_code = 429


class Unavailable(Exception):
    status_code = 503


@pytest.mark.parametrize(
    ("error", "billed"),
    [
        (Refusal(), False),
        (ConnectionRefusedError(), False),
        (Unavailable(), True),
        (TimeoutError(), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_a_call_that_failed_is_billed_unless_it_was_clearly_refused(
    bursar: Bursar, error: BaseException, billed: bool
) -> None:
    with pytest.raises(type(error)), call(bursar):
        raise error
    record = only_record(bursar)
    assert (record.kind, record.estimated) == (("settlement", True) if billed else ("release", False))
    assert spent(bursar)[1] == 0
    assert (spent(bursar)[0] > 0) is billed


def test_a_block_that_is_left_unsettled_books_the_worst_case(bursar: Bursar) -> None:
    with call(bursar):
        assert spent(bursar)[1] > 0
    record = only_record(bursar)
    assert record.estimated
    assert record.cost_nanos >= 2_500_000 + 5_000_000  # the whole maximum output


def test_i7_a_cost_above_the_limit_is_booked_and_reported(bursar: Bursar) -> None:
    with call(bursar) as open_call:
        open_call.settle(Usage(input_tokens=1_000_000, output_tokens=100))
    status = next(status for status in bursar.status() if status.name == "b")
    assert status.spent == Decimal("2.501")
    assert status.overrun > 2
    with pytest.raises(BudgetExceeded):
        call(bursar).__enter__()


def test_tools_cost_their_price_or_what_is_told(bursar: Bursar) -> None:
    with bursar.tool("search", cost="0.01 USD"):
        assert spent(bursar) == (0, Decimal("0.01"))
    with bursar.tool("search", cost="0.01 USD") as tool:
        tool.settle("0.003 USD")
    bursar.charge("0.002 USD", tool="crawler")
    assert spent(bursar) == (Decimal("0.015"), 0)
    for wrong in ("-1 USD", "0.003", 0.003, {}, "NaN USD"):
        with bursar.tool("search", cost="0.01 USD") as tool, pytest.raises(InvalidInput):
            tool.settle(wrong)
    assert spent(bursar) == (Decimal("0.065"), 0)  # each left its block at its price


def test_a_cut_stream_that_used_a_tool_without_a_known_fee_ends_at_its_worst_case(bursar: Bursar) -> None:
    """I9: the tokens that it told cannot be priced with that tool; the call ends all the same, with no error of Bursar's."""
    usage = {"input_tokens": 100, "output_tokens": 1, "server_tool_use": {"dream_requests": 1}}
    begun = {"type": "message_start", "message": {"model": "claude-sonnet-4-5", "usage": usage}}
    with bursar.call("anthropic", "claude-sonnet-4-5", input_tokens=1_000, max_output_tokens=500) as call:
        record = call.settle([begun])
    assert record is not None
    assert (record.estimated, record.cost_nanos) == (True, 1_000 * 3_000 + 500 * 15_000)
    assert bursar.store.open_reservations() == 0


def test_the_tokens_of_an_answer_that_used_a_tool_without_a_known_fee_are_booked(bursar: Bursar) -> None:
    """They are known, and may be many more than were reserved: what a tool finds is read by the model."""
    with bursar.call("anthropic", "claude-sonnet-4-5", input_tokens=1_000, max_output_tokens=500) as call:
        record = call.settle(Usage(input_tokens=90_000, output_tokens=200, server_tools={"dream": 3}))
    assert record is not None
    assert (record.estimated, record.cost_nanos) == (True, 90_000 * 3_000 + 500 * 15_000)


# -- the same id, late ends ------------------------------------------------------------------------------------------


def test_i6_the_same_id_is_the_same_call(bursar: Bursar) -> None:
    first = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500, id="call-1")
    again = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500, id="call-1")
    assert spent(bursar)[1] > 0
    assert first.settle(ANSWER) == again.settle(ANSWER)
    with pytest.raises(IdempotencyConflict) as caught:
        again.settle(Usage(input_tokens=1))
    assert caught.value.id == "call-1"
    with pytest.raises(IdempotencyConflict):
        bursar.reserve("openai", "gpt-4o-mini", input_tokens=1_000, max_output_tokens=500, id="call-1")
    assert len(list(bursar.records())) == 1
    bursar.charge("0.1 USD", id="charge-1")
    bursar.charge("0.1 USD", id="charge-1")
    with pytest.raises(IdempotencyConflict):
        bursar.charge("0.2 USD", id="charge-1")
    assert spent(bursar) == (Decimal("0.1035"), 0)


@pytest.mark.parametrize(
    "other",
    [
        {"max_output_tokens": 16_000},
        {"region": "eu"},
        {"body": {"service_tier": "priority"}},
        {"usage": Usage(input_tokens=30)},
    ],
)
def test_i6_a_repeated_id_asks_for_no_more_than_before(bursar: Bursar, other: dict[str, Any]) -> None:
    """What the first reservation does not cover would go out with it."""
    said: dict[str, Any] = {"input_tokens": 10, "max_output_tokens": 10, "id": "mine"}
    bursar.reserve("openai", "gpt-5.1", **said)
    with pytest.raises(IdempotencyConflict):
        bursar.reserve("openai", "gpt-5.1", **{**said, **other})


def test_i6_an_id_that_comes_again_ends_unknown_at_what_was_granted_under_it() -> None:
    """Whatever is estimated by then: the record says what the accounts do."""
    with Bursar("memory:", [Budget("b", "100 USD")]) as bursar:
        asked: Any = {"input_tokens": 1_000, "resize": False}
        bursar.reserve("openai", "gpt-4o", id="x", **asked)
        for _ in range(3):
            bursar.reserve("openai", "gpt-4o", **asked).settle(Usage(input_tokens=1_000, output_tokens=10))
        record = bursar.reserve("openai", "gpt-4o", id="x", **asked).settle_unknown("lost")
        assert record is not None
        assert [record.cost_nanos] == [one["amount"] for one in record.amounts]
        assert record.usage["output_tokens"] > 10_000


def test_i6_a_repeated_id_gets_the_smaller_answer_that_was_granted() -> None:
    with Bursar("memory:", [Budget("strict", "0.01 USD", estimate="strict")]) as bursar:
        said: dict[str, Any] = {"messages": "hello", "id": "mine"}
        first, again = (bursar.reserve("openai", "gpt-4o", **said) for _ in range(2))
        assert first.max_output_tokens == again.max_output_tokens < 1_000
        assert again.capped


def test_i5_what_has_ended_in_another_way_says_how(bursar: Bursar) -> None:
    reservation = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
    reservation.release()
    with pytest.raises(ReservationEnded) as caught:
        reservation.settle(ANSWER)
    assert (caught.value.id, caught.value.ended) == (reservation.id, "release")
    operator = Operator(bursar.store)
    operator = Operator(bursar.store, operator.appoint())
    with pytest.raises(InvalidInput, match="no reservation"):
        operator.release("never-seen")


def test_i5_a_reservation_expires_and_is_settled_late(bursar: Bursar, clock: ManualClock) -> None:
    reservation = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500, ttl_s=60)
    clock.advance(61)
    bursar.tend()
    assert spent(bursar)[0] > Decimal("0.0035")
    record = reservation.settle(ANSWER)
    assert record is not None
    assert record.corrects == reservation.id
    assert spent(bursar) == (Decimal("0.0035"), 0)
    assert sum(record.cost_nanos for record in bursar.records()) == COST_NANOS


def test_i5_an_operator_takes_an_expired_call_off_the_books(bursar: Bursar, clock: ManualClock) -> None:
    id = bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500).id
    clock.advance(600)
    bursar.tend()
    with pytest.raises(OperatorRequired, match="key"):
        Operator(bursar.store).release(id)
    key = Operator(bursar.store).appoint()
    with pytest.raises(OperatorRequired, match="signature"):
        Operator(bursar.store, OperatorKey.generate()).release(id)
    assert spent(bursar) != (0, 0)
    Operator(bursar.store, key).release(id)
    assert spent(bursar) == (0, 0)


def test_i8_a_live_block_is_extended_and_a_dead_one_is_not(bursar: Bursar, clock: ManualClock) -> None:
    with call(bursar) as live:
        bursar.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
        for _ in range(6):
            clock.advance(250)
            bursar.tend()
        assert bursar.store.open_reservations() == 1
        assert live.settle(ANSWER).kind == "settlement"


def test_i8_a_live_block_of_seconds_is_extended_as_often_as_calls_are_looked_at(
    bursar: Bursar, clock: ManualClock
) -> None:
    with bursar.tool("search", cost="0.01 USD", ttl_s=2):
        for _ in range(6):
            clock.advance(1)
            bursar._driver.keeper.look()
            bursar.store.sweep()
        assert bursar.store.open_reservations() == 1


# -- room for a smaller answer ---------------------------------------------------------------------------------------


def test_a_call_without_a_maximum_is_cut_to_what_fits(bursar: Bursar) -> None:
    with call(bursar, input_tokens=390_000, max_output_tokens=None) as cut:  # $0.975 of $1
        assert cut.capped
        assert 16 <= cut.max_output_tokens <= 2_500
        cut.settle(Usage(input_tokens=390_000, output_tokens=cut.max_output_tokens))
    assert spent(bursar)[0] <= 1


def test_a_call_that_may_not_be_cut_is_told_what_would_fit(bursar: Bursar) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        call(bursar, input_tokens=390_000, max_output_tokens=16_000).__enter__()
    error = caught.value
    assert 16 <= error.max_output_tokens <= 2_500
    assert f"at most {error.max_output_tokens} tokens" in str(error)
    assert (error.budget, error.unit, error.limit, error.spent, error.reserved) == ("b", "USD", 1, 0, 0)
    assert error.asked > error.available == 1
    with call(bursar, input_tokens=390_000, max_output_tokens=error.max_output_tokens):
        assert spent(bursar)[1] <= 1


def test_errors_travel_between_processes(bursar: Bursar) -> None:
    with pytest.raises(BudgetExceeded) as caught:
        call(bursar, input_tokens=10**7).__enter__()
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (type(copy), str(copy), copy.fields) == (BudgetExceeded, str(caught.value), caught.value.fields)
    assert isinstance(copy, RuntimeError)
    with pytest.raises(AttributeError):
        _ = copy.nothing


def test_async_twins_do_the_same(bursar: Bursar) -> None:
    async def everything() -> None:
        async with bursar.acall("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500) as open_call:
            assert (await open_call.asettle(ANSWER)).cost_nanos == COST_NANOS
        async with bursar.atool("search", cost="0.01 USD"):
            pass
        reservation = await bursar.areserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500)
        await reservation.arelease()
        await bursar.acharge("0.01 USD")
        with pytest.raises(TimeoutError):
            async with bursar.acall("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=500):
                raise TimeoutError

    asyncio.run(everything())
    kinds = sorted((record.kind, record.estimated) for record in bursar.records())
    assert kinds == [
        ("charge", False),
        ("release", False),
        ("settlement", False),
        ("settlement", False),
        ("settlement", True),
    ]


# -- what nobody can talk it into ------------------------------------------------------------------------------------

NAN = float("nan")
WRONG_CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    *[("reserve", (provider, "gpt-4o"), {}) for provider in ("", "a\nb", "x" * 600, None, 5)],
    *[("reserve", ("openai", model), {}) for model in ("", "a\0b", None, ["gpt-4o"])],
    *[("reserve", ("openai", "gpt-4o"), {"input_tokens": n}) for n in (-1, 1.5, "10", NAN, 2**70, True)],
    *[("reserve", ("openai", "gpt-4o"), {"max_output_tokens": n}) for n in (-1, 1.5, "10", NAN, 2**70, math.inf)],
    *[("reserve", ("openai", "gpt-4o"), {"n": n}) for n in (-1, 1.5, "2")],
    *[("reserve", ("openai", "gpt-4o"), {"retries": n}) for n in (-1, 0.5, "2")],
    *[("reserve", ("openai", "gpt-4o"), {"ttl_s": n}) for n in (0, -5, NAN, math.inf, "60", None, 10**9)],
    *[("reserve", ("openai", "gpt-4o"), {"id": id}) for id in ("", "a~b", "a!b", "[x", "#x", "@policy", "a\n", "x" * 201, 5, b"x")],
    *[("reserve", ("openai", "gpt-4o"), {"tags": tags}) for tags in ("x", 5, {"": "x"}, {"a b": "x"}, {"a": ""}, {"a": "x" * 513})],
    *[("reserve", ("openai", "gpt-4o"), {"tags": tags}) for tags in ({"a": "\n"}, {"a": "\ud800"}, {5: "x"})],
    ("reserve", ("openai", "gpt-4o"), {"tags": {f"t{n}": "x" for n in range(65)}}),
    ("reserve", ("openai", "gpt-4o"), {"messages": 5}),
    *[("tool", (name,), {}) for name in ("", "a\nb", None)],
    *[("tool", ("search",), {"cost": cost}) for cost in ("1", "one USD", "-1 USD", 0.01, "NaN USD", "1e40 USD", "Infinity USD")],
    *[("charge", (cost,), {}) for cost in ("", "1", "-1 USD", 5, None, "9999999999 USD")],
    ("charge", ("1 USD",), {"id": "a~"}),
    ("records", (), {"run": ""}),
    ("status", (), {"bad name": "x"}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "args", "options"), WRONG_CALLS, ids=str)
def test_a_wrong_argument_is_an_error_that_says_so_and_nothing_is_changed(
    method: str, args: tuple[Any, ...], options: dict[str, Any]
) -> None:
    with Bursar("memory:", [Budget("b", "1 USD")]) as bursar:
        if method == "reserve":
            options = {"input_tokens": 10, "max_output_tokens": 10} | options
        with pytest.raises(InvalidInput) as caught:
            getattr(bursar, method)(*args, **options)
        assert str(caught.value).endswith(".")
        assert len(str(caught.value)) < 2_000
        assert list(bursar.records()) == []
        assert list(bursar.store.accounts()) == []
        assert bursar.store.open_reservations() == 0


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: Bursar("mongodb://x"), InvalidInput),
        (lambda: Bursar("sqlite:///a.db?mode=ro"), InvalidInput),
        (lambda: Bursar("sqlite:///a.db?durability=none"), InvalidInput),
        (lambda: Bursar(""), InvalidInput),
        (lambda: Bursar("memory:", on_expiry="keep"), InvalidInput),
        (lambda: Bursar("memory:", max_accounts=0), InvalidInput),
        (lambda: Bursar("memory:", ["b"]), BursarError),  # type: ignore[list-item]
        (lambda: Bursar("memory:", rates={"EUR": 1.08}), BursarError),  # type: ignore[dict-item]
    ],
)
def test_a_wrong_option_of_bursar_is_an_error_that_says_so(
    make: Callable[[], Bursar], kind: type[BursarError], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        make()
    assert str(caught.value).endswith(".")
    assert list(tmp_path.iterdir()) == []


def test_i11_an_unknown_price_is_never_nothing(bursar: Bursar) -> None:
    with pytest.raises(UnknownPrice) as caught:
        bursar.reserve("openai", "gpt-4-omega-unknown", input_tokens=10, max_output_tokens=10)
    assert caught.value.nearest
    assert list(bursar.records()) == []


@pytest.mark.parametrize("count", [-1, 2**48 + 1, 1.5, True, "5", NAN])
def test_usage_is_counted_in_whole_numbers(count: Any) -> None:
    with pytest.raises(InvalidInput):
        Usage(input_tokens=count)


@pytest.mark.parametrize("said", [{"n": 2**60}, {"input_tokens": 2**48, "retries": 2**60}])
@pytest.mark.parametrize("mode", ["enforce", "shadow"])
def test_a_monstrous_call_is_refused_with_a_reason(said: dict[str, int], mode: str, tmp_path: Path) -> None:
    """By the budget; and where that only watches, because no sum of it could be held."""
    budgets = [Budget("b", "1 USD", mode=mode, estimate="strict")]
    with Bursar(f"sqlite:////{tmp_path}/bursar.db", budgets) as bursar:
        with pytest.raises(BursarError) as caught:
            bursar.reserve("openai", "gpt-4o", **{"input_tokens": 10, "max_output_tokens": 10} | said)  # type: ignore[arg-type]
        assert str(caught.value).endswith(".")
        assert bursar.store.open_reservations() == 0
        bursar.charge("0.01 USD")


def test_a_monstrous_usage_is_booked_and_harms_no_other(tmp_path: Path) -> None:
    """Until the sum would no longer fit: then that call alone fails, and says so."""
    with Bursar(f"sqlite:////{tmp_path}/bursar.db", [Budget("b", "1 USD", mode="shadow")]) as bursar:
        told = []
        for _ in range(4):
            reservation = bursar.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
            try:
                reservation.settle(Usage(input_tokens=2**48, output_tokens=2**48))
            except BursarError as error:
                told.append(error)
                reservation.release()
        assert {error.fault for error in told} == {"overflow"}
        bursar.charge("0.01 USD")
        assert bursar.store.open_reservations() == 0


def test_thousands_of_runs_are_thousands_of_accounts(tmp_path: Path) -> None:
    with Bursar(f"sqlite:////{tmp_path}/bursar.db?durability=process", [Budget("run", "1 USD", per="run")]) as bursar:

        def work(start: int) -> None:
            for number in range(start, start + 250):
                bursar.charge("0.001 USD", tags={"run": f"r{number}"})

        threads = [threading.Thread(target=work, args=(start,)) for start in range(0, 2_000, 250)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(bursar.status()) == 2_000
        assert [status.spent for status in bursar.status(run="r7")] == [Decimal("0.001")]
        assert sum(record.cost_nanos for record in bursar.records()) == 2_000 * 1_000_000


# -- failures -----------------------------------------------------------------------------------------------------------------


class Refusal(Exception):
    """What an SDK raises for a 429."""

    status_code = 429


@pytest.mark.parametrize("url", ["memory:", "sqlite:///FILE?durability=process"])
def test_a_storm_of_failures_stops_at_its_limit_in_every_process(url: str, tmp_path: Path, clock: ManualClock) -> None:
    """Refusals, time-outs and failing tools count, whoever met them; time alone lets calls through again."""
    url = url.replace("FILE", str(tmp_path / "storm.db"))
    budgets = [Budget("storm", "3 failures/minute", per="connection"), Budget("b", "1 USD")]
    with Bursar(url, budgets, clock=clock) as one, Bursar(one.store, budgets, clock=clock) as other:
        for number in range(4):
            error: Exception = Refusal() if number % 2 else TimeoutError()
            with pytest.raises(type(error)), call((one, other)[number % 2]):
                raise error
        with pytest.raises(BudgetExceeded) as caught:
            other.reserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        assert (caught.value.budget, caught.value.unit) == ("storm", "failures")
        assert caught.value.retry_after == 20
        one.reserve("anthropic", "claude-sonnet-4-5", input_tokens=10, max_output_tokens=10).release()
        clock.advance(20)
        with call(other) as passing:
            passing.settle(ANSWER)
        with pytest.raises(KeyError), one.tool("search"):
            raise KeyError
        counts = {status.scope["connection"]: status.spent for status in one.status() if status.name == "storm"}
        assert counts["search"] == 1


# -- scopes that cross processes ----------------------------------------------------------------------------------------------

CHILD = """
import sys
from bursar import BudgetExceeded, Bursar
bursar = Bursar(sys.argv[1])
try:
    with bursar.scope(agent="child"):
        bursar.charge("0.05 USD")
        bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=10_000)
except BudgetExceeded as error:
    print(error.budget, error.limit, error.spent)
"""


def test_a_child_process_spends_from_its_parents_budget(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'family.db'}?durability=process"
    with Bursar(url, [Budget("b", "9 USD")]) as parent, parent.scope(run="r-1", team="a", budget="0.10 USD"):
        environ = os.environ | parent.scope_environ()
        done = subprocess.run(
            [sys.executable, "-c", CHILD, url], env=environ, capture_output=True, text=True, timeout=60
        )
        assert done.stdout.split()[-2:] == ["0.10", "0.05"], done.stderr
        (charge,) = [record for record in parent.records() if record.kind == "charge"]
        assert charge.tags == {"run": "r-1", "team": "a", "agent": "child"}
        parent.charge("0.02 USD")
        with pytest.raises(BudgetExceeded):
            parent.reserve("openai", "gpt-4o", input_tokens=1_000, max_output_tokens=3_000)


def test_a_scope_of_the_same_tags_lifts_no_limit(bursar: Bursar) -> None:
    with bursar.scope(run="r-1", budget="0.01 USD"), bursar.scope(run="r-1", budget="100 USD"):
        with pytest.raises(BudgetExceeded) as caught:
            bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=9_000)
        assert caught.value.limit == Decimal("0.01")
        with bursar.scope(run="r-1", budget="0.005 USD"), pytest.raises(BudgetExceeded) as caught:
            bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=9_000)
        assert caught.value.limit == Decimal("0.005")


def test_a_remote_agent_spends_from_the_callers_budget(bursar: Bursar) -> None:
    with bursar.scope(team="a", run="r-1", budget="0.10 USD"):
        header = bursar.scope_headers()["baggage"]
    assert bursar.scope_headers() == {}
    with bursar.scope(carried=f"other=1;p=2, {header};ttl=3", agent="remote") as scope:
        assert scope.runs == ("r-1",)
        assert bursar.charge("0.01 USD").tags == {"team": "a", "run": "r-1", "agent": "remote"}
        with pytest.raises(BudgetExceeded) as caught:
            bursar.reserve("openai", "gpt-4o", input_tokens=10_000, max_output_tokens=9_000)
        assert caught.value.limit == Decimal("0.10")


@pytest.mark.parametrize(
    "text", ["", "x", "[]", "[[],[]]", '[[{"a b":"c"}],[]]', '[[{"run":7}]]', "bursar.scope=%7B", "[" * 5_000]
)
def test_a_carried_scope_that_cannot_be_read_is_an_error(bursar: Bursar, text: str) -> None:
    with pytest.raises(InvalidInput), bursar.scope(carried=text):
        raise AssertionError("it was taken")
