"""Settings: budgets, prices, detectors and alerts of one Bursar, checked together, so that they are taken together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from bursar.budget import Budget, parse_limit
from bursar.detect import Detectors
from bursar.errors import InvalidInput, PolicyError
from bursar.money import dollar_text
from bursar.policy import Policy
from bursar.prices import PriceBook
from bursar.scope import check_tags
from bursar.sentry import Sentry

if TYPE_CHECKING:
    from bursar.alerts import Alerts

DEFAULT = "(default)"  # the name of the budget that a default_limit makes


@dataclass(frozen=True, slots=True)
class Settings:
    """What calls are held against. `names`: the budgets of this process (None: all that the store has)."""

    policy: Policy
    names: tuple[str, ...] | None
    book: PriceBook
    detectors: Detectors | Literal["report", "off"]
    require: tuple[str, ...]
    alerts: Alerts | None

    @classmethod
    def of(
        cls,
        budgets: Iterable[Budget] | None = None,
        *,
        prices: PriceBook | None = None,
        rates: Mapping[str, str] | None = None,
        detectors: Detectors | Literal["report", "off"] = "report",
        require: Sequence[str] = (),
        default_limit: str | None = None,
        alerts: Alerts | None = None,
    ) -> Settings:
        """Settings of what `Bursar` is given. Raises PolicyError, InvalidInput."""
        default = None if default_limit is None else _default(default_limit)
        given = Policy(budgets or (), rates=rates, default=default)
        policy = Policy([_in_dollars(one, given.rates) for one in given.budgets], rates=rates, default=default)
        names = None if budgets is None else tuple(budget.name for budget in policy.budgets)
        return cls(policy, names, prices or PriceBook.packaged(), detectors, _tag_names(require), alerts)

    def definitions(self) -> dict[str, dict[str, Any]]:
        """The budgets as the store is to have them."""
        return {budget.name: budget.definition() for budget in self.policy.budgets}

    def sentry(self) -> Sentry:
        """A new sentry that watches by these settings."""
        if isinstance(self.detectors, str):
            return Sentry(None if self.detectors == "off" else Detectors(), require=self.require)
        return Sentry(self.detectors, acts=True, require=self.require)


def _in_dollars(budget: Budget, rates: Mapping[str, str]) -> Budget:
    """The budget with its limit in US dollars, as others read it from the store, who know no rates or other ones."""
    limit = parse_limit(budget, rates)
    if limit.unit != "USD" or "USD" in budget.limit:
        return budget
    _, per, period = budget.limit.partition("/")
    return replace(budget, limit=f"{dollar_text(limit.amount)} USD{per}{period}")


def _default(limit: str) -> Budget:
    """The budget of runs that no other limits."""
    try:
        default = Budget(DEFAULT, limit, per="run")
    except PolicyError as error:
        raise PolicyError(str(error), key="default_limit") from error
    found = parse_limit(default)
    if found.period_us or found.unit in ("slots", "failures"):
        raise PolicyError(
            f'default_limit = {limit!r} does not bound what a run spends. Write it like "1 USD".', key="default_limit"
        )
    return default


def _tag_names(names: Sequence[str]) -> tuple[str, ...]:
    found = (names,) if isinstance(names, str) else tuple(names)
    try:
        check_tags(dict.fromkeys(found, "x"))
    except InvalidInput as error:
        raise InvalidInput(str(error), argument="require") from error
    return found
