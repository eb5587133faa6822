"""The balance of one account as a reckoning keeps it, and how many turns of a loop leave it as it is."""

from __future__ import annotations

from collections import deque

from bursar.accounts import Rule

FOREVER = 2**62


class Balance:
    """What one account has spent. A rate's `level` is counted in amount x microseconds of its period, so that it is exact.

    `is_killed`: a mark that kills was reached; it stays so when a rolling window has let it go.
    """

    __slots__ = ("at_us", "buckets", "is_killed", "level", "rule", "spent")

    def __init__(self, rule: Rule, now_us: int) -> None:
        self.rule = rule
        self.spent = 0
        self.is_killed = False
        self.buckets: deque[list[int]] = deque()  # of a rolling window: [index, amount], oldest first
        self.level, self.at_us = rule.limit * rule.period_us, now_us

    def age(self, now_us: int) -> None:
        rule = self.rule
        if rule.kind == "rolling":
            oldest = (now_us - rule.period_us) // (rule.period_us // 60)
            while self.buckets and self.buckets[0][0] < oldest:
                self.spent -= self.buckets.popleft()[1]
        elif rule.kind == "refill":
            gained = (now_us - self.at_us) * rule.limit
            self.level, self.at_us = min(rule.limit * rule.period_us, self.level + gained), now_us

    def has_room(self, amount: int, limit: int) -> bool:
        if self.rule.kind == "refill":
            return self.level >= amount * self.rule.period_us
        return self.rule.kind == "slots" or self.spent + amount <= limit

    def book(self, amount: int, now_us: int) -> None:
        if self.rule.kind == "refill":
            self.level -= amount * self.rule.period_us
        elif self.rule.kind != "slots":
            self.spent += amount
        if self.rule.kind == "rolling":
            index = now_us // (self.rule.period_us // 60)
            if not self.buckets or self.buckets[-1][0] != index:
                self.buckets.append([index, 0])
            self.buckets[-1][1] += amount
        self.is_killed = self.is_killed or any(self.spent >= at for at, action in self.rule.marks if action == "kill")

    def wait_us(self, need: int, limit: int, now_us: int) -> int | None:
        """How long until time alone makes room for `need`; None when it never does."""
        rule = self.rule
        if need > limit:
            return None
        if rule.kind == "refill":
            return -(-(need * rule.period_us - self.level) // rule.limit)
        if rule.kind == "rolling":
            left = self.spent
            for index, amount in self.buckets:
                left -= amount
                if left + need <= limit:
                    return (index + 1) * (rule.period_us // 60) + rule.period_us - now_us
            return None
        return None if rule.end_us is None else rule.end_us - now_us

    def marks(self) -> int:
        """How many marks the spending has reached."""
        return sum(self.spent >= mark.at for mark in self.rule.marks)

    def turns(self, moves: list[tuple[int, int]], next_us: int, interval_us: int) -> int:
        """How many more turns of these (held, actual) bring nothing new, the first of them at `next_us`."""
        rule = self.rule
        each = sum(actual for _, actual in moves)
        before = peak = 0
        for held, actual in moves:
            peak = max(peak, before + held)
            before += actual
        if rule.kind == "slots":
            return FOREVER
        self.age(next_us)
        if rule.kind == "refill":
            loss, spare = each * rule.period_us - interval_us * rule.limit, self.level - peak * rule.period_us
            return 0 if spare < 0 else FOREVER if loss <= 0 else spare // loss + 1
        if self._is_never_full(each, peak, interval_us):
            return FOREVER
        end_us = FOREVER if rule.end_us is None else rule.end_us
        if rule.kind == "rolling":  # the next bucket begins, or the oldest leaves
            width = rule.period_us // 60
            end_us = (next_us // width + 1) * width
            if self.buckets:
                end_us = min(end_us, (self.buckets[0][0] + 1) * width + rule.period_us)
        found = [-(-(end_us - next_us) // interval_us)]
        if each:
            found.append((rule.limit - self.spent - peak) // each + 1)
            found += [(mark.at - self.spent - 1) // each for mark in rule.marks if mark.at > self.spent][:1]
        return max(0, min(found))

    def _is_never_full(self, each: int, peak: int, interval_us: int) -> bool:
        """Whether at this pace no window ever comes to a mark or its limit, with what is spent in this one already."""
        rule = self.rule
        if rule.kind == "rolling":
            length_us = rule.period_us + rule.period_us // 60
        elif rule.end_us is not None:
            length_us = (rule.end_us - rule.start_us) * 5 // 4  # months and days with a change of the clocks differ
        else:
            return False
        most = self.spent + -(-length_us // interval_us) * each + peak
        return most <= rule.limit and all(most < mark.at for mark in rule.marks)

    def skip(self, count: int, moves: list[tuple[int, int]], next_us: int, interval_us: int) -> None:
        """Book `count` turns, the first of them at `next_us`."""
        self.age(next_us)
        each, rule = sum(actual for _, actual in moves), self.rule
        if not each and rule.kind != "refill":
            return
        if rule.kind == "refill":
            gained = (count - 1) * (interval_us * rule.limit - each * rule.period_us)
            self.level = min(rule.limit * rule.period_us, self.level + gained) - each * rule.period_us
            self.at_us = next_us + (count - 1) * interval_us
            return
        if rule.kind != "rolling":
            self.book(count * each, next_us)
            return
        width, last_us = rule.period_us // 60, next_us + (count - 1) * interval_us
        for index in range(max(next_us, last_us - rule.period_us) // width, last_us // width + 1):
            begins, ends = (
                min(count, max(0, turns_until(at * width, next_us, interval_us))) for at in (index, index + 1)
            )
            if begins < ends:
                self.book((ends - begins) * each, index * width)


def turns_until(at_us: int, first_us: int, interval_us: int) -> int:
    """How many turns come before a time, the first of them at `first_us`."""
    return -(-(at_us - first_us) // interval_us)
