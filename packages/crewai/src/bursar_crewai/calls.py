"""One model call or embedding: reserved before CrewAI's client sends it, ended by what came of it."""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from bursar.ending import amid_bursar, end_soon
from bursar.errors import BursarError
from bursar.sending import Sending
from bursar_crewai.answer import Answers, Ending
from bursar_crewai.errors import crew_error
from bursar_crewai.frames import told_only
from bursar_crewai.request import as_granted
from bursar_crewai.retries import delay_s
from bursar_crewai.streams import open_streams

if TYPE_CHECKING:
    from bursar import Bursar, Reservation


class Attempt:
    """One call under way: by which client, and what has been answered. `stop` is the error that ended it in mid-stream."""

    __slots__ = ("answers", "client", "earlier_error", "reservation", "said", "sending", "stop", "streamed", "streams")

    sending: Sending
    reservation: Reservation

    def __init__(self, client: object, said: dict[str, Any]) -> None:
        self.client = client
        self.said = said
        self.answers = Answers()
        self.streamed = False
        self.stop: BursarError | None = None
        self.streams: list[Any] = []
        self.earlier_error = sys.exc_info()[1]

    def admit(self, bursar: Bursar, reservation: Reservation) -> Sending:
        """It may be sent, by a client that sends what was granted."""
        said = self.said
        if reservation.capped or reservation.model != said["model"]:
            self.client = as_granted(self.client, reservation)
        self.reservation = reservation
        self.sending = Sending(bursar, reservation.model, said["messages"] or said["body"])
        return self.sending

    def sends_by(self, client: object) -> bool:
        """Whether the call is sent by this client, or through it: Azure's hands its Responses on to one of OpenAI's."""
        return client is self.client or client is getattr(self.client, "_responses_delegate", self.client)

    def check(self) -> None:
        """Raise what stopped the call in mid-stream, where something did, whatever CrewAI's client has made of it."""
        if self.stop is not None:
            raise self.stop.with_traceback(None)

    def end(self, reservation: Reservation, error: BaseException | None) -> None:
        """End the reservation by the answers, or by the error that came out of the call."""
        verb, args, options = self._ending(self.stop or error)
        end = partial(getattr(reservation, verb), *args, **options)
        if error is not None and amid_bursar():  # the garbage collector's doing
            end_soon(end)
            return
        with told_only(), _apart(error, self.earlier_error):
            end()

    async def aend(self, reservation: Reservation) -> None:
        """As `end`, for async callers whose call was answered."""
        verb, args, options = self._ending(None)
        with told_only():
            await getattr(reservation, f"a{verb}")(*args, **options)

    def _ending(self, error: BaseException | None) -> Ending:
        tier = self.said["body"].get("service_tier")
        return self.answers.ending(error, tier if tier in ("flex", "priority") else None, streamed=self.streamed)


_attempt: ContextVar[Attempt | None] = ContextVar("bursar_crewai_attempt", default=None)


def is_part(client: object, messages: Any) -> bool:
    """Whether this is a step of a call that is reserved already: `acall` by way of `call`, or once more without `stop`."""
    attempt = _attempt.get()
    same = attempt is not None and attempt.sends_by(client) and not attempt.answers.count
    return same and attempt is not None and bool(attempt.said["messages"] == messages)


def note_answer(client: object, stated: Any) -> None:
    """The client has read the usage of an answer."""
    attempt = _attempt.get()
    if attempt is not None and attempt.sends_by(client):
        attempt.sending.end()  # tools may follow inside the same call of the client
        attempt.answers.add(stated)


def note_tools(client: object, response: Any) -> None:
    """The client reads this answer of OpenAI's Responses."""
    attempt = _attempt.get()
    if attempt is not None and attempt.sends_by(client):
        attempt.answers.add_tools(response)


def note_chunk(client: object) -> None:
    """A part of a streamed answer is on its way to the user's code: the call cannot be made again behind its back.

    Raises the error of the switch, or of the budget, that stops the call from here on.
    """
    attempt = _attempt.get()
    if attempt is not None and attempt.sends_by(client):
        attempt.sending.end()
        attempt.streamed = True
        if attempt.stop is None and attempt.reservation.stopped is not None:
            attempt.stop = crew_error(attempt.reservation.stopped)
            attempt.streams = open_streams()
        attempt.check()


def run(bursar: Bursar, client: object, said: dict[str, Any], send: Callable[[Any], Any], repeats: int = 0) -> Any:
    """Reserve, send, and end the reservation; again, up to `repeats` times, where the client's SDK would have sent again.

    `send` is given the client to send by. Raises Bursar's errors before anything is sent, and later only what stops a stream.
    """
    for tried in itertools.count():
        attempt = Attempt(client, said)
        try:
            return _run_once(bursar, attempt, send)
        except Exception as error:
            pause_s = delay_s(error, tried) if tried < repeats and not attempt.streamed else None
            if pause_s is None:
                raise
        time.sleep(pause_s)


async def arun(
    bursar: Bursar, client: object, said: dict[str, Any], send: Callable[[Any], Awaitable[Any]], repeats: int = 0
) -> Any:
    """As `run`; the event loop goes on while the call waits for headroom, for the store, or to be made again."""
    for tried in itertools.count():
        attempt = Attempt(client, said)
        try:
            return await _arun_once(bursar, attempt, send)
        except Exception as error:
            pause_s = delay_s(error, tried) if tried < repeats and not attempt.streamed else None
            if pause_s is None:
                raise
        await asyncio.sleep(pause_s)


def _run_once(bursar: Bursar, attempt: Attempt, send: Callable[[Any], Any]) -> Any:
    block = bursar.call(**attempt.said)
    with gate():
        reservation = block.__enter__()
    token = _attempt.set(attempt)
    try:
        with attempt.admit(bursar, reservation):
            answer = send(attempt.client)
        attempt.check()
    except BaseException as error:
        attempt.end(reservation, error)
        if attempt.stop is None:
            raise
    finally:
        _attempt.reset(token)
    with suppress(Exception):  # what the SDK says of its stream's end must not take the place of the stop or the answer
        for stream in attempt.streams:
            stream.close()
    attempt.check()
    attempt.end(reservation, None)
    return answer


async def _arun_once(bursar: Bursar, attempt: Attempt, send: Callable[[Any], Awaitable[Any]]) -> Any:
    block = bursar.acall(**attempt.said)
    with gate():
        reservation = await block.__aenter__()
    token = _attempt.set(attempt)
    try:
        with attempt.admit(bursar, reservation):
            answer = await send(attempt.client)
        attempt.check()
    except BaseException as error:
        # Without awaiting: a cancelled task may be cancelled again, and a loop that closes runs nothing any more.
        attempt.end(reservation, error)
        if attempt.stop is None:
            raise
    finally:
        _attempt.reset(token)
    with suppress(Exception):
        for stream in attempt.streams:
            await stream.close()
    attempt.check()
    await attempt.aend(reservation)
    return answer


@contextmanager
def gate() -> Iterator[None]:
    """Around a reserving: what it raises stops the crew, once."""
    try:
        yield
    except BursarError as error:
        raise crew_error(error) from None


@contextmanager
def _apart(error: BaseException | None, earlier: BaseException | None) -> Iterator[None]:
    """Without the error that was being handled when the call began.

    CrewAI repeats tasks and shortens conversations inside `except`, so that Python chains the new error to the old one;
    whether this call was billed must not be read from the 400 or 429 of that one.
    """
    link: BaseException | None = error
    seen = 0
    while link is not None and earlier is not None and link.__context__ is not earlier and seen < 20:
        link, seen = link.__context__, seen + 1
    if link is None or earlier is None or link.__context__ is not earlier:
        yield
        return
    link.__context__ = None
    try:
        yield
    finally:
        link.__context__ = earlier
