"""Calls that the garbage collector ends: it comes amid whatever its thread does, and must wait for no lock of that thread."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
from collections.abc import AsyncGenerator, Generator
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from collecting import Collecting, drop, in_time

from bursar import Budget, Bursar
from bursar.commands import Tell
from bursar.ending import drain, end_soon, settled
from bursar.waiting import WaitingRoom


def test_i9_a_block_that_is_collected_amid_a_transaction_of_the_same_thread_ends_after_it(tmp_path: Path) -> None:
    clock = Collecting()
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("b", "1 USD")], clock=clock)

    def stream() -> Generator[None]:
        with bursar.tool("search", cost="0.10 USD"):
            yield

    drop(stream())
    clock.collects = True
    assert in_time(lambda: bursar.store.execute(Tell("one", "policy", {})))
    clock.collects = False
    assert drain(20)
    assert bursar.store.open_reservations() == 0
    (status,) = bursar.status()
    assert (status.spent, status.reserved) == (Decimal("0.1"), 0)
    bursar.close()


def test_a_call_that_is_collected_while_it_waits_leaves_the_room_whatever_that_does_meanwhile() -> None:
    room = WaitingRoom()

    def waits() -> Generator[None]:
        ticket = room.come()
        room.move(ticket, "a")
        try:
            yield
        finally:
            room.leave(ticket)

    drop(waits())
    assert in_time(lambda: room.freed("a" for _ in range(1) if gc.collect() >= 0))
    assert not room


@pytest.mark.parametrize("in_loop", [False, True])
def test_i9_the_call_of_a_task_that_nobody_goes_on_with_ends(in_loop: bool, tmp_path: Path) -> None:
    """Its coroutine is closed where it stands, without a loop or amid another's work, and cannot wait for the store."""
    bursar = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("b", "1 USD")])
    loop, begun = asyncio.new_event_loop(), asyncio.Event()

    async def work() -> None:
        async with bursar.atool("search", cost="0.10 USD"):
            begun.set()
            await loop.create_future()

    async def collect() -> None:
        gc.collect()

    task: Any = loop.create_task(work())
    task._log_destroy_pending = False
    loop.run_until_complete(begun.wait())
    del task
    if in_loop:
        loop.run_until_complete(collect())
        loop.close()
    else:
        loop.close()
        gc.collect()
    assert drain(20)
    assert bursar.store.open_reservations() == 0
    assert [record.cost_nanos for record in bursar.records()] == [100_000_000]
    bursar.close()


@pytest.mark.parametrize("store", ["memory:", "sqlite"])
def test_a_stream_that_is_closed_makes_room_for_the_next_at_once(store: str, tmp_path: Path) -> None:
    async def parts(bursar: Bursar) -> AsyncGenerator[None]:
        async with bursar.acall("openai", "gpt-4o", messages="hello", max_output_tokens=10):
            yield
            yield

    async def work() -> None:
        with Bursar(url, [Budget("one at a time", "1 slots")]) as bursar:
            for _ in range(50):
                async with contextlib.aclosing(parts(bursar)) as stream:
                    async for _part in stream:
                        break

    url = f"sqlite:///{tmp_path}/b.db" if store == "sqlite" else store
    asyncio.run(work())


def test_i9_what_ends_in_the_background_is_booked_before_the_store_closes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/b.db"

    with Bursar(url, [Budget("b", "10 USD")]) as bursar:
        for reservation in [bursar.tool("search", cost="0.10 USD").__enter__() for _ in range(50)]:
            end_soon(partial(settled(None).end, reservation))
    with Bursar(url) as again:
        assert again.store.open_reservations() == 0
        assert len(list(again.records())) == 50


@pytest.mark.parametrize("way", ["block", "ending"])
def test_i9_the_end_of_a_call_whose_loop_is_gone_is_booked_later_whatever_error_it_comes_as(
    way: str, tmp_path: Path
) -> None:
    """Clients make errors of their own of what closes their coroutine, and clean up with errors after that."""
    url = f"sqlite:///{tmp_path}/b.db"
    bursar = Bursar(url, [Budget("b", "1 USD")])
    loop, begun = asyncio.new_event_loop(), asyncio.Event()

    async def send() -> None:
        begun.set()
        try:
            await loop.create_future()
        finally:
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                raise ConnectionError("the connection cannot be closed") from None

    async def work() -> None:
        if way == "block":
            async with bursar.atool("search", cost="0.10 USD"):
                try:
                    await send()
                except ConnectionError as error:
                    raise ValueError("not answered") from error
        else:
            reservation = await bursar.atool("search", cost="0.10 USD").__aenter__()
            try:
                await send()
            except ConnectionError:
                await settled(None).aend(reservation)

    coroutine = work()
    task = loop.create_task(coroutine)
    loop.run_until_complete(begun.wait())
    loop.close()
    with contextlib.suppress(RuntimeError):
        coroutine.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    bursar.close()
    with Bursar(url) as again:
        assert again.store.open_reservations() == 0
        assert [record.cost_nanos for record in again.records()] == [100_000_000]


AT_EXIT = """
from bursar import Budget, Bursar, facade

facade._CLOSING_S = 3600.0

class Holder:
    bursar = Bursar("memory:", [Budget("b", "1 USD")])

    def __del__(self):
        self.bursar.close()
        print("closed")

holder = Holder()
with holder.bursar.tool("search", cost="0.10 USD"):
    pass
"""


def test_a_bursar_that_is_closed_when_the_interpreter_goes_waits_for_no_thread_of_it() -> None:
    """They are stopped then."""
    ran = subprocess.run([sys.executable, "-c", AT_EXIT], capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout == "closed\n"
