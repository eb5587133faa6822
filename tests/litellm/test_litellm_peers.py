"""The scenarios in which peers overspend, through LiteLLM: a budget for ten calls of $0.0075 in one SQLite file."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("bursar_litellm")

import litellm

from bursar import Budget, BudgetExceeded, Bursar
from bursar.testing.provider import Answer, Fault, Provider
from bursar_litellm import BursarLogger, install

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

PROMPT = "abc " * 1_000
COST_NANOS = 7_500_000
WORKER = """
import sys
from concurrent.futures import ThreadPoolExecutor
import litellm
from bursar import BudgetExceeded, Bursar
from bursar_litellm import install

store, url, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
bursar = Bursar(store)
install(bursar)
print("ready", flush=True)
sys.stdin.readline()

def one(_):
    try:
        litellm.completion(
            "openai/gpt-4o", [{"role": "user", "content": "abc " * 1_000}], max_tokens=500, max_retries=0,
            api_base=f"{url}/v1", api_key="any",
        )
    except BudgetExceeded:
        return

with ThreadPoolExecutor(threads) as pool:
    list(pool.map(one, range(threads)))
bursar.close()
"""


@pytest.fixture
def provider() -> Iterator[Provider]:
    with Provider(Answer(input_tokens=1_000, output_tokens=500, chunks=10), latency_s=0.05) as provider:
        yield provider


def budget(on_exceed: str = "refuse") -> Budget:
    return Budget("cap", "0.078 USD", on_exceed=on_exceed)


def start(store: str, provider: Provider, threads: int) -> subprocess.Popen[str]:
    """A process that makes as many calls at once, when it is told to go."""
    command = [sys.executable, "-c", WORKER, store, provider.url, str(threads)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def go(worker: subprocess.Popen[str]) -> None:
    assert worker.stdout is not None
    assert worker.stdin is not None
    assert worker.stdout.readline() == "ready\n"
    worker.stdin.write("go\n")
    worker.stdin.flush()


def call(provider: Provider, **more: Any) -> Any:
    settings = {"max_tokens": 500, "max_retries": 0, "api_base": f"{provider.url}/v1", "api_key": "any"}
    return litellm.completion("openai/gpt-4o", [{"role": "user", "content": PROMPT}], **settings, **more)


def fill(provider: Provider) -> None:
    """Call until the budget refuses."""
    for _ in range(30):
        try:
            call(provider)
        except BudgetExceeded:
            return
    raise AssertionError("30 calls, and no refusal")


@pytest.mark.parametrize("on_exceed", ["refuse", "wait 60s"])
def test_four_processes_of_thirteen_threads(on_exceed: str, provider: Provider, tmp_path: Path) -> None:
    """Never more than ten; exactly ten when they wait for headroom."""
    store = f"sqlite:///{tmp_path}/bursar.db"
    with Bursar(store, [budget(on_exceed)]) as bursar:
        workers = [start(store, provider, 13) for _ in range(4)]
        for worker in workers:
            go(worker)
        assert [worker.wait(120) for worker in workers] == [0] * 4
        provider.wait_idle()
        assert provider.billed_calls <= 10
        if on_exceed != "refuse":
            assert provider.billed_calls == 10
        assert bursar.store.open_reservations() == 0
        settled = [record for record in bursar.records() if record.outcome == "completed"]
        assert sum(record.cost_nanos for record in settled) == provider.billed_nanos


def test_a_killed_process_does_not_give_its_calls_back(provider: Provider, tmp_path: Path) -> None:
    """Five in flight at SIGKILL were billed: the others find room for five."""
    store = f"sqlite:///{tmp_path}/bursar.db"
    provider.script([Fault("hang")] * 5)
    with Bursar(store, [budget()]) as bursar:
        worker = start(store, provider, 5)
        go(worker)
        provider.wait_requests(5, 60)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(20)
        uninstall = install(bursar)
        try:
            fill(provider)
        finally:
            uninstall()
        assert provider.billed_calls <= 10
        assert bursar.store.open_reservations() == 5  # until they expire, and are booked


@pytest.mark.parametrize("wrong", ["times out", "is abandoned"])
def test_calls_without_an_end_are_billed(wrong: str, provider: Provider, tmp_path: Path) -> None:
    if wrong == "times out":
        provider.script([Fault("hang")] * 5)
    with Bursar(f"sqlite:///{tmp_path}/bursar.db", [budget()]) as bursar:
        uninstall = install(bursar)
        try:
            for _ in range(5):
                if wrong == "times out":
                    with pytest.raises(litellm.Timeout):
                        call(provider, timeout=0.2)
                else:
                    next(call(provider, stream=True))
            assert BursarLogger(bursar).drain()
            fill(provider)
        finally:
            uninstall()
        provider.wait_idle()
        assert provider.billed_calls <= 10
        (status,) = bursar.status()
        assert provider.billed_nanos <= int(status.spent * 10**9) <= 78_000_000
        assert bursar.store.open_reservations() == 0
