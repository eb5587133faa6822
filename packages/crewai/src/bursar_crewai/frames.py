"""Who a call belongs to: the kickoffs, agents and tools that are under way around it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from bursar.errors import BursarError

if TYPE_CHECKING:
    from bursar import Reservation
    from bursar_crewai.guard import BursarCrew

log = logging.getLogger("bursar.crewai")
_MAX_LENGTH = 512


class Frame:
    """One crew, flow, agent or tool under way. `subject` is what its end will name; tags hold for all that is inside.

    Frames are values of a context variable, which CrewAI hands on to its threads. A frame that has ended no longer counts in
    the thread where it began: nothing has to be undone in its context. What it has left behind in other threads, as memory
    that is still being saved, is its own until that has ended too.

    `top`: the outermost crew, flow or agent, within which a refusal is told that CrewAI has swallowed.
    """

    __slots__ = (
        "ended", "guard", "open_tools", "outer", "refusal", "reservation", "root", "subject", "tags", "thread", "top",
    )  # fmt: skip

    def __init__(self, guard: BursarCrew, subject: object, tags: Mapping[str, Any], outer: Frame | None) -> None:
        self.guard = guard
        self.subject = subject
        self.outer = outer
        self.root: Frame = self if outer is None else outer.root
        around = None if outer is None else outer.top
        self.top: Frame | None = self if around is None and subject is not None else around
        self.thread = threading.current_thread()
        self.tags: dict[str, str] = {} if outer is None else dict(outer.tags)
        if outer is None or outer.guard is not guard:
            self.tags.update(guard.tags)
        self.tags.update(clean(tags))
        self.ended = False
        self.reservation: Reservation | None = None
        self.refusal: BursarError | None = None  # of the top
        self.open_tools: dict[int, Frame] = {}  # of the root
        if outer is None:
            self.tags.setdefault("run", f"crewai-{uuid4()}")

    def end(self) -> None:
        """What is inside has ended too; tools whose end nobody told are booked at their price: their body may have run."""
        self.ended = True
        if self.root is self:
            for tool in list(self.open_tools.values()):
                tool.end_tool(None)

    def raise_refusal(self) -> None:
        """Raise what CrewAI has swallowed, where it did."""
        if self.top is not None and self.top.refusal is not None:
            raise self.top.refusal

    def hold(self, reservation: Reservation) -> None:
        """The reservation of the tool that this frame is."""
        self.reservation = reservation
        self.root.open_tools[id(self)] = self

    def end_tool(self, released: str | None) -> None:
        """The tool has ended; `released` says why its body never ran, None books its price."""
        self.ended = True
        self.root.open_tools.pop(id(self), None)
        with _lock:
            reservation, self.reservation = self.reservation, None
        if reservation is not None:
            with told_only():
                reservation.settle(None) if released is None else reservation.release(released)


class told_only(suppress):
    """A settlement that fails is logged and tried again in the background; the answer is the user's all the same."""

    def __init__(self) -> None:
        super().__init__(BursarError)

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        suppressed = bool(super().__exit__(kind, error, trace))
        if suppressed:
            log.error("while booking a call: %s", error)
        return suppressed


_lock = threading.Lock()
_innermost: ContextVar[Frame | None] = ContextVar("bursar_crewai_frame", default=None)


def current() -> Frame | None:
    """The innermost frame that is under way, with all those around it."""
    found = frame = _innermost.get()
    while frame is not None:
        if frame.ended and frame.thread is threading.current_thread():
            found = frame.outer
        frame = frame.outer
    return found


def enter(guard: BursarCrew, subject: object, **tags: Any) -> Frame:
    """From now on, calls of this context belong to the subject."""
    frame = Frame(guard, subject, tags, current())
    _innermost.set(frame)
    return frame


@contextmanager
def inside(guard: BursarCrew, subject: object, **tags: Any) -> Iterator[None]:
    """The block belongs to the subject."""
    frame = enter(guard, subject, **tags)
    try:
        yield
    finally:
        leave(frame)


def find(subject: object) -> Frame | None:
    """The innermost frame of this subject that has not ended."""
    frame = current()
    while frame is not None and frame.subject is not subject:
        frame = frame.outer
    return frame


def leave(frame: Frame) -> None:
    """The frame's subject has ended."""
    frame.end()
    inner = _innermost.get()
    while inner is not None and inner is not frame:
        inner = inner.outer
    if inner is not None:
        _innermost.set(frame.outer)


def clean(tags: Mapping[str, Any]) -> dict[str, str]:
    """The tags as the books take them: printable text of at most 512 characters; those without a value are left out."""
    cleaned = {}
    for name, value in tags.items():
        text = "" if value is None else " ".join(str(value).split())
        if text:
            cleaned[name] = "".join(sign if sign.isprintable() else "?" for sign in text)[:_MAX_LENGTH]
    return cleaned
