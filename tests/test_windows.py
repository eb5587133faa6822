"""Windows against an oracle that looks at the wall clock minute by minute, across every kind of change of the clocks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.errors import InvalidInput
from bursar.windows import NAMES, Window

# (zone, the instant in UTC at which its clocks change)
CHANGES = [
    ("Europe/Berlin", "2025-03-30T01:00"),
    ("Europe/Berlin", "2025-10-26T01:00"),
    ("America/New_York", "2026-11-01T06:00"),
    ("Australia/Lord_Howe", "2025-04-05T15:00"),  # by half an hour
    ("Australia/Lord_Howe", "2025-10-04T15:30"),
    ("America/Havana", "2025-03-09T05:00"),  # midnight is skipped
    ("America/Havana", "2025-11-02T05:00"),  # midnight comes twice
    ("America/Sao_Paulo", "2018-11-04T03:00"),
    ("America/Sao_Paulo", "2018-02-18T02:00"),  # 23:00 comes twice
    ("America/St_Johns", "2010-11-07T02:31"),  # a minute past midnight, back into yesterday
    ("Pacific/Apia", "2011-12-30T10:00"),  # a whole day is skipped
    ("Asia/Kathmandu", "2025-01-01T00:00"),  # 5:45 ahead
    ("Africa/Casablanca", "2025-02-23T02:00"),
    ("UTC", "2024-12-31T00:00"),
]
ZONES = sorted({zone for zone, _ in CHANGES})
CALENDAR = ("minute", "hour", "day", "week", "month", "quarter", "year")


def instant(text: str) -> int:
    return oracle.us(datetime.fromisoformat(text).replace(tzinfo=UTC))


@pytest.mark.parametrize(("zone", "change"), CHANGES)
@pytest.mark.parametrize("name", CALENDAR)
def test_windows_tile_time_across_a_change_of_the_clocks(name: str, zone: str, change: str) -> None:
    """Every instant lies in its window, each window ends where the next begins, and the oracle draws the same lines."""
    window = Window(name, zone)
    at_us = instant(change)
    for minute in [*range(-26 * 60, 26 * 60, 47), *range(-95, 96, 5), -2, -1, 1, 2]:
        for off in (-1, 0, 1):
            now_us = at_us + minute * oracle.MINUTE_US + off
            start_us, end_us = window.bounds(now_us)
            assert end_us is not None
            assert start_us <= now_us < end_us
            assert (start_us, end_us) == oracle.window_at(name, zone, now_us)
            assert Window(name, zone).bounds(end_us)[0] == end_us
            assert Window(name, zone).bounds(start_us - 1)[1] == start_us


@given(
    st.sampled_from(CALENDAR),
    st.sampled_from(ZONES),
    st.datetimes(min_value=datetime(2000, 1, 1), max_value=datetime(2040, 1, 1), timezones=st.just(UTC)),  # noqa: DTZ001
)
def test_any_instant_lies_in_the_window_that_the_oracle_names(name: str, zone: str, at: datetime) -> None:
    now_us = oracle.us(at)
    assert Window(name, zone).bounds(now_us) == oracle.window_at(name, zone, now_us)


@pytest.mark.parametrize(
    ("name", "zone", "at", "start", "hours"),
    [
        ("day", "Europe/Berlin", "2025-03-30T12:00", "2025-03-29T23:00", 23),
        ("day", "Europe/Berlin", "2025-10-26T12:00", "2025-10-25T22:00", 25),
        ("day", "Australia/Lord_Howe", "2025-04-06T00:00", "2025-04-05T13:00", 24.5),
        ("hour", "Australia/Lord_Howe", "2025-04-05T15:10", "2025-04-05T14:00", 1.5),
        ("hour", "Australia/Lord_Howe", "2025-10-04T15:40", "2025-10-04T15:30", 0.5),
        ("hour", "Asia/Kathmandu", "2025-05-01T12:20", "2025-05-01T12:15", 1),
        ("day", "America/Havana", "2025-03-09T12:00", "2025-03-09T05:00", 23),
        ("day", "America/Havana", "2025-11-02T12:00", "2025-11-02T04:00", 25),
        ("week", "UTC", "2026-01-01T00:00", "2025-12-29T00:00", 168),
        ("quarter", "UTC", "2024-02-29T00:00", "2024-01-01T00:00", 91 * 24),
    ],
)
def test_known_windows(name: str, zone: str, at: str, start: str, hours: float) -> None:
    start_us, end_us = Window(name, zone).bounds(instant(at))
    assert start_us == instant(start)
    assert end_us == instant(start) + timedelta(hours=hours) // timedelta(microseconds=1)


def test_total_and_rolling_windows_have_no_end() -> None:
    assert Window("total").bounds(1) == (0, None)
    assert Window("rolling 10m").bounds(1) == (0, None)
    assert Window("rolling 10m").rolling_us == 600_000_000


@pytest.mark.parametrize(
    "name", ["", "Day", "fortnight", "rolling", "rolling 0m", "rolling 10", "rolling 5w", "rolling 1.5h"]
)
def test_an_unknown_window_is_named_in_the_error(name: str) -> None:
    with pytest.raises(InvalidInput, match=r"is not a window\. Use one of") as caught:
        Window(name)
    assert caught.value.window == name
    assert all(known in str(caught.value) for known in NAMES)


@pytest.mark.parametrize("zone", ["", "Mars/Olympus", "../etc/passwd", "Europe", "/etc/localtime", "a\0b"])
def test_an_unknown_zone_is_named_in_the_error(zone: str) -> None:
    with pytest.raises(InvalidInput, match="is not a time zone"):
        Window("day", zone)
