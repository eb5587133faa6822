"""Accounts: one limit in one window, and the arithmetic of holding and booking amounts on it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

# An account is rebuilt at every step of the hot path: `tuple.__new__` takes half the time of a NamedTuple's own __new__.
_new = tuple.__new__

Kind = Literal["window", "rolling", "refill", "slots"]


# What a threshold does, from the mildest to the strictest.
ACTIONS = ("notify", "downgrade", "clamp", "throttle", "ask", "block", "kill")
# Those that hold for every reserve while spent + reserved is at the mark, and those that hold from its crossing on.
_BY_BALANCE = frozenset({"downgrade", "clamp", "throttle", "block"})
_BY_CROSSING = frozenset({"ask", "kill"})
STOPPING = frozenset({"ask", "block", "kill"})


class Mark(NamedTuple):
    """A threshold on its account: what happens from this amount on. `action`: one of ACTIONS, or "waived" by an operator."""

    at: int
    action: str


class Rule(NamedTuple):
    """An account's identity and the limit in force, as the policy states them. Amounts are integers in the unit.

    `period_us` is the length of a rolling window, or the time in which a refill account gains `limit`. `marks` rise.
    """

    key: str
    budget: str
    scope: str
    unit: str
    kind: Kind
    limit: int
    start_us: int = 0
    end_us: int | None = None
    period_us: int = 0
    enforce: bool = True
    marks: tuple[Mark, ...] = ()


class Account(NamedTuple):
    """One limit in one window. A refill account has a `level`: what is available now, negative when overdrawn.

    `crossed`: how many marks spending has reached; each is told once, and again only when the limit was raised above it or
    a rolling window has let it go.
    """

    rule: Rule
    spent: int = 0
    reserved: int = 0
    overrun: int = 0
    refused: int = 0
    refused_minute: int = 0
    refused_in_minute: int = 0
    level: int = 0
    remainder: int = 0
    at_us: int = 0
    buckets: tuple[tuple[int, int], ...] = ()
    crossed: int = 0

    @property
    def available(self) -> int:
        """`limit - spent - reserved`; for a refill account its level."""
        return self.level if self.rule.kind == "refill" else self.rule.limit - self.spent - self.reserved


def scope_budget(tags: Mapping[str, str]) -> str:
    """The name of the budget that a scope with these tags was opened with."""
    return ("scope " + " ".join(f"{tag}={value}" for tag, value in tags.items()))[:100]


def reached(rule: Rule, amount: int) -> int:
    """How many of the rule's marks lie at or below the amount."""
    return sum(amount >= mark.at for mark in rule.marks)


def under(account: Account, rule: Rule) -> Account:
    """The account under another limit: marks that spending is below again will be told again."""
    return account._replace(rule=rule, crossed=min(account.crossed, reached(rule, account.spent)))


def still_crossed(account: Account) -> int:
    """How many of the crossed marks spending is still above, where a rolling window lets it go; all of them elsewhere."""
    rule, crossed = account.rule, account.crossed
    return min(crossed, reached(rule, account.spent)) if rule.kind == "rolling" else crossed


def killed(account: Account) -> bool:
    """Whether spending has crossed a mark that stops what is in flight."""
    return any(mark.action == "kill" for mark in account.rule.marks[: still_crossed(account)])


def in_force(account: Account) -> tuple[int, ...]:
    """The indices of the marks that hold for a call that is to be reserved now."""
    balance, crossed = account.spent + account.reserved, still_crossed(account)
    return tuple(
        index
        for index, (at, action) in enumerate(account.rule.marks)
        if (action in _BY_BALANCE and balance >= at) or (action in _BY_CROSSING and index < crossed)
    )


def age(account: Account, now_us: int) -> Account:
    """The account as time has changed it: buckets that are wholly outside leave, a refill account gains."""
    rule = account.rule
    if rule.kind == "rolling":
        width = rule.period_us // 60
        oldest = (now_us - rule.period_us) // width
        if not account.buckets or account.buckets[0][0] >= oldest:
            return account
        buckets = tuple(bucket for bucket in account.buckets if bucket[0] >= oldest)
        return account._replace(buckets=buckets, spent=sum(amount for _, amount in buckets))
    if rule.kind == "refill":
        level, remainder, at_us = _refilled(rule, account.level, account.remainder, account.at_us, now_us)
        return account._replace(level=level, remainder=remainder, at_us=at_us)
    return account


def _refilled(rule: Rule, level: int, remainder: int, at_us: int, now_us: int) -> tuple[int, int, int]:
    """Level, remainder (what was gained of a further unit) and their time, `now_us` at the earliest."""
    if now_us <= at_us:
        return level, remainder, at_us
    gained, remainder = divmod((now_us - at_us) * rule.limit + remainder, rule.period_us)
    level += gained
    return (level, remainder, now_us) if level < rule.limit else (rule.limit, 0, now_us)


def hold(account: Account, amount: int, now_us: int) -> Account:
    """The account as it stands now with `amount` held on it, whether or not it fits."""
    rule, spent, reserved, overrun, refused, minute, in_minute, level, remainder, at_us, buckets, crossed = account
    if rule.kind == "window":
        pass
    elif rule.kind == "refill":
        level, remainder, at_us = _refilled(rule, level, remainder, at_us, now_us)
        level -= amount
    elif rule.kind == "rolling":
        _, spent, *_, buckets, _ = age(account, now_us)
    reserved += amount
    fields = (rule, spent, reserved, overrun, refused, minute, in_minute, level, remainder, at_us, buckets, crossed)
    return _new(Account, fields)


def book(account: Account, held: int, actual: int, reserved_us: int, now_us: int, overrun: int) -> Account:
    """Give back what was held and book what was spent, in the window that holds the reserve time.

    `crossed` stays as it was: the marks between it and `reached` are the caller's to tell.
    """
    rule, spent, reserved, over, refused, minute, in_minute, level, remainder, at_us, buckets, crossed = account
    kind = rule.kind
    if kind == "window":
        pass
    elif kind == "slots":
        actual = overrun = 0
    elif kind == "rolling":
        outside_us = now_us - rule.period_us
        buckets = _bucketed(age(account, now_us).buckets, rule.period_us // 60, reserved_us, actual, outside_us)
        spent = sum(amount for _, amount in buckets) - actual
    else:
        level, remainder, at_us = _refilled(rule, level, remainder, at_us, now_us)
        level += held - actual
        if level >= rule.limit:
            level, remainder = rule.limit, 0
    spent, reserved, over = spent + actual, reserved - held, over + overrun
    fields = (rule, spent, reserved, over, refused, minute, in_minute, level, remainder, at_us, buckets, crossed)
    return _new(Account, fields)


def _bucketed(
    buckets: tuple[tuple[int, int], ...], width: int, at_us: int, amount: int, outside_us: int
) -> tuple[tuple[int, int], ...]:
    index = at_us // width
    if index < outside_us // width:  # its bucket has left the window already
        return buckets
    sums = dict(buckets)
    sums[index] = sums.get(index, 0) + amount
    return tuple(sorted(sums.items()))


def until(account: Account, asked: int, now_us: int) -> int | None:
    """Microseconds until time alone makes room for `asked`, or None when it never does."""
    rule = account.rule
    if asked > rule.limit:
        return None
    if rule.kind == "refill":
        need = (asked - account.level) * rule.period_us - account.remainder
        return -(-need // rule.limit)
    if rule.kind == "rolling":
        width, room = rule.period_us // 60, account.available
        for index, amount in account.buckets:
            room += amount
            if room >= asked:
                return (index + 1) * width + rule.period_us - now_us
        return None
    return None if rule.end_us is None else rule.end_us - now_us


def may_free(account: Account, asked: int) -> bool:
    rule = account.rule
    return rule.kind != "refill" and account.reserved > 0 and asked <= rule.limit - account.spent
