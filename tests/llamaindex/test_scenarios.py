"""The peers' scenarios through LlamaIndex, on SQLite: ten calls fit the cap, and never more are billed, whoever calls.

Callers are threads, tasks, agents and processes; calls time out, streams are abandoned, a process is killed.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("llama_index.core")

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.llms.openai import OpenAI

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.testing import ManualClock
from bursar.testing.provider import Answer, Fault, Provider
from bursar_llamaindex import BursarCallbackHandler, install

PROMPT = " ".join(["cat"] * 1_000)
MESSAGES = [ChatMessage(role="user", content=PROMPT)]
CAP, CAP_NANOS = "0.078 USD", 78_000_000  # a call is billed 1,000 prompt and 500 completion tokens of gpt-4o: ten fit
STORE = "sqlite:///scenario.db?durability=process"
TTL_S = 600
FORK = multiprocessing.get_context("fork")  # LlamaIndex takes seconds to import


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=20), latency_s=0.02) as running:
        yield running


@pytest.fixture
def open_guard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Bursar]]:
    """open_guard(*budgets): a Bursar, installed; `warm`: it knows what such calls use."""
    monkeypatch.chdir(tmp_path)
    undo: list[Callable[[], None]] = []

    def open_(*budgets: Budget, warm: bool = False, clock: ManualClock | None = None) -> Bursar:
        guard = Bursar(STORE, budgets=budgets, clock=clock)
        if warm:
            warm_up(guard)
        undo.extend([install(guard, phase="test"), guard.close])
        return guard

    yield open_
    for one in undo:
        one()


def warm_up(guard: Bursar) -> None:
    """Fifty calls of the same kind, on no budget of the test."""
    for _ in range(50):
        known = guard.reserve("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=500, tags={"phase": "warm"})
        known.settle(Usage(input_tokens=1_000, output_tokens=500))


def cap(**options: Any) -> Budget:
    return Budget("cap", limit=CAP, match={"phase": "test"}, **options)


def llm_at(provider: Provider, **options: Any) -> OpenAI:
    settings = {"api_base": f"{provider.url}/v1", "api_key": "any", "max_retries": 0, "max_tokens": 500}
    return OpenAI(model="gpt-4o", **{**settings, **options})


def drained(guard: Bursar) -> bool:
    return BursarCallbackHandler(guard).drain(20.0)


def check(guard: Bursar, provider: Provider, *, exact: bool = True) -> None:
    """Nothing is open; the ledger is the provider's account, or exceeds it by estimated records alone."""
    assert drained(guard)
    provider.wait_idle()
    assert guard.store.open_reservations() == 0
    records = list(guard.records(phase="test"))
    booked = sum(record.cost_nanos for record in records)
    certain = sum(record.cost_nanos for record in records if not record.estimated)
    assert certain <= provider.billed_nanos <= booked <= CAP_NANOS
    if exact:
        assert certain == booked


def tried(call: Callable[[], Any]) -> bool:
    try:
        call()
    except BudgetExceeded:
        return False
    return True


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_one_caller(warm: bool, provider: Provider, open_guard: Any) -> None:
    guard = open_guard(cap(), warm=warm)
    answered = sum(tried(lambda: llm_at(provider).chat(MESSAGES)) for _ in range(30))
    assert answered == provider.billed_calls == 10
    check(guard, provider)


@pytest.mark.parametrize(
    ("options", "warm"),
    [({}, True), ({}, False), ({"estimate": "strict"}, False), ({"on_exceed": "wait 30s"}, False)],
    ids=["warm", "cold", "strict", "wait"],
)
@pytest.mark.parametrize("is_async", [False, True], ids=["threads", "tasks"])
def test_fifty_at_once(is_async: bool, options: Any, warm: bool, provider: Provider, open_guard: Any) -> None:
    """Waiting holds up no event loop: the calls that free the headroom run on the same one."""
    guard, llm = open_guard(cap(**options), warm=warm), llm_at(provider)

    async def all_at_once() -> int:
        answers = await asyncio.gather(*(llm.achat(MESSAGES) for _ in range(50)), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(error, BudgetExceeded) for error in refused)
        return len(answers) - len(refused)

    if is_async:
        answered = asyncio.run(all_at_once())
    else:
        with ThreadPoolExecutor(50) as pool:
            answered = sum(pool.map(lambda _: tried(lambda: llm.chat(MESSAGES)), range(50)))
    assert answered == provider.billed_calls
    assert (answered == 10) if warm or "on_exceed" in options else (answered <= 10)
    check(guard, provider)


def test_five_time_outs(provider: Provider, open_guard: Any) -> None:
    """What timed out at the client was billed by the provider: it counts."""
    guard = open_guard(cap(), warm=True)
    provider.script([Fault("hang")] * 5)
    for _ in range(5):
        with pytest.raises(Exception, match=r"(?i)timed out"):
            llm_at(provider, timeout=0.2).chat(MESSAGES)
    answered = sum(tried(lambda: llm_at(provider).chat(MESSAGES)) for _ in range(30))
    assert (answered, provider.billed_calls) == (5, 10)
    check(guard, provider, exact=False)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_thirty_abandoned_streams(is_async: bool, provider: Provider, open_guard: Any) -> None:
    """Each has a client of its own: when a stream is dropped, and garbage is collected while httpcore holds the lock of that
    stream's connections, it waits for itself for ever (https://github.com/encode/httpcore/discussions/990).
    """
    guard = open_guard(cap(), warm=True)

    def broken_off() -> None:
        for _ in llm_at(provider).stream_chat(MESSAGES):
            break

    async def abroken_off() -> bool:
        try:
            async for _ in await llm_at(provider).astream_chat(MESSAGES):
                break
        except BudgetExceeded:
            return False
        return True

    async def thirty() -> int:
        return sum([await abroken_off() for _ in range(30)])

    begun = asyncio.run(thirty()) if is_async else sum(tried(broken_off) for _ in range(30))
    assert begun == provider.billed_calls == 10
    check(guard, provider, exact=False)


def test_five_children_share_the_parents_ten(provider: Provider, open_guard: Any) -> None:
    """Each child may spend half of the parent's cap; together they spend no more than the whole."""
    guard, llm = open_guard(cap(), warm=True), llm_at(provider)

    def child(number: int) -> int:
        with guard.scope(run="parent"), guard.scope(run=f"child-{number}", budget="0.039 USD"):
            return sum(tried(lambda: llm.chat(MESSAGES)) for _ in range(10))

    with ThreadPoolExecutor(5) as pool:
        answered = list(pool.map(child, range(5)))
    assert sum(answered) == provider.billed_calls == 10
    assert max(answered) <= 5
    check(guard, provider)


def test_a_loose_maximum(provider: Provider, open_guard: Any) -> None:
    """max_tokens 4,096, 500 used, 50 threads at once, waiting: at least 8 of the 10 that fit, and never more."""
    guard, llm = open_guard(cap(on_exceed="wait 30s")), llm_at(provider, max_tokens=4_096)
    with ThreadPoolExecutor(50) as pool:
        answered = sum(pool.map(lambda _: tried(lambda: llm.chat(MESSAGES)), range(50)))
    assert answered == provider.billed_calls
    assert 8 <= answered <= 10
    check(guard, provider)


def test_a_smaller_answer_is_granted_where_the_call_sets_no_maximum(provider: Provider, open_guard: Any) -> None:
    """A strict budget that has no room for the model's own maximum lets the call go out with what fits."""
    guard = open_guard(Budget("cap", limit="0.030 USD", estimate="strict", match={"phase": "test"}))
    llm_at(provider, max_tokens=None).chat(MESSAGES)
    (served,) = provider.account
    assert 16 <= served.request["max_tokens"] < 4_096
    check(guard, provider)


@pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
def test_twenty_agents_side_by_side(on_exceed: str, provider: Provider, open_guard: Any) -> None:
    """Agents stream by default; those that a budget stops do not harm the others."""
    guard = open_guard(cap(on_exceed=on_exceed))

    async def all_of_them() -> list[Any]:
        agents = [FunctionAgent(name=f"agent-{n}", llm=llm_at(provider), tools=[]) for n in range(20)]

        async def one(agent: FunctionAgent) -> Any:
            return await agent.run(PROMPT)

        return await asyncio.gather(*map(one, agents), return_exceptions=True)

    answers = asyncio.run(all_of_them())
    refused = [answer for answer in answers if isinstance(answer, BaseException)]
    assert all(type(error) is BudgetExceeded for error in refused), refused
    assert len(answers) - len(refused) == provider.billed_calls <= 10
    if on_exceed != "refuse":
        assert provider.billed_calls == 10
    check(guard, provider)


# -- processes ---------------------------------------------------------------------------------------------------


def _thirteen_threads(url: str, provider_url: str, on_exceed: str, start: Any) -> None:
    with Bursar(url, [cap(on_exceed=on_exceed)]) as guard:
        uninstall = install(guard, phase="test")
        warm_up(guard)
        llm = OpenAI(model="gpt-4o", api_base=f"{provider_url}/v1", api_key="any", max_retries=0, max_tokens=500)
        start.wait()
        with ThreadPoolExecutor(13) as pool:
            list(pool.map(lambda _: tried(lambda: llm.chat(MESSAGES)), range(13)))
        uninstall()


@pytest.mark.parametrize("on_exceed", ["refuse", "wait 30s"])
def test_four_processes_of_thirteen_threads(on_exceed: str, provider: Provider, tmp_path: Path) -> None:
    """They start at once, when all of them know what such calls use."""
    url, start = f"sqlite:///{tmp_path}/scenario.db?durability=process", FORK.Barrier(4)
    workers = [
        FORK.Process(target=_thirteen_threads, args=(url, provider.url, on_exceed, start), daemon=True)
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert provider.billed_calls == 10
    with Bursar(url) as guard:
        check(guard, provider)


def _five_in_flight(url: str, provider_url: str) -> None:
    guard = Bursar(url, [cap()])
    install(guard, phase="test")
    warm_up(guard)
    llm = OpenAI(model="gpt-4o", api_base=f"{provider_url}/v1", api_key="any", max_retries=0, max_tokens=500)
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda _: llm.chat(MESSAGES), range(5)))


def test_a_killed_process_with_five_calls_in_flight(provider: Provider, open_guard: Any, tmp_path: Path) -> None:
    """SIGKILL: the five stay booked, before and after they expire, because the provider billed them."""
    provider.script([Fault("hang")] * 5)
    victim = FORK.Process(target=_five_in_flight, args=(f"sqlite:///{tmp_path}/scenario.db", provider.url), daemon=True)
    victim.start()
    provider.wait_requests(5, 60)
    victim.kill()
    victim.join(20)
    clock = ManualClock(time.time_ns() // 1_000)
    guard, llm = open_guard(cap(), warm=True, clock=clock), llm_at(provider)
    assert guard.store.open_reservations() == 5
    assert sum(tried(lambda: llm.chat(MESSAGES)) for _ in range(30)) == 5
    clock.advance(TTL_S + 1)
    guard.tend()
    assert not tried(lambda: llm.chat(MESSAGES))
    assert provider.billed_calls == 10
    check(guard, provider, exact=False)
