"""A lane: what waits for one sink, when its turn comes, and what is sent together. No input or output, no clock, no lock."""

from __future__ import annotations

from collections import deque
from collections.abc import Container
from dataclasses import dataclass, field
from random import Random

from bursar.alerts.alert import budget_of, topic_of
from bursar.alerts.message import MAX_ALERTS, Message
from bursar.alerts.sinks import Sink, Undelivered
from bursar.commands import Alert

MINUTE_US = 60_000_000
TOGETHER_US = MINUTE_US  # between two messages about the same kind and budget
FIRST_RETRY_US = 1_000_000
LAST_RETRY_US = 2 * MINUTE_US
GIVE_UP_US = 3 * 24 * 60 * MINUTE_US  # the Standard Webhooks specification: a schedule of several days


@dataclass(slots=True)
class _Group:
    """The alerts of one kind and budget. `message` is being tried, and stays as it is until it is taken."""

    waiting: deque[Alert] = field(default_factory=deque)
    message: Message | None = None
    failures: int = 0
    not_before_us: int = 0

    @property
    def idle(self) -> bool:
        return not self.message and not self.waiting

    @property
    def oldest_us(self) -> int:
        return self.message.alerts[0].at_us if self.message else self.waiting[0].at_us


class Lane:
    """The queue of one sink. A failure holds up this lane alone; one message that fails holds up no other for long."""

    def __init__(self, sink: Sink, per_minute: int, random: Random) -> None:
        self.sink = sink
        self.busy = False  # somebody is sending
        self.gone = False  # the receiver wants nothing more
        self.failures = 0
        self._random = random
        self._groups: dict[tuple[str, str, str], _Group] = {}
        self._sent_us: deque[int] = deque(maxlen=per_minute)
        self._paused_until_us = 0

    def __len__(self) -> int:
        return sum(len(one.waiting) + (len(one.message.alerts) if one.message else 0) for one in self._groups.values())

    def add(self, alert: Alert) -> None:
        self._group(alert).waiting.append(alert)

    def due(self, now_us: int) -> bool:
        """Whether `take` would give a message."""
        return self._next(now_us) is not None

    def take(self, now_us: int) -> Message | None:
        """The message whose turn it is. It ends with `taken` or `failed`."""
        group = self._next(now_us)
        if group is None:
            return None
        if group.message is None:
            count = min(len(group.waiting), MAX_ALERTS)
            group.message = Message(tuple(group.waiting.popleft() for _ in range(count)))
        self._sent_us.append(now_us)
        return group.message

    def taken(self, message: Message, now_us: int) -> None:
        """The receiver has it."""
        group = self._group(message.alerts[0])
        group.message, group.failures, self.failures = None, 0, 0
        # a full message more can go at once: what waits is many alerts, not many messages
        group.not_before_us = now_us + TOGETHER_US if len(group.waiting) < MAX_ALERTS else now_us

    def failed(self, message: Message, error: Exception, now_us: int) -> bool:
        """The receiver may not have it: it is tried again, later and later. True when that has been done for long enough."""
        group = self._group(message.alerts[0])
        group.failures += 1
        self.failures += 1
        if group.oldest_us < now_us - GIVE_UP_US:
            group.message, group.failures = None, 0
            return True
        wish_us = round((error.retry_after_s or 0.0) * 1e6) if isinstance(error, Undelivered) else 0
        group.not_before_us = now_us + self._backoff_us(group.failures)
        self._paused_until_us = now_us + max(self._backoff_us(self.failures), wish_us)
        return False

    def drain(self) -> list[Alert]:
        """Everything that waits; nothing does afterwards."""
        left = [alert for group in self._groups.values() for alert in (*_alerts(group.message), *group.waiting)]
        self._groups.clear()
        return left

    def waiting(self) -> set[str]:
        """The ids of what waits and is not in a message that is being tried."""
        return {alert.id for group in self._groups.values() for alert in group.waiting}

    def drop(self, ids: Container[str]) -> None:
        """Forget these among those that wait."""
        for group in self._groups.values():
            group.waiting = deque(alert for alert in group.waiting if alert.id not in ids)

    def _group(self, alert: Alert) -> _Group:
        return self._groups.setdefault((alert.kind, topic_of(alert), budget_of(alert)), _Group())

    def _next(self, now_us: int) -> _Group | None:
        if now_us < self._paused_until_us:
            return None
        if len(self._sent_us) == self._sent_us.maxlen and now_us < self._sent_us[0] + MINUTE_US:
            return None
        for key in [key for key, group in self._groups.items() if group.idle and now_us >= group.not_before_us]:
            del self._groups[key]
        ready = (group for key, group in self._groups.items() if now_us >= group.not_before_us and self._may_go(key))
        return min(ready, key=lambda group: group.oldest_us, default=None)

    def _may_go(self, key: tuple[str, str, str]) -> bool:
        """Whether something waits, and nobody would hear that it is over before hearing that it began."""
        kind, topic, budget = key
        begun = self._groups.get((topic, topic, budget)) if kind == "resolved" else None
        return not self._groups[key].idle and (begun is None or begun.idle)

    def _backoff_us(self, failures: int) -> int:
        """1, 2, 4 ... seconds, at most two minutes, with jitter: between half of it and all of it."""
        full_us = min(LAST_RETRY_US, FIRST_RETRY_US << min(failures - 1, 20))
        return full_us // 2 + self._random.randrange(full_us // 2 + 1)


def _alerts(message: Message | None) -> tuple[Alert, ...]:
    return message.alerts if message else ()
