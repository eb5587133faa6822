"""Windows: when a budget refills, as half-open intervals of microseconds since the epoch."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from bursar.errors import InvalidInput

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
            raise InvalidInput(f"{name!r} is not a window. Use one of {', '.join(NAMES)}.", window=name)
        try:
            self.zone = ZoneInfo(tz)
        except (ZoneInfoNotFoundError, ValueError, OSError):
            raise InvalidInput(f'{tz!r} is not a time zone. Use an IANA name such as "Europe/Paris".', tz=tz) from None
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
            return self._around_clock(at_us, _BY_CLOCK[self.name])
        first, following = _BY_DATE[self.name](_local(at_us, self.zone).date())
        return _midnight(first, self.zone), _midnight(following, self.zone)

    def _around_clock(self, at_us: int, length_us: int) -> tuple[int, int]:
        start = self._clock_start(at_us, length_us)
        end = start + length_us
        # An offset that changes by less than the window (Lord Howe: 30 minutes) makes one window shorter or longer.
        before = self._clock_start(end - 1, length_us)
        if before != start:
            return start, before
        for _ in range(8):
            following = self._clock_start(end, length_us)
            if following != start:
                return start, following
            end += length_us // 4
        return start, end

    def _clock_start(self, at_us: int, length_us: int) -> int:
        local = _local(at_us, self.zone)
        whole = local.replace(second=0, microsecond=0)
        return _instant(whole.replace(minute=0) if length_us == _BY_CLOCK["hour"] else whole)


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
