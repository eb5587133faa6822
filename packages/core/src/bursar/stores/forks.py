"""Forks of the process, of which every store is told: connections and locks must not cross them as they stand."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from typing import Protocol


class Forking(Protocol):
    """What a store does about a fork of its process."""

    def before_fork(self) -> None:
        """Come to rest: nothing may be half-done when the child begins."""

    def after_fork(self, *, in_child: bool) -> None:
        """Go on; in the child with connections of its own, and without the parent's threads."""


_numbers = itertools.count()
_stores: weakref.WeakValueDictionary[int, Forking] = weakref.WeakValueDictionary()
_forking: list[Forking] = []
_one_at_a_time = threading.Lock()  # from before a fork until after it, in the child as well: threads may fork at once


def watch(store: Forking) -> None:
    """Tell this store of forks as long as it lives: later ones come to rest first, for they may be using earlier ones."""
    _stores[next(_numbers)] = store


def _before_fork() -> None:
    _one_at_a_time.acquire()
    _forking[:] = [store for _, store in sorted(_stores.items(), key=lambda item: -item[0])]
    for store in _forking:
        store.before_fork()


def _after_fork(in_child: bool) -> None:
    for store in reversed(_forking):
        store.after_fork(in_child=in_child)
    _forking.clear()
    _one_at_a_time.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=lambda: _after_fork(False), after_in_child=lambda: _after_fork(True)
    )
