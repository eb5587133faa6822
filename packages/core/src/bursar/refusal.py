"""Refusals: why a call may not be sent, how long waiting may help, and the error that says what to do."""

from __future__ import annotations

import json

from bursar.commands import Refused, Rejected
from bursar.errors import BudgetExceeded, BursarError, IdempotencyConflict, InvalidInput, ReservationEnded, StoreError
from bursar.money import dollar_text
from bursar.policy import Budget, Matched
from bursar.records import amount

POLL_S = 0.05  # how often the first of a queue looks, because other processes cannot wake it


def patience_s(refused: Refused, matched: tuple[Matched, ...]) -> float:
    """How long the call may wait: the shortest patience among the budgets that are short of room; 0 refuses at once."""
    budgets = {one.rule.key: one.budget for one in matched}
    short = [account.rule for account, asked in refused.lines if asked > account.available and account.rule.enforce]
    return min((budgets[rule.key].wait_s if rule.key in budgets else 0.0 for rule in short), default=0.0)


def pause_s(refused: Refused, now_us: int, deadline_us: int) -> float | None:
    """How long to wait before the next look; None when waiting cannot help before the deadline."""
    left_us = deadline_us - now_us
    if left_us <= 0:
        return None
    retry_us = refused.retry_after_us
    if refused.may_free:
        return min(POLL_S, left_us / 1e6)
    if retry_us is not None and retry_us <= left_us:
        return retry_us / 1e6
    return None


def exceeded(refused: Refused, budget: Budget, fit: int | None) -> BudgetExceeded:
    """The error of a refusal, with its facts, and the ways out in its last sentence. `fit`: a maximum output that would do."""
    account = refused.account
    rule = account.rule
    scope = json.loads(rule.scope)
    spent = account.spent if rule.kind != "refill" else max(0, rule.limit - account.level - account.reserved)
    retry_s = None if refused.retry_after_us is None else refused.retry_after_us / 1e6

    def show(count: int) -> str:
        return f"${dollar_text(count)}" if rule.unit == "USD" else f"{count} {rule.unit}"

    where = ", ".join(f"{tag}={value}" for tag, value in scope.items())
    remedy = f"Raise the budget's limit{f' (ask {budget.owner})' if budget.owner else ''}"
    if retry_s is not None:
        remedy += f", or try again in {retry_s:.3g} s"
    elif refused.may_free:
        remedy += ", or try again when calls in flight have ended"
    if fit is not None:
        remedy += f", or set the maximum output to at most {fit} tokens"
    return BudgetExceeded(
        f"The budget {rule.budget!r}{f' ({where})' if where else ''} refused the call: it needs {show(refused.asked)}, "
        f"available are {show(account.available)} of {show(rule.limit)} ({show(spent)} spent, "
        f"{show(account.reserved)} reserved). Nothing was sent. {remedy}.",
        budget=rule.budget,
        scope=scope,
        unit=rule.unit,
        limit=amount(rule.limit, rule.unit),
        spent=amount(spent, rule.unit),
        reserved=amount(account.reserved, rule.unit),
        available=amount(account.available, rule.unit),
        asked=amount(refused.asked, rule.unit),
        retry_after=retry_s,
        max_output_tokens=fit,
    )


def rejection(id: str, answer: Rejected) -> BursarError:
    """The error of a command that does not fit the state."""
    if answer.why == "conflict":
        return IdempotencyConflict(
            f"The id {id!r} was used before with other content (I6). Use a new id for a new call.", id=id
        )
    if answer.why == "ended":
        return ReservationEnded(
            f"The reservation {id!r} has ended already ({answer.detail}, I5). Book a further cost with charge().",
            id=id,
            ended=answer.detail,
        )
    if answer.why == "unknown":
        return InvalidInput(
            f"There is no reservation {id!r}. Reserve before you settle or release.", argument="id", value=id
        )
    if answer.why == "accounts":
        return StoreError(
            f"The budget {answer.detail!r} has as many accounts as it may. Raise max_accounts, or use a `per` with fewer "
            "values.",
            fault="accounts",
            budget=answer.detail,
        )
    return StoreError(f"The store rejected the command ({answer.why} {answer.detail}). Try again.", fault="locked")
