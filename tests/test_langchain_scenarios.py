"""The peers' scenarios through LangChain: a cap that ten calls fit, under threads, tasks, time-outs, broken streams, fan-out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from langchain_openai import ChatOpenAI

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.testing.provider import Answer, Fault, Provider
from bursar_langchain import BursarCallbackHandler

PROMPT = " ".join(["cat"] * 1_000)
CAP, CALL_NANOS = "0.078 USD", 7_500_000  # a call is billed 1,000 prompt and 500 completion tokens of gpt-4o: ten fit
STORES = ["memory:", "sqlite:///scenario.db?durability=process"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:coroutine 'ahandle_event' was never awaited"),
    pytest.mark.parametrize("store", STORES, ids=["memory", "sqlite"]),
]


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=20), latency_s=0.02) as running:
        yield running


@pytest.fixture
def open_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bursar]]:
    monkeypatch.chdir(tmp_path)
    opened: list[Bursar] = []

    def open_(store: str, *budgets: Budget, warm: bool = False) -> Bursar:
        guard = Bursar(store, budgets=budgets)
        opened.append(guard)
        if warm:
            _warm(guard)
        return guard

    yield open_
    for guard in opened:
        guard.close()


def _warm(guard: Bursar) -> None:
    """Fifty settled calls of the same kind, on no budget of the test: what an agent that has run before knows."""
    message = [{"role": "user", "content": PROMPT}]
    for _ in range(50):
        reservation = guard.reserve("openai", "gpt-4o", messages=message, max_output_tokens=500, tags={"phase": "warm"})
        reservation.settle(Usage(input_tokens=1_000, output_tokens=500))


def cap(**options: Any) -> Budget:
    return Budget("cap", limit=CAP, match={"phase": "test"}, **options)


def chat(provider: Provider, **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model="gpt-4o",
        base_url=f"{provider.url}/v1",
        api_key="local",
        **{"max_tokens": 500, "max_retries": 0, "stream_usage": True, **options},
    )


def config_of(handler: BursarCallbackHandler) -> Any:
    return {"callbacks": [handler]}


def check(guard: Bursar, handler: BursarCallbackHandler, provider: Provider, *, exact: bool = True) -> None:
    """No open reservation; the ledger is the provider's account, or exceeds it by estimated records alone."""
    assert handler.drain(20.0)
    provider.wait_idle()
    assert all(status.reserved == 0 for status in guard.status())
    records = list(guard.records(phase="test"))
    booked = sum(record.cost_nanos for record in records)
    certain = sum(record.cost_nanos for record in records if not record.estimated)
    assert certain <= provider.billed_nanos <= booked
    if exact:
        assert certain == booked == provider.billed_nanos
    assert booked <= 78_000_000


def tried(call: Callable[[], Any]) -> bool:
    try:
        call()
    except BudgetExceeded:
        return False
    return True


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_one_caller(store: str, warm: bool, provider: Provider, open_guard: Any) -> None:
    guard = open_guard(store, cap(), warm=warm)
    handler = BursarCallbackHandler(guard, phase="test")
    answered = sum(tried(lambda: chat(provider).invoke(PROMPT, config_of(handler))) for _ in range(30))
    assert answered == provider.billed_calls == 10
    check(guard, handler, provider)


@pytest.mark.parametrize(("estimate", "warm"), [("learned", True), ("learned", False), ("strict", False)])
def test_fifty_threads(store: str, estimate: str, warm: bool, provider: Provider, open_guard: Any) -> None:
    guard = open_guard(store, cap(estimate=estimate), warm=warm)
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider)
    with ThreadPoolExecutor(50) as pool:
        answered = sum(pool.map(lambda _: tried(lambda: model.invoke(PROMPT, config_of(handler))), range(50)))
    assert answered == provider.billed_calls
    assert (answered == 10) if warm else (answered <= 10)
    check(guard, handler, provider)


def test_fifty_threads_that_wait(store: str, provider: Provider, open_guard: Any) -> None:
    guard = open_guard(store, cap(on_exceed="wait 30s"))
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider)
    with ThreadPoolExecutor(50) as pool:
        answered = sum(pool.map(lambda _: tried(lambda: model.invoke(PROMPT, config_of(handler))), range(50)))
    assert answered == provider.billed_calls == 10
    check(guard, handler, provider)


@pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
def test_fifty_tasks(store: str, on_exceed: str, provider: Provider, open_guard: Any) -> None:
    """Waiting holds up no event loop: the calls that free the headroom run on the same one."""
    guard = open_guard(store, cap(on_exceed=on_exceed), warm=on_exceed == "refuse")
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider)

    async def all_at_once() -> list[Any]:
        calls = [model.ainvoke(PROMPT, config_of(handler)) for _ in range(50)]
        return await asyncio.gather(*calls, return_exceptions=True)

    answers = asyncio.run(all_at_once())
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(isinstance(error, BudgetExceeded) for error in refused)
    assert len(answers) - len(refused) == provider.billed_calls == 10
    check(guard, handler, provider)


def test_five_time_outs(store: str, provider: Provider, open_guard: Any) -> None:
    """What timed out at the client was billed by the provider: it counts."""
    guard = open_guard(store, cap(), warm=True)
    handler = BursarCallbackHandler(guard, phase="test")
    provider.script([Fault("hang")] * 5)

    def give_up(_: int) -> None:
        with pytest.raises(Exception, match=r"(?i)timed out"):
            chat(provider, timeout=0.2).invoke(PROMPT, config_of(handler))

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(give_up, range(5)))
    answered = sum(tried(lambda: chat(provider).invoke(PROMPT, config_of(handler))) for _ in range(30))
    assert (answered, provider.billed_calls) == (5, 10)
    check(guard, handler, provider, exact=False)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_thirty_abandoned_streams(store: str, is_async: bool, provider: Provider, open_guard: Any) -> None:
    guard = open_guard(store, cap(), warm=True)
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider)

    def broken_off() -> None:
        for _ in model.stream(PROMPT, config_of(handler)):
            break

    async def abroken_off() -> None:
        async for _ in model.astream(PROMPT, config_of(handler)):
            break

    async def thirty() -> int:
        begun = 0
        for _ in range(30):
            try:
                await abroken_off()
                begun += 1
            except BudgetExceeded:
                await asyncio.to_thread(handler.drain)
        return begun

    begun = asyncio.run(thirty()) if is_async else sum(tried(broken_off) for _ in range(30))
    assert begun == provider.billed_calls == 10
    check(guard, handler, provider, exact=False)


def test_five_children_share_the_parent_s_ten(store: str, provider: Provider, open_guard: Any) -> None:
    """Each child may spend half of the parent's cap; together they spend no more than the whole."""
    guard = open_guard(store, cap(), warm=True)
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider)

    def child(number: int) -> int:
        with guard.scope(run="parent"), guard.scope(run=f"child-{number}", budget="0.039 USD"):
            return sum(tried(lambda: model.invoke(PROMPT, config_of(handler))) for _ in range(10))

    with ThreadPoolExecutor(5) as pool:
        answered = list(pool.map(child, range(5)))
    assert sum(answered) == provider.billed_calls == 10
    assert max(answered) <= 5
    check(guard, handler, provider)


def test_a_loose_maximum(store: str, provider: Provider, open_guard: Any) -> None:
    """max_tokens 4,096, 500 used, 50 threads at once, waiting: at least 8 of the 10 that fit, and never more."""
    guard = open_guard(store, cap(on_exceed="wait 30s"))
    handler, model = BursarCallbackHandler(guard, phase="test"), chat(provider, max_tokens=4_096)
    with ThreadPoolExecutor(50) as pool:
        answered = sum(pool.map(lambda _: tried(lambda: model.invoke(PROMPT, config_of(handler))), range(50)))
    assert answered == provider.billed_calls
    assert 8 <= answered <= 10
    check(guard, handler, provider)
