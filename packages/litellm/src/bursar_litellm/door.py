"""The door: one call of a function of `litellm` while it runs, and what was reserved and refused in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from bursar.sending import is_sending, passing

if TYPE_CHECKING:
    from bursar import Bursar
    from bursar_litellm.gate import Attempt


_MOCKS = ("mock_response", "mock_tool_calls", "mock_timeout")
# Which functions answer by a mock themselves, and which of them by a text alone; the others send what has one.
_MOCKED = frozenset({"completion", "text_completion"})
_MOCKED_BY_RESPONSE = frozenset({"embedding", "image_generation"})
_MOCKED_BY_TEXT = frozenset({"responses", "anthropic_messages", "generate_content", "generate_content_stream"})


def is_mocked(kind: str, asked: Mapping[str, Any]) -> bool:
    """Whether LiteLLM answers this call of a function by a mock among its arguments, and sends nothing."""
    mock = asked.get("mock_response")
    if kind in _MOCKED:
        return any(asked.get(name) for name in _MOCKS)
    return bool(mock) and (kind in _MOCKED_BY_RESPONSE or (kind in _MOCKED_BY_TEXT and isinstance(mock, str)))


class Door:
    """One call of a function of `litellm`, from outside or from within: what was reserved in it, and what was refused.

    Entered around the call. `guards`: those there are, `kind`: the function, `asked`: its arguments. `held`: the guards for
    which a framework around LiteLLM has reserved for this very call already.
    """

    __slots__ = ("_passing", "_token", "attempts", "held", "is_mock", "is_open", "outer", "refusal", "root")

    def __init__(self, guards: Sequence[Bursar], kind: str, asked: Mapping[str, Any]) -> None:
        self.attempts: list[Attempt] = []
        self.refusal: BaseException | None = None
        outer: Door | None = open_door()
        self.outer = outer
        self.root: Door = self if outer is None else outer.root
        self.is_mock = is_mocked(kind, asked)
        self.held: Sequence[Bursar] = ()
        self._passing = ExitStack() if is_sending() else None
        if self._passing is not None:
            guards = guards if outer is None else outer.held  # LiteLLM's own retries are attempts of its own
            model, enter = str(asked.get("model")), self._passing.enter_context
            self.held = [one for one in guards if enter(passing(one, model, asked))]
        self.is_open = True
        self._token = _current.set(self)

    def __enter__(self) -> Door:
        return self

    def __exit__(self, *error: Any) -> None:
        """The call has returned. Tasks that it started go on in its context, and may make calls of their own."""
        self.is_open = False
        for attempt in self.attempts:
            attempt.sent()
        with suppress(ValueError):  # an abandoned coroutine, closed in another context: there this door never stood
            _current.reset(self._token)
        if self._passing is not None:
            self._passing.__exit__(*error)

    def is_free(self, bursar: Bursar) -> bool:
        """Whether nothing is to be reserved in it for this guard."""
        return self.is_mock or bursar in self.held

    def refused(self, error: BaseException | None) -> None:
        """Remember a refusal here and further out, where it may come to light in another error's clothes; None: no more."""
        door: Door | None = self
        while door is not None:
            door.refusal = error
            door = door.outer

    def own(self) -> list[Attempt]:
        """The open attempts of this call, the newest last."""
        return [one for one in self.attempts if one.door is self and one.gate.has(one)]


_current: ContextVar[Door | None] = ContextVar("bursar_litellm_door", default=None)


def open_door() -> Door | None:
    """The call of a function of `litellm` that this code runs in."""
    door = _current.get()
    return door if door is not None and door.is_open else None
