"""Forks of the process: every store comes to rest before each, and goes on after it, in the parent and in the child."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from bursar.commands import Tell
from bursar.stores import forks
from bursar.stores.memory import MemoryStore

FORKS = 25


class Resting:
    """A store that may not be used by two threads at once, and knows in whose process it was told to go on."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.process = os.getpid()

    def before_fork(self) -> None:
        self.lock.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        if in_child:
            self.process = os.getpid()
        self.lock.release()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of forks among threads, from Python 3.12 on
def test_threads_that_fork_at_once_leave_every_store_usable_in_parent_and_children() -> None:
    stores = [Resting(), Resting(), Resting()]
    for store in stores:
        forks.watch(store)
    ended: list[int] = []

    def fork() -> None:
        for _ in range(FORKS):
            child = os.fork()
            if child == 0:
                os._exit(sum(store.process != os.getpid() for store in stores))
            ended.append(os.waitpid(child, 0)[1])

    threads = [threading.Thread(target=fork, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert ended == [0] * FORKS * len(threads)
    assert all(store.lock.acquire(blocking=False) for store in stores)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_memory_store_that_other_threads_use_is_usable_in_a_fork_s_child() -> None:
    store, over = MemoryStore(), threading.Event()

    def use(name: str) -> None:
        number = 0
        while not over.is_set():
            number += 1
            store.execute(Tell(f"{name} {number % 100}", "policy", {}))

    threads = [threading.Thread(target=use, args=(f"thread {number}",), daemon=True) for number in range(4)]
    for thread in threads:
        thread.start()
    ended = []
    for _ in range(FORKS):
        child = os.fork()
        if child == 0:
            signal.alarm(5)  # the signal ends it
            store.execute(Tell("child", "policy", {}))
            os._exit(0)
        ended.append(os.waitpid(child, 0)[1])
        if ended[-1]:
            break
    over.set()
    for thread in threads:
        thread.join(30)
    assert ended == [0] * FORKS
