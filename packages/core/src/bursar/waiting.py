"""Waiting for headroom: one queue per account, first come first served, for threads and event loops alike."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio


class Ticket:
    """A place in the queue of one account. `wake` may come from any thread."""

    __slots__ = ("_event", "_future", "_loop", "_woken", "key")

    def __init__(self, key: str) -> None:
        self.key = key
        self._woken = False
        self._event: threading.Event | None = None
        self._future: asyncio.Future[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def wake(self) -> None:
        self._woken = True
        if self._event is not None:
            self._event.set()
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._resolve)
            except RuntimeError:  # the loop is closed, and its waiter gone with it
                self._loop = None

    def _resolve(self) -> None:
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    def wait(self, timeout_s: float) -> None:
        """Until woken, or until the time is over. A wake that came before counts."""
        event = self._event = threading.Event()
        if not self._woken:
            event.wait(timeout_s)
        self._event, self._woken = None, False

    async def await_wake(self, timeout_s: float) -> None:
        """The same for a task; cancelling it leaves the ticket to its owner's `finally`."""
        import asyncio  # callers without an event loop need not load it

        self._loop = asyncio.get_running_loop()
        self._future = self._loop.create_future()
        if not self._woken:
            await asyncio.wait([self._future], timeout=timeout_s)
        self._future, self._loop, self._woken = None, None, False


class WaitingRoom:
    """The queues of one process. Only the first of a queue tries; the others wait behind it."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[Ticket]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._queues)

    def occupied(self, keys: Iterable[str]) -> str | None:
        """The first of these accounts for which somebody waits."""
        with self._lock:
            return next((key for key in keys if key in self._queues), None)

    def join(self, key: str) -> Ticket:
        ticket = Ticket(key)
        with self._lock:
            self._queues.setdefault(key, deque()).append(ticket)
        return ticket

    def is_first(self, ticket: Ticket) -> bool:
        with self._lock:
            return self._queues[ticket.key][0] is ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up the place; the next of the queue is woken to try."""
        with self._lock:
            queue = self._queues[ticket.key]
            queue.remove(ticket)
            if not queue:
                del self._queues[ticket.key]
            following = queue[0] if queue else None
        if following is not None:
            following.wake()

    def freed(self, keys: Iterable[str]) -> None:
        """Amounts were given back on these accounts: wake the first of each queue."""
        if not self._queues:
            return
        with self._lock:
            firsts = [self._queues[key][0] for key in keys if key in self._queues]
        for ticket in firsts:
            ticket.wake()
