"""Stands: how every account must stand, worked out by the auditor from what happened to it, in the plainest terms.

Nothing here comes from the law: a budget is read from its published definition, an account from its key.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

NANOS = 10**9
PERIODS_US = {"second": 1_000_000, "minute": 60_000_000, "hour": 3_600_000_000, "day": 86_400_000_000}
STOPPING = ("ask", "block", "kill")
BY_BALANCE = ("downgrade", "clamp", "throttle", "block")
BY_CROSSING = ("ask", "kill")


class Spec:
    """A budget as it was published."""

    def __init__(self, definition: dict[str, Any]) -> None:
        self.name = definition["name"]
        amount, self.unit = definition["limit"].split("/")[0].split(" ")
        self.limit = int(Decimal(amount) * (NANOS if self.unit == "USD" else 1))
        self.rate_us = PERIODS_US[definition["limit"].split("/")[1]] if "/" in definition["limit"] else 0
        self.window = definition["window"]
        self.strict = definition["estimate"] == "strict"
        self.enforce = definition["mode"] == "enforce"
        self.open = definition["on_unreachable"] == "open"
        self.marks = tuple(
            (-(-self.limit * int(one["at"].rstrip("%")) // 100), one["action"]) for one in definition["thresholds"]
        )

    def begins(self, now_us: int) -> int:
        """Where the window begins that holds the instant; 0 where there is but one."""
        length_us = PERIODS_US.get(self.window, 0)
        return now_us // length_us * length_us if length_us else 0


class Stand:
    """One account. `level` of a rate is counted in units times its period, so that it stays a whole number."""

    __slots__ = (
        *("at_us", "buckets", "held", "key", "level", "overrun", "refused"),
        *("rolling_us", "spec", "spent", "told", "top"),
    )

    def __init__(self, key: str, spec: Spec, now_us: int) -> None:
        self.key = key
        self.spec = spec
        self.rolling_us = int(spec.window[8:-1]) * 60_000_000 if spec.window.startswith("rolling") else 0
        self.held = self.spent = self.overrun = self.told = 0
        self.buckets: dict[int, int] = {}
        self.level = spec.limit * spec.rate_us
        self.at_us = now_us
        self.top = spec.limit
        self.refused: dict[int, int] = {}

    def take(self, spec: Spec) -> None:
        """Another definition is in force: marks that spending lies below now are told again."""
        if spec is not self.spec:
            self.spec = spec
            self.told = min(self.told, self.reached(self.spent))
            self.top = max(self.top, spec.limit)

    def look(self, now_us: int) -> None:
        """Let time do its work."""
        if self.rolling_us:
            width_us = self.rolling_us // 60
            gone = [index for index in self.buckets if (index + 1) * width_us + self.rolling_us <= now_us]
            for index in gone:
                self.spent -= self.buckets.pop(index)
            self.at_us = max(self.at_us, now_us)
        elif self.spec.rate_us and now_us > self.at_us:
            gained = self.level + (now_us - self.at_us) * self.spec.limit
            self.level, self.at_us = min(self.spec.limit * self.spec.rate_us, gained), now_us

    def available(self) -> int:
        """What is left, as of the last look."""
        if self.spec.rate_us:
            return self.level // self.spec.rate_us
        return self.spec.limit - self.spent - self.held

    def hold(self, amount: int) -> None:
        self.held += amount
        self.level -= amount * self.spec.rate_us

    def move(self, back: int, spent: int, reserved_us: int, now_us: int, over: int) -> list[int]:
        """Give back and book; the marks that have been reached by this for the first time."""
        self.look(now_us)
        self.held -= back
        if self.spec.unit == "slots":
            return []
        told = min(self.told, self.reached(self.spent)) if self.rolling_us else self.told
        self.overrun += over
        if self.rolling_us:
            index = reserved_us // (self.rolling_us // 60)
            if (index + 1) * (self.rolling_us // 60) + self.rolling_us > now_us:
                self.buckets[index] = self.buckets.get(index, 0) + spent
                self.spent += spent
        else:
            self.spent += spent
        if self.spec.rate_us:
            full = self.spec.limit * self.spec.rate_us
            self.level = min(full, self.level + (back - spent) * self.spec.rate_us)
        reached = self.reached(self.spent)
        if reached <= told:
            return []
        self.told = reached
        return list(range(told, reached))

    def reached(self, amount: int) -> int:
        return sum(amount >= at for at, _ in self.spec.marks)

    def acting(self) -> list[int]:
        """The marks that act on a call that is reserved now."""
        balance = self.spent + self.held
        told = min(self.told, self.reached(self.spent)) if self.rolling_us else self.told
        return [
            index
            for index, (at, action) in enumerate(self.spec.marks)
            if (action in BY_BALANCE and balance >= at) or (action in BY_CROSSING and index < told)
        ]

    def differs(self, row: Any) -> str:
        """What of the store's row is not as it must be; nothing where all is."""
        if row.reserved != self.held:
            return f"I2: {self.key} has {row.reserved} reserved, its open reservations hold {self.held}"
        if row.overrun != self.overrun:
            return f"I1: {self.key} tells of an overrun of {row.overrun}, it is {self.overrun}"
        if row.crossed != self.told and not self.rolling_us:
            return f"I10: {self.key} has told {row.crossed} marks, it has crossed {self.told}"
        if self.rolling_us:
            width_us = self.rolling_us // 60
            held = {i: v for i, v in row.buckets if (i + 1) * width_us + self.rolling_us > self.at_us}
            if held != self.buckets:
                return f"I3: {self.key} has the buckets {row.buckets}, what was spent is {self.buckets}"
        elif row.spent != self.spent:
            return f"I3: {self.key} has {row.spent} spent, what was settled is {self.spent}"
        if self.spec.rate_us and row.at_us == self.at_us:
            level = row.level * self.spec.rate_us + row.remainder
            if level != self.level:
                return f"I3: {self.key} has a level of {level}, it is {self.level}"
        return ""
