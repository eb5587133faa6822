"""How fast money goes: dollars a minute against a learned baseline, and a budget's burn rate over two windows."""

from __future__ import annotations

from array import array

from bursar.detect.settings import Detectors, Finding, found

MINUTE_US = 60_000_000
HOURS_6 = 360  # minutes
LEARNED = 10  # minutes with spending, before the baseline is believed
_SMOOTH = 16  # the baseline moves a sixteenth of the way at each minute that cost anything
# Google, "The Site Reliability Workbook", chapter 5: a budget of 30 days burns 2 % in an hour at 14.4 times the even rate,
# 5 % in six hours at 6 times. The shorter window says that it still goes on. (minutes, minutes, rate x 10)
_BURNS = (("fast", 60, 5, 144), ("slow", 360, 30, 60))
_LEAST_BURN_X10 = min(
    short * rate_x10 for _, _, short, rate_x10 in _BURNS
)  # minutes of even spending within any of them


class Buckets:
    """Sums over the last `count` stretches of `width_us` each. Times may not run back; what is older counts as newest."""

    __slots__ = ("_newest", "_values", "_width_us", "most")

    def __init__(self, width_us: int, count: int) -> None:
        self._width_us = width_us
        self._values = array("q", bytes(8 * count))
        self._newest = 0
        self.most = 0  # what any sum is at most: that of all buckets, with those that have left since it was made

    def add(self, amount: int, now_us: int) -> None:
        if now_us >= (self._newest + 1) * self._width_us:
            self._turn(now_us)
        index = self._newest % len(self._values)
        self._values[index] = min(self._values[index] + amount, 2**62)
        self.most += amount

    def sum(self, now_us: int, last: int | None = None) -> int:
        """The sum of the last buckets, the one under way included; of all of them without `last`."""
        self._turn(now_us)
        count = len(self._values)
        if last is None or last >= count:
            return sum(self._values)
        first = (self._newest + 1 - last) % count
        return sum(self._values[first : first + last]) + sum(self._values[: max(0, first + last - count)])

    def _turn(self, now_us: int) -> None:
        newest = now_us // self._width_us
        if newest <= self._newest:
            return
        count = len(self._values)
        if newest >= self._newest + count:  # all have left, as at the first time
            self._values = array("q", bytes(8 * count))
        else:
            for passed in range(self._newest + 1, newest + 1):
                self._values[passed % count] = 0
        self._newest = newest
        self.most = sum(self._values)


class Velocity:
    """The spending of one run, agent or budget, minute by minute. All amounts are integer nano-dollars.

    The baseline is the smoothed cost of the minutes that cost anything, learned before the minute it is held against; a
    fast minute moves it by its limit at most, so that a runaway does not teach that it is normal.
    """

    __slots__ = ("_baseline", "_learned", "_minute", "_minute_nanos", "_settings", "_spent")

    def __init__(self, settings: Detectors) -> None:
        self._settings = settings
        self._spent = Buckets(MINUTE_US, HOURS_6)
        self._minute = -1
        self._minute_nanos = 0
        self._baseline = 0
        self._learned = 0

    @property
    def baseline_nanos(self) -> int | None:
        """What a minute usually costs; None before ten minutes were seen."""
        return self._baseline if self._learned >= LEARNED else None

    def spent(self, nanos: int, now_us: int) -> Finding | None:
        """Note a cost; a finding when this minute costs many times what minutes usually do."""
        settings = self._settings
        minute = now_us // MINUTE_US
        if minute > self._minute:
            self._learn(minute)
        self._spent.add(nanos, now_us)
        self._minute_nanos += nanos
        rate = self._minute_nanos
        if self._learned < LEARNED:
            return None
        if rate < settings.velocity_floor_nanos or rate < settings.velocity_factor * self._baseline:
            return None
        times = rate // max(1, self._baseline)
        why = (
            f"This minute cost ${rate / 1e9:.2f} so far, {times} times the usual ${self._baseline / 1e9:.4f}. "
            "Look at what runs, or set a budget per minute."
        )
        return found("velocity", settings.velocity, why)

    def burn(self, limit_nanos: int, period_us: int, now_us: int) -> Finding | None:
        """Whether a budget of `limit_nanos` per `period_us` is used up too fast, by a long and a short window.

        For budgets of a day or longer; shorter ones end before the windows say anything, and give None.
        """
        if period_us < 24 * 60 * MINUTE_US or limit_nanos <= 0:
            return None
        if self._spent.most * period_us * 10 <= _LEAST_BURN_X10 * limit_nanos * MINUTE_US:
            return None  # as good as always
        for name, long, short, rate_x10 in _BURNS:
            fastest = rate_x10 * limit_nanos * MINUTE_US
            # the short window first: its sum is the cheaper, and mostly the only one that is made
            if self._spent.sum(now_us, short) * period_us * 10 <= fastest * short:
                continue
            spent = self._spent.sum(now_us, long)
            if spent * period_us * 10 > fastest * long:
                left = limit_nanos * long // spent
                why = (
                    f"${spent / 1e9:.2f} went in {long} minutes, and it still goes on ({name} burn): the whole budget of "
                    f"${limit_nanos / 1e9:.2f} would last {left // 60} h {left % 60} min. Look at what runs, or lower its speed."
                )
                return found("burn", self._settings.burn, why)
        return None

    def _learn(self, minute: int) -> None:
        """Take the minute that has ended into the baseline, before the next one begins."""
        cost = self._minute_nanos
        if self._learned >= LEARNED:
            cost = min(cost, self._settings.velocity_factor * max(1, self._baseline))
        if cost > 0:
            self._learned += 1
            self._baseline += (cost - self._baseline) // min(self._learned, _SMOOTH)
        self._minute, self._minute_nanos = minute, 0
