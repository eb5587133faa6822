"""The promise on one machine: whoever calls, however it ends, ten calls fit the cap, ten are billed, and each is on the books.

A provider bills 1,000 input and 500 output tokens of gpt-4o ($0.0075) per call, under a cap of $0.078. The calls go through
`Bursar.call` with the real OpenAI client over HTTP. Run as a program, this file is one of the processes of the scenarios.
"""

from __future__ import annotations

import asyncio
import contextvars
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bursar import Budget, BudgetExceeded, Bursar, Usage
from bursar.testing import ManualClock
from bursar.testing.provider import Answer, Fault, Provider

openai = pytest.importorskip("openai")

CAP = "0.078 USD"
FIT = 10
COST_NANOS = 7_500_000
ANSWER = Answer(input_tokens=1_000, output_tokens=500, latency_s=0.05)
MESSAGES = [{"role": "user", "content": "cat " * 1_000}]
WARM = {"team": "warming up"}
STORES = {
    "memory": "memory:",
    "sqlite-process": "sqlite:///{}?durability=process",
    "sqlite-full": "sqlite:///{}",
}
TTL_S = 600

# How a call is estimated, and how many of the ten then have to be billed, at the least: the caller's count; estimates learned
# from 50 settled calls; the packaged priors, with and without waiting for what calls in flight free; an upper bound. That one
# holds $0.0159 for each call of $0.0075, because a token may be one byte: so the tenth call never fits.
MODES: dict[str, tuple[dict[str, Any], int]] = {
    "given": ({}, FIT),
    "given, strict": ({"estimate": "strict"}, FIT),
    "warm": ({}, FIT),
    "cold": ({}, 8),
    "cold, waiting": ({"on_exceed": "wait"}, FIT),
    "strict": ({"estimate": "strict"}, 4),
    "strict, waiting": ({"estimate": "strict", "on_exceed": "wait"}, 9),
}


# Every mode on memory, the leading ones on SQLite too.
CELLS = [
    pytest.param(store, mode, id=f"{name}-{mode}")
    for name, store in STORES.items()
    for mode in (MODES if name == "memory" else ("given", "warm", "cold, waiting"))
]


@pytest.fixture(params=STORES.values(), ids=STORES)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(request.param).format(tmp_path / "budgets.db")


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(ANSWER) as running:
        yield running


def guard_of(url: str, clock: ManualClock | None = None, **options: Any) -> Bursar:
    return Bursar(url, budgets=[Budget("cap", CAP, match={"team": "research"}, **options)], clock=clock)


def client_of(url: str, *, asynchronous: bool = False, timeout_s: float = 30.0) -> Any:
    kind = openai.AsyncOpenAI if asynchronous else openai.OpenAI
    return kind(base_url=url + "/v1", api_key="any", max_retries=0, timeout=timeout_s)


def warm_up(guard: Bursar) -> None:
    for _ in range(50):
        call = guard.reserve("openai", "gpt-4o", messages=MESSAGES, max_output_tokens=500, tags=WARM)
        call.settle(Usage(input_tokens=1_000, output_tokens=500))


def said(mode: str) -> dict[str, Any]:
    """What a call says of its input."""
    return {"input_tokens": 1_000} if mode.startswith("given") else {"messages": MESSAGES}


def attempt(guard: Bursar, client: Any, *, max_tokens: int = 500, **said: Any) -> bool:
    """One guarded call; False where the budget refused it."""
    said = said or {"input_tokens": 1_000}
    try:
        with guard.call("openai", "gpt-4o", max_output_tokens=max_tokens, **said) as call:
            answer = client.chat.completions.create(
                model=call.model, max_completion_tokens=call.max_output_tokens, messages=MESSAGES
            )
            call.settle(answer)
    except BudgetExceeded:
        return False
    return True


def in_threads(count: int, work: Callable[[], object]) -> list[BaseException]:
    """Run the work in as many threads at once, each in a copy of this context; what went wrong in them."""
    barrier, errors = threading.Barrier(count), []

    def run() -> None:
        barrier.wait()
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the test looks at it, in its own thread
            errors.append(error)

    threads = [threading.Thread(target=contextvars.copy_context().run, args=(run,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def check_books(guard: Bursar, provider: Provider, *, estimated: int = 0) -> None:
    """Nothing is open, and the ledger is the provider's account, or exceeds it by so many `estimated` records alone."""
    provider.wait_idle(timeout_s=60)
    assert guard.store.open_reservations() == 0
    records = [record for record in guard.records(team="research") if record.kind != "refusal"]
    known = [record.cost_nanos for record in records if not record.estimated]
    guessed = [record.cost_nanos for record in records if record.estimated]
    assert len(guessed) == estimated
    assert sum(known) == provider.billed_nanos - estimated * COST_NANOS
    assert all(cost >= COST_NANOS for cost in guessed)
    (cap,) = guard.status(team="research")
    assert cap.spent * 10**9 == sum(known) + sum(guessed)
    assert cap.reserved == 0


def check_billed(provider: Provider, mode: str) -> None:
    assert MODES[mode][1] <= provider.billed_calls <= FIT


@pytest.mark.parametrize(("url", "mode"), CELLS, indirect=["url"])
def test_one_caller_tries_thirty_times(url: str, provider: Provider, mode: str) -> None:
    client = client_of(provider.url)
    with guard_of(url, **MODES[mode][0]) as guard, guard.scope(team="research"):
        if mode == "warm":
            warm_up(guard)
        sent = sum(attempt(guard, client, **said(mode)) for _ in range(30))
        assert sent == provider.billed_calls
        check_billed(provider, mode)
        check_books(guard, provider)


@pytest.mark.parametrize(("url", "mode"), CELLS, indirect=["url"])
def test_fifty_threads(url: str, provider: Provider, mode: str) -> None:
    client = client_of(provider.url)
    with guard_of(url, **MODES[mode][0]) as guard, guard.scope(team="research"):
        if mode == "warm":
            warm_up(guard)
        assert not in_threads(50, lambda: attempt(guard, client, **said(mode)))
        check_billed(provider, mode)
        check_books(guard, provider)


@pytest.mark.parametrize(("url", "mode"), CELLS, indirect=["url"])
def test_fifty_tasks(url: str, provider: Provider, mode: str) -> None:
    async def one(guard: Bursar, client: Any) -> bool:
        try:
            async with guard.acall("openai", "gpt-4o", max_output_tokens=500, **said(mode)) as call:
                answer = await client.chat.completions.create(
                    model=call.model, max_completion_tokens=call.max_output_tokens, messages=MESSAGES
                )
                await call.asettle(answer)
        except BudgetExceeded:
            return False
        return True

    async def all_of_them(guard: Bursar) -> int:
        async with client_of(provider.url, asynchronous=True) as client:
            return sum(await asyncio.gather(*(one(guard, client) for _ in range(50))))

    with guard_of(url, **MODES[mode][0]) as guard, guard.scope(team="research"):
        if mode == "warm":
            warm_up(guard)
        assert asyncio.run(all_of_them(guard)) == provider.billed_calls
        check_billed(provider, mode)
        check_books(guard, provider)


@pytest.mark.parametrize(
    ("mode", "durability"), [("given", "process"), ("given", "full"), ("warm", "process"), ("cold, waiting", "process")]
)
def test_four_processes_of_thirteen_threads(tmp_path: Path, provider: Provider, mode: str, durability: str) -> None:
    four_processes(f"sqlite:///{tmp_path / 'budgets.db'}?durability={durability}", provider, mode)


def four_processes(url: str, provider: Provider, mode: str) -> None:
    """Four processes of 13 threads, each thread with one call: none beyond the cap, on whatever store."""
    with guard_of(url, **MODES[mode][0]) as guard:
        workers = [start("try", url, provider.url, mode) for _ in range(4)]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == b"ready\n"
        for worker in workers:
            assert worker.stdin is not None
            worker.stdin.write(b"go\n")
            worker.stdin.flush()
        for worker in workers:
            worker.communicate(timeout=60)
        assert [worker.returncode for worker in workers] == [0] * 4
        check_billed(provider, mode)
        check_books(guard, provider)


@pytest.mark.parametrize("mode", ["given", "warm"])
def test_five_client_timeouts(url: str, provider: Provider, mode: str) -> None:
    """A call that timed out may have been billed, and here was: it is booked at what was reserved."""
    provider.script([Fault("hang")] * 5)
    client = client_of(provider.url, timeout_s=0.25)
    timeouts = 0
    with guard_of(url) as guard, guard.scope(team="research"):
        if mode == "warm":
            warm_up(guard)
        for _ in range(30):
            try:
                attempt(guard, client, **said(mode))
            except openai.APITimeoutError:
                timeouts += 1
        assert timeouts == 5
        assert provider.billed_calls == FIT
        check_books(guard, provider, estimated=5)


@pytest.mark.parametrize("mode", ["given", "warm"])
def test_thirty_abandoned_streams(url: str, provider: Provider, mode: str) -> None:
    client = client_of(provider.url)
    refused = 0
    with guard_of(url) as guard, guard.scope(team="research"):
        if mode == "warm":
            warm_up(guard)
        for _ in range(30):
            try:
                with guard.call("openai", "gpt-4o", max_output_tokens=500, **said(mode)) as call:
                    stream = client.chat.completions.create(
                        model=call.model,
                        max_completion_tokens=call.max_output_tokens,
                        messages=MESSAGES,
                        stream=True,
                    )
                    next(iter(stream))
                    stream.close()
            except BudgetExceeded:
                refused += 1
        assert refused == 20
        assert provider.billed_calls == FIT
        check_books(guard, provider, estimated=FIT)


@pytest.mark.parametrize("durability", ["process", "full"])
def test_a_killed_process_with_five_calls_in_flight(tmp_path: Path, provider: Provider, durability: str) -> None:
    killed_with_five_in_flight(f"sqlite:///{tmp_path / 'budgets.db'}?durability={durability}", provider)


def killed_with_five_in_flight(url: str, provider: Provider) -> None:
    """SIGKILL: the five stay booked, before and after they expire, because the provider billed them."""
    provider.script([Fault("hang")] * 5)
    client = client_of(provider.url)
    with guard_of(url) as guard, guard.scope(team="research"):
        victim = start("hang", url, provider.url, "given")
        provider.wait_requests(5, timeout_s=60)
        victim.send_signal(signal.SIGKILL)
        assert victim.wait() == -signal.SIGKILL
        assert guard.store.open_reservations() == 5
        assert sum(attempt(guard, client) for _ in range(30)) == 5
        later = ManualClock(guard.store.now_us() + (TTL_S + 1) * 1_000_000)
    with guard_of(url, later) as guard, guard.scope(team="research"):
        guard.tend()
        assert not any(attempt(guard, client) for _ in range(30))
        assert provider.billed_calls == FIT
        check_books(guard, provider, estimated=5)


@pytest.mark.parametrize("mode", ["given", "cold, waiting"])
def test_a_parents_budget_holds_for_five_children(url: str, provider: Provider, mode: str) -> None:
    """Ten calls each, in threads of their own, under children's budgets that together are five times the parent's."""
    client = client_of(provider.url)
    children = iter(range(5))
    with Bursar(url, budgets=[Budget("cap", CAP, per="crew", match={"team": "research"}, **MODES[mode][0])]) as guard:
        if mode == "warm":
            warm_up(guard)

        def child() -> None:
            with guard.scope(run=f"child {next(children)}", budget=CAP):
                for _ in range(10):
                    attempt(guard, client, **said(mode))

        with guard.scope(team="research", crew="crew 1", run="parent"):
            assert not in_threads(5, child)
        check_billed(provider, mode)
        provider.wait_idle(timeout_s=60)
        assert guard.store.open_reservations() == 0
        found = {(one.name, one.scope.get("run")): one for one in guard.status()}
        assert found["cap", None].spent * 10**9 == provider.billed_nanos
        assert sum(one.spent for (_, run), one in found.items() if run) == found["cap", None].spent


def test_a_parents_own_budget_holds_for_its_children(url: str, provider: Provider) -> None:
    client = client_of(provider.url)
    children = iter(range(5))
    with Bursar(url) as guard:

        def child() -> None:
            with guard.scope(run=f"child {next(children)}", budget="0.05 USD"):
                for _ in range(10):
                    attempt(guard, client)

        with guard.scope(run="parent", team="research", budget=CAP):
            assert not in_threads(5, child)
        assert provider.billed_calls == FIT
        assert sum(record.cost_nanos for record in guard.records()) == provider.billed_nanos
        assert guard.store.open_reservations() == 0


def test_a_loose_maximum_waits_for_headroom(url: str, provider: Provider) -> None:
    """The maximum of 4,096 tokens holds four times what a call uses: estimates learn, and callers wait for the difference."""
    client = client_of(provider.url)
    with guard_of(url, on_exceed="wait 30s") as guard, guard.scope(team="research"):
        assert not in_threads(50, lambda: attempt(guard, client, max_tokens=4_096))
        assert 8 <= provider.billed_calls <= FIT
        check_books(guard, provider)


def test_embeddings_are_refused_once_the_cap_is_blown(url: str, provider: Provider) -> None:
    client = client_of(provider.url)
    with guard_of(url) as guard, guard.scope(team="research"):
        while attempt(guard, client):
            pass
        guard.charge("0.01 USD")
        sent = provider.requests
        with (
            pytest.raises(BudgetExceeded) as caught,
            guard.call("openai", "text-embedding-3-small", messages="cat") as call,
        ):
            client.embeddings.create(model=call.model, input="cat")
        assert caught.value.available < 0
        assert provider.requests == sent


def start(what: str, url: str, provider_url: str, mode: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-P", __file__, what, url, provider_url, mode]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def process(what: str, url: str, provider_url: str, mode: str) -> None:
    """One process of a scenario: 13 threads with a try each, or five calls that never end."""
    client = client_of(provider_url)
    with guard_of(url, **MODES[mode][0]) as guard, guard.scope(team="research"):
        if what == "hang":
            in_threads(5, lambda: attempt(guard, client))
        if mode == "warm":
            warm_up(guard)
        print("ready", flush=True)
        sys.stdin.readline()
        errors = in_threads(13, lambda: attempt(guard, client, **said(mode)))
    if errors:
        raise errors[0]


if __name__ == "__main__":
    process(*sys.argv[1:])
