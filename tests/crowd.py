"""Processes by the dozen: forked from one parent that has imported everything, each with a guard and connections of its own."""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

import bursar.estimate.request
import bursar.stores.leases
import bursar.stores.postgres
import bursar.stores.redis
import bursar.stores.sqlite  # noqa: F401 - what a process would otherwise import when it opens a store
from bursar import Budget, BudgetExceeded, Bursar, PriceBook

CAP = "0.078 USD"  # ten calls of $0.0075 fit
MESSAGES = [{"role": "user", "content": "cat " * 1_000}]
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["crowd"])
PriceBook.packaged()  # once, in the parent


def _begin() -> None:
    """Start the parent, with this folder in its path: what Python itself hands over reaches only its children."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (os.path.dirname(__file__), before)))
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ.update({} if before is None else {"PYTHONPATH": before})


class Member(NamedTuple):
    """One process, and the pipe to it."""

    process: BaseProcess
    pipe: Connection


@contextmanager
def crowd(work: Callable[..., None], count: int, *given: Any) -> Iterator[list[Member]]:
    """So many processes that do `work(pipe, *given)`; whoever is left at the end is killed."""
    _begin()
    members = []
    for _ in range(count):
        mine, its = _FORKS.Pipe()
        process = _FORKS.Process(target=work, args=(its, *given), daemon=True)
        process.start()
        its.close()  # a process that fails is heard of
        members.append(Member(process, mine))
    try:
        yield members
    finally:
        for process, pipe in members:
            process.kill()
            process.join()
            pipe.close()


def ask(port: int, *, max_tokens: int | None, timeout_s: float = 60.0, **more: Any) -> Any:
    """One request of gpt-4o to the provider on that port, and its answer. Raises OSError, HTTPException or ValueError."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        body = {"model": "gpt-4o", "max_completion_tokens": max_tokens, "messages": MESSAGES, **more}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def attempt(guard: Bursar, port: int, **said: Any) -> bool:
    """One guarded call; False where the budget refused it."""
    try:
        with guard.call("openai", "gpt-4o", max_output_tokens=500, **said) as call:
            call.settle(ask(port, max_tokens=call.max_output_tokens))
    except BudgetExceeded:
        return False
    return True


def caller(pipe: Connection, url: str, port: int, options: dict[str, Any], said: dict[str, Any], threads: int) -> None:
    """A process of a scenario: opens its guard, says so, waits for a word, tries once in each thread, and says what was sent."""
    sent: list[bool | BaseException] = []

    def one(guard: Bursar) -> None:
        try:
            with guard.scope(team="research"):
                sent.append(attempt(guard, port, **said))
        except BaseException as error:  # noqa: BLE001 - the test looks at it
            sent.append(error)

    with Bursar(url, budgets=[Budget("cap", CAP, match={"team": "research"}, **options)]) as guard:
        pipe.send("ready")
        pipe.recv()
        started = [threading.Thread(target=one, args=(guard,)) for _ in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    pipe.send([one if isinstance(one, bool) else repr(one) for one in sent])
