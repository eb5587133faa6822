"""Open responses that are watched: what is read of them passes by, and their end is the end of the call."""

from __future__ import annotations

import sys
import weakref
from collections.abc import AsyncIterator, Iterator
from types import FrameType
from typing import Any

from bursar.ending import end_soon, expect_orphans
from bursar.errors import Stopped
from bursar.wrap.answer import Answer


def watch(response: Any, answer: Answer) -> None:
    """Let the bytes of an open response (httpx, httpx2) pass by `answer`, which ends with it: read, closed or forgotten."""
    expect_orphans()
    response.__class__ = _watched(type(response))
    response._bursar_answer = answer
    weakref.finalize(response, end, answer).atexit = False  # at exit the store may be gone; the reservation expires


class _Watched:
    """What a watched response does otherwise. Every way of reading but `iter_raw` goes through `iter_bytes`."""

    _bursar_answer: Answer

    def iter_bytes(self, *arguments: Any, **options: Any) -> Iterator[bytes]:
        answer = self._bursar_answer
        reservation = answer.reservation
        rest: Any = super()
        answer.is_reading = True
        try:
            for data in rest.iter_bytes(*arguments, **options):
                shown = answer.feed(data)
                if answer.complete:
                    answer.end_now()  # before the caller sees the end, and asks for the next call
                elif (stopped := reservation.stopped) is not None:
                    raise stopped.with_traceback(None)
                if shown:
                    answer.is_reading = False
                    yield shown
                    answer.is_reading = True
            left = answer.finish()
            answer.end_now()
            if left:
                yield left
        finally:
            answer.is_reading = False
            end(answer)

    async def aiter_bytes(self, *arguments: Any, **options: Any) -> AsyncIterator[bytes]:
        answer = self._bursar_answer
        reservation = answer.reservation
        rest: Any = super()
        answer.is_reading = True
        try:
            async for data in rest.aiter_bytes(*arguments, **options):
                shown = answer.feed(data)
                if answer.complete:
                    await answer.aend()
                elif (stopped := reservation.stopped) is not None:
                    raise stopped.with_traceback(None)
                if shown:
                    answer.is_reading = False
                    yield shown
                    answer.is_reading = True
            left = answer.finish()
            await answer.aend()
            if left:
                yield left
        except Stopped:
            await rest.aclose()  # the sync one is closed when it is let go; this one would wait for the event loop
            raise
        finally:
            answer.is_reading = False
            await answer.aend()

    def close(self) -> None:
        rest: Any = super()
        try:
            rest.close()
        finally:
            if not self._bursar_answer.is_reading:  # else it is the reading itself that closes, and ends the call
                end(self._bursar_answer)

    async def aclose(self) -> None:
        rest: Any = super()
        try:
            await rest.aclose()
        finally:
            if not self._bursar_answer.is_reading:
                await self._bursar_answer.aend()


def _watched(kind: type) -> type:
    if kind not in _kinds:
        _kinds[kind] = type(kind.__name__, (_Watched, kind), {"__module__": kind.__module__})
    return _kinds[kind]


_kinds: dict[type, type] = {}
_LOCKING = ("bursar.driver", "bursar.keeper", "bursar.stores", "bursar.waiting")


def end(answer: Answer) -> None:
    """End the call, from wherever its answer was closed or forgotten."""
    if answer.has_ended:
        return
    if _inside_bursar():
        end_soon(answer.end_now)
    else:
        answer.end_now()


def _inside_bursar() -> bool:
    """Whether a garbage collection in the midst of Bursar's own work brought us here: its locks are held then."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith(_LOCKING):
            return True
        frame = frame.f_back
    return False
