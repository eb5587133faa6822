"""Planting: how a bug is put into the real code for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from bursar import accounts, law
from bursar.law import ends, incurred, reserving, standing

Patch = Callable[[], "contextlib.AbstractContextManager[None]"]


@contextlib.contextmanager
def replaced(*places: tuple[Any, str, Any]) -> Iterator[None]:
    """Put other values in these places for a while."""
    before = [(owner, name, _get(owner, name)) for owner, name, _ in places]
    for owner, name, value in places:
        _set(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            _set(owner, name, value)


def _get(owner: Any, name: Any) -> Any:
    return owner[name] if isinstance(owner, dict) else owner.__dict__[name]


def _set(owner: Any, name: Any, value: Any) -> None:
    if isinstance(owner, dict):
        owner[name] = value
    else:
        setattr(owner, name, value)


def handler(kind: type, change: Callable[..., Any]) -> Patch:
    """The law's answer to one kind of command, changed: `change(original, read, command, now_us)`."""
    original = law._HANDLERS[kind]
    return lambda: replaced((law._HANDLERS, kind, lambda *args: change(original, *args)))


def decision(kind: type, change: Callable[[Any, Any, Any, int], Any]) -> Patch:
    """What the law decides of one kind of command, changed afterwards: `change(decision, read, command, now_us)`."""
    return handler(
        kind, lambda original, read, command, now_us: change(original(read, command, now_us), read, command, now_us)
    )


def function(owner: Any, name: str, make: Callable[[Any], Any]) -> Patch:
    """A function in another's place: `make(original)`."""
    original = _get(owner, name)
    return lambda: replaced((owner, name, make(original)))


def everywhere(name: str, make: Callable[[Any], Any]) -> Patch:
    """A function of `accounts`, where the law uses it too."""
    original = getattr(accounts, name)
    users = [one for one in (accounts, standing, reserving, ends, incurred) if hasattr(one, name)]
    return lambda: replaced(*((one, name, make(original)) for one in users))


def with_rows(found: Any, **changed: Any) -> Any:
    """A decision with other figures in every account that it puts."""
    puts = {
        key: row._replace(**{name: change(row) for name, change in changed.items()})
        if type(row) is accounts.Account
        else row
        for key, row in found.puts.items()
    }
    return found._replace(puts=puts)
