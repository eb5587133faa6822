"""Advice on a policy that is valid: what stands in it and can never do what its author may expect."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from bursar.budget import Budget, parse_limit
from bursar.detect import Detectors
from bursar.errors import PolicyError
from bursar.policy_file.file import PolicyFile
from bursar.stores import public_url

# Windows that a window of this kind always lies in, of the same time zone; a week may lie in two months.
_WITHIN = {
    "minute": ("hour", "day", "week", "month", "quarter", "year", "total"),
    "hour": ("day", "week", "month", "quarter", "year", "total"),
    "day": ("week", "month", "quarter", "year", "total"),
    "week": ("total",),
    "month": ("quarter", "year", "total"),
    "quarter": ("year", "total"),
    "year": ("total",),
}


def advice(policy: PolicyFile, *, has_operator: bool) -> list[str]:
    """Sentences for the author. `has_operator`: whether the policy's store knows an operator, who alone can approve."""
    budgets = [budget for budget in policy.make_budgets() if budget.mode != "off"]
    said = [line for budget in budgets for line in _about(budget, has_operator=has_operator)]
    for budget in budgets:
        stricter = next((one for one in budgets if one is not budget and _hides(one, budget, policy.rates)), None)
        if stricter is not None:
            said.append(
                f"The budget {budget.name!r} can never refuse a call: {stricter.name!r} counts at least the same calls and is "
                "used up no later. Remove one of them."
            )
    if not has_operator:
        said += _asking_detectors(policy)
    if public_url(policy.store) != policy.store:
        said.append(
            "The store's URL holds a password. Put the URL into the environment's BURSAR_STORE, or the password into ~/.pgpass."
        )
    try:
        policy.make_alerts()
    except PolicyError as error:  # the secrets may be there where the policy is used, and not here
        said.append(str(error))
    return said


def _about(budget: Budget, *, has_operator: bool) -> Iterator[str]:
    actions = {one.action for one in budget.ladder}
    if "ask" in actions and not has_operator and budget.mode == "enforce":
        yield (
            f"The budget {budget.name!r} asks, but its store has no operator who could approve. "
            "Run `bursar operator init`."
        )
    if budget.mode == "shadow" and actions - {"notify"}:
        acting = ", ".join(one.action for one in budget.ladder if one.action != "notify")
        yield (
            f"The budget {budget.name!r} is in shadow mode: its thresholds ({acting}) are only told. "
            'Set mode = "enforce" to have them act.'
        )


def _asking_detectors(policy: PolicyFile) -> list[str]:
    if isinstance(policy.detectors, str):
        return []
    settings = policy.detectors.make()
    asking = [one.name for one in fields(Detectors) if getattr(settings, one.name) == "ask"]
    if not asking:
        return []
    return [
        f"The detectors {', '.join(asking)} ask, but the store has no operator who could approve. "
        "Run `bursar operator init`, or give them another action."
    ]


def _hides(stricter: Budget, budget: Budget, rates: dict[str, str]) -> bool:
    """Whether `stricter` refuses whatever `budget` would: it counts all of its calls, for as long, and allows no more."""
    small, large = parse_limit(stricter, rates), parse_limit(budget, rates)
    return (
        (small.unit, small.period_us) == (large.unit, large.period_us)
        and stricter.mode == budget.mode == "enforce"
        and (small.amount, stricter.name) < (large.amount, budget.name)
        and set(stricter.per) <= set(budget.per)
        and (not stricter.match or stricter.match == budget.match)
        and _lasts_as_long(stricter, budget)
    )


def _lasts_as_long(stricter: Budget, budget: Budget) -> bool:
    if stricter.window == budget.window:
        return stricter.tz == budget.tz or budget.window == "total"
    if budget.window.startswith("rolling"):
        return stricter.window == "total"
    return stricter.window in _WITHIN.get(budget.window, ()) and (
        stricter.tz == budget.tz or stricter.window == "total"
    )
