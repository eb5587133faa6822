"""The policy: budgets as their owners write them, and the accounts that a call matches."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from bursar.accounts import Account, Rule
from bursar.errors import InvalidInput, PolicyError
from bursar.money import MAX_NANOS, NANOS_PER_USD, nanos
from bursar.scope import Scope
from bursar.windows import SECOND_US, Window, window

UNITS = ("USD", "tokens", "requests", "calls", "slots")
NONE = "(none)"
MAX_BUDGETS = 1_000
MAX_WAIT_S = 600.0
# commas only between thousands: "1,50 USD" is somebody's 1.50, and must not become 150
_NUMBER = r"\d{1,3}(?:[,_]\d{3})+(?:\.\d{1,30})?|\d{1,30}(?:\.\d{1,30})?"
_LIMIT = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]+)(?:\s*/\s*(second|minute|hour|day))?\s*", re.ASCII)
_WAIT = re.compile(r"wait(?: (\d+(?:\.\d+)?)(ms|s|m))?")
_PERIODS_US = {name: s * SECOND_US for name, s in {"second": 1, "minute": 60, "hour": 3_600, "day": 86_400}.items()}
_CHOICES = {
    "estimate": ("learned", "strict"),
    "on_unreachable": ("closed", "open"),
    "mode": ("enforce", "shadow", "off"),
}


class Limit(NamedTuple):
    """An amount in a unit; with `period_us` it is a rate, refilled continuously."""

    amount: int
    unit: str
    period_us: int = 0


@dataclass(frozen=True)
class Budget:
    """A limit on a scope over a window.

    `limit`: "5 USD", "4.50 EUR" (at the rate given to Bursar), "200_000 tokens", "60 requests/minute", "20 calls" (of tools),
    "8 slots" (in flight). `window`: total, minute, hour, day, week, month, quarter, year (of `tz`), or "rolling 10m".
    `per`: one account for each value of these tags. `match`: only calls whose tags have these values (`*` and lists allowed).
    `estimate`: "learned", or "strict" for an upper bound. `on_exceed`: "refuse", "wait" or "wait 30s". `on_unreachable`:
    "closed" refuses calls while the store is out of reach, "open" lets them go and books them later. `mode`: "enforce",
    "shadow" (counts, never refuses) or "off". `owner`: who is to be asked, named in refusals. Raises PolicyError.
    """

    name: str
    limit: str
    window: str = "total"
    tz: str = "UTC"
    per: Sequence[str] | str = ()
    match: Mapping[str, str | Sequence[str]] | None = field(default=None, hash=False)
    estimate: str = "learned"
    on_exceed: str = "refuse"
    on_unreachable: str = "closed"
    mode: str = "enforce"
    owner: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not 0 < len(self.name) <= 100 or not self.name.isprintable():
            raise _bad(self, "name", self.name, "Use 1 to 100 printable characters")
        object.__setattr__(self, "per", _texts(self, "per", self.per))
        _check_match(self)
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise _bad(self, key, getattr(self, key), f"Use one of {', '.join(choices)}")
        limit = parse_limit(self)
        for key, value in (("window", self.window), ("tz", self.tz)):
            if not isinstance(value, str):
                raise _bad(self, key, value, "Use text")
        try:
            window(self.window, self.tz)
        except InvalidInput as error:
            key = "window" if "window" in error.fields else "tz"
            raise PolicyError(f"The budget {self.name!r}: {error}", budget=self.name, key=key) from error
        if limit.period_us and self.window != "total":
            raise _bad(self, "window", self.window, "A rate refills by itself: leave the window out")
        if limit.unit == "slots" and self.window != "total":
            raise _bad(self, "window", self.window, "Slots are free when calls end: leave the window out")
        if self.owner is not None and not (isinstance(self.owner, str) and self.owner.isprintable()):
            raise _bad(self, "owner", self.owner, "Use printable text")
        _ = self.wait_s

    @property
    def wait_s(self) -> float:
        """How long a call may wait for headroom, in seconds; 0 for "refuse"."""
        if self.on_exceed == "refuse":
            return 0.0
        found = _WAIT.fullmatch(self.on_exceed) if isinstance(self.on_exceed, str) else None
        if found is None:
            raise _bad(self, "on_exceed", self.on_exceed, 'Use "refuse", "wait" or "wait 30s"')
        seconds = float(found[1]) * {"ms": 0.001, "s": 1.0, "m": 60.0}[found[2]] if found[1] else MAX_WAIT_S
        return min(seconds, MAX_WAIT_S)

    def definition(self) -> dict[str, Any]:
        """The budget as plain data; `Budget(**definition)` gives it back."""
        plain = asdict(self)
        plain["per"] = list(self.per)
        if self.match is not None:
            plain["match"] = {
                tag: value if isinstance(value, str) else list(value) for tag, value in self.match.items()
            }
        return plain


def _bad(budget: Budget, key: str, value: object, remedy: str) -> PolicyError:
    return PolicyError(f"The budget {budget.name!r} has {key} = {value!r}. {remedy}.", budget=budget.name, key=key)


def _texts(budget: Budget, key: str, given: object) -> tuple[str, ...]:
    """One name or several, each once."""
    found = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Sequence) else None
    if found is None or not all(isinstance(one, str) and one.isprintable() for one in found):
        raise _bad(budget, key, given, "Use a text or a list of texts")
    if len(set(found)) != len(found) or "" in found:
        raise _bad(budget, key, given, "Name each once")
    return found


def _check_match(budget: Budget) -> None:
    if budget.match is None:
        return
    if not isinstance(budget.match, Mapping) or not all(isinstance(tag, str) and tag for tag in budget.match):
        raise _bad(budget, "match", budget.match, 'Write it like {"team": "research"} or {"model": ["gpt-*", "o*"]}')
    for tag, value in budget.match.items():
        if not _texts(budget, "match", value):
            raise _bad(budget, "match", budget.match, f"Give {tag} a value, or leave it out")


def _usd_rate(rates: Mapping[str, str], currency: str) -> Decimal:
    """US dollars per unit of a currency, as Bursar was given it."""
    rate = rates[currency]
    found = re.fullmatch(r"\d{1,9}(\.\d{1,12})?", rate, re.ASCII) if isinstance(rate, str) else None
    if found is None or not Decimal(rate):
        raise PolicyError(
            f'rates[{currency!r}] = {rate!r} is no rate. Write it like "1.08", US dollars each.', key="rates"
        )
    return Decimal(rate)


def parse_limit(budget: Budget, rates: Mapping[str, str] | None = None) -> Limit:
    """The budget's limit as an integer amount in its unit; other currencies at `rates`, US dollars per unit of them.

    Without `rates` another currency is taken as it stands, to check its form. Raises PolicyError.
    """
    found = _LIMIT.fullmatch(budget.limit) if isinstance(budget.limit, str) else None
    if found is None:
        raise _bad(budget, "limit", budget.limit, 'Write it like "5 USD", "60 requests/minute" or "8 slots"')
    number, unit, period = Decimal(found[1].replace("_", "").replace(",", "")), found[2], found[3]
    period_us = _PERIODS_US[period] if period else 0
    if unit.isupper() and len(unit) == 3:
        if unit != "USD" and rates is not None:
            if unit not in rates:
                raise _bad(budget, "limit", budget.limit, f'Give Bursar the rate: rates={{"{unit}": "1.08"}} USD each')
            number *= _usd_rate(rates, unit)
        if number > MAX_NANOS // NANOS_PER_USD:
            raise _bad(budget, "limit", budget.limit, f"An account holds up to {MAX_NANOS // NANOS_PER_USD} USD")
        amount, unit = nanos(number), "USD"
    elif unit in UNITS:
        if number != int(number) or number > 2**53:
            raise _bad(budget, "limit", budget.limit, "Use a whole number")
        amount = int(number)
    else:
        raise _bad(budget, "limit", budget.limit, f"Use one of {', '.join(UNITS)}, or a currency")
    if period_us and unit == "slots":
        raise _bad(budget, "limit", budget.limit, 'Slots are calls in flight: write "8 slots"')
    if amount <= 0:
        raise _bad(budget, "limit", budget.limit, 'Use an amount above 0; mode = "off" switches a budget off')
    return Limit(amount, unit, period_us)


class Matched(NamedTuple):
    """A budget and the account of it that a call belongs to."""

    budget: Budget
    rule: Rule


class _Compiled:
    """One budget, ready to match calls."""

    __slots__ = ("budget", "kind", "limit", "matches", "per", "window", "window_name")

    def __init__(self, budget: Budget, limit: Limit) -> None:
        self.budget = budget
        self.limit = limit
        self.per = tuple(budget.per)
        self.window: Window = window(budget.window, budget.tz)
        self.window_name = f"/{limit.period_us}" if limit.period_us else f"{budget.window} {budget.tz}"
        if limit.unit == "slots":
            self.kind = "slots"
        elif limit.period_us:
            self.kind = "refill"
        else:
            self.kind = "rolling" if self.window.rolling_us else "window"
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
        scope = {tag: tags.get(tag, NONE) for tag in self.per}
        start_us, end_us = self.window.bounds(now_us)
        limit = self.limit
        return Rule(
            json.dumps([self.budget.name, limit.unit, self.window_name, scope, start_us], ensure_ascii=False),
            self.budget.name,
            json.dumps(scope, ensure_ascii=False),
            limit.unit,
            self.kind,  # type: ignore[arg-type]
            limit.amount,
            start_us,
            end_us,
            limit.period_us or self.window.rolling_us or 0,
            self.budget.mode == "enforce",
        )


def _matcher(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    exact = frozenset(pattern for pattern in patterns if not set(pattern) & set("*?["))
    globs = tuple(pattern for pattern in patterns if pattern not in exact)
    return lambda value: value in exact or any(fnmatchcase(value, pattern) for pattern in globs)


class Policy:
    """All budgets in force, in the version that the store gave them."""

    CACHE = 4_096

    def __init__(self, budgets: Iterable[Budget], *, version: int = 0, rates: Mapping[str, str] | None = None) -> None:
        self.budgets = tuple(budgets)
        self.version = version
        self.rates = dict(rates or {})
        if not all(isinstance(budget, Budget) for budget in self.budgets):
            raise PolicyError('A policy holds budgets. Write each as Budget("name", limit="5 USD").', key="budgets")
        for currency in self.rates:
            _usd_rate(self.rates, currency)
        names = [budget.name for budget in self.budgets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PolicyError(f"Two budgets are named {twice!r}. Give each a name of its own.", key="name")
        if len(names) > MAX_BUDGETS:
            raise PolicyError(f"A policy holds at most {MAX_BUDGETS} budgets. Use `per` instead of one budget each.")
        compiled = [
            _Compiled(budget, parse_limit(budget, self.rates)) for budget in self.budgets if budget.mode != "off"
        ]
        # the most granular budget first: refusals name the first account that is short
        self._compiled = sorted(compiled, key=lambda one: (-len(one.per) - len(one.matches), one.budget.name))
        self._cache: dict[tuple[str, ...], tuple[int, int, tuple[Matched, ...]]] = {}

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
        key = (scope.key, provider, model, tool, connection, *units)
        held = self._cache.get(key)
        if held is not None and held[0] <= now_us < held[1]:
            return held[2]
        own = {"provider": provider, "model": model, "tool": tool, "connection": connection}
        own = {tag: value for tag, value in own.items() if value}
        matched = self._match(scope, own, units, now_us)
        if len(self._cache) >= self.CACHE:
            self._cache.clear()
        since = max((one.rule.start_us for one in matched), default=0)
        until = min((one.rule.end_us for one in matched if one.rule.end_us is not None), default=2**62)
        until = min([until, *(one.window.bounds(now_us)[1] or 2**62 for one in self._compiled)])
        self._cache[key] = (since, until, matched)
        return matched

    def _match(self, scope: Scope, own: dict[str, str], units: tuple[str, ...], now_us: int) -> tuple[Matched, ...]:
        found: dict[str, Matched] = {}
        levels = [({**tags, **own}, tags is scope.path[-1]) for tags in reversed(scope.path)]
        for one in (*self._scoped(scope), *self._compiled):
            if one.limit.unit not in units:
                continue
            for tags, leaf in levels:
                rule = one.rule(tags, now_us, leaf=leaf)
                if rule is not None:
                    found.setdefault(rule.key, Matched(one.budget, rule))
        return tuple(found.values())

    def check_limit(self, limit: str) -> None:
        """Raise PolicyError for a limit that a scope cannot be opened with."""
        parse_limit(Budget("scope", limit), self.rates)

    def fresh_accounts(self, now_us: int) -> list[Account]:
        """The accounts, as yet unused, of the budgets that have one account for all calls."""
        rules = [one.account_rule({}, now_us) for one in self._compiled if not one.per]
        return [Account(rule, level=rule.limit if rule.kind == "refill" else 0, at_us=now_us) for rule in rules]

    def _scoped(self, scope: Scope) -> list[_Compiled]:
        """The budgets that scopes were opened with, innermost first; each holds for its own tags' values."""
        scoped = []
        for tags, limit in reversed(scope.limits):
            name = "scope " + " ".join(f"{tag}={value}" for tag, value in tags.items())
            exact = {tag: re.sub(r"([*?[])", r"[\1]", value) for tag, value in tags.items()}  # values, not patterns
            budget = Budget(name[:100], limit, match=exact, per=tuple(tags))
            scoped.append(_Compiled(budget, parse_limit(budget, self.rates)))
        return scoped
