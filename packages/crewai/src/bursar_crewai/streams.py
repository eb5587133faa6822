"""The SDKs' streams that a stopped call was reading, to be closed with it, so that the provider generates no more."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

_MAX_DEPTH = 60
_NAMES = ("Stream", "AsyncStream")


def open_streams() -> list[Any]:
    """The streams in the local variables of the functions that lead here.

    CrewAI leaves them to the garbage collector; those of OpenAI's SDK refer to themselves, so that it finds them late.
    """
    return [value for local in _locals() for value in (local, _inside(local)) if type(value).__name__ in _NAMES]


def _locals() -> Iterator[Any]:
    frame = sys._getframe(1)
    for _ in range(_MAX_DEPTH):
        if frame.f_back is None:
            return
        frame = frame.f_back
        yield from list(frame.f_locals.values())


def _inside(local: Any) -> Any:
    """What LiteLLM's stream reads from."""
    return local.completion_stream if type(local).__name__ == "CustomStreamWrapper" else None
