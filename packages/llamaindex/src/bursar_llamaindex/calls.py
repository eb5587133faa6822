"""One announced call with its reservation, ended once, and in the background where its end comes from a finaliser."""

from __future__ import annotations

import os
import threading
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from bursar.ending import Ending
from bursar.sending import Sending

if TYPE_CHECKING:
    from bursar import Bursar, Reservation, Usage


class Call:
    """One call of a model. `request` are the arguments of `Bursar.reserve`; `event` is LlamaIndex's id of it.

    `settings` are the keyword arguments that LlamaIndex is about to send, and `limit_name` the one that limits the output,
    where a smaller answer than was asked for may be granted. `usage`: what was heard of its cost before its end.
    """

    __slots__ = ("__weakref__", "_held", "bursar", "event", "limit_name", "request", "sending", "settings", "usage")

    def __init__(
        self,
        bursar: Bursar,
        request: dict[str, Any],
        event: str,
        settings: dict[str, Any] | None = None,
        limit_name: str | None = None,
    ) -> None:
        self.bursar = bursar
        self.request = request
        self.event = event
        self.settings = settings
        self.limit_name = limit_name
        self.usage: Usage | None = None
        self.sending = Sending(bursar, request["model"], request.get("messages") or request.get("body"))
        self._held: list[Reservation] = []

    @property
    def provider(self) -> str:
        provider: str = self.request["provider"]
        return provider

    @property
    def is_open(self) -> bool:
        return bool(self._held)

    def reserve(self) -> Reservation:
        """Raises the errors of `Bursar.reserve`."""
        return self._hold(self.bursar.reserve(**self.request))

    async def areserve(self) -> Reservation:
        """As `reserve`, for async callers, who may wait for headroom."""
        return self._hold(await self.bursar.areserve(**self.request))

    def _hold(self, reservation: Reservation) -> Reservation:
        self._held.append(reservation)
        _start()  # here, because where a finaliser runs a thread cannot safely be started
        self.sending.begin()
        if reservation.capped and self.limit_name is not None and self.settings is not None:
            self.settings[self.limit_name] = reservation.max_output_tokens
        return reservation

    def end(self, ending: Ending) -> None:
        """End it, if it is open. What goes wrong is logged: raised, it would cost the caller the model's answer."""
        reservation = self._let_go()
        if reservation is not None:
            ending.end(reservation)

    async def aend(self, ending: Ending) -> None:
        """As `end`, where it can be awaited: the event loop goes on meanwhile."""
        reservation = self._let_go()
        if reservation is not None:
            await ending.aend(reservation)

    def _let_go(self) -> Reservation | None:
        try:
            reservation = self._held.pop()
        except IndexError:  # ended already, or never reserved
            return None
        self.sending.end()
        return reservation

    def end_soon(self, ending: Ending) -> None:
        """End it in the background: a finaliser may run anywhere, under any lock."""
        if self._held:
            _ends.put((self, ending))


_ends: SimpleQueue[tuple[Call, Ending] | threading.Event] = SimpleQueue()
_thread: threading.Thread | None = None


def drain(timeout_s: float) -> bool:
    """Wait until the ends that were put off so far are booked; False when that takes longer."""
    reached = threading.Event()
    _ends.put(reached)
    _start()
    return reached.wait(timeout_s)


def _start() -> None:
    global _thread
    if _thread is None:
        _thread = threading.Thread(target=_work, args=(_ends,), daemon=True, name="bursar-llamaindex")
        _thread.start()


def _work(ends: SimpleQueue[tuple[Call, Ending] | threading.Event]) -> None:
    while True:
        item = ends.get()
        if isinstance(item, threading.Event):
            item.set()
        else:
            item[0].end(item[1])
        del item


def _forked() -> None:
    """In the child of a fork there is no thread, and what waits for it is the parent's."""
    global _ends, _thread
    _ends, _thread = SimpleQueue(), None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
