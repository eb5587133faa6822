"""The policy: all budgets in force, what operators decided, and the accounts that a call matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from json.encoder import encode_basestring as quoted  # what json.dumps makes of a text, with ensure_ascii=False
from math import ceil
from typing import NamedTuple

from bursar.accounts import Account, Mark, Rule, scope_budget
from bursar.budget import Budget, Limit, Threshold, parse_limit, usd_rate
from bursar.decisions import NO_DECISIONS, Decisions, Freeze
from bursar.errors import PolicyError
from bursar.scope import Scope
from bursar.windows import Window, window

NONE = "(none)"
MAX_BUDGETS = 1_000
_EVER_US = 2**62


class Matched(NamedTuple):
    """A budget and the account of it that a call belongs to."""

    budget: Budget
    rule: Rule


class Match(NamedTuple):
    """The accounts that a call matches from one time until another: then a window begins, or ends what was granted."""

    since_us: int
    until_us: int
    matched: tuple[Matched, ...]


def limits(rule: Rule) -> bool:
    """Whether this account bounds what a call may cost in all, rather than how many go at a time or how fast."""
    return rule.enforce and rule.kind in ("window", "rolling") and rule.unit != "failures"


def _window_name(budget: Budget, limit: Limit) -> str:
    return f"/{limit.period_us}" if limit.period_us else f"{budget.window} {budget.tz}"


class _Compiled:
    """One budget, ready to match calls."""

    __slots__ = ("_key", "_last", "budget", "decisions", "kind", "limit", "matches", "per", "window", "window_name")

    def __init__(self, budget: Budget, limit: Limit, decisions: Decisions = NO_DECISIONS) -> None:
        self.budget = budget
        self.limit = limit
        self.decisions = decisions
        self.per = tuple(budget.per)
        self.window: Window = window(budget.window, budget.tz)
        self.window_name = _window_name(budget, limit)
        if limit.unit == "slots":
            self.kind = "slots"
        elif limit.period_us:
            self.kind = "refill"
        else:
            self.kind = "rolling" if self.window.rolling_us else "window"
        self._key = ", ".join([quoted(budget.name), quoted(limit.unit), quoted(self.window_name)])
        self._last: tuple[tuple[str, ...], int, int, Rule] | None = None  # of which values, since and until when
        self.matches = tuple(
            (tag, _matcher((value,) if isinstance(value, str) else tuple(value)))
            for tag, value in (budget.match or {}).items()
        )

    def rule(self, tags: Mapping[str, str], now_us: int, *, leaf: bool) -> Rule | None:
        """The account of a call with these tags; None when the budget is not about it."""
        for tag, accepts in self.matches:
            if not accepts(tags.get(tag, NONE)):
                return None
        if not leaf and not all(tag in tags for tag in self.per):
            return None
        return self.account_rule(tags, now_us)

    def account_rule(self, tags: Mapping[str, str], now_us: int) -> Rule:
        """The account for these tags, matched or not."""
        values = tuple([tags.get(tag, NONE) for tag in self.per])
        last = self._last  # most budgets have the same account for the next run too
        if last is not None and last[0] == values and last[1] <= now_us < last[2]:
            return last[3]
        rule = self._rule_of(values, now_us)
        until_us = min(rule.end_us or _EVER_US, self.decisions.ends_us(rule.key, now_us))
        self._last = values, rule.start_us, until_us, rule
        return rule

    def _rule_of(self, values: tuple[str, ...], now_us: int) -> Rule:
        start_us, end_us = self.window.bounds(now_us)
        pairs = [f"{quoted(tag)}: {quoted(value)}" for tag, value in zip(self.per, values, strict=True)]
        scope = f"{{{', '.join(pairs)}}}"
        key = f"[{self._key}, {scope}, {start_us}]"  # JSON, which every store and record has as json.dumps writes it
        raised, waived = self.decisions.granted(key, now_us)
        limit = self.limit.amount + raised
        return Rule(
            key,
            self.budget.name,
            scope,
            self.limit.unit,
            self.kind,  # type: ignore[arg-type]
            limit,
            start_us,
            end_us,
            self.limit.period_us or self.window.rolling_us or 0,
            self.budget.mode == "enforce",
            tuple([_mark(one, limit, waived) for one in self.budget.ladder]),
        )


def throttle_rule(rule: Rule, rate: str) -> Rule:
    """The account of a threshold's rate, beside the account that reached it."""
    limit = parse_limit(Budget(rule.budget, rate))
    name = f"throttle /{limit.period_us}"
    key = json.dumps([rule.budget, limit.unit, name, json.loads(rule.scope), 0], ensure_ascii=False)
    return Rule(key, rule.budget, rule.scope, limit.unit, "refill", limit.amount, period_us=limit.period_us)


def _mark(threshold: Threshold, limit: int, waived: bool) -> Mark:
    at = ceil(threshold.share * limit)  # at 50% of 1 it is not reached by 0
    return Mark(at, "waived" if waived and threshold.action == "ask" else threshold.action)


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    exact = frozenset(pattern for pattern in patterns if not set(pattern) & set("*?["))
    globs = tuple(pattern for pattern in patterns if pattern not in exact)
    return lambda value: value in exact or any(fnmatchcase(value, pattern) for pattern in globs)


class Policy:
    """All budgets in force, in the version that the store gave them."""

    CACHE = 1_024  # calls that differ in what budgets ask for

    def __init__(
        self,
        budgets: Iterable[Budget],
        *,
        version: int = 0,
        rates: Mapping[str, str] | None = None,
        decisions: Decisions = NO_DECISIONS,
        default: Budget | None = None,
    ) -> None:
        self.budgets = tuple(budgets)
        self.version = version
        self.decisions = decisions
        self.rates = dict(rates or {})
        self.default = default
        if not all(isinstance(budget, Budget) for budget in self.budgets):
            raise PolicyError('A policy holds budgets. Write each as Budget("name", limit="5 USD").', key="budgets")
        for currency in self.rates:
            usd_rate(self.rates, currency)
        names = [budget.name for budget in (*self.budgets, *([] if default is None else [default]))]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PolicyError(
                f"Two budgets are named {twice!r}. Give each a name of its own.", budget=twice, key="name"
            )
        if len(self.budgets) > MAX_BUDGETS:
            raise PolicyError(f"A policy holds at most {MAX_BUDGETS} budgets. Use `per` instead of one budget each.")
        compiled = [
            _Compiled(budget, parse_limit(budget, self.rates), decisions)
            for budget in self.budgets
            if budget.mode != "off"
        ]
        self._default = None if default is None else _Compiled(default, parse_limit(default, self.rates), decisions)
        # the most granular budget first: refusals name the first account that is short
        self._compiled = sorted(compiled, key=lambda one: (-len(one.per) - len(one.matches), one.budget.name))
        every = self._compiled if self._default is None else [*self._compiled, self._default]
        self._tags = tuple({tag for one in every for tag in (*one.per, *(name for name, _ in one.matches))})
        self._cache: dict[tuple[object, ...], Match] = {}

    def match(
        self,
        scope: Scope,
        units: tuple[str, ...],
        now_us: int,
        provider: str = "",
        model: str = "",
        tool: str = "",
        connection: str = "",
    ) -> tuple[Matched, ...]:
        """The accounts of a call in this scope that count any of `units`, ancestors' accounts included."""
        return self.matching(scope, units, now_us, provider, model, tool, connection).matched

    def matching(
        self, scope: Scope, units: tuple[str, ...], now_us: int, provider: str, model: str, tool: str, connection: str
    ) -> Match:
        """As `match`, and how long it is so."""
        # only what budgets ask for: else every run would be matched anew
        asked = scope.key if scope.limits else tuple([tags.get(tag) for tags in scope.path for tag in self._tags])
        key = (asked, provider, model, tool, connection, units)
        held = self._cache.get(key)
        if held is not None and held.since_us <= now_us < held.until_us:
            return held
        own = {"provider": provider, "model": model, "tool": tool, "connection": connection}
        own = {tag: value for tag, value in own.items() if value}
        matched = self._match(scope, own, units, now_us)
        if len(self._cache) >= self.CACHE:
            self._cache.clear()
        since = max([one.rule.start_us for one in matched], default=0)
        ends = [one.rule.end_us or _EVER_US for one in matched]
        ends += [one.window.bounds(now_us)[1] or _EVER_US for one in self._compiled]
        ends += [self.decisions.ends_us(one.rule.key, now_us) for one in matched]
        held = self._cache[key] = Match(since, min(ends, default=_EVER_US), matched)
        return held

    def _match(self, scope: Scope, own: dict[str, str], units: tuple[str, ...], now_us: int) -> tuple[Matched, ...]:
        found: dict[str, Matched] = {}
        levels = [({**tags, **own}, tags is scope.path[-1]) for tags in reversed(scope.path)]
        for one in (*self._scoped(scope), *self._compiled):
            if one.limit.unit not in units:
                continue
            for tags, leaf in levels:
                rule = one.rule(tags, now_us, leaf=leaf)
                # a scope inside another with the same tags shares its account: it may limit further, not lift
                if rule is not None and (rule.key not in found or rule.limit < found[rule.key].rule.limit):
                    found[rule.key] = Matched(one.budget, rule)
        default = self._default
        if default is not None and default.limit.unit in units and not any(limits(one.rule) for one in found.values()):
            rule = default.account_rule(levels[0][0], now_us)
            found[rule.key] = Matched(default.budget, rule)
        return tuple(found.values())

    def stop(self, scope: Scope, own: Mapping[str, str], matched: Iterable[Matched]) -> Freeze | None:
        """The switch that stops a call in this scope with these tags of its own, if one is thrown."""
        if not self.decisions.any_stopped:
            return None
        levels = [{**tags, **own} for tags in scope.path]
        return self.decisions.stop(levels, (one.rule.key for one in matched))

    def account_name(self, budget: Budget) -> tuple[str, str]:
        """The unit and the window's name, by which a budget's accounts are known."""
        limit = parse_limit(budget, self.rates)
        return limit.unit, _window_name(budget, limit)

    def accepts(self, budget: Budget, tag: str, value: str) -> bool:
        """Whether a budget of this policy is about calls with this value of a tag."""
        one = next(one for one in self._compiled if one.budget.name == budget.name)
        return all(accepts(value) for name, accepts in one.matches if name == tag)

    def check_limit(self, limit: str) -> None:
        """Raise PolicyError for a limit that a scope cannot be opened with."""
        parse_limit(Budget("scope", limit), self.rates)

    def in_force(self, account: Account, now_us: int) -> Account:
        """The account under the limit that its next call will meet: the newest definition of its budget, and what was raised."""
        rule = account.rule
        one = next((one for one in self._compiled if one.budget.name == rule.budget), None)
        if one is None:
            return account
        limit = one.limit.amount + self.decisions.granted(rule.key, now_us)[0]
        own = json.loads(rule.key)[1:3] == [
            one.limit.unit,
            one.window_name,
        ]  # else of an earlier definition, or a throttle's
        return account._replace(rule=rule._replace(limit=limit)) if own else account

    def fresh_accounts(self, now_us: int) -> list[Account]:
        """The accounts, as yet unused, of the budgets that have one account for all calls."""
        rules = [one.account_rule({}, now_us) for one in self._compiled if not one.per]
        return [Account(rule, level=rule.limit if rule.kind == "refill" else 0, at_us=now_us) for rule in rules]

    def _scoped(self, scope: Scope) -> list[_Compiled]:
        """The budgets that scopes were opened with, innermost first; each holds for its own tags' values."""
        scoped = []
        for tags, limit in reversed(scope.limits):
            exact = {tag: re.sub(r"([*?[])", r"[\1]", value) for tag, value in tags.items()}  # values, not patterns
            budget = Budget(scope_budget(tags), limit, match=exact, per=tuple(tags))
            scoped.append(_Compiled(budget, parse_limit(budget, self.rates), self.decisions))
        return scoped
