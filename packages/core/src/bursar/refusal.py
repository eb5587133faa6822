"""Refusals: why a call may not be sent, how long waiting may help, and the error that says what to do."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

from bursar.accounts import Account, Rule
from bursar.budget import Budget
from bursar.commands import Refused, Rejected
from bursar.decisions import Approval, Freeze
from bursar.errors import (
    ApprovalRequired,
    BudgetExceeded,
    BursarError,
    IdempotencyConflict,
    InvalidInput,
    OperatorRequired,
    ReservationEnded,
    Stopped,
    StoreError,
)
from bursar.money import dollar_text
from bursar.policy import Matched
from bursar.records import amount, spent_on
from bursar.sentry import Sign

POLL_S = 0.05  # how often the first of a queue looks, because other processes cannot wake it


def patience_s(refused: Refused, matched: tuple[Matched, ...]) -> float:
    """How long the call may wait: the shortest patience among the budgets that are short of room; 0 refuses at once."""
    budgets = {one.rule.key: one.budget for one in matched}
    if refused.mark is not None:
        rule = refused.account.rule
        return budgets[rule.key].wait_s if rule.marks[refused.mark].action == "block" and rule.key in budgets else 0.0
    short = {account.rule.key for account, asked in refused.lines if asked > account.available and account.rule.enforce}
    keys = short | {refused.account.rule.key}  # where others came before, it need not be short
    return min(budgets[key].wait_s if key in budgets else 0.0 for key in keys)


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
    account, rule = refused.account, refused.account.rule
    retry_s = None if refused.retry_after_us is None else refused.retry_after_us / 1e6
    fields = _fields(account, refused.asked, retry_s, fit)
    remedy = f"Raise the budget's limit{_ask_owner(budget)}"
    if retry_s is not None:
        remedy += f", or try again in {retry_s:.3g} s"
    elif refused.may_free:
        remedy += ", or try again when calls in flight have ended"
    if fit is not None:
        remedy += f", or set the maximum output to at most {fit} tokens"
    action = None if refused.mark is None else rule.marks[refused.mark].action
    if action == "kill":
        why = f"{_named(rule)} reached its kill threshold: {_show(account.spent, rule)} of {_show(rule.limit, rule)} are spent"
        return Stopped(f"{why}. Nothing was sent. {remedy}.", cause="killed", why=why, **fields)
    if action == "block":
        reason = f"it blocks calls from {_show(rule.marks[refused.mark or 0].at, rule)} on"
    else:
        reason = f"it needs {_show(refused.asked, rule)}"
        if refused.asked <= account.available:
            reason += ", calls that came before wait for what there is"
    return BudgetExceeded(
        f"{_named(rule)} refused the call: {reason}, {_balance(account)}. Nothing was sent. {remedy}.", **fields
    )


def reaching(facts: Mapping[str, Any]) -> str:
    """The sentence of a threshold's alert."""
    budget, unit, _, scope, _ = json.loads(facts["account"])
    rule = Rule(facts["account"], budget, json.dumps(scope), unit, "window", facts["limit"])
    share = 100 * facts["at"] / facts["limit"]
    shadow = "" if facts["enforce"] else " (shadow: nothing is done)"
    return (
        f"{_named(rule)} has reached {share:.4g}% of its limit: {_show(facts['spent'], rule)} of "
        f"{_show(facts['limit'], rule)} are spent; {facts['action']}{shadow}"
    )


def asking(account: Account, asked: int, budget: Budget, mark: int, id: str) -> ApprovalRequired:
    """The error of a threshold that asks."""
    return ApprovalRequired(
        f"{_named(account.rule)} asks before more is spent: {_balance(account)}. Nothing was sent. "
        f"Have an operator{_ask_owner(budget)} run `bursar approve {id}`, then try again.",
        id=id,
        **_fields(account, asked, None, None),
    )


def denied(account: Account, asked: int, budget: Budget, answered: Approval) -> BudgetExceeded:
    """The error of a question that an operator has answered with no."""
    return BudgetExceeded(
        f"{_named(account.rule)} refused the call: {answered.by or 'an operator'} denied more"
        f"{f' ({answered.why})' if answered.why else ''}, {_balance(account)}. Nothing was sent. "
        f"Raise the budget's limit{_ask_owner(budget)}.",
        **_fields(account, asked, None, None),
    )


def stopped(freeze: Freeze) -> Stopped:
    """The error of a switch that is thrown."""
    if freeze.account is None:
        scope, budget = dict(freeze.tags or {}), ""
    else:
        budget, _, _, scope, _ = json.loads(freeze.account)
    where = ", ".join(f"{tag}={value}" for tag, value in scope.items()) or "everything"
    by = f" by {freeze.by}" if freeze.by else ""
    return Stopped(
        f"{where} was stopped ({freeze.cause}){by}{f': {freeze.why}' if freeze.why else ''}. Nothing further was sent. "
        f"Have an operator run `bursar resume {shlex.quote(freeze.name)}` when the cause is gone.",
        cause=freeze.cause,
        why=freeze.why,
        budget=budget,
        scope=scope,
        unit="",
        **dict.fromkeys(("limit", "spent", "reserved", "available", "asked"), Decimal(0)),
        retry_after=None,
        max_output_tokens=None,
    )


def found(sign: Sign, run: str, *, id: str | None = None) -> BudgetExceeded:
    """The error of what a detector found in a run; with the `id` of a question where an operator may let it go on."""
    facts = {
        "budget": "",
        "scope": {"run": run},
        "unit": "",
        **dict.fromkeys(("limit", "spent", "reserved", "available", "asked"), Decimal(0)),
        "retry_after": sign.wait_us / 1e6 or None,
        "max_output_tokens": None,
    }
    if id is not None:
        return ApprovalRequired(
            f"The run {run!r} was held up ({sign.name}): {sign.why} Nothing was sent. "
            f"Have an operator run `bursar approve {id}`, then try again.",
            id=id,
            **facts,
        )
    return Stopped(
        f"The run {run!r} was stopped ({sign.name}): {sign.why} Nothing was sent.",
        cause=sign.name,
        why=sign.why,
        **facts,
    )


def run_account(run: str, detector: str) -> str:
    """What a question about a run is about, in the form of an account's key."""
    return json.dumps([f"detector {detector}", "USD", "", {"run": run}, 0], ensure_ascii=False)


def _fields(account: Account, asked: int, retry_s: float | None, fit: int | None) -> dict[str, Any]:
    rule = account.rule
    counts = {
        "limit": rule.limit,
        "spent": spent_on(account),
        "reserved": account.reserved,
        "available": account.available,
        "asked": asked,
    }
    return {
        "budget": rule.budget,
        "scope": json.loads(rule.scope),
        "unit": rule.unit,
        **{name: amount(count, rule.unit) for name, count in counts.items()},
        "retry_after": retry_s,
        "max_output_tokens": fit,
    }


def _show(count: int, rule: Rule) -> str:
    return f"${dollar_text(count)}" if rule.unit == "USD" else f"{count} {rule.unit}"


def _named(rule: Rule) -> str:
    where = ", ".join(f"{tag}={value}" for tag, value in json.loads(rule.scope).items())
    return f"The budget {rule.budget!r}{f' ({where})' if where else ''}"


def _balance(account: Account) -> str:
    rule = account.rule
    return (
        f"available are {_show(account.available, rule)} of {_show(rule.limit, rule)} "
        f"({_show(spent_on(account), rule)} spent, {_show(account.reserved, rule)} reserved)"
    )


def _ask_owner(budget: Budget) -> str:
    return f" (ask {budget.owner})" if budget.owner else ""


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
    if answer.why == "operator":
        return OperatorRequired(
            f"Releasing the expired {id!r} needs the operator's signature. "
            f"Run `bursar release {shlex.quote(id)}` with the operator's key.",
            kind="release",
            name=id,
        )
    if answer.why == "accounts":
        return StoreError(
            f"The budget {answer.detail!r} has as many accounts as it may. Retire old ones (bursar prune), raise max_accounts, or "
            "use a `per` with fewer values.",
            fault="accounts",
            budget=answer.detail,
        )
    return StoreError(f"The store rejected the command ({answer.why} {answer.detail}). Try again.", fault="locked")
