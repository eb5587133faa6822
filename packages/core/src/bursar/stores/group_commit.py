"""Group commit: callers queue their commands, one of them applies all that wait as one batch, under one fsync."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING

from bursar.commands import Answer, Command
from bursar.errors import StoreError

if TYPE_CHECKING:
    import asyncio

MAX_BATCH = 512
COMPANY_S = 0.0001  # how long the first waits for one more to come: less than most fsyncs take

# The commands, and whether all of them come for the first time.
Apply = Callable[[Sequence[Command], bool], "list[Answer | BaseException]"]
# One command that comes for the first time; None, with nothing done, where that would have to wait.
ApplyAtOnce = Callable[[Command], "Answer | BaseException | None"]


class _Item:
    """One command on its way, and its answer once there is one."""

    __slots__ = ("answer", "command", "future", "gate", "loop", "tried")

    def __init__(self, command: Command) -> None:
        self.command = command
        self.answer: Answer | BaseException | None = None
        self.tried = False
        self.gate: SimpleQueue[None] | None = None  # where a thread waits until it is answered, or is to lead
        self.loop: asyncio.AbstractEventLoop | None = None
        self.future: asyncio.Future[Answer] | None = None

    def waits(self) -> bool:
        return self.answer is None


class GroupCommit:
    """Runs `apply(commands, first time)` by one caller at a time.

    A lone caller applies its own command and touches no other thread. While a batch runs, further commands queue; then the
    first thread that waits applies them all. Threads that shared a batch are likely to come back together, so the first of
    them waits for the others as long as they keep coming. Commands of event loops are applied by a worker thread, which
    wakes each loop once per batch.

    Where the store has `at_once`, one command in each turn of an event loop is applied in the loop itself, if that waits for
    nobody: without an fsync, the hop there and back takes longer than the transaction (a guarded `ainvoke` of LangChain adds
    0.77 ms so, rather than 0.97). Those that come with it share a batch. The same task's next command, mostly the end of its
    call, is applied so too, and does not ask the loop to say when the turn is over.

    An interrupt may come anywhere. So a command leaves the queue only after its answer stands: what a cut-off batch leaves
    behind is applied by the worker, and the law gives a command that comes twice the same answer (I6).
    """

    def __init__(self, apply: Apply, at_once: ApplyAtOnce | None = None) -> None:
        self._apply = apply
        self._apply_at_once = at_once
        self._served: asyncio.AbstractEventLoop | None = None  # one command of its present turn was applied at once
        self._first_task = 0  # whose
        self._queue: deque[_Item] = deque()
        self._turn = threading.Lock()
        self._starting = threading.Lock()
        self._worker: threading.Thread | None = None
        self._wake: SimpleQueue[None] = SimpleQueue()
        self._awake = False
        self._company = 0  # threads that shared the last batch
        self._enough = threading.Lock()  # released to tell the first of a batch that it need not wait for more
        self._enough.acquire()
        self._closed = False

    def run(self, command: Command) -> Answer:
        """Apply one command and wait for its answer."""
        if self._closed:
            self._check_open()
        if self._company < 2 and not self._queue and not self._turn.locked():
            return self._run_alone(command)
        item = _Item(command)
        item.gate = SimpleQueue()
        try:
            self._queue.append(item)
            if self._turn.locked() or not self._is_first(item):
                self._tell_first()
                item.gate.get()
            else:
                self._await_company()
            if item.waits():
                with self._turn:
                    while item.waits():
                        self._lead()
                self._hand_over()
        except BaseException:
            self._wake_worker()  # nobody may wait for somebody who was interrupted
            raise
        return _given(item.answer)

    def _run_alone(self, command: Command) -> Answer:
        """Nobody waits: no queue, and no gate. Only a command that was cut off is queued, for the worker to see it through."""
        answer = None
        try:
            with self._turn:
                (answer,) = self._apply((command,), True)
            if self._queue:
                self._hand_over()
        except BaseException:
            self._see_through(command, answer)
            raise
        return _given(answer)

    def _see_through(self, command: Command, answer: Answer | BaseException | None) -> None:
        """Leave a command that was cut off to the worker, which delivers the answer if there is one already."""
        item = _Item(command)
        item.answer, item.tried = answer, True
        self._put(item)

    async def arun(self, command: Command) -> Answer:
        """Apply one command: at once where that waits for nobody, else on the worker thread. The event loop goes on."""
        import asyncio  # callers without an event loop need not load it

        self._check_open()
        loop = asyncio.get_running_loop()
        task = id(asyncio.current_task())
        follows = task == self._first_task  # once: a task that never waits must not hold the loop up
        if self._apply_at_once is not None and (follows or self._served is not loop) and not self._queue:
            if follows:
                self._first_task = 0
            else:
                self._first_task, self._served = task, loop
                loop.call_soon(self._begin_turn)
            answer = self._run_at_once(command, self._apply_at_once)
            if answer is not None:
                return _given(answer)
        item = _Item(command)
        item.loop = loop
        item.future = loop.create_future()
        self._put(item)
        return await item.future

    def _begin_turn(self) -> None:
        self._served = None

    def _run_at_once(self, command: Command, apply: ApplyAtOnce) -> Answer | BaseException | None:
        """As `_run_alone`, where nobody has the turn and `apply` need not wait; else None, with nothing done."""
        answer, is_ours = None, False
        try:
            try:
                # An interrupt comes after a call, but not between a loop's step and its variable: else the turn might be lost.
                for is_ours in map(self._turn.acquire, (False,)):
                    if is_ours:
                        answer = apply(command)
            finally:
                if is_ours:
                    self._turn.release()
            if is_ours and self._queue:
                self._hand_over()
        except BaseException:
            self._see_through(command, answer)
            raise
        return answer

    def post(self, command: Command) -> None:
        """Apply one command soon, on the worker thread; nobody waits for its answer."""
        self._check_open()
        self._put(_Item(command))

    def close(self) -> None:
        """Refuse new commands, and apply the queued ones."""
        self._closed = True
        self._empty()
        self._wake.put(None)
        if self._worker is not None and self._worker is not threading.current_thread():
            self._worker.join()

    def _put(self, item: _Item) -> None:
        """Queue what nobody leads for: the worker does, or whoever comes when closing has looked for the last time."""
        self._queue.append(item)
        if self._closed:
            self._empty()
        else:
            self._wake_worker()

    def _empty(self) -> None:
        while self._queue:
            with self._turn:
                self._lead()

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError("The store is closed. Open a new Bursar.", fault="closed")

    def _wake_worker(self) -> None:
        try:
            self._start_worker()
        except RuntimeError:  # there is no room for a thread, and whoever comes next waits behind what is queued
            self._empty()
            return
        if not self._awake:
            self._awake = True
            self._wake.put(None)

    def _start_worker(self) -> None:
        if self._worker is None:
            with self._starting:
                if self._worker is None:
                    worker = threading.Thread(target=self._work, name="bursar-store", daemon=True)
                    worker.start()
                    self._worker = worker

    def _work(self) -> None:
        while not self._closed:
            self._wake.get()
            self._awake = False
            self._empty()

    def _is_first(self, item: _Item) -> bool:
        """Nobody goes before those who wait already: they would be left to a batch of their own."""
        try:
            return self._queue[0] is item
        except IndexError:  # answered, and gone from the queue
            return True

    def _await_company(self) -> None:
        """Be the first of a batch as large as the last, if the others come soon."""
        seen = 0
        while seen < len(self._queue) < self._company:
            seen = len(self._queue)
            # A lock, for a SimpleQueue whose time is over before it looks again waits for ever (CPython 3.11).
            self._enough.acquire(timeout=COMPANY_S)

    def _tell_first(self) -> None:
        """As many wait now as had the last batch: the first need not wait for more."""
        if len(self._queue) == self._company:
            with contextlib.suppress(RuntimeError):  # it was told already
                self._enough.release()

    def _hand_over(self) -> None:
        """Let the first thread that waits lead. After the turn was given up, so that nobody queues unseen in between."""
        following = next((item for item in list(self._queue) if item.waits()), None)
        if following is not None and following.gate is not None:  # of the others, the worker was told
            following.gate.put(None)

    def _lead(self) -> None:
        """Apply what waits, by the one whose turn it is."""
        batch = list(self._queue)[:MAX_BATCH]  # at once: an iterator would meet what others append
        waiting = [item for item in batch if item.waits()]
        if waiting:
            first_time = not any(item.tried for item in waiting)
            for item in waiting:
                item.tried = True
            answers = self._apply([item.command for item in waiting], first_time)
            for item, answer in zip(waiting, answers, strict=True):
                item.answer = answer
            self._company = sum(item.gate is not None for item in waiting)
        _deliver(batch)
        for _ in batch:
            self._queue.popleft()


def _deliver(batch: list[_Item]) -> None:
    loops: dict[asyncio.AbstractEventLoop, list[_Item]] = {}
    for item in batch:
        if item.gate is not None:
            item.gate.put(None)
        elif item.loop is not None:
            loops.setdefault(item.loop, []).append(item)
    for loop, items in loops.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed: its callers are gone, their answers stand
            loop.call_soon_threadsafe(_resolve, items)


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


def _given(answer: Answer | BaseException | None) -> Answer:
    assert answer is not None
    if isinstance(answer, BaseException):
        raise answer
    return answer
