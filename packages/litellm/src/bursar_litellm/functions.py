"""The functions of `litellm`, wrapped: what the logger reserved in a call ends with the call, and its refusals are raised."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Sequence
from types import CoroutineType
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import litellm

from bursar.ending import Ending, end_soon, expect_orphans, unknown
from bursar_litellm.answer import read_answer, read_error
from bursar_litellm.door import Door
from bursar_litellm.errors import UNBOUNDED, BudgetStop, check_bounded, litellm_error
from bursar_litellm.gate import Attempt
from bursar_litellm.request import kind_of
from bursar_litellm.streams import ABANDONED, guard_stream, is_stream

if TYPE_CHECKING:
    from bursar import Bursar

_NAMES = (
    *("completion", "text_completion", "embedding", "responses", "anthropic_messages", "image_generation"),
    *("image_edit", "image_variation", "transcription", "speech", "rerank", "ocr", "video_generation"),
    *("generate_content", "generate_content_stream", "compact_responses", "llm_passthrough_route", *UNBOUNDED),
)
# The modules that LiteLLM's functions are looked up in, and which of these.
_PLACES = ((litellm, _NAMES), (litellm.google_genai, _NAMES), (litellm.interactions, ("create",)))
_lock = threading.Lock()
_Later = list[Callable[[], Any]]


class _Background:
    """LiteLLM's executor, through which it logs a sync call; it gets the work when that call has been booked.

    That work takes the interpreter's lock, which SQLite lets go of nine times a settlement: beside it, a settlement took
    more than twice as long.
    """

    def __init__(self) -> None:
        self._executor: Any = None
        self._thread = threading.local()

    def take_place(self) -> None:
        """Stand before the executor where LiteLLM's functions look it up, once."""
        if self._executor is None:
            self._executor, litellm.utils.executor = litellm.utils.executor, self

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        """Start it; or later, in a call: LiteLLM does not wait for what it hands on there, and asks for no result."""
        later: _Later | None = getattr(self._thread, "later", None)
        if later is None:
            return self._executor.submit(work, *args, **kwargs)
        later.append(functools.partial(self._executor.submit, work, *args, **kwargs))
        return None

    def hold(self) -> tuple[_Later, _Later | None]:
        """From the begin of a sync call on; `let_go` takes what it returns, when the call has been booked."""
        later: _Later = []
        outer: _Later | None = getattr(self._thread, "later", None)
        self._thread.later = later
        return later, outer

    def let_go(self, later: _Later, outer: _Later | None) -> None:
        self._thread.later = outer
        for start in later:
            start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._executor, name)


_background = _Background()


def wrap_functions() -> None:
    """Wrap them in the module `litellm`, once; its Router and its own functions look them up there at every call."""
    with _lock:
        _background.take_place()
        for place, names in _PLACES:
            for name in (*names, *(f"a{name}" for name in names)):
                function = getattr(place, name, None)
                if callable(function) and not hasattr(function, "__bursar__"):
                    wrapped = _awaited(function) if inspect.iscoroutinefunction(function) else _plain(function)
                    wrapped.__bursar__ = True  # type: ignore[attr-defined]
                    setattr(place, name, wrapped)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    names = _names(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _named(names, args, kwargs)
        held = _background.hold()
        try:
            with _door(function.__name__, args, kwargs) as door:
                try:
                    answer = function(*args, **_announced(function.__name__, kwargs))
                except BaseException as error:  # noqa: BLE001 - raised again, below
                    for attempt, ending in _failed(door, error):
                        attempt.gate.end(attempt, ending)
                    _raise(door, error)
            if is_stream(answer):
                return guard_stream(answer, door.own())
            for attempt, ending in _answered(door, answer):
                attempt.gate.end(attempt, ending)
            return answer
        finally:
            _background.let_go(*held)

    return call


def _awaited(function: Callable[..., Any]) -> Callable[..., Any]:
    names = _names(function)

    @functools.wraps(function)
    async def call(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = _named(names, args, kwargs)
        with _door(function.__name__, args, kwargs) as door:
            try:
                answer = await function(*args, **kwargs)
            except GeneratorExit:  # its task was thrown away: nothing can be awaited here
                expect_orphans()
                for attempt in door.own():
                    end_soon(functools.partial(attempt.gate.end, attempt, unknown(ABANDONED)))
                raise
            except BaseException as error:  # noqa: BLE001 - raised again, below
                for attempt, ending in _failed(door, error):
                    await attempt.gate.aend(attempt, ending)
                _raise(door, error)
        if is_stream(answer):
            return guard_stream(answer, door.own())
        for attempt, ending in _answered(door, answer):
            await attempt.gate.aend(attempt, ending)
        return answer

    return call


def _names(function: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]


def _named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional arguments by their names: LiteLLM announces, and lets be changed, named ones only."""
    if not args:
        return args, kwargs
    told = dict(zip(names, args, strict=False))
    return (args, kwargs) if told.keys() & kwargs.keys() else (args[len(told) :], {**told, **kwargs})


def _announced(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Have each guard reserve for a sync call, which LiteLLM itself announces when it can no more be changed."""
    loggers: dict[Any, Any] = {one.gate: one for one in litellm.input_callback if hasattr(one, "gate")}
    if not loggers or kwargs.get("acompletion") or kwargs.get(f"a{name}"):  # nobody asks, or it is awaited after all
        return kwargs
    kwargs = {"litellm_call_id": str(uuid4()), **kwargs}  # by which LiteLLM will tell of it
    for logger in loggers.values():
        kwargs = logger.announce(name, kwargs)
    return kwargs


def _door(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Door:
    """The door of one call, to be entered around it."""
    asked = {**dict(zip(("model", "messages"), args, strict=False)), **kwargs} if args else kwargs
    return Door(_arm(name), kind_of(name), asked)


def _arm(name: str) -> Sequence[Bursar]:
    """Have LiteLLM announce what goes out, too: it does so to this list, and adds nothing to it beyond 100 callbacks.

    The guards there are. Raises what one says of a function whose cost does not come with its answer.
    """
    callbacks: list[Any] = litellm.callbacks
    for callback in callbacks:
        if hasattr(callback, "gate") and callback not in litellm.input_callback:
            litellm.input_callback.append(callback)
    announced: list[Any] = litellm.input_callback
    guards = list(dict.fromkeys(callback.bursar for callback in announced if hasattr(callback, "gate")))
    if guards:
        check_bounded(kind_of(name))
    return guards


def _answered(door: Door, answer: Any) -> list[tuple[Attempt, Ending]]:
    if isinstance(answer, CoroutineType):
        for attempt in door.own():
            attempt.gate.disown(attempt)
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
