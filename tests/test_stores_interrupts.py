"""Interrupts and cancellations at any moment of a reservation: nothing stays held, and nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bursar import Budget, Bursar, Usage
from bursar.commands import Release

BUDGETS = [Budget("dollars", "500 USD"), Budget("flight", "1 slots", on_exceed="wait 10s")]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


def open_bursar(url: str, folder: Path) -> Bursar:
    return Bursar(url.replace("FILE", f"/{folder}/bursar.db"), BUDGETS)


def open_ids(bursar: Bursar) -> list[str]:
    """The ids of all open reservations, after what was posted has been done."""
    store = bursar.store
    asyncio.run(store.aexecute(Release("nobody")))  # by the same worker, after what it was told before
    return [reservation.id for reservation in store.reservations()]


def call_once(bursar: Bursar) -> None:
    with bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10) as call:
        call.settle(Usage(input_tokens=10, output_tokens=10))


def goes_on(bursar: Bursar) -> bool:
    """Whether another thread still gets its call through."""
    thread = threading.Thread(target=call_once, args=(bursar,), daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()


def interrupted_calls(url: str, folder: Path, wanted: int, call_s: float = 4e-4) -> dict[str, int]:
    """Interrupt that many calls, each at some microsecond of it; how many were, and what went wrong afterwards."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    at_random = random.Random(7)
    found = {"interrupted": 0, "held": 0, "stuck": 0, "queued": 0}
    bursar = open_bursar(url, folder)
    call_once(bursar)
    for _ in range(50 * wanted):
        if found["interrupted"] == wanted:
            break
        block = bursar.call("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        entered = False
        try:
            signal.setitimer(signal.ITIMER_REAL, at_random.uniform(1e-6, call_s))
            block.__enter__()
            entered = True
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            found["interrupted"] += 1
        if entered:
            block.__exit__(None, None, None)
        held = [] if entered else open_ids(bursar)
        found["held"] += len(held)
        found["queued"] += bool(bursar.guard.room)
        if held or not goes_on(bursar):
            found["stuck"] += not held
            break
    return found


@needs_fork
@pytest.mark.slow
@pytest.mark.parametrize("url", ["memory:", "sqlite:///FILE?durability=process"])
def test_i9_a_keyboard_interrupt_leaves_nothing_held_and_nobody_stuck(url: str, tmp_path: Path) -> None:
    found = interrupted_child(url, tmp_path, 300)
    assert found == {"interrupted": 300, "held": 0, "stuck": 0, "queued": 0}


def interrupted_child(url: str, folder: Path, wanted: int, call_s: float = 4e-4) -> dict[str, int]:
    """In a child, because the alarm of this process is the test runner's."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(interrupted_calls(url, folder, wanted, call_s)).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        found: dict[str, int] = json.loads(pipe.read() or b"{}")
    os.waitpid(child, 0)
    return found


# -- cancelled tasks -------------------------------------------------------------------------------------------------


@pytest.fixture(params=["memory:", "sqlite:///FILE?durability=process", "sqlite:///FILE"])
def bursar(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bursar]:
    with open_bursar(request.param, tmp_path) as bursar:
        yield bursar


async def cancelled_after(turns: int, work: Callable[[], object]) -> bool:
    """Start the work as a task, and cancel it after so many turns of the loop; whether it had come to its end by then."""
    task = asyncio.ensure_future(work())  # type: ignore[arg-type]
    for _ in range(turns):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    return not task.cancelled()


def test_i9_a_cancelled_task_leaves_nothing_held(bursar: Bursar) -> None:
    """Cancelled at its every await while reserving, and while waiting behind another."""

    async def reserve() -> None:
        reservation = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        await reservation.arelease()

    async def everything() -> None:
        for turns in range(12):
            await cancelled_after(turns, reserve)
            assert bursar.store.open_reservations() <= 1
            await reserve()  # behind what was posted
        holder = await bursar.areserve("openai", "gpt-4o", input_tokens=10, max_output_tokens=10)
        for turns in range(12):
            assert not await cancelled_after(turns, reserve)
        assert not bursar.guard.room
        await holder.arelease()
        await reserve()

    asyncio.run(everything())
    assert open_ids(bursar) == []


async def call_without_end(bursar: Bursar, inside: asyncio.Event) -> None:
    async with bursar.acall("openai", "gpt-4o", input_tokens=10, max_output_tokens=10):
        inside.set()
        await asyncio.Event().wait()


def test_i7_a_call_cancelled_inside_its_block_is_booked(bursar: Bursar) -> None:
    async def everything() -> None:
        inside = asyncio.Event()
        task = asyncio.ensure_future(call_without_end(bursar, inside))
        await inside.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(everything())
    assert open_ids(bursar) == []
    assert [(record.kind, record.estimated) for record in bursar.records() if record.kind != "release"] == [
        ("settlement", True)
    ]


def test_an_event_loop_that_is_closed_midway_leaves_the_store_to_others(bursar: Bursar) -> None:
    async def leave_it() -> None:
        tasks = {asyncio.ensure_future(call_without_end(bursar, asyncio.Event())) for _ in range(3)}
        await asyncio.sleep(0)
        assert len(tasks) == 3

    asyncio.run(leave_it())
    assert goes_on(bursar)
    assert open_ids(bursar) == []
