"""The scenarios in which peers overspend, through LiteLLM: a budget for ten calls of $0.0075 in one SQLite file."""

from __future__ import annotations

import asyncio
import multiprocessing
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import litellm
import pytest

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Fault, Provider
from bursar_litellm import BursarLogger, install

pytestmark = pytest.mark.slow

PROMPT = "abc " * 1_000
MESSAGES = [{"role": "user", "content": PROMPT}]
CAP_NANOS = 78_000_000
# A program of its own: as many calls at once as it has threads, when all its like are ready.
PROGRAM = """
from concurrent.futures import ThreadPoolExecutor
import litellm
from bursar import BudgetExceeded, Bursar
from bursar_litellm import install

def one(_):
    try:
        litellm.completion(
            "openai/gpt-4o", [{"role": "user", "content": "abc " * 1_000}], max_tokens=500, max_retries=0,
            api_base=f"{url}/v1", api_key="any",
        )
    except BudgetExceeded:
        return

with Bursar(store) as bursar:
    install(bursar)
    ready.wait(120)
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(threads)))
"""
# LiteLLM takes seconds to import: the processes are forked from one that has done so.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["litellm", "bursar_litellm"])


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=10), latency_s=0.05) as provider:
        yield provider


@contextmanager
def installed(store: str, on_exceed: str = "refuse") -> Iterator[Bursar]:
    with Bursar(store, [budget(on_exceed)]) as bursar:
        uninstall = install(bursar)
        try:
            yield bursar
            assert BursarLogger(bursar).drain()
        finally:
            uninstall()


def budget(on_exceed: str = "refuse") -> Budget:
    return Budget("cap", "0.078 USD", on_exceed=on_exceed)


def start(count: int, threads: int, store: str, provider: Provider) -> list[Any]:
    """So many processes, of so many threads each, which have their guards and are about to call."""
    ready = processes.Barrier(count + 1)
    told = {"store": store, "url": provider.url, "threads": threads, "ready": ready}
    started = [processes.Process(target=exec, args=(PROGRAM, told), daemon=True) for _ in range(count)]
    for process in started:
        process.start()
    ready.wait(120)
    return started


def where(provider: Provider) -> dict[str, Any]:
    return {"api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0}


def call(provider: Provider, **more: Any) -> Any:
    return litellm.completion("openai/gpt-4o", MESSAGES, max_tokens=500, **where(provider), **more)


def allowed(calls: int, one: Callable[[], Any]) -> int:
    """How many of so many calls, one after the other, the budget allows."""
    count = 0
    for _ in range(calls):
        try:
            one()
        except BudgetExceeded:
            continue
        count += 1
    return count


# -- many at once ------------------------------------------------------------------------------------------------


def router(provider: Provider) -> Any:
    deployment = {"model": "openai/gpt-4o", **where(provider)}
    return litellm.Router([{"model_name": "main", "litellm_params": deployment}], num_retries=0)


def in_threads(calls: int, one: Callable[[], Any]) -> None:
    with ThreadPoolExecutor(calls) as pool:
        list(pool.map(lambda _: allowed(1, one), range(calls)))


def in_tasks(calls: int, one: Callable[[], Awaitable[Any]]) -> None:
    async def task() -> None:
        try:
            async for _ in await one():
                continue
        except BudgetExceeded:
            return

    async def tasks() -> None:
        await asyncio.gather(*(task() for _ in range(calls)))

    asyncio.run(tasks())


STREAMS: dict[str, Callable[[Provider], Any]] = {
    "chat": lambda p: call(p, stream=True),
    "router": lambda p: router(p).completion("main", MESSAGES, max_tokens=500, stream=True),
    "responses": lambda p: litellm.responses(PROMPT, "openai/gpt-4o", max_output_tokens=500, stream=True, **where(p)),
}
ASYNC_STREAMS: dict[str, Callable[[Provider], Any]] = {
    "chat": lambda p: litellm.acompletion("openai/gpt-4o", MESSAGES, max_tokens=500, stream=True, **where(p)),
    "router": lambda p: router(p).acompletion("main", MESSAGES, max_tokens=500, stream=True),
    "responses": lambda p: litellm.aresponses(PROMPT, "openai/gpt-4o", max_output_tokens=500, stream=True, **where(p)),
}


@pytest.mark.parametrize("name", list(STREAMS))
@pytest.mark.parametrize("ways", ["threads", "tasks"])
def test_fifty_streams_at_once_that_wait_for_room_are_ten(ways: str, name: str, provider: Provider) -> None:
    """Calls that are answered at once are the contract's."""
    with installed("memory:", "wait 60s") as bursar:
        if ways == "threads":
            in_threads(50, lambda: list(STREAMS[name](provider)))
        else:
            in_tasks(50, lambda: ASYNC_STREAMS[name](provider))
        assert provider.billed_calls == 10
        assert settled(bursar) == provider.billed_nanos


@pytest.mark.parametrize("on_exceed", ["refuse", "wait 60s"])
def test_four_processes_of_thirteen_threads(on_exceed: str, provider: Provider, tmp_path: Path) -> None:
    """Never more than ten; exactly ten when they wait for headroom."""
    store = f"sqlite:///{tmp_path}/bursar.db"
    with Bursar(store, [budget(on_exceed)]) as bursar:
        for process in (started := start(4, 13, store, provider)):
            process.join(120)
        assert [process.exitcode for process in started] == [0] * 4
        provider.wait_idle()
        assert provider.billed_calls <= 10
        if on_exceed != "refuse":
            assert provider.billed_calls == 10
        assert bursar.store.open_reservations() == 0
        assert settled(bursar) == provider.billed_nanos


def settled(bursar: Bursar) -> int:
    return sum(record.cost_nanos for record in bursar.records() if record.outcome == "completed")


# -- calls that do not end as they should ------------------------------------------------------------------------


def test_a_killed_process_does_not_give_its_calls_back(provider: Provider, tmp_path: Path) -> None:
    """Five in flight at SIGKILL were billed: the others find room for five."""
    store = f"sqlite:///{tmp_path}/bursar.db"
    provider.script([Fault("hang")] * 5)
    with installed(store) as bursar:
        (process,) = start(1, 5, store, provider)
        provider.wait_requests(5, 60)
        process.kill()
        process.join(20)
        allowed(30, lambda: call(provider))
        assert provider.billed_calls <= 10
        assert bursar.store.open_reservations() == 5  # until they expire, and are booked


@pytest.mark.parametrize("wrong", ["nothing", "5 time out", "all are abandoned"])
def test_one_caller_who_tries_thirty_times(wrong: str, provider: Provider, tmp_path: Path) -> None:
    with installed(f"sqlite:///{tmp_path}/bursar.db") as bursar:
        if wrong == "all are abandoned":
            count = allowed(30, lambda: next(call(provider, stream=True)))
            assert BursarLogger(bursar).drain()
        else:
            if wrong == "5 time out":
                provider.script([Fault("hang")] * 5)
                for _ in range(5):
                    with pytest.raises(litellm.Timeout):
                        call(provider, timeout=0.2)
            count = allowed(30, lambda: call(provider))
        provider.wait_idle()
        assert count > 0
        assert provider.billed_calls <= 10
        if wrong == "nothing":
            assert count == provider.billed_calls == 10
        (status,) = bursar.status()
        assert provider.billed_nanos <= int(status.spent * 10**9) <= CAP_NANOS
        assert bursar.store.open_reservations() == 0
