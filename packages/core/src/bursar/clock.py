"""Time comes in through a clock: microseconds since the epoch, never running back."""

from __future__ import annotations

import time
from typing import Protocol

from bursar.errors import StoreError

MAX_SKEW_US = 60_000_000


class Clock(Protocol):
    """What the product asks of time. `bursar.testing.ManualClock` is one that tests set."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        ...


class SystemClock:
    """The host's clock."""

    def now_us(self) -> int:
        return time.time_ns() // 1_000


class StoreClock:
    """A store's time: the host's, but never back. A host clock 60 s behind the store's is an error (I8)."""

    def __init__(self, clock: Clock, high_us: int = 0) -> None:
        self._now = clock.now_us
        self._high = high_us

    def now_us(self) -> int:
        now = self._now()
        if now >= self._high:
            self._high = now
            return now
        if self._high - now > MAX_SKEW_US:
            raise StoreError(
                f"This host's clock is {(self._high - now) // 1_000_000} s behind the store's. Set the clock (NTP), "
                "then try again.",
                fault="clock",
            )
        return self._high
