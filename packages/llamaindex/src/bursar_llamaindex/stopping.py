"""The bytes of streams: they end when a switch is thrown, and usage that only Bursar asked for is taken out.

LlamaIndex lets nobody raise between two parts, so it is done where they arrive. The request that is leaving is told apart by a
header, which is taken off before it is sent.
"""

from __future__ import annotations

import itertools
import json
import weakref
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx

from bursar.errors import BursarError
from bursar.usage import Usage
from bursar_llamaindex.calls import Call
from bursar_llamaindex.embedded import http_hooks

_HEADER, _EXTENSION = "x-bursar-call", "bursar_call"
_RAW_HEADER = _HEADER.encode()  # to ask the headers for a name has httpx read all of them as text
_NO_USAGE = b',"usage":null'
_numbers = itertools.count(1)
_calls: weakref.WeakValueDictionary[str, Call] = weakref.WeakValueDictionary()


def make_stoppable(call: Call, instance: Any, settings: dict[str, Any], *, is_async: bool) -> None:
    """Have the stream of this call raise what stops it. One whose client cannot be reached goes on to its end."""
    hooks = http_hooks(instance, is_async=is_async)
    if hooks is None:
        return
    leaving, arriving = _ASYNC_HOOKS if is_async else _SYNC_HOOKS
    if leaving not in hooks["request"]:
        hooks["request"].append(leaving)
    if arriving not in hooks["response"]:
        hooks["response"].append(arriving)
    number = str(next(_numbers))
    _calls[number] = call
    settings["extra_headers"] = {**(settings.get("extra_headers") or {}), _HEADER: number}


def _leaving(request: httpx.Request) -> None:
    number = next((value for name, value in request.headers.raw if name == _RAW_HEADER), None)
    if number is not None:
        del request.headers[_HEADER]
        request.extensions[_EXTENSION] = number.decode()


def _arriving(response: httpx.Response) -> None:
    call = _calls.get(response.request.extensions.get(_EXTENSION, ""))
    if call is not None and response.status_code == 200:
        hides_usage = (
            call.hides_usage and "content-encoding" not in response.headers
        )  # packed bytes cannot be read here
        response.stream = Body(response.stream, call, hides_usage)


async def _aleaving(request: httpx.Request) -> None:
    _leaving(request)


async def _aarriving(response: httpx.Response) -> None:
    _arriving(response)


_SYNC_HOOKS, _ASYNC_HOOKS = (_leaving, _arriving), (_aleaving, _aarriving)


class Body(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A body that raises the call's error in place of what comes after it was stopped; the client then closes it."""

    def __init__(self, stream: Any, call: Call, hides_usage: bool) -> None:
        self._stream = stream
        self._call = call
        self._hides_usage = hides_usage
        self._parts: AsyncIterator[bytes] | None = None

    def __iter__(self) -> Iterator[bytes]:
        for part in self._stream:
            self._call.check()
            shown = self._without_usage(part) if self._hides_usage else part
            if shown:
                yield shown

    # Not an async generator: clients leave streams at their last event, and the event loop closes each generator by a task.
    def __aiter__(self) -> AsyncIterator[bytes]:
        self._parts = self._stream.__aiter__()
        return self

    async def __anext__(self) -> bytes:
        assert self._parts is not None
        while True:
            part = await anext(self._parts)
            self._call.check()
            shown = self._without_usage(part) if self._hides_usage else part
            if shown:
                return shown

    def _without_usage(self, part: bytes) -> bytes:
        """The part without the event that tells the usage, where it holds all of it. Else LlamaIndex reads it too, and shows it."""
        part = part.replace(_NO_USAGE, b"")  # what each event before it says
        if b'"usage"' not in part:
            return part
        *events, rest = part.split(b"\n\n")
        return b"\n\n".join([*(event for event in events if not self._takes(event)), rest])

    def _takes(self, event: bytes) -> bool:
        if not event.startswith(b"data:"):
            return False
        try:
            data = json.loads(event[5:].decode())
            usage = Usage.from_response(self._call.provider, data) if data.get("choices") == [] else None
        except (ValueError, AttributeError, BursarError):
            return False  # a part of an event, or one that tells something else
        if usage is not None:
            self._call.usage = usage
        return usage is not None

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()
