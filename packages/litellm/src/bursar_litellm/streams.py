"""Streams: the one LiteLLM returns, told apart only by its class, ends its reservation when it ends, fails or is dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from bursar.ending import Ending, end_soon, expect_orphans, released, settled, unknown
from bursar.usage import Usage
from bursar_litellm.answer import chat_events, is_answered, is_cached, kept, log, read_error, read_usage, tells_last
from bursar_litellm.errors import litellm_error
from bursar_litellm.gate import Attempt

if TYPE_CHECKING:
    from bursar import Stopped

ABANDONED = "abandoned: closed, cancelled or dropped before its end"
_ENDS = ("response.completed", "response.incomplete", "response.failed")
_MAX_TAIL = 2**20  # characters of one line of an event stream
_SOURCES = ("completion_stream", "streaming_response", "response", "_generator")
_MAX_DEPTH = 5


def is_stream(answer: Any) -> bool:
    """Whether LiteLLM answered by something to be read piece by piece."""
    return hasattr(type(answer), "__next__") or hasattr(type(answer), "__anext__")


def guard_stream(stream: Any, attempts: list[Attempt]) -> Any:
    """The same stream, of a class of its own class's kind, which ends the attempts. Generators come inside of one."""
    if not attempts:
        return stream
    expect_orphans()
    for attempt in attempts:
        # LiteLLM's notes and the stream hold each other: it would die late, when the garbage collector comes by.
        if attempt.details is not None and attempt.details.get("original_response") is stream:
            attempt.details["original_response"] = None
        attempt.details = None
        if attempt.hides_usage and hasattr(stream, "send_stream_usage"):
            stream.send_stream_usage, stream.stream_options = False, None
    if not hasattr(stream, "__dict__"):  # a generator
        stream = _Generated(stream)
    # Its class is changed and not its place taken: LiteLLM's Router, and users, ask what kind of stream it is.
    kind: type = type(stream)
    stream.__class__ = _guarded(kind)
    stream._bursar = _Reading(attempts, is_cached(stream), kept(stream) is not None)
    return stream


class _Reading:
    """What passes by of one stream, as far as it tells what is billed."""

    def __init__(self, attempts: list[Attempt], is_from_cache: bool, is_kept: bool) -> None:
        self.attempts = attempts
        self.provider = attempts[-1].provider
        self.is_from_cache = is_from_cache
        self.is_kept = is_kept  # the stream keeps its own pieces: they are read once, at its end
        self.has_begun = self.is_complete = self.is_over = False
        self.reservations = [one.reservation for one in attempts if one.reservation is not None]
        self.stopped: Stopped | None = None
        self.events: list[Any] = []
        self._tail = ""

    def feed(self, chunk: Any) -> None:
        """Keep what a piece says of usage. Never raises: accounting must not break a stream."""
        if isinstance(chunk, (bytes, str)):
            self._feed_text(chunk.decode("utf-8", "replace") if isinstance(chunk, bytes) else chunk)
            return
        kind = chunk.get("type") if isinstance(chunk, Mapping) else getattr(chunk, "type", None)
        if str(getattr(kind, "value", kind)) in _ENDS:
            self.events, self.is_complete = [chunk], True
        elif isinstance(chunk, Mapping) and (chunk.get("usage") or chunk.get("usageMetadata") or chunk.get("message")):
            self.events.append(chunk)
        elif getattr(chunk, "usage_metadata", None) is not None or getattr(chunk, "usageMetadata", None) is not None:
            self.events = [chunk]  # Google's: each holds the whole so far

    def _feed_text(self, text: str) -> None:
        lines = (self._tail + text).split("\n")
        self._tail = lines.pop()[-_MAX_TAIL:]
        for line in lines:
            if line.startswith("data:") and '"usage' in line:
                self.events.append(line.strip())
                self.is_complete = self.is_complete or "message_delta" in line or "response.completed" in line

    def is_open(self) -> bool:
        """Whether its end is still to be told."""
        return any(one.gate.has(one) for one in self.attempts)

    def usage(self, stream: Any, *, final: bool = False) -> Usage | None:
        """What the stream has told so far, or with `final` at its end; None when nothing."""
        events = self.events or chat_events(stream)
        if not events:
            return None
        # One chunk of a chat that tells it reads as a whole answer does, at once.
        return read_usage(self.provider, events if self.events or len(events) > 1 else events[0], final=final)

    def ended(self, stream: Any) -> Ending:
        """It was read to its end, or so it looks where a connection was closed: then the counts are but the first ones."""
        if self.is_from_cache:
            return released("answered from LiteLLM's cache")
        usage = self.usage(stream, final=True) if self.events or is_answered(stream) or tells_last(stream) else None
        return unknown("the stream stated no usage", self.usage(stream)) if usage is None else settled(usage)

    def failed(self, stream: Any, error: BaseException) -> Ending:
        """It broke off, or its reader was cancelled. Only a refusal of the request itself is free, whatever status it has."""
        if self.has_begun:
            return unknown(type(error).__name__, self.usage(stream))
        return read_error(self.provider, error, None)

    def stop(self, stream: Any) -> BaseException | None:
        """The error of what stops it here, a switch or a budget's kill; what has been answered in full goes on to its usage."""
        for reservation in self.reservations:
            if reservation.stopped is not None and not self._is_answered(stream):
                self.is_over, self.stopped = True, reservation.stopped
                return litellm_error(reservation.stopped)
        return None

    def _is_answered(self, stream: Any) -> bool:
        return self.is_complete or is_answered(stream)

    def abandoned(self, stream: Any) -> Ending:
        """Nobody reads on. Where the answer was complete all the same, its usage is the real one."""
        if self.is_from_cache:
            return self.ended(stream)
        usage = self.usage(stream)
        if usage is not None and self._is_answered(stream):
            return settled(usage)
        reason = ABANDONED if self.stopped is None else f"stopped in mid-stream ({self.stopped.cause})"
        return unknown(reason, usage)


class _Generated:
    """A generator, sync or async, as an object whose class can be changed."""

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def __iter__(self) -> Any:
        return self

    def __aiter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return next(self._generator)

    async def __anext__(self) -> Any:
        return await anext(self._generator)

    def close(self) -> None:
        self._generator.close()

    async def aclose(self) -> None:
        await self._generator.aclose()


def _source(stream: Any) -> Any:
    """What the stream is read from, as deep as it is known: LiteLLM's own classes close nothing, or only some."""
    for _ in range(_MAX_DEPTH):
        inner = next((one for name in _SOURCES if (one := getattr(stream, name, None)) is not None), None)
        if inner is None:
            break
        stream = inner
    return stream


@contextmanager
def _closing() -> Iterator[None]:
    """What cannot be closed is left to the garbage collector: it must not take the place of the refusal."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - see above
        log.debug("a stream that was stopped could not be closed: %r", error)


@cache
def _guarded(kind: type) -> type:
    """A subclass that ends the attempts of `_bursar`, with the methods that the stream's class has."""
    members: dict[str, Any] = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    methods = (("__next__", _next), ("__anext__", _anext), ("close", _close), ("aclose", _aclose))
    for name, make in (*methods, ("cache_streaming_response", _read_out)):
        if hasattr(kind, name):
            members[name] = make(getattr(kind, name))
    members["__del__"] = _del(getattr(kind, "__del__", None))
    return type(kind.__name__, (kind,), members)


def _next(inner: Any) -> Any:
    def __next__(self: Any) -> Any:
        reading: _Reading = self._bursar
        if reading.is_over:
            raise StopIteration
        try:
            chunk = inner(self)
        except BaseException as error:
            if reading.is_open():
                over = isinstance(error, StopIteration)
                _end(reading, reading.ended(self) if over else reading.failed(self, error))
            raise
        reading.has_begun = True
        if not reading.is_kept:
            reading.feed(chunk)
        stop = reading.stop(self)
        if stop is not None:
            _end(reading, reading.abandoned(self))
            with _closing():
                _source(self).close()
            raise stop
        return chunk

    return __next__


def _anext(inner: Any) -> Any:
    async def __anext__(self: Any) -> Any:
        reading: _Reading = self._bursar
        if reading.is_over:
            raise StopAsyncIteration
        try:
            chunk = await inner(self)
        except BaseException as error:
            if reading.is_open():
                over = isinstance(error, StopAsyncIteration)
                await _aend(reading, reading.ended(self) if over else reading.failed(self, error))
            raise
        reading.has_begun = True
        if not reading.is_kept:
            reading.feed(chunk)
        stop = reading.stop(self)
        if stop is not None:
            await _aend(reading, reading.abandoned(self))
            with _closing():
                await _source(self).aclose()
            raise stop
        return chunk

    return __anext__


def _read_out(inner: Any) -> Any:
    """LiteLLM calls it when the provider has said everything, and then hands the answer to its threads, which log it.

    A store that lets go of the interpreter's lock, as SQLite does nine times, would wait for theirs each time.
    """

    def cache_streaming_response(self: Any, processed_chunk: Any, cache_hit: bool) -> Any:
        reading: _Reading = self._bursar
        if reading.is_open():
            _end(reading, reading.ended(self))
        return inner(self, processed_chunk, cache_hit)

    return cache_streaming_response


def _close(inner: Any) -> Any:
    def close(self: Any) -> Any:
        _end(self._bursar, self._bursar.abandoned(self))
        return inner(self)

    return close


def _aclose(inner: Any) -> Any:
    async def aclose(self: Any) -> Any:
        ending = self._bursar.abandoned(self)
        try:
            return await inner(self)
        finally:
            await _aend(self._bursar, ending)

    return aclose


def _del(inner: Any) -> Any:
    def __del__(self: Any) -> None:
        reading = self.__dict__.get("_bursar")
        if reading is not None and reading.is_open():
            ending = reading.abandoned(self)
            for attempt in reading.attempts:
                end_soon(partial(attempt.gate.end, attempt, ending))
        if inner is not None:
            inner(self)

    return __del__


def _end(reading: _Reading, ending: Ending) -> None:
    for attempt in reading.attempts:
        attempt.gate.end(attempt, ending)


async def _aend(reading: _Reading, ending: Ending) -> None:
    for attempt in reading.attempts:
        await attempt.gate.aend(attempt, ending)
