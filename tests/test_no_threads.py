"""A process that may start no further thread: nothing waits for one, and it is started once there is room."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bursar import Budget, Bursar
from bursar.commands import Tell, Told
from bursar.stores.sqlite import SqliteStore

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the room that stacks have differs")
NO_ROOM = 2**47  # bytes of a thread's stack: all that a process can address


@contextlib.contextmanager
def no_room() -> Iterator[None]:
    before = threading.stack_size(NO_ROOM)
    try:
        with pytest.raises(RuntimeError):
            threading.Thread(target=print).start()
        yield
    finally:
        threading.stack_size(before)


def test_a_command_that_no_worker_can_take_is_applied_all_the_same_and_holds_nobody_up(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "b.db")
    with no_room():
        store.post(Tell("posted", "policy", {}))
        assert asyncio.run(store.aexecute(Tell("of a task", "policy", {}))) == Told(False)
        assert store.execute(Tell("posted", "policy", {})) == Told(True)
    assert asyncio.run(store.aexecute(Tell("later", "policy", {}))) == Told(False)
    store.close()


def test_i8_housekeeping_that_could_not_begin_begins_with_the_next_call() -> None:
    with Bursar("memory:", [Budget("b", "1 USD")]) as bursar:
        with no_room(), pytest.raises(RuntimeError):
            bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1)
        assert bursar.store.open_reservations() == 0
        before = set(threading.enumerate())
        bursar.reserve("openai", "gpt-4o", input_tokens=1, max_output_tokens=1).release()
        assert "bursar-keeper" in {thread.name for thread in set(threading.enumerate()) - before}


def test_ends_that_finalisers_put_off_are_told_once_there_is_room() -> None:
    code = f"""
import threading
from bursar import ending
threading.stack_size({NO_ROOM})
try:
    ending.expect_orphans()
except RuntimeError:
    threading.stack_size(0)
ending.end_soon(lambda: print("told"))
print(ending.drain(10))
"""
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "told\nTrue\n"
