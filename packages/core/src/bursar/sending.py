"""The model call that is being sent: reserved for already, so that a door further in lets it pass and it is charged once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_MAX_DEPTH = 6  # of what a message's text is nested in
# Where requests keep their conversation, and messages and their parts their text, in the forms of SDKs and frameworks.
_CONVERSATIONS = ("messages", "input", "prompt", "contents")
_TEXTS = ("blocks", "content", "parts", "output", "text")


class Sending:
    """One reserved model call on its way out. An adapter begins it when the reservation stands, and ends it with the answer.

    `guard` is the Bursar that holds the reservation, `model` as it was asked for, `messages` as they are sent, in any form. It is
    seen in the thread or task where it was begun and wherever its context is handed on. Use it as a context manager around
    the sending; or `begin()` and `end()`, for frameworks that only tell of both; `end` may be called anywhere, more than once.
    """

    __slots__ = ("_guard", "_messages", "_model", "_outer", "_untaken")

    def __init__(self, guard: object, model: str, messages: Any) -> None:
        self._guard: object = guard  # None when it has ended
        self._model = model
        self._messages = messages
        self._outer: Sending | None = None
        self._untaken: list[None] = [None]  # taking from a list is one step, whatever threads there are

    def begin(self) -> Sending:
        """From here on a door further in lets this call pass, until it has been answered or has ended."""
        self._outer = _innermost()
        _current.set(self)
        return self

    def end(self) -> None:
        """Nothing passes by this call any more."""
        self._guard = self._messages = None
        self._untaken.clear()
        if _current.get() is self:
            _current.set(self._outer)

    def __enter__(self) -> Sending:
        return self.begin()

    def __exit__(self, *error: object) -> None:
        self.end()

    def _take(self, guard: object, model: str, messages: Any) -> bool:
        """Whether that is this call, and no other has passed by it."""
        if guard is not self._guard or _name(model) != _name(self._model) or not self._untaken:
            return False
        text = _text(_last(messages))
        if not text or text != _text(_last(self._messages)):
            return False
        try:
            self._untaken.pop()
        except IndexError:
            return False  # another thread was faster
        return True


_current: ContextVar[Sending | None] = ContextVar("bursar_sending", default=None)


def is_sending() -> bool:
    """Whether any call may be on its way out here; if not, `passing` need not be asked."""
    return _current.get() is not None


@contextmanager
def passing(guard: object, model: str, messages: Any) -> Iterator[bool]:
    """For a door further in: whether this call is the one that is being sent, so that it is not to be charged again.

    The same guard, the same model and the same text of the last message say so. Wherever that cannot be told (no text,
    another name for the model, a context that was not handed on) the call counts as another one, and is charged. One call
    passes: after its answer, what else is called inside is charged; after an error it may be sent again.
    """
    sending = _innermost()
    try:
        while sending is not None and not sending._take(guard, model, messages):
            sending = sending._outer
    except Exception:  # noqa: BLE001 - a strange message must not cost the user the call: it is charged as another one
        sending = None
    if sending is None:
        yield False
        return
    try:
        with Sending(guard, model, messages):  # for doors that are further in still
            yield True
    except BaseException:
        if sending._guard is not None:
            sending._untaken.append(None)
        raise
    sending.end()


def _innermost() -> Sending | None:
    sending = _current.get()
    while sending is not None and sending._guard is None:
        sending = sending._outer
    return sending


def _name(model: str) -> str:
    """Frameworks put the provider before a model's name: `openai/gpt-4o`."""
    return model.rpartition("/")[2]


def _last(messages: Any) -> Any:
    """The last message of a conversation, prompt or request body."""
    if isinstance(messages, Mapping):
        messages = next((messages[name] for name in _CONVERSATIONS if name in messages), None)
    return messages[-1] if isinstance(messages, (list, tuple)) and messages else messages


def _text(value: Any, depth: int = 0) -> str:
    """The text of a message, whatever it is wrapped in; empty where there is none."""
    if isinstance(value, str) or value is None or depth > _MAX_DEPTH:
        return value if isinstance(value, str) else ""
    if isinstance(value, (list, tuple)):
        return "".join(_text(part, depth + 1) for part in value)
    for name in _TEXTS:
        found = value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
        if found is not None:
            return _text(found, depth + 1)
    return ""
