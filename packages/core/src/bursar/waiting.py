"""Waiting for headroom: queues of calls, first come first served on each account, for threads and event loops alike."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable
from itertools import count
from operator import attrgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

_number = attrgetter("number")


class Ticket:
    """A waiting call: lower numbers came first. `key` is the queue it stands in. `wake` may come from any thread."""

    __slots__ = ("_notify", "_woken", "key", "number")

    def __init__(self, key: str, number: int = 0) -> None:
        self.key = key
        self.number = number
        self._woken = False
        self._notify: Callable[[], object] | None = None

    def wake(self) -> None:
        self._woken = True
        notify = self._notify
        if notify is not None:
            notify()

    def arm(self, notify: Callable[[], object]) -> bool:
        """Have `notify` called at every wake from now on; False when a wake came before: it counts, so do not wait."""
        self._notify = notify
        return not self._woken

    def disarm(self) -> None:
        """Forget the wakes so far: what they told of is seen by the look that follows."""
        self._notify, self._woken = None, False

    def wait(self, timeout_s: float) -> None:
        """Block this thread until woken, or until the time is over."""
        event = threading.Event()
        if self.arm(event.set):
            event.wait(timeout_s)
        self.disarm()

    async def await_wake(self, timeout_s: float) -> None:
        """The same for a task; cancelling it leaves the ticket to its owner's `finally`."""
        import asyncio  # callers without an event loop need not load it

        loop = asyncio.get_running_loop()
        future = loop.create_future()
        if self.arm(lambda: _resolve_in(loop, future)):
            await asyncio.wait([future], timeout=timeout_s)
        self.disarm()


def _resolve_in(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> None:
    try:
        loop.call_soon_threadsafe(lambda: None if future.done() else future.set_result(None))
    except (
        RuntimeError
    ):  # the loop is closed and its waiter gone with it: who gave something back must not fail for that
        return


class WaitingRoom:
    """The queues of one process, each in the order in which its calls came to the room.

    A call stands in one queue at a time, that of the account which keeps it, and takes its number along. It may go when nobody
    with a lower number stands in the queue of any of its accounts: nobody is overtaken on an account, and nobody stands behind
    an account that it does not need.
    """

    def __init__(self) -> None:
        self._queues: dict[str, list[Ticket]] = {}
        self._numbers = count(1)
        self._lock = threading.RLock()  # the garbage collector may end a call that waits amid any of what follows

    def __bool__(self) -> bool:
        return bool(self._queues)

    def __len__(self) -> int:
        with self._lock:
            return sum(map(len, self._queues.values()))

    def occupied(self, keys: Iterable[str], ticket: Ticket | None = None) -> str | None:
        """The first of these queues in which somebody stands who came before this ticket; without one, everybody did."""
        with self._lock:
            for key in keys:
                queue = self._queues.get(key)
                if queue and (ticket is None or queue[0].number < ticket.number):
                    return key
        return None

    def come(self) -> Ticket:
        """Enter the room, behind everybody who is in it. The ticket stands in no queue yet; whoever holds it has to `leave`."""
        return Ticket("", next(self._numbers))

    def move(self, ticket: Ticket, key: str) -> None:
        """Stand in this queue and in no other, before those who came to the room later."""
        if ticket.key == key:
            return
        with self._lock:
            following = self._take_out(ticket)
            ticket.key = key
            insort(self._queues.setdefault(key, []), ticket, key=_number)
        if following is not None:
            following.wake()

    def is_first(self, ticket: Ticket) -> bool:
        with self._lock:
            return self._queues[ticket.key][0] is ticket

    def leave(self, ticket: Ticket) -> None:
        """Give up the place; who is first now is woken to try. To leave twice, or from nowhere, does no harm."""
        with self._lock:
            following = self._take_out(ticket)
        if following is not None:
            following.wake()

    def _take_out(self, ticket: Ticket) -> Ticket | None:
        """Who is first in the ticket's queue without it."""
        queue = self._queues.get(ticket.key, [])
        at = bisect_left(queue, ticket.number, key=_number)
        if at < len(queue) and queue[at] is ticket:  # else an interrupt came before it stood there, or while it left
            del queue[at]
        if not queue:
            self._queues.pop(ticket.key, None)
        return queue[0] if queue else None

    def freed(self, keys: Iterable[str]) -> None:
        """Amounts were given back on these accounts: wake the first of each queue."""
        if not self._queues:
            return
        with self._lock:
            firsts = [queue[0] for key in keys if (queue := self._queues.get(key))]
        for ticket in firsts:
            ticket.wake()
