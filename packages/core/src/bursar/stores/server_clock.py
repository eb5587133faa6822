"""The server's time, kept without asking for it each time."""

from __future__ import annotations

import time
from collections.abc import Callable

from bursar.clock import MAX_SKEW_US, SystemClock
from bursar.errors import StoreError


class ServerClock:
    """The server's time, without asking it each time: what it last said, and what has passed here since then.

    It lags by the way of an answer, and never leads. A host whose own clock is a minute off is an error (I8).
    """

    def __init__(self, ask: Callable[[], int], seen_us: int) -> None:
        self._ask = ask
        self._host = SystemClock()
        self.seen_us = seen_us  # nobody has seen a later time
        self._said_us = self._at_ns = 0
        self.check()

    def learn(self, said_us: int) -> None:
        """The server has just said this."""
        self._said_us, self._at_ns = said_us, time.monotonic_ns()
        self.seen_us = max(self.seen_us, said_us)

    def now_us(self) -> int:
        now_us = self._estimate_us()
        if now_us > self.seen_us:
            self.seen_us = now_us
        return self.seen_us

    def _estimate_us(self) -> int:
        return self._said_us + (time.monotonic_ns() - self._at_ns) // 1_000

    def check(self) -> None:
        """Raise StoreError (clock) where host and server disagree by a minute."""
        if abs(self._host.now_us() - self._estimate_us()) <= MAX_SKEW_US:
            return
        self.learn(self._ask())  # a host that slept does not know how long
        off_us = self._host.now_us() - self._said_us
        if abs(off_us) > MAX_SKEW_US:
            raise StoreError(
                f"This host's clock is {abs(off_us) // 1_000_000} s {'ahead of' if off_us > 0 else 'behind'} the server's. "
                "Set the clocks (NTP), then try again.",
                fault="clock",
            )
