"""The peers' scenarios through crews: a budget that ten calls fit, in one SQLite file, whoever calls and however it ends.

Run as a program, with `job` among its globals, this file is one of the processes of the scenarios.
"""

from __future__ import annotations

import asyncio
import os
import runpy
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bursar_crewai")

from crewai import LLM, Agent, Crew, Task

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.testing import ManualClock
from bursar.testing.provider import Answer, Fault, Provider
from bursar_crewai import BursarCrew

CAP, CAP_NANOS = "0.078 USD", 78_000_000  # a call is billed 1,000 prompt and 500 completion tokens of gpt-4o: ten fit
TTL_S = 600


@pytest.fixture
def provider() -> Iterator[Provider]:
    answer = Answer(text="Final Answer: done", input_tokens=1_000, output_tokens=500, chunks=20)
    with Provider(answer, latency_s=0.02) as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/budgets.db?durability=process"


@pytest.fixture(scope="module")
def messages() -> Any:
    """What the crews of these tests send."""
    with Provider(Answer(text="Final Answer: done")) as provider:
        crew_of(llm_at(provider.url)).kickoff()
        return provider.account[0].request["messages"]


def open_guard(store: str, clock: ManualClock | None = None, **options: Any) -> Bursar:
    return Bursar(store, [Budget("cap", CAP, match={"phase": "test"}, **options)], clock=clock)


def warm_up(bursar: Bursar, messages: Any) -> None:
    """Fifty settled calls of the same kind, on no budget of the test: what a crew that has run before knows."""
    for _ in range(50):
        known = bursar.reserve("openai", "gpt-4o", messages=messages, max_output_tokens=500, tags={"phase": "warm"})
        known.settle(Usage(input_tokens=1_000, output_tokens=500))


def llm_at(url: str, **options: Any) -> LLM:
    settings = {"base_url": f"{url}/v1", "api_key": "any", "max_retries": 0, "max_tokens": 500}
    return LLM(model="gpt-4o", **{**settings, **options})


def crew_of(llm: LLM, bursar: Bursar | None = None, *, stream: bool = False) -> Crew:
    """A crew that makes one call, guarded by its step callback."""
    agent = Agent(role="planner", goal="g", backstory="b", llm=llm)
    task = Task(description="cat " * 1_000, expected_output="e", agent=agent)
    callback = None if bursar is None else BursarCrew(bursar, phase="test").step_callback
    return Crew(agents=[agent], tasks=[task], stream=stream, step_callback=callback)


def tried(call: Callable[[], Any]) -> bool:
    """Make the call; False where the budget refused it."""
    try:
        call()
    except BudgetExceeded:
        return False
    return True


def in_threads(count: int, call: Callable[[], Any]) -> int:
    """Try it in as many threads at once; how many were let through."""
    with ThreadPoolExecutor(count) as pool:
        return sum(pool.map(lambda _: tried(call), range(count)))


def check(bursar: Bursar, provider: Provider, *, estimated: int = 0) -> None:
    """Nothing is open; the books are the provider's account, or exceed it by estimated records alone."""
    provider.wait_idle()
    assert bursar.store.open_reservations() == 0
    records = list(bursar.records(phase="test"))
    certain = sum(record.cost_nanos for record in records if not record.estimated)
    assert certain <= provider.billed_nanos <= sum(record.cost_nanos for record in records) <= CAP_NANOS
    assert sum(record.estimated for record in records) <= estimated


def test_one_caller_tries_thirty_times(store: str, provider: Provider) -> None:
    with open_guard(store) as bursar:
        made = crew_of(llm_at(provider.url), bursar)
        assert sum(tried(made.kickoff) for _ in range(30)) == provider.billed_calls == 10
        check(bursar, provider)


@pytest.mark.parametrize(
    ("way", "on_exceed"),
    [
        ("threads", "refuse"),
        ("threads", "wait 30s"),
        ("kickoff_async", "wait 30s"),
        ("akickoff", "wait 30s"),
        pytest.param("kickoff_async", "refuse", marks=pytest.mark.nightly),
        pytest.param("akickoff", "refuse", marks=pytest.mark.nightly),
    ],
)
def test_fifty_crews_at_once(way: str, on_exceed: str, store: str, provider: Provider, messages: Any) -> None:
    """Waiting holds up no event loop: the calls that free the headroom run on the same one."""

    llm = llm_at(provider.url)

    async def tasks(bursar: Bursar) -> int:
        crews = [crew_of(llm, bursar) for _ in range(50)]
        answers = await asyncio.gather(*(getattr(crew, way)() for crew in crews), return_exceptions=True)
        refused = [answer for answer in answers if isinstance(answer, BaseException)]
        assert all(isinstance(error, BudgetExceeded) for error in refused), refused
        return len(answers) - len(refused)

    with open_guard(store, on_exceed=on_exceed) as bursar:
        if on_exceed == "refuse":
            warm_up(bursar, messages)
        threads = partial(in_threads, 50, lambda: crew_of(llm, bursar).kickoff())
        answered = threads() if way == "threads" else asyncio.run(tasks(bursar))
        assert answered == provider.billed_calls == 10
        check(bursar, provider)


def test_five_time_outs(store: str, provider: Provider, messages: Any) -> None:
    """What timed out at the client was billed: it counts, and so does each of the attempts that CrewAI makes of a task."""
    provider.script([Fault("hang")] * 5)
    with open_guard(store) as bursar:
        warm_up(bursar, messages)
        llm = llm_at(provider.url, timeout=0.5)
        with pytest.raises(ConnectionError):
            crew_of(llm, bursar).kickoff()  # three attempts
        made = crew_of(llm, bursar)  # two, and one that is answered
        assert sum(tried(made.kickoff) for _ in range(30)) == 5
        assert provider.billed_calls == 10
        check(bursar, provider, estimated=5)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_thirty_abandoned_streams(is_async: bool, store: str, provider: Provider, messages: Any) -> None:
    llm = llm_at(provider.url)

    def broken_off() -> None:
        output: Any = crew_of(llm, bursar, stream=True).kickoff()
        next(iter(output))
        output.close()

    async def abroken_off() -> bool:
        output: Any = await crew_of(llm, bursar, stream=True).akickoff()
        try:
            async for _ in output:
                break
            await output.aclose()
        except BudgetExceeded:
            return False
        return True

    async def thirty() -> int:
        return sum([await abroken_off() for _ in range(30)])

    with open_guard(store) as bursar:
        warm_up(bursar, messages)
        begun = asyncio.run(thirty()) if is_async else sum(tried(broken_off) for _ in range(30))
        assert begun == provider.billed_calls == 10
        check(bursar, provider, estimated=10)


def test_five_children_share_the_parents_ten(store: str, provider: Provider, messages: Any) -> None:
    """Each child may spend half of the parent's budget; together they spend no more than the whole."""
    llm = llm_at(provider.url)
    with open_guard(store) as bursar:
        warm_up(bursar, messages)

        def child(number: int) -> int:
            with bursar.scope(run="parent"), bursar.scope(run=f"child-{number}", budget="0.039 USD"):
                made = crew_of(llm, bursar)
                return sum(tried(made.kickoff) for _ in range(10))

        with ThreadPoolExecutor(5) as pool:
            answered = list(pool.map(child, range(5)))
        assert sum(answered) == provider.billed_calls == 10
        assert max(answered) <= 5
        check(bursar, provider)


def test_a_loose_maximum(store: str, provider: Provider) -> None:
    """max_tokens 4,096, 500 used, 50 threads at once, waiting: at least 8 of the 10 that fit, and never more."""
    llm = llm_at(provider.url, max_tokens=4_096)
    with open_guard(store, on_exceed="wait 30s") as bursar:
        answered = in_threads(50, lambda: crew_of(llm, bursar).kickoff())
        assert answered == provider.billed_calls
        assert 8 <= answered <= 10
        check(bursar, provider)


# -- several processes -------------------------------------------------------------------------------------------------


def start(forks: Any, folder: Path, *job: Any) -> Any:
    """A process that makes as many calls at once as the job says."""
    folder.mkdir()
    made = forks.Process(target=runpy.run_path, args=(__file__, {"job": (folder, *job)}, "__main__"))
    made.start()
    return made


def run_process(folder: Path, store: str, url: str, on_exceed: str, threads: int, all_there: Any) -> None:
    os.environ["CREWAI_STORAGE_DIR"] = str(folder)
    llm = llm_at(url)
    with open_guard(store, on_exceed=on_exceed) as bursar:
        all_there.wait(60)
        in_threads(threads, lambda: crew_of(llm, bursar).kickoff())


@pytest.mark.parametrize("on_exceed", [pytest.param("refuse", marks=pytest.mark.nightly), "wait 60s"])
def test_four_processes_of_thirteen_threads(
    on_exceed: str, store: str, provider: Provider, forks: Any, tmp_path: Path
) -> None:
    with open_guard(store, on_exceed=on_exceed) as bursar:
        all_there = forks.Barrier(4)
        workers = [start(forks, tmp_path / str(n), store, provider.url, on_exceed, 13, all_there) for n in range(4)]
        for worker in workers:
            worker.join(120)
        assert [worker.exitcode for worker in workers] == [0] * 4
        assert 5 <= provider.billed_calls <= 10
        if on_exceed != "refuse":
            assert provider.billed_calls == 10
        check(bursar, provider)


def test_a_killed_process_does_not_give_its_calls_back(
    store: str, provider: Provider, forks: Any, tmp_path: Path, messages: Any
) -> None:
    """Five in flight at SIGKILL were billed: they stay booked, before and after their reservations expire."""
    provider.script([Fault("hang")] * 5)
    with open_guard(store) as bursar:
        alone = forks.Barrier(1)
        victim = start(forks, tmp_path / "victim", store, provider.url, "refuse", 5, alone)
        provider.wait_requests(5, timeout_s=60)
        victim.kill()
        victim.join()
        assert bursar.store.open_reservations() == 5
        warm_up(bursar, messages)
        made = crew_of(llm_at(provider.url), bursar)
        answered = sum(tried(made.kickoff) for _ in range(30))
        assert 3 <= answered <= 5  # the killed process knew no such calls, and reserved more than they cost
        later = ManualClock(bursar.store.now_us() + (TTL_S + 1) * 1_000_000)
    with open_guard(store, later) as bursar:
        bursar.tend()
        assert not tried(crew_of(llm_at(provider.url), bursar).kickoff)
        assert provider.billed_calls == 5 + answered
        check(bursar, provider, estimated=5)


if __name__ == "__main__":
    run_process(*job)  # type: ignore[name-defined]  # noqa: F821
