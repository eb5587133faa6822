"""Which objects are in the middle of a call that stands reserved already, in this thread or task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_served: ContextVar[tuple[int, ...]] = ContextVar("bursar_llamaindex_served", default=())


@contextmanager
def serving(instance: Any) -> Iterator[None]:
    """Inside, the object's own calls are parts of one that is reserved."""
    token = _served.set((*_served.get(), id(instance)))
    try:
        yield
    finally:
        _served.reset(token)


def is_served(instance: Any) -> bool:
    """Whether this object is, or with None: any object."""
    served = _served.get()
    return id(instance) in served if instance is not None else bool(served)
