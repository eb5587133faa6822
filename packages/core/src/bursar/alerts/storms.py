"""Storms: alerts that come again and again while something lasts, and the word that it is over."""

from __future__ import annotations

from dataclasses import dataclass

from bursar.alerts.alert import budget_of, topic_of
from bursar.commands import Alert

RECURRING = ("detector",)
QUIET_US = 900_000_000
MAX_STORMS = 10_000


@dataclass(slots=True)
class _Storm:
    first_us: int
    last: Alert
    count: int
    ends_us: int


class Storms:
    """What this process has seen that will be over without anybody saying so, by kind and budget.

    A detector's alert is over when none has come for a quarter of an hour, a threshold's at the end of its window (`until_us`).
    """

    def __init__(self) -> None:
        self._storms: dict[tuple[str, str], _Storm] = {}

    def see(self, alert: Alert) -> None:
        """Count an alert, or the word that its kind is over."""
        key = (topic_of(alert), budget_of(alert))
        ends_us = _ends_us(alert)
        storm = self._storms.get(key)
        if alert.kind == "resolved":
            self._storms.pop(key, None)
        elif storm is not None and ends_us is not None:
            storm.last, storm.count, storm.ends_us = alert, storm.count + 1, max(storm.ends_us, ends_us)
        elif ends_us is not None and len(self._storms) < MAX_STORMS:
            self._storms[key] = _Storm(alert.at_us, alert, 1, ends_us)

    def over(self, now_us: int) -> list[Alert]:
        """A `resolved` alert for each that is over; they are forgotten."""
        ended = [key for key, storm in self._storms.items() if storm.ends_us <= now_us]
        return [_resolved(self._storms.pop(key), now_us) for key in ended]


def _ends_us(alert: Alert) -> int | None:
    if alert.kind in RECURRING:
        return alert.at_us + QUIET_US
    until_us = alert.facts.get("until_us")
    return until_us if alert.kind == "threshold" and isinstance(until_us, int) else None


def _resolved(storm: _Storm, now_us: int) -> Alert:
    last = storm.last
    said = {"was": last.kind, "count": storm.count, "first_us": storm.first_us, "last_us": last.at_us}
    facts = {**said, **{name: value for name, value in last.facts.items() if name in ("budget", "owner")}}
    return Alert(f"{last.id}:over", "resolved", now_us, facts)
