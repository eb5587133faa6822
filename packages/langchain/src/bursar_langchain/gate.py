"""The gate: every call that LangChain has announced and not yet ended, each with one reservation of one guard."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING
from uuid import UUID

from bursar.ending import Ending, end_soon, expect_orphans, released, unknown
from bursar.errors import BudgetExceeded
from bursar.sending import Sending
from bursar_langchain.errors import langchain_error
from bursar_langchain.runs import Runs

if TYPE_CHECKING:
    from types import TracebackType

    from bursar import Bursar, Reservation
    from bursar_langchain.slot import Slot


class Open:
    """One announced call. `said` is an object that every handler is shown of it, and of no other call but those of its batch.

    `in_batch`: whether it is one of several, as in `generate([a, b])`; `tools`: what it may use; `cleanup` is what its end
    undoes; `earlier` an open call with the same run id, which a user may give to several.
    """

    __slots__ = (
        "cleanup", "earlier", "in_batch", "is_chat", "order", "parent", "provider", "reservation", "said", "sending",
        "tools", "watch",
    )  # fmt: skip

    def __init__(self, order: int, parent: int | None, said: object, in_batch: bool, is_chat: bool) -> None:
        self.order = order
        self.parent = parent
        self.said = said
        self.in_batch = in_batch
        self.is_chat = is_chat
        self.earlier: Open | None = None
        self.provider = ""
        self.tools: object = None
        self.reservation: Reservation | None = None
        self.cleanup: Callable[[], object] | None = None
        self.sending: Sending | None = None
        self.watch: weakref.ref[UUID] | None = None


class Admission:
    """Around the reserving: a refusal takes the call, and those announced with it, out again, and is made LangChain's."""

    __slots__ = ("_gate", "_key", "_opened")

    def __init__(self, gate: Gate, key: int, opened: Open) -> None:
        self._gate, self._key, self._opened = gate, key, opened

    def __enter__(self) -> None:
        return

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._gate.refused(self._key, self._opened)
            if isinstance(error, BudgetExceeded):
                raise langchain_error(error) from error


class Gate:
    """One per guard, whatever number of handlers and middlewares there are: a run id is reserved for once and ended once."""

    def __init__(self, bursar: Bursar) -> None:
        self.bursar = bursar
        self.runs = Runs()
        self._open: dict[int, Open] = {}
        # The ends that were told of several calls with one run id, while one is open.
        self._told: dict[int, list[object]] = {}
        self._order = itertools.count()
        # The run id of this context's last call, and the orders of those of that run which began here.
        self._began: ContextVar[tuple[int, tuple[int, ...]]] = ContextVar("bursar_langchain_began", default=(0, ()))
        self._unended = 0
        self._ended = threading.Condition()

    @classmethod
    def of(cls, bursar: Bursar) -> Gate:
        """The guard's gate."""
        with _lock:
            gate = _gates.get(id(bursar))
            if gate is None:
                gate = _gates[id(bursar)] = cls(bursar)  # the gate keeps the guard, so the id is not given anew
            return gate

    # -- begin ---------------------------------------------------------------------------------------------------

    def begin(
        self, run_id: UUID, parent_run_id: UUID | None, said: object, *, in_batch: bool = False, is_chat: bool = False
    ) -> Open | None:
        """Enter the call; None when it is entered already, by another handler of the same guard."""
        key = run_id.int
        opened = Open(next(self._order), None if parent_run_id is None else parent_run_id.int, said, in_batch, is_chat)
        began, orders = self._began.get()
        here = [opened.order]
        with self._ended:
            earlier = opened.earlier = self._open.get(key)
            while earlier is not None:
                if earlier.said is said:
                    return None
                if began == key and earlier.order in orders:
                    here.append(earlier.order)
                earlier = earlier.earlier
            self._open[key] = opened
            self._unended += 1
        self._began.set((key, tuple(here)))
        expect_orphans()
        # The run's id lives as long as somebody can still report the run's end. Nothing else tells of a call that was
        # cancelled, abandoned or refused by a later handler, so its death ends the call (only queued here: a finaliser
        # may run anywhere, under any lock).
        opened.watch = weakref.ref(run_id, partial(_forsaken, self, key, opened.order))
        return opened

    def admission(self, run_id: UUID, opened: Open) -> Admission:
        """To be entered around the reserving."""
        return Admission(self, run_id.int, opened)

    def refused(self, key: int, opened: Open) -> None:
        """Take the call out again: it will not be sent."""
        self._take_out(key, opened)
        self._count_end()
        # One refusal ends the whole of `generate([a, b])` before anything is sent.
        for other, _ in self.siblings(opened):
            self.end_now(other, released("refused with another prompt of its batch"))
        for gate in list(_gates.values()):
            if gate is not self:
                for other in gate.shown(key, opened):
                    gate.end_now(other, released("refused by another guard"))

    def admitted(self, run_id: UUID, opened: Open, reservation: Reservation, slot: Slot | None = None) -> None:
        """The reservation was granted, for a call that is sent as it was announced."""
        opened.reservation = reservation
        if slot is not None:
            slot.keys.append(run_id.int)

    def adopt(self, slot: Slot | None, model: str, limit: int | None) -> Reservation | None:
        """The slot's parked reservation, if this is the call it is for; another call gives it back."""
        if slot is None or slot.parked is None:
            return None
        reservation, slot.parked = slot.parked, None
        if slot.granted == (model, limit):
            return reservation
        reservation.release("the request did not come again as it was granted")
        return None

    # -- end -----------------------------------------------------------------------------------------------------

    def take(self, key: int, event: object = None, *, order: int | None = None) -> Open | None:
        """The call, out of the list: whoever gets it ends it. None when it has ended, or was never reserved here.

        `event`: what every handler is shown of this end. Of several with one run id it is that of this `order`; or the last that
        began in this context; where that was another run's, the last of all, for those before may have been abandoned.
        """
        began, orders = self._began.get() if order is None else (key, (order,))
        with self._ended:
            opened = self._open.get(key)
            if opened is not None and (
                opened.earlier is not None or key in self._told or (began == key and opened.order not in orders)
            ):
                opened = self._one_of(key, event, orders if began == key else None)
            if opened is None or opened.reservation is None:
                return None
            self._take_out(key, opened)
        if opened.sending is not None:
            opened.sending.end()
        if opened.cleanup is not None:
            opened.cleanup()
        return opened

    def _one_of(self, key: int, event: object, orders: tuple[int, ...] | None) -> Open | None:
        """Which of the open calls with one run id this end is of, one of these orders; None where it has been told already."""
        told = self._told.setdefault(key, [])
        if event is not None and any(event is one for one in told):
            return None
        told += [] if event is None else [event]
        opened = self._open.get(key)
        while opened is not None:
            if opened.reservation is not None and (orders is None or opened.order in orders):
                return opened
            opened = opened.earlier
        return None

    def _take_out(self, key: int, opened: Open) -> None:
        with self._ended:
            last = self._open.pop(key, None)
            if last is not opened and last is not None:
                self._open[key] = later = last
                while later.earlier is not None and later.earlier is not opened:
                    later = later.earlier
                later.earlier = opened.earlier
            elif last is not None and last.earlier is not None:
                self._open[key] = last.earlier
            else:
                self._told.pop(key, None)

    def answering(self, key: int) -> None:
        """A part of its answer is there: the user's code comes between the parts, and what it calls is its own.

        Raises what stops the call in mid-stream.
        """
        opened = self._open.get(key)
        if opened is None:
            return
        if opened.sending is not None:
            opened.sending.end()
            opened.sending = None
        if opened.reservation is not None and (stopped := opened.reservation.stopped) is not None:
            raise langchain_error(stopped)

    def finish(self, opened: Open, ending: Ending) -> None:
        """End the reservation."""
        assert opened.reservation is not None, "a call that was taken has one"
        try:
            ending.end(opened.reservation)
        finally:
            self._count_end()

    async def afinish(self, opened: Open, ending: Ending) -> None:
        """As `finish`, for async callers."""
        assert opened.reservation is not None, "a call that was taken has one"
        try:
            await ending.aend(opened.reservation)
        finally:
            self._count_end()

    def _count_end(self) -> None:
        with self._ended:
            self._unended -= 1
            if not self._unended:
                self._ended.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until every announced call has ended; False when that takes longer."""
        with self._ended:
            return self._ended.wait_for(lambda: not self._unended, timeout_s)

    def end_now(self, key: int, ending: Ending, order: int | None = None) -> None:
        """End a call from outside of its own events, if it is still open."""
        opened = self.take(key, order=order)
        if opened is not None:
            self.finish(opened, ending)

    def end_soon(self, key: int, order: int | None = None) -> None:
        """End a call of which no event will come, in the background: for finalisers, done callbacks and the like."""
        if key in self._open:
            end_soon(partial(self.end_now, key, unknown(ABANDONED), order))

    def siblings(self, opened: Open) -> list[tuple[int, bool]]:
        """The open calls of the same `generate`, and whether they came before this one."""
        if not opened.in_batch:
            return []
        everyone = list(self._open.items())
        return [(key, other.order < opened.order) for key, other in everyone if other.said is opened.said]

    def shown(self, key: int, refused: Open) -> list[int]:
        """The open calls that are this one of another guard's gate, or of its batch: what is said may be no more than None."""
        everyone = list(self._open.items())
        return [one for one, other in everyone if other.said is refused.said and (one == key or other.in_batch)]

    def end_children(self, run_id: UUID) -> None:
        """A run was torn down by a cancellation: so are the calls that it made."""
        for key in [key for key, opened in list(self._open.items()) if opened.parent == run_id.int]:
            self.end_soon(key)

    def forget(self) -> None:
        """After a fork, in the child: the open calls are the parent's."""
        self._open.clear()
        self._told.clear()
        self._unended, self._ended = 0, threading.Condition()


# -- calls whose end nobody reports ------------------------------------------------------------------------------

_gates: weakref.WeakValueDictionary[int, Gate] = weakref.WeakValueDictionary()
_lock = threading.Lock()
ABANDONED = "abandoned: cancelled, or its stream was dropped, before an end was told"


def _forsaken(gate: Gate, key: int, order: int, _: weakref.ref[UUID]) -> None:
    gate.end_soon(key, order)


def _forked() -> None:
    """In the child of a fork the open calls belong to the parent."""
    global _lock
    _lock = threading.Lock()
    for gate in list(_gates.values()):
        gate.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
