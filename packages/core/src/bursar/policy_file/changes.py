"""What becomes of everything when one policy takes the place of another: every change has one outcome."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from bursar.accounts import Account, age
from bursar.budget import Budget, Limit, parse_limit
from bursar.policy import Policy
from bursar.policy_file.file import PolicyFile
from bursar.records import amount

NEW_ACCOUNTS = "new accounts, from zero; the old ones stay readable, and book what is in flight"
_OUTCOMES = {
    "match": "from the next reservation on it holds for the calls that it matches then; its accounts stay as they are",
    "thresholds": "from the next reservation on; ask and kill, where spending has passed them already, from the next "
    "settlement on",
    "estimate": "for calls reserved from now on",
    "on_exceed": "for calls reserved from now on",
    "on_unreachable": "for calls reserved from now on",
    "owner": "alerts go there from now on",
}
_MODES = {
    "enforce": "refuses from the next reservation on; what was spent while it was off is not counted",
    "shadow": "goes on counting, and refuses nothing",
    "off": "is not held against calls any more; its accounts stay readable, and miss what is spent from now on",
}
_SECTIONS = {
    "store": "is read at the start only: restart the programs; running ones keep all of their old policy",
    "operator": "is read at the start only: restart the programs; running ones keep all of their old policy",
    "require": "for calls reserved from now on",
    "default_limit": "for runs that no budget limits, from the next reservation on",
    "detectors": "what was seen of runs is forgotten: they are judged anew",
    "price": "for calls made from now on; what is in flight keeps its prices",
    "ceiling": "for calls made from now on; what is in flight keeps its prices",
    "tools": "for calls made from now on; what is in flight keeps its prices",
    "rates": "limits in other currencies change with them",
    "alert": "alerts that are not delivered yet go where the new entries say",
}


class Change(NamedTuple):
    """One change. `budget`: its name, or "" where it is about the file's other tables; `key`: what of it has changed."""

    budget: str
    key: str
    before: str
    after: str
    outcome: str

    @property
    def what(self) -> str:
        """The change alone, such as "limit 5 USD -> 4 USD"."""
        return f"{self.key} {self.before} -> {self.after}" if self.before and self.after else self.key


class Books(NamedTuple):
    """What a store holds at a time: its accounts, by which a change's outcome is told in figures."""

    accounts: Sequence[Account]
    policy: Policy
    now_us: int

    def live(self, budget: Budget) -> list[Account]:
        """The accounts that this budget, as it reads now, goes on with."""
        unit, window_name, _ = _identity(budget, self.policy)
        return [
            age(one, self.now_us)
            for one in self.accounts
            if one.rule.budget == budget.name
            and json.loads(one.rule.key)[1:3] == [unit, window_name]
            and list(json.loads(one.rule.scope)) == list(budget.per)
            and (one.rule.end_us is None or self.now_us < one.rule.end_us)
        ]

    def above_limit(self, accounts: Sequence[Account]) -> int:
        """How many of them have nothing left under the limits of the new policy."""
        found = (self.policy.in_force(one, self.now_us) for one in accounts)
        return sum(one.spent + one.reserved > one.rule.limit for one in found if one.rule.kind != "refill")


def compare(old: PolicyFile, new: PolicyFile, books: Books | None = None) -> list[Change]:
    """The changes from one policy to another, budgets first. `books`: the store's, under the new policy."""
    before, after = (Policy(one.make_budgets(), rates=one.rates) for one in (old, new))
    olds, news = ({budget.name: budget for budget in one.budgets} for one in (before, after))
    added = {name: budget for name, budget in news.items() if name not in olds}
    changes = []
    for name, budget in olds.items():
        if name in news:
            changes += _changed(budget, before, news[name], after, books)
            continue
        twin = next((one for one in added.values() if _but_name(one) == _but_name(budget)), None)
        if twin is None:
            outcome = (
                "ends for programs that follow this file; its accounts stay readable. The store still has it, for programs "
                "that take their budgets from there"
            )
            changes.append(Change(name, "removed", budget.limit, "", outcome))
        else:
            del added[twin.name]
            changes.append(Change(name, "renamed", name, twin.name, _from_where(twin, books) or NEW_ACCOUNTS))
    for name, budget in added.items():
        outcome = _from_where(budget, books) or "limits calls from the next reservation on, from zero"
        changes.append(Change(name, "added", "", budget.limit, outcome))
    return [*changes, *_sections(old, new)]


def _changed(old: Budget, before: Policy, new: Budget, after: Policy, books: Books | None) -> list[Change]:
    fresh = _identity(old, before) != _identity(new, after)
    found = []
    limits = parse_limit(old, before.rates), parse_limit(new, after.rates)
    if limits[0] != limits[1]:
        outcome = NEW_ACCOUNTS if fresh else _limit_outcome(limits[0].amount < limits[1].amount, new, books)
        found.append(Change(new.name, "limit", _limit(old, limits[0]), _limit(new, limits[1]), outcome))
    for key in ("window", "tz", "per"):
        if getattr(old, key) != getattr(new, key):
            found.append(Change(new.name, key, _said(getattr(old, key)), _said(getattr(new, key)), NEW_ACCOUNTS))
    for key, outcome in _OUTCOMES.items():
        one, other = getattr(old, key), getattr(new, key)
        if one != other:
            found.append(Change(new.name, key, _said(one), _said(other), outcome))
    if old.mode != new.mode:
        outcome = "goes on counting, and refuses" if (old.mode, new.mode) == ("shadow", "enforce") else _MODES[new.mode]
        found.append(Change(new.name, "mode", old.mode, new.mode, outcome))
    return found


def _identity(budget: Budget, policy: Policy) -> tuple[str, str, tuple[str, ...]]:
    """What tells a budget's accounts from others: of another unit, window, zone or `per` they are others."""
    unit, window_name = policy.account_name(budget)
    return unit, window_name, tuple(budget.per)


def _limit_outcome(raised: bool, budget: Budget, books: Books | None) -> str:
    if raised:
        return "from the next reservation on; thresholds that lie above what is spent again are told again"
    if books is None:
        return "from the next reservation on; accounts that have spent more refuse it, and nothing else changes"
    live = books.live(budget)
    above = books.above_limit(live)
    if not above:
        return f"from the next reservation on; 0 of {len(live)} accounts above it"
    return f"{above} of {len(live)} accounts above it: these refuse the next call, and nothing else changes"


def _from_where(budget: Budget, books: Books | None) -> str:
    live = [] if books is None else books.live(budget)
    spent = sum(one.spent for one in live)
    if not spent:
        return ""
    unit = live[0].rule.unit
    return f"goes on with the {len(live)} accounts that the store has of it, {amount(spent, unit)} {unit} spent in all"


def _but_name(budget: Budget) -> dict[str, object]:
    return {key: value for key, value in budget.definition().items() if key != "name"}


def _limit(budget: Budget, limit: Limit) -> str:
    """The limit as it is written; of another currency in US dollars too, where the change may be one of the rate."""
    return budget.limit if limit.unit in budget.limit else f"{budget.limit} ({amount(limit.amount, 'USD')} USD)"


def _said(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(_step(one) for one in value) or "(none)"
    if isinstance(value, dict):
        return " ".join(f"{tag}={_said(tuple(one)) if isinstance(one, list) else one}" for tag, one in value.items())
    return "(none)" if value is None else str(value)


def _step(value: object) -> str:
    return f"{value.at} {value.action}" if hasattr(value, "action") and hasattr(value, "at") else str(value)


def _sections(old: PolicyFile, new: PolicyFile) -> list[Change]:
    found = []
    for key, outcome in _SECTIONS.items():
        one, other = getattr(old, key), getattr(new, key)
        if one != other:
            plain = isinstance(one, str | None) and isinstance(other, str | None)
            before, after = (_said(one), _said(other)) if plain else ("", "")
            found.append(Change("", key, before, after, outcome))
    return found
