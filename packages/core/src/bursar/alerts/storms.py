"""Storms: alerts that come again and again while something lasts, and the word that it is over."""

from __future__ import annotations

from dataclasses import dataclass

from bursar.alerts.alert import Alert

RECURRING = ("refused", "detector", "shadow")
QUIET_US = 900_000_000
MAX_STORMS = 10_000


@dataclass(slots=True)
class _Storm:
    first_us: int
    last: Alert
    count: int


class Storms:
    """What this process has seen of the recurring kinds, by kind and budget. Other kinds say themselves when they are over."""

    def __init__(self) -> None:
        self._storms: dict[tuple[str, str], _Storm] = {}

    def see(self, alert: Alert) -> None:
        """Count an alert, or the word that its kind is over."""
        key = (alert.topic, alert.budget)
        storm = self._storms.get(key)
        if alert.kind == "resolved":
            self._storms.pop(key, None)
        elif storm is not None:
            storm.last, storm.count = alert, storm.count + 1
        elif alert.kind in RECURRING and len(self._storms) < MAX_STORMS:
            self._storms[key] = _Storm(alert.at_us, alert, 1)

    def over(self, now_us: int) -> list[Alert]:
        """A `resolved` alert for each that has not recurred for a quarter of an hour; they are forgotten."""
        ended = [key for key, storm in self._storms.items() if storm.last.at_us <= now_us - QUIET_US]
        return [_resolved(self._storms.pop(key), now_us) for key in ended]


def _resolved(storm: _Storm, now_us: int) -> Alert:
    last = storm.last
    said = {"was": last.kind, "count": storm.count, "first_us": storm.first_us, "last_us": last.at_us}
    facts = {**said, **{name: value for name, value in last.facts.items() if name in ("budget", "owner")}}
    return Alert(f"{last.id}:over", "resolved", now_us, facts)
