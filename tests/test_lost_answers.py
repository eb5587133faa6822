"""Answers of the store that are lost: what was spent is booked once (I7), whoever tries again, and nothing is held on (I9)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from bursar import Budget, Bursar, Usage
from bursar.commands import Answer, Charge, Command, Extend, Release, Reserve, Settle
from bursar.errors import IdempotencyConflict, StoreError
from bursar.stores.memory import MemoryStore
from bursar.testing import ManualClock

USAGE = Usage(input_tokens=1_000, output_tokens=400)
CALL = {"input_tokens": 1_000, "max_output_tokens": 500}


class Far(MemoryStore):
    """A store whose way is cut for some kinds of commands: before they arrive, or before their answer does."""

    def __init__(self, clock: ManualClock) -> None:
        super().__init__(clock)
        self.cut: tuple[type, ...] = ()
        self.late: tuple[type, ...] = ()
        self.seen: list[Command] = []

    def execute(self, command: Command) -> Answer:
        if type(command) in self.cut:
            raise StoreError("no way. Try again.", fault="unreachable")
        answer = super().execute(command)
        self.seen.append(command)
        if type(command) in self.late:
            raise StoreError("no answer. Try again.", fault="unreachable")
        return answer


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def store(clock: ManualClock) -> Far:
    return Far(clock)


Open = Callable[[str], Bursar]


@pytest.fixture
def opened(store: Far) -> Open:
    return lambda policy: Bursar(store, [Budget("all", "5 USD", on_unreachable=policy)], detectors="off")


def costs(bursar: Bursar) -> list[tuple[str, int]]:
    return [(record.kind, record.cost_nanos) for record in bursar.records()]


@pytest.mark.parametrize("away_at_the_end", [False, True])
def test_i7_a_call_that_went_out_unguarded_though_the_store_had_taken_it_is_settled_once(
    store: Far, opened: Open, *, away_at_the_end: bool
) -> None:
    bursar = opened("open")
    store.late = (Reserve,)
    with bursar.call("openai", "gpt-4o", **CALL) as call:
        assert call.state == "unguarded"
        store.late = ()
        store.cut = (Charge, Settle) if away_at_the_end else ()
        if away_at_the_end:
            with pytest.raises(StoreError):
                call.settle(USAGE)
        else:
            call.settle(USAGE)
    store.cut = ()
    bursar.tend()
    assert costs(bursar) == [("settlement", 6_500_000)]
    assert store.open_reservations() == 0


def test_a_call_that_went_out_unguarded_and_was_not_billed_gives_back_what_the_store_has_taken(
    store: Far, opened: Open
) -> None:
    bursar = opened("open")
    store.late = (Reserve,)
    reservation = bursar.reserve("openai", "gpt-4o", **CALL)
    reservation.release()
    assert costs(bursar) == [("release", 0)]


def test_i7_another_attempt_under_the_same_id_that_fails_leaves_the_kept_end_of_the_first(
    store: Far, opened: Open
) -> None:
    bursar = opened("closed")
    first = bursar.reserve("openai", "gpt-4o", id="one", **CALL)
    store.cut = (Settle, Reserve)
    with pytest.raises(StoreError):
        first.settle(USAGE)
    with pytest.raises(StoreError):
        bursar.reserve("openai", "gpt-4o", id="one", **CALL)
    store.cut = ()
    bursar.tend()
    assert costs(bursar) == [("settlement", 6_500_000)]


def test_i7_an_interrupted_attempt_under_an_id_of_the_callers_does_not_give_back_what_an_earlier_one_holds(
    store: Far, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    bursar = opened("closed")
    first = bursar.reserve("openai", "gpt-4o", id="one", **CALL)

    def interrupted(command: Command) -> Answer:
        if type(command) is Reserve:
            raise KeyboardInterrupt
        return Far.execute(store, command)

    monkeypatch.setattr(store, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bursar.reserve("openai", "gpt-4o", id="one", **CALL)
    monkeypatch.undo()
    first.settle(USAGE)
    assert costs(bursar) == [("settlement", 6_500_000)]
    assert not [command for command in store.seen if type(command) is Release]


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("settled", [True, False], ids=["settled", "left unsettled"])
def test_i9_an_end_that_is_interrupted_is_made_all_the_same(
    store: Far, opened: Open, monkeypatch: pytest.MonkeyPatch, *, arrives: bool, settled: bool
) -> None:
    """Nobody knows whether the store has it: it is told again, rather than the call be extended for hours."""
    bursar = opened("closed")

    def interrupted(command: Command) -> Answer:
        if type(command) is Settle:
            monkeypatch.undo()
            if arrives:
                Far.execute(store, command)
            raise KeyboardInterrupt
        return Far.execute(store, command)

    def call() -> None:
        with bursar.call("openai", "gpt-4o", **CALL) as call:
            if settled:
                call.settle(USAGE)

    monkeypatch.setattr(store, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    bursar.tend()
    assert costs(bursar) == [("settlement", 6_500_000 if settled else 7_500_000)]
    assert store.open_reservations() == 0
    assert not bursar._driver.keeper._in_flight()


def test_i7_a_call_that_went_out_before_its_cost_was_worked_out_is_booked_at_its_worst_case(
    store: Far, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A switch is thrown, and whether it still is cannot be asked."""
    bursar = opened("open")
    store.publish({"provider=openai": {"frozen": True, "tags": {"provider": "openai"}, "cause": "frozen"}}, "freeze")
    bursar._load_policy()

    def away(since: int = 0) -> None:
        raise StoreError("no way. Try again.", fault="unreachable")

    monkeypatch.setattr(store, "definitions", away)
    reservation = bursar.reserve("openai", "gpt-4o", **CALL)
    assert reservation.state == "unguarded"
    reservation.settle_unknown("timed out")
    assert costs(bursar) == [("charge", 7_500_000)]


@pytest.mark.parametrize("rejected", [False, True])
def test_i9_a_call_whose_end_was_booked_later_or_rejected_is_extended_no_more(
    store: Far, opened: Open, clock: ManualClock, *, rejected: bool
) -> None:
    bursar = opened("closed")
    with bursar.call("openai", "gpt-4o", id="one", **CALL) as call:
        if rejected:
            opened("closed").reserve("openai", "gpt-4o", id="one", **CALL).settle(Usage(input_tokens=1))
            with pytest.raises(IdempotencyConflict):
                call.settle(USAGE)
        else:
            store.cut = (Settle,)
            with pytest.raises(StoreError):
                call.settle(USAGE)
            store.cut = ()
            bursar.tend()
        clock.advance(300)
        bursar.tend()
        call._call.state = "settled"  # it has ended; leaving the block has nothing more to say
    assert not [command for command in store.seen if type(command) is Extend]


def test_i9_a_kept_end_that_no_account_can_hold_keeps_nothing_else_from_ending(
    clock: ManualClock, tmp_path: Path
) -> None:
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db", [Budget("b", "1 USD", mode="shadow")], clock=clock)
    other = bursar.reserve("openai", "gpt-4o", **CALL)
    faults = []
    for _ in range(4):
        try:
            bursar.reserve("openai", "gpt-4o", **CALL).settle(Usage(input_tokens=2**48, output_tokens=2**48))
        except StoreError as error:
            faults.append(error.fault)
    assert set(faults) == {"overflow"}
    clock.advance(601)
    with pytest.raises(StoreError, match="a sum would pass"):
        bursar.tend()
    assert ("expiry", other.id) in [(record.kind, record.id) for record in bursar.records()]
    bursar.close()


def test_a_switch_reaches_a_call_whose_reservation_expired_while_the_store_was_away(
    store: Far, opened: Open, clock: ManualClock
) -> None:
    bursar = opened("closed")
    with bursar.call("openai", "gpt-4o", **CALL) as call:
        clock.advance(601)
        store.sweep()  # another process, which has the store again before this one
        bursar.tend()
        store.publish({"everything": {"frozen": True, "tags": {}}}, "freeze")
        bursar._driver.keeper.look()
        assert call.stopped is not None
        call.settle(USAGE)
    assert costs(bursar) == [("expiry", 7_500_000), ("correction", -1_000_000)]
    assert not bursar._driver.keeper._in_flight()
