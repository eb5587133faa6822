"""Retries: a floor under the wait before a failed call's next attempt, the most attempts, and storms of failures."""

from __future__ import annotations

from collections import OrderedDict

from bursar.detect.settings import Detectors, Finding, found
from bursar.detect.velocity import Buckets

MOST_CALLS = 64
MAX_DOUBLINGS = 40
STORM_US = 60_000_000


class Retries:
    """The calls that failed last time, each by a key of its content."""

    __slots__ = ("_failed", "_settings")

    def __init__(self, settings: Detectors) -> None:
        self._settings = settings
        self._failed: OrderedDict[int, tuple[int, int]] = OrderedDict()  # key -> failures in a row, not before (us)

    def failed(self, key: int, now_us: int, retry_after_us: int = 0) -> int:
        """Note a failure; give the microseconds that the next attempt has to wait: what the provider asks for, or more."""
        settings = self._settings
        failures = self._failed.get(key, (0, 0))[0] + 1
        wait_ms = min(settings.max_backoff_ms, settings.backoff_ms << min(failures - 1, MAX_DOUBLINGS))
        wait_us = max(wait_ms * 1_000, retry_after_us)
        self._failed[key] = failures, now_us + wait_us
        self._failed.move_to_end(key)
        if len(self._failed) > MOST_CALLS:
            self._failed.popitem(last=False)
        return wait_us

    def succeeded(self, key: int) -> None:
        """The call went through: its failures are over."""
        self._failed.pop(key, None)

    def check(self, key: int, now_us: int) -> Finding | None:
        """Whether the call may be tried again now; a finding with `wait_us` where it is only too early."""
        failures, not_before_us = self._failed.get(key, (0, 0))
        settings = self._settings
        if failures >= settings.max_attempts:
            why = (
                f"The same call failed {failures} times in a row; at most {settings.max_attempts} attempts are made. "
                "Find out why it fails before trying again."
            )
            return found("attempts", settings.retries, why, repetitions=failures)
        if now_us < not_before_us and settings.retries != "off":
            wait_us = not_before_us - now_us
            why = f"The same call failed {failures} times in a row. Wait {wait_us / 1e6:.1f} s before the next attempt."
            return found("backoff", "throttle", why, repetitions=failures, wait_us=wait_us)
        return None


class Storm:
    """Failures of many calls together, of one connection or provider, from one process or (by their counts) several."""

    __slots__ = ("_calls", "_failures", "_settings")

    def __init__(self, settings: Detectors) -> None:
        self._settings = settings
        self._calls = Buckets(STORM_US // 12, 12)
        self._failures = Buckets(STORM_US // 12, 12)

    def ended(self, calls: int, failures: int, now_us: int) -> Finding | None:
        """Note that `calls` ended, `failures` of them in a failure; a finding while a storm goes on."""
        self._calls.add(calls, now_us)
        self._failures.add(failures, now_us)
        return self.check(now_us)

    def check(self, now_us: int) -> Finding | None:
        settings = self._settings
        calls, failures = self._calls.sum(now_us), self._failures.sum(now_us)
        if failures < settings.storm_failures or 2 * failures < calls:
            return None
        wait_us = settings.max_backoff_ms * 1_000
        why = f"{failures} of {calls} calls failed within a minute. Let the retries pause until the provider answers again."
        return found("storm", settings.storms, why, repetitions=failures, wait_us=wait_us)
