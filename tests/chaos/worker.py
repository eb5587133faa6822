"""A process of the chaos run: threads with guarded calls over HTTP, whatever happens to it, its store or its clock."""

from __future__ import annotations

import faulthandler
import http.client
import logging
import os
import random
import signal
import threading
import time
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from crowd import ask

from bursar import Budget, BudgetExceeded, Bursar, StoreError
from bursar.stores import server_clock

THREADS = 4
CLIENT_TIMEOUT_S = 1.0
INPUT_TOKENS = 1_000  # of a message that is short, so that machines are busy with faults rather than with text
MESSAGES = [{"role": "user", "content": "Well?"}]
RETRY_S = 0.2
SMALLEST = 10  # tokens of output: what still fits where little is left


class Skewed:
    """A host's clock that is off by a shared number of microseconds."""

    def __init__(self, off_us: Any) -> None:
        self._off_us = off_us

    def now_us(self) -> int:
        return time.time_ns() // 1_000 + int(self._off_us.value)


class Orders(NamedTuple):
    """What a worker is told. `team`: the number of the team that spends now; `off_us`: by how much its host's clock is off.

    These and `stop` are shared without locks: whoever is killed would hold them for ever.
    """

    url: str
    port: int
    limit: str
    ttl_s: float
    pause_s: float
    acknowledged: str
    team: Any
    off_us: Any
    stop: Any

    def open(self) -> Bursar:
        """The guard, on its budgets; the store of a file goes by the host's clock, servers by their own."""
        budgets = [
            Budget("everybody", "1000000 USD", estimate="strict"),
            Budget("team", self.limit, per="team", estimate="strict"),
        ]
        host = self.clock
        server_clock.SystemClock = lambda: host  # type: ignore[assignment, misc]
        return Bursar(self.url, budgets, detectors="off", clock=host if self.url.startswith("sqlite") else None)

    @property
    def clock(self) -> Skewed:
        return Skewed(self.off_us)


def work(pipe: Connection, orders: Orders, seed: int) -> None:
    """Until told to stop, or killed. SIGUSR1 has it say where its threads are."""
    faulthandler.register(signal.SIGUSR1)
    threading.Thread(target=_end_with, args=(pipe,), daemon=True).start()
    logging.getLogger("bursar").setLevel(logging.CRITICAL)
    while not orders.stop.value:
        try:
            guard = orders.open()
        except StoreError:
            time.sleep(RETRY_S)
            continue
        file = os.open(orders.acknowledged, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        threads = [
            threading.Thread(target=_calls, args=(guard, orders, file, random.Random(seed + number)))
            for number in range(THREADS)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        guard.close()


def _end_with(pipe: Connection) -> None:
    """Nobody goes on where whoever began the run is gone."""
    pipe.poll(None)
    os._exit(1)


def _calls(guard: Bursar, orders: Orders, file: int, at_random: random.Random) -> None:
    while not orders.stop.value:
        time.sleep(at_random.uniform(0, 2 * orders.pause_s))
        team = orders.team.value
        try:
            if not _call(guard, orders, file, team, at_random.choice((100, 200, 500))):
                _call(guard, orders, file, team, SMALLEST)
                orders.team.value = max(orders.team.value, team + 1)
        except StoreError:
            time.sleep(RETRY_S)
        except (OSError, http.client.HTTPException, ValueError):
            continue  # the provider's fault: the block has ended the call


def _call(guard: Bursar, orders: Orders, file: int, team: int, max_tokens: int) -> bool:
    """One call, and a line in the file once its settlement is acknowledged; False where the budget refused it."""
    try:
        with (
            guard.scope(team=f"t{team}"),
            guard.call(
                "openai", "gpt-4o", input_tokens=INPUT_TOKENS, max_output_tokens=max_tokens, ttl_s=orders.ttl_s
            ) as call,
        ):
            who = f"{os.getpid()} t{team} {call.id}"
            answer = ask(orders.port, max_tokens=max_tokens, timeout_s=CLIENT_TIMEOUT_S, user=who, messages=MESSAGES)
            record = call.settle(answer)
    except BudgetExceeded:
        return False
    if record is not None and not record.estimated:
        os.write(file, f"{call.id}\n".encode())
    return True
