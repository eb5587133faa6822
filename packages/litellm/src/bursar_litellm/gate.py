"""The gate: every dispatch of LiteLLM that is reserved for and not yet ended, each with one reservation of one guard."""

from __future__ import annotations

import os
import sys
import threading
import weakref
from collections import OrderedDict
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from bursar.ending import Ending, unknown
from bursar.errors import BudgetExceeded
from bursar.sending import Sending
from bursar_litellm.answer import read_error
from bursar_litellm.door import Door, open_door
from bursar_litellm.errors import litellm_error

if TYPE_CHECKING:
    from bursar import Bursar, Reservation

# LiteLLM's id of a call, and of which call from outside: the Router asks several models at once under one id, and clients of
# the proxy choose theirs. 0: it was made where no wrapper stands.
_Key = tuple[str, int]
MAX_OPEN = 100_000  # beyond it the oldest are left to their expiry


class Attempt:
    """One dispatch. `details` are LiteLLM's notes on it, `door` the call of a function of `litellm` that it happens in.

    `moment`: when LiteLLM says that it was sent; `characters`: of a text to be spoken, where they are what is billed;
    `hides_usage`: the stream's usage was switched on here, and is kept from the user; `handling`: the id of the error that
    was being handled when it was sent.
    """

    __slots__ = (
        "characters",
        "details",
        "door",
        "gate",
        "handling",
        "hides_usage",
        "is_sent",
        "key",
        "moment",
        "provider",
        "reservation",
        "sending",
    )

    def __init__(self, gate: Gate, key: _Key, door: Door | None) -> None:
        self.gate = gate
        self.key = key
        self.door = door
        self.provider = ""
        self.reservation: Reservation | None = None
        self.details: dict[str, Any] | None = None
        self.moment: object = None
        self.characters = 0
        self.hides_usage = False
        self.is_sent = False
        self.handling = 0
        self.sending: Sending | None = None

    def reserve(self, request: dict[str, Any]) -> Reservation:
        """Until it has ended it is extended, and stopped when a switch is thrown: where a door sees to its end."""
        bursar = self.gate.bursar
        self.reservation = bursar.reserve(**request) if self.door is None else bursar.call(**request).__enter__()
        return self.reservation

    async def areserve(self, request: dict[str, Any]) -> Reservation:
        """As `reserve`, for async callers, who may wait for headroom."""
        bursar = self.gate.bursar
        self.reservation = (
            await bursar.areserve(**request) if self.door is None else await bursar.acall(**request).__aenter__()
        )
        return self.reservation

    def left(self) -> Ending:
        """How it ended when LiteLLM sends another one in the same call: by the error that it noted, or handles just then."""
        error = (self.details or {}).get("exception")
        if error is None and id(sys.exception()) != self.handling:
            error = sys.exception()
        if isinstance(error, Exception):
            return read_error(self.provider, error, self.details)
        return unknown("it was tried again, and its end not told")

    def sent(self) -> None:
        """LiteLLM's client has sent it: what is called from now on is another call."""
        if self.sending is not None:
            self.sending.end()


class Admission:
    """Around the reserving: a refusal takes the attempt out again, and is made LiteLLM's."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        attempt, shown = self._attempt, None
        if error is not None:
            attempt.gate.take(attempt)
            shown = litellm_error(error)
        if attempt.door is not None and (shown is None or isinstance(shown, BudgetExceeded)):
            attempt.door.refused(shown)
        if shown is not None and shown is not error:
            raise shown from error


class Gate:
    """One per guard, whatever number of loggers there are: a dispatch is reserved for once and ended once."""

    def __init__(self, bursar: Bursar) -> None:
        self.bursar = bursar
        # The last call outside of a door, of which nothing tells when it has been sent: at the latest with the next.
        self.early: ContextVar[Sending | None] = ContextVar("bursar_litellm_early", default=None)
        self.forget()

    @classmethod
    def of(cls, bursar: Bursar) -> Gate:
        """The guard's gate."""
        with _lock:
            gate = _gates.get(id(bursar))
            if gate is None:
                gate = _gates[id(bursar)] = cls(bursar)  # the gate keeps the guard, so the id is not given anew
            return gate

    # -- begin ---------------------------------------------------------------------------------------------------

    def enter(self, call_id: str) -> Attempt | None:
        """A new attempt of the call; None while the last one has not been sent yet, which then belongs to this door.

        LiteLLM serves many a call by another of its own functions (responses by a chat, messages by responses): both
        announce it, under one id.
        """
        door = open_door()
        with self._lock:
            key, found = _key(call_id, door), self.find(call_id)
            if found is None or found.is_sent:
                attempt = self._open[key] = Attempt(self, key, door)
                self._unended += 1
                if len(self._open) > MAX_OPEN:
                    self._open.popitem(last=False)
                    self._unended -= 1
            else:
                del self._open[found.key]
                attempt = self._open[key] = found
                found.key, found.door = key, door
        if door is not None:
            door.attempts.append(attempt)
        if found is not None and found.is_sent and found.reservation is not None:
            self._finish(found, found.left())
        return None if attempt is found else attempt

    def find(self, call_id: str | None) -> Attempt | None:
        """The open attempt of this call, or the one that a function around it announced where no wrapper stands."""
        if call_id is None:
            return None
        door = open_door()
        found = self._open.get(_key(call_id, door))
        if found is None and door is not None:
            found = self._open.get((call_id, 0))
            return None if found is None or found.is_sent else found
        return found

    def disown(self, attempt: Attempt) -> None:
        """Its door is left before it has ended: LiteLLM's events will tell of that."""
        with self._lock:
            if self._open.pop(attempt.key, None) is not None:
                attempt.key, attempt.door = (attempt.key[0], 0), None
                self._open[attempt.key] = attempt

    def has(self, attempt: Attempt) -> bool:
        """Whether the attempt is still open."""
        return self._open.get(attempt.key) is attempt

    # -- end -----------------------------------------------------------------------------------------------------

    def take(self, attempt: Attempt) -> bool:
        """Out of the list: whoever gets it ends it. False when it has ended already, or was never reserved."""
        with self._lock:
            if self._open.get(attempt.key) is not attempt:
                return False
            del self._open[attempt.key]
        attempt.sent()
        if attempt.reservation is None:
            self._count_end()
        return attempt.reservation is not None

    def end(self, attempt: Attempt, ending: Ending) -> None:
        """End the attempt, if it is still open."""
        if self.take(attempt):
            self._finish(attempt, ending)

    async def aend(self, attempt: Attempt, ending: Ending) -> None:
        """As `end`, for async callers."""
        if self.take(attempt):
            assert attempt.reservation is not None, "an attempt that was taken has one"
            try:
                await ending.aend(attempt.reservation)
            finally:
                self._count_end()

    def _finish(self, attempt: Attempt, ending: Ending) -> None:
        assert attempt.reservation is not None, "an attempt that was taken has one"
        try:
            ending.end(attempt.reservation)
        finally:
            self._count_end()

    def _count_end(self) -> None:
        with self._lock:
            self._unended -= 1
            if self._drains and not self._unended:
                self._ended.notify_all()

    def drain(self, timeout_s: float) -> bool:
        """Wait until every attempt has ended; False when that takes longer."""
        with self._lock:
            self._drains += 1
            try:
                return self._ended.wait_for(lambda: not self._unended, timeout_s)
            finally:
                self._drains -= 1

    def forget(self) -> None:
        """At the beginning; and in the child after a fork, for the open attempts are the parent's."""
        self._open: OrderedDict[_Key, Attempt] = OrderedDict()
        self._unended = self._drains = 0  # `_drains`: how many threads wait for the last to end
        self._lock = threading.RLock()
        self._ended = threading.Condition(self._lock)


def _key(call_id: str, door: Door | None) -> _Key:
    return call_id, 0 if door is None else id(door.root)  # an attempt keeps its door, so the id is not given anew


# -- attempts whose end nobody reports ---------------------------------------------------------------------------

_gates: weakref.WeakValueDictionary[int, Gate] = weakref.WeakValueDictionary()
_lock = threading.Lock()


def _forked() -> None:
    """In the child of a fork the open attempts belong to the parent."""
    global _lock
    _lock = threading.Lock()
    for gate in list(_gates.values()):
        gate.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
