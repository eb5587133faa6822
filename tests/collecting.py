"""The garbage collector at its worst: calls that it finds amid a store's transaction, in the thread that holds its lock."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

from bursar.testing import ManualClock


class Collecting(ManualClock):
    """A clock that has garbage collected when it is asked for the time: the SQLite store asks amid its transaction."""

    collects = False

    def now_us(self) -> int:
        if self.collects:
            gc.collect()
        return super().now_us()


def drop(stream: Iterator[Any]) -> None:
    """Leave it half-way, as a part of a cycle: nobody but the collector will find it."""
    next(stream)
    held: list[object] = [stream]
    held.append(held)


def in_time(work: Callable[[], object]) -> bool:
    """Whether the work ends, in a thread that nobody waits for longer."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(20)
    return not thread.is_alive()
