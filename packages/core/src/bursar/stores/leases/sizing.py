"""Sizing: which calls are made out of leases, and how much a lease asks for. Amounts are integers in the unit."""

from __future__ import annotations

from collections.abc import Iterable

from bursar.accounts import Account
from bursar.commands import Reserve

HOT_PER_S = 5.0  # calls a second from which on a lease is worth its round trips
# Where the store is slow, calls come seldom because they wait for it: so many in a row that wait for this share of the time
# until the next one are as good. Where it takes less than 50 ms they are hot anyway.
SLOW_IN_A_ROW = 5
SLOW_SHARE = 4
HORIZON_S = 1.0  # how long a lease is to last
# The most that a lease takes of what is available. What silent processes hold when a budget runs out is stranded: with two of
# eight silent since the beginning, 2/256.
SHARE = 256
MIN_CALLS = 16  # fewer are not worth the round trips
MAX_CALLS = 20_000
_ACTING = frozenset({"downgrade", "clamp", "throttle", "ask", "block", "kill"})


class Demand:
    """How often calls on the same accounts come, whether they wait for the store, and when a lease may be asked for again."""

    __slots__ = ("_last_us", "_waited_us", "begun_us", "count", "not_before_us", "rate", "slow")

    def __init__(self, now_us: int) -> None:
        self.begun_us = now_us
        self.count = 0
        self.rate = 0.0
        self.slow = 0  # calls in a row that waited long
        self.not_before_us = 0
        self._last_us = now_us
        self._waited_us = 0

    def note(self, now_us: int) -> None:
        """One more call."""
        passed_us = now_us - self.begun_us
        if passed_us >= 1_000_000:
            self.rate = self.count * 1e6 / passed_us
            self.begun_us, self.count = now_us, 0
        self.count += 1
        if self._waited_us:
            self.slow = self.slow + 1 if SLOW_SHARE * self._waited_us >= now_us - self._last_us else 0
        self._last_us, self._waited_us = now_us, 0

    def waited(self, us: int) -> None:
        """So long the last call has waited for the shared store."""
        self._waited_us = us

    def used_up(self, made: int, passed_us: int) -> None:
        """So many calls took all of a lease in that time: they come at least so fast, if only the next one lets them."""
        self.rate = max(self.rate, made * 1e6 / max(passed_us, 1))

    def calls(self) -> int:
        """How many calls a lease is to last for; 0 where they come too seldom."""
        rate = max(self.rate, float(self.count))
        hot = rate >= HOT_PER_S or self.slow >= SLOW_IN_A_ROW
        return min(max(int(rate * HORIZON_S), MIN_CALLS), MAX_CALLS) if hot else 0


def leasable(command: Reserve) -> bool:
    """Whether a call may be made out of a lease at all.

    Not where its id was given (others may use it again), others wait who came before, or a threshold asks for steps; and on
    windows that are enforced alone: rates and slots are for all processes at once.
    """
    return not (command.digest or command.behind or command.complied) and all(
        rule.kind == "window" and rule.enforce for rule, _ in command.lines
    )


def amounts(command: Reserve, accounts: Iterable[Account], calls: int) -> tuple[int, ...] | None:
    """What a lease for so many calls like this one asks of each of its lines; None where too little is left for one.

    Of a unit the same on each account. Never so much that the balance reaches a mark that acts on the next call.
    """
    asked: dict[str, int] = {}
    share: dict[str, int] = {}
    for (rule, amount), account in zip(command.lines, accounts, strict=True):
        balance = account.spent + account.reserved
        room = (rule.limit - balance) // SHARE
        marks = [mark.at - 1 - balance for mark in rule.marks if mark.action in _ACTING and mark.at > balance]
        room = min([room, *marks])
        asked[rule.unit] = max(asked.get(rule.unit, 0), amount)
        share[rule.unit] = min(share.get(rule.unit, room), room)
    for unit, amount in asked.items():
        if amount:
            calls = min(calls, share[unit] // amount)
    if calls < MIN_CALLS:
        return None
    return tuple(asked[rule.unit] * calls for rule, _ in command.lines)
