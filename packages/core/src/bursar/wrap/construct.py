"""Clients that a program makes for itself: each is made as its guarded twin."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

from bursar.wrap.client import is_client, twin_of

if TYPE_CHECKING:
    from bursar.facade import Bursar


def guard_new_clients(
    bursar: Bursar, sdk: ModuleType, is_guarded: Callable[[str], bool] = lambda module: False
) -> Callable[[], None]:
    """Guard every client of `sdk` (openai, anthropic) that is made from now on. Returns what ends that.

    `is_guarded(module)` tells of the modules whose clients another guard watches already: theirs stay plain, so that no call
    is charged twice.
    """
    # by type(), because the module holds proxies that load what they stand for when they are looked at
    kinds = {value for value in list(vars(sdk).values()) if issubclass(type(value), type) and is_client(value)}
    twins: dict[type, type] = {}
    guards = [bursar]
    for kind, plain_new in [(kind, kind.__new__) for kind in kinds]:
        kind.__new__ = _maker(plain_new, guards, sdk.__name__, is_guarded, twins)
    return guards.clear  # the classes keep their `__new__`: Python does not take it back from a class whole


def _maker(
    plain_new: Any, guards: list[Bursar], sdk: str, is_guarded: Callable[[str], bool], twins: dict[type, type]
) -> Any:
    def __new__(cls: Any, *arguments: Any, **options: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # Within the SDK clients are copied; but the module's own client is a call of the user's, as in
        # `openai.chat.completions.create`.
        inside = caller.partition(".")[0] == sdk and cls.__name__ != "_ModuleClient"
        made = cls
        if guards and not inside and not hasattr(cls, "_bursar_gate") and not is_guarded(caller):
            made = twins.get(cls) or twins.setdefault(cls, twin_of(guards[0], cls, None))
        return object.__new__(made) if plain_new is object.__new__ else plain_new(made, *arguments, **options)

    return staticmethod(__new__)
