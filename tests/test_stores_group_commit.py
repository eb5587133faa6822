"""Group commit: who comes together shares a batch, who comes alone waits for nobody, and what is cut off is seen through."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import pytest

from bursar.commands import Answer, Command, Extended, Release
from bursar.errors import StoreError
from bursar.stores import group_commit
from bursar.stores.group_commit import GroupCommit


class Log:
    """Applies commands by writing them down; `hold` keeps a batch under way until `go`."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], bool]] = []
        self.cut_off = False
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)

    def apply(self, commands: Sequence[Command], first_time: bool) -> list[Answer | BaseException]:
        self.batches.append(([command.id for command in commands], first_time))
        self.begun.release()
        assert self.go.wait(20)
        if self.cut_off:
            self.cut_off = False
            raise KeyboardInterrupt
        return [Extended(len(self.batches)) for _ in commands]

    def apply_at_once(self, command: Command) -> Answer | BaseException | None:
        (answer,) = self.apply((command,), True)
        return answer


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def commits(log: Log) -> Iterator[GroupCommit]:
    made = GroupCommit(log.apply)
    yield made
    log.go.set()
    made.close()


def start(commits: GroupCommit, id: str) -> threading.Thread:
    thread = threading.Thread(target=commits.run, args=(Release(id),), daemon=True)
    thread.start()
    return thread


def queued(commits: GroupCommit, count: int) -> None:
    deadline = time.monotonic() + 10
    while len(commits._queue) < count:
        assert time.monotonic() < deadline


def share_a_batch(commits: GroupCommit, log: Log) -> None:
    """`b` and `c` come while `a` is under way, and are applied together."""
    log.go.clear()
    threads = [start(commits, "a")]
    assert log.begun.acquire(timeout=20)
    threads += [start(commits, "b"), start(commits, "c")]
    queued(commits, 2)
    log.go.set()
    for thread in threads:
        thread.join(20)
    assert sorted(log.batches[1][0]) == ["b", "c"]
    log.batches.clear()


def test_a_lone_caller_meets_no_other_thread(commits: GroupCommit, log: Log) -> None:
    before = threading.active_count()
    assert commits.run(Release("a")) == Extended(1)
    assert log.batches == [(["a"], True)]
    assert threading.active_count() == before


def test_who_shared_a_batch_comes_back_together(
    commits: GroupCommit, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "COMPANY_S", 60)
    share_a_batch(commits, log)
    first = start(commits, "d")
    queued(commits, 1)
    second = start(commits, "e")
    first.join(5)
    second.join(5)
    assert log.batches == [(["d", "e"], True)]


def test_nobody_waits_for_those_who_stay_away(commits: GroupCommit, log: Log) -> None:
    share_a_batch(commits, log)
    for id in ("d", "e"):
        start(commits, id).join(20)
    assert log.batches == [(["d"], True), (["e"], True)]


def test_i7_a_lone_command_that_is_cut_off_is_seen_through(commits: GroupCommit, log: Log) -> None:
    """By the worker, which no longer believes that it comes for the first time; and whoever queued behind it goes on."""
    log.cut_off = True
    log.go.clear()
    cut_off: list[type[BaseException]] = []

    def interrupted() -> None:
        try:
            commits.run(Release("a"))
        except KeyboardInterrupt:
            cut_off.append(KeyboardInterrupt)

    threads = [threading.Thread(target=interrupted, daemon=True)]
    threads[0].start()
    assert log.begun.acquire(timeout=20)
    threads.append(start(commits, "b"))
    queued(commits, 1)
    log.go.set()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    commits.close()
    assert cut_off
    assert log.batches[0] == (["a"], True)
    again = log.batches[1:]
    assert sorted(id for ids, _ in again for id in ids) == ["a", "b"]
    assert all(not first_time for ids, first_time in again if "a" in ids)


def test_commands_that_come_at_any_step_of_whoever_leads_are_applied(commits: GroupCommit, log: Log) -> None:
    """A trace stands for the threads that get their turn in between: it queues a command at each step."""
    posted: list[str] = []

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if frame.f_code is not GroupCommit._lead.__code__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode" and len(posted) < 300:
            posted.append(f"{len(posted)}")
            commits.post(Release(posted[-1]))
        return trace

    commits.post(Release("first"))
    tracing = sys.gettrace()
    sys.settrace(trace)
    try:
        with commits._turn:
            commits._lead()
    finally:
        sys.settrace(tracing)
    commits.close()
    assert len(posted) > 20
    assert sorted(id for ids, _ in log.batches for id in ids) == sorted(["first", *posted])


@pytest.mark.parametrize("with_worker", [False, True])
@pytest.mark.parametrize("is_awaited", [False, True])
def test_i9_who_comes_while_the_store_is_closed_is_answered(
    commits: GroupCommit, log: Log, monkeypatch: pytest.MonkeyPatch, with_worker: bool, is_awaited: bool
) -> None:
    """It is found open, and the store is closed before the command is queued."""
    if with_worker:
        commits.post(Release("earlier"))
        assert log.begun.acquire(timeout=20)
    check = commits._check_open

    def found_open() -> None:
        check()
        commits.close()

    monkeypatch.setattr(commits, "_check_open", found_open)
    if is_awaited:
        asyncio.run(asyncio.wait_for(commits.arun(Release("late")), 20))
    else:
        commits.post(Release("late"))
    assert log.batches[-1][0] == ["late"]
    with pytest.raises(StoreError):
        commits.post(Release("later"))


# -- in the event loop itself ----------------------------------------------------------------------------------------


@pytest.fixture
def eager(log: Log) -> Iterator[GroupCommit]:
    """Its store can apply a command at once."""
    made = GroupCommit(log.apply, log.apply_at_once)
    yield made
    log.go.set()
    made.close()


def test_a_lone_task_meets_no_other_thread(eager: GroupCommit, log: Log) -> None:
    async def everything() -> None:
        for id in "abc":
            await eager.arun(Release(id))
            await asyncio.sleep(0)

    before = threading.active_count()
    asyncio.run(everything())
    assert log.batches == [([id], True) for id in "abc"]
    assert threading.active_count() == before


def test_a_task_that_waits_for_nothing_else_leaves_the_loop_to_others(eager: GroupCommit) -> None:
    turns = 0

    async def busy() -> None:
        for number in range(30):
            await eager.arun(Release(f"{number}"))

    async def everything() -> None:
        nonlocal turns
        task = asyncio.ensure_future(busy())
        while not task.done():
            turns += 1
            await asyncio.sleep(0)

    asyncio.run(everything())
    assert turns >= 10


def test_tasks_that_come_together_share_a_batch(eager: GroupCommit, log: Log) -> None:
    """The first of them is applied at once; a loop that was closed meanwhile keeps the next one from nothing."""

    async def everything() -> None:
        await asyncio.gather(*(eager.arun(Release(f"{number}")) for number in range(200)))

    for loop in (asyncio.new_event_loop(), asyncio.new_event_loop()):
        while eager._queue or eager._turn.locked():
            time.sleep(0)  # the worker has answered, and is not done yet
        log.batches.clear()
        loop.run_until_complete(everything())
        loop.close()
        assert log.batches[0] == (["0"], True)
        assert sum(len(ids) for ids, _ in log.batches) == 200
        assert len(log.batches) <= 20


def test_a_task_waits_for_no_thread(eager: GroupCommit, log: Log) -> None:
    """Neither for one that has its turn, nor where the store would wait; and its own turn keeps no thread waiting."""
    log.go.clear()
    first = start(eager, "a")
    assert log.begun.acquire(timeout=20)

    async def everything() -> None:
        task = asyncio.ensure_future(eager.arun(Release("b")))
        while len(eager._queue) < 1:
            await asyncio.sleep(0)
        log.go.set()
        await task
        eager._apply_at_once = lambda command: None
        await eager.arun(Release("c"))

        def apply(command: Command) -> Answer | BaseException | None:
            threads.append(start(eager, "e"))
            queued(eager, 1)
            return log.apply_at_once(command)

        while eager._queue or eager._served or eager._turn.locked():
            await asyncio.sleep(0)
        eager._apply_at_once = apply
        await eager.arun(Release("d"))

    threads = [first]
    asyncio.run(everything())
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert [ids for ids, _ in log.batches] == [["a"], ["b"], ["c"], ["d"], ["e"]]


def test_i7_a_command_that_is_cut_off_in_the_loop_is_seen_through(eager: GroupCommit, log: Log) -> None:
    log.cut_off = True
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(eager.arun(Release("a")))
    eager.close()
    assert log.batches == [(["a"], True), (["a"], False)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_i9_no_interrupt_in_the_loop_takes_the_turn_away() -> None:
    """In a child, because the alarm of this process is the test runner's."""
    child = os.fork()
    if child == 0:
        os._exit(turns_lost(2_000))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def turns_lost(interrupts: int) -> int:
    """1 where one of so many interrupts left the turn with nobody; 2 where they were too few."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def apply(command: Command) -> Answer | BaseException | None:
        return Extended(1)

    commits = GroupCommit(lambda commands, _: [Extended(1) for _ in commands], apply)
    signal.signal(signal.SIGALRM, interrupt)
    at_random = random.Random(7)
    interrupted = 0
    for _ in range(20 * interrupts):
        with contextlib.suppress(KeyboardInterrupt):
            interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, at_random.uniform(1e-6, 2e-5))
            for _ in range(50):
                commits._run_at_once(Release("a"), apply)
            signal.setitimer(signal.ITIMER_REAL, 0)
            interrupted -= 1
        if not commits._turn.acquire(timeout=5):  # the worker may have it for what was cut off
            return 1
        commits._turn.release()
        if interrupted == interrupts:
            return 0
    return 2
