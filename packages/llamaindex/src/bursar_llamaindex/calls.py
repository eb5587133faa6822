"""One announced call with its reservation, ended once, and in the background where its end comes from a finaliser."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from bursar.ending import Ending, amid_bursar, end_soon, expect_orphans, failed, settled, unknown
from bursar.sending import Sending
from bursar_llamaindex.answer import read_answer
from bursar_llamaindex.spans import noted

if TYPE_CHECKING:
    from collections.abc import Callable

    from bursar import Bursar, Reservation, Usage


class Call:
    """One call of a model. `request` are the arguments of `Bursar.call`; `event` is LlamaIndex's id of it.

    `write` puts what is granted into what LlamaIndex is about to send. `conversation`: what is sent, as LlamaIndex has it.
    `usage`: what was heard of its cost before its end; `hides_usage`: only Bursar asked the stream for it.
    """

    __slots__ = (
        "__weakref__", "_held", "_write", "bursar", "conversation", "event", "hides_usage", "is_answering", "request", "sending",
        "usage",
    )  # fmt: skip

    def __init__(
        self,
        bursar: Bursar,
        request: dict[str, Any],
        event: str,
        write: Callable[[Reservation], None] | None = None,
        conversation: Any = None,
    ) -> None:
        self.bursar = bursar
        self.request = request
        self.event = event
        self.conversation = conversation
        self.usage: Usage | None = None
        self.hides_usage = False
        self.is_answering = False
        self.sending: Sending | None = None
        self._write = write
        self._held: list[Reservation] = []

    @property
    def provider(self) -> str:
        provider: str = self.request["provider"]
        return provider

    @property
    def is_open(self) -> bool:
        return bool(self._held)

    @property
    def is_llm(self) -> bool:
        return self.conversation is not None

    def reserve(self) -> Reservation:
        """Until it has ended, it is extended, and stopped when a switch is thrown. Raises the errors of `Bursar.reserve`."""
        with noted():
            return self._hold(self.bursar.call(**self.request).__enter__())

    async def areserve(self) -> Reservation:
        """As `reserve`, for async callers, who may wait for headroom."""
        with noted():
            return self._hold(await self.bursar.acall(**self.request).__aenter__())

    def check(self) -> None:
        """A part of its answer is there, so that what else is called is not its own. Raises what has stopped it."""
        self.is_answering = True
        if self.sending is not None:
            self.sending.end()
            self.sending = None
        for reservation in self._held:
            if reservation.stopped is not None:
                raise reservation.stopped

    def _hold(self, reservation: Reservation) -> Reservation:
        self._held.append(reservation)
        expect_orphans()
        self.sending = Sending(self.bursar, reservation.model, self.request.get("body")).begin()
        if self._write is not None:
            self._write(reservation)
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

    def answered(self, response: Any) -> Ending:
        """Its end, once LlamaIndex has all of the answer."""
        return read_answer(self.provider, response) if self.usage is None else settled(self.usage)

    def failed(self, error: BaseException) -> Ending:
        """Its end, by the error that came out of it: in mid-stream that may have the code of a refusal."""
        return unknown(type(error).__name__) if self.is_answering else failed(error)

    def _let_go(self) -> Reservation | None:
        try:
            reservation = self._held.pop()
        except IndexError:  # ended already, or never reserved
            return None
        if self.sending is not None:
            self.sending.end()
        return reservation

    def drop(self, ending: Ending) -> None:
        """End it where an error comes out of it: that may be a task that the garbage collector closes, amid Bursar's own work."""
        (self.end_soon if amid_bursar() else self.end)(ending)

    def end_soon(self, ending: Ending) -> None:
        """End it in the background: a finaliser may run anywhere, under any lock."""
        if self._held:
            end_soon(partial(self.end, ending))
