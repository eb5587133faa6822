"""The functions of `litellm`, wrapped: what the logger reserved in a call ends with the call, and its refusals are raised."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any

import litellm

from bursar_litellm.answer import Ending, read_answer, read_error, unknown
from bursar_litellm.errors import BudgetStop, litellm_error
from bursar_litellm.gate import Attempt, Door, end_soon, expect_orphans
from bursar_litellm.request import UNBOUNDED
from bursar_litellm.streams import ABANDONED, guard_stream, is_stream

_NAMES = (
    *("completion", "text_completion", "embedding", "responses", "anthropic_messages", "image_generation"),
    *("image_edit", "image_variation", "transcription", "speech", "rerank", "ocr", "video_generation"),
)
_lock = threading.Lock()


def wrap_functions() -> None:
    """Wrap them in the module `litellm`, once; its Router and its own functions look them up there at every call."""
    with _lock:
        for name in (*_NAMES, *(f"a{name}" for name in _NAMES), *UNBOUNDED):
            function = getattr(litellm, name, None)
            if callable(function) and not hasattr(function, "__bursar__"):
                wrapped = _awaited(function) if inspect.iscoroutinefunction(function) else _plain(function)
                wrapped.__bursar__ = True  # type: ignore[attr-defined]
                setattr(litellm, name, wrapped)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        _arm(function.__name__)
        door = Door(is_mock=_is_mock(kwargs))
        try:
            answer = function(*args, **kwargs)
        except BaseException as error:  # noqa: BLE001 - raised again, below
            for attempt, ending in _failed(door, error):
                attempt.gate.end(attempt, ending)
            _raise(door, error)
        finally:
            door.close()
        if is_stream(answer):
            return guard_stream(answer, door.own())
        for attempt, ending in _answered(door, answer):
            attempt.gate.end(attempt, ending)
        return answer

    return call


def _awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        _arm(function.__name__)
        door = Door(is_mock=_is_mock(kwargs))
        try:
            answer = await function(*args, **kwargs)
        except GeneratorExit:  # its task was thrown away: nothing can be awaited here
            expect_orphans()
            for attempt in door.own():
                end_soon(attempt, unknown(ABANDONED))
            raise
        except BaseException as error:  # noqa: BLE001 - raised again, below
            for attempt, ending in _failed(door, error):
                await attempt.gate.aend(attempt, ending)
            _raise(door, error)
        finally:
            door.close()
        if is_stream(answer):
            return guard_stream(answer, door.own())
        for attempt, ending in _answered(door, answer):
            await attempt.gate.aend(attempt, ending)
        return answer

    return call


def _arm(name: str) -> None:
    """Have LiteLLM announce what goes out, too: it does so to this list, and adds nothing to it beyond 100 callbacks.

    Raises what the guard says of a function whose cost does not come with its answer.
    """
    callbacks: list[Any] = litellm.callbacks
    for callback in callbacks:
        if hasattr(callback, "gate"):
            if callback not in litellm.input_callback:
                litellm.input_callback.append(callback)
            callback.check_bounded(name)


def _is_mock(kwargs: dict[str, Any]) -> bool:
    return any(kwargs.get(name) for name in ("mock_response", "mock_tool_calls", "mock_timeout"))


def _answered(door: Door, answer: Any) -> list[tuple[Attempt, Ending]]:
    if inspect.iscoroutine(answer):
        for attempt in door.own():
            attempt.door = None  # LiteLLM's events will tell of it
        return []
    own = door.own()
    newest = {one.gate: one for one in own}
    return [
        (one, read_answer(one.provider, answer, one.details, one.characters))
        if newest[one.gate] is one
        else (one, unknown("its end was not told"))
        for one in own
    ]


def _failed(door: Door, error: BaseException) -> list[tuple[Attempt, Ending]]:
    return [(one, read_error(one.provider, error, one.details)) for one in door.own()]


def _raise(door: Door, error: BaseException) -> None:
    """Raise what the user is to see: a refusal, in whatever clothes LiteLLM put it."""
    if isinstance(error, BudgetStop):
        raise litellm_error(error.error) from None
    if door.refusal is not None and isinstance(error, Exception) and error is not door.refusal:
        raise door.refusal from error
    raise error
