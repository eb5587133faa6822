"""Budgets and their thresholds, as their owners write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, NamedTuple

from bursar.accounts import ACTIONS
from bursar.errors import InvalidInput, PolicyError, shown
from bursar.money import MAX_NANOS, NANOS_PER_USD, nanos
from bursar.windows import SECOND_US, window

UNITS = ("USD", "tokens", "requests", "calls", "failures", "slots")
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
class Threshold:
    """What happens when a budget reaches a share of its limit.

    `at`: the share, "1%" to "100%". `action`, from the mildest to the strictest: "notify" tells the owner; "downgrade" sends
    calls of a model in `models` to the model that it names; "clamp" lets an answer have `max_output_tokens` at most; "throttle"
    lets calls through at `rate` ("6 requests/minute"); "ask" stops until an operator approves; "block" refuses; "kill" stops
    what runs too, streams in flight included. What a framework cannot carry out falls to the next stricter one. Milder actions
    go on when a stricter one begins. Raises PolicyError.
    """

    at: str
    action: str
    models: Mapping[str, str] | None = field(default=None, hash=False)
    max_output_tokens: int | None = None
    rate: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise _wrong(self, "action", self.action, f"Use one of {', '.join(ACTIONS)}")
        _ = self.share
        needed = {"downgrade": "models", "clamp": "max_output_tokens", "throttle": "rate"}
        for action, key in needed.items():
            value = getattr(self, key)
            if (action == self.action) != (value is not None):
                remedy = f"{action} needs it, and nothing else takes it"
                raise _wrong(self, key, value, remedy)
        texts = self.models is None or all(
            isinstance(one, str) and one and one.isprintable() for pair in self.models.items() for one in pair
        )
        if not texts or self.models == {}:
            raise _wrong(self, "models", self.models, 'Write it like {"gpt-4o": "gpt-4o-mini"}')
        if self.max_output_tokens is not None and (
            type(self.max_output_tokens) is not int or self.max_output_tokens < 1
        ):
            raise _wrong(self, "max_output_tokens", self.max_output_tokens, "Use a whole number from 1")
        if self.rate is None:
            return
        limit = parse_limit(Budget("rate", self.rate))
        if not limit.period_us or limit.unit not in self.rate:
            raise _wrong(self, "rate", self.rate, 'Write it like "6 requests/minute" or "1 USD/hour"')

    @property
    def share(self) -> Decimal:
        """`at` as a share of 1."""
        found = re.fullmatch(r"(\d{1,3}(?:\.\d{1,6})?)%", self.at, re.ASCII) if isinstance(self.at, str) else None
        if found is None or not 0 < Decimal(found[1]) <= 100:
            raise _wrong(self, "at", self.at, 'Write the share of the limit like "80%", up to "100%"')
        return Decimal(found[1]) / 100

    def definition(self) -> dict[str, Any]:
        """The threshold as plain data, without what is not set."""
        plain = asdict(self)
        return {key: value for key, value in plain.items() if value is not None}


def _wrong(threshold: Threshold, key: str, value: object, remedy: str) -> PolicyError:
    return PolicyError(f"A threshold at {shown(threshold.at)} has {key} = {shown(value)}. {remedy}.", key=key)


@dataclass(frozen=True)
class Budget:
    """A limit on a scope over a window.

    `limit`: "5 USD", "4.50 EUR" (at the rate given to Bursar), "200_000 tokens", "60 requests/minute", "20 calls" (of
    tools), "20 failures/minute" (of calls: beyond it no further one is sent, so retries cannot storm), "8 slots" (in
    flight). `window`: total, minute, hour, day, week, month, quarter, year (of `tz`), or "rolling 10m". `per`: one account
    for each value of these tags. `match`: only calls whose tags have these values (`*` and lists allowed). `estimate`:
    "learned", or "strict" for an upper bound. `on_exceed`: "refuse", "wait" or "wait 30s". `on_unreachable`: "closed"
    refuses calls while the store is out of reach, "open" lets them go and books them later. `mode`: "enforce", "shadow"
    (counts, never refuses, records what it would have done) or "off". `owner`: who is told and to be asked. `thresholds`:
    see Threshold; for amounts with a window or a total, not for rates and slots. Raises PolicyError.
    """

    name: str
    limit: str
    window: str = "total"
    tz: str = "UTC"
    per: Sequence[str] | str = ()
    match: Mapping[str, str | Sequence[str]] | None = field(default=None, hash=False)
    thresholds: Sequence[Threshold | Mapping[str, Any]] = ()
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
        object.__setattr__(self, "thresholds", _ladder(self, limit))

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

    @classmethod
    def of(cls, definition: Mapping[str, Any]) -> Budget:
        """The budget that a store has as plain data. Raises PolicyError where this Bursar does not know all that it says."""
        try:
            return cls(**definition)
        except TypeError as error:
            name = definition.get("name")
            raise PolicyError(
                f"The store's budget {shown(name)} cannot be read: {error}. Upgrade Bursar where a newer one has written it, "
                "else put it right with `bursar policy apply FILE`.",
                budget=name,
            ) from error

    def definition(self) -> dict[str, Any]:
        """The budget as plain data; `Budget.of(definition)` gives it back."""
        plain = asdict(self)
        plain["per"] = list(self.per)
        if self.match is not None:
            plain["match"] = {
                tag: value if isinstance(value, str) else list(value) for tag, value in self.match.items()
            }
        plain["thresholds"] = [one.definition() for one in self.ladder]
        return plain

    @property
    def ladder(self) -> tuple[Threshold, ...]:
        """The thresholds, in the order in which spending reaches them, milder actions first."""
        return self.thresholds  # type: ignore[return-value]  # made so at the start


def _bad(budget: Budget, key: str, value: object, remedy: str) -> PolicyError:
    return PolicyError(
        f"The budget {shown(budget.name)} has {key} = {shown(value)}. {remedy}.", budget=budget.name, key=key
    )


def _ladder(budget: Budget, limit: Limit) -> tuple[Threshold, ...]:
    given = budget.thresholds
    if isinstance(given, (str, Mapping)) or not isinstance(given, Sequence):
        raise _bad(budget, "thresholds", given, 'Give a list of Threshold("80%", "notify")')
    found = []
    for one in given:
        try:
            found.append(one if isinstance(one, Threshold) else Threshold(**one))
        except TypeError as error:
            raise _bad(budget, "thresholds", one, 'Write each like {"at": "80%", "action": "notify"}') from error
        except PolicyError as error:
            raise PolicyError(f"The budget {budget.name!r}: {error}", budget=budget.name, key="thresholds") from error
    if found and (limit.period_us or limit.unit == "slots"):
        raise _bad(budget, "thresholds", given, "Rates and slots have none: give them to a budget of an amount")
    found.sort(key=lambda one: (one.share, ACTIONS.index(one.action)))
    if len({(one.share, one.action) for one in found}) < len(found):
        raise _bad(budget, "thresholds", given, "Give each action once per share")
    return tuple(found)


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


def usd_rate(rates: Mapping[str, str], currency: str) -> Decimal:
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
            number *= usd_rate(rates, unit)
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
