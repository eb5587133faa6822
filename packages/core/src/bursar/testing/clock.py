"""A clock that tests set: no test has to sleep."""

from __future__ import annotations

import threading

START_US = 1_750_000_000_000_000  # 2025-06-15T15:06:40Z


class ManualClock:
    """Time that stands still until it is told otherwise. Hand it to `Bursar(clock=...)` or to a store.

    Microseconds since the epoch. It may be set back, as a host's clock may be: a store does not follow.
    """

    def __init__(self, now_us: int = START_US) -> None:
        self._lock = threading.Lock()
        self._now_us = now_us

    def now_us(self) -> int:
        return self._now_us

    def set(self, now_us: int) -> None:
        """Make it this time."""
        with self._lock:
            self._now_us = now_us

    def advance(self, seconds: float = 0.0, *, us: int = 0) -> int:
        """Let time pass, or run back when negative; the time afterwards."""
        with self._lock:
            self._now_us += round(seconds * 1_000_000) + us
            return self._now_us
