"""Windows: when a budget refills, as half-open intervals of microseconds since the epoch."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from bursar.errors import InvalidInput, shown

SECOND_US = 1_000_000
ROLLING_BUCKETS = 60
_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ROLLING = re.compile(r"rolling ([1-9]\d{0,5})([smhd])")


def _month(first: date, months: int) -> date:
    index = first.year * 12 + first.month - 1 + months
    return date(index // 12, index % 12 + 1, 1)


# window name -> (first day of the window that holds a day, first day of the next one)
_BY_DATE: dict[str, Callable[[date], tuple[date, date]]] = {
    "day": lambda day: (day, day + timedelta(days=1)),
    "week": lambda day: (
        day - timedelta(days=day.weekday()),
        day - timedelta(days=day.weekday()) + timedelta(days=7),
    ),
    "month": lambda day: (day.replace(day=1), _month(day, 1)),
    "quarter": lambda day: (
        date(day.year, (day.month - 1) // 3 * 3 + 1, 1),
        _month(date(day.year, (day.month - 1) // 3 * 3 + 1, 1), 3),
    ),
    "year": lambda day: (date(day.year, 1, 1), date(day.year + 1, 1, 1)),
}
_BY_CLOCK = {"minute": 60 * SECOND_US, "hour": 3_600 * SECOND_US}
NAMES = ("total", *_BY_CLOCK, *_BY_DATE, "rolling 10m")


class Window:
    """One kind of window in one time zone: `total`, a calendar unit, or `rolling N{s,m,h,d}`.

    Calendar windows follow the zone's clock across DST changes, so a day may hold 23 or 25 hours (zoneinfo; PEP 615).
    `rolling_us` is the length of a rolling window, else None. Raises InvalidInput for unknown names and zones.
    """

    __slots__ = ("_held", "name", "rolling_us", "tz", "zone")

    def __init__(self, name: str, tz: str = "UTC") -> None:
        self.name = name
        self.tz = tz
        self.rolling_us: int | None = None
        rolling = _ROLLING.fullmatch(name)
        if rolling is not None:
            self.rolling_us = int(rolling[1]) * _SECONDS[rolling[2]] * SECOND_US
        elif name != "total" and name not in _BY_CLOCK and name not in _BY_DATE:
            raise InvalidInput(f"{shown(name)} is not a window. Use one of {', '.join(NAMES)}.", window=name)
        try:
            self.zone = ZoneInfo(tz)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise InvalidInput(
                f'{shown(tz)} is not a time zone. Use an IANA name such as "Europe/Paris".', tz=tz
            ) from None
        self._held: tuple[int, int | None] = (0, None) if self.endless else (0, 0)

    @property
    def endless(self) -> bool:
        """True for `total` and rolling windows: one account for all time."""
        return self.name == "total" or self.rolling_us is not None

    def bounds(self, at_us: int) -> tuple[int, int | None]:
        """Start and end of the window that holds the instant; the end is exclusive, None when there is none."""
        start, end = self._held
        if end is None or start <= at_us < end:
            return start, end
        self._held = held = self._around(at_us)
        return held

    def _around(self, at_us: int) -> tuple[int, int]:
        if self.name in _BY_CLOCK:
            length_us = _BY_CLOCK[self.name]
            return self._clock_start(at_us, length_us), self._clock_end(at_us, length_us)
        first, following = _BY_DATE[self.name](_local(at_us, self.zone).date())
        if at_us >= _midnight(following, self.zone):  # the clock was set back over midnight: it is not yesterday again
            first, following = _BY_DATE[self.name](following)
        return _midnight(first, self.zone), _midnight(following, self.zone)

    # A clock window ends where the zone's clock strikes, and where a change of the clocks skips that moment. A change by
    # less than the window (Lord Howe: 30 minutes) makes one window shorter or longer.

    def _clock_start(self, at_us: int, length_us: int) -> int:
        offset_us = self._offset_us(at_us)
        start = (at_us + offset_us) // length_us * length_us - offset_us
        if self._offset_us(start) == offset_us:
            return start
        change = self._change(start, at_us)
        return change if self._strikes(change, length_us) else self._clock_start(change - 1, length_us)

    def _clock_end(self, at_us: int, length_us: int) -> int:
        offset_us = self._offset_us(at_us)
        end = ((at_us + offset_us) // length_us + 1) * length_us - offset_us
        if self._offset_us(end) == offset_us:
            return end
        change = self._change(at_us, end)
        return change if self._strikes(change, length_us) else self._clock_end(change, length_us)

    def _offset_us(self, at_us: int) -> int:
        return (_local(at_us, self.zone).utcoffset() or timedelta()) // timedelta(microseconds=1)

    def _change(self, before: int, after: int) -> int:
        """The first instant of the offset that is in force at `after`, and not yet at `before`."""
        offset_us = self._offset_us(after)
        while after - before > 1:
            middle = (before + after) // 2
            if self._offset_us(middle) == offset_us:
                after = middle
            else:
                before = middle
        return after

    def _strikes(self, change: int, length_us: int) -> bool:
        before, now = change - 1 + self._offset_us(change - 1), change + self._offset_us(change)
        return before // length_us != now // length_us or now % length_us == 0


def _local(at_us: int, zone: ZoneInfo) -> datetime:
    return (_EPOCH + timedelta(microseconds=at_us)).astimezone(zone)


def _instant(local: datetime) -> int:
    return (local.astimezone(UTC) - _EPOCH) // timedelta(microseconds=1)


def _midnight(day: date, zone: ZoneInfo) -> int:
    # fold=0: where midnight comes twice the day begins with the first, where it is skipped with the jump itself
    return _instant(datetime(day.year, day.month, day.day, tzinfo=zone))


@lru_cache(maxsize=256)
def window(name: str, tz: str = "UTC") -> Window:
    """The shared Window of this name and zone."""
    return Window(name, tz)
