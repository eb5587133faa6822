"""All watches of a process: one per run, per spender and per connection, the least recently used forgotten."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TypeVar

from bursar.detect.retries import Storm
from bursar.detect.run import RunWatch
from bursar.detect.settings import Detectors
from bursar.detect.velocity import Velocity

MOST_RUNS = 1_024
MOST_SPENDERS = 1_024
MOST_CONNECTIONS = 256

T = TypeVar("T")


class Watchtower:
    """Finds the watch of a run, the velocity of a spender and the storm of a connection; makes it at first sight.

    A run here is one task of one agent system, as its scope or its framework says. Do not watch a run that stands for a
    whole process: many users who ask the same are no loop.
    """

    def __init__(self, settings: Detectors | None = None) -> None:
        self.settings = settings or Detectors()
        self._lock = threading.Lock()
        self._runs: OrderedDict[str, RunWatch] = OrderedDict()
        self._spenders: OrderedDict[str, Velocity] = OrderedDict()
        self._connections: OrderedDict[str, Storm] = OrderedDict()

    def run(self, run: str) -> RunWatch:
        """The watch over a run."""
        return self._one(self._runs, run, RunWatch, MOST_RUNS)

    def spender(self, key: str) -> Velocity:
        """The velocity of whatever spends: a run, an agent, a budget's account."""
        return self._one(self._spenders, key, Velocity, MOST_SPENDERS)

    def connection(self, key: str) -> Storm:
        """The failures of a connection or provider."""
        return self._one(self._connections, key, Storm, MOST_CONNECTIONS)

    def _one(self, kept: OrderedDict[str, T], key: str, make: Callable[[Detectors], T], most: int) -> T:
        with self._lock:
            one = kept.get(key)
            if one is None:
                one = kept[key] = make(self.settings)
                if len(kept) > most:
                    kept.popitem(last=False)
            else:
                kept.move_to_end(key)
            return one
