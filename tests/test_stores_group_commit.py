"""Group commit: who comes together shares a batch, who comes alone waits for nobody, and what is cut off is seen through."""

from __future__ import annotations

import asyncio
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
