"""Group commit: callers queue their commands, one of them applies all that wait as one batch, under one fsync."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from bursar.commands import Answer, Command
from bursar.errors import StoreError

if TYPE_CHECKING:
    import asyncio

MAX_BATCH = 512

Apply = Callable[[Sequence[Command]], "list[Answer | BaseException]"]


class _Item:
    """One command on its way: answered, or told to lead the next batch."""

    __slots__ = ("answer", "command", "future", "gate", "loop")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.answer: Answer | BaseException | None = None
        self.gate: threading.Lock | None = None
        self.loop: asyncio.AbstractEventLoop | None = None
        self.future: asyncio.Future[Answer] | None = None

    def result(self) -> Answer:
        answer = self.answer
        assert answer is not None
        if isinstance(answer, BaseException):
            raise answer
        return answer


class GroupCommit:
    """Runs `apply(commands)` by one caller at a time.

    A lone caller applies its own command and touches no other thread. While a batch runs, further commands queue; then
    the first thread that waits applies them all. Commands of event loops are applied by a worker thread, which wakes
    each loop once per batch.
    """

    def __init__(self, apply: Apply) -> None:
        self._apply = apply
        self._mutex = threading.Lock()
        self._queue: deque[_Item] = deque()
        self._busy = False
        self._handed = False  # the worker is to lead
        self._worker: threading.Thread | None = None
        self._wake = threading.Semaphore(0)
        self._closed = False

    def run(self, command: Command) -> Answer:
        """Apply one command and wait for its answer."""
        item: _Item | None = None
        with self._mutex:
            self._check_open()
            if self._busy:
                item = _Item(command)
                item.gate = threading.Lock()
                item.gate.acquire()
                self._queue.append(item)
            else:
                self._busy = True
        if item is None:
            return self._run_alone(command)
        self._wait(item)
        if item.answer is None:
            self._lead(self._take(), item)
        return item.result()

    def _run_alone(self, command: Command) -> Answer:
        try:
            (answer,) = self._apply((command,))
        finally:
            self._pass_on([])
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _wait(self, item: _Item) -> None:
        """Until the item is answered or is to lead. An interrupted caller leaves the queue, and leads nobody."""
        gate = item.gate
        assert gate is not None
        try:
            gate.acquire()
        except BaseException:
            with self._mutex:
                if item in self._queue:
                    self._queue.remove(item)
                chosen = gate.acquire(blocking=False) and item.answer is None
            if chosen:
                self._pass_on([])
            raise

    async def arun(self, command: Command) -> Answer:
        """Apply one command on the worker thread; the event loop goes on."""
        import asyncio  # callers without an event loop need not load it

        item = _Item(command)
        item.loop = asyncio.get_running_loop()
        item.future = item.loop.create_future()
        self._enqueue(item)
        return await item.future

    def post(self, command: Command) -> None:
        """Apply one command soon, on the worker thread; nobody waits for its answer."""
        self._enqueue(_Item(command))

    def close(self) -> None:
        """Refuse new commands, and wait until the queued ones are applied."""
        with self._mutex:
            self._closed = True
            worker = self._worker
        if worker is not None and worker is not threading.current_thread():
            self._wake.release()
            worker.join()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")

    def _enqueue(self, item: _Item) -> None:
        with self._mutex:
            self._check_open()
            if self._worker is None:
                self._worker = threading.Thread(target=self._work, name="bursar-store", daemon=True)
                self._worker.start()
            self._queue.append(item)
            if not self._busy:
                self._busy = self._handed = True
                self._wake.release()

    def _work(self) -> None:
        while True:
            self._wake.acquire()
            with self._mutex:
                lead, self._handed = self._handed, False
                if not lead and self._closed and not self._busy:
                    return
            if lead:
                self._lead(self._take(), None)

    def _take(self) -> list[_Item]:
        with self._mutex:
            return [self._queue.popleft() for _ in range(min(len(self._queue), MAX_BATCH))]

    def _lead(self, batch: list[_Item], own: _Item | None) -> None:
        try:
            answers = self._apply([item.command for item in batch])
            for item, answer in zip(batch, answers, strict=True):
                item.answer = answer
        finally:
            # An interrupt in this thread ends this caller alone: the others' commands go back to the queue's head.
            self._deliver([item for item in batch if item.answer is not None])
            self._pass_on([item for item in batch if item.answer is None and item is not own])

    def _deliver(self, answered: list[_Item]) -> None:
        loops: dict[asyncio.AbstractEventLoop, list[_Item]] = {}
        for item in answered:
            if item.loop is not None:
                loops.setdefault(item.loop, []).append(item)
            elif item.gate is not None and item.gate.locked():
                item.gate.release()
        for loop, items in loops.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: its callers are gone, their answers stand
                loop.call_soon_threadsafe(_resolve, items)

    def _pass_on(self, unanswered: list[_Item]) -> None:
        with self._mutex:
            self._queue.extendleft(reversed(unanswered))
            if not self._queue and not self._closed:
                self._busy = False
                return
            leader = next((item for item in self._queue if item.gate is not None), None)
            self._busy = bool(self._queue)
            if leader is not None and leader.gate is not None:
                # it takes the queue from its head, so it must stand there
                self._queue.remove(leader)
                self._queue.appendleft(leader)
                leader.gate.release()
            elif self._busy:
                self._handed = True
                self._wake.release()
            elif self._closed:
                self._wake.release()


def _resolve(items: list[_Item]) -> None:
    for item in items:
        assert item.future is not None
        if item.future.done():
            continue
        if isinstance(item.answer, BaseException):
            item.future.set_exception(item.answer)
        else:
            assert item.answer is not None
            item.future.set_result(item.answer)
