"""Waiting for headroom: first come, first served on each account, by threads and tasks alike, and cancellably."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from bursar import Budget, BudgetExceeded, Bursar, Reservation, Usage
from bursar.call import Pause, Reload
from bursar.testing import ManualClock
from bursar.waiting import Ticket, WaitingRoom

FLIGHT = Budget("flight", "1 slots", on_exceed="wait 60s")


def reserve(bursar: Bursar, **options: Any) -> Reservation:
    return bursar.reserve("openai", "gpt-4o", **{"input_tokens": 10, "max_output_tokens": 10} | options)


@pytest.fixture(params=["memory:", "sqlite:///FILE?durability=process"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).replace("FILE", f"/{tmp_path}/bursar.db")


@pytest.fixture
def bursar(url: str) -> Iterator[Bursar]:
    with Bursar(url, [FLIGHT]) as bursar:
        yield bursar


def waiting(bursar: Bursar) -> int:
    return len(bursar.guard.room)


class Crowd:
    """Callers that come one after another, each seen in the queue before the next comes."""

    def __init__(self, bursar: Bursar) -> None:
        self.bursar = bursar
        self.served: list[int] = []
        self.threads: list[threading.Thread] = []
        self.failures: list[Exception] = []

    def come(self, number: int, work: Callable[[Callable[[], None]], object]) -> None:
        """`work` is told to call back when it is served, while it still holds what it waited for."""

        def run() -> None:
            try:
                work(lambda: self.served.append(number))
            except Exception as error:  # noqa: BLE001 - the test looks at it
                self.failures.append(error)

        before = waiting(self.bursar)
        self.threads.append(threading.Thread(target=run))
        self.threads[-1].start()
        while waiting(self.bursar) == before:
            assert self.threads[-1].is_alive(), self.failures

    def go(self) -> None:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()


def by_thread(bursar: Bursar, served: Callable[[], None], **options: Any) -> None:
    reservation = reserve(bursar, **options)
    served()
    reservation.release()


def by_task(bursar: Bursar, served: Callable[[], None]) -> None:
    async def one() -> None:
        reservation = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        served()
        await reservation.arelease()

    asyncio.run(one())


@pytest.mark.parametrize("kinds", [[by_thread], [by_task], [by_thread, by_task]], ids=["threads", "tasks", "mixed"])
def test_who_came_first_is_served_first(bursar: Bursar, kinds: list[Callable[..., None]]) -> None:
    holder = reserve(bursar)
    crowd = Crowd(bursar)
    for number in range(8):
        crowd.come(number, functools.partial(kinds[number % len(kinds)], bursar))
    holder.release()
    crowd.go()
    assert crowd.served == list(range(8))
    assert crowd.failures == []
    assert not bursar.guard.room


def test_a_small_call_does_not_overtake_a_large_one_that_waits(url: str) -> None:
    with Bursar(url, [Budget("tokens", "100 tokens", on_exceed="wait 60s", estimate="strict")]) as bursar:
        hold = bursar.reserve("openai", "gpt-4o", input_tokens=40, max_output_tokens=30)
        crowd = Crowd(bursar)
        for number, output in enumerate((60, 5)):  # the second would fit beside the holder
            crowd.come(number, functools.partial(by_thread, bursar, max_output_tokens=output))
        assert crowd.served == []
        hold.release()
        crowd.go()
        assert crowd.served == [0, 1]


def test_who_is_cancelled_leaves_the_queue_to_the_next(bursar: Bursar) -> None:
    async def everything() -> list[int]:
        served: list[int] = []

        async def one(number: int) -> None:
            reservation = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
            served.append(number)
            await reservation.arelease()

        holder = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        tasks = []
        for number in range(5):
            tasks.append(asyncio.ensure_future(one(number)))
            while waiting(bursar) <= number:
                await asyncio.sleep(0)
        for number in (0, 2):
            tasks[number].cancel()
        await asyncio.gather(tasks[0], tasks[2], return_exceptions=True)
        await holder.arelease()
        await asyncio.gather(tasks[1], tasks[3], tasks[4])
        return served

    assert asyncio.run(everything()) == [1, 3, 4]
    assert not bursar.guard.room


def test_patience_ends_with_an_error_that_has_the_facts(url: str) -> None:
    clock = ManualClock()
    with Bursar(url, [Budget("flight", "1 slots", on_exceed="wait 30s", owner="ops@acme")], clock=clock) as bursar:
        holder = reserve(bursar)
        failed: list[BudgetExceeded] = []

        def work(_: Callable[[], None]) -> None:
            with pytest.raises(BudgetExceeded) as caught:
                reserve(bursar)
            failed.append(caught.value)

        crowd = Crowd(bursar)
        crowd.come(0, work)
        clock.advance(29)
        assert waiting(bursar) == 1
        clock.advance(1)
        crowd.go()
        (error,) = failed
        assert (error.budget, error.unit, error.limit, error.reserved, error.asked) == (
            "flight", "slots", Decimal(1), Decimal(1), Decimal(1),
        )  # fmt: skip
        assert "ask ops@acme" in str(error)
        holder.release()
        assert sorted(record.kind for record in bursar.records()) == ["refusal", "release"]


def test_waiting_for_time_alone(url: str) -> None:
    """A rate gives room by itself: the call goes out as soon as it does, and not before."""
    clock = ManualClock()
    with Bursar(url, [Budget("rate", "2 requests/minute", on_exceed="wait 2m")], clock=clock) as bursar:
        for _ in range(2):
            reserve(bursar)
        crowd = Crowd(bursar)
        crowd.come(0, functools.partial(by_thread, bursar))
        clock.advance(29.9)
        assert waiting(bursar) == 1
        clock.advance(0.1)
        crowd.go()
        assert crowd.served == [0]


def test_who_cannot_be_served_in_time_is_refused_at_once(url: str) -> None:
    with Bursar(url, [Budget("rate", "2 requests/hour", on_exceed="wait 60s")]) as bursar:
        for _ in range(2):
            reserve(bursar)
        with pytest.raises(BudgetExceeded) as caught:
            reserve(bursar)
        assert caught.value.retry_after == pytest.approx(1_800, abs=60)


def test_a_budget_that_refuses_at_once_is_not_waited_for(url: str) -> None:
    budgets = [FLIGHT, Budget("dollars", "0.001 USD")]
    with Bursar(url, budgets) as bursar, pytest.raises(BudgetExceeded) as caught:
        bursar.reserve("openai", "gpt-4o", input_tokens=100_000, max_output_tokens=10, resize=False)
    assert caught.value.budget == "dollars"


def test_what_another_process_frees_is_noticed(tmp_path: Path) -> None:
    url = f"sqlite:////{tmp_path}/bursar.db?durability=process"
    with Bursar(url, [FLIGHT]) as here, Bursar(url, [FLIGHT]) as there:
        holder = reserve(there)
        crowd = Crowd(here)
        crowd.come(0, functools.partial(by_thread, here))
        holder.release()
        crowd.go()
        assert crowd.served == [0]


def test_a_limit_that_is_raised_meanwhile_is_noticed(tmp_path: Path) -> None:
    url = f"sqlite:////{tmp_path}/bursar.db?durability=process"
    with Bursar(url, [FLIGHT]) as here:
        reserve(here)
        crowd = Crowd(here)
        crowd.come(0, functools.partial(by_thread, here))
        Bursar(url, [Budget("flight", "2 slots", on_exceed="wait 60s")]).close()
        crowd.go()
        assert crowd.served == [0]


def join(room: WaitingRoom, key: str) -> Ticket:
    ticket = room.come()
    room.move(ticket, key)
    return ticket


def test_a_ticket_keeps_its_number_in_whatever_queue_it_stands() -> None:
    room = WaitingRoom()
    first, second, third = join(room, "a"), join(room, "b"), join(room, "a")
    assert room.occupied(["a", "b"], second) == "a", "it came second, and the first waits in a"
    assert room.occupied(["b"], first) is None
    assert room.occupied(["c", "b"]) == "b"
    room.move(first, "b")
    assert (room.is_first(first), room.is_first(second), room.is_first(third)) == (True, False, True)
    assert not third.arm(list), "woken: it is first now"
    assert second.arm(list), "not woken"
    room.leave(first)
    assert not second.arm(list)
    room.leave(second)
    room.leave(third)
    assert not room


def test_a_wake_reaches_whoever_waits_later() -> None:
    room = WaitingRoom()
    ticket = join(room, "a")
    room.freed(["a", "b"])
    waiting = threading.Thread(target=ticket.wait, args=(60,), daemon=True)
    waiting.start()
    waiting.join(20)
    assert not waiting.is_alive()
    asyncio.run(_freed_while_awaited(room, ticket))


async def _freed_while_awaited(room: WaitingRoom, ticket: Ticket) -> None:
    waiting = asyncio.ensure_future(ticket.await_wake(60))
    await asyncio.sleep(0)
    await asyncio.to_thread(room.freed, ["a"])
    await asyncio.wait_for(waiting, 20)


class Caller:
    """One call, step by step: `look` is what its thread or task does when it is woken or its pause is over."""

    def __init__(self, bursar: Bursar, tokens: int, **tags: str) -> None:
        self.bursar = bursar
        self.call = bursar._make.model("openai", "gpt-4o", usage=Usage(input_tokens=tokens), resize=False, tags=tags)
        self.steps = bursar.guard.reserve(self.call, bursar.store.now_us())
        self.error: BudgetExceeded | None = None
        self.pause: Pause | None = None
        self._go(None)

    @property
    def sent(self) -> bool:
        return self.call.state == "open"

    @property
    def woken(self) -> bool:
        return self.pause is not None and not self.pause.ticket.arm(list)

    def look(self) -> None:
        assert self.pause is not None
        self.pause.ticket.disarm()
        self.pause = None
        self._go(self.bursar.store.now_us())

    def _go(self, answer: Any) -> None:
        try:
            while True:
                step = self.steps.send(answer)
                if isinstance(step, Pause):
                    self.pause = step
                    return
                assert not isinstance(step, Reload)
                answer = self.bursar.store.execute(step)
        except StopIteration:
            assert self.sent
        except BudgetExceeded as refused:
            self.error = refused

    def end(self) -> None:
        self.bursar._driver.run(self.bursar.guard.settle(self.call, self.call.usage or Usage(), 0))


TOKENS = Budget("tokens", "100 tokens/minute", on_exceed="wait 60s")


def test_who_runs_out_of_patience_in_the_queue_does_not_overtake(url: str) -> None:
    """Both are due at one instant: the one behind looks first, and finds room that is not its own."""
    clock = ManualClock()
    with Bursar(url, [TOKENS], clock=clock) as bursar:
        assert Caller(bursar, 100).sent
        large, small = Caller(bursar, 100), Caller(bursar, 5)
        assert (large.pause.seconds, small.pause.seconds) == (1, 60), "only the first looks by itself"  # type: ignore[union-attr]
        clock.advance(60)
        small.look()
        large.look()
        assert large.sent
        assert small.error is not None
        assert (small.error.budget, small.error.asked, small.error.available) == ("tokens", 5, 100)
        assert "calls that came before wait for what there is" in str(small.error)
        (record,) = (record for record in bursar.records() if record.kind == "refusal")
        assert record.outcome == "blocked"


def test_i9_an_interrupt_at_any_step_of_queueing_leaves_no_place_behind() -> None:
    """Else everybody who comes later would stand behind it, and be refused."""
    steps = -1

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal left
        if frame.f_globals["__name__"] != "bursar.waiting":
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            left -= 1
            if left == -1:
                raise KeyboardInterrupt
        return trace

    with Bursar("memory:", [FLIGHT]) as bursar:
        assert Caller(bursar, 1).sent
        left = -1
        while left < 0:
            steps += 1
            left = steps
            tracing = sys.gettrace()
            sys.settrace(trace)
            try:
                Caller(bursar, 1).steps.close()
            except KeyboardInterrupt:
                assert left < 0
            finally:
                sys.settrace(tracing)
            assert not bursar.guard.room, steps
    assert steps > 50


def test_a_place_is_kept_where_a_window_ends(url: str) -> None:
    clock = ManualClock()
    with Bursar(url, [Budget("each", "1 requests", window="minute", on_exceed="wait 2m")], clock=clock) as bursar:
        assert Caller(bursar, 1).sent
        first = Caller(bursar, 1)
        clock.advance(60)
        second = Caller(bursar, 1)
        assert not second.sent
        first.look()
        assert first.sent


def test_a_call_that_waits_elsewhere_now_is_not_overtaken_there(url: str) -> None:
    clock = ManualClock()
    with Bursar(url, [Budget("slot", "1 slots", on_exceed="wait 60s"), TOKENS], clock=clock) as bursar:
        holder = Caller(bursar, 40)
        large, small = Caller(bursar, 90), Caller(bursar, 5)
        holder.end()
        assert large.woken
        large.look()
        assert small.woken, "the slot has no other who waits for it"
        small.look()
        assert not small.sent, "the tokens that there are belong to the one that came before"
        clock.advance(18)
        large.look()
        assert large.sent
        large.end()
        clock.advance(3)
        assert small.woken
        small.look()
        assert small.sent


def test_nobody_stands_behind_an_account_that_it_does_not_need(url: str) -> None:
    planners = Budget("planner", "100 tokens/minute", match={"agent": "planner"}, on_exceed="wait 60s")
    with Bursar(
        url, [planners, Budget("all", "1000 tokens/minute", on_exceed="wait 60s")], clock=ManualClock()
    ) as bursar:
        assert Caller(bursar, 100, agent="planner").sent
        assert not Caller(bursar, 50, agent="planner").sent
        assert Caller(bursar, 50, agent="writer").sent


def test_who_cannot_be_helped_by_waiting_is_told_at_once_though_others_wait(url: str) -> None:
    readers = Budget("readers", "60 tokens", match={"agent": "reader"})
    with Bursar(url, [TOKENS, readers], clock=ManualClock()) as bursar:
        assert Caller(bursar, 50).sent
        waiting = Caller(bursar, 60)
        refused, too_large = Caller(bursar, 70, agent="reader").error, Caller(bursar, 101).error
        assert refused is not None
        assert refused.budget == "readers"
        assert too_large is not None
        assert (too_large.budget, too_large.retry_after) == ("tokens", None)
        assert waiting.pause is not None


def test_a_retry_must_suit_every_account(url: str) -> None:
    """The refusal names the first account that is short, and the time at which all have room."""
    clock = ManualClock()
    with Bursar(url, [Budget("a", "1 requests/minute"), Budget("b", "1 requests/hour")], clock=clock) as bursar:
        assert Caller(bursar, 1).sent
        refused = Caller(bursar, 1).error
        assert refused is not None
        assert (refused.budget, refused.retry_after) == ("a", 3_600)
        clock.advance(3_600)
        assert Caller(bursar, 1).sent
