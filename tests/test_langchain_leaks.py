"""Calls of which LangChain tells no end, or two: each reservation still ends once, and what may have been billed is booked."""

from __future__ import annotations

import asyncio
import gc
from collections import OrderedDict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from collecting import Collecting, drop, in_time
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import HumanMessage
from langchain_core.rate_limiters import InMemoryRateLimiter
from langchain_core.runnables import RunnableConfig, RunnableGenerator, RunnableLambda
from langchain_openai import ChatOpenAI

from bursar import Budget, Bursar
from bursar.commands import Tell
from bursar.testing.provider import Answer, Fault, Provider
from bursar_langchain import BursarCallbackHandler, LangChainBudgetExceeded

CORE = tuple(int(part) for part in version("langchain-core").split(".")[:2])
TWO = [[HumanMessage("cat " * 800)], [HumanMessage("cat " * 800)]]
HANG = Fault("hang")


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=50, chunks=40)) as running:
        yield running


@pytest.fixture
def guard() -> Iterator[Bursar]:
    with Bursar("memory:", budgets=[Budget("all", limit="10 USD")]) as guard:
        yield guard


@pytest.fixture
def handler(guard: Bursar) -> BursarCallbackHandler:
    return BursarCallbackHandler(guard)


@pytest.fixture
def model(provider: Provider) -> ChatOpenAI:
    return ChatOpenAI(
        model="gpt-4o", base_url=f"{provider.url}/v1", api_key="local", max_tokens=50, max_retries=0, stream_usage=True
    )


def ends(guard: Bursar, handler: BursarCallbackHandler) -> list[tuple[str, bool]]:
    """How the calls ended, when all have: kind of record, and whether it is estimated. Nothing stays reserved."""
    gc.collect()  # a call that is part of a cycle is found to be abandoned by the collector only
    assert handler.drain(20.0)
    assert [status.reserved for status in guard.status()] == [0]
    return sorted((record.kind, record.estimated) for record in guard.records())


async def cancelled(provider: Provider, call: Any) -> None:
    """Cancel a task once its request has arrived."""
    task = asyncio.ensure_future(call)
    await asyncio.to_thread(provider.wait_requests, 1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def generate(model: ChatOpenAI, batch: Any, handler: BursarCallbackHandler, is_async: bool) -> None:
    if is_async:
        asyncio.run(model.agenerate(batch, callbacks=[handler]))
    else:
        model.generate(batch, callbacks=[handler])


UNKNOWN, BILLED, FREE = ("settlement", True), ("settlement", False), ("release", False)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cancelled_ainvoke(
    streaming: bool, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    provider.script([HANG])
    model = model.model_copy(update={"streaming": streaming})
    asyncio.run(cancelled(provider, model.ainvoke("hi", {"callbacks": [handler]})))
    assert ends(guard, handler) == [UNKNOWN]


def test_an_ainvoke_that_times_out_in_its_own_task(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    provider.script([HANG])

    async def late() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await model.ainvoke("hi", {"callbacks": [handler]})

    asyncio.run(late())
    assert ends(guard, handler) == [UNKNOWN]


def test_a_cancelled_chain_inside_a_longer_task(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    """A tracer that keeps the run's id keeps it alive: the chain's cancellation ends the call all the same."""
    provider.script([HANG])
    kept = []

    class Tracer(BaseCallbackHandler):
        def on_chat_model_start(self, *given: Any, run_id: Any, **more: Any) -> None:
            kept.append(run_id)

    async def late() -> None:
        chain = RunnableLambda(lambda text: text) | model
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await chain.ainvoke("hi", {"callbacks": [Tracer(), handler]})
        assert await asyncio.to_thread(handler.drain, 10.0)

    asyncio.run(late())
    assert kept
    assert ends(guard, handler) == [UNKNOWN]


def test_a_call_that_its_task_leaves_behind(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    """Whoever keeps the run's id keeps it alive: that the task ends without an answer ends the call all the same."""
    provider.script([HANG])
    config: RunnableConfig = {"callbacks": [handler], "run_id": uuid4()}

    async def late() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await model.ainvoke("hi", config)

    asyncio.run(late())
    assert ends(guard, handler) == [UNKNOWN]
    assert config


@pytest.mark.parametrize("streamed", [False, True])
def test_a_wait_for_the_rate_limiter_that_is_cancelled(
    streamed: bool, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    slow = model.model_copy(update={"rate_limiter": InMemoryRateLimiter(requests_per_second=0.001)})

    async def stream() -> None:
        async for _ in slow.astream("hi", {"callbacks": [handler]}):
            pytest.fail("nothing was sent")

    async def late() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await (stream() if streamed else slow.ainvoke("hi", {"callbacks": [handler]}))

    asyncio.run(late())
    assert ends(guard, handler) == [UNKNOWN]
    assert provider.requests == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_of_which_one_is_refused(is_async: bool, provider: Provider, model: ChatOpenAI) -> None:
    with Bursar("memory:", budgets=[Budget("all", limit="0.0035 USD")]) as guard:  # room for one of the two
        handler = BursarCallbackHandler(guard)
        with pytest.raises(LangChainBudgetExceeded):
            generate(model, TWO, handler, is_async)
        assert ends(guard, handler) == [("refusal", False), FREE]
        assert provider.requests == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_a_batch_of_which_one_fails(
    is_async: bool, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    """The sync path tells of the failed one alone, and drops the answer before it; the third is never sent."""
    three = [[HumanMessage("hi")]] * 3
    provider.script([Answer(input_tokens=100, output_tokens=5), Fault("refuse", status=400)])
    with pytest.raises(Exception, match="400"):
        generate(model, three, handler, is_async)
    expected = [FREE, BILLED, BILLED] if is_async else [FREE, FREE, UNKNOWN]
    assert ends(guard, handler) == expected
    assert provider.requests == (3 if is_async else 2)


class Raising(BaseCallbackHandler):
    """A stranger's handler that comes after ours."""

    raise_error = True

    def on_chat_model_start(self, *given: Any, **more: Any) -> None:
        raise ValueError("planted")


@pytest.mark.parametrize("is_async", [False, True])
def test_a_later_handler_that_raises(
    is_async: bool, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    config: Any = {"callbacks": [handler, Raising()]}
    with pytest.raises(ValueError, match="planted") as raised:
        asyncio.run(model.ainvoke("hi", config)) if is_async else model.invoke("hi", config)
    del raised  # its traceback holds the call's frames
    assert ends(guard, handler) == [UNKNOWN]
    assert provider.requests == 0


def test_a_sync_stream_that_is_broken_off_or_dropped(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    for _ in model.stream("hi", {"callbacks": [handler]}):
        break
    assert ends(guard, handler) == [UNKNOWN]
    held = model.stream("hi", {"callbacks": [handler]})
    next(held)
    assert guard.status()[0].reserved > 0  # while somebody holds it, it may still go on
    del held
    assert ends(guard, handler) == [UNKNOWN, UNKNOWN]


def test_a_stream_that_nobody_iterates_reserves_nothing(
    guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    model.stream("hi", {"callbacks": [handler]})
    assert ends(guard, handler) == []


def test_an_async_stream_that_is_broken_off(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    async def first() -> None:
        async for _ in model.astream("hi", {"callbacks": [handler]}):
            break

    asyncio.run(first())
    assert ends(guard, handler) == [UNKNOWN]


def test_a_stream_that_the_provider_drops(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    provider.script([Fault("drop", after_events=5)])
    with pytest.raises(Exception):  # noqa: B017 - the client's own, of changing classes
        list(model.stream("hi", {"callbacks": [handler]}))
    assert ends(guard, handler) == [UNKNOWN]
    assert sum(record.cost_nanos for record in guard.records()) > 0


@pytest.mark.skipif(CORE < (1, 4), reason="stream_events v3 came with langchain-core 1.4")
@pytest.mark.filterwarnings("ignore:The method")  # it is in beta
class TestStreamEventsV3:
    def test_sync_abandoned(
        self, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
    ) -> None:
        events = iter(model.stream_events("hi", {"callbacks": [handler]}, version="v3"))
        next(events)
        del events
        assert len(ends(guard, handler)) == 1

    @pytest.mark.parametrize("consumed", [False, True])
    def test_async_ends_once(
        self, consumed: bool, provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
    ) -> None:
        """Consumed, it ends twice: on_llm_end, then on_llm_error. Abandoned, its producer reads on to the end."""

        async def run() -> None:
            async for _ in await model.astream_events("hi", {"callbacks": [handler]}, version="v3"):
                if not consumed:
                    break
            await asyncio.to_thread(handler.drain, 10.0)

        asyncio.run(run())
        assert len(ends(guard, handler)) == 1
        if consumed:
            assert sum(record.cost_nanos for record in guard.records()) == provider.billed_nanos


def test_a_forked_child_leaves_the_parents_calls_alone(
    provider: Provider, guard: Bursar, handler: BursarCallbackHandler, model: ChatOpenAI
) -> None:
    import os

    held = model.stream("hi", {"callbacks": [handler]})
    next(held)
    child = os.fork()
    if not child:
        os._exit(0 if handler.drain(0.0) and not handler._gate._open else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for _ in held:
        continue
    assert ends(guard, handler) == [BILLED]


def test_a_stream_that_is_collected_amid_a_transaction_of_the_same_thread_ends_after_it(
    provider: Provider, model: ChatOpenAI, tmp_path: Path
) -> None:
    """It must not wait for that transaction's lock."""
    clock = Collecting()
    guard = Bursar(f"sqlite:///{tmp_path}/b.db?durability=process", [Budget("all", limit="10 USD")], clock=clock)
    handler = BursarCallbackHandler(guard)
    config: RunnableConfig = {"callbacks": [handler], "run_id": uuid4()}
    drop(model.stream("hi", config))
    clock.collects = True
    assert in_time(lambda: guard.store.execute(Tell("one", "policy", {})))
    clock.collects = False
    assert ends(guard, handler) == [UNKNOWN]
    guard.close()


def test_a_chain_that_is_collected_while_another_begins_does_not_hold_it_up(
    handler: BursarCallbackHandler, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Collects(OrderedDict[int, Any]):
        def __setitem__(self, key: int, value: Any) -> None:
            gc.collect()
            super().__setitem__(key, value)

    def twice(parts: Iterator[str]) -> Iterator[str]:
        for part in parts:
            yield from (part, part)

    config: RunnableConfig = {"callbacks": [handler]}
    drop(RunnableGenerator(twice).stream("hi", config))
    monkeypatch.setattr(handler._gate.runs, "_runs", Collects())
    assert in_time(lambda: RunnableLambda(str).invoke("hi", config))
